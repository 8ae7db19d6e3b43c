"""A hub of one repository on this machine: what its client says over HTTP to make a repository, upload files and commit."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml


class Hub:
    """What the hub knows.

    Attributes:
        name: of the repository; None until it is made.
        files: path -> content, as the last commit left them.
        stored: SHA-256 -> content of large files that were uploaded, committed or not.
        refused: SHA-256 of large files whose upload fails.
        uploads, commits: the SHA-256 of each upload; each commit's operations.
    """

    token = "hf_token"

    def __init__(self) -> None:
        self.name: str | None = None
        self.private = False
        self.files: dict[str, bytes] = {}
        self.stored: dict[str, bytes] = {}
        self.refused: set[str] = set()
        self.uploads: list[str] = []
        self.commits: list[list[dict[str, Any]]] = []
        self.requests = 0
        self.url = ""

    @contextmanager
    def served(self) -> Iterator[Hub]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield self
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status and content of an answer; None for an empty one."""
        if method == "PUT":
            digest = path.rpartition("/")[2]
            if digest in self.refused:
                return 403, {"error": "not now"}
            assert hashlib.sha256(body).hexdigest() == digest
            self.stored[digest] = body
            self.uploads.append(digest)
            return 200, None
        if path == "/api/repos/create":
            given = json.loads(body)
            self.name = f"{given['organization']}/{given['name']}"
            self.private = given.get("visibility") == "private" or given.get("private") is True
            self.files = {".gitattributes": b""}
            return 200, {"url": f"{self.url}/{self.name}"}
        if path == "/api/validate-yaml":
            head = yaml.safe_load(json.loads(body)["content"].split("---\n")[1]) if b"---" in body else {}
            return 200, {"warnings": [], "errors": [] if isinstance(head, dict) else [{"message": "no mapping"}]}
        if self.name is None or self.name not in path:
            return 404, {"error": "no such repository"}
        rest = path.partition(self.name)[2].partition("?")[0]
        routes = {"": self.info, "/preupload/main": self.modes, ".git/info/lfs/objects/batch": self.batch, "/commit/main": self.commit}  # fmt: skip
        return routes[rest](body)

    def info(self, body: bytes) -> tuple[int, Any]:
        siblings = [
            {"rfilename": path, "size": len(content), "blobId": git_id(content)} for path, content in self.files.items()
        ]
        return 200, {"id": self.name, "sha": f"{len(self.commits):040x}", "private": self.private, "siblings": siblings}

    def modes(self, body: bytes) -> tuple[int, Any]:
        files = [
            {"path": file["path"], "shouldIgnore": False,
             "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
            for file in json.loads(body)["files"]
        ]  # fmt: skip
        return 200, {"files": files}

    def batch(self, body: bytes) -> tuple[int, Any]:
        def entry(each: dict[str, Any]) -> dict[str, Any]:
            if each["oid"] in self.stored:
                return each
            return {**each, "actions": {"upload": {"href": f"{self.url}/lfs/{each['oid']}"}}}

        return 200, {"transfer": "basic", "objects": [entry(each) for each in json.loads(body)["objects"]]}

    def commit(self, body: bytes) -> tuple[int, Any]:
        lines = [json.loads(line) for line in body.splitlines()]
        parent = lines[0]["value"].get("parentCommit")
        assert parent in (None, f"{len(self.commits):040x}")
        for line in lines[1:]:
            value = line["value"]
            match line["key"]:
                case "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    self.files[value["path"]] = self.stored[value["oid"]]
                case "deletedFile":
                    del self.files[value["path"]]
        self.commits.append(lines[1:])
        oid = f"{len(self.commits):040x}"
        return 200, {"commitUrl": f"{self.url}/{self.name}/commit/{oid}", "commitOid": oid}


def git_id(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked" and not body:
            body = self.chunks()
        self.hub.requests += 1
        allowed = self.command == "PUT" or self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        status, content = self.hub.answer(self.command, self.path, body) if allowed else (401, {"error": "no token"})
        data = b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def chunks(self) -> bytes:
        parts = []
        while size := int(re.split(rb"[;\r]", self.rfile.readline())[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    do_GET = do_POST = do_PUT = handle_any

    def log_message(self, *args: Any) -> None:
        """Say nothing."""
