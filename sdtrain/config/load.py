"""The way of a page: read, override, migrate, validate, and either a frozen config or one error that lists everything.

Precedence: defaults < YAML < `key=value` on the command line; nothing changes afterwards.
"""

from __future__ import annotations

import inspect
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.nodes import SequenceNode
from ruamel.yaml.representer import SafeRepresenter

from sdtrain.config.base import Section
from sdtrain.config.compare import Difference, differences, refuse_on_resume
from sdtrain.config.ingestion import INGESTION_RULES, IngestionConfig
from sdtrain.config.migrate import SCHEMA_VERSION, migrate
from sdtrain.config.page import Page, apply_overrides, read_page
from sdtrain.config.problems import Problem, nearest, problem_of, shown, value_at
from sdtrain.config.run import TRAINING_RULES, TrainingConfig
from sdtrain.config.sampling import SAMPLING_RULES, SamplingConfig
from sdtrain.errors import ConfigError

__all__ = [
    "KINDS",
    "Config",
    "Difference",
    "Kind",
    "differences",
    "dump_yaml",
    "load_config",
    "load_ingestion",
    "load_sampling",
    "load_section",
    "load_training",
    "refuse_on_resume",
]

Config = TrainingConfig | IngestionConfig | SamplingConfig
Model = TypeVar("Model", bound=Section)
Rule = Callable[..., Iterator[Problem]]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of page.

    Attributes:
        model: What it is validated by.
        rules: What must hold between its sections.
        command: The command that runs it.
    """

    model: type[TrainingConfig] | type[IngestionConfig] | type[SamplingConfig]
    rules: tuple[Rule, ...]
    command: str


KINDS: Mapping[str, Kind] = {
    "training": Kind(TrainingConfig, TRAINING_RULES, "sdtrain train"),
    "ingestion": Kind(IngestionConfig, INGESTION_RULES, "sdtrain-data run"),
    "sampling": Kind(SamplingConfig, SAMPLING_RULES, "sdtrain sample"),
}


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Read a page of any kind.

    Args:
        path: A YAML file.
        overrides: `dotted.key=value` settings, which win over the file.

    Raises:
        ConfigError: Everything that is wrong with the file and the overrides, in one message.
    """
    return _load(Path(path), overrides, None)


def load_training(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> TrainingConfig:
    """Read a page of kind `training`; as `load_config`."""
    return _of_kind(_load(Path(path), overrides, "training"), TrainingConfig)


def load_ingestion(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> IngestionConfig:
    """Read a page of kind `ingestion`; as `load_config`."""
    return _of_kind(_load(Path(path), overrides, "ingestion"), IngestionConfig)


def load_sampling(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> SamplingConfig:
    """Read a page of kind `sampling`; as `load_config`."""
    return _of_kind(_load(Path(path), overrides, "sampling"), SamplingConfig)


def _of_kind(config: Config, model: type[Model]) -> Model:
    assert isinstance(config, model), "the kind was checked before the page was validated"
    return config


def _load(path: Path, overrides: Sequence[str], wanted: str | None) -> Config:
    page = read_page(path)
    apply_overrides(page, overrides)
    try:
        page.data = migrate(page.data)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    name = _kind_of(page.data, path, wanted)
    if page.data.get("name") is None:
        page.data["name"] = f"{path.resolve().parent.name}-{path.stem}".lstrip("-")
    kind = KINDS[name]
    return _checked(path, page, kind.model, kind.rules, f"All keys of this kind of page: sdtrain config schema {name}")


def load_section(
    path: str | os.PathLike[str], model: type[Model], rules: Sequence[Rule] = (), *, footer: str = ""
) -> Model:
    """Read a YAML file of one section, such as a site's defaults for jobs, as strictly as a page.

    Args:
        path: A YAML file.
        model: What it is validated by.
        rules: What must hold between its keys.
        footer: Last line of an error: where all keys are listed.

    Raises:
        ConfigError: Everything that is wrong with the file, in one message.
    """
    return _checked(Path(path), read_page(Path(path)), model, rules, footer)


def _checked(path: Path, page: Page, model: type[Model], rules: Sequence[Rule], footer: str) -> Model:
    config, problems = _validate(model, rules, page.data)
    problems = page.problems + problems
    if config is None or problems:
        raise ConfigError(_message(path, page, problems, footer))
    return config


def _kind_of(data: Mapping[str, Any], path: Path, wanted: str | None) -> str:
    """The page's kind.

    Raises:
        ConfigError: There is no such kind, or another one is wanted; names the command that runs the page.
    """
    found = data.get("kind", "training")
    if not isinstance(found, str) or found not in KINDS:
        meant = nearest(str(found), list(KINDS))
        hint = f"; did you mean {meant}?" if meant else ""
        raise ConfigError(f"{path}: kind = {shown(found)} must be one of {', '.join(KINDS)}{hint}")
    if wanted is not None and found != wanted:
        raise ConfigError(
            f"{path} is a page of kind {found}, not {wanted}; it runs with: {KINDS[found].command} {path}"
        )
    return found


def _validate(model: type[Model], rules: Sequence[Rule], data: dict[str, Any]) -> tuple[Model | None, list[Problem]]:
    """The config, or all that is wrong; rules run on the sections that did validate."""
    try:
        config = model.model_validate_json(json.dumps(data))
    except ValidationError as failed:
        errors = failed.errors(include_url=False)
        problems = [problem_of(error, model, data) for error in errors]
        sections = _valid_sections(model, data, {str(error["loc"][0]) for error in errors})
        return None, problems + list(_broken_rules(rules, sections))
    sections = {name: getattr(config, name) for name in model.model_fields}
    return config, list(_broken_rules(rules, sections))


def _valid_sections(model: type[Section], data: Mapping[str, Any], failed: set[str]) -> dict[str, Any]:
    """The sections without a mistake, validated one by one."""
    hints = get_type_hints(model, include_extras=True)
    sections: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        if name in failed:
            continue
        if name in data:
            sections[name] = TypeAdapter(hints[name]).validate_json(json.dumps(data[name]), strict=True)
        else:
            sections[name] = info.get_default(call_default_factory=True)
    return sections


def _broken_rules(rules: Sequence[Rule], sections: Mapping[str, Any]) -> Iterator[Problem]:
    for rule in rules:
        needed = list(inspect.signature(rule).parameters)
        if all(name in sections for name in needed):
            yield from rule(**{name: sections[name] for name in needed})


def _message(path: Path, page: Page, problems: Sequence[Problem], footer: str) -> str:
    """All problems under one headline, each with its value and its place."""
    lines = [_line(problem, page) for problem in dict.fromkeys(problems)]
    count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
    listed = "\n".join(f"  {line}" for line in lines)
    return f"{path}: {count}\n{listed}\n{footer}"


def _line(problem: Problem, page: Page) -> str:
    if not problem.path:
        return problem.message
    path = tuple(int(part) if part.isdigit() else part for part in problem.path.split("."))
    found, value = value_at(page.data, path)
    text = problem.path
    if found and not isinstance(value, dict):
        text += f" = {shown(value)}"
    place = next((page.places[path[:end]] for end in range(len(path), 0, -1) if path[:end] in page.places), None)
    if place is not None:
        text += f" ({place})"
    return f"{text}: {problem.message}"


class _PageRepresenter(SafeRepresenter):
    """Writes sections in their own order, lists on one line, and `null` where ruamel would leave a blank."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.sort_base_mapping_type_on_output = False

    def represent_list(self, data: Sequence[Any]) -> SequenceNode:
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)


_PageRepresenter.add_representer(list, _PageRepresenter.represent_list)


def dump_yaml(config: Config) -> str:
    """The resolved page: every key with its value, loadable again, first line the command that runs it."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _PageRepresenter
    yaml.default_flow_style = False
    yaml.width = 120
    kind = KINDS[config.kind]
    text = io.StringIO()
    yaml.dump(config.model_dump(mode="json"), text)
    return (
        f"# {kind.command} {config.name or 'page'}.yaml  (resolved, schema version {SCHEMA_VERSION})\n{text.getvalue()}"
    )
