"""One cluster for all tests of this folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import ClusterRun, local_cluster
from tests.support import make_latent_manifest

NEEDED = ("slurmctld", "slurmd", "sbatch", "munged")


@pytest.fixture(scope="session")
def slurm_is_here() -> None:
    path = f"{os.environ.get('PATH', '')}:/usr/sbin"
    missing = [name for name in NEEDED if shutil.which(name, path=path) is None]
    if missing or os.geteuid() != 0:
        reason = f"{', '.join(missing)} is missing: see slurm/local_cluster/start.sh" if missing else "needs root"
        if os.environ.get("SDTRAIN_REQUIRE_SLURM"):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def cluster(slurm_is_here: None) -> Iterator[None]:
    folder = Path(tempfile.mkdtemp(prefix="sl-", dir="/tmp"))  # a socket's path must be short
    with local_cluster(folder):
        yield
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Names of the cluster's nodes do not resolve, and all of them share this machine's disk.

    The preflight has tests of its own; in the others two cores would spend ten seconds of every start on it.
    """
    path = tmp_path_factory.mktemp("site") / "site.yaml"
    environment = {"SDTRAIN_MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    settings = {"environment": environment, "shared_folders": ["/"], "preflight": False}
    path.write_text(json.dumps(settings))  # JSON is YAML
    return path


@pytest.fixture(scope="session")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_latent_manifest(tmp_path_factory.mktemp("world"), train=48, validation=8)


@pytest.fixture(scope="session")
def new_run(
    cluster: None, site: Path, manifest: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], ClusterRun]:
    return lambda name: ClusterRun(tmp_path_factory.mktemp(name), site, manifest)
