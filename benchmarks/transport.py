"""The hostile server suite: our download stage beside bare img2dataset, case by case.

    python -m benchmarks.transport

Both run in a network namespace that holds nothing but `lo`, with a name server of its own (`tests.data.hostile`): no
packet can leave. Ours takes all cases at once, as one part. img2dataset takes each case in a process of its own, with
its Reader, Downloader, Resizer and urllib as they ship, ended after some seconds or beyond some memory, so that an
endless body does not stop the table.

A case goes wrong where a forbidden address was connected to, where something was stored that must not be or with other
pixels than it must have, or where the process had to be ended.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tests.data.hostile import namespace, suite
from tests.data.hostile.cases import CASES, STORED, Case
from tests.data.hostile.pictures import SIDE
from tests.data.hostile.suite import Verdict

MODULE = "benchmarks.transport"
AT_ONCE = 16
KILLED = "ended by us"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], epilog="Example: python -m benchmarks.transport"
    )
    parser.add_argument("--seconds", type=float, default=6.0, help="limit of img2dataset for one case")
    parser.add_argument(
        "--memory-mb", type=int, default=1000, help="limit of img2dataset for one case, beyond its start"
    )
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside is not None:
        json.dump(_inside(arguments.inside, arguments), sys.stdout)
        return
    with tempfile.TemporaryDirectory() as folder:
        options = ["--seconds", str(arguments.seconds), "--memory-mb", str(arguments.memory_mb)]
        ended = namespace.run(MODULE, "--inside", folder, *options, timeout_seconds=280)
    if ended.returncode != 0:
        sys.exit(ended.stdout[-2000:] + ended.stderr[-4000:])
    _print(json.loads(ended.stdout), arguments)


def _print(report: dict[str, Any], arguments: argparse.Namespace) -> None:
    ours, theirs = ([Verdict(**row) for row in report[side]] for side in ("ours", "img2dataset"))
    names = ("case", "must", "ours", "img2dataset")
    widths = (max(len(case.name) for case in CASES), 26, 26)
    print("  ".join(name.ljust(width) for name, width in zip(names, (*widths, 0), strict=True)))
    for mine, peer in zip(ours, theirs, strict=True):
        cells = (mine.name, mine.must, _shown(mine), _shown(peer))
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, (*widths, 0), strict=True)).rstrip())
    print()
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("img2dataset", "opencv-python-headless")]
    print(f"{len(CASES)} cases; {', '.join(versions)}; Python {sys.version.split()[0]}")
    print(f"img2dataset: at most {arguments.seconds:g} s and {arguments.memory_mb} MB a case")
    for name, verdicts in (("ours", ours), ("img2dataset", theirs)):
        wrong = [verdict for verdict in verdicts if not _is_right(verdict)]
        visits = sum(len(verdict.reached or ()) for verdict in verdicts)
        stored = sum(verdict.got == STORED != verdict.must for verdict in verdicts)
        killed = sum(verdict.got.startswith(KILLED) for verdict in verdicts)
        print(
            f"{name:12} wrong {len(wrong):3}; connections to forbidden addresses {visits:3}; "
            f"stored that must not be {stored:3}; ended by force {killed:3}"
        )
    peak, held = report["peak_bytes"] / 1e6, report["held_bytes"] / 1e6
    bound = held + suite.MEMORY_LIMIT_BYTES / 1e6
    print(f"our worker's memory: {held:.0f} MB before the first picture, peak {peak:.0f} MB, bound {bound:.0f} MB")


def _is_right(verdict: Verdict) -> bool:
    """As `Verdict.is_right`, but any reason to refuse will do: each program has its own words."""
    pixels_fit = verdict.pixel_error is None or verdict.pixel_error <= suite.MAX_PIXEL_ERROR
    right_end = (verdict.got == STORED) == (verdict.must == STORED) and not verdict.got.startswith(KILLED)
    return right_end and pixels_fit and not verdict.reached


def _shown(verdict: Verdict) -> str:
    words = "stored" if verdict.got == STORED else verdict.got
    if verdict.pixel_error is not None and verdict.pixel_error > suite.MAX_PIXEL_ERROR:
        words += ", other pixels"
    if verdict.reached:
        words += f", reached {', '.join(sorted(set(verdict.reached)))}"
    return words if _is_right(verdict) else f"WRONG {words}"


# --------------------------------------------------------------------------------------------------- in the namespace


def _inside(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    report = suite.main(folder)
    before = len((folder / suite.server.LOG).read_text().splitlines())
    assert before == sum(len(row["reached"] or ()) for row in report["verdicts"]), "connections of unknown origin"
    servers = suite.start_servers(folder)
    servers.wait()
    theirs = list(_img2dataset(folder, arguments))
    servers.stop()
    reached = suite.reached(folder)
    for verdict in theirs:
        verdict.reached = reached.get(verdict.name)
    return {**report, "ours": report["verdicts"], "img2dataset": [asdict(verdict) for verdict in theirs]}


def _img2dataset(folder: Path, arguments: argparse.Namespace) -> Iterator[Verdict]:
    """Every case in a fork of a process that has img2dataset loaded, some side by side."""
    with tempfile.TemporaryFile("w+") as file:
        pid = os.fork()
        if pid == 0:
            with _as_script(file):
                _run_forks(folder, arguments, file)
        os.waitpid(pid, 0)
        file.seek(0)
        outcomes = {row["name"]: row for row in map(json.loads, file)}
    for case in CASES:
        row = outcomes[case.name]
        yield Verdict(case.name, case.must, row["got"], row["pixel_error"])


@contextlib.contextmanager
def _as_script(file: Any) -> Iterator[None]:
    """End a fork with the block, whatever happens in it."""
    try:
        yield
        file.flush()
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def _run_forks(folder: Path, arguments: argparse.Namespace, file: Any) -> None:
    """Start a fork for each case, end those that take too long."""
    import urllib.request

    urllib.request.install_opener(urllib.request.build_opener())  # the one that ships
    running: dict[int, tuple[Case, float]] = {}
    waiting = list(CASES)
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            case = waiting.pop(0)
            running[_fork(folder, case, arguments)] = (case, time.monotonic())
        for pid, (case, began) in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            took = time.monotonic() - began
            if not ended and took < arguments.seconds:
                continue
            if not ended:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            del running[pid]
            got = f"{KILLED} after {took:.0f} s" if not ended else _outcome(folder, case, status)
            error = _pixel_error(folder, case) if got == STORED else None
            file.write(json.dumps({"name": case.name, "got": got, "pixel_error": error}) + "\n")
        time.sleep(0.02)


def _fork(folder: Path, case: Case, arguments: argparse.Namespace) -> int:
    pid = os.fork()
    if pid == 0:
        held = suite.memory_bytes("VmData")
        limit = held + arguments.memory_mb * 1_000_000
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        with open(os.devnull, "w") as nowhere, _as_script(nowhere):
            _download(folder / "peer" / case.name, case)
    return pid


def _download(folder: Path, case: Case) -> None:
    """One row through img2dataset's parts, as its own `download` puts them together."""
    from img2dataset.downloader import Downloader
    from img2dataset.reader import Reader
    from img2dataset.resizer import Resizer
    from img2dataset.writer import FilesSampleWriter

    source = suite.write_table(folder / "parts", [case])
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        digest = next((name for name in ("md5", "sha256") if getattr(case, name)), None)
        reader = Reader(str(source), "parquet", "url", "caption", digest, digest, [], 10000, set(), str(folder))
        (folder / "out").mkdir()
        downloader = Downloader(
            sample_writer_class=FilesSampleWriter,
            resizer=Resizer(SIDE, "center_crop", False, min_image_size=SIDE),
            thread_count=1,
            save_caption=True,
            extract_exif=False,
            output_folder=str(folder / "out"),
            column_list=reader.column_list,
            timeout=2,
            number_sample_per_shard=10000,
            oom_shard_count=5,
            compute_hash=digest or "sha256",  # its `download` insists that the two are the same
            verify_hash_type=digest,
            encode_format="jpg",
            retries=0,
            user_agent_token=None,
            disallowed_header_directives=["noai", "noimageai", "noindex", "noimageindex"],
        )
        for shard in reader:
            downloader.download_shard(shard)


def _outcome(folder: Path, case: Case, status: int) -> str:
    """`success`, img2dataset's own message, or what ended the process."""
    if os.WIFSIGNALED(status):
        return f"crashed by signal {os.WTERMSIG(status)}"
    tables = list((folder / "peer" / case.name / "out").glob("*.parquet"))
    if not tables:
        return "failed without a word"
    rows = pq.read_table(tables[0]).to_pylist()
    if not rows:
        return "lost: neither stored nor counted"
    row = rows[0]
    return STORED if row["status"] == "success" else _one_line(row["error_message"] or "MemoryError")


def _one_line(message: str) -> str:
    return " ".join(ascii(message)[1:-1].split())[:60]


def _pixel_error(folder: Path, case: Case) -> float:
    files = list((folder / "peer" / case.name / "out").rglob("*.jpg"))
    return suite.pixel_error(files[0].read_bytes(), case) if files else 255.0


if __name__ == "__main__":
    main()
