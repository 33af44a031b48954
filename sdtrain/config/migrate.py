"""Older pages are brought to today's keys by pure steps, one per version."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sdtrain.errors import ConfigError

SCHEMA_VERSION = 1
"""Version of the keys that this program knows."""

Step = Callable[[dict[str, Any]], dict[str, Any]]

STEPS: Mapping[int, Step] = {}
"""STEPS[n] turns a page of version n into one of version n + 1 without touching its argument; none so far."""


def migrate(
    page: dict[str, Any], *, steps: Mapping[int, Step] = STEPS, current: int = SCHEMA_VERSION
) -> dict[str, Any]:
    """The page in today's keys.

    A page whose schema_version is absent or no whole number is returned as it is: validation names that mistake
    together with all others.

    Raises:
        ConfigError: The page is newer than this program, or older than its oldest step.
    """
    version = page.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool):
        return page
    if version > current:
        raise ConfigError(
            f"schema_version = {version} is newer than this sdtrain, which knows {current} and older; update sdtrain"
        )
    while version < current:
        if version not in steps:
            raise ConfigError(
                f"schema_version = {version} is unknown; this sdtrain reads {min([*steps, current])} to {current}"
            )
        version += 1
        page = {**steps[version - 1](page), "schema_version": version}
    return page
