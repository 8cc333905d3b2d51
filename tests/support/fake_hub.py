"""A stand-in for the model hub on loopback: it answers what huggingface_hub asks when it pushes and fetches.

Repositories with branches and commits, large files by the LFS batch interface, redirects to where they are stored, the
hub's own error codes. It stores large files by LFS, not by Xet. The real hub has not been asked.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from tests.support.web import Call, FakeServer, Handler, fake_server

TOKEN = "hf_test"
READ_ONLY = "hf_read"
_LARGE = (".safetensors", ".onnx", ".png", ".plan", ".bin", ".pt", ".pkl")


@dataclass
class Repository:
    """Commits by hash, each with all its files, and the newest of every branch."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        """Adds a commit with these files."""
        stated = [
            message,
            str(len(self.commits)),
            *(f"{name} {hashlib.sha1(files[name]).hexdigest()}" for name in files),
        ]
        sha = hashlib.sha1("\n".join(stated).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.messages.append(message)
        return sha

    def files(self, branch: str = "main") -> dict[str, bytes]:
        """The files of a branch now."""
        return self.commits[self.branches[branch]]


Answer = Callable[[Handler, Call], bool]


@dataclass
class FakeHub:
    """What is stored, and what to do wrong.

    Attributes:
        repositories: by id.
        stored: large files by sha256.
        owner: the namespace that `TOKEN` may write to.
        before: asked before each request; True means that it has answered.
    """

    server: FakeServer | None = None
    repositories: dict[str, Repository] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    owner: str = "me"
    before: Answer | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        assert self.server is not None
        return self.server.url

    @property
    def elsewhere(self) -> str:
        """The same server under another name, as large files are on other hosts."""
        return self.url.replace("127.0.0.1", "localhost")

    def paths(self, method: str | None = None) -> list[str]:
        """Paths of the requests so far."""
        assert self.server is not None
        return [urlsplit(call.path).path for call in self.server.calls if method in (None, call.method)]

    def add(self, name: str, files: Mapping[str, bytes], *, private: bool = False) -> Repository:
        """A repository with these files, as somebody else would have made it."""
        made = self.repositories[name] = Repository(private)
        made.commit("main", dict(files), "Upload")
        return made

    def __call__(self, handler: Handler, call: Call) -> None:
        """Answers one request."""
        if self.before is not None and self.before(handler, call):
            return
        path = unquote(urlsplit(call.path).path)
        for method, pattern, answer in _ROUTES:
            if method in (call.method, "*") and (match := re.fullmatch(pattern, path)):
                answer(self, handler, call, **match.groupdict())
                return
        handler.answer({"error": f"no such page: {call.method} {path}"}, 404)

    def found(self, handler: Handler, call: Call, name: str) -> Repository | None:
        """The repository, if the token may see it; else the hub's own answer has been given."""
        token = _token(call)
        if token is not None and token not in (TOKEN, READ_ONLY):
            _refuse(handler, 401, "Invalid credentials in Authorization header", code=None)
            return None
        known = self.repositories.get(name)
        if known is None or (known.private and token is None):
            _refuse(handler, 401 if token is None else 404, "Repository not found", code="RepoNotFound")
            return None
        return known

    def may_write(self, handler: Handler, call: Call, name: str) -> bool:
        """Whether the token may write; else the answer has been given."""
        if _token(call) not in (TOKEN, READ_ONLY):
            _refuse(handler, 401, "Invalid credentials in Authorization header", code=None)
        elif _token(call) == READ_ONLY or name.partition("/")[0] != self.owner:
            _refuse(handler, 403, "You don't have the rights to create a model under this namespace", code=None)
        else:
            return True
        return False

    def create(self, handler: Handler, call: Call) -> None:
        """`create_repo`."""
        asked = json.loads(call.body)
        name = f"{asked['organization'] or self.owner}/{asked['name']}"
        if not self.may_write(handler, call, name):
            return
        if name in self.repositories:
            _refuse(handler, 409, "You already created this model repo", code=None)
            return
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.add(name, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, private=private)
        handler.answer({"url": f"{self.url}/{name}", "name": name, "id": name})

    def branch(self, handler: Handler, call: Call, name: str, branch: str) -> None:
        """`create_branch`."""
        known = self.found(handler, call, name)
        if known is not None and self.may_write(handler, call, name):
            known.branches[branch] = known.branches["main"]
            handler.answer({})

    def info(self, handler: Handler, call: Call, name: str, revision: str | None = None) -> None:
        """`model_info`."""
        known = self.found(handler, call, name)
        if known is None or (commit := _commit(handler, known, revision or "main")) is None:
            return
        files = known.commits[commit]
        siblings = [{"rfilename": path, "size": len(data), "blobId": _oid(path, data)} for path, data in files.items()]
        handler.answer({"id": name, "sha": commit, "private": known.private, "siblings": siblings, "tags": []})

    def preupload(self, handler: Handler, call: Call, name: str, revision: str) -> None:
        """Which files are large, and what is there already."""
        known = self.found(handler, call, name)
        if known is None or (commit := _commit(handler, known, revision)) is None:
            return
        there = known.commits[commit]
        handler.answer(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(_LARGE) else "regular",
                        "shouldIgnore": False,
                        "oid": _oid(file["path"], there[file["path"]]) if file["path"] in there else None,
                    }
                    for file in json.loads(call.body)["files"]
                ]
            }
        )

    def batch(self, handler: Handler, call: Call, name: str) -> None:
        """Where large files are to be sent; nowhere for those that are there."""
        if not self.may_write(handler, call, name):
            return
        objects = []
        for entry in json.loads(call.body)["objects"]:
            upload = {"upload": {"href": f"{self.url}/store/{entry['oid']}", "header": {}}}
            objects.append({**entry, "actions": upload} if entry["oid"] not in self.stored else dict(entry))
        handler.answer({"transfer": "basic", "objects": objects})

    def store(self, handler: Handler, call: Call, oid: str) -> None:
        """Receives a large file."""
        assert hashlib.sha256(call.body).hexdigest() == oid
        self.stored[oid] = call.body
        handler.answer(b"")

    def commit(self, handler: Handler, call: Call, name: str, revision: str) -> None:
        """`create_commit`."""
        known = self.found(handler, call, name)
        if known is None or not self.may_write(handler, call, name):
            return
        lines = [json.loads(line) for line in call.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        head = known.branches[revision]
        if header.get("parentCommit", head) != head:
            _refuse(handler, 412, "A commit has happened since. Please refresh and try again.", code=None)
            return
        files = dict(known.commits[head])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = known.commit(revision, files, header["summary"])
        handler.answer({"commitUrl": f"{self.url}/{name}/commit/{sha}", "commitOid": sha, "success": True})

    def resolve(self, handler: Handler, call: Call, name: str, revision: str, path: str) -> None:
        """A file; a large one is elsewhere."""
        known = self.found(handler, call, name)
        if known is None or (commit := _commit(handler, known, revision)) is None:
            return
        data = known.commits[commit].get(path)
        if data is None:
            _refuse(handler, 404, "Entry not found", code="EntryNotFound", commit=commit)
            return
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_oid(path, data)}"'}
        if not path.endswith(_LARGE):
            handler.answer(data, headers=headers)
            return
        oid = hashlib.sha256(data).hexdigest()
        self.stored.setdefault(oid, data)
        headers |= {
            "X-Linked-Etag": f'"{oid}"',
            "X-Linked-Size": str(len(data)),
            "Location": f"{self.elsewhere}/store/{oid}",
        }
        handler.answer(b"", 302, headers)

    def stored_file(self, handler: Handler, call: Call, oid: str) -> None:
        """The content of a large file, for whoever knows its address."""
        assert _token(call) is None, "the token was sent to another host"
        handler.answer(self.stored[oid])

    def validate(self, handler: Handler, call: Call) -> None:
        """Whether the front matter of a card is valid."""
        handler.answer({"errors": [], "warnings": []})


_ID = r"(?P<name>[\w.-]+/[\w.-]+)"
_ROUTES: tuple[tuple[str, str, Any], ...] = (
    ("POST", "/api/repos/create", FakeHub.create),
    ("POST", "/api/validate-yaml", FakeHub.validate),
    ("POST", f"/api/models/{_ID}/branch/(?P<branch>.+)", FakeHub.branch),
    ("POST", f"/api/models/{_ID}/preupload/(?P<revision>.+)", FakeHub.preupload),
    ("POST", f"/api/models/{_ID}/commit/(?P<revision>.+)", FakeHub.commit),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", FakeHub.batch),
    ("PUT", "/store/(?P<oid>[0-9a-f]{64})", FakeHub.store),
    ("*", "/store/(?P<oid>[0-9a-f]{64})", FakeHub.stored_file),
    ("GET", f"/api/models/{_ID}/revision/(?P<revision>.+)", FakeHub.info),
    ("GET", f"/api/models/{_ID}", FakeHub.info),
    ("*", f"/{_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", FakeHub.resolve),
)


def _token(call: Call) -> str | None:
    stated = {name.lower(): value for name, value in call.headers.items()}.get("authorization")
    return None if stated is None else stated.removeprefix("Bearer ")


def _oid(path: str, data: bytes) -> str:
    """As the hub names content: sha256 of a large file, git's hash of another."""
    if path.endswith(_LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _commit(handler: Handler, known: Repository, revision: str) -> str | None:
    commit = known.branches.get(revision, revision)
    if commit in known.commits:
        return commit
    _refuse(handler, 404, f"Invalid rev id: {revision}", code="RevisionNotFound")
    return None


def _refuse(handler: Handler, status: int, message: str, *, code: str | None, commit: str | None = None) -> None:
    headers = {"X-Error-Message": message}
    if code is not None:
        headers["X-Error-Code"] = code
    if commit is not None:
        headers["X-Repo-Commit"] = commit
    handler.answer({"error": message}, status, headers)


def fails(status: int, method: str, pattern: str, message: str = "on purpose", times: int = 10**6) -> Answer:
    """Answers requests whose path fits with a status, the given number of times."""
    left = [times]

    def answer(handler: Handler, call: Call) -> bool:
        if (
            method not in ("*", call.method)
            or not re.search(pattern, unquote(urlsplit(call.path).path))
            or left[0] == 0
        ):
            return False
        left[0] -= 1
        _refuse(handler, status, message, code=None)
        return True

    return answer


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A running stand-in."""
    hub = FakeHub()
    with fake_server(hub) as server:
        hub.server = server
        yield hub


def point_at(hub: FakeHub, patch: pytest.MonkeyPatch, cache: str, *, token: str | None = TOKEN) -> None:
    """Makes the client in this process, and in those that it starts, use the stand-in and a cache of its own."""
    from huggingface_hub import constants, hf_api

    # the instance behind functions such as `huggingface_hub.model_info`, which diffusers calls
    patch.setattr(hf_api.api, "endpoint", hub.url)
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", cache)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_TOKEN_PATH", f"{cache}/no-token")
    for name, value in (("HF_ENDPOINT", hub.url), ("HF_HUB_CACHE", cache), ("HF_HUB_DISABLE_XET", "1")):
        patch.setenv(name, value)
    patch.setenv("HF_TOKEN_PATH", f"{cache}/no-token")
    patch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        patch.delenv(name, raising=False)
    patch.delenv("HF_TOKEN", raising=False)
    if token is not None:
        patch.setenv("HF_TOKEN", token)
