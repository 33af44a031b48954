"""The JSON schema says what the docstrings say."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from sdtrain.config.base import Section, described_fields
from sdtrain.config.load import KINDS
from sdtrain.config.problems import _section_classes
from sdtrain.config.schema import json_schema


def sections(model: type[Section]) -> Iterator[type[Section]]:
    yield model
    for info in model.model_fields.values():
        for section in _section_classes(info.annotation):
            yield from sections(section)


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_is_described(kind: str) -> None:
    for section in sections(KINDS[kind].model):
        assert list(described_fields(section)) == list(section.model_fields), section.__name__


@pytest.mark.parametrize("kind", KINDS)
def test_schema_is_closed_and_complete(kind: str) -> None:
    schema = json_schema(kind)
    json.dumps(schema)
    assert schema["title"] == f"sdtrain {kind} page"
    assert set(schema["properties"]) == set(KINDS[kind].model.model_fields)
    for part in [schema, *schema["$defs"].values()] if "$defs" in schema else [schema]:
        assert part["additionalProperties"] is False
        assert all(key["description"] for key in part["properties"].values())


def test_schema_knows_bounds_choices_and_defaults() -> None:
    parts = json_schema("training")["$defs"]
    assert parts["TrainerConfig"]["properties"]["precision"]["enum"] == ["fp32", "bf16", "fp16"]
    assert parts["DataConfig"]["properties"]["batch_size"]["exclusiveMinimum"] == 0
    assert parts["OptimizerConfig"]["properties"]["warmup_start_lr"]["default"] == 1e-6
    assert parts["DataConfig"]["required"] == ["manifest", "batch_size", "micro_batch_size"]


def test_descriptions_join_their_lines() -> None:
    class Example(Section):
        """An example.

        Attributes:
            first: One line.
            second: Two
                lines.
        """

        first: int
        second: int

    assert described_fields(Example) == {"first": "One line.", "second": "Two lines."}
