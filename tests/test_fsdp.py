"""FSDP: processes that share a network out train the weights of one process that has all of it, and each holds its part alone."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_distributed import OFFLINE, ONLINE, Answers, shared, torchrun
from torch import Generator
from toy import Network, Toy, diffusion, in_processes, move, nearness

import diffalign
from diffalign.config import check_needs, resolve
from diffalign.errors import InputError
from diffalign.models import load_pipeline, make_policy, prepare_to_train
from diffalign.preflight import preflight
from diffalign.processes import make_accelerator
from diffalign.settings import Settings
from diffalign.streams import PromptList, Stream
from diffalign.types import ALONE, Context, Method, Processes

ALL: dict[str, Any] = {
    "full": True, "steps": 3, "learning_rate": 3e-5, "sample_steps": 1, "sample_every": 100, "checkpoint_every": 1, "keep_checkpoints": 9,
    "lr_schedule": "constant", "device": "cpu",
}  # fmt: skip
# The backward pass runs the network again, and each block in it; the base model's calls lie between; two losses make a step.
RUNS: dict[str, dict[str, Any]] = {
    "draft": {"k": 2, "inference_steps": 3, "reference_weight": 0.1, "gradient_checkpointing": True, "accumulate": 2, "eval_size": 2},
    "diffusion-dpo": {"drop_text": 0.3, "accumulate": 1, "ema": 0.5, "eval_size": 0},
}
WORK = """
import json, os, shutil, sys
from pathlib import Path
import torch.distributed
import diffalign
from diffalign import session

prepare = session.prepare

def watched(policy, *rest, **named):
    training = prepare(policy, *rest, **named)
    parameters, optimizer = list(training.parameters.values()), training.optimizer.optimizer

    def here(tensors):
        return sum(x.to_local().numel() for x in tensors)

    def note(*_):
        states = [x for state in optimizer.state.values() for x in state.values() if x.numel() > 1]
        Path(f"held-{os.environ['RANK']}.json").write_text(json.dumps({
            "all": sum(p.numel() for p in parameters), "weights": here(parameters), "gradients": here([p.grad for p in parameters]),
            "states": here(states), "base": here(policy.frozen.parameters()),
        }))

    optimizer.register_step_post_hook(note)
    return training

session.prepare = watched
for name, call in json.loads(sys.argv[1]).items():
    diffalign.align(method=name, batch_size=2, output=f"two/{name}", fsdp=True, **call)
    for part in ("handed-on", "resumed"):
        if os.environ["RANK"] == "0":
            shutil.copytree(f"two/{name}", f"{part}/{name}")
            for later in ("checkpoints/step-000003", "model", "samples"):
                shutil.rmtree(f"{part}/{name}/{later}")
    torch.distributed.barrier()
    diffalign.resume(f"resumed/{name}")
"""


@dataclass(frozen=True)
class Ran:
    """`RUNS` in one process (one/) and in two (two/); these as they were at step 2 (handed-on/), and gone on from there (resumed/)."""

    folder: Path
    done: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("ran")
    (folder / "work.py").write_text(WORK)
    pairs = diffalign.make_pairs("shapes", reward="shapes-clip", output=folder / "pairs", pairs=12, sample_steps=2, batch_size=4)
    calls = {name: {**ALL, **call, **({"data": str(pairs)} if name == "diffusion-dpo" else {})} for name, call in RUNS.items()}
    for name, call in calls.items():
        diffalign.align(method=name, batch_size=4, output=folder / "one" / name, **call)
    done = torchrun("work.py", json.dumps(calls), folder=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all weights, sharded (2,224,280 weights), 3 steps, 2 samples x 2 batches x 2 processes = 8 a step" in done.stderr
    return Ran(folder, done)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "diffusion_pytorch_model.safetensors")


def checkpoint(run: Path, step: int = 3) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:06d}" / "tensors.safetensors")


def apart(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    assert all(x.shape == second[name].shape for name, x in first.items())
    return max(float((x.double() - second[name].double()).abs().max()) for name, x in first.items() if x.numel())


@pytest.mark.parametrize("name", RUNS)
def test_processes_that_share_the_network_out_train_the_weights_of_one(ran: Ran, name: str):
    one, two = ran.folder / "one" / name, ran.folder / "two" / name
    assert apart(weights(one), weights(two)) < 1e-5
    begun = {key: x for key, x in checkpoint(one, 0).items() if "/parameters/" in key}
    assert apart(begun, {key: x for key, x in checkpoint(one).items() if key in begun}) > 5e-5, "the weights moved"
    for ours, theirs in zip(diffalign.load(two).metrics, diffalign.load(one).metrics, strict=True):
        for metric in theirs.keys() & {"loss", "reward", "reward_std", "drift", "margin", "grad_norm", "reward_queries", "network_samples"}:
            assert ours[metric] == pytest.approx(theirs[metric], rel=1e-3, abs=1e-6), metric


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_is_whole(ran: Ran, name: str):
    """It is what a single process writes: weights, averages, and the optimiser's means of gradients and of their squares."""
    ours, theirs = checkpoint(ran.folder / "two" / name), checkpoint(ran.folder / "one" / name)
    assert ours.keys() == theirs.keys()
    means = [key for key in theirs if key.endswith("/exp_avg")]
    assert len(means) == len([key for key in theirs if "/parameters/" in key])
    scale = max(float(theirs[key].abs().max()) for key in means)
    for key in theirs:
        bound = 1e-4 * scale if key in means else 1e-5
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3 if key.endswith("/exp_avg_sq") else 0, atol=bound)


def test_each_process_holds_its_part(ran: Ran):
    held = [json.loads((ran.folder / f"held-{rank}.json").read_text()) for rank in (0, 1)]
    size = held[0]["all"]
    assert size == sum(x.numel() for x in weights(ran.folder / "one" / "draft").values()) > 2e6
    for what, times in {"weights": 1, "gradients": 1, "states": 2, "base": 1}.items():
        assert held[0][what] + held[1][what] == times * size
        assert all(0.49 * times * size < each[what] < 0.51 * times * size for each in held)


def test_the_first_process_saves_what_diffusers_loads(ran: Ran):
    from diffusers import UNet2DConditionModel

    one, two = (ran.folder / name / "draft" / "model" for name in ("one", "two"))
    assert (two / "config.json").read_text() == (one / "config.json").read_text()
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir())
    loaded: Any = UNet2DConditionModel.from_pretrained(two)
    assert apart(dict(loaded.state_dict()), weights(two.parent)) == 0
    assert len(diffalign.load(two.parent).sample(["a red circle"], output=ran.folder / "samples")) == 2
    ours, theirs = (json.loads((path.parent / "eval.json").read_text())["rewards"]["shapes-clip"] for path in (two, one))
    assert (ours["before"], ours["after"]) == pytest.approx((theirs["before"], theirs["after"]), abs=1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_shared_out_or_in_one_process(ran: Ran, name: str):
    never_stopped = checkpoint(ran.folder / "two" / name)
    assert apart(checkpoint(ran.folder / "resumed" / name), never_stopped) == 0
    assert apart(weights(ran.folder / "resumed" / name), weights(ran.folder / "two" / name)) == 0
    run = ran.folder / "handed-on" / name
    with pytest.raises(InputError, match="write fsdp: false into its config"):
        diffalign.resume(run)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("fsdp: true", "fsdp: false"))
    diffalign.resume(run)
    assert [row["step"] for row in diffalign.load(run).metrics] == [1, 2, 3]
    assert apart(weights(run), weights(ran.folder / "two" / name)) < 1e-5
    shutil.rmtree(run)


# --- what is refused ---

CALLS: dict[str, Method] = {**ONLINE, **OFFLINE}


def network_calls(name: str, processes: Processes) -> list[list[bool]]:
    """For each loss of two rounds the network calls before it, the base model's too: whether each was recorded for a gradient."""
    source: Any = PromptList(["0", "0.5", "-1", "2", "0.25", "-0.75", "1.5"]) if name in ONLINE else Answers()
    policy = move(Toy(diffusion(), Network()))
    stream = Stream(source, 4 // processes.count, Generator().manual_seed(5), processes.count, processes.rank)
    context = Context(shared(processes), processes, stream.next)
    calls = list[list[bool]]()
    for _ in range(2):
        for loss in CALLS[name].losses(policy, nearness, stream.next(), context):
            assert loss.value.isfinite()
            calls.append(policy.graphs.copy())
            policy.graphs.clear()
    return calls


@pytest.mark.parametrize("name", [name for name, method in CALLS.items() if method.needs.in_step])
def test_methods_that_say_so_call_the_network_equally_often(name: str):
    alone = network_calls(name, ALONE)
    assert in_processes(lambda processes: network_calls(name, processes)) == [alone, alone]
    assert all(map(any, alone)), "each has a gradient"


def test_methods_that_do_not_say_so_may_call_it_unequally():
    name = "ddpo, as many steps as samples"
    diffusion()  # imports, which two threads at once do badly
    first, second = in_processes(lambda processes: network_calls(name, processes))
    assert first != second


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        ({"full": False}, "a LoRA is small: add --full, or drop --fsdp"),
        ({"precision": "fp16"}, "fsdp and precision fp16 do not go together: drop one, or use bf16"),
        ({"compile": True}, r"fsdp and compile do not go together: drop one\."),
        ({"channels_last": True}, "fsdp and channels_last"),
        ({"memory_budget": 2.0}, "fsdp and memory_budget"),
        ({"optimizer": "adamw8bit"}, "fsdp and optimizer adamw8bit"),
    ],
)
def test_what_does_not_go_with_it_is_refused(chosen: dict[str, Any], says: str):
    Settings(full=True, fsdp=True)
    with pytest.raises(InputError, match=says):
        Settings(**{"full": True, "fsdp": True, **chosen})


@pytest.mark.parametrize("method", ["ddpo", "dpok", "prdp", "d3po"])
def test_methods_on_uneven_shares_are_refused(method: str):
    says = f"fsdp: with {method} one process .* take one of .*draft.*rwr"
    with pytest.raises(InputError, match=says):
        check_needs(resolve({"method": method, "full": True, "fsdp": True, "reward": "shapes-clip"}))


def test_a_check_has_the_whole_network():
    plan = resolve({"method": "draft", "full": True, "fsdp": True, "reward": "shapes-clip", "device": "cpu"})
    policy = make_policy(plan.settings)
    found = next(finding for finding in preflight(plan, policy, ["a red circle"]) if finding.name == "fsdp")
    assert found.text == "one process works here, with the whole network: what is said of memory is of that"
    assert policy.plain is None


def test_one_process_a_live_pipeline_and_other_adapters_are_refused(run_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    outcome = run_cli("train", "--full", "--fsdp", "--device", "cpu", "--output", "run")
    assert outcome.status == 2
    assert outcome.err.startswith("error: fsdp shares the network out among processes, and this is one: start 2 or more with torchrun")
    assert not Path("run").exists()
    settings = Settings(full=True, fsdp=True, device="cpu")
    with pytest.raises(InputError, match="and this is one"):
        make_accelerator(settings)
    live = load_pipeline("shapes")
    with pytest.raises(InputError, match="a live pipeline would be left in parts"):
        diffalign.align(live, reward="shapes-clip", full=True, fsdp=True, device="cpu", output="run")
    other = SimpleNamespace(pipe=live, unfreeze=lambda: None)
    with pytest.raises(InputError, match="the adapter of StableDiffusionPipeline does not share its network out"):
        prepare_to_train(other, settings, mesh=object())
