"""What an optimiser step costs beyond the network calls that it cannot avoid. Exits with status 1 above a method's bar.

    OMP_NUM_THREADS=1 python scripts/benchmark_overhead.py [--methods draft ddpo] [--batch-size 16] [--inference-steps 10] [--repeats 15]

Unavoidable, at the same batch, with the LoRA in place: the UNet's forwards (the base model's through a UNet without LoRA), the decoding
and the reward of the samples, and their backward passes; for AlignProp the forwards that per-step checkpointing repeats, too. A step has
besides: noise, schedule, kernel, log-probabilities, advantages, conditions, the data's latents, AdamW, clipping, counting, metrics.

Both are measured in one process, in turns, and the ratio is the median of the turns' ratios. CPU time on a CPU, where waiting for a
neighbour does not count, and seconds on a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import diffalign
from diffalign.config import Plan, resolve
from diffalign.data import read_prompts, text_of
from diffalign.inputs import open_data
from diffalign.loop import prepare, train
from diffalign.models import load_pipeline, make_policy, prepare_to_train
from diffalign.processes import make_accelerator
from diffalign.streams import PromptList
from diffalign.types import Prompts


@dataclass(frozen=True)
class Raw:
    """The networks by themselves, on a batch of prompts: no noise path, no kernel, no bookkeeping."""

    policy: Any
    base: Any  # a UNet without LoRA
    reward: Any
    prompts: Prompts
    hidden: Tensor
    weights: Sequence[Tensor]
    steps: int  # of a whole sample

    def noise(self) -> Tensor:
        return torch.randn(self.policy.prior(self.policy.encode(self.prompts)).shape, device=self.hidden.device)

    def forward(self, x: Tensor, unet: Any = None) -> Tensor:
        """The UNet's output for `len(x)` rows, where x may be twice the prompts."""
        hidden = self.hidden.repeat(len(x) // len(self.hidden), 1, 1)
        return (unet or self.policy.pipe.unet)(x, 500, encoder_hidden_states=hidden, return_dict=False)[0]

    @torch.no_grad()
    def sample(self, steps: int) -> Tensor:
        x = self.noise()
        for _ in range(steps):
            x = self.forward(x)
        return x

    def score(self, x: Tensor) -> Tensor:
        pictures = self.policy.pipe.vae.decode(x / self.policy.pipe.vae.config.scaling_factor, return_dict=False)[0] / 2 + 0.5
        return self.reward(pictures, self.prompts)

    def backward(self, loss: Tensor) -> None:
        torch.autograd.grad(loss.mean(), self.weights)


def draft(raw: Raw) -> None:
    raw.backward(raw.score(raw.forward(raw.sample(raw.steps - 1))))


def alignprop(raw: Raw) -> None:
    half = raw.steps // 2
    x = raw.sample(raw.steps - half)
    for _ in range(half - 1):
        x = checkpoint(raw.forward, x, use_reentrant=False)
    raw.backward(raw.score(raw.forward(x)))


def refl(raw: Raw) -> None:
    raw.backward(raw.score(raw.forward(raw.sample(raw.steps - 2))))
    raw.backward(raw.forward(raw.noise()))


def ddpo(raw: Raw) -> None:
    with torch.no_grad():
        raw.score(raw.sample(raw.steps))
    for _ in range(raw.steps):
        raw.backward(raw.forward(raw.noise()))


def diffusion_dpo(raw: Raw) -> None:
    pairs = torch.cat([raw.noise(), raw.noise()])
    with torch.no_grad():
        raw.forward(pairs, raw.base)
    raw.backward(raw.forward(pairs))


@dataclass(frozen=True)
class Case:
    """A method in a setting whose steps all cost the same, its unavoidable calls, and the ratio that it may have at most."""

    unavoidable: Callable[[Raw], None]
    bar: float
    fields: Callable[[int], dict[str, Any]]  # T -> the method's


# All that costs something is said here, whatever the preset of `shapes` is.
DDPO = {
    "random_steps": None,
    "batches": 1,
    "samples": 1,
    "updates": 1,
    "inner_epochs": 1,
    "fraction": 1.0,
    "kl_weight": 0.0,
    "advantage": "global",
}
CASES = {
    "draft": Case(draft, 1.10, lambda t: {"inference_steps": t, "k": 1, "n": 0, "reference_weight": 0.0}),
    "ddpo": Case(ddpo, 1.10, lambda t: {"inference_steps": t, **DDPO}),
    "diffusion-dpo": Case(diffusion_dpo, 1.10, lambda t: {"reference_free": False}),
    "alignprop": Case(alignprop, 1.15, lambda t: {"inference_steps": t, "truncation": "fixed", "k": t // 2, "checkpointing": True}),
    "refl": Case(refl, 1.15, lambda t: {"inference_steps": t, "first": t - 2, "last": t - 2, "pretrain_weight": 1.0}),
}


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def timed(work: Callable[[], object]) -> float:
    start = clock()
    work()
    return clock() - start


def measure(name: str, size: int, steps: int, repeats: int, data: Path) -> tuple[float, float, float]:
    """Medians: seconds of the unavoidable calls, seconds of the whole optimiser step, and their ratio."""
    case, warm_up = CASES[name], 3
    given = {
        "method": {"name": name, **case.fields(steps)},
        "reward": "shapes-clip",
        "batch_size": size,
        "accumulate": 1,
        "guidance_scale": 1.0,
    }
    plan = resolve({**given, "steps": repeats + warm_up, **({"data": str(data)} if name == "diffusion-dpo" else {})})
    policy = make_policy(plan.settings, train=False)
    examples = open_data(plan, policy)
    source = examples[0] if examples else PromptList(read_prompts("shapes")[: 4 * size], policy)
    prepare_to_train(policy, plan.settings)
    texts = tuple(dict.fromkeys(["", *map(text_of, source.prompts)]))
    policy.encode(Prompts(texts))  # as in any but the first epoch
    rows, weights = steps_of(plan, policy, source)
    prompts = Prompts((texts[1:] * size)[:size])
    reward = plan.reward.reward if plan.reward else None
    hidden = policy.encode(prompts).tensors["encoder_hidden_states"]
    raw = Raw(policy, load_pipeline("shapes").unet.to(hidden.device), reward, prompts, hidden, weights, steps)
    for _ in range(warm_up):
        case.unavoidable(raw)
        next(rows)
    turns = [(timed(lambda: case.unavoidable(raw)), timed(lambda: next(rows))) for _ in range(repeats)]
    calls, whole = (statistics.median(values) for values in zip(*turns, strict=True))
    return calls, whole, statistics.median(b / a for a, b in turns)


def steps_of(plan: Plan, policy: Any, source: Any) -> tuple[Any, list[Tensor]]:
    """The training, a row an optimiser step, and the weights it trains."""
    training = prepare(policy, plan.settings, source, make_accelerator(plan.settings))
    return train(training, policy, plan.method, plan.reward, plan.settings), list(training.parameters.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help=" ".join(CASES))
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--inference-steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=15)
    chosen = parser.parse_args()
    size, steps, good = chosen.batch_size, chosen.inference_steps, True
    table = ["| method | batch | denoising steps | threads | network calls, ms | whole step, ms | ratio | bar |", "| --- " * 8 + "|"]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "pairs"
        if "diffusion-dpo" in chosen.methods:
            diffalign.make_pairs("shapes", reward="shapes-clip", output=data, pairs=4 * size)
        for name in chosen.methods:
            calls, whole, ratio = measure(name, size, steps, chosen.repeats, data)
            bar = CASES[name].bar
            good &= ratio <= bar
            table.append(
                f"| {name} | {size} | {'-' if name == 'diffusion-dpo' else steps} | {torch.get_num_threads()} | {1e3 * calls:.0f} "
                f"| {1e3 * whole:.0f} | {ratio:.2f} | {bar:.2f} |"
            )
    print("\n".join(table))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
