"""The world of edits, its judges, and prompts about pictures: their files, and what is wrong with them."""

from __future__ import annotations

import base64
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from torch import Generator, Tensor

from diffalign import edits, shapes
from diffalign.data import PicturePrompt, batch_of, check_prompts, hold_out, read_file, read_prompts, write_file
from diffalign.edits import Edit
from diffalign.errors import InputError
from diffalign.media import data_uri, to_pil
from diffalign.pipelines.instruct_pix2pix import InstructPix2Pix
from diffalign.pipelines.stable_diffusion import StableDiffusion
from diffalign.rewards.shapes import ShapesEditChecker, ShapesEditCLIP
from diffalign.shapes import Scene
from diffalign.streams import PromptList
from diffalign.types import Prompts

ONE, TWO = Scene(1, "large", "green", "circle", "white"), Scene(2, "small", "red", "cross", "blue")


@pytest.mark.parametrize(
    ("edit", "named", "plain"),
    [
        (Edit(ONE, "colour", "red"), "make the circle red", "make it red"),
        (Edit(TWO, "colour", "black"), "make the crosses black", "make them black"),
        (Edit(ONE, "shape", "square"), "turn the circle into a square", "turn it into a square"),
        (Edit(TWO, "shape", "triangle"), "turn the crosses into triangles", "turn them into triangles"),
        (Edit(TWO, "background", "white"), "make the background white", "make the background white"),
    ],
)
def test_instructions_are_read_as_they_are_written(edit: Edit, named: str, plain: str):
    assert edits.instruction(edit) == named
    assert edits.instruction(edit, named=False) == plain
    for text in (named, plain, f" {named.upper()}. "):
        assert edits.parse(text) == (edit.attribute, edit.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a red circle", "is not an instruction.*make the circle red"),
        ("make it rad", "'rad'.*Did you mean 'red'"),
        ("make the sqare red", "'sqare'.*Did you mean 'square'"),
        ("turn it into a red", "'red' in 'turn it into a red'"),
        ("turn the background into circles", "'background'"),
    ],
)
def test_other_texts_are_errors_with_their_mend(text: str, says: str):
    with pytest.raises(InputError, match=says):
        edits.parse(text)


def test_a_held_out_edit_starts_and_ends_at_scenes_that_no_training_shows():
    train, held = edits.split()
    seen = {scene for edit in train for scene in (edit.source, edit.target)}
    assert len(held) == 256
    assert not seen & {scene for edit in held for scene in (edit.source, edit.target)}
    assert seen == set(shapes.split()[0])
    assert min(Counter(edit.attribute for edit in held).values()) > 30
    assert edits.split()[1] == held
    differences = [[name for name in shapes.VALUES if getattr(e.source, name) != getattr(e.target, name)] for e in train]
    assert all(names == [edit.attribute] for names, edit in zip(differences, train, strict=True))


def drawn(n: int = 64, seed: int = 0) -> tuple[list[Edit], Tensor, Tensor]:
    chosen = edits.split()[1][:n]
    return chosen, *edits.draw(chosen, Generator().manual_seed(seed))


def wanted(chosen: list[Edit], sources: Tensor) -> Prompts:
    return Prompts(tuple(edits.instruction(edit) for edit in chosen), sources)


def test_an_edit_changes_what_is_asked_for_and_nothing_else():
    chosen, before, after = drawn(256)
    changed = (before != after).any(1)
    for i, edit in enumerate(chosen):
        corner = before[i, :, 0, 0] != after[i, :, 0, 0]
        assert bool(corner.any()) == (edit.attribute == "background"), edit
        assert changed[i].any()
    coloured = [i for i, edit in enumerate(chosen) if edit.attribute == "colour"]
    ink = [(after[i] != after[i, :, :1, :1]).any(0) for i in coloured]
    assert all(torch.equal(changed[i], where) for i, where in zip(coloured, ink, strict=True)), "the shapes stand where they stood"


def test_the_checker_finds_what_was_asked_for_and_what_was_kept():
    chosen, before, after = drawn(256)
    prompts = wanted(chosen, before)
    done, nothing = ShapesEditChecker().judge(after, prompts), ShapesEditChecker().judge(before, prompts)
    assert done["all"].float().mean() == 1
    assert not nothing["asked"].any()
    assert nothing["kept"].mean() == 1
    assert ShapesEditChecker()(before, prompts).unique().tolist() == [0.5]
    assert ShapesEditChecker(strict=True)(after, prompts).min() == 1
    too_much = torch.stack([shapes.draw([Scene(1, "large", "purple", "circle", "orange")], Generator().manual_seed(0))[0]] * 2)
    source = torch.stack([shapes.draw([Scene(1, "large", "red", "circle", "white")], Generator().manual_seed(0))[0]] * 2)
    scores = ShapesEditChecker()(too_much, Prompts(("make it purple", "turn it into a square"), source))
    assert scores.tolist() == [0.5 + 0.5 * 3 / 4, 0.5 * 2 / 4], "the background is not the source's; nor the colour; and no square"


def test_the_scorer_prefers_the_edit_and_has_a_gradient():
    chosen, before, after = drawn()
    prompts = wanted(chosen, before)
    after.requires_grad_()
    scores = ShapesEditCLIP()(after, prompts)
    assert (torch.autograd.grad(scores.sum(), after)[0].flatten(1) != 0).any(1).all()
    assert (scores > ShapesEditCLIP()(before, prompts)).float().mean() > 0.95


@pytest.mark.parametrize(
    ("text", "image", "says"),
    [
        ("make it red", None, "needs prompts with the picture"),
        ("make it red", torch.ones(1, 3, 32, 32), "shows no shapes"),
        ("a dog", "drawn", "not an instruction"),
        ("make the background green", "drawn", "as their background"),
    ],
)
def test_what_the_judges_cannot_judge_is_an_error(text: str, image: Any, says: str):
    picture = shapes.draw([ONE], Generator().manual_seed(0))
    for judge in (ShapesEditChecker(), ShapesEditCLIP()):
        with pytest.raises(InputError, match=says):
            judge(picture, Prompts((text,), picture if image == "drawn" else image))


# Prompts about pictures


def save(path: Path, seed: int = 0, size: tuple[int, int] = (16, 16)) -> Tensor:
    picture = (torch.rand(3, *size, generator=Generator().manual_seed(seed)) * 255).round() / 255
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil(picture).save(path)
    return picture


def lines(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_prompt_file_with_pictures(tmp_path: Path):
    picture = save(tmp_path / "in" / "a.png")
    uri = data_uri((tmp_path / "in" / "a.png").read_bytes())
    rows = [{"prompt": " make it red ", "image": "in/a.png"}, {"prompt": "b", "image": uri}, {"prompt": "a dog", "image": None}]
    first, second, third = read_prompts(lines(tmp_path / "p.jsonl", *rows))
    assert first == PicturePrompt("make it red", tmp_path / "in" / "a.png")
    assert third == "a dog"
    policy = InstructPix2Pix.of(tiny.instruct_pix2pix(), guidance_scale=1.0)
    batch = PromptList([first, second], policy).take([1, 0])
    assert batch.text == ("b", "make it red")
    assert batch.image is not None
    assert torch.equal(batch.image, torch.stack([picture, picture]))
    write_file(tmp_path / "again.jsonl", [first, second, third])
    assert read_file(tmp_path / "again.jsonl", root=None) == [first, second, third]
    assert hold_out([first, second, third] * 9, seed=0)[1] == [first, second, third], "they can be told apart"


def test_pictures_are_cut_to_the_policys_size(tmp_path: Path):
    prompts = [PicturePrompt("a", tmp_path / "wide.png"), PicturePrompt("b", tmp_path / "small.png")]
    wide = save(tmp_path / "wide.png", size=(16, 40))
    save(tmp_path / "small.png", size=(4, 4))
    batch = batch_of(prompts, InstructPix2Pix.of(tiny.instruct_pix2pix()))
    assert batch.image is not None
    assert batch.image.shape == (2, 3, 16, 16)
    assert torch.equal(batch.image[0], wide[:, :, 12:28]), "the middle"


@pytest.mark.parametrize(
    ("image", "says"),
    [
        ("none.png", r"p.jsonl, line 1: there is no picture .*none.png"),
        ("../a.png", r"line 1: the path '../a.png' leads out of"),
        ("/etc/hosts", r"line 1: the path '/etc/hosts' leads out of"),
        ("link.png", r"line 1: the path 'link.png' leads out of"),
        ("cut.png", r"cut.png is no picture that can be read"),
        ("text.png", r"text.png is no picture that can be read"),
        ("bomb.png", r"bomb.png is too large a picture"),
        ("data:image/png;base64,????", r"line 1: .*no data: URI"),
        ("data:image/png;base64," + base64.b64encode(b"nothing").decode(), r"The picture of 'x' is no picture"),
        (3, r"line 1: the image is no text"),
    ],
)
def test_bad_pictures_are_named(tmp_path: Path, image: Any, says: str):
    folder = tmp_path / "data"
    save(tmp_path / "a.png")
    save(folder / "whole.png", size=(64, 64))
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:5000])
    (folder / "text.png").write_text("text")
    (folder / "link.png").symlink_to(tmp_path / "a.png")
    if image == "bomb.png":
        Image.new("1", (10_000, 9_000)).save(folder / "bomb.png")
    with pytest.raises(InputError, match=says):
        read_prompts(lines(folder / "p.jsonl", {"prompt": "x", "image": image}))


def test_a_pipeline_says_if_it_wants_pictures(tmp_path: Path):
    save(tmp_path / "a.png")
    prompts = check_prompts([("make it red", tmp_path / "a.png")])
    with pytest.raises(InputError, match=r"edits pictures, and the prompt 'a dog' has none.*--image FILE"):
        batch_of([*prompts, "a dog"], InstructPix2Pix.of(tiny.instruct_pix2pix()))
    with pytest.raises(InputError, match="takes no picture, and the prompt 'make it red' comes with one"):
        batch_of(prompts, StableDiffusion.of(tiny.stable_diffusion()))
    with pytest.raises(InputError, match=r"b\.png of the prompt 'make it red' cannot be read"):
        check_prompts([("make it red", tmp_path / "b.png")])
    with pytest.raises(InputError, match=r"\(string, picture file\)"):
        check_prompts([("make it red", tmp_path / "a.png", 3)])


def test_the_prompts_that_ship_are_the_edits_that_are_held_out():
    (train, held), policy = edits.split(), InstructPix2Pix.of(tiny.instruct_pix2pix(), height=32, width=32)
    prompts = batch_of(read_prompts("shapes-edit", "heldout"), policy)
    assert prompts.text == tuple(edits.instruction(edit, named=i % 2 == 0) for i, edit in enumerate(held))
    redrawn = Prompts(prompts.text, edits.draw(held, Generator().manual_seed(5))[0])
    assert prompts.image is not None
    assert ShapesEditChecker().judge(prompts.image, redrawn)["kept"].mean() == 1, "the pictures show the scenes"
    shown = read_prompts("shapes-edit", "train")
    assert len(shown) == len(set(shown)) == 1024
    known = {edits.instruction(edit, named) for edit in train for named in (True, False)}
    assert {prompt.text for prompt in shown if isinstance(prompt, PicturePrompt)} <= known
