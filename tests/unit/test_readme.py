"""README says what is there: commands, flags, settings, paths, exit codes."""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from ruamel.yaml import YAML

import data_pipeline.cli
import launcher.cli
import sdtrain.cli
from sdtrain.config.load import load_config
from sdtrain.errors import ExitCode

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = {
    "sdtrain": sdtrain.cli.app,
    "sdtrain-data": data_pipeline.cli.app,
    "sdtrain-launch": launcher.cli.app,
}
OTHERS = {"make", "source", "hf", "touch"}
"""First words of command lines that are no programs of ours."""


def blocks(language: str) -> list[str]:
    """The code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def command_lines() -> list[str]:
    """Every line of the bash blocks, and whatever in the text starts with one of our programs and has arguments."""
    listed = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`((?:sdtrain(?:-data|-launch)?|torchrun|make) [^`]+)`", prose)
    return [*listed, *inline]


def rows(header: str) -> list[list[str]]:
    """The cells of the table whose first header is `header`, heads left out."""
    table = re.search(rf"^\| {header} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", README, re.MULTILINE)
    assert table is not None, f"README has no table that starts with {header}"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()]


def split_command(words: list[str]) -> tuple[Any, list[str], list[str]]:
    """The command that `words` call, its name, and its arguments."""
    command: Any = typer.main.get_command(PROGRAMS[words[0]])
    name, rest = [words[0]], words[1:]
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        assert rest[0] in command.commands, f"{' '.join(name)} has no command {rest[0]}"
        command = command.commands[rest[0]]
        name.append(rest.pop(0))
    return command, name, rest


def ours() -> Iterator[list[str]]:
    """The words of every command line that calls one of our programs, plain torchrun's trainee included."""
    for line in command_lines():
        words = shlex.split(line, comments=True)
        if words[0] == "torchrun":
            words = words[words.index("-m") + 1 :]
        if words[0] in PROGRAMS:
            yield words


@pytest.mark.parametrize("words", list(ours()), ids=" ".join)
def test_commands_and_flags_are_real(words: list[str]) -> None:
    command, name, rest = split_command(words)
    if rest in ([], ["--help"]) or "PAGE" in rest:  # a command that is only spoken of
        return
    assert not hasattr(command, "commands"), f"{' '.join(name)} needs a command"
    context = command.make_context(" ".join(name), list(rest))  # parses as the program does; raises what it would say
    assert context.params


@pytest.mark.parametrize("words", [words for words in ours() if any(".yaml" in one for one in words)], ids=" ".join)
def test_pages_load_with_their_settings(words: list[str]) -> None:
    pages = [word for word in words if word.endswith(".yaml") and "=" not in word]
    settings = [word for word in words if re.fullmatch(r"[a-z_.]+=.*", word)]
    page = next(word for word in pages if word.startswith("configs/"))
    load_config(ROOT / page, settings)


def test_every_command_line_is_known() -> None:
    known = {*PROGRAMS, *OTHERS, "torchrun"}
    assert {shlex.split(line, comments=True)[0] for line in command_lines()} <= known
    assert len(list(ours())) >= 20, "the lines must have been found"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)\b", "\n".join([*blocks("bash"), *code_spans()])))
    assert {"demo", "test"} <= named <= targets


def code_spans() -> list[str]:
    """What stands between single backticks."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", README)


def test_files_that_are_named_exist() -> None:
    """Code spans and command lines that look like a path of this repository, wildcards included."""
    tops = {"configs", "sdtrain", "launcher", "data_pipeline", "tests", "docs", "benchmarks", ".ci"}
    words = {word for span in [*code_spans(), *blocks("bash")] for word in span.split()}
    paths = sorted(word for word in words if "/" in word and word.split("/")[0] in tops)
    assert len(paths) > 30
    assert [path for path in paths if not list(ROOT.glob(path.rstrip("/")))] == []


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#]+)\)", README))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).is_file()


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: block.splitlines()[0])
def test_settings_are_those_of_the_page_they_are_from(block: str) -> None:
    page = load_config(ROOT / block.splitlines()[0].removeprefix("# ")).model_dump(mode="json")
    shown = YAML(typ="safe").load(io.StringIO(block))
    for section, settings in shown.items():
        assert {key: page[section][key] for key in settings} == settings


def test_exit_codes_are_the_program_s() -> None:
    listed = {int(code): name for code, name, _ in rows("code")}
    assert listed == {int(code): code.name.lower().replace("_", " ") for code in ExitCode}


def test_the_house_has_these_rooms_and_no_others() -> None:
    listed = [cell.strip("`") for cell, _ in rows("place")]
    assert [place for place in listed if not (ROOT / place).exists()] == []
    packages = {f"sdtrain/{init.parent.name}/" for init in (ROOT / "sdtrain").glob("*/__init__.py")}
    assert packages <= set(listed)


def test_tests_that_are_named_exist() -> None:
    named = {name for cells in rows("claim") for name in re.findall(r"test_\w+\.py", cells[1])}
    there = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert named
    assert named <= there


def test_the_licence_is_the_whole_standard_text() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert len(text.splitlines()) == 201
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert text.rstrip().endswith("limitations under the License.")
