"""Which steps saw a sample: kills, rollbacks, forks and take-downs, against the positions one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sdtrain.checkpoints.manifest import folder_name as name
from sdtrain.data.manifest import Manifest
from sdtrain.data.plan import order_of
from sdtrain.errors import ConfigError, DataError
from sdtrain.evaluation.exposure import Exposure, Stretch, exposure, show_seen, stretches_of
from sdtrain.run_dir import RunDir, append_json_line
from tests.ledgers import BATCH, commit, rollback, start
from tests.support import make_latent_manifest, tiny_page
from tests.takedowns import take_down


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_latent_manifest(tmp_path_factory.mktemp("data"), train=40, validation=8)


@pytest.fixture
def run(manifest: Path, tmp_path: Path) -> RunDir:
    folder = RunDir(tmp_path / "run")
    folder.path.mkdir()
    tiny_page(tmp_path, manifest).rename(folder.config)
    return folder


def write(run: RunDir, *rows: dict[str, Any], last_step: int = 0, attempt: str = "a") -> None:
    for number, row in enumerate(rows):
        append_json_line(run.ledger, {"time": float(number), "attempt": "a"} | row)
    if last_step:
        append_json_line(run.metrics, {"attempt": attempt, "step": last_step, "time": 100.0})


def key_at(manifest: Path, position: int) -> str:
    loaded = Manifest.load(manifest)
    place = order_of(loaded, "train", seed=7, window_shards=2).sample_at(position)
    with loaded.open_shard(loaded.split("train")[place.shard]) as reader:
        return reader.keys[place.sample]


def steps_of(found: Exposure) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    return {one.key: (one.steps, one.lost_steps) for one in found.seen}


def test_surviving_steps_are_counted_as_in_the_metrics(run: RunDir, manifest: Path) -> None:
    write(run, start("a"), commit(2, None), commit(4, 2))
    keys = [key_at(manifest, position) for position in (0, BATCH - 1, BATCH, 4 * BATCH - 1)]
    later = key_at(manifest, 4 * BATCH)
    found = exposure(run.path, [*keys, later, "000010000", "none"])
    assert steps_of(found) == dict(zip(keys, [((1,), ()), ((1,), ()), ((2,), ()), ((4,), ())], strict=True))
    assert (found.not_yet, found.absent, found.last_step) == ((later,), ("000010000", "none"), 4)
    assert (found.is_certain, found.forked_from) == (False, None)


def test_every_epoch_counts(run: RunDir, manifest: Path) -> None:
    write(run, start("a"), commit(10, None))
    every = {key_at(manifest, position) for position in range(40)}
    found = steps_of(exposure(run.path, sorted(every)))
    assert len(found) == 40 and all(len(steps) == 2 and not lost for steps, lost in found.values())


def test_steps_behind_the_last_commit_are_lost_or_not_saved_yet(run: RunDir, manifest: Path) -> None:
    write(run, start("a"), commit(2, None), last_step=4)
    assert steps_of(exposure(run.path, [key_at(manifest, 3 * BATCH)]))[key_at(manifest, 3 * BATCH)] == ((), (4,))
    write(run, start("b", 2), commit(5, 2, "b"))
    assert steps_of(exposure(run.path, [key_at(manifest, 3 * BATCH)]))[key_at(manifest, 3 * BATCH)] == ((4,), ())


def test_a_rollback_loses_what_it_leaves_out_and_goes_on_behind_it(run: RunDir) -> None:
    write(run, start("a"), commit(2, None), rollback(2, (2 * BATCH, 5 * BATCH)))
    write(run, commit(4, 2, first_position=2 * BATCH, last_position=7 * BATCH), last_step=4)
    first, lost, after = stretches_of(run, BATCH)
    assert first == Stretch(0, 2 * BATCH, 2, "a", True)
    assert lost == Stretch(2 * BATCH, 5 * BATCH, 5, "a", False)
    assert after.step == 4 and after.last == 7 * BATCH and after.survives


def test_an_attempt_that_had_the_sample_masked_did_not_see_it(run: RunDir, manifest: Path) -> None:
    early, late = key_at(manifest, 0), key_at(manifest, 2 * BATCH)
    first = take_down(manifest, "unrelated")
    taken = take_down(manifest, early, late)
    try:
        write(run, start("a") | {"takedown_sha256": first.sha256}, commit(2, None))
        write(run, start("b", 2) | {"takedown_sha256": taken.sha256}, commit(10, 2, "b"))
        found = exposure(run.path, [early, late])
        assert steps_of(found) == {early: ((1,), ())} and found.not_yet == (late,)
    finally:
        (manifest.parent / "takedown.json").unlink()


def test_a_fork_names_its_origin_and_a_shown_run_says_it(run: RunDir, manifest: Path, tmp_path: Path, capsys) -> None:
    write(run, start("a") | {"forked_from": {"checkpoint": "/runs/old/checkpoints/step-00000009"}}, commit(2, None))
    keys = tmp_path / "keys.txt"
    keys.write_text("".join(f"{key_at(manifest, position)}\n" for position in range(3)))
    show_seen(run.path, keys)
    printed = capsys.readouterr().out
    assert "origin  it began with weights of /runs/old/checkpoints/step-00000009: look there as well" in printed
    assert "seen    3 samples; 0 were not reached or were masked, 0 are not in its training split" in printed
    show_seen(run.path, keys, as_json=True)
    assert json.loads(capsys.readouterr().out)["last_step"] == 2
    keys.write_text("".join(f"{key_at(manifest, position)}\n" for position in range(16)) + "\n" * 20)
    show_seen(run.path, keys)
    assert "seen    16 samples" in capsys.readouterr().out


def checkpoint_over(run: RunDir, sha256: str) -> None:
    from sdtrain.checkpoints.manifest import MANIFEST, seal

    folder = run.checkpoints / name(2)
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text(seal({"step": 2, "identity": {"data_manifest_sha256": sha256}}))


def test_a_data_set_that_was_built_anew_is_looked_up_under_its_old_name(run: RunDir, manifest: Path) -> None:
    write(run, start("a"), commit(2, None))
    kept = manifest.read_text()
    old = Manifest.load(manifest)
    checkpoint_over(run, old.sha256)
    assert exposure(run.path, []).is_certain
    manifest.unlink()
    make_latent_manifest(manifest.parent / "new", train=24, validation=8)
    page = json.loads((manifest.parent / "new" / "manifest.json").read_text())
    for shard in page["shards"]:
        shard["path"] = f"new/{shard['path']}"
    from sdtrain.data.manifest import ShardEntry, write_manifest

    entries = [ShardEntry(**(row | {"fields": tuple(row["fields"])})) for row in page["shards"]]
    write_manifest(manifest, entries, fingerprint=page["fingerprint"])
    try:
        with pytest.raises(DataError, match=rf"was trained on {old.sha256}; put that manifest back to learn"):
            exposure(run.path, [])
        older = manifest.with_name(f"manifest.superseded-{old.sha256[:12]}.json")
        older.write_text(kept)
        found = exposure(run.path, [])
        assert (found.manifest, found.manifest_sha256, found.is_certain) == (str(older), old.sha256, True)
    finally:
        manifest.write_text(kept)


def test_what_is_no_run_or_no_list_is_said_so(run: RunDir, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run: holds no ledger.jsonl and config.yaml of a run; give the run_dir of"):
        exposure(run.path, [])
    write(run, start("a"))
    with pytest.raises(ConfigError, match=r"none.txt: cannot be read .*; give a text file with one sample key in each"):
        show_seen(run.path, tmp_path / "none.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"binary: cannot be read"):
        show_seen(run.path, tmp_path / "binary")
