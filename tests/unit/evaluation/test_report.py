import html.parser
import json
import re

import numpy as np
import pytest
from PIL import Image

from sdtrain.errors import ConfigError, DataError
from sdtrain.evaluation import report as report_module
from sdtrain.evaluation.charts import MAX_POINTS, Chart, Line, Mark, chart_svg, smoothed, thinned
from sdtrain.evaluation.report import (
    format_count,
    format_figure,
    format_seconds,
    format_share,
    read_accuracy,
    read_funnel,
    read_picture,
    read_timings,
    write_report,
)
from sdtrain.evaluation.run_story import loss_names, read_run
from sdtrain.run_dir import Exit, RunDir, append_json_line


def dump(path, value):
    path.write_text(json.dumps(value))
    return path


def start(run: RunDir, attempt: str, step: int, last: int, world_size: int, loss: float = 0.5) -> None:
    """One attempt that logs every 10 steps, as the trainer does."""
    resumed = f"step-{step:08d}" if step else None
    run.log("start", attempt=attempt, step=step, resumed_from=resumed, world_size=world_size)
    append_json_line(run.metrics, {"attempt": attempt, "resumed_step": step})
    for at in range(step + 10, last + 1, 10):
        append_json_line(run.metrics, {"step": at, "attempt": attempt, "train/loss": loss, "train/learning_rate": 1e-3})


@pytest.fixture
def run(tmp_path):
    """A run that was killed at 60, resumed from 40 on one rank, and finished at 100."""
    run = RunDir(tmp_path / "digits <run>")
    run.path.mkdir()
    start(run, "first", 0, 60, 2, loss=0.75)
    start(run, "second", 40, 100, 1, loss=0.25)
    append_json_line(run.metrics, {"step": 100, "attempt": "second", "validation/loss": 0.3})
    run.write_exit(Exit(0, "complete", 100, 0, "second"))
    run.config.write_text("# sdtrain-launch torchrun <x>\nseed: 42\n")
    run.environment.write_text(json.dumps({"git_commit": "abc", "argv": ["a", "b"], "versions": {"torch": "2.13"}}))
    return run


ACCURACY = {
    "n": 10,
    "digit_accuracy": 0.9,
    "colour_accuracy": 1.0,
    "prompt_accuracy": 0.875,
    "judge_accuracy": 0.99,
    "judge_n": 597,
    "seen": {"n": 10, "digit_accuracy": 0.9, "colour_accuracy": 1.0, "prompt_accuracy": 0.875},
    "unseen": {"n": 0, "digit_accuracy": None, "colour_accuracy": None, "prompt_accuracy": None},
    "sampling": {"guidance_scale": 3.0, "sampler": "ddim"},
}
FUNNEL = {
    "rows_in": 21000,
    "rules": [
        {"rule": "min_aesthetic", "setting": ">= 6.5 (v1)", "rejected": 5200, "left": 15800},
        {"rule": "<script>alert(1)</script>", "setting": "", "rejected": 800, "left": 15000},
    ],
    "rows_out": 15000,
}


@pytest.fixture
def page(tmp_path, run):
    """The whole report, with every section."""
    Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(tmp_path / "grid.png")
    output = write_report(
        tmp_path / "out" / "report.html",
        title="Digits & <b>more</b>",
        funnel_json=dump(tmp_path / "funnel.json", FUNNEL),
        download_summary=dump(tmp_path / "download.json", {"success": 12345, "nested": {"not": "shown"}}),
        runs=[run.path],
        grids=[tmp_path / "grid.png"],
        prompt_accuracy=[dump(tmp_path / "accuracy.json", ACCURACY)],
        timings_json=dump(tmp_path / "timings.json", {"download": 61.0, "train": 125.0}),
    )
    return output.read_text(encoding="utf-8")


class Structure(html.parser.HTMLParser):
    """Collects what a browser would load, run or confuse."""

    void = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.void:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()


def parse(page: str) -> Structure:
    structure = Structure()
    structure.feed(page)
    structure.close()
    return structure


# --- the page ---------------------------------------------------------------------------------------------------


def test_the_page_is_well_formed_and_loads_nothing(page):
    structure = parse(page)
    assert structure.open == []
    assert len(structure.ids) == len(set(structure.ids))
    assert not {"script", "iframe", "object", "embed", "base"} & {tag for tag, _ in structure.tags}
    for tag, attributes in structure.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action", "poster"):
            value = attributes.get(name) or ""
            assert value == "" or value.startswith(("data:", "#")), (tag, name, value[:80])
        assert not any(name.startswith("on") for name in attributes)
    assert "default-src 'none'" in page
    assert not re.search(r"url\((?!#)", page) and "@import" not in page


def test_what_others_wrote_is_escaped(page):
    assert "<script>" not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "Digits &amp; &lt;b&gt;more&lt;/b&gt;" in page
    assert "digits &lt;run&gt;" in page and "<run>" not in page


def test_tables_and_pictures_are_named_for_those_who_do_not_see_them(page):
    structure = parse(page)
    assert page.count("<table") == page.count("<caption>") >= 6
    assert all(
        attributes.get("scope") or attributes.get("aria-hidden") for tag, attributes in structure.tags if tag == "th"
    )
    assert all(attributes.get("alt") for tag, attributes in structure.tags if tag == "img")
    charts = [attributes for tag, attributes in structure.tags if tag == "svg"]
    assert charts and all(chart["role"] == "img" and chart["aria-label"] for chart in charts)
    assert dict(structure.tags)["html"] == {"lang": "en"}


def test_the_key_figures(page):
    tiles = re.findall(r"<li><strong>(.*?)</strong><span>(.*?)</span>(?:<small>(.*?)</small>)?</li>", page)
    assert tiles == [
        ("71.4 %", "survived the filter", "of 21,000 rows"),
        ("0.25", "loss, digits &lt;run&gt;", "after 100 steps, 1 restart"),
        ("87.5 %", "show digit and colours of their prompt", "of 10 samples, guidance 3"),
        ("3 min 06 s", "from start to end", "2 steps"),
    ]


def test_the_tables_hold_the_figures(page):
    for cell in (
        "5,200",
        "15,800",
        "&gt;= 6.5 (v1)",
        "12,345",
        "1 min 01 s",
        "2 min 05 s",
        "90.0 %",
        "87.5 %",
        "99.0 %",
    ):
        assert f">{cell}<" in page or f" {cell} " in page, cell
    assert "nested" not in page
    assert "# sdtrain-launch torchrun &lt;x&gt;" in page
    assert "<td>2.13</td>" in page and "<td>a b</td>" in page


def test_both_themes_colour_the_charts(page):
    chart = page[page.index("<svg") : page.index("</svg>")]
    assert "var(--series-1)" in chart and "var(--ink)" in chart
    assert not re.findall(r"#[0-9a-fA-F]{6}", chart)
    assert page.count("--series-1:") == 2 and "prefers-color-scheme: dark" in page


def test_a_report_of_nothing_is_a_page(tmp_path):
    page = write_report(tmp_path / "report.html").read_text()
    assert parse(page).open == [] and "<h2>" not in page


def test_the_best_accuracy_is_the_key_figure(tmp_path):
    files = [
        dump(tmp_path / f"{share}.json", ACCURACY | {"prompt_accuracy": share, "sampling": {"guidance_scale": scale}})
        for share, scale in ((0.5, 1.0), (0.75, 2.0), (0.625, 3.0))
    ]
    page = write_report(tmp_path / "report.html", prompt_accuracy=files).read_text()
    assert "<strong>75.0 %</strong>" in page and "guidance 2</small>" in page


# --- the story of a run -----------------------------------------------------------------------------------------


def test_attempts_and_losses(run):
    story = read_run(run.path, "chart")
    first, second = story.attempts
    assert (first.start_step, first.last_step, first.world_size, first.resumed_from) == (0, 60, 2, None)
    assert first.end == "killed or stopped; the next start resumed"
    assert (second.start_step, second.last_step, second.resumed_from) == (40, 100, "step-00000040")
    assert second.end == "done: complete"
    assert (story.last_step, story.final_loss, story.num_restarts) == (100, 0.25, 1)
    assert story.figures == {"train/learning_rate": 1e-3, "train/loss": 0.25, "validation/loss": 0.3}


def test_the_chart_marks_the_restart_and_what_was_lost(run):
    chart = read_run(run.path, "chart").charts["Loss"]
    for words in ("resumed at 40, 1 rank<", "lost to a kill, trained again", "validation", "training, smoothed"):
        assert words in chart
    assert "resumed at 0" not in chart


def test_a_run_without_kills_shows_none(tmp_path):
    run = RunDir(tmp_path)
    start(run, "only", 0, 50, 2)
    story = read_run(tmp_path, "chart")
    assert "lost to a kill" not in story.charts["Loss"] and "resumed" not in story.charts["Loss"]
    assert story.attempts[0].end == "running, or killed"
    assert (story.config, story.environment) == ("", {})


def test_a_run_that_logged_nothing_yet(tmp_path):
    append_json_line(RunDir(tmp_path).metrics, {"attempt": "a", "resumed_step": 0})
    story = read_run(tmp_path, "chart")
    assert (story.charts, story.final_loss, story.last_step) == ({}, None, 0)


def test_every_trainable_has_a_chart():
    rows = [
        {"train/discriminator/loss": 1, "train/autoencoder/loss": 2, "train/gradient_norm": 3, "validation/loss": 4}
    ]
    assert loss_names(rows) == ["train/autoencoder/loss", "train/discriminator/loss"]


def test_a_folder_without_metrics_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no metrics.jsonl; give the folder of a run that was started"):
        read_run(tmp_path, "chart")


# --- charts -----------------------------------------------------------------------------------------------------


def test_charts_are_the_same_every_time_and_named():
    chart = Chart('a "b" <c>', "x", "y", [Line("line", [1, 2], [3, 4])], [Mark(1, "m")])
    assert chart_svg(chart, "one") == chart_svg(chart, "one")
    assert 'aria-label="a &quot;b&quot; &lt;c&gt;"' in chart_svg(chart, "one")
    ids = re.findall(r'id="([^"]*)"', chart_svg(chart, "one"))
    assert ids and all(name.startswith("one-") for name in ids)


def test_thinning_keeps_every_stretch():
    x, y = thinned(range(10 * MAX_POINTS), [1.0] * (10 * MAX_POINTS))
    assert len(x) == len(y) == MAX_POINTS
    assert x[0] == 4.5 and x[-1] == 10 * MAX_POINTS - 5.5 and set(y) == {1.0}
    assert thinned([1, 2], [3, 4]) == ([1, 2], [3, 4])


def test_smoothing_is_centred():
    assert smoothed([1.0, 2.0, 3.0, 4.0, 5.0], 2) == [1.0, 2.0, 3.0, 4.0, 5.0]  # a straight line stays
    assert smoothed([0.0, 0.0, 9.0, 0.0, 0.0], 1) == [0.0, 3.0, 3.0, 3.0, 0.0]
    assert smoothed([3.0, 1.0], 0) == [3.0, 1.0] and smoothed([], 3) == []


# --- sources ----------------------------------------------------------------------------------------------------


def test_missing_and_damaged_sources_are_named(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    for path, error, message in (
        (tmp_path / "none.json", ConfigError, "none.json: no such file; leave the option out"),
        (tmp_path / "broken.json", DataError, "broken.json: not JSON"),
        (dump(tmp_path / "list.json", [1]), DataError, "list.json: holds a list, needed is an object"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            write_report(tmp_path / "report.html", timings_json=path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("funnel", "message"),
    [
        ({"rows_in": 3}, r"not a survival funnel of the filter \(KeyError: 'rows_out'\)"),
        (FUNNEL | {"rows_out": 14000}, "21000 rows in less 6000 rejected are not rows_out, 14000"),
    ],
)
def test_a_funnel_that_does_not_add_up_is_refused(tmp_path, funnel, message):
    with pytest.raises(DataError, match=message):
        read_funnel(dump(tmp_path / "funnel.json", funnel))


def test_timings_are_numbers(tmp_path):
    with pytest.raises(DataError, match="needed is a number of seconds per step"):
        read_timings(dump(tmp_path / "timings.json", {"train": "long"}))


def test_an_accuracy_without_its_judge_is_refused(tmp_path):
    without = {name: value for name, value in ACCURACY.items() if name != "judge_accuracy"}
    with pytest.raises(DataError, match="not a result of prompt accuracy; 'judge_accuracy' is missing"):
        read_accuracy(dump(tmp_path / "accuracy.json", without))


def test_pictures_that_a_page_cannot_hold_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"grid.tif: found the type '.tif', allowed are .png"):
        read_picture(tmp_path / "grid.tif")
    with pytest.raises(ConfigError, match=r"grid.png: no such image"):
        read_picture(tmp_path / "grid.png")
    (tmp_path / "grid.png").write_bytes(b"12345")
    monkeypatch.setattr(report_module, "MAX_IMAGE_BYTES", 4)
    with pytest.raises(ConfigError, match=r"grid.png: 5 bytes, allowed in one page are 4"):
        read_picture(tmp_path / "grid.png")


def test_words_for_figures():
    assert [format_count(n) for n in (0, 12345, 635_561, 12_340_000)] == ["0", "12,345", "635,561", "12.3 M"]
    assert [format_share(share) for share in (0.9349, 1, None)] == ["93.5 %", "100.0 %", "\u2013"]
    assert [format_seconds(s) for s in (4.23, 59.9, 185, 7620)] == ["4.2 s", "59.9 s", "3 min 05 s", "2 h 07 min"]
    assert [format_figure(value) for value in (0.123456, None)] == ["0.1235", "\u2013"]
