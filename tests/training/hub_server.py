"""A small Hub on this machine: repositories of small files, by the calls that huggingface_hub makes."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WRITER = "hf_test"
"""The one token that may write."""


class HubServer(ThreadingHTTPServer):
    """Remembers what was asked for and which files were committed."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.calls: list[str] = []
        self.repositories: list[dict[str, Any]] = []
        self.files: list[tuple[str, bytes]] = []
        """Path in the repository and content, commit by commit."""
        self.seconds = 0.0
        """How long a commit takes."""
        self.failing: set[int] = set()
        """Numbers of the commits, from 0, that are refused."""

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def do_GET(self) -> None:
        """Nothing is to be read."""
        self.server.calls.append(f"GET {self.path}")
        self._answer(404, {"error": "Repository not found"})

    def do_POST(self) -> None:
        """Make a repository, say how files are to be sent, or take them."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.calls.append(f"POST {self.path}")
        if self.headers.get("Authorization") != f"Bearer {WRITER}":
            self._answer(401, {"error": "Invalid username or password."})
        elif self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        elif "/commit/" in self.path:
            self._commit([json.loads(line) for line in body.splitlines()])
        else:
            self._answer(404, {"error": "Not found"})

    def _create(self, wanted: dict[str, Any]) -> None:
        url = f"{self.server.url}/{wanted['organization']}/{wanted['name']}"
        is_new = not self.server.repositories
        self.server.repositories.append(wanted)
        self._answer(200 if is_new else 409, {"url": url})

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        time.sleep(self.server.seconds)
        number = sum("/commit/" in call for call in self.server.calls) - 1
        if number in self.server.failing:
            self._answer(400, {"error": "No space left for you"})
            return
        for line in lines:
            if line["key"] == "file":
                self.server.files.append((line["value"]["path"], base64.b64decode(line["value"]["content"])))
        commit = "a" * 40
        repository = self.path.removeprefix("/api/").removeprefix("models/").partition("/commit/")[0]
        url = f"{self.server.url}/{repository}/commit/{commit}"
        self._answer(200, {"commitUrl": url, "commitOid": commit, "success": True})

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if "error" in content:
            self.send_header("X-Error-Message", content["error"])
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Be silent."""


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """A server that runs in a thread."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
