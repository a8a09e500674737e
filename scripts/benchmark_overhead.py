"""What a DRaFT-1 step costs beyond the network calls that it cannot avoid, medians in one process. Exits with status 1 above 1.10.

    python scripts/benchmark_overhead.py [--batch-size 16] [--inference-steps 10] [--repeats 15]

Unavoidable at the same batch: T UNet forwards (the last with a graph), one VAE decode and one reward forward, and their backward
passes, with the LoRA in place. The step has besides: the noise, the schedule, the kernel, the prompts, AdamW, clipping, metrics.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch

from diffalign.config import resolve
from diffalign.data import read_prompts
from diffalign.loop import make_accelerator, prepare, train
from diffalign.models import make_policy
from diffalign.types import Prompts


def timed(work: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--inference-steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=15)
    chosen = parser.parse_args()
    plan = resolve(
        {
            "method": {"name": "draft", "inference_steps": chosen.inference_steps},
            "batch_size": chosen.batch_size,
            "steps": chosen.repeats + 3,
        }
    )
    settings, reward = plan.settings, plan.reward
    assert reward is not None
    policy = make_policy(settings)
    texts = read_prompts("shapes")[: 4 * chosen.batch_size]  # every prompt is encoded in the warm-up, as in any but the first epoch
    policy.encode(Prompts(tuple(texts)))
    training = prepare(policy, settings, texts, make_accelerator(settings))
    rows = train(training, policy, plan.method, reward, settings)

    batch = Prompts(tuple(texts[: chosen.batch_size]))
    hidden = policy.encode(batch).tensors["encoder_hidden_states"]
    parameters = list(training.parameters.values())
    now = policy.path.schedule(chosen.inference_steps).now

    def unavoidable() -> None:
        x = torch.randn(chosen.batch_size, *policy.prior(policy.encode(batch[:1])).shape[1:])
        with torch.no_grad():
            for t in now.t[:-1]:
                policy.pipe.unet(x, t, encoder_hidden_states=hidden, return_dict=False)
        latents = policy.pipe.unet(x, now.t[-1], encoder_hidden_states=hidden, return_dict=False)[0]
        pictures = policy.pipe.vae.decode(latents / policy.pipe.vae.config.scaling_factor, return_dict=False)[0] / 2 + 0.5
        torch.autograd.grad(reward.reward(pictures, batch).mean(), parameters)

    for _ in range(3):
        unavoidable()
        next(rows)
    raw, whole = zip(*((timed(unavoidable), timed(lambda: next(rows))) for _ in range(chosen.repeats)), strict=True)
    ratio = statistics.median(whole) / statistics.median(raw)
    print("| batch | denoising steps | threads | network calls, ms | DRaFT-1 step, ms | ratio | bar |")
    print("| --- " * 7 + "|")
    print(
        f"| {chosen.batch_size} | {chosen.inference_steps} | {torch.get_num_threads()} | {1e3 * statistics.median(raw):.0f} "
        f"| {1e3 * statistics.median(whole):.0f} | {ratio:.2f} | 1.10 |"
    )
    return 0 if ratio <= 1.10 else 1


if __name__ == "__main__":
    sys.exit(main())
