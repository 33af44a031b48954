"""The digits world: a small, real and honest stand-in for LAION.

Scikit-learn's 1,797 handwritten digits, enlarged and coloured, captioned "a red handwritten seven on a blue
background", listed in parquet files of LAION's columns. Some rows must be rejected by each filter rule, some are
duplicates, some links are dead, slow or no pictures. Everything follows from the seed.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import mmh3
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from sdtrain.errors import ConfigError, DataError
from sdtrain.run_dir import write_atomically

COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "magenta": (255, 0, 255),
    "cyan": (0, 255, 255),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
}
"""The corners of the RGB cube: no two are nearer than 255."""

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HELD_OUT_DIGITS_PERCENT = 20
HELD_OUT_COMBINATIONS_PERCENT = 5
JPEG_QUALITY = 95
SLOW_SECONDS = 20.0
_NUM_FILES = 3

# parts per thousand of all rows; what is left are good rows
_BAD_ROWS = {
    "aesthetic": 60,
    "similarity": 40,
    "size": 40,
    "aspect_ratio": 20,
    "caption": 20,
    "pwatermark": 30,
    "nsfw": 20,
    "duplicate": 30,
    "gone": 15,
    "page": 5,
    "small": 5,
}
_NUM_SLOW = 2


@dataclass(frozen=True, slots=True)
class World:
    """What `world.json` says; the judge of generated digits reads it too.

    Attributes:
        seed: Everything follows from it.
        rows: Rows of metadata.
        image_size: Side of the pictures in pixels.
        port: Port of the loopback server that the URLs name.
        colours: Name -> (red, green, blue).
        digit_names: Ten names, zero first.
        held_out_combinations: (digit, foreground, background) that no row shows.
        judge_train: Indices of scikit-learn's digits that pictures are made of, and that a judge may learn from.
        judge_held_out: Indices that no picture shows: a judge's own accuracy is measured on them.
        kinds: How many rows are of which kind.
    """

    seed: int
    rows: int
    image_size: int
    port: int
    colours: Mapping[str, tuple[int, int, int]]
    digit_names: tuple[str, ...]
    held_out_combinations: tuple[tuple[int, str, str], ...]
    judge_train: tuple[int, ...]
    judge_held_out: tuple[int, ...]
    kinds: Mapping[str, int]

    @classmethod
    def load(cls, folder: Path) -> World:
        """Read `world.json` of a folder.

        Raises:
            DataError: There is none, or it is of another version.
        """
        path = folder / "world.json"
        try:
            page = json.loads(path.read_text(encoding="utf-8"))
            page["held_out_combinations"] = tuple(tuple(row) for row in page["held_out_combinations"])
            page["colours"] = {name: tuple(colour) for name, colour in page["colours"].items()}
            for name in ("digit_names", "judge_train", "judge_held_out"):
                page[name] = tuple(page[name])
            return cls(**page)
        except FileNotFoundError:
            raise DataError(f"{path}: no such file; `sdtrain-data serve-digits` makes a world") from None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not a digits world of this version ({error}); remove the folder") from None

    def write(self, folder: Path) -> None:
        """Write `world.json`."""
        write_atomically(folder / "world.json", json.dumps(asdict(self), indent=1) + "\n")


@dataclass(frozen=True, slots=True)
class Picture:
    """One coloured digit.

    Attributes:
        index: Which of scikit-learn's digits.
        foreground: Colour name of the stroke.
        background: Colour name of the ground.
    """

    index: int
    foreground: str
    background: str

    @property
    def path(self) -> str:
        """Its place on the server."""
        return f"digit/{self.index:04d}-{self.foreground}-{self.background}.jpg"

    def caption(self) -> str:
        """`a red handwritten seven on a blue background`."""
        digit = DIGIT_NAMES[int(scans()[1][self.index])]
        return f"a {self.foreground} handwritten {digit} on a {self.background} background"


@lru_cache(maxsize=1)
def scans() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """(1797, 8, 8) scans in [0, 1], and (1797,) digits."""
    from sklearn.datasets import load_digits

    images, labels = (np.asarray(array) for array in load_digits(return_X_y=True))
    return images.reshape(-1, 8, 8) / 16.0, labels.astype(np.int64)


def render(picture: Picture, image_size: int) -> npt.NDArray[np.uint8]:
    """(size, size, 3) pixels: the scan, enlarged, mixes ground and stroke."""
    scan = Image.fromarray((scans()[0][picture.index] * 255).round().astype(np.uint8))
    enlarged = scan.resize((image_size, image_size), Image.Resampling.BICUBIC)
    stroke = np.asarray(enlarged, np.float64)[..., None] / 255.0  # (size, size, 1)
    mixed = stroke * COLOURS[picture.foreground] + (1.0 - stroke) * COLOURS[picture.background]
    return mixed.round().astype(np.uint8)


def to_jpeg(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Encode without chroma subsampling: thin strokes keep their colour."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def make_world(folder: Path, *, seed: int, rows: int, image_size: int, port: int) -> Path:
    """Write `metadata/part-0000N.parquet` and `world.json`; pictures are rendered on request by the server.

    Args:
        folder: Where to write.
        seed: Everything follows from it.
        rows: Rows of metadata; about 7 of 10 survive filter, dedup and download.
        image_size: Side of the pictures in pixels.
        port: Port of the loopback server, part of every URL.

    Returns:
        The folder of the metadata, for `source.metadata`.

    Raises:
        ConfigError: Too few rows for every kind of row, or more than there are different pictures.
    """
    kinds = _kinds(_generator(seed, "kinds"), rows)
    drawn = draw(seed, rows)
    table = _table(_generator(seed, "table"), kinds, drawn.pictures, image_size, port)
    metadata = folder / "metadata"
    metadata.mkdir(parents=True, exist_ok=True)
    for index in range(_NUM_FILES):
        start, stop = rows * index // _NUM_FILES, rows * (index + 1) // _NUM_FILES
        pq.write_table(table.slice(start, stop - start), metadata / f"part-{index:05d}.parquet")
    drawn.world(image_size, port, kinds.tolist()).write(folder)
    return metadata


@dataclass(frozen=True, slots=True)
class Drawn:
    """Pictures drawn by a seed, and what was kept out of them.

    Attributes:
        seed: The seed.
        pictures: Different pictures in random order.
        train: Indices of the digits that they are made of.
        held_out: Indices that none is made of.
        combinations: (digit, foreground, background) that none shows.
    """

    seed: int
    pictures: tuple[Picture, ...]
    train: tuple[int, ...]
    held_out: tuple[int, ...]
    combinations: tuple[tuple[int, str, str], ...]

    def world(self, image_size: int, port: int, kinds: Sequence[str]) -> World:
        """What the judge needs to know of these pictures."""
        return World(
            seed=self.seed,
            rows=len(self.pictures),
            image_size=image_size,
            port=port,
            colours=COLOURS,
            digit_names=DIGIT_NAMES,
            held_out_combinations=self.combinations,
            judge_train=self.train,
            judge_held_out=self.held_out,
            kinds=dict(sorted(Counter(kinds).items())),
        )


def draw(seed: int, count: int) -> Drawn:
    """Draw pictures; more of them begin with the same ones.

    Raises:
        ConfigError: There are not so many different pictures.
    """
    order = _generator(seed, "digits").permutation(len(scans()[1]))
    num_held_out = len(order) * HELD_OUT_DIGITS_PERCENT // 100
    held_out, train = np.sort(order[:num_held_out]), np.sort(order[num_held_out:])
    combinations = _held_out_combinations(_generator(seed, "combinations"))
    pictures = _pictures(_generator(seed, "pictures"), train, frozenset(combinations), count)
    kept_out = tuple(sorted(combinations))
    return Drawn(seed, tuple(pictures), tuple(train.tolist()), tuple(held_out.tolist()), kept_out)


def _generator(seed: int, stream: str) -> np.random.Generator:
    """Random numbers for one purpose, so that one more row does not change the held-out combinations."""
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=16).digest(), "big")
    return np.random.Generator(np.random.Philox(key=key))


def _held_out_combinations(rng: np.random.Generator) -> list[tuple[int, str, str]]:
    every = [(d, fg, bg) for d in range(10) for fg in COLOURS for bg in COLOURS if fg != bg]
    chosen = rng.permutation(len(every))[: len(every) * HELD_OUT_COMBINATIONS_PERCENT // 100]
    return [every[index] for index in chosen]


def _kinds(rng: np.random.Generator, rows: int) -> npt.NDArray[np.str_]:
    """Each row's kind: `good`, the rule that it breaks, or what is wrong with its link."""
    kinds = [kind for kind, share in _BAD_ROWS.items() for _ in range(rows * share // 1000)] + ["slow"] * _NUM_SLOW
    if len(set(kinds)) <= len(_BAD_ROWS):
        least = -(-1000 // min(_BAD_ROWS.values()))
        raise ConfigError(f"rows = {rows} is too few for a row of every kind; give {least} or more")
    kinds += ["good"] * (rows - len(kinds))
    return np.array(kinds)[rng.permutation(rows)]


def _pictures(
    rng: np.random.Generator, train: npt.NDArray[np.int64], held_out: frozenset[tuple[int, str, str]], count: int
) -> list[Picture]:
    """Different pictures in random order, none of a held-out combination."""
    labels, names = scans()[1], list(COLOURS)
    pairs = [(fg, bg) for fg in names for bg in names if fg != bg]
    every = len(train) * len(pairs)
    if count > every * (100 - 2 * HELD_OUT_COMBINATIONS_PERCENT) // 100:
        raise ConfigError(f"rows = {count} is more than there are different pictures; give {every // 2} or fewer")
    pictures = []
    for number in rng.permutation(every):
        index = int(train[number // len(pairs)])
        foreground, background = pairs[number % len(pairs)]
        if (int(labels[index]), foreground, background) not in held_out:
            pictures.append(Picture(index, foreground, background))
        if len(pictures) == count:
            break
    return pictures


def _table(
    rng: np.random.Generator, kinds: npt.NDArray[np.str_], pictures: Sequence[Picture], image_size: int, port: int
) -> pa.Table:
    """LAION-Aesthetics V2's columns, each row good or bad as its kind says."""
    count = len(kinds)
    scores = {
        "similarity": np.where(kinds == "similarity", rng.uniform(0.1, 0.27, count), rng.uniform(0.285, 0.4, count)),
        "punsafe": np.where(kinds == "nsfw", rng.uniform(0.25, 1.0, count), rng.uniform(0.0, 0.19, count)),
        "pwatermark": np.where(kinds == "pwatermark", rng.uniform(0.55, 1.0, count), rng.uniform(0.0, 0.49, count)),
        "aesthetic": rng.uniform(7.0, 9.0, count),
        "AESTHETIC_SCORE": np.where(kinds == "aesthetic", rng.uniform(4.5, 6.4, count), rng.uniform(6.51, 8.0, count)),
    }
    widths = np.where(kinds == "size", image_size // 2, np.where(kinds == "aspect_ratio", image_size * 3, image_size))
    heights = np.where(kinds == "size", image_size // 2, image_size)
    captions = [_caption(kind, picture, row) for row, (kind, picture) in enumerate(zip(kinds, pictures, strict=True))]
    urls = _urls(rng, kinds, pictures, port)
    hashes = [mmh3.hash64((url + text).encode())[0] for url, text in zip(urls, captions, strict=True)]
    columns: dict[str, Any] = {
        "URL": pa.array(urls, pa.string()),
        "TEXT": pa.array(captions, pa.string()),
        "WIDTH": pa.array(widths, pa.int32()),
        "HEIGHT": pa.array(heights, pa.int32()),
        "similarity": pa.array(scores["similarity"], pa.float64()),
        "hash": pa.array(hashes, pa.int64()),
        **{name: pa.array(scores[name].astype(np.float32)) for name in scores if name != "similarity"},
    }
    return pa.table(columns)


def _caption(kind: str, picture: Picture, row: int) -> str:
    if kind == "caption":  # too short and too long in turn
        return "a digit" if row % 2 else " ".join([picture.caption()] * 8)
    return picture.caption()


def _urls(rng: np.random.Generator, kinds: npt.NDArray[np.str_], pictures: Sequence[Picture], port: int) -> list[str]:
    """Good links, and those of the kinds whose link is bad; a duplicate repeats the URL of a good row."""
    good = np.flatnonzero(kinds == "good")
    prefix = f"http://127.0.0.1:{port}"
    urls = []
    for kind, picture in zip(kinds, pictures, strict=True):
        if kind == "duplicate":
            picture = pictures[int(rng.choice(good))]
        folder = f"{kind}/" if kind in ("gone", "page", "small", "slow") else ""
        urls.append(f"{prefix}/{folder}{picture.path}")
    return urls
