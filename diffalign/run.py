"""A run: the folder on disk that holds everything one training needs and made."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file

from diffalign import checkpoint, kohya, lora
from diffalign.config import Plan, resolve
from diffalign.data import PicturePrompt, Prompt, caption_of, check_fit, check_prompts, rate_of, read_file, write_file
from diffalign.errors import InputError
from diffalign.evaluate import sample, sheet
from diffalign.gathering import note
from diffalign.knobs import to_sample
from diffalign.lora import WEIGHTS
from diffalign.media import to_pil
from diffalign.models import class_named, class_of, device_of, make_policy, network_of, open_pipeline
from diffalign.notices import quiet
from diffalign.settings import LIVE, Settings
from diffalign.sound import write_all

PACKAGES = ("diffalign", "torch", "diffusers", "transformers", "accelerate", "peft", "numpy", "pillow")


def versions() -> dict[str, str]:
    """What a run depends on: packages and Python."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


def json_lines(file: Path) -> list[Any]:
    """What the lines of a log hold; none where there is no file. A last line that is cut short, by a kill or as it is being written, is
    none yet. Raises ValueError for any other line that is no JSON.
    """
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    if lines and not lines[-1].endswith("\n"):
        with suppress(ValueError):
            return [*map(json.loads, lines)]
        lines = lines[:-1]
    return [*map(json.loads, lines)]


@dataclass(frozen=True)
class Run:
    """`Run.create` makes the folder, `Run.open` (or `diffalign.load`) reads one that exists."""

    path: Path
    live: Any = None  # the pipeline object that was trained, where one was given
    trained: Any = None  # its policy, which knows the base model

    @staticmethod
    def refuse_existing(path: Path) -> None:
        """Raise InputError where there is something at `path` already: a run is never overwritten."""
        if checkpoint.occupied(path):
            raise InputError(f"{path} exists already, and a run is never overwritten: choose another --output, or --resume {path}.")

    @classmethod
    def create(cls, path: Path, config: Mapping[str, Any], live: Any = None, commit: str | None = None) -> Run:
        """Make the folder and write config.yaml; raises InputError where it exists already or cannot be written.

        `commit` is that of a base model from the Hub: its revision may be a branch, which moves.
        """
        cls.refuse_existing(path)
        run = cls(path, live)
        try:
            path.mkdir(parents=True, exist_ok=True)
            run.write_config({**config, "versions": versions() | ({"base_commit": commit} if commit else {})})
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error.strerror}): choose another --output.") from error
        return run

    @classmethod
    def open(cls, path: str | Path, live: Any = None) -> Run:
        """Read a run folder; raises InputError where there is none. `live` is the pipeline of a run that was made from an object."""
        path = Path(path).expanduser()
        if not (path / "config.yaml").is_file():
            raise InputError(f"{path} is no run: it holds no config.yaml. A run is the folder that 'diffalign train' made.")
        return cls(path, live)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved settings, as config.yaml has them."""
        try:
            config = yaml.safe_load((self.path / "config.yaml").read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{self.path / 'config.yaml'} is damaged.") from error
        if not isinstance(config, dict):
            raise InputError(f"{self.path / 'config.yaml'} is damaged: it holds no settings.")
        return config

    @cached_property
    def plan(self) -> Plan:
        """The settings and the method of the run, without its reward: to sample takes none, and a file of one may be gone."""
        return resolve(self.config, rewarded=False)

    @property
    def merged(self) -> dict[str, Any] | None:
        """What `diffalign merge` made the run of, with weights; None for one that was trained."""
        return self.config.get("merged")

    @property
    def source(self) -> Run:
        """The run that was trained with these settings: itself, or of a merged one the first. Raises InputError where that one is gone."""
        return self if self.merged is None else Run.open(self.merged["runs"][0]["run"]).source

    @property
    def metrics(self) -> list[dict[str, float]]:
        """The rows of metrics.jsonl, one an optimiser step; a value is None where it was not finite."""
        file = self.path / "metrics.jsonl"
        try:
            return json_lines(file)
        except ValueError as error:
            raise InputError(f"{file} is damaged: a line of it is no JSON. Mend or delete that line.") from error

    @property
    def evaluation(self) -> dict[str, Any]:
        """What eval.json holds: held-out rewards before and after."""
        file = self.path / "eval.json"
        if not file.is_file():
            raise InputError(f"{self.path} has not been evaluated: diffalign eval {self.path}")
        try:
            return json.loads(file.read_text())
        except ValueError as error:
            raise InputError(f"{file} is damaged. Write it again: diffalign eval {self.path}") from error

    @cached_property
    def pipeline(self) -> Any:
        """The diffusers pipeline with what was trained, ready to call: `run.pipeline("a red circle").images[0]`."""
        if self.live is not None:
            return self.live
        return self.load_into(self._base())

    def load_into(self, pipe: Any) -> Any:
        """Put what was trained into its base pipeline; raises InputError where the files are missing or damaged."""
        full = self.plan.settings.full
        weights = self._weights("model" if full else "lora")
        try:
            if full:
                network = network_of(pipe)
                setattr(pipe, network, type(getattr(pipe, network)).from_pretrained(weights, use_safetensors=True))
            else:
                lora.load(pipe, network_of(pipe), weights)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{weights} is damaged ({reason}). Write it again: diffalign train --resume {self.path}") from error
        return pipe

    @cached_property
    def policy(self) -> Any:
        """The trained policy, frozen; `policy.reference()` switches to the base model."""
        if self.trained is not None:
            return self.trained
        settings = to_sample(self.plan.settings, device_of(self.plan.settings))
        if self.live is None:  # a pipeline of its own: the policy's precision is not the plain pipeline's
            policy = make_policy(settings, self.load_into(self._base()), train=False)
        else:
            policy = make_policy(settings, self.live, train=False)
        if settings.full:
            if self.live is not None:
                raise InputError(f"{self.path} trained all weights of a live object: its base model is not known here. Use run.pipeline.")
            base = self._base()
            policy.frozen = getattr(base, network_of(base)).to(policy.module.device)
        return policy

    def sample(
        self,
        prompts: Sequence[Prompt | tuple[str, *tuple[str | Path, ...]]],
        *,
        seed: int = 0,
        steps: int | None = None,
        lora_scale: float = 1.0,
        output: str | Path | None = None,
    ) -> list[Path]:
        """Pictures of the prompts from the base model and the trained one, same noise: `[side by side, each trained one, ...]`.

        Prompts are texts, where the pipeline takes pictures `(text, picture file)` and `(text, picture file, mask file)`, of speech
        `SpokenPrompt(text, transcript)`. Of sounds the files are mel spectrograms side by side, and .wav files: each trained one, then
        each of the base model. samples.jsonl in the folder says which file answers which prompt, for `diffalign label`.
        """
        prompts = check_prompts(prompts)
        settings, policy = self.plan.settings, self.policy
        check_fit(prompts, policy)
        if lora_scale != 1.0 and settings.full:
            raise InputError("lora_scale: this run trained all weights, and has no LoRA to scale.")
        steps = self.plan.sample_steps if steps is None else steps
        if steps < 1 or not math.isfinite(lora_scale) or not 0 <= seed < 2**63:
            raise InputError(f"steps {steps}, lora_scale {lora_scale}, seed {seed}: give 1 or more steps, a finite scale, a seed from 0.")
        chosen: dict[str, Any] = dict(steps=steps, seed=seed, batch_size=settings.batch_size)
        with lora.scaled(policy.pipe, network_of(policy.pipe), lora_scale):
            after = sample(policy, prompts, suffix=self.plan.suffix, **chosen)
        with policy.reference():
            before = sample(policy, prompts, **chosen)
        folder = self.path / "samples" if output is None else Path(output).expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder} cannot be written ({error.strerror}): choose another --output.") from error
        words = re.sub(r"[^a-z0-9]+", "-", caption_of(prompts[0]).lower())[:60].strip("-") or "picture"
        apart = hashlib.sha256(repr((list(prompts), steps, lora_scale)).encode()).hexdigest()[:6]
        stem = f"{words}-seed{seed}-{apart}"
        paths = [folder / f"{stem}.png", *(folder / f"{stem}-{i}.png" for i in range(len(prompts)))]
        rate = rate_of(policy)
        sheet([("before", before), ("after", after)], prompts, rate).save(paths[0])
        if rate is not None:
            heard = {folder / stem: after, folder / f"{stem}-before": before}
            paths = [paths[0], *(path for where, media in heard.items() for path in write_all(where, media, rate))]
        else:
            for path, image in zip(paths[1:], after, strict=True):
                to_pil(image).save(path)
        if not any(isinstance(prompt, PicturePrompt) for prompt in prompts):  # whose pictures may lie outside of the folder
            note(folder, prompts, paths[1 : 1 + len(prompts)])
        return paths

    def export(self, output: str | Path | None = None, *, force: bool = False) -> Path:
        """Write the LoRA as one kohya file, by default `<run>/<name of the run>.safetensors`, and return its path.

        AUTOMATIC1111 and ComfyUI read it, the pipeline's own `load_lora_weights`, and `lora.init`. Raises InputError for a run without a
        finished LoRA, a LoRA that such a file cannot hold, or a file that exists already (with `force` it is replaced).
        """
        path = self.path / f"{self.path.resolve().name}.safetensors" if output is None else Path(output).expanduser()
        if self.plan.settings.full:
            raise InputError(f"{self.path} trained all weights, and has no LoRA to export: its model/ loads through from_pretrained.")
        weights = self._weights("lora") / WEIGHTS
        if path.suffix != ".safetensors" or path.is_dir():
            raise InputError(f"--output {path}: give a .safetensors file.")
        if path.resolve() == weights.resolve():
            raise InputError(f"--output {path} is the run's own LoRA: choose another file.")
        if path.exists() and not force:
            raise InputError(f"{path} exists already: choose another --output, or --force to replace it.")
        known = type(self.live) if self.live is not None else class_named(class_of(self._named()))
        if not lora.native(known):
            raise InputError(f"{self.path}: no programme reads a kohya file of a {known.__name__}. Its lora/ loads through peft.")
        try:
            with quiet(pipelines=True):
                tensors = kohya.convert(weights, known)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{weights} is damaged ({error}). Write it again: diffalign train --resume {self.path}") from error
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with checkpoint.whole(path) as draft:
                save_file(tensors, draft)  # without metadata: AUTOMATIC1111 takes a file whose metadata name no base model for SD 1's
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error.strerror}): choose another --output.") from error
        return path

    def _named(self) -> Settings:
        """The settings, of a run whose pipeline can be opened again. Raises InputError for that of a live object."""
        if self.plan.settings.pipeline == LIVE:
            raise InputError(f"{self.path} was made from a live pipeline object: diffalign.load(folder, pipe=...) wants it again.")
        return self.plan.settings

    @property
    def lora_folder(self) -> Path:
        """lora/, which holds what was trained; raises InputError where the run is unfinished."""
        return self._weights("lora")

    def _base(self) -> Any:
        return open_pipeline(self._named())

    def _weights(self, name: str) -> Path:
        if not (self.path / name).is_dir():
            raise InputError(f"{self.path} holds no {name}/ yet: the run is unfinished. Resume it: diffalign train --resume {self.path}")
        return self.path / name

    def save_weights(self, policy: Any, folder: str | None = None) -> None:
        """Write lora/ (or, after full fine-tuning, model/), or another folder of the run, as plain diffusers loads it."""
        with checkpoint.whole(self.path / (folder or ("lora" if policy.frozen is None else "model"))) as draft:
            policy.save(draft)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the folder while the block runs; raises InputError where another training holds it."""
        import fcntl  # not on Windows

        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(f"Another training is at work in {self.path}: wait for it, or choose another folder.") from error
            yield

    def write_config(self, config: Mapping[str, Any]) -> None:
        with checkpoint.whole(self.path / "config.yaml") as draft:
            draft.write_text(yaml.safe_dump(dict(config), sort_keys=False))

    def write_prompts(self, part: str, prompts: Sequence[Prompt]) -> None:
        """Write prompts/train.jsonl or prompts/heldout.jsonl. Pictures that lie in files stay where they are."""
        (self.path / "prompts").mkdir(exist_ok=True)
        write_file(self.path / "prompts" / f"{part}.jsonl", prompts)

    def read_prompts(self, part: str) -> list[Prompt]:
        """The run's own prompts, 'train' or 'heldout'."""
        return read_file(self.path / "prompts" / f"{part}.jsonl", root=None)

    def append_metrics(self, row: Mapping[str, float]) -> None:
        """Add a row; a number that is not finite, such as the norm of a gradient that overflowed in fp16, is null: JSON has none."""
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(finite, allow_nan=False) + "\n")

    def rewind_metrics(self, step: int) -> None:
        """Drop the rows after `step`, and one cut short by a kill: a resumed run writes them again."""
        file = self.path / "metrics.jsonl"
        if file.is_file():
            lines = file.read_text().splitlines(keepends=True)[:step]
            with checkpoint.whole(file) as draft:
                draft.write_text("".join(lines))

    def save_checkpoint(self, step: int, tree: Any, keep: int) -> Path:
        return checkpoint.write(self.path / "checkpoints", step, tree, keep)

    def newest_checkpoint(self) -> tuple[Any, list[Path]]:
        return checkpoint.newest(self.path / "checkpoints")

    def save_picture(self, name: str, picture: Any) -> Path:
        """Write a PIL picture under the run's folder."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        return path
