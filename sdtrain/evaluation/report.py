"""One HTML file that tells a whole run, from metadata to samples; it loads nothing and needs no script."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtrain import __version__
from sdtrain.data.captions import clean_caption
from sdtrain.errors import ConfigError, DataError
from sdtrain.evaluation.run_story import RunStory, read_run
from sdtrain.run_dir import write_atomically

TEMPLATES = Path(__file__).parent / "templates"
MAX_IMAGE_BYTES = 16_000_000
NO_FIGURE = "\u2013"
_IMAGE_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}


@dataclass(frozen=True, slots=True)
class FunnelRow:
    """One rule of the filter: its setting in words, how many rows it rejected, how many were left after it."""

    rule: str
    setting: str
    rejected: int
    left: int


@dataclass(frozen=True, slots=True)
class Funnel:
    """What filtering left of the metadata."""

    rows_in: int
    rows_out: int
    rules: tuple[FunnelRow, ...]


@dataclass(frozen=True, slots=True)
class Tile:
    """A key figure with what it means."""

    value: str
    label: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Picture:
    """An image as a data URI, with the text that stands for it."""

    uri: str
    name: str


@dataclass(frozen=True, slots=True)
class Accuracy:
    """One row of the prompt-accuracy table; shares are None where there was no picture."""

    pictures: str
    n: int
    digit: float | None
    colour: float | None
    prompt: float | None


# Reading the sources ------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ConfigError: the file is missing.
        DataError: it holds no JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path}: no such file; leave the option out, or give the file that the step wrote"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise DataError(f"{path}: holds a {type(found).__name__}, needed is an object with named values")
    return found


def read_funnel(path: Path) -> Funnel:
    """The survival funnel, as the filter wrote it: `rows_in`, `rules` (rule, setting, rejected, left), `rows_out`.

    Raises:
        ConfigError: the file is missing.
        DataError: a key is missing, or the figures do not add up.
    """
    found = read_json(path)
    try:
        rows_in, rows_out = int(found["rows_in"]), int(found["rows_out"])
        rules = tuple(
            FunnelRow(str(row["rule"]), str(row["setting"]), int(row["rejected"]), int(row["left"]))
            for row in found["rules"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not a survival funnel of the filter ({type(error).__name__}: {error})") from error
    rejected = sum(rule.rejected for rule in rules)
    if rows_in - rejected != rows_out:
        raise DataError(f"{path}: {rows_in} rows in less {rejected} rejected are not rows_out, {rows_out}")
    return Funnel(rows_in, rows_out, rules)


def read_timings(path: Path) -> dict[str, float]:
    """Seconds by the name of the step, in the order of the file.

    Raises:
        ConfigError: the file is missing.
        DataError: a value is no number.
    """
    found = read_json(path)
    try:
        return {str(name): float(seconds) for name, seconds in found.items()}
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: needed is a number of seconds per step; found {found}") from error


def read_picture(path: Path) -> Picture:
    """An image file as a data URI.

    Raises:
        ConfigError: the file is missing, too large for a page, or of another type.
    """
    if path.suffix.lower() not in _IMAGE_TYPES:
        raise ConfigError(f"{path}: found the type {path.suffix!r}, allowed are {', '.join(_IMAGE_TYPES)}")
    if not path.is_file():
        raise ConfigError(f"{path}: no such image")
    if path.stat().st_size > MAX_IMAGE_BYTES:
        raise ConfigError(
            f"{path}: {path.stat().st_size} bytes, allowed in one page are {MAX_IMAGE_BYTES}; give a smaller grid"
        )
    encoded = base64.b64encode(path.read_bytes()).decode()
    return Picture(f"data:{_IMAGE_TYPES[path.suffix.lower()]};base64,{encoded}", f"{path.parent.name}/{path.name}")


def read_accuracy(path: Path) -> tuple[dict[str, Any], list[Accuracy]]:
    """A result of `prompt_accuracy` and its rows: all pictures, seen combinations, unseen ones.

    Raises:
        ConfigError: the file is missing.
        DataError: it is no such result.
    """
    found = read_json(path)
    parts = {"all": found, "seen combinations": found.get("seen"), "unseen combinations": found.get("unseen")}
    try:
        rows = [
            Accuracy(name, part["n"], part["digit_accuracy"], part["colour_accuracy"], part["prompt_accuracy"])
            for name, part in parts.items()
        ]
        judge = {"judge_accuracy": float(found["judge_accuracy"]), "judge_n": int(found["judge_n"])}
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: not a result of prompt accuracy; {error} is missing") from error
    return found | judge, rows


# Words for figures --------------------------------------------------------------------------------------------------


def format_count(number: float) -> str:
    """`12,345`; from ten million on `12.3 M`."""
    if abs(number) >= 1e7:
        return f"{number / 1e6:,.1f} M"
    return f"{number:,.0f}"


def format_share(share: float | None) -> str:
    """`93.5 %`, or a dash for no figure."""
    return NO_FIGURE if share is None else f"{100 * share:.1f} %"


def format_seconds(seconds: float) -> str:
    """`4.2 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_figure(value: float | None) -> str:
    """Four significant digits, or a dash."""
    return NO_FIGURE if value is None else f"{value:.4g}"


# The page -----------------------------------------------------------------------------------------------------------


def _tiles(
    funnel: Funnel | None, stories: Sequence[RunStory], best: Mapping[str, Any] | None, timings: Mapping[str, float]
) -> list[Tile]:
    tiles = []
    if funnel is not None:
        share = funnel.rows_out / funnel.rows_in if funnel.rows_in else 0.0
        note = f"of {format_count(funnel.rows_in)} rows"
        tiles.append(Tile(format_share(share), "survived the filter", note))
    for story in stories:
        if story.final_loss is not None:
            restarts = f"{story.num_restarts} restart{'s' * (story.num_restarts != 1)}"
            note = f"after {format_count(story.last_step)} steps, {restarts}"
            tiles.append(Tile(format_figure(story.final_loss), f"loss, {story.name}", note))
    if best is not None:
        scale = best.get("sampling", {}).get("guidance_scale")
        note = f"of {best['n']} samples" + (f", guidance {scale:g}" if scale is not None else "")
        tiles.append(Tile(format_share(best["prompt_accuracy"]), "show digit and colours of their prompt", note))
    if timings:
        tiles.append(Tile(format_seconds(sum(timings.values())), "from start to end", f"{len(timings)} steps"))
    return tiles


def write_report(
    output: Path,
    *,
    title: str = "Training report",
    funnel_json: Path | None = None,
    download_summary: Path | None = None,
    runs: Sequence[Path] = (),
    grids: Sequence[Path] = (),
    prompt_accuracy: Sequence[Path] = (),
    timings_json: Path | None = None,
) -> Path:
    """Write the page; sections without a source are left out.

    Args:
        output: HTML file, replaced atomically.
        title: Heading of the page.
        funnel_json: Survival funnel of the filter.
        download_summary: Counts of the download by name.
        runs: Run folders.
        grids: Image files.
        prompt_accuracy: Results of `evaluation.prompt_accuracy`, such as one per guidance scale.
        timings_json: Seconds by the name of the step.

    Raises:
        ConfigError: a source is missing.
        DataError: a source does not hold what it should.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    funnel = None if funnel_json is None else read_funnel(funnel_json)
    download = {} if download_summary is None else read_json(download_summary)
    stories = [read_run(run, f"run{i}") for i, run in enumerate(runs)]
    accuracies = [read_accuracy(path) for path in prompt_accuracy]
    timings = {} if timings_json is None else read_timings(timings_json)
    best = max((found for found, _ in accuracies), key=lambda found: found["prompt_accuracy"] or 0.0, default=None)

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": format_count,
        "share": format_share,
        "seconds": format_seconds,
        "figure": format_figure,
        "caption": clean_caption,
    }
    page = environment.get_template("report.html.j2").render(
        title=title,
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        version=__version__,
        tiles=_tiles(funnel, stories, best, timings),
        funnel=funnel,
        download={name: value for name, value in download.items() if not isinstance(value, dict | list)},
        stories=stories,
        pictures=[read_picture(path) for path in grids],
        accuracies=accuracies,
        timings=timings,
    )
    write_atomically(output, page)
    return output
