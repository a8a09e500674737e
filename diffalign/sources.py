"""Where a pipeline's files come from, the Hub or a folder, and whether they are whole: found out before anything is loaded."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffalign import registry
from diffalign.errors import InputError

DIFFUSERS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")  # in the order in which each library looks for them
TRANSFORMERS = ("model.safetensors", "pytorch_model.bin")
NAMES = {"diffusers": DIFFUSERS, "transformers": TRANSFORMERS}  # a class that comes with a pipeline may be either's
OF_LIBRARIES = "Take a model whose parts are classes of diffusers and transformers."
WEIGHTLESS = ("Scheduler", "Tokenizer", "Processor", "FeatureExtractor")


def class_of(source: str, revision: str | None = None) -> str:
    """The class of a pipeline by its name, folder or Hub id: from model_index.json alone.

    Raises InputError where there is none, and for a `revision` of what is not on the Hub.
    """
    path = registry.locate(source)
    if path is not None and revision is not None:
        raise InputError(f"revision is {revision}, and the model '{source}' is here, not on the Hub: it has none. Drop --revision.")
    return _index(_fetched(source, revision) if path is None else path / "model_index.json")["_class_name"]


def folder_of(source: str, revision: str | None, pipeline_class: Any) -> Path:
    """The folder with a pipeline's files, downloaded where `source` is a Hub id, all of them there and whole; else raises InputError."""
    path = registry.locate(source)
    if path is None:
        _refuse_code(_index(_fetched(source, revision)), source)  # what downloads it would say how to have it run
        try:
            # safetensors where every part has them, else .bin, which are read weights-only
            path = Path(pipeline_class.download(source, revision=revision, use_safetensors=None))
        except Exception as error:
            raise _unreachable(source, revision, error) from error
    check(path)
    return path


def check(folder: Path) -> None:
    """Raise InputError for parts that are programs, and for weights that are missing, cut short, or pickles of more than weights; of a
    folder in diffusers layout."""
    index = _index(folder / "model_index.json")
    _refuse_code(index, folder)
    for part, entry in index.items():  # a tokenizer that is not there would load as an empty one
        if isinstance(entry, list) and "okenizer" in str(entry[-1]) and not any((folder / part).glob("*")):
            raise InputError(f"{folder / part} is missing: the model is not whole (half a download?). {_mend(folder)}")
    for part, files in _parts(folder):
        for file in files:
            if not file.is_file():
                raise InputError(f"{_missing(file)} {_mend(folder)}")
            _check_file(file, part, folder)


def commit_of(folder: str | None) -> str | None:
    """The commit that a folder of the Hub's cache is a snapshot of; None for other folders, and for none."""
    path = Path(folder or "")
    return path.name if path.parent.name == "snapshots" and path.parents[1].name.startswith("models--") else None


def absent(folder: Path) -> list[str]:
    """The parts that a pipeline was saved without, such as Stable Diffusion 3's T5: diffusers loads it so where it is told of each."""
    return [part for part, entry in _index(folder / "model_index.json").items() if entry == [None, None]]


def pickled(folder: Path) -> list[str]:
    """The parts of a pipeline whose weights are .bin files."""
    return [part for part, files in _parts(folder) if any(file.suffix == ".bin" for file in files)]


def _index(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        if not isinstance(found["_class_name"], str | list):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: it names no pipeline class. Fetch or save the model again.") from error
    if isinstance(found["_class_name"], list):
        raise InputError(f"{path} names a pipeline class of the model's own code, which is not run. {OF_LIBRARIES}")
    return found


def _refuse_code(index: Mapping[str, Any], model: str | Path) -> None:
    """Raise InputError for a part whose class is no library's, but in a file of the model."""
    from diffusers import pipelines

    for part, entry in index.items():
        if part.startswith("_") or not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
            continue
        library, name = entry
        file = f"{part}/{library}.py"
        beside = isinstance(model, Path) and (model / file).is_file()  # diffusers takes it before a library of that name
        if beside or not (library in NAMES or hasattr(pipelines, library)):
            raise InputError(
                f"The {part} of {model} is of the class {name} in the model's own code ({file}), which is not run. {OF_LIBRARIES}"
            )


def _fetched(source: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, "model_index.json", revision=revision))
    except Exception as error:
        raise _unreachable(source, revision, error) from error


def _parts(folder: Path) -> Iterator[tuple[str, list[Path]]]:
    """The parts of a pipeline that hold weights, each with its files, whether they are there or not."""
    for part, entry in _index(folder / "model_index.json").items():
        if part.startswith("_") or not isinstance(entry, list) or len(entry) != 2 or None in entry:
            continue
        library, name = entry
        # networks write a config.json, and other parts files of other names; a folder that is not there at all is told by its class
        if any(word in str(name) for word in WEIGHTLESS) or ((folder / part).is_dir() and not (folder / part / "config.json").is_file()):
            continue
        yield part, _files(folder / part, NAMES.get(library, (*TRANSFORMERS, *DIFFUSERS)))


def _files(folder: Path, names: Sequence[str]) -> list[Path]:
    """The files that a part is loaded from; where there is none, the one that should be there."""
    for name in names:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(f"{index} is damaged: it names no files. Fetch or save the model again.") from error
            return [folder / shard for shard in shards]
    return [folder / names[0]]


def _missing(file: Path) -> str:
    others = sorted(other.name for other in file.parent.glob("*.safetensors")) if file.parent.is_dir() else []
    if any(other.startswith(f"{file.stem}.") for other in others):
        return f"{file} is missing, and only {', '.join(others)} is there: a variant, which is not read."
    return f"{file} is missing: the model is not whole (half a download?)."


def _mend(folder: Path) -> str:
    """How to complete a folder: a snapshot in the Hub's cache by fetching its repository again."""
    for parent in folder.resolve().parents:
        if parent.name.startswith("models--"):
            return f"Fetch it again: hf download {parent.name.removeprefix('models--').replace('--', '/')}"
    return "Fetch the missing files (hf download USER/MODEL --local-dir FOLDER goes on where it stopped), or save the model again."


def _check_file(file: Path, part: str, folder: Path) -> None:
    with file.open("rb") as opened:
        if opened.read(20).startswith(b"version https://git-"):
            raise InputError(f"{file} is a note of git-lfs in the place of the weights. Fetch them in that checkout: git lfs pull")
    if file.suffix == ".bin":
        _check_pickle(file, part)
        return
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt"):  # reads the header, and holds it against the file's size
            pass
    except SafetensorError as error:
        raise InputError(f"{file} does not load ({error}): it is cut short or damaged. {_mend(folder)}") from error


def _check_pickle(file: Path, part: str) -> None:
    """Raise InputError for a file that torch does not load weights-only, which runs nothing in it."""
    import pickle

    import torch

    try:
        torch.load(file, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{file} is a pickle that holds more than weights, and is not opened: it could run any program. "
            f"Take a copy of the model whose {part} is in safetensors, or load it where you trust it, and save_pretrained writes one."
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).partition("\n")[0][:200]
        raise InputError(f"{file} does not load ({reason}): it is cut short or damaged. Fetch or save it again.") from error


def _unreachable(source: str, revision: str | None, error: BaseException) -> Exception:
    """What a person can do about an error of the Hub's client; a full disk's stays what it is."""
    from huggingface_hub import errors
    from huggingface_hub.constants import is_offline_mode

    chain = list(chain_of(error))

    def of(*kinds: type[BaseException]) -> Any:
        return next((link for link in chain if isinstance(link, kinds)), None)

    if any(isinstance(link, OSError) and link.errno == errno.ENOSPC for link in chain):
        return OSError(errno.ENOSPC, f"No space left on device, to download {source}")
    if of(errors.GatedRepoError):
        return InputError(
            f"The model '{source}' is gated: its owner grants access on https://huggingface.co/{source}. "
            "Ask for it there, then log in here: hf auth login"
        )
    if of(errors.DisabledRepoError):
        return InputError(f"The model '{source}' was disabled on the Hub: choose another, or a copy of it in a folder.")
    if of(errors.RepositoryNotFoundError):
        return InputError(
            f"There is no model '{source}' on the Hub, or it is private. Check the name; for a private one log in: hf auth login"
        )
    if of(errors.RevisionNotFoundError):
        return InputError(
            f"The model '{source}' has no revision '{revision}'. Its branches, tags and commits: https://huggingface.co/{source}/commits"
        )
    if of(errors.RemoteEntryNotFoundError):
        return InputError(f"'{source}' on the Hub holds no model_index.json: give a whole pipeline in diffusers layout.")
    if of(errors.HFValidationError):
        return InputError(f"'{source}' can be no name on the Hub: give user/model, or a folder that exists.")
    answered = of(errors.HfHubHTTPError)
    if answered is not None and answered.response is not None:
        status = answered.response.status_code
        mends = {401: "log in again, hf auth login", 403: "your login has no right to it", 429: "wait a while, then try again"}
        return InputError(f"The Hub answered {status} when it was asked for '{source}': {mends.get(status, 'try again later')}.")
    if is_offline_mode() and of(errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError):
        return InputError(
            f"'{source}' is not on this machine, or not all of it, and HF_HUB_OFFLINE forbids to fetch it: unset that, "
            f"or fetch it where there is a network (hf download {source})."
        )
    if of(errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError, TimeoutError) or of_transport(chain):
        return InputError(
            f"'{source}' is not on this machine, or not all of it, and the Hub cannot be reached: check the network and try again. "
            "Is it the name of a folder? There is none here."
        )
    reason = " ".join(str(error).split())[:300]
    return InputError(f"The model '{source}' could not be fetched ({type(error).__name__}: {reason}).")


def of_transport(chain: list[BaseException]) -> bool:
    """Whether the HTTP client itself failed, whichever one huggingface_hub has."""
    return any(type(link).__module__.partition(".")[0] in ("httpx", "httpx2", "requests", "urllib3") for link in chain)


def chain_of(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it came of."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
