"""Old pages become today's pages by pure steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from sdtrain.config.migrate import SCHEMA_VERSION, STEPS, migrate
from sdtrain.errors import ConfigError


def rename_steps(page: dict[str, Any]) -> dict[str, Any]:
    trainer = dict(page["trainer"])
    return {**page, "trainer": {"max_steps": trainer.pop("steps"), **trainer}}


def add_seed(page: dict[str, Any]) -> dict[str, Any]:
    return {**page, "seed": 42}


STEPS_TO_3 = {1: rename_steps, 2: add_seed}


def test_steps_run_in_order_and_leave_the_page_alone() -> None:
    old = {"schema_version": 1, "trainer": {"steps": 5}}
    kept = copy.deepcopy(old)
    assert migrate(old, steps=STEPS_TO_3, current=3) == {"schema_version": 3, "trainer": {"max_steps": 5}, "seed": 42}
    assert old == kept


def test_only_the_missing_steps_run() -> None:
    assert migrate({"schema_version": 2}, steps=STEPS_TO_3, current=3) == {"schema_version": 3, "seed": 42}
    assert migrate({"schema_version": 3}, steps=STEPS_TO_3, current=3) == {"schema_version": 3}


def test_newer_page() -> None:
    with pytest.raises(ConfigError) as caught:
        migrate({"schema_version": 4}, steps=STEPS_TO_3, current=3)
    assert str(caught.value) == (
        "schema_version = 4 is newer than this sdtrain, which knows 3 and older; update sdtrain"
    )


@pytest.mark.parametrize("version", [0, -1])
def test_version_without_a_step(version: int) -> None:
    with pytest.raises(ConfigError) as caught:
        migrate({"schema_version": version}, steps=STEPS_TO_3, current=3)
    assert str(caught.value) == f"schema_version = {version} is unknown; this sdtrain reads 1 to 3"


@pytest.mark.parametrize("page", [{}, {"schema_version": "1"}, {"schema_version": True}, {"schema_version": None}])
def test_no_version_is_left_to_validation(page: dict[str, Any]) -> None:
    assert migrate(page) is page


def test_there_is_a_step_from_every_older_version() -> None:
    assert sorted(STEPS) == list(range(1, SCHEMA_VERSION))
