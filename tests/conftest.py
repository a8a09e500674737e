"""Every test runs offline, on few threads, from a fixed seed. Set before torch and transformers are imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["HF_HUB_OFFLINE"] = "1"


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def _seed() -> None:
    """torch's global generator, for the tests' own draws: the engine never uses it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The tests' own cache of embedded data: the person's is neither read nor filled."""
    os.environ["DIFFALIGN_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def run_cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Outcome]:
    """`run_cli("train", "--method", "draft")`: the command line in this process, with `tmp_path` as the working folder."""
    from diffalign.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*args: object) -> Outcome:
        capsys.readouterr()
        try:
            status = main([str(arg) for arg in args])
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        printed = capsys.readouterr()
        return Outcome(status, printed.out, printed.err)

    return run


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny pipeline, a file of rewards, and prompts: see `tiny.write_files`."""
    import tiny

    return tiny.write_files(tmp_path_factory.mktemp("files"))
