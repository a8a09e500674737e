"""A socket that a server of this package listens on, and how long the server lives."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterator

from diffalign.errors import InputError


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens; raises InputError where the address is taken or not this machine's."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(2048)
    except (OSError, OverflowError) as error:
        sock.close()
        raise InputError(f"{host}:{port} cannot be listened on ({error}): choose another --host or --port.") from error
    return sock


def url_of(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextlib.contextmanager
def outlived(*signals: int) -> Iterator[None]:
    """Signals end nothing by themselves: uvicorn, once it has stopped for one, sends it again."""
    before = {number: signal.signal(number, lambda *_: None) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
