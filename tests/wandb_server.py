"""A stand-in for a W&B server on this machine: answers what the client asks of it, and remembers what it was told."""

import base64
import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

ENTITY = "me"


@dataclass
class ServerRun:
    """What the server knows of a run.

    Attributes:
        config: Nested; W&B's own entries are under ``_wandb``.
        starts: How often a process began it.
    """

    name: str = ""
    group: str = ""
    tags: list[str] = field(default_factory=list)
    sweep: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    preempting: bool = False
    exit_code: int | None = None
    starts: int = 0
    told: list[str] = field(default_factory=list)  # ``config`` and ``rows``, in order


@dataclass
class Server:
    """The server, while it runs.

    Attributes:
        runs: By identifier.
        manifests: Of artifacts that were committed, in order: the reference of each file.
        sweep: The configuration of the sweep, as its YAML says, and the commands that its agent is to get.
        unknown: Operations that it could not answer.
    """

    url: str = ""
    runs: dict[str, ServerRun] = field(default_factory=dict)
    manifests: list[dict[str, str]] = field(default_factory=list)
    sweep: dict[str, Any] = field(default_factory=dict)
    commands: list[dict[str, Any]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Answers a GraphQL request."""
        name = re.search(r"(?:query|mutation)\s+(\w+)", query)
        method = getattr(self, f"_{name[1]}", None) if name else None
        if method is None:
            self.unknown.append(name[0] if name else query)
            return {}
        return method(variables)

    def stream(self, run: ServerRun, told: dict[str, Any]) -> None:
        """Takes what a client streams: rows of metrics, summaries, and how the run ended."""
        for file, chunk in (told.get("files") or {}).items():
            if file == "wandb-history.jsonl":
                del run.rows[chunk["offset"] :]
                run.rows += [json.loads(line) for line in chunk["content"]]
                run.told.append("rows")
            if file == "wandb-summary.json":
                run.summary = json.loads(chunk["content"][-1])
        run.preempting |= told.get("preempting", False)
        if told.get("complete"):
            run.exit_code = told["exitcode"]

    def _Viewer(self, _: Any) -> dict[str, Any]:
        return {"viewer": {"id": "v", "entity": ENTITY, "username": ENTITY, "flags": "{}", "teams": {"edges": []}}}

    def _OrganizationCoreWeaveOrganizationID(self, _: Any) -> dict[str, Any]:
        return {"entity": {"organization": None}}

    def _ServerFeaturesQuery(self, _: Any) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _RunResumeStatus(self, asked: Any) -> dict[str, Any]:
        run = self.runs.get(asked["name"])
        bucket = run and {
            "id": _id(asked["name"]),
            "name": asked["name"],
            "displayName": run.name,
            "summaryMetrics": json.dumps(run.summary),
            "logLineCount": 0,
            "historyLineCount": len(run.rows),
            "eventsLineCount": 0,
            "historyTail": json.dumps([json.dumps(row) for row in run.rows[-1:]]),
            "eventsTail": "[]",
            "config": json.dumps({key: {"value": value} for key, value in run.config.items()}),
            "tags": run.tags,
            "notes": None,
            "wandbConfig": "{}",
        }
        return {"model": {"id": "m", "name": "tedlab", "entity": {"id": "e", "name": ENTITY}, "bucket": bucket}}

    def _UpsertBucket(self, told: Any) -> dict[str, Any]:
        name = told["name"] or base64.b64decode(told["id"]).decode()
        new = name not in self.runs
        run = self.runs.setdefault(name, ServerRun())
        if told["host"]:
            run.starts += told["id"] is None
        if told["displayName"]:
            run.name, run.group, run.tags, run.sweep = (
                told[key] for key in ("displayName", "groupName", "tags", "sweep")
            )
        config = {key: entry["value"] for key, entry in json.loads(told["config"] or "{}").items()}
        if config.keys() - {"_wandb"} and config != run.config:
            run.told.append("config")
        run.config |= config
        bucket = {
            "id": _id(name),
            "name": name,
            "displayName": run.name,
            "sweepName": run.sweep,
            "project": {"id": "p", "name": "tedlab", "entity": {"id": "e", "name": ENTITY}},
            "historyLineCount": len(run.rows),
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": new}}

    def _ArtifactType(self, _: Any) -> dict[str, Any]:
        return {"project": {"artifact": None}}

    def _CreateArtifact(self, _: Any) -> dict[str, Any]:
        artifact = {"id": "QQ==", "state": "PENDING", "artifactSequence": {"id": "s", "latestArtifact": None}}
        return {"createArtifact": {"artifact": artifact}}

    def _CreateArtifactManifest(self, _: Any) -> dict[str, Any]:
        return {"createArtifactManifest": {"artifactManifest": {"id": "TQ==", "file": self._file("manifest")}}}

    def _CreateArtifactFiles(self, told: Any) -> dict[str, Any]:
        files = [self._file(file["name"]) for file in told.get("artifactFiles") or told["input"]["artifactFiles"]]
        return {"createArtifactFiles": {"files": {"edges": [{"node": file} for file in files]}}}

    def _CommitArtifact(self, _: Any) -> dict[str, Any]:
        return {"commitArtifact": {"artifact": {"id": "QQ==", "digest": "d"}}}

    def _CreateRunFiles(self, told: Any) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in told["files"]]
        return {"createRunFiles": {"runID": _id(told["run"]), "uploadHeaders": [], "files": files}}

    def _UpsertSweep(self, told: Any) -> dict[str, Any]:
        self.sweep = told
        project = {"id": "p", "name": told["projectName"], "entity": {"id": "e", "name": ENTITY}}
        sweep = {"id": "S", "name": "abcd1234", "project": project}
        return {"upsertSweep": {"sweep": sweep, "configValidationWarnings": []}}

    def _SweepWithRuns(self, _: Any) -> dict[str, Any]:
        sweep = {"id": "S", "name": "abcd1234", "config": self.sweep["config"], "runs": {"edges": []}}
        return {"project": {"sweep": sweep}}

    def _CreateAgent(self, _: Any) -> dict[str, Any]:
        return {"createAgent": {"agent": {"id": "agent"}}}

    def _Heartbeat(self, told: Any) -> dict[str, Any]:
        running = any(json.loads(told["runState"]).values())
        given = [] if running else [self.commands.pop(0) if self.commands else {"type": "exit"}]
        return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(given)}}

    def _file(self, name: str) -> dict[str, Any]:
        return {
            "id": "f",
            "name": name,
            "displayName": name,
            "storagePath": name,
            "uploadUrl": f"{self.url}/upload/{name}",
            "uploadHeaders": [],
            "uploadMultipartUrls": None,
            "artifact": {"id": "QQ=="},
        }


@contextmanager
def wandb_server() -> Iterator[Server]:
    """Runs a server on a free port."""
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self._body()
            answer: dict[str, Any] = {}
            with server.lock:
                if self.path == "/graphql":
                    asked = json.loads(body)
                    answer = {"data": server.answer(asked["query"], asked.get("variables") or {})}
                elif match := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
                    server.stream(server.runs[match[1]], json.loads(body))
                elif unquote(self.path) == "/upload/manifest":
                    entries = json.loads(body)["contents"]
                    server.manifests.append({name: entry["ref"] for name, entry in entries.items() if "ref" in entry})
            content = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_PUT = do_GET = do_POST

        def _body(self) -> bytes:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        server.url = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()


def _id(name: str) -> str:
    return base64.b64encode(name.encode()).decode()
