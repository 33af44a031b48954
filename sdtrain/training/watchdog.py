"""The process beside every rank: sees that the rank stands still or died, names who is to blame, and ends it.

A hang cannot be noticed from inside: the rank waits in a collective, is stopped, or sits in a file system that does not
answer. This process shares nothing with its rank but a record in memory, imports no torch and starts in a tenth of a
second, before the rank has met its peers. As long as the rank moves, it touches no file.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sdtrain.errors import ExitCode
from sdtrain.run_dir import Exit, RunDir
from sdtrain.training.heartbeat import LEAVING, Heartbeat, Patience, Pulse, PulseReader
from sdtrain.training.peers import (
    ANSWER_SECONDS,
    Peer,
    RollCall,
    call_roll,
    from_bytes,
    host_name,
    listen_beside,
    to_bytes,
)
from sdtrain.training.verdict import Board, ProcessState, Report, Verdict, decide, descendants, launch_name, look_at

TICK_SECONDS = 0.25
MAX_TICK_SECONDS = 5.0
"""A longer pause between two ticks means that this process did not run either: a suspended job is not a hang."""
SETTLE_SECONDS = 3.0
"""How long an alarmed watchdog waits for the others' reports, and then for their word."""
OVER_SECONDS = 10.0
"""How long a rank may stand still once another one has left a word of failure."""
FILES_SECONDS = 20.0
"""How long reporting may take before the rank is ended without it: the file system may be what hangs."""
STACKS_SIGNAL = signal.SIGUSR2


class Watchdog:
    """Watches one rank; see `watch`."""

    def __init__(
        self,
        run: RunDir,
        *,
        rank: int,
        world_size: int,
        pid: int,
        notice_seconds: float,
        board: Board,
        read_pulse: Callable[[], Pulse],
        read_stacks: Callable[[], str],
        call: Callable[[], RollCall] = RollCall,
        look: Callable[[int], ProcessState] = look_at,
        is_parent: Callable[[int], bool] = lambda pid: os.getppid() == pid,
        send: Callable[[int, int], None] = os.kill,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Watch the process `pid`.

        Args:
            run: The run's folder.
            rank: Global rank of `pid`.
            world_size: Number of ranks.
            pid: Process of the rank, parent of this one.
            notice_seconds: A rank that stands this long is reported to the others, alarmed or not.
            board: Where the watchdogs of this launch report.
            read_pulse: The rank's last beat.
            read_stacks: Python stacks that the rank has dumped so far.
            call: Ask who of the other ranks answers over the network.
            look: State of a process.
            is_parent: Whether the rank still lives.
            send: Send a signal to a process.
            clock: Seconds that do not jump.
            sleep: Wait.
        """
        self._run = run
        self._rank = rank
        self._world_size = world_size
        self._pid = pid
        self._notice_seconds = notice_seconds
        self._board = board
        self._read_pulse = read_pulse
        self._read_stacks = read_stacks
        self._call = call
        self._look = look
        self._is_parent = is_parent
        self._send = send
        self._clock = clock
        self._sleep = sleep
        self._pulse = read_pulse()
        self._quiet_seconds = 0.0
        self._last_tick = clock()
        self._next_look = 0.0
        self._is_reported = False

    def watch(self) -> None:
        """Return when the rank has ended, by itself or through this process."""
        while True:
            try:
                if not self.tick():
                    return
            except OSError as error:  # a full disk is no reason to stop watching
                self._say(f"could not write to the run folder: {error}")
            self._sleep(TICK_SECONDS)

    def tick(self) -> bool:
        """Look once; whether there is still something to watch."""
        if not self._is_parent(self._pid):
            self._mourn()
            return False
        self._listen()
        if self._quiet_seconds >= self._pulse.allowance_seconds:
            return self._raise_alarm()
        if self._quiet_seconds >= self._notice_seconds and not self._is_reported:
            self._publish(alarmed=False)
        if self._quiet_seconds >= OVER_SECONDS and self._is_over():
            self._say("the attempt is over, and this rank does not leave: it is ended")
            self._end_rank()
            return False
        return True

    def _listen(self) -> None:
        """Take note of a new beat, or of the time that went by without one."""
        now = self._clock()
        passed, self._last_tick = now - self._last_tick, now
        pulse, before = self._read_pulse(), self._pulse
        self._pulse = pulse
        self._quiet_seconds += min(passed, MAX_TICK_SECONDS)
        if pulse.count == before.count:
            return
        if self._is_reported:
            self._say(f"moves again after {self._quiet_seconds:.0f} s in phase {before.phase} of step {before.step}")
            self._board.withdraw(self._rank)
            self._is_reported = False
        self._quiet_seconds = 0.0

    # A rank that stands still -----------------------------------------------------------------------------------------

    def _raise_alarm(self) -> bool:
        """Report, hear the others, leave a word, end the rank; true if it moved after all."""
        deadline = threading.Timer(FILES_SECONDS, self._end_rank)
        deadline.daemon = True
        deadline.start()
        try:
            self._ask_for_stacks()
            self._publish(alarmed=True)
            self._say(
                f"phase {self._pulse.phase} of step {self._pulse.step} stands for {self._quiet_seconds:.0f} s; "
                f"{self._pulse.allowance_seconds:g} s are allowed"
            )
            self._sleep(SETTLE_SECONDS)
            self._listen()
            if self._quiet_seconds == 0:
                return True
            self._keep_stacks()
            self._see_to_a_word()
            self._end_rank()
        except OSError as error:
            self._say(f"the hang could not be written down: {error}")
            self._end_rank()
        finally:
            deadline.cancel()
        return False

    def _see_to_a_word(self) -> None:
        """The lowest alarmed rank decides, so that one reads all reports and not everyone; the others wait for it."""
        judge = self._lowest_alarmed()
        if judge is not None and self._waits_for_the_word_of(judge):
            return
        call = self._call()
        reports = self._board.read_all(self._world_size) | {self._rank: self._report(alarmed=True)}
        self._leave_word(decide(reports, self._world_size, call))

    def _lowest_alarmed(self) -> Report | None:
        """The alarmed report of a lower rank; None where this rank is the lowest."""
        reports = map(self._board.read, range(self._rank))
        return next((report for report in reports if report is not None and report.alarmed), None)

    def _waits_for_the_word_of(self, judge: Report) -> bool:
        end = self._clock() + 2 * SETTLE_SECONDS + ANSWER_SECONDS
        while self._clock() < end:
            word = self._run.read_exit()
            if word is not None and word.attempt in (judge.attempt, self._pulse.attempt):
                return True
            self._sleep(TICK_SECONDS)
        return False

    def _leave_word(self, verdict: Verdict) -> None:
        seconds = f"{self._quiet_seconds:.0f} s without a sign of life"
        reason = f"hang: {verdict.reason}; {seconds}; stacks in {self._run.stacks / self._pulse.attempt}"
        self._say(reason)
        attempt = self._pulse.attempt
        self._run.leave_word(Exit(int(ExitCode.HANG), reason, self._pulse.step, verdict.rank, attempt))

    def _report(self, *, alarmed: bool) -> Report:
        state = self._look(self._pid)
        return Report(
            rank=self._rank,
            host=host_name(),
            pid=self._pid,
            attempt=self._pulse.attempt,
            alarmed=alarmed,
            quiet_seconds=self._quiet_seconds,
            phase=self._pulse.phase,
            step=self._pulse.step,
            micro_step=self._pulse.micro_step,
            ticks=self._pulse.ticks,
            state=state.state,
            waits_in=state.waits_in,
            time=time.time(),
        )

    def _publish(self, *, alarmed: bool) -> None:
        self._is_reported = True
        self._board.publish(self._report(alarmed=alarmed))

    def _ask_for_stacks(self) -> None:
        """A stopped process dumps nothing; what it was stopped in is no cause either."""
        with contextlib.suppress(ProcessLookupError):
            self._send(self._pid, STACKS_SIGNAL)

    def _keep_stacks(self) -> None:
        stacks = self._read_stacks() or "no stacks: the process is stopped, or waits for a disk\n"
        path = self._run.stacks / self._pulse.attempt / f"rank-{self._rank}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(stacks, encoding="utf-8")

    # A rank that must end, or did -------------------------------------------------------------------------------------

    def _is_over(self) -> bool:
        """Whether another rank has left a word of failure while this one stands; asks the file system now and then."""
        if self._pulse.phase == LEAVING or self._clock() < self._next_look:
            return False
        self._next_look = self._clock() + OVER_SECONDS / 2
        word = self._run.read_exit()
        planned = (ExitCode.DONE, ExitCode.REQUEUE)
        return word is not None and word.attempt == self._pulse.attempt and word.code not in planned

    def _end_rank(self) -> None:
        """Kill the rank and what it started, a stopped data worker too."""
        if not self._is_parent(self._pid):
            return
        family = [pid for pid in descendants(self._pid) if pid != os.getpid()]
        for pid in (self._pid, *family):
            with contextlib.suppress(ProcessLookupError):
                self._send(pid, signal.SIGKILL)

    def _mourn(self) -> None:
        """The rank is gone and did not say why: nobody else can tell where it was."""
        self._listen()
        pulse = self._pulse
        reason = (
            f"rank {self._rank} on {host_name()} died in phase {pulse.phase} of step {pulse.step} without a "
            "word: killed (kill -9, out of memory) or crashed in native code; its own log may say more"
        )
        if self._run.leave_word(Exit(int(ExitCode.HANG), reason, pulse.step, self._rank, pulse.attempt)):
            self._say(reason)

    def _say(self, text: str) -> None:
        print(f"[watchdog of rank {self._rank}] {text}", file=sys.stderr, flush=True)


# The rank's side ------------------------------------------------------------------------------------------------------


class Watched:
    """A rank's own watchdog process, from before it meets its peers until it has left its last word.

    Attributes:
        heartbeat: What the rank beats on.
        peer: Where the others find this watchdog.
        peers: Where all ranks are, once they have met.
    """

    def __init__(self, run: RunDir, *, rank: int, world_size: int, patience: Patience, attempt: str) -> None:
        """Start the process; from the main thread, early."""
        self.heartbeat = Heartbeat(patience, attempt=attempt)
        self._rank = rank
        self._stacks = os.memfd_create("sdtrain-stacks")
        faulthandler.register(STACKS_SIGNAL, file=self._stacks, all_threads=True)
        self._roll = os.memfd_create("sdtrain-roll")
        self.peer, door = listen_beside(rank) if world_size > 1 else (Peer(rank, host_name()), None)
        self.peers: list[Peer] = []
        doors = () if door is None else (door.fileno(),)  # the watchdog alone keeps it open, and never reads from it
        self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
            [
                *(sys.executable, "-m", "sdtrain.training.watchdog", str(run.path.absolute())),
                *("--rank", str(rank), "--world-size", str(world_size), "--pid", str(os.getpid())),
                *("--notice-seconds", str(patience.step_seconds / 2), "--launch", launch_name(os.environ)),
                *("--beats", str(self.heartbeat.fd), "--stacks", str(self._stacks), "--roll", str(self._roll)),
            ],
            pass_fds=(self.heartbeat.fd, self._stacks, self._roll, *doors),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # who signals the rank's process group does not mean its watchdog
        )
        if door is not None:
            door.close()

    def introduce(self, peers: Sequence[Peer]) -> None:
        """Tell the watchdog where the ranks are that this one has met."""
        self.peers = list(peers)
        os.pwrite(self._roll, to_bytes(peers), 0)

    def call_roll(self) -> RollCall:
        """Ask who of the other ranks still answers; not collective."""
        return call_roll(self._rank, self.peers)

    def check(self) -> None:
        """Say so, once, if the watchdog died; it is no zombie then."""
        if self._process is not None and self._process.poll() is not None:
            code = self._process.returncode
            print(f"rank {self._rank}: its watchdog ended ({code}); hangs go unnoticed from here", file=sys.stderr)
            self._process = None

    def close(self) -> None:
        """End the watchdog: the rank has left its word, or needs none."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        faulthandler.unregister(STACKS_SIGNAL)
        os.close(self._stacks)
        os.close(self._roll)
        self.heartbeat.close()


# The process ----------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Watch the process that started this one."""
    parser = argparse.ArgumentParser(prog="python -m sdtrain.training.watchdog", description=__doc__)
    parser.add_argument("run", type=Path)
    for name in ("--rank", "--world-size", "--pid", "--beats", "--stacks", "--roll"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--notice-seconds", type=float, required=True)
    parser.add_argument("--launch", required=True)
    given = parser.parse_args(arguments)
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)  # meant for the rank; this process ends with it
    run = RunDir(given.run)
    Watchdog(
        run,
        rank=given.rank,
        world_size=given.world_size,
        pid=given.pid,
        notice_seconds=given.notice_seconds,
        board=Board(run, given.launch, since=time.time() - 60),
        read_pulse=PulseReader(given.beats).read,
        read_stacks=lambda: os.pread(given.stacks, 2**20, 0).decode(errors="replace"),
        call=lambda: call_roll(given.rank, from_bytes(os.pread(given.roll, 2**24, 0))),
    ).watch()


if __name__ == "__main__":
    main()
