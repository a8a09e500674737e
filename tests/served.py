"""Servers for the tests of rewards over HTTP: the real one in a thread, and one that answers as it is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx2
import torch

from diffalign.batching import Scorer
from diffalign.contract import as_reward
from diffalign.gate import Limits
from diffalign.listening import bind, url_of
from diffalign.serve import make_server


@contextmanager
def serving(reward: Any, *, max_batch: int = 16, queue: int = 256, port: int = 0, **limits: Any) -> Iterator[tuple[str, Scorer]]:
    """A reward behind uvicorn, on that port of this machine or a free one; its address, and its scorer."""
    scorer = Scorer(as_reward(reward), "mine", torch.device("cpu"), max_batch, queue)
    sock = bind("127.0.0.1", port)
    server = make_server(scorer, Limits(**limits))
    thread = threading.Thread(target=lambda: server.run(sockets=[sock]))
    thread.start()
    while not (scorer.loaded or scorer.failed):
        pass
    try:
        yield url_of(sock), scorer
    finally:
        server.should_exit = True
        thread.join()
        scorer.stop()
        sock.close()


def post(url: str, body: Any, **headers: str) -> httpx2.Response:
    content, headers = body if isinstance(body, bytes) else json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
    return httpx2.post(f"{url}/score", content=content, headers=headers, timeout=30, trust_env=False)


@dataclass
class Answers:
    """A server that gives these answers in turn, (status, body, headers), and the last one for ever; `asked` are the bodies."""

    answers: Sequence[tuple[int, bytes, dict[str, str]]]
    asked: list[Any] = field(default_factory=list[Any])
    headers: list[dict[str, str]] = field(default_factory=list[dict[str, str]])


DESCRIPTION = json.dumps({"name": "told", "modality": "image", "max_batch": 4}).encode()


@contextmanager
def answering(*answers: tuple[int, bytes, dict[str, str]], description: bytes = DESCRIPTION) -> Iterator[tuple[str, Answers]]:
    """A server whose POSTs are answered so, and its GETs with the description."""
    told = Answers(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(200, description, {})

        def do_POST(self) -> None:
            told.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            told.headers.append(dict(self.headers))
            self.reply(*told.answers[min(len(told.asked), len(told.answers)) - 1])

        def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=lambda: server.serve_forever(0.02))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", told
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def at_once(work: Callable[[int], Any], count: int) -> list[Any]:
    """`work(i)` in `count` threads that start together."""
    barrier, found = threading.Barrier(count), [None] * count

    def one(i: int) -> None:
        barrier.wait()
        found[i] = work(i)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found
