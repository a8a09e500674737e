"""How long the light commands take: medians of 5 with a warm cache, against their bars. Exits with status 1 over one.

python scripts/benchmark_startup.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

CASES = {
    "diffalign --help": (["-m", "diffalign", "--help"], 0.5),
    "diffalign list rewards": (["-m", "diffalign", "list", "rewards"], 1.0),
    "import diffalign": (["-c", "import diffalign"], 0.3),
}


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> int:
    passed = True
    print("| command | median s | bar s |\n| --- | --- | --- |")
    for name, (command, bar) in CASES.items():
        seconds(command)
        median = statistics.median(seconds(command) for _ in range(5))
        passed &= median < bar
        print(f"| `{name}` | {median:.2f} | {bar} |")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
