"""Several processes: with an equal part of the batch each they are one process with all of it, they end together, and runs change hands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import PartialState
from by_hand import gradient
from safetensors.torch import load_file
from torch import Generator, Tensor
from toy import Network, Toy, diffusion, in_processes, move, nearness

import diffalign
from diffalign import session
from diffalign import tiny as dry_run
from diffalign.cli import main
from diffalign.config import resolve
from diffalign.errors import InputError
from diffalign.inputs import open_data
from diffalign.methods.alignprop import AlignProp
from diffalign.methods.d3po import D3PO
from diffalign.methods.ddpo import DDPO
from diffalign.methods.diffusion_dpo import DiffusionDPO
from diffalign.methods.dpok import DPOK
from diffalign.methods.draft import DRaFT
from diffalign.methods.kto import KTO
from diffalign.methods.mapo import MaPO
from diffalign.methods.prdp import PRDP
from diffalign.methods.refl import ReFL
from diffalign.methods.rwr import RWR
from diffalign.noise import draw_noise
from diffalign.processes import make_accelerator
from diffalign.settings import Settings
from diffalign.shards import Shared, draw_rows, everyone, everyones_prompts, held, own
from diffalign.streams import PromptList, Stream
from diffalign.types import ALONE, Context, Examples, Method, Processes, Prompts

# --- rows ---


def shared(processes: Processes, seed: int = 0) -> Generator:
    rng = Generator() if processes.count == 1 else Shared(processes)
    return rng.manual_seed(seed)


def test_processes_draw_the_rows_of_one():
    def drawn(processes: Processes) -> list[Tensor]:
        rng, n, path = shared(processes), 6 // processes.count, diffusion()
        rows = [draw_noise((n, 3), torch.zeros(1), rng), path.draw(n, rng).t, draw_rows(n, rng, lambda n: torch.rand(n, generator=rng))]
        return [*rows, torch.randn(2, generator=rng)]

    whole, parts = drawn(ALONE), in_processes(drawn, 3)
    for i in range(3):
        assert torch.equal(torch.cat([part[i] for part in parts]), whole[i])
        assert len(whole[i].unique(dim=0)) == 6
    assert all(torch.equal(part[3], whole[3]) for part in parts), "what is no row is the same in all, and they stay in step"


def test_everyones_rows_stand_as_in_one_process():
    """Two batches of 2 rows in each of three processes: a batch of all is rows 0 to 5, the next one 6 to 11."""
    whole = torch.arange(12).unflatten(0, (2, 3, 2))

    def work(processes: Processes) -> tuple[Tensor, Tensor, list[int]]:
        mine = whole[:, processes.rank].flatten()
        every = everyone(mine, processes, 2)
        here, rows = held(torch.tensor([11, 0, 3, 8, 6]), processes, 2)
        assert torch.equal(mine[rows[here]], torch.tensor([11, 0, 3, 8, 6])[here])
        return every, own(every, processes, 2), here.tolist()

    for rank, (every, mine, here) in enumerate(in_processes(work, 3)):
        assert every.tolist() == [*range(12)]
        assert torch.equal(mine, whole[:, rank].flatten())
        assert here == [[False, True, False, False, True], [False, False, True, True, False], [True, False, False, False, False]][rank]


def test_everyones_prompts_bring_all_that_is_theirs():
    image = torch.arange(4.0)[:, None, None, None].expand(4, 3, 2, 2)
    whole = Prompts(("a", "äöü", "", "much longer"), image, metadata=tuple({"n": n} for n in range(4)))
    for found in in_processes(lambda p: everyones_prompts(whole[2 * p.rank : 2 * p.rank + 2], p, 2, torch.device("cpu"))):
        assert found.text == whole.text
        assert found.metadata == whole.metadata
        assert found.mask is None
        assert found.image is not None
        assert torch.equal(found.image, image)


# --- methods, in float64, where a difference is no rounding ---

TEXTS = ["0", "0.5", "-1", "2", "0.25", "-0.75", "1.5"]  # fewer than two batches, and none divides them


@dataclass(frozen=True)
class Answers:
    """Two answers to each prompt, the first one preferred; every third is disliked."""

    def __len__(self) -> int:
        return len(TEXTS)

    def take(self, indices: Sequence[int]) -> Examples:
        rng = Generator().manual_seed(7)
        won, lost = (torch.randn(len(TEXTS), 2, generator=rng, dtype=torch.float64)[list(indices)] for _ in range(2))
        return Examples(Prompts(tuple(TEXTS[i] for i in indices)), won, lost, torch.tensor([i % 3 > 0 for i in indices]))

    def contents(self) -> str:
        return ""


def steps_of(method: Method, processes: Processes, source: Any) -> list[Tensor]:
    """The gradients of the optimiser steps of three rounds, of a policy that stays as it is."""
    policy = move(Toy(diffusion(), Network()))
    stream = Stream(source, 4 // processes.count, Generator().manual_seed(5), processes.count, processes.rank)
    context, steps = Context(shared(processes), processes, stream.next), list[Tensor]()
    size = sum(w.numel() for w in policy.weights)
    for _ in range(3):
        slope = torch.zeros(size, dtype=torch.float64)
        for loss in method.losses(policy, nearness, stream.next(), context):
            slope = slope if loss.value.is_leaf else slope + gradient(loss.value, policy)
            if loss.update:
                steps.append(slope)
                slope = torch.zeros(size, dtype=torch.float64)
    return steps


ROUND: dict[str, Any] = {"inference_steps": 3, "batches": 2}
ONLINE = {
    "draft": DRaFT(k=2, inference_steps=3, reference_weight=0.1),
    "draft-lv": DRaFT(n=2, inference_steps=3),
    "alignprop": AlignProp(inference_steps=4),
    "refl": ReFL(inference_steps=5, first=2, last=4, drop_text=0.3, pretrain_batches=2),
    "ddpo": DDPO(**ROUND, samples=2, updates=3, advantage="group", fraction=0.5),
    "ddpo, as many steps as samples": DDPO(**ROUND, updates=8, inner_epochs=2, buffer=3, least=2),
    "dpok": DPOK(**ROUND, policy_steps=2, forwards=1, value_batch=5, value_learning_rate=1e-2),
    "dpok, KL in the reward": DPOK(**ROUND, kl_mode="reward", baseline="none"),
    "prdp": PRDP(**ROUND, samples=2, updates=2),
    "d3po": D3PO(**ROUND, samples=3, updates=7, ratio_clip=0.9),
    "rwr": RWR(**ROUND, samples=3, updates=2, drop_text=0.3),
    "raft": RWR(**ROUND, samples=3, weighting="best"),
}
OFFLINE = {"diffusion-dpo": DiffusionDPO(drop_text=0.3), "mapo": MaPO(), "kto": KTO(drop_text=0.3)}


@pytest.mark.parametrize("name", [*ONLINE, *OFFLINE])
def test_two_processes_with_half_the_batch_take_the_steps_of_one(name: str):
    method, source = (ONLINE[name], PromptList(TEXTS)) if name in ONLINE else (OFFLINE[name], Answers())
    whole = steps_of(method, ALONE, source)
    halves = in_processes(lambda processes: steps_of(method, processes, source))
    assert len(whole) == len(halves[0]) == len(halves[1]) >= 3
    assert sum(bool(slope.any()) for slope in whole) >= 3
    scale = max(float(one.abs().max()) for one in whole)
    for one, first, second in zip(whole, *halves, strict=True):
        # the value network is of fp32
        torch.testing.assert_close((first + second) / 2, one, rtol=0, atol=(1e-4 if name == "dpok" else 1e-9) * scale)
    apart = max(float((first - second).abs().max()) for first, second in zip(*halves, strict=True))
    assert apart > 1e-3 * scale, "each had samples of its own"


# --- real processes ---

SMALL: dict[str, Any] = {
    "steps": 3, "learning_rate": 1e-4, "eval_size": 0, "sample_steps": 1, "sample_every": 100, "lr_schedule": "constant", "device": "cpu",
}  # fmt: skip
OWN = {"inference_steps": 2, "batches": 2, "samples": 2, "reward": "jpeg-compressibility"}
RUNS: dict[str, dict[str, Any]] = {
    "draft": {"k": 2, "inference_steps": 3},
    "ddpo": {**OWN, "updates": 3, "random_steps": None, "advantage": "per_prompt", "buffer": 4, "least": 2},
    "rwr": {**OWN, "updates": 1, "drop_text": 0.3},
    "diffusion-dpo": {"drop_text": 0.3},
}
ALIGN = """
import json, sys
import diffalign
calls, killed, odd = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
for name, call in calls.items():
    diffalign.align(method=name, batch_size=2, output=f"two/{name}", **call)
diffalign.resume(killed)
try:
    diffalign.resume(odd)
except diffalign.InputError as error:
    print(f"refused: {error}", file=sys.stderr)
"""
REWARD = """
import os, signal
from pathlib import Path
calls = 0
def mortal(images, prompts):
    global calls
    calls += 1
    mark = Path(__file__).parent / "killed"
    if calls == 3 and os.environ.get("RANK") == "1" and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return images.mean((1, 2, 3))
def of_the_second(images, prompts):
    if os.environ.get("RANK") == "1":
        raise ValueError("no such luck")
    return images.mean((1, 2, 3))
"""
CHOSEN = {
    "--method": "ddpo", "--method.inference-steps": 2, "--method.batches": 1, "--method.samples": 1, "--method.updates": 1,
    "--method.advantage": "per_prompt", "--method.buffer": 3, "--method.least": 2, "--steps": 4, "--checkpoint-every": 1,
    "--keep-checkpoints": 9, "--learning-rate": 1e-4, "--lr-schedule": "constant", "--eval-size": 2, "--sample-steps": 1,
    "--sample-every": 100, "--device": "cpu",
}  # fmt: skip
FLAGS = ["train", *(str(word) for pair in CHOSEN.items() for word in pair)]


def torchrun(*command: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """Two processes on one machine, at a port that is free; they end within ten minutes, on a machine as busy as it may be."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *map(str, command)]
    apart = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")}
    here = str(Path(diffalign.__file__).parents[1])
    environment = {**apart, "PYTHONPATH": here, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as launcher:
        try:
            out, err = launcher.communicate(timeout=600)
        except subprocess.TimeoutExpired:
            launcher.terminate()  # not killed, it ends its processes too
            raise
    return subprocess.CompletedProcess(words, launcher.returncode, out, err)


def lora_of(run: Path) -> dict[str, Tensor]:
    return load_file(run / "lora" / "pytorch_lora_weights.safetensors")


def assert_the_same(ours: Path, theirs: Path) -> None:
    first, second = lora_of(ours), lora_of(theirs)
    assert first.keys() == second.keys()
    for name, weight in first.items():
        torch.testing.assert_close(weight, second[name], rtol=0, atol=1e-5)
    moved = max(float(weight.abs().max()) for name, weight in first.items() if "lora_B" in name or "lora.up" in name)
    assert moved > 1e-4, "a LoRA's second half begins at 0"


@dataclass(frozen=True)
class Ran:
    """What two launches left in `folder`: the runs of `RUNS` in one process (one/) and in two (two/), and a run that was killed, resumed.

    `killed` is the launch of that one, `handed_on` the run as the kill left it; `done` the launch of all the others.
    """

    folder: Path
    killed: subprocess.CompletedProcess[str]
    handed_on: Path
    done: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("ran")
    (folder / "reward.py").write_text(REWARD)
    (folder / "work.py").write_text(ALIGN)
    pairs = diffalign.make_pairs("shapes", reward="shapes-clip", output=folder / "pairs", pairs=12, sample_steps=2, batch_size=4)
    calls = {name: {**SMALL, **call, **({"data": str(pairs)} if name == "diffusion-dpo" else {})} for name, call in RUNS.items()}
    for name, call in calls.items():
        diffalign.align(method=name, batch_size=4, output=folder / "one" / name, **call)
    diffalign.align(batch_size=3, output=folder / "odd", inference_steps=2, k=1, **{**SMALL, "steps": 1})
    killed = torchrun("-m", "diffalign", *FLAGS, "--reward", "reward.py:mortal", "--batch-size", 4, "--output", "killed-run", folder=folder)
    shutil.copytree(folder / "killed-run", folder / "handed-on")
    return Ran(folder, killed, folder / "handed-on", torchrun("work.py", json.dumps(calls), "killed-run", "odd", folder=folder))


def test_real_processes_train_the_lora_of_one(ran: Ran):
    assert ran.done.returncode == 0, ran.done.stderr[-3000:]
    assert "2 samples x 1 batches x 2 processes = 4 a step" in ran.done.stderr
    for name in RUNS:
        run, alone = diffalign.load(ran.folder / "two" / name), diffalign.load(ran.folder / "one" / name)
        assert (run.config["processes"], alone.config["processes"]) == (2, 1)
        assert_the_same(run.path, alone.path)
        assert len(run.metrics) == 3, "one process writes"
        for ours, theirs in zip(run.metrics, alone.metrics, strict=True):
            for metric in theirs.keys() & {"loss", "reward", "reward_std", "grad_norm", "reward_queries"}:
                assert ours[metric] == pytest.approx(theirs[metric], rel=1e-3, abs=1e-4), (name, metric)
            assert ours["device_seconds"] == pytest.approx(2 * ours["seconds"], rel=1e-3)


def test_a_batch_that_processes_cannot_share_is_refused(ran: Ran):
    assert ran.done.stderr.count("refused: The run has 3 samples in a batch of all its processes, which 2 cannot share: ") == 2


def test_a_killed_run_goes_on_in_as_many_processes_or_in_one(ran: Ran):
    assert ran.killed.returncode != 0
    assert (ran.folder / "killed").exists()
    left = {path.name for path in (ran.handed_on / "checkpoints").iterdir()}
    assert {"step-000002"} <= left, ran.killed.stderr[-3000:]
    assert not {"step-000003"} & left
    assert "Resuming killed-run at step 2" in ran.done.stderr
    assert (ran.folder / "killed-run" / "eval.json").is_file()
    diffalign.resume(ran.handed_on)
    reward = str(ran.folder / "reward.py:mortal")
    assert main([*FLAGS, "--reward", reward, "--batch-size", "8", "--output", str(ran.folder / "never-stopped")]) == 0
    for run in (ran.folder / "killed-run", ran.handed_on):
        assert [row["step"] for row in diffalign.load(run).metrics] == [1, 2, 3, 4]
        assert_the_same(run, ran.folder / "never-stopped")


def test_an_error_in_one_process_ends_all_with_one_message(tmp_path: Path):
    (tmp_path / "reward.py").write_text(REWARD)
    flags = [*FLAGS, "--reward", "reward.py:of_the_second", "--batch-size", "4", "--output", "run"]
    done = torchrun("-m", "diffalign", *flags, folder=tmp_path)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == ["error: The reward of_the_second failed with ValueError: no such luck"]
    assert "Stopping after this step" not in done.stderr


# --- what is refused ---


def test_other_commands_work_in_one_process(run_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as a launcher tells it
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    outcome = run_cli("pairs", "--reward", "shapes-clip", "--output", "pairs")
    assert outcome.status == 2
    assert outcome.err == "error: diffalign pairs works in one process: start it without torchrun or accelerate.\n"


def test_processes_that_do_not_join_are_refused(monkeypatch: pytest.MonkeyPatch):
    """Each would train the whole run, into one folder."""
    make_accelerator(Settings(device="cpu"))  # accelerate has begun with one process now
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="2 processes were started, accelerate joins 1"):
        make_accelerator(Settings(device="cpu"))
    with pytest.raises(InputError, match="device is cpu:0, and 2 processes were started"):
        make_accelerator(Settings(device="cpu:0"))


def test_no_gpu_is_touched_before_the_process_has_its_own(monkeypatch: pytest.MonkeyPatch):
    """Else every process of a machine would hold some of the first GPU's memory."""
    asked: list[str] = []

    def zeros(*size: int, device: str) -> None:
        asked.append(f"{device}, accelerate has begun: {bool(PartialState._shared_state)}")
        raise RuntimeError("out of reach")

    monkeypatch.setattr(PartialState, "_shared_state", {})
    monkeypatch.setattr(torch, "zeros", zeros)
    plan = dry_run.cut(resolve({"method": "draft", "device": "cuda", "tiny": True}))
    assert asked == []
    with pytest.raises(InputError, match="'cuda' cannot be used here: out of reach"):
        make_accelerator(plan.settings)
    assert asked == ["cuda, accelerate has begun: True"]
    with pytest.raises(InputError, match="'gpu' cannot be used here"):
        make_accelerator(Settings(device="gpu"))


@pytest.mark.parametrize(("on_its_machine", "order"), [(0, ["read", "wait"]), (1, ["wait", "read"])])
def test_one_process_of_each_machine_embeds_the_data(on_its_machine: int, order: list[str], monkeypatch: pytest.MonkeyPatch):
    """The third and the fourth process are those of a second machine."""
    accelerator, found = make_accelerator(Settings(device="cpu")), list[str]()
    monkeypatch.setattr("accelerate.PartialState.wait_for_everyone", lambda self: found.append("wait"))
    monkeypatch.setattr("diffalign.examples.read", lambda *args, **kwargs: found.append("read"))
    where = {"num_processes": 4, "process_index": 2 + on_its_machine, "local_process_index": on_its_machine}
    monkeypatch.setattr(PartialState, "_shared_state", {**PartialState._shared_state, **where})
    open_data(resolve({"method": "diffusion-dpo", "data": "pairs"}), None, accelerator)
    assert found == order


def test_a_batch_is_shared_or_refused():
    plan = resolve({"method": "draft", "batch_size": 4})
    assert [session._of_as_many(plan, 12, n).settings.batch_size for n in (1, 2, 3, 12)] == [12, 6, 4, 1]
    with pytest.raises(InputError, match=r"12 samples .* which 5 cannot share: resume it with 1, 2, 3, 4, 6, 12\."):
        session._of_as_many(plan, 12, 5)


def test_generators_that_come_out_of_step_are_found(monkeypatch: pytest.MonkeyPatch):
    from test_loop import Rounds, make

    training, _ = make(Rounds(), steps=1)
    other = Generator().manual_seed(3).get_state()
    monkeypatch.setattr("diffalign.loop.all_of", lambda value: [value, other])
    with pytest.raises(InputError, match="The processes have drawn differently"):
        training.state()
