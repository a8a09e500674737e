"""The model card of a run: what it is, how to load it in plain diffusers, what was measured, every setting, and what to cite."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from diffalign import bare
from diffalign.base import Base
from diffalign.contract import short_name
from diffalign.data import PicturePrompt, Prompt, SpokenPrompt, caption_of, text_of
from diffalign.flags import COMPOSE
from diffalign.guard import closing
from diffalign.papers import citations
from diffalign.registry import METHODS
from diffalign.run import Run, versions
from diffalign.settings import LIVE, Settings

DTYPES = {"fp32": "torch.float32", "bf16": "torch.bfloat16", "fp16": "torch.float16"}
OPTIONS = (  # settings that the pipelines' own calls take by the same names
    *("negative_prompt", "height", "width", "image_guidance_scale", "true_cfg_scale"),
    *("original_size", "crops_coords_top_left", "target_size"),
)
COSTS = {"reward_queries": "reward queries", "network_calls": "network calls", "seconds": "seconds", "peak_memory_mb": "peak memory, MB"}


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

    data = _metadata(run, repo, base, config, evaluation, prompts)
    parts = [
        _title(run, repo, base, config),
        _media(repo, shown, files),
        _loading(run, repo, base, prompts),
        _scores(evaluation, guard),
        _training(run, base, config, prompts, files),
        _closing(run, base, config, evaluation),
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"))


def _metadata(
    run: Run,
    repo: str,
    base: Base,
    config: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
    prompts: Mapping[str, Sequence[Prompt]],
) -> Any:
    from huggingface_hub import EvalResult, ModelCardData

    task, full, source = task_of(run, [*prompts["heldout"], *prompts["train"]]), run.plan.settings.full, _prompts_from(config)
    results = [
        EvalResult(
            task_type=task,
            dataset_type=source.removeprefix("hf:") if source.startswith("hf:") else "prompts",
            dataset_name=f"{found.get('prompts', (evaluation or {}).get('prompts'))} held-out prompts",
            dataset_split="heldout",
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
        tags=["diffalign", *([] if full else ["lora"]), short_name(str(config["method"]["name"])), "alignment"],
        model_name=repo.rpartition("/")[2],
        eval_results=results or None,
    )


def _title(run: Run, repo: str, base: Base, config: Mapping[str, Any]) -> str:
    what = "All weights of the denoising network" if run.plan.settings.full else "A LoRA"
    method, rewards = short_name(str(config["method"]["name"])), _rewards(run, config)
    on = f" on the reward {', '.join(rewards)}" if rewards else " on data"
    made = f"diffalign {config.get('versions', versions())['diffalign']}"
    return f"# {repo.rpartition('/')[2]}\n\n{what} of {_linked(base)}, aligned with **{method}**{on} by {made}."


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
    known |= {name: vars(settings)[name] for name in OPTIONS if vars(settings)[name] != vars(Settings())[name]}
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
        "## Held-out scores",
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
        f"On {evaluation['prompts']} held-out prompts, {evaluation['denoising_steps']} deterministic denoising steps, the same noise for "
        f"both models (seed {evaluation['seed']}). Intervals are bootstraps over the prompts; a tie is half a win.",
    ]
    if pairs := evaluation.get("pairs"):
        lines.append(f"The implicit reward prefers the chosen one of {pairs['implicit_accuracy']:.0%} of {pairs['count']} held-out pairs.")
    return "\n".join([*lines, *([closing(guard)] if guard else [])])


def _training(run: Run, base: Base, config: Mapping[str, Any], prompts: Mapping[str, Sequence[Prompt]], files: Sequence[str]) -> str:
    settings, last, known = run.plan.settings, run.metrics[-1], config.get("versions", {})
    revision = ", ".join(filter(None, (base.revision and f"revision {base.revision}", base.commit and f"commit {base.commit}")))
    method = str(config["method"]["name"])
    alpha = settings.lora.rank if settings.lora.alpha is None else settings.lora.alpha
    rows = {
        "base model": f"{_linked(base)}, {revision or 'no revision was named'}" if base.kind == "hub" else _linked(base),
        "method": f"{method}: {METHODS[method].summary}" if method in METHODS else method,
        "reward": ", ".join(_rewards(run, config)),
        "prompts": f"{_prompts_from(config)}: {len(prompts['train'])} to train on, {len(prompts['heldout'])} held out",
        "data": config.get("data"),
        "trained": "all weights of the network" if settings.full else f"a LoRA of rank {settings.lora.rank}, alpha {alpha:g}",
        "steps": f"{int(last['step'])}, each of {run.plan.batch_in_words(config.get('processes') or 1)}",
        "learning rate": f"{settings.learning_rate:g}, {settings.lr_schedule}",
        "precision, seed": f"{settings.precision}, {settings.seed}",
        **{what: f"{last[name]:,.0f}" for name, what in COSTS.items() if last.get(name) is not None},
        "versions": ", ".join(f"{name} {version}" for name, version in known.items() if name != "base_commit"),
    }
    table = [f"| {name} | {_cell(str(value))} |" for name, value in rows.items() if value]
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True).rstrip()
    return "\n".join([
        "## How it was trained", "", "| | |", "| --- | --- |", *table,
        *(["", "![reward](curve.png)"] if "curve.png" in files else []),
        "", "<details><summary>Every setting (diffalign.yaml)</summary>", "", "```yaml", text, "```", "", "</details>", "",
        "`diffalign train --config diffalign.yaml` runs it again, with your own files where a file is named.",
    ])  # fmt: skip


def _closing(run: Run, base: Base, config: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> str:
    licence = base.licence.get("license_name") or base.licence.get("license")
    link = base.licence.get("license_link")
    named = f"[{licence}]({link})" if licence and link else licence
    says = f"The base model's: {named}." if named else "The base model's, which is not known here: see its own page."
    judges = [*_rewards(run, config), *(name.partition("/")[0] for name in (evaluation or {}).get("rewards", {}))]
    lines = [f"- {line}" for line in citations(str(config["method"]["name"]), judges, lora=not run.plan.settings.full)]
    return "\n".join(["## Licence", "", says, *(["", "## What to cite", "", *lines] if lines else [])])


def _rewards(run: Run, config: Mapping[str, Any]) -> list[str]:
    """The names of what was trained on, a composed reward's parts each; none for training on data alone."""
    needs, reward = run.plan.method.needs, config.get("reward") or {}
    if not needs.reward or (needs.data_role == "instead" and config.get("data")):
        return []
    names = [part["name"] for part in reward.get("parts", ())] if reward.get("name") == COMPOSE else [reward.get("name")]
    return [short_name(name) if name != LIVE else "a Python object" for name in names if name]


def _prompts_from(config: Mapping[str, Any]) -> str:
    return str(config.get("prompts") or config.get("data") or "a list")


def _cell(text: str) -> str:
    """Text inside a table."""
    return " ".join(text.split()).replace("|", "\\|")
