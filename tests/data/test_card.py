"""The data card: what it says, that it says the same again, and that texts from the web stay texts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from data_pipeline import build, cli
from data_pipeline.card import JSON_NAME, MARKDOWN_NAME
from data_pipeline.card_markdown import to_markdown
from data_pipeline.cluster import InlineExecutor
from sdtrain.data.manifest import Manifest

PAGE = """schema_version: 1
kind: ingestion
name: digits
output: {output}
source: {{type: digits, num_images: 40}}
validation: {{num_samples: 10}}
download: {{image_size: 32, samples_per_shard: 20}}
card: {{license: "CC0, see [terms](https://example.org)", contact: someone@example.org, notes: "a <b>test</b>"}}
"""


class Inline(InlineExecutor):
    """In this process, where the command line asks for Ray."""

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    page = folder / "data.yaml"
    page.write_text(PAGE.format(output=folder / "out"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "executor_for", lambda config: Inline())
        assert call("run", page) == 0
    return folder


@pytest.fixture
def page(made: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The page of a data set that a test may change: it is put back afterwards."""
    monkeypatch.setattr(build, "executor_for", lambda config: Inline())
    kept = made.with_name(f"{made.name}-kept")
    shutil.copytree(made, kept)
    yield made / "data.yaml"
    shutil.rmtree(made)
    kept.rename(made)


def read(page: Path) -> tuple[dict[str, Any], str]:
    out = page.parent / "out"
    return json.loads((out / JSON_NAME).read_text()), (out / MARKDOWN_NAME).read_text()


def test_run_writes_a_card_that_names_the_data_and_changes_none_of_it(page: Path) -> None:
    card, text = read(page)
    manifest = Manifest.load(page.parent / "out" / "manifest.json")
    assert card["manifests"]["manifest.json"]["sha256"] == manifest.sha256 and manifest.sha256 in text
    assert card["manifests"]["images.json"]["splits"]["train"]["samples"] == 30
    assert card["validation"] == {"num_samples": 10, "seed": 42}
    assert (
        card["versions"]["ray"] and card["manifests"]["manifest.json"]["fingerprint"]["transform"]["image_size"] == 32
    )
    assert [stage["name"] for stage in card["stages"]] == ["digits", "images", "manifest"]
    assert "30 train, 10 validation samples in 3 shards" in text and "None so far." in text
    assert len(card["examples"]) == 5 and "handwritten" in card["examples"][0]
    assert "runner" not in card["page"]


def test_the_same_data_gives_the_same_card(page: Path, capsys) -> None:
    out = page.parent / "out"
    names = [JSON_NAME, MARKDOWN_NAME, "images.json", "manifest.json"]
    before = [(out / name).read_bytes() for name in names]
    assert call("card", page) == 0
    assert capsys.readouterr().out == f"card: wrote {out / MARKDOWN_NAME}\n"
    assert call("run", page) == 0
    assert [(out / name).read_bytes() for name in names] == before


def test_a_take_down_is_in_the_card_at_once_and_its_caption_is_not(page: Path, tmp_path: Path, capsys) -> None:
    out = page.parent / "out"
    manifest = Manifest.load(out / "manifest.json")
    with manifest.open_shard(manifest.split("train")[0]) as reader:
        gone, caption = reader.keys[0], reader.decode(0, "txt")
    assert caption in read(page)[0]["examples"]
    (tmp_path / "list.txt").write_text(f"{gone}\n")
    assert call("takedown", tmp_path / "list.txt", "--root", out, "--reason", "<i>mail</i> | 7") == 0
    card, text = read(page)
    (row,) = card["takedowns"]
    assert (row["reason"], row["requests"], row["samples"]) == (
        "<i>mail</i> | 7",
        1,
        {"images.json": 1, "manifest.json": 1},
    )
    assert "| &lt;i&gt;mail&lt;/i&gt; \\| 7 | 1 | 1 in images.json, 1 in manifest.json |" in text
    assert caption not in card["examples"] and len(card["examples"]) == 5
    capsys.readouterr()
    assert call("card", page) == 0
    assert read(page) == (card, text)


def test_a_page_that_made_other_data_and_a_missing_data_set_are_refused(page: Path, capsys) -> None:
    before = read(page)
    assert call("card", page, "download.jpeg_quality=50", "source.num_images=41") == 3
    error = capsys.readouterr().err
    assert "is not what this page says (digits: 0 of " in error and "run `sdtrain-data run` with it first" in error
    assert read(page) == before
    (page.parent / "out" / "manifest.json").unlink()
    assert call("card", page) == 3
    assert "holds no manifest.json, so there is no data set to describe" in capsys.readouterr().err


def test_a_damaged_card_is_named_and_the_samples_are_masked_all_the_same(page: Path, tmp_path: Path, capsys) -> None:
    out = page.parent / "out"
    (out / JSON_NAME).write_text('{"version": 2}')
    (tmp_path / "list.txt").write_text("some-key\n")
    assert call("takedown", tmp_path / "list.txt", "--root", out) == 3
    error = capsys.readouterr().err
    assert (
        f"{out / JSON_NAME}: not a data card (ValueError: version 2 found, 1 is read); the samples are masked" in error
    )
    assert Manifest.load(out / "manifest.json").takedown.sha256 is not None


def test_a_card_that_cannot_be_written_is_said_so(page: Path, capsys) -> None:
    out = page.parent / "out"
    (out / MARKDOWN_NAME).unlink()
    (out / MARKDOWN_NAME).mkdir()
    assert call("card", page) == 8
    assert (
        f"{out}: the data card cannot be written: Is a directory; the data set is complete" in capsys.readouterr().err
    )


HOSTILE = (
    "<script>alert(1)</script>",
    "[click](javascript:alert(1)) ![x](http://evil/x.png)",
    "a | b | c\n| --- |\n# heading",
    "`code` *bold* __bold__ ~~gone~~ <https://evil.org>",
    "https://evil.org www.evil.org me@evil.org",
    "- list\n1. one",
    "evil \u202etxt.exe\u202c \x07\u200b end",
    "&lt;b&gt; &amp; \\*not bold\\*",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_from_the_web_stay_texts(text: str, page: Path) -> None:
    """What a Markdown reader with tables, links and raw HTML makes of them is one plain text in its place."""
    card, _ = read(page)
    card |= {"name": text, "license": text, "notes": text, "contact": text, "examples": [text]}
    card["sources"] = [card["sources"][0] | {"source": text, "columns": {"url": text}}]
    card["failures"] = [{"stage": text, "unit": "00000", "error": text}]
    markdown = to_markdown(card)
    assert "://" not in markdown and "www." not in markdown, "GitHub makes links of bare addresses"
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(markdown)
    flat = [inner for token in tokens for inner in (token, *(token.children or ()))]
    kinds = {token.type for token in flat}
    assert not kinds & {"html_block", "html_inline", "link_open", "image", "em_open", "s_open", "ordered_list_open"}
    expected = " ".join(
        text.replace("\u202e", "").replace("\u202c", "").replace("\x07", "").replace("\u200b", "").split()
    )
    headings = [tokens[i + 1].children for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert "".join(child.content for child in headings[0] or ()) == expected
    cells = [tokens[i + 1] for i, token in enumerate(tokens) if token.type == "td_open"]
    assert any("".join(child.content for child in cell.children or ()) == expected for cell in cells)
    assert len([token for token in tokens if token.type == "heading_open" and token.tag == "h1"]) == 1
