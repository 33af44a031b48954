"""The forecast of a data set before a single picture is fetched: the funnel, bytes and hours.

The funnel follows from a sample of URLs (`data_pipeline.stages.sample`) by the rules, thresholds and identities of the
run itself. Every count is a ratio estimate: what the sample says of its rows, times the rows that have a URL, which are
counted, not sampled. Its error is found from sixteen groups of URLs that are samples of their own (random groups:
Wolter, Introduction to Variance Estimation, 2007, chapter 2).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from rich.table import Table as RichTable

from data_pipeline.build import filter_settings
from data_pipeline.costs import Rows, StageCost, costs_of
from data_pipeline.plan_pictures import PictureTally
from data_pipeline.sources.laion import Columns, Table
from data_pipeline.sources.rows import Rows as TableRows
from data_pipeline.stage import Stage, numbered_files
from data_pipeline.stages.adopt import ShardTablesStage
from data_pipeline.stages.filter import FilterSettings, Rule, failures, judge, rules_for
from data_pipeline.stages.identity import ExcludedUrls, TextIdentity, Words, mixed, read_excluded_urls
from data_pipeline.stages.metadata import MetadataStage, read_card
from data_pipeline.stages.percentiles import value_at_percentile
from data_pipeline.stages.sample import SampleStage
from sdtrain.config.ingestion import DigitsSource, IngestionConfig, LaionSource, ShardsSource
from sdtrain.errors import ConfigError, DataError
from sdtrain.run_dir import write_atomically

pc: Any = pyarrow.compute  # its functions are generated at import, so a type checker sees none of them

GROUPS = 16
_CONFIDENCE = 2.13  # 95 % of Student's t with 15 degrees of freedom
_MAX_SHOWN = 5
_KEYS = {
    "aesthetic": "min_aesthetic",
    "similarity": "min_similarity",
    "size": "min_width and min_height",
    "pwatermark": "max_pwatermark",
    "nsfw": "nsfw.max_punsafe",
}
"""Rules that least and greatest values can decide, and the keys behind them."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the forecast funnel.

    Attributes:
        rule: A rule, `excluded` or `duplicates`.
        setting: Its setting in words.
        rejected: Rows that it is the first to reject.
        left: Rows after it.
        margin: Half of the 95 % interval of `left`.
    """

    rule: str
    setting: str
    rejected: int
    left: int
    margin: int


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run would do.

    Attributes:
        rows_in: Rows of all tables: counted.
        sampled: Rows that the forecast rests on.
        funnel: Its lines.
        images: Pictures after link rot.
        costs: Bytes and hours of each stage.
        assumptions: What the costs rest on.
        warnings: Settings that deserve a second look.
    """

    rows_in: int
    sampled: int
    funnel: tuple[Line, ...]
    images: int
    costs: tuple[StageCost, ...]
    assumptions: tuple[str, ...]
    warnings: tuple[str, ...]


def plan_stages(config: IngestionConfig) -> list[Stage]:
    """The stages that a forecast needs: taking stock, as the run does and for it too, and the sample.

    Raises:
        ConfigError: The source has no metadata to look at.
    """
    metadata = config.output / "01-metadata"
    match config.source:
        case LaionSource():
            stock: Stage = MetadataStage(config.source.metadata, config.source.columns, metadata)
        case ShardsSource():
            _refuse_to_copy(config.source, metadata)
            stock = ShardTablesStage(config.source.shards, config.download.max_bytes, metadata)
        case DigitsSource():
            raise ConfigError("source.type: digits has no metadata to plan from; plan needs laion or shards")
    return [stock, SampleStage(config.plan.sample, config.plan.min_sample_rows, metadata, _folder(config))]


def _refuse_to_copy(source: ShardsSource, metadata: Path) -> None:
    """A forecast fetches no picture; to look into shards elsewhere is to copy them here.

    Raises:
        ConfigError: The shards are elsewhere, and the run has not copied them yet.
    """
    if "://" in source.shards and not (metadata / "ledger.jsonl").exists():
        raise ConfigError(
            f"source.shards: {source.shards}: plan looks into the shards, which would copy all of them here; plan from "
            "a few of them on this machine, or let the stage copy them first: sdtrain-data run CONFIG metadata"
        )


def forecast(config: IngestionConfig) -> Forecast:
    """The forecast from the sample that `plan_stages` left; also written to `00-plan/forecast.json`.

    Raises:
        DataError: Columns that the rules need are absent, or the sample is empty.
    """
    samples = _samples(config)
    settings = filter_settings(config.filter)
    cuts = _cuts(samples, settings)
    rules = _all_rules(samples, settings, cuts)
    is_adopted = isinstance(config.source, ShardsSource)
    tally = _Tally(rules[0], PictureTally(config.download, is_adopted=is_adopted))
    identify = TextIdentity(config.dedup.by, config.dedup.exclude)
    listed = read_excluded_urls(config.dedup.exclude)
    for sample, bound in zip(samples, rules, strict=True):
        for batch in sample.table.batches() if sample.table.rows else ():
            tally.add(batch, bound, identify, listed)
    if not tally.rows:
        raise DataError(f"{_folder(config)}: no row was sampled; raise plan.sample or plan.min_sample_rows")
    rows_in, without_url = sum(sample.rows for sample in samples), sum(sample.without_url for sample in samples)
    funnel = tally.funnel(rows_in, without_url, _settings_in_words(rules))
    rows = Rows(rows_in, next(line.left for line in funnel if line.rule == rules[0][-1].name), funnel[-1].left)
    tar_bytes = sum(sample.source_bytes for sample in samples) if is_adopted else 0
    cost = costs_of(config, rows, sum(sample.table_bytes for sample in samples), tally.pictures.means(), tar_bytes)
    result = Forecast(
        rows_in=rows_in,
        sampled=tally.rows,
        funnel=funnel,
        images=cost.images,
        costs=cost.stages,
        assumptions=cost.assumptions,
        warnings=(*_idle_rules(samples, rules, tally), *_too_few(config, tally, funnel)),
    )
    write_atomically(_folder(config) / "forecast.json", to_json(result))
    return result


def to_json(forecast: Forecast) -> str:
    """The forecast as JSON text."""
    return json.dumps(asdict(forecast), indent=2) + "\n"


def _folder(config: IngestionConfig) -> Path:
    return config.output / "00-plan"


@dataclass(frozen=True, slots=True)
class _Sample:
    """The sampled rows of one table, and what was counted over all its rows.

    Attributes:
        table: The rows.
        rows: Of the whole table.
        table_bytes: Of the whole table.
        source_bytes: Of what it was made from: the table itself, or a shard.
        without_url: Rows that have none.
        ranges: Least and greatest values by column.
    """

    table: Table
    rows: int
    table_bytes: int
    source_bytes: int
    without_url: int
    ranges: Mapping[str, Mapping[str, Any]]


def _samples(config: IngestionConfig) -> list[_Sample]:
    """What the sample stage left, table by table."""
    found = []
    for path in numbered_files(_folder(config), ".parquet"):
        stats = json.loads(path.with_suffix(".stats.json").read_text(encoding="utf-8"))
        card = config.output / "01-metadata" / f"{path.stem}.json"
        original, schema = read_card(card), pq.read_schema(path)
        columns = Columns({name: name for name in schema.names}, original.columns.present)
        table = Table(path, original.source, stats["sampled"], columns)
        sizes = original.path.stat().st_size, json.loads(card.read_text(encoding="utf-8"))["bytes"]
        found.append(_Sample(table, stats["rows"], *sizes, stats["without_url"], stats["ranges"]))
    return found


def _cuts(samples: Sequence[_Sample], settings: FilterSettings) -> dict[str, float]:
    """Column -> its value at the percentile that is set for it, as the sample has it."""
    cuts = {}
    for family, column in settings.percentile_columns().items():
        parts = []
        for sample in samples:
            if column in sample.table.columns.chosen:
                values = pq.read_table(sample.table.path, columns=[column])[column].drop_null()
                found = values.to_numpy()
                parts.append(np.sort(found[np.isfinite(found)]))
        cuts[column] = value_at_percentile(parts, settings.percentiles[family], column)
    return cuts


def _all_rules(samples: Sequence[_Sample], settings: FilterSettings, cuts: Mapping[str, float]) -> list[list[Rule]]:
    """The rules of each table.

    Raises:
        DataError: Tables lack columns that rules need; all such tables are told at once.
    """
    rules, problems = [], []
    for sample in samples:
        try:
            rules.append(rules_for(settings, sample.table.columns, sample.table.source, cuts))
        except DataError as error:
            problems.append(str(error))
    if problems:
        more = f"\n  and {len(problems) - _MAX_SHOWN} more" if len(problems) > _MAX_SHOWN else ""
        lines = "".join(f"\n  {problem}" for problem in problems[:_MAX_SHOWN])
        raise DataError(f"{len(problems)} of {len(samples)} tables do not fit the filter:{lines}{more}")
    return rules


def _settings_in_words(rules: Sequence[Sequence[Rule]]) -> dict[str, str]:
    """Rule -> its setting; tables of different schemas may word the same rule differently."""
    words: dict[str, dict[str, None]] = {}
    for rule in (rule for bound in rules for rule in bound):
        words.setdefault(rule.name, {})[rule.setting] = None
    return {name: " | ".join(settings) for name, settings in words.items()}


class _Tally:
    """Counts over the sample, for each group of URLs apart.

    Args:
        rules: The rules in their order.
        pictures: Takes the rows that pass.
    """

    def __init__(self, rules: Sequence[Rule], pictures: PictureTally):
        self.pictures = pictures
        self._names = [rule.name for rule in rules]
        self._verdicts = np.zeros((GROUPS, len(rules) + 1), np.int64)
        self._excluded = np.zeros(GROUPS, np.int64)
        self._kept: list[Words] = []
        self._failed = np.zeros(len(rules), np.int64)

    @property
    def rows(self) -> int:
        """Rows of the sample."""
        return int(self._verdicts.sum())

    def add(self, batch: pa.RecordBatch, rules: Sequence[Rule], identify: TextIdentity, listed: ExcludedUrls) -> None:
        """Judge some rows and identify those that pass."""
        verdict = judge(TableRows.of(batch), rules)
        self._failed += [int(failed.sum()) for failed in failures(batch, rules)]
        everyone = TextIdentity("url").of_batch(batch, read_excluded_urls(()))
        group = (everyone.place >> np.uint64(60)).astype(np.int64)
        np.add.at(self._verdicts, (group, verdict), 1)
        passed = batch.filter(pa.array(verdict == 0))
        kept = identify.of_batch(passed, listed)
        passed_group = group[verdict == 0]
        self._excluded += np.bincount(passed_group, minlength=GROUPS) - np.bincount(
            passed_group[kept.row], minlength=GROUPS
        )
        # 60 bits of the identity under 4 of the group, which follows from the URL: equal rows stay equal
        bits = mixed(kept.high ^ mixed(kept.low)) >> np.uint64(4)
        self._kept.append(bits | (passed_group[kept.row].astype(np.uint64) << np.uint64(60)))
        self.pictures.add(passed)

    def never_failed(self) -> set[str]:
        """Rules that no sampled row fails."""
        return {name for name, count in zip(self._names, self._failed, strict=True) if not count}

    def funnel(self, rows_in: int, without_url: int, settings: Mapping[str, str]) -> tuple[Line, ...]:
        """Scale the sample up to all rows.

        Args:
            rows_in: Rows of all tables.
            without_url: Rows among them that have no URL; they were not sampled.
            settings: Rule -> its setting in words.
        """
        sampled = self._verdicts.sum(axis=1)
        unique = np.bincount(
            (np.unique(np.concatenate(self._kept)) >> np.uint64(60)).astype(np.int64), minlength=GROUPS
        )
        steps = [(name, settings[name], self._verdicts[:, place]) for place, name in enumerate(self._names, 1)]
        passed = self._verdicts[:, 0]
        if self._excluded.any():
            steps.append(("excluded", "dedup.exclude", self._excluded))
        steps.append(("duplicates", "dedup", passed - self._excluded - unique))
        left, before, lines = sampled, rows_in, []
        for name, setting, rejected in steps:
            left = left - rejected
            count, margin = _scaled(left, sampled, rows_in - without_url)
            lines.append(Line(name, setting, before - count, count, margin))
            before = count
        return tuple(lines)


def _scaled(part: npt.NDArray[np.int64], whole: npt.NDArray[np.int64], rows: int) -> tuple[int, int]:
    """Rows of all that `part` stands for, and half of the 95 % interval.

    Args:
        part: Rows of each group that are counted.
        whole: Rows of each group.
        rows: Rows of all tables that groups were sampled from.
    """
    count = int(whole.sum())
    share = int(part.sum()) / count
    residuals = part - share * whole
    error = math.sqrt(GROUPS / (GROUPS - 1) * float(residuals @ residuals)) / count
    error *= math.sqrt(max(1 - count / rows, 0))  # a sample of all rows has none
    return round(share * rows), round(_CONFIDENCE * error * rows)


def _idle_rules(samples: Sequence[_Sample], rules: Sequence[Sequence[Rule]], tally: _Tally) -> Iterator[str]:
    """Rules that reject nothing in these tables: proven by least and greatest values, or seen in the sample."""
    proven = set.intersection(*(_cannot_reject(sample, bound) for sample, bound in zip(samples, rules, strict=True)))
    settings = _settings_in_words(rules)
    for rule in rules[0]:
        if rule.name in proven:
            absent = 0 if rule.nulls == "keep" else sum(_absent(sample, rule) for sample in samples)
            but = f" but the {absent:,} rows without a value" if absent else ""
            yield (
                f"filter.{_KEYS[rule.name]}: {rule.name} {settings[rule.name]} cannot reject anything in these "
                f"tables{but}: {_ranges_in_words(samples, rule)}; were they cut before?"
            )
        elif rule.name in tally.never_failed() and rule.name != "url":
            yield f"filter: {rule.name} {settings[rule.name]} rejects none of the {tally.rows:,} sampled rows"


def _cannot_reject(sample: _Sample, rules: Sequence[Rule]) -> set[str]:
    """Rules that both a row of all least and a row of all greatest values pass."""
    schema = pq.read_schema(sample.table.path)
    known = {name: seen for name, seen in sample.ranges.items() if seen["least"] is not None}
    ends = [pa.array([seen["least"], seen["greatest"]], schema.field(name).type) for name, seen in known.items()]
    extremes = pa.record_batch(ends, names=list(known))
    decided = (rule for rule in rules if rule.name in _KEYS and set(rule.columns) <= known.keys())
    return {rule.name for rule in decided if pc.all(rule.passes(extremes)).as_py()}


def _absent(sample: _Sample, rule: Rule) -> int:
    """Rows without a value for a rule (of several columns the one that lacks most)."""
    return max(sample.ranges[name]["absent"] for name in rule.columns)


def _ranges_in_words(samples: Sequence[_Sample], rule: Rule) -> str:
    words = []
    for name in rule.columns:
        least = min(sample.ranges[name]["least"] for sample in samples)
        greatest = max(sample.ranges[name]["greatest"] for sample in samples)
        words.append(f"{name} is {least:g} to {greatest:g}")
    return ", ".join(words)


def _too_few(config: IngestionConfig, tally: _Tally, funnel: Sequence[Line]) -> Iterator[str]:
    """What the forecast cannot promise, and what the run would refuse."""
    last = funnel[-1]
    if last.left == 0:
        yield f"no sampled row of {tally.rows:,} is left: loosen the rule that rejects most"
        return
    if last.margin > 0.05 * last.left:
        yield (
            f"the number of rows left is known to {100 * last.margin / last.left:.0f} % only: set plan.sample or "
            "plan.min_sample_rows higher"
        )
    held_out = config.validation.num_samples
    if last.left + last.margin <= held_out:
        yield f"validation.num_samples = {held_out:,} takes all {last.left:,} rows: nothing would remain to train on"


def tables_of(forecast: Forecast) -> Iterator[RichTable]:
    """Funnel and costs, for the terminal."""
    yield _funnel_table(forecast)
    table = RichTable(title=f"about {forecast.images:,} pictures")
    table.add_column("stage")
    for header in ("from the network", "on disk", "hours"):
        table.add_column(header, justify="right")
    for cost in forecast.costs:
        hours = cost.note if cost.hours is None else f"{cost.hours:.2g}"
        table.add_row(cost.stage, _size(cost.reads), _size(cost.writes), hours)
    yield table


def _size(count: int) -> str:
    """Bytes in words."""
    if not count:
        return ""
    power = min(int(math.log10(count)) // 3, 4)
    return f"{count / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def _funnel_table(forecast: Forecast) -> RichTable:
    table = RichTable(title=f"forecast of the survival funnel, from {forecast.sampled:,} sampled rows")
    for header in ("rule", "setting"):
        table.add_column(header)
    for header in ("rejected", "left", "± (95 %)", "% of all"):
        table.add_column(header, justify="right")
    table.add_row("rows in", "", "", f"{forecast.rows_in:,}", "", "100.0")
    for line in forecast.funnel:
        share = f"{100 * line.left / max(forecast.rows_in, 1):.1f}"
        table.add_row(line.rule, line.setting, f"{line.rejected:,}", f"{line.left:,}", f"{line.margin:,}", share)
    return table
