"""The two ends of a batch script: which outcome asks for another start, and when that is enough."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from launcher import slurm_job
from launcher.slurm_job import Surroundings, begin, end
from launcher.slurm_journal import Journal, Start, fruitless_starts
from launcher.slurm_queue import QueuedJob
from sdtrain.errors import ConfigError, ExitCode, NoProgressError
from sdtrain.run_dir import REFUSALS, Exit, RunDir, read_json_lines

FIRST = Surroundings("7", 0, 2, 1)


class Scheduler:
    """Knows one job, and how often it was asked to requeue it, with which delays."""

    def __init__(self) -> None:
        self.job: QueuedJob | None = QueuedJob("RUNNING", "None", "1:00", "1:00:00", "n[1-2]", "N/A")
        self.delays: list[int] = []
        self.excluded: list[str] = []

    @property
    def requeued(self) -> int:
        return len(self.delays)

    def find_job(self, job: str) -> QueuedJob | None:
        return self.job

    def requeue(self, job: str, *, delay_seconds: int, exclude: Sequence[str]) -> None:
        self.delays.append(delay_seconds)
        self.excluded = list(exclude)


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Scheduler:
    found = Scheduler()
    monkeypatch.delenv(REFUSALS, raising=False)
    monkeypatch.setattr(slurm_job, "find_job", found.find_job)
    monkeypatch.setattr(slurm_job, "requeue", found.requeue)
    return found


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def commit(run: RunDir, step: int) -> None:
    (run.checkpoints / f"step-{step:08d}").mkdir(parents=True)


@pytest.mark.parametrize(
    ("code", "again"),
    [(code, code in (ExitCode.HANG, ExitCode.REQUEUE)) for code in ExitCode],
)
def test_the_word_decides(run: RunDir, scheduler: Scheduler, code: int, again: bool) -> None:
    begin(run, FIRST, 5)
    run.write_exit(Exit(code, "why", 3, 1, "a"))
    assert end(run, FIRST, 5, 143) == code, "whatever srun said"
    assert scheduler.requeued == again
    row = list(read_json_lines(Journal(run).path))[-1]
    assert (row["event"], row["code"], row["requeued"]) == ("end", code, again)
    assert row["reason"].startswith(f"attempt a ended with code {code} at step 3: why")


@pytest.mark.parametrize(("status", "code"), [(0, 1), (1, 1), (137, 6)])
def test_a_missing_word_is_a_crash(
    run: RunDir, scheduler: Scheduler, capsys: pytest.CaptureFixture[str], status: int, code: int
) -> None:
    logs = begin(run, FIRST, 5)
    assert end(run, FIRST, 5, status) == code
    assert scheduler.requeued == 1
    how = "was ended by SIGKILL" if status == 137 else f"returned {status}"
    said = f"crash: the ranks left no exit.json (srun {how}); every rank's output is in {logs}; requeued, to go on from"
    assert said in capsys.readouterr().err


def test_a_stale_word_is_a_crash(run: RunDir, scheduler: Scheduler) -> None:
    run.write_exit(Exit(0, "complete", 3, 0, "a"))
    begin(run, FIRST, 5)
    assert end(run, FIRST, 5, 0) == ExitCode.BUG
    assert scheduler.requeued == 1
    assert run.read_exit() is None, "nobody shall take it for this attempt's"


def test_a_refused_start_is_no_crash(
    run: RunDir, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(REFUSALS, str(tmp_path / "refusals"))
    begin(run, FIRST, 5)
    RunDir(tmp_path / "refusals").write_exit(Exit(3, "manifest is gone", -1, 0, "a"))
    assert end(run, FIRST, 5, 3) == ExitCode.DATA
    assert scheduler.requeued == 0


def test_a_start_that_finds_an_earlier_one_alive_comes_back_later_and_later(
    run: RunDir, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv(REFUSALS, str(tmp_path / "refusals"))
    RunDir(tmp_path / "refusals").write_exit(Exit(85, "attempt a is alive here, as process 5 of n1", -1, 0, "b"))
    codes = []
    for restart in range(3):
        here = Surroundings("7", restart, 2, 1)
        begin(run, here, 50)
        codes.append(end(run, here, 50, 85))
    assert codes == [85, 85, ExitCode.NO_PROGRESS]
    assert scheduler.delays == [240, 480]
    said = capsys.readouterr().err
    assert (
        "was touched: attempt a is alive here, as process 5 of n1; requeued, to go on from the newest checkpoint"
        in said
    )
    assert "checkpoint in 4 minutes or later\n" in said and "checkpoint in 8 minutes or later\n" in said
    assert "as process 5 of n1; not requeued: 3 starts in a row made no new checkpoint" in said


def test_the_cap_on_restarts(run: RunDir, scheduler: Scheduler, capsys: pytest.CaptureFixture[str]) -> None:
    last = Surroundings("7", 2, 2, 1)
    begin(run, last, 2)
    run.write_exit(Exit(85, "SIGUSR1", 3, 0, "a"))
    assert end(run, last, 2, 85) == ExitCode.REQUEUE
    assert scheduler.requeued == 0
    assert "not requeued: job had 2 restarts, and --max-restarts is 2. Go on with: sdtrain-launch" in (
        capsys.readouterr().err
    )
    with pytest.raises(NoProgressError, match="job had 2 restarts, and --max-restarts is 2"):
        begin(run, Surroundings("7", 3, 2, 1), 2)  # the scheduler requeued it by itself


def test_starts_in_vain(run: RunDir, scheduler: Scheduler, capsys: pytest.CaptureFixture[str]) -> None:
    commit(run, 2)
    codes = []
    for restart in range(3):
        here = Surroundings("7", restart, 2, 1)
        begin(run, here, 50)
        run.write_exit(Exit(6, "rank 1 died", 2, 1, f"a{restart}"))
        codes.append(end(run, here, 50, 143))
    assert codes == [6, 6, ExitCode.NO_PROGRESS]
    assert scheduler.requeued == 2
    assert "not requeued: 3 starts in a row made no new checkpoint under" in capsys.readouterr().err
    with pytest.raises(NoProgressError, match=r"3 starts in a row made no new checkpoint .* mend the cause, then: "):
        begin(run, Surroundings("7", 3, 2, 1), 50)
    begin(run, Surroundings("8", 0, 2, 1), 50)  # a new job is a person's decision


def test_a_scheduler_that_refuses_to_requeue(
    run: RunDir, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def requeue(job: str, *, delay_seconds: int, exclude: Sequence[str]) -> None:
        raise ConfigError("scontrol requeue 7 failed: Requested operation is presently disabled")

    monkeypatch.setattr(slurm_job, "requeue", requeue)
    begin(run, FIRST, 5)
    run.write_exit(Exit(85, "SIGTERM", 3, 0, "a"))
    assert end(run, FIRST, 5, 85) == ExitCode.REQUEUE
    assert f"is presently disabled. Go on with: sdtrain-launch resume {run.path}" in capsys.readouterr().err


def test_a_full_disk_does_not_keep_a_job_from_its_next_start(
    run: RunDir, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(run, FIRST, 5)
    run.write_exit(Exit(85, "SIGTERM", 3, 0, "a"))

    def add(self: Journal, *row: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Journal, "add", add)
    assert end(run, FIRST, 5, 85) == ExitCode.REQUEUE
    assert scheduler.requeued == 1
    assert "slurm.jsonl could not be written: No space left on device" in capsys.readouterr().err


def test_a_new_checkpoint_gives_new_chances() -> None:
    def start(*names: str, job: str = "7") -> Start:
        return Start(job, 0, "logs", 1, 2, None, list(names))

    assert fruitless_starts([start()], {"step-2"}) == 0
    assert fruitless_starts([start(), start()], set()) == 2
    assert fruitless_starts([start(), start("step-2"), start("step-2")], {"step-2"}) == 2
    assert fruitless_starts([start(), start("step-2"), start("step-2")], {"step-4"}) == 0, "the older one was retired"
    assert fruitless_starts([start(job="6"), start(job="6"), start()], set()) == 1


@pytest.mark.parametrize("state", ["CANCELLED", "PENDING", "COMPLETING"])
def test_what_the_scheduler_has_decided_stands(
    run: RunDir, scheduler: Scheduler, capsys: pytest.CaptureFixture[str], state: str
) -> None:
    begin(run, FIRST, 5)
    run.write_exit(Exit(85, "SIGTERM", 3, 0, "a"))
    scheduler.job = QueuedJob(state, "None", "", "", "", "")
    assert end(run, FIRST, 5, 85) == ExitCode.REQUEUE
    scheduler.job = None
    assert end(run, FIRST, 5, 85) == ExitCode.REQUEUE
    assert scheduler.requeued == 0
    said = capsys.readouterr().err
    assert f"not requeued by this script: to the scheduler job 7 is {state} (None)" in said
    assert "to the scheduler job 7 is gone" in said


def test_surroundings() -> None:
    environment = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "64", "SLURM_NTASKS_PER_NODE": "8"}
    assert Surroundings.of(environment) == Surroundings("7", 0, 64, 8)
    assert Surroundings.of(environment | {"SLURM_RESTART_COUNT": "2"}).restart == 2
    assert Surroundings.of(environment).world_size == 512
    with pytest.raises(ConfigError, match=r"'SLURM_JOB_ID' is not set as in a batch job of Slurm: slurm/train.sbatch"):
        Surroundings.of({})
