"""`diffalign serve`: parity with the local reward, many clients at once, and everything that a client may do wrong."""

from __future__ import annotations

import base64
import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from served import at_once, post, serving

import diffalign
from diffalign import wire
from diffalign.batching import Busy, Fault, Sample, Scorer
from diffalign.contract import FunctionReward
from diffalign.errors import InputError
from diffalign.sound import resample
from diffalign.types import Prompts

MEAN = FunctionReward(lambda images, prompts: images.mean((1, 2, 3)))


def item(value: float = 0.5, prompt: str = "a dog", size: int = 8, encoding: wire.Encoding = "float32") -> dict[str, Any]:
    return {"prompt": prompt, "media": wire.encode(torch.full((3, size, size), value), encoding)}


def detail(answer: httpx2.Response) -> str:
    said = answer.json()["detail"]
    assert isinstance(said, str)
    assert "Traceback" not in answer.text
    return said


def test_what_it_says_of_itself() -> None:
    with serving(MEAN, max_batch=3, queue=7) as (url, _):
        said = httpx2.get(url, trust_env=False).json()
        assert (said["name"], said["modality"], said["max_batch"], said["max_items"], said["loaded"]) == ("mine", "image", 3, 7, True)
        assert (said["differentiable"], said["range"], said["accepts"]) == (False, None, ["png", "safetensors"])
        health = httpx2.get(f"{url}/health", trust_env=False).json()
        assert health["loaded"]
        assert health["queue"] == 0
        assert health["versions"]["diffalign"] == diffalign.__version__


def test_64_clients_each_get_their_own_scores_from_shared_batches() -> None:
    batches = list[int]()

    def slow(images: torch.Tensor, prompts: Prompts) -> torch.Tensor:
        batches.append(len(images))
        time.sleep(0.01)
        return images.mean((1, 2, 3)) + torch.tensor([float(text) for text in prompts.text])

    def ask(i: int) -> list[float]:
        return post(url, {"items": [item(i / 100, str(j), size=8 + 8 * (i % 2)) for j in range(1 + i % 3)]}).json()["scores"]

    with serving(slow, max_batch=8) as (url, _):
        found = at_once(ask, 64)
    assert found == [pytest.approx([i / 100 + j for j in range(1 + i % 3)]) for i in range(64)]
    assert sum(batches) == sum(1 + i % 3 for i in range(64))
    assert max(batches) <= 8
    assert len(batches) < 64, "requests that wait share a batch, where their pictures have one size"


def test_a_request_that_is_wrong_harms_no_other() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def picky(images: torch.Tensor, prompts: Prompts) -> torch.Tensor:
        begun.set()
        go_on.wait(10)
        if "bad" in prompts.text:
            raise InputError("I take no bad prompts.")
        if "exit" in prompts.text:
            raise SystemExit
        if "worse" in prompts.text:
            raise RuntimeError("secret")
        return images.mean((1, 2, 3)) * (float("nan") if "nan" in prompts.text else 1)

    with serving(picky) as (url, scorer):
        answers = dict[str, httpx2.Response]()

        def ask(prompt: str) -> threading.Thread:
            def work() -> None:
                answers[prompt] = post(url, {"items": [item(prompt=prompt)]})

            thread = threading.Thread(target=work)
            thread.start()
            return thread

        threads = [ask("first")]
        begun.wait(10)
        threads += [ask(prompt) for prompt in ("good", "bad", "worse", "exit", "nan")]
        while scorer.waiting < 5:
            time.sleep(0.01)
        go_on.set()
        for thread in threads:
            thread.join()
    assert {prompt: answer.status_code for prompt, answer in answers.items()} == {
        "first": 200, "good": 200, "bad": 422, "worse": 500, "exit": 500, "nan": 500,
    }  # fmt: skip
    assert detail(answers["bad"]) == "I take no bad prompts."
    assert detail(answers["worse"]) == "The reward mine failed with RuntimeError; the server's log says more."
    assert "failed with SystemExit" in detail(answers["exit"])
    assert "no finite numbers" in detail(answers["nan"])


def test_a_scorer_that_cannot_go_on_keeps_nobody_waiting() -> None:
    class Dying(BaseException): ...

    begun, go_on, told = threading.Event(), threading.Event(), list[bool]()

    def dies(images: torch.Tensor, prompts: Prompts) -> torch.Tensor:
        begun.set()
        go_on.wait(10)
        raise Dying

    scorer = Scorer(FunctionReward(dies), "mine", torch.device("cpu"), 1, 8)
    scorer.start(lambda: told.append(True))
    while not scorer.loaded:
        time.sleep(0.01)
    sample = Sample("a", torch.zeros(3, 8, 8))
    first = scorer.submit([sample])
    begun.wait(10)
    second = scorer.submit([sample])
    go_on.set()
    for job in (first, second):
        with pytest.raises(Fault, match="The reward mine failed with Dying"):
            job.result(10)
    scorer.stop()
    assert told == [True]
    assert isinstance(scorer.failed, Dying)
    with pytest.raises(Busy):
        scorer.submit([sample])


def test_a_full_queue_says_when_to_come_back_and_a_client_that_left_is_forgotten() -> None:
    begun, go_on, seen = threading.Event(), threading.Event(), list[str]()

    def held(images: torch.Tensor, prompts: Prompts) -> torch.Tensor:
        seen.extend(prompts.text)
        begun.set()
        go_on.wait(10)
        return images.mean((1, 2, 3))

    with serving(held, max_batch=1, queue=2) as (url, scorer):
        first = threading.Thread(target=lambda: post(url, {"items": [item(prompt="first")]}))
        first.start()
        begun.wait(10)
        second = threading.Thread(target=lambda: post(url, {"items": [item(prompt="second")]}))
        second.start()
        host, _, port = url.removeprefix("http://").partition(":")
        body = json.dumps({"items": [item(prompt="gone")]}).encode()
        with socket.create_connection((host, int(port))) as leaver:
            head = f"POST /score HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            leaver.sendall(head.encode() + body)
            while scorer.waiting < 2:
                time.sleep(0.01)
            answer = post(url, {"items": [item()]})
            assert answer.status_code == 503
            assert int(answer.headers["Retry-After"]) >= 1
            assert detail(answer) == "The queue is full (2 of 2 items)."
            assert post(url, {"items": [item()] * 3}).status_code == 413, "more than the queue ever holds"
        time.sleep(0.2)
        go_on.set()
        first.join()
        second.join()
        while scorer.waiting:
            time.sleep(0.01)
    assert seen == ["first", "second"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "JSON decode error"),
        (b"[" * 100_000, "The body is no request to score: it cannot be read as JSON."),
        ({}, "items: Field required"),
        ({"items": []}, "items: List should have at least 1 item"),
        ({"items": [{"prompt": "a"}]}, "items.0.media: Field required"),
        ({"items": [{"prompt": 3, "media": {"type": "png", "data": ""}}]}, "items.0.prompt: Input should be a valid string"),
        ({"items": [{"prompt": "a", "media": {"type": "gif", "data": ""}}]}, "items.0.media.type: Input should be 'png'"),
        ({"items": [{**item(), "more": 1}]}, "items.0.more: Extra inputs are not permitted"),
        ({"items": [{"prompt": "a", "media": {"type": "png", "data": "*"}}]}, "items.0.media is no base64."),
        ({"items": [{"prompt": "a", "media": {"type": "png", "data": "AAAA"}}]}, "items.0.media is no picture that can be read."),
        ({"items": [{"prompt": "a", "media": {"type": "safetensors", "data": "AAAA"}}]}, "items.0.media is no safetensors file"),
        ({"items": [{"prompt": "a", "media": {"type": "wav", "data": "AAAA"}}]}, "this reward judges pictures"),
        ({"items": [{"prompt": "a", "media": {"type": "path", "data": "a.png"}}]}, "started without --media-folder"),
        ({"items": [item(), item(7.0)]}, "items.1.media has pixels from 7 to 7: expected numbers in [0, 1]."),
        ({"items": [item(float("nan"))]}, "items.0.media holds numbers that are not finite."),
        ({"items": [item(size=65)]}, "items.0.media has 65 x 65 pixels: this server takes at most 4,096."),
        ({"items": [item(size=65, encoding="png")]}, "items.0.media has 65 x 65 pixels: this server takes at most 4,096."),
        ({"items": [{**item(), "mask": item()["media"]}]}, "items.0.mask has the shape (3, 8, 8): expected (1, H, W)."),
    ],
)  # fmt: skip
def test_a_malformed_request_is_told_what_is_wrong(mean_server: str, body: Any, says: str) -> None:
    answer = post(mean_server, body)
    assert answer.status_code == 422
    assert says in detail(answer)


@pytest.fixture(scope="module")
def mean_server() -> Any:
    with serving(MEAN, max_pixels=4096, max_bytes=200_000) as (url, _):
        yield url


def test_what_is_too_large_or_says_no_size(mean_server: str) -> None:
    answer = post(mean_server, b"x" * 5_000_000)
    assert answer.status_code == 413
    assert "A body of 5,000,000 bytes: this server takes at most 200,000." in detail(answer)
    chunked = httpx2.post(f"{mean_server}/score", content=iter([b"{}"]), trust_env=False)
    assert chunked.status_code == 411
    assert post(mean_server, {"items": [item()]}).status_code == 200


def test_another_name_for_this_machine_is_refused(mean_server: str) -> None:
    answer = post(mean_server, {"items": [item()]}, Host="attacker.example")
    assert answer.status_code == 403
    assert "attacker.example" in detail(answer)
    assert post(mean_server, {"items": [item()]}, Host="localhost:1").status_code == 200
    assert post(mean_server, {"items": [item()]}, Host="[::1").status_code == 403


def test_the_token(capfd: pytest.CaptureFixture[str]) -> None:
    token = "n0t-for-logs"
    with serving(MEAN, token=token) as (url, _):
        for wrong in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": token}, {"Authorization": f"Bearer {token}x"}):
            answer = post(url, {"items": [item()]}, **wrong)
            assert answer.status_code == 401
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            assert token not in answer.text
            assert httpx2.get(f"{url}/health", headers=wrong, trust_env=False).status_code == 401
        assert post(url, {"items": [item()]}, Authorization=f"Bearer {token}").status_code == 200
        assert post(url, {"items": 3}, Authorization=f"Bearer {token}").status_code == 422
    assert token not in "".join(capfd.readouterr())


def test_slow_clients_are_hung_up_on_and_keep_nobody_waiting() -> None:
    with serving(MEAN, timeout=0.5) as (url, _):
        host, _, port = url.removeprefix("http://").partition(":")
        heads = [socket.create_connection((host, int(port)), timeout=5) for _ in range(20)]
        bodies = [socket.create_connection((host, int(port)), timeout=5) for _ in range(20)]
        for slow in heads:
            slow.sendall(b"POST /score HTTP/1.1\r\nHost: localhost\r\nX-A: ")
        for slow in bodies:
            slow.sendall(b'POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 90\r\n\r\n{"')
        begin = time.monotonic()
        assert post(url, {"items": [item()]}).status_code == 200
        assert time.monotonic() - begin < 5
        for slow in bodies:
            assert b"408" in slow.recv(100)
        for slow in heads:
            with contextlib.suppress(ConnectionResetError):
                assert slow.recv(100) == b""
        for slow in (*heads, *bodies):
            slow.close()


def test_files_of_the_media_folder_alone(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    for folder in (inside, outside):
        (folder / "a.png").write_bytes(wire.png(torch.full((3, 8, 8), 1.0)))
    (inside / "a.safetensors").write_bytes(base64.b64decode(item(0.25)["media"]["data"]))
    (inside / "link.png").symlink_to(outside / "a.png")
    with serving(MEAN, media_folder=inside) as (url, _):

        def ask(path: Any) -> httpx2.Response:
            return post(url, {"items": [{"prompt": "a", "media": {"type": "path", "data": str(path)}}]})

        assert ask("a.png").json()["scores"] == [1.0]
        assert ask(inside / "a.safetensors").json()["scores"] == [0.25]
        for path in ("../out/a.png", outside / "a.png", "link.png", "b.png", ".", "/dev/zero", "a\0b"):
            answer = ask(path)
            assert answer.status_code == 422
            assert detail(answer) == "items.0.media is no file in the server's media folder."


def test_sources_masks_metadata_and_sound() -> None:
    seen = list[Any]()

    def note(media: torch.Tensor, prompts: Prompts) -> torch.Tensor:
        seen.append((media, prompts))
        return torch.zeros(len(media))

    whole = {**item(0.25), "image": item(0.5)["media"], "mask": wire.encode(torch.ones(1, 8, 8), "png"), "metadata": {"n": 3}}
    with serving(note) as (url, _):
        assert post(url, {"items": [whole, item()]}).json()["scores"] == [0.0, 0.0]
    (first, prompts), (_, without) = seen
    assert torch.equal(first, torch.full((1, 3, 8, 8), 0.25))
    assert prompts.image is not None
    assert torch.equal(prompts.image, torch.full((1, 3, 8, 8), 0.5))
    assert torch.equal(prompts.mask, torch.ones(1, 1, 8, 8))
    assert prompts.metadata == ({"n": 3},)
    assert (without.image, without.mask, without.metadata) == (None, None, None)
    with serving(FunctionReward(note, modality="audio")) as (url, _):
        wave = base64.b64encode(_wav([0, 16384, -32768])).decode()
        assert post(url, {"items": [{"prompt": "a", "media": {"type": "wav", "data": wave}}]}).json()["scores"] == [0.0]
        assert "judges sound" in detail(post(url, {"items": [item(encoding="png")]}))
    assert seen[-1][0].tolist() == [[0.0, 0.5, -1.0]]
    assert seen[-1][1].sample_rate == 16_000


def test_sounds_of_any_rate_are_heard_at_the_rewards() -> None:
    heard = list[tuple[torch.Tensor, Prompts]]()

    def note(media: torch.Tensor, prompts: Prompts) -> torch.Tensor:
        heard.append((media, prompts))
        return torch.zeros(len(media))

    sound = torch.linspace(-0.5, 0.5, 64)
    plain: dict[str, Any] = {"prompt": "a", "media": wire.encode(sound, "float32")}
    wave = {"prompt": "a", "media": {"type": "wav", "data": base64.b64encode(_wav([0, 100, 200, 300])).decode()}, "transcript": "one"}
    with serving(FunctionReward(note, modality="audio", sample_rate=8000)) as (url, _):
        assert json.loads(httpx2.get(url, trust_env=False).text)["sample_rate"] == 8000
        items = [wave, {**plain, "sample_rate": 8000}, {**plain, "sample_rate": 16000}]
        assert post(url, {"items": items}).json()["scores"] == [0.0, 0.0, 0.0]
        assert "do not say at which rate they are" in detail(post(url, {"items": [plain]}))
        assert "its sample_rate is 8000: drop that" in detail(post(url, {"items": [{**wave, "sample_rate": 8000}]}))
        two = {"prompt": "a", "media": wire.encode(sound.view(2, 32), "float32"), "sample_rate": 8000}
        assert "expected (samples,)" in detail(post(url, {"items": [two]}))
    spoken, same, other = heard
    assert (tuple(spoken[0].shape), spoken[1].transcript, spoken[1].sample_rate) == ((1, 2), ("one",), 8000)
    assert torch.equal(same[0], sound[None])
    assert same[1].transcript is None
    assert torch.equal(other[0], resample(sound[None], 16000, 8000))


def _wav(samples: list[int]) -> bytes:
    import io
    import wave

    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16_000)
        out.writeframes(b"".join(n.to_bytes(2, "little", signed=True) for n in samples))
    return file.getvalue()


def test_it_stops_gracefully_on_a_signal(tmp_path: Path) -> None:
    """What is being scored and what is queued is answered; standard output is the address alone."""
    (tmp_path / "r.py").write_text(
        "import time\n\ndef slow(images, prompts):\n    open('begun', 'w').close()\n    time.sleep(1)\n    return images.mean((1, 2, 3))\n"
    )
    words = ["serve", "--reward", "r.py:slow", "--port", "0", "--max-batch", "1"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "diffalign", *words], stdout=subprocess.PIPE, stderr=log, text=True, cwd=tmp_path)
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        answers = list[int]()
        threads = [threading.Thread(target=lambda: answers.append(post(url, {"items": [item()]}).status_code)) for _ in range(2)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 60
        while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert process.wait(30) == 0
        assert process.stdout.read() == ""
        process.stdout.close()
    assert answers == [200, 200]
    assert "Traceback" not in (tmp_path / "log").read_text()


@contextlib.contextmanager
def started(folder: Path, code: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    """`diffalign serve` of rewards in r.py; its address is the first line of its standard output. It is gone when the block ends."""
    (folder / "r.py").write_text(code)
    command = [sys.executable, "-m", "diffalign", "serve", *words, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder) as process:
        try:
            yield process
        finally:
            process.kill()


LOADS = """
class Loads:
    differentiable = False
    modality = 'image'

    def open(self):
        {0}

    def tiny(self, folder):
        return self

    def __call__(self, images, prompts):
        return images.mean((1, 2, 3))
"""


def test_a_signal_does_not_wait_for_a_reward_that_is_being_loaded(tmp_path: Path) -> None:
    code = LOADS.format("import time; open('begun', 'w').close(); time.sleep(300)")
    with started(tmp_path, code, "--reward", "r.py:Loads") as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert not httpx2.get(f"{url}/health", trust_env=False, timeout=30).json()["loaded"]
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "Traceback" not in err


def test_a_reward_that_ends_the_process_as_it_loads_is_an_error(tmp_path: Path) -> None:
    with started(tmp_path, LOADS.format("raise SystemExit(0)"), "--reward", "r.py:Loads") as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "error: The reward Loads failed with SystemExit" in err


def test_several_rewards_in_one(tmp_path: Path) -> None:
    code = "".join(
        f"def {name}(images, prompts):\n    return images.mean((1, 2, 3)) {by}\n" for name, by in (("low", "- 1"), ("high", "+ 1"))
    )
    with started(tmp_path, code, "--reward", "r.py:low", "r.py:high", "--reward.high.weight", "2") as process:
        assert process.stdout is not None
        url, answer = process.stdout.readline().strip(), httpx2.Response(503)
        while answer.status_code == 503:
            answer = post(url, {"items": [item(0.5)]})
    assert answer.json() == {"name": "compose", "scores": [1 * -0.5 + 2 * 1.5]}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines in: give --token-file FILE, or set DIFFALIGN_SERVE_TOKEN."),
        (["--port", "TAKEN"], "cannot be listened on"),
        (["--port", "99999"], "cannot be listened on"),
        (["--queue", "0"], "--queue is 0: give 1 or more."),
        (["--timeout", "nan"], "--timeout is nan"),
        (["--token-file", "missing"], "--token-file missing cannot be read"),
        (["--token-file", "empty"], "empty holds no token"),
        (["--media-folder", "missing"], "--media-folder missing is no folder."),
        (["--reward.sing", "1"], "There is no setting 'reward.sing'"),
        (["--reward", "r.py:Late"], "no weights here"),
        (["--device", "tpu9"], "tpu9"),
        (["--reward", "jpeg-compressibility", "r.py:mean", "--reward.mean.normalise", "running"], "and diffalign serve is none"),
    ],
)
def test_what_cannot_be_served(words: list[str], says: str, run_cli: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "r.py").write_text(
        "from diffalign.errors import InputError\n\n"
        "def mean(images, prompts):\n    return images.mean((1, 2, 3))\n\n"
        "class Late:\n    differentiable = False\n    modality = 'image'\n\n"
        "    def open(self):\n        raise InputError('no weights here')\n\n    def tiny(self, folder):\n        return self\n\n"
        "    def __call__(self, images, prompts):\n        return images.mean((1, 2, 3))\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = [str(taken.getsockname()[1]) if word == "TAKEN" else word for word in words]
        named = [] if "--reward" in words else ["--reward", "jpeg-compressibility"]
        port = [] if "--port" in words else ["--port", "0"]
        outcome = run_cli("serve", *named, *port, *words)
    assert outcome.status == 2
    assert says in outcome.err
