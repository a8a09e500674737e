"""`diffalign label`."""

from __future__ import annotations

import importlib.util
import secrets
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from diffalign.commands.common import parser_of, quiet
from diffalign.errors import InputError

if TYPE_CHECKING:
    from diffalign.labels import Labels

OWN = {"compare": 2, "rounds": 1, "seed": 0}  # what the comparisons are made with; a database keeps it
SAMPLING = ("prompts", "samples", "sample_steps", "batch_size", "guidance_scale", "precision", "device")


def run(arguments: list[str]) -> int:
    parser = parser_of("label", "diffalign label FOLDER, then: diffalign pairs --from-labels FOLDER/labels.sqlite --output DIR")
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="samples as diffalign pairs or sample writes them; one of each model")
    parser.add_argument("--labels", metavar="FILE", help="the database; by default labels.sqlite in the first folder, or in --output")
    parser.add_argument("--table", metavar="FILE", help="print what a database says of raters, agreement and models, and stop")
    parser.add_argument("--compare", type=int, metavar="K", help="samples in a comparison, 2 to 4; by default 2")
    parser.add_argument("--rounds", type=int, metavar="N", help="how often samples are put together anew, by default 1")
    parser.add_argument(
        "--choose", choices=("random", "uncertain"), default="random", help="the next comparison: at random, or what tells most of models"
    )
    parser.add_argument("--seed", type=int, help="of comparisons, order and sides (and of noise), by default 0")
    making = parser.add_argument_group("samples that are made first")
    making.add_argument("--pipeline", nargs="+", metavar="P", help="models or runs, sampled with the same noise into --output")
    making.add_argument("--prompts", metavar="FILE", help="one a line, or .jsonl; or shapes")
    making.add_argument("--output", metavar="DIR", help="a folder in it for each model; the same command again goes on")
    making.add_argument("--samples", type=int, help="of each prompt, by default 2 of one model, 1 of each of several")
    making.add_argument("--sample-steps", type=int, help="denoising steps, by default the model's")
    making.add_argument("--batch-size", type=int, help="samples of one forward")
    making.add_argument("--guidance-scale", type=float, help="by default the model's")
    making.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="of the network, by default fp32")
    making.add_argument("--device", help="by default cuda, mps or cpu, the first there is")
    page = parser.add_argument_group("the page")
    page.add_argument("--host", default="127.0.0.1", help="by default 127.0.0.1, this machine alone; others get a link with a key")
    page.add_argument("--port", type=int, default=8771, help="by default 8771; 0 for a free one, which is printed")
    page.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="URL",
        help="another address of the page, as of a tunnel; gives the link a key",
    )
    chosen = parser.parse_args(arguments)
    if chosen.table is not None:
        return _table(chosen.table)
    _check(chosen)
    if missing := [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]:
        raise InputError(f"diffalign label needs {' and '.join(missing)}: pip install 'diffalign[serve]'")
    quiet()
    from diffalign.console import say
    from diffalign.gate import is_loopback
    from diffalign.label_page import Asking, check_origins, guarded, make_app, serve
    from diffalign.listening import bind, url_of

    check_origins(chosen.allow_origin, chosen.host)
    with bind(chosen.host, chosen.port) as sock:  # before samples are made: the wait would be for nothing
        folders = [Path(folder).expanduser() for folder in chosen.folders]
        path = _database(chosen, folders)
        labels = _opened(chosen, path, folders + (_made(chosen) if chosen.pipeline else []))
        names = [chosen.host, *(urlsplit(origin).hostname or "" for origin in chosen.allow_origin)]  # a tunnel lets others in, too
        key = None if all(map(is_loopback, names)) else secrets.token_urlsafe(16)
        app = make_app(Asking(labels, chosen.choose))
        say(f"{len(labels.comparisons):,} comparisons; answers go into {labels.path}. Ctrl-C stops, and nothing is lost.")
        print(url_of(sock) + ("" if key is None else f"/?key={key}"), flush=True)  # alone on standard output
        for origin in chosen.allow_origin:
            say(f"Also as {origin}{'' if key is None else f'/?key={key}'}")
        try:
            serve(guarded(app, origins=chosen.allow_origin, host=chosen.host, key=key), [sock])
        finally:
            labels.close()
    return 0


def _check(chosen: Any) -> None:
    if not chosen.folders and not chosen.pipeline:
        raise InputError("Nothing to label: give a folder of samples, or --pipeline P --prompts FILE --output DIR. See docs/label.md.")
    if chosen.pipeline and chosen.output is None:
        raise InputError("--pipeline: say where the samples go, --output DIR.")
    if not chosen.pipeline and (given := [name for name in ("output", *SAMPLING) if getattr(chosen, name) is not None]):
        raise InputError(f"--{given[0].replace('_', '-')} is about making samples: give --pipeline too, or leave it out.")
    if chosen.choose == "uncertain" and len(chosen.folders) + len(chosen.pipeline or ()) < 2:
        raise InputError("--choose uncertain is between models, and there is one: give folders of two or more, or leave it out.")
    if chosen.compare is not None and not 2 <= chosen.compare <= 4:
        raise InputError(f"--compare is {chosen.compare}: give 2, 3 or 4.")
    for name, least in {"rounds": 1, "seed": 0, "port": 0, "samples": 1}.items():
        value = getattr(chosen, name)
        if value is not None and not least <= value < 2**31:
            raise InputError(f"--{name} is {value}: give {least} or more.")


def _made(chosen: Any) -> list[Path]:
    """The folders of samples of the pipelines, made where they are not there yet."""
    from diffalign.label_making import make, settle

    samples = chosen.samples or (1 if len(chosen.pipeline) + len(chosen.folders) > 1 else 2)
    given = {name: getattr(chosen, name) for name in SAMPLING if name != "samples" and getattr(chosen, name) is not None}
    settled = settle(chosen.pipeline, Path(chosen.output).expanduser(), {**given, "seed": chosen.seed or 0})
    for path, (making, prompts) in settled.items():
        make(path, making, prompts, samples)
    return list(settled)


def _database(chosen: Any, folders: list[Path]) -> Path:
    """Where answers go. Raises InputError, before samples are made for nothing, where they cannot, or where it was begun with other
    settings; and for a folder that is no folder of samples."""
    from diffalign import gathering
    from diffalign.labels import Labels

    if folders and chosen.pipeline:
        gathering.gather(folders)
    default = (Path(chosen.output).expanduser() if chosen.pipeline else folders[0]) / "labels.sqlite"
    path = default if chosen.labels is None else Path(chosen.labels).expanduser()
    if chosen.labels is None and not path.parent.is_dir():  # it is made with the samples
        return path
    if Labels.begun(path):
        with closing(Labels.open(path)) as labels:
            labels.check_settings({name: getattr(chosen, name) for name in OWN})
    return path


def _opened(chosen: Any, path: Path, folders: list[Path]) -> Labels:
    """The database of the folders, a new one or the one that was begun; raises InputError for one of other samples or settings."""
    from diffalign import comparing, gathering
    from diffalign.console import say
    from diffalign.labels import Labels

    gathered = gathering.gather(folders)
    if Labels.begun(path):
        labels = Labels.open(path)
    else:
        settings = {name: default if getattr(chosen, name) is None else getattr(chosen, name) for name, default in OWN.items()}
        found, notes = comparing.plan(gathered, **settings)
        gathering.check(gathered)
        if notes:
            say(notes)
        labels = Labels.begin(path, gathered, found, settings)
    labels.check_same(gathered)
    labels.check_settings({name: getattr(chosen, name) for name in OWN})  # another process may have begun it meanwhile
    return labels


def _table(path: str) -> int:
    quiet()
    from diffalign.console import show
    from diffalign.label_results import tables
    from diffalign.labels import Labels

    for table in tables(Labels.open(path)):
        show(table)
    return 0
