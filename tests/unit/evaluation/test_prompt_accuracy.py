import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from sdtrain.errors import ConfigError, DataError
from sdtrain.evaluation.prompt_accuracy import (
    DigitJudge,
    DigitsWorld,
    Score,
    Wanted,
    contrast,
    judge_pictures,
    nearest_colours,
    prompt_accuracy,
    read_colours,
    score_samples,
)

COLOURS = {"red": (214, 40, 40), "blue": (40, 70, 200), "green": (40, 150, 60), "yellow": (240, 210, 50)}
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
REAL, LABELS = load_digits(return_X_y=True)
ORDER = np.random.default_rng(0).permutation(len(REAL)).tolist()
WORLD = DigitsWorld(COLOURS, NAMES, frozenset({(7, "red", "blue")}), tuple(ORDER[:1200]), tuple(ORDER[1200:]))


def picture(index: int, foreground: str, background: str, size: int = 32) -> np.ndarray:
    """A real digit, enlarged and coloured as the digits world does."""
    ink = Image.fromarray((REAL[index].reshape(8, 8) / 16 * 255).astype(np.uint8))
    share = np.asarray(ink.resize((size, size), Image.Resampling.BICUBIC))[..., None] / 255
    return (
        (np.array(COLOURS[foreground]) * share + np.array(COLOURS[background]) * (1 - share)).round().astype(np.uint8)
    )


def caption(digit: int, foreground: str, background: str) -> str:
    return f"a {foreground} handwritten {NAMES[digit]} on a {background} background"


def held_out(count: int, foreground: str, background: str) -> tuple[np.ndarray, list[int]]:
    chosen = WORLD.judge_held_out[:count]
    return np.stack([picture(i, foreground, background) for i in chosen]), [int(LABELS[i]) for i in chosen]


# --- captions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a red handwritten seven on a blue background", Wanted(7, "red", "blue")),
        ("On a blue background, a red handwritten seven.", Wanted(7, "red", "blue")),
        ("A RED seven drawn on BLUE paper", Wanted(7, "red", "blue")),
    ],
)
def test_captions_are_read(text, wanted):
    assert WORLD.parse(text) == wanted


def test_a_longer_colour_name_wins():
    world = DigitsWorld({"blue": (0, 0, 255), "light blue": (150, 150, 255)}, NAMES, frozenset(), (), ())
    assert world.parse("a light blue one on a blue background") == Wanted(1, "light blue", "blue")


@pytest.mark.parametrize(
    "text", ["a red seven", "a red dog on a blue background", "a red seven and one on a blue background"]
)
def test_a_caption_that_asks_for_anything_else_is_refused(text):
    with pytest.raises(
        DataError, match=r"caption .*: found digits \[.*\] and colours \[.*\], needed are one digit \(zero"
    ):
        WORLD.parse(text)


# --- looking at pictures ----------------------------------------------------------------------------------------


def test_contrast_does_not_depend_on_the_two_colours():
    pictures = [picture(5, *pair) for pair in (("red", "blue"), ("yellow", "green"), ("blue", "yellow"))]
    first, *others = contrast(np.stack(pictures))
    for other in others:
        np.testing.assert_allclose(other, first, atol=0.03)
    assert first.max() == 1 and first.min() == 0


def test_equal_luminance_is_no_obstacle():
    pixels = np.full((1, 16, 16, 3), (200, 0, 0), np.uint8)
    pixels[0, 4:12, 4:12] = (0, 102, 0)  # 0.2126 * 200 / 0.7152 = 59 in linear, about this in 8 bits: as bright
    assert contrast(pixels)[0, 8, 8] == 1 and contrast(pixels)[0, 0, 0] == 0


def test_a_flat_picture_has_no_contrast():
    assert not contrast(np.full((1, 16, 16, 3), 77, np.uint8)).any()
    assert np.isfinite(judge_pictures(np.full((1, 16, 16, 3), 77, np.uint8))).all()


def test_the_judge_sees_the_real_digit_again():
    pixels = np.stack([picture(i, "red", "blue", size=64) for i in range(50)])
    real = REAL[:50] / REAL[:50].max(axis=1, keepdims=True)
    assert np.abs(judge_pictures(pixels) - real).mean() < 0.08


def test_nearest_colours():
    assert nearest_colours(np.array([[200.0, 60, 60], [60, 60, 220], [0, 255, 0]]), COLOURS) == ["red", "blue", "green"]


def test_colours_survive_jpeg_and_noise():
    pixels, _ = held_out(40, "yellow", "blue")
    noisy = np.clip(pixels + np.random.default_rng(0).normal(0, 12, pixels.shape), 0, 255).astype(np.uint8)
    for i, picture_ in enumerate(noisy):
        buffer = io.BytesIO()
        Image.fromarray(picture_).save(buffer, "JPEG", quality=85)
        noisy[i] = np.asarray(Image.open(buffer))
    assert read_colours(noisy, COLOURS) == [("yellow", "blue")] * 40


# --- the judge --------------------------------------------------------------------------------------------------


def test_the_judge_reads_digits_that_it_did_not_learn_from():
    judge = DigitJudge(WORLD.judge_train, WORLD.judge_held_out)
    assert judge.accuracy > 0.98 and judge.num_held_out == 597
    pixels, digits = held_out(200, "green", "red")
    assert (judge.read(pixels) == digits).mean() > 0.96


@pytest.mark.parametrize(("train", "test"), [((), (1,)), ((1, 2), ()), ((1, 2, 3), (3, 4))])
def test_a_judge_is_not_tested_on_what_it_learned(train, test):
    with pytest.raises(DataError, match=r"judge: \d digits to learn from and \d to be tested on, \d of them in both"):
        DigitJudge(train, test)


# --- the whole --------------------------------------------------------------------------------------------------


def test_right_pictures_score_high_and_wrong_ones_low():
    pixels, digits = held_out(100, "red", "blue")
    right = prompt_accuracy(pixels, [caption(digit, "red", "blue") for digit in digits], WORLD).overall
    assert right.n == 100 and right.colour_accuracy == 1.0
    assert right.digit_accuracy is not None and right.digit_accuracy > 0.95
    assert right.prompt_accuracy == right.digit_accuracy
    swapped = prompt_accuracy(pixels, [caption(digit, "blue", "red") for digit in digits], WORLD).overall
    assert (swapped.digit_accuracy, swapped.colour_accuracy, swapped.prompt_accuracy) == (
        right.digit_accuracy,
        0.0,
        0.0,
    )
    other = prompt_accuracy(pixels, [caption((digit + 1) % 10, "red", "blue") for digit in digits], WORLD).overall
    assert other.digit_accuracy is not None and other.digit_accuracy < 0.05 and other.colour_accuracy == 1.0


def test_noise_scores_at_chance():
    pixels = np.random.default_rng(0).integers(0, 256, (200, 32, 32, 3), dtype=np.uint8)
    score = prompt_accuracy(pixels, [caption(i % 10, "red", "blue") for i in range(200)], WORLD).overall
    assert score.digit_accuracy is not None and score.digit_accuracy < 0.25


def test_combinations_never_seen_are_counted_apart():
    sevens = [i for i in WORLD.judge_held_out if LABELS[i] == 7][:10]
    pixels = np.stack([picture(i, "red", "blue") for i in sevens] + [picture(i, "red", "green") for i in sevens[:4]])
    captions = [caption(7, "red", "blue")] * 10 + [caption(7, "red", "yellow")] * 4  # the seen ones in a wrong colour
    result = prompt_accuracy(pixels, captions, WORLD)
    assert (result.overall.n, result.unseen.n, result.seen.n) == (14, 10, 4)
    assert (result.unseen.colour_accuracy, result.seen.colour_accuracy) == (1.0, 0.0)
    assert result.overall.colour_accuracy == pytest.approx(10 / 14)


def test_no_picture_gives_no_figure():
    pixels, digits = held_out(3, "green", "red")
    result = prompt_accuracy(pixels, [caption(digit, "green", "red") for digit in digits], WORLD)
    assert result.unseen == Score(0, None, None, None)
    assert json.loads(json.dumps(result.as_json()))["unseen"]["digit_accuracy"] is None


def test_captions_and_pictures_must_pair():
    with pytest.raises(DataError, match="captions: found 1 for 2 pictures, needed is one for each"):
        prompt_accuracy(held_out(2, "red", "blue")[0], [caption(1, "red", "blue")], WORLD)


# --- files ------------------------------------------------------------------------------------------------------


def world_file(folder):
    page = {
        "colours": {name: list(value) for name, value in COLOURS.items()},
        "digit_names": list(NAMES),
        "held_out_combinations": [[7, "red", "blue"]],
        "judge_train": list(WORLD.judge_train),
        "judge_held_out": list(WORLD.judge_held_out),
        "image_size": 32,
    }
    (folder / "world.json").write_text(json.dumps(page))
    return folder / "world.json"


def test_the_world_is_read(tmp_path):
    assert DigitsWorld.load(world_file(tmp_path)) == WORLD


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file; the digits source writes it"),
        ("{", "not a description of a digits world"),
        ('{"colours": {"red": [1, 2]}}', "not a description of a digits world"),
        ('{"colours": {}}', "key 'digit_names' is missing"),
    ],
)
def test_a_world_that_cannot_be_read_is_named(tmp_path, text, message):
    path = tmp_path / "world.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=f"{re.escape(str(path))}: {re.escape(message)}"):
        DigitsWorld.load(path)


def test_a_folder_of_samples_is_judged(tmp_path):
    pixels, digits = held_out(4, "red", "blue")
    items = []
    for i, (picture_, digit) in enumerate(zip(pixels, digits, strict=True)):
        Image.fromarray(picture_).save(tmp_path / f"{i:05d}.png")
        items.append({"file": f"{i:05d}.png", "prompt": caption(digit, "red", "blue"), "seed": i})
    (tmp_path / "samples.json").write_text(json.dumps({"n": 4, "guidance_scale": 3.0, "items": items}))
    result = score_samples(tmp_path, world_file(tmp_path), tmp_path / "out" / "accuracy.json")
    written = json.loads((tmp_path / "out" / "accuracy.json").read_text())
    assert written["n"] == 4 and written["colour_accuracy"] == result.overall.colour_accuracy == 1.0
    assert written["sampling"] == {"n": 4, "guidance_scale": 3.0}
    assert written["judge_n"] == 597


def test_a_folder_without_samples_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no samples.json; give the output folder of `sdtrain sample`"):
        score_samples(tmp_path, tmp_path / "world.json", tmp_path / "out.json")
