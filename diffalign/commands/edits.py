"""`diffalign edits`."""

from __future__ import annotations

from pathlib import Path

from diffalign.commands.common import parser_of, quiet


def run(arguments: list[str]) -> int:
    parser = parser_of("edits", "diffalign edits --pipeline timbrooks/instruct-pix2pix --prompts edits.jsonl --output edits/mine")
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
    quiet()
    from dataclasses import fields

    from diffalign.config import model_preset
    from diffalign.edit_data import make_edits
    from diffalign.settings import Settings

    known = {field.name for field in fields(Settings)} - {"lora"}
    preset = {name: value for name, value in model_preset(chosen["pipeline"], "edits").items() if name in known}
    print(make_edits(Settings(**{**preset, **{k: v for k, v in chosen.items() if v is not None}}), output, samples))
    return 0
