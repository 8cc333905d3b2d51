"""Fetches files of one commit of a hub repository into the hub's cache, and uploads files as one commit.

`fmg.core.hub` locates files that components read, and never transfers unasked. This module transfers what a user names.
Imports no torch.
"""

from __future__ import annotations

import inspect
import io
import logging
import re
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmg.core.cache import cache_dir
from fmg.core.display import counted, size_text
from fmg.core.errors import FmgError, HubError, UsageError, reason
from fmg.core.events import Notice, Observer, StageProgress
from fmg.core.hub import METADATA_TIMEOUT_S, OFFLINE, SNAPSHOTS, HubSource, cached, check_room, is_offline

MAIN = "main"
_COMMIT = re.compile(r"[0-9a-f]{40}")
# the characters that git allows, of those that `owner/name@revision` can have
_BRANCH = re.compile(r"(?!.*(?:\.\.|//|/\.|\.lock$))[A-Za-z0-9_][A-Za-z0-9_./-]*(?<![./])")
_MAX_LISTING = 4 * 10**6
_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


@dataclass(frozen=True)
class Checkout:
    """A repository at one commit.

    Attributes:
        repository: its id.
        commit: the full hash.
        folder: where the hub's cache keeps the files of this commit; each is a link.
    """

    repository: str
    commit: str
    folder: Path

    @property
    def label(self) -> str:
        """`owner/name@commit`, which always refers to the same files."""
        return f"{self.repository}@{self.commit}"

    def has(self, name: str) -> bool:
        """Whether a file has been fetched."""
        return (self.folder / name).is_file()

    def fetch(
        self, names: Sequence[str], observer: Observer, *, optional: Collection[str] = (), into: Path | None = None
    ) -> None:
        """Downloads the files that are not cached yet, after reporting their size.

        Args:
            names: required files.
            observer: receives the progress.
            optional: files that are also fetched if the repository has them.
            into: a folder of fmg's cache, for files that may not be links; None means the hub's cache.

        Raises:
            HubError: the hub cannot be reached, refuses, or lacks one.
            UsageError: the disk is too small, or the network is forbidden.
        """
        place = into or self.folder
        missing = [name for name in names if not (place / name).is_file()]
        if not missing:
            return
        if is_offline():
            raise UsageError(
                f"'{self.repository}' has not been fetched completely: {missing[0]} is missing, and --offline or"
                f" {OFFLINE} forbids network access",
                "Run the command once without it.",
            )
        from huggingface_hub import constants

        sizes = _sizes(self.repository, self.commit)
        if lacking := [name for name in missing if name not in sizes]:
            raise HubError(
                f"'{self.label}' lacks {lacking[0]}, which it lists", "Ask its owner to push the run or artifact again."
            )
        missing += [name for name in optional if name in sizes and not (place / name).is_file()]
        total = sum(sizes[name] for name in missing)
        check_room(Path(constants.HF_HUB_CACHE) if into is None else cache_dir(), total / 1e9)
        observer(Notice("info", f"{self.repository}: fetching {counted(len(missing), 'file')}, {size_text(total)}"))
        done = 0
        for name in missing:
            before = done

            def tell(count: int) -> None:
                nonlocal done
                done += count
                observer(StageProgress("download (MB)", done // 10**6, max(1, total // 10**6)))

            with hub_errors(self.repository):
                _download(self.repository, name, self.commit, tell, into=into)
            done = before
            tell(sizes[name])


def check_out(source: HubSource, names: Sequence[str]) -> Checkout | None:
    """The current commit of a source and the first of the given files that it has; None if it has none of them.

    A full commit hash that is in the cache needs no network. Without one, the newest commit in the cache is taken.

    Raises:
        HubError: the hub cannot be reached and nothing is cached, or the hub refuses.
        UsageError: the network is forbidden and nothing is cached.
    """
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    offline = is_offline()
    if not offline and not any(cached(source, name) for name in names):
        # reports at once what is wrong; a download would retry for half a minute
        names = sorted(_sizes(source.repository, source.revision).keys() & set(names), key=names.index)
    for name in names:
        # a commit does not change
        pinned = source.revision is not None and _COMMIT.fullmatch(source.revision) is not None
        file = cached(source, name) if pinned else None
        try:
            with hub_errors(source.repository, source.revision):
                file = file or _download(source.repository, name, source.revision, _limit(name), local=offline)
        except HubError as error:
            cause = error.__cause__
            if isinstance(cause, EntryNotFoundError) and (offline or not isinstance(cause, LocalEntryNotFoundError)):
                continue
            raise
        folder = file.parents[len(Path(name).parts) - 1]
        return Checkout(source.repository, folder.parts[folder.parts.index(SNAPSHOTS) + 1], folder)
    if offline:
        raise UsageError(
            f"'{source.repository}' has not been fetched, and --offline or {OFFLINE} forbids network access",
            "Run the command once without it.",
        )
    return None


@dataclass(frozen=True)
class Remote:
    """The current contents of a repository.

    Attributes:
        commit: the newest commit of the branch; None if the branch does not exist or has no commit.
        files: names of its files at that commit.
        private: whether others cannot see it.
    """

    commit: str | None
    files: frozenset[str]
    private: bool


@dataclass(frozen=True)
class Commit:
    """The result of a push.

    Attributes:
        url: the repository's page.
        commit: the full hash.
        created: whether the repository is new.
        changed: False if the repository already had these files.
    """

    url: str
    commit: str
    created: bool
    changed: bool


def check_name(repository: str, branch: str = MAIN) -> None:
    """Checks that texts are a valid repository id and branch name.

    Raises:
        UsageError: one is not.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repository)
        valid = repository.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise UsageError(
            f"'{repository}' is not the name of a repository",
            "Write owner/name, of letters, digits, '-', '_' and '.'; the owner is your user name or an organisation.",
        )
    if _BRANCH.fullmatch(branch) is None:
        raise UsageError(f"'{branch}' is not the name of a branch", "Use letters, digits, '-', '_', '.' and '/'.")


def check_may_push() -> None:
    """Checks what a push needs, before anything is sent.

    Raises:
        UsageError: the network is forbidden, or there is no token.
    """
    from huggingface_hub import get_token

    if is_offline():
        raise UsageError(
            f"A push needs the network, which --offline or {OFFLINE} forbids", "Leave it out, or add --dry-run."
        )
    if get_token() is None:
        raise UsageError("No token for the hub is set", f"To push, {_LOG_IN} to a token with write access.")


def read_remote(repository: str, branch: str) -> Remote | None:
    """The current contents of a repository; None if it does not exist or cannot be seen.

    Raises:
        HubError: the hub cannot be reached, or refuses the token.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    api = HfApi()
    with hub_errors(repository, branch, writing=True):
        try:
            found = info = api.model_info(repository, timeout=METADATA_TIMEOUT_S)
            if branch != MAIN:
                found = api.model_info(repository, revision=branch, timeout=METADATA_TIMEOUT_S)
        except RevisionNotFoundError:
            return Remote(None, frozenset(), bool(info.private))
        except RepositoryNotFoundError:
            return None
    return Remote(found.sha, frozenset(file.rfilename for file in found.siblings or ()), bool(info.private))


def read_text(repository: str, name: str, commit: str) -> str:
    """A small text file of a repository.

    Raises:
        HubError: the hub cannot be reached, or refuses.
    """
    with hub_errors(repository):
        return _download(repository, name, commit, None).read_text(encoding="utf-8", errors="replace")


def send(
    repository: str,
    files: Mapping[str, bytes | Path],
    *,
    remote: Remote | None,
    branch: str,
    message: str,
    private: bool,
    obsolete: Collection[str] = (),
) -> Commit:
    """Uploads files as one commit; a missing repository or branch is created first.

    A push that is killed leaves no commit, and what it uploaded is not sent again. Other files are kept.

    Args:
        repository: its id.
        files: content, or the file with it, by name.
        remote: what `read_remote` found.
        branch: the branch to commit to.
        message: the commit message.
        private: whether a new repository is private.
        obsolete: files to delete.

    Raises:
        HubError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi

    api = HfApi()
    operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
        *(CommitOperationAdd(name, content) for name, content in files.items()),
        *(CommitOperationDelete(name, is_folder=False) for name in obsolete),
    ]
    before = None if remote is None else remote.commit
    with hub_errors(repository, branch, writing=True), _quiet():
        if remote is None:
            api.create_repo(repository, private=private or None, exist_ok=True)
        if branch != MAIN and before is None:
            api.create_branch(repository, branch=branch, exist_ok=True)
        made = api.create_commit(repository, operations, commit_message=message, revision=branch, parent_commit=before)
    return Commit(f"{api.endpoint}/{repository}", made.oid, remote is None, made.oid != before)


@contextmanager
def hub_errors(repository: str, revision: str | None = None, *, writing: bool = False) -> Iterator[None]:
    """Turns errors of the hub client into one sentence on what is wrong and one on what to do.

    Raises:
        HubError: from the client's error.
    """
    try:
        yield
    except FmgError:
        raise
    except Exception as error:
        # the client raises errors of its own, of its HTTP library and of the system
        raise HubError(*_words(error, repository, revision, writing)) from error


def _sizes(repository: str, revision: str | None) -> dict[str, int]:
    """The files of a repository with their sizes in bytes."""
    from huggingface_hub import HfApi

    with hub_errors(repository, revision):
        info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=METADATA_TIMEOUT_S)
    return {file.rfilename: file.size or 0 for file in info.siblings or ()}


def _limit(name: str) -> Callable[[int], None]:
    """Aborts the download of a listing file (digests or manifest) that exceeds the size limit."""
    left = _MAX_LISTING

    def tell(count: int) -> None:
        nonlocal left
        left -= count
        if left < 0:
            raise HubError(f"{name} has more than {size_text(_MAX_LISTING)}", "Give a repository that fmg pushed.")

    return tell


def _words(error: Exception, repository: str, revision: str | None, writing: bool) -> tuple[str, str]:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    cause: BaseException | None = error
    while cause is not None and getattr(cause, "response", None) is None:
        cause = cause.__cause__ or cause.__context__
    status = getattr(getattr(cause, "response", None), "status_code", None)
    stated = getattr(cause, "server_message", None)
    said = f": {' '.join(stated.split())}" if stated else ""
    match cause:
        case RevisionNotFoundError():
            return f"'{repository}' has no revision '{revision}'", "Give a branch, a tag or a full commit hash."
        case GatedRepoError():
            return (
                f"'{repository}' is available only to users who have accepted its terms",
                f"Accept them on its page, and {_LOG_IN}.",
            )
        case RepositoryNotFoundError() if not writing:
            return (
                f"'{repository}' does not exist on the hub, or is private",
                f"Check the name; for a private repository, {_LOG_IN}.",
            )
    match status:
        case 401:
            return f"The hub rejects the token{said}", f"Use a valid one: {_LOG_IN}."
        case 403:
            doing = "write to" if writing else "read"
            return (
                f"The token may not {doing} '{repository}'{said}",
                "Use a token with that permission, or push to a repository of your own.",
            )
        case 404:
            return f"The hub does not find '{repository}'{said}", "Check its name, and that the token has write access."
        case 409 | 412:
            return (
                f"'{repository}' was changed by somebody else during the push{said}",
                "Run the command again; what was uploaded is not sent again.",
            )
        case 413:
            return f"The hub does not accept files of this size{said}", "Push to another account, or fewer files."
        case 429:
            return f"The hub limits the number of requests{said}", "Wait a few minutes, then run the command again."
        case int() if status >= 500:
            again = "Run the command again later"
            return (
                f"The hub failed with status {status}{said}",
                f"{again}; nothing was committed, and what was uploaded is not sent again." if writing else f"{again}.",
            )
        case int():
            return f"The hub refused with status {status}{said}", "Check the name and the files."
    from huggingface_hub import constants

    why = f"The hub at {constants.ENDPOINT} cannot be reached: {reason(_root(error))}"
    return why, "Check the connection and the proxy (HTTPS_PROXY); HF_ENDPOINT names a mirror."


def _root(error: BaseException) -> BaseException:
    """The first error in the chain of causes, which states the reason."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _download(
    repository: str,
    name: str,
    revision: str | None,
    tell: Callable[[int], None] | None,
    *,
    local: bool = False,
    into: Path | None = None,
) -> Path:
    from huggingface_hub import hf_hub_download

    options: dict[str, Any] = {}
    if "tqdm_class" in inspect.signature(hf_hub_download).parameters:
        # older clients show their own bar, in a terminal
        options["tqdm_class"] = _bar(tell or (lambda count: None))
    with _quiet():
        return Path(
            hf_hub_download(repository, name, revision=revision, local_files_only=local, local_dir=into, **options)
        )


def _bar(tell: Callable[[int], None]) -> type:
    """A progress bar that shows nothing and reports bytes."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "file": io.StringIO(), "disable": False})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            tell(int(n or 0))
            super().update(n)

    return Bar


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides the hub client's messages, and its progress bars when the output is a pipe."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logger = logging.getLogger("huggingface_hub")
    level, bars = logger.level, not are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    if hide := bars and not sys.stderr.isatty():
        disable_progress_bars()
    try:
        with warnings.catch_warnings():
            # the client's HTTP library warns about how the client calls it
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)
        if hide:
            enable_progress_bars()
