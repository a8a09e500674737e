"""Prompts, some of them about a picture or with a transcript: where they come from, and the batches that a policy takes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Generator

from diffalign.errors import InputError
from diffalign.media import data_uri, decode_image, fit, from_data_uri
from diffalign.registry import MODELS, PROMPTS
from diffalign.types import PicturePolicy, Policy, PromptField, Prompts, SoundPolicy, says

Metadata = tuple[tuple[str, str | int | float | bool], ...]  # names and values, in their order


@dataclass(frozen=True)
class TextPrompt:
    """A text, and what is known of it, which a composed reward's parts may ask for. Of a list all prompts have metadata, or none has."""

    text: str
    metadata: Metadata = ()


@dataclass(frozen=True)
class PicturePrompt:
    """What to do with a picture, and where it is to be filled anew a mask; both are files, or the bytes of such."""

    text: str
    picture: Path | bytes
    mask: Path | bytes | None = None
    metadata: Metadata | None = None

    def open(self) -> Image.Image:
        """The picture in RGB; raises InputError where it is missing or damaged."""
        return _opened(self.picture, self.text, "picture")

    def open_both(self) -> tuple[Image.Image, Image.Image | None]:
        """The picture, and the mask in grey, white where the picture is to be filled.

        Raises InputError also where their sizes differ, and where nothing is to be filled.
        """
        picture = self.open()
        if self.mask is None:
            return picture, None
        mask = _opened(self.mask, self.text, "mask").convert("L")
        if mask.size != picture.size:
            sizes = f"{mask.width} x {mask.height}, and the picture {picture.width} x {picture.height}"
            raise InputError(f"The mask of '{self.text}' is {sizes}: they must be of one size, so that one knows what is masked.")
        lightest = int(np.asarray(mask).max())
        if lightest < 128:
            values = "its values are 0 and 1, and white is 255: multiply them by 255" if lightest == 1 else "white says where to fill"
            raise InputError(f"The mask of '{self.text}' is black all over, so that nothing is filled: {values}.")
        return picture, mask


def _opened(file: Path | bytes, text: str, what: str) -> Image.Image:
    if isinstance(file, bytes):
        return decode_image(file, f"The {what} of '{text}'")
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InputError(f"The {what} {file} of the prompt '{text}' cannot be read ({error.strerror}).") from error
    return decode_image(data, str(file))


@dataclass(frozen=True)
class SpokenPrompt:
    """What is to be said, and how, which may be empty."""

    text: str
    transcript: str
    metadata: Metadata | None = None


Prompt = str | TextPrompt | PicturePrompt | SpokenPrompt


def text_of(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else prompt.text


def caption_of(prompt: Prompt) -> str:
    """The prompt as people read it: with what is to be said."""
    if not isinstance(prompt, SpokenPrompt):
        return text_of(prompt)
    return f'{prompt.text}: "{prompt.transcript}"' if prompt.text else f'"{prompt.transcript}"'


def known_as(prompt: Prompt) -> str:
    """What tells prompts apart, but for their pictures and metadata."""
    return f"{prompt.text}\0{prompt.transcript}" if isinstance(prompt, SpokenPrompt) else text_of(prompt)


def without_pictures(prompts: Sequence[Prompt]) -> Prompts:
    """The texts of prompts, and their metadata where they have some."""
    metadata = [None if isinstance(prompt, str) else prompt.metadata for prompt in prompts]
    known = tuple(dict(values or ()) for values in metadata)
    return Prompts(tuple(map(text_of, prompts)), metadata=None if all(values is None for values in metadata) else known)


def _alike(prompts: list[Prompt]) -> list[Prompt]:
    """The prompts; where one has metadata the others have empty ones, so that all batches have the same fields."""
    if all(isinstance(prompt, str) or prompt.metadata is None for prompt in prompts):
        return prompts
    tagged = [TextPrompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    return [replace(prompt, metadata=()) if prompt.metadata is None else prompt for prompt in tagged]


def batch_of(prompts: Sequence[Prompt], policy: Policy | None = None) -> Prompts:
    """Prompts as `policy` takes them, pictures and masks scaled and cut to its size; texts alone where there is no policy yet.

    Raises InputError as `check_pictures` does, and for a picture that is missing or damaged.
    """
    pictures, said = check_pictures(prompts, policy), check_transcripts(prompts, policy)
    texts = without_pictures(prompts)
    if not pictures or not isinstance(policy, PicturePolicy):
        return replace(texts, transcript=tuple(said) or None, sample_rate=rate_of(policy))
    opened, size = [prompt.open_both() for prompt in pictures], (policy.height, policy.width)
    images = torch.stack([fit(picture, *size) for picture, _ in opened])
    # scaled and cut as its picture is, then 1 where it is more white than black
    masks = [(fit(mask.convert("RGB"), *size)[:1] >= 0.5).float() for _, mask in opened if mask is not None]
    return replace(texts, image=images, mask=torch.stack(masks) if masks else None)


def takes(policy: Policy | None) -> tuple[PromptField, ...]:
    """Which pictures the policy's prompts come with, or that they have transcripts."""
    return policy.takes if isinstance(policy, PicturePolicy | SoundPolicy) else ()


def rate_of(policy: Policy | None) -> int | None:
    """The sample rate of a policy's sounds, Hz; None where it makes pictures."""
    return policy.sample_rate if isinstance(policy, SoundPolicy) and policy.modality == "audio" else None


def check_fit(prompts: Sequence[Prompt], policy: Policy) -> None:
    """Raise InputError for prompts that lack what the policy takes, bring what it does not take, or that it cannot say."""
    check_pictures(prompts, policy)
    check_transcripts(prompts, policy)
    if isinstance(policy, SoundPolicy) and policy.modality == "audio":
        for prompt in prompts:
            apart = prompt.transcript if isinstance(prompt, SpokenPrompt) and "transcript" in takes(policy) else None
            why = policy.unspeakable(text_of(prompt) if apart is None else apart)
            if why is not None:
                what = "prompt" if apart is None else "transcript of the prompt"
                raise InputError(f"The {what} {caption_of(prompt)} cannot be said: {why}. Write it otherwise.")


def check_transcripts(prompts: Sequence[Prompt], policy: Policy | None) -> list[str]:
    """The transcripts, of all prompts or of none; raises InputError where the policy says them and one is lacking, or could not say one.

    A policy of sound that is told its text alone may have prompts with transcripts that are in the text ("a man: seven" says "seven"):
    its rewards hear for them.
    """
    spoken = [prompt for prompt in prompts if isinstance(prompt, SpokenPrompt)]
    if policy is None or not prompts:
        return []
    if "transcript" not in takes(policy):
        unsaid = [p for p in spoken if policy.modality != "audio" or not says(p.text, p.transcript)]
        if unsaid:
            own = (
                " It says the text itself: write the prompt so that the transcript is in it." if policy.modality == "audio" else " Drop it."
            )
            raise InputError(f"This pipeline takes no transcript, and the prompt {caption_of(unsaid[0])} comes with one.{own}")
        return [prompt.transcript if isinstance(prompt, SpokenPrompt) else text_of(prompt) for prompt in prompts] if spoken else []
    lacking = [prompt for prompt in prompts if not isinstance(prompt, SpokenPrompt)]
    if lacking:
        raise InputError(
            f"This pipeline says transcripts, and the prompt '{text_of(lacking[0])}' has none. Give a .jsonl file of lines such as "
            '{"prompt": "a calm voice", "transcript": "seven"}; to diffalign sample, --transcript TEXT.'
        )
    return [prompt.transcript for prompt in spoken]


def check_pictures(prompts: Sequence[Prompt], policy: Policy | None) -> list[PicturePrompt]:
    """Those prompts that have a picture: all where the policy takes pictures, else none; raises InputError where it is otherwise.

    The same of masks.
    """
    wanted = takes(policy)
    pictures = [prompt for prompt in prompts if isinstance(prompt, PicturePrompt)]
    lacking: list[Prompt] = [prompt for prompt in prompts if not isinstance(prompt, PicturePrompt)]
    if "mask" in wanted:
        lacking += [prompt for prompt in pictures if prompt.mask is None]
    if "image" in wanted and lacking:
        what = "edits pictures" if wanted == ("image",) else "fills masked pictures"
        none = "no mask" if isinstance(lacking[0], PicturePrompt) else "none"
        example = ", ".join(['"prompt": "make it red"', '"image": "picture.png"', '"mask": "mask.png"'][: 1 + len(wanted)])
        flags = " ".join(f"--{name} FILE" for name in wanted)
        raise InputError(
            f"This pipeline {what}, and the prompt '{text_of(lacking[0])}' has {none}. Give a .jsonl file of lines such as {{{example}}}; "
            f"to diffalign sample, {flags}."
        )
    masked = [prompt for prompt in pictures if prompt.mask is not None]
    for name, found in (("image", pictures), ("mask", masked)):
        if name not in wanted and found:
            what = "picture" if name == "image" else "mask"
            raise InputError(f"This pipeline takes no {what}, and the prompt '{found[0].text}' comes with one. Drop the {what}s.")
    return pictures


def read_prompts(source: str, part: str = "train") -> list[Prompt]:
    """Prompts from a file (.txt: one a line; .jsonl: the keys 'prompt' and, where the pipeline takes them, 'image' and 'mask', or
    'transcript', beside which the prompt may be missing, and 'metadata', an object of values that a composed reward may ask for; .json: a
    list of texts or of such objects), the name of a list or of an embedded model, or `hf:user/dataset/path/in/it.txt`.

    A pipe is read like a .txt file, once. An image or a mask is a path in the file's folder, or a data: URI. `part` ('train' or 'heldout')
    picks the list of an embedded model. Raises InputError for a file that is missing, empty or no text, and for pictures that are missing
    or damaged.
    """
    if source in MODELS:
        folder = MODELS[source] / "prompts"
        path = next((p for p in (folder / f"{part}.txt", folder / f"{part}.jsonl") if p.is_file()), folder / f"{part}.txt")
    elif source in PROMPTS:
        path = PROMPTS[source]
    elif source.startswith("hf:"):
        path = _download(source.removeprefix("hf:"))
    else:
        path = Path(source).expanduser()
    prompts = read_file(path, path.parent)
    for prompt in prompts:
        if isinstance(prompt, PicturePrompt):
            prompt.open_both()
    return prompts


def read_file(path: Path, root: Path | None) -> list[Prompt]:
    """Prompts of a file as `read_prompts` has them; their pictures are not opened, and lie in `root`, where one is given."""
    if not path.is_file() and not path.is_fifo():  # such as the shell's <(command)
        known = ", ".join((*MODELS, *PROMPTS))
        raise InputError(f"There is no prompt file {path}. Give a text file with one prompt a line, or one of: {known}.")
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte-order mark
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text file (UTF-8). Give one prompt a line.") from error
    if "\0" in text:
        raise InputError(f"{path} is a binary file. Give one prompt a line.")
    lines = [line.strip() for line in (_listed(text, path) if path.suffix == ".json" else text.splitlines())]
    prompts = [_of_json(line, path, i, root) if path.suffix in (".json", ".jsonl") else line for i, line in enumerate(lines, 1) if line]
    if not prompts:
        raise InputError(f"{path} holds no prompts. Give one prompt a line.")
    return _alike(prompts)


def _listed(text: str, path: Path) -> list[str]:
    """The entries of a JSON list of texts (as HPDv2's benchmark) or of objects, as lines of .jsonl."""
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path} is no JSON ({error}).") from error
    if not isinstance(entries, list):
        raise InputError(f'{path} is no list: expected ["a dog", ...] or [{{"prompt": "a dog"}}, ...].')
    return [json.dumps({"prompt": entry} if isinstance(entry, str) else entry) for entry in entries]


def write_file(path: Path, prompts: Sequence[Prompt]) -> None:
    """Write prompts as .jsonl; a picture's bytes as a data: URI, a file by its absolute path."""
    path.write_text("".join(json.dumps(_to_json(prompt)) + "\n" for prompt in prompts), encoding="utf-8")


def _to_json(prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"prompt": prompt}
    known = {} if prompt.metadata is None else {"metadata": dict(prompt.metadata)}
    if isinstance(prompt, TextPrompt):
        return {"prompt": prompt.text, **known}
    if isinstance(prompt, SpokenPrompt):
        return {"prompt": prompt.text, "transcript": prompt.transcript, **known}
    files = {"image": prompt.picture} | ({} if prompt.mask is None else {"mask": prompt.mask})
    named = {name: str(file.absolute()) if isinstance(file, Path) else data_uri(file) for name, file in files.items()}
    return {"prompt": prompt.text, **named, **known}


def _of_json(line: str, path: Path, number: int, root: Path | None) -> Prompt:
    where = f"{path}, {'entry' if path.suffix == '.json' else 'line'} {number}"
    try:
        values = json.loads(line)
        prompt = values["prompt"] if values.get("transcript") is None else values.get("prompt") or ""
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f'{where}: expected an object with the key "prompt", such as {{"prompt": "a dog"}}.') from error
    said = values.get("transcript")
    if not isinstance(prompt, str) or not (prompt.strip() or said is not None):
        raise InputError(f"{where}: the prompt is no text, or empty.")
    if said is not None and (not isinstance(said, str) or not said.strip()):
        raise InputError(f"{where}: the transcript is no text, or empty.")
    _check_text(prompt + (said or ""), where)
    image, mask = (None if values.get(key) is None else _picture(values[key], key, where, root) for key in ("image", "mask"))
    if image is None and mask is not None:
        raise InputError(f"{where}: there is a mask, and no image that it is of.")
    metadata = None if values.get("metadata") is None else _metadata(values["metadata"], where)
    if said is not None:
        if image is not None:
            raise InputError(f"{where}: there is an image and a transcript, and no pipeline takes both.")
        return SpokenPrompt(prompt.strip(), said.strip(), metadata)
    if image is None:
        return prompt.strip() if metadata is None else TextPrompt(prompt.strip(), metadata)
    return PicturePrompt(prompt.strip(), image, mask, metadata)


def _metadata(values: Any, where: str) -> Metadata:
    if not isinstance(values, Mapping) or not all(isinstance(value, str | int | float) for value in values.values()):
        raise InputError(f'{where}: metadata is an object of texts and numbers, such as {{"style": "photo"}}.')
    return tuple((str(name), value) for name, value in values.items())


def _picture(value: Any, key: str, where: str, root: Path | None) -> Path | bytes:
    if not isinstance(value, str) or not value or "\0" in value:
        raise InputError(f"{where}: the {key} is no text: give a path in the file's folder.")
    if value.startswith("data:"):
        try:
            return from_data_uri(value)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
    if root is None:
        return Path(value)
    if PurePath(value).is_absolute() or not (root / value).resolve().is_relative_to(root.resolve()):
        raise InputError(f"{where}: the path {value!r} leads out of {root}. Pictures lie in the file's folder.")
    if not (root / value).is_file():
        raise InputError(f"{where}: there is no picture {root / value}.")
    return root / value


def _download(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    parts = name.split("/", 2)
    if len(parts) < 3:
        raise InputError(f"hf:{name}: give hf:user/dataset/path/in/it.txt.")
    try:
        return Path(hf_hub_download("/".join(parts[:2]), parts[2], repo_type="dataset"))
    except Exception as error:
        raise InputError(f"hf:{name} could not be fetched ({type(error).__name__}). Check the name, the network and your token.") from error


def check_prompts(prompts: Sequence[Any]) -> list[Prompt]:
    """The prompts of a Python caller: texts, `TextPrompt`, `SpokenPrompt(text, transcript)`, `(text, picture file)` or
    `(text, picture file, mask file)`.

    Raises InputError where there are none, one is empty, or a file cannot be used.
    """
    pairs: list[Any] = [_of_tuple(prompt) if isinstance(prompt, tuple) else prompt for prompt in prompts]
    if not pairs or not all(map(_usable, pairs)):
        raise InputError(
            "prompts: give a non-empty list of non-empty strings; for an editing pipeline of (string, picture file), for inpainting of "
            "(string, picture file, mask file), for speech of diffalign.SpokenPrompt(text, transcript)."
        )
    for prompt in pairs:
        _check_text(caption_of(prompt), "prompts")
        if isinstance(prompt, PicturePrompt):
            prompt.open_both()
    return _alike([prompt.strip() if isinstance(prompt, str) else replace(prompt, text=prompt.text.strip()) for prompt in pairs])


def _check_text(text: str, where: str) -> None:
    if "\0" in text:  # which caches part texts with
        raise InputError(f"{where}: {text!r} holds the character U+0000, which is of no text. Drop it.")


def _usable(prompt: Any) -> bool:
    if isinstance(prompt, SpokenPrompt):
        return isinstance(prompt.text, str) and isinstance(prompt.transcript, str) and bool(prompt.transcript.strip())
    return isinstance(prompt, Prompt) and isinstance(text_of(prompt), str) and bool(text_of(prompt).strip())


def _of_tuple(prompt: tuple[Any, ...]) -> PicturePrompt | None:
    files = prompt[1:]
    if len(files) not in (1, 2) or not all(isinstance(file, str | Path) for file in files):
        return None
    return PicturePrompt(prompt[0], Path(files[0]), Path(files[1]) if len(files) > 1 else None)


def hold_out(prompts: Sequence[Prompt], seed: int, share: float = 0.1, most: int = 256) -> tuple[list[Prompt], list[Prompt]]:
    """Split distinct prompts into training and held-out ones. Fewer than ten cannot spare any: both lists are then all of them."""
    distinct = list(dict.fromkeys(prompts))
    if len(distinct) < 10:
        return list(prompts), distinct
    order = torch.randperm(len(distinct), generator=Generator().manual_seed(seed)).tolist()
    held = {distinct[i] for i in order[: min(most, int(len(distinct) * share))]}
    return [p for p in prompts if p not in held], [p for p in distinct if p in held]
