"""Stage `filter`: seven rules on typed columns, vectorised, each with its count in the survival funnel.

Before them, rows without a URL are rejected: there is nothing to download. Percentile thresholds are rules of their
own, each after the rule with the fixed threshold; what they cut at is found by the stage `filter-percentiles`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
from rich.table import Table as RichTable

from data_pipeline.funnel import Funnel
from data_pipeline.sources.laion import Columns, TableWriter
from data_pipeline.sources.rows import Rows
from data_pipeline.stage import Needs, Stage, Unit, Work
from data_pipeline.stages.metadata import read_card, table_units
from data_pipeline.stages.percentiles import PercentilesStage, read_cuts
from sdtrain.errors import DataError

pc: Any = pyarrow.compute  # its functions are generated at import, so a type checker sees none of them

NullPolicy = Literal["reject", "keep"]
Check = Callable[[pa.RecordBatch], pa.Array]


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of the funnel.

    Attributes:
        name: What the funnel calls it.
        setting: The threshold in words.
        nulls: What happens to rows whose value is absent.
        check: Batch -> bool array, null where the value is absent.
        columns: What it looks at.
        is_costly: It looks at text, or computes: only rows that are still in question are given to it.
    """

    name: str
    setting: str
    nulls: NullPolicy
    check: Check
    columns: tuple[str, ...]
    is_costly: bool = False

    def passes(self, batch: pa.RecordBatch) -> pa.Array:
        """Which rows pass; no nulls."""
        return pc.fill_null(self.check(batch), self.nulls == "keep")


@dataclass(frozen=True)
class FilterSettings:
    """Thresholds as `filter` in the configuration gives them; None switches a rule off.

    Attributes:
        min_aesthetic: Least aesthetic score.
        aesthetic_scale: Which predictor's score: `v1` (column aesthetic) or `v2` (AESTHETIC_SCORE).
        min_similarity: Least CLIP similarity.
        min_width: Least width in pixels.
        min_height: Least height in pixels.
        min_aspect_ratio: Least width / height.
        max_aspect_ratio: Greatest width / height.
        min_caption_chars: Fewest characters, outer white space not counted.
        max_caption_chars: Most characters.
        max_pwatermark: Watermark probabilities below this pass.
        nsfw_allow: Values of a string column NSFW that pass; None switches the rule off.
        max_punsafe: Where there is only `punsafe`: values below this pass; None switches the rule off.
        nulls: Rule family (aesthetic, similarity, size, caption, pwatermark, nsfw) -> reject or keep.
        percentiles: Rule family (aesthetic, similarity, pwatermark, punsafe) -> percentile of the whole table.
        keep_rejected: Write rejected rows too, with the rule that rejected them.
    """

    min_aesthetic: float | None
    aesthetic_scale: Literal["v1", "v2"]
    min_similarity: float | None
    min_width: int | None
    min_height: int | None
    min_aspect_ratio: float | None
    max_aspect_ratio: float | None
    min_caption_chars: int | None
    max_caption_chars: int | None
    max_pwatermark: float | None
    nsfw_allow: tuple[str, ...] | None
    max_punsafe: float | None
    nulls: Mapping[str, NullPolicy]
    percentiles: Mapping[str, float] = field(default_factory=dict)
    keep_rejected: bool = False

    def facts(self) -> dict[str, Any]:
        """All settings as JSON."""
        allow = None if self.nsfw_allow is None else list(self.nsfw_allow)
        return {**vars(self), "nsfw_allow": allow, "nulls": dict(self.nulls), "percentiles": dict(self.percentiles)}

    def percentile_columns(self) -> dict[str, str]:
        """Rule family of each percentile threshold -> the column that it is about."""
        return {
            family: f"aesthetic_{self.aesthetic_scale}" if family == "aesthetic" else family
            for family in self.percentiles
        }


def rules_for(
    settings: FilterSettings, columns: Columns, source: str, cuts: Mapping[str, float] | None = None
) -> list[Rule]:
    """The active rules in the funnel's order, bound to a file's columns.

    Args:
        settings: The thresholds.
        columns: The file's columns.
        source: What messages call the file.
        cuts: Column -> the value at its percentile, for the percentiles of `settings`.

    Raises:
        DataError: A rule is on, but its column is not in the file; the message names the columns that are.
    """
    build = _RuleBuilder(settings, columns, source, cuts or {})
    candidates = [
        Rule("url", "present", "reject", lambda batch: pc.greater(pc.binary_length(batch["url"]), 0), ("url",)),
        build.aesthetic(),
        build.percentile("aesthetic"),
        build.similarity(),
        build.percentile("similarity"),
        build.size(),
        build.aspect_ratio(),
        build.caption(),
        build.pwatermark(),
        build.percentile("pwatermark"),
        build.nsfw(),
        build.percentile("punsafe"),
    ]
    return [rule for rule in candidates if rule is not None]


@dataclass(frozen=True, slots=True)
class _RuleBuilder:
    settings: FilterSettings
    columns: Columns
    source: str
    cuts: Mapping[str, float]

    def _need(self, column: str, key: str, spelled: str, advice: str = "") -> None:
        if column not in self.columns.chosen:
            raise DataError(
                f"{self.source}: filter.{key} needs a column {spelled}; columns present: "
                f"{', '.join(self.columns.present)}; {advice}or switch the rule off with filter.{key}: null"
            )

    def aesthetic(self) -> Rule | None:
        least, scale = self.settings.min_aesthetic, self.settings.aesthetic_scale
        if least is None:
            return None
        other = "v1" if scale == "v2" else "v2"
        has_other = f"aesthetic_{other}" in self.columns.chosen
        advice = f"set filter.aesthetic_scale: {other} (with a threshold of that scale), " if has_other else ""
        self._need(f"aesthetic_{scale}", "min_aesthetic", "AESTHETIC_SCORE" if scale == "v2" else "aesthetic", advice)
        column = f"aesthetic_{scale}"
        return self._rule("aesthetic", f"{scale} >= {least:g}", "aesthetic", _least(column, least), column)

    def similarity(self) -> Rule | None:
        least = self.settings.min_similarity
        if least is None:
            return None
        self._need("similarity", "min_similarity", "similarity")
        return self._rule("similarity", f">= {least:g}", "similarity", _least("similarity", least), "similarity")

    def size(self) -> Rule | None:
        sides, checks, words = [], [], []
        for side in ("width", "height"):
            least = self.settings.min_width if side == "width" else self.settings.min_height
            if least is not None:
                self._need(side, f"min_{side}", side.upper())
                sides.append(side)
                checks.append(_least(side, least))
                words.append(f"{side} >= {least}")
        return self._rule("size", ", ".join(words), "size", _all(checks), *sides) if checks else None

    def aspect_ratio(self) -> Rule | None:
        low, high = self.settings.min_aspect_ratio, self.settings.max_aspect_ratio
        if low is None and high is None:
            return None
        key = "min_aspect_ratio" if low is not None else "max_aspect_ratio"
        for side in ("width", "height"):
            self._need(side, key, side.upper())

        def ratio(batch: pa.RecordBatch) -> pa.Array:
            return pc.divide(batch["width"].cast(pa.float64()), batch["height"].cast(pa.float64()))

        words = _range_words("", low, high)
        return self._rule("aspect_ratio", words, "size", _between(ratio, low, high), "width", "height")

    def caption(self) -> Rule | None:
        low, high = self.settings.min_caption_chars, self.settings.max_caption_chars
        if low is None and high is None:
            return None

        def length(batch: pa.RecordBatch) -> pa.Array:
            return pc.utf8_length(pc.utf8_trim_whitespace(batch["caption"]))

        words = _range_words(" characters", low, high)
        return self._rule("caption", words, "caption", _between(length, low, high), "caption")

    def pwatermark(self) -> Rule | None:
        limit = self.settings.max_pwatermark
        if limit is None:
            return None
        self._need("pwatermark", "max_pwatermark", "pwatermark")
        return self._rule("pwatermark", f"< {limit:g}", "pwatermark", _below("pwatermark", limit), "pwatermark")

    def nsfw(self) -> Rule | None:
        allow, limit = self.settings.nsfw_allow, self.settings.max_punsafe
        if allow is None or limit is None:
            return None
        if "nsfw" in self.columns.chosen:
            values = pa.array(allow, pa.string())

            def is_allowed(batch: pa.RecordBatch) -> pa.Array:
                inside = pc.is_in(batch["nsfw"], value_set=values)
                return pc.if_else(batch["nsfw"].is_null(), pa.scalar(None, pa.bool_()), inside)

            return self._rule("nsfw", f"in {{{', '.join(allow)}}}", "nsfw", is_allowed, "nsfw")
        self._need("punsafe", "nsfw", "NSFW or punsafe")
        return self._rule("nsfw", f"punsafe < {limit:g}", "nsfw", _below("punsafe", limit), "punsafe")

    def percentile(self, family: str) -> Rule | None:
        percent = self.settings.percentiles.get(family)
        if percent is None:
            return None
        column = self.settings.percentile_columns()[family]
        self._need(column, f"percentiles.{family}", column)
        cut, is_least = self.cuts[column], family in ("aesthetic", "similarity")
        words = f"{'>=' if is_least else '<='} percentile {percent:g} = {cut:g}"
        check = _least(column, cut) if is_least else _at_most(column, cut)
        return self._rule(f"{family}_percentile", words, "nsfw" if family == "punsafe" else family, check, column)

    def _rule(self, name: str, setting: str, family: str, check: Check, *columns: str) -> Rule:
        is_costly = name in ("aspect_ratio", "caption") or "nsfw" in columns
        return Rule(name, setting, self.settings.nulls[family], check, columns, is_costly)


def _threshold(value: float, kind: pa.DataType) -> pa.Scalar:
    """A threshold in the column's own precision: 0.7 of a float32 column is its nearest float32, not 0.7 itself."""
    return pa.scalar(value, pa.float64()).cast(kind) if pa.types.is_floating(kind) else pa.scalar(value)


def _least(column: str, value: float) -> Check:
    return lambda batch: pc.greater_equal(batch[column], _threshold(value, batch[column].type))


def _at_most(column: str, value: float) -> Check:
    return lambda batch: pc.less_equal(batch[column], _threshold(value, batch[column].type))


def _below(column: str, value: float) -> Check:
    return lambda batch: pc.less(batch[column], _threshold(value, batch[column].type))


def _between(measure: Check, low: float | None, high: float | None) -> Check:
    def check(batch: pa.RecordBatch) -> pa.Array:
        values = measure(batch)
        if pa.types.is_floating(values.type):  # 0 / 0 pixels is an absent ratio
            values = pc.if_else(pc.is_nan(values), pa.scalar(None, values.type), values)
        bounds = [] if low is None else [pc.greater_equal(values, pa.scalar(low))]
        bounds += [] if high is None else [pc.less_equal(values, pa.scalar(high))]
        return _conjunction(bounds)

    return check


def _all(checks: Sequence[Check]) -> Check:
    return lambda batch: _conjunction([check(batch) for check in checks])


def _conjunction(parts: Sequence[pa.Array]) -> pa.Array:
    """Kleene logic: false beats null, so an absent height does not save a row whose width is too small."""
    result = parts[0]
    for part in parts[1:]:
        result = pc.and_kleene(result, part)
    return result


def _range_words(unit: str, low: float | None, high: float | None) -> str:
    if low is not None and high is not None:
        return f"{low:g} - {high:g}{unit}"
    return f">= {low:g}{unit}" if low is not None else f"<= {high:g}{unit}"


def failures(batch: pa.RecordBatch, rules: Sequence[Rule]) -> list[npt.NDArray[np.bool_]]:
    """For each rule which rows fail it, whatever the rules before it say."""
    return [~_passes(batch, rule) for rule in rules]


def judge(rows: Rows, rules: Sequence[Rule]) -> npt.NDArray[np.uint8]:
    """For each row the place of the first rule that rejects it, counted from 1; 0 passes.

    Costly rules see only the rows that passed those before them: captions cost more than all numbers together.
    """
    verdict = np.zeros(len(rows), np.uint8)
    for place, rule in enumerate(rules, 1):
        alive = verdict == 0
        if rule.is_costly:
            chosen = np.flatnonzero(alive)
            failed = np.zeros(len(alive), bool)
            failed[chosen] = ~_passes(rows.take(chosen, rule.columns), rule)
        elif rule.columns == ("url",):
            failed = ~rows.has_text("url")
        else:
            failed = alive & ~_passes(rows.numbers, rule)
        verdict += failed.view(np.uint8) * np.uint8(place)
    return verdict


def _passes(batch: pa.RecordBatch, rule: Rule) -> npt.NDArray[np.bool_]:
    return rule.passes(batch).to_numpy(zero_copy_only=False)


def apply_rules(batch: pa.RecordBatch, rules: Sequence[Rule]) -> tuple[pa.RecordBatch, dict[str, int]]:
    """The rows that pass every rule, and how many each rule was the first to reject."""
    verdict = judge(Rows.of(batch), rules)
    return batch.filter(pa.array(verdict == 0)), _rejected(verdict, rules)


def _rejected(verdict: npt.NDArray[np.uint8], rules: Sequence[Rule]) -> dict[str, int]:
    counts = np.bincount(verdict, minlength=len(rules) + 1)
    return {rule.name: int(count) for rule, count in zip(rules, counts[1:], strict=True)}


def filter_stages(settings: FilterSettings, source: Path, folder: Path) -> list[Stage]:
    """The filter, and before it the search for its percentiles where it has any.

    Args:
        settings: The thresholds.
        source: Folder of the metadata stage.
        folder: Folder of the filtered files.
    """
    columns = tuple(sorted(settings.percentile_columns().values()))
    if not columns:
        return [FilterStage(settings, source, folder)]
    percentiles = folder.with_name(f"{folder.name}-percentiles")
    return [PercentilesStage(columns, source, percentiles), FilterStage(settings, source, folder, percentiles)]


@dataclass(frozen=True)
class FilterStage:
    """Rows that pass all rules, one output for each table.

    Attributes:
        settings: The thresholds.
        source: Folder of the metadata stage.
        folder: Where the filtered files and funnel.json go; rejected rows go to `<unit>.rejected.parquet`.
        percentiles: Folder of the stage that finds percentiles; None where `settings` has none.
    """

    settings: FilterSettings
    source: Path
    folder: Path
    percentiles: Path | None = None
    name: str = "filter"
    version: str = "2"
    needs: Needs = field(default_factory=lambda: Needs(environment={"POLARS_MAX_THREADS": "1"}))  # a worker is one core

    def config_facts(self) -> dict[str, Any]:
        """Every threshold."""
        return self.settings.facts()

    def units(self) -> list[Unit]:
        """One for each table; the values that percentiles stand for are part of each."""
        units = table_units(self.source)
        if self.percentiles is None:
            return units
        cuts = read_cuts(self.percentiles, self.settings.percentiles, self.settings.percentile_columns())
        return [replace(unit, facts={"cuts": cuts}) for unit in units]

    def worker(self) -> Work:
        """Stream one table through the rules."""

        def work(unit: Unit, folder: Path) -> dict[str, Any]:
            table = read_card(unit.inputs[0])
            rules = rules_for(self.settings, table.columns, table.source, unit.facts.get("cuts"))
            funnel = Funnel.empty([(rule.name, rule.setting) for rule in rules])
            with ExitStack() as stack:
                passed = stack.enter_context(TableWriter(folder / f"{unit.name}.parquet"))
                dropped = TableWriter(folder / f"{unit.name}.rejected.parquet")
                if self.settings.keep_rejected:
                    stack.enter_context(dropped)
                for rows in table.chunks():
                    verdict = judge(rows, rules)
                    passed.add(rows.take(np.flatnonzero(verdict == 0)))
                    if self.settings.keep_rejected:
                        dropped.add(_with_reasons(rows, verdict, rules))
                    funnel = funnel.add(len(rows), _rejected(verdict, rules))
            return funnel.to_json()

        return work

    def report(self, stats: Sequence[Mapping[str, Any]]) -> RichTable:
        """Add the files' funnels up, write funnel.json, show the table."""
        funnel = Funnel.total([Funnel.from_json(row) for row in stats])
        funnel.write(self.folder / "funnel.json")
        return funnel.table()


def _with_reasons(rows: Rows, verdict: npt.NDArray[np.uint8], rules: Sequence[Rule]) -> pa.RecordBatch:
    """The rejected rows, with the name of the first rule that rejects each as `rejected_by`."""
    rejected = np.flatnonzero(verdict)
    names = pa.array([rule.name for rule in rules], pa.string())
    reasons = names.take(pa.array(verdict[rejected].astype(np.int64) - 1))
    return rows.take(rejected).append_column("rejected_by", reasons)
