"""What `sdtrain-data status` makes of the files of a run that goes on, has ended, or died."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from data_pipeline.ledger import Commit, DeadLetters, Ledger
from data_pipeline.progress import RunProgress, StageProgress, read_progress, rows_of, start_ticks
from data_pipeline.status import duration, lines_of, read_status, to_json
from sdtrain.errors import ConfigError, DataError


def folders(output: Path) -> dict[str, Path]:
    return {"metadata": output / "01-metadata", "filter": output / "02-filter"}


def change(output: Path, **attempt: object) -> None:
    path = output / "progress.json"
    row = json.loads(path.read_text())
    row["attempt"] |= attempt
    path.write_text(json.dumps(row))


@pytest.fixture
def running(tmp_path):
    """A run of this process in the middle of its first stage."""
    progress = RunProgress(tmp_path, folders(tmp_path), ["metadata", "filter"])
    with progress:
        facts = {"units": 10, "done": 5, "failed": 1, "in_flight": 1, "rows": 700, "finished": 4, "finished_rows": 600}
        oldest = [{"unit": "00006", "attempt": 2, "since": time.time() - 90}]
        progress.tell("metadata", {"state": "running", "seconds": 2.0, "oldest": oldest, **facts})
        yield tmp_path


def test_a_run_that_goes_on_has_a_rate_and_a_time_left(running):
    status = read_status(running)
    assert status.attempt is not None
    assert (status.attempt.state, status.attempt.pid) == ("running", os.getpid())
    first, second = status.stages
    assert (first.state, first.done, first.units, first.failed, first.in_flight) == ("running", 5, 10, 1, 1)
    assert (first.units_per_second, first.rows_per_second, first.seconds_left) == (2.0, 300.0, 2.0)
    assert (second.state, second.units, second.seconds_left) == ("waiting", None, None)
    lines = list(lines_of(status))
    assert re.fullmatch(
        rf"running: process {os.getpid()} on \S+, since .* \(0 s\), last sign of life 0 s ago", lines[0]
    )
    assert lines[1] == "metadata: the oldest in flight is unit 00006, attempt 2, for 1 min 30 s"
    assert json.loads(to_json(status))["stages"][0]["oldest"][0]["unit"] == "00006"


def test_a_killed_run_is_told_from_one_that_goes_on_even_if_its_number_is_used_again(running):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for attempt in ({"pid": ended.pid}, {"start_ticks": 1}):
        change(running, **attempt)
        status = read_status(running)
        assert status.attempt is not None and status.attempt.state == "died"
        assert [stage.state for stage in status.stages] == ["stopped", "waiting"]
        assert status.stages[0].in_flight == 0 and status.stages[0].seconds_left is None
        assert "died" in next(iter(lines_of(status))) and "run again to go on" in next(iter(lines_of(status)))


def test_a_run_on_another_machine_is_known_by_its_sign_of_life(running):
    change(running, host="another")
    assert "running: process" in next(iter(lines_of(read_status(running))))
    change(running, updated=time.time() - 200)
    assert re.match(
        r"perhaps running: .* without a sign of life for 3 min 20 s", next(iter(lines_of(read_status(running))))
    )


@pytest.mark.parametrize(
    ("error", "state", "words"),
    [
        (None, "done", "ended as done after 0 s, 0 s ago"),
        (DataError("stage metadata: 1 of 3 units failed"), "failed", "0 s ago: stage metadata: 1 of 3 units failed"),
        (KeyboardInterrupt(), "interrupted", "ended as interrupted after 0 s, 0 s ago: KeyboardInterrupt"),
    ],
)
def test_how_a_run_ended_is_kept(tmp_path, error, state, words):
    expected = contextlib.suppress(type(error)) if error else contextlib.nullcontext()
    with expected, RunProgress(tmp_path, folders(tmp_path), ["metadata"]) as progress:
        progress.tell("metadata", {"state": "running" if error else "done"})
        if error:
            raise error
    status = read_status(tmp_path)
    assert status.stages[0].state == state
    assert words in next(iter(lines_of(status)))


def test_stages_that_a_later_run_does_not_touch_keep_their_figures(tmp_path):
    with RunProgress(tmp_path, folders(tmp_path), ["metadata", "filter"]) as progress:
        progress.tell("filter", {"state": "done", "units": 3, "done": 3})
    with RunProgress(tmp_path, {"metadata": tmp_path / "01-metadata"}, ["metadata"]):
        pass
    assert [(row["name"], row["state"]) for row in read_progress(tmp_path)["stages"]] == [
        ("metadata", "waiting"),
        ("filter", "done"),
    ]


def test_the_file_follows_a_stage_unit_by_unit(tmp_path):
    told = []
    with StageProgress(Console(quiet=True), "filter", 4, 1, rows=10, tell=lambda *one: told.append(one)) as progress:
        progress.start("00001", 1)
        progress.start("00002", 1)
        progress.beat()
        assert told[-1][0]["in_flight"] == 2 and [row["unit"] for row in told[-1][0]["oldest"]] == ["00001", "00002"]
        progress.retry("00001")
        progress.advance("00002", rows=5)
        progress.start("00001", 2)
        progress.advance("00001", failed=True)
    facts, at_once = told[-1]
    assert at_once and (facts["done"], facts["failed"], facts["retries"], facts["in_flight"]) == (2, 1, 1, 0)
    assert (facts["rows"], facts["finished"], facts["finished_rows"]) == (15, 2, 5)


def test_writing_is_rare_unless_it_must_be_seen(tmp_path):
    with RunProgress(tmp_path, folders(tmp_path), ["metadata"]) as progress:
        progress.tell("metadata", {"done": 1})
        progress.tell("metadata", {"done": 2}, at_once=False)
        assert read_progress(tmp_path)["stages"][0]["done"] == 1
    assert read_progress(tmp_path)["stages"][0]["done"] == 2


def test_a_disk_that_takes_nothing_more_does_not_hide_the_error_that_says_so(tmp_path):
    output = tmp_path / "out"
    with (
        pytest.raises(DataError, match="the data's own error"),
        RunProgress(output, folders(output), ["metadata"]) as progress,
    ):
        shutil.rmtree(output)
        output.write_text("a file, in which nothing can be written")
        progress.tell("metadata", {"done": 1})
        raise DataError("the data's own error")


def test_ledgers_without_a_progress_file_are_counted(tmp_path):
    commit = Commit("00000", {}, {}, "1", {"00000.txt": "2"}, {"rows": 3}, 0.5)
    Ledger(tmp_path / "02-filter").add(commit)
    DeadLetters(tmp_path / "dead_letter.json").replace(
        "filter", [{"stage": "filter", "unit": "00001", "attempts": 3, "error": "boom"}]
    )
    status = read_status(tmp_path)
    assert [(stage.name, stage.state, stage.done, stage.rows) for stage in status.stages] == [
        ("filter", "unknown", 1, 3)
    ]
    assert list(lines_of(status)) == [
        "no progress.json: counts are those of the ledgers",
        "failed: filter 00001 after 3 attempts: boom",
    ]


def test_a_long_list_of_failures_is_cut_and_says_where_the_rest_is(tmp_path):
    dead = [{"stage": "filter", "unit": f"{unit:05d}", "attempts": 3, "error": "boom"} for unit in range(25)]
    (tmp_path / "dead_letter.json").write_text(json.dumps(dead))
    status = read_status(tmp_path, is_new=True)
    lines = list(lines_of(status))
    assert lines[-2:] == [
        "failed: filter 00019 after 3 attempts: boom",
        f"failed: 5 more, see {tmp_path}/dead_letter.json",
    ]
    assert len(status.dead_letters) == 25 and len(json.loads(to_json(status))["dead_letters"]) == 25


def test_a_folder_without_a_run_is_refused_unless_a_page_names_it(tmp_path):
    with pytest.raises(
        ConfigError, match=r"no ingestion run has worked here: .*give a page of kind ingestion \(YAML\)"
    ):
        read_status(tmp_path)
    assert list(lines_of(read_status(tmp_path / "new", is_new=True))) == ["nothing has run yet"]


def test_words_and_counts():
    words = {0: "0 s", 59.6: "1 min", 185: "3 min 5 s", 7800: "2 h 10 min", 3600: "1 h", 270_000: "3 d 3 h"}
    assert {seconds: duration(seconds) for seconds in words} == words
    assert rows_of({"samples": {"train": 3, "validation": 1}, "shards": 2}) == 4
    assert rows_of({"rows": 7, "stored": 5}) == 7 and rows_of({"shards": 2}) == 0
    assert start_ticks(os.getpid()) is not None and start_ticks(2**22 + 1) is None
