"""`softgrpo train`: start the pools, run the controller, leave a usable run directory whatever happens.

Exit codes: 0 done; 75 stopped, --resume goes on from a checkpoint or, where there was no step to keep, from the
beginning; 1 error; 2 configuration (raised as `ConfigError` before any actor starts).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any

from ray.exceptions import RayError

from learner.group import LearnerGroup
from learner.spec import LearnerError
from orchestration.alternation import AlternatingLearner
from orchestration.cli import EXIT_DONE, EXIT_ERROR, EXIT_STOPPED
from orchestration.cluster import connected, labelled_pools, reserve_learner
from orchestration.config import Config, ConfigError
from orchestration.controller import Controller
from orchestration.dataset import PromptStream, Visit, dataset_digest
from orchestration.draining import DrainWatcher, Resident, node_of, own_node
from orchestration.evaluate import TwoPools
from orchestration.failures import RunError, one_line
from orchestration.groups_log import GroupsLog
from orchestration.inference_pools import make_rollout_pool, make_verifier_pool
from orchestration.initial_model import with_end_of_thinking
from orchestration.logs import also_to, set_policy_version
from orchestration.metrics_export import MetricsExporter
from orchestration.mirror import FinalStatus
from orchestration.parts import Parts
from orchestration.plan import make_plan
from orchestration.progress import Progress
from orchestration.run_evaluation import RunEvaluation
from orchestration.run_state import RunDirectory, load_state
from orchestration.scale import follow_requests
from orchestration.step_metrics import StepMetrics
from orchestration.stopping import StopSignals, how_to_go_on
from orchestration.tracking import Tracker
from orchestration.trajectory_sample import save_sample
from orchestration.validate import Resolved, validate
from orchestration.watchdog import Watchdog
from rollout.full_store import StoreFull

logger = logging.getLogger(__name__)

DRAIN_SHARE = 0.8
"""Of the time until a node goes, for finishing the step and the checkpoint."""


def run_training(config: Config, *, resume: bool) -> int:
    """One attempt at a run; returns the exit code."""
    directory, signals = RunDirectory(config.run_dir), StopSignals()
    try:
        with signals.caught():
            return _run_attempt(config, directory, signals, resume=resume)
    except SystemExit:  # a signal before the pools were up
        if directory.is_run():
            logger.info("stopped before the first step; %s", how_to_go_on(directory))
            return EXIT_STOPPED
        logger.error("stopped before anything was started; run the same command again")
    except (RunError, OSError) as error:  # before the pools were up: there is nothing to save
        logger.error("the run cannot start: %s", error)
    return EXIT_ERROR


def _run_attempt(config: Config, directory: RunDirectory, signals: StopSignals, *, resume: bool) -> int:
    directory.check(resume=resume)  # before the lease makes the directory
    resolved = validate(config).require_complete()
    for warning in resolved.warnings:
        logger.warning("%s", warning)
    with directory.lease():
        directory.create(config, resume=resume)
        with also_to(directory.path / "driver.log"), connected(config):
            signals.install()
            resolved = with_end_of_thinking(resolved, directory.path / "initial_model")
            return asyncio.run(TrainingRun(resolved, directory, signals, resume=resume).run())


class TrainingRun:
    """Everything between a connected cluster and an exit code."""

    def __init__(self, resolved: Resolved, directory: RunDirectory, signals: StopSignals, *, resume: bool) -> None:
        assert resolved.train is not None
        self.signals = signals
        self.config = resolved.config
        self.directory = directory
        self.prompts = resolved.train
        self.evaluation_prompts = resolved.evaluation
        self.stream = PromptStream(self.prompts.rows, seed=self.config.seed)
        self.checkpoint = directory.resume_point() if resume else None
        self.state = load_state(self.checkpoint) if self.checkpoint else None
        self.backlog = self._restore_stream()
        self.plan = make_plan(resolved, initial_version=0, labelled=labelled_pools())
        self.tracker = Tracker.open(self.config, datasets=[_describe_dataset(resolved)], checkpoint=self.checkpoint)
        self.groups = GroupsLog(directory.path, attempt=self.tracker.attempt)
        directory.flush = self._flush
        self.exporter = MetricsExporter(self.config.name)
        self.watchdog = Watchdog()
        self.controller: Controller | None = None
        self.evaluation: RunEvaluation | None = None
        self.stopping = False
        self.started = time.monotonic()

    async def run(self) -> int:
        """Start, train, evaluate, stop; the tracker learns how it ended."""
        work = asyncio.create_task(self._work(), name="training run")
        self.watchdog.start(asyncio.get_running_loop())
        status: FinalStatus = "FAILED"
        with self.signals.asking(partial(self._stop, work, self.config.checkpoint.stop_grace_s)):
            try:
                status = await self._end_of(work)
            finally:
                self._close(status)
        if status != "FINISHED":
            logger.info("%s; %s", "stopped" if status == "KILLED" else "failed", how_to_go_on(self.directory))
        return {"FINISHED": EXIT_DONE, "KILLED": EXIT_STOPPED}.get(status, EXIT_ERROR)

    async def _end_of(self, work: asyncio.Task[None]) -> FinalStatus:
        try:
            await work
        except asyncio.CancelledError:
            if not self.stopping:
                raise
        except (RunError, LearnerError, StoreFull, RayError, OSError) as error:
            logger.error("%s", error, exc_info=isinstance(error, OSError | RayError))
            await self._save_what_is_left()
            return "FAILED"
        except ConfigError:
            raise
        except Exception:  # the end of the process: whatever it was belongs into the run's own log too
            logger.exception("the run ends with an error that nobody expected")
            return "FAILED"
        return "KILLED" if self.stopping else "FINISHED"

    def _close(self, status: FinalStatus) -> None:
        try:
            if self.evaluation is not None:
                self.evaluation.cancel()
            self._kill_pools()
        finally:
            self.groups.close()
            self.tracker.close(status)
            self.watchdog.stop()

    async def _work(self) -> None:
        await self._start()
        current = asyncio.current_task()
        assert current is not None
        drains = DrainWatcher(partial(self._residents, current))
        requests = follow_requests(self.directory.path, self.rollout.resize)
        beside = [
            _beside(drains.watch(), "watching for nodes that go", "none is noticed before it is gone"),
            _beside(requests, "softgrpo scale", "no request is heard any more; stop and resume to change the pool"),
        ]
        try:
            await self._train()
        finally:
            for task in beside:
                task.cancel()

    async def _train(self) -> None:
        self.evaluation = RunEvaluation(
            self.config,
            self.evaluation_prompts,
            TwoPools(self.rollout, self.verifier),
            self.directory,
            self.tracker.log,
            started=self.started,
        )
        if self.state is None:
            await self.evaluation.before()
        progress = Progress(self.config.name, self.state.step if self.state else 0, self.config.steps)
        self.progress = progress
        parts = Parts(
            stream=self.stream,
            prompt_ids=lambda visit: self.prompts.prompt_ids[visit.row.prompt_id],
            rollout=self.rollout,
            verifier=self.verifier,
            learner=AlternatingLearner(self.learner, self.rollout) if self.config.alternates else self.learner,
            directory=self.directory,
            after_step=self._after_step,
        )
        self.controller = Controller(self.config, parts, self.state, self.backlog)
        try:
            await self.controller.run()
        finally:
            progress.close()
        if not self.stopping:
            await self.rollout.synchronised(self.controller.publish_again)
            await self.evaluation.finish(self.controller.step)
            exported = self._fresh_directory("model")
            await self.learner.export(exported)
            self.tracker.register_model(exported)

    async def _start(self) -> None:
        """Bring up the three pools at once; a resumed policy reaches the rollout actors before they serve."""
        config = self.config
        self.learner = LearnerGroup(self.plan.learner, await reserve_learner(self.plan))
        if not config.alternates:
            self.rollout = make_rollout_pool(config, self.plan, self.learner)
        self.verifier = make_verifier_pool(config, self.plan)
        checkpoint = self.checkpoint / "learner" if self.checkpoint else None
        await self.learner.start(checkpoint)
        if config.alternates:  # an engine takes what others on its GPU allocate while it starts for its own use
            self.rollout = make_rollout_pool(config, self.plan, self.learner)
        if self.state is not None:
            await self.rollout.publish(await self.learner.publish(self.state.version))
        await asyncio.gather(self.rollout.start(), self.verifier.start())
        logger.info(
            "ready after %.0f s: %d rollout, %d verifier actors, %d learner ranks",
            time.monotonic() - self.started,
            config.rollout.num_actors,
            config.reward.num_actors,
            config.learner.world_size,
        )

    def _restore_stream(self) -> list[Visit]:
        if self.state is None:
            return []
        self.stream.restore(self.state.stream)
        rows = {row.prompt_id: row for row in self.prompts.rows}
        return [Visit(rows[prompt_id], visit) for prompt_id, visit in self.state.pending]

    async def _after_step(self, step: int, version: int, metrics: StepMetrics) -> None:
        set_policy_version(version)
        self.groups.append(step, version, [group.visit.group_id for group in metrics.groups])
        values = metrics.values | {"sync/version": version, **self._pool_metrics()}
        self.tracker.log(values, step)
        self.exporter.export(values)
        self.progress.advance(step, values)
        if self.evaluation is not None:
            self.evaluation.after_step(step)
        every = self.config.tracking.trajectories_every
        if every and step % every == 0:
            await self._save_sample(metrics, step)

    async def _save_sample(self, metrics: StepMetrics, step: int) -> None:
        """A group of this step for people to read; one that cannot be had costs a warning, never a step."""
        path = self.directory.path / "trajectories" / f"step_{step:06d}.parquet"
        try:
            await asyncio.to_thread(save_sample, metrics.groups[0], path)
        except (RayError, OSError) as error:
            logger.warning("no trajectories of step %d: %s", step, str(error).splitlines()[0])
            return
        self.tracker.artifact(path, "trajectories")

    def _pool_metrics(self) -> dict[str, float]:
        metrics: dict[str, float] = {
            "failures/stall_reports": self.watchdog.num_reports,
            "failures/learner_restarts": self.learner.generation - 1,
        }
        for pool in (self.rollout, self.verifier):
            metrics[f"pool/{pool.name}_actors"] = sum(member.ready for member in pool.members)
            metrics[f"idle/{pool.name}"] = pool.take_idle_share()
            counts = {"restarts": 0} | pool.counts
            metrics |= {f"failures/{pool.name}_{name.replace('/', '_')}": n for name, n in counts.items()}
        if reports := self.rollout.take_sync_reports():
            metrics["sync/fetch_s"] = max(report["fetch_s"] for report in reports)
            metrics["sync/pause_s"] = max(report["pause_s"] for report in reports)
            metrics["sync/bytes"] = sum(report["num_bytes"] for report in reports)
        return metrics

    def _flush(self) -> None:
        """What a checkpoint's copies refer to; on the thread that commits it."""
        self.tracker.flush()
        self.groups.sync()

    def _stop(self, work: asyncio.Task[None], grace_s: float) -> None:
        """Finish the step in progress and checkpoint, in the grace time; asked twice, or before the first: stop now."""
        if self.stopping or self.controller is None:
            self.stopping = True
            work.cancel()
            return
        logger.info("stopping: finishing the step (at most %.0f s)", grace_s)
        self.stopping = True
        self.controller.request_stop()
        asyncio.get_running_loop().call_later(grace_s, work.cancel)

    def _residents(self, work: asyncio.Task[None]) -> list[Resident]:
        """What must act when its node is about to go: driver and learner stop the run, pool members move."""

        def stop(seconds: float) -> None:
            if not self.stopping:
                self._stop(work, min(self.config.checkpoint.stop_grace_s, seconds * DRAIN_SHARE))

        places: list[tuple[str, str | None, Callable[[float], None]]] = [("the driver", own_node(), stop)]
        places += [(f"learner rank {rank}", node_of(actor), stop) for rank, actor in enumerate(self.learner.ranks)]
        for pool in (self.rollout, self.verifier):
            for member in pool.members:
                move = partial(pool.retire, member)
                places.append((f"{pool.name} actor {member.index}", node_of(member.actor), move))
        return [Resident(name, node, leave) for name, node, leave in places if node is not None]

    async def _save_what_is_left(self) -> None:
        """After an error outside the learner its state is still good: keep it."""
        if self.controller is None or not self.learner.alive:
            return
        if self.controller.slots.training:
            logger.error("no checkpoint at the end: the learner is in the middle of a step that has no version yet")
            return
        self.controller.request_stop()
        try:
            async with asyncio.timeout(self.config.checkpoint.stop_grace_s):
                await self.controller.checkpoint()
        except (LearnerError, RunError, TimeoutError) as error:
            logger.error("no checkpoint at the end: %s", error)

    def _kill_pools(self) -> None:
        for name in ("rollout", "verifier", "learner"):
            if pool := getattr(self, name, None):
                try:
                    pool.kill()
                except Exception:  # Ray is gone, and its actors go with it: no reason to end otherwise than decided
                    logger.exception("%s: its actors cannot be killed", name)

    def _fresh_directory(self, name: str) -> Path:
        path = self.directory.path / name
        path.mkdir(exist_ok=True)
        return path


def _beside(work: Coroutine[Any, Any, None], name: str, lost: str) -> asyncio.Task[None]:
    """A convenience beside training: should it die, the run goes on and its log says what is `lost`."""

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s ended with %s: %s", name, one_line(error), lost, exc_info=error)

    task = asyncio.create_task(work, name=name)
    task.add_done_callback(ended)
    return task


def _describe_dataset(resolved: Resolved) -> tuple[str, str, str]:
    assert resolved.train is not None
    return resolved.train.name, dataset_digest(resolved.train.rows), resolved.config.data.train.path
