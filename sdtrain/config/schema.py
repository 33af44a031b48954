"""The JSON schema of a page, for editors and for people."""

from __future__ import annotations

from typing import Any

from sdtrain.config.load import KINDS


def json_schema(kind: str) -> dict[str, Any]:
    """JSON schema (draft 2020-12) of the pages of one kind, with the meaning and the default of every key."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"sdtrain {kind} page",
        **{key: part for key, part in KINDS[kind].model.model_json_schema().items() if key != "title"},
    }
