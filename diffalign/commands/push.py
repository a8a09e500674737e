"""`diffalign push`."""

from __future__ import annotations

from pathlib import Path

from diffalign.commands.common import parser_of, quiet


def run(arguments: list[str]) -> int:
    parser = parser_of("push", "diffalign push runs/NAME anna/my-lora")
    parser.add_argument("run", help="the run folder")
    parser.add_argument("repo", metavar="USER/REPO", help="made where it is not there, private; else brought up to date")
    parser.add_argument("--public", action="store_true", help="make it for everybody to see; also needed to push to one that is public")
    parser.add_argument("--force", action="store_true", help="push to a repository that diffalign has not made: its README.md is replaced")
    parser.add_argument("--base-model", metavar="ID", help="the base model on the Hub, where the run has it from a folder or an object")
    parser.add_argument("--license", metavar="ID", help="the base model's licence, where its card on the Hub does not say it")
    parser.add_argument("--dry-run", metavar="DIR", help="write what would be uploaded into a new folder, and ask no network")
    chosen = parser.parse_args(arguments)
    quiet()
    from diffalign.console import say
    from diffalign.hub import Push, dry_run, upload
    from diffalign.run import Run

    to, opened = Push(chosen.repo, chosen.public, chosen.force, chosen.base_model, chosen.license), Run.open(chosen.run)
    if chosen.dry_run is not None:
        files, notes = dry_run(opened, to, Path(chosen.dry_run).expanduser())
        print("\n".join(map(str, files)))
    else:
        address, notes = upload(opened, to)
        print(address)
    for note in notes:
        say(note)
    return 0
