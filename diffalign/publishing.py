"""What of a run is published: its weights, model card, settings and evaluation, without anything of the machine that it was made on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from diffalign import bare
from diffalign.base import Base
from diffalign.card import card
from diffalign.checkpoint import occupied, whole
from diffalign.errors import InputError
from diffalign.guarding import guard_outcome
from diffalign.lora import WEIGHTS
from diffalign.origin import check_finished, evaluation_of
from diffalign.run import Run

CARD, CONFIG, EVALUATION, PICTURE, CURVE = "README.md", "diffalign.yaml", "eval.json", "before-after.png", "curve.png"
HEARD = re.compile(r"(before|after)-\d+\.wav")
MODEL = re.compile(r"(unet|transformer)/(config\.json|diffusion_pytorch_model[\w.-]*)")
OF_THE_MACHINE = ("device",)
TEXTS = ("negative_prompt", "suffix", "prompt", "text")  # fields of words, not of files, whatever they begin with
FILED = (
    "name",
    "pipeline",
    "prompts",
    "data",
    "eval_prompts",
    "rewards",
    "eval_rewards",
    "init",
    "run",
    "folder",
    "checkpoint",
    "file",
    "path",
    "model",
)

Contents = dict[str, bytes | Path]


def ours(name: str) -> bool:
    """Whether a file of a repository is one that `contents` makes."""
    known = (CARD, CONFIG, EVALUATION, PICTURE, CURVE, WEIGHTS, bare.CONFIG, bare.WEIGHTS)
    return name in known or bool(HEARD.fullmatch(name) or MODEL.fullmatch(name))


def check_publishable(run: Run) -> None:
    """Raise InputError for a run that is unfinished, or whose base model is a twin of random weights."""
    if run.plan.settings.tiny:
        raise InputError(f"{run.path} is a dry run, of a twin with random weights: there is nothing in it to publish.")
    check_finished(run)


def contents(run: Run, repo: str, base: Base) -> Contents:
    """What is published of a finished run, by its name in `repo`: bytes, or the file that holds them.

    Optimiser states, checkpoints and prompt lists stay at home, and so does where things lie: of a path its last part is told. Raises
    InputError where a file of the run is missing or damaged, or would still tell something of the machine.
    """
    measured = evaluation_of(run) if (run.path / "eval.json").is_file() else None
    evaluation = measured and public({**measured, **({"guard": _of_guard(measured["guard"])} if "guard" in measured else {})})
    config = public({name: value for name, value in run.config.items() if name not in OF_THE_MACHINE})
    found: Contents = {CONFIG: yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode()}
    found |= _weights(run, base) | _media(run)
    if evaluation is not None:
        found[EVALUATION] = _json(evaluation)
    if (run.path / CURVE).is_file():
        found[CURVE] = run.path / CURVE
    prompts = {part: run.read_prompts(part) for part in ("train", "heldout")}
    shown = prompts["heldout"] if found.get(PICTURE) == run.path / "samples" / PICTURE else []
    facts = {"evaluation": evaluation, "guard": _of_guard(guard_outcome(run)), "prompts": prompts, "shown": shown, "files": sorted(found)}
    found[CARD] = card(run, repo, base, config=config, **facts).encode()
    _check_private(run, found)
    return dict(sorted(found.items()))


def write(found: Contents, folder: Path) -> list[Path]:
    """Write what would be uploaded into a new folder; the files. Raises InputError where it holds something or cannot be written."""
    if occupied(folder):
        raise InputError(f"{folder} holds something already: give --dry-run a new folder.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with whole(folder) as draft:
            for name, content in found.items():
                (draft / name).parent.mkdir(parents=True, exist_ok=True)
                (draft / name).write_bytes(content.read_bytes() if isinstance(content, Path) else content)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}): give --dry-run another folder.") from error
    return [folder / name for name in found]


def public(value: Any, field: str = "") -> Any:
    """Plain values without paths of the machine, in keys too: of an absolute path its last part, of an address no login and no query.

    Keys that are the same then are numbered. `field` is the key that the value has: what is a text for people stays as it is.
    """
    match value:
        case Mapping():
            told: dict[Any, Any] = {}
            for key, inner in value.items():
                name = _public_text(key, "name") if isinstance(key, str) else key
                count = 2
                while name in told or (name != key and name in value):
                    name, count = f"{_public_text(key, 'name')} ({count})", count + 1
                told[name] = public(inner, key)
            return told
        case list() | tuple():
            return [public(inner, field) for inner in value]
        case str():
            return _public_text(value, field)
        case _:
            return value


def is_path(text: str, field: str = "") -> bool:
    """Whether the value of a field tells where something lies: it is absolute or in a home folder, and of a field that names files, or
    of two parts or more and without a blank, or there."""
    if field in TEXTS or not re.match(r"/[^/]|~[\w.-]*/", text):
        return False
    if field in FILED:
        return True
    return "/" in text.rstrip("/")[1:] and (not re.search(r"\s", text) or _there(text))


def _there(text: str) -> bool:
    try:
        return Path(text.partition(".py:")[0] + ".py" if ".py:" in text else text).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False


def _of_guard(outcome: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """`public` of what came of a guard, whose sentence names the reward that fired."""
    if outcome is None or not outcome["fired"]:
        return public(outcome)
    measure, text = outcome["fired"]["measure"], outcome["fired"]["text"]
    fired = {"measure": _public_text(measure, "name"), "text": text.replace(measure, _public_text(measure, "name"))}
    return public({**outcome, "fired": {**outcome["fired"], **fired}})


def _public_text(text: str, field: str = "") -> str:
    if is_path(text, field):
        return text.rstrip("/").rpartition("/")[2]
    if text.startswith(("http://", "https://")):
        parts = urlsplit(text)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
    return text


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _weights(run: Run, base: Base) -> Contents:
    """The LoRA's files as diffusers or peft look for them; after full fine-tuning the network in a folder of its own name."""
    folder, inside = (run.path / "model", f"{base.network}/") if run.plan.settings.full else (run.path / "lora", "")
    files = [file for file in sorted(folder.iterdir()) if ours(inside + file.name)]
    if not any(file.suffix == ".safetensors" for file in files):
        raise InputError(f"{folder} holds no weights. Write them again: diffalign train --resume {run.path}")
    try:
        return {
            inside + file.name: _json(public(json.loads(file.read_text()))) if file.suffix == ".json" else _whole(file) for file in files
        }
    except ValueError as error:
        raise InputError(f"{folder} is damaged ({error}). Write it again: diffalign train --resume {run.path}") from error


def _whole(file: Path) -> Path:
    """The file, whose header fits its size; raises ValueError for another."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt"):
            return file
    except SafetensorError as error:
        raise ValueError(f"{file.name}: {error}") from error


def _media(run: Run) -> Contents:
    """Pictures or sounds before and after: the training's own, else those of a later diffalign eval."""
    picture = next((file for file in (run.path / "samples" / PICTURE, run.path / "eval.png") if file.is_file()), None)
    if picture is None:
        return {}
    found: Contents = {PICTURE: picture}
    for name in ("before", "after"):
        heard = re.compile(rf"{re.escape(picture.stem)}-{name}-(\d+)\.wav")
        for file in sorted(picture.parent.glob("*.wav")):
            if match := heard.fullmatch(file.name):
                found[f"{name}-{match[1]}.wav"] = file
    return found


def _check_private(run: Run, found: Contents) -> None:
    """Raise InputError where a text, or the header of weights, still tells of the machine or holds the token: the last look."""
    from huggingface_hub import get_token

    paths, token = ({str(Path.home()), str(run.path.resolve())} - {"/"}) | set(_paths(run.config)), get_token()
    secret = {path: "a path of this machine" for path in paths} | ({token: "your token"} if token else {})
    for name, content in found.items():
        said = content if isinstance(content, bytes) else _header(content)
        for text, what in secret.items():
            if text.encode() in said:
                raise InputError(f"{name} would tell {what}, and is not uploaded: take it out of the run's files.")


def _paths(value: Any, field: str = "") -> Iterator[str]:
    """The paths in a run's settings, keys included."""
    match value:
        case Mapping():
            for key, inner in value.items():
                yield from (*_paths(key, "name"), *_paths(inner, str(key)))
        case list():
            for inner in value:
                yield from _paths(inner, field)
        case str() if is_path(value, field):
            yield value.rstrip("/")
        case _:
            pass


def _header(file: Path) -> bytes:
    if file.suffix != ".safetensors":
        return b""
    with file.open("rb") as opened:
        return opened.read(int.from_bytes(opened.read(8), "little"))
