"""What can be named on the command line, and where it lives. Nothing is imported before it is asked for."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal

from diffalign.errors import InputError, nearest

Kind = Literal["methods", "rewards", "pipelines"]


@dataclass(frozen=True)
class Entry:
    """A row of a table: `target` is module:name, `preset` the fields that its name stands for, `extra` a pip extra it needs.

    `settings` are of the loop, over the method's own `defaults`.
    """

    target: str
    summary: str
    facts: str = ""
    preset: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    extra: str | None = None
    package: str | None = None


# The public configurations of Stable Diffusion 3.5 (its rounds of 48 prompts x 24 samples, 2 updates) and FLUX, on DDPO's loop
FLOW_GRPO = {
    "inference_steps": 10, "eta": 0.7, "batches": 6, "samples": 24, "updates": 2, "advantage": "group_global", "kl_weight": 0.04,
    "kl_unit": "time",
}  # fmt: skip
FLOW_GRPO_FAST = {**FLOW_GRPO, "random_steps": 2, "window": "drawn", "eta": 0.8, "clip": 1e-5, "kl_weight": 0.0}
FLOW_GRPO_SETTINGS = {"guidance_scale": 4.5, "sample_steps": 40, "lora": {"rank": 32, "alpha": 64}}
DANCE_GRPO = {
    "inference_steps": 16, "eta": 0.3, "noise": "constant", "same_noise": True, "batches": 2, "samples": 12, "updates": 3,
    "advantage": "group", "fraction": 0.6,
}  # fmt: skip
DANCE_GRPO_SETTINGS = {"learning_rate": 1e-5, "max_grad_norm": 1.0, "guidance_scale": 3.5}
# The paper's loss: raw rewards, its own estimator, alpha = beta = 1, on the few steps of a speech model
DLPO = {
    "estimator": "sf", "updates": 1, "advantage": "none", "denoising_weight": 1.0, "inference_steps": 10, "batches": 4,
}  # fmt: skip
DLPO_SETTINGS = {"guidance_scale": 1.0, "learning_rate": 1e-5}

METHODS = {
    "draft": Entry("diffalign.methods.draft:DRaFT", "Reward gradient through the last K sampling steps.", "differentiable reward"),
    "draft-lv": Entry(
        "diffalign.methods.draft:DRaFT", "DRaFT-1 averaged over re-noised copies of the sample.", "differentiable reward", {"n": 2}
    ),
    "ddpo": Entry("diffalign.methods.ddpo:DDPO", "Clipped policy gradient on the denoising steps.", "any reward"),
    "flow-grpo": Entry(
        "diffalign.methods.ddpo:DDPO",
        "DDPO among groups of samples, with a KL, on a flow's SDE.",
        "any reward",
        FLOW_GRPO,
        FLOW_GRPO_SETTINGS,
    ),
    "flow-grpo-fast": Entry(
        "diffalign.methods.ddpo:DDPO", "The same on two random steps of a sample.", "any reward", FLOW_GRPO_FAST, FLOW_GRPO_SETTINGS
    ),
    "dance-grpo": Entry(
        "diffalign.methods.ddpo:DDPO",
        "Groups that start from one noise, on an SDE of constant noise.",
        "any reward",
        DANCE_GRPO,
        DANCE_GRPO_SETTINGS,
    ),
    "dlpo": Entry(
        "diffalign.methods.ddpo:DDPO",
        "Policy gradient on the reward less the denoising error of the own sample, for speech.",
        "any reward",
        DLPO,
        DLPO_SETTINGS,
    ),
    "dpok": Entry("diffalign.methods.dpok:DPOK", "Policy gradient with a value baseline and a KL to the base model.", "any reward"),
    "prdp": Entry("diffalign.methods.prdp:PRDP", "Regression of log-ratios on reward differences, with proximal updates.", "any reward"),
    "d3po": Entry("diffalign.methods.d3po:D3PO", "Preferences between two samples, on every denoising step.", "any reward"),
    "rwr": Entry("diffalign.methods.rwr:RWR", "Denoising loss on own samples, weighted by the reward.", "any reward"),
    "raft": Entry("diffalign.methods.rwr:RWR", "Denoising loss on the best of n own samples.", "any reward", {"weighting": "best"}),
    "diffusion-dpo": Entry("diffalign.methods.diffusion_dpo:DiffusionDPO", "Preference pairs, on the denoising loss.", "pairs"),
    "kto": Entry("diffalign.methods.kto:KTO", "Liked and disliked samples, unpaired, on the denoising loss.", "labels or pairs"),
    "mapo": Entry("diffalign.methods.mapo:MaPO", "Preference pairs without a reference model.", "pairs"),
    "hive": Entry("diffalign.methods.hive:HIVE", "Edits of pictures, weighted by their rewards or told how good they are.", "edits"),
    "refl": Entry("diffalign.methods.refl:ReFL", "Reward gradient on a one-step prediction.", "differentiable reward"),
    "alignprop": Entry("diffalign.methods.alignprop:AlignProp", "Reward gradient through randomly many steps.", "differentiable reward"),
}
DIGITS = {"model": "digits", "sample_rate": 8000}
REWARDS = {
    "hps-v2": Entry("diffalign.rewards.hps:HPS", "Human Preference Score v2, a CLIP ViT-H-14.", "differentiable"),
    "hps-v2.1": Entry("diffalign.rewards.hps:HPS", "Human Preference Score v2.1.", "differentiable", {"version": "v2.1"}),
    "image-reward": Entry("diffalign.rewards.image_reward:ImageReward", "ImageReward, a BLIP.", "differentiable"),
    "pickscore": Entry("diffalign.rewards.pickscore:PickScore", "PickScore, a CLIP ViT-H-14.", "differentiable"),
    "clip": Entry("diffalign.rewards.clip:CLIP", "Cosine of a CLIP or SigLIP model of the Hub.", "differentiable"),
    "open-clip": Entry(
        "diffalign.rewards.clip:OpenCLIP", "Cosine of a model of open_clip.", "differentiable", extra="open-clip", package="open_clip"
    ),
    "aesthetic": Entry("diffalign.rewards.aesthetic:Aesthetic", "LAION's aesthetic predictor; reads no prompt.", "differentiable"),
    "trained": Entry("diffalign.rewards.trained:Trained", "One of your own, made by diffalign reward train.", "differentiable"),
    "shapes-clip": Entry("diffalign.rewards.shapes:ShapesCLIP", "Tiny CLIP trained on shapes.", "differentiable"),
    "shapes-checker": Entry("diffalign.rewards.shapes:ShapesChecker", "Share of the caption's attributes that are right.", "score"),
    "shapes-all-right": Entry(
        "diffalign.rewards.shapes:ShapesChecker", "1 where all the caption's attributes are right.", "score", {"strict": True}
    ),
    "shapes-edit-checker": Entry("diffalign.rewards.shapes:ShapesEditChecker", "Of an edit: what was asked, and what was kept.", "score"),
    "shapes-edit-all-right": Entry(
        "diffalign.rewards.shapes:ShapesEditChecker", "1 where all of an edit is right.", "score", {"strict": True}
    ),
    "shapes-edit-clip": Entry("diffalign.rewards.shapes:ShapesEditCLIP", "Tiny CLIP on the caption after an edit.", "differentiable"),
    "compose": Entry("diffalign.rewards.compose:Compose", "Several rewards in one: their sum, the worst, or the product.", "as its parts"),
    "jpeg-compressibility": Entry("diffalign.rewards.jpeg:JPEGCompressibility", "Minus the kB of a JPEG at quality 95.", "score"),
    "jpeg-incompressibility": Entry("diffalign.rewards.jpeg:JPEGCompressibility", "The kB of a JPEG at quality 95.", "score", {"sign": 1}),
    "loudness": Entry("diffalign.rewards.sound:Loudness", "Of sound: how near its level is to a target.", "differentiable"),
    "silence": Entry("diffalign.rewards.sound:Silence", "Of sound: minus the share that is silent.", "score"),
    "ctc": Entry("diffalign.rewards.speech:CTC", "Likelihood of the transcript under a CTC recogniser.", "differentiable"),
    "wer": Entry("diffalign.rewards.speech:ErrorRate", "Minus the word error rate under Whisper or a CTC recogniser.", "score"),
    "cer": Entry("diffalign.rewards.speech:ErrorRate", "Minus the character error rate.", "score", {"unit": "character"}),
    "digits-ctc": Entry(
        "diffalign.rewards.speech:CTC", "Likelihood of the transcript, with the embedded recogniser.", "differentiable", DIGITS
    ),
    "digits-wer": Entry("diffalign.rewards.speech:ErrorRate", "Minus the word error rate, with the embedded one.", "score", DIGITS),
    "digits-quality": Entry(
        "diffalign.rewards.quality:Quality", "How clean speech is, by the embedded judge; reads no prompt.", "differentiable"
    ),
    "mos": Entry("diffalign.rewards.mos:MOS", "UTMOS: the naturalness of speech, about 1 to 5; reads no prompt.", "differentiable"),
    "clap": Entry("diffalign.rewards.clap:CLAP", "Of sound: cosine with its description under CLAP.", "differentiable"),
    "si-sdr": Entry("diffalign.rewards.compared:SISDR", "Of sound: dB of signal over distortion beside a recording.", "differentiable"),
    "stoi": Entry(
        "diffalign.rewards.compared:Compared",
        "Of speech: intelligibility beside a recording.",
        "score",
        extra="speech-metrics",
        package="pystoi",
    ),
    "pesq": Entry(
        "diffalign.rewards.compared:Compared",
        "Of speech: quality beside a recording.",
        "score",
        {"measure": "pesq"},
        extra="speech-metrics",
        package="pesq",
    ),
    "speaker-similarity": Entry(
        "diffalign.rewards.voices:SpeakerSimilarity", "Of speech: cosine of the speaker's vector with a recording's.", "differentiable"
    ),
    "speech-bert-score": Entry(
        "diffalign.rewards.voices:SpeechBERTScore", "Of speech: BERTScore between its frames and a recording's.", "differentiable"
    ),
    "dnsmos": Entry(
        "diffalign.rewards.predicted:DNSMOS",
        "Of speech: DNSMOS, the quality that people would hear, 1 to 5.",
        "score",
        extra="speech-metrics",
        package="torchmetrics",
    ),
    "nisqa": Entry(
        "diffalign.rewards.predicted:NISQA",
        "Of speech: NISQA, the quality that people would hear, 1 to 5.",
        "score",
        extra="speech-metrics",
        package="torchmetrics",
    ),
    "remote": Entry("diffalign.rewards.remote:Remote", "What a reward server says: diffalign serve, or one of yours.", "score"),
    "judge": Entry("diffalign.rewards.judge:Judge", "A vision-language model's rating, over an OpenAI-compatible endpoint.", "score"),
}
PIPELINES = {
    "StableDiffusionPipeline": Entry("diffalign.pipelines.stable_diffusion:StableDiffusion", "Stable Diffusion 1.x and 2.x.", "image"),
    "StableDiffusionXLPipeline": Entry("diffalign.pipelines.sdxl:StableDiffusionXL", "Stable Diffusion XL, the base model.", "image"),
    "StableDiffusionInstructPix2PixPipeline": Entry(
        "diffalign.pipelines.instruct_pix2pix:InstructPix2Pix", "InstructPix2Pix: edits a picture as told.", "image"
    ),
    "StableDiffusionXLInstructPix2PixPipeline": Entry(
        "diffalign.pipelines.instruct_pix2pix:InstructPix2PixXL", "InstructPix2Pix on SDXL.", "image"
    ),
    "StableDiffusionInpaintPipeline": Entry(
        "diffalign.pipelines.inpaint:Inpaint", "Inpainting: fills what a mask leaves out (UNets with 9 channels).", "image"
    ),
    "StableDiffusionXLInpaintPipeline": Entry("diffalign.pipelines.inpaint:InpaintXL", "Inpainting on SDXL.", "image"),
    "StableDiffusion3Pipeline": Entry("diffalign.pipelines.sd3:StableDiffusion3", "Stable Diffusion 3 and 3.5.", "image"),
    "FluxPipeline": Entry("diffalign.pipelines.flux:Flux", "FLUX.1, text to image.", "image"),
    "ZImagePipeline": Entry("diffalign.pipelines.z_image:ZImage", "Z-Image and Z-Image-Turbo.", "image"),
    "AudioLDM2Pipeline": Entry("diffalign.pipelines.audioldm2:AudioLDM2", "AudioLDM 2: text to sound; with VITS, speech.", "audio"),
    "LongCatAudioDiTPipeline": Entry("diffalign.pipelines.longcat_audio:LongCatAudio", "LongCat-AudioDiT: speech.", "audio"),
}
UNSUITED = {
    "StableDiffusionXLImg2ImgPipeline": "SDXL's refiner works on pictures of the base model: align that one (StableDiffusionXLPipeline), "
    "and refine its pictures as before.",
}
PROMPTS = {"animals": Path(__file__).parent / "assets" / "prompts" / "animals.txt"}  # the 45 of DDPO (arXiv 2305.13301)
MODELS = {name: Path(__file__).parent / "assets" / name for name in ("shapes", "shapes-edit", "shapes-flow", "digits")}
TABLES: dict[Kind, dict[str, Entry]] = {"methods": METHODS, "rewards": REWARDS, "pipelines": PIPELINES}


def table(kind: Kind) -> dict[str, Entry]:
    """The built-in rows and those of installed packages (entry points `diffalign.methods`, `.rewards`, `.pipelines`)."""
    return {**_of_packages(kind), **TABLES[kind]}


@functools.cache  # reads a file of every package that is installed, and a command asks some thirty times
def _of_packages(kind: Kind) -> dict[str, Entry]:
    return {
        point.name: Entry(point.value, f"From {point.dist.name if point.dist else 'an installed package'}.")
        for point in entry_points(group=f"diffalign.{kind}")
    }


def locate(source: str) -> Path | None:
    """The folder of a model's name or path, or None for a Hub id; raises InputError for what can be neither, without a network."""
    path = MODELS.get(source, Path(source).expanduser())
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise InputError(f"{path} holds no model_index.json: give a folder in diffusers layout, as save_pretrained writes it.")
        return path
    if path.exists() or source.startswith((".", "/", "~")) or source.count("/") != 1:
        close = "" if "/" in source else f" {nearest(source, MODELS)}"
        raise InputError(f"There is no model '{source}': give shapes, a folder in diffusers layout, or a Hub id user/model.{close}")
    return None


def model_folder(name: str) -> Path:
    """The folder of an embedded model, which plain diffusers' `from_pretrained` loads; raises InputError for another name."""
    if name not in MODELS:
        raise InputError(f"No model '{name}' comes with diffalign. {nearest(name, MODELS)}")
    return MODELS[name]


def installed(entry: Entry) -> bool:
    return entry.package is None or importlib.util.find_spec(entry.package) is not None


def trained_folder(name: str) -> Path | None:
    """The folder that a reward's name is, one that `diffalign reward train` has made; None for other names."""
    path = Path(name).expanduser()
    return path if name and name not in table("rewards") and (path / "config.json").is_file() else None


def names_reward(word: str) -> bool:
    """Whether the word is a reward's name, as far as its form says."""
    return word in table("rewards") or ".py:" in word or trained_folder(word) is not None


def find(kind: Kind, name: str) -> tuple[Any, dict[str, Any]]:
    """The class or function that `name` stands for and its preset fields: a row's name, `path/to/file.py:Name`, or the folder of a trained
    reward.

    Raises InputError for an unknown name (with the nearest), a missing extra (with the pip command), or a file that does not load.
    """
    if ".py:" in name:
        file, _, attribute = name.rpartition(":")
        found = _from_file(Path(file).expanduser().resolve(), attribute)
        lacking = [part for part in ("needs", "defaults", "losses") if kind == "methods" and part not in dir(found)]
        if lacking:
            raise InputError(f"{name} is no method: it lacks {', '.join(lacking)}. See docs/design.md, and diffalign/methods/draft.py.")
        return found, {}
    rows = table(kind)
    if kind == "rewards" and (folder := trained_folder(name)):
        return find("rewards", "trained")[0], {"checkpoint": folder}
    if name not in rows:
        raise InputError(f"There is no {kind[:-1]} '{name}'. {nearest(name, rows)}")
    entry = rows[name]
    if not installed(entry):
        raise InputError(f"The {kind[:-1]} '{name}' needs a package that is not installed: pip install 'diffalign[{entry.extra}]'")
    module, _, attribute = entry.target.partition(":")
    return getattr(importlib.import_module(module), attribute), dict(entry.preset)


def defaults_of(method: str) -> dict[str, Any]:
    """The settings of the loop that come with a method: its class's, and over them its row's."""
    settings = {} if ".py:" in method else table("methods")[method].settings
    return {**find("methods", method)[0].defaults, **settings}


@functools.cache
def _from_file(path: Path, attribute: str) -> Any:
    if not path.is_file():
        raise InputError(f"{path} does not exist. A plug-in is named as path/to/file.py:Name.")
    spec = importlib.util.spec_from_file_location(f"diffalign_plugin_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise InputError(f"{path} does not load: {type(error).__name__}: {error}") from error
    if attribute not in vars(module):
        names = [n for n, v in vars(module).items() if not n.startswith("_") and callable(v)]
        raise InputError(f"{path} holds no '{attribute}'. {nearest(attribute, names) if names else 'It defines nothing.'}")
    return vars(module)[attribute]
