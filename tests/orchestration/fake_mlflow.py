"""A tracking server with the few REST calls that we make, and the ways in which real ones fail."""

from __future__ import annotations

import json
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse


class FakeMlflow:
    """`mode`: ok, 500, 503, 401, hang; `stop()` refuses connections, `start()` comes back on the same port."""

    def __init__(self, artifacts: Path) -> None:
        self.mode = "ok"
        self.requests = 0
        self.bodies: list[str] = []
        self.experiments: dict[str, str] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.metrics: list[dict[str, Any]] = []
        self.rejected_names: set[str] = set()
        self.rejected_calls: set[str] = set()
        self.release = threading.Event()
        self._artifacts = artifacts
        self._port = 0
        self.start()

    def start(self) -> None:
        """Listen (again)."""
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                fake.answer(self, {key: values[0] for key, values in parse_qs(urlparse(self.path).query).items()})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
                fake.bodies.append(body)
                fake.answer(self, json.loads(body or "{}"))

            def log_message(self, *_: Any) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._server.daemon_threads = True
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections from now on."""
        self.release.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def uri(self) -> str:
        """What to put into tracking.mlflow_uri."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def steps(self) -> list[int]:
        """Steps of `reward/mean`, in order of arrival."""
        return [metric["step"] for metric in self.metrics if metric["key"] == "reward/mean"]

    def answer(self, handler: BaseHTTPRequestHandler, arguments: dict[str, Any]) -> None:
        """Misbehave as told, or do what the real server does."""
        self.requests += 1
        if self.mode == "hang":
            self.release.wait(30)
            handler.close_connection = True
            return
        if self.mode != "ok":
            self._send(handler, int(self.mode), {"error_code": "INTERNAL_ERROR", "message": "as told"})
            return
        status, tree = self._call(urlparse(handler.path).path.partition("/mlflow/")[2], arguments)
        self._send(handler, status, tree)

    def _call(self, call: str, arguments: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if call in self.rejected_calls:
            return 400, {"error_code": "INVALID_PARAMETER_VALUE", "message": "deleted in the meantime"}
        match call:
            case "experiments/get-by-name":
                name = arguments["experiment_name"]
                if name not in self.experiments:
                    return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": name}
                return 200, {"experiment": {"experiment_id": self.experiments[name], "name": name}}
            case "experiments/create":
                self.experiments[arguments["name"]] = str(len(self.experiments) + 1)
                return 200, {"experiment_id": self.experiments[arguments["name"]]}
            case "runs/create":
                run = {"run_id": uuid.uuid4().hex, "params": {}, "status": "RUNNING"}
                run["tags"] = {tag["key"]: tag["value"] for tag in arguments.get("tags", [])}
                self.runs[run["run_id"]] = run
                return 200, {"run": self._describe(run)}
            case "runs/search":
                key = arguments["filter"].split("'")[1]
                found = [run for run in self.runs.values() if key in run["tags"].values()]
                return 200, {"runs": [self._describe(run) for run in found]}
            case "runs/log-batch":
                return self._log_batch(arguments)
        run = self.runs[arguments["run_id"]]
        if call == "runs/update":
            run["status"] = arguments.get("status", run["status"])
        elif call == "runs/set-tag":
            run["tags"][arguments["key"]] = arguments["value"]
        elif call == "runs/log-inputs":
            run["datasets"] = [given["dataset"]["name"] for given in arguments["datasets"]]
        elif call != "runs/get":
            return 404, {"error_code": "ENDPOINT_NOT_FOUND", "message": call}
        return 200, {"run": self._describe(run), "run_info": self._describe(run)["info"]}

    def _log_batch(self, arguments: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        metrics = arguments.get("metrics", [])
        if self.rejected_names & {metric["key"] for metric in metrics}:
            return 400, {"error_code": "INVALID_PARAMETER_VALUE", "message": "bad name"}
        self.metrics += metrics
        params = self.runs[arguments["run_id"]]["params"]
        params.update({param["key"]: param["value"] for param in arguments.get("params", [])})
        return 200, {}

    def _describe(self, run: dict[str, Any]) -> dict[str, Any]:
        return {
            "info": {
                "run_id": run["run_id"],
                "run_uuid": run["run_id"],
                "experiment_id": "1",
                "status": run["status"],
                "artifact_uri": (self._artifacts / run["run_id"]).as_uri(),
                "lifecycle_stage": "active",
            },
            "data": {
                "params": [{"key": key, "value": value} for key, value in run["params"].items()],
                "tags": [{"key": key, "value": value} for key, value in run["tags"].items()],
            },
        }

    @staticmethod
    def _send(handler: BaseHTTPRequestHandler, status: int, tree: dict[str, Any]) -> None:
        """As MLflow does: JSON, but plain text from its authentication layer."""
        data = b"You are not authenticated." if status == 401 else json.dumps(tree).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "text/html" if status == 401 else "application/json")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)
