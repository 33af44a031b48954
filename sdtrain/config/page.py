"""A YAML file as plain data, with the line of every key; duplicate keys and tricks of YAML are mistakes."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from sdtrain.config.problems import KeyPath, Problem, dotted, shown
from sdtrain.errors import ConfigError

COMMAND_LINE = "command line"


@dataclass(slots=True)
class Page:
    """A page as it was written.

    Attributes:
        data: Nested dicts, lists and scalars.
        places: Where each key was given: `line 7`, or `command line`.
        problems: Mistakes that were found on the way.
    """

    data: Any = None
    places: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


class _Reader:
    """Turns YAML's nodes into plain data. YAML 1.2: `1e-4` is a number, `yes` and `no` are texts."""

    def __init__(self, place: str | None = None) -> None:
        self.page = Page()
        self._place = place
        self._yaml = YAML(typ="safe", pure=True)
        self._seen: set[int] = set()

    def read(self, text: str) -> Page:
        """Read one document; its mistakes are in the page."""
        node = self._yaml.compose(text)
        self.page.data = None if node is None else self._plain(node, ())
        return self.page

    def _plain(self, node: Node, path: KeyPath) -> Any:
        if id(node) in self._seen:
            self._refuse(path, "YAML aliases (*name) are not used in pages; write the value out")
            return None
        self._seen.add(id(node))
        if isinstance(node, MappingNode):
            return self._mapping(node, path)
        if isinstance(node, SequenceNode):
            return [self._plain(part, (*path, index)) for index, part in enumerate(node.value)]
        return self._scalar(node, path)

    def _mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Any]:
        plain: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, ScalarNode) else "?"
            place = self._place or f"line {key_node.start_mark.line + 1}"
            if key in plain:
                first = self.page.places[*path, key]
                where = "" if first == place else f", in {first} and {place}"
                self._refuse((*path, key), f"is given twice{where}; remove one")
                continue
            self.page.places[*path, key] = place
            plain[key] = self._plain(value_node, (*path, key))
        return plain

    def _scalar(self, node: Node, path: KeyPath) -> Any:
        """A scalar by YAML's rules; tags that would build something else are refused, dates stay texts."""
        kind = str(node.tag).rpartition(":")[2]
        if kind == "timestamp":
            return node.value
        if kind not in ("null", "bool", "int", "float", "str"):
            self._refuse(path, f"the YAML tag !{kind} is not used in pages; write a plain value")
            return None
        try:
            return self._yaml.constructor.construct_object(node)
        except (ValueError, YAMLError):
            self._refuse(path, f"{node.value} is no {kind}")
            return None

    def _refuse(self, path: KeyPath, message: str) -> None:
        self.page.problems.append(Problem(dotted(path), message))


def _not_yaml(error: YAMLError) -> str:
    mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
    if mark is None:
        return f"is not YAML: {str(error).splitlines()[0]}"
    problem = getattr(error, "problem", None) or getattr(error, "context", None)
    return f"is not YAML: {problem} (line {mark.line + 1}, column {mark.column + 1})"


def _no_such_file(path: Path) -> str:
    pages = sorted(part.name for part in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, pages, n=1)
    if close:
        return f"{path}: no such file; did you mean {path.with_name(close[0])}?"
    if pages:
        return f"{path}: no such file; {path.parent} holds {', '.join(pages)}"
    return f"{path}: no such file, and no YAML page in {path.parent}"


def read_page(path: Path) -> Page:
    """Read a YAML file.

    Raises:
        ConfigError: The file is missing or unreadable, is not YAML, or is not made of `key: value` lines.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(_no_such_file(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else (error.strerror or str(error))
        raise ConfigError(f"{path}: cannot be read: {reason}") from None
    try:
        page = _Reader().read(text)
    except YAMLError as error:
        raise ConfigError(f"{path} {_not_yaml(error)}") from None
    if not isinstance(page.data, dict):
        found = "nothing" if page.data is None else shown(page.data)
        raise ConfigError(f"{path}: a page is made of `key: value` lines, found {found}")
    return page


def apply_overrides(page: Page, overrides: Sequence[str]) -> None:
    """Put `dotted.key=value` settings into a page; values are YAML, so `ema=null` and `a=[1, 2]` work."""
    for override in overrides:
        problem = _apply(page, override)
        if problem is not None:
            page.problems.append(problem)


def _apply(page: Page, override: str) -> Problem | None:
    key, equals, text = override.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        return Problem("", f"{override!r} on the command line is not key=value, like optimizer.learning_rate=2e-4")
    try:
        value = _Reader(COMMAND_LINE).read(text)
    except YAMLError as error:
        return Problem(dotted(path), f"the value {text!r} on the command line {_not_yaml(error)}")
    section = page.data
    for depth, part in enumerate(path[:-1], start=1):
        if section.get(part) is None:
            section[part] = {}
            page.places[path[:depth]] = COMMAND_LINE
        if not isinstance(section[part], dict):
            return Problem(
                dotted(path), f"{dotted(path[:depth])} = {shown(section[part])} holds no keys; give it as a whole"
            )
        section = section[part]
    section[path[-1]] = value.data
    page.places = {known: place for known, place in page.places.items() if known[: len(path)] != path}
    page.places[path] = COMMAND_LINE
    page.places |= {(*path, *below): place for below, place in value.places.items()}
    page.problems += [
        Problem(dotted((*path, problem.path) if problem.path else path), problem.message) for problem in value.problems
    ]
    return None
