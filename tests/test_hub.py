"""A run onto the Hub, through the real client and a small Hub of the tests: what arrives, what it makes, and what is refused before."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import numpy as np
import pytest
import tiny
import torch
import yaml
from diffusers.loaders import lora_base
from hub_server import TOKEN, Hub, Repository, a_hub
from huggingface_hub import ModelCard, constants, hf_api
from huggingface_hub.utils import _http

import diffalign
from diffalign import papers, registry
from diffalign.base import base_of
from diffalign.cli import main
from diffalign.errors import InputError
from diffalign.hub import Push, check_name, push
from diffalign.publishing import _of_guard, public
from diffalign.run import Run
from diffalign.sources import commit_of

REPO = "anna/my-lora"
FILES = {"README.md", "before-after.png", "curve.png", "diffalign.yaml", "eval.json", "pytorch_lora_weights.safetensors"}


def train(output: Path, **flags: Any) -> Path:
    chosen = {"method": "draft", "method.k": 1, "method.inference_steps": 2, "batch_size": 2, "accumulate": 1, "eval_size": 2, **flags}
    assert main(["train", *(f"--{name}={value}" for name, value in chosen.items()), "--output", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the embedded model: a LoRA."""
    return train(tmp_path_factory.mktemp("hub") / "shapes", steps=2, learning_rate=0.05, eval_size=4, guidance_scale=2)


@pytest.fixture(scope="module")
def opened(shapes: Path) -> Run:
    """The same, whose settings are read once."""
    return Run.open(shapes)


@pytest.fixture(scope="module")
def of_files(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of all the weights of a model in a folder, on a reward and prompts in files."""
    own = {"pipeline": files / "model", "reward": f"{files / 'rewards.py'}:red", "prompts": files / "prompts.txt", "guidance_scale": 2}
    return train(tmp_path_factory.mktemp("hub") / "full", full="true", steps=1, learning_rate=0.01, **own)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub that the client asks in place of the real one, with the token of anna, who waits for nothing."""
    with a_hub() as served:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(lora_base, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(hf_api.api, "endpoint", served.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(_http.time, "sleep", lambda _: None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        huggingface_hub.utils.disable_progress_bars()
        yield served
        huggingface_hub.utils.enable_progress_bars()


def code_of(card: str) -> tuple[str, str]:
    """(the lines that load, the last one, which samples) of a card's Python."""
    lines = re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)[0].splitlines()
    return "\n".join(lines[:-1]), lines[-1]


def card_of(content: bytes) -> Any:
    return ModelCard(content.decode())


def made_by(code: tuple[str, str], **known: Any) -> Any:
    """What a card's code makes, of seed 0; `known` in place of the loading."""
    names: dict[str, Any] = dict(known)
    if not known:
        exec(code[0], names)
    names["pipe"].set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    exec(code[1], names)
    return np.asarray(names.get("image", names.get("sound")))


def copied(run: Path, folder: Path, **settings: Any) -> Path:
    """A copy of the run whose config.yaml says otherwise."""
    shutil.copytree(run, folder / "copy")
    config = yaml.safe_load((folder / "copy" / "config.yaml").read_text())
    (folder / "copy" / "config.yaml").write_text(yaml.safe_dump({**config, **settings}))
    return folder / "copy"


def test_a_pushed_lora_makes_the_runs_pictures_in_plain_diffusers(shapes: Path, hub: Hub, run_cli: Callable[..., Any]) -> None:
    outcome = run_cli("push", shapes, REPO)
    assert (outcome.status, outcome.out) == (0, f"{hub.url}/{REPO}\n"), outcome.err
    repository = hub.repositories[REPO]
    assert repository.private
    assert repository.files.keys() == {".gitattributes", *FILES}
    assert repository.files["pytorch_lora_weights.safetensors"] == (shapes / "lora" / "pytorch_lora_weights.safetensors").read_bytes()
    code = code_of(repository.files["README.md"].decode())
    theirs, run = made_by(code), diffalign.load(shapes)
    assert hub.count(rf"GET /{REPO}/resolve/\w+/pytorch_lora_weights.safetensors") == 1
    np.testing.assert_array_equal(theirs, made_by(code, pipe=run.pipeline))
    base = diffusers.StableDiffusionPipeline.from_pretrained(diffalign.model_folder("shapes"), dtype=torch.float32)
    assert (theirs != made_by(code, pipe=base)).any(), "a LoRA that changes nothing would have passed"


def test_the_card_says_what_was_measured(opened: Run, hub: Hub) -> None:
    push(opened, REPO)
    found, card = opened.evaluation, card_of(hub.repositories[REPO].files["README.md"])
    results = {result.metric_type: result for result in card.data.eval_results or ()}
    assert {name: result.metric_value for name, result in results.items()} == {n: r["after"] for n, r in found["rewards"].items()}
    assert results["shapes-clip"].metric_args["interval"] == found["rewards"]["shapes-clip"]["interval"]
    assert (card.data.license, card.data.pipeline_tag, card.data.library_name) == ("apache-2.0", "text-to-image", "diffusers")
    assert card.data.base_model is None, "shapes is no model of the Hub"
    assert {"diffalign", "lora", "draft"} <= set(card.data.tags or ())
    clip = found["rewards"]["shapes-clip"]
    low, high = clip["interval"]
    assert f"| {clip['before']:.4g} | {clip['after']:.4g} | {clip['difference']:+.4g}, {low:+.4g} to {high:+.4g} |" in card.text
    assert "| reward queries | 4 |" in card.text
    assert "![before and after](before-after.png)" in card.text
    assert "https://arxiv.org/abs/2309.17400" in card.text
    config = yaml.safe_load(re.findall(r"```yaml\n(.*?)\n```", card.text, re.DOTALL)[0])
    own = yaml.safe_load((opened.path / "config.yaml").read_text())
    assert config == {name: value for name, value in own.items() if name != "device"}


def test_a_second_push_sends_what_is_new(shapes: Path, hub: Hub, tmp_path: Path) -> None:
    run = copied(shapes, tmp_path)
    push(run, REPO)
    sent = hub.sent
    assert sent > (run / "lora" / "pytorch_lora_weights.safetensors").stat().st_size
    push(run, REPO)
    assert (hub.sent, len(hub.repositories[REPO].commits)) == (sent, 1), "nothing has changed"
    hub.repositories[REPO].files |= {"after-3.wav": b"of another run", "notes.txt": b"somebody's"}
    (run / "eval.json").unlink()
    push(run, REPO)
    assert (hub.sent, len(hub.repositories[REPO].commits)) == (sent, 2)
    assert hub.repositories[REPO].files.keys() == {".gitattributes", "notes.txt", *FILES} - {"eval.json"}
    assert b"Not evaluated." in hub.repositories[REPO].files["README.md"]


def test_a_cut_upload_goes_on_where_it_stopped(shapes: Path, hub: Hub, run_cli: Callable[..., Any]) -> None:
    hub.fail("PUT /lfs", None)
    hub.fail("POST .*/commit/", None, times=9)
    outcome = run_cli("push", shapes, REPO)
    assert outcome.status == 2
    assert f"Push again: diffalign push {shapes} {REPO}" in outcome.err
    assert hub.count("PUT /lfs") == 4, "one was cut, and the client tried it again"
    sent = hub.sent
    hub.faults.clear()
    assert run_cli("push", shapes, REPO).status == 0
    assert hub.sent == sent
    assert hub.repositories[REPO].files.keys() >= FILES


def test_ctrl_c_says_how_to_go_on(shapes: Path, hub: Hub, run_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hf_api.HfApi, "create_commit", stopped)
    outcome = run_cli("push", shapes, REPO, "--public")
    assert outcome.status == 130
    assert f"Interrupted. Push again: diffalign push {shapes} {REPO} --public" in outcome.err


FAULTS = {
    "401 of the token": ("GET /api/whoami", 401, "does not take your token", 1),
    "429 of the token": ("GET /api/whoami", 429, "wait some minutes", 1),
    "403 of the repository": (f"GET /api/models/{REPO}", 403, "may not write there", 1),
    "403 of making it": ("POST /api/repos/create", 403, "may not write there", 1),
    "503, again and again": ("POST .*/preupload/", 503, "wait some minutes", 6),
    "429, again and again": ("POST .*/objects/batch", 429, "wait some minutes", 6),
    "500 of large files": ("PUT /lfs/", 500, "wait some minutes", None),
    "401 of the commit": ("POST .*/commit/", 401, "does not take your token", 1),
    "409 of the commit": ("POST .*/commit/", 409, "another change to it is under way", 1),
    "413 of the commit": ("POST .*/commit/", 413, "does not take what was sent", 1),
    "502 of the commit": ("POST .*/commit/", 502, "wait some minutes", 1),
    "a cut connection": ("POST .*/preupload/", None, "check the network", 6),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_the_hub_answers_is_one_line_with_the_mend(name: str, opened: Run, hub: Hub) -> None:
    pattern, status, words, asked = FAULTS[name]
    hub.fail(pattern, status, times=99, X_Error_Message="Invalid credentials in Authorization header" if status == 401 else "no")
    with pytest.raises(InputError) as caught:
        push(opened, REPO)
    said = str(caught.value)
    assert "\n" not in said
    assert words in said
    assert ("Push again: " in said) == ("GET" not in pattern)
    assert (str(status) if status else "RemoteProtocolError") in said
    assert asked is None or hub.count(pattern) == asked
    assert not hub.repositories.get(REPO, Repository(True)).commits


def test_a_fault_that_passes_is_waited_for(opened: Run, hub: Hub) -> None:
    hub.fail("POST .*/preupload/", 503, times=2)
    hub.fail("POST .*/objects/batch", 429, Retry_After="1")
    push(opened, REPO)
    assert hub.repositories[REPO].files.keys() >= FILES


def test_xet_that_is_refused_says_how_to_do_without(opened: Run, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(InputError, match=r"HF_HUB_DISABLE_XET=1.*Push again"):
        push(opened, REPO)
    assert hub.count("xet-write-token") >= 1


RIGHTS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "a token that reads": (REPO, {"role": "read"}, "may only read"),
    "a fine-grained token of others": (
        REPO,
        {"role": "fineGrained", "fineGrained": {"scoped": [{"entity": {"name": "lab"}, "permissions": ["repo.write"]}]}},
        "may not write to the repositories of anna",
    ),
    "a fine-grained token that reads": (
        REPO,
        {"role": "fineGrained", "fineGrained": {"scoped": [{"entity": {"name": "anna"}, "permissions": ["repo.content.read"]}]}},
        "may not write to the repositories of anna",
    ),
    "a fine-grained token that writes": (
        REPO,
        {"role": "fineGrained", "fineGrained": {"scoped": [{"entity": {"name": "anna"}, "permissions": ["repo.write"]}]}},
        None,
    ),
    "somebody else": ("bob/my-lora", {"role": "write"}, "is not yours: your token is of anna, of lab, library. Give anna/my-lora"),
    "the same, in other letters": ("Library/my-lora", {"role": "write"}, "may only read in Library"),
    "an organisation that may be read": ("library/my-lora", {"role": "write"}, "may only read in library"),
    "an organisation": ("lab/my-lora", {"role": "write"}, None),
}


@pytest.mark.parametrize("name", RIGHTS)
def test_who_may_not_write_is_told_before_anything_is_sent(name: str, opened: Run, hub: Hub) -> None:
    repo, hub.rights, words = RIGHTS[name]
    if words is None:
        assert push(opened, repo) == f"{hub.url}/{repo}"
        return
    with pytest.raises(InputError, match=re.escape(words)):
        push(opened, repo)
    assert hub.count("POST|PUT") == 0


def test_repositories_that_are_left_alone(opened: Run, hub: Hub) -> None:
    hub.repositories[REPO] = Repository(True, {".gitattributes": b"", "README.md": b"mine", "model.bin": b"mine"})
    with pytest.raises(InputError, match=r"diffalign has not made it \(README.md, model.bin\).*--force"):
        push(opened, REPO)
    assert hub.count("POST|PUT") == 0
    push(opened, REPO, force=True)
    assert hub.repositories[REPO].files.keys() == {".gitattributes", "model.bin", *FILES}
    hub.repositories[REPO].private = False
    with pytest.raises(InputError, match="is public: add --public"):
        push(opened, REPO)
    push(opened, REPO, public=True)
    hub.repositories[REPO].private = True
    with pytest.raises(InputError, match="is private, and --public does not change that"):
        push(opened, REPO, public=True)
    push(opened, "anna/open", public=True)
    assert not hub.repositories["anna/open"].private


def test_runs_and_names_that_are_refused(shapes: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for repo in ("anna/a--b", "anna/my lora", "anna/x.git", "a/b/c", "anna/", "-/-", "anna/" + "x" * 97):
        with pytest.raises(InputError, match="can be no name on the Hub"):
            push(shapes, repo)
    with pytest.raises(InputError, match="lacks the user"):
        check_name("my-lora", "USER/REPO")
    dry = copied(shapes, tmp_path / "dry", tiny=True)
    with pytest.raises(InputError, match="is a dry run"):
        push(dry, REPO)
    unfinished = copied(shapes, tmp_path / "unfinished", steps=50)
    with pytest.raises(InputError, match="is unfinished, at step 2 of 50: diffalign train --resume"):
        push(unfinished, REPO)
    cut = copied(shapes, tmp_path / "cut")
    (cut / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"half")
    with pytest.raises(InputError, match=r"lora is damaged .* diffalign train --resume"):
        push(cut, REPO)
    with pytest.raises(InputError, match="is no run"):
        push(tmp_path, REPO)
    assert hub.count("POST|PUT") == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE forbids"):
        push(shapes, REPO)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(InputError, match="There is no token to push to anna/my-lora: log in"):
        push(shapes, REPO)


def test_nothing_of_the_machine_is_uploaded(of_files: Path, files: Path, hub: Hub) -> None:
    push(of_files, REPO)
    sent = hub.repositories[REPO].files
    names = {".gitattributes", *FILES, "unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
    assert sent.keys() == names - {"pytorch_lora_weights.safetensors"}, "no optimiser, no checkpoint, no list of prompts"
    for name, content in sent.items():
        for secret in (TOKEN, str(of_files), str(files), str(Path.home()), str(Path(diffalign.__file__).parent)):
            assert secret.encode() not in content, f"{name} tells {secret}"
    config = yaml.safe_load(sent["diffalign.yaml"])
    told = (config["pipeline"], config["reward"]["name"], config["prompts"])
    assert told == ("model", "rewards.py:red", "prompts.txt")
    own = yaml.safe_load((of_files / "config.yaml").read_text())
    assert own["pipeline"] == str(files / "model"), "the run itself knows"
    assert public({"url": "https://anna:pass@host:1/v1?key=2", "in": ["~/a/b/", "/", 1], "hub": "user/model"}) == {
        "url": "https://host:1/v1", "in": ["b", "/", 1], "hub": "user/model"
    }  # fmt: skip


def test_what_would_tell_of_the_machine_all_the_same_stops_the_push(shapes: Path, hub: Hub, tmp_path: Path) -> None:
    run = copied(shapes, tmp_path, negative_prompt=f"see {tmp_path}/copy")
    with pytest.raises(InputError, match=r"(README.md|diffalign.yaml) would tell a path of this machine"):
        push(run, REPO)
    run = copied(shapes, tmp_path / "token", negative_prompt=f"with {TOKEN}")
    with pytest.raises(InputError, match="would tell your token"):
        push(run, REPO)
    assert hub.count("POST|PUT") == 0


def test_all_weights_make_the_runs_pictures(of_files: Path, files: Path, hub: Hub) -> None:
    push(of_files, REPO)
    loading, call = code_of(hub.repositories[REPO].files["README.md"].decode())
    assert '"path/to/model"' in loading
    theirs = made_by((loading.replace("path/to/model", str(files / "model")), call))
    np.testing.assert_array_equal(theirs, made_by(("", call), pipe=diffalign.load(of_files).pipeline))


def test_sound_is_pushed_with_its_wav_files(hub: Hub, tmp_path: Path) -> None:
    run = train(tmp_path / "digits", pipeline="digits", steps=1, learning_rate=0.05, reward="loudness", eval_rewards="[loudness]")
    push(run, REPO)
    sent = hub.repositories[REPO].files
    names = {"adapter_config.json", "adapter_model.safetensors", "before-0.wav", "before-1.wav", "after-0.wav", "after-1.wav"}
    assert sent.keys() == {".gitattributes", *FILES, *names} - {"pytorch_lora_weights.safetensors"}
    assert sent["after-1.wav"] == (run / "samples" / "before-after-after-1.wav").read_bytes() != sent["before-1.wav"]
    card = card_of(sent["README.md"])
    assert (card.data.pipeline_tag, card.data.library_name) == ("text-to-speech", "peft")
    assert f"{REPO}/resolve/main/after-1.wav" in card.text
    assert '"one three"' in card.text
    code = code_of(card.text)
    np.testing.assert_array_equal(made_by(code), made_by(code, pipe=diffalign.load(run).pipeline))


def test_the_base_model_and_its_licence(shapes: Path, of_files: Path, hub: Hub, tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    """Of a model from the Hub its id, revision and licence; of a folder or an object what the person says."""
    base = "anna/base"
    hub.repositories[base] = Repository(False, card={"license": "other", "license_name": "open", "license_link": "https://x.org/l"})
    run = copied(of_files, tmp_path, pipeline=base, revision="v2", versions={"diffalign": "0.1.0", "base_commit": "abc123"})
    push(run, REPO)
    card = card_of(hub.repositories[REPO].files["README.md"])
    assert (card.data.base_model, card.data.get("base_model_relation")) == (base, "finetune")
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "open", "https://x.org/l")
    assert 'DiffusionPipeline.from_pretrained("anna/base", revision="abc123", dtype=torch.float32)' in card.text
    assert "revision v2, commit abc123" in card.text
    assert "The base model's: [open](https://x.org/l)." in card.text

    live = copied(of_files, tmp_path / "live", pipeline="live object")
    held = base_of(Run.open(live, tiny.stable_diffusion()), None, {})
    assert (held.kind, held.pipeline_class, held.network) == ("object", "StableDiffusionPipeline", "unet")
    outcome = run_cli("push", live, "anna/live")
    assert outcome.status == 0
    assert "--base-model USER/MODEL" in outcome.err
    assert "--license ID" in outcome.err
    assert card_of(hub.repositories["anna/live"].files["README.md"]).data.base_model is None
    outcome = run_cli("push", live, "anna/live", "--base-model", base)
    assert (outcome.status, "--base-model" in outcome.err) == (0, False)
    assert card_of(hub.repositories["anna/live"].files["README.md"]).data.base_model == base
    outcome = run_cli("push", shapes, "anna/shapes", "--base-model", base)
    assert (outcome.status, "comes with diffalign" in outcome.err) == (2, True)
    outcome = run_cli("push", live, "anna/live", "--base-model", "anna/nothing")
    assert (outcome.status, "--base-model: there is no model 'anna/nothing'" in outcome.err) == (2, True)
    outcome = run_cli("push", of_files, "anna/folder", "--license", "mit")
    assert (outcome.status, "--license" in outcome.err) == (0, False)
    assert card_of(hub.repositories["anna/folder"].files["README.md"]).data.license == "mit"


def test_a_dry_run_writes_what_would_be_sent(shapes: Path, hub: Hub, run_cli: Callable[..., Any], tmp_path: Path) -> None:
    outcome = run_cli("push", shapes, REPO, "--dry-run", "out")
    assert outcome.status == 0, outcome.err
    assert hub.asked == []
    assert {Path(line).name for line in outcome.out.splitlines()} == FILES
    push(shapes, REPO)
    written = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert written == {name: content for name, content in hub.repositories[REPO].files.items() if name != ".gitattributes"}
    outcome = run_cli("push", shapes, REPO, "--dry-run", "out")
    assert (outcome.status, "holds something already" in outcome.err) == (2, True)


def test_a_training_pushes_its_run(files: Path, hub: Hub, run_cli: Callable[..., Any], tmp_path: Path) -> None:
    cached = Path(shutil.copytree(files / "model", tmp_path / "models--anna--base" / "snapshots" / "c0ffee"))
    own = ["--pipeline", cached, "--reward", f"{files / 'rewards.py'}:red", "--prompts", files / "prompts.txt"]
    few = ["--method", "draft", "--method.inference_steps=2", "--steps=1", "--batch-size=2", "--eval-size=0", "--output", "run"]
    hub.rights = {"role": "read"}
    outcome = run_cli("train", *own, *few, "--push-to-hub", REPO)
    assert (outcome.status, "may only read" in outcome.err) == (2, True)
    assert not (tmp_path / "run").exists(), "said before the training"
    hub.rights = {"role": "write"}
    hub.fail("POST .*/commit/", 503)
    outcome = run_cli("train", *own, *few, f"--push-to-hub={REPO}")
    assert outcome.status == 2
    assert f"Push again: diffalign push run {REPO}" in outcome.err
    assert "The run is whole: run" in outcome.err
    outcome = run_cli("train", "--resume", "run", "--push-to-hub", REPO)
    assert outcome.status == 0
    assert f"Pushed: {hub.url}/{REPO}" in outcome.err
    assert "lora" in card_of(hub.repositories[REPO].files["README.md"]).data.tags
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert not any("push" in name for name in config), "who runs it again has not asked for it"
    assert config["versions"]["base_commit"] == "c0ffee", "a snapshot of the Hub's cache"
    for flags, words in (
        (["--public"], "add --push-to-hub"),
        (["--push-to-hub", REPO, "--tiny"], "a dry run"),
        (["--push-to-hub"], "one arg"),
    ):
        outcome = run_cli("train", *own, *few, *flags)
        assert (outcome.status, words in outcome.err) == (2, True), outcome.err


def test_the_command_that_pushes_again() -> None:
    to = Push(REPO, public=True, base_model="a/b", license="openrail++")
    command = to.command("my runs/x")
    assert command == f"diffalign push 'my runs/x' {REPO} --public --base-model a/b --license openrail++"


def test_a_merged_run_is_pushed_as_what_it_is(shapes: Path, hub: Hub, tmp_path: Path) -> None:
    other = copied(shapes, tmp_path, method={"name": "ddpo"}, reward={"name": "jpeg-compressibility"})
    merged = diffalign.merge([shapes, other], [1, -0.25], extrapolate=1.0, output=tmp_path / "both")
    push(merged, REPO)
    repository = hub.repositories[REPO]
    (message,) = repository.commits
    assert message.startswith("merged from shapes x 2, copy x -0.5 (diffalign ")
    card = card_of(repository.files["README.md"])
    for words in (
        "merged from shapes x 2, copy x -0.5 by",
        "by 1 (ExPO)",
        "| methods of the runs | draft, ddpo |",
        "shapes-clip, jpeg-compress",
    ):
        assert words in card.text, words
    for paper in ("2309.17400", "2305.13301", "2404.16792"):
        assert f"arxiv.org/abs/{paper}" in card.text, paper
    for words in ("| steps |", "reward queries", "--config diffalign.yaml", str(tmp_path)):
        assert words not in card.text, words
    assert {"merge", "lora"} <= set(card.data.tags or ())


def test_what_fails_before_the_upload_leaves_no_repository(opened: Run, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.fail("POST /api/validate-yaml", 400)
    with pytest.raises(InputError, match="The Hub answered 400 for anna/my-lora"):
        push(opened, REPO)
    with pytest.raises(InputError, match="--license: 'My Licence' can be no licence"):
        push(opened, REPO, license="My Licence")
    with pytest.raises(InputError, match=r"--license: shapes comes with diffalign, under apache-2\.0"):
        push(opened, REPO, license="mit")
    monkeypatch.setattr(Run, "metrics", [])
    with pytest.raises(InputError, match="is unfinished"):
        push(opened, REPO)
    assert hub.repositories == {}


def test_paths_are_told_from_texts() -> None:
    home = {"/data/anna/v1.py:score": 1, "/data/bob/v1.py:score": 2, "v1.py:score (2)": 3, "red": 4}
    assert public(home) == {"v1.py:score": 1, "v1.py:score (3)": 2, "v1.py:score (2)": 3, "red": 4}
    texts = {"negative_prompt": "~ugly / bad", "suffix": "/a/b", "note": "/imagine a cat / dog", "other": "~", "ratio": "/ 2"}
    assert public(texts) == texts
    paths = {
        "pipeline": "/data/my models/sd",
        "name": "/data/x/my rewards.py:red",
        "url": "/data/x/y",
        "rewards": ["~/r.py:a", "~bob/r.py:b"],
    }
    assert public(paths) == {"pipeline": "sd", "name": "my rewards.py:red", "url": "y", "rewards": ["r.py:a", "r.py:b"]}


def test_paths_in_keys_and_in_other_texts(shapes: Path, hub: Hub, tmp_path: Path) -> None:
    run = copied(shapes, tmp_path, eval_prompts="/data/anna/held.txt")
    found = json.loads((run / "eval.json").read_text())
    scores = found["rewards"]["shapes-clip"]
    (run / "eval.json").write_text(json.dumps({**found, "rewards": {"/data/anna/v1.py:score": scores, "/data/bob/v1.py:score": scores}}))
    push(run, REPO)
    files = hub.repositories[REPO].files
    assert json.loads(files["eval.json"])["rewards"].keys() == {"v1.py:score", "v1.py:score (2)"}
    assert not any(b"/data/" in content for content in files.values())
    kept = {"fired": {"measure": "/data/anna/w.py:w", "text": "/data/anna/w.py:w fell by 2 to 3"}, "step": 2}
    assert _of_guard(kept) == {"fired": {"measure": "w.py:w", "text": "w.py:w fell by 2 to 3"}, "step": 2}
    said = copied(run, tmp_path / "said", negative_prompt="as in /data/anna/held.txt")
    with pytest.raises(InputError, match="would tell a path of this machine"):
        push(said, "anna/said")
    assert "anna/said" not in hub.repositories


def test_every_method_has_the_paper_that_the_table_has() -> None:
    table = (Path(__file__).parents[1] / "docs" / "papers.md").read_text()
    rows = {name: line for line in table.splitlines() for name in re.findall(r"`([\w.-]+)`", line)}
    assert papers.METHODS.keys() == registry.METHODS.keys()
    for name, ids in (papers.METHODS | papers.REWARDS).items():
        said = rows.get(name, table)
        assert all(paper in said or f"[{paper}]" in table for paper in ids), name
        assert name not in rows or ids[0] in said or "the same" in said, name
    assert {
        paper for ids in (*papers.METHODS.values(), *papers.REWARDS.values(), *papers.EXPO.values(), papers.LORA) for paper in ids
    } == papers.PAPERS.keys()
    assert len(papers.citations(["refl"], ["image-reward"], lora=False)) == 1, "each paper once"
    assert papers.citations(["mine.py:Mine"], ["red"], lora=False) == []


def test_the_commit_of_a_model_in_the_cache() -> None:
    assert commit_of("/x/models--a--b/snapshots/abc") == "abc"
    assert commit_of("/x/models/b") is commit_of(None) is None


def test_the_names_of_embedded_models() -> None:
    assert (diffalign.model_folder("digits") / "model_index.json").is_file()
    with pytest.raises(InputError, match="Did you mean 'shapes'"):
        diffalign.model_folder("shape")


def test_a_damaged_evaluation_is_told(shapes: Path, hub: Hub, tmp_path: Path) -> None:
    run = copied(shapes, tmp_path)
    (run / "eval.json").write_text(json.dumps({})[:1])
    with pytest.raises(InputError, match=r"eval.json is damaged. Write it again: diffalign eval"):
        push(Run.open(run), REPO)
    assert hub.count("POST|PUT") == 0
