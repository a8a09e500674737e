"""What `diffalign pairs` is told: its fields and flags, and what a model or a run brings along of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import docstring_parser
from jsonargparse import ArgumentParser, Namespace

from diffalign import registry
from diffalign.composing import make_reward
from diffalign.config import model_preset
from diffalign.contract import CheckedReward, as_reward, name_of
from diffalign.errors import InputError
from diffalign.flags import parameters
from diffalign.run import Run
from diffalign.settings import LIVE, Settings

# Which machine made the samples, and how: their pictures are the same but for rounding
OF_THE_MACHINE = ("device", "vae_batch_size", "offload", "attention", "channels_last")


@dataclass(frozen=True)
class Making:
    """Making pairs."""

    pipeline: str = "shapes"
    """Model whose samples are compared: shapes (embedded), a Hub id, a folder in diffusers layout, or the folder of a run."""
    revision: str | None = None
    """Revision of a Hub model."""
    prompts: str | None = None
    """Prompts: a .txt or .jsonl file, shapes, or hf:user/dataset/file.txt."""
    pairs: int | None = None
    """Stop after so many pairs, going through the prompts again and again; by default once through the prompts."""
    samples: int = 2
    """Samples of each prompt: the best and the worst are a pair."""
    sample_steps: int = 50
    """Denoising steps of a sample."""
    trajectories: bool = False
    """Keep each sample's states beside its picture, and take random steps (eta 1): D3PO trains on these once people have judged."""
    random_steps: int | None = None
    """With trajectories: only so many of the first steps are random; by default all are."""
    batch_size: int = 8
    """Samples of one forward."""
    guidance_scale: float = 7.5
    """Classifier-free guidance; 1 for none."""
    true_cfg_scale: float = 1.0
    """Classifier-free guidance of models that are told guidance_scale (FLUX); 1 for none."""
    max_sequence_length: int | None = None
    """Tokens of the long text encoder of Stable Diffusion 3, FLUX, Z-Image and the pipelines of sound; by default the pipeline's own."""
    negative_prompt: str | None = None
    """Prompt of the unconditional branch; by default the pipeline's own: the empty one, or none at all for SDXL."""
    height: int | None = None
    """Height of the pictures in pixels; by default the model's own."""
    width: int | None = None
    """Width of the pictures in pixels; by default the model's own."""
    audio_seconds: float | None = None
    """Length of the sounds; by default the model's own (AudioLDM 2), or 5 (LongCat-AudioDiT)."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the network."""
    vae_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the VAE. Where its configuration says that it overflows in fp16 (force_upcast), fp16 is fp32, as in diffusers."""
    vae_batch_size: int | None = None
    """Pictures that the VAE decodes at a time; by default all of a forward."""
    offload: bool = False
    """Text encoders and VAE are on the GPU only while they work."""
    attention: Literal["sdpa", "xformers", "sliced", "eager"] = "sdpa"
    """sdpa: torch's own; xformers: its package's, on CUDA. Of UNets, sliced: one head at a time; eager: plain matrix products."""
    channels_last: bool = False
    """Convolutions of the UNet and the VAE with the channels innermost in memory."""
    device: str | None = None
    """By default cuda, mps or cpu, the first there is."""
    seed: int = 0
    """Of the noise."""

    def __post_init__(self) -> None:
        for name, least in {"samples": 2, "sample_steps": 1, "batch_size": 1}.items():
            if vars(self)[name] < least:
                raise InputError(f"{name} is {vars(self)[name]}: give {least} or more.")
        if self.random_steps is not None and not (self.trajectories and 1 <= self.random_steps <= self.sample_steps):
            raise InputError(f"random_steps is {self.random_steps}: give 1 to {self.sample_steps} (sample_steps), and --trajectories.")
        if self.pairs is not None and self.pairs < 1:
            raise InputError(f"pairs is {self.pairs}: give 1 or more.")
        if not 0 <= self.seed < 2**31:
            raise InputError(f"seed is {self.seed}: give a whole number from 0 to 2147483647.")


def build_parser(pipeline: str, reward: str | None) -> ArgumentParser:
    """The parser of `diffalign pairs`: the fields of `Making` and of the named reward, with the model's or the run's defaults."""
    preset = preset_of(pipeline)
    named = preset.pop("reward", None) or {}
    reward = reward or named.get("name")
    found, reward_fields = registry.find("rewards", reward) if reward else (None, {})
    parser = ArgumentParser(prog="diffalign pairs", exit_on_error=False, usage="diffalign pairs --reward NAME --output DIR [options]")
    parser.add_argument("--output", type=str, required=True, metavar="DIR", help="Folder of the pairs; the same command again goes on.")
    parser.add_class_arguments(Making, None)
    parser.add_argument("--reward.name", type=str | None, default=reward, help="See: diffalign list rewards.")
    for name, (kind, default, about) in parameters(found).items():
        parser.add_argument(f"--reward.{name}", type=kind, default=default, help=about)
    defaults = {**preset, **{f"reward.{key}": value for key, value in {**reward_fields, **_only(named, reward)}.items()}}
    parser.set_defaults(defaults)
    about = {p.arg_name: " ".join((p.description or "").split()) for p in docstring_parser.parse_from_object(Making).params}
    for action in parser._actions:
        action.help = about.get(action.dest, action.help)
    return parser


def settle(parsed: Namespace, reward: Any = None) -> tuple[Making, CheckedReward, dict[str, Any], Path]:
    """(making, reward, the reward's fields, output) of parsed flags; `reward` is an object in the place of a name."""
    values: dict[str, Any] = parsed.as_dict()
    output, reward_fields = Path(values.pop("output")).expanduser(), values.pop("reward")
    name = reward_fields.pop("name")
    if reward is not None:
        checked, reward_fields = CheckedReward(as_reward(reward), name_of(reward)), {}
    elif name is None:
        raise InputError("pairs need a reward: --reward NAME. See: diffalign list rewards.")
    else:
        made, reward_fields = make_reward(name, reward_fields)
        checked = CheckedReward(made, name)
    checked.check_settled("diffalign pairs is none")
    return Making(**values), checked, reward_fields, output


def preset_of(pipeline: str) -> dict[str, Any]:
    """What a model or a run brings along: fields of `Making`, and `reward` as {"name": ...}."""
    if is_run(pipeline):
        run = Run.open(pipeline)
        known = {**run.config, "pipeline": pipeline, "sample_steps": run.plan.sample_steps}
        known = {key: value for key, value in known.items() if key not in OF_THE_MACHINE}
    else:
        if pipeline != LIVE:
            registry.locate(pipeline)
        known = model_preset(pipeline, "pairs")
    named = known.get("reward")
    named = {"name": named} if isinstance(named, str) else dict(named or {})
    own = {field.name for field in fields(Making)} - {"seed", "pairs", "samples"}
    return {**{key: value for key, value in known.items() if key in own}, "reward": {} if named.get("name") == LIVE else named}


def _only(named: Mapping[str, Any], reward: str | None) -> dict[str, Any]:
    """The fields of a run's reward, where it is the reward that is meant."""
    return {key: value for key, value in named.items() if key != "name"} if named.get("name") == reward else {}


def is_run(pipeline: str) -> bool:
    path = Path(pipeline).expanduser()
    return (path / "config.yaml").is_file() and not (path / "model_index.json").is_file()


def settings_of(making: Making) -> Settings:
    """What of a training's settings there is in making pairs, too."""
    shared = {field.name for field in fields(Settings)} & {field.name for field in fields(Making)}
    return Settings(**{name: vars(making)[name] for name in shared})
