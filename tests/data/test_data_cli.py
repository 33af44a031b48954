"""`sdtrain-data`: help with examples, plans, runs, typed exits."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_pipeline import build, cli
from data_pipeline.cluster import InlineExecutor
from data_pipeline.runner import Runner
from data_pipeline.sources.digits import make_world

PAGE = """# sdtrain-data run {path}
schema_version: 1
kind: ingestion
output: {output}
source: {{type: laion, metadata: {metadata}}}
filter: {{min_width: 64, min_height: 64}}
validation: {{num_samples: 20}}
download: {{image_size: 64, samples_per_shard: 100, contact: someone@example.org}}
runner: {{workers: 2}}
"""


@pytest.fixture
def page(tmp_path, monkeypatch) -> Path:
    """A page over a small digits world, worked on in this process."""
    metadata = make_world(tmp_path / "world", seed=0, rows=400, image_size=64, port=8123)
    path = tmp_path / "data.yaml"
    path.write_text(PAGE.format(path=path, output=tmp_path / "out", metadata=metadata))

    class Inline(InlineExecutor):
        def __enter__(self):
            return self

        def __exit__(self, *exc_info):
            pass

    monkeypatch.setattr(build, "executor_for", lambda config: Inline())
    return path


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main([str(argument) for argument in arguments])
    return int(caught.value.code or 0)


@pytest.mark.parametrize("command", ["run", "status", "serve-digits"])
def test_every_help_has_an_example(command, capsys):
    assert call(command, "--help") == 0
    assert f"Example: sdtrain-data {command} " in capsys.readouterr().out


def test_help_needs_no_heavy_import():
    code = (
        "import sys, data_pipeline.cli; print([m for m in ('ray', 'torch', 'pyarrow', 'pydantic') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_stages_run_up_to_dedup_and_then_nothing_is_left(page, capsys, tmp_path):
    assert call("run", page, "metadata", "filter", "dedup") == 0
    printed = capsys.readouterr().out
    assert "metadata: 0 of 3 up to date; 3 new" in printed and "survival funnel" in printed
    assert "20 validation rows in 1 parts" in printed
    funnel = json.loads((tmp_path / "out/02-filter/funnel.json").read_text())
    assert funnel["rows_in"] == 400 and 250 < funnel["rows_out"] < 400
    assert call("run", page, "metadata", "filter", "dedup", "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "metadata: 3 of 3 up to date" and lines[-1] == "dedup: 4 of 4 up to date"
    assert call("run", page, "filter", "filter.min_aesthetic=5", "--set", "filter.min_similarity=0.2", "--dry-run") == 0
    settings = "3 with changed settings (min_aesthetic 6.5 -> 5.0, min_similarity 0.28 -> 0.2)"
    assert capsys.readouterr().out == f"filter: 0 of 3 up to date; {settings}\n"


def test_status_says_what_waits_for_what_and_what_failed(page, capsys, tmp_path):
    assert call("status", page) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["metadata: 0 of 3 up to date; 3 new", "filter: waits for metadata"]
    (tmp_path / "world/metadata/part-00001.parquet").write_bytes(b"cut")
    assert call("run", page, "metadata") == 3
    message = capsys.readouterr().err
    assert (
        message.startswith("sdtrain-data: stage metadata: 1 of 3 units failed\n  00001: ")
        and "Traceback" not in message
    )
    assert call("status", page) == 0
    printed = capsys.readouterr().out
    assert "metadata: 2 of 3 up to date; 1 new" in printed
    assert "failed: metadata 00001 after 1 attempts: " in printed and "not a readable parquet file" in printed


def test_users_errors_are_one_message_and_their_exit_code(page, capsys, tmp_path):
    assert call("run", tmp_path / "none.yaml") == 2
    assert "none.yaml" in capsys.readouterr().err
    assert call("run", page, "filter.min_aestetic=6") == 2
    assert "min_aesthetic" in capsys.readouterr().err
    assert call("run", page, "fitler") == 3
    assert (
        "there is no stage 'fitler'; stages of this configuration: metadata, filter, dedup-split"
        in capsys.readouterr().err
    )
    assert call("run", page, "filter") == 3
    assert (
        "stage metadata is not up to date (metadata: 0 of 3 up to date; 3 new); run it as well"
        in capsys.readouterr().err
    )


def test_an_absent_column_and_a_cut_file_are_clear_lines_and_exit_code_3(page, capsys, tmp_path):
    path = tmp_path / "world/metadata/part-00000.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["pwatermark"]), path)
    assert call("run", page, "metadata", "filter") == 3
    error = capsys.readouterr().err
    assert "00000: " in error and "filter.max_pwatermark needs a column pwatermark; columns present: URL, TEXT" in error
    assert "Traceback" not in error and error.startswith("sdtrain-data: stage filter: 1 of 3 units failed\n")


def test_an_interrupt_is_one_line(page, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "run", stop)
    assert call("run", page) == 130
    assert "interrupted; what is committed stays, run again to go on" in capsys.readouterr().err


def test_serve_digits_makes_a_world_once_and_serves_it(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "data_pipeline.cli", "serve-digits", str(tmp_path / "world")]
    command += ["--port", str(port), "--rows", "300"]
    made = subprocess.run([*command, "--make-only"], check=True, capture_output=True, text=True)
    assert made.stdout == f"made 300 rows in {tmp_path / 'world' / 'metadata'}\n"
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + 60
        while True:
            try:
                assert opener.open(f"http://127.0.0.1:{port}/ready", timeout=5).read() == b"ready\n"
                break
            except OSError:
                assert time.monotonic() < deadline and server.poll() is None
                time.sleep(0.1)
    finally:
        server.terminate()
        output, _ = server.communicate()
    assert output == f"serving {tmp_path / 'world'} on http://127.0.0.1:{port}/ until interrupted\n"
