"""What every method keeps to, whoever wrote it: a row of the registry is tested by its name."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from by_hand import record
from torch import Generator, Tensor
from toy import GOAL, Exact, Toy, a_context, diffusion, flow, in_processes, nearness

from diffalign import checkpoint, config, registry
from diffalign.errors import InputError
from diffalign.lora import LoRA
from diffalign.sampling import ddim, rollout
from diffalign.settings import Settings
from diffalign.types import Context, Examples, Loss, Method, Processes, Prompts

T = 4
PROMPTS = Prompts(("0",) * 32)


class Case(NamedTuple):
    """Fields that are small enough for the toy, and a training that must raise the reward there from about -5 by `rise`."""

    fields: dict[str, Any]
    rate: float
    batches: int
    rise: float


ROUND = {"inference_steps": T, "batches": 2}
CASES = {
    "draft": Case({"inference_steps": T}, 0.1, 20, 2.0),
    "draft-lv": Case({"inference_steps": T}, 0.1, 20, 2.0),
    "alignprop": Case({"inference_steps": T}, 0.1, 20, 2.0),
    "refl": Case({"inference_steps": T, "first": 1, "last": 3, "reward_weight": 1.0}, 0.1, 20, 1.0),
    "ddpo": Case({**ROUND, "clip": 0.1}, 0.1, 15, 1.0),
    "flow-grpo": Case({**ROUND, "samples": 8, "clip": 0.1, "kl_weight": 0.01}, 0.1, 15, 1.0),
    "flow-grpo-fast": Case({**ROUND, "samples": 8, "clip": 0.1}, 0.1, 15, 0.5),
    "dance-grpo": Case({**ROUND, "samples": 8, "clip": 0.1}, 0.1, 15, 0.5),
    "dlpo": Case({**ROUND, "denoising_weight": 0.1}, 0.1, 15, 1.0),
    "dpok": Case({**ROUND, "clip": 0.1, "kl_weight": 0.01, "policy_steps": 2, "value_learning_rate": 1e-2}, 0.1, 10, 1.0),
    "prdp": Case({**ROUND, "clip": 0.1, "samples": 4, "beta": 0.02, "updates": 2}, 0.1, 10, 1.0),
    "d3po": Case({**ROUND, "beta": 1.0, "updates": 2}, 0.1, 10, 0.5),
    "rwr": Case({**ROUND, "samples": 8, "updates": 4}, 0.1, 10, 0.5),
    "raft": Case({**ROUND, "samples": 8, "updates": 4}, 0.1, 10, 0.5),
    "diffusion-dpo": Case({"beta": 20.0}, 0.1, 60, 0.5),
    "kto": Case({"beta": 20.0}, 0.1, 60, 0.5),
    "mapo": Case({}, 0.1, 60, 0.5),
}
ANY_SIGN = {("diffusion-dpo", "offset"), ("refl", "phi")}
FLOWS = ("flow-grpo", "flow-grpo-fast", "dance-grpo")  # made for flows, and tested on one
UNBOUNDED = {
    *((name, "advantage_clip") for name in ("ddpo", "dlpo", *FLOWS)),
    ("rwr", "cap"),
    ("raft", "cap"),
    ("hive", "cap"),
}  # infinity: nothing is cut


def its_class(name: str) -> tuple[Any, dict[str, Any]]:
    return registry.find("methods", name)


def a_method(name: str) -> Method:
    found, preset = its_class(name)
    if found.needs.data == "edits":
        pytest.skip("the toy has no picture to edit: tested on a tiny pipeline, in the method's own file")
    assert name in CASES, "a new method is given its row here"
    return found(**{**preset, **CASES[name].fields})


def a_toy(name: str = "") -> Toy:
    path = flow(shift=3.0) if name in FLOWS else diffusion()
    return Toy(path, Exact(path))


def examples(kind: str, seed: int, n: int = 64) -> Examples:
    """Of the base's own data, `N((1.5, -0.5), 0.5^2)`: what is nearer to the goal is preferred, or liked."""
    rng, prompts = Generator().manual_seed(seed), Prompts(("0",) * n)
    x, y = torch.tensor([1.5, -0.5], dtype=torch.float64) + 0.5 * torch.randn(2, n, 2, generator=rng, dtype=torch.float64)
    better = nearness(x, prompts) > nearness(y, prompts)
    match kind:
        case "pairs":
            return Examples(prompts, torch.where(better[:, None], x, y), torch.where(better[:, None], y, x))
        case "labels":
            return Examples(prompts, x, desirable=nearness(x, prompts) > -5)
        case _:
            return Examples(prompts, x)


def losses(method: Method, policy: Toy, batch: int, context: Context) -> Iterator[Loss]:
    data = method.needs.data is not None and method.needs.data_role == "only"
    given = examples(str(method.needs.data), batch) if data else PROMPTS
    return method.losses(policy, nearness if method.needs.reward else None, given, context)


@torch.no_grad()
def reward_of(policy: Toy) -> float:
    prompts = Prompts(("0",) * 512)
    rng = Generator().manual_seed(123)
    return float(nearness(rollout(policy, policy.encode(prompts), steps=10, kernel=ddim(0.0), rng=rng).final, prompts).mean())


@pytest.mark.parametrize("name", [*registry.METHODS])
def test_a_short_training_raises_the_reward(name: str):
    """And all that it yields can be gone down and logged."""
    method, case, policy, context = a_method(name), CASES[name], a_toy(name), a_context(PROMPTS)
    optimiser = torch.optim.Adam(policy.weights, lr=case.rate)
    before = reward_of(policy)
    for batch in range(case.batches):
        complete = False
        for loss in losses(method, policy, batch, context):
            assert loss.value.requires_grad
            assert loss.value.shape == ()
            assert loss.value.isfinite()
            assert loss.metrics, "something is logged"
            for metric, number in loss.metrics.items():
                assert metric.isidentifier()
                assert math.isfinite(float(number)), metric
                assert not (isinstance(number, Tensor) and number.requires_grad), f"{metric} holds a graph"
            loss.value.backward()
            complete = loss.update
            if loss.update:
                optimiser.step()
                optimiser.zero_grad()
        assert complete, "the last loss of a batch completes an update"
    assert reward_of(policy) > before + case.rise


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if name not in FLOWS])
def test_every_method_takes_a_flow(name: str):
    """One round, or one batch: finite losses with a gradient, and a first update that moves the policy."""
    path, method = flow(shift=3.0), a_method(name)
    policy = Toy(path, Exact(path))
    slopes = list[Tensor]()
    for loss in losses(method, policy, 0, a_context(PROMPTS)):
        assert loss.value.isfinite()
        slopes += torch.autograd.grad(loss.value, policy.weights, materialize_grads=True)
    assert all(slope.isfinite().all() for slope in slopes)
    assert any(slope.any() for slope in slopes)


@pytest.mark.parametrize("name", [*registry.METHODS])
def test_the_same_seed_gives_the_same_losses(name: str):
    method = a_method(name)

    def values(seed: int) -> list[float]:
        before = torch.get_rng_state()
        out = [float(loss.value.detach()) for loss in losses(method, a_toy(name), 0, a_context(PROMPTS, seed))]
        assert torch.equal(torch.get_rng_state(), before), "torch's own generator is not used"
        return out

    first = values(0)
    assert values(0) == first
    if name not in ("diffusion-dpo", "kto", "d3po", "ddpo", *FLOWS):  # these begin at a number that is known
        assert values(1) != first


@pytest.mark.parametrize("name", [*registry.METHODS])
def test_the_policy_is_left_as_it_was_found(name: str):
    """Sampling and asking the base change no weight, no mode and no module."""
    method, policy = a_method(name), a_toy(name)
    module, weights = policy.module, [w.clone() for w in policy.weights]
    for _ in losses(method, policy, 0, a_context(PROMPTS)):
        assert policy.module is module
        assert torch.is_grad_enabled()
    assert all(torch.equal(w, before) for w, before in zip(policy.weights, weights, strict=True))
    assert all(w.grad is None for w in policy.weights)


@pytest.mark.parametrize("name", ["ddpo", "dpok", "prdp", "d3po"])
def test_only_the_random_steps_are_trained_on(name: str):
    """The others have no transition, in any method on denoising steps."""
    method: Any = a_method(name)
    policy, first = a_toy(), diffusion().schedule(T).now.t[:2].tolist()
    calls = record(policy)
    assert len(list(losses(replace(method, random_steps=2), policy, 0, a_context(PROMPTS)))) > 1
    trained = {t for call, graph in zip(calls, policy.graphs, strict=True) if graph for t in call.t.tolist()}
    assert trained == set(first)


@pytest.mark.parametrize("name", [*registry.METHODS])
def test_a_resumed_training_goes_on_as_if_it_had_not_stopped(name: str, tmp_path: Path):
    method, policy, context = a_method(name), a_toy(name), a_context(PROMPTS)
    list(losses(method, policy, 0, context))
    resumed = a_context(PROMPTS, memory=checkpoint.read(checkpoint.write(tmp_path, 1, context.memory, keep=1)))
    resumed.rng.set_state(context.rng.get_state())
    ours, theirs = (list(losses(method, policy, 1, c)) for c in (context, resumed))
    assert [float(loss.value.detach()) for loss in ours] == [float(loss.value.detach()) for loss in theirs]
    assert [{k: float(v) for k, v in loss.metrics.items()} for loss in ours] == [
        {k: float(v) for k, v in loss.metrics.items()} for loss in theirs
    ]


@pytest.mark.parametrize("name", [*registry.METHODS])
def test_two_processes_keep_in_step(name: str, tmp_path: Path):
    """As many updates in each, or the next collective hangs; the same metrics, or their mean does; and the same memory."""
    method = a_method(name)

    def a_process(processes: Processes) -> tuple[int, set[str], str]:
        policy, context = a_toy(name), a_context(PROMPTS, seed=processes.rank, processes=processes)
        marks, names = 0, set[str]()
        for batch in range(2):
            for loss in losses(method, policy, 2 * batch + processes.rank, context):
                marks, names = marks + loss.update, names | set(loss.metrics)
        saved = checkpoint.write(tmp_path / str(processes.rank), 1, context.memory, keep=1)
        return marks, names, (saved / checkpoint.SUMS).read_text()

    first, second = in_processes(a_process)
    assert first == second
    assert first[0] >= 2


@pytest.mark.parametrize("name", [*registry.METHODS])
def test_its_fields_are_documented_flags(name: str):
    found, _ = its_class(name)
    made = found()
    assert is_dataclass(made)
    parser = config.build_parser(config.Names(name, "user/model", None))
    flags = {action.dest: action.help for action in parser._actions}
    for field in fields(found):
        assert flags[f"method.{field.name}"], f"{field.name} has no docstring"
    with pytest.raises(FrozenInstanceError):
        setattr(made, fields(found)[0].name, 1)


@pytest.mark.parametrize("name", [*registry.METHODS])
def test_its_defaults_are_settings_and_resolve(name: str):
    (found, preset), defaults = its_class(name), registry.defaults_of(name)
    assert set(defaults) <= {field.name for field in fields(Settings)} | {"method"}
    given = {key: value for key, value in defaults.items() if key != "method"}
    settings = Settings(**{**given, "lora": LoRA(**given.get("lora", {}))})
    plan = config.resolve({"method": name, "pipeline": "user/model", "data": "folder"})
    assert replace(plan.settings, pipeline="shapes", data=None) == settings
    assert plan.method == found(**{**defaults.get("method", {}), **preset})


@pytest.mark.parametrize(("value", "fine"), [(-1, ANY_SIGN), (math.nan, set()), (math.inf, UNBOUNDED)], ids=["negative", "nan", "inf"])
@pytest.mark.parametrize("name", [*registry.METHODS])
def test_a_number_that_makes_no_sense_is_an_error_that_names_its_field(name: str, value: float, fine: set[tuple[str, str]]):
    found, preset = its_class(name)
    numbers = [field.name for field in fields(found) if str(field.type).split(" | ")[0] in ("int", "float")]
    assert numbers
    for field in numbers:
        given = {**preset, field: value}
        if (name, field) in fine:
            assert vars(found(**given))[field] == value
            continue
        with pytest.raises(InputError, match=rf"^method\.{field} is {value}: give .*\.$"):
            found(**given)


@pytest.mark.parametrize("name", [*registry.METHODS])
def test_it_says_what_it_needs(name: str):
    found, _ = its_class(name)
    needs = found.needs
    assert needs.reward or needs.data, "there is something to learn from"
    assert not (needs.differentiable_reward and not needs.reward)
    assert needs.data or needs.data_role == "only"
    assert (needs.differentiable_reward and registry.METHODS[name].facts == "differentiable reward") or not needs.differentiable_reward


@pytest.mark.parametrize("name", [name for name, row in registry.METHODS.items() if row.facts == "any reward"])
def test_methods_of_any_reward_take_one_without_a_gradient(name: str):
    method = a_method(name)

    def black_box(media: Tensor, prompts: Prompts) -> Tensor:
        assert not torch.is_grad_enabled(), "nothing of the sampling is recorded"
        return torch.tensor([-float(((x - GOAL) ** 2).sum()) for x in media])

    for loss in method.losses(a_toy(name), black_box, PROMPTS, a_context(PROMPTS)):
        assert loss.value.requires_grad
