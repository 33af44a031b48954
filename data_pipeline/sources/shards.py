"""WebDataset shards that somebody else made: where they lie, and what their samples say of themselves.

Nothing in them is trusted. A tar is never extracted: members are read by offset, and links, duplicates, absolute names
and `..` make the whole tar be refused (`sdtrain.data.shard.survey_tar`); entries for folders, as `tar` adds them, are
passed over. Of a sample only the picture, `txt` and `json` are looked at; pictures by their header alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.image_header import read_header
from data_pipeline.sources.laion import ALIASES
from data_pipeline.sources.tables import RemoteTable, find_files
from sdtrain.data.shard import ABSENT, ShardIndex, survey_tar
from sdtrain.errors import DataError

PICTURE_FIELDS = ("jpg", "jpeg", "png", "webp")
MAX_TEXT_BYTES = 1 << 20
"""Of `txt` and of `json`."""

NO_PICTURE = "no_picture"
BAD_TEXT = "bad_text"
BAD_JSON = "bad_json"
NOT_AN_IMAGE = "not_an_image"
TOO_LARGE = "too_large"

_OWN = ("url", "caption", "width", "height", "sample_id", "md5", "sha256")  # found here, whatever the json says


def find_shards(where: str) -> Sequence[Path] | Sequence[RemoteTable]:
    """The tars of a folder, of a glob (`**` crosses folders), or a single one, sorted by name.

    Raises:
        DataError: There is none, or the place cannot be reached.
        ConfigError: No installed library reads such URLs.
    """
    found = find_files(where, ".tar")
    if not found:
        raise DataError(
            f"source.shards: {where}: no tar there; give a folder of *.tar, a glob such as FOLDER/**/*.tar, or a URL "
            "of either (s3://BUCKET/FOLDER)"
        )
    return found


class RejectedError(Exception):
    """A sample that cannot be adopted; its text is the reason that is counted."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a field lies in its tar."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Sample:
    """A sample as its tar has it.

    Attributes:
        key: Its name there.
        picture: Where the picture lies.
        columns: Its values under our names for columns.
    """

    key: str
    picture: Place
    columns: Mapping[str, Any]


class ForeignShard:
    """One tar, read by offset.

    Args:
        path: The tar on this machine.
        source: What messages call it.
        max_bytes: Largest picture.

    Attributes:
        num_folders: Entries for folders in it.

    Raises:
        DataError: Unreadable, or members that no honest tool writes.
    """

    _index: ShardIndex
    num_folders: int

    def __init__(self, path: Path, source: str, max_bytes: int):
        self._path = path
        self._max_bytes = max_bytes
        try:
            self._index, self.num_folders = survey_tar(path)
        except DataError as error:
            text = str(error).replace(str(path), source)
            raise DataError(f"{text}; take this tar out of source.shards, or write it anew with webdataset") from None
        self._handle = os.open(path, os.O_RDONLY)

    @property
    def keys(self) -> list[str]:
        """The samples' names."""
        return self._index.keys

    def close(self) -> None:
        """Give the file back."""
        os.close(self._handle)

    def sample(self, number: int) -> Sample:
        """One sample.

        Raises:
            RejectedError: It has no picture, or a field is not what its name says.
        """
        picture = self._place(number, PICTURE_FIELDS)
        if picture is None:
            raise RejectedError(NO_PICTURE)
        if picture.size > self._max_bytes:
            raise RejectedError(TOO_LARGE)
        facts = self._json(number)
        caption = self._text(number)
        body = read_member(self._handle, picture, self._path)
        try:
            header = read_header(body)
        except ValueError:
            raise RejectedError(NOT_AN_IMAGE) from None
        digest = hashlib.sha256(body).hexdigest()
        columns: dict[str, Any] = {name: _value(name, facts) for name in ALIASES if name not in _OWN}
        columns["url"] = _value("url", facts) or f"sha256:{digest}"
        columns["caption"] = _value("caption", facts) or "" if caption is None else caption
        columns |= {"width": header.width, "height": header.height, "sha256": digest}
        return Sample(self.keys[number], picture, columns)

    def _place(self, number: int, names: Sequence[str]) -> Place | None:
        """The first of some fields that a sample has, whatever the case of its name."""
        for wanted in names:
            for name, columns in self._index.fields.items():
                if name.lower() == wanted and columns.size[number] != ABSENT:
                    return Place(columns.offset[number], columns.size[number])
        return None

    def _text(self, number: int) -> str | None:
        place = self._place(number, ("txt",))
        if place is None:
            return None
        try:
            return self._small(place, BAD_TEXT).decode()
        except UnicodeDecodeError:
            raise RejectedError(BAD_TEXT) from None

    def _json(self, number: int) -> Mapping[str, Any]:
        """The sample's facts by lower-case name; empty where it has no json."""
        place = self._place(number, ("json",))
        if place is None:
            return {}
        try:
            facts = json.loads(self._small(place, BAD_JSON))
        except (ValueError, RecursionError):
            raise RejectedError(BAD_JSON) from None
        if not isinstance(facts, dict):
            raise RejectedError(BAD_JSON)
        return {name.lower(): value for name, value in facts.items()}

    def _small(self, place: Place, reason: str) -> bytes:
        if place.size > MAX_TEXT_BYTES:
            raise RejectedError(reason)
        return read_member(self._handle, place, self._path)


def _value(name: str, facts: Mapping[str, Any]) -> Any:
    """A value under one of the names that LAION's tables know, if it is of the right kind."""
    kind, aliases = ALIASES[name]
    for alias in aliases:
        value = facts.get(alias)
        if kind == "text" and isinstance(value, str):
            return _without_surrogates(value)
        if kind == "number" and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if kind == "integer" and isinstance(value, int) and -(2**63) <= value < 2**63 and not isinstance(value, bool):
            return value
    return None


def _without_surrogates(text: str) -> str:
    """JSON may escape halves of characters, which no file can hold."""
    return text.encode("utf-8", "replace").decode()


def read_member(handle: int, place: Place, path: Path) -> bytes:
    """The bytes of a field.

    Raises:
        DataError: They are no longer there.
    """
    data = os.pread(handle, place.size, place.offset)
    if len(data) != place.size:
        raise DataError(f"{path}: {len(data)} of {place.size} bytes at {place.offset}; the tar was cut off, run again")
    return data
