"""`sdtrain-data export --format hf`: a data set as a folder that `datasets.load_from_disk` opens.

Shards are read one after another and written through the `datasets` library's own writer, a few hundred samples at a
time, so memory does not grow with the data. Pictures stay the bytes they are and are decoded when they are looked at.
Samples that are taken down are left out.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from PIL import Image
from rich.console import Console

from data_pipeline.progress import StageProgress
from sdtrain.config.ingestion import IngestionConfig
from sdtrain.data.manifest import Manifest, ShardEntry
from sdtrain.data.shard import ShardReader
from sdtrain.errors import ConfigError, DataError, StorageError
from sdtrain.run_dir import sync_folder, write_atomically

if TYPE_CHECKING:
    from datasets import Features

FILE_BYTES = 500_000_000
"""Size at which the next Arrow file is begun; whole shards stay together."""

LATENT_FIELDS = {"tokens": "tokens.npy", "moments": "moments.npy"}
"""Columns that are written where they are asked for -> their names in the shards."""

_PICTURES = ("jpg", "jpeg", "png", "webp")
_FORMATS = ("JPEG", "PNG", "WEBP")
_STATE = "state.json"


@dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes:
        pictures: Manifest of shards with pictures.
        latents: Manifest of shards of the same names with tokens, moments and the captions that training sees; None
            where nothing is wanted of them.
        extra: Which of `LATENT_FIELDS` are wanted.
    """

    pictures: Manifest
    latents: Manifest | None
    extra: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of the export before it is written.

    Attributes:
        key: Sample key.
        picture: The encoded file.
        caption: Text.
        facts: What the shard says of it.
        latents: Tokens and moments, as they are wanted.
    """

    key: str
    picture: bytes
    caption: str
    facts: Mapping[str, Any]
    latents: Mapping[str, Any]

    @property
    def scores(self) -> Mapping[str, float]:
        """Scores by name."""
        return _scores(self.facts)

    def _size(self) -> tuple[int, int]:
        """Width and height, by the header of the file.

        Raises:
            DataError: It is no picture.
        """
        try:
            with Image.open(io.BytesIO(self.picture), formats=_FORMATS) as image:
                return image.size
        except Exception as error:  # damaged files make PIL raise anything
            raise DataError(
                f"sample {self.key!r}: its picture cannot be read ({type(error).__name__}); make the shard whole, or "
                "take the sample down by its key"
            ) from error

    def row(self, score_names: Sequence[str]) -> dict[str, Any]:
        """As the columns of `features_of`."""
        width, height = self._size()
        row = {
            "key": self.key,
            "image": {"bytes": self.picture, "path": None},
            "caption": self.caption,
            "url_sha256": _url_sha256(self.facts),
            "width": width,
            "height": height,
        }
        scores = {"scores": {name: self.scores.get(name) for name in score_names}} if score_names else {}
        return row | scores | dict(self.latents)


def export(source: Source, target: Path, console: Console) -> dict[str, int]:
    """Write a folder that `datasets.load_from_disk` opens; it appears complete or not at all.

    Args:
        source: What is exported.
        target: The folder, which must not be there yet.
        console: Where progress is shown.

    Returns:
        Samples by split.

    Raises:
        ConfigError: The library is not installed, or the folder is there already.
        DataError: A shard cannot be read, or does not hold what is wanted.
        StorageError: The disk is full or refuses writes.
    """
    datasets = _library()
    if os.path.lexists(target):
        raise ConfigError(f"--out {target}: is there already; give a folder that is not, nothing is overwritten")
    splits = list(dict.fromkeys(shard.split for shard in source.pictures.shards))
    score_names = _score_names(source.pictures, console)
    features = features_of(source, score_names)
    counts = {}
    try:
        with _appearing(target) as folder:
            empty = {name: [] for name in features}
            parts = {split: datasets.Dataset.from_dict(empty, features=features, split=split) for split in splits}
            datasets.DatasetDict(parts).save_to_disk(folder)
            for split in splits:
                counts[split] = _write_split(source, split, folder / split, features, score_names, console)
    except OSError as error:
        raise StorageError(
            f"{target}: cannot be written: {error.strerror or error}; make room or give another folder, nothing is left"
        ) from error
    return counts


def source_of(wanted: Path | IngestionConfig, extra: Sequence[str]) -> Source:
    """What a manifest, or the data set of a page, gives for an export.

    Args:
        wanted: A manifest of pictures, or the page of a finished data set.
        extra: Which of `LATENT_FIELDS` to write beside the pictures; they come from `manifest.json` in the same folder.

    Raises:
        ConfigError: An unknown column.
        DataError: No pictures there, or no tokens and moments of the one shape that a column has.
    """
    unknown = sorted(set(extra) - set(LATENT_FIELDS))
    if unknown:
        raise ConfigError(f"--with {unknown[0]}: is no column; known are {', '.join(LATENT_FIELDS)}")
    latents: Manifest | None = None
    if isinstance(wanted, IngestionConfig):
        path = wanted.output / "manifest.json"
        latents = Manifest.load(path)  # what a training reads: its captions may be other ones than those of images.json
        if _lacks_pictures(latents) is not None:
            path = path.with_name("images.json")
        elif not extra:
            latents = None
    else:
        path = wanted
        latents = Manifest.load(path.with_name("manifest.json")) if extra else None
    pictures = Manifest.load(path)
    bare = _lacks_pictures(pictures)
    if bare is not None:
        raise DataError(
            f"{path}: shard {bare.path} holds no picture ({' or '.join(_PICTURES)}), it holds "
            f"{', '.join(bare.fields)}; give the images.json beside it, or the page of the data set"
        )
    for name in extra:
        if latents is not None and LATENT_FIELDS[name] not in latents.field_shapes:
            sizes = (
                f"; it has several sizes of it ({', '.join(latents.bucket_shapes)})" if latents.bucket_shapes else ""
            )
            raise DataError(
                f"{latents.path}: no one shape of {LATENT_FIELDS[name]!r}, it has "
                f"{', '.join(sorted(latents.field_shapes))}{sizes}; export without --with {name}"
            )
    return Source(pictures, latents, tuple(extra))


def _lacks_pictures(manifest: Manifest) -> ShardEntry | None:
    """The first shard without a picture."""
    shards = (shard for shard in manifest.shards if shard.num_samples and not set(_PICTURES) & set(shard.fields))
    return next(shards, None)


def features_of(source: Source, score_names: Sequence[str]) -> Features:
    """The columns, as `datasets` types."""
    from datasets import Array3D, Features, List, Value
    from datasets import Image as ImageFeature

    columns: dict[str, Any] = {
        "key": Value("string"),
        "image": ImageFeature(),
        "caption": Value("string"),
        "url_sha256": Value("string"),
        "width": Value("int32"),
        "height": Value("int32"),
    }
    if score_names:
        columns["scores"] = {name: Value("float64") for name in score_names}
    shapes = {} if source.latents is None else source.latents.field_shapes
    if "tokens" in source.extra:
        columns["tokens"] = List(Value("uint16"), length=shapes[LATENT_FIELDS["tokens"]][0])
    if "moments" in source.extra:
        columns["moments"] = Array3D(shape=tuple(shapes[LATENT_FIELDS["moments"]]), dtype="float16")
    return Features(columns)


# Reading ------------------------------------------------------------------------------------------------------------


def samples_of(source: Source, shard: ShardEntry) -> Iterator[Sample]:
    """The samples of a shard that are not taken down, with what belongs to them in the latent shard.

    Raises:
        DataError: Something cannot be read, or a sample has no tokens or moments.
    """
    taken_down = source.pictures.takedown.keys
    with ExitStack() as stack:
        reader = stack.enter_context(source.pictures.open_shard(shard))
        latents = None if source.latents is None else stack.enter_context(_latent_shard(source.latents, shard))
        rows = {} if latents is None else {key: row for row, key in enumerate(latents.keys)}
        field = next((name for name in _PICTURES if name in reader.fields), "")
        for place, key in enumerate(reader.keys):
            if key in taken_down:
                continue
            facts = _facts(reader, place)
            extra = {}
            if latents is not None:
                if key not in rows:
                    raise DataError(
                        f"{latents.path}: holds no sample {key!r} of {reader.path}; run `sdtrain-data run`, or export "
                        "without --with"
                    )
                extra = {name: latents.decode(rows[key], LATENT_FIELDS[name]) for name in source.extra}
            text = latents if latents is not None and "txt" in latents.fields else reader
            row = place if text is reader else rows[key]
            caption = text.decode(row, "txt") if "txt" in text.fields else str(facts.get("caption", ""))
            yield Sample(key, reader.read(place, field), caption, facts, extra)


def _latent_shard(latents: Manifest, shard: ShardEntry) -> ShardReader:
    """The latent shard of the same name: stages keep the numbers of their inputs."""
    name = PurePosixPath(shard.path).name
    found = [one for one in latents.split(shard.split) if PurePosixPath(one.path).name == name]
    if len(found) != 1:
        raise DataError(
            f"{latents.path}: lists {len(found)} shards {name!r} in split {shard.split!r}, one is needed for each "
            "shard of pictures; export without --with"
        )
    return latents.open_shard(found[0])


def _facts(reader: ShardReader, place: int) -> Mapping[str, Any]:
    facts = reader.decode(place, "json") if "json" in reader.fields else {}
    return facts if isinstance(facts, Mapping) else {}


def _scores(facts: Mapping[str, Any]) -> Mapping[str, float]:
    scores = facts.get("scores")
    if not isinstance(scores, Mapping):
        return {}
    return {str(name): float(value) for name, value in scores.items() if isinstance(value, int | float)}


def _url_sha256(facts: Mapping[str, Any]) -> str | None:
    known, url = facts.get("url_sha256"), facts.get("url")
    if isinstance(known, str):
        return known
    return hashlib.sha256(url.encode()).hexdigest() if isinstance(url, str) else None


def _score_names(manifest: Manifest, console: Console) -> list[str]:
    """Every score that any sample has: the columns must be known before the first row is written."""
    names: set[str] = set()
    with StageProgress(console, "scores", len(manifest.shards)) as progress:
        for shard in manifest.shards:
            with manifest.open_shard(shard) as reader:
                for place in range(len(reader)):
                    names |= _scores(_facts(reader, place)).keys()
            progress.advance()
    return sorted(names)


# Writing ------------------------------------------------------------------------------------------------------------


def _write_split(
    source: Source, split: str, folder: Path, features: Features, score_names: Sequence[str], console: Console
) -> int:
    """Write the Arrow files of a split, and name them in the state that the library wrote; returns the samples."""
    from datasets.arrow_writer import ArrowWriter

    shards = source.pictures.split(split)
    files: list[str] = []
    count = 0
    with StageProgress(console, f"export {split}", len(shards)) as progress:
        for group in _groups(shards):
            files.append(f"data-{len(files):05d}.arrow")
            writer = ArrowWriter(features=features, path=str(folder / files[-1]))
            try:
                for shard in group:
                    for sample in samples_of(source, shard):
                        writer.write(sample.row(score_names))
                        count += 1
                    progress.advance()
                writer.finalize()
            finally:
                writer.close()
    _name_files(source, folder, files)
    return count


def _groups(shards: Sequence[ShardEntry]) -> Iterator[list[ShardEntry]]:
    """Consecutive shards that make one file each."""
    group: list[ShardEntry] = []
    for shard in shards:
        if group and sum(one.size_bytes for one in group) + shard.size_bytes > FILE_BYTES:
            yield group
            group = []
        group.append(shard)
    if group:
        yield group


def _name_files(source: Source, folder: Path, files: Sequence[str]) -> None:
    """Complete the state of an empty split; its fingerprint follows from the data, not from the clock."""
    state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    parts = [source.pictures.sha256, source.pictures.takedown.sha256, source.extra, folder.name]
    state["_fingerprint"] = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    state["_data_files"] = [{"filename": name} for name in files]
    write_atomically(folder / _STATE, json.dumps(state, indent=2, sort_keys=True) + "\n")


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A hidden folder that becomes `target` when all went well; what a killed export left is removed first.

    Raises:
        ConfigError: Another export writes to the same target now.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    hidden, lock = (target.with_name(f".{target.name}.{ending}") for ending in ("part", "lock"))
    with open(lock, "w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"--out {target}: another export writes there now; wait for it or stop it") from None
        shutil.rmtree(hidden, ignore_errors=True)
        try:
            hidden.mkdir()
            yield hidden
            _sync(hidden)
            hidden.rename(target)
            sync_folder(target.parent)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
            lock.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Wait until every file of a folder is on the disk."""
    for path in (folder, *folder.rglob("*")):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _library() -> Any:
    """The `datasets` library, silent and offline.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise ConfigError("--format hf needs the package datasets; pip install 'sdtrain[huggingface]'") from None
    datasets.disable_progress_bars()
    return datasets
