"""The download stage: rounds, digests, block lists and buckets."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.cluster import InlineExecutor
from data_pipeline.stages.download import DownloadStage
from sdtrain.data.shard import ShardReader
from tests.data.download_site import Site, image, in_namespace, lone_loopback, run, serve, settings, write_part


def scenario_rounds(folder: Path) -> None:
    """A further round asks only for what may have come back, and makes the shard of a run that met no trouble."""
    port = serve()
    here = f"http://127.0.0.1:{port}"
    urls = [
        f"{here}/later/a-64-48-JPEG",
        f"{here}/image/b-64-48-JPEG",
        f"{here}/gone/c",
        f"{here}/later/d-40-64-PNG",
        f"{here}/image/e-64-64-JPEG",
        f"{here}/image/f-31-64-JPEG",
    ]
    write_part(folder / "parts", 0, urls)
    write_part(folder / "parts", 1, [f"{here}/image/g-64-48-JPEG", f"{here}/gone/h"])

    def bring(name: str, **changes: Any) -> Counter[str]:
        before = Counter(Site.requests)
        run(
            folder,
            DownloadStage(folder / "parts", folder / name, settings(port, retries=0, **changes)),
            InlineExecutor(),
        )
        return Site.requests - before

    def stats(name: str) -> dict[str, int]:
        return json.loads((folder / name / "00000.stats.json").read_text())["reasons"]

    assert bring("one").total() == 8
    assert stats("one") == {"http_410": 1, "http_500": 2, "success": 2, "too_small": 1}
    failed = pq.read_table(folder / "one" / "00000.failed.parquet").to_pylist()
    assert [(row["row"], row["reason"]) for row in failed] == [
        (0, "http_500"),
        (2, "http_410"),
        (3, "http_500"),
        (5, "too_small"),
    ]
    assert (failed[1]["key"], failed[1]["url"]) == (f"{0:04x}{2:028x}", urls[2])
    assert bring("one").total() == 0
    first = (folder / "one" / "00000.tar").read_bytes()
    later = {"/later/a-64-48-JPEG": 1, "/later/d-40-64-PNG": 1}
    assert bring("one", retry_round=1) == later  # still busy: asked once, the samples stay
    assert (folder / "one" / "00000.tar").read_bytes() == first
    assert bring("one", retry_round=1).total() == 0 == bring("one").total()
    Site.is_open = True
    assert bring("one", retry_round=1).total() == 0
    assert bring("one", retry_round=2) == later
    assert stats("one") == {"http_410": 1, "success": 4, "too_small": 1}
    assert bring("one", retry_round=3).total() == 0  # nothing is left that may come back
    assert bring("two").total() == 8
    for name in ("00000.tar", "00000.tar.index.json", "00000.failed.parquet", "00000.stats.json", "00001.tar"):
        assert (folder / "one" / name).read_bytes() == (folder / "two" / name).read_bytes(), name
    (folder / "two" / "00000.tar").write_bytes(b"damaged")
    assert bring("two", retry_round=1).total() == 6  # made anew, and only that


def scenario_digests(folder: Path) -> None:
    """Digests are recorded always, and enforced where the table names them; blocked files are not kept."""
    port = serve()
    names = [f"{letter}-64-48-JPEG" for letter in "abcdef"]
    bodies = [image(name, (64, 48)) for name in names]
    path = write_part(folder / "parts", 0, [f"http://127.0.0.1:{port}/image/{name}" for name in names])
    md5 = [hashlib.md5(body).hexdigest() for body in bodies]
    sha256 = [hashlib.sha256(body).hexdigest() for body in bodies]
    table = pq.read_table(path)
    table = table.append_column("md5", pa.array([md5[0].upper(), "0" * 32, None, md5[3], None, None]))
    table = table.append_column("sha256", pa.array([None, None, sha256[2], "0" * 64, None, None]))
    pq.write_table(table, path)
    (folder / "bytes.txt").write_text(f"{md5[4]}\n")
    (folder / "urls.txt").write_text(f"http://127.0.0.1:{port}/image/{names[5]}\n")
    lists = {"blocked_bytes": (folder / "bytes.txt",), "blocked_urls": (folder / "urls.txt",)}
    run(folder, DownloadStage(folder / "parts", folder / "one", settings(port, **lists)), InlineExecutor())
    failed = pq.read_table(folder / "one" / "00000.failed.parquet").to_pylist()
    assert [(row["row"], row["reason"]) for row in failed] == [
        (1, "refused:digest"),
        (3, "refused:digest"),
        (4, "refused:blocked_bytes"),
        (5, "refused:blocked_url"),
    ]
    assert Site.requests[f"/image/{names[5]}"] == 0
    with ShardReader(folder / "one" / "00000.tar") as reader:
        facts = [reader.decode(sample, "json") for sample in range(len(reader))]
    assert [(each["md5"], each["sha256"]) for each in facts] == [(md5[0], sha256[0]), (md5[2], sha256[2])]
    assert "md5" not in facts[0]["source"] and "sha256" not in facts[1]["source"]


def scenario_buckets(folder: Path) -> None:
    """Each picture gets the shape nearest to its own, and the sample says which."""
    port = serve()
    sizes = [(64, 64), (128, 64), (64, 110), (70, 60), (30, 90)]
    write_part(folder / "parts", 0, [f"http://127.0.0.1:{port}/image/a-{w}-{h}-JPEG" for w, h in sizes])
    stage = DownloadStage(folder / "parts", folder / "one", settings(port, resize_mode="buckets"))
    assert stage.config_facts()["bucket_shapes"] == [[24, 40], [32, 32], [40, 24]]
    run(folder, stage, InlineExecutor())
    with ShardReader(folder / "one" / "00000.tar") as reader:
        facts = [reader.decode(sample, "json") for sample in range(len(reader))]
        shapes = [reader.decode(sample, "jpg").shape for sample in range(len(reader))]
    assert [each["size"] for each in facts] == [[32, 32], [40, 24], [24, 40], [32, 32], [24, 40]]
    assert [(each["width"], each["height"]) for each in facts] == [tuple(each["size"]) for each in facts]
    assert shapes == [(3, each["height"], each["width"]) for each in facts]
    assert [each["original_size"] for each in facts] == [list(size) for size in sizes]
    assert facts[1]["crop"] == [10, 0, 117, 64]


def scenario_settings(folder: Path) -> None:
    """Three in one process, which spares two imports of img2dataset."""
    for part in (scenario_rounds, scenario_digests, scenario_buckets):
        part(folder / part.__name__)


@pytest.mark.heavy
def test_settings(tmp_path: Path) -> None:
    in_namespace(__file__, "settings", tmp_path)


if __name__ == "__main__":
    lone_loopback()
    scenario_settings(Path(sys.argv[2]))
