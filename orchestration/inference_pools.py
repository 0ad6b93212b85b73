"""The two pools that answer and grade, made from a plan: all that evaluation needs, and a part of training."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import ray

from learner.group import LearnerGroup
from orchestration.broadcast import BroadcastPool
from orchestration.config import Config
from orchestration.evaluate import MAX_GROUP, TwoPools
from orchestration.plan import Plan, as_member, make_plan
from orchestration.rollout_pool import ROOM_PER_SEAT, RolloutPool
from orchestration.validate import Resolved
from orchestration.verifier_pool import VerifierPool
from reward.actor import VerifierActor
from rollout.actor import RolloutActor

logger = logging.getLogger(__name__)

GROUP_GRADING_SLACK_S = 60.0


def make_rollout_pool(config: Config, plan: Plan, learner: LearnerGroup | None = None) -> RolloutPool:
    """The vLLM actors of a plan, not yet started; `learner` is whose weights they will serve, if anybody's."""
    pool_class: Callable[..., RolloutPool] = RolloutPool
    if config.pipeline.transport == "nccl" and learner is not None:
        pool_class = partial(BroadcastPool, learner, config.rollout.tensor_parallel_size)
    return pool_class(
        lambda index: _create(RolloutActor, as_member(plan.engine_options, index), plan.engine),
        config.rollout.num_actors,
        request_timeout_s=config.rollout.request_timeout_s,
        sync_timeout_s=config.pipeline.sync_timeout_s,
        republish_timeout_s=config.learner.step_timeout_s
        + config.learner.startup_timeout_s
        + config.pipeline.sync_timeout_s,
        max_in_flight=ROOM_PER_SEAT * config.rollout.max_num_seqs,
        startup_timeout_s=config.rollout.startup_timeout_s,
        hang_timeout_s=config.rollout.request_timeout_s,
        restarts=config.pipeline.max_restarts,
    )


def make_verifier_pool(config: Config, plan: Plan) -> VerifierPool:
    """The verifier actors of a plan, not yet started."""
    largest_group = max(config.algorithm.group_size, MAX_GROUP)
    return VerifierPool(
        lambda index: _create(VerifierActor, as_member(plan.verifier_options, index), plan.verifier),
        config.reward.num_actors,
        group_timeout_s=largest_group * config.reward.deadline_s + GROUP_GRADING_SLACK_S,
        groups_per_member=config.reward.processes_per_actor,
        startup_timeout_s=config.rollout.startup_timeout_s,
        hang_timeout_s=config.rollout.request_timeout_s,
        restarts=config.pipeline.max_restarts,
    )


@asynccontextmanager
async def inference_pools(resolved: Resolved) -> AsyncIterator[TwoPools]:
    """Both pools, started inside the block and gone after it; Ray must be connected."""
    started = time.monotonic()
    config, plan = resolved.config, make_plan(resolved, initial_version=0)
    pools = TwoPools(make_rollout_pool(config, plan), make_verifier_pool(config, plan))
    try:
        await asyncio.gather(pools.rollout.start(), pools.verifier.start())
        logger.info("ready after %.0f s: %d rollout actors", time.monotonic() - started, config.rollout.num_actors)
        yield pools
    finally:
        pools.rollout.kill()
        pools.verifier.kill()


def _create(actor_class: type, options: dict[str, Any], spec: Any) -> Any:
    return ray.remote(actor_class).options(**options).remote(spec)
