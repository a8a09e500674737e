"""`diffalign export`."""

from __future__ import annotations

from diffalign.commands.common import parser_of, quiet


def run(arguments: list[str]) -> int:
    parser = parser_of("export", "diffalign export runs/NAME --output loras/NAME.safetensors")
    parser.add_argument("run", help="the run folder")
    parser.add_argument("--format", choices=["kohya"], default="kohya", help="kohya: lora_down, lora_up and alpha of each layer")
    parser.add_argument("--output", metavar="FILE", help="a .safetensors file; by default RUN/NAME.safetensors")
    parser.add_argument("--force", action="store_true", help="replace the file where it exists")
    chosen = parser.parse_args(arguments)
    quiet()
    from diffalign.run import Run

    print(Run.open(chosen.run).export(chosen.output, force=chosen.force))
    return 0
