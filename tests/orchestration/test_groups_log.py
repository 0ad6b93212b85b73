"""groups.jsonl: one line per trained step, on disk when `append` returns; the last line of a step counts."""

from __future__ import annotations

import json
from pathlib import Path

from orchestration.groups_log import GroupsLog, read_groups
from tests.orchestration.test_metrics_log import FullDisk


def test_a_line_is_there_when_append_returns(tmp_path: Path) -> None:
    log = GroupsLog(tmp_path, attempt=2)
    log.append(3, 4, ["p7@0", "p1@1"])
    (line,) = (tmp_path / "groups.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 3, "version": 4, "attempt": 2, "trained": ["p7@0", "p1@1"]}
    log.close()


def test_a_repeated_step_counts_once_and_a_torn_line_not_at_all(tmp_path: Path) -> None:
    log = GroupsLog(tmp_path, attempt=1)
    for step in (1, 2, 3):
        log.append(step, step, [f"p{step}@0"])
    log.close()
    with (tmp_path / "groups.jsonl").open("a") as file:
        file.write('{"step": 4, "trai')
    log = GroupsLog(tmp_path, attempt=2)
    log.append(3, 4, ["p9@0"])
    log.close()
    assert {step: record["trained"] for step, record in read_groups(tmp_path).items()} == {
        1: ["p1@0"],
        2: ["p2@0"],
        3: ["p9@0"],
    }
    assert read_groups(tmp_path / "nowhere") == {}


def test_a_full_disk_delays_lines_and_raises_nothing(tmp_path: Path) -> None:
    log = GroupsLog(tmp_path, attempt=1)
    log._lines._file = disk = FullDisk(log._lines._file, room=20)
    log.append(1, 1, ["p1@0"])
    log.append(2, 2, ["p2@0"])
    disk.room = 10_000
    log.append(3, 3, ["p3@0"])
    log.close()
    assert list(read_groups(tmp_path)) == [1, 2, 3]
