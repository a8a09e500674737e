"""`diffalign serve`."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from diffalign.commands.common import parser_of, quiet, several_of, split_fields
from diffalign.errors import InputError

TOKEN = "DIFFALIGN_SERVE_TOKEN"


def run(arguments: list[str]) -> int:
    parser = parser_of("serve", "diffalign serve --reward hps-v2.1 --port 8770")
    parser.add_argument(
        "--reward", required=True, metavar="NAME", help="or several names; with --reward.FIELD for fields, as diffalign train has them"
    )
    parser.add_argument("--host", default="127.0.0.1", help="by default 127.0.0.1, this machine alone; others want a token")
    parser.add_argument("--port", type=int, default=8770, help="by default 8770; 0 for a free one, which is printed")
    parser.add_argument("--token-file", metavar="FILE", help=f"a file with the token that clients must show; or set {TOKEN}")
    parser.add_argument("--max-batch", type=int, default=16, help="samples scored at once, by default 16")
    parser.add_argument("--queue", type=int, default=256, help="samples that may wait, and be in one request; by default 256")
    parser.add_argument("--max-bytes", type=int, default=64_000_000, help="of a request's body, by default 64 MB")
    parser.add_argument("--max-pixels", type=int, default=4096 * 4096, help="of a picture, by default 4096 x 4096")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds in which a request must arrive, by default 30")
    parser.add_argument("--media-folder", metavar="DIR", help="clients on this machine may name files in it, such as one in /dev/shm")
    parser.add_argument("--device", help="by default cuda, mps or cpu, the first there is")
    words, own = split_fields(arguments)
    words, several = several_of(words)
    chosen = parser.parse_args(words)
    if missing := [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]:
        raise InputError(f"diffalign serve needs {' and '.join(missing)}: pip install 'diffalign[serve]'")
    for name, least in {"max_batch": 1, "queue": 1, "max_bytes": 1, "max_pixels": 1, "timeout": 0.1, "port": 0}.items():
        if not least <= vars(chosen)[name] < float("inf"):
            raise InputError(f"--{name.replace('_', '-')} is {vars(chosen)[name]}: give {least} or more.")
    token = _token(chosen.token_file)
    folder = Path(chosen.media_folder).expanduser() if chosen.media_folder else None
    if folder is not None and not folder.is_dir():
        raise InputError(f"--media-folder {folder} is no folder.")
    quiet()
    from diffalign.gate import Limits, is_loopback
    from diffalign.listening import bind, url_of
    from diffalign.serve import serve

    if token is None and not is_loopback(chosen.host):
        raise InputError(f"--host {chosen.host} lets other machines in: give --token-file FILE, or set {TOKEN}.")
    with bind(chosen.host, chosen.port) as sock:  # before the reward is made: the wait would be for nothing
        from diffalign.batching import Scorer
        from diffalign.composing import make_reward, with_part_flags
        from diffalign.config import reward_fields
        from diffalign.console import say
        from diffalign.contract import CheckedReward, short_name
        from diffalign.flags import normal
        from diffalign.models import device_of
        from diffalign.settings import Settings

        fields = reward_fields(chosen.reward, with_part_flags(normal([*several, *own])))
        (reward, _), name = make_reward(chosen.reward, fields), short_name(chosen.reward)
        CheckedReward(reward, name).check_settled("diffalign serve is none")
        device = device_of(Settings(device=chosen.device))
        scorer = Scorer(reward, name, device, min(chosen.max_batch, chosen.queue), chosen.queue)
        say(f"Serving {scorer.name} on {device}, {'with' if token else 'without'} a token. Ctrl-C stops.")
        print(url_of(sock), flush=True)  # alone on standard output: scripts that gave --port 0 read it
        serve(scorer, Limits(token, chosen.max_bytes, chosen.max_pixels, chosen.timeout, folder), [sock])
    return 0


def _token(file: str | None) -> str | None:
    """The token of the file, else of the environment; raises InputError for one that is empty or cannot be in a header."""
    token, source = os.environ.get(TOKEN), TOKEN
    if file is not None:
        source = file
        try:
            token = Path(file).expanduser().read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--token-file {file} cannot be read as a line of ASCII text.") from error
    if token is not None and not (token.isascii() and token.isprintable() and token.strip() and " " not in token):
        raise InputError(f"{source} holds no token: give one line of ASCII without spaces, such as openssl rand -hex 32 makes.")
    return token
