"""Runs `sdtrain` with its run folder read-only or on a small disk, in a mount namespace that ends with the process.

    python -m tests.faults.confined ANSWER read-only FOLDER train PAGE ...
    python -m tests.faults.confined ANSWER size=1m,nr_inodes=40 FOLDER train PAGE ...
    python -m tests.faults.confined ANSWER read-only@1 FOLDER train PAGE ...  # for rank 1 alone

Needs root, else it exits with 77. A small disk gets what FOLDER holds; ANSWER tells how the command ended and what it
changed there, since nobody else sees that disk.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

from sdtrain import cli

NEW_NAMESPACE = 0x20000
READ_ONLY, REMOUNT, BIND, RECURSIVE, PRIVATE = 0x1, 0x20, 0x1000, 0x4000, 0x40000
NOT_ALLOWED = 77
_libc = ctypes.CDLL(None, use_errno=True)


def everything(folder: Path) -> dict[str, list[object]]:
    """Time, size and digest of everything in a folder, itself included."""
    found: dict[str, list[object]] = {}
    for path in sorted((folder, *folder.rglob("*"))):
        facts = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        size = facts.st_size if path.is_file() else 0
        found[str(path.relative_to(folder))] = [facts.st_mtime_ns, size, hashlib.sha256(content).hexdigest()]
    return found


def mount(source: str, target: Path, kind: str, flags: int, options: str = "") -> None:
    if _libc.mount(source.encode(), str(target).encode(), kind.encode(), flags, options.encode()) != 0:
        raise OSError(ctypes.get_errno(), f"mount {kind} on {target}")


def leave_namespace() -> None:
    """Mounts from here on are seen by this process and its children alone."""
    if _libc.unshare(NEW_NAMESPACE) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    mount("none", Path("/"), "none", RECURSIVE | PRIVATE)


def confine(folder: Path, how: str) -> None:
    leave_namespace()
    if how == "read-only":
        mount(str(folder), folder, "none", BIND)
        mount("none", folder, "none", BIND | REMOUNT | READ_ONLY)
        return
    aside = Path(f"{folder}-aside-{os.getpid()}")
    shutil.copytree(folder, aside)
    mount("tmpfs", folder, "tmpfs", 0, how)
    shutil.copytree(aside, folder, dirs_exist_ok=True)
    shutil.rmtree(aside)


def main() -> None:
    answer, how, folder, *command = sys.argv[1:]
    how, _, of_rank = how.partition("@")
    try:
        if of_rank in ("", os.environ["RANK"]):
            confine(Path(folder), how)
    except OSError as error:
        print(f"mounts are not allowed here: {error}", file=sys.stderr)
        sys.exit(NOT_ALLOWED)
    before = everything(Path(folder))
    pid = os.fork()
    if pid == 0:
        cli.main(command)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    told = {"code": code, "before": before, "after": everything(Path(folder))}
    Path(f"{answer}.{os.environ['RANK']}").write_text(json.dumps(told))
    sys.exit(code)


if __name__ == "__main__":
    main()
