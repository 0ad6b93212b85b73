"""The real controller on a simulated clock: rollout, verifier and learner are replaced by their durations.

For what depends on scheduling alone (staleness, conservation under faults, the share of the ideal rate); anything about
the parts themselves is tested with the real ones.
"""

from __future__ import annotations

import asyncio
import math
import random
import selectors
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from learner.spec import BatchesLost, LearnerError, PublishedWeights
from orchestration.config import Config, parse_config
from orchestration.controller import Controller
from orchestration.dataset import PromptRow, PromptStream, Visit
from orchestration.failures import ActorLost, GroupFailed
from orchestration.parts import Parts
from orchestration.rollout_pool import ROOM_PER_SEAT, Reservation
from orchestration.run_state import RunDirectory, RunState, load_state
from orchestration.step_metrics import StepMetrics
from reward.verdict import Grade, Verdict
from rollout.request import GroupSummary, RolloutRequest
from rollout.weights import WeightManifest

FETCH_S = 20.0
"""Until a learner knows that a batch is lost: Ray's health check of the node that had it."""


MAX_S = 10**5
"""Simulated seconds of a run that will never end."""


class Killed(Exception):
    """The driver's process is gone."""


class SimulatedLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer instead of waiting, and that may be killed at any turn."""

    def __init__(self, killed_at: int | None = None) -> None:
        self.now, self.turns, self.killed_at = 0.0, 0, killed_at
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self.now

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        """At once: what a thread does takes no simulated time."""
        done = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:
            done.set_exception(error)
        return done


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self, loop: SimulatedLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list:
        """Between two turns, outside of every callback: an exception from here ends the loop and unwinds nothing."""
        self._loop.turns += 1
        if self._loop.turns == self._loop.killed_at:
            raise Killed
        ready = super().select(0)
        if not ready and timeout:
            self._loop.now += timeout
            assert self._loop.now < MAX_S, "the run hangs"
        return ready


@dataclass
class SimulatedActor:
    """A continuous-batching engine: every running response advances one token per step."""

    index: int
    seats: asyncio.Semaphore
    """Responses that decode together; the rest queue in the engine."""
    version: int = 0
    in_flight: int = 0
    running: int = 0


@dataclass
class Timing:
    """Durations in seconds; lengths are log-normal (sigma, mean, cap in tokens)."""

    sigma: float = 0.8
    mean_length: int = 400
    cap: int = 1600
    base_step_s: float = 0.006
    step_per_response_s: float = 0.00004
    train_s: float = 10.0
    publish_s: float = 0.0
    save_s: float = 0.0
    sync_s: float = 0.05
    restart_s: float = 25.0

    def draw_length(self, rng: random.Random) -> int:
        mu = math.log(self.mean_length) - self.sigma**2 / 2
        return max(1, min(self.cap, round(rng.lognormvariate(mu, self.sigma))))


class SimulatedRollout:
    """Rollout pool: lengths from a distribution, tokens at the engine's rate, weights after a delay."""

    def __init__(self, actors: int, slots_per_actor: int, timing: Timing, rng: random.Random) -> None:
        self.changed = asyncio.Event()
        self.weights_lost = False
        self.loses_weights: Callable[[int], bool] = lambda version: False
        """Whether a published version's bytes go before any actor has them."""
        self.actors = [SimulatedActor(index, asyncio.Semaphore(slots_per_actor)) for index in range(actors)]
        self.max_in_flight, self.timing, self.rng = ROOM_PER_SEAT * slots_per_actor, timing, rng
        self.lose: Callable[[str], bool] = lambda group_id: False
        self.refuse: Callable[[str], bool] = lambda group_id: False
        """Whether no actor can ever generate this group."""
        self.oldest: dict[str, int] = {}
        """Version of the actor that started a group, by group id."""
        self.running: set[tuple[int, str]] = set()
        """Actor and group, until a cancelled group's actor has heard of it."""
        self.busy_seats_s = 0.0
        self.given_up: dict[str, tuple[Any, ...]] = {}
        """Why groups were cancelled while they were generated, by group id."""

    def raise_if_broken(self) -> None:
        return

    def reserve(self, size: int, accepts_version: Callable[[int], bool]) -> Reservation | None:
        free = [a for a in self.actors if a.in_flight < self.max_in_flight and accepts_version(a.version)]
        actor = min(free, key=lambda actor: (actor.in_flight, actor.index), default=None)
        if actor is None:
            return None
        actor.in_flight += size
        return Reservation(actor, actor.version, size)

    async def generate(self, room: Reservation, requests: Sequence[RolloutRequest]) -> tuple[Any, GroupSummary]:
        member, started = room.member, room.member.version
        self.oldest[requests[0].group_id] = started
        running = (member.index, requests[0].group_id)
        if running in self.running:
            raise GroupFailed("an engine refuses requests whose ids it has already")
        self.running.add(running)
        try:
            if self.refuse(requests[0].group_id):
                raise GroupFailed("simulated")
            lengths = [self.timing.draw_length(self.rng) for _ in requests]
            await asyncio.gather(*(self._decode(member, length) for length in lengths))
            if self.lose(requests[0].group_id):
                raise ActorLost("simulated")
        except asyncio.CancelledError as cancelled:
            self.given_up[requests[0].group_id] = cancelled.args
            raise
        finally:
            self.running.discard(running)
            room.release()
            self.changed.set()
        summary = GroupSummary(
            group_id=requests[0].group_id,
            request_ids=tuple(request.request_id for request in requests),
            lengths=tuple(lengths),
            soft_lengths=tuple(lengths),
            oldest_version=started,
            newest_version=member.version,
            num_truncated=0,
            entropy=0.5,
            top_weight=0.9,
            seconds=1.0,
        )
        return requests[0].group_id, summary

    async def _decode(self, member: SimulatedActor, tokens: int) -> None:
        """One response, at a rate that follows the engine's load (ten looks are enough)."""
        async with member.seats:
            member.running += 1
            started = asyncio.get_running_loop().time()
            try:
                for _ in range(10):
                    step_s = self.timing.base_step_s + self.timing.step_per_response_s * member.running
                    await asyncio.sleep(tokens / 10 * step_s)
            finally:
                member.running -= 1
                self.busy_seats_s += asyncio.get_running_loop().time() - started

    async def publish(self, weights: PublishedWeights) -> None:
        self.weights_lost = self.loses_weights(weights.manifest.version)
        if self.weights_lost:
            return
        for actor in self.actors:
            asyncio.get_running_loop().call_later(self.timing.sync_s, self._swap, actor, weights.manifest.version)

    def _swap(self, actor: SimulatedActor, version: int) -> None:
        actor.version = max(actor.version, version)
        self.changed.set()


@dataclass
class SimulatedVerifier:
    """Every other answer is right; `breaks` says which groups' graders die."""

    breaks: Callable[[str], bool] = lambda group_id: False

    def raise_if_broken(self) -> None:
        return

    async def score(self, batch: Any, gold: Any, rule: str) -> list[Grade]:
        await asyncio.sleep(0.01)
        if self.breaks(batch):
            return [Grade(Verdict.CRASH, 0.0, detail="segmentation fault")] * 2
        return [Grade(Verdict.CORRECT, 1.0), Grade(Verdict.INCORRECT, 0.0)]


@dataclass
class SimulatedLearner:
    """Takes `train_s` for a step; remembers what it trained, saves and restores that."""

    timing: Timing
    trained: list[str] = field(default_factory=list)
    busy_s: float = 0.0
    die: Callable[[str], bool] = lambda phase: False
    """Asked at the end of a phase: train, publish, save."""
    gone: Callable[[str], bool] = lambda group_id: False
    """Whether this group's batch was lost with its node."""

    async def train(self, groups: Sequence[Any], step: int) -> dict[str, float]:
        if lost := [group.group_id for group in groups if self.gone(group.group_id)]:
            await asyncio.sleep(FETCH_S)
            raise BatchesLost(lost)
        await asyncio.sleep(self.timing.train_s)
        self._live_through("train")
        self.busy_s += self.timing.train_s
        self.trained += [group.group_id for group in groups]
        return {"loss/policy": 0.0}

    async def publish(self, version: int) -> PublishedWeights:
        await asyncio.sleep(self.timing.publish_s)
        self._live_through("publish")
        return PublishedWeights(WeightManifest(version, (), ()), ())

    async def save(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        await asyncio.sleep(self.timing.save_s)
        self._live_through("save")
        (directory / "trained.txt").write_text("\n".join(self.trained), encoding="utf-8")

    async def start(self, checkpoint: Path | None) -> dict[str, float]:
        await asyncio.sleep(self.timing.restart_s)
        self.trained = (checkpoint / "trained.txt").read_text(encoding="utf-8").split("\n") if checkpoint else []
        return {}

    def _live_through(self, phase: str) -> None:
        if self.die(phase):
            raise LearnerError(f"rank 0 died in {phase} (simulated)")


def simulated_config(tmp_path: Path, **changes: Any) -> Config:
    """A recipe of the given batch, staleness and steps; sections as dotted keys."""
    tree: dict[str, Any] = {
        "name": "simulation",
        "output_dir": str(tmp_path / "run"),
        "model": {"path": "none"},
        "data": {"train": {"path": "none"}},
        "algorithm": {"group_size": 2, "prompts_per_step": 4},
        "steps": 10,
    }
    for key, value in changes.items():
        *sections, leaf = key.split("__")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    return parse_config(tree, "simulation")


def once_each(prompts: int) -> Counter[str]:
    """A complete pass over p0, p1, ..."""
    return Counter(f"p{i}" for i in range(prompts))


def prompt_rows(number: int) -> list[PromptRow]:
    """p0, p1, ..."""
    return [PromptRow(f"p{i}", ({"role": "user", "content": "q"},), "1", "s", "math", i) for i in range(number)]


@dataclass
class Simulation:
    """One simulated run; `run()` may raise what the controller raises."""

    config: Config
    actors: int = 2
    slots_per_actor: int = 64
    timing: Timing = field(default_factory=Timing)
    seed: int = 0
    prompts: int = 1000
    prepare: Callable[[Simulation], None] = lambda simulation: None
    resume: bool = False
    killed_at: int | None = None
    """Turn of the event loop at which the driver is killed: nothing of it unwinds, as long as `self` is kept."""
    killed: bool = False

    def run(self) -> Simulation:
        self.loop = SimulatedLoop(self.killed_at)
        try:
            self.loop.run_until_complete(self._run())
        except Killed:
            self.killed = True
        finally:
            self.elapsed_s = self.loop.now
            if not self.killed:
                self.loop.close()
        return self

    def bury(self) -> None:
        """After a kill, when nobody looks at the run directory any more: unwind what it left unfinished."""
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self.loop.close()

    def trained_prompts(self) -> Counter[str]:
        """How often each prompt id is in the learner's state."""
        return Counter(group_id.rpartition("@")[0] for group_id in self.learner.trained)

    async def _run(self) -> None:
        await self.start()
        await self.controller.run()

    async def start(self) -> None:
        """The controller and its parts, where the newest checkpoint left them."""
        rng = random.Random(self.seed)
        rows = prompt_rows(self.prompts)
        stream = PromptStream(rows, seed=0)
        self.directory = RunDirectory(Path(self.config.output_dir or ""))
        self.directory.create(self.config, resume=self.resume)
        self.rollout = SimulatedRollout(self.actors, self.slots_per_actor, self.timing, rng)
        self.learner = SimulatedLearner(self.timing)
        self.verifier = SimulatedVerifier()
        state, backlog = await self._restore(stream, {row.prompt_id: row for row in rows})
        self.ages: list[int] = []
        self.metrics: list[dict[str, float]] = []
        parts = Parts(
            stream=stream,
            prompt_ids=lambda visit: (1, 2, 3),
            rollout=self.rollout,
            verifier=self.verifier,
            learner=self.learner,
            directory=self.directory,
            after_step=self._after_step,
        )
        self.controller = Controller(self.config, parts, state, backlog)
        if state:
            await self.rollout.publish(SimpleNamespace(manifest=SimpleNamespace(version=state.version)))
        self.prepare(self)

    async def _restore(self, stream: PromptStream, rows: dict[str, PromptRow]) -> tuple[RunState | None, list[Visit]]:
        checkpoint = self.directory.latest_checkpoint()
        if checkpoint is None:
            return None, []
        state = load_state(checkpoint)
        stream.restore(state.stream)
        await self.learner.start(checkpoint / "learner")
        return state, [Visit(rows[prompt_id], visit) for prompt_id, visit in state.pending]

    async def _after_step(self, step: int, version: int, metrics: StepMetrics) -> None:
        ages = [version - 1 - self.rollout.oldest[group.visit.group_id] for group in metrics.groups]
        assert metrics.ages == ages, "what is reported is what was trained"
        self.ages += ages
        self.metrics.append(metrics.values)
