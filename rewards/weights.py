"""Where the weights of trained rewards come from: files of a user or of the Hub, looked at before they are used."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from diffalign.errors import InputError
from diffalign.notices import quiet

WEIGHTS = ["*.json", "model.safetensors", "model-*.safetensors"]
TOKENIZER = ["tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "*.model"]


def fetch(repo: str, file: str, revision: str, local: Path | None, sha256: str | None = None) -> Path:
    """The user's file `local`, or a file of the Hub, with the checksum that is asked for, or that the Hub states. InputError where not."""
    if local is not None:
        path = local.expanduser()
        if not path.is_file():
            raise InputError(f"There is no file {path}: --reward.checkpoint takes the path of {file}.")
        check_sha256(path, sha256)
        return path
    from huggingface_hub import hf_hub_download

    try:
        path = Path(hf_hub_download(repo, file, revision=revision))
    except Exception as error:
        url = f"https://huggingface.co/{repo}/resolve/{revision}/{file}"
        raise InputError(
            f"{file} of {repo} could not be fetched ({type(error).__name__}). Where there is no network, download {url} elsewhere "
            "and name the file: --reward.checkpoint FILE."
        ) from error
    check_sha256(path, sha256 or hub_sha256(path))
    return path


def fetch_url(url: str, local: Path | None, sha256: str | None = None) -> Path:
    """The user's file `local`, or a file that is no Hub's, kept where torch.hub keeps such; InputError where it is none, or another one."""
    name = url.rpartition("/")[2]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name if local is None else local.expanduser()
    if local is not None and not path.is_file():
        raise InputError(f"There is no file {path}: --reward.checkpoint takes the path of {name}.")
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), progress=False)
        except Exception as error:
            raise InputError(
                f"{name} could not be fetched ({type(error).__name__}). Where there is no network, download {url} elsewhere and name the "
                "file: --reward.checkpoint FILE."
            ) from error
    check_sha256(path, sha256)
    return path


def snapshot(repo: str, revision: str, local: Path | None, flag: str, patterns: Sequence[str]) -> Path:
    """The user's folder `local`, or one with the files of a Hub repository that fit the patterns. InputError where there is none."""
    if local is not None:
        folder = local.expanduser()
        if not folder.is_dir():
            raise InputError(
                f"There is no folder {folder}: --reward.{flag} takes one with the files of {repo}, as save_pretrained writes them."
            )
        return folder
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
        if "model.safetensors" in patterns and not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(repo, revision=revision, allow_patterns=[*patterns, "pytorch_model*.bin"]))
    except Exception as error:
        raise InputError(
            f"{repo} could not be fetched ({type(error).__name__}). Check the name, the revision and your login for a gated model "
            f"(hf auth login). Where there is no network, download it elsewhere (hf download {repo} --local-dir FOLDER) "
            f"and name it: --reward.{flag} FOLDER."
        ) from error
    for file in folder.iterdir():
        check_sha256(file, hub_sha256(file))
    return folder


def hub_sha256(path: Path) -> str | None:
    """The sha256 that the Hub states for a large file in its cache: the name of the blob that it links to. None for small files."""
    name = Path(os.readlink(path)).name if path.is_symlink() else ""
    return name if re.fullmatch(r"[0-9a-f]{64}", name) else None


def check_sha256(path: Path, expected: str | None) -> None:
    """Raise InputError where a file has another checksum than `expected`; None expects nothing."""
    if expected is None:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected.lower():
        raise InputError(
            f"{path} is not what was asked for: its sha256 is {found}, and {expected.lower()} is expected. Fetch it again, or mend "
            "--reward.sha256 if that was given."
        )


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a torch file that holds nothing but tensors, by name; of its `state_dict` if it has one.

    Raises InputError for a damaged file, and for a pickle with anything that is not plain data: loading that could run its code.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if not re.search("[Uu]nsupported (global|class)|GLOBAL|reduce", str(error)):
            raise InputError(f"{path} is no checkpoint that can be read: it is damaged, or no torch file. Fetch it again.") from error
        raise InputError(
            f"{path} holds pickled objects besides tensors, which could run code when they are loaded: it is refused. Save its tensors "
            "alone, as safetensors or torch.save(model.state_dict())."
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} is damaged or cut short ({_said(error)}). Fetch it again.") from error
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise InputError(f"{path} holds no tensors by name: a checkpoint's state dict is expected.")
    return found


class Source(NamedTuple):
    """Where a parameter stands in a checkpoint: under `key`, all of it or the third `part` of three, transposed or not."""

    key: str
    part: int | None = None
    transposed: bool = False

    def take(self, tensor: Tensor) -> Tensor:
        tensor = tensor if self.part is None else tensor.chunk(3)[self.part]
        return tensor.T if self.transposed else tensor


def require(weights: Mapping[str, Tensor], keys: Iterable[str], what: str, path: Path) -> None:
    """Raise InputError where the weights lack one of `keys`, which tell how large the network is."""
    lacking = [key for key in keys if key not in weights]
    if lacking:
        raise InputError(f"{path} is no checkpoint of {what}: it lacks {_some(lacking)}, and has {_some(sorted(weights))}.")


def count(weights: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the largest number that the pattern finds among the names: of layers."""
    return max((int(found[1]) for key in weights if (found := re.match(pattern, key))), default=-1) + 1


def convert(weights: Mapping[str, Tensor], networks: Mapping[str, tuple[nn.Module, Callable[[str], Source]]], path: Path) -> dict[str, Any]:
    """State dicts of several networks, by name, out of one checkpoint. Each is given with where its parameters stand in there.

    The networks may be on the device `meta`: only names and shapes count. Raises InputError with all keys that are missing,
    unexpected or of another shape.
    """
    states: dict[str, dict[str, Tensor]] = {}
    wanted, shapes = set[str](), list[str]()
    for name, (network, source_of) in networks.items():
        states[name] = {}
        for parameter, model in network.state_dict().items():
            source = source_of(parameter)
            wanted.add(source.key)
            if source.key in weights:
                found = source.take(weights[source.key])
                states[name][parameter] = found
                if found.shape != model.shape:
                    shapes.append(f"{source.key} {tuple(weights[source.key].shape)}")
    missing, unexpected = sorted(wanted - set(weights)), sorted(set(weights) - wanted)
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    if any(faults.values()):
        text = "; ".join(f"{len(keys)} {what}: {_some(keys)}" for what, keys in faults.items() if keys)
        raise InputError(f"{path} is not the checkpoint of this reward. Keys {text}.")
    return states


def build(model_class: Any, config: Any, state: Mapping[str, Tensor], dtype: torch.dtype, **more: Any) -> Any:
    """A transformers network with these weights, frozen."""
    with quiet():
        model = model_class.from_pretrained(None, config=config, state_dict=dict(state), dtype=dtype, **more)
    return model.eval().requires_grad_(False)


def load(model_class: Any, folder: Path, dtype: torch.dtype, unused: str | None = None) -> Any:
    """A transformers network from a folder, frozen. Raises InputError where it does not load, or weights are missing.

    `unused` is a pattern of the weights that are of training alone: published files often lack them.
    """
    try:
        with quiet():
            model, said = model_class.from_pretrained(
                folder, dtype=dtype, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except Exception as error:
        raise InputError(f"The model in {folder} does not load: {_said(error)} Fetch or save it again.") from error
    missing = sorted(key for key in said["missing_keys"] if unused is None or not re.search(unused, key))
    if missing:
        raise InputError(f"The model in {folder} lacks {len(missing)} weights: {_some(missing)}.")
    if said["mismatched_keys"]:
        shapes = [f"{key} {tuple(theirs)}, not {tuple(ours)}" for key, theirs, ours in sorted(said["mismatched_keys"])]
        raise InputError(f"The model in {folder} has weights of another shape than its config.json says: {_some(shapes)}.")
    return model.eval().requires_grad_(False)


def load_tokenizer(tokenizer_class: Any, folder: Path, size: int, at_least: int | None = None) -> Any:
    """A tokenizer from a folder; raises InputError where it does not load, or has not `size` tokens (from `at_least` on, where given)."""
    try:
        with quiet():
            tokenizer = tokenizer_class.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise InputError(f"The tokenizer in {folder} does not load: {_said(error)}") from error
    if not (size if at_least is None else at_least) <= len(tokenizer) <= size:
        raise InputError(f"The tokenizer in {folder} has {len(tokenizer):,} tokens and the network {size:,}: they do not belong together.")
    return tokenizer


def linears(weights: Mapping[str, Tensor], prefix: str, what: str, path: Path) -> tuple[nn.Sequential, Callable[[str], Source]]:
    """The linear layers `prefix`N.weight and .bias in their order, with nothing between, empty on `meta`; and where their weights stand.

    What these heads had between them was dropout, which does nothing outside training; the gaps in the numbers are its.
    """
    numbers = sorted({int(found[1]) for key in weights if (found := re.fullmatch(re.escape(prefix) + r"(\d+)\.weight", key))})
    require(weights, [f"{prefix}{number}.weight" for number in numbers or [0]], what, path)
    sizes = [weights[f"{prefix}{number}.weight"].shape for number in numbers]
    if any(before[0] != after[-1] for before, after in pairwise(sizes)) or sizes[-1][0] != 1:
        raise InputError(f"{path} is no checkpoint of {what}: its layers, {[tuple(size) for size in sizes]}, do not end in one number.")
    with torch.device("meta"):
        stack = nn.Sequential(*(nn.Linear(int(size[-1]), int(size[0])) for size in sizes))
    return stack, lambda name: Source(re.sub(r"^(\d+)", lambda found: f"{prefix}{numbers[int(found[1])]}", name))


def _said(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
