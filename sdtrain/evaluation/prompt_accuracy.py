"""Do generated digits show what their captions say? A digit judge and a colour check.

The judge is a support vector machine that learns from real handwritten digits and is tested on others; its own accuracy
on those is part of every result, since no generated picture can be judged better than that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdtrain.errors import ConfigError, DataError
from sdtrain.evaluation.grids import check_pixels
from sdtrain.run_dir import write_atomically

JUDGE_SIZE = 8  # scikit-learn's digits are 8 x 8
FOREGROUND_ABOVE, BACKGROUND_BELOW = 0.7, 0.2


@dataclass(frozen=True)
class DigitsWorld:
    """What the digits source wrote about its world (`world.json`).

    Attributes:
        colours: Name -> (red, green, blue), 0 to 255.
        digit_names: The ten names, zero first.
        held_out_combinations: (digit, foreground, background) that training never saw.
        judge_train: Indices into scikit-learn's digits that the judge learns from.
        judge_held_out: Indices that it is tested on.
    """

    colours: Mapping[str, tuple[int, int, int]]
    digit_names: tuple[str, ...]
    held_out_combinations: frozenset[tuple[int, str, str]]
    judge_train: tuple[int, ...]
    judge_held_out: tuple[int, ...]

    @classmethod
    def load(cls, path: Path) -> DigitsWorld:
        """Read `world.json`.

        Raises:
            DataError: it is missing, not JSON, or lacks a key.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                colours={
                    name: (int(red), int(green), int(blue)) for name, (red, green, blue) in found["colours"].items()
                },
                digit_names=tuple(found["digit_names"]),
                held_out_combinations=frozenset((int(d), fg, bg) for d, fg, bg in found["held_out_combinations"]),
                judge_train=tuple(found["judge_train"]),
                judge_held_out=tuple(found["judge_held_out"]),
            )
        except FileNotFoundError as error:
            raise DataError(f"{path}: no such file; the digits source writes it beside its metadata") from error
        except KeyError as error:
            raise DataError(f"{path}: key {error} is missing; write the world again with this version") from error
        except (json.JSONDecodeError, TypeError, ValueError) as error:
            raise DataError(f"{path}: not a description of a digits world ({error})") from error

    @cached_property
    def _word(self) -> re.Pattern[str]:
        names = sorted([*self.colours, *self.digit_names], key=len, reverse=True)
        return re.compile(rf"\b({'|'.join(map(re.escape, names))})\b(\s+background\b)?", re.IGNORECASE)

    def parse(self, caption: str) -> Wanted:
        """What a caption asks for; the background is the colour before that word, else the second colour.

        Raises:
            DataError: the caption does not name one digit and two colours.
        """
        found = [(match[1].lower(), match[2] is not None) for match in self._word.finditer(caption)]
        digits = [self.digit_names.index(word) for word, _ in found if word in self.digit_names]
        colours = [(word, is_background) for word, is_background in found if word in self.colours]
        if len(digits) != 1 or len(colours) != 2:
            raise DataError(
                f"caption {caption!r}: found digits {[self.digit_names[digit] for digit in digits]} and colours "
                f"{[word for word, _ in colours]}, needed are one digit ({', '.join(self.digit_names)}) "
                f"and two colours ({', '.join(self.colours)})"
            )
        (first, first_is_background), (second, _) = colours
        foreground, background = (second, first) if first_is_background else (first, second)
        return Wanted(digits[0], foreground, background)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What one caption asks for."""

    digit: int
    foreground: str
    background: str


@dataclass(frozen=True, slots=True)
class Score:
    """Shares of pictures, in [0, 1]; None where there is no picture.

    Attributes:
        n: Number of pictures.
        digit_accuracy: The judge sees the digit of the caption.
        colour_accuracy: Foreground and background are both nearest to the colours of the caption.
        prompt_accuracy: Digit and both colours at once.
    """

    n: int
    digit_accuracy: float | None
    colour_accuracy: float | None
    prompt_accuracy: float | None


@dataclass(frozen=True, slots=True)
class PromptAccuracy:
    """The whole result.

    Attributes:
        overall: All pictures.
        seen: Those whose combination of digit and colours was in the training data.
        unseen: Those whose combination was held out.
        judge_accuracy: Of the judge, on real digits it did not learn from: the ceiling of `digit_accuracy`.
        judge_n: How many real digits those were.
    """

    overall: Score
    seen: Score
    unseen: Score
    judge_accuracy: float
    judge_n: int

    def as_json(self) -> dict[str, Any]:
        """Plain values, the overall shares at the top."""
        judge = {"judge_accuracy": self.judge_accuracy, "judge_n": self.judge_n}
        return asdict(self.overall) | judge | {"seen": asdict(self.seen), "unseen": asdict(self.unseen)}


def background_colour(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(num, 3) median colour along the border of each picture; a digit that touches it covers far less than half."""
    top, bottom, left, right = pixels[:, 0], pixels[:, -1], pixels[:, 1:-1, 0], pixels[:, 1:-1, -1]
    return np.median(np.concatenate([top, bottom, left, right], axis=1).astype(np.float64), axis=1)


def contrast(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(num, height, width) distance from the background colour, 1 where it is largest; 0 for a flat picture.

    Colour distance, not luminance: a red digit on a blue ground may be as bright as its ground.
    """
    distance = np.linalg.norm(pixels - background_colour(pixels)[:, None, None], axis=-1)
    strongest = np.percentile(distance, 98, axis=(1, 2), keepdims=True)
    return np.clip(distance / np.maximum(strongest, 1e-9), 0, 1) * (strongest > 1)


def judge_pictures(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(num, 64) contrast at the judge's 8 x 8, by area; the same for any two colours and any size."""
    small = [Image.fromarray(picture.astype(np.float32)) for picture in contrast(pixels)]
    boxed = [np.asarray(picture.resize((JUDGE_SIZE, JUDGE_SIZE), Image.Resampling.BOX)) for picture in small]
    pictures = np.stack(boxed).astype(np.float64).reshape(len(pixels), -1)
    return pictures / np.maximum(pictures.max(axis=1, keepdims=True), 1e-9)


class DigitJudge:
    """Reads digits from pictures of any two colours.

    Attributes:
        accuracy: Share of the held-out real digits that it reads right.
        num_held_out: How many those were.
    """

    def __init__(self, train: Sequence[int], held_out: Sequence[int]) -> None:
        """Learn from scikit-learn's digits `train`, be tested on `held_out`.

        Raises:
            DataError: the two overlap, or one is empty.
        """
        from sklearn.datasets import load_digits
        from sklearn.svm import SVC

        if not train or not held_out or set(train) & set(held_out):
            raise DataError(
                f"judge: {len(train)} digits to learn from and {len(held_out)} to be tested on, "
                f"{len(set(train) & set(held_out))} of them in both; needed are two separate sets"
            )
        pictures, digits = load_digits(return_X_y=True)
        pictures = pictures / np.maximum(pictures.max(axis=1, keepdims=True), 1e-9)
        self._machine = SVC(C=10, gamma="scale").fit(pictures[list(train)], digits[list(train)])
        self.num_held_out = len(held_out)
        self.accuracy = float((self._machine.predict(pictures[list(held_out)]) == digits[list(held_out)]).mean())

    def read(self, pixels: NDArray[np.uint8]) -> NDArray[np.int64]:
        """(num,) the digit in each picture."""
        return self._machine.predict(judge_pictures(pixels)).astype(np.int64)


def nearest_colours(colours: NDArray[np.float64], table: Mapping[str, tuple[int, int, int]]) -> list[str]:
    """Name of the nearest colour of the table for each of (num, 3) colours."""
    names, values = list(table), np.array(list(table.values()), dtype=np.float64)
    distances = np.linalg.norm(colours[:, None] - values, axis=-1)
    return [names[i] for i in distances.argmin(axis=1)]


def read_colours(pixels: NDArray[np.uint8], table: Mapping[str, tuple[int, int, int]]) -> list[tuple[str, str]]:
    """(foreground, background) names of each picture: medians over the strokes and over the ground."""
    strength = contrast(pixels)
    foregrounds, backgrounds = [], []
    for picture, strong in zip(pixels.astype(np.float64), strength, strict=True):
        ground = picture[strong < BACKGROUND_BELOW]
        stroke = picture[strong > FOREGROUND_ABOVE]
        backgrounds.append(np.median(ground if len(ground) else picture.reshape(-1, 3), axis=0))
        foregrounds.append(np.median(stroke, axis=0) if len(stroke) else backgrounds[-1])
    return list(
        zip(nearest_colours(np.stack(foregrounds), table), nearest_colours(np.stack(backgrounds), table), strict=True)
    )


def _score(digit_right: NDArray[np.bool_], colour_right: NDArray[np.bool_], chosen: NDArray[np.bool_]) -> Score:
    n = int(chosen.sum())
    if n == 0:
        return Score(0, None, None, None)
    both = digit_right & colour_right
    return Score(n, *(float(right[chosen].mean()) for right in (digit_right, colour_right, both)))


def prompt_accuracy(pixels: NDArray[np.uint8], captions: Sequence[str], world: DigitsWorld) -> PromptAccuracy:
    """Compare pictures with their captions.

    Args:
        pixels: (num, height, width, 3) uint8.
        captions: One a picture, in the grammar of the digits world.
        world: Colours, names and which combinations were held out.

    Raises:
        DataError: pixels of another shape or type, another number of captions, or a caption that names no digit.
    """
    check_pixels(pixels)
    if len(captions) != len(pixels):
        raise DataError(f"captions: found {len(captions)} for {len(pixels)} pictures, needed is one for each")
    wanted = [world.parse(caption) for caption in captions]
    judge = DigitJudge(world.judge_train, world.judge_held_out)
    digit_right = judge.read(pixels) == np.array([want.digit for want in wanted])
    colours = read_colours(pixels, world.colours)
    colour_right = np.array(
        [(want.foreground, want.background) == found for want, found in zip(wanted, colours, strict=True)]
    )
    unseen = np.array(
        [(want.digit, want.foreground, want.background) in world.held_out_combinations for want in wanted]
    )
    return PromptAccuracy(
        overall=_score(digit_right, colour_right, np.ones_like(unseen)),
        seen=_score(digit_right, colour_right, ~unseen),
        unseen=_score(digit_right, colour_right, unseen),
        judge_accuracy=judge.accuracy,
        judge_n=judge.num_held_out,
    )


def score_samples(samples: Path, world: Path, output: Path) -> PromptAccuracy:
    """Judge a folder that `sdtrain sample` wrote, and write the result as JSON.

    Args:
        samples: Folder with `samples.json` and the pictures that it lists.
        world: The digits world's `world.json`.
        output: JSON file to write; it repeats how the pictures were sampled.

    Raises:
        ConfigError: `samples` holds no samples.json.
        DataError: a picture, a caption or the world does not fit.
    """
    listing = samples / "samples.json"
    if not listing.is_file():
        raise ConfigError(f"{samples}: no samples.json; give the output folder of `sdtrain sample`")
    facts = json.loads(listing.read_text(encoding="utf-8"))
    items = facts.pop("items")
    pictures = [np.asarray(Image.open(samples / item["file"]).convert("RGB")) for item in items]
    result = prompt_accuracy(np.stack(pictures), [item["prompt"] for item in items], DigitsWorld.load(world))
    write_atomically(output, json.dumps(result.as_json() | {"sampling": facts}, indent=2) + "\n")
    return result
