"""A hub on the loopback interface: what the clients of ModelScope and of Hugging Face ask when they load a dataset."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from urllib.parse import parse_qs, urlsplit

COMMIT = "c" * 40
GENERAL_DATASET = 4
"""The hub's type for a repository of plain files; other types are fetched from object storage."""


def _listing(files: dict[str, bytes], root: str, recursive: bool) -> list[dict[str, object]]:
    prefix = f"{root.strip('/')}/" if root.strip("/") else ""
    entries: list[dict[str, object]] = []
    for path, content in files.items():
        if path.startswith(prefix) and (recursive or "/" not in path.removeprefix(prefix)):
            digest = hashlib.sha256(content).hexdigest()
            entries.append(
                {"Type": "blob", "Name": path.split("/")[-1], "Path": path, "Size": len(content), "Sha256": digest}
            )
    return entries


_NO_ENTRY = {"X-Error-Code": "EntryNotFound"}


def _handler(datasets: dict[str, dict[str, bytes]], requests: list[str]) -> type[BaseHTTPRequestHandler]:
    numbers = {name: str(number) for number, name in enumerate(datasets, 1)}  # 0 would read as "no id"
    by_number = {number: name for name, number in numbers.items()}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *said: object) -> None:
            """Keep the test output quiet."""

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            query = {key: values[-1] for key, values in parse_qs(url.query).items()}
            requests.append(f"{self.command} {url.path}")
            if url.path.startswith(("/api/datasets/", "/datasets/")):
                self.hugging_face(url.path)
                return
            where = url.path.removeprefix("/api/v1/datasets/").split("/")
            # The listing is asked for by the number of the dataset, everything else by its name.
            name = by_number.get(where[0], "/".join(where[:2]))
            asked = "/".join(where[1:] if where[0] in by_number else where[2:])
            files = datasets.get(name)
            if files is None:
                self.answer(404, {"Code": 404, "Success": False, "Message": f"no dataset {name}"})
            elif asked == "":
                owner, short = name.split("/")
                about = {"Id": int(numbers[name]), "Type": GENERAL_DATASET, "Namespace": owner, "Name": short}
                self.answer(200, {"Code": 200, "Success": True, "Data": about})
            elif asked == "repo/tree":
                found = _listing(files, query.get("Root", ""), query.get("Recursive") == "True")
                found = found if query.get("PageNumber", "1") == "1" else []
                self.answer(200, {"Code": 200, "Success": True, "Data": {"Files": found, "TotalCount": len(found)}})
            elif asked == "repo" and query.get("FilePath") in files:
                self.answer(200, files[query["FilePath"]])
            elif asked == "download/increase":
                self.answer(200, {"Code": 200, "Success": True, "Data": {}})
            else:
                self.answer(404, {"Code": 404, "Success": False, "Message": f"nothing at {self.path}"})

        def hugging_face(self, path: str) -> None:
            where = path.removeprefix("/api").removeprefix("/datasets/").split("/")
            name, asked = "/".join(where[:2]), where[2:]
            files = datasets.get(name, {})
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in files.items()
            ]
            if name not in datasets:
                self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            elif not asked or asked[0] == "revision":
                about = {"id": name, "sha": COMMIT, "private": False, "gated": False, "disabled": False, "tags": []}
                self.answer(200, about | {"downloads": 0, "siblings": [{"rfilename": path} for path in files]})
            elif asked[0] == "tree":
                below = "".join(f"{folder}/" for folder in asked[2:])
                folders = {path.rpartition("/")[0] for path in files} - {""}
                entries += [{"type": "directory", "path": folder, "size": 0, "oid": COMMIT} for folder in folders]
                found = [entry for entry in entries if str(entry["path"]).startswith(below)]
                if "recursive=true" not in self.path.lower():
                    found = [entry for entry in found if "/" not in str(entry["path"]).removeprefix(below)]
                self.answer(200, found) if found else self.answer(404, {"error": "no such folder"}, _NO_ENTRY)
            elif asked[0] == "paths-info":
                wanted = (
                    json.loads(self.body)["paths"] if self.body[:1] == b"{" else parse_qs(self.body.decode())["paths"]
                )
                self.answer(200, [entry for entry in entries if entry["path"] in wanted])
            elif asked[0] == "resolve" and (content := files.get("/".join(asked[2:]))) is not None:
                self.answer(200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})
            else:
                self.answer(404, {"error": f"nothing at {path}"}, _NO_ENTRY)

        do_HEAD = do_GET
        body = b""

        def do_POST(self) -> None:
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.do_GET()

        def answer(self, status: int, body: object, headers: Mapping[str, str] = MappingProxyType({})) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/octet-stream" if body is content else "application/json")
            self.send_header("Content-Length", str(len(content)))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    return Handler


@contextmanager
def loopback_hub(datasets: dict[str, dict[str, bytes]]) -> Iterator[tuple[str, list[str]]]:
    """Serve datasets given as {"owner/name": {"train.jsonl": content}}; yields the address and the requests as they come."""
    requests: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(datasets, requests))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
