"""The page of `diffalign label`: what it shows and what it is told. Needs the extra `serve`; docs/label.md says what is promised of it."""

from __future__ import annotations

import hmac
import io
import math
import signal
import socket
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any, Literal
from urllib.parse import SplitResult, parse_qs, urlsplit

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from diffalign import comparing
from diffalign.arena import skills_of
from diffalign.errors import InputError
from diffalign.gate import Gate, Limits, Words, patient
from diffalign.gathering import is_wav
from diffalign.label_results import agreement, rankings
from diffalign.labels import Conflict, Labels
from diffalign.listening import outlived
from diffalign.media import decode_image

Choose = Literal["random", "uncertain"]
MAX_BYTES = 16_384  # of a request: an answer has some hundred
ASSETS = {"/": ("index.html", "text/html"), "/label.css": ("label.css", "text/css"), "/label.js": ("label.js", "text/javascript")}
SHOWN = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp", ".gif": "image/gif", ".bmp": "image/bmp"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; media-src 'self'; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
WORDS = Words(
    host="This page answers to the addresses that diffalign label has printed, not to '{}': name that with --allow-origin.",
    large="{:,} bytes: this page takes at most {:,}.",
)


class Rater(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)  # else true would be comparison 1
    rater: str = Field(min_length=1, max_length=200)


class Said(Rater):
    """`ranks[i]` of the i-th sample from the left, 0 is the best; null to skip."""

    comparison: int = Field(ge=0, lt=2**31)
    ranks: list[int] | None = Field(max_length=4)
    seconds: float | None = Field(default=None, ge=0, le=1e6)


@dataclass(frozen=True)
class Asking:
    """What the page asks people about, and in which way the next comparison is chosen."""

    labels: Labels
    choose: Choose = "random"

    def state(self, rater: str) -> dict[str, Any]:
        """What the page shows this rater now."""
        labels, own = self.labels, self.labels.answers(rater)
        now, then = self._next(rater, {answer.comparison for answer in own})
        return {
            "rater": rater,
            "done": len(own),
            "total": len(labels.comparisons),
            "skipped": sum(answer.ranks is None for answer in own),
            "comparison": None if now is None else self._shown(rater, now),
            "then": [] if then is None else list(self._order(rater, then)),
        }

    def _next(self, rater: str, done: set[int]) -> tuple[int | None, int | None]:
        """The comparison that this rater sees next, and the one after where that is known: one that was taken back comes first."""
        labels = self.labels
        waiting = [c for c in _order_of(len(labels.comparisons), labels.settings["seed"], rater) if c not in done]
        again = labels.reopened(rater)
        waiting = again + [c for c in waiting if c not in again]
        if not waiting:
            return None, None
        if self.choose == "random" or again:
            return waiting[0], waiting[1] if len(waiting) > 1 and self.choose == "random" else None
        media = labels.gathered.media
        skills = skills_of(len(labels.gathered.models), rankings(labels, labels.answers()))
        return waiting[comparing.most_telling([[media[n].model for n in labels.comparisons[c].media] for c in waiting], skills)], None

    def _order(self, rater: str, number: int) -> tuple[int, ...]:
        return comparing.shown(self.labels.comparisons[number], self.labels.settings["seed"], rater)

    def _shown(self, rater: str, number: int) -> dict[str, Any]:
        """A comparison without a word of which model is which."""
        gathered, comparison = self.labels.gathered, self.labels.comparisons[number]
        asked = gathered.asked[comparison.asked]
        places = {id(medium): n for n, medium in enumerate(gathered.media)}
        return {
            "id": number,
            "prompt": asked.text,
            "transcript": asked.transcript,
            "kind": "sound" if gathered.sounds else "picture",
            "media": list(self._order(rater, number)),
            "source": None if asked.source is None else places[id(asked.source)],
            "mask": None if asked.mask is None else places[id(asked.mask)],
        }

    def answer(self, rater: str, said: Said) -> None:
        """Write an answer down; raises InputError for one to a comparison that does not exist, or with ranks that are none."""
        if said.comparison >= len(self.labels.comparisons):
            raise InputError(f"There is no comparison {said.comparison}.")
        order = self._order(rater, said.comparison)
        ranks = None if said.ranks is None else tuple(said.ranks)
        if ranks is not None and (len(ranks) != len(order) or sorted(set(ranks)) != list(range(len(set(ranks))))):
            raise InputError(f"ranks are {list(ranks)}: give {len(order)} numbers from 0, the best, without a gap.")
        self.labels.answer(rater, said.comparison, order, ranks, said.seconds)

    def medium(self, number: int) -> Response:
        """The file of a medium by its number; one that a browser cannot show as PNG. Raises HTTPException where it is gone."""
        media = self.labels.gathered.media
        if not 0 <= number < len(media):
            raise HTTPException(404, "There is no such medium.")
        root = self.labels.gathered.roots[media[number].model]
        path = root / media[number].path
        if not path.resolve().is_relative_to(root.resolve()) or not path.is_file():
            raise HTTPException(404, f"{media[number].path} is gone.")
        kind = "audio/wav" if is_wav(path.name) else SHOWN.get(path.suffix.lower())
        cached = {"Cache-Control": "private, max-age=3600"}
        if kind is not None:
            return FileResponse(path, media_type=kind, headers=cached)
        png = io.BytesIO()
        decode_image(path.read_bytes(), path.name).save(png, "PNG")
        return Response(png.getvalue(), media_type="image/png", headers=cached)


@lru_cache(maxsize=64)
def _order_of(count: int, seed: int, rater: str) -> tuple[int, ...]:
    return tuple(comparing.order_of(count, seed, rater))


def name_of(text: str) -> str:
    """A rater's name as it is written down; raises InputError for an empty, a long or an unprintable one."""
    name = " ".join(unicodedata.normalize("NFC", text).split())
    if not 0 < len(name) <= 40 or not name.isprintable():
        raise InputError("A name has 1 to 40 characters that can be printed.")
    return name


def make_app(asking: Asking) -> FastAPI:
    app = FastAPI(title="diffalign label", docs_url=None, redoc_url=None, openapi_url=None)  # their pages would load scripts from elsewhere
    folder = files("diffalign") / "assets" / "label"

    def asset(name: str, kind: str) -> Any:
        text = (folder / name).read_text(encoding="utf-8")
        return lambda: Response(text, media_type=kind, headers={"Cache-Control": "no-cache"})

    for path, (name, kind) in ASSETS.items():
        app.add_api_route(path, asset(name, kind), methods=["GET"])

    @app.get("/state")
    def state(rater: str) -> dict[str, Any]:
        return asking.state(name_of(rater))

    @app.get("/agreement")
    def agreed() -> dict[str, Any]:
        found = agreement(asking.labels.answers())
        share, kappa = (value if math.isfinite(value) else None for value in (found.share, found.kappa))  # JSON has no NaN
        return {"common": found.common, "share": share, "kappa": kappa, "name": found.name}

    @app.get("/media/{number}")
    def medium(number: int) -> Response:
        return asking.medium(number)

    @app.post("/answer")
    def answer(said: Said) -> dict[str, Any]:
        rater = name_of(said.rater)
        asking.answer(rater, said)
        return asking.state(rater)

    @app.post("/undo")
    def undo(by: Rater) -> dict[str, Any]:
        rater = name_of(by.rater)
        asking.labels.undo(rater)
        return asking.state(rater)

    def say(status: int, message: str) -> JSONResponse:
        return JSONResponse({"detail": message}, status)

    app.add_exception_handler(InputError, lambda _, error: say(422, str(error)))
    app.add_exception_handler(Conflict, lambda _, error: say(409, str(error)))
    app.add_exception_handler(RequestValidationError, lambda _, error: say(422, f"No request that this page makes: {_first(error)}"))
    app.add_exception_handler(Exception, lambda _, error: say(500, f"The server failed with {type(error).__name__}; its log says more."))
    return app


def _first(error: Any) -> str:
    about = error.errors()[0]
    return f"{'.'.join(map(str, about['loc']))}: {about['msg']}."


@dataclass(frozen=True)
class Fence:
    """What stands before the page: its own origin alone may write, and where it has a `key`, only who has the link with it gets in."""

    inner: Any
    origins: frozenset[str] = frozenset()
    key: str | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.inner(scope, receive, send)
            return

        async def marked(message: Any) -> None:
            if message["type"] == "http.response.start":
                more = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        answer = self._refusal(scope)
        await (answer or self.inner)(scope, receive, marked)

    def _refusal(self, scope: Any) -> Response | None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "").lower()
        if self.key is not None:
            given = parse_qs(scope["query_string"].decode("latin-1")).get("key", [""])[0]
            if scope["path"] == "/" and _same(given, self.key):
                answer = RedirectResponse("/", 303)  # the link's key does not stay in the address
                secure = scope["scheme"] == "https" or f"https://{host}" in self.origins
                answer.set_cookie(_cookie(host), self.key, httponly=True, samesite="lax", secure=secure)
                return answer
            cookies = dict(part.strip().partition("=")[::2] for part in headers.get("cookie", "").split(";"))
            if not _same(cookies.get(_cookie(host), ""), self.key):
                return PlainTextResponse("This page wants the whole link that diffalign label has printed, with its key.", 401)
        if scope["method"] in ("GET", "HEAD"):
            return None
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "same-origin")
        own = origin is None or origin in self.origins or ((parts := _split(origin)) is not None and parts.netloc == host)
        if own and (site == "same-origin" or origin in self.origins):
            return None
        return JSONResponse({"detail": f"Answers come from this page alone, not from {(origin or 'elsewhere')[:100]}."}, 403)


def _cookie(host: str) -> str:
    """A browser sends a host's cookies to all of its ports: each has a name of its own, or one page would put its key over another's."""
    parts = _split(f"//{host}")
    return f"diffalign-label-{'' if parts is None else parts.port or ''}".rstrip("-")


def _split(url: str) -> SplitResult | None:
    """None of what is no address: a bracket that is not closed, a port that is none."""
    try:
        parts = urlsplit(url)
        return parts if parts.port is None or parts.port else None
    except ValueError:
        return None


def _same(given: str, key: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), key.encode())


def guarded(app: FastAPI, *, origins: Sequence[str] = (), host: str = "127.0.0.1", key: str | None = None, timeout: float = 30.0) -> Fence:
    """The page with all that stands before it; it answers to the names of this machine, to `host` and to those in `origins`."""
    names = {urlsplit(origin).hostname or "" for origin in origins} | ({host} if host not in ("0.0.0.0", "::") else set())
    return Fence(Gate(app, Limits(max_bytes=MAX_BYTES, timeout=timeout, hosts=frozenset(names)), WORDS), frozenset(origins), key)


def make_server(fence: Fence, timeout: float = 30.0) -> uvicorn.Server:
    config = uvicorn.Config(fence, http=patient(timeout), ws="none", loop="asyncio", log_level="warning", server_header=False)
    config.timeout_graceful_shutdown = 3
    return uvicorn.Server(config)


def serve(fence: Fence, sockets: Sequence[socket.socket]) -> None:
    """Answer until SIGTERM or SIGINT."""
    with outlived(signal.SIGTERM, signal.SIGINT):
        make_server(fence).run(sockets=list(sockets))


def check_origins(origins: Sequence[str], host: str) -> None:
    """Raise InputError for what is no origin, and for a `host` of every address without one."""
    for origin in origins:
        parts = _split(origin)
        if parts is None or parts.scheme not in ("http", "https") or not parts.hostname or origin != f"{parts.scheme}://{parts.netloc}":
            raise InputError(f"--allow-origin {origin}: give the address of the page up to the port, such as http://192.168.1.5:8771.")
    if host in ("0.0.0.0", "::") and not origins:
        raise InputError(f"--host {host} is every address of this machine: say by which one people come: --allow-origin http://NAME:PORT.")
