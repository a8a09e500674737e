"""HIVE: its weights, levels and dropped conditions by hand, the data it reads, and runs of editing models."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import Generator, Tensor
from toy import in_processes

import diffalign
from diffalign import examples
from diffalign.contract import CheckedReward, FunctionReward
from diffalign.data import PicturePrompt
from diffalign.errors import InputError
from diffalign.media import data_uri, to_pil
from diffalign.methods.hive import HIVE, PHRASE
from diffalign.noise import diffuse
from diffalign.pipelines.instruct_pix2pix import InstructPix2Pix
from diffalign.pipelines.latent import LatentPolicy
from diffalign.types import Context, Examples, Loss, Prompts

DROP_NOTHING: dict[str, Any] = {"drop_text": 0.0, "drop_image": 0.0, "drop_both": 0.0}
SCORES = ([0.1, 0.9, 0.5], [2.0, 0.5, -1.0])


@pytest.fixture(scope="module")
def policy() -> LatentPolicy:
    return InstructPix2Pix.of(tiny.instruct_pix2pix(), guidance_scale=3.0)


def a_batch(scores: list[float], seed: int) -> Examples:
    rng = Generator().manual_seed(seed)
    texts = ("make it red", "two cats", "a dog")
    prompts = Prompts(texts, torch.rand(3, 3, 16, 16, generator=rng))
    return Examples(prompts, torch.randn(3, 4, 8, 8, generator=rng), scores=torch.tensor(scores))


BATCHES = [a_batch(scores, seed) for seed, scores in enumerate(SCORES)]


def a_context(**given: Any) -> Context:
    return Context(Generator().manual_seed(0), more=lambda: BATCHES[1], **given)


def losses(policy: LatentPolicy, context: Context | None = None, **fields: Any) -> list[Loss]:
    return list(HIVE(**{"forwards": 2, **fields}).losses(policy, None, BATCHES[0], context or a_context()))


@pytest.fixture
def heard(policy: LatentPolicy, monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[str, ...], Tensor]]:
    """Of each forward the texts that were encoded, and the sources' latents that the network saw."""
    calls, encode, predict = list[Any](), policy.encode, policy.predict

    def encoded(prompts: Prompts) -> Any:
        calls.append(prompts.text)
        return encode(prompts)

    def predicted(x_t: Tensor, at: Any, condition: Any) -> Tensor:
        assert condition.null is None, "trained without guidance"
        calls[-1] = calls[-1], condition.tensors["source"]
        return predict(x_t, at, condition)

    monkeypatch.setattr(policy, "encode", encoded)
    monkeypatch.setattr(policy, "predict", predicted)
    return calls


def errors_by_hand(policy: LatentPolicy, emphasis: bool = False) -> list[Tensor]:
    """Squared error of epsilon in the order in which HIVE draws: what to drop, the noise, the level."""
    rng, out = Generator().manual_seed(0), list[Tensor]()
    for batch in BATCHES:
        torch.rand(3, generator=rng)
        noise, at = torch.randn(batch.x_0.shape, generator=rng), policy.path.draw(3, rng)
        hidden = policy.pipe._encode_prompt(list(batch.prompts.text), "cpu", 1, False)
        assert batch.prompts.image is not None
        source = policy.pipe.vae.encode(batch.prompts.image * 2 - 1).latent_dist.mode()
        epsilon = policy.module(torch.cat([diffuse(batch.x_0, noise, at), source], 1), at.t, hidden).sample
        error = ((epsilon - noise) ** 2).mean((1, 2, 3))
        if emphasis:
            snr = at.alpha**2 / at.sigma**2
            error = error * ((1 + 1 / snr).clamp(max=40) * torch.minimum(5 / snr, torch.ones(3))).float()
        out.append(error.detach())
    return out


def weights_by_hand(scores: Tensor, beta: float, cap: float) -> Tensor:
    raw = (scores / beta).exp()
    return (raw / raw.mean()).clamp(max=cap)


@pytest.mark.parametrize(("beta", "cap", "weighting"), [(1.0, 20.0, "epsilon"), (0.5, 2.0, "epsilon"), (1.0, 20.0, "v")])
def test_the_weighted_loss_by_hand(policy: LatentPolicy, beta: float, cap: float, weighting: Any):
    first, second = losses(policy, beta=beta, cap=cap, weighting=weighting, **DROP_NOTHING)
    assert (first.update, second.update) == (False, True)
    weights = weights_by_hand(torch.tensor(SCORES), beta, cap)
    assert (cap < 20) == bool((weights == cap).any()), "one case is capped"
    for loss, weight, error in zip((first, second), weights, errors_by_hand(policy, weighting == "v"), strict=True):
        torch.testing.assert_close(loss.value.detach(), (weight * error).mean() / 2)
    everything = weights.flatten()
    assert float(first.metrics["reward"]) == pytest.approx(0.5)
    assert float(first.metrics["largest_weight"]) == pytest.approx(float(everything.max()))
    assert float(first.metrics["effective_sample_size"]) == pytest.approx(float(everything.sum() ** 2 / (everything**2).sum() / 6))


def test_processes_scale_their_weights_together(policy: LatentPolicy):
    def work(processes: Any) -> list[float]:
        context = Context(Generator().manual_seed(0), processes)
        method = HIVE(forwards=1, beta=1.0, **DROP_NOTHING)
        (loss,) = method.losses(policy, None, BATCHES[processes.rank], context)
        return [float(loss.value.detach()), float(loss.metrics["largest_weight"])]

    weights = weights_by_hand(torch.tensor(SCORES), 1.0, 20.0)
    error = errors_by_hand(policy)[0]
    (value, largest), (_, same) = in_processes(work)
    assert value == pytest.approx(float((weights[0] * error).mean()), rel=1e-5)
    assert largest == same == pytest.approx(float(weights.max()))


def test_the_conditional_variant_says_how_good_each_edit_is(policy: LatentPolicy, heard: list[Any]):
    """Six scores: -1, 0.1, 0.5, 0.5, 0.9, 2. Not better than each: 1, 2, 4, 4, 5, 6 of 6, so the fifths 1, 2, 4, 4, 5, 5."""
    out = losses(policy, variant="conditional", **DROP_NOTHING)
    levels = [["two", "five", "four"], ["five", "four", "one"]]
    assert [texts for texts, _ in heard] == [
        tuple(text + f", image quality is {level} out of five" for text, level in zip(BATCHES[0].prompts.text, part, strict=True))
        for part in levels
    ]
    for loss in out:
        torch.testing.assert_close(loss.value.detach() * 2, loss.metrics["denoising_error"])
        assert float(loss.metrics["level"]) == pytest.approx((2 + 5 + 4 + 5 + 4 + 1) / 6)
        assert "effective_sample_size" not in loss.metrics


def test_levels_are_of_all_scores_seen_lately(policy: LatentPolicy, heard: list[Any]):
    context = a_context(memory={"scores": [3.0] * 94})
    losses(policy, context, variant="conditional", **DROP_NOTHING)
    assert {text.split(" is ")[1] for texts, _ in heard for text in texts} == {"one out of five"}, "the six are the worst of a hundred"
    assert len(context.memory["scores"]) == 100
    again = a_context(memory={"scores": list(context.memory["scores"])})
    heard.clear()
    losses(policy, again, variant="conditional", **DROP_NOTHING)
    assert len(again.memory["scores"]) == 106


@pytest.mark.parametrize(("dropped", "texts", "sources"), [("text", 0, 1), ("image", 1, 0), ("both", 0, 0), (None, 1, 1)])
def test_instructions_and_sources_are_left_out_for_guidance(
    policy: LatentPolicy, heard: list[Any], dropped: str | None, texts: int, sources: int
):
    losses(policy, **{**DROP_NOTHING, **({f"drop_{dropped}": 1.0} if dropped else {})})
    for said, source in heard:
        assert all(bool(text) == bool(texts) for text in said)
        assert bool(source.any()) == bool(sources)


def test_shares_of_what_is_left_out(policy: LatentPolicy):
    big = Prompts(("make it red",) * 512, torch.rand(1, 3, 16, 16).expand(512, 3, 16, 16))
    method = HIVE(drop_text=0.1, drop_image=0.2, drop_both=0.3)
    condition = method._condition(policy, big, None, a_context())
    null = policy.texts([""])["encoder_hidden_states"][0]
    deaf = (condition.tensors["encoder_hidden_states"] == null).flatten(1).all(1)
    blind = (condition.tensors["source"] == 0).flatten(1).all(1)
    for share, wanted in ((deaf & ~blind, 0.1), (blind & ~deaf, 0.2), (blind & deaf, 0.3)):
        assert float(share.float().mean()) == pytest.approx(wanted, abs=0.06)


def test_what_the_trained_model_is_asked_for():
    assert HIVE().suffix == ""
    assert HIVE(variant="conditional").suffix == ", image quality is five out of five"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"beta": 0.0}, "method.beta is 0.0: give a number above 0"),
        ({"cap": 0.5}, "method.cap is 0.5: give 1 or more"),
        ({"forwards": 0}, "method.forwards is 0: give 1 or more"),
        ({"drop_text": -0.1}, "method.drop_text is -0.1: give a share from 0 to 1"),
        ({"drop_image": 0.5, "drop_both": 0.6}, "method.drop_text, method.drop_image and method.drop_both are above 1 together"),
    ],
)
def test_wrong_settings_are_errors_with_their_mend(fields: dict[str, Any], says: str):
    with pytest.raises(InputError, match=says):
        HIVE(**fields)


def test_a_reward_is_needed(policy: LatentPolicy):
    batch = Examples(BATCHES[0].prompts, BATCHES[0].x_0)
    with pytest.raises(InputError, match="needs a reward of every edit"):
        next(HIVE(forwards=1).losses(policy, None, batch, a_context()))


# Data


def png(seed: int) -> bytes:
    file = io.BytesIO()
    to_pil(torch.rand(3, 16, 16, generator=Generator().manual_seed(seed))).save(file, "PNG")
    return file.getvalue()


def write_edits(
    folder: Path, keys: tuple[str, str, str] = ("source", "instruction", "edited"), count: int = 12, name: str = "edits.jsonl"
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(2 * count):
        (folder / f"{seed}.png").write_bytes(png(seed))
    rows = [dict(zip(keys, (f"{i}.png", f"make it {'a' * (i + 1)}", f"{count + i}.png"), strict=True)) for i in range(count)]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def brighter(images: Tensor, prompts: Prompts) -> Tensor:
    assert prompts.image is not None
    return (images - prompts.image).mean((1, 2, 3))


def read(source: Path | str, policy: LatentPolicy, **given: Any) -> Any:
    chosen = {"reward": CheckedReward(FunctionReward(brighter), "brighter"), "limit": None, "skip": False, "seed": 0, "say": print}
    return examples.read(str(source), "edits", policy, **{**chosen, **given})


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        (("source", "instruction", "edited"), "edits.jsonl"),
        (("original_image", "edit_prompt", "edited_image"), "metadata.jsonl"),
        (("input_image", "edit", "edited_image"), "metadata.jsonl"),
        (("original_image_file_name", "edit_instruction", "edited_image_file_name"), "metadata.jsonl"),
    ],
)
def test_edits_are_read_embedded_and_scored(tmp_path: Path, policy: LatentPolicy, keys: Any, name: str):
    write_edits(tmp_path, keys, name=name)
    examples.check(str(tmp_path), "edits")
    train, held = read(tmp_path, policy)
    assert (len(train), len(held)) == (11, 1)
    batch = train.take(range(11))
    assert batch.prompts.image is not None
    for i, prompt in enumerate(train.prompts):
        assert isinstance(prompt, PicturePrompt)
        assert isinstance(prompt.picture, Path)
        seed = int(prompt.picture.stem)
        source, edited = (torch.rand(3, 16, 16, generator=Generator().manual_seed(s)).mul(255).round() / 255 for s in (seed, 12 + seed))
        assert prompt.text == f"make it {'a' * (seed + 1)}"
        assert torch.equal(batch.prompts.image[i], source)
        torch.testing.assert_close(batch.x_0[i], policy.embed(edited[None])[0])
        assert batch.scores is not None
        assert float(batch.scores[i]) == pytest.approx(float(edited.mean() - source.mean()), abs=1e-6)


def test_edits_in_parquet_hold_bytes(tmp_path: Path, policy: LatentPolicy):
    pytest.importorskip("datasets")
    import pyarrow
    import pyarrow.parquet

    def row(i: int) -> dict[str, Any]:
        return {"original_image": {"bytes": png(i)}, "edit_prompt": f"make it {i}", "edited_image": {"bytes": png(9 + i)}}

    rows = [row(i) for i in range(3)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    train, _ = read(tmp_path, policy)
    assert {prompt.picture: prompt.text for prompt in train.prompts} == {png(i): f"make it {i}" for i in range(3)}


@pytest.mark.parametrize("which", ["source", "edited"])
@pytest.mark.parametrize("damage", ["missing", "cut", "data"])
def test_bad_pictures_of_edits_are_named_and_left_out_if_asked(tmp_path: Path, policy: LatentPolicy, which: str, damage: str):
    write_edits(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "edits.jsonl").read_text().splitlines()]
    if damage == "missing":
        (tmp_path / rows[3][which]).unlink()
    elif damage == "cut":
        (tmp_path / rows[3][which]).write_bytes(png(0)[:200])
    else:
        rows[3][which] = data_uri(png(0))[:-3] + "!"
        (tmp_path / "edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"edits.jsonl, line 4.*--bad-pictures skip"):
        read(tmp_path, policy)
    said = list[str]()
    train, held = read(tmp_path, policy, skip=True, say=said.append)
    assert len(train) + len(held) == 11
    assert any("Left out: " in line and "line 4" in line for line in said)


def test_a_model_of_text_cannot_read_edits(run_cli: Any, tmp_path: Path, files: Path):
    write_edits(tmp_path / "edits")
    given = ("--pipeline", files / "model", "--reward", f"{files / 'rewards.py'}:red", "--data", "edits")
    outcome = run_cli("train", "--method", "hive", *given)
    assert outcome.status == 2
    assert "hive trains pipelines that edit pictures" in outcome.err
    outcome = run_cli("train", "--method", "hive", *given[:4])
    assert outcome.status == 2
    assert "edits.jsonl (source, instruction, edited)" in outcome.err
    assert "diffalign edits" in outcome.err


# Runs


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pix2pix")
    tiny.instruct_pix2pix().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("variant", ["weighted", "conditional"])
def test_a_run_from_a_folder_of_edits(run_cli: Any, tmp_path: Path, files: Path, model: Path, variant: str):
    write_edits(tmp_path / "edits")
    small = ("--steps", 2, "--batch-size", 3, "--method.forwards", 2, "--sample-steps", 2, "--eval-size", 2, "--checkpoint-every", 1)
    given = ("--pipeline", model, "--reward", f"{files / 'rewards.py'}:red", "--data", "edits", *small)
    trained = run_cli("train", "--method", "hive", "--method.variant", variant, *given, "--output", "run")
    assert trained.status == 0, trained.err
    run = diffalign.load(tmp_path / "run")
    assert [row["step"] for row in run.metrics] == [1, 2]
    assert run.evaluation["prompts"] == 1
    assert run.plan.suffix == (PHRASE.format("five") if variant == "conditional" else "")
    held = run.read_prompts("heldout")
    assert isinstance(held[0], PicturePrompt)
    shown = run_cli("sample", "run", "--prompt", "make it red", "--image", "edits/0.png", "--output", "shown")
    assert shown.status == 0, shown.err
    assert len(shown.out.splitlines()) == 2
    assert run_cli("sample", "run", "--prompt", "make it red").status == 2
    assert run_cli("train", "--resume", "run", "--steps", 3).status == 0
    assert run_cli("eval", "run").status == 0


SHORT = {"refl": ("--method.first", 1, "--method.last", 1, "--accumulate", 1, "--method.pretrain-batches", 1)}


@pytest.mark.parametrize("method", ["draft", "ddpo", "rwr", "refl"])
def test_any_method_trains_an_editing_model(run_cli: Any, tmp_path: Path, files: Path, model: Path, method: str):
    write_edits(tmp_path, ("image", "prompt", "edited"), name="prompts.jsonl")
    small = (
        "--steps",
        1,
        "--batch-size",
        2,
        "--method.inference-steps",
        2,
        "--eval-size",
        2,
        "--guidance-scale",
        3,
        *SHORT.get(method, ()),
    )
    given = ("--pipeline", model, "--reward", f"{files / 'rewards.py'}:red", "--prompts", "prompts.jsonl", *small)
    trained = run_cli("train", "--method", method, *given, "--output", "run")
    assert trained.status == 0, trained.err
    assert diffalign.load(tmp_path / "run").evaluation["prompts"] == 1


def test_draft_trains_shapes_edit_on_the_scorer(run_cli: Any, tmp_path: Path):
    trained = run_cli("train", "--pipeline", "shapes-edit", "--steps", 1, "--batch-size", 2, "--eval-size", 4, "--output", "run")
    assert trained.status == 0, trained.err
    run = diffalign.load(tmp_path / "run")
    assert set(run.evaluation["rewards"]) == {"shapes-edit-clip", "shapes-edit-checker", "shapes-edit-all-right"}


def test_hive_trains_shapes_edit_on_its_own_edits(run_cli: Any, tmp_path: Path):
    small = ("--steps", 1, "--batch-size", 4, "--eval-size", 4, "--data-limit", 16)
    trained = run_cli("train", "--method", "hive", "--pipeline", "shapes-edit", *small, "--output", "run")
    assert trained.status == 0, trained.err
    run = diffalign.load(tmp_path / "run")
    assert run.config["data"] == "shapes-edit"
    assert len(run.read_prompts("heldout")) == 256, "of the model, not of the data"


def test_a_model_makes_edits_for_hive(run_cli: Any, tmp_path: Path, model: Path):
    write_edits(tmp_path, ("image", "prompt", "edited"), count=2, name="prompts.jsonl")
    small = ("--pipeline", model, "--prompts", "prompts.jsonl", "--samples", 2, "--sample-steps", 2)
    made = run_cli("edits", *small, "--output", "made")
    assert made.status == 0, made.err
    rows = [json.loads(line) for line in (tmp_path / "made" / "edits.jsonl").read_text().splitlines()]
    assert [row["source"] for row in rows] == ["images/000001.png"] * 2 + ["images/000002.png"] * 2
    assert [row["edited"] for row in rows] == [f"images/00000{n}-{i}.png" for n in (1, 2) for i in (0, 1)]
    train, _ = read(tmp_path / "made", InstructPix2Pix.of(tiny.instruct_pix2pix()))
    assert len(train) == 4
    again = run_cli("edits", *small, "--output", "made")
    assert again.status == 2
    assert "exists already" in again.err


def test_levels_weighted_for_v_want_a_network_that_predicts_epsilon():
    policy: Any = SimpleNamespace(path=SimpleNamespace(prediction="v_prediction"))
    with pytest.raises(InputError, match="of networks that predict epsilon, and this one does not"):
        next(iter(HIVE(weighting="v").losses(policy, None, None, None)))  # pyright: ignore[reportArgumentType]
