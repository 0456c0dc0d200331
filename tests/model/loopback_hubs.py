"""Small servers on this machine that speak as much of the two hubs' protocols as a download needs.

They can misbehave on request: cut a body short, serve another content than listed, list hostile names, refuse.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

from tests.model.loopback import serving

COMMIT = "c" * 40
"""Commit of the default branch on the Hugging Face stand-in."""


@dataclass
class Repository:
    """What a stand-in serves, and how it misbehaves."""

    files: dict[str, bytes]
    model_id: str = "owner/small"
    served: dict[str, bytes] = field(default_factory=dict)
    """File -> what is sent in place of the listed content."""
    cut_once: dict[str, int] = field(default_factory=dict)
    """File -> bytes after which the connection is closed, the first time."""
    cut_always: dict[str, int] = field(default_factory=dict)
    """The same, each time, counted from the first byte that is sent."""
    refuse: tuple[int, dict[str, str]] | None = None
    """Status and headers of every answer about this repository."""
    log: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path, Range of each request."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repository: Repository

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._answer()

    def _answer(self) -> None:
        parsed = urlparse(self.path)
        query = {name: values[0] for name, values in parse_qs(parsed.query).items()}
        self.route(unquote(parsed.path), query)

    def route(self, path: str, query: dict[str, str]) -> None:
        raise NotImplementedError

    def note(self, what: str) -> None:
        self.repository.log.append((self.command, what, self.headers.get("Range", "")))

    def send(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, stop_after: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body if stop_after is None else body[:stop_after])
        if stop_after is not None:
            self.wfile.flush()
            self.close_connection = True

    def send_json(self, value: Any, status: int = 200) -> None:
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send_file(self, name: str, headers: dict[str, str]) -> None:
        self.note(name)
        content = self.repository.served.get(name, self.repository.files[name])
        stop_after = self.repository.cut_once.pop(name, None) if self.command == "GET" else None
        stop_after = self.repository.cut_always.get(name, stop_after)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            self.send(200, content, {**headers, "Accept-Ranges": "bytes"}, stop_after)
            return
        start, end = int(asked[1]), int(asked[2] or len(content) - 1)
        headers = {**headers, "Content-Range": f"bytes {start}-{end}/{len(content)}"}
        self.send(206, content[start : end + 1], headers, stop_after)


class _ModelScopeHandler(_Handler):
    def route(self, path: str, query: dict[str, str]) -> None:
        repository = self.repository
        base = f"/api/v1/models/{repository.model_id}"
        if path == "/api/v1/repos/internalAccelerationInfo":
            self.send_json({"Code": 200, "Success": True, "Data": {"InternalRegionQueryAddress": ""}})
        elif not path.startswith(base):
            self.note("/api-unknown")
            self.send_json({"Code": 404, "Message": "record not found", "Success": False}, 404)
        elif repository.refuse:
            self.note("/api-refused")
            status, _ = repository.refuse
            self.send_json({"Code": status, "Message": "no access", "Success": False}, status)
        elif path == f"{base}/repo/files":
            self.note(f"/api-list {query['Revision']}")
            files = [
                {"Name": name.rpartition("/")[2], "Path": name, "Type": "blob", "Size": len(content)}
                | {"Sha256": hashlib.sha256(content).hexdigest(), "Revision": "a" * 40}
                for name, content in repository.files.items()
            ]
            self.send_json({"Code": 200, "Success": True, "Data": {"Files": files}})
        elif path == f"{base}/repo" and query.get("FilePath") in repository.files:
            self.send_file(query["FilePath"], {})
        else:
            self.note(f"/api-missing {path}")
            self.send_json({"Code": 404, "Message": "not found", "Success": False}, 404)


class _HuggingFaceHandler(_Handler):
    def route(self, path: str, query: dict[str, str]) -> None:
        repository = self.repository
        resolve = re.fullmatch(rf"/{re.escape(repository.model_id)}/resolve/([^/]+)/(.+)", path)
        info = re.fullmatch(rf"/api/models/{re.escape(repository.model_id)}(?:/(revision|tree)/([^/]+))?", path)
        if resolve is None and info is None:
            self.note("/api-unknown")
            self.send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif repository.refuse:
            self.note("/api-refused")
            status, headers = repository.refuse
            self.send(status, b"{}", headers)
        elif (resolve[1] if resolve else info and info[2]) not in (None, "main", "v1", COMMIT):
            self.note("/api-no-revision")
            self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif resolve is not None:
            content = repository.files[resolve[2]]
            etag = self._names(content)
            self.send_file(resolve[2], {"ETag": f'"{etag.get("sha256") or etag["oid"]}"', "X-Repo-Commit": COMMIT})
        elif info is not None and info[1] == "tree":
            self.note("/api-tree")
            self.send_json(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": self._names(content)["oid"]}
                    | self._large(content, "oid")
                    for name, content in repository.files.items()
                ]
            )
        else:
            self.note("/api-list")
            siblings = [
                {"rfilename": name, "size": len(content), "blobId": self._names(content)["oid"]}
                | self._large(content, "sha256")
                for name, content in repository.files.items()
            ]
            self.send_json({"id": repository.model_id, "sha": COMMIT, "siblings": siblings})

    @staticmethod
    def _names(content: bytes) -> dict[str, str]:
        names = {"oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}
        return names | ({"sha256": hashlib.sha256(content).hexdigest()} if len(content) > 5000 else {})

    def _large(self, content: bytes, key: str) -> dict[str, Any]:
        """What the hub adds for a file in large-file storage, here one above 5,000 bytes."""
        names = self._names(content)
        if "sha256" not in names:
            return {}
        return {"lfs": {key: names["sha256"], "size": len(content), "pointerSize": 130}}


@contextmanager
def serve(hub: str, repository: Repository) -> Iterator[str]:
    """Serve `repository` as `modelscope` or `huggingface` and yield the server's address."""
    base = {"modelscope": _ModelScopeHandler, "huggingface": _HuggingFaceHandler}[hub]
    with serving(type("Handler", (base,), {"repository": repository})) as address:
        yield address
