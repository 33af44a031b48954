"""The download stage: hostile rows are counted and none is stored, the same part gives the same bytes.

Whatever fetches runs as a process of its own in a network namespace that holds nothing but `lo`: this file run as a
script with the name of a scenario.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.cluster import InlineExecutor, RayExecutor
from data_pipeline.engine import Collector, reason_of
from data_pipeline.stage import Unit
from data_pipeline.stages.download import (
    DownloadStage,
    ShardFailedError,
    _refuse_total_loss,
    download_part,
    read_part,
)
from data_pipeline.transport_policy import RefusedError, TransportPolicy
from sdtrain.config.ingestion import DownloadConfig
from sdtrain.data.shard import ShardReader
from sdtrain.errors import ConfigError, DataError
from tests.data.download_site import (
    SIDE,
    Site,
    bomb,
    image,
    in_namespace,
    lone_loopback,
    run,
    serve,
    settings,
    write_part,
)

# ------------------------------------------------------------------------------------- scenarios, in the namespace


def scenario_hostile(folder: Path) -> None:
    """One part with a good row of every kind and a bad row of every kind."""
    port = serve()
    Site.bomb = bomb()
    here = f"http://127.0.0.1:{port}"
    rows = [
        (f"{here}/image/a-64-48-JPEG", "success"),
        (f"{here}/image/b-32-50-PNG", "success"),  # the shorter side fits exactly: cropped all the same
        (f"{here}/image/c-90-40-WEBP", "success"),
        (f"{here}/busy/d", "success"),
        (f"{here}/away//image/e-64-64-JPEG", "success"),
        (f"{here}/image/f-31-64-JPEG", "too_small"),
        (f"{here}/gone/1", "http_410"),
        (f"{here}/html/1", "not_an_image"),
        (f"{here}/endless/1", "too_large"),
        (f"{here}/slow/1", "deadline"),
        (f"{here}/gzip/1", "refused:content_encoding"),
        (f"{here}/bomb/1", "too_many_pixels"),
        (f"{here}/broken/1", "undecodable"),
        (f"{here}/noai/1", "refused:robots_tag"),
        (f"http://127.0.0.2:{port}/down/1", "http_503"),
        (f"{here}/away/file:///etc/passwd", "refused:scheme"),
        (f"{here}/away/http://169.254.169.254:{port}/latest", "refused:link_local"),
        (f"{here}/away/http://10.0.0.1:{port}/", "refused:private_address"),
        ("file:///etc/passwd", "refused:scheme"),
        ("no scheme at all", "refused:scheme"),
        (f"http://10.0.0.1:{port}/", "refused:private_address"),
        (f"http://[::ffff:192.168.0.1]:{port}/", "refused:private_address"),
        ("http://127.0.0.1:22/", "refused:port"),
        ("http://[::1", "refused:url"),
    ]
    write_part(folder / "parts", 0, [url for url, _ in rows])
    stage = DownloadStage(folder / "parts", folder / "one", settings(port), memory_limit_bytes=2_000_000_000)
    run(folder, stage, InlineExecutor())
    stats = json.loads((folder / "one" / "00000.stats.json").read_text())
    assert stats["reasons"] == dict(sorted(Counter(reason for _, reason in rows).items())), stats
    assert (stats["rows"], stats["stored"], stats["split"]) == (len(rows), 5, "train")
    check_samples(folder / "one" / "00000.tar", rows)
    assert sorted(path.name for path in (folder / "one").glob("00000*")) == [
        "00000.failed.parquet",
        "00000.stats.json",
        "00000.tar",
        "00000.tar.index.json",
    ]


def check_samples(shard: Path, rows: list[tuple[str, str]]) -> None:
    with ShardReader(shard) as reader:
        assert reader.keys == [f"{0:04x}{row:028x}" for row in range(5)]
        for sample in range(5):
            pixels, facts = reader.decode(sample, "jpg"), reader.decode(sample, "json")
            assert pixels.shape == (3, SIDE, SIDE)
            assert facts["url"] == rows[sample][0]
            assert reader.decode(sample, "txt") == facts["caption"] == f"caption {sample} of part 0"
        facts = reader.decode(0, "json")
    assert facts["sha256"] == hashlib.sha256(image("a-64-48-JPEG", (64, 48))).hexdigest()
    assert facts["url_sha256"] == hashlib.sha256(rows[0][0].encode()).hexdigest()
    assert (facts["original_size"], facts["crop"], facts["size"]) == ([64, 48], [8, 0, 56, 48], [SIDE, SIDE])
    assert (facts["scores"], facts["source"]) == ({"aesthetic_v2": 6.5}, {"nsfw": "UNLIKELY", "source_hash": 0})
    assert facts["split"] == "train"


def scenario_workers(folder: Path) -> None:
    """Two Ray workers and this process write the same bytes; a second run has nothing to do; the summary adds up."""
    port = serve()
    for index in range(3):
        urls = [f"http://127.0.0.1:{port}/image/{index}.{row}-64-{40 + row}-JPEG" for row in range(12)]
        urls.append(f"http://127.0.0.1:{port}/gone/{index}")
        write_part(folder / "parts", index, urls, "validation" if index == 2 else "train")
    inline = DownloadStage(folder / "parts", folder / "inline", settings(port))
    run(folder, inline, InlineExecutor())
    ray_stage = DownloadStage(folder / "parts", folder / "ray", settings(port), memory_limit_bytes=2_000_000_000)
    with RayExecutor(workers=2) as executor:
        run(folder, ray_stage, executor)
        asked = Site.requests.total()
        run(folder, ray_stage, executor)
    assert asked == 2 * 3 * 13 == Site.requests.total()
    for name in [f"{index:05d}.tar{suffix}" for index in range(3) for suffix in ("", ".index.json")]:
        assert (folder / "inline" / name).read_bytes() == (folder / "ray" / name).read_bytes(), name
    assert json.loads((folder / "ray" / "summary.json").read_text()) == {
        "shards": 3,
        "empty_shards": [],
        "rows": 39,
        "stored": 36,
        "success_rate": 0.9231,
        "reasons": {"success": 36, "http_410": 3},
    }


def scenario_bomb(folder: Path) -> None:
    """A bomb that passes the header check meets the memory limit, and its neighbours arrive."""
    port = serve()
    Site.bomb = bomb()
    here = f"http://127.0.0.1:{port}"
    write_part(folder / "parts", 0, [f"{here}/image/a-64-64-JPEG", f"{here}/bomb/1", f"{here}/image/b-64-64-JPEG"])
    roomy = settings(port, max_pixels=500_000_000)
    stage = DownloadStage(folder / "parts", folder / "one", roomy, memory_limit_bytes=300_000_000)
    run(folder, stage, InlineExecutor())
    stats = json.loads((folder / "one" / "00000.stats.json").read_text())
    assert stats["reasons"] == {"out_of_memory": 1, "success": 2}, stats


def scenario_lost(folder: Path) -> None:
    """All rows fail: for good reasons an empty shard, for passing ones a failure."""
    port = serve()
    gone = write_part(folder / "parts", 0, [f"http://127.0.0.1:{port}/gone/1", "file:///etc/passwd"])
    down = write_part(folder / "parts", 1, [f"http://127.0.0.1:{port}/gone/1", f"http://127.0.0.2:{port}/down/1"])
    work = DownloadStage(folder / "parts", folder / "one", settings(port)).worker()
    for name in ("0", "1"):
        (folder / name).mkdir()
    stats = work(Unit(0, (gone,)), folder / "0")
    assert stats == {"rows": 2, "stored": 0, "split": "train", "reasons": {"http_410": 1, "refused:scheme": 1}}
    with ShardReader(folder / "0" / "00000.tar") as reader:
        assert len(reader) == 0
    with pytest.raises(ShardFailedError, match=r"not one of 2 images arrived: \{'http_410': 1, 'http_503': 1\}"):
        work(Unit(1, (down,)), folder / "1")
    assert list((folder / "1").iterdir()) == []


@pytest.mark.heavy
@pytest.mark.parametrize("scenario", ["hostile", "workers", "bomb", "lost"])
def test_scenario(scenario: str, tmp_path: Path) -> None:
    in_namespace(__file__, scenario, tmp_path)


# --------------------------------------------------------------------------------------------- without any network


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (None, "success"),
        ("refused:link_local 169.254.169.254 of host a", "refused:link_local"),
        ("http_404 Not Found", "http_404"),
        ("http_404x", "internal_error"),
        ("too_large", "too_large"),
        ("unknown url type: 'a'", "refused:scheme"),
        ("Invalid IPv6 URL", "refused:url"),
        ("too_small 20x31; stored are (32, 32)", "too_small"),
        ("Unable to allocate 1. GiB for an array", "out_of_memory"),
        ("", "out_of_memory"),
        ("a surprise", "internal_error"),
    ],
)
def test_messages_become_reasons(message: str | None, reason: str) -> None:
    assert reason_of(message) == reason


def test_only_permanent_reasons_make_an_empty_shard() -> None:
    part = Path("00007.parquet")
    _refuse_total_loss({"http_404": 5, "refused:scheme": 1, "too_small": 1, "unknown_host": 2}, part)
    _refuse_total_loss({"success": 1, "timeout": 99}, part)
    _refuse_total_loss({}, part)
    for reason in ("timeout", "http_503", "connect_failed", "dns_failed", "internal_error"):
        with pytest.raises(ShardFailedError, match=r"00007.parquet: not one of 3 images arrived"):
            _refuse_total_loss({"http_404": 2, reason: 1}, part)


def test_parts_must_have_their_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["a"], "TEXT": ["b"]}), tmp_path / "00000.parquet")
    with pytest.raises(
        DataError, match=r"columns \['key', 'caption', 'split'\] are missing, there are \['url', 'TEXT'\]"
    ):
        read_part(tmp_path / "00000.parquet", 10)


def unused() -> Collector:
    def resizer(body: memoryview) -> Any:
        raise AssertionError("nothing was fetched")

    return Collector(resizer)


def test_a_part_larger_than_a_shard_is_refused(tmp_path: Path) -> None:
    path = write_part(tmp_path, 0, ["http://a.example/"] * 3)
    with pytest.raises(DataError, match=r"3 rows, download.samples_per_shard allows 2; run the stages before again"):
        download_part(Unit(0, (path,)), tmp_path, collector=unused(), settings=settings(80, samples_per_shard=2))


def test_a_part_belongs_to_one_split(tmp_path: Path) -> None:
    columns = {"key": ["a", "b"], "url": ["a", "b"], "caption": ["a", "b"], "split": ["train", "validation"]}
    pq.write_table(pa.table(columns), tmp_path / "00000.parquet")
    with pytest.raises(DataError, match=r"holds splits \['train', 'validation'\]; a shard belongs to exactly one"):
        read_part(tmp_path / "00000.parquet", 10)


def test_the_contact_is_asked_for_before_anything_runs(tmp_path: Path) -> None:
    write_part(tmp_path / "parts", 0, ["http://a.example/"])
    stage = DownloadStage(tmp_path / "parts", tmp_path / "out", DownloadConfig())
    with pytest.raises(ConfigError, match=r"download.contact is ''; give a URL or mail address"):
        stage.units()


def test_patience_is_no_reason_to_fetch_again(tmp_path: Path) -> None:
    def facts(**changes: Any) -> Any:
        return DownloadStage(tmp_path, tmp_path, settings(80, **changes)).config_facts()

    assert facts(threads=3, processes=9, timeout_seconds=2.0, retries=0) == facts()
    assert facts(connections_per_host=1, host_gap_seconds=2.0, blocked_urls=(tmp_path / "a",), retry_round=4) == facts()
    assert facts(jpeg_quality=90) != facts()
    assert "bucket_shapes" not in facts()
    shapes = [facts(resize_mode="buckets", bucket_shapes=shapes) for shapes in (None, ((32, 64),))]
    assert shapes[0]["bucket_shapes"] != shapes[1]["bucket_shapes"] == [[32, 64]]
    assert facts()["engine"].startswith("img2dataset 1.47")


def test_each_process_gets_its_share_of_a_host(tmp_path: Path) -> None:
    def policy(**changes: Any) -> TransportPolicy:
        return DownloadStage(tmp_path, tmp_path, settings(80, **changes)).policy

    assert policy(processes=4, connections_per_host=10).connections_per_host == 2
    assert policy(processes=16, connections_per_host=10).connections_per_host == 1
    assert policy(processes=4, host_gap_seconds=0.5).host_gap_seconds == 2.0
    assert policy(honored_robots_tags=("NoAI",)).robots_rules == {"noai"}
    assert policy().robots_rules == {"noai", "noimageai"}


def test_a_block_list_is_looked_at_before_anything_runs(tmp_path: Path) -> None:
    write_part(tmp_path / "parts", 0, ["http://a.example/"])
    stage = DownloadStage(tmp_path / "parts", tmp_path / "out", settings(80, blocked_urls=(tmp_path / "gone.txt",)))
    with pytest.raises(DataError, match=r"download.blocked_urls: .*gone.txt: cannot be read as text"):
        stage.units()


def test_a_collector_counts_what_its_resizer_refuses() -> None:
    def resizer(body: memoryview) -> Any:
        raise RefusedError("too_small", "1x1")

    collector = Collector(resizer)
    assert collector.resize(io.BytesIO(b"x")) == (None, None, None, None, None, "too_small 1x1")
    collector.write(None, "0000000000003", None, {"error_message": "too_small 1x1"})
    collector.write(None, "0000000000004", None, {"error_message": "a surprise"})
    assert collector.failed == {3: "too_small", 4: "internal_error"}
    assert collector.unexpected == {"a surprise"}


if __name__ == "__main__":
    lone_loopback()
    globals()[f"scenario_{sys.argv[1]}"](Path(sys.argv[2]))
