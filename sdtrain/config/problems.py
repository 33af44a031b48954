"""What is wrong with a page, in words: one `Problem` per mistake, all of them in one message."""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic_core import ErrorDetails

from sdtrain.config.base import Section, described_fields

KeyPath = tuple[str | int, ...]

_WANTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "a text",
    "bool_type": "true or false",
    "tuple_type": "a list, like [a, b]",
    "list_type": "a list, like [a, b]",
    "dict_type": "a section of key: value lines",
    "model_type": "a section of key: value lines",
    "model_attributes_type": "a section of key: value lines",
    "finite_number": "a finite number",
}
_BOUNDS = {
    "greater_than": (">", "gt"),
    "greater_than_equal": (">=", "ge"),
    "less_than": ("<", "lt"),
    "less_than_equal": ("<=", "le"),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake.

    Attributes:
        path: Dotted path of the key, as one would write it on the command line; empty for the whole page.
        message: What is wrong, what is allowed, what to do.
    """

    path: str
    message: str


def dotted(path: Sequence[str | int]) -> str:
    """`("data", "batch_size")` as `data.batch_size`."""
    return ".".join(str(part) for part in path)


def shown(value: Any, *, most: int = 80) -> str:
    """A value as YAML would write it on one line, cut after `most` characters."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= most else text[: most - 3] + "..."


def nearest(word: str, choices: Sequence[str]) -> str | None:
    """The choice that `word` was most likely meant to be, or None."""
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return close[0] if close else None


def value_at(page: Any, path: Sequence[str | int]) -> tuple[bool, Any]:
    """Whether the page holds something at `path`, and what."""
    for part in path:
        if isinstance(page, list):  # its keys are its indices, so that one look-up serves both
            page = dict(enumerate(page))
        if not isinstance(page, Mapping) or part not in page:
            return False, None
        page = page[part]
    return True, page


def _section_classes(annotation: Any) -> Iterator[type[Section]]:
    """The section classes in an annotation, through unions and `Annotated`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    elif get_origin(annotation) is Annotated:
        yield from _section_classes(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from _section_classes(part)


def _meant(annotation: Any, data: Any) -> type[Section] | None:
    """The section class that `data` is written for: the only one, or the one with its `type`."""
    classes = list(_section_classes(annotation))
    if len(classes) <= 1:
        return classes[0] if classes else None
    tag = data.get("type") if isinstance(data, Mapping) else None
    return next((part for part in classes if tag in get_args(part.model_fields["type"].annotation)), None)


def section_at(model: type[Section], page: Any, path: Sequence[str | int]) -> type[Section] | None:
    """The section class that stands at `path` of a page, or None where there is none."""
    section: type[Section] | None = model
    for part in path:
        if section is None or part not in section.model_fields:
            return None
        _, page = value_at(page, (part,))
        section = _meant(section.model_fields[str(part)].annotation, page)
    return section


def key_paths(model: type[Section], prefix: KeyPath = ()) -> Iterator[KeyPath]:
    """Every key that a page may hold, through all kinds of its sections."""
    for name, info in model.model_fields.items():
        yield (*prefix, name)
        for section in _section_classes(info.annotation):
            yield from key_paths(section, (*prefix, name))


def _without_tags(page: Any, loc: Sequence[str | int]) -> KeyPath:
    """Pydantic's location without the union tags that it weaves in: they are no keys of the page."""
    path: list[str | int] = []
    data = page
    for part in loc:
        if isinstance(data, Mapping) and part not in data and data.get("type") == part:
            continue
        path.append(part)
        _, data = value_at(data, (part,))
    return tuple(path)


def _unknown_key(model: type[Section], page: Any, path: KeyPath) -> str:
    """Words for a key that no section knows: its likely meaning, its right place, or all valid keys."""
    *parents, word = path
    section = section_at(model, page, parents)
    siblings = [name for name in section.model_fields if name != word] if section else []
    if (meant := nearest(str(word), siblings)) is not None:
        return f"unknown key; did you mean {dotted((*parents, meant))}?"
    elsewhere = sorted({dotted(known) for known in key_paths(model) if known[-1] == word})
    if elsewhere:
        return f"unknown key; it belongs at {' or '.join(elsewhere)}"
    return f"unknown key; {dotted(parents) or 'the page'} may hold {', '.join(siblings)}"


def _missing(model: type[Section], page: Any, path: KeyPath) -> str:
    """Words for an absent key, with its meaning."""
    section = section_at(model, page, path[:-1])
    meaning = described_fields(section).get(str(path[-1])) if section else None
    return f"is missing: {meaning}" if meaning else "is missing"


def _one_of(value: Any, choices: Sequence[Any]) -> str:
    """Words for a value that is none of a few."""
    meant = nearest(value, [str(choice) for choice in choices]) if isinstance(value, str) else None
    listed = ", ".join(str(choice) for choice in choices)
    return f"must be {'one of ' if len(choices) > 1 else ''}{listed}" + (f"; did you mean {meant}?" if meant else "")


def _literal_choices(model: type[Section], page: Any, path: KeyPath, expected: str) -> list[str]:
    """The choices of a literal, read from the section where possible (pydantic joins them into a sentence)."""
    section = section_at(model, page, path[:-1])
    info = section.model_fields.get(str(path[-1])) if section else None
    if info is None:
        return [expected.replace("'", "")]
    parts = [info.annotation, *get_args(info.annotation)]
    literals = [choice for part in parts for choice in get_args(part) if isinstance(choice, str | int)]
    return list(dict.fromkeys(str(choice) for choice in literals))


def _wrong_type(kind: str, value: Any) -> str:
    """Words for a value of a wrong type, with the right spelling where it is known."""
    text = f"must be {_WANTED[kind]}"
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f"{text}; write {int(value)}"
    return text


def problem_of(error: ErrorDetails, model: type[Section], page: Any) -> Problem:
    """One of pydantic's errors in our words."""
    path = _without_tags(page, error["loc"])
    kind, context = error["type"], error.get("ctx", {})
    _, value = value_at(page, path)
    if kind == "extra_forbidden":
        message = _unknown_key(model, page, path)
    elif kind == "missing":
        message = _missing(model, page, path)
    elif kind in ("union_tag_invalid", "union_tag_not_found"):
        path = (*path, "type")
        tags = [tag for part in _tagged_choices(model, page, path[:-1]) for tag in part]
        message = (
            _one_of(context.get("tag"), tags) if kind == "union_tag_invalid" else f"is missing; {_one_of(None, tags)}"
        )
    elif kind == "literal_error":
        message = _one_of(value, _literal_choices(model, page, path, context["expected"]))
    elif kind in _BOUNDS:
        sign, name = _BOUNDS[kind]
        message = f"must be {sign} {context[name]:g}"
    elif kind == "string_too_short":
        message = "must not be empty"
    elif kind in ("too_short", "too_long"):
        bound = context["min_length"] if kind == "too_short" else context["max_length"]
        message = (
            f"must hold {bound} {'or more' if kind == 'too_short' else 'at most'}, found {context['actual_length']}"
        )
    elif kind in _WANTED:
        message = _wrong_type(kind, value)
    else:
        message = error["msg"][0].lower() + error["msg"][1:]
    return Problem(dotted(path), message)


def _tagged_choices(model: type[Section], page: Any, path: KeyPath) -> Iterator[tuple[str, ...]]:
    """The `type` values of the sections that may stand at `path`."""
    parent = section_at(model, page, path[:-1])
    if parent is None:
        return
    for section in _section_classes(parent.model_fields[str(path[-1])].annotation):
        yield get_args(section.model_fields["type"].annotation)
