"""The model card of a run: what it is, how to load it in plain diffusers, what was measured, every setting, and what to cite."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from diffalign import bare
from diffalign.base import Base
from diffalign.console import evaluated
from diffalign.contract import short_name
from diffalign.data import PicturePrompt, Prompt, SpokenPrompt, caption_of, text_of
from diffalign.guard import closing
from diffalign.origin import CALLED, COSTS, EXPO, Origin, named, origin_of
from diffalign.papers import citations
from diffalign.registry import METHODS
from diffalign.run import Run, versions
from diffalign.settings import Settings

DTYPES = {"fp32": "torch.float32", "bf16": "torch.bfloat16", "fp16": "torch.float16"}


def task_of(run: Run, prompts: Sequence[Prompt]) -> str:
    """The Hub's name for what the model does."""
    if is_sound(run):
        return "text-to-speech" if any(isinstance(prompt, SpokenPrompt) for prompt in prompts) else "text-to-audio"
    return "image-to-image" if any(isinstance(prompt, PicturePrompt) for prompt in prompts) else "text-to-image"


def is_sound(run: Run) -> bool:
    return (run.path / "lora" / bare.WEIGHTS).is_file() or any((run.path / "samples").glob("*.wav"))


def card(
    run: Run,
    repo: str,
    base: Base,
    *,
    config: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
    guard: Mapping[str, Any] | None,
    prompts: Mapping[str, Sequence[Prompt]],
    shown: Sequence[Prompt],
    files: Sequence[str],
) -> str:
    """README.md of a run in `repo`, metadata and all, through huggingface_hub's ModelCard.

    `config` and `evaluation` are what is published of config.yaml and eval.json, `guard` what came of the run's, `prompts` its "train" and
    "heldout" ones, `shown` those of the sounds before and after, and `files` the names beside the card.
    """
    from huggingface_hub import ModelCard

    origin = origin_of(run.config)
    data = _metadata(run, repo, base, origin, config, evaluation, prompts)
    parts = [
        _title(run, repo, base, origin, config),
        _media(repo, shown, files),
        _loading(run, repo, base, prompts),
        _scores(evaluation, guard),
        _merging(run, base, origin, config) if origin.parts else _training(run, base, origin, config, prompts, files),
        _settings(config, origin),
        _closing(run, base, origin, evaluation),
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"))


def _metadata(
    run: Run,
    repo: str,
    base: Base,
    origin: Origin,
    config: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
    prompts: Mapping[str, Sequence[Prompt]],
) -> Any:
    from huggingface_hub import EvalResult, ModelCardData

    task, full, source = task_of(run, [*prompts["heldout"], *prompts["train"]]), run.plan.settings.full, _prompts_from(config)
    seen = (evaluation or {}).get("trained_on") or 0
    split = "heldout" if not seen else "train" if seen >= (evaluation or {})["prompts"] else "heldout and train"
    results = [
        EvalResult(
            task_type=task,
            dataset_type=source.removeprefix("hf:") if source.startswith("hf:") else "prompts",
            dataset_name=_of(evaluation or {}, found),
            dataset_split=split,
            metric_type=name,
            metric_name=f"{name} (base model {found['before']:.4g})",
            metric_value=found["after"],
            metric_args={key: found[key] for key in ("before", "difference", "interval", "win_rate")},
        )
        for name, found in (evaluation or {}).get("rewards", {}).items()
    ]
    licence: dict[str, Any] = dict(base.licence)
    return ModelCardData(
        **licence,
        base_model=base.source if base.kind == "hub" else None,
        base_model_relation=("finetune" if full else "adapter") if base.kind == "hub" else None,
        library_name="peft" if (run.path / "lora" / bare.WEIGHTS).is_file() else "diffusers",
        pipeline_tag=task,
        tags=["diffalign", *([] if full else ["lora"]), origin.method, "alignment"],
        model_name=repo.rpartition("/")[2],
        eval_results=results or None,
    )


def _of(evaluation: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """What a row of an evaluation is of: `64 held-out prompts`; a part of a composed reward may be for fewer."""
    if "prompts" not in found:
        return evaluated(evaluation)
    return f"{found['prompts']} of {evaluated(evaluation)}"


def _title(run: Run, repo: str, base: Base, origin: Origin, config: Mapping[str, Any]) -> str:
    what = "All weights of the denoising network" if run.plan.settings.full else "A LoRA"
    rewards, made = [named(judge) for judge in origin.judges], f"diffalign {config.get('versions', versions())['diffalign']}"
    on = f" on the reward {', '.join(rewards)}" if rewards else " on data"
    how = f"merged from {origin.of}" if origin.parts else f"aligned with **{origin.method}**{on}"
    return f"# {repo.rpartition('/')[2]}\n\n{what} of {_linked(base)}, {how} by {made}."


def _linked(base: Base) -> str:
    known = {
        "hub": f"[{base.source}](https://huggingface.co/{base.source})",
        "embedded": f"`{base.source}`, a small model that comes with diffalign",
        "folder": f"a model from a folder, `{base.source}`",
        "object": "a pipeline that was given as a Python object",
    }
    return known[base.kind]


def _media(repo: str, prompts: Sequence[Prompt], files: Sequence[str]) -> str:
    lines = list[str]()
    if "before-after.png" in files:
        what = "Mel spectrograms of the same prompts" if "after-0.wav" in files else "The same prompts"
        lines += ["![before and after](before-after.png)", "", f"*{what} from the same noise: the base model's above, and after training.*"]
    heard = sorted(int(name[6:-4]) for name in files if name.startswith("after-"))
    if heard:
        lines += ["", "| prompt | base model | after training |", "| --- | --- | --- |"]
    for i in heard:
        sounds = " | ".join(
            f'<audio controls src="https://huggingface.co/{repo}/resolve/main/{name}-{i}.wav"></audio> [{name}-{i}.wav]({name}-{i}.wav)'
            for name in ("before", "after")
        )
        lines.append(f"| {_cell(caption_of(prompts[i])) if i < len(prompts) else i} | {sounds} |")
    return "\n".join(lines)


def _loading(run: Run, repo: str, base: Base, prompts: Mapping[str, Sequence[Prompt]]) -> str:
    settings, full, whole = run.plan.settings, run.plan.settings.full, f'"{repo}"'
    peft = (run.path / "lora" / bare.WEIGHTS).is_file()
    trained_class = _class_in(run.path / "model") if full else None
    imports = ["import torch", f"from diffusers import {', '.join(filter(None, (base.pipeline_class, trained_class)))}"]
    imports += ["from peft import PeftModel"] if peft else []
    imports[:0] = ["import diffalign"] if base.kind == "embedded" else []
    where = {
        "hub": f'"{base.source}"' + (f', revision="{base.commit or base.revision}"' if base.commit or base.revision else ""),
        "embedded": f'diffalign.model_folder("{base.source}")',
        "folder": f'"path/to/{base.source}"',
        "object": "...",
    }[base.kind]
    dtype = DTYPES[settings.precision]
    more = "".join(f", {part}=None" for part in base.absent) + f", dtype={dtype}"
    lines = [f"pipe = {base.pipeline_class}.from_pretrained({where}{more})"]
    if full:
        lines.append(f'pipe.{base.network} = {trained_class}.from_pretrained({whole}, subfolder="{base.network}", dtype={dtype})')
    elif peft:
        lines.append(f"pipe.{base.network} = PeftModel.from_pretrained(pipe.{base.network}, {whole})")
    else:
        lines.append(f"pipe.load_lora_weights({whole})")
    shown: Prompt = next(iter([*prompts["heldout"], *prompts["train"]]), "a prompt")
    imports += ["from diffusers.utils import load_image"] if isinstance(shown, PicturePrompt) else []
    lines.append(_call(run, base, shown))
    notes = {
        "embedded": "The base model lies inside the package diffalign, which must be installed: `diffalign.model_folder` gives its folder, "
        "and the rest is plain diffusers.",
        "folder": f"The base model lay in a folder called `{base.source}`: put your own path there.",
        "object": "The base model was a pipeline object of the training's own program: put the same one there.",
    }
    code = "\n".join([*imports, "", *lines])
    return "\n\n".join(filter(None, ("## How to load it", f"```python\n{code}\n```", notes.get(base.kind))))


def _class_in(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["_class_name"]


def _call(run: Run, base: Base, prompt: Prompt) -> str:
    settings, sound = run.plan.settings, is_sound(run)
    audioldm = sound and base.network == "unet"
    given = [repr(text_of(prompt) + run.plan.suffix)]
    if isinstance(prompt, PicturePrompt):
        given += ['image=load_image("picture.png")'] + ['mask_image=load_image("mask.png")'] * (prompt.mask is not None)
    if isinstance(prompt, SpokenPrompt) and audioldm:
        given.append(f"transcription={prompt.transcript!r}")
    known = {"num_inference_steps": run.plan.sample_steps, "guidance_scale": settings.guidance_scale}
    known |= {name: vars(settings)[name] for name in CALLED if vars(settings)[name] != vars(Settings())[name]}
    if settings.max_sequence_length is not None and not sound:
        known["max_sequence_length"] = settings.max_sequence_length
    if settings.audio_seconds is not None:
        known["audio_length_in_s" if audioldm else "audio_duration_s"] = settings.audio_seconds
    given += [f"{name}={value!r}" for name, value in known.items()]
    return f"{'sound' if sound else 'image'} = pipe({', '.join(given)}).{'audios' if sound else 'images'}[0]"


def _scores(evaluation: Mapping[str, Any] | None, guard: Mapping[str, Any] | None) -> str:
    if evaluation is None:
        return "## Held-out scores\n\nNot evaluated."
    lines = [
        "## Scores on training prompts" if (evaluation.get("trained_on") or 0) >= evaluation["prompts"] else "## Held-out scores",
        "",
        "| reward | base model | after training | difference, 95% interval | wins |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, found in evaluation["rewards"].items():
        low, high = found["interval"]
        fewer = f" ({found['prompts']} prompts)" if "prompts" in found else ""
        lines.append(
            f"| {_cell(name)}{fewer} | {found['before']:.4g} | {found['after']:.4g} "
            f"| {found['difference']:+.4g}, {low:+.4g} to {high:+.4g} | {found['win_rate']:.0%} |"
        )
    lines += [
        "",
        f"On {evaluated(evaluation)}, {evaluation['denoising_steps']} deterministic denoising steps, the same noise for "
        f"both models (seed {evaluation['seed']}). Intervals are bootstraps over the prompts; a tie is half a win.",
    ]
    if pairs := evaluation.get("pairs"):
        of = "pairs that it was trained on" if pairs.get("trained_on") else "held-out pairs"
        lines.append(f"The implicit reward prefers the chosen one of {pairs['implicit_accuracy']:.0%} of {pairs['count']} {of}.")
    return "\n".join([*lines, *([closing(guard)] if guard else [])])


def _at(base: Base) -> str:
    """The base model, and what of it."""
    revision = ", ".join(filter(None, (base.revision and f"revision {base.revision}", base.commit and f"commit {base.commit}")))
    return f"{_linked(base)}, {revision or 'no revision was named'}" if base.kind == "hub" else _linked(base)


def _merging(run: Run, base: Base, origin: Origin, config: Mapping[str, Any]) -> str:
    merged = config["merged"]
    rows = {
        "base model": _at(base),
        "merged from": origin.of,
        "extrapolated": f"by {merged['extrapolate']:g} (ExPO); the weights above have it in them" if "extrapolate" in merged else None,
        "methods of the runs": ", ".join(short_name(name) for name in origin.methods if name != EXPO),
        "rewards of the runs": ", ".join(map(named, origin.judges)),
        "LoRA": f"of rank {run.plan.settings.lora.rank}",
        "lost by the cut to that rank": f"{merged['lost']:.2%} of the update's squared norm" if "lost" in merged else None,
        "versions": _versions(config),
    }
    return "\n".join(["## How it was merged", "", *_table(rows)])


def _versions(config: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in config.get("versions", {}).items() if name != "base_commit")


def _table(rows: Mapping[str, Any]) -> list[str]:
    return ["| | |", "| --- | --- |", *(f"| {name} | {_cell(str(value))} |" for name, value in rows.items() if value)]


def _training(
    run: Run, base: Base, origin: Origin, config: Mapping[str, Any], prompts: Mapping[str, Sequence[Prompt]], files: Sequence[str]
) -> str:
    settings, last, method = run.plan.settings, run.metrics[-1], str(config["method"]["name"])
    distinct, taught = len(set(prompts["train"])), len(prompts["train"])
    asked = f"{_prompts_from(config)}: {taught} to train on" if origin.prompts else ""
    alpha = settings.lora.rank if settings.lora.alpha is None else settings.lora.alpha
    rows = {
        "base model": _at(base),
        "method": f"{method}: {METHODS[method].summary}" if method in METHODS else method,
        "reward": ", ".join(map(named, origin.judges)),
        "prompts": asked,
        "data": config.get("data") if origin.prompts or not origin.data else f"{config['data']}: {taught} examples of {distinct} prompts",
        "trained": "all weights of the network" if settings.full else f"a LoRA of rank {settings.lora.rank}, alpha {alpha:g}",
        "steps": f"{int(last['step'])}, each of {run.plan.batch_in_words(config.get('processes') or 1)}",
        "learning rate": f"{settings.learning_rate:g}, {settings.lr_schedule}",
        "precision, seed": f"{settings.precision}, {settings.seed}",
        **{what: f"{last[name]:,.0f}" for name, what in COSTS.items() if last.get(name) is not None},
        "versions": _versions(config),
    }
    return "\n".join(["## How it was trained", "", *_table(rows), *(["", "![reward](curve.png)"] if "curve.png" in files else [])])


def _settings(config: Mapping[str, Any], origin: Origin) -> str:
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True).rstrip()
    again = "`diffalign train --config diffalign.yaml` runs it again, with your own files where a file is named."
    lines = ["<details><summary>Every setting (diffalign.yaml)</summary>", "", "```yaml", text, "```", "", "</details>"]
    return "\n".join([*lines, *([] if origin.parts else ["", again])])


def _closing(run: Run, base: Base, origin: Origin, evaluation: Mapping[str, Any] | None) -> str:
    licence = base.licence.get("license_name") or base.licence.get("license")
    link = base.licence.get("license_link")
    linked = f"[{licence}]({link})" if licence and link else licence
    says = f"The base model's: {linked}." if linked else "The base model's, which is not known here: see its own page."
    judges = [*map(named, origin.judges), *(name.partition("/")[0] for name in (evaluation or {}).get("rewards", {}))]
    lines = [f"- {line}" for line in citations(origin.methods, judges, lora=not run.plan.settings.full)]
    return "\n".join(["## Licence", "", says, *(["", "## What to cite", "", *lines] if lines else [])])


def _prompts_from(config: Mapping[str, Any]) -> str:
    return str(config.get("prompts") or config.get("data") or "a list")


def _cell(text: str) -> str:
    """Text inside a table."""
    return " ".join(text.split()).replace("|", "\\|")
