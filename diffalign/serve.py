"""`diffalign serve`: a reward over HTTP. Needs the extra `serve`; docs/rewards/remote.md has the schema and what is promised of it."""

from __future__ import annotations

import asyncio
import math
import signal
import socket
from collections.abc import Sequence
from typing import Any, Literal

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from diffalign import wire
from diffalign.batching import Busy, Fault, Sample, Scorer
from diffalign.errors import InputError
from diffalign.gate import Gate, Limits, patient
from diffalign.listening import outlived
from diffalign.run import versions
from diffalign.types import SoundReward


class Payload(BaseModel):
    """A picture, mask or sound: base64 of a file; of type `path`, a file in the server's media folder."""

    model_config = ConfigDict(extra="forbid")
    type: wire.Kind
    data: str


class Item(BaseModel):
    """One medium to be scored, and what it was to be.

    `image` and `mask` where it was made from a source, `transcript` where it speaks one; `sample_rate` (Hz) of sound.
    """

    model_config = ConfigDict(extra="forbid")
    prompt: str
    media: Payload
    image: Payload | None = None
    mask: Payload | None = None
    transcript: str | None = None
    sample_rate: int | None = Field(default=None, ge=1, le=1_000_000)
    metadata: dict[str, Any] | None = None


class Ask(BaseModel):
    model_config = ConfigDict(extra="forbid")
    items: list[Item] = Field(min_length=1)


class Scores(BaseModel):
    name: str
    scores: list[float]


class Description(BaseModel):
    """`range` is null where an end is infinite, or the reward does not say; `sample_rate` of pictures, and where any will do."""

    name: str
    modality: Literal["image", "audio"]
    sample_rate: int | None
    differentiable: bool
    range: tuple[float | None, float | None] | None
    accepts: list[str]
    max_batch: int
    max_items: int
    max_bytes: int
    max_pixels: int
    loaded: bool


class Health(BaseModel):
    loaded: bool
    queue: int
    versions: dict[str, str]


def make_app(scorer: Scorer, limits: Limits) -> Gate:
    """The ASGI application of a scorer; starting and stopping that is the caller's."""
    app = FastAPI(title=f"diffalign: {scorer.name}", docs_url=None, redoc_url=None)  # their pages would load scripts from elsewhere

    @app.get("/")
    def describe() -> Description:
        reward = scorer.reward
        ends: Any = getattr(reward, "range", None)
        low, high = ends or (math.inf, math.inf)
        return Description(
            name=scorer.name,
            modality=reward.modality,
            sample_rate=reward.sample_rate if isinstance(reward, SoundReward) else None,
            differentiable=reward.differentiable,
            range=None if ends is None else (_finite(low), _finite(high)),
            accepts=["wav" if reward.modality == "audio" else "png", "safetensors", *(["path"] if limits.media_folder else [])],
            max_batch=scorer.max_batch,
            max_items=scorer.capacity,
            max_bytes=limits.max_bytes,
            max_pixels=limits.max_pixels,
            loaded=scorer.loaded,
        )

    @app.get("/health")
    def health() -> Health:
        return Health(loaded=scorer.loaded, queue=scorer.waiting, versions=versions())

    @app.post("/score")
    async def score(ask: Ask, request: Request) -> Scores:
        if len(ask.items) > scorer.capacity:
            raise HTTPException(413, f"{len(ask.items)} items: this server takes at most {scorer.capacity} in a request.")
        # not here: unpacking pictures would keep every other client waiting
        samples = await asyncio.to_thread(lambda: [_sample(item, i, scorer, limits) for i, item in enumerate(ask.items)])
        job = scorer.submit(samples)
        scores, gone = asyncio.wrap_future(job), asyncio.ensure_future(request.receive())
        await asyncio.wait({scores, gone}, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not scores.done():
            scores.cancel()  # nobody waits for it any more
            raise HTTPException(499, "The client is gone.")
        return Scores(name=scorer.name, scores=scores.result())

    def say(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
        return JSONResponse({"detail": message}, status, headers)

    app.add_exception_handler(InputError, lambda _, error: say(422, str(error)))
    app.add_exception_handler(Fault, lambda _, error: say(500, str(error)))
    app.add_exception_handler(Busy, lambda _, error: say(503, f"{_busy(scorer)}.", {"Retry-After": str(vars(error)["seconds"])}))
    # a body that FastAPI fails to read at all, such as JSON nested too deeply
    app.add_exception_handler(400, lambda *_: say(422, "The body is no request to score: it cannot be read as JSON."))
    app.add_exception_handler(RequestValidationError, lambda _, error: say(422, _first(error)))
    app.add_exception_handler(Exception, lambda _, error: say(500, f"The server failed with {type(error).__name__}; its log says more."))
    return Gate(app, limits)


def _finite(end: float) -> float | None:
    return float(end) if math.isfinite(end) else None  # JSON has no infinity


def _busy(scorer: Scorer) -> str:
    return f"The queue is full ({scorer.waiting} of {scorer.capacity} items)" if scorer.loaded else "The reward is still being loaded"


def _first(error: Any) -> str:
    """The first thing that is wrong with a body, in one sentence."""
    about = error.errors()[0]
    where = ".".join(str(part) for part in about["loc"] if part != "body") if about["type"] != "json_invalid" else ""
    more = f" ({about['ctx']['error']})" if about["type"] == "json_invalid" else ""
    return f"The body is no request to score{f': {where}' if where else ''}: {about['msg']}{more}. Send it as application/json."


def _sample(item: Item, i: int, scorer: Scorer, limits: Limits) -> Sample:
    def picture(name: Literal["media", "image", "mask"], channels: Literal[1, 3] = 3) -> Any:
        payload: Payload | None = getattr(item, name)
        if payload is None:
            return None
        kind, data = _bytes(payload, f"items.{i}.{name}", limits)
        return wire.picture(kind, data, f"items.{i}.{name}", limits.max_pixels, channels)

    if scorer.reward.modality == "audio":
        kind, data = _bytes(item.media, f"items.{i}.media", limits)
        media, rate = wire.sound(kind, data, f"items.{i}.media", item.sample_rate)
    else:
        media, rate = picture("media"), None
    return Sample(item.prompt, media, picture("image"), picture("mask", 1), item.transcript, rate, item.metadata)


def _bytes(payload: Payload, name: str, limits: Limits) -> tuple[wire.Kind, bytes]:
    """A payload's file and its kind; raises InputError for a path that is not in the media folder, links followed."""
    if payload.type != "path":
        return payload.type, wire.from_base64(payload.data, name)
    if limits.media_folder is None:
        raise InputError(f"{name} is a path, and this server was started without --media-folder: send the file itself.")
    folder = limits.media_folder.resolve()
    try:
        path = (folder / payload.data).resolve()
        if not path.is_relative_to(folder) or not path.is_file():
            raise InputError(f"{name} is no file in the server's media folder.")
        if path.stat().st_size > limits.max_bytes:
            raise InputError(f"{name} is a file of more than {limits.max_bytes:,} bytes.")
        kinds: dict[str, wire.Kind] = {".safetensors": "safetensors", ".wav": "wav"}
        return kinds.get(path.suffix, "png"), path.read_bytes()
    except (OSError, ValueError) as error:  # such as a name with a zero byte
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name} is no file in the server's media folder.") from error


def make_server(scorer: Scorer, limits: Limits) -> uvicorn.Server:
    """A server whose scorer runs already, or begins to: where the reward does not load, the server stops."""
    # h11 and asyncio are what is always there: with another of uvicorn's choices the server would be another on each machine
    config = uvicorn.Config(
        make_app(scorer, limits), http=patient(limits.timeout), ws="none", loop="asyncio", log_level="warning", server_header=False
    )
    server = uvicorn.Server(config)

    def stop() -> None:
        server.should_exit = True

    scorer.start(stop)
    return server


def serve(scorer: Scorer, limits: Limits, sockets: Sequence[socket.socket]) -> None:
    """Answer until SIGTERM or SIGINT, and then what is in the queue; raises what the reward raised where it did not load."""
    server = make_server(scorer, limits)
    try:
        with outlived(signal.SIGTERM, signal.SIGINT):
            server.run(sockets=list(sockets))
    finally:
        scorer.stop()
    if isinstance(scorer.failed, Exception):
        raise scorer.failed
    if scorer.failed is not None:  # such as SystemExit, whose status may be 0
        raise InputError(f"The reward {scorer.name} failed with {type(scorer.failed).__name__}: {scorer.failed}") from scorer.failed
