"""The resumable state of a learner: DeepSpeed's own files plus our facts, written into one given folder and synced.

`save_state` writes only below that folder; making the result atomic (manifest, rename) is the caller's job, so
DeepSpeed's `latest` file is never written. What one rank cannot write all ranks report, after DeepSpeed's own barriers:
an exception in between would leave the others waiting in them. The step decides the learning rate, and nothing in a
learner step is random.

A state is loaded with the ZeRO stage it was saved with, on any number of ranks: partitioned states of another world
size go through DeepSpeed's universal checkpoint format, converted beside the committed checkpoint (never inside it: a
file that its manifest does not list would condemn it) and removed after loading.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from learner.export import sync_directory
from learner.spec import CheckpointNotWritten, LearnerError

logger = logging.getLogger(__name__)

TAG = "learner"
FACTS = "learner.json"
CONVERSION = (
    "the other ranks wait for it at most learner.collective_timeout_s, the driver learner.startup_timeout_s: raise "
    "both, or resume with the number of ranks that saved it"
)
UNIVERSAL = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
"""Without it DeepSpeed refuses to convert the state of ZeRO 1 and 2."""


class Writes:
    """The writes of one checkpoint on this rank: failures are kept until every rank can raise them together."""

    ERRORS = (OSError, RuntimeError, SafetensorError)
    """Of a full disk: the system's own, torch.save's and safetensors'."""

    def __init__(self) -> None:
        self._failures: list[str] = []
        self._written: list[Path] = []

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """A failure to write inside the block is kept."""
        try:
            yield
        except self.ERRORS as error:
            self._failures.append(f"{type(error).__name__}: {error}")

    @contextlib.contextmanager
    def of_deepspeed(self, engine: Any) -> Iterator[None]:
        """The same for everything that DeepSpeed writes inside the block."""
        files = engine.checkpoint_engine
        writers = [
            (files, "makedirs", self._attempted(files.makedirs)),
            (files, "save", self._saved(files.save)),
            (engine, "_copy_recovery_script", self._attempted(engine._copy_recovery_script)),
        ]
        for owner, name, writer in writers:
            setattr(owner, name, writer)
        try:
            yield
        finally:
            for owner, name, _ in writers:
                delattr(owner, name)

    def _attempted(self, write: Callable[..., None]) -> Callable[..., None]:
        def attempted(*arguments: Any, **options: Any) -> None:
            with self.attempt():
                write(*arguments, **options)

        return attempted

    def _saved(self, save: Callable[[Any, str], None]) -> Callable[..., None]:
        def saved(state_dict: Any, path: str) -> None:
            with self.attempt():
                save(state_dict, path)
                self.wrote(Path(path))

        return saved

    def wrote(self, path: Path) -> None:
        """This rank wrote a file that the state cannot be loaded without."""
        self._written.append(path)

    def sizes(self, directory: Path) -> dict[str, int]:
        """What this rank wrote: path below `directory` -> bytes."""
        return {str(path.relative_to(directory)): path.stat().st_size for path in self._written}

    def conclude(self, directory: Path) -> None:
        """Raise `CheckpointNotWritten` on every rank if anything failed on one; collective."""
        import torch.distributed as dist

        failures: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(failures, self._failures)
        for rank, of_rank in enumerate(failures):
            if of_rank:
                raise CheckpointNotWritten(f"rank {rank} cannot write to {directory}: {of_rank[0]}")


def save_state(engine: Any, directory: Path, facts: dict[str, Any], rank: int, writes: Writes) -> None:
    """Write optimiser, master weights and `facts` below a folder; collective, synced when it returns.

    Raises `CheckpointNotWritten` on every rank if one of `writes`, these or earlier ones, failed on any.
    """
    with writes.of_deepspeed(engine):
        engine.save_checkpoint(str(directory), tag=TAG, client_state=UNIVERSAL, save_latest=False)
    with writes.attempt():
        if rank == 0:
            (directory / FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")
            writes.wrote(directory / FACTS)
        sync_directory(directory)
    writes.conclude(directory)


def read_facts(directory: Path) -> dict[str, Any]:
    """The facts of a saved state; raises `LearnerError` if there is none."""
    try:
        facts: dict[str, Any] = json.loads((directory / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LearnerError(f"{directory}: no learner state that can be read: {error}") from None
    return facts


def check_loadable(facts: dict[str, Any], zero_stage: int, directory: Path) -> None:
    """Raise `LearnerError` for a state that cannot be loaded with this ZeRO stage."""
    if facts["zero_stage"] != zero_stage:
        raise LearnerError(
            f"{directory}: saved with ZeRO stage {facts['zero_stage']}, this learner runs stage {zero_stage}; "
            f"set learner.zero_stage={facts['zero_stage']} to resume"
        )


def needs_conversion(facts: dict[str, Any], world_size: int) -> bool:
    """Whether the state is partitioned over another number of ranks."""
    return facts["zero_stage"] > 0 and facts["world_size"] != world_size


def load_state(engine: Any, directory: Path, *, convert: bool, rank: int) -> None:
    """Restore what `save_state` wrote; collective. With `convert` the engine must be configured for it
    (`checkpoint.load_universal`), and the folder of all checkpoints must be writable and seen by all ranks.

    Raises `LearnerError` where the conversion takes longer than a collective may.
    """
    options = [{key: group[key] for key in group if key != "params"} for group in engine.optimizer.param_groups]
    with _converted(directory, rank) if convert else contextlib.nullcontext(directory) as source:
        path, _ = engine.load_checkpoint(str(source), tag=TAG)
    if path is None:
        raise LearnerError(f"{directory}: DeepSpeed could not load the state below {TAG}/")
    # From a universal checkpoint ZeRO-3 gives every group the options of the first (and its weight decay), and all
    # states one step counter, which would then be counted up once per group.
    for group, kept in zip(engine.optimizer.param_groups, options, strict=True):
        group.update(kept)
    for state in engine.basic_optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()


@contextlib.contextmanager
def _converted(directory: Path, rank: int) -> Iterator[Path]:
    """A folder with the universal form of a saved state, made by rank 0 while the others wait."""
    import torch.distributed as dist

    checkpoint = directory.parent
    target = checkpoint.with_name(f".{checkpoint.name}.{directory.name}.universal")
    if rank == 0:
        from deepspeed.checkpoint import ds_to_universal

        logger.info("converting %s for another number of ranks; %s", directory, CONVERSION)
        shutil.rmtree(target, ignore_errors=True)
        ds_to_universal.main(
            argparse.Namespace(
                input_folder=str(directory / TAG),
                output_folder=str(target / TAG),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=False,
            )
        )
    try:
        dist.barrier()
    except RuntimeError as error:  # gloo and NCCL: the wait for rank 0 ended before its conversion did
        raise LearnerError(f"{directory}: not converted for another number of ranks; {CONVERSION}: {error}") from error
    try:
        yield target
        dist.barrier()
    finally:
        if rank == 0:
            shutil.rmtree(target, ignore_errors=True)
