"""A stand-in of the Hugging Face Hub on this machine: what its client asks for to fetch and to push a model."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


@dataclass
class Repository:
    commits: dict[str, Files] = field(default_factory=dict)
    """By hash, oldest first."""
    tags: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: Files) -> str:
        before = next(reversed(self.commits.values()), {})
        digest = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[digest] = before | files
        return digest

    def resolve(self, revision: str) -> str | None:
        revision = unquote(revision)
        if revision == "main":
            return next(reversed(self.commits), None)
        return self.tags.get(revision, revision if revision in self.commits else None)


class StandIn:
    """Serves until :meth:`close`."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests = 0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                hub.requests += 1
                length = int(self.headers.get("Content-Length") or 0)
                status, headers, body = hub.answer(self.command, self.path, self.rfile.read(length))
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(body))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_HEAD = do_POST = handle_any

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        path = urlsplit(path).path
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.repositories.setdefault(
                name, Repository(private=bool(asked.get("private")) or asked.get("visibility") == "private")
            )
            return _json({"url": f"{self.url}/{name}"})
        if path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree|preupload|commit)/([^/]+)", path):
            return self._model(*found.groups(), body)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(*found.groups())
        return 404, {}, b"not here"

    def _model(self, name: str, what: str, revision: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        if (repository := self.repositories.get(name)) is None:
            return 401, {"X-Error-Code": "RepoNotFound"}, b"no such repository"
        if what == "preupload":
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in _files(body)]
            return _json({"files": files})
        if what == "commit":
            lines = [json.loads(line) for line in body.splitlines()]
            values = [line["value"] for line in lines if line["key"] == "file"]
            digest = repository.commit({value["path"]: base64.b64decode(value["content"]) for value in values})
            return _json({"commitUrl": f"{self.url}/{name}/commit/{digest}", "commitOid": digest})
        if (digest := repository.resolve(revision)) is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"no such revision"
        names = sorted(repository.commits[digest])
        if what == "revision":
            siblings = [{"rfilename": file} for file in names]
            return _json({"id": name, "sha": digest, "siblings": siblings, "private": repository.private})
        sizes = {file: len(repository.commits[digest][file]) for file in names}
        return _json([{"type": "file", "path": file, "size": sizes[file], "oid": f"{digest}{file}"} for file in names])

    def _file(self, name: str, revision: str, file: str) -> tuple[int, dict[str, str], bytes]:
        repository = self.repositories[name]
        digest = repository.resolve(revision)
        if repository.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b"ask for access"
        content = repository.commits[digest].get(file)
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b"no such file"
        return 200, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": digest}, content


def _files(body: bytes) -> list[dict]:
    return json.loads(body)["files"]


def _json(value: object) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()
