"""`diffalign sample`."""

from __future__ import annotations

from typing import Any

from diffalign.commands.common import parser_of, quiet
from diffalign.errors import InputError


def run(arguments: list[str]) -> int:
    parser = parser_of("sample", 'diffalign sample runs/NAME --prompt "a red circle on a blue background" --lora-scale 0.6')
    parser.add_argument("run", help="the run folder")
    parser.add_argument("--prompt", action="append", help="again for several; may be left out with --transcript")
    parser.add_argument("--image", action="append", metavar="FILE", help="the picture to edit, of all prompts, or again for each")
    parser.add_argument("--mask", action="append", metavar="FILE", help="for inpainting: white where it is filled; one, or one for each")
    parser.add_argument("--transcript", action="append", metavar="TEXT", help="for speech: what is said; of all prompts, or again for each")
    parser.add_argument("--lora-scale", type=float, default=1.0, help="how much of the LoRA: 0 is the base model, 1 what was trained")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--steps", type=int, help="denoising steps; by default the run's")
    parser.add_argument("--output", help="folder of the pictures or sounds; by default RUN/samples")
    chosen = parser.parse_args(arguments)
    quiet()
    from diffalign.run import Run

    if not chosen.prompt and not chosen.transcript:
        raise InputError("No prompts: give --prompt TEXT, for speech --transcript TEXT.")
    prompts = _with_files(chosen.prompt or [], image=chosen.image, mask=chosen.mask)
    if chosen.transcript:
        prompts = _spoken(chosen.prompt or [""], chosen.transcript, chosen.image)
    for path in Run.open(chosen.run).sample(
        prompts, seed=chosen.seed, steps=chosen.steps, lora_scale=chosen.lora_scale, output=chosen.output
    ):
        print(path)
    return 0


def _spoken(prompts: list[str], transcripts: list[str], images: list[str] | None) -> list[Any]:
    """Prompts that say transcripts: one of the shorter list for all, or one for each."""
    from diffalign.data import SpokenPrompt

    if images:
        raise InputError("--image and --transcript: no pipeline takes both. Drop one.")
    count = max(len(prompts), len(transcripts))
    if any(len(given) not in (1, count) for given in (prompts, transcripts)):
        raise InputError(f"{len(transcripts)} transcripts for {len(prompts)} prompts: give one for all, or one for each.")
    return [SpokenPrompt(*each) for each in zip(prompts * (count // len(prompts)), transcripts * (count // len(transcripts)), strict=True)]


def _with_files(prompts: list[str], **flags: list[str] | None) -> list[Any]:
    """Each prompt with its files, `(prompt, file, ...)`: one of a flag for all, or one for each. The prompts alone without any."""
    columns = list[list[str]]()
    for flag, files in flags.items():
        if files is not None:
            if len(files) not in (1, len(prompts)):
                raise InputError(f"{len(files)} {flag}s for {len(prompts)} prompts: give one --{flag} for all, or one for each --prompt.")
            columns.append(files * (len(prompts) if len(files) == 1 else 1))
    if flags["mask"] is not None and flags["image"] is None:
        raise InputError("--mask: a mask is of a picture. Give its --image too.")
    return list(zip(prompts, *columns, strict=True)) if columns else prompts
