"""A small Hub for the tests of uploads: what huggingface_hub asks of the real one to make, fill and read a model's repository."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_a_token_of_the_tests"
ANNA = {"name": "anna", "orgs": [{"name": "lab", "roleInOrg": "write"}, {"name": "library", "roleInOrg": "read"}]}


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict[str, bytes])
    card: dict[str, Any] = field(default_factory=dict[str, Any])  # what the Hub has read of its README's metadata
    commits: list[str] = field(default_factory=list[str])


@dataclass
class Hub:
    """`repositories` by name; `asked`, each request as "METHOD path"; `stored`, large files by checksum; `rights`, of the token."""

    rights: dict[str, Any] = field(default_factory=lambda: {"role": "write"})
    repositories: dict[str, Repository] = field(default_factory=dict[str, Repository])
    stored: dict[str, bytes] = field(default_factory=dict[str, bytes])
    asked: list[str] = field(default_factory=list[str])
    sent: int = 0  # bytes of large files
    faults: list[tuple[str, int | None, dict[str, str]]] = field(default_factory=list[tuple[str, int | None, dict[str, str]]])
    url: str = ""

    def fail(self, pattern: str, status: int | None, times: int = 1, **headers: str) -> None:
        """Answer the next `times` requests that match with this status, or with None cut the connection."""
        self.faults += [(pattern, status, {name.replace("_", "-"): value for name, value in headers.items()})] * times

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, line)) for line in self.asked)

    def large(self, name: str) -> bool:
        return name.endswith((".safetensors", ".png", ".wav"))


@contextmanager
def a_hub() -> Iterator[Hub]:
    """A Hub on a free port of this machine, while the block runs."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def reply(self, status: int, body: Any = None, **headers: str) -> None:
            content = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def handle_all(self) -> None:
            path = unquote(urlsplit(self.path).path)
            line = f"{self.command} {path}"
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            hub.asked.append(line)
            for i, (pattern, status, headers) in enumerate(hub.faults):
                if re.search(pattern, line):
                    del hub.faults[i]
                    if status is None:
                        self.close_connection = True
                        self.connection.close()
                        return
                    self.reply(status, {"error": f"a fault of {status}"}, **headers)
                    return
            if "/lfs/" not in path and path != "/api/validate-yaml" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.reply(401, {"error": "Invalid username or password."}, X_Error_Message="Invalid credentials in Authorization header")
                return
            answer(self, line, body)

        do_GET = do_POST = do_PUT = do_HEAD = handle_all

    def answer(handler: Handler, line: str, body: bytes) -> None:
        if line == "GET /api/whoami-v2":
            handler.reply(200, {"type": "user", **ANNA, "auth": {"type": "access_token", "accessToken": hub.rights}})
        elif line == "POST /api/repos/create":
            create(handler, json.loads(body))
        elif line == "POST /api/validate-yaml":
            handler.reply(200, {"errors": [], "warnings": []})
        elif match := re.fullmatch(r"PUT /lfs/(\w+)", line):
            assert hashlib.sha256(body).hexdigest() == match[1], "what has arrived is not what was announced"
            hub.stored[match[1]], hub.sent = body, hub.sent + len(body)
            handler.reply(200)
        elif match := re.fullmatch(r"POST /(\w+/[\w.-]+)\.git/info/lfs/objects/batch", line):
            objects = [{**each, **transfer(each["oid"])} for each in json.loads(body)["objects"]]
            handler.reply(200, {"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"\w+ (?:/api/models)?/(\w+/[\w.-]+?)(?:/(preupload|commit|revision|resolve)/[\w.-]+(?:/(.*))?)?", line):
            if match[1] not in hub.repositories:
                handler.reply(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            else:
                of_repository(handler, match[1], match[2], match[3], body)
        else:
            handler.reply(404, {"error": f"no such address: {line}"})

    def transfer(oid: str) -> dict[str, Any]:
        return {} if oid in hub.stored else {"actions": {"upload": {"href": f"{hub.url}/lfs/{oid}"}}}

    def create(handler: Handler, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        known = name in hub.repositories
        if not known:
            hub.repositories[name] = Repository(asked.get("visibility") == "private", {".gitattributes": b""})
        handler.reply(409 if known else 200, {"url": f"{hub.url}/{name}"})

    def of_repository(handler: Handler, name: str, what: str | None, path: str | None, body: bytes) -> None:
        repository = hub.repositories[name]
        sha = hashlib.sha1(repr(sorted(repository.files.items())).encode()).hexdigest()
        if what == "preupload":
            handler.reply(200, {"files": [known(repository, each["path"]) for each in json.loads(body)["files"]]})
        elif what == "commit":
            commit(repository, [json.loads(each) for each in body.splitlines()])
            handler.reply(200, {"commitUrl": f"{hub.url}/{name}/commit/{sha}", "commitOid": sha})
        elif what == "resolve":
            content = repository.files.get(path or "")
            if content is None:
                handler.reply(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
            else:
                handler.reply(200, content, ETag=f'"{git_hash(content)}"', X_Repo_Commit=sha)
        else:
            siblings = [{"rfilename": file} for file in repository.files]
            handler.reply(200, {"id": name, "sha": sha, "private": repository.private, "siblings": siblings, "cardData": repository.card})

    def known(repository: Repository, path: str) -> dict[str, Any]:
        content, large = repository.files.get(path), hub.large(path)
        oid = None if content is None else hashlib.sha256(content).hexdigest() if large else git_hash(content)
        return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def commit(repository: Repository, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repository.commits.append(value["summary"])
            elif line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = hub.stored[value["oid"]]
            else:
                assert line["key"] == "deletedFile"
                del repository.files[value["path"]]

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
