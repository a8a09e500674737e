"""What rewards that ask a server share: requests that are tried again, several at once, and errors that say the mend."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from random import SystemRandom
from threading import Event
from typing import Any, TypeVar
from urllib.parse import urlsplit

from diffalign.errors import InputError

A = TypeVar("A")
B = TypeVar("B")
PASSING = (429, 502, 503)  # statuses that a later try may not get
MOST_BYTES = 64_000_000  # of an answer
LONGEST = 30.0  # seconds between two tries, where the server asks for no more


def check_fields(url: str | None, token_env: str | None, timeout: float, retries: int, wait: float, parallel: int) -> None:
    """Raise InputError for fields that cannot be: none of them needs the server."""
    try:
        parts = urlsplit(url or "")
        whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not parts.query and not parts.fragment
    except ValueError as error:  # of brackets that are not closed, and of ports; what is left may hold a password
        raise InputError(
            "reward.url is no address that can be read: give the server's address, such as --reward.url http://127.0.0.1:8770"
        ) from error
    if not whole or not str(url).isprintable() or " " in str(url):
        raise InputError(f"reward.url is {url}: give the server's address, such as --reward.url http://127.0.0.1:8770")
    if parts.username is not None or parts.password is not None:
        raise InputError("reward.url holds a password, which would stand in config.yaml: give --reward.token_env VARIABLE instead.")
    if token_env is not None and not re.fullmatch("[A-Z_][A-Z0-9_]*", token_env):  # tokens, hf_..., have small letters
        raise InputError(
            "reward.token_env is no name of an environment variable, of capitals, digits and _: give the one that holds the token."
        )
    for name, value, least in (("timeout", timeout, 0.1), ("retries", retries, 0), ("wait", wait, 0), ("parallel", parallel, 1)):
        if not least <= value < float("inf"):
            raise InputError(f"reward.{name} is {value}: give {least} or more.")


@dataclass(frozen=True)
class Endpoint:
    """A server, and how often it is asked again: where a try fails in passing, `retries` times, and for at least `wait` seconds.

    In passing: no connection, no answer within `timeout` seconds, or the statuses 429, 502, 503. Between tries it waits 0.5, 1, 2, ... at
    most 30 s, less a random part that no generator of the run gives, or as long as the server asks for with Retry-After. `mend` ends
    the message where all was in vain.
    """

    url: str
    token_env: str | None
    timeout: float
    retries: int
    wait: float
    mend: str

    def token(self) -> str | None:
        """Read anew from the environment; raises InputError where the variable is not set, or holds what no header can."""
        if self.token_env is None:
            return None
        token = os.environ.get(self.token_env, "").strip()
        if not token or not token.isascii() or not token.isprintable():
            raise InputError("The environment variable that reward.token_env names holds no token: set it, or name another.")
        return token

    def ask(self, path: str, body: Any = None, *, stop: Event | None = None, at_once: bool = False) -> Any:
        """What the server answers, JSON: to a GET, or with a `body` to a POST of it.

        `stop` ends the waiting. With `at_once` a server that cannot be reached is not waited for, only one that is busy.
        Raises InputError where no answer came, or none that can be read.
        """
        stop, begin, tries = stop or Event(), time.monotonic(), 0
        data = None if body is None else json.dumps(body).encode()
        while True:
            try:
                return self._once(path, data)
            except _Passing as passing:
                tries, waited = tries + 1, time.monotonic() - begin
                vain = (at_once and isinstance(passing, _Unreached)) or (tries > self.retries and waited >= self.wait)
                delay = min(LONGEST, 0.5 * 2 ** min(tries - 1, 10)) * SystemRandom().uniform(0.5, 1)
                if tries > self.retries:  # the last try is made when the wait is over
                    delay = min(delay, max(0.1, self.wait - waited))
                if vain or stop.wait(max(delay, passing.seconds)):
                    often = f" in {tries} tries and {waited:.0f} s" if tries > 1 else ""
                    raise InputError(f"No answer from {self.url}{often}: {passing}. {self.mend}") from passing

    def _once(self, path: str, data: bytes | None) -> Any:
        import httpx2

        token = self.token()
        headers = {"Accept": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
        headers |= {"Content-Type": "application/json"} if data is not None else {}
        end, answer = time.monotonic() + self.timeout, bytearray()
        try:
            with self._client.stream(
                "GET" if data is None else "POST", self.url.rstrip("/") + path, content=data, headers=headers
            ) as response:
                for part in response.iter_bytes():
                    answer += part
                    if time.monotonic() > end:
                        raise _Passing(f"its answer took longer than {self.timeout:g} s (reward.timeout)")
                    if len(answer) > MOST_BYTES:
                        raise InputError(f"{self.url}{path} answers with more than {MOST_BYTES:,} bytes: is it the right server?")
        except httpx2.InvalidURL as error:
            raise InputError(f"reward.url is {self.url}, which is no address ({line(str(error))}).") from error
        except httpx2.ConnectTimeout as error:
            raise _Unreached(f"no connection within {self.timeout:g} s") from error
        except httpx2.TimeoutException as error:
            raise _Passing(f"none within {self.timeout:g} s (reward.timeout)") from error
        except httpx2.ConnectError as error:
            raise _Unreached(line(str(error)) or "no connection") from error
        except httpx2.TransportError as error:
            raise _Passing(line(str(error)) or type(error).__name__) from error
        return self._read(path, response.status_code, response.headers, bytes(answer))

    def _read(self, path: str, status: int, headers: Mapping[str, str], answer: bytes) -> Any:
        """The JSON of an answer; raises InputError for a status that is none of success, and for what is no JSON."""
        if status in PASSING:
            after = headers.get("retry-after", "")
            raise _Passing(f"status {status}: {_said(answer)}", min(float(after), 300.0) if after.isascii() and after.isdecimal() else 0.0)
        if status in (401, 403):
            given = f"the token in {self.token_env}" if self.token_env else "no token"
            raise InputError(
                f"{self.url} refuses {given} ({status}: {_said(answer)}). Give --reward.token_env VARIABLE with the right one in it."
            )
        if status != 200:
            raise InputError(f"{self.url}{path} answers with status {status}: {_said(answer)}")
        try:
            return json.loads(answer, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.url}{path} answers with no JSON ({line(str(error))}): '{_said(answer)}'. {self.mend}") from error

    @cached_property
    def _client(self) -> Any:
        import httpx2

        # this machine is not asked through a proxy, whatever the environment says
        local = urlsplit(self.url).hostname in ("localhost", "127.0.0.1", "::1")
        return httpx2.Client(timeout=self.timeout, trust_env=not local)


class _Passing(Exception):
    """A failure that may be over at the next try, which is due in `seconds` at the earliest."""

    def __init__(self, message: str, seconds: float = 0.0) -> None:
        super().__init__(message)
        self.seconds = seconds


class _Unreached(_Passing):
    """Nobody listens there."""


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number")


def line(text: str) -> str:
    """At most 300 characters in one line, that a terminal only prints."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))[:300]


def _said(answer: bytes) -> str:
    """What a server says of its error, as FastAPI and as OpenAI have it; else how its answer begins."""
    text = answer[:100_000].decode("utf-8", "replace")
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return line(text)
    said = said.get("detail", said.get("error", said)) if isinstance(said, dict) else said
    said = said.get("message", said) if isinstance(said, dict) else said
    return line(said if isinstance(said, str) else json.dumps(said, ensure_ascii=False))


def in_parallel(work: Callable[[A, Event], B], things: Sequence[A], parallel: int) -> list[B]:
    """`work(thing, stop)` of all, `parallel` at a time, in their order. Where one fails, `stop` is set for the others, and it is raised."""
    if not things:
        return []
    stop = Event()
    with ThreadPoolExecutor(min(parallel, len(things))) as pool, _setting(stop):
        futures: list[Future[B]] = [pool.submit(work, thing, stop) for thing in things]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in futures:
                if future in done:
                    future.result()
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()


@contextmanager
def _setting(stop: Event) -> Iterator[None]:
    """The pool waits for its threads when it ends: before, they are told."""
    try:
        yield
    finally:
        stop.set()
