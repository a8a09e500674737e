"""What stands before a reward server's application: the token, limits of size and time, and the hosts that may be named."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol


@dataclass(frozen=True)
class Limits:
    """What a server takes. `max_bytes` is of a request's body, `timeout` the seconds in which its head, and then its body, must arrive.
    `hosts` are names besides this machine's own by which a server without a token may be called."""

    token: str | None = None
    max_bytes: int = 64_000_000
    max_pixels: int = 4096 * 4096
    timeout: float = 30.0
    media_folder: Path | None = None
    hosts: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Words:
    """How a server says whom and what it refuses: `host` with the name that it was called by, `large` with the bytes and their limit."""

    host: str = "This server has no token, and answers to the names of this machine alone, not to '{}'."
    large: str = "A body of {:,} bytes: this server takes at most {:,}. Send fewer items at once."


@dataclass
class Gate:
    """What a request passes before the application sees it: the host it names, the token, how large it says it is, how fast it comes.

    Bodies that are being received or scored take eight times `max_bytes` of memory at most, together.
    """

    app: FastAPI
    limits: Limits
    words: Words = Words()
    held: int = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        timed, length = self._timed(receive), int(headers.get("content-length", "0"))
        if refusal := self._refusal(scope["method"], headers, length):
            with contextlib.suppress(HTTPException):
                while (await timed()).get("more_body"):  # a client that is still writing would not read the answer
                    pass
            status, message = refusal
            more = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(status, {})
            await JSONResponse({"detail": message}, status, {"Connection": "close", **more})(scope, receive, send)
            return
        self.held += length
        try:
            await self.app(scope, timed, send)
        finally:
            self.held -= length

    def _refusal(self, method: str, headers: dict[str, str], length: int) -> tuple[int, str] | None:
        limits = self.limits
        if limits.token is None:
            try:
                host = urlsplit(f"//{headers.get('host', '')}").hostname or ""
            except ValueError:  # of a bracket that is not closed
                host = ""
            if not (is_loopback(host) or host in limits.hosts):  # a web page that had its own name point here
                return 403, self.words.host.format(host[:100])
        else:
            given = headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, f"Bearer {limits.token}".encode("latin-1")):
                return 401, "This server wants its token: Authorization: Bearer TOKEN."
        if "transfer-encoding" in headers or (method == "POST" and "content-length" not in headers):
            return 411, "Say how long the body is, in Content-Length."
        if length > limits.max_bytes:
            return 413, self.words.large.format(length, limits.max_bytes)
        if self.held + length > 8 * limits.max_bytes:
            return 503, "Too many requests are being received: try again."
        return None

    def _timed(self, receive: Any) -> Any:
        """`receive`, which raises HTTPException 408 where the body is not there in time."""
        deadline, done = asyncio.get_running_loop().time() + self.limits.timeout, False

        async def timed() -> Any:
            nonlocal done
            if done:  # from here on it is only told that the client is gone
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                close = {"Connection": "close"}
                raise HTTPException(408, f"The body did not arrive within {self.limits.timeout:g} s.", close) from None
            done = not message.get("more_body")
            return message

        return timed


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on this host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def patient(timeout: float) -> Any:
    """uvicorn's HTTP protocol, which hangs up where a request's head does not arrive in `timeout` seconds: uvicorn would wait for ever."""

    def make(config: Any, server_state: Any, app_state: Any, _loop: Any = None) -> H11Protocol:
        protocol, loop = H11Protocol(config=config, server_state=server_state, app_state=app_state, _loop=_loop), asyncio.get_running_loop()

        def look(seen: Any) -> None:
            cycle = protocol.cycle
            idle = cycle is None or cycle.response_complete
            if protocol.transport is None or protocol.transport.is_closing():
                return
            if idle and cycle is seen:  # no request began since the last look
                protocol.transport.abort()
            else:
                loop.call_later(timeout, look, cycle)

        loop.call_later(timeout, look, None)
        return protocol

    return make
