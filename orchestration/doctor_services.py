"""What `softgrpo doctor` says about everything that answers on a port: Ray's head and token, the tracking server."""

from __future__ import annotations

import base64
import http.client
import json
import os
import socket
import stat
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from orchestration.finding import Finding
from orchestration.machine import installed_version
from orchestration.redaction import redact_text

PROBE_DEADLINE_S = 5.0


def check_ports(ports: Sequence[int]) -> Iterator[Finding]:
    """Ports of a head started by hand; a local run takes free ones and does not care."""
    taken = [port for port in ports if _listens(port)]
    if taken:
        fix = "only for `ray start --head`: stop the other cluster, or choose --port and --dashboard-port"
        yield Finding("ports", "warn", f"{', '.join(map(str, taken))} in use", fix)
    else:
        yield Finding("ports", "ok", f"{', '.join(map(str, ports))} free")


def check_ray_authentication() -> Iterator[Finding]:
    """Whoever reaches a Ray cluster without a token can run code on it."""
    mode = os.environ.get("RAY_AUTH_MODE", "")
    given = os.environ.get("RAY_AUTH_TOKEN_PATH")
    token = Path(given) if given else Path.home() / ".ray" / "auth_token"
    if mode == "disabled":
        fix = "unset RAY_AUTH_MODE: local runs then make a token of their own"
        yield Finding("ray token", "warn", "RAY_AUTH_MODE=disabled: anyone on the network may use the cluster", fix)
    elif os.environ.get("RAY_AUTH_TOKEN"):
        fix = "put it into a file (mode 600) and set RAY_AUTH_TOKEN_PATH: variables are visible to every child"
        yield Finding("ray token", "warn", "in RAY_AUTH_TOKEN", fix)
    elif token.is_file():
        open_to = token.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)
        fix = f"chmod 600 {token}"
        yield Finding("ray token", "warn" if open_to else "ok", f"{token}", fix if open_to else "")
    elif given:
        fix = f"write the cluster's token to {token}, or unset RAY_AUTH_TOKEN_PATH"
        yield Finding("ray token", "fail", f"RAY_AUTH_TOKEN_PATH={given} does not exist", fix)
    else:
        yield Finding("ray token", "ok", "none yet; a local run makes one")


def check_head(address: str | None) -> Iterator[Finding]:
    """A running head, where one is named: reachable, same Ray, token accepted."""
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if not address:
        return
    status, body = _get(f"{address.rstrip('/')}/api/version", _bearer())
    if status in (401, 403):
        fix = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a file with that cluster's token"
        yield Finding("ray head", "fail", f"{address} refuses the token ({status})", fix)
    elif status != 200:
        fix = "start it (`ray start --head`) or forward its port (`kubectl port-forward`)"
        yield Finding("ray head", "fail", f"{address} does not answer: {body}", fix)
    else:
        theirs, ours = _json_field(body, "ray_version"), installed_version("ray")
        same = theirs == ours
        fix = f"install ray=={theirs} here, or use an image with ray=={ours}"
        yield Finding(
            "ray head", "ok" if same else "fail", f"{address}: ray {theirs}, here {ours}", "" if same else fix
        )


def check_mlflow(uri: str | None) -> Iterator[Finding]:
    """The tracking store. A dead server costs a run nothing but lag, so it is a warning."""
    shown = redact_text(uri or "")
    try:
        parts = urlsplit(uri or "")
    except ValueError as error:
        yield Finding("mlflow", "fail", f"{shown}: {error}", "correct MLFLOW_TRACKING_URI, or --mlflow")
        return
    if not uri:
        yield Finding("mlflow", "ok", "sqlite beside the run directory")
    elif parts.scheme in ("http", "https"):
        status, body = _get(f"{_without_credentials(uri)}/health", _basic(parts.username, parts.password))
        if status == 200:
            yield Finding("mlflow", "ok", f"{shown} answers")
        elif status in (401, 403):
            fix = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            yield Finding("mlflow", "warn", f"{shown} wants credentials ({status})", fix)
        else:
            fix = (
                "start the server or correct MLFLOW_TRACKING_URI; the run goes on without it and sends everything later"
            )
            yield Finding("mlflow", "warn", f"{shown}: {body or status}", fix)
    elif parts.scheme == "sqlite":
        directory = Path(parts.path.removeprefix("/")).absolute().parent
        writable = directory.is_dir() and os.access(directory, os.W_OK)
        fix = "" if writable else f"create {directory}"
        yield Finding("mlflow", "ok" if writable else "fail", shown, fix)
    elif parts.scheme in ("", "file"):
        fix = "use sqlite:///path/mlflow.db or a server: this MLflow refuses file stores"
        yield Finding("mlflow", "fail", f"{shown} is a file store", fix)
    else:
        yield Finding("mlflow", "ok", f"{shown} (not checked)")


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=0.5).close()
    except OSError:
        return False
    return True


def _bearer() -> dict[str, str]:
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    if not token and path.is_file() and os.access(path, os.R_OK):
        token = path.read_text(encoding="utf-8", errors="replace").strip()
    return {"Authorization": f"Bearer {token}"} if token else {}


def _basic(user: str | None, password: str | None) -> dict[str, str]:
    user = user or os.environ.get("MLFLOW_TRACKING_USERNAME")
    password = password or os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
    token = base64.b64encode(f"{user}:{password}".encode()).decode()
    return {"Authorization": f"Basic {token}"} if user else {}


def _without_credentials(uri: str) -> str:
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")


def _get(url: str, headers: dict[str, str]) -> tuple[int, str]:
    """(status, body); (0, reason) where nobody answers within the deadline."""
    try:
        if urlsplit(url).scheme not in ("http", "https"):
            return 0, "not an http address"
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(request, timeout=PROBE_DEADLINE_S) as answer:
            return answer.status, answer.read(65536).decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, str(error.reason)
    except (OSError, ValueError, http.client.HTTPException) as error:
        return 0, str(error)


def _json_field(body: str, name: str) -> str | None:
    try:
        tree = json.loads(body)
    except ValueError:
        return None
    return tree.get(name) if isinstance(tree, dict) else None
