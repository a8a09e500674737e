"""Several rewards in one: every formula by hand, gradients, gates, running statistics, and what is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from toy import in_processes

import diffalign
from diffalign import registry
from diffalign.composing import make_reward, with_part_flags
from diffalign.contract import CheckedReward, FunctionReward, as_reward
from diffalign.errors import InputError
from diffalign.flags import nested, normal
from diffalign.parts import Moments
from diffalign.sound import resample
from diffalign.types import ALONE, ComposedReward, LearnedReward, Prompts, Reward, StatefulReward

MEDIA = torch.tensor([[1.0, 4.0], [2.0, 0.5], [3.0, -1.0]])  # two numbers a sample: the raw scores of `a` and `b`
THREE = Prompts(("a portrait", "a photo", "a dog"), metadata=({"style": "oil"}, {"style": "photo", "n": 1}, {}))


@dataclass
class Column:
    """A reward whose score is a number of the sample."""

    at: int
    differentiable: bool = True
    modality: str = "image"
    sample_rate: int | None = None
    asked: list[tuple[str, ...]] = field(default_factory=list)

    def __call__(self, media: Tensor, prompts: Prompts) -> Tensor:
        self.asked.append(prompts.text)
        return media[:, self.at]


def of(combine: Any = "sum", a: dict[str, Any] | None = None, b: dict[str, Any] | None = None) -> Any:
    parts = [{"reward": Column(0), "label": "a", **(a or {})}, {"reward": Column(1), "label": "b", **(b or {})}]
    return diffalign.compose(parts, combine=combine)


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (of("sum"), [5, 2.5, 2]),
        (of("sum", {"weight": 2}, {"weight": -1}), [-2, 3.5, 7]),
        (of("min", {"weight": 2}), [2, 0.5, -1]),
        (of("min", {"normalise": "fixed", "mean": 2, "std": 0.5}), [-2, 0, -1]),  # (r - 2) / 0.5 = -2, 0, 2 beside 4, 0.5, -1
        (of("product", {"weight": 2}, {"at_least": 0, "threshold": "step"}), [1, 4, 0]),
        (of("product", {"weight": 0.5}, {"normalise": "fixed", "mean": -1, "std": 2}), [2.5, 0.75 * 2**0.5, 0]),
        (of("sum", {"weight": 0}, {"at_least": 1}), [0, -0.5, -2]),  # min(0, r - 1)
        (of("sum", {"weight": 0}, {"at_most": 0}), [-4, -0.5, 0]),  # min(0, -r)
        (of("sum", {"weight": 0}, {"at_least": 0, "at_most": 1, "weight": 3}), [-9, 0, -3]),
        (of("sum", {"weight": 0}, {"at_least": 1, "normalise": "fixed", "mean": 7, "std": 2}), [0, -0.25, -1]),  # the mean has no say
        (of("sum", {"at_most": 2, "threshold": "step"}, {"weight": 0}), [1, 1, 0]),
        (of("sum", {"when": "portrait|photo"}, {"weight": 10}), [41, 7, -10]),
        (of("min", {"when": "^a d"}), [4, 0.5, -1]),
        (of("min", None, {"when": "photo"}), [1, 0.5, 3]),
        (of("product", {"weight": 2}, {"when": "portrait"}), [4, 4, 9]),
        (of("sum", {"when": {"style": "photo"}}), [4, 2.5, -1]),
        (of("sum", {"when": {"style": "photo", "n": 2}}), [4, 0.5, -1]),
    ],
)
def test_formulas(reward: Any, expected: list[float]) -> None:
    assert reward(MEDIA, THREE).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("combine", ["sum", "min", "product"])
def test_the_gradient_is_that_of_the_parts(combine: Any) -> None:
    media = torch.tensor([[1.0, 4.0], [3.0, 0.5], [2.0, 2.0]], requires_grad=True)
    reward = of(combine, {"weight": 2}, {"weight": 4 if combine != "product" else 1, "when": "portrait|photo"})
    (found,) = torch.autograd.grad(CheckedReward(reward, "compose")(media, THREE).sum(), media)
    a, b = media.detach().unbind(1)
    expected = {
        "sum": [[2, 4], [2, 4], [2, 0]],  # w_a grad a + w_b grad b; the third prompt is none of b's
        "min": [[2, 0], [0, 4], [2, 0]],  # 2 a = 2 < 4 b = 16; 2 a = 6 > 4 b = 2
        "product": [[2 * a[0] * b[0], a[0] ** 2], [2 * a[1] * b[1], a[1] ** 2], [2 * a[2], 0]],  # a^2 b
    }[combine]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))


def test_the_gradient_of_a_sum_is_the_sum_of_gradients_of_networks() -> None:
    network, other = torch.nn.Linear(12, 1), torch.nn.Linear(12, 1)
    first = diffalign.reward(differentiable=True)(lambda x, p: network(x.flatten(1))[:, 0].tanh())
    second = diffalign.reward(differentiable=True)(lambda x, p: other(x.flatten(1))[:, 0] ** 2)
    media = torch.rand(3, 3, 2, 2, requires_grad=True)
    reward = diffalign.compose([{"reward": first, "label": "1"}, {"reward": second, "label": "2", "at_most": 0.05}], [0.3, -2.0])
    (found,) = torch.autograd.grad(reward(media, THREE).sum(), media)
    (one,) = torch.autograd.grad(first(media, THREE).sum(), media)
    (two,) = torch.autograd.grad((0.05 - second(media, THREE)).clamp(max=0).sum(), media)
    torch.testing.assert_close(found, 0.3 * one - 2.0 * two)
    assert float(found.abs().max()) > 1e-4


def test_min_raises_the_worst_part_and_a_sum_does_not() -> None:
    """r_1 = 2 x and r_2 = 3 - x: the worst is best at x = 1, where both are 2; the sum 3 + x grows without end."""

    def ascend(combine: Any) -> list[float]:
        up, down = (diffalign.reward(differentiable=True)(f) for f in (lambda x, p: 2 * x[:, 0], lambda x, p: 3 - x[:, 0]))
        reward = diffalign.compose([{"reward": up, "label": "up"}, {"reward": down, "label": "down"}], combine=combine)
        x = torch.zeros(1, 1, requires_grad=True)
        for _ in range(400):
            (slope,) = torch.autograd.grad(reward(x, THREE[:1]).sum(), x)
            x = (x + 0.01 * slope).detach().requires_grad_(True)
        return [2 * x.item(), 3 - x.item()]

    assert min(ascend("min")) == pytest.approx(2, abs=0.05)
    assert min(ascend("sum")) == pytest.approx(-1, abs=0.01)


def test_parts_are_asked_for_their_prompts_alone() -> None:
    reward = of("sum", {"when": "portrait"}, {"when": "o"})
    a, b = (part.reward for part in reward.parts)
    raw = reward.measure(MEDIA, THREE)
    assert a.asked == [("a portrait",)]
    assert b.asked == [("a portrait", "a photo", "a dog")]
    assert raw["a"].isnan().tolist() == [False, True, True]
    reward.measure(MEDIA[1:], THREE[1:])
    assert len(a.asked) == 1, "none of these prompts is its"
    with pytest.raises(InputError, match=r"No part of the reward is for the prompt 'cat'"):
        reward(MEDIA[:1], Prompts(("cat",)))
    with pytest.raises(InputError, match=r"The part a is for none of the 2 prompts: mend its 'when', 'portrait'"):
        reward.check(THREE[1:], whole=True)


def test_metadata_that_is_not_there() -> None:
    with pytest.raises(InputError, match="The part a: when asks for metadata, which these prompts do not have"):
        of("sum", {"when": {"style": "photo"}})(MEDIA[:1], Prompts(("a dog",)))


def test_it_says_what_it_is() -> None:
    assert isinstance(of(), Reward)
    assert isinstance(of(), ComposedReward)
    assert isinstance(of(), LearnedReward)
    assert isinstance(of(), StatefulReward)
    assert of("min").differentiable
    assert not of("sum", {"reward": Column(0, differentiable=False)}).differentiable
    assert of("sum", {"at_least": 1, "threshold": "step"}).still == ["a"]
    media = MEDIA.clone().requires_grad_(True)
    assert not CheckedReward(of("sum", {"reward": Column(0, differentiable=False)}), "compose")(media, THREE).requires_grad


def test_a_part_that_fails_is_named() -> None:
    reward = of("sum", {"reward": lambda x, p: x})
    with pytest.raises(InputError, match=r"The reward a returned the shape \(3, 2\): return \(3,\)"):
        CheckedReward(reward, "compose")(MEDIA, THREE)
    with pytest.raises(InputError, match="The part b is -1, and a product takes parts of 0 or more"):
        of("product")(MEDIA, THREE)
    zero = torch.tensor([[0.0, 1.0]], requires_grad=True)
    with pytest.raises(InputError, match=r"The part a is 0, where the power 0\.5 has no gradient"):
        of("product", {"weight": 0.5})(zero, THREE[:1])
    assert float(of("product", {"weight": 0.5})(zero.detach(), THREE[:1])) == 0


# --- running statistics ---


def test_moments_are_numpys() -> None:
    values = np.random.default_rng(0).normal(1e4, 3.0, 500)
    moments = Moments()
    for part in np.split(values, [1, 7, 300]):
        moments = moments.after(part.tolist())
    assert moments.count == 500
    assert moments.mean == pytest.approx(values.mean(), rel=1e-12)
    assert moments.scale == pytest.approx(values.std(), rel=1e-9)
    assert Moments().scale == Moments().after([5.0]).scale == Moments().after([0.1 + 0.2, 0.3] * 9).scale == 1


def rounds_of(processes: Any, rounds: int = 3, calls: int = 2) -> tuple[list[Tensor], dict[str, Any]]:
    """The scores of batches of 4 shared by the processes, round after round, and the state after them."""
    stream = torch.randn(rounds * calls * 4, 2, generator=torch.Generator().manual_seed(3)) * 5 + 2
    reward = of("sum", {"normalise": "running"}, {"normalise": "running", "when": "1|3"})
    checked, size, found = CheckedReward(reward, "compose", learners=processes), 4 // processes.count, list[Tensor]()
    for i, batch in enumerate(stream.split(4)):
        own = slice(processes.rank * size, (processes.rank + 1) * size)
        found.append(checked(batch[own], Prompts(tuple("0123"))[own]))
        if i % calls == calls - 1:
            checked.end_round()
    return found, reward.state()


def test_statistics_are_those_before_the_round_and_of_the_first_batch_in_the_first() -> None:
    stream = (torch.randn(24, 2, generator=torch.Generator().manual_seed(3)) * 5 + 2).double().numpy()
    batches, theirs = np.split(stream, 6), np.array([False, True, False, True])
    found, state = rounds_of(ALONE)
    for i, batch in enumerate(batches):
        seen = np.concatenate(batches[:1] if i < 2 else batches[: i // 2 * 2])
        a, b = seen[:, 0], seen[np.tile(theirs, len(seen) // 4), 1]
        expected = (batch[:, 0] - a.mean()) / a.std() + np.where(theirs, (batch[:, 1] - b.mean()) / b.std(), 0)
        assert found[i].tolist() == pytest.approx(expected, rel=1e-5)
    count, mean, squares = state["statistics"]["b"]
    of_b = stream[np.tile(theirs, 6), 1]
    assert (count, mean, math.sqrt(squares / count)) == (12, pytest.approx(of_b.mean()), pytest.approx(of_b.std()))


def test_processes_have_the_statistics_of_one() -> None:
    whole, state = rounds_of(ALONE)
    parts = in_processes(rounds_of)
    assert [own for _, own in parts] == [state, state], "to the last bit"
    for i, scores in enumerate(whole):
        assert torch.equal(torch.cat([found[i] for found, _ in parts]), scores)


def test_nothing_moves_outside_a_training() -> None:
    reward = of("sum", {"normalise": "running"}, {"weight": 0})
    checked = CheckedReward(reward, "compose")
    with pytest.raises(InputError, match="The part a is normalised by running statistics, and there are none before"):
        checked(MEDIA, THREE)
    with pytest.raises(InputError, match=r"a part is normalised by running statistics, .* and diffalign pairs is none"):
        checked.check_settled("diffalign pairs is none")
    blank = reward.state()
    with checked.rehearsal():
        std = math.sqrt(2 / 3)  # of 1, 2, 3, the first batch
        assert checked(MEDIA, THREE).tolist() == pytest.approx([-1 / std, 0, 1 / std])
        assert checked(MEDIA * 9, THREE).tolist() == pytest.approx([7 / std, 16 / std, 25 / std])
    assert reward.state() == blank
    assert reward.waits
    reward.restore({"statistics": {"a": [3, 2.0, 2.0]}, "parts": {}})
    before = reward.state()
    assert torch.equal(checked(MEDIA, THREE), checked(MEDIA, THREE))
    checked.end_round()
    assert reward.state() == before
    with pytest.raises(InputError, match="The run has a state of b, and now a has one"):
        reward.restore({"statistics": {"b": [1, 0.0, 0.0]}, "parts": {}})


@dataclass
class Rising(Column):
    """A part with a state of its own."""

    bar: float = 0.0
    learns: ClassVar[bool] = True

    def __call__(self, media: Tensor, prompts: Prompts) -> Tensor:
        return super().__call__(media, prompts) - self.bar

    def learn(self, scores: Tensor) -> None:
        self.bar += float(scores.mean())

    def state(self) -> dict[str, Any]:
        return {"bar": self.bar}

    def restore(self, state: Any) -> None:
        self.bar = state["bar"]


def test_a_reward_with_a_state_says_whether_its_scale_moves() -> None:
    class Still(Rising):
        learns: ClassVar[bool] = False

    for reward, learns in ((Column(0), False), (Rising(0), True), (Still(0), False)):
        for given in (reward, of("sum", {"reward": reward}, {"weight": 0})):
            checked = CheckedReward(as_reward(given), "a", learners=ALONE)
            checked(MEDIA, THREE)
            assert checked.learns == learns
            assert bool(checked.seen) == learns, "what does not learn is handed no scores"
            checked.end_round()

    @dataclass
    class Unsaid(Column):
        def learn(self, scores: Tensor) -> None: ...
        def state(self) -> dict[str, Any]: ...
        def restore(self, state: Any) -> None: ...

    with pytest.raises(InputError, match=r"Unsaid keeps a state, and does not say .*: give its class learns = True, or False"):
        as_reward(Unsaid(0))


def test_a_part_with_a_state_learns_from_its_own_scores() -> None:
    reward = of("sum", {"reward": Rising(0), "when": "o"}, {"weight": 0})
    checked = CheckedReward(reward, "compose", learners=ALONE)
    checked(MEDIA, THREE)
    checked(MEDIA[:2], THREE[:2])
    checked.end_round()
    assert reward.state() == {"statistics": {}, "parts": {"a": {"bar": pytest.approx((1 + 2 + 3 + 1 + 2) / 5)}}}
    assert reward(MEDIA, THREE).tolist() == pytest.approx([-0.8, 0.2, 1.2])
    reward.restore({"statistics": {}, "parts": {"a": {"bar": 1.0}}})
    assert reward(MEDIA, THREE).tolist() == [0, 1, 2]


# --- what people write ---


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(parts=[]), "compose has no parts"),
        (dict(parts="jpeg-compressibility"), "parts is no list"),
        (dict(parts=["jpeg-compressibility"], weights=[1, 2]), "2 weights for 1 rewards"),
        (dict(parts=["jpeg-compressibility"], weights=[math.nan]), "jpeg-compressibility: weight is nan: give a finite number"),
        (dict(parts=["jpeg-compressibility"], weights=[math.inf]), "weight is inf"),
        (dict(parts=["jpeg-compresibility"]), "Did you mean 'jpeg-compressibility'"),
        (dict(parts=["jpeg-compressibility"] * 2), "Two parts are called jpeg-compressibility: give one of them another label"),
        (dict(parts=["shapes-clip"], combine="max"), "combine is 'max': give sum, min or product"),
        (dict(parts=[{"name": "aesthetic", "precison": "bf16"}]), "no setting 'precison' of the part aesthetic. Did you mean 'precision'"),
        (dict(parts=[{"name": "aesthetic", "wieght": 1}]), "Did you mean 'weight'"),
        (dict(parts=[{"name": "aesthetic", "precision": "fp8"}]), "The part aesthetic: precision is fp8: give"),
        (dict(parts=[{"name": "aesthetic", "weight": "much"}]), "The part aesthetic: weight is much: give a number"),
        (dict(parts=[{"name": "aesthetic", "when": "("}]), r"when is '\(', which is no regular expression"),
        (dict(parts=[{"name": "aesthetic", "when": {}}]), "when is empty"),
        (dict(parts=[{"name": "aesthetic", "normalise": "fixed", "mean": 0, "std": -1}]), "std is -1.0: normalise fixed wants"),
        (dict(parts=[{"name": "aesthetic", "normalise": "fixed"}]), "std is None: normalise fixed wants"),
        (dict(parts=[{"name": "aesthetic", "mean": 1}]), "mean and std are of normalise fixed, and normalise is none"),
        (dict(parts=[{"name": "aesthetic", "at_least": 5, "at_most": 4}]), "at_least 5 is above at_most 4"),
        (dict(parts=[{"name": "aesthetic", "threshold": "step"}]), "threshold step: give at_least, at_most"),
        (dict(parts=[{"name": "aesthetic", "at_least": 1, "threshold": "step", "normalise": "running"}]), "a step is 0 or 1"),
        (dict(parts=[{"name": "aesthetic", "weight": 0}], combine="min"), "has the weight 0, which in a min hides the others"),
        (dict(parts=[{"name": "aesthetic", "weight": -1}], combine="product"), "has the weight -1: an exponent of a product is above 0"),
        (dict(parts=[{"name": "aesthetic", "normalise": "running"}], combine="product"), "a running z-score, which falls below 0"),
        (dict(parts=[{"name": "aesthetic", "at_least": 5}], combine="product"), "a hinge, which falls below 0"),
        (dict(parts=["compose"]), "A part of compose is compose again"),
        (dict(parts=[{"weight": 1}]), "names no reward"),
        (dict(parts=[3]), "is no reward"),
    ],
)
def test_bad_input(call: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        diffalign.compose(**call)


def test_each_part_hears_its_own_rate() -> None:
    heard = dict[str, tuple[Tensor, Prompts]]()

    def part(name: str, rate: int | None) -> FunctionReward:
        def note(media: Tensor, prompts: Prompts) -> Tensor:
            heard[name] = media.detach(), prompts
            return media.mean(1)

        return FunctionReward(note, differentiable=True, modality="audio", sample_rate=rate)

    sounds, asked = torch.rand(2, 480) - 0.5, Prompts(("a", "b"), transcript=("one", "two"), sample_rate=24000)
    mixed = diffalign.compose(
        [{"reward": part(name, rate), "label": name} for name, rate in (("low", 8000), ("high", 16000), ("any", None))]
    )
    checked = CheckedReward(mixed, "mixed", noted={})
    assert (checked.modality, checked.sample_rate) == ("audio", None)
    score = checked(sounds.requires_grad_(True), asked)
    expected = {"low": resample(sounds, 24000, 8000), "high": resample(sounds, 24000, 16000), "any": sounds}
    for name, rate in (("low", 8000), ("high", 16000), ("any", 24000)):
        assert torch.equal(heard[name][0], expected[name])
        assert (heard[name][1].sample_rate, heard[name][1].transcript) == (rate, ("one", "two"))
    torch.testing.assert_close(score, sum(x.mean(1) for x in expected.values()))
    assert torch.autograd.grad(score.sum(), sounds)[0].ne(0).all()
    assert list(checked.noted or {}) == ["low", "high", "any"]
    same = CheckedReward(diffalign.compose([{"reward": part(name, 8000), "label": name} for name in ("low", "high")]), "same")
    assert same.sample_rate == 8000
    same(sounds, asked)
    assert torch.equal(heard["high"][0], expected["low"])


def test_one_modality_and_own_fields() -> None:
    with pytest.raises(InputError, match="The parts judge different things: a judges image, b judges audio"):
        of("sum", None, {"reward": Column(1, modality="audio")})
    with pytest.raises(InputError, match="Compose takes parts that are made"):
        registry.find("rewards", "compose")[0](parts=["aesthetic"])
    with pytest.raises(InputError, match="compose has no parts: name the rewards"):
        make_reward("compose", {})


def test_fields_stand_beside_the_weight_and_are_all_recorded() -> None:
    reward, fields = make_reward("compose", {"parts": ["shapes-clip", {"name": "hps-v2.1", "precision": "bf16", "at_least": 0.2}]})
    clip, hps = (part.reward for part in reward.parts)  # type: ignore[attr-defined]
    assert (hps.version, hps.precision, clip.folder) == ("v2.1", "bf16", None)
    assert fields["parts"][0] == {"name": "shapes-clip", "folder": None, "label": "shapes-clip", "weight": 1.0, "normalise": "none"}
    again, twice = make_reward("compose", fields)
    assert twice == fields
    assert again.parts == reward.parts  # type: ignore[attr-defined]


def test_a_field_that_a_part_has_too_is_refused(tmp_path: Any) -> None:
    (tmp_path / "mine.py").write_text("class Mine:\n    def __init__(self, weight: float = 1.0): ...\n")
    with pytest.raises(InputError, match="has a field weight, which a part has too"):
        diffalign.compose([f"{tmp_path}/mine.py:Mine"])


def test_words_become_parts() -> None:
    words = normal(["--reward", "hps-v2.1", "my.py:red", "--reward.weights", "1", "-0.1", "--reward.combine", "min"])
    expected = [
        "--reward.name=compose",
        '--reward.parts=["hps-v2.1", "my.py:red"]',
        "--reward.weights=[1, -0.1]",
        "--reward.combine",
        "min",
    ]
    assert words == expected
    assert normal(["--reward", "aesthetic", "--steps", "3"]) == ["--reward.name", "aesthetic", "--steps", "3"]
    words = with_part_flags(
        normal(["--reward", "hps-v2.1", "my.py:red", "--reward.hps-v2.1.at-least", "0.2", "--reward.red.when=[ab]", "--full"])
    )
    last = '--reward.parts=[{"name": "hps-v2.1", "at_least": 0.2}, {"name": "my.py:red", "when": "[ab]"}]'
    assert words[0] == "--reward.name=compose"
    assert words[-2:] == ["--full=true", last]
    of_file = with_part_flags(["--reward.aesthetic.weight", "3"], [{"name": "aesthetic", "weight": 1}, "shapes-clip"])
    assert of_file == ['--reward.parts=[{"name": "aesthetic", "weight": 3}, {"name": "shapes-clip"}]']
    assert nested({"reward": ["a", "b"]})["reward"] == {"name": "compose", "parts": ["a", "b"]}
    assert nested({"reward": {"parts": ["a"], "combine": "min"}})["reward"] == {"name": "compose", "parts": ["a"], "combine": "min"}
