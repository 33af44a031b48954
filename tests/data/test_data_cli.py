"""`sdtrain-data`: help with examples, plans, runs, typed exits."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_pipeline import build, cli
from data_pipeline.card_markdown import shown
from data_pipeline.cluster import InlineExecutor
from data_pipeline.runner import Runner
from data_pipeline.sources.digits import World, make_world
from data_pipeline.sources.digits_server import DigitsServer
from sdtrain.data.manifest import Manifest, verify
from sdtrain.errors import ExitCode
from tests.support import make_latent_manifest, write_tiny_autoencoder

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


@pytest.mark.parametrize("command", ["run", "plan", "status", "serve-digits", "verify", "takedown", "card", "export"])
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


def test_until_takes_all_stages_up_to_one(page, capsys):
    assert call("run", page, "--until", "dedup") == 0
    assert "20 validation rows" in capsys.readouterr().out
    assert call("run", page, "--until", "filter", "--dry-run") == 0
    assert capsys.readouterr().out == "metadata: 3 of 3 up to date\nfilter: 3 of 3 up to date\n"
    assert call("run", page, "--until", "fitler") == 3
    assert "there is no stage 'fitler'" in capsys.readouterr().err


def test_status_says_how_far_each_stage_is_and_what_failed(page, capsys, tmp_path):
    assert call("status", page) == 0
    assert capsys.readouterr().out == "nothing has run yet\n"
    (tmp_path / "world/metadata/part-00001.parquet").write_bytes(b"cut")
    assert call("run", page, "--until", "filter") == 3
    message = capsys.readouterr().err
    assert (
        message.startswith("sdtrain-data: stage metadata: 1 of 3 units failed\n  00001: ")
        and "Traceback" not in message
    )
    assert call("status", page) == 0
    printed = capsys.readouterr().out
    assert re.search(r"metadata +failed +2/3 +1 ", printed) and re.search(r"filter +waiting", printed)
    assert "ended as failed after" in printed and ": stage metadata: 1 of 3 units failed" in printed
    assert "failed: metadata 00001 after 1 attempts: " in printed and "not a readable parquet file" in printed
    assert call("status", tmp_path / "out", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["attempt"]["state"] == "failed" and [row["unit"] for row in found["dead_letters"]] == ["00001"]
    assert [(row["name"], row["state"], row["done"]) for row in found["stages"]] == [
        ("metadata", "failed", 2),
        ("filter", "waiting", 0),
    ]


def test_status_of_a_folder_without_a_run_is_a_config_error(capsys, tmp_path):
    assert call("status", tmp_path) == 2
    assert "no ingestion run has worked here: it is no folder with progress.json or" in capsys.readouterr().err


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


def test_a_table_damaged_in_the_middle_costs_nothing_of_the_others(page, capsys, tmp_path):
    path = tmp_path / "world/metadata/part-00001.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:400] + bytes(400) + whole[800:])
    assert call("run", page, "metadata", "filter") == 3
    error = capsys.readouterr().err
    assert error.startswith("sdtrain-data: stage filter: 1 of 3 units failed\n  00001: ") and "Traceback" not in error
    assert "part-00001.parquet: damaged inside, in row group 0 of 1 (rows 0 to " in error
    assert sorted(file.name for file in (tmp_path / "out/02-filter").glob("*.parquet")) == [
        "00000.parquet",
        "00002.parquet",
    ]
    path.write_bytes(whole)
    assert call("run", page, "metadata", "filter") == 0
    printed = capsys.readouterr().out
    assert "filter: 2 of 3 up to date; 1 new" in printed and not json.loads(
        (tmp_path / "out/dead_letter.json").read_text()
    )


def test_a_plan_says_what_a_run_would_do(page, capsys, tmp_path):
    assert call("plan", page, "plan.link_success=0.5", "filter.min_aesthetic=5.0") == 0
    printed = capsys.readouterr()
    assert "forecast of the survival funnel, from 400 sampled rows" in printed.out and "duplicates" in printed.out
    assert "assumes: 50 % of the links still give a picture (plan.link_success)\n" in printed.out
    assert call("plan", page, "plan.link_success=0.5", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    kept = found["funnel"][-1]["left"]
    assert found["rows_in"] == 400 and found["images"] == round(kept / 2)
    assert found == json.loads((tmp_path / "out/00-plan/forecast.json").read_text())
    assert call("run", page, "--until", "dedup") == 0
    assert json.loads((tmp_path / "out/03-dedup-pick/duplicates.json").read_text())["rows_out"] == kept
    path = tmp_path / "world/metadata/part-00000.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["pwatermark"]), path)
    assert call("plan", page) == 3
    error = capsys.readouterr().err
    assert "sdtrain-data: 1 of 3 tables do not fit the filter:\n" in error and "Traceback" not in error


def test_an_interrupt_is_one_line(page, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "run", stop)
    assert call("run", page) == 130
    assert "interrupted; what is committed stays, run again to go on" in capsys.readouterr().err


def test_usr1_asks_for_another_start(page, capsys, monkeypatch):
    """As Slurm sends it ahead of a time limit; a second one changes nothing."""
    handler = signal.getsignal(signal.SIGUSR1)

    def stop(*_):
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(Runner, "run", stop)
    assert call("run", page) == 85
    assert "sdtrain-data: SIGUSR1; what is committed stays, run again to go on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGUSR1) == handler


def test_a_cluster_whose_head_does_not_answer(page, capsys):
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    waiting = ("--await-nodes", "n1,n2", "--await-seconds", "0")
    assert call("run", page, f"runner.address={address}", *waiting) == 6
    assert f"sdtrain-data: the head of Ray at {address} did not answer within 0 s (" in capsys.readouterr().err


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


ENCODED = """encode: {{autoencoder: {autoencoder}, batch_size: 8, check_samples: 2}}
"""


@pytest.mark.heavy
def test_the_whole_way_from_links_to_latents_on_real_ray(tmp_path, capfd):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    metadata = make_world(tmp_path / "world", seed=0, rows=400, image_size=64, port=port)
    path, out = tmp_path / "data.yaml", tmp_path / "out"
    text = PAGE.format(path=path, output=out, metadata=metadata) + ENCODED.format(autoencoder=tmp_path / "autoencoder")
    limits = f"threads: 4, timeout_seconds: 3, total_timeout_seconds: 4, allow_loopback: true, allowed_ports: [{port}]"
    path.write_text(text.replace("contact:", f"{limits}, contact:"))
    world = World.load(tmp_path / "world")
    with DigitsServer(world, port):
        assert call("run", path, "--until", "images") == 0  # needs no autoencoder yet
    images = Manifest.load(out / "images.json")
    write_tiny_autoencoder(tmp_path / "autoencoder")
    assert call("run", path) == 0  # and the server may be gone
    summary = json.loads((out / "04-download" / "summary.json").read_text())
    bad = {"gone", "page", "small", "slow"}
    rows = world.kinds["good"] + sum(world.kinds[kind] for kind in bad)
    assert summary["rows"] == rows and summary["stored"] == world.kinds["good"]
    reasons = {"gone": "http_404", "small": "too_small", "page": "not_an_image", "slow": "deadline"}
    assert {kind: summary["reasons"][reasons[kind]] for kind in bad} == {kind: world.kinds[kind] for kind in bad}
    latents = Manifest.load(out / "manifest.json")
    for split in ("train", "validation"):
        assert latents.num_samples(split) == images.num_samples(split) > 0
    assert latents.num_samples("train") + latents.num_samples("validation") == world.kinds["good"]
    for manifest in (images, latents):
        verify(manifest, deep=True)
    assert images.field_shapes == {"jpg": (3, 64, 64)}
    assert latents.field_shapes == {"moments.npy": (8, 32, 32), "tokens.npy": (77,)}
    assert sorted(latents.fingerprint) == ["autoencoder", "tokenizer", "transform"]
    before = (out / "manifest.json").read_bytes()
    capfd.readouterr()
    assert call("run", path) == 0
    plans = [line for line in capfd.readouterr().out.splitlines() if "up to date" in line]
    assert "encode: 4 of 4 up to date" in plans and "manifest: 1 of 1 up to date" in plans
    assert all(re.fullmatch(r"[\w-]+: (\d+) of \1 up to date", plan) for plan in plans), plans
    assert (out / "manifest.json").read_bytes() == before
    the_card_tells_it_all(out, summary["reasons"])
    assert call("export", path, "--out", tmp_path / "hf", "--with", "tokens", "--with", "moments") == 0
    import datasets

    found = datasets.load_from_disk(str(tmp_path / "hf"))
    assert isinstance(found, datasets.DatasetDict)
    assert {name: len(rows) for name, rows in found.items()} == {name: images.num_samples(name) for name in found}
    row = found["train"].with_format("numpy")[0]
    assert row["moments"].shape == (8, 32, 32) and row["tokens"].shape == (77,) and row["image"].shape == (64, 64, 3)
    assert min(row["scores"].values()) > 0


def the_card_tells_it_all(out: Path, reasons: dict[str, int]) -> None:
    """Rows of the sources, the funnel rule by rule, duplicates, outcomes and the autoencoder are in the data card."""
    card, text = json.loads((out / "data_card.json").read_text()), (out / "data_card.md").read_text()
    funnel = json.loads((out / "02-filter" / "funnel.json").read_text())
    assert funnel["rows_in"] == sum(source["rows"] for source in card["sources"])
    assert all(len(source["sha256"]) == 64 and source["columns"]["url"] == "URL" for source in card["sources"])
    for rule in funnel["rules"]:
        assert f"| {shown(rule['rule'])} | {shown(rule['setting'])} | {rule['rejected']:,} | {rule['left']:,} |" in text
    assert all(f"| {shown(name)} | {count:,} |" in text for name, count in reasons.items() if name != "success")
    assert f"| stored | {reasons['success']:,} |" in text and "0 owners had opted out" in text
    assert "## Duplicates, by dedup" in text and "| `autoencoder.scaling_factor` | 0.5 |" in text


def test_verify_reads_shards_back_and_names_the_damaged_one(tmp_path, capsys):
    path = make_latent_manifest(tmp_path)
    shard = path.parent / Manifest.load(path).shards[0].path
    assert call("verify", path) == 0
    assert capsys.readouterr().out.endswith("shards are as they were written\n")
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    assert call("verify", path, "--quick") == 0
    assert capsys.readouterr().out.endswith("shards are there, with the right sizes\n")
    assert call("verify", path) == ExitCode.DATA
    assert f"shards are missing or damaged:\n  {shard}: sha256 " in capsys.readouterr().err
