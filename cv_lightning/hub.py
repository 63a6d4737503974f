"""The Hugging Face Hub: files of data sets as `hf://` paths, and uploads of model folders.

A path is `hf://datasets/OWNER/NAME[@REVISION]/PATH`, where PATH may be a glob. The revision is resolved to a commit
once, with one request; files are then taken from that commit, out of huggingface_hub's cache if they are there. Token
and cache are those of the standard environment (HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE).
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import logging
import re
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cv_lightning.files import write_json
from cv_lightning.types import CVLightningError, DataError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LOG = logging.getLogger(__name__)
SCHEME = "hf://"
PATH = re.compile(r"hf:/{1,2}datasets/([\w.-]+/[\w.-]+?)(?:@([\w.-]+|refs/(?:convert|pr)/[\w.-]+))?/(.+)")
"""A path; `Path` makes one slash of two."""
COMMIT = re.compile(r"[0-9a-f]{40}")
REPO = re.compile(r"[\w.-]+/[\w.-]+")
RECORD = "hub_files.json"
"""File of a run's folder: the pinned paths by the path that was given."""
FILE_ARGUMENTS = ("train_files", "eval_files")
TIMEOUT_S = 30.0
MOST_CLOSE = 3
"""Similar names that a message lists."""


class HubFile(NamedTuple):
    """A file of a data set on the Hub, or several by a glob."""

    repo: str
    """OWNER/NAME."""
    revision: str
    """Branch, tag or commit; empty: the default branch."""
    path: str

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{SCHEME}datasets/{self.repo}{revision}/{self.path}"

    @property
    def is_pinned(self) -> bool:
        """True if it names one file of one commit."""
        return bool(COMMIT.fullmatch(self.revision)) and not any(sign in self.path for sign in "*?[")


def is_hub_path(path: str | Path) -> bool:
    """True for a path that begins with `hf:/`."""
    return str(path).startswith("hf:/")


def parse(path: str | Path, flag: str) -> HubFile:
    """The parts of a path.

    Raises:
        DataError: It has another form; names the flag.
    """
    if not (found := PATH.fullmatch(str(path))):
        raise DataError(f"{flag}: {path} is not hf://datasets/OWNER/NAME[@REVISION]/PATH, with a file or glob as PATH")
    return HubFile(found[1], found[2] or "", found[3])


def pin(path: str | Path, flag: str) -> list[str]:
    """The paths of the files that a path stands for today, each with the commit that it is read from.

    Raises:
        DataError: There is no such data set, revision or file, or the Hub does not answer; names the flag.
    """
    given = parse(path, flag)
    return [str(given)] if given.is_pinned else [str(file) for file in _find(given, flag)]


def _find(given: HubFile, flag: str) -> list[HubFile]:
    """The files of a path and their commit, by one request, which is not repeated."""
    with _errors(flag, given):
        info = _api().dataset_info(given.repo, revision=given.revision or None, timeout=TIMEOUT_S)
    names = [file.rfilename for file in info.siblings or ()]
    matching = [given.path] if given.path in names else sorted(fnmatch.filter(names, given.path))
    if not matching:
        close = difflib.get_close_matches(given.path, names, n=MOST_CLOSE, cutoff=0.4) or names[:MOST_CLOSE]
        raise DataError(f"{flag}: {given}: no such file in the data set; it has {', '.join(close) or 'no files'}")
    LOG.info("%s is read at commit %s (%d of its files)", given, info.sha, len(matching))
    return [HubFile(given.repo, str(info.sha), name) for name in matching]


def local_files(path: str | Path, flag: str) -> list[Path]:
    """The files of a path in the local cache, downloaded where they are not there yet.

    Raises:
        DataError: As in `pin`; or access is refused.
    """
    given = parse(path, flag)
    if given.is_pinned and (cached := _cached(given)):
        return [cached]
    return [_cached(file) or _download(file, flag) for file in _find(given, flag)]


def pin_files(arguments: MutableMapping[str, Any], run: Path, *, resumes: bool) -> None:
    """Replace the `hf://` files of a DataModule's arguments by their commits, and record those in the run's folder.

    Args:
        arguments: Values by name; `FILE_ARGUMENTS` of them are lists of files.
        run: The run's folder.
        resumes: Take the commits that the folder records, so that a resumed run reads the same rows.

    Raises:
        DataError: As in `pin`.
    """
    given = {name: arguments.get(name) for name in FILE_ARGUMENTS}  # a user's class may take something else
    lists = {name: list(map(str, files)) if isinstance(files, list) else [] for name, files in given.items()}
    if not any(is_hub_path(file) for files in lists.values() for file in files):
        return
    record = run / RECORD
    recorded = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    known: dict[str, list[str]] = {}
    for name, files in lists.items():
        for file in filter(is_hub_path, files):
            known[file] = (resumes and recorded.get(file)) or pin(file, f"--data.init_args.{name}")
        if any(map(is_hub_path, files)):
            arguments[name] = [path for file in files for path in known.get(file, [file])]
    run.mkdir(parents=True, exist_ok=True)
    write_json(record, recorded | known)


def _cached(file: HubFile) -> Path | None:
    """The file in the cache, without a request; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(file.repo, file.path, revision=file.revision, repo_type="dataset")
    return Path(found) if isinstance(found, str) else None


def _download(file: HubFile, flag: str) -> Path:
    from huggingface_hub import hf_hub_download

    with _errors(flag, file):
        return Path(hf_hub_download(file.repo, file.path, repo_type="dataset", revision=file.revision))


def _api() -> HfApi:
    from huggingface_hub import HfApi

    return HfApi()


@contextmanager
def _errors(flag: str, file: HubFile) -> Iterator[None]:
    """Context manager that turns errors of huggingface_hub into ours.

    Raises:
        DataError: What the Hub says, and what to do.
    """
    import httpx2
    from huggingface_hub import constants, errors

    start, page = f"{flag}: {file}", f"{constants.ENDPOINT}/datasets/{file.repo}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise DataError(f"{start}: the data set is gated; ask for access at {page}, and set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise DataError(
            f"{start}: the Hub has no data set {file.repo}, or hides it; check the name, and for a private one HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise DataError(f"{start}: the data set has no revision {file.revision}; leave @{file.revision} out") from error
    except errors.EntryNotFoundError as error:
        if isinstance(error, errors.LocalEntryNotFoundError):
            raise DataError(f"{start}: {_unreachable(error)}") from error
        raise DataError(f"{start}: no such file at this revision; see {page}/tree/main") from error
    except errors.HFValidationError as error:
        raise DataError(f"{start}: {error}") from error
    except (errors.OfflineModeIsEnabled, errors.HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        raise DataError(f"{start}: {_unreachable(error)}") from error


def _unreachable(error: Exception) -> str:
    """Why the Hub gave nothing, in one line."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "not in the cache, and HF_HUB_OFFLINE is set; unset it, or download the file first"
    reason = (str(error).strip() or repr(error)).splitlines()[0]
    return f"{constants.ENDPOINT} cannot be read ({reason}), and the file is not in the cache"


# ------------------------------------------------------------------------------------------------ uploads
def check_upload(repo: str) -> None:
    """Refuse an upload that would fail after a long export: a wrong name, no token or a refused one, no network.

    Raises:
        CVLightningError: What is wrong and what to do.
    """
    from huggingface_hub import get_token

    if not REPO.fullmatch(repo):
        raise CVLightningError(f"--push_to_hub {repo}: the name is OWNER/NAME, of letters, digits, -, _ and .")
    if get_token() is None:
        raise CVLightningError(
            f"--push_to_hub {repo}: no token; set HF_TOKEN to one with write access, or log in with `hf auth login`"
        )
    with _upload_errors(repo, "nothing was written"):
        _api().whoami()


def upload_folder(folder: Path, repo: str, *, private: bool = False) -> str:
    """Upload a model folder, into a repository that is made if it does not exist; returns its address.

    Raises:
        CVLightningError: The Hub refused it; the folder stays as it is.
    """
    api = _api()
    with _upload_errors(repo, f"{folder} stays; `hf upload {repo} {folder}` tries again"):
        address = api.create_repo(repo, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload by cv_lightning")
    return str(address)


@contextmanager
def _upload_errors(repo: str, state: str) -> Iterator[None]:
    import httpx2
    from huggingface_hub import constants, errors

    start = f"--push_to_hub {repo}"
    try:
        yield
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        reason = {
            401: "the Hub refuses the token; set HF_TOKEN to a valid one with write access",
            403: f"the token may not write to {repo.partition('/')[0]}; use one with write access to that owner",
            409: "a repository of this name and another kind exists; choose another name",
        }.get(status, (str(error).strip() or repr(error)).splitlines()[0])
        raise CVLightningError(f"{start}: {reason} ({state})") from error
    except errors.OfflineModeIsEnabled as error:
        raise CVLightningError(f"{start}: HF_HUB_OFFLINE is set; unset it ({state})") from error
    except (errors.HFValidationError, ValueError) as error:
        raise CVLightningError(f"{start}: {error} ({state})") from error
    except (httpx2.HTTPError, OSError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise CVLightningError(f"{start}: {constants.ENDPOINT} does not answer: {reason} ({state})") from error
