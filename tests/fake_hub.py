"""The part of the Hub's HTTP interface that publishing and downloading a model need, on localhost.

It keeps repositories in memory and answers as the Hub does, including its statuses and the header
that names the reason. Tests set `refuse` or `hang_up` to make a request fail.
"""

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest

from hf_lowrank.report.public import public_report

OWNER = "ada"
TOKENS = {"hf_write": "write", "hf_read": "read"}


def published(folder: Path) -> dict[str, bytes]:
    """What the files of a folder become on the Hub: the same, but for the paths in the report."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return files | {"report.json": public_report(files["report.json"].decode()).encode()}


class Repository:
    def __init__(self, private: bool) -> None:
        self.private = private
        self.commits: list[dict[str, bytes]] = []

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1] if self.commits else {}

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr(len(self.commits)).encode()).hexdigest()


class FakeHub:
    """State of the Hub, and what went over the wire.

    Attributes:
        repositories: By `namespace/name`.
        requests: (method, path) in order.
        upload_mode: "regular" (in the commit) or "lfs" (before it) for weights.
        refuse: Status to answer by a part of a path.
        hang_up: Part of a path on which the connection is closed without an answer.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.upload_mode = "regular"
        self.refuse: dict[str, int] = {}
        self.hang_up = ""
        self.url = ""


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    handler = type("BoundHandler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def acting_as_the_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[FakeHub]:
    """A running fake that this process takes for the Hub, with a token that may write."""
    with running_hub() as fake:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", fake.url)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            f"{fake.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        )
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-token"))
        impatient = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
        monkeypatch.setattr("huggingface_hub.utils._http.time", impatient)  # of retries alone
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # a cache
        monkeypatch.setenv("HF_TOKEN", "hf_write")
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        yield fake


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.hub.hang_up and self.hub.hang_up in path:
            self.close_connection = True
            return
        for part, status in self.hub.refuse.items():
            if part in path:
                self._send(status, {"error": "refused"})
                return
        parts = path.strip("/").split("/")
        role = TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        if path == "/api/whoami-v2":
            self._whoami(role)
        elif path == "/api/validate-yaml":
            self._send(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(json.loads(body), role)
        elif parts[:2] == ["api", "models"]:
            self._models("/".join(parts[2:4]), parts[4:], body, role)
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif parts[0] == "storage":
            self.hub.blobs[parts[1]] = body
            self._send(200, {})
        elif "resolve" in parts:
            self._resolve("/".join(parts[:2]), "/".join(parts[4:]))
        else:
            self._send(404, {"error": "unknown path"})

    def _whoami(self, role: str | None) -> None:
        if role is None:
            self._send(401, {"error": "Invalid credentials in Authorization header"})
            return
        auth = {"accessToken": {"role": role}}
        self._send(200, {"name": OWNER, "orgs": [{"name": "engines"}], "auth": auth})

    def _create(self, wanted: dict[str, Any], role: str | None) -> None:
        repo_id = f"{wanted['organization'] or OWNER}/{wanted['name']}"
        if role != "write":
            self._send(403, {"error": "no write access"})
            return
        status = 409 if repo_id in self.hub.repositories else 200
        if status == 200:
            private = wanted.get("private") or wanted.get("visibility") == "private"
            self.hub.repositories[repo_id] = Repository(bool(private))
        self._send(status, {"url": f"{self.hub.url}/{repo_id}"})

    def _models(self, repo_id: str, rest: list[str], body: bytes, role: str | None) -> None:
        repository = self.hub.repositories.get(repo_id)
        if repository is None:
            self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif not rest or rest[0] == "revision":
            siblings = [{"rfilename": name} for name in repository.files]
            info = {"id": repo_id, "sha": repository.sha, "private": repository.private}
            self._send(200, info | {"siblings": siblings})
        elif rest[0] == "tree":
            self._send(200, [_entry(name, data) for name, data in repository.files.items()])
        elif rest[0] == "preupload":
            files = json.loads(body)["files"]
            self._send(200, {"files": [self._preupload(file["path"]) for file in files]})
        elif rest[0] == "commit" and role == "write":
            self._commit(repo_id, repository, body)
        else:
            self._send(403, {"error": "no write access"})

    def _preupload(self, path: str) -> dict[str, Any]:
        mode = self.hub.upload_mode if path.endswith(".safetensors") else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False}

    def _batch(self, wanted: dict[str, Any]) -> None:
        objects = [
            entry | {"actions": {"upload": {"href": f"{self.hub.url}/storage/{entry['oid']}"}}}
            for entry in wanted["objects"]
        ]
        self._send(200, {"transfer": "basic", "objects": objects})

    def _commit(self, repo_id: str, repository: Repository, body: bytes) -> None:
        files = dict(repository.files)
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        repository.commits.append(files)
        url = f"{self.hub.url}/{repo_id}/commit/{repository.sha}"
        self._send(200, {"commitUrl": url, "commitOid": repository.sha, "pullRequestUrl": None})

    def _resolve(self, repo_id: str, name: str) -> None:
        repository = self.hub.repositories.get(repo_id)
        data = None if repository is None else repository.files.get(name)
        if repository is None or data is None:
            code = "RepoNotFound" if repository is None else "EntryNotFound"
            self._send(404, {}, {"X-Error-Code": code})
            return
        headers = {"ETag": f'"{_blob_id(data)}"', "X-Repo-Commit": repository.sha}
        self._send(200, data, headers)

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _entry(name: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(data), "oid": _blob_id(data)}


def _blob_id(data: bytes) -> str:
    """As git names a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
