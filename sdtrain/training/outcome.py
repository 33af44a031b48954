"""How an attempt ends: one word that all ranks agree on, in `exit.json`, because launchers lose exit codes."""

from __future__ import annotations

import logging
import sys
import traceback

from sdtrain import distributed
from sdtrain.errors import ExitCode, SdtrainError
from sdtrain.run_dir import Exit, RunDir

log = logging.getLogger(__name__)

LOST_PEER_SIGNS = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "timed out waiting",
    "remote process exited",
    "nccl communicator was aborted",
)


def code_of(error: BaseException) -> ExitCode:
    """The exit code of an error: ours have one, a torn process group means a lost peer, anything else is a bug."""
    if isinstance(error, SdtrainError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.REQUEUE
    if isinstance(error, OSError) and error.errno in (28, 122):  # no space left, quota exceeded
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


def leave_broken(run: RunDir, attempt: str, error: BaseException, step: int) -> ExitCode:
    """An unplanned end of this rank: leave the word without asking the others, who may wait in a collective.

    The first cause wins: a rank that only lost its peer does not overwrite the peer's own reason.
    """
    code = code_of(error)
    rank = distributed.ranks().rank
    if code is ExitCode.BUG:
        traceback.print_exception(error)
    else:
        print(f"rank {rank}: {error}", file=sys.stderr)
    standing = run.read_exit()
    is_first = standing is None or standing.attempt != attempt
    if is_first or (standing is not None and standing.code == ExitCode.HANG and code != ExitCode.HANG):
        reason = f"{type(error).__name__}: {error}"
        run.write_exit(Exit(int(code), reason, step, rank, attempt))
        run.log("end", attempt=attempt, code=int(code), reason=reason, step=step, rank=rank)
    return code
