"""Where a pipeline comes from: every way in which the Hub or a folder fails has its own message, before anything is loaded."""

from __future__ import annotations

import importlib
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tiny
import torch
from huggingface_hub import errors
from parity import own_pictures, pictures, policy_of
from safetensors.torch import load_file, save_file

from diffalign import sources
from diffalign.errors import InputError
from diffalign.models import load_pipeline, make_policy
from diffalign.settings import Settings

client: Any = importlib.import_module(errors.HfHubHTTPError.__mro__[1].__module__.partition(".")[0])  # huggingface_hub's: httpx, httpx2
HUB_ID = "somebody/something"
UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


def answer(status: int) -> Any:
    return client.Response(status, request=client.Request("GET", f"https://huggingface.co/{HUB_ID}"))


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


UNREACHABLE = {
    "gated": (errors.GatedRepoError("x", response=answer(403)), "is gated: .*https://huggingface.co/somebody/something.*hf auth login"),
    "missing or private": (errors.RepositoryNotFoundError("x", response=answer(404)), "no model 'somebody/something' on the Hub.*private"),
    "revision": (errors.RevisionNotFoundError("x", response=answer(404)), "has no revision 'v9'.*something/commits"),
    "disabled": (errors.DisabledRepoError("x", response=answer(403)), "was disabled on the Hub"),
    "no pipeline": (errors.RemoteEntryNotFoundError("x", response=answer(404)), "holds no model_index.json: give a whole pipeline"),
    "a bad name": (errors.HFValidationError("x"), "can be no name on the Hub"),
    "login": (errors.HfHubHTTPError("x", response=answer(401)), "answered 401 .*hf auth login"),
    "too often": (errors.HfHubHTTPError("x", response=answer(429)), "answered 429 .*wait a while"),
    "server": (
        caused(errors.LocalEntryNotFoundError("x"), errors.HfHubHTTPError("x", response=answer(503))),
        "answered 503 .*try again later",
    ),
    "offline mode": (caused(errors.LocalEntryNotFoundError("x"), errors.OfflineModeIsEnabled("x")), "HF_HUB_OFFLINE forbids to fetch it"),
    "something else": (RuntimeError("of a\nnew kind"), r"could not be fetched \(RuntimeError: of a new kind\)"),
}


def fails(error: BaseException) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise error

    return call


@pytest.mark.parametrize("name", UNREACHABLE)
def test_each_failure_of_the_hub_has_its_message(name: str, monkeypatch: pytest.MonkeyPatch):
    error, says = UNREACHABLE[name]
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails(error))
    with pytest.raises(InputError, match=says) as raised:
        load_pipeline(HUB_ID, "v9")
    assert "\n" not in str(raised.value)
    assert raised.value.__cause__ is error, "--debug shows it"


@pytest.mark.parametrize("error", [client.ConnectError("x"), client.ReadTimeout("x"), ConnectionError("x"), TimeoutError("x")])
@pytest.mark.parametrize("wrapped", [False, True])
def test_no_network_is_said_so(error: Exception, wrapped: bool, monkeypatch: pytest.MonkeyPatch):
    raised = caused(errors.LocalEntryNotFoundError("x"), error) if wrapped else error
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails(raised))
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
    with pytest.raises(InputError, match="the Hub cannot be reached: check the network"):
        load_pipeline(HUB_ID)


def test_a_full_disk_is_none_of_the_hubs_failures(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left on device"):  # for which the command line has its message
        load_pipeline(HUB_ID)


@pytest.mark.parametrize("name", ["gated", "missing or private", "revision", "offline mode"])
def test_the_command_line_says_it_at_once_with_status_2(
    name: str, files: Path, run_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    error, _ = UNREACHABLE[name]
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails(error))
    monkeypatch.setattr("diffusers.StableDiffusionPipeline.from_pretrained", fails(AssertionError("nothing is loaded")))
    given = {"reward": f"{files / 'rewards.py'}:red", "prompts": files / "prompts.txt"}
    outcome = run_cli("train", "--pipeline", HUB_ID, *(f"--{k}={v}" for k, v in given.items()))
    assert outcome.status == 2, outcome.err
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    assert not list((tmp_path / "runs").glob("*"))


def test_a_download_that_breaks_off_is_said_too(files: Path, monkeypatch: pytest.MonkeyPatch):
    """The first file comes, and then the weights do not: diffusers wraps the Hub's error in one of its own."""
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **kwargs: str(files / "model" / "model_index.json"))
    error = caused(OSError("see the stacktrace above"), errors.GatedRepoError("x", response=answer(403)))
    monkeypatch.setattr("diffusers.StableDiffusionPipeline.download", fails(error))
    with pytest.raises(InputError, match="is gated"):
        load_pipeline(HUB_ID)


@pytest.fixture
def model(files: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(files / "model", tmp_path / "model"))


def as_bin(model: Path) -> Path:
    for name, old in ((UNET, "diffusion_pytorch_model.bin"), (TEXT, "pytorch_model.bin"), (UNET.replace("unet", "vae"), None)):
        file = model / name
        torch.save(load_file(file), file.with_name(old or "diffusion_pytorch_model.bin"))
        file.unlink()
    return model


def in_shards(model: Path) -> Path:
    file = model / UNET
    tensors = sorted(load_file(file).items())
    halves = {f"diffusion_pytorch_model-0000{n}-of-00002.safetensors": dict(tensors[n - 1 :: 2]) for n in (1, 2)}
    for name, half in halves.items():
        save_file(half, file.with_name(name), {"format": "pt"})
    weight_map = {tensor: name for name, half in halves.items() for tensor in half}
    file.with_name(f"{file.name}.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    file.unlink()
    return model


def test_a_whole_model_passes_in_one_file_and_in_shards(model: Path):
    sources.check(model)
    expected = own_pictures(policy_of(load_pipeline(str(model))))
    sources.check(in_shards(model))
    assert sources.pickled(model) == []
    assert torch.equal(own_pictures(policy_of(load_pipeline(str(model)))), expected)


def test_parts_without_weights_are_not_asked_for_any(tmp_path: Path):
    tiny.checked().save_pretrained(tmp_path)
    assert (tmp_path / "feature_extractor").is_dir()
    sources.check(tmp_path)
    (tmp_path / "safety_checker" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"safety_checker/model.safetensors is missing"):
        sources.check(tmp_path)
    for make in (tiny.sd3, lambda: tiny.sd3(t5=False), tiny.flux, *tiny.FAMILIES.values()):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        make().save_pretrained(folder)
        sources.check(folder)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:5000])


def renamed(file: Path, name: str) -> None:
    file.rename(file.with_name(name))


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights": (lambda m: (m / UNET).unlink(), r"unet/diffusion_pytorch_model.safetensors is missing.*half a download.*hf download"),
    "a folder": (lambda m: shutil.rmtree(m / "vae"), r"vae/diffusion_pytorch_model.safetensors is missing"),
    "transformers' weights": (lambda m: (m / TEXT).unlink(), r"text_encoder/model.safetensors is missing"),
    "a shard": (
        lambda m: (in_shards(m) / "unet/diffusion_pytorch_model-00002-of-00002.safetensors").unlink(),
        r"00002-of-00002.safetensors is missing",
    ),
    "a damaged list of shards": (
        lambda m: (in_shards(m) / f"{UNET}.index.json").write_text("{}"),
        r"safetensors.index.json is damaged: it names no files",
    ),
    "a variant": (
        lambda m: renamed(m / UNET, "diffusion_pytorch_model.fp16.safetensors"),
        r"is missing, and only diffusion_pytorch_model.fp16.safetensors is there: a variant",
    ),
    "cut short": (lambda m: cut(m / UNET), r"unet/diffusion_pytorch_model.safetensors does not load .*cut short or damaged"),
    "empty": (lambda m: (m / TEXT).write_bytes(b""), r"text_encoder/model.safetensors does not load .*cut short"),
    "git-lfs": (
        lambda m: (m / UNET).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"),
        r"a note of git-lfs in the place of the weights.*git lfs pull",
    ),
    "a .bin cut short": (lambda m: cut(as_bin(m) / "unet/diffusion_pytorch_model.bin"), r"unet/diffusion_pytorch_model.bin does not load"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_is_not_whole_names_the_file_and_the_mend(name: str, model: Path, monkeypatch: pytest.MonkeyPatch):
    harm, says = BROKEN[name]
    harm(model)
    monkeypatch.setattr("diffusers.StableDiffusionPipeline.from_pretrained", fails(AssertionError("nothing is loaded")))
    with pytest.raises(InputError, match=says):
        load_pipeline(str(model))


def test_half_a_download_in_the_hubs_cache_names_the_command_that_goes_on(model: Path, tmp_path: Path):
    snapshot = tmp_path / "models--somebody--something" / "snapshots" / "0123"
    shutil.copytree(model, snapshot)
    (snapshot / UNET).unlink()
    with pytest.raises(InputError, match=r"half a download.*: hf download somebody/something$"):
        sources.check(snapshot)


def test_bin_weights_are_loaded_weights_only_and_it_is_said(model: Path):
    expected = pictures(make_policy(Settings(str(model), device="cpu"), train=False))
    as_bin(model)
    said = list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("diffusers").addHandler(handler)
    policy = make_policy(Settings(str(model), device="cpu"), train=False)
    logging.getLogger("diffusers").removeHandler(handler)
    assert said == [], "what diffusers says of it is said in our words"
    assert torch.equal(pictures(policy), expected)
    (note,) = policy.notes
    assert "unet" in note
    assert "text_encoder" in note
    assert ".bin files: loaded weights-only" in note


class Program:
    """What a pickle may do that is not read weights-only: it leaves `opened` behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("file", ["unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin"])
def test_a_pickle_that_holds_a_program_is_not_opened(file: str, model: Path, tmp_path: Path):
    mark = tmp_path / "opened"
    torch.save({"weight": torch.zeros(1), "x": Program(mark)}, as_bin(model) / file)
    with pytest.raises(InputError, match=f"{file} is a pickle that holds more than weights, and is not opened"):
        load_pipeline(str(model))
    assert not mark.exists()
    (model / file).write_bytes(pickle.dumps(Program(mark)))
    with pytest.raises(InputError, match=f"{file} is a pickle that holds more than weights, and is not opened"):
        load_pipeline(str(model))
    assert not mark.exists()
    pickle.loads((model / file).read_bytes())
    assert mark.exists(), "opened the other way, it runs"


OWN_CODE: dict[str, tuple[dict[str, Any], str]] = {
    "a file of its own": (
        {"unet": ["evil", "Evil"]},
        r"The unet of .*/model is of the class Evil in the model's own code \(unet/evil.py\), which is not run",
    ),
    "a library's name": (
        {"unet": ["diffusers", "UNet2DConditionModel"]},
        r"UNet2DConditionModel in the model's own code \(unet/diffusers.py\)",
    ),
    "the pipeline": ({"_class_name": ["pipeline", "Evil"]}, r"names a pipeline class of the model's own code, which is not run"),
}


@pytest.mark.parametrize("name", OWN_CODE)
def test_code_that_comes_with_a_model_is_not_run(name: str, model: Path, tmp_path: Path):
    entries, says = OWN_CODE[name]
    mark, index = tmp_path / "ran", model / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **entries}))
    program = f"open({str(mark)!r}, 'w')\nfrom diffusers import UNet2DConditionModel\nclass Evil(UNet2DConditionModel): pass\n"
    for file in ("pipeline.py", *(f"unet/{entry[0]}.py" for part, entry in entries.items() if part == "unet")):
        (model / file).write_text(program)
    with pytest.raises(InputError, match=says) as raised:
        load_pipeline(str(model))
    assert "trust_remote_code" not in str(raised.value)
    assert not mark.exists()


def test_code_that_comes_with_a_model_of_the_hub_is_not_fetched(model: Path, monkeypatch: pytest.MonkeyPatch):
    index = model / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "unet": ["evil", "Evil"]}))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **kwargs: str(index))
    monkeypatch.setattr("diffusers.StableDiffusionPipeline.download", fails(AssertionError("nothing is fetched")))
    with pytest.raises(InputError, match=f"The unet of {HUB_ID} is of the class Evil in the model's own code"):
        load_pipeline(HUB_ID)


def test_what_is_no_fault_of_the_files_is_not_said_to_be(model: Path, monkeypatch: pytest.MonkeyPatch):
    load = "diffusers.StableDiffusionPipeline.from_pretrained"
    monkeypatch.setattr(load, fails(ImportError("T5Tokenizer requires the SentencePiece library")))
    with pytest.raises(InputError, match=r"requires the SentencePiece library Install the package that is missing\.$"):
        load_pipeline(str(model))
    for error in (MemoryError(), torch.OutOfMemoryError("x"), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        monkeypatch.setattr(load, fails(error))
        with pytest.raises(type(error)) as raised:  # for which the command line has its message
            load_pipeline(str(model))
        assert raised.value is error
    monkeypatch.setattr(load, fails(ValueError("of a new kind")))
    with pytest.raises(InputError, match=r"does not load: of a new kind Fetch or save it again\.$"):
        load_pipeline(str(model))


def test_a_model_on_the_hub_is_asked_for_safetensors_first_and_its_files_are_checked(model: Path, monkeypatch: pytest.MonkeyPatch):
    asked = dict[str, Any]()
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **kwargs: str(model / "model_index.json"))

    def download(name: str, **options: Any) -> Path:
        asked.update(options)
        return model

    monkeypatch.setattr("diffusers.StableDiffusionPipeline.download", download)
    assert type(load_pipeline(HUB_ID, "v9")).__name__ == "StableDiffusionPipeline"
    assert asked == {"revision": "v9", "use_safetensors": None}
    (model / UNET).unlink()
    with pytest.raises(InputError, match="is missing"):
        load_pipeline(HUB_ID)


def test_only_a_model_on_the_hub_has_revisions(files: Path, run_cli: Any):
    for source in ("shapes", str(files / "model")):
        with pytest.raises(InputError, match=f"revision is v9, and the model '{source}' is here, not on the Hub.*Drop --revision"):
            load_pipeline(source, "v9")
    outcome = run_cli("check", "--revision", "v9", "--prompts", "shapes")
    assert outcome.status == 2
    assert outcome.err.count("\n") == 1
    assert "revision is v9" in outcome.err


HUB = """
import sys, threading
from http.server import BaseHTTPRequestHandler, HTTPServer

CODES = {
    "gated": (403, "GatedRepo"),
    "missing": (401, "RepoNotFound"),
    "revision": (404, "RevisionNotFound"),
    "single": (404, "EntryNotFound"),
}

class Hub(BaseHTTPRequestHandler):
    def do_HEAD(self):
        status, code = CODES[self.path.split("/")[2]]
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.end_headers()
    do_GET = do_HEAD
    def log_message(self, *args): pass

server = HTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
import os
os.environ.update(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HUB_OFFLINE="0", HF_HOME=sys.argv[1])
from diffalign.errors import InputError
from diffalign.sources import class_of
for name in CODES:
    try:
        class_of(f"somebody/{name}", "v9")
    except InputError as error:
        print(f"{name}: {error}")
"""


def test_offline_mode_itself():
    with pytest.raises(InputError, match="HF_HUB_OFFLINE forbids to fetch it"):  # conftest.py sets it
        load_pipeline(HUB_ID)


def test_the_clients_own_errors_are_told_apart(tmp_path: Path):
    """Against a server that answers as the Hub does, in a process of its own: the client reads its address once."""
    environment = {**os.environ, "NO_PROXY": "*", "no_proxy": "*"}
    done = subprocess.run([sys.executable, "-c", HUB, str(tmp_path)], capture_output=True, text=True, env=environment, check=False)
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    expected = {
        "gated": "is gated", "missing": "no model 'somebody/missing' on the Hub", "revision": "has no revision 'v9'",
        "single": "holds no model_index.json",
    }  # fmt: skip
    assert said.keys() == expected.keys(), done.stderr
    for name, says in expected.items():
        assert says in said[name]
