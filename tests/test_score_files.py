"""`diffalign score` on files of all kinds, and what is refused of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.media import read_image
from diffalign.sound import write_wav

RAMP = np.linspace(0, 255, 48).astype("uint8")[None].repeat(40, 0)
COLOURS = np.dstack([RAMP, RAMP[:, ::-1], RAMP // 2])


@pytest.mark.parametrize(
    ("name", "picture", "wanted"),
    [
        ("grey.png", Image.fromarray(RAMP), np.dstack([RAMP] * 3)),
        ("grey-alpha.png", Image.fromarray(np.dstack([RAMP, RAMP])), np.dstack([RAMP] * 3)),
        ("rgba.png", Image.fromarray(np.dstack([COLOURS, RAMP])), COLOURS),  # the colours below, as ImageReward's package takes them
        ("palette.gif", Image.fromarray(RAMP).convert("P"), np.dstack([RAMP] * 3)),
        ("bits.png", Image.fromarray(RAMP > 100), np.dstack([(RAMP > 100) * np.uint8(255)] * 3)),
        ("rgb.bmp", Image.fromarray(COLOURS), COLOURS),
    ],
)
def test_pictures_of_other_kinds_are_read_as_rgb(name: str, picture: Image.Image, wanted: Any, tmp_path: Path, run_cli: Any) -> None:
    picture.save(tmp_path / name)
    assert np.array_equal((read_image(tmp_path / name).permute(1, 2, 0) * 255).round().byte().numpy(), wanted)
    outcome = run_cli("score", name, "--reward", "jpeg-compressibility")
    assert outcome.status == 0, outcome.err
    assert float(outcome.out.split("\t")[0]) < 0


@pytest.mark.parametrize(
    ("name", "picture", "says"),
    [
        (
            "deep.png",
            Image.fromarray(RAMP.astype("uint16") * 257),
            "deep.png holds 16-bit values, which have no one meaning as colours: save",
        ),
        ("nan.tif", Image.fromarray(np.full((9, 9), np.nan, "float32")), "nan.tif holds floating point values"),
        ("float.tif", Image.fromarray(RAMP / np.float32(255)), "float.tif holds floating point values"),
        ("whole.tif", Image.fromarray(RAMP.astype("int32") * 99), "whole.tif holds 32-bit values"),
        ("huge.png", Image.new("1", (10_000, 9_500)), "huge.png is too large a picture"),
    ],
)
def test_pictures_without_one_meaning_are_refused(name: str, picture: Image.Image, says: str, tmp_path: Path, run_cli: Any) -> None:
    picture.save(tmp_path / name)
    outcome = run_cli("score", name, "--reward", "jpeg-compressibility")
    assert outcome.status == 2
    assert says in outcome.err
    assert outcome.err.strip().count("\n") <= 1  # that no prompt was given, and the error
    assert outcome.out == ""


def test_a_picture_that_is_cut_short_or_none_is_refused_before_any_is_scored(tmp_path: Path, run_cli: Any) -> None:
    Image.fromarray(COLOURS).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    (tmp_path / "page.png").write_text("<html>404</html>")
    for name in ("cut.png", "page.png", "missing.png"):
        outcome = run_cli("score", "good.png", name, "--reward", "jpeg-compressibility", "--prompt", "x")
        assert outcome.status == 2
        assert outcome.out == ""
        assert name in outcome.err
        assert outcome.err.count("\n") == 1


def test_files_are_read_before_weights_are(tmp_path: Path, run_cli: Any) -> None:
    """Neither reward can be had here, and what is wrong with the files is said all the same."""
    write_wav(tmp_path / "a.wav", torch.zeros(100), 8000)
    for reward, file, says in (
        ("hps-v2.1", "a.wav", "a.wav is a sound, and hps-v2.1 judges pictures. Choose another reward"),
        ("hps-v2.1", "none.png", "no file none.png"),
        ("speaker-similarity", "none.wav", "There is no file none.wav"),
    ):
        outcome = run_cli("score", "--reward", reward, "--prompt", "x", file)
        assert (outcome.status, outcome.out) == (2, "")
        assert says in outcome.err
