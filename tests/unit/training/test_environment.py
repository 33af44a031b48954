"""What a run remembers of its surroundings."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys

import pytest
import torch

from sdtrain import __version__
from sdtrain.training import environment


def test_versions_are_those_of_the_installed_packages() -> None:
    found = environment.versions()
    assert found["sdtrain"] == __version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["torch"] == torch.__version__.split("+")[0]
    assert set(found) == {"sdtrain", "python", *environment.PACKAGES}


def test_a_package_that_is_not_there_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.metadata.version

    def version(package: str) -> str:
        if package == "deepspeed":
            raise importlib.metadata.PackageNotFoundError(package)
        return known(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert set(environment.PACKAGES) - set(environment.versions()) == {"deepspeed"}


def test_the_commit_is_a_full_one(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        told.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="0" * 40 + "-dirty\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert environment.git_commit() == "0" * 40 + "-dirty"
    assert told[0][:2] == ["git", "-C"]
    assert re.search(r"sdtrain.training$", told[0][2])


@pytest.mark.parametrize(
    "error", [FileNotFoundError("git"), subprocess.CalledProcessError(128, "git"), subprocess.TimeoutExpired("git", 10)]
)
def test_no_git_no_commit(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*command: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(subprocess, "run", run)
    assert environment.git_commit() is None


def test_describe_names_everything_that_can_change_a_run_s_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(sys, "argv", ["sdtrain", "train", "page.yaml"])
    told = environment.describe()
    assert told["argv"] == ["sdtrain", "train", "page.yaml"]
    assert told["world_size"] == 4
    assert told["num_threads"] == torch.get_num_threads()
    assert set(told) == {"argv", "git_commit", "versions", "world_size", "device", "num_threads"}
