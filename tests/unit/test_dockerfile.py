"""The Dockerfile, read as a builder reads it: nothing in it may name what is not there. It is not built here."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
TARGETS = ("data", "train", "sample", "evaluate")


@dataclass
class Stage:
    """One `FROM`, and the instructions below it."""

    name: str
    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, name: str) -> list[str]:
        return [arguments for instruction, arguments in self.instructions if instruction == name]


def stages_of(text: str) -> dict[str, Stage]:
    """The stages by name; build arguments from before the first one are filled in."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    arguments: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    for line in filter(None, joined.splitlines()):
        name, rest = line.split(maxsplit=1)
        if name == "FROM":
            image, _, stage = rest.split()
            image = re.sub(r"\$\{(\w+)\}", lambda found: arguments[found[1]], image)
            stages[stage] = Stage(stage, image)
        elif not stages:
            assert name == "ARG", line
            key, _, value = rest.partition("=")
            arguments[key] = value
        else:
            stages[next(reversed(stages))].instructions.append((name, rest))
    return stages


STAGES = stages_of((REPOSITORY / "Dockerfile").read_text())


def history(stage: str) -> list[tuple[str, str]]:
    """All instructions that an image is made of, those of its bases first."""
    if stage not in STAGES:
        return []
    return [*history(STAGES[stage].base), *STAGES[stage].instructions]


def is_ignored(path: str) -> bool:
    """By the last line of .dockerignore that speaks of the path."""
    verdict = False
    for line in (REPOSITORY / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if line and not line.startswith("#") and fnmatch(path, pattern):
            verdict = not line.startswith("!")
    return verdict


def test_there_is_one_target_for_each_kind_of_work() -> None:
    used = {stage.base for stage in STAGES.values()} | {"tools", "wheel"}
    assert {name for name in STAGES if name not in used} == set(TARGETS)


def test_bases_are_pinned_or_stages_from_above() -> None:
    above: set[str] = set()
    for stage in STAGES.values():
        pinned = re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+-\w+(-\w+)?", stage.base)
        assert stage.base in above or pinned, f"{stage.name} starts from {stage.base}"
        above.add(stage.name)


@pytest.mark.parametrize("target", TARGETS)
def test_it_ends_as_a_user_without_rights_and_with_a_command_that_exists(target: str) -> None:
    users = [arguments for name, arguments in history(target) if name == "USER"]
    assert users[-1:] == ["1000"]
    command = json.loads(STAGES[target].all("CMD")[-1])
    program = Path(sys.executable).with_name(command[0])
    assert command[0] in PROJECT["scripts"]
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Usage: " in done.stdout


def test_what_is_copied_is_there_and_not_ignored() -> None:
    copied = [shlex.split(one)[:-1] for stage in STAGES.values() for one in stage.all("COPY")]
    paths = [path for sources in copied for path in sources if not sources[0].startswith("--from=")]
    assert {"pyproject.toml", "requirements.lock", *PROJECT["license-files"], PROJECT["readme"]} <= set(paths)
    assert [path for path in paths if not (REPOSITORY / path).exists() or is_ignored(path)] == []
    wheel = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert set(wheel["packages"]) <= set(paths)
    assert all(map(is_ignored, ("tests", ".venv", ".git", "runs", "sdtrain/__pycache__")))


def test_what_comes_from_other_stages_is_made_above() -> None:
    for place, stage in enumerate(STAGES.values()):
        taken = re.findall(r"from=(\w+)", " ".join(stage.all("RUN") + stage.all("COPY")))
        assert set(taken) <= set(list(STAGES)[:place]), stage.name


def test_what_changes_is_copied_and_not_mounted() -> None:
    """buildah takes a layer from its cache although what the layer's command had mounted is another."""
    mounted = {found for stage in STAGES.values() for found in re.findall(r"source=(\S+?),", str(stage.all("RUN")))}
    assert mounted == {"/usr/local/bin/uv"}


def test_labels_are_those_of_the_project() -> None:
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]+)"', str(STAGES["common"].all("LABEL"))))
    assert labels == {
        "title": PROJECT["name"],
        "description": PROJECT["description"].rstrip("."),
        "licenses": PROJECT["license"],
        "version": PROJECT["version"],
    }


def installs(target: str) -> list[str]:
    return [arguments for name, arguments in history(target) if name == "RUN" and "uv pip install" in arguments]


@pytest.mark.parametrize("target", TARGETS)
def test_everything_that_is_installed_is_held_to_the_lock(target: str) -> None:
    *dependencies, ours = installs(target)
    assert dependencies
    for command in dependencies:
        assert "--requirement /opt/sdtrain/pyproject.toml --constraint /opt/sdtrain/requirements.lock" in command
        assert "--mount=type=cache,target=/root/.cache/uv" in command, "or the cache stays in the image"
    assert "--no-cache --no-deps /opt/sdtrain/*.whl" in ours


def test_targets_hold_the_extras_of_their_work_and_no_others() -> None:
    extras = {target: set(re.findall(r"--extra (\S+)", " ".join(installs(target)))) for target in TARGETS}
    assert extras == {
        "data": {"data", "storage", "huggingface"},
        "train": {"train", "storage"},
        "sample": set(),
        "evaluate": {"evaluate"},
    }
    assert set().union(*extras.values()) <= PROJECT["optional-dependencies"].keys()
    compiles = {target for target in TARGETS if "g++" in str(history(target))}
    assert compiles == {"train"}


def test_the_lock_has_every_package_of_every_target() -> None:
    locked = set(re.findall(r"^([\w.-]+)==", (REPOSITORY / "requirements.lock").read_text(), re.MULTILINE))
    wanted = [*PROJECT["dependencies"], *(one for extra in PROJECT["optional-dependencies"].values() for one in extra)]
    names = {re.split(r"[\[<>=]", one)[0].lower().replace(".", "-") for one in wanted}
    assert names - locked == set()


def test_hadolint_accepts_it() -> None:
    program = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([program, REPOSITORY / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
