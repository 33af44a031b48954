"""How an attempt ends: one word that all ranks agree on, in `exit.json`, because launchers lose exit codes."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from sdtrain import distributed
from sdtrain.errors import ExitCode, NoProgressError, SdtrainError
from sdtrain.run_dir import REFUSED_STEP, Exit, RunDir, tell_launcher
from sdtrain.training.peers import RollCall
from sdtrain.training.verdict import lost_peers

LOST_PEER_SIGNS = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "timed out waiting",
    "timed out after",
    "remote process exited",
    "nccl communicator was aborted",
)
LOST_PEER_SECONDS = 5.0
"""How long a rank that lost a peer waits for the word of who knows more: the peer, or the peer's watchdog."""
TURN_SECONDS, MAX_TURNS = 0.25, 20
"""How much longer each rank waits than the one before it, so that one rank looks for the lost one and not everyone."""
MAX_FRUITLESS_ATTEMPTS = 3


class Refused(SdtrainError):
    """A start that must not become an attempt: all ranks leave alike, and the run's folder stays as it is."""

    def __init__(self, exit_code: ExitCode, text: str) -> None:
        super().__init__(text)
        self.exit_code = exit_code


@contextmanager
def refusing() -> Iterator[None]:
    """What any rank finds wrong inside refuses the start on all of them; nothing inside may be collective.

    Raises:
        Refused: With the first error, and the rank's name unless all ranks say the same.
    """
    found: tuple[ExitCode, str] | None = None
    try:
        yield
    except SdtrainError as error:
        found = error.exit_code, str(error)
    told = distributed.gather_objects(found)
    rank, first = next(((rank, one) for rank, one in enumerate(told) if one is not None), (0, None))
    if first is not None:
        code, text = first
        raise Refused(code, text if all(one == first for one in told) else f"rank {rank}: {text}")


def leave_refused(attempt: str, refused: Refused) -> ExitCode:
    """Say once why the run does not start, and tell it to a launcher that asked; the run's folder is left alone.

    Collective, so that the words are out before a launcher ends the ranks that it still sees.
    """
    place = distributed.ranks()
    if place.is_main:
        print(f"sdtrain: {refused}", file=sys.stderr, flush=True)
    if place.local_rank == 0:
        tell_launcher(Exit(int(refused.exit_code), str(refused), REFUSED_STEP, place.rank, attempt))
    distributed.barrier()
    return refused.exit_code


def code_of(error: BaseException) -> ExitCode:
    """The exit code of an error: ours have one, a torn process group means a lost peer, anything else is a bug."""
    if isinstance(error, SdtrainError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.REQUEUE
    if isinstance(error, OSError) and error.errno in (28, 30, 122):  # no space left, read-only, quota exceeded
        return ExitCode.STORAGE
    if isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in LOST_PEER_SIGNS):
        return ExitCode.HANG
    return ExitCode.BUG


def leave_together(run: RunDir, attempt: str, code: ExitCode, reason: str, step: int) -> None:
    """A planned end: rank 0 writes the word, and nobody leaves before it stands. Collective."""
    if distributed.ranks().is_main:
        run.write_exit(Exit(int(code), reason, step, 0, attempt))
        run.log("end", attempt=attempt, code=int(code), reason=reason, step=step)
    distributed.barrier()


def leave_broken(
    run: RunDir, attempt: str, error: BaseException, step: int, call: Callable[[], RollCall] = RollCall
) -> ExitCode:
    """An unplanned end of this rank: leave the word without asking the others, who may wait in a collective.

    The first cause wins: a rank that only lost its peer waits for the peer's own reason, and never overwrites it. Where
    none comes, it finds out who does not answer any more.

    Args:
        run: The run's folder.
        attempt: Name of this start.
        error: Why this rank leaves.
        step: Finished steps.
        call: Ask who of the other ranks answers over the network.
    """
    code = code_of(error)
    rank = distributed.ranks().rank
    if code is ExitCode.BUG:
        traceback.print_exception(error)
    else:
        print(f"rank {rank}: {error}", file=sys.stderr)
    reason, blamed = f"{type(error).__name__}: {error}", rank
    if code is ExitCode.HANG:
        if _another_left_a_word(run, attempt, LOST_PEER_SECONDS + min(rank, MAX_TURNS) * TURN_SECONDS):
            return code
        if (lost := lost_peers(call())) is not None:
            reason, blamed = f"{lost.reason}; rank {rank} noticed it by {reason}", lost.rank
    try:
        run.leave_word(Exit(int(code), reason, step, blamed, attempt))
    except OSError as refused:  # a disk that is full or gone must not turn this end into another one
        print(f"rank {rank}: no word of it could be left in {run.path}: {refused}", file=sys.stderr)
    return code


def _another_left_a_word(run: RunDir, attempt: str, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        word = run.read_exit()
        if word is not None and word.attempt == attempt:
            return True
        time.sleep(0.1)
    return False


def refuse_to_spin(run: RunDir, *, step: int, config_sha256: str) -> None:
    """Stop a run that is started again and again and dies each time before its next checkpoint; collective.

    Args:
        run: Its ledger tells.
        step: Where this attempt would begin.
        config_sha256: Digest of its page: who changed a setting gets a new chance.

    Raises:
        NoProgressError: The last `MAX_FRUITLESS_ATTEMPTS` attempts began here too and came to nothing.
    """
    is_main = distributed.ranks().is_main
    endings = fruitless(run.ledger_rows(), step=step, config_sha256=config_sha256) if is_main else []
    endings = distributed.broadcast_object(endings)
    if len(endings) < MAX_FRUITLESS_ATTEMPTS:
        return
    listed = "\n  ".join(endings[:MAX_FRUITLESS_ATTEMPTS])
    raise NoProgressError(
        f"the last {len(endings)} attempts began at step {step} as well and ended without a new checkpoint, the "
        f"newest first:\n  {listed}\nAnother start would end alike. Mend the cause and say where to start "
        "(--resume CHECKPOINT, or --resume never where nothing is saved yet), or change the page, for example "
        "checkpoint.every_steps if an attempt is too short for one."
    )


def fruitless(rows: Sequence[Mapping[str, Any]], *, step: int, config_sha256: str) -> list[str]:
    """How the last attempts ended, newest first, as long as they began alike, committed nothing and did not end well.

    Args:
        rows: The ledger's rows.
        step: Where they began.
        config_sha256: Digest of their page.
    """
    committed = {row.get("attempt") for row in rows if row.get("event") == "commit"}
    ends = {row.get("attempt"): row for row in rows if row.get("event") == "end"}
    endings: list[str] = []
    for start in reversed([row for row in rows if row.get("event") == "start"]):
        attempt, end = start.get("attempt"), ends.get(start.get("attempt"), {})
        is_alike = (start.get("step"), start.get("config_sha256")) == (step, config_sha256)
        if not is_alike or attempt in committed or end.get("code") == ExitCode.DONE:
            break
        endings.append(f"{attempt}: {end.get('reason', 'died without a word')}")
    return endings
