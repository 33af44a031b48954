"""The data card for people: Markdown that is made of the card's JSON and of nothing else.

Texts in it come from the web (captions, URLs) or from people: they are shown as they are, and never become markup.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sdtrain.data.captions import clean_caption

_SPECIAL = re.compile(r"([\\`*_{}\[\]()#!|~])")
_LIST_MARK = re.compile(r"^(\d*)([-+.])(?=\s|$)")
_BAR = 24
_EIGHTHS = " ▏▎▍▌▋▊▉"
_SHOWN = 25
_OPTED_OUT = ("refused:robots_tag",)
_BLOCKED = ("refused:blocked_url", "refused:blocked_bytes")
_STORED = "success"

Row = Sequence[str]


def to_markdown(card: Mapping[str, Any]) -> str:
    """The whole card; sections of which nothing is known are left out."""
    sections = (
        _summary(card),
        _terms(card),
        _sources(card["sources"]),
        *(_funnel(stage) for stage in card["stages"] if "funnel" in stage["summaries"]),
        *(_figures(stage) for stage in card["stages"] if "duplicates" in stage["summaries"]),
        *(_outcomes(stage) for stage in card["stages"] if "reasons" in stage["summaries"].get("summary", {})),
        _splits(card),
        _buckets(card["manifests"]),
        _made_with(card["manifests"]),
        _takedowns(card),
        _examples(card["examples"]),
        _stages(card["stages"]),
        _failures(card["failures"]),
        _table("Software", ("package", "version"), [(name, found) for name, found in sorted(card["versions"].items())]),
        _page(card["page"]),
    )
    return "\n\n".join(section for section in sections if section) + "\n"


def shown(text: object) -> str:
    """A text that Markdown and HTML show as it is: no markup, no link, no line break, nothing invisible."""
    escaped = html.escape(clean_caption(str(text)), quote=False)
    escaped = _LIST_MARK.sub(r"\1\\\2", _SPECIAL.sub(r"\\\1", escaped))
    return escaped.replace("://", "&#58;//").replace("www.", "www&#46;").replace("@", "&#64;")  # no link by itself


def _summary(card: Mapping[str, Any]) -> str:
    manifest = card["manifests"]["manifest.json"]
    splits = ", ".join(f"{facts['samples']:,} {shown(name)}" for name, facts in manifest["splits"].items())
    size = sum(facts["bytes"] for facts in manifest["splits"].values())
    shards = sum(facts["shards"] for facts in manifest["splits"].values())
    lines = [
        f"# {shown(card['name'])}",
        f"Captioned pictures for text-to-image training: {splits} samples in {shards:,} shards, {_bytes(size)}. Each "
        f"sample holds {', '.join(shown(name) for name in manifest['fields'])}.",
        "Made by `sdtrain-data`, which wrote this card from what its stages left; `data_card.json` says the same to "
        f"machines. The data set is named by its manifest's sha256: `{manifest['sha256']}`.",
    ]
    return "\n\n".join(lines)


def _terms(card: Mapping[str, Any]) -> str:
    license = card["license"]
    contact = card["contact"]
    lines = [
        f"**License and terms.** {shown(license)}"
        if license
        else "No license is stated (`card.license`); pictures and captions belong to their owners.",
        f"**To have a picture taken down,** write to {shown(contact)}."
        if contact
        else "No contact for take-downs is stated (`card.contact`).",
        *([shown(card["notes"])] if card["notes"] else []),
    ]
    return "\n\n".join(["## Terms", *lines])


def _sources(sources: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            shown(one["source"]),
            _count(one["rows"]),
            _bytes(one["bytes"]),
            shown(", ".join(f"{ours} = {theirs}" for ours, theirs in (one["columns"] or {}).items()) or "-"),
            f"`{one['sha256'][:16]}`" if one["sha256"] else "-",
        )
        for one in sources
    ]
    total = sum(one["rows"] or 0 for one in sources)
    title = f"Sources: {total:,} rows in {len(sources):,} files"
    return _table(title, ("source", "rows", "size", "columns (ours = theirs)", "sha256"), rows)


def _funnel(stage: Mapping[str, Any]) -> str:
    """Rows in, rejected per rule, rows out, with the share that is left as a bar."""
    funnel = stage["summaries"]["funnel"]
    every = max(funnel["rows_in"], 1)
    rows = [("rows in", "", "", f"{funnel['rows_in']:,}", _bar(1.0))]
    rows += [
        (
            shown(one["rule"]),
            shown(one["setting"]),
            f"{one['rejected']:,}",
            f"{one['left']:,}",
            _bar(one["left"] / every),
        )
        for one in funnel["rules"]
    ]
    text = _table(f"Funnel of {shown(stage['name'])}", ("rule", "setting", "rejected", "left", "share left"), rows)
    return f"{text}\n\n{funnel['rows_out']:,} of {funnel['rows_in']:,} rows passed every rule."


def _figures(stage: Mapping[str, Any]) -> str:
    """Counts of duplicates, as the stage names them."""
    found = stage["summaries"]["duplicates"]
    rows = [(shown(name.replace("_", " ")), _count(value)) for name, value in found.items() if type(value) is int]
    return _table(f"Duplicates, by {shown(stage['name'])}", ("rows", "number"), rows)


def _outcomes(stage: Mapping[str, Any]) -> str:
    """What became of every address; opt-outs and block lists are named apart, since they are wishes and no failures."""
    found = stage["summaries"]["summary"]
    reasons: Mapping[str, int] = found["reasons"]
    every = max(sum(reasons.values()), 1)
    ordered = sorted(reasons.items(), key=lambda item: (item[0] != _STORED, -item[1], item[0]))
    rows = [(shown(_word(name)), f"{count:,}", f"{count / every:.1%}", _bar(count / every)) for name, count in ordered]
    text = _table(f"Pictures, by {shown(stage['name'])}", ("outcome", "number", "share", ""), rows)
    opted, blocked = (sum(reasons.get(name, 0) for name in names) for names in (_OPTED_OUT, _BLOCKED))
    return (
        f"{text}\n\n{opted:,} owners had opted out by `X-Robots-Tag` and {blocked:,} pictures were on a block list; "
        f"none of them was stored."
    )


def _word(reason: str) -> str:
    if reason == _STORED:
        return "stored"
    return f"{reason} (opted out)" if reason in _OPTED_OUT else reason


def _splits(card: Mapping[str, Any]) -> str:
    rows = [
        (
            f"`{name}`",
            shown(split),
            f"{facts['samples']:,}",
            f"{facts['shards']:,}",
            _bytes(facts["bytes"]),
            f"`{found['sha256'][:16]}`",
        )
        for name, found in card["manifests"].items()
        if found is not None
        for split, facts in found["splits"].items()
    ]
    text = _table("Splits and manifests", ("manifest", "split", "samples", "shards", "size", "sha256"), rows)
    asked = card["validation"]
    return (
        f"{text}\n\nValidation was asked to hold {asked['num_samples']:,} samples (seed {asked['seed']}), chosen "
        "before any picture was fetched, so that it may hold fewer; none of them is trained on."
    )


def _buckets(manifests: Mapping[str, Any]) -> str:
    """A histogram of sizes, where samples have several."""
    buckets: Mapping[str, int] = (manifests.get("manifest.json") or {}).get("buckets", {})
    if not buckets:
        return ""
    most, every = max(buckets.values()), sum(buckets.values())
    rows = [(shown(name), f"{count:,}", f"{count / every:.1%}", _bar(count / most)) for name, count in buckets.items()]
    return _table("Sizes", ("bucket", "samples", "share", ""), rows)


def _made_with(manifests: Mapping[str, Any]) -> str:
    facts = _flat((manifests["manifest.json"] or {}).get("fingerprint", {}))
    rows = [(f"`{name}`", shown(value)) for name, value in facts.items()]
    text = _table("Made with", ("fact", "value"), rows)
    return text and f"{text}\n\nA training refuses the data where its own tokenizer or autoencoder differs from these."


def _takedowns(card: Mapping[str, Any]) -> str:
    entries = card["takedowns"]
    if not entries:
        return "## Take-downs\n\nNone so far. Samples that are taken down are masked when they are read."
    rows = [
        (
            shown(one["date"]),
            shown(one["reason"]),
            f"{one['requests']:,}",
            shown(", ".join(f"{count:,} in {name}" for name, count in one["samples"].items())),
            f"`{one['list_sha256'][:16]}`",
        )
        for one in entries
    ]
    return _table("Take-downs", ("date", "reason", "requests", "samples masked", "list's sha256"), rows)


def _examples(captions: Sequence[str]) -> str:
    if not captions:
        return ""
    return "\n".join(
        ["## Captions of the first training samples", "", *(f"- {shown(caption)}" for caption in captions)]
    )


def _stages(stages: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            shown(stage["name"]),
            shown(stage["version"]),
            f"{stage['outputs']:,}",
            shown(", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in stage["counts"].items()) or "-"),
        )
        for stage in stages
    ]
    return _table("Stages", ("stage", "version", "outputs", "counted over all outputs"), rows)


def _failures(failures: Sequence[Mapping[str, Any]]) -> str:
    rows = [(shown(one["stage"]), shown(one["unit"]), shown(one["error"])) for one in failures]
    return _table("Outputs that failed", ("stage", "output", "error"), rows)


def _page(page: Mapping[str, Any]) -> str:
    """The settings, as code: nothing in a code block is markup, and three backticks cannot stand in JSON text."""
    text = json.dumps(page, indent=1, sort_keys=True, ensure_ascii=False).replace("`", "\\u0060")
    return f"## Settings\n\n```json\n{text}\n```"


# Parts --------------------------------------------------------------------------------------------------------------


def _table(title: str, headers: Row, rows: Sequence[Row]) -> str:
    """A section with a table; empty without rows, cut after `_SHOWN`."""
    if not rows:
        return ""
    lines = [f"## {title}", "", _line(headers), _line(["---"] * len(headers)), *map(_line, rows[:_SHOWN])]
    if len(rows) > _SHOWN:
        lines += ["", f"{len(rows) - _SHOWN:,} more are in `data_card.json`."]
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _bar(share: float) -> str:
    """A bar of blocks, an eighth of one being the least."""
    eighths = round(min(max(share, 0.0), 1.0) * _BAR * 8)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _bytes(size: int | None) -> str:
    """Bytes in words, in powers of ten."""
    if size is None:
        return "-"
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size} B"


def _flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in sorted(facts.items()):
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
