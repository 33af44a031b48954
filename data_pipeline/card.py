"""The data card: where a data set came from and what was done to it, for people (Markdown) and machines (JSON).

Everything is read from what the stages left; no clock is looked at, so the same data set has the same card. The only
dates in it are those of take-downs. The Markdown is made of the JSON alone, which a later take-down brings up to date.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import platform
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.card_markdown import to_markdown
from data_pipeline.ledger import Commit, Ledger
from data_pipeline.runner import Runner
from data_pipeline.stage import Stage
from sdtrain.config.ingestion import IngestionConfig
from sdtrain.data.captions import clean_caption
from sdtrain.data.manifest import Manifest
from sdtrain.errors import DataError, StorageError
from sdtrain.run_dir import write_atomically

CARD_VERSION = 1
JSON_NAME = "data_card.json"
MARKDOWN_NAME = "data_card.md"

MANIFESTS = ("manifest.json", "images.json")
PACKAGES = (
    "sdtrain",
    "img2dataset",
    "ray",
    "pyarrow",
    "polars",
    "webdataset",
    "opencv-python-headless",
    "opencv-python",
    "pillow",
    "numpy",
    "torch",
    "transformers",
    "open-clip-torch",
)
"""Packages whose version can change a row, a pixel, a token or a latent."""

NUM_EXAMPLES = 5
_SUMMARIES = ("funnel.json", "duplicates.json", "summary.json")
_NOT_OF_THE_DATA = {"runner", "plan", "card"}  # sections of the page that no byte depends on


# Gathering ----------------------------------------------------------------------------------------------------------


def write_card(page: IngestionConfig, stages: Sequence[Stage]) -> Path:
    """Write the card of a finished data set beside its manifest; the same data set gives the same bytes.

    Args:
        page: The page that it was made by.
        stages: The page's stages.

    Returns:
        The Markdown file.

    Raises:
        DataError: There is no manifest yet.
        StorageError: The folder cannot be written to.
    """
    if not (page.output / MANIFESTS[0]).is_file():
        raise DataError(
            f"{page.output}: holds no {MANIFESTS[0]}, so there is no data set to describe; run `sdtrain-data run` first"
        )
    return _write(page.output, gather(page, stages))


def refuse_other_page(runner: Runner, stages: Sequence[Stage]) -> None:
    """Refuse a page that the data set was not made by: its card would tell of settings that nothing was made with.

    Raises:
        DataError: A stage is not up to date.
    """
    for stage in stages:
        plan = runner.plan(stage)
        if not plan.is_current:
            raise DataError(
                f"{stage.folder}: is not what this page says ({plan.summary()}); run `sdtrain-data run` with it first, "
                "or give the page that the data set was made by"
            )


def bring_up_to_date(folder: Path) -> None:
    """Write the card of a folder again, if it has one, after samples were taken down.

    Raises:
        DataError: What stands there is no data card.
    """
    path = folder / JSON_NAME
    if not path.is_file():
        return
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        if card["version"] != CARD_VERSION:
            raise ValueError(f"version {card['version']!r} found, {CARD_VERSION} is read")
        _write(folder, card | _read_again(folder))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not a data card ({type(error).__name__}: {error}); the samples are masked, write the card again "
            "with `sdtrain-data card CONFIG`"
        ) from error


def _write(folder: Path, card: Mapping[str, Any]) -> Path:
    text = json.dumps(card, indent=1, sort_keys=True, ensure_ascii=False)
    try:
        write_atomically(folder / JSON_NAME, text + "\n")
        write_atomically(folder / MARKDOWN_NAME, to_markdown(json.loads(text)))  # the order of keys is part of the text
    except OSError as error:
        raise StorageError(
            f"{folder}: the data card cannot be written: {error.strerror}; the data set is complete, make room or the "
            "folder writable and write it with `sdtrain-data card CONFIG`"
        ) from error
    return folder / MARKDOWN_NAME


def gather(page: IngestionConfig, stages: Sequence[Stage]) -> dict[str, Any]:
    """All that the card says, as plain values; texts from outside are cleaned."""
    told = [_stage_facts(stage) for stage in stages]
    card = {
        "version": CARD_VERSION,
        "name": page.name or page.output.name,
        "license": page.card.license,
        "contact": page.card.contact,
        "notes": page.card.notes,
        "page": page.model_dump(mode="json", exclude=_NOT_OF_THE_DATA),
        "sources": _sources(stages[0]),
        "stages": told,
        "failures": _failures(page.output),
        "validation": {"num_samples": page.validation.num_samples, "seed": page.seed},
        "manifests": {name: _manifest_facts(page.output / name) for name in MANIFESTS},
        "versions": versions(),
        **_read_again(page.output),
    }
    return _cleaned(card)


def _stage_facts(stage: Stage) -> dict[str, Any]:
    """Name, version, outputs, counts over all outputs, and what the stage itself wrote down."""
    commits = Ledger(stage.folder).commits().values()
    summaries = {
        name.removesuffix(".json"): json.loads((stage.folder / name).read_text(encoding="utf-8"))
        for name in _SUMMARIES
        if (stage.folder / name).is_file()
    }
    return {
        "name": stage.name,
        "version": stage.version,
        "outputs": len(commits),
        "counts": _counts(commit.stats for commit in commits),
        "summaries": summaries,
    }


def _counts(stats: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Sums of whole numbers over outputs; figures that do not add up (means, sizes of one picture) are left out."""
    counts: Counter[str] = Counter()
    for row in stats:
        counts.update({name: value for name, value in row.items() if type(value) is int})
    return dict(sorted(counts.items()))


def _sources(first: Stage) -> list[dict[str, Any]]:
    """What the first stage read: one row per file, with the digest that its ledger has of it."""
    return [_source(commit) for commit in Ledger(first.folder).commits().values()]


def _source(commit: Commit) -> dict[str, Any]:
    names, digests = list(commit.inputs), list(commit.inputs.values())
    remote = commit.facts.get("remote")
    return {
        "source": str(commit.stats.get("source") or (names[0] if names else f"made here, part {commit.unit}")),
        "rows": commit.stats.get("rows", commit.stats.get("stored")),
        "bytes": commit.stats.get("bytes"),
        "columns": commit.stats.get("columns"),
        "sha256": digests[0] if digests else None,
        "remote": remote,
    }


def _failures(output: Path) -> list[dict[str, Any]]:
    path = output / "dead_letter.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return [{name: row[name] for name in ("stage", "unit", "error")} for row in rows]


def _manifest_facts(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    manifest = Manifest.load(path)
    splits: dict[str, Counter[str]] = {}
    buckets: Counter[str] = Counter()
    for shard in manifest.shards:
        facts = {"shards": 1, "samples": shard.num_samples, "bytes": shard.size_bytes}
        splits.setdefault(shard.split, Counter()).update(facts)
        if shard.bucket is not None:
            buckets[shard.bucket] += shard.num_samples
    return {
        "sha256": manifest.sha256,
        "splits": {name: dict(counts) for name, counts in splits.items()},
        "fields": sorted({name for shard in manifest.shards for name in shard.fields}),
        "shapes": {name: list(shape) for name, shape in manifest.field_shapes.items()},
        "buckets": dict(sorted(buckets.items())),
        "fingerprint": dict(manifest.fingerprint),
    }


def _read_again(folder: Path) -> dict[str, Any]:
    """What a take-down changes: the record of take-downs, and the captions that are shown."""
    manifest = Manifest.load(folder / MANIFESTS[0])
    entries = [
        {
            "date": entry.date,
            "reason": clean_caption(entry.reason),
            "list_sha256": entry.list_sha256,
            "requests": len(entry.requests),
            "samples": {name: one["masked"] for name, one in sorted(entry.manifests.items())},
        }
        for entry in manifest.takedown.entries
    ]
    return {"takedowns": entries, "examples": list(itertools.islice(_captions(manifest), NUM_EXAMPLES))}


def _captions(manifest: Manifest) -> Iterator[str]:
    """Captions of training samples that are not masked, in the order of the manifest; damaged ones are passed over."""
    for shard in manifest.shards:
        if shard.split != "train" or "txt" not in shard.fields:
            continue
        try:
            with manifest.open_shard(shard) as reader:
                for sample, key in enumerate(reader.keys):
                    if key not in manifest.takedown.keys:
                        yield clean_caption(reader.decode(sample, "txt"))
        except DataError:
            continue


def versions() -> dict[str, str]:
    """Versions of Python and of those of `PACKAGES` that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cleaned(value: Any) -> Any:
    """Plain values whose texts can be shown anywhere."""
    match value:
        case str():
            return clean_caption(value)
        case Mapping():
            return {clean_caption(str(name)): _cleaned(part) for name, part in value.items()}
        case list() | tuple():
            return [_cleaned(part) for part in value]
        case _:
            return value
