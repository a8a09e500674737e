"""A dry run (`--tiny`): the same training with tiny random weights and few of everything, so that a configuration is known to run.

Pipelines and rewards are opened as their twins (`models.open_pipeline`, `CheckedReward.open`); here is what is left to be cut and made.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Generator

from diffalign import registry
from diffalign.config import Plan
from diffalign.console import say
from diffalign.data import PicturePrompt, Prompt, SpokenPrompt
from diffalign.errors import InputError
from diffalign.media import data_uri, to_pil
from diffalign.models import device_type
from diffalign.settings import Settings
from diffalign.sound import wav_bytes
from diffalign.types import Data, Modality, PromptField

MOST = {"steps": 2, "batch_size": 2, "accumulate": 2, "eval_size": 2, "eval_draws": 2, "warmup_steps": 1}  # of the settings
MOST_OF_METHOD = {"batches": 1, "samples": 2, "forwards": 1, "pretrain_batches": 1}
DENOISING, SHOWN = 10, 4  # denoising steps of the method, and of pictures and evaluation
NEVER = 1_000_000  # evaluations: random rewards fall by chance, and a dry run takes all of its steps
COUNTED = ("inference_steps", "random_steps", "k", "first", "last")  # what counts the method's denoising steps
TEXTS = [f"a {colour} {thing}" for colour in ("red", "blue", "grey") for thing in ("dog", "cat", "cow", "hen")]
FILES: dict[Data, str] = {"pairs": "pairs.jsonl", "labels": "pairs.jsonl", "pictures": "pictures.jsonl", "edits": "edits.jsonl"}


def cut(plan: Plan) -> Plan:
    """The plan with few of everything that takes time: steps, batches, samples, denoising steps, pictures, examples.

    Left out are the trackers, and what the twin cannot have, which is said: height and width, a length, a LoRA to continue. On a CPU it
    computes in fp32, which is said too. Everything else stays as it is.
    """
    s, fields = plan.settings, vars(plan.method)
    fewer: dict[str, Any] = {name: min(vars(s)[name], most) for name, most in MOST.items()}
    if device_type(s) == "cpu":
        for name in ("precision", "vae_precision"):
            if vars(s)[name] != "fp32":
                say(f"A CPU computes the dry run in fp32, in the place of {name} {vars(s)[name]}.")
        fewer |= {"precision": "fp32", "vae_precision": "fp32"}
    own = s.pipeline in registry.MODELS
    absent = {} if own else {"height": s.height, "width": s.width, "audio_seconds": s.audio_seconds, "lora.init": s.lora.init}
    if said := [f"{name} {value}" for name, value in absent.items() if value is not None]:
        say(f"The dry run leaves out {', '.join(said)}: its tiny model is of another size.")
    settings = replace(
        s,
        **fewer,
        sample_steps=min(plan.sample_steps, SHOWN),
        sample_every=MOST["steps"],
        data_limit=min(s.data_limit or len(TEXTS), len(TEXTS)),
        height=s.height if own else None,
        width=s.width if own else None,
        audio_seconds=s.audio_seconds if own else None,
        lora=s.lora if own else replace(s.lora, init=None),
        guard=replace(s.guard, size=MOST["batch_size"], patience=NEVER) if s.guard.rewards else s.guard,
        log=[],
    )
    smaller: dict[str, Any] = {name: min(fields[name], most) for name, most in MOST_OF_METHOD.items() if name in fields}
    steps = fields.get("inference_steps", 0)
    if steps > DENOISING:
        smaller |= {name: max(1, fields[name] * DENOISING // steps) for name in COUNTED if isinstance(fields.get(name), int)}
    method: Any = plan.method
    return replace(plan, settings=settings, method=replace(method, **smaller))


def in_words(settings: Settings) -> str:
    """One line for the person: what this run is."""
    own = settings.pipeline in registry.MODELS
    what = f"{settings.pipeline}" if own else f"random tiny weights in the place of {settings.pipeline}"
    names = {"prompts": settings.prompts, "held-out prompts": settings.eval_prompts, "data": settings.data}
    made_here = [f"{name} made up in the place of {source}" for name, source in names.items() if made(settings, source)]
    parts = [what, "rewards with random tiny weights", *made_here, f"{settings.steps} steps"]
    return f"A dry run (tiny): {', '.join(parts)}. It shows that the configuration runs; its numbers mean nothing."


def made(settings: Settings, source: str | None) -> bool:
    """Whether a dry run makes up what `source` names, prompts or data: what is on the Hub. A file that is missing is an error in it too."""
    return settings.tiny and source is not None and source.startswith("hf:")


def prompts(takes: Sequence[PromptField]) -> list[Prompt]:
    """Twelve prompts, with the pictures and masks, or transcripts, that a pipeline takes; always the same ones."""
    if "transcript" in takes:
        return [SpokenPrompt(text, text.rpartition(" ")[-1]) for text in TEXTS]
    if not takes:
        return list(TEXTS)
    rng = Generator().manual_seed(0)
    return [PicturePrompt(text, _picture(rng), _mask() if "mask" in takes else None) for text in TEXTS]


@contextmanager
def data(kind: Data, takes: Sequence[PromptField], made: Modality = "image") -> Iterator[str]:
    """A folder, while the block runs, with twelve examples of the kind on which a method trains, pictures or sounds; always the same ones.

    Raises InputError for trajectories, which a model must have sampled.
    """
    if kind not in FILES:
        raise InputError(f"A dry run makes up no {kind}: give a folder that is here, or leave --data out.")
    rng = Generator().manual_seed(1)
    with TemporaryDirectory(prefix="diffalign-tiny-") as folder:
        rows = [json.dumps(_row(kind, text, takes, made, rng)) for text in TEXTS]
        (Path(folder) / FILES[kind]).write_text("\n".join(rows))
        yield folder


def _row(kind: Data, text: str, takes: Sequence[PromptField], made: Modality, rng: Generator) -> dict[str, str]:
    if made == "audio":
        said = {"transcript": text.rpartition(" ")[-1]} if "transcript" in takes else {}
        sounds = ["data:audio/wav;base64," + base64.b64encode(_sound(rng)).decode() for _ in range(2)]
        return {"prompt": text, **said, **({"audio": sounds[0]} if kind == "pictures" else {"chosen": sounds[0], "rejected": sounds[1]})}
    one, other = (data_uri(_picture(rng)) for _ in range(2))
    if kind == "edits":
        return {"instruction": text, "source": one, "edited": other}
    if kind == "pictures":
        return {"prompt": text, "image": one}
    about = {"image": data_uri(_picture(rng))} if takes else {}
    return {"prompt": text, "chosen": one, "rejected": other, **about, **({"mask": data_uri(_mask())} if "mask" in takes else {})}


def _sound(rng: Generator) -> bytes:
    """0.3 s of noise at 16 kHz."""
    return wav_bytes(torch.rand(4800, generator=rng) - 0.5, 16000)


def _picture(rng: Generator) -> bytes:
    """A PNG of 32 x 32 random pixels."""
    return _png(to_pil(torch.rand(3, 32, 32, generator=rng)))


def _mask() -> bytes:
    """A PNG of 32 x 32 pixels whose right half is filled."""
    half = torch.zeros(3, 32, 32)
    half[..., 16:] = 1
    return _png(to_pil(half))


def _png(picture: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()
