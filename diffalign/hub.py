"""A run onto the Hugging Face Hub: who may write there is found out first, and what fails says how to go on."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.base import base_of
from diffalign.errors import InputError
from diffalign.origin import named, origin_of
from diffalign.publishing import CONFIG, check_publishable, contents, ours, write
from diffalign.registry import MODELS
from diffalign.run import Run, versions
from diffalign.sources import chain_of, of_transport

LICENCE = r"[a-z0-9][a-z0-9.+-]{0,63}"  # the form of the Hub's ids
LOGIN = "log in with one that may write (https://huggingface.co/settings/tokens): hf auth login"


@dataclass(frozen=True)
class Push:
    """Where a run goes. `force` puts it beside the files of a repository that diffalign has not made; `base_model` and `license` say what
    the run does not know: the Hub id of a base model that was a folder or an object, and its licence."""

    repo: str
    public: bool = False
    force: bool = False
    base_model: str | None = None
    license: str | None = None

    def __post_init__(self) -> None:
        check_name(self.repo, "USER/REPO")
        if self.base_model is not None:
            check_name(self.base_model, "--base-model")
        if self.license is not None and not re.fullmatch(LICENCE, self.license):
            raise InputError(f"--license: '{self.license}' can be no licence on the Hub: give its id, such as apache-2.0 or openrail++.")

    def command(self, run: str | Path) -> str:
        """The command that pushes a run so."""
        flags = [f"--{name}" for name in ("public", "force") if vars(self)[name]]
        flags += [f"--{name.replace('_', '-')} {shlex.quote(vars(self)[name])}" for name in ("base_model", "license") if vars(self)[name]]
        return " ".join(["diffalign push", shlex.quote(str(run)), shlex.quote(self.repo), *flags])


def check_name(repo: str, what: str) -> None:
    """Raise InputError for a name that the Hub would refuse."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"{what}: '{repo}' can be no name on the Hub: letters, digits, '-', '_' and '.', as in anna/my-lora.") from error
    if repo.count("/") != 1:
        raise InputError(f"{what}: '{repo}' lacks the user or the organisation: give it as in anna/{repo}.")


def push(
    run: Run | str | Path,
    repo: str,
    *,
    public: bool = False,
    force: bool = False,
    base_model: str | None = None,
    license: str | None = None,
) -> str:
    """Upload a finished run to `repo`, "user/name", in one commit, and return its address; what is there already is not sent twice.

    A new repository is private unless `public`. Raises InputError, before anything is uploaded, for what `check_publishable`,
    `check_access` and `contents` refuse; and where the upload fails, which the same call takes up again.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    return upload(run, Push(repo, public, force, base_model, license))[0]


def upload(run: Run, to: Push) -> tuple[str, list[str]]:
    """`push`, and what the person should know besides: the address, and a note each."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard

    check_publishable(run)
    existing = check_access(to)
    api, again = HfApi(), to.command(run.path)
    found = contents(run, to.repo, base_of(run, to.base_model, _licence(api, run, to)))
    operations: list[Any] = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in found.items()]
    stale = [name for name in existing or () if ours(name) and name not in found] if CONFIG in (existing or ()) else []
    operations += [CommitOperationDelete(path_in_repo=name) for name in stale]
    message, card = _message(run), ModelCard(bytes(found["README.md"]).decode())
    with asking(to, again):
        card.validate()  # before there is a repository: a card that the Hub refuses would leave it empty
        if existing is None:
            api.create_repo(to.repo, private=not to.public, exist_ok=True)
        api.create_commit(to.repo, operations, commit_message=message)
    return f"{api.endpoint}/{to.repo}", notes(run, found)


def _message(run: Run) -> str:
    """The first line of the commit."""
    origin = origin_of(run.config)
    if origin.parts:
        made = f"merged from {origin.of}"
    else:
        on = f" on {', '.join(map(named, origin.judges))}" if origin.judges else ""
        made = f"{origin.method}{on}, step {int(run.metrics[-1]['step'])}"
    return f"{made} (diffalign {versions()['diffalign']})"


def dry_run(run: Run, to: Push, folder: Path) -> tuple[list[Path], list[str]]:
    """Write what `upload` would send into a new folder, without a network; the files, and the same notes."""
    check_publishable(run)
    found = contents(run, to.repo, base_of(run, to.base_model, {"license": to.license} if to.license else {}))
    return write(found, folder), notes(run, found)


def notes(run: Run, found: Mapping[str, Any]) -> list[str]:
    """What the card lacks, and how it could be had."""
    card = bytes(found["README.md"]).decode()
    lacking = [] if "eval.json" in found else [f"The run has not been evaluated, and the card says so: diffalign eval {run.path}"]
    unnamed = run.plan.settings.pipeline not in MODELS and "\nbase_model: " not in card
    lacking += ["The card names no base model of the Hub: --base-model USER/MODEL, where it is one."] * unnamed
    return lacking + ["The card says nothing of the base model's licence: --license ID, where you know it."] * ("\nlicense: " not in card)


def check_access(to: Push) -> list[str] | None:
    """The files of the repository, None where there is none yet; nothing is written.

    Raises InputError where there is no token, or one that may not write there; for a repository with files that diffalign has not made,
    unless `force`; and for one that is public where `public` was not said, or the other way round.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if get_token() is None:
        raise InputError(f"There is no token to push to {to.repo}: {LOGIN}, or set HF_TOKEN.")
    api = HfApi()
    with asking(to):
        _check_rights(api.whoami(), to.repo)
        try:
            info = api.model_info(to.repo)
        except RepositoryNotFoundError:
            return None
    files = [sibling.rfilename for sibling in info.siblings or ()]
    if CONFIG not in files and set(files) - {".gitattributes"} and not to.force:
        some = ", ".join(sorted(set(files) - {".gitattributes"})[:3])
        raise InputError(
            f"{to.repo} exists, and diffalign has not made it ({some}): choose another name, or diffalign push --force to put the run "
            "beside what is there; its README.md is replaced."
        )
    if bool(info.private) == to.public:
        raise InputError(
            f"{to.repo} is private, and --public does not change that: make it public on its settings page, or leave --public out."
            if to.public
            else f"{to.repo} is public: add --public to push there, or choose another name."
        )
    return files


def _check_rights(who: Mapping[str, Any], repo: str) -> None:
    """Raise InputError where what the Hub says of the token shows that it may not write to `repo`."""
    owner, user = repo.partition("/")[0], who.get("name", "")
    organisations = {entry["name"]: entry.get("roleInOrg") for entry in who.get("orgs", ())}
    if owner.lower() not in {name.lower() for name in (user, *organisations)}:
        others = f", of {', '.join(organisations)}" if organisations else ""
        raise InputError(
            f"{repo} is not yours: your token is of {user}{others}. Give {user}/{repo.partition('/')[2]}, or log in: hf auth login"
        )
    if {name.lower(): role for name, role in organisations.items()}.get(owner.lower()) == "read":
        raise InputError(f"{user} may only read in {owner}: ask there for the right to write, or push to {user}/{repo.partition('/')[2]}.")
    token = who.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise InputError(f"Your token may only read: {LOGIN}")
    scoped: Sequence[Mapping[str, Any]] = token.get("fineGrained", {}).get("scoped", ())
    if token.get("role") == "fineGrained" and not any(
        "repo.write" in scope.get("permissions", ()) and scope.get("entity", {}).get("name", "").lower() in (owner.lower(), repo.lower())
        for scope in scoped
    ):
        raise InputError(f"Your token may not write to the repositories of {owner}: {LOGIN}")


def _licence(api: Any, run: Run, to: Push) -> dict[str, str]:
    """What the base model's card on the Hub says of its licence; nothing where it says nothing, or cannot be read."""
    from huggingface_hub.errors import RepositoryNotFoundError

    source = to.base_model or run.plan.settings.pipeline
    if to.license or source in MODELS or source.count("/") != 1 or Path(source).expanduser().exists():
        return {"license": to.license} if to.license else {}
    try:
        with asking(to):
            said = api.model_info(source).card_data
    except RepositoryNotFoundError as error:
        if to.base_model is not None:
            raise InputError(f"--base-model: there is no model '{source}' on the Hub, or it is private.") from error
        return {}
    except InputError:  # the card says that it does not know, and so does a note
        return {}
    return {name: said[name] for name in ("license", "license_name", "license_link") if said and said.get(name)}


@contextmanager
def asking(to: Push, again: str | None = None) -> Iterator[None]:
    """What goes wrong with the Hub while the block runs, as an InputError; with `again`, the command that goes on with an upload."""
    try:
        yield
    except InputError:
        raise
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"Interrupted.{f' Push again: {again}' if again else ''}") from stop
    except Exception as error:
        from huggingface_hub.errors import RepositoryNotFoundError

        if isinstance(error, RepositoryNotFoundError) and again is None:
            raise  # there is none yet
        more = f" What has arrived is not sent twice. Push again: {again}" if again else ""
        raise InputError(f"{refusal(error, to.repo)}{more}") from error


def refusal(error: BaseException, repo: str) -> str:
    """A line on an error of the Hub's client: what is wrong, and what a person can do about it."""
    from huggingface_hub import errors
    from huggingface_hub.constants import HF_HUB_DISABLE_XET

    xet = importlib.util.find_spec("hf_xet") is not None and not HF_HUB_DISABLE_XET
    chain, reason = list(chain_of(error)), " ".join(str(error).split())[:200]
    answered: Any = next((link for link in chain if isinstance(link, errors.HfHubHTTPError)), None)
    if any(isinstance(link, errors.OfflineModeIsEnabled) for link in chain):
        return "HF_HUB_OFFLINE forbids to ask the Hub: unset it."
    if answered is not None and answered.response is not None:
        status, said = answered.response.status_code, " ".join((answered.server_message or "").split())[:200]
        mends = {
            401: f"it does not take your token (expired, or revoked?): {LOGIN}",
            403: f"your token may not write there: {LOGIN}",
            404: "it was deleted, or your token may not see it.",
            409: "another change to it is under way.",
            412: "it was changed meanwhile.",
            429: "too many requests: wait some minutes.",
        }
        mend = mends.get(status, "that should pass: wait some minutes." if status >= 500 else "it does not take what was sent.")
        return f"The Hub answered {status} for {repo}{f' ({said})' if said else ''}: {mend}"
    if any(isinstance(link, ConnectionError | TimeoutError) for link in chain) or of_transport(chain):
        firewall = " Where a firewall lets huggingface.co alone through, set HF_HUB_DISABLE_XET=1." if xet else ""
        return f"The connection to the Hub failed ({type(error).__name__}: {reason}): check the network.{firewall}"
    return f"The Hub did not take {repo} ({type(error).__name__}: {reason})."
