"""The command line. Everything heavy is imported by the command that needs it, so that `--help` answers at once."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Sequence

import diffalign
from diffalign.commands import COMMANDS
from diffalign.errors import InputError, nearest

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
    except KeyboardInterrupt as stop:
        return _fail(str(stop) or "Interrupted.", 130, debug)
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
    return importlib.import_module(f"diffalign.commands.{command}").run(rest)


if __name__ == "__main__":
    sys.exit(main())
