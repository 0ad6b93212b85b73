"""Trajectories survive Arrow to the bit, as views; rows that cannot be replayed are named and the rest is kept."""

from __future__ import annotations

import dataclasses
import io
import pickle

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.trajectory import SCHEMA, Kind, Trajectory, TrajectoryError, columns, pack, schema_for, unpack
from rollout.trajectory_check import validate

VOCABULARY = 1000
ARRAYS = [field.name for field in dataclasses.fields(Trajectory) if "ndarray" in str(field.type)]


def make(
    index: int = 0,
    kinds: list[int] | None = None,
    versions: list[int] | None = None,
    candidates: int = 5,
    prompt: int = 3,
) -> Trajectory:
    """A random but valid response with the given kinds (one per position)."""
    generator = np.random.default_rng(index)
    kinds = [Kind.SOFT] * 4 + [Kind.ENDED] + [Kind.DISCRETE] * 3 if kinds is None else kinds
    length, soft = len(kinds), sum(kind == Kind.SOFT for kind in kinds)
    weights = generator.dirichlet(np.ones(candidates), soft).astype(np.float32).reshape(soft, candidates)
    logprobs = np.log(generator.dirichlet(np.ones(candidates), soft)).astype(np.float32).reshape(soft, candidates)
    if soft:
        logprobs[0, -1] = -np.inf
    return Trajectory(
        request_id=f"p{index}@0/{index}",
        group_id=f"p{index}@0",
        prompt_id=f"p{index}",
        sample_index=index,
        seed=2**63 - 1 - index,
        prompt_ids=generator.integers(0, VOCABULARY, prompt).astype(np.int32),
        response_ids=generator.integers(0, VOCABULARY, length).astype(np.int32),
        kinds=np.array(kinds, np.uint8),
        versions=np.array([7] * length if versions is None else versions, np.int64),
        log_density=generator.standard_normal(length).astype(np.float32),
        candidate_ids=generator.integers(0, VOCABULARY, (soft, candidates)).astype(np.int32),
        candidate_logprobs=logprobs,
        noise=generator.gumbel(size=(soft, candidates)).astype(np.float32),
        weights=weights,
        censor_threshold=np.full(soft, np.nan, np.float32),
        finish_reason="stop",
        response_text="thought </think> Ümlaut",
        answer_text="Ümlaut",
    )


def assert_equal(found: Trajectory, want: Trajectory) -> None:
    for field in dataclasses.fields(Trajectory):
        a, b = getattr(found, field.name), getattr(want, field.name)
        if field.name in ARRAYS:
            assert a.dtype == b.dtype, field.name
            assert a.shape == b.shape, field.name
            assert a.tobytes() == b.tobytes(), field.name
        else:
            assert a == b, field.name


def over_a_stream(batch: pa.RecordBatch) -> pa.Table:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return pa.ipc.open_stream(sink.getvalue()).read_all()


@st.composite
def trajectories(draw: st.DrawFn) -> list[Trajectory]:
    """Any kinds and versions in any order, empty responses and empty batches included."""
    found = []
    for index in range(draw(st.integers(0, 5))):
        kinds = draw(st.lists(st.sampled_from(list(Kind)), max_size=12))
        versions = draw(st.lists(st.integers(0, 3), min_size=len(kinds), max_size=len(kinds)))
        found.append(make(index, kinds, versions, candidates=3, prompt=draw(st.integers(0, 3))))
    return found


@settings(deadline=None, max_examples=100)
@given(trajectories())
def test_round_trip(wanted: list[Trajectory]) -> None:
    batch = pack(wanted, max_candidates=3)
    batch.validate(full=True)
    assert batch.schema.equals(schema_for(3), check_metadata=True)
    good, bad = validate(batch, vocabulary_size=VOCABULARY, max_candidates=3)
    assert bad == []
    for found in (unpack(batch), unpack(over_a_stream(batch)), unpack(pickle.loads(pickle.dumps(batch))), good):
        assert len(found) == len(wanted)
        for a, b in zip(found, wanted, strict=True):
            assert_equal(a, b)


@settings(deadline=None, max_examples=40)
@given(trajectories(), st.integers(0, 5), st.integers(0, 5))
def test_slices_and_tables_of_several_batches(wanted: list[Trajectory], start: int, length: int) -> None:
    batch = pack(wanted, max_candidates=3)
    parts = pa.Table.from_batches([batch.slice(start, length), batch])
    expected = wanted[start : start + length] + wanted
    for a, b in zip(unpack(parts), expected, strict=True):
        assert_equal(a, b)
    good, bad = validate(parts, vocabulary_size=VOCABULARY, max_candidates=3)
    assert len(good) == len(expected)
    assert bad == []


def test_unpacked_arrays_are_read_only_views() -> None:
    batch = pack([make(0), make(1)])
    stored = batch.column("noise").values.flatten().buffers()[1]
    for trajectory in unpack(batch):
        for name in ARRAYS:
            with pytest.raises(ValueError, match="read-only"):
                getattr(trajectory, name)[...] = 0
        address = trajectory.noise.__array_interface__["data"][0]
        assert stored.address <= address < stored.address + stored.size


def test_runs_are_stored_as_runs() -> None:
    batch = pack([make(0, versions=[4] * 6 + [5] * 2), make(1, kinds=[Kind.DISCRETE] * 2), make(2, kinds=[])])
    assert batch.column("kind_runs").to_pylist() == [
        [{"kind": 1, "length": 4}, {"kind": 2, "length": 1}, {"kind": 0, "length": 3}],
        [{"kind": 0, "length": 2}],
        [],
    ]
    assert batch.column("version_runs").to_pylist()[0] == [{"version": 4, "length": 6}, {"version": 5, "length": 2}]


def test_flat_columns_are_the_rows_end_to_end() -> None:
    wanted = [make(0), make(1, kinds=[Kind.SOFT] * 2)]
    parts = columns(pack(wanted))
    assert np.array_equal(parts.flat["weights"], np.concatenate([t.weights for t in wanted]))
    assert parts.offsets["weights"].tolist() == [0, 4, 6]
    assert parts.scalars["request_id"] == [t.request_id for t in wanted]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("kinds", np.zeros(3, np.uint8)),
        ("versions", np.zeros(9, np.int64)),
        ("log_density", np.zeros(7, np.float32)),
        ("candidate_ids", np.zeros((4, 6), np.int32)),
        ("weights", np.zeros((3, 5), np.float32)),
        ("noise", np.zeros(20, np.float32)),
        ("censor_threshold", np.zeros(5, np.float32)),
    ],
)
def test_pack_refuses_arrays_that_do_not_fit(column: str, value: np.ndarray) -> None:
    bad = dataclasses.replace(make(1), **{column: value})
    with pytest.raises(TrajectoryError, match=r"p1@0/1.*column"):
        pack([make(0), bad])


def test_another_schema_version_is_refused() -> None:
    batch = pack([make(0)]).replace_schema_metadata({"softgrpo.schema_version": "2", "softgrpo.max_candidates": "5"})
    with pytest.raises(TrajectoryError, match="schema version 2, this code reads 1"):
        unpack(batch)
    with pytest.raises(TrajectoryError, match="schema version absent"):
        unpack(batch.replace_schema_metadata({}))


def test_a_missing_or_retyped_column_is_refused() -> None:
    batch = pack([make(0)])
    without = pa.RecordBatch.from_arrays(
        [column for name, column in zip(batch.schema.names, batch.columns, strict=True) if name != "kind_runs"],
        schema=batch.schema.remove(batch.schema.get_field_index("kind_runs")),
    )
    with pytest.raises(TrajectoryError, match="column kind_runs: absent"):
        validate(without, vocabulary_size=VOCABULARY, max_candidates=5)
    position = SCHEMA.get_field_index("log_density")
    half = batch.set_column(
        position, pa.field("log_density", pa.list_(pa.float64())), pa.array([[0.0] * 8], pa.list_(pa.float64()))
    )
    with pytest.raises(TrajectoryError, match="column log_density"):
        unpack(half)


def test_nulls_are_refused() -> None:
    batch = pack([make(0)])
    position = SCHEMA.get_field_index("log_density")
    values = pa.array([[None] * 8], pa.list_(pa.float32()))
    with pytest.raises(TrajectoryError, match="column log_density: 8 nulls"):
        unpack(batch.set_column(position, batch.schema.field(position), values))


def test_more_candidates_than_configured_are_refused() -> None:
    with pytest.raises(TrajectoryError, match=r"p0@0/0: column candidate_ids: 8 candidates, configured are 5"):
        validate(pack([make(0, candidates=8)], max_candidates=8), vocabulary_size=VOCABULARY, max_candidates=5)


def changed(column: str, index: int | tuple[int, int], value: float) -> Trajectory:
    array = getattr(make(1), column).copy()
    array[index] = value
    return dataclasses.replace(make(1), **{column: array})


@pytest.mark.parametrize(
    ("bad", "column", "reason"),
    [
        (changed("prompt_ids", 1, VOCABULARY), "prompt_ids", "vocabulary"),
        (changed("response_ids", 0, -1), "response_ids", "vocabulary"),
        (changed("candidate_ids", (3, 4), VOCABULARY + 5), "candidate_ids", "vocabulary"),
        (changed("log_density", 7, np.nan), "log_density", "NaN"),
        (changed("noise", (0, 0), np.inf), "noise", "infinite"),
        (changed("weights", (2, 1), np.nan), "weights", "NaN"),
        (changed("weights", (2, 1), 3.0), "weights", "sum to 1"),
        (changed("candidate_logprobs", (1, 1), np.nan), "candidate_logprobs", "NaN"),
        (changed("candidate_logprobs", (1, 1), 0.5), "candidate_logprobs", "positive"),
        (changed("censor_threshold", 0, np.inf), "censor_threshold", "infinite"),
        (changed("kinds", 7, 9), "kind_runs", "unknown kind"),
        (dataclasses.replace(make(1), finish_reason="cut"), "finish_reason", "goes on"),
    ],
)
def test_bad_rows_are_named_and_the_others_kept(bad: Trajectory, column: str, reason: str) -> None:
    good, found = validate(
        pack([make(0), bad, make(2), make(3, kinds=[])]), vocabulary_size=VOCABULARY, max_candidates=5
    )
    assert [t.request_id for t in good] == ["p0@0/0", "p2@0/2", "p3@0/3"]
    assert [(f.request_id, f.column) for f in found] == [("p1@0/1", column)]
    assert reason in str(found[0])
    assert_equal(good[1], make(2))


def test_runs_that_do_not_cover_the_response_are_named() -> None:
    batch = pack([make(0), make(1), make(2)])
    for column in ("kind_runs", "version_runs"):
        position = SCHEMA.get_field_index(column)
        kept = batch.column(column).to_pylist()
        for runs in ([], [{**kept[1][0], "length": 5}], [{**kept[1][0], "length": n} for n in (9, -1)]):
            values = pa.array([kept[0], runs, kept[2]], SCHEMA.field(position).type)
            torn = batch.set_column(position, batch.schema.field(position), values)
            good, found = validate(torn, vocabulary_size=VOCABULARY, max_candidates=5)
            assert [t.request_id for t in good] == ["p0@0/0", "p2@0/2"]
            assert [f.column for f in found] == [column]
