"""A small server on this machine that takes uploads as the two hubs do."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.model.loopback import serving


@dataclass
class Store:
    """What arrived."""

    token: str
    files: dict[str, bytes] = field(default_factory=dict)
    created: list[dict[str, Any]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **(headers or {}),
        }.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        allowed = self.store.token in (self.headers.get("Authorization") or "") + (self.headers.get("Cookie") or "")
        if not allowed and not path.startswith("/blob/"):
            self._send(401, {"Code": 401, "Message": "no token", "Success": False, "error": "no token"})
        else:
            self.route(path, body)

    do_GET = do_POST = do_PUT = do_HEAD = _answer

    def route(self, path: str, body: bytes) -> None:
        raise NotImplementedError


class _ModelScope(_Handler):
    def route(self, path: str, body: bytes) -> None:
        store = self.store
        if path == "/api/v1/models" and self.command == "POST":
            # The client asks again before it uploads, for a public one; a hub makes a repository once.
            if store.created:
                self._send(409, {"Code": 409, "Message": "already exists", "Success": False})
            else:
                store.created.append(json.loads(body))
                self._ok({"Id": 1})
        elif path.endswith("/info/lfs/objects/batch"):
            host = self.headers["Host"]
            objects = json.loads(body)["objects"]
            self._ok(
                {
                    "objects": [
                        {**each, "actions": {"upload": {"href": f"http://{host}/blob/{each['oid']}"}}}
                        for each in objects
                    ]
                }
            )
        elif match := re.fullmatch(r"/blob/([0-9a-f]{64})", path):
            assert hashlib.sha256(body).hexdigest() == match[1]
            store.blobs[match[1]] = body
            self._send(200, {"Code": 200})
        elif "/commit/" in path:
            request = json.loads(body)
            store.messages.append(request["commit_message"])
            for action in request["actions"]:
                large = action["type"] == "lfs"
                store.files[action["path"]] = (
                    store.blobs[action["sha256"]] if large else base64.b64decode(action["content"])
                )
            self._ok({"Id": "c" * 40, "oid": "c" * 40})
        elif path == "/openapi/v1/users/me":
            self._send(200, {"success": True, "data": {"username": "owner", "email": "o@example.com"}})
        elif re.fullmatch(r"/(api|openapi)/v1/models/owner/mine(/repo/files)?", path) and store.created:
            self._ok({"Id": 1, "Type": 4, "Name": "mine", "Path": "owner", "Files": []})
        else:
            self._send(404, {"Code": 404, "Message": "record not found", "Success": False})

    def _ok(self, data: Any) -> None:
        self._send(
            200, {"Code": 200, "Success": True, "success": True, "Message": "success", "Data": data, "data": data}
        )


class _HuggingFace(_Handler):
    def route(self, path: str, body: bytes) -> None:
        store, host = self.store, self.headers["Host"]
        if path == "/api/repos/create":
            store.created.append(json.loads(body))
            self._send(200, {"url": f"http://{host}/owner/mine", "name": "owner/mine"})
        elif path == "/api/validate-yaml":
            self._send(200, {"errors": [], "warnings": []})
        elif "/preupload/" in path:
            names = [each["path"] for each in json.loads(body)["files"]]
            self._send(200, {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/" in path:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "header":
                    store.messages.append(entry["value"]["summary"])
                elif entry["key"] == "file":
                    store.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            url = f"http://{host}/owner/mine/commit/{'c' * 40}"
            self._send(200, {"success": True, "commitOid": "c" * 40, "commitUrl": url})
        elif path.startswith("/api/models/owner/mine"):
            self._send(200, {"id": "owner/mine", "sha": "b" * 40, "siblings": []})
        else:
            self._send(404, {"error": "not found"})


@contextmanager
def take_uploads(hub: str, store: Store) -> Iterator[str]:
    """Serve `modelscope` or `huggingface` and yield the server's address."""
    base = {"modelscope": _ModelScope, "huggingface": _HuggingFace}[hub]
    with serving(type("Handler", (base,), {"store": store})) as address:
        yield address
