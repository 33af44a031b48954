"""Ranks in containers, on a real Slurm.

**Neither apptainer nor pyxis takes part**: Debian 12 has no package of them. What stands in for apptainer reads the
words that the batch script gives it, and makes a mount namespace in which everything is read-only but what they bind.
So this shows that the script gives the right words, that folders, variables, signals and the ranks' last word pass, and
nothing of how apptainer itself behaves.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sdtrain.errors import ExitCode
from tests.slurm.cluster import ClusterRun, slurm

pytestmark = [pytest.mark.heavy, pytest.mark.long, pytest.mark.timeout(400)]

NewRun = Callable[[str], ClusterRun]

STAND_IN = """#!/usr/bin/env bash
set -euo pipefail
[ "$1 $2" = "exec --nv" ] && [[ $3 == --bind=* && $4 == --pwd=* ]] || { echo "not understood: $*" >&2; exit 255; }
binds=${3#--bind=} folder=${4#--pwd=} image=$5
shift 5
export PATH=IMAGE_PATH STANDS_IN=$image
exec /usr/bin/unshare --mount /bin/bash -euc '
  image=$1 folder=$2 binds=$3
  shift 3
  if [ -d "$image/bin" ]; then
    /bin/mount --rbind "$image" "$image"
    for place in /dev /proc /sys; do /bin/mount --rbind "$place" "$image$place"; done
  else
    /bin/mount --rbind / "$image"
  fi
  for bind in ${binds//,/ }; do
    IFS=: read -r from to _ <<<"$bind"
    /bin/mkdir -p "$image${to:-$from}"
    /bin/mount --bind "$from" "$image${to:-$from}"
  done
  /bin/mount -o remount,bind,ro "$image"
  exec /usr/sbin/chroot "$image" /usr/bin/env --chdir="$folder" "$@"
' - "$image" "$folder" "$binds" "$@"
"""
OWN_PATH = f"{Path(sys.executable).parent}:/usr/bin:/bin"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An empty folder, in which this machine's own root file system appears; or a built image, with what it has."""
    built = os.environ.get("SDTRAIN_TEST_IMAGE")
    made = tmp_path / "image"
    made.mkdir()
    return Path(built) if built else made


@pytest.fixture
def contained(new_run: NewRun, image: Path, tmp_path: Path, manifest: Path) -> ClusterRun:
    """A run whose nodes have an `apptainer`, and whose site has what goes with it."""
    run = new_run("contained")
    for folder in ("bin", "scratch"):
        (tmp_path / folder).mkdir()
    program = tmp_path / "bin" / "apptainer"
    path = "/usr/local/bin:/usr/bin:/bin" if (image / "bin").exists() else OWN_PATH
    program.write_text(STAND_IN.replace("IMAGE_PATH", path))
    program.chmod(0o755)
    site = json.loads(run.site.read_text())
    site["environment"]["PATH"] = f"{program.parent}:{os.environ['PATH']}"
    site |= {"container_runtime": "apptainer", "container_mounts": [str(manifest.parent)]}
    site |= {"scratch": str(tmp_path / "scratch")}
    run.site = tmp_path / "site.yaml"
    run.site.write_text(json.dumps(site))
    return run


@pytest.mark.parametrize("mode", ["srun", "torchrun"])
def test_ranks_in_containers_are_told_to_leave_and_go_on(contained: ClusterRun, image: Path, mode: str) -> None:
    run = contained
    page = run.page(data={"batch_size": 16}, trainer={"max_steps": 8})
    run.submit(page, "--container", str(image), "--mode", mode)
    run.wait_for_step(2)
    assert [run.rank(number).environ()["STANDS_IN"] for number in (0, 1)] == [str(image)] * 2
    slurm("scancel", "--signal=TERM", run.job)
    assert run.wait_for_end() == "COMPLETED", run.said()
    assert (run.word().code, run.word().step, run.restarts()) == (0, 8, 1), run.said()
    told, again = run.events("end")[0], run.events("start")[1]
    assert told["code"] == ExitCode.REQUEUE
    assert again["step"] == told["step"] > 0 and again["world_size"] == 2


def test_the_word_of_a_refused_start_leaves_the_container(contained: ClusterRun, image: Path, tmp_path: Path) -> None:
    """It lies in the temporary folder, since the run's folder must not be touched."""
    run = contained
    page = run.page(data={"batch_size": 16, "manifest": str(tmp_path / "no-such-manifest")})
    run.submit(page, "--container", str(image))
    assert run.wait_for_end() == "FAILED", run.said()
    assert (run.exit_code(), run.restarts()) == (ExitCode.DATA, 0), run.said()
    assert "the start was refused with code 3, nothing but" in run.said()
