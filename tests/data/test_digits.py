"""The digits world: what is in it, what must be filtered out, and a server that only loopback reaches."""

from __future__ import annotations

import io
import json
import socket
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipeline.build import filter_settings
from data_pipeline.cluster import InlineExecutor
from data_pipeline.ledger import sha256_file
from data_pipeline.runner import Runner
from data_pipeline.sources.digits import COLOURS, DIGIT_NAMES, Picture, World, draw, make_world, render, scans, to_jpeg
from data_pipeline.sources.digits_server import DigitsServer, serve
from data_pipeline.stages.dedup import dedup_stages
from data_pipeline.stages.digits import DigitsStage
from data_pipeline.stages.filter import FilterStage
from data_pipeline.stages.metadata import MetadataStage
from sdtrain.config.ingestion import FilterConfig
from sdtrain.data.shard import ShardReader
from sdtrain.errors import ConfigError, DataError
from sdtrain.evaluation.prompt_accuracy import DigitsWorld

ROWS = 4000
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@pytest.fixture(scope="module")
def world_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder, seed=3, rows=ROWS, image_size=64, port=8123)
    return folder


def rows_of(folder: Path) -> list[dict]:
    tables = [pq.read_table(path) for path in sorted((folder / "metadata").glob("*.parquet"))]
    assert len(tables) == 3
    return pa.concat_tables(tables).to_pylist()


def test_the_world_is_a_function_of_its_seed(tmp_path, world_folder):
    for name, seed in (("same", 3), ("other", 4)):
        make_world(tmp_path / name, seed=seed, rows=ROWS, image_size=64, port=8123)
    digest = {path.name: sha256_file(path) for path in world_folder.rglob("*.*")}
    assert digest == {path.name: sha256_file(path) for path in (tmp_path / "same").rglob("*.*")}
    assert digest != {path.name: sha256_file(path) for path in (tmp_path / "other").rglob("*.*")}


def test_held_out_combinations_and_digits_never_occur(world_folder):
    world = World.load(world_folder)
    assert len(world.held_out_combinations) == 28
    assert set(world.judge_train).isdisjoint(world.judge_held_out)
    assert len(world.judge_train) + len(world.judge_held_out) == 1797 and len(world.judge_held_out) == 359
    judge = DigitsWorld.load(world_folder / "world.json")  # what the judge reads is what was written
    assert judge.judge_held_out == world.judge_held_out and judge.colours == dict(COLOURS)
    captions = Counter()
    for row in rows_of(world_folder):
        picture = picture_of(row["URL"])
        digit = int(scans()[1][picture.index])
        assert picture.index in set(world.judge_train)
        assert (digit, picture.foreground, picture.background) not in judge.held_out_combinations
        if row["TEXT"] == picture.caption():
            wanted = judge.parse(row["TEXT"])
            assert (wanted.digit, wanted.foreground, wanted.background) == (
                digit,
                picture.foreground,
                picture.background,
            )
            captions[row["TEXT"]] += 1
    assert len(captions) > 0.9 * (560 - 28)


def picture_of(url: str) -> Picture:
    index, foreground, background = url.rpartition("/")[2].removesuffix(".jpg").split("-")
    return Picture(int(index), foreground, background)


def test_every_rule_has_rows_to_reject_and_duplicates_are_found(tmp_path, world_folder):
    world = World.load(world_folder)
    settings = filter_settings(FilterConfig(min_width=64, min_height=64))
    stages = [
        MetadataStage(str(world_folder / "metadata"), {}, tmp_path / "01-metadata"),
        FilterStage(settings, tmp_path / "01-metadata", tmp_path / "02-filter"),
        *dedup_stages(
            source=tmp_path / "02-filter",
            folder=tmp_path / "03-dedup",
            by="url",
            seed=0,
            num_validation=50,
            samples_per_shard=1000,
        ),
    ]
    runner = Runner(output=tmp_path, executor=InlineExecutor())
    runner.run(stages)
    stats = [commit["rejected"] for commit in read_json(tmp_path / "02-filter" / "funnel.json")["rules"]]
    rules = [row["rule"] for row in read_json(tmp_path / "02-filter" / "funnel.json")["rules"]]
    rejected = dict(zip(rules, stats, strict=True))
    assert rejected.pop("url") == 0
    assert rejected == {rule: world.kinds[rule] for rule in rejected} and len(rejected) == 7
    assert read_json(tmp_path / "03-dedup-pick" / "duplicates.json")["duplicates"] == world.kinds["duplicate"] > 0
    good = world.kinds["good"]
    assert 0.7 * ROWS < good < 0.75 * ROWS and sum(world.kinds.values()) == ROWS


def read_json(path: Path):
    return json.loads(path.read_text())


@pytest.mark.parametrize(("foreground", "background"), [("red", "blue"), ("black", "white"), ("white", "black")])
def test_pictures_show_their_colours(foreground, background):
    pixels = render(Picture(0, foreground, background), 64).astype(float)
    assert pixels.shape == (64, 64, 3)
    to_stroke = np.abs(pixels - COLOURS[foreground]).sum(-1)
    to_ground = np.abs(pixels - COLOURS[background]).sum(-1)
    assert to_stroke.min() <= 30 and (to_ground <= 3).mean() > 0.25
    decoded = np.asarray(Image.open(io.BytesIO(to_jpeg(pixels.astype(np.uint8)))), float)
    assert np.abs(decoded - pixels).mean() < 4


def test_no_two_colours_are_near():
    values = np.array(list(COLOURS.values()), float)
    distance = np.linalg.norm(values[:, None] - values, axis=-1) + 1e9 * np.eye(len(values))
    assert len(COLOURS) == 8 and distance.min() == 255


def test_a_caption_is_the_sentence_of_the_demo():
    seven = int(np.flatnonzero(scans()[1] == 7)[0])
    assert Picture(seven, "red", "blue").caption() == "a red handwritten seven on a blue background"
    assert len(DIGIT_NAMES) == 10


def test_the_server_renders_and_is_gone_slow_or_wrong_where_asked(world_folder):
    with DigitsServer(World.load(world_folder), 0, slow_seconds=0.3) as server:
        host, port = server.server_address[:2]
        assert host == "127.0.0.1"
        picture = Picture(5, "red", "cyan")

        def get(path: str):
            return OPENER.open(f"http://127.0.0.1:{port}/{path}", timeout=10)

        body = get(picture.path).read()
        assert body == to_jpeg(render(picture, 64))
        assert Image.open(io.BytesIO(get(f"small/{picture.path}").read())).size == (32, 32)
        page = get(f"page/{picture.path}")
        assert page.headers["Content-Type"] == "text/html" and b"new home" in page.read()
        started = time.monotonic()
        assert get(f"slow/{picture.path}").read() == body and time.monotonic() - started >= 0.3
        assert get("ready").read() == b"ready\n"
        bad = [
            f"gone/{picture.path}",
            "digit/9999-red-cyan.jpg",
            "../world.json",
            "digit/0005-red-pink.jpg",
            "metadata",
        ]
        for path in bad:
            with pytest.raises(urllib.error.HTTPError) as caught:
                get(path)
            assert caught.value.code == 404
            caught.value.close()


def test_serve_refuses_a_taken_port_another_port_and_an_empty_folder(tmp_path, world_folder):
    with pytest.raises(DataError, match=r"world\.json: no such file; `sdtrain-data serve-digits` makes a world"):
        serve(tmp_path, 8123)
    with pytest.raises(
        ConfigError, match=r"--port 8124: the URLs of .* name port 8123; serve it there or make it anew"
    ):
        serve(world_folder, 8124)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError, match=f"--port {port}: cannot listen on 127.0.0.1:{port}: Address already in use"
        ):
            DigitsServer(World.load(world_folder), port)
    (tmp_path / "world.json").write_text('{"seed": 1}')
    with pytest.raises(DataError, match=r"not a digits world of this version .*held_out_combinations"):
        World.load(tmp_path)


def test_too_few_and_too_many_rows_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="rows = 100 is too few for a row of every kind; give 200 or more"):
        make_world(tmp_path, seed=0, rows=100, image_size=64, port=1)
    make_world(tmp_path, seed=0, rows=200, image_size=64, port=1)
    with pytest.raises(
        ConfigError, match="rows = 200000 is more than there are different pictures; give 40264 or fewer"
    ):
        make_world(tmp_path, seed=0, rows=200_000, image_size=64, port=1)


def digits_stage(folder: Path, **changes) -> DigitsStage:
    options = {"num_images": 25, "num_validation": 5, "image_size": 32, "samples_per_shard": 8, "seed": 1, **changes}
    return DigitsStage(folder=folder / "04-download", **options)


def test_digits_without_a_server_become_the_shards_of_a_download(tmp_path):
    stage = digits_stage(tmp_path)
    Runner(output=tmp_path, executor=InlineExecutor()).run([stage])
    readers = [ShardReader(path) for path in sorted(stage.folder.glob("*.tar"))]
    assert [len(reader.keys) for reader in readers] == [8, 8, 4, 5]
    assert len({key for reader in readers for key in reader.keys}) == 25
    facts = [json.loads(reader.read(0, "json")) for reader in readers]
    assert [row["split"] for row in facts] == ["train"] * 3 + ["validation"]
    judge = DigitsWorld.load(stage.folder / "world.json")
    for reader in readers:
        for index in range(len(reader.keys)):
            wanted = judge.parse(reader.read(index, "txt").decode())
            assert (wanted.digit, wanted.foreground, wanted.background) not in judge.held_out_combinations
            assert Image.open(io.BytesIO(reader.read(index, "jpg"))).size == (32, 32)
    with pytest.raises(
        DataError, match=r"validation\.num_samples = 25, but source\.num_images = 25: nothing would remain"
    ):
        digits_stage(tmp_path, num_validation=25).units()


def test_more_pictures_begin_with_the_same_ones():
    few, many = draw(7, 10), draw(7, 30)
    assert many.pictures[:10] == few.pictures and many.combinations == few.combinations
    assert draw(8, 10).pictures != few.pictures
