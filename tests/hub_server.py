"""A small Hugging Face Hub on the loopback interface, spoken to by the real `huggingface_hub` client.

Repositories live in memory as lists of commits. Served: repository information and file trees, file downloads with the
Hub's headers, repository creation, pre-upload, commits with small files inline and large ones through the basic LFS
protocol.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Commit:
    sha: str
    message: str
    files: dict[str, bytes]


@dataclass
class Hub:
    """What the server knows; `requests` is the log of (method, path)."""

    repos: dict[str, list[Commit]] = field(default_factory=dict)
    branches: dict[str, dict[str, str]] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    private: set[str] = field(default_factory=set)
    endpoint: str = ""

    def create(self, repo: str) -> None:
        self.repos[repo] = []
        self.branches[repo] = {}
        self.commit(repo, {}, "initial commit")

    def commit(self, repo: str, changes: dict[str, bytes | None], message: str, branch: str = "main") -> Commit:
        """Write files (None deletes) on top of the newest commit."""
        before = self.repos[repo][-1].files if self.repos[repo] else {}
        files = {path: data for path, data in {**before, **changes}.items() if data is not None}
        digest = hashlib.sha1(f"{repo}{len(self.repos[repo])}{message}".encode()).hexdigest()
        commit = Commit(digest, message, files)
        self.repos[repo].append(commit)
        self.branches[repo][branch] = digest
        return commit

    def find(self, repo: str, revision: str) -> Commit | None:
        wanted = self.branches[repo].get(revision, revision)
        return next((commit for commit in self.repos[repo] if commit.sha == wanted), None)


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_large(path: str) -> bool:
    return path.endswith(".safetensors")


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(b"")

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self._body())

    def do_PUT(self) -> None:
        self._answer(self._body())

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, body: bytes) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path))
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if parts[0] == "api":
            self._api(parts[1:], body)
        elif parts[0] == "lfs":
            if self.command == "PUT":
                assert hashlib.sha256(body).hexdigest() == parts[1]
                self.hub.large[parts[1]] = body
            self._json({})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._lfs_batch(json.loads(body))
        elif "resolve" in parts:
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._error(404, "EntryNotFound")

    def _api(self, parts: list[str], body: bytes) -> None:
        if parts[:2] == ["repos", "create"]:
            self._create(json.loads(body))
        elif parts[0] == "validate-yaml":
            valid = json.loads(body)["content"].startswith("---\n")
            self._json({"errors": [] if valid else [{"message": "no front matter"}], "warnings": []})
        elif parts[0] == "whoami-v2":
            self._json({"name": "me", "type": "user", "orgs": []})
        elif parts[0] == "models" and len(parts) >= 3:
            repo = "/".join(parts[1:3])
            if repo not in self.hub.repos or (repo in self.hub.private and "Authorization" not in self.headers):
                self._error(401, "RepoNotFound")
            else:
                self._model(repo, parts[3:], body)
        else:
            self._error(404, "EntryNotFound")

    def _create(self, wanted: dict[str, Any]) -> None:
        repo = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        known = repo in self.hub.repos
        if not known:
            self.hub.create(repo)
            if wanted.get("private") or wanted.get("visibility") == "private":
                self.hub.private.add(repo)
        self._json({"url": f"{self.hub.endpoint}/{repo}", "name": repo, "id": repo}, status=409 if known else 200)

    def _model(self, repo: str, rest: list[str], body: bytes) -> None:
        action, revision = (rest[0], rest[1]) if len(rest) > 1 else ("revision", "main")
        commit = self.hub.find(repo, revision)
        if commit is None:
            self._error(404, "RevisionNotFound")
        elif action == "revision":
            siblings = [{"rfilename": path} for path in sorted(commit.files)]
            self._json({"id": repo, "modelId": repo, "sha": commit.sha, "siblings": siblings, "tags": []})
        elif action == "tree":
            self._json([self._entry(path, data) for path, data in sorted(commit.files.items())])
        elif action == "preupload":
            files = json.loads(body)["files"]
            self._json({"files": [self._upload_mode(commit, file["path"]) for file in files]})
        elif action == "commit":
            self._commit(repo, revision, [json.loads(line) for line in body.splitlines() if line])
        else:
            self._error(404, "EntryNotFound")

    def _entry(self, path: str, data: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
        if is_large(path):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    def _upload_mode(self, commit: Commit, path: str) -> dict[str, Any]:
        return {"path": path, "uploadMode": "lfs" if is_large(path) else "regular", "shouldIgnore": False}

    def _lfs_batch(self, wanted: dict[str, Any]) -> None:
        objects = []
        for item in wanted["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.large:
                answer["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{item['oid']}", "header": {}}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, repo: str, branch: str, lines: list[dict[str, Any]]) -> None:
        message = ""
        changes: dict[str, bytes | None] = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changes[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                changes[value["path"]] = None
        commit = self.hub.commit(repo, changes, message, branch)
        url = f"{self.hub.endpoint}/{repo}/commit/{commit.sha}"
        self._json({"success": True, "commitOid": commit.sha, "commitUrl": url, "hookOutput": ""})

    def _file(self, repo: str, revision: str, path: str) -> None:
        if repo not in self.hub.repos:
            return self._error(401, "RepoNotFound")
        commit = self.hub.find(repo, revision)
        if commit is None:
            return self._error(404, "RevisionNotFound")
        if path not in commit.files:
            return self._error(404, "EntryNotFound", {"X-Repo-Commit": commit.sha})
        data = commit.files[path]
        etag = hashlib.sha256(data).hexdigest() if is_large(path) else git_oid(data)
        self._send(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": commit.sha, "X-Linked-Size": str(len(data))})

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Start an empty Hub on a free port; `hub.endpoint` is its address."""
    hub = Hub()
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
