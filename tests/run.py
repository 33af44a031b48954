"""`make test`: the light tests on all cores, then the heavy ones one at a time; `--long` runs the long ones alone.

Two heavy tests at once (two ranks each, or Ray) on a small machine run many times slower than one after the other.
"""

from __future__ import annotations

import os
import subprocess
import sys

SIDE_BY_SIDE = ("-n", "auto", "--dist", "loadgroup")


def run(title: str, *arguments: str) -> int:
    print(f"\n== {title}", flush=True)
    # Without bytecode, every process that a test starts would compile torch anew, for many seconds.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}
    code = subprocess.call([sys.executable, "-m", "pytest", "-q", *arguments], env=environment)
    return 0 if code == 5 else code  # 5: no test matched the expression


def main() -> int:
    arguments = sys.argv[1:]
    if "--long" in arguments:
        arguments.remove("--long")
        return run("long tests, one at a time", "-m", "long", "--durations=15", "--timeout=3600", *arguments)
    light = run("light tests, all cores", "-m", "not heavy and not long", *SIDE_BY_SIDE, *arguments)
    heavy = run("heavy tests, one at a time", "-m", "heavy and not long", "--durations=15", *arguments)
    return light or heavy


if __name__ == "__main__":
    sys.exit(main())
