"""Trainings and take-downs: what a resume leaves out, and which steps are said to have seen a sample."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline import cli
from sdtrain.config.load import load_training
from sdtrain.data.manifest import Manifest
from sdtrain.data.plan import order_of
from sdtrain.data.shard import ShardReader
from sdtrain.data.takedown import read_takedown
from sdtrain.run_dir import RunDir
from tests.engines import one_rank, sdtrain
from tests.support import make_latent_manifest, tiny_page

pytestmark = pytest.mark.engine


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Path]:
    manifest = make_latent_manifest(tmp_path / "data", train=32, validation=8)
    with one_rank():
        yield tiny_page(tmp_path, manifest, data={"max_bad_fraction": 0.0})


def steps_by_key(page: Path, steps: int) -> dict[str, list[int]]:
    """The steps that each sample belongs to, position by position."""
    config = load_training(page)
    manifest = Manifest.load(config.data.manifest)
    order = order_of(manifest, "train", seed=config.seed, window_shards=config.data.window_shards)
    keys = [ShardReader(manifest.shard_path(shard)).keys for shard in manifest.split("train")]
    found: dict[str, list[int]] = {}
    for position in range(steps * config.data.batch_size):
        place = order.sample_at(position)
        found.setdefault(keys[place.shard][place.sample], []).append(position // config.data.batch_size + 1)
    return found


def take_down(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(["takedown", *(str(argument) for argument in arguments)])
    assert not caught.value.code
    return capsys.readouterr().out


def test_a_resume_leaves_out_what_was_taken_down_and_the_report_knows_who_saw_it(
    page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sdtrain("train", page, "trainer.max_steps=3") == 0
    run, manifest = RunDir(tmp_path / "run"), tmp_path / "data" / "manifest.json"
    steps = steps_by_key(page, 9)
    seen = next(key for key in steps if steps[key][0] == 2)
    later = next(key for key in steps if steps[key][0] == 4)
    listed = tmp_path / "list.txt"
    listed.write_text(f"{seen}\n{later}\nnone\n")
    capsys.readouterr()
    report = json.loads(take_down(capsys, listed, "--manifest", manifest, "--run", run.path, "--json"))
    (told,) = report["runs"]
    assert told["seen"] == [{"key": seen, "steps": [2], "lost_steps": []}] and told["not_yet"] == [later]
    assert (told["is_certain"], told["last_step"]) == (True, 3) and report["unmatched"] == ["none"]
    assert sdtrain("train", page, "trainer.max_steps=9") == 0
    assert "; 2 samples are taken down and will not be read\n" in capsys.readouterr().out
    assert not run.tombstones.exists(), "masked samples are not unreadable: max_bad_fraction is 0 here"
    starts = [row for row in run.ledger_rows() if row["event"] == "start"]
    assert [row.get("takedown_sha256") for row in starts] == [None, read_takedown(manifest).sha256]
    assert len(steps[seen]) > 1, "it came again, masked"
    assert sdtrain("inspect", run.path, "--seen", listed, "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["seen"], again["not_yet"], again["absent"]) == (told["seen"], [later], ["none"])
    others = [key for key in steps if key not in (seen, later)]
    listed.write_text("".join(f"{key}\n" for key in others))
    assert sdtrain("inspect", run.path, "--seen", listed, "--json") == 0
    every = {row["key"]: row["steps"] for row in json.loads(capsys.readouterr().out)["seen"]}
    assert every == {key: steps[key] for key in others}
