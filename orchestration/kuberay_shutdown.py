"""How long everything may take when a run is stopped on Kubernetes: derived for `render`, checked for `validate`.

    the job is stopped   SIGTERM to the driver --job stop wait--> SIGKILL
    a worker pod goes    drain (actors work on) -> end                          --pod grace--> SIGKILL
    the head pod goes    preStop: stop the jobs and wait -> drain -> end        --pod grace--> SIGKILL

Workers outlive the driver's last checkpoint: pod grace > drain > job stop wait. The head stops the jobs before it
drains: pod grace > preStop + drain, and preStop > job stop wait.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from orchestration.config import Config
from orchestration.kuberay_manifest import Manifest, environment, pods, ray_container, runtime_environment
from orchestration.kuberay_schema import Problem

DRAIN_VARIABLE = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
STOP_WAIT_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
STOP_SCRIPT = "stop_jobs.py"
RAY_DRAIN_S = 30
"""Ray's own drain, where the variable is not set."""
MIN_STOP_WAIT_S = 60
HEAD_DRAIN_S = 30


@dataclass(frozen=True)
class ShutdownDeadlines:
    """Seconds, in the order in which they must end."""

    job_stop_wait_s: int
    head_stop_s: int
    """What the head's preStop may take: the job's stop wait and a margin."""
    worker_drain_s: int
    pod_grace_s: int


def job_stop_wait_s(config: Config) -> int:
    """From a job's stop signal to its end by force: the last checkpoint, then tracking and actors need a moment."""
    return max(MIN_STOP_WAIT_S, int(config.checkpoint.stop_grace_s) + 30)


def shutdown_deadlines(config: Config) -> ShutdownDeadlines:
    """60, 75, 90 and 120 s, or in proportion to a longer `checkpoint.stop_grace_s`."""
    wait = job_stop_wait_s(config)
    return ShutdownDeadlines(wait, wait + 15, wait * 3 // 2, wait * 2)


def shutdown_deadlines_are_ordered(manifest: Manifest) -> Iterator[Problem]:
    """Otherwise a pod is killed while the last checkpoint is written."""
    stop_wait = _stop_wait_s(manifest)
    for path, pod in pods(manifest):
        grace = pod.get("terminationGracePeriodSeconds")
        if grace is None:
            yield Problem(f"{path}.terminationGracePeriodSeconds", "30 s by default; 120 leaves time to checkpoint")
            continue
        drain = _seconds(environment(pod).get(DRAIN_VARIABLE, str(RAY_DRAIN_S)))
        stop = _pre_stop_s(pod)
        if stop is None:
            yield from _worker_order(path, grace, drain, stop_wait)
        else:
            yield from _head_order(path, grace, drain, stop, stop_wait)


def _worker_order(path: str, grace: int, drain: int | None, stop_wait: int | None) -> Iterator[Problem]:
    if drain is not None and drain >= grace:
        yield Problem(f"{path}.terminationGracePeriodSeconds", f"{grace} s end before the drain of {drain} s")
    if stop_wait is None:
        return
    if drain is not None and drain <= stop_wait:
        yield Problem(
            f"{path}.containers[0].env",
            f"the drain of {drain} s ends before the stop wait of {stop_wait} s; set {DRAIN_VARIABLE} above it",
        )
    if grace <= stop_wait:
        yield Problem(f"{path}.terminationGracePeriodSeconds", f"{grace} s end before the stop wait of {stop_wait} s")


def _head_order(path: str, grace: int, drain: int | None, stop: int, stop_wait: int | None) -> Iterator[Problem]:
    if grace <= stop + (drain or 0):
        yield Problem(
            f"{path}.terminationGracePeriodSeconds",
            f"{grace} s end before the preStop of {stop} s and the drain of {drain or 0} s",
        )
    if stop_wait is not None and stop <= stop_wait:
        yield Problem(
            f"{path}.containers[0].lifecycle.preStop",
            f"its {stop} s end before the stop wait of {stop_wait} s; give {STOP_SCRIPT} more",
        )


def _pre_stop_s(pod: Manifest) -> int | None:
    """What the preStop hook of `render` is given; None where the pod has none, or another."""
    hook = ((ray_container(pod).get("lifecycle") or {}).get("preStop") or {}).get("exec") or {}
    command = hook.get("command") or []
    ours = len(command) > 1 and any(word.endswith(STOP_SCRIPT) for word in command)
    return _seconds(command[-1]) if ours else None


def _stop_wait_s(manifest: Manifest) -> int | None:
    try:
        variables = runtime_environment(manifest).get("env_vars") or {}
    except ValueError:
        return None  # a problem of its own
    return _seconds(variables.get(STOP_WAIT_VARIABLE))


def _seconds(value: object) -> int | None:
    return int(str(value)) if str(value).isdecimal() else None
