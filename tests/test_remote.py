"""The reward `remote`: its scores are the local ones, it outlives a server that dies, and what it does not take from a server."""

from __future__ import annotations

import json
import random
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
import yaml
from served import DESCRIPTION, answering, serving

import diffalign
from diffalign import shapes
from diffalign.contract import CheckedReward, FunctionReward, as_reward, check_modality, judged
from diffalign.errors import InputError
from diffalign.rewards.http import in_parallel
from diffalign.rewards.jpeg import JPEGCompressibility
from diffalign.rewards.remote import Remote
from diffalign.rewards.shapes import ShapesChecker, ShapesCLIP
from diffalign.run import Run
from diffalign.session import resume
from diffalign.sound import resample
from diffalign.types import Prompts, StatefulReward

PAGE = Path(__file__).resolve().parent.parent / "docs" / "rewards" / "remote.md"
QUICK = {"wait": 0.0, "retries": 0, "timeout": 5.0}


def ok(*scores: Any) -> tuple[int, bytes, dict[str, str]]:
    return 200, json.dumps({"name": "told", "scores": scores}).encode(), {}


def drawn(n: int) -> tuple[torch.Tensor, Prompts]:
    """Pictures of the shapes world, and captions that half of them fit."""
    rng = torch.Generator().manual_seed(0)
    scenes = shapes.sample(shapes.every(), n, rng)
    return shapes.draw(scenes, rng), Prompts(tuple(shapes.caption(scenes[i // 2 * 2]) for i in range(n)))


@pytest.mark.parametrize(
    ("reward", "encoding", "tolerance"),
    [
        (ShapesChecker(), "png", 0.0),
        (JPEGCompressibility(), "png", 0.0),
        (JPEGCompressibility(), "float32", 0.0),
        (ShapesCLIP(), "float32", 0.0),
        (ShapesCLIP(), "float16", 1e-3),
        (ShapesCLIP(), "png", 5e-3),
    ],
)
def test_scores_are_the_local_ones(reward: Any, encoding: Any, tolerance: float) -> None:
    pictures, prompts = drawn(13)
    with serving(reward, max_batch=4) as (url, _):
        remote = Remote(url, encoding=encoding, parallel=3)
        remote.open()
        scores = remote(pictures, prompts)
    local = torch.cat([reward(pictures[i : i + 4], prompts[i : i + 4]) for i in range(0, 13, 4)])  # in the server's batches
    assert scores.dtype == torch.float32
    assert float((scores - local.float()).abs().max()) <= tolerance
    assert len(set(local.tolist())) > 1, "else any order would do"


def test_sources_masks_and_metadata_arrive() -> None:
    seen = list[Prompts]()

    def note(images: torch.Tensor, prompts: Prompts) -> torch.Tensor:
        seen.append(prompts)
        return torch.zeros(len(images))

    image, mask = torch.rand(2, 3, 8, 8), (torch.rand(2, 1, 8, 8) > 0.5).float()
    with serving(note) as (url, _):
        Remote(url, encoding="float32")(torch.rand(2, 3, 8, 8), Prompts(("a", "b"), image, mask, metadata=({"i": 0}, {"i": 1})))
    assert torch.equal(seen[0].image, image)  # pyright: ignore[reportArgumentType]
    assert torch.equal(seen[0].mask, mask)  # pyright: ignore[reportArgumentType]
    assert seen[0].metadata == ({"i": 0}, {"i": 1})


def test_requests_are_no_larger_than_the_server_takes() -> None:
    sizes = list[int]()

    def note(images: torch.Tensor, prompts: Prompts) -> torch.Tensor:
        sizes.append(len(images))
        return images.mean((1, 2, 3))

    pictures = torch.rand(5, 3, 32, 32)  # 16.4 kB each
    with serving(note, max_bytes=40_000, max_batch=4) as (url, _):
        assert torch.equal(Remote(url, encoding="float32", parallel=1)(pictures, Prompts(("a",) * 5)), pictures.mean((1, 2, 3)))
    assert sizes == [2, 2, 1]


def test_the_modality_is_the_servers() -> None:
    with serving(FunctionReward(lambda media, prompts: media.mean(1), modality="audio")) as (url, _):
        remote = Remote(url)
        remote.open()
        assert remote.modality == "audio"
        assert remote(torch.tensor([[0.5, 0.25], [1.0, -1.0]]), Prompts(("a", "b"))).tolist() == [0.375, 0.0]
        with pytest.raises(InputError, match="mine judges sound, and this pipeline makes pictures"):
            check_modality(as_reward(remote), "mine", "image")


def test_sounds_arrive_at_the_rate_that_the_server_hears_with_what_they_say() -> None:
    heard = list[tuple[torch.Tensor, Prompts]]()

    @diffalign.reward(differentiable=False, modality="audio", sample_rate=8000)
    def note(media: torch.Tensor, prompts: Prompts) -> torch.Tensor:
        heard.append((media, prompts))
        return media.mean(1)

    sounds, asked = torch.rand(2, 1600) - 0.5, Prompts(("calm", ""), transcript=("one", "two"), sample_rate=16000)
    expected = resample(sounds, 16000, 8000)
    with serving(note) as (url, _):
        remote = CheckedReward(as_reward(Remote(url)), "remote")
        assert torch.equal(remote(sounds, asked), expected.mean(1)), "it is asked what it hears by the first call, where nobody opened it"
        remote.open()
        assert remote.sample_rate == 8000
        assert torch.equal(remote(sounds, asked), expected.mean(1))
    assert len(heard) == 2
    for media, prompts in heard:
        assert torch.equal(media, expected)
        assert (prompts.text, prompts.transcript, prompts.sample_rate) == (("calm", ""), ("one", "two"), 8000)


def test_what_is_not_told_yet_is_not_refused_and_the_twin_takes_both() -> None:
    unasked = Remote("http://127.0.0.1:1")
    assert judged(as_reward(unasked)) is None
    check_modality(as_reward(unasked), "remote", "audio")
    twin = unasked.tiny(Path())
    twin.open()
    check_modality(as_reward(twin), "remote", "audio")
    check_modality(as_reward(twin), "remote", "image")
    assert twin(torch.full((1, 3, 2, 2), 1.0), Prompts(("a",))).tolist() == [1.0]
    assert twin(torch.full((1, 8), 0.25), Prompts(("a",), sample_rate=8000)).tolist() == [0.25]
    louder = {"name": "loudness"}
    assert diffalign.compose([{"name": "remote", "url": "http://127.0.0.1:1"}, louder]).modality == "audio"
    with serving(lambda images, prompts: images.mean((1, 2, 3))) as (url, _):
        both: Any = diffalign.compose([{"name": "remote", "url": url}, louder])
        with pytest.raises(InputError, match="The parts judge different things: remote judges image, loudness judges audio"):
            both.open()


def test_what_fails_in_passing_is_tried_again_and_no_generator_moves() -> None:
    passing = [(503, b"{}", {"Retry-After": "1"}), (502, b"<html>", {}), (429, b"", {})]
    with answering(*passing, ok(0.5)) as (url, told):
        remote, pictures, begin = Remote(url, retries=3, wait=0.0), torch.rand(1, 3, 4, 4), time.monotonic()
        states = torch.get_rng_state(), random.getstate()
        assert remote(pictures, Prompts(("a",))).tolist() == [0.5]
        assert time.monotonic() - begin > 1 + 0.5 + 1, "Retry-After, and half of 1 and 2 seconds at least"
    assert len(told.asked) == 4
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((422, b'{"detail": "I take no bad prompts."}', {}), "status 422: I take no bad prompts."),
        ((413, b'{"detail": "too large"}', {}), "status 413: too large"),
        ((500, b'{"detail": "it broke"}', {}), "status 500: it broke"),
        ((404, b"<html>\x1b[2J", {}), r"status 404: <html> \[2J"),
        ((200, b"<html>", {}), "answers with no JSON .*: '<html>'"),
        ((200, b'{"scores": [NaN]}', {}), "NaN is no number"),
        ((200, b'{"scores": [1e999]}', {}), "gave the score inf: finite numbers are expected"),
        ((200, b'{"scores": [null]}', {}), "gave the score None"),
        ((200, b'{"scores": [true]}', {}), "gave the score True"),
        ((200, b'{"score": 1}', {}), "without 'scores', a list of numbers"),
        ((200, b"[1]", {}), "without 'scores', a list of numbers"),
        (ok(0.5, 0.5), "gave 2 scores for 1 items"),
        ((503, b"", {"Retry-After": "\u00b2"}), "status 503"),
        ((200, b"[" * 100_000, {}), "answers with no JSON"),
        ((200, b'{"name": "another", "scores": [0.5]}', {}), "now serves the reward 'another', and this run began with 'told'"),
        ((302, b"", {"Location": "http://127.0.0.1:1/"}), "status 302"),
    ],
)
def test_a_wrong_answer_is_an_error_at_once(answer: Any, says: str) -> None:
    with answering(answer) as (url, told), pytest.raises(InputError, match=says):
        Remote(url, retries=0 if answer[0] == 503 else 5, wait=0.0)(torch.rand(1, 3, 4, 4), Prompts(("a",)))
    assert len(told.asked) == 1


@pytest.mark.parametrize("url", ["https://a", "HTTPS://a", "http://a", "Http://127.0.0.1"])
def test_certificates_are_verified_however_the_address_is_written(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = list[dict[str, Any]]()
    monkeypatch.setattr(httpx2, "Client", lambda **given: made.append(given))
    assert Remote(url).endpoint._client is None
    assert made[0].get("verify", True) is True


def test_pictures_that_are_none_are_not_sent() -> None:
    with answering(ok(0.5)) as (url, told):
        for media in (
            torch.full((1, 3, 4, 4), float("nan")),
            torch.full((1, 3, 4, 4), 7.0),
            torch.rand(1, 1, 4, 4),
            torch.rand(0, 3, 4, 4),
        ):
            for reward in (Remote(url), JPEGCompressibility()):
                with pytest.raises(InputError, match=r"^Pictures "):
                    reward(media, Prompts(("a",) * len(media)))
    assert told.asked == []


def test_no_things_are_no_work() -> None:
    assert in_parallel(lambda thing, stop: thing, [], 4) == []


def test_a_run_goes_on_with_the_reward_that_it_began_with() -> None:
    with serving(JPEGCompressibility()) as (url, _):
        remote = Remote(url)
        assert isinstance(remote, StatefulReward)
        assert remote.state() == {"name": None}
        remote.open()
        kept = remote.state()
        assert kept == {"name": "mine"}
        remote.restore(kept)
    with answering() as (url, _):
        message = "now serves the reward 'told', and this run began with 'mine'"
        early, late = Remote(url), Remote(url)
        early.restore(kept)
        with pytest.raises(InputError, match=message):
            early.open()
        late.open()
        with pytest.raises(InputError, match=message):
            late.restore(kept)


def test_a_failing_chunk_ends_the_others_waits() -> None:
    begin = time.monotonic()
    with answering((503, b"", {}), (503, b"", {}), (422, b'{"detail": "no"}', {})) as (url, _), pytest.raises(InputError, match="422: no"):
        Remote(url, batch_size=1, parallel=3, wait=300)(torch.rand(3, 3, 4, 4), Prompts(("a", "b", "c")))
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize(
    ("description", "fields", "says"),
    [
        (b'{"hello": 1}', {}, "is no reward server"),
        (b'{"name": "x", "modality": "smell"}', {}, "is no reward server"),
        (b'{"name": "x", "modality": "image", "max_batch": 0}', {}, "'max_batch' a whole number from 1"),
        (b'{"name": "x", "modality": "audio", "sample_rate": 0}', {}, "'sample_rate' is a whole number of Hz"),
        (DESCRIPTION, {"encoding": "float32"}, "takes png and no safetensors: choose another --reward.encoding"),
        (DESCRIPTION, {"token_env": "NOT_SET_AT_ALL"}, "The environment variable that reward.token_env names holds no token"),
    ],
)
def test_what_the_server_is_is_asked_first(description: bytes, fields: dict[str, Any], says: str) -> None:
    with answering(description=description) as (url, _), pytest.raises(InputError, match=re.escape(says)):
        Remote(url, **fields).open()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "reward.url is None: give the server's address"),
        ({"url": "localhost:8770"}, "reward.url is localhost:8770"),
        ({"url": "http://a/?token=1"}, "give the server's address"),
        ({"url": "http://me:secret@a"}, "holds a password, which would stand in config.yaml: give --reward.token_env"),
        ({"url": "http://a", "token_env": "sk-12"}, "no name of an environment variable"),
        ({"url": "http://a", "token_env": "hf_secret"}, "no name of an environment variable"),
        ({"url": "http://me:secret@[::1/v1"}, "reward.url is no address that can be read: give the server's address"),
        ({"url": "http://127.0.0.1:abc/v1"}, "reward.url is no address that can be read"),
        ({"url": "http://127.0.0.1:99999"}, "reward.url is no address that can be read"),
        ({"url": " http://a"}, "give the server's address"),
        ({"url": "http://a/\n"}, "give the server's address"),
        ({"url": "http://a", "timeout": float("nan")}, "reward.timeout is nan"),
        ({"url": "http://a", "retries": -1}, "reward.retries is -1: give 0 or more"),
        ({"url": "http://a", "batch_size": 0}, "reward.batch_size is 0"),
    ],
)
def test_fields_that_cannot_be(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        Remote(**fields)
    assert "secret" not in str(caught.value)


def test_a_server_that_is_not_there_is_told_before_any_model_loads(run_cli: Any, tmp_path: Path) -> None:
    begin = time.monotonic()
    words = ["--method", "ddpo", "--reward", "remote", "--reward.url", f"http://127.0.0.1:{free_port()}"]
    outcome = run_cli("train", *words, "--pipeline", "shapes", "--output", tmp_path / "run")
    assert outcome.status == 2
    assert "No answer from http://127.0.0.1:" in outcome.err
    assert "Start the server (diffalign serve --reward NAME), or name another with --reward.url" in outcome.err
    assert not (tmp_path / "run").exists()
    assert time.monotonic() - begin < 60, "not waited for"


def test_the_token_comes_from_the_environment_and_is_written_nowhere(
    files: Path, run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUR_TOKEN", "n0t-for-files")
    with serving(JPEGCompressibility(), token="n0t-for-files") as (url, _):
        assert run_cli(*train_args(files, tmp_path / "run", url, **{"reward.token_env": "OUR_TOKEN", "steps": 1})).status == 0
        for file in (p for p in (tmp_path / "run").rglob("*") if p.is_file()):
            assert b"n0t-for-files" not in file.read_bytes(), file
        assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["reward"]["token_env"] == "OUR_TOKEN"
        with pytest.raises(InputError, match=r"refuses no token \(401.*Give --reward.token_env VARIABLE"):
            Remote(url).open()
        monkeypatch.setenv("OUR_TOKEN", "an0ther")
        with pytest.raises(InputError, match="refuses the token in OUR_TOKEN") as caught:
            Remote(url, "OUR_TOKEN").open()
        assert "an0ther" not in str(caught.value)


def test_the_twin_asks_a_server_too(tmp_path: Path) -> None:
    checked = CheckedReward(as_reward(Remote("http://127.0.0.1:1", batch_size=2)), "remote", tiny=True)
    checked.open()
    assert checked(torch.stack([torch.full((3, 4, 4), i / 5) for i in range(5)]), Prompts(("a",) * 5)).tolist() == pytest.approx(
        [0.0, 0.2, 0.4, 0.6, 0.8]
    )


# --- in a training ---

STEPS = 5


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def train_args(files: Path, output: Path, url: str, **flags: Any) -> list[str]:
    named = {"pipeline": files / "model", "prompts": files / "prompts.txt", "output": output, "method": "ddpo", "reward": "remote"}
    small = {
        "steps": STEPS,
        "batch_size": 2,
        "eval_size": 2,
        "learning_rate": 0.01,
        "checkpoint_every": 1000,
        "sample_every": 1000,
        "seed": 5,
    }
    method = {"method.inference_steps": 2, "method.batches": 1, "method.samples": 2, "method.updates": 1}
    chosen = {**named, **small, **method, "reward.url": url, **flags}
    return ["train", *(f"--{name}={value}" for name, value in chosen.items())]


class Plain:
    """The server that stands in docs/rewards/remote.md, in a process of its own; `dies_at` kills it at that request."""

    def __init__(self, folder: Path, port: int) -> None:
        (code,) = re.findall(r"```python\n(import base64.*?)```", PAGE.read_text(), flags=re.DOTALL)
        (folder / "redness.py").write_text(code)
        self.command, self.port = [sys.executable, str(folder / "redness.py"), str(port)], port
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stderr=subprocess.DEVNULL)
        while self.process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except OSError:
                time.sleep(0.02)
        raise AssertionError("the page's server does not start")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def outcome_of(run: Path) -> tuple[bytes, list[list[float]]]:
    rows = [[row[k] for k in ("step", "loss", "reward", "grad_norm", "reward_queries")] for row in Run.open(run).metrics]
    return (run / "lora" / "pytorch_lora_weights.safetensors").read_bytes(), rows


@pytest.fixture(scope="module")
def undisturbed(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run with the page's server, and the port that this server had."""
    from diffalign.cli import main

    folder, port = tmp_path_factory.mktemp("plain"), free_port()
    server = Plain(folder, port)
    try:
        assert main(train_args(files, folder / "run", f"http://127.0.0.1:{port}")) == 0
    finally:
        server.kill()
    return outcome_of(folder / "run"), port


def lines(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def killed_after(server: Plain, run: Path, rows: int, again_after: float | None = None) -> threading.Thread:
    """A thread that kills the server when the run has so many rows, and starts it again later."""

    def work() -> None:
        while lines(run) < rows and server.process.poll() is None:
            time.sleep(0.001)
        server.kill()
        if again_after is not None:
            time.sleep(again_after)
            server.start()

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_a_server_that_dies_and_comes_back_is_waited_for(files: Path, undisturbed: Any, tmp_path: Path) -> None:
    from diffalign.cli import main

    expected, port = undisturbed
    server, run = Plain(tmp_path, port), tmp_path / "run"
    killer = killed_after(server, run, rows=2, again_after=1.0)
    try:
        flags = {"reward.wait": 120, "reward.retries": 0}
        assert main(train_args(files, run, f"http://127.0.0.1:{port}", **flags)) == 0
        killer.join()
        assert server.process.poll() is None, "the run ended without having asked the second server"
    finally:
        killer.join()
        server.kill()
    assert outcome_of(run) == expected


def test_where_it_stays_away_nothing_is_lost(files: Path, undisturbed: Any, tmp_path: Path, run_cli: Any) -> None:
    expected, port = undisturbed
    server, run = Plain(tmp_path, port), tmp_path / "run"
    killer = killed_after(server, run, rows=2)
    flags = {"reward.wait": 0.2, "reward.retries": 1}
    outcome = run_cli(*train_args(files, run, f"http://127.0.0.1:{port}", **flags))
    killer.join()
    step = lines(run)
    assert outcome.status == 2
    assert 2 <= step < STEPS, "the run ended before the server did"
    assert re.search(r"No answer from http://127.0.0.1:\d+ in \d tries and \d+ s: .*refused", outcome.err), outcome.err
    assert f"Saved at step {step}. Go on: diffalign train --resume {run}" in outcome.err
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step-000000", f"step-{step:06d}"]
    again = run_cli("train", "--resume", run)
    assert again.status == 2, "still away, and nothing was loaded"
    with serving(JPEGCompressibility(), port=port), pytest.raises(InputError, match=r"'mine', and this run began with 'redness'"):
        resume(run)
    server.start()
    try:
        resume(run)
    finally:
        server.kill()
    assert outcome_of(run) == expected
    assert diffalign.load(run).metrics[-1]["step"] == STEPS
