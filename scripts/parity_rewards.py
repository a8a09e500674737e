"""Our readers of HPSv2's and ImageReward's checkpoints beside the original packages, hpsv2 1.2.0 and image-reward 1.5.

    python scripts/parity_rewards.py [--env build/parity] [--packages hpsv2 image-reward] [--sizes small full] [--write]

The first call makes an environment for each package with pip, in the folder of --env: the packages want versions that exclude each other
and, ImageReward, ours. That takes PyPI, some minutes, and 2 GB of disk with a CPU build of torch; where pip finds none, 7 GB for each.
The published checkpoints are not fetched. Every package writes one of its own, of random weights in the original layout: `small`, a
network of the same make of some million weights (seconds), and `full`, the whole one (HPSv2: 986 million weights, 2 minutes
of one core for the package, 1 for ours, 9 GB of memory; ImageReward: 447 million). It scores three pictures with a prompt
each, from their files by its own `score`, and from the pixels that its own transform made of them, with the gradient at those pixels.
Then our reader opens the same checkpoint and is held against both; and our back end `--reward.backend package`, in the package's
environment, against the package's own `score`.

Prints a table. --write puts it into docs/rewards/hps.md and image-reward.md, and the numbers of the small networks into
tests/parity_rewards.json, which the tests hold our readers against without the packages. Exits with status 1 where something is
further off than LIMITS.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import parity_recipe as recipe
import torch
from torch import Tensor
from torch.nn import functional as F

from diffalign.media import read_image
from diffalign.rewards.hps import HPS
from diffalign.rewards.image_reward import ImageReward
from diffalign.rewards.weights import quiet
from diffalign.types import Prompts

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = {  # pinned far enough that pip need not look for a combination, which for image-reward takes it ten minutes
    "hpsv2": (
        "torch==2.13.0", "torchvision==0.28.0", "hpsv2==1.2.0", "open_clip_torch==3.3.0", "transformers==5.23.0", "timm==1.0.31",
        "numpy==2.4.6", "pillow==13.0.0", "huggingface_hub==2.4.0",
    ),
    # transformers 5 lacks helpers that the package imports; it imports CLIP, which it does not ask for, and, to train, diffusers
    "image-reward": (
        "torch==2.13.0", "torchvision==0.28.0", "image-reward==1.5", "transformers==4.39.3", "diffusers==0.31.0", "clip-anytorch==2.6.0",
        "numpy==2.4.6", "pillow==13.0.0", "huggingface_hub==0.36.2", "accelerate==1.15.0", "datasets==5.0.1",
    ),
}  # fmt: skip
AFTERWARDS = {"image-reward": ("setuptools==69.5.1",)}  # CLIP imports its pkg_resources; torch asks for a newer one, and runs with this
LIMITS = {"ids": 0, "scores": 1e-6, "slopes": 1e-5, "backend": 0}  # of what is to be equal: the rest is another way from the file
PAGES = {"hpsv2": "hps.md", "image-reward": "image-reward.md"}
JSON = ROOT / "tests" / "parity_rewards.json"
BPE = "bpe_simple_vocab_16e6.txt.gz"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=Path, default=Path("build/parity"), help="folder of the environments and of what is written")
    parser.add_argument("--packages", nargs="+", choices=list(ENVIRONMENTS), default=list(ENVIRONMENTS))
    parser.add_argument("--sizes", nargs="+", choices=["small", "full"], default=["small", "full"])
    parser.add_argument("--write", action="store_true", help="write the tables into docs/rewards and the numbers into tests")
    chosen = parser.parse_args()
    failed = False
    for package in chosen.packages:
        python = environment(package, chosen.env.absolute())
        base = chosen.env.absolute()
        for size in chosen.sizes:
            folder = base / f"{package}-{size}"
            in_environment(python, package, size, folder)
            original = torch.load(folder / "original.pt", weights_only=True)
            facts = json.loads((folder / "original.json").read_text())
            found = compare(package, folder, original, facts)
            in_environment(python, package, size, folder, "backend")
            found |= backend(folder, original)
            if size == "full":
                (folder / "checkpoint.pt").unlink()  # gigabytes
            (folder / "found.json").write_text(json.dumps({"size": size, **facts, **found}))
            failed |= bool(beyond(found))
            if chosen.write and size == "small":
                write_numbers(package, original, facts)
        files = [base / f"{package}-{size}" / "found.json" for size in ("small", "full")]
        text = table(package, [json.loads(file.read_text()) for file in files if file.is_file()])
        print(text)
        if chosen.write:
            put(text, ROOT / "docs" / "rewards" / PAGES[package])
    return int(failed)


def beyond(found: Mapping[str, float]) -> list[str]:
    """What is further off than its limit; NaN is."""
    return [name for name, limit in LIMITS.items() if not found[name] <= limit]


def larger(first: float, second: float) -> float:
    """The larger of two, NaN where one is: `max` would lose it."""
    return first if math.isnan(first) or second <= first else second


def put(text: str, page: Path) -> None:
    """The table into its place on the page."""
    between = re.compile("(<!-- parity -->\n).*(<!-- /parity -->)", re.DOTALL)
    page.write_text(between.sub(lambda marks: f"{marks[1]}{text}\n{marks[2]}", page.read_text()))


def environment(package: str, folder: Path) -> Path:
    """The interpreter of the package's own environment, made where it is not there yet."""
    python = folder / package / "bin" / "python"
    if not (folder / package / ".installed").is_file():
        print(f"Making the environment of {package} in {folder / package}", file=sys.stderr)
        venv.create(folder / package, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *ENVIRONMENTS[package]], check=True)
        if package in AFTERWARDS:
            subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *AFTERWARDS[package]], check=True)
        if package == "hpsv2":  # its wheel lacks CLIP's vocabulary, which is open_clip's
            (site,) = (folder / package / "lib").glob("python*/site-packages")
            (site / "hpsv2" / "src" / "open_clip" / BPE).write_bytes((site / "open_clip" / BPE).read_bytes())
        (folder / package / ".installed").touch()
    return python


def in_environment(python: Path, package: str, size: str, folder: Path, *more: str) -> None:
    print(f"{package}, {size} {' '.join(more)}", file=sys.stderr)
    settings = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"}
    script = Path(__file__).with_name("parity_originals.py")
    subprocess.run([python, script, package, size, folder, *more], check=True, env={**os.environ, **settings}, stdout=subprocess.DEVNULL)


def reader(package: str, folder: Path, merges: list[tuple[str, str, int]]) -> Any:
    """Our reward on the checkpoint in `folder`."""
    tokenizer, checkpoint = folder / "tokenizer", folder / "checkpoint.pt"
    save_tokenizer(package, tokenizer, merges, folder)
    return (HPS if package == "hpsv2" else ImageReward)(checkpoint=checkpoint, tokenizer=tokenizer)


def save_tokenizer(package: str, tokenizer: Path, merges: list[tuple[str, str, int]], folder: Path) -> None:
    from transformers import BertTokenizer, CLIPTokenizer

    with quiet():
        if package == "hpsv2":
            pairs: Any = [(first, second) for first, second, _ in merges]
            CLIPTokenizer(vocab=recipe.clip_vocabulary(merges), merges=pairs, model_max_length=77).save_pretrained(tokenizer)
        else:
            words = (folder / "bert-base-uncased" / "vocab.txt").read_text().split("\n")
            BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=512).save_pretrained(tokenizer)


def seen(package: str, reward: Any, pixels: Tensor, number: int) -> Tensor:
    """Our score (1,) of pixels (1, 3, 224, 224) that the package's transform made, and the prompt of that number."""
    text = [recipe.PROMPTS[number]]
    if package == "hpsv2":
        return (F.normalize(reward.towers.look(pixels), dim=-1) * reward.towers.texts(text)["features"]).sum(-1)
    read = reward.judge.tokens(text)
    return reward.judge.rate(pixels, *(read[name] for name in reward.judge.tokens.names))


def compare(package: str, folder: Path, original: dict[str, Tensor], facts: dict[str, Any]) -> dict[str, Any]:
    """How far we are off: `ids` that differ, `scores` from the same pixels, their gradients in parts of the largest, `files`, `pixels`."""
    started = time.perf_counter()
    reward = reader(package, folder, facts.get("merges", []))
    words = reward.judge.words if package == "image-reward" else _words(folder / "tokenizer")
    read = words(recipe.PROMPTS)
    ids = read["input_ids"] * read["attention_mask"]
    off = {"ids": int((ids != original["ids"]).sum()), "scores": 0.0, "slopes": 0.0, "files": 0.0, "pixels": 0.0, "pixels_mean": 0.0}
    view = reward.judge.view if package == "image-reward" else reward.towers.view
    std = torch.tensor(view.std).view(1, 3, 1, 1)
    for i, prompt in enumerate(recipe.PROMPTS):
        at = original["pixels"][i : i + 1].clone().requires_grad_()
        score = seen(package, reward, at, i)
        slope = torch.autograd.grad(score.sum(), at)[0]
        file = read_image(folder / f"{i}.png")[None]
        with torch.no_grad():
            apart = (view(file) - original["pixels"][i : i + 1]).mul(std * 255).abs()
            whole = reward(file, Prompts((prompt,)))
        theirs = original["slopes"][i : i + 1]
        worst = {
            "scores": score - original["scores"][i], "slopes": (slope - theirs) / theirs.abs().max(),
            "files": whole - original["files"][i], "pixels": apart,
        }  # fmt: skip
        off |= {name: larger(off[name], float(x.detach().abs().max())) for name, x in worst.items()}
        off["pixels_mean"] = larger(off["pixels_mean"], float(apart.mean()))
    spread = float(original["scores"].max() - original["scores"].min())
    return {**off, "spread": spread, "our_seconds": round(time.perf_counter() - started)}


def _words(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    from diffalign.rewards.common import Words

    return Words(CLIPTokenizer.from_pretrained(folder), 77, "hps", unescape=True)


def backend(folder: Path, original: dict[str, Tensor]) -> dict[str, Any]:
    said = json.loads((folder / "backend.json").read_text())
    return {"backend": float((torch.tensor(said["scores"]) - original["files"]).abs().max()), "each": said["seconds_a_picture"]}


def write_numbers(package: str, original: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """What the tests hold our reader against: the small network's scores, and some numbers of its pixels and gradients."""
    numbers = json.loads(JSON.read_text()) if JSON.is_file() else {}
    numbers[package] = {
        "versions": facts["versions"], "merges": facts.get("merges", []),
        "ids": [[int(i) for i in row if i] for row in original["ids"]],
        "files": original["files"].tolist(), "scores": original["scores"].tolist(),
        "pixels": [recipe.digest(x.numpy()) for x in original["pixels"]], "slopes": [recipe.digest(x.numpy()) for x in original["slopes"]],
    }  # fmt: skip
    JSON.write_text(json.dumps(numbers, sort_keys=True, separators=(",", ":")).replace('"],', '"],\n') + "\n")


def table(package: str, rows: list[dict[str, Any]]) -> str:
    titles = [f"{row['size']}, {row['weights'] / 1e6:.1f} million weights" for row in rows]
    lines = {
        "tokens that differ": lambda r: str(r["ids"]),
        "score, from the same pixels": lambda r: f"{r['scores']:.1e}",
        "its gradient at the pixels, in parts of the largest": lambda r: f"{r['slopes']:.1e}",
        "score, from the file": lambda r: f"{r['files']:.1e}",
        "pixels of the network's picture, of 255: mean, largest": lambda r: f"{r['pixels_mean']:.2g}, {r['pixels']:.2g}",
        "scores of the three pictures lie apart by": lambda r: f"{r['spread']:.2g}",
        "`backend package` and the package's `score`": lambda r: f"{r['backend']:.1e}" if "backend" in r else "not run",
    }
    versions = ", ".join(f"{name} {version}" for name, version in rows[0]["versions"].items())
    head = ["| largest difference | " + " | ".join(titles) + " |", "| --- |" + " --- |" * len(rows)]
    body = [f"| {name} | " + " | ".join(of(row) for row in rows) + " |" for name, of in lines.items()]
    return "\n".join(["", *head, *body, "", f"The package's side: {versions}, Python {rows[0]['python']}, a CPU.", ""])


if __name__ == "__main__":
    sys.exit(main())
