"""What `--compile` costs at the first optimiser step, and what the steps after it take, beside the plain network.

    OMP_NUM_THREADS=1 python scripts/benchmark_compile.py [--repeats 5]

DRaFT on the embedded model as `diffalign train --method draft` trains it. Each network is measured in a process of its own, the compiled
one with an empty cache. Processor's seconds, those of the C++ compiler that it starts too.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

from diffalign.config import resolve
from diffalign.data import read_prompts
from diffalign.loop import prepare, train
from diffalign.models import make_policy
from diffalign.processes import make_accelerator
from diffalign.streams import PromptList


def clock() -> tuple[float, float]:
    """Seconds of the processor, of this process and those that it has waited for; and seconds on the wall."""
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used), time.perf_counter()


def measure(compiled: bool, repeats: int) -> None:
    plan = resolve({"method": "draft", "compile": compiled, "steps": 1 + repeats})
    policy = make_policy(plan.settings)
    prompts = PromptList(read_prompts("shapes"), policy)
    training = prepare(policy, plan.settings, prompts, make_accelerator(plan.settings))
    policy.encode(prompts.take(range(plan.settings.batch_size)))
    assert plan.reward is not None
    plan.reward.open()
    taken, last = list[tuple[float, float]](), clock()
    for _ in train(training, policy, plan.method, plan.reward, plan.settings):
        now = clock()
        taken.append((now[0] - last[0], now[1] - last[1]))
        last = now
        print(f"  step {len(taken)}: {taken[-1][0]:.2f} s of the processor, {taken[-1][1]:.2f} s", file=sys.stderr, flush=True)
    later = [seconds for seconds, _ in taken[1:]]
    name, first = "--compile" if compiled else "plain", " | ".join(f"{seconds:.1f}" for seconds in taken[0])
    print(f"| {name} | {plan.settings.batch_size} | {first} | {statistics.median(later):.2f} | {min(later):.2f} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="steps after the first")
    parser.add_argument("--one", choices=["plain", "compile"], help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        measure(chosen.one == "compile", chosen.repeats)
        return 0
    print("| network | batch | first step, processor s | first step, s | step, median s | least s |\n" + "| --- " * 6 + "|", flush=True)
    for one in ("plain", "compile"):
        with tempfile.TemporaryDirectory() as cache:
            # one thread: the workers of a pool would not be counted
            own = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
            subprocess.run([sys.executable, __file__, "--one", one, "--repeats", str(chosen.repeats)], env=own, check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
