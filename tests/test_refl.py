"""ReFL: the one-step prediction and its loss by hand, and the denoising loss that holds the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from by_hand import gradient, record, record_noised, value
from torch import Generator, Tensor
from toy import Network, Toy, a_context, diffusion, in_processes, move, nearness

from diffalign import checkpoint
from diffalign.contract import reward
from diffalign.errors import InputError
from diffalign.lora import LoRA
from diffalign.methods.refl import ReFL
from diffalign.pipelines.instruct_pix2pix import InstructPix2Pix
from diffalign.pipelines.latent import LatentPolicy
from diffalign.pipelines.stable_diffusion import StableDiffusion
from diffalign.sampling import ddim, denoising_error, rollout
from diffalign.types import Condition, Context, Examples, Level, Loss, Processes, Prompts

T = 8
PROMPTS = Prompts(("1", "0.5", "-1"))


def a_toy(**scheduler: Any) -> Toy:
    return move(Toy(diffusion(**scheduler), Network()))


def refl(**fields: Any) -> ReFL:
    return ReFL(**{"inference_steps": T, "first": 4, "last": 6, "pretrain_batches": 2, "drop_text": 0.0, **fields})


def losses(policy: Toy, context: Context | None = None, **fields: Any) -> list[Loss]:
    return list(refl(**fields).losses(policy, nearness, PROMPTS, context or a_context(PROMPTS)))


def predicted(policy: Toy, seed: int = 0, eta: float = 1.0) -> Tensor:
    """x0_hat as `losses` predicts it from the same seed: `(x_t - sigma eps) / alpha` after 4 to 6 steps."""
    rng = Generator().manual_seed(seed)
    stop = int(torch.randint(4, 7, (), generator=rng))
    trajectory = rollout(policy, policy.encode(PROMPTS), steps=T, kernel=ddim(eta), rng=rng)
    x_t, now = trajectory.states[stop], policy.path.schedule(T).now[stop]
    epsilon = policy.module(x_t, now, trajectory.condition.tensors["context"])
    return (x_t - float(now.sigma) * epsilon) / float(now.alpha)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_loss_on_the_prediction_by_hand(seed: int, eta: float):
    """`lambda mean relu(phi - r(x0_hat))`: a sample above phi has no gradient."""
    policy = a_toy()
    scores = nearness(predicted(policy, seed, eta), PROMPTS)
    phi = float(scores.detach().sort().values[1:].mean())  # between the best and the second
    want = 0.3 * (phi - scores).clamp(min=0).mean()
    ours = losses(policy, a_context(PROMPTS, seed), eta=eta, reward_weight=0.3, phi=phi, pretrain_weight=0.0)
    (loss,) = ours
    assert loss.update
    assert value(ours) == pytest.approx(float(want.detach()))
    torch.testing.assert_close(gradient(loss.value, policy), gradient(want, policy), rtol=1e-9, atol=1e-10)
    assert loss.metrics["reward"] == pytest.approx(float(scores.detach().mean()))
    assert loss.metrics["reward_std"] == pytest.approx(float(scores.detach().std(correction=0)))


def test_where_all_rewards_are_high_enough_nothing_moves():
    policy = a_toy()
    (loss,) = losses(policy, phi=-1e6, pretrain_weight=0.0)
    assert value([loss]) == 0
    assert not gradient(loss.value, policy).any()


def test_the_rollout_stops_at_a_random_late_step_and_one_call_has_a_graph():
    policy, stops = a_toy(), list[int]()
    schedule = policy.path.schedule(T).now.t.tolist()
    for seed in range(60):
        policy.graphs.clear()
        calls = record(policy := a_toy())
        losses(policy, a_context(PROMPTS, seed), pretrain_weight=0.0)
        stops.append(len(calls) - 1)
        assert policy.graphs == [False] * stops[-1] + [True]
        assert [float(call.t[0]) for call in calls] == schedule[: stops[-1] + 1], "the next step's prediction"
    assert {stop: stops.count(stop) > 10 for stop in stops} == {4: True, 5: True, 6: True}


def test_guidance_is_off():
    policy = StableDiffusion.of(tiny.stable_diffusion(), guidance_scale=5.0)
    policy.adapt(LoRA(rank=2))
    sizes, prompts = list[int](), Prompts(("a dog", "two cats"))
    policy.module.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    red = reward(differentiable=True)(lambda images, prompts: images[:, 0].mean((1, 2)))
    method = ReFL(inference_steps=3, first=1, last=1, pretrain_batches=1)
    ours = list(method.losses(policy, red, prompts, a_context(prompts)))
    # a step and the prediction; the base model's samples are guided, as people use it: 3 steps of 4 rows; L_pre
    assert sizes == [2, 2, 4, 4, 4, 2]
    trained = [p for p in policy.module.parameters() if p.requires_grad]
    assert all(any(bool(g.any()) for g in torch.autograd.grad(loss.value, trained, allow_unused=True) if g is not None) for loss in ours)


# --- L_pre ---


def test_the_denoising_loss_is_on_the_data_where_there_is_some(monkeypatch: pytest.MonkeyPatch):
    policy, calls, given = a_toy(), record_noised(monkeypatch, "diffalign.methods.refl"), list[Examples]()

    def examples() -> Examples:
        given.append(Examples(Prompts((str(len(given)), "7")), torch.randn(2, 2, dtype=torch.float64)))
        return given[-1]

    context = a_context(PROMPTS, examples=examples)
    for rounds in range(1, 4):
        first, second = losses(policy, context, pretrain_weight=0.7)
        assert (first.update, second.update) == (False, True)
        assert len(given) == len(calls) == rounds
        assert torch.equal(calls[-1].x_0, given[-1].x_0)
        assert calls[-1].context[:, 0].tolist() == [float(text) for text in given[-1].prompts.text]
        want = 0.7 * calls[-1].error(policy.module).mean()
        assert value([second]) == pytest.approx(float(want.detach()))
        torch.testing.assert_close(gradient(second.value, policy), gradient(want, policy), rtol=1e-7, atol=1e-9)
        assert second.metrics["denoising_error"] == pytest.approx(float(want.detach()) / 0.7)
    assert context.memory == {}
    assert len({float(t) for call in calls for t in call.at.t}) > 2


def test_the_denoising_loss_is_else_on_samples_that_the_base_made_once(monkeypatch: pytest.MonkeyPatch):
    policy, calls, context = a_toy(), record_noised(monkeypatch, "diffalign.methods.refl"), a_context(PROMPTS)
    _, second = losses(policy, context)
    pool = context.memory["pretrain"]
    assert pool["x_0"].shape == (6, 2), "two batches"
    assert pool["prompts"] == [*PROMPTS.text, *PROMPTS.text]
    assert value([second]) == pytest.approx(float(calls[0].error(policy.module).detach().mean()))

    # the same draws again: where to stop, the rollout to there, and the base model's own rollouts without noise
    rng = Generator().manual_seed(0)
    stop = int(torch.randint(4, 7, (), generator=rng))
    rollout(policy, policy.encode(PROMPTS), steps=T, kernel=ddim(1.0), until=stop, rng=rng)
    with policy.reference():
        finals = [rollout(policy, policy.encode(PROMPTS), steps=T, kernel=ddim(0.0), rng=rng).final for _ in range(2)]
    assert torch.equal(pool["x_0"], torch.cat(finals))

    before, made = pool["x_0"].clone(), len(policy.graphs)
    for _ in range(8):
        losses(policy, context)
    assert len(policy.graphs) - made < 8 * (T + 2), "no samples were made again"
    assert torch.equal(context.memory["pretrain"]["x_0"], before)
    for call in calls:
        for x, shift in zip(call.x_0, call.context[:, 0].tolist(), strict=True):
            row = int((before == x).all(1).nonzero())
            assert float(pool["prompts"][row]) == shift, "each with its own prompt"
    assert len({tuple(x.tolist()) for call in calls for x in call.x_0}) == 6, "drawn from all of them"


@pytest.mark.parametrize(("share", "least", "most"), [(0.0, 0, 0), (0.25, 0.15, 0.35), (1.0, 1, 1)])
@pytest.mark.parametrize("data", [True, False])
def test_a_share_is_trained_with_an_empty_prompt(monkeypatch: pytest.MonkeyPatch, data: bool, share: float, least: float, most: float):
    """In the toy an empty prompt is 0, and none of ours is. The scored prediction has its prompt."""
    policy, calls = a_toy(), record_noised(monkeypatch, "diffalign.methods.refl")
    given = Examples(PROMPTS, torch.zeros(3, 2, dtype=torch.float64))
    context, seen = a_context(PROMPTS, examples=(lambda: given) if data else None), record(policy)
    for _ in range(60):
        losses(policy, context, drop_text=share)
    empty = torch.cat([call.context for call in calls]) == 0
    assert least <= float(empty.double().mean()) <= most
    assert sum(int((call.context == 0).sum()) for call in seen) == int(empty.sum()), "nowhere else"


def test_the_base_models_samples_keep_their_pictures(monkeypatch: pytest.MonkeyPatch):
    """Of a model that edits: each is trained with the instruction, picture and mask that it answers."""
    policy, encoded, trained_on = InstructPix2Pix.of(tiny.instruct_pix2pix(), guidance_scale=3.0), list[Prompts](), list[Any]()
    policy.adapt(LoRA(rank=2))
    encode, rng = policy.encode, Generator().manual_seed(1)

    def listen(prompts: Prompts) -> Condition:
        encoded.append(prompts)
        return encode(prompts)

    def spy(policy: LatentPolicy, x_0: Tensor, noise: Tensor, at: Level, condition: Condition) -> Tensor:
        assert condition.null is None
        trained_on.append((x_0, encoded[-1], condition.tensors["source"]))
        return denoising_error(policy, x_0, noise, at, condition)

    monkeypatch.setattr(policy, "encode", listen)
    monkeypatch.setattr("diffalign.methods.refl.denoising_error", spy)
    red = reward(differentiable=True)(lambda images, prompts: images[:, 0].mean((1, 2)))
    texts = ("make it red", "two cats")
    first, second = (Prompts(texts, torch.rand(2, 3, 16, 16, generator=rng), torch.rand(2, 1, 16, 16, generator=rng)) for _ in range(2))
    context = Context(Generator().manual_seed(0), more=lambda: second)
    method = ReFL(inference_steps=3, first=1, last=1, pretrain_batches=2, drop_text=0.0)
    for _ in range(6):
        list(method.losses(policy, red, first, context))

    pool, whole = context.memory["pretrain"], (first, second)
    assert pool["prompts"] == [*texts, *texts]
    for name in ("image", "mask"):
        assert torch.equal(pool[name], torch.cat([vars(prompts)[name] for prompts in whole]))
    rows = [[int((pool["x_0"] == x).flatten(1).all(1).nonzero()) for x in x_0] for x_0, _, _ in trained_on]
    assert {row for batch in rows for row in batch} == {0, 1, 2, 3}
    sources = encode(Prompts((*texts, *texts), pool["image"])).tensors["source"]
    assert len(sources.unique(dim=0)) == 4
    for batch, (_, prompts, source) in zip(rows, trained_on, strict=True):
        assert prompts.text == tuple(pool["prompts"][row] for row in batch)
        assert torch.equal(prompts.image, pool["image"][batch])
        assert torch.equal(prompts.mask, pool["mask"][batch])
        torch.testing.assert_close(source, sources[batch])


def test_the_base_models_samples_survive_a_checkpoint(tmp_path: Path):
    policy, context = a_toy(), a_context(PROMPTS)
    losses(policy, context)
    resumed = a_context(PROMPTS, memory=checkpoint.read(checkpoint.write(tmp_path, 1, context.memory, keep=1)))
    resumed.rng.set_state(context.rng.get_state())
    for _ in range(3):
        ours, theirs = losses(policy, context), losses(policy, resumed)
        assert [value([loss]) for loss in ours] == [value([loss]) for loss in theirs]


def test_two_processes_share_the_base_models_samples():
    """What is in the memory is saved by one process, and handed to all when a run is resumed."""

    def a_process(processes: Processes) -> dict[str, Any]:
        prompts = Prompts(("1", "2.25")) if processes.rank == 0 else Prompts(("-1.5", ""))
        context = a_context(prompts, seed=processes.rank, processes=processes)
        list(refl().losses(a_toy(), nearness, prompts, context))
        return context.memory["pretrain"]

    first, second = in_processes(a_process)
    assert first["prompts"] == second["prompts"] == ["1", "2.25", "1", "2.25", "-1.5", "", "-1.5", ""]
    assert torch.equal(first["x_0"], second["x_0"])
    assert len(first["x_0"].unique(dim=0)) == 8


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"first": 0}, "method.first is 0: give 1 to 6"),
        ({"first": 7}, r"method.first is 7: give 1 to 6 \(method.last\)"),
        ({"last": T}, "method.last is 8: give 1 to 7, below the denoising steps"),
        ({"inference_steps": 5}, "method.last is 6: give 1 to 4"),
        ({"inference_steps": 1}, "method.inference_steps is 1: give 2 or more"),
        ({"eta": -0.1}, "method.eta is -0.1: give a number from 0 to 1"),
        ({"eta": 1.1}, "method.eta is 1.1"),
        ({"reward_weight": 0.0}, "method.reward_weight is 0.0: give a number above 0"),
        ({"pretrain_weight": -1.0}, "method.pretrain_weight is -1.0: give 0 or more"),
        ({"pretrain_batches": 0}, "method.pretrain_batches is 0: give 1 or more"),
        ({"drop_text": 1.1}, "method.drop_text is 1.1: give a share from 0 to 1"),
    ],
)
def test_wrong_settings_are_errors_with_their_mend(fields: dict[str, Any], says: str):
    with pytest.raises(InputError, match=says):
        refl(**fields)


def test_it_says_what_it_needs_and_the_papers_defaults():
    assert ReFL.needs.differentiable_reward
    assert ReFL.needs.data == "pictures"
    assert ReFL.needs.data_role == "besides"
    method = ReFL()
    assert (method.inference_steps, method.first, method.last, method.reward_weight, method.phi) == (40, 30, 39, 1e-3, 2.0)
    assert method.drop_text == 0.1, "this project's choice"
