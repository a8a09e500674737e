"""The command line. Everything heavy is imported by the command that needs it, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffalign
from diffalign.errors import InputError, nearest

if TYPE_CHECKING:
    from diffalign.config import Plan

COMMANDS = {
    "train": "align a model with a reward",
    "sample": "pictures of a prompt, before and after",
    "eval": "held-out rewards of a run, before and after",
    "score": "score pictures that exist",
    "pairs": "preference pairs from a model's samples and a reward, for the offline methods",
    "edits": "a model's own edits, good and bad, for HIVE",
    "export": "a run's LoRA as one file for AUTOMATIC1111, ComfyUI and the like",
    "compare": "finished runs side by side: rewards, KL, diversity, and what they took",
    "check": "preflight: would this training learn?",
    "list": "methods, rewards and pipelines, with what each needs",
    "doctor": "versions, devices, extras",
}
HELP = f"""usage: diffalign COMMAND [options]        (diffalign COMMAND --help)

Align diffusion models with rewards and preferences.

{chr(10).join(f"  {name:8}{about}" for name, about in COMMANDS.items())}

examples:
  diffalign train --method draft                      the embedded model 'shapes', about a minute on two cores
  diffalign train --method draft --pipeline FOLDER --reward file.py:my_reward --prompts prompts.txt
  diffalign sample runs/NAME --prompt "a red circle on a blue background"

  --debug shows the traceback of an error; --version"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 for success, 2 for bad input, 128 + signal where one stopped it, 1 for a fault of ours."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    try:
        return _dispatch(arguments)
    except InputError as error:
        return _fail(str(error), 2, debug)
    except KeyboardInterrupt:
        return _fail("Interrupted.", 130, debug)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if "No space left on device" in str(error):
            return _fail(f"The disk is full ({error}). Make room: the checkpoints before are whole, and --resume goes on.", 2, debug)
        if isinstance(error, OSError):
            return _fail(f"{error}.", 2, debug)
        if _bereaved(error):
            return _fail("Another process of this training has ended without a word. Was it killed? --resume goes on.", 1, debug)
        if (memory := _out_of_memory(error)) is not None:
            return _fail(f"Out of memory ({memory}). Lower --batch-size and raise --accumulate, or lower --height and --width.", 2, debug)
        return _fail(f"{type(error).__name__}: {error}\nThis is a fault in diffalign or in a plug-in; --debug shows where.", 1, debug)


def _out_of_memory(error: Exception) -> str | None:
    """What torch or numpy say of memory that is not there; None for other errors. On a CPU and on Apple's GPUs torch has no type for it."""
    said = re.search(r"DefaultCPUAllocator: .*|MPS backend out of memory.*", str(error))
    if said is None and not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
        return None
    return said[0] if said else str(error).partition("\n")[0] or type(error).__name__


def _bereaved(error: Exception) -> bool:
    """Whether a collective failed because another process is gone."""
    said = re.search(r"gloo|[Cc]onnection (closed|reset) by peer|NCCL", str(error))
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and isinstance(error, RuntimeError) and said is not None


def _fail(message: str, status: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    if _speaks():
        print(f"error: {message}", file=sys.stderr)
    return status


def _speaks() -> bool:
    """Whether it is this process that says what went wrong: of several the first that fails, others fail in its wake."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    from diffalign.processes import first_to_fail

    return first_to_fail()


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0 if arguments else 2
    command, rest = arguments[0], arguments[1:]
    if command in ("--version", "-V"):
        print(f"diffalign {diffalign.__version__}")
        return 0
    if command not in COMMANDS:
        raise InputError(f"There is no command '{command}'. {nearest(command, COMMANDS)}")
    if command != "train" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(f"diffalign {command} works in one process: start it without torchrun or accelerate.")
    run: Callable[[list[str]], int] = {
        "train": _train, "sample": _sample, "eval": _eval, "score": _score, "pairs": _pairs, "edits": _edits, "export": _export,
        "compare": _compare, "check": _check, "list": _list, "doctor": _doctor,
    }[command]  # fmt: skip
    return run(rest)


def _parser(command: str, example: str) -> argparse.ArgumentParser:
    about = COMMANDS[command]
    return argparse.ArgumentParser(
        f"diffalign {command}", description=about[0].upper() + about[1:] + ".", epilog=f"example: {example}", allow_abbrev=False
    )


def _plan(arguments: list[str], command: str) -> tuple[Plan, str | None] | None:
    """The plan of a train or check command line and its --output; None where help or the configuration was asked for, and printed."""
    from diffalign.config import Names, build_parser, check_needs, names_of, settle
    from diffalign.flags import flat, nested, normal, parse, read_config, value_of

    arguments = normal(arguments)
    file = value_of(arguments, "--config")
    config = {} if file is None else nested(read_config(file))
    flags = {"method": "--method.name", "reward": "--reward.name", "pipeline": "--pipeline"}
    said = {key: value for key, flag in flags.items() if (value := value_of(arguments, flag)) is not None}
    names: Names = names_of({**config, **said})
    parser = build_parser(names, f"diffalign {command}")
    if {"-h", "--help"} & set(arguments):
        print(_train_help(parser, command))
        return None
    if config:
        # the file's fields of a method or reward in whose place a flag names another are not that one's
        same = {k: v for k, v in config.items() if not (k in said and isinstance(v, dict) and v.get("name") != said[k])}
        parse(parser, lambda: parser.parse_object(same))
        parser.set_defaults({k: v for k, v in flat(same).items() if k not in ("method.name", "reward.name")})
    show = "--print_config" in arguments
    parsed = parse(parser, lambda: parser.parse_args([a for a in arguments if a != "--print_config"]))
    output = parsed.pop("output")
    if output == "":
        raise InputError("output is empty: give a value, or leave it out.")
    plan = settle(parsed, names)
    check_needs(plan)
    if plan.settings.tiny:
        from diffalign.tiny import cut

        plan = cut(plan)
    if show:
        import yaml

        print(yaml.safe_dump(plan.config(), sort_keys=False), end="")
        return None
    return plan, output


def _train_help(parser: Any, command: str) -> str:
    from diffalign.flags import help_of

    resume = "  --resume DIR          Go on with a run, alone or with --steps N. A finished one starts a new round.\n"
    resume = resume if command == "train" else ""
    more = f"options:\n{resume}  --print-config        Show the resolved settings as YAML, and stop.\n"
    text = help_of(parser).replace("options:\n", more, 1)
    return f"{text}\nexample: diffalign {command} --method draft --steps 100 --seed 1 --lora.rank 4"


def _quiet() -> None:
    """Nothing on the screen that the person did not ask for."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


def _train(arguments: list[str]) -> int:
    _quiet()
    if any(argument.partition("=")[0] == "--resume" for argument in arguments):
        return _resume(arguments)
    resolved = _plan(arguments, "train")
    if resolved is None:
        return 0
    from diffalign.session import start

    return _stoppable(lambda: start(*resolved))


def _resume(arguments: list[str]) -> int:
    if "--tiny" in arguments:
        raise InputError("--tiny: a dry run goes on as one without being told so, and no other run becomes one. Drop it.")
    parser = _parser("train", "diffalign train --resume runs/NAME --steps 200")
    parser.add_argument("--resume", required=True, metavar="DIR", help="the run folder")
    parser.add_argument("--steps", type=int, help="another number of optimiser steps than the run's")
    chosen = parser.parse_args(arguments)
    from diffalign.session import resume

    return _stoppable(lambda: resume(chosen.resume, chosen.steps))


def _stoppable(work: Callable[[], Any]) -> int:
    import torch.distributed

    from diffalign.console import say
    from diffalign.session import Stopped

    status = 0
    try:
        work()
    except Stopped as stop:
        say(f"Stopped at step {stop.step}, saved. Go on: diffalign train --resume {stop.path}")
        status = 128 + stop.signum
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return status


def _sample(arguments: list[str]) -> int:
    parser = _parser("sample", 'diffalign sample runs/NAME --prompt "a red circle on a blue background" --lora-scale 0.6')
    parser.add_argument("run", help="the run folder")
    parser.add_argument("--prompt", action="append", required=True, help="again for several")
    parser.add_argument("--image", action="append", metavar="FILE", help="the picture to edit, of all prompts, or again for each")
    parser.add_argument("--mask", action="append", metavar="FILE", help="for inpainting: white where it is filled; one, or one for each")
    parser.add_argument("--lora-scale", type=float, default=1.0, help="how much of the LoRA: 0 is the base model, 1 what was trained")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--steps", type=int, help="denoising steps; by default the run's")
    parser.add_argument("--output", help="folder of the pictures; by default RUN/samples")
    chosen = parser.parse_args(arguments)
    _quiet()
    from diffalign.data import check_prompts
    from diffalign.run import Run

    prompts = _with_files(chosen.prompt, image=chosen.image, mask=chosen.mask)
    for path in Run.open(chosen.run).sample(
        check_prompts(prompts), seed=chosen.seed, steps=chosen.steps, lora_scale=chosen.lora_scale, output=chosen.output
    ):
        print(path)
    return 0


def _with_files(prompts: list[str], **flags: list[str] | None) -> list[Any]:
    """Each prompt with its files, `(prompt, file, ...)`: one of a flag for all, or one for each. The prompts alone without any."""
    columns = list[list[str]]()
    for flag, files in flags.items():
        if files is not None:
            if len(files) not in (1, len(prompts)):
                raise InputError(f"{len(files)} {flag}s for {len(prompts)} prompts: give one --{flag} for all, or one for each --prompt.")
            columns.append(files * (len(prompts) if len(files) == 1 else 1))
    if flags["mask"] is not None and flags["image"] is None:
        raise InputError("--mask: a mask is of a picture. Give its --image too.")
    return list(zip(prompts, *columns, strict=True)) if columns else prompts


def _eval(arguments: list[str]) -> int:
    parser = _parser("eval", "diffalign eval runs/NAME --reward shapes-checker jpeg-compressibility --prompts prompts.txt")
    parser.add_argument("run", help="the run folder")
    parser.add_argument("--reward", nargs="+", metavar="NAME", help="by default the run's")
    parser.add_argument("--prompts", help="a prompt file; by default the run's held-out prompts")
    parser.add_argument("--limit", type=int, help="use so many prompts; by default the run's eval_size")
    parser.add_argument("--seed", type=int, help="of the noise; by default the run's seed + 1, as at the end of its training")
    parser.add_argument("--output", help="where to write; by default RUN/eval.json")
    chosen = parser.parse_args(arguments)
    _quiet()
    from diffalign.api import evaluate_run
    from diffalign.console import comparison, show
    from diffalign.run import Run

    show(comparison(evaluate_run(Run.open(chosen.run), chosen.reward, chosen.prompts, chosen.limit, chosen.seed, chosen.output)))
    return 0


def _score(arguments: list[str]) -> int:
    parser = _parser("score", 'diffalign score --reward shapes-clip picture.png --prompt "a red circle"')
    parser.add_argument("files", nargs="+", metavar="FILE", help="pictures")
    parser.add_argument("--reward", required=True, metavar="NAME", help="with --reward.FIELD for its fields, as diffalign train has them")
    parser.add_argument("--prompt", help="the prompt of all the pictures, for a reward that reads one")
    parser.add_argument("--image", metavar="FILE", help="the picture that was edited, for a reward that judges edits")
    words, own = _split_fields(arguments)
    chosen = parser.parse_args(words)
    _quiet()
    from diffalign.api import score_files
    from diffalign.config import reward_fields

    source = Path(chosen.image) if chosen.image else None
    fields = reward_fields(chosen.reward, own)
    for file, value in score_files(chosen.reward, [Path(f) for f in chosen.files], chosen.prompt, source, fields):
        print(f"{value:.6g}\t{file}")
    return 0


def _split_fields(arguments: list[str]) -> tuple[list[str], list[str]]:
    """(the other words, the words `--reward.FIELD value`)."""
    words, fields = list[str](), list[str]()
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        own = word.startswith("--reward.")
        (fields if own else words).append(word)
        if own and "=" not in word and waiting:
            fields.append(waiting.pop(0))
    return words, fields


def _pairs(arguments: list[str]) -> int:
    _quiet()
    from diffalign import pairs
    from diffalign.flags import help_of, normal, parse, value_of

    arguments = normal(arguments)
    parser = pairs.build_parser(value_of(arguments, "--pipeline") or "shapes", value_of(arguments, "--reward.name"))
    if {"-h", "--help"} & set(arguments):
        print(f"{help_of(parser)}\nexample: diffalign pairs --reward shapes-clip --pairs 1000 --output pairs/shapes")
        return 0
    settled = pairs.settle(parse(parser, lambda: parser.parse_args(arguments)))
    try:
        print(pairs.make(*settled))
    except KeyboardInterrupt:
        return _fail(f"Interrupted. What is made is kept: the same command goes on with {settled[-1]}.", 130, False)
    return 0


def _edits(arguments: list[str]) -> int:
    parser = _parser("edits", "diffalign edits --pipeline timbrooks/instruct-pix2pix --prompts edits.jsonl --output edits/mine")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the edits, a new one")
    parser.add_argument("--pipeline", default="shapes-edit", help="shapes-edit (embedded), a Hub id, or a folder in diffusers layout")
    parser.add_argument("--prompts", help='a .jsonl file of lines {"prompt": ..., "image": ...}; by default the embedded model\'s')
    parser.add_argument("--samples", type=int, default=1, help="edits of each prompt")
    parser.add_argument("--sample-steps", type=int, help="denoising steps")
    parser.add_argument("--guidance-scale", type=float, help="towards the instruction; 1 for none")
    parser.add_argument("--image-guidance-scale", type=float, help="towards the source")
    parser.add_argument("--batch-size", type=int, help="edits of one forward")
    parser.add_argument("--seed", type=int, help="of the noise")
    chosen = vars(parser.parse_args(arguments))
    output, samples = Path(chosen.pop("output")).expanduser(), chosen.pop("samples")
    _quiet()
    from dataclasses import fields

    from diffalign.config import model_preset
    from diffalign.edit_data import make_edits
    from diffalign.settings import Settings

    known = {field.name for field in fields(Settings)} - {"lora"}
    preset = {name: value for name, value in model_preset(chosen["pipeline"], "edits").items() if name in known}
    print(make_edits(Settings(**{**preset, **{k: v for k, v in chosen.items() if v is not None}}), output, samples))
    return 0


def _export(arguments: list[str]) -> int:
    parser = _parser("export", "diffalign export runs/NAME --output loras/NAME.safetensors")
    parser.add_argument("run", help="the run folder")
    parser.add_argument("--format", choices=["kohya"], default="kohya", help="kohya: lora_down, lora_up and alpha of each layer")
    parser.add_argument("--output", metavar="FILE", help="a .safetensors file; by default RUN/NAME.safetensors")
    parser.add_argument("--force", action="store_true", help="replace the file where it exists")
    chosen = parser.parse_args(arguments)
    _quiet()
    from diffalign.run import Run

    print(Run.open(chosen.run).export(chosen.output, force=chosen.force))
    return 0


def _compare(arguments: list[str]) -> int:
    parser = _parser("compare", "diffalign compare runs/draft-1 runs/ddpo-1")
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders")
    parser.add_argument("--output", default="compare", help="folder of compare.json and compare.png; by default compare")
    parser.add_argument("--limit", type=int, default=32, help="held-out prompts for KL and diversity, by default 32; 0 leaves them out")
    chosen = parser.parse_args(arguments)
    _quiet()
    from diffalign.compare import compare_runs, write
    from diffalign.console import runs_table, say, show

    compared = compare_runs(chosen.runs, chosen.limit)
    files = write(compared, Path(chosen.output).expanduser())
    show(runs_table(compared["runs"]))
    for line in (*compared["notes"], f"Written: {' and '.join(map(str, files))}"):
        say(line)
    return 0


def _check(arguments: list[str]) -> int:
    _quiet()
    resolved = _plan(arguments, "check")
    if resolved is None:
        return 0
    from diffalign.api import check

    failed = 0
    for finding in check(resolved[0]):
        mark = {True: "ok  ", False: "FAIL", None: "    "}[finding.passed]
        failed += finding.passed is False
        print(f"{mark}  {finding.name}: {finding.text}", flush=True)
    return 1 if failed else 0


def _list(arguments: list[str]) -> int:
    parser = _parser("list", "diffalign list rewards")
    parser.add_argument("what", choices=["methods", "rewards", "pipelines"])
    from diffalign.registry import installed, table

    rows = sorted(table(parser.parse_args(arguments).what).items())
    wide = max(len(name) for name, _ in rows)
    for name, entry in rows:
        missing = "" if installed(entry) else f"  (not installed: pip install 'diffalign[{entry.extra}]')"
        print(f"{name:{wide}}  {entry.facts:22}{entry.summary}{missing}")
    return 0


def _doctor(arguments: list[str]) -> int:
    _parser("doctor", "diffalign doctor").parse_args(arguments)
    _quiet()
    from diffalign.doctor import report

    for line in report():
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
