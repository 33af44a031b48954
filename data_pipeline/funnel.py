"""The survival funnel: rows in, rejected per rule, rows out. Sums exactly, whatever the order of adding."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from sdtrain.run_dir import write_atomically


@dataclass(frozen=True, slots=True)
class FunnelRule:
    """One line: a rule, its setting in words, and the rows that it was the first to reject."""

    name: str
    setting: str
    rejected: int


@dataclass(frozen=True, slots=True)
class Funnel:
    """Counts of one file or of all.

    Attributes:
        rows_in: Rows before the first rule.
        rules: The rules in the order in which they are applied.
    """

    rows_in: int
    rules: tuple[FunnelRule, ...]

    @property
    def rows_out(self) -> int:
        """Rows that passed every rule."""
        return self.rows_in - sum(rule.rejected for rule in self.rules)

    @classmethod
    def empty(cls, rules: Sequence[tuple[str, str]]) -> Funnel:
        """No rows yet.

        Args:
            rules: (name, setting) in the order of application.
        """
        return cls(0, tuple(FunnelRule(name, setting, 0) for name, setting in rules))

    def add(self, rows_in: int, rejected: Mapping[str, int]) -> Funnel:
        """One batch more; `rejected` has one count for each rule."""
        rules = tuple(FunnelRule(rule.name, rule.setting, rule.rejected + rejected[rule.name]) for rule in self.rules)
        return Funnel(self.rows_in + rows_in, rules)

    @classmethod
    def total(cls, funnels: Sequence[Funnel]) -> Funnel:
        """The sum; files of different schemas may word the same rule differently."""
        settings: dict[str, list[str]] = {}
        rejected: dict[str, int] = {}
        for funnel in funnels:
            for rule in funnel.rules:
                known = settings.setdefault(rule.name, [])
                if rule.setting not in known:
                    known.append(rule.setting)
                rejected[rule.name] = rejected.get(rule.name, 0) + rule.rejected
        rules = tuple(FunnelRule(name, " | ".join(words), rejected[name]) for name, words in settings.items())
        return cls(sum(funnel.rows_in for funnel in funnels), rules)

    def to_json(self) -> dict[str, Any]:
        """`rows_in`, `rules` with `rejected` and rows `left` after each, `rows_out`."""
        left, rows = self.rows_in, []
        for rule in self.rules:
            left -= rule.rejected
            rows.append({"rule": rule.name, "setting": rule.setting, "rejected": rule.rejected, "left": left})
        return {"rows_in": self.rows_in, "rules": rows, "rows_out": self.rows_out}

    @classmethod
    def from_json(cls, page: Mapping[str, Any]) -> Funnel:
        """The inverse of `to_json`."""
        rules = tuple(FunnelRule(row["rule"], row["setting"], row["rejected"]) for row in page["rules"])
        return cls(page["rows_in"], rules)

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        write_atomically(path, json.dumps(self.to_json(), indent=2) + "\n")

    def table(self) -> Table:
        """For the terminal."""
        table = Table(title="survival funnel")
        for header in ("rule", "setting"):
            table.add_column(header)
        for header in ("rejected", "left", "% of all"):
            table.add_column(header, justify="right")
        table.add_row("rows in", "", "", f"{self.rows_in:,}", "100.0")
        for row in self.to_json()["rules"]:
            share = 100 * row["left"] / max(self.rows_in, 1)
            table.add_row(row["rule"], row["setting"], f"{row['rejected']:,}", f"{row['left']:,}", f"{share:.1f}")
        return table
