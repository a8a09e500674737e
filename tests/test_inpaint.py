"""Inpainting as a policy: what the network is shown, prompts with masks, pairs with masks. See test_pipelines.py."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from parity import own_pictures, pictures, prompts_for
from PIL import Image, ImageDraw
from torch import Generator, Tensor

import diffalign
from diffalign import examples
from diffalign.data import PicturePrompt, batch_of, check_prompts, read_file, read_prompts, write_file
from diffalign.errors import InputError
from diffalign.evaluate import sheet
from diffalign.media import data_uri, to_pil
from diffalign.pipelines.inpaint import Inpaint
from diffalign.pipelines.instruct_pix2pix import InstructPix2Pix
from diffalign.pipelines.stable_diffusion import StableDiffusion
from diffalign.types import Data


def save(path: Path, size: tuple[int, int] = (16, 16), seed: int = 0) -> Tensor:
    """Write a random picture (H, W), and return it as its file has it."""
    picture = (torch.rand(3, *size, generator=Generator().manual_seed(seed)) * 255).round() / 255
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil(picture).save(path)
    return picture


def save_mask(path: Path, size: tuple[int, int] = (16, 16), box: tuple[int, int, int, int] = (0, 0, 7, 15)) -> None:
    """Black, and white in the box (left, top, right, bottom), inclusive; size (H, W)."""
    mask = Image.new("L", (size[1], size[0]))
    ImageDraw.Draw(mask).rectangle(box, fill=255)
    mask.save(path)


def lines(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "a.png")
    save_mask(tmp_path / "m.png")
    return tmp_path


# What the network is shown


def test_the_picture_is_grey_where_it_is_masked_and_its_latents_are_scaled():
    policy = Inpaint.of(tiny.inpaint(certain=False), guidance_scale=5.0)
    prompts = prompts_for(policy)
    assert prompts.image is not None
    assert prompts.mask is not None
    shown = policy.encode(prompts)
    grey = prompts.image * (1 - prompts.mask) + 0.5 * prompts.mask
    posterior = policy.pipe.vae.encode(grey * 2 - 1).latent_dist
    torch.testing.assert_close(shown.tensors["masked"], posterior.mode() * 0.18215)
    assert float(posterior.std.mean()) > 0.1, "diffusers would draw from a wide one"
    assert shown.tensors["mask"].shape == (2, 1, 8, 8)
    assert torch.equal(shown.tensors["mask"], prompts.mask[:, :, ::2, ::2])
    for name in ("mask", "masked"):
        assert torch.equal((shown.null or {})[name], shown.tensors[name]), "in both branches of guidance"
    theirs = own_pictures(policy, masked_image_latents=shown.tensors["masked"])
    torch.testing.assert_close(pictures(policy), theirs, rtol=0, atol=1e-5)


def test_masks_are_one_or_zero():
    policy = Inpaint.of(tiny.inpaint(), guidance_scale=1.0)
    prompts = prompts_for(policy)
    assert prompts.mask is not None
    soft = type(prompts)(prompts.text, prompts.image, prompts.mask * 0.6 + 0.2)
    for name, value in policy.encode(prompts).tensors.items():
        assert torch.equal(policy.encode(soft).tensors[name], value)


def test_what_is_pasted_or_decoded_otherwise_is_refused():
    with pytest.raises(InputError, match="has 4 input channels, and that of a StableDiffusionInpaintPipeline has 9 here"):
        Inpaint.of(tiny.inpaint(unet={"in_channels": 4}))
    from diffusers import AsymmetricAutoencoderKL

    pipe = tiny.inpaint()
    pipe.register_modules(vae=AsymmetricAutoencoderKL(norm_num_groups=16))
    with pytest.raises(InputError, match="AsymmetricAutoencoderKL decodes with the picture at hand"):
        Inpaint.of(pipe)


# Prompts with masks


def test_a_prompt_file_with_masks(folder: Path):
    uris = {name: data_uri((folder / file).read_bytes()) for name, file in (("image", "a.png"), ("mask", "m.png"))}
    rows = [
        {"prompt": " a door ", "image": "a.png", "mask": "m.png"},
        {"prompt": "b", **uris},
        {"prompt": "c", "image": "a.png", "mask": None},
    ]
    first, second, bare = read_prompts(lines(folder / "p.jsonl", *rows))
    assert first == PicturePrompt("a door", folder / "a.png", folder / "m.png")
    assert bare == PicturePrompt("c", folder / "a.png")
    policy = Inpaint.of(tiny.inpaint())
    batch = batch_of([first, second], policy)
    assert batch.mask is not None
    assert batch.image is not None
    assert torch.equal(batch.image[0], save(folder / "again.png"))
    expected = torch.zeros(1, 16, 16)
    expected[:, :, :8] = 1
    assert torch.equal(batch.mask, torch.stack([expected, expected]))
    assert torch.equal(batch.mask[1], expected)
    assert batch[[1]].mask is not None
    write_file(folder / "again.jsonl", [first, second, bare])
    assert read_file(folder / "again.jsonl", root=None) == [first, second, bare]
    assert check_prompts([("a door ", folder / "a.png", str(folder / "m.png"))]) == [first]


def test_a_mask_is_cut_as_its_picture(tmp_path: Path):
    wide = save(tmp_path / "a.png", (16, 40))
    save_mask(tmp_path / "m.png", (16, 40), (12, 0, 19, 15))
    batch = batch_of([PicturePrompt("a", tmp_path / "a.png", tmp_path / "m.png")], Inpaint.of(tiny.inpaint()))
    assert batch.mask is not None
    assert batch.image is not None
    assert torch.equal(batch.image[0], wide[:, :, 12:28])
    assert batch.mask[0, 0].unique(dim=0).tolist() == [[1.0] * 8 + [0.0] * 8]


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        ("none.png", r"p.jsonl, line 1: there is no picture .*none.png"),
        ("../m.png", r"line 1: the path '../m.png' leads out of"),
        ("/etc/hosts", r"line 1: the path '/etc/hosts' leads out of"),
        ("link.png", r"line 1: the path 'link.png' leads out of"),
        ("text.png", r"text.png is no picture that can be read"),
        ("wide.png", r"The mask of 'x' is 40 x 16, and the picture 16 x 16: they must be of one size"),
        ("data:image/png;base64,????", r"line 1: .*no data: URI"),
        (3, r"line 1: the mask is no text"),
    ],
)
def test_bad_masks_are_named(tmp_path: Path, mask: Any, says: str):
    data = tmp_path / "data"
    save(data / "a.png")
    save_mask(tmp_path / "m.png")
    save_mask(data / "wide.png", (16, 40))
    (data / "text.png").write_text("text")
    (data / "link.png").symlink_to(tmp_path / "m.png")
    with pytest.raises(InputError, match=says):
        read_prompts(lines(data / "p.jsonl", {"prompt": "x", "image": "a.png", "mask": mask}))


@pytest.mark.parametrize(
    ("value", "says"), [(0, "white says where to fill"), (1, "its values are 0 and 1, and white is 255: multiply them")]
)
def test_a_mask_that_fills_nothing_is_refused(value: int, says: str, folder: Path):
    """Masks of 0 and 1 are what segmentation tools write, and are all but black as pictures."""
    half = Image.new("L", (16, 16))
    half.paste(value, (8, 0, 16, 16))
    half.save(folder / "dark.png")
    for given in (
        lambda: read_prompts(lines(folder / "p.jsonl", {"prompt": "x", "image": "a.png", "mask": "dark.png"})),
        lambda: check_prompts([("x", folder / "a.png", folder / "dark.png")]),
    ):
        with pytest.raises(InputError, match=f"The mask of 'x' is black all over, so that nothing is filled: {says}"):
            given()
    Image.new("L", (16, 16), 255).save(folder / "white.png")
    assert check_prompts([("x", folder / "a.png", folder / "white.png")]), "the whole picture is made anew"


def test_a_mask_needs_its_picture(folder: Path):
    with pytest.raises(InputError, match="line 1: there is a mask, and no image that it is of"):
        read_prompts(lines(folder / "p.jsonl", {"prompt": "x", "mask": "m.png"}))
    (folder / "m.png").unlink()
    with pytest.raises(InputError, match=r"The mask .*m\.png of the prompt 'x' cannot be read"):
        check_prompts([("x", folder / "a.png", folder / "m.png")])


@pytest.mark.parametrize("prompt", [("x",), ("x", "a.png", "m.png", "z.png"), ("x", 3), ("x", "a.png", 3), (), ("", "a.png")])
def test_tuples_that_are_no_prompts(prompt: tuple[Any, ...], folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    with pytest.raises(InputError, match=r"for inpainting of \(string, picture file, mask file\)"):
        check_prompts([prompt])


def test_a_pipeline_says_if_it_wants_masks(folder: Path):
    masked, bare = PicturePrompt("a door", folder / "a.png", folder / "m.png"), PicturePrompt("make it red", folder / "a.png")
    policy = Inpaint.of(tiny.inpaint())
    line = r'\{"prompt": "make it red", "image": "picture.png", "mask": "mask.png"\}; to diffalign sample, --image FILE --mask FILE'
    with pytest.raises(InputError, match=f"fills masked pictures, and the prompt 'a dog' has none. .*{line}"):
        batch_of([masked, "a dog"], policy)
    with pytest.raises(InputError, match=f"fills masked pictures, and the prompt 'make it red' has no mask. .*{line}"):
        batch_of([masked, bare], policy)
    with pytest.raises(InputError, match=r"takes no mask, and the prompt 'a door' comes with one\. Drop the masks"):
        batch_of([bare, masked], InstructPix2Pix.of(tiny.instruct_pix2pix()))
    with pytest.raises(InputError, match=r"takes no picture, and the prompt 'a door' comes with one\. Drop the pictures"):
        batch_of([masked], StableDiffusion.of(tiny.stable_diffusion()))


def test_a_sheet_shows_what_was_masked_grey(folder: Path):
    shown = sheet([("after", torch.zeros(1, 3, 16, 16))], [PicturePrompt("a door", folder / "a.png", folder / "m.png")])
    left, top, scale = 60, 40, 8
    assert shown.getpixel((left + 4 * scale, top + 8 * scale)) == (128, 128, 128)
    assert shown.getpixel((left + 12 * scale, top + 8 * scale)) == Image.open(folder / "a.png").getpixel((12, 8))


# Pairs with masks


def test_pairs_are_about_pictures_and_masks(folder: Path):
    for i in range(4):
        save(folder / f"{i}.png", seed=i + 1)
    rows = [{"prompt": "a door", "image": "a.png", "mask": "m.png", "chosen": "0.png", "rejected": "1.png"}]
    lines(folder / "pairs.jsonl", *rows)
    lines(folder / "ranks.jsonl", {"prompt": "a door", "image": "a.png", "mask": "m.png", "images": ["2.png", "3.png"]})
    policy = Inpaint.of(tiny.inpaint(), guidance_scale=1.0)
    cases: list[tuple[Path, Data]] = [(folder, "pairs"), (folder / "ranks.jsonl", "pairs"), (folder, "labels")]
    for source, kind in cases:
        train, _ = examples.read(str(source), kind, policy, reward=None, limit=None, skip=False, seed=0, say=print)
        assert set(train.prompts) == {PicturePrompt("a door", folder / "a.png", folder / "m.png")}
        batch = train.take([0])
        assert batch.prompts.mask is not None
        assert batch.prompts.mask.mean() == 0.5
    with pytest.raises(InputError, match="takes no picture, and the prompt 'a door' comes with one"):
        read_pairs(folder, StableDiffusion.of(tiny.stable_diffusion())).take([0])


def read_pairs(source: Path, policy: Any, skip: bool = False) -> Any:
    return examples.read(str(source), "pairs", policy, reward=None, limit=None, skip=skip, seed=0, say=print)[0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mask": "none.png"}, "There is no picture .*none.png"),
        ({"mask": "../m.png"}, r"the path '../m.png' leads out of"),
        ({"mask": "wide.png"}, "line 2: The mask of 'a door' is 40 x 16"),
        ({"image": "text.png"}, "text.png .*is no picture that can be read"),
        ({"image": None}, "line 2: there is a mask, and no image that it is of"),
    ],
)
def test_bad_masks_of_pairs_are_named_and_left_out_if_asked(folder: Path, change: dict[str, Any], says: str):
    for i in range(2):
        save(folder / f"{i}.png", seed=i + 1)
    save_mask(folder / "wide.png", (16, 40))
    (folder / "text.png").write_text("text")
    row = {"prompt": "a door", "image": "a.png", "mask": "m.png", "chosen": "0.png", "rejected": "1.png"}
    lines(folder / "pairs.jsonl", row, {**row, **change})
    policy = Inpaint.of(tiny.inpaint())
    with pytest.raises(InputError, match=says):
        read_pairs(folder, policy)
    if change.get("mask") != "../m.png" and change.get("image", "") is not None:  # a folder that tries that is refused in any case
        assert len(read_pairs(folder, policy, skip=True)) == 1


# From the command line


def test_a_run_is_sampled_with_its_files(folder: Path, run_cli: Any):
    tiny.inpaint().save_pretrained(folder / "model")
    (folder / "rewards.py").write_text(tiny.REWARDS)
    lines(folder / "p.jsonl", *({"prompt": text, "image": "a.png", "mask": "m.png"} for text in tiny.PROMPTS))
    numbers = {"steps": 1, "batch-size": 2, "eval-size": 2, "sample-steps": 2, "method.inference-steps": 2, "lora.rank": 2}
    flags = [f"--{name}={value}" for name, value in numbers.items()]
    given = ("--pipeline", folder / "model", "--reward", f"{folder}/rewards.py:red", "--prompts", folder / "p.jsonl", "--output", "run")
    trained = run_cli("train", *given, *flags)
    assert trained.status == 0, trained.err
    again = shlex.split(trained.err.rpartition("Again: diffalign ")[2])
    assert again[-4:] == ["--image", str(folder / "a.png"), "--mask", str(folder / "m.png")]
    assert run_cli(*again).status == 0
    files = ("--image", folder / "a.png", "--mask", folder / "m.png")
    assert run_cli("sample", "run", "--prompt", "a door", "--prompt", "a dog", *files).status == 0
    for given, says in (
        (files[:2], "has no mask"),
        ((), "has none"),
        (files[2:], "--mask: a mask is of a picture"),
        ((*files, "--mask", "m.png", "--mask", "m.png"), "3 masks for 2 prompts: give one --mask for all"),
    ):
        refused = run_cli("sample", "run", "--prompt", "a door", "--prompt", "a dog", *given)
        assert refused.status == 2
        assert says in refused.err
    assert diffalign.load("run").evaluation["prompts"] == 1
