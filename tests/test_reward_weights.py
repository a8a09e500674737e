"""Files of weights: what is refused, what is said of it, and where they are looked for."""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from diffalign.errors import InputError
from diffalign.rewards.hps import HPS
from diffalign.rewards.image_reward import ImageReward
from diffalign.rewards.weights import Source, check_sha256, convert, fetch, hub_sha256, linears, read_weights, snapshot

STATE = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}


class Dangerous:
    """What a pickle could do when it is loaded."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch pwned",)


def test_what_is_read(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "bare.pt")
    torch.save({"epoch": 1, "name": "x", "state_dict": STATE}, tmp_path / "nested.pt")
    torch.save(STATE, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(STATE, tmp_path / "new.safetensors")
    for file in tmp_path.iterdir():
        found = read_weights(file)
        assert found.keys() == STATE.keys()
        assert all(torch.equal(found[key], STATE[key]) for key in STATE)


def test_a_pickle_with_more_than_tensors_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": STATE, "hook": Dangerous()}, tmp_path / "bad.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Dangerous(), protocol=2))
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    for name in ("bad.pt", "plain.pt", "module.pt"):
        with pytest.raises(
            InputError, match=rf"{name} (holds pickled objects besides tensors|is no checkpoint that can be read)"
        ) as raised:
            read_weights(tmp_path / name)
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "pwned").exists()
    with pytest.raises(InputError, match="holds pickled objects besides tensors, which could run code when they are loaded: it is refused"):
        read_weights(tmp_path / "module.pt")


@pytest.mark.parametrize("name", ["new.pt", "old.pt", "weights.safetensors", "text.pt", "empty.pt"])
def test_a_file_that_is_cut_short_or_none_at_all(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    many = {f"layer.{i}": torch.randn(40, 40) for i in range(8)}
    if name.endswith("safetensors"):
        save_file(many, path)
    else:
        torch.save(many, path, _use_new_zipfile_serialization=name == "new.pt")
    path.write_bytes({"text.pt": b"<html>404</html>", "empty.pt": b""}.get(name, path.read_bytes()[:9000]))
    with pytest.raises(InputError, match="damaged"):
        read_weights(path)


def test_a_file_without_named_tensors(tmp_path: Path) -> None:
    for content in ([1, 2], {}, {"a": 3}, torch.ones(2)):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(InputError, match="holds no tensors by name"):
            read_weights(tmp_path / "x.pt")


def test_checksums(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "x.pt")
    right = hashlib.sha256((tmp_path / "x.pt").read_bytes()).hexdigest()
    assert fetch("user/repo", "x.pt", "main", tmp_path / "x.pt", right.upper()) == tmp_path / "x.pt"
    with pytest.raises(InputError, match=rf"its sha256 is {right}, and {'0' * 64} is expected"):
        fetch("user/repo", "x.pt", "main", tmp_path / "x.pt", "0" * 64)
    check_sha256(tmp_path / "x.pt", None)


def cached(folder: Path, repo: str, file: str, content: bytes, name: str) -> Path:
    """A file in huggingface_hub's cache: a blob named after its checksum, and a link to it in a snapshot."""
    root = folder / f"models--{repo.replace('/', '--')}"
    for part in ("blobs", "refs", "snapshots/abc"):
        (root / part).mkdir(parents=True, exist_ok=True)
    (root / "refs" / "main").write_text("abc")
    (root / "blobs" / name).write_bytes(content)
    (root / "snapshots" / "abc" / file).symlink_to(Path("../../blobs") / name)
    return root / "snapshots" / "abc" / file


def test_a_file_of_the_hubs_cache_is_held_to_the_hubs_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file, revision: huggingface_hub.file_download.hf_hub_download(
        repo, file, revision=revision, cache_dir=tmp_path))  # fmt: skip
    content = b"weights"
    right = hashlib.sha256(content).hexdigest()
    path = cached(tmp_path, "user/right", "x.pt", content, right)
    assert hub_sha256(path) == right
    assert fetch("user/right", "x.pt", "main", None) == path
    cached(tmp_path, "user/wrong", "x.pt", content[:3], right)
    with pytest.raises(InputError, match=f"and {right} is expected. Fetch it again"):
        fetch("user/wrong", "x.pt", "main", None)
    small = cached(tmp_path, "user/small", "x.json", b"{}", "9e26dfeeb6e641a33dae4961196235bdb965b21b")  # git's own checksum
    assert hub_sha256(small) is None
    assert hub_sha256(small.resolve()) is None


def test_without_a_network_the_file_its_address_and_the_flag_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("offline mode is enabled")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    address = "https://huggingface.co/xswu/HPSv2/resolve/main/HPS_v2.1_compressed.pt"
    with pytest.raises(
        InputError, match=rf"LocalEntryNotFoundError.* download {address} elsewhere and name the file: --reward.checkpoint FILE"
    ):
        HPS(version="v2.1").open()
    with pytest.raises(InputError, match=r"resolve/abc/ImageReward\.pt elsewhere"):
        ImageReward(revision="abc").open()
    with pytest.raises(InputError, match=r"hf download user/model --local-dir FOLDER\) and name it: --reward.checkpoint FOLDER"):
        snapshot("user/model", "main", None, "checkpoint", ["*.json"])


def test_a_local_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"There is no file .*none\.pt: --reward.checkpoint takes the path of HPS_v2_compressed.pt"):
        HPS(checkpoint=tmp_path / "none.pt").open()


def test_sources_take_their_part_and_many_faults_are_told_together() -> None:
    whole = torch.arange(18.0).reshape(6, 3)
    assert torch.equal(Source("x", 1).take(whole), whole[2:4])
    assert torch.equal(Source("x", None, True).take(whole), whole.T)
    network, source = linears({"h.0.weight": torch.ones(2, 3), "h.3.weight": torch.ones(1, 2)}, "h.", "a head", Path("f"))
    assert [source(name).key for name in network.state_dict()] == ["h.0.weight", "h.0.bias", "h.3.weight", "h.3.bias"]
    more = {f"u{i}": torch.ones(1) for i in range(6)}
    with pytest.raises(InputError, match=r"Keys 2 missing: h.0.bias, h.3.bias; 6 unexpected: u0, u1, u2, u3 and 2 more\."):
        convert({"h.0.weight": torch.ones(2, 3), "h.3.weight": torch.ones(1, 2), **more}, {"h": (network, source)}, Path("f"))
