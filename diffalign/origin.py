"""What made a run and of what, how far it came, and whether its evaluation was held out: one answer for pages, tables and cards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from diffalign import registry
from diffalign.contract import short_name
from diffalign.data import Prompt
from diffalign.errors import InputError
from diffalign.flags import COMPOSE
from diffalign.guarding import guard_rows
from diffalign.rerun import merging
from diffalign.run import Run
from diffalign.settings import LIVE
from diffalign.types import Needs

CALLED = (  # settings that the pipelines' own calls take by the same names
    *("negative_prompt", "height", "width", "image_guidance_scale", "true_cfg_scale"),
    *("original_size", "crops_coords_top_left", "target_size"),
)
COSTS = {  # columns of metrics.jsonl, of all steps so far
    "reward_queries": "reward queries",
    "network_calls": "network calls",
    "network_samples": "network samples",
    "seconds": "seconds",
    "device_seconds": "device seconds",
    "peak_memory_mb": "peak memory, MB",
}
EXPO = "expo"  # what `diffalign merge --extrapolate` is cited by


@dataclass(frozen=True)
class Origin:
    """What made a run, by the names in its settings. Of a merged run those of all its runs, nested ones too, and no data.

    `reward` is None where the run was not trained on one, whatever its settings name; `judges` are a composed one's parts, else itself.
    `data` is None where the run was trained on none; `prompts` says whether it sampled its prompts. `parts` are the merged runs' names and
    weights.
    """

    methods: tuple[str, ...]
    reward: str | None = None
    judges: tuple[str, ...] = ()
    data: str | None = None
    prompts: bool = True
    parts: tuple[tuple[str, float], ...] = ()

    @property
    def method(self) -> str:
        """What the method is called."""
        return "merge" if self.parts else ", ".join(short_name(name) for name in self.methods)

    @property
    def of(self) -> str:
        """What it was trained on, or merged of, in words: `a and b`; empty where nothing was."""
        if self.parts:
            return ", ".join(f"{name} x {weight:g}" for name, weight in self.parts)
        return " and ".join(filter(None, (short_name(self.reward) if self.reward else "", self.data)))


def origin_of(config: Mapping[str, Any]) -> Origin:
    """What config.yaml says made the run. Raises InputError where a plug-in's method is gone, which alone knows what it trains on."""
    method, reward = (config.get(key) or {} for key in ("method", "reward"))
    name, asked, data = str(method.get("name") or ""), reward.get("name"), config.get("data")
    if merged := config.get("merged"):
        return Origin(
            tuple(merged.get("methods", ())),
            judges=tuple(merged.get("rewards", ())),
            prompts=False,
            parts=tuple((run["run"].rpartition("/")[2], run["weight"]) for run in merged["runs"]),
        )
    needs: Needs = registry.find("methods", name)[0].needs if name else Needs()
    on_data = data if needs.data is not None else None
    if not needs.reward or (on_data and needs.data_role == "instead"):
        asked = None
    judges = [part["name"] for part in reward.get("parts", ())] if asked == COMPOSE else [asked]
    prompts = on_data is None or needs.data_role == "besides"
    return Origin((name,) if name else (), asked, tuple(judge for judge in judges if judge), on_data, prompts)


@dataclass(frozen=True)
class Reached:
    """How far a run came: `step` of `steps`. Only an `unfinished` one is not whole."""

    kind: Literal["merged", "finished", "guarded", "unfinished"]
    step: int
    steps: int

    @property
    def text(self) -> str:
        """In words."""
        return {
            "merged": "merged, not trained",
            "finished": f"finished, {self.steps:,} steps",
            "guarded": f"ended by its guard at step {self.step:,} of {self.steps:,}",
            "unfinished": f"unfinished, at step {self.step:,} of {self.steps:,}",
        }[self.kind]


def reached(run: Run, config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], guard: Sequence[Mapping[str, Any]]) -> Reached:
    """How far the run came, by the rows of metrics.jsonl and guard.jsonl, and whether its weights are there."""
    steps, whole = int(config["steps"]), (run.path / ("model" if config.get("full") else "lora")).is_dir()
    if config.get("merged"):
        return Reached("merged" if whole else "unfinished", 0, 0)
    step = int(rows[-1]["step"]) if rows else 0
    if whole and guard and guard[-1]["fired"] and guard[-1]["step"] == step:
        return Reached("guarded", step, steps)
    return Reached("finished" if whole and step >= steps else "unfinished", step, steps)


def check_finished(run: Run) -> None:
    """Raise InputError where a run has not taken all its steps, nor was ended by its guard, or has no weights. A merged one takes none."""
    found = reached(run, run.config, run.metrics, guard_rows(run.path))
    if found.kind == "unfinished":
        again = f"diffalign train --resume {run.path}" if not run.merged else f"its lora/ is gone. {merging(run)}"
        raise InputError(f"{run.path} is unfinished, at step {found.step} of {found.steps}: {again}")


def trained_on(prompts: Sequence[Prompt], seen: Sequence[Prompt]) -> int:
    """How many of the prompts are among those that were `seen` in training."""
    known = set(seen)
    return sum(prompt in known for prompt in prompts)


def evaluation_of(run: Run) -> dict[str, Any]:
    """What eval.json holds, with `trained_on`, how many of its prompts the run was trained on, also where an older version wrote it.

    Raises InputError where the run has not been evaluated.
    """
    found = run.evaluation
    if "trained_on" not in found and "prompts" in found:
        with suppress(InputError, OSError):
            held = run.read_prompts("heldout")[: found["prompts"]]
            count = trained_on(held, run.read_prompts("train"))
            found["trained_on"] = found["prompts"] if held and count == len(held) else count
    return found


def named(judge: str) -> str:
    """What a reward is called on a card."""
    return "a Python object" if judge == LIVE else short_name(judge)
