"""What it costs to ask a reward over HTTP: pictures a second here and from a server on this machine, for each encoding.

python scripts/benchmark_serve.py --reward shapes-clip --size 32 512 --pictures 256
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil  # accelerate brings it
import torch
from torch import Generator

from diffalign.inputs import named_rewards
from diffalign.rewards.remote import Remote
from diffalign.types import Prompts


def costs(
    score: Callable[..., Any], pictures: torch.Tensor, prompts: Prompts, batch: int, rounds: int, others: list[Any]
) -> tuple[float, float]:
    """(wall clock, CPU) seconds in which all pictures are scored, `batch` at a time: of the best of `rounds` each.

    CPU time is of this process and `others`, which a busy machine lengthens less than the clock.
    """
    processes, wall, cpu = [psutil.Process(), *others], list[float](), list[float]()

    def used() -> float:
        return sum(p.cpu_times().user + p.cpu_times().system for p in processes)

    for _ in range(rounds + 1):
        before, begin = used(), time.perf_counter()
        for i in range(0, len(pictures), batch):
            score(pictures[i : i + batch], prompts[i : i + batch])
        wall.append(time.perf_counter() - begin)
        cpu.append(used() - before)
    return min(wall[1:]), min(cpu[1:])  # the first warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward", default="shapes-clip")
    parser.add_argument("--size", type=int, nargs="+", default=[32, 512], help="pixels of a side")
    parser.add_argument("--pictures", type=int, default=256, help="of 32 pixels; a sixteenth of it of larger ones")
    parser.add_argument("--batch", type=int, default=16, help="of the reward, and of a request")
    parser.add_argument("--round", type=int, default=64, help="pictures of one call of the reward")
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    (local,) = named_rewards([chosen.reward])
    command = [sys.executable, "-m", "diffalign", "serve", "--reward", chosen.reward, "--port", "0", "--max-batch", str(chosen.batch)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} thread(s) here")
        for size in chosen.size:
            count = chosen.pictures if size <= 64 else max(chosen.batch, chosen.pictures // 16)
            pictures = torch.rand(count, 3, 8, 8, generator=Generator().manual_seed(0))
            pictures = torch.nn.functional.interpolate(
                pictures, (size, size), mode="bilinear"
            )  # noise alone would compress like nothing real
            prompts = Prompts(("a red circle on a blue background",) * count)
            with torch.no_grad():
                here = costs(local, pictures, prompts, chosen.batch, chosen.rounds, [])
            print(f"{size} pixels  local    {count / here[0]:8.1f} pictures/s, {here[1] / count * 1000:.2f} ms of CPU each")
            for encoding in ("png", "float16", "float32"):
                there = costs(Remote(url, encoding=encoding), pictures, prompts, chosen.round, chosen.rounds, [psutil.Process(server.pid)])
                more = (there[1] - here[1]) / count * 1000
                print(f"{size} pixels  {encoding:8} {count / there[0]:8.1f} pictures/s, {more:.2f} ms of CPU more for each")
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
