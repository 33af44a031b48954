"""`sdtrain-data takedown`: mask samples in every manifest of a folder, and say what was masked and who had seen it.

A list holds one URL, sha256 of a URL or of a picture's bytes, or sample key in each line. Matches go into the list
beside the manifests (see `sdtrain.data.takedown`), which every reader of the data set honours. Requests stay in it,
matched or not, and are looked up again in every manifest that is written beside them later.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from data_pipeline.card import bring_up_to_date
from data_pipeline.progress import StageProgress
from data_pipeline.takedown_report import Masked, Report, seen_by
from sdtrain.data.manifest import Manifest, ShardEntry
from sdtrain.data.takedown import TAKEDOWN, Entry, Searched, append_entry, read_takedown
from sdtrain.errors import ConfigError, DataError

MAX_LINE_BYTES = 8192
MAX_LIST_BYTES = 2**30

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_URL = re.compile(r"[a-z][a-z0-9+.-]+:/")
_SUPERSEDED = ".superseded-"
_SIDECAR = ".tar.index.json"
_HEAD_BYTES = 4096
_THREADS = 8
_NOT_GIVEN = "not given"


# The list -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RequestList:
    """What is asked for.

    Attributes:
        name: Of the file.
        sha256: Of the file.
        lines: Request, in the form in which it is looked up and kept -> the line that asked for it.
    """

    name: str
    sha256: str
    lines: Mapping[str, str]


def read_list(path: Path) -> RequestList:
    """Read a list: UTF-8 text, one request in each line; empty lines and lines that begin with `#` do not count.

    Raises:
        DataError: It cannot be read, is no text, has a line that is no request, or holds nothing.
    """
    digest, lines = hashlib.sha256(), {}
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_LIST_BYTES:
                raise DataError(f"{path}: more than {MAX_LIST_BYTES} bytes; cut the list into several")
            for number, raw in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
                digest.update(raw)
                text = _checked_line(path, number, raw)
                if text and not text.startswith("#"):
                    lines.setdefault(canonical(text), text)
    except OSError as error:
        raise DataError(f"{path}: the take-down list cannot be read: {error.strerror}; check the path") from error
    if not lines:
        raise DataError(f"{path}: the take-down list holds no request; {_FORM}")
    return RequestList(path.name, digest.hexdigest(), lines)


_FORM = "it is UTF-8 text with one URL, sha256 (of a URL or of a picture) or sample key in each line"


def _checked_line(path: Path, number: int, raw: bytes) -> str:
    """The request in a line, without the spaces around it."""
    if len(raw) > MAX_LINE_BYTES:
        raise DataError(
            f"{path}: line {number} is longer than {MAX_LINE_BYTES} bytes (it starts with {raw[:16]!r}); this is no "
            f"take-down list: {_FORM}"
        )
    try:
        text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
    except UnicodeDecodeError:
        text = "\0"
    if any(char.isspace() or not char.isprintable() for char in text) and not text.startswith("#"):
        raise DataError(
            f"{path}: line {number} is no request: {raw[:40]!r} holds spaces or bytes that are no text; this is no "
            f"take-down list: {_FORM}"
        )
    return text


def canonical(line: str) -> str:
    """How a request is looked up and kept: URLs by their sha256, digests in lower case, keys as they are."""
    if "://" in line:
        return hashlib.sha256(line.encode()).hexdigest()
    return line.lower() if _SHA256.fullmatch(line) else line


# Finding ------------------------------------------------------------------------------------------------------------


def find_manifests(folders: Iterable[Path], *, recursive: bool) -> list[Path]:
    """The manifests in folders, sorted; those that were superseded are left out, since their shards were replaced.

    Raises:
        DataError: A folder is not there, a file cannot be looked at, or there is no manifest.
    """
    found: set[Path] = set()
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; give one that holds a data set's manifest.json")
        found |= {path for path in (folder.rglob if recursive else folder.glob)("*.json") if _looks_like_one(path)}
    if not found:
        where = ", ".join(str(folder) for folder in folders)
        raise DataError(f"{where}: holds no manifest of a data set; give --manifest FILE, or a --root that has some")
    return sorted(found)


def _looks_like_one(path: Path) -> bool:
    if path.name.startswith(".") or path.name.endswith(_SIDECAR) or _SUPERSEDED in path.name:
        return False
    try:
        with open(path, "rb") as file:
            return b'"field_shapes"' in file.read(_HEAD_BYTES)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be looked at: {error.strerror}; it might be a manifest, so make it readable or remove it"
        ) from error


@dataclass
class Found:
    """What was found in one manifest.

    Attributes:
        manifest: The manifest.
        requests: Masked key -> the requests that it answers.
        places: Masked samples; more than keys where shards repeat a key.
        unreadable: Shards or samples that could not be looked into.
    """

    manifest: Manifest
    requests: dict[str, set[str]] = field(default_factory=dict)
    places: int = 0
    unreadable: list[str] = field(default_factory=list)


def look_up(manifest: Manifest, wanted: frozenset[str], console: Console, *, keys_only: bool = False) -> Found:
    """Find the samples that requests ask for, shard by shard.

    Args:
        manifest: Where to look.
        wanted: Requests, as `canonical` makes them.
        console: Where progress is shown.
        keys_only: Compare keys alone, which are in the sidecars; no sample is read.
    """
    found = Found(manifest)
    of_shard = partial(_look_into, manifest, wanted, keys_only)
    with (
        ThreadPoolExecutor(_THREADS) as threads,
        StageProgress(console, manifest.folder.name, len(manifest.shards)) as bar,
    ):
        for matches, problems in threads.map(of_shard, manifest.shards):
            for key, requests in matches:
                found.requests.setdefault(key, set()).update(requests)
            found.places += len(matches)
            found.unreadable += problems
            bar.advance(failed=bool(problems))
    return found


def _look_into(
    manifest: Manifest, wanted: frozenset[str], keys_only: bool, shard: ShardEntry
) -> tuple[list[tuple[str, set[str]]], list[str]]:
    matches, problems = [], []
    try:
        with manifest.open_shard(shard) as reader:
            has_facts = "json" in reader.fields and not keys_only
            for sample, key in enumerate(reader.keys):
                names = {key}
                try:
                    names |= _names_of(reader.decode(sample, "json")) if has_facts else set()
                except DataError as error:
                    problems.append(str(error))
                if hits := names & wanted:
                    matches.append((key, hits))
    except DataError as error:
        problems.append(str(error))
    return matches, problems


def _names_of(facts: Any) -> set[str]:
    """The digests that a sample's facts are known by: of its URL, and of the picture's bytes as they were fetched."""
    if not isinstance(facts, Mapping):
        return set()
    names = {facts.get("url_sha256"), facts.get("sha256")}
    if isinstance(url := facts.get("url"), str):
        names |= {hashlib.sha256(url.encode()).hexdigest(), url}
    return {name for name in names if isinstance(name, str)}


# Masking ------------------------------------------------------------------------------------------------------------


def take_down(
    path: Path,
    *,
    manifests: Sequence[Path],
    roots: Sequence[Path],
    runs: Sequence[Path],
    reason: str | None,
    dry_run: bool,
    console: Console,
) -> Report:
    """Mask what a list asks for; doing it again changes nothing.

    Args:
        path: The list.
        manifests: Manifests; the mask counts for every manifest in their folders, so all of them are searched.
        roots: Folders that are searched for manifests, with all folders below.
        runs: Run folders of trainings that may have seen the samples.
        reason: Why, for the record.
        dry_run: Say what would be done.
        console: Where progress is shown.

    Raises:
        ConfigError: Neither a manifest nor a root was given.
        DataError: The list or a manifest cannot be used.
    """
    if not manifests and not roots:
        raise ConfigError("takedown: give --manifest FILE or --root FOLDER, so that it is known where to look")
    wanted = read_list(path)
    found = [Manifest.load(each) for each in _all_manifests(manifests, roots)]
    date = _now()
    masked: list[Masked] = []
    samples: dict[str, set[str]] = {}
    unreadable: list[str] = []
    for folder in sorted({manifest.folder for manifest in found}):
        looked = _look_up_together([one for one in found if one.folder == folder], frozenset(wanted.lines), console)
        draft = Entry(date, reason or _NOT_GIVEN, wanted.name, wanted.sha256, tuple(sorted(wanted.lines)), (), {})
        masked += _mask(looked, draft, dry_run=dry_run)
        if not dry_run:
            bring_up_to_date(folder)
        for one in looked:
            unreadable += one.unreadable
            for key, requests in one.requests.items():
                samples.setdefault(key, set()).update(requests)
    answered = {request for requests in samples.values() for request in requests}
    return Report(
        list_name=wanted.name,
        list_sha256=wanted.sha256,
        date=date,
        reason=reason or _NOT_GIVEN,
        is_dry_run=dry_run,
        manifests=tuple(masked),
        samples={key: tuple(sorted(wanted.lines[one] for one in samples[key])) for key in sorted(samples)},
        unmatched=tuple(line for request, line in wanted.lines.items() if request not in answered),
        unreadable=tuple(dict.fromkeys(unreadable)),
        runs=tuple(seen_by(run, sorted(samples)) for run in runs) if samples else (),
    )


def _all_manifests(manifests: Sequence[Path], roots: Sequence[Path]) -> list[Path]:
    """The manifests that were named, with those beside them, and those below the roots."""
    for path in (*manifests, *roots):
        if _URL.match(str(path)):
            raise ConfigError(
                f"{path}: manifests on object storage cannot be searched; run this where the data set's folder is on "
                f"disk, and copy the {TAKEDOWN} that it writes beside the manifest there"
            )
    beside = [Path(manifest) for manifest in manifests]
    for path in beside:
        Manifest.load(path)  # what was named must be one, whatever lies beside it
    found = set(find_manifests(roots, recursive=True)) if roots else set()
    folders = {path.parent for path in beside}
    return sorted(found | set(beside) | (set(find_manifests(folders, recursive=False)) if folders else set()))


def _look_up_together(manifests: Sequence[Manifest], wanted: frozenset[str], console: Console) -> list[Found]:
    """Look into the manifests of one folder; what one of them knows by its URL, the others know by its key."""
    found = [look_up(manifest, wanted, console) for manifest in manifests]
    requests: dict[str, set[str]] = {}
    for one in found:
        for key, asked in one.requests.items():
            requests.setdefault(key, set()).update(asked)
    keys = frozenset(requests)
    together = []
    for one in found:
        if keys - one.requests.keys():
            again = look_up(one.manifest, keys, console, keys_only=True)
            one = Found(one.manifest, {key: requests[key] for key in again.requests}, again.places, one.unreadable)
        together.append(one)
    return together


def _mask(found: Sequence[Found], draft: Entry, *, dry_run: bool) -> list[Masked]:
    """Add one entry to the list of the manifests' folder, unless it would say nothing new."""
    path = Path(found[0].manifest.path)
    standing = read_takedown(path)
    keys = {key for one in found for key in one.requests}
    is_known = all(standing.asked(one.manifest.sha256).issuperset(draft.requests) for one in found)
    if not dry_run and not (is_known and standing.keys.issuperset(keys)):
        searched = {
            Path(one.manifest.path).name: Searched(sha256=one.manifest.sha256, masked=one.places) for one in found
        }
        append_entry(path, replace(draft, keys=tuple(sorted(keys)), manifests=searched))
    return [
        Masked(str(one.manifest.path), one.manifest.sha256, one.places, len(one.requests.keys() - standing.keys))
        for one in found
    ]


def take_down_again(manifest: Path, console: Console) -> str | None:
    """Look up in a new manifest what earlier lists asked for; returns what was done in words, None without a request.

    Raises:
        DataError: The list or a shard cannot be read: the new data set must not be used before it could be searched.
    """
    loaded = Manifest.load(manifest)
    standing = read_takedown(manifest)
    pending = standing.pending(loaded.sha256)
    if not pending or standing.sha256 is None:
        return None
    found = look_up(loaded, pending | standing.keys, console)
    if found.unreadable:
        raise DataError(
            f"{manifest}: {len(found.unreadable)} shards or samples could not be searched for samples that were taken "
            f"down, such as {found.unreadable[0]}; make them whole and run again"
        )
    date, searched = _now(), {manifest.name: Searched(sha256=loaded.sha256, masked=found.places)}
    reason = "asked for before this manifest was written"
    keys = tuple(sorted(found.requests))
    append_entry(manifest, Entry(date, reason, TAKEDOWN, standing.sha256, tuple(sorted(pending)), keys, searched))
    return f"{found.places:,} of its samples were taken down before and are masked"


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
