"""Run all cases through the download stage; a program for `namespace.run`, which prints its report as JSON."""

from __future__ import annotations

import io
import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.data.hostile import namespace, pictures, server
from tests.data.hostile.cases import (
    BLOCKED_BYTES,
    BLOCKED_URLS,
    CASES,
    MAX_BYTES,
    MAX_PIXELS,
    PREPARED,
    SCRIPTS,
    SECRET,
    STORED,
    Case,
)

THREADS = 128
MEMORY_LIMIT_BYTES = 200_000_000
"""What the worker may take beyond what it held before the first picture."""

MAX_PIXEL_ERROR = 6.0
"""Mean difference to the expected pixels, of 255; a turned or recoloured picture is beyond 40."""

MODULE = "tests.data.hostile.suite"


@dataclass
class Verdict:
    """What became of a case.

    Attributes:
        name: Of the case.
        must: What had to come of it.
        got: `success`, or the reason.
        pixel_error: Mean difference of what was stored to what is expected, of 255.
        reached: Forbidden addresses that were connected to.
    """

    name: str
    must: str
    got: str
    pixel_error: float | None = None
    reached: list[str] | None = None

    @property
    def is_right(self) -> bool:
        """Whether nothing forbidden was reached, and the outcome and the pixels are those that must be."""
        pixels_fit = self.pixel_error is None or self.pixel_error <= MAX_PIXEL_ERROR
        return not self.reached and self.got == self.must and pixels_fit


def prepare(folder: Path) -> server.Servers:
    """Enter the network and start the servers."""
    namespace.enter(folder)
    SECRET.write_bytes(pictures.jpeg())
    (folder / server.LOG).touch()
    return start_servers(folder)


def start_servers(folder: Path) -> server.Servers:
    """Servers that remember nothing of earlier look-ups and requests."""
    return server.Servers(SCRIPTS, PREPARED, folder)


def write_table(folder: Path, cases: list[Case] = CASES) -> Path:
    """The cases as a part of metadata; a row's key is its number."""
    columns = {
        "key": [f"{row:06d}" for row in range(len(cases))],
        "url": [case.url for case in cases],
        "caption": [case.name for case in cases],
        "split": ["train"] * len(cases),
        "md5": [case.md5 for case in cases],
        "sha256": [case.sha256 for case in cases],
    }
    folder.mkdir(parents=True, exist_ok=True)
    types = dict.fromkeys(columns, pa.string())
    pq.write_table(pa.table(columns, schema=pa.schema(list(types.items()))), folder / "00000.parquet")
    return folder


def run_ours(folder: Path, servers: server.Servers) -> tuple[dict[str, str], int]:
    """What the stage says of every case, by name, and the memory that its worker held before the first one.

    The shard lies in `folder`.
    """
    from data_pipeline.stage import Unit
    from data_pipeline.stages.download import DownloadStage
    from sdtrain.config.ingestion import DownloadConfig

    for name, lines in (("urls", BLOCKED_URLS), ("bytes", BLOCKED_BYTES)):
        (folder / f"blocked-{name}.txt").write_text("\n".join(lines) + "\n")
    settings = DownloadConfig(
        contact="https://example.org/crawl",
        image_size=pictures.SIDE,
        samples_per_shard=len(CASES),
        processes=1,
        threads=THREADS,
        timeout_seconds=0.8,
        total_timeout_seconds=2.4,
        retries=1,
        max_bytes=MAX_BYTES,
        max_pixels=MAX_PIXELS,
        blocked_urls=(folder / "blocked-urls.txt",),
        blocked_bytes=(folder / "blocked-bytes.txt",),
    )
    source = write_table(folder / "parts")
    stage = DownloadStage(source, folder / "images", settings, memory_limit_bytes=MEMORY_LIMIT_BYTES)
    work = stage.worker()
    held = memory_bytes("VmRSS")
    servers.wait()
    (folder / "images").mkdir()
    stats = work(Unit(0, (source / "00000.parquet",)), folder / "images")
    assert sum(stats["reasons"].values()) == len(CASES), stats
    failed = pq.read_table(folder / "images" / "00000.failed.parquet")
    reasons = dict(zip(failed["row"].to_pylist(), failed["reason"].to_pylist(), strict=True))
    return {case.name: reasons.get(row, STORED) for row, case in enumerate(CASES)}, held


def pixel_errors(shard: Path) -> dict[str, float]:
    """How far each stored picture is from the expected one, by case."""
    from sdtrain.data.shard import ShardReader

    errors = {}
    with ShardReader(shard) as reader:
        for sample, key in enumerate(reader.keys):
            case = CASES[int(key)]
            errors[case.name] = pixel_error(reader.read(sample, "jpg"), case)
    return errors


def pixel_error(stored: bytes, case: Case) -> float:
    """Mean absolute difference, of 255; 255 where the size is another."""
    found = np.asarray(Image.open(io.BytesIO(stored)).convert("RGB"), np.int16)
    expected = case.pixels()
    return float(np.abs(found - expected).mean()) if found.shape == expected.shape else 255.0


def reached(folder: Path) -> dict[str, list[str]]:
    """Forbidden addresses that were connected to, by case."""
    found: dict[str, list[str]] = {}
    for line in (folder / server.LOG).read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["case"], []).append(f"{row['address']}:{row['port']}")
    return found


def memory_bytes(field: str) -> int:
    """A field of /proc/self/status: VmRSS, or its peak VmHWM."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def main(folder: Path) -> dict[str, Any]:
    servers = prepare(folder)
    got, held = run_ours(folder, servers)
    peak = memory_bytes("VmHWM")
    servers.stop()
    errors, forbidden = pixel_errors(folder / "images" / "00000.tar"), reached(folder)
    verdicts = [
        Verdict(case.name, case.must, got[case.name], errors.get(case.name), forbidden.pop(case.name, None))
        for case in CASES
    ]
    return {
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "forbidden": forbidden,
        "held_bytes": held,
        "peak_bytes": peak,
    }


if __name__ == "__main__":
    json.dump(main(Path(sys.argv[1])), sys.stdout)
