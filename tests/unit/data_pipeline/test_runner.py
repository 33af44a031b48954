"""The runner's promises, in one process: what is redone and why, what is committed, what fails and how."""

from __future__ import annotations

import errno
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from data_pipeline.cluster import InlineExecutor
from data_pipeline.runner import Needs, Runner, Unit, choose, numbered_files, one_to_one
from sdtrain.errors import DataError, ExitCode, StorageError


@dataclass(frozen=True)
class Upper:
    source: Path
    folder: Path
    name: str = "upper"
    version: str = "1"
    needs: Needs = field(default_factory=Needs)
    facts: Mapping[str, Any] = field(default_factory=dict)
    errors: Mapping[str, list[Exception]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    reported: list[int] = field(default_factory=list)

    def config_facts(self):
        return dict(self.facts)

    def units(self):
        return one_to_one(self.source, ".txt")

    def worker(self):
        def work(unit: Unit, folder: Path) -> dict[str, Any]:
            self.calls.append(unit.name)
            text = unit.inputs[0].read_text().upper()
            (folder / f"{unit.name}.txt").write_text(text)
            if self.errors.get(unit.name):
                raise self.errors[unit.name].pop(0)
            return {"chars": len(text)}

        return work

    def report(self, stats: Sequence[Mapping[str, Any]]):
        self.reported[:] = [row["chars"] for row in stats]
        return f"{sum(self.reported)} [chars]"


class Bench:
    """A source of three files, a runner and its printed words."""

    def __init__(self, path: Path):
        self.output = path / "out"
        self.source = path / "source"
        self.source.mkdir()
        for index in range(3):
            (self.source / f"{index:05d}.txt").write_text("abc"[: index + 1])
        self.screen = io.StringIO()

    def stage(self, **changes) -> Upper:
        return Upper(self.source, self.output / "01-upper", **changes)

    def runner(self, **changes) -> Runner:
        console = Console(file=self.screen, width=200)
        return Runner(
            output=self.output, executor=InlineExecutor(), console=console, **{"backoff_seconds": 0.0, **changes}
        )

    def run(self, *stages: Upper, only: Sequence[str] = ()) -> str:
        self.screen.truncate(0)
        self.runner().run(stages, only)
        return self.screen.getvalue()

    def contents(self) -> dict[str, str]:
        return {path.name: path.read_text() for path in numbered_files(self.output / "01-upper", ".txt")}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_first_run_commits_every_unit_and_a_second_does_nothing(bench):
    stage = bench.stage()
    printed = bench.run(stage)
    assert bench.contents() == {"00000.txt": "A", "00001.txt": "AB", "00002.txt": "ABC"}
    assert stage.reported == [1, 2, 3]
    assert "upper: 0 of 3 up to date; 3 new" in printed and "6 [chars]" in printed
    assert json.loads((stage.folder / "00002.stats.json").read_text()) == {"chars": 3}
    printed = bench.run(again := bench.stage())
    assert again.calls == [] and again.reported == [1, 2, 3] and "upper: 3 of 3 up to date" in printed


@pytest.mark.parametrize(
    ("damage", "redone", "reason"),
    [
        (lambda b: (b.source / "00001.txt").write_text("xy"), ["00001"], "1 with changed input"),
        (lambda b: (b.output / "01-upper/00002.txt").unlink(), ["00002"], "1 with a missing output"),
        (lambda b: (b.output / "01-upper/00000.txt").write_text("Z"), ["00000"], "1 with a damaged output"),
        (lambda b: (b.output / "01-upper/00000.stats.json").write_text("{}"), ["00000"], "1 with a damaged output"),
        (lambda b: (b.source / "00003.txt").write_text("new"), ["00003"], "1 new"),
    ],
)
def test_what_changed_is_noticed_and_only_that_is_redone(bench, damage, redone, reason):
    bench.run(bench.stage())
    damage(bench)
    printed = bench.run(stage := bench.stage())
    assert stage.calls == redone
    assert reason in printed
    assert bench.run(after := bench.stage()) and after.calls == []


def test_a_touched_but_equal_input_is_not_redone(bench):
    bench.run(bench.stage())
    text = (bench.source / "00001.txt").read_text()
    (bench.source / "00001.txt").write_text(text)
    bench.run(stage := bench.stage())
    assert stage.calls == []


def test_changed_settings_and_versions_redo_everything_and_name_the_change(bench):
    bench.run(bench.stage(facts={"a": {"b": 1}, "same": 2}))
    printed = bench.run(stage := bench.stage(facts={"a": {"b": 5}, "same": 2}))
    assert len(stage.calls) == 3 and "3 with changed settings (a.b 1 -> 5)" in printed
    printed = bench.run(stage := bench.stage(facts={"a": {"b": 5}, "same": 2}, version="2"))
    assert len(stage.calls) == 3 and "3 of another version (1 -> 2)" in printed


def test_a_unit_that_is_gone_takes_its_output_with_it(bench):
    bench.run(bench.stage())
    (bench.source / "00002.txt").unlink()
    printed = bench.run(stage := bench.stage())
    assert "1 obsolete, to be removed" in printed
    assert sorted(bench.contents()) == ["00000.txt", "00001.txt"] and stage.calls == []
    assert not list(stage.folder.glob("00002.*"))


def test_files_renamed_but_never_recorded_are_not_trusted(bench):
    folder = bench.output / "01-upper"
    folder.mkdir(parents=True)
    (folder / "00001.txt").write_text("torn")
    (folder / "00007.txt").write_text("stray")
    (folder / ".tmp-00001-1-1").mkdir()
    bench.run(stage := bench.stage())
    assert stage.calls == ["00000", "00001", "00002"]
    assert bench.contents() == {"00000.txt": "A", "00001.txt": "AB", "00002.txt": "ABC"}
    assert not list(folder.glob(".tmp-*"))


def test_a_torn_ledger_row_costs_one_unit(bench):
    bench.run(bench.stage())
    ledger = bench.output / "01-upper/ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes()[:-20])
    bench.run(stage := bench.stage())
    assert stage.calls == ["00002"]
    bench.run(stage := bench.stage())
    assert stage.calls == []


def test_a_transient_error_is_tried_again(bench):
    stage = bench.stage(errors={"00001": [ConnectionResetError("peer"), OSError("slow")]})
    bench.run(stage)
    assert stage.calls.count("00001") == 3 and bench.contents()["00001.txt"] == "AB"
    assert not list(stage.folder.glob(".tmp-*"))


def test_failed_units_go_to_the_dead_letter_list_and_the_others_are_kept(bench):
    stage = bench.stage(errors={"00000": [DataError("no column")], "00001": [ValueError("boom")] * 3})
    with pytest.raises(DataError) as caught:
        bench.run(stage)
    assert caught.value.exit_code == ExitCode.DATA
    assert str(caught.value) == (
        "stage upper: 2 of 3 units failed\n  00000: no column\n  00001: ValueError: boom\n"
        f"all are listed in {bench.output / 'dead_letter.json'}; running again tries only what is missing"
    )
    assert stage.calls.count("00000") == 1 and stage.calls.count("00001") == 3
    rows = bench.runner().dead_letters.rows()
    assert [(row["stage"], row["unit"], row["attempts"]) for row in rows] == [
        ("upper", "00000", 1),
        ("upper", "00001", 3),
    ]
    assert "ValueError: boom" in rows[1]["traceback"] and rows[0]["inputs"] == [str(bench.source / "00000.txt")]
    bench.run(healed := bench.stage())
    assert healed.calls == ["00000", "00001"] and bench.runner().dead_letters.rows() == []


def test_a_full_disk_stops_the_stage_with_its_own_exit_code(bench):
    stage = bench.stage(errors={"00000": [OSError(errno.ENOSPC, "No space left on device")]})
    with pytest.raises(StorageError, match=r"01-upper: cannot write unit 00000: .*No space left.*make room, run again"):
        bench.run(stage)
    assert stage.calls == ["00000"]


def test_a_second_run_on_the_same_folder_is_refused(bench):
    runner = bench.runner()
    with runner._locked(), pytest.raises(DataError, match="another run works on this folder"):
        bench.run(bench.stage())


def test_a_later_stage_is_refused_on_stale_inputs(bench):
    first = bench.stage()
    second = Upper(first.folder, bench.output / "02-again", name="again")
    with pytest.raises(DataError, match=r"stage upper is not up to date .*3 new.*run it as well"):
        bench.run(first, second, only=["again"])
    bench.run(first, second, only=["upper"])
    bench.run(first, second, only=["again"])
    assert second.reported == [1, 2, 3]
    (bench.source / "00000.txt").write_text("other")
    with pytest.raises(DataError, match=r"stage upper is not up to date .*1 with changed input"):
        bench.run(first, second, only=["again"])


def test_an_empty_folder_says_which_stage_is_missing(bench):
    with pytest.raises(DataError, match=r"nothing holds no numbered \.txt file; run the stage that writes it first"):
        one_to_one(bench.output / "nothing", ".txt")


def test_stages_are_chosen_by_name_and_by_family(bench):
    stages = [bench.stage(name=name) for name in ("metadata", "dedup-split", "dedup", "download")]
    assert choose(stages, []) == {"metadata", "dedup-split", "dedup", "download"}
    assert choose(stages, ["dedup"]) == {"dedup-split", "dedup"}
    with pytest.raises(
        DataError, match="no stage 'dedupe'; stages of this configuration: metadata, dedup-split, dedup"
    ):
        choose(stages, ["dedupe"])


def test_a_worker_that_writes_elsewhere_is_caught(bench):
    @dataclass(frozen=True)
    class Stray(Upper):
        def worker(self):
            def work(unit: Unit, folder: Path) -> dict[str, Any]:
                (folder / "other.txt").write_text("x")
                return {"chars": 0}

            return work

    with pytest.raises(DataError, match=r"other\.txt is not named 00000\.\*"):
        bench.run(Stray(bench.source, bench.output / "01-upper"))
