"""A run whose folder is lost goes on from its copies in a store, with the same bits and the same proof."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sdtrain.checkpoints.manifest import list_checkpoints
from sdtrain.checkpoints.recut import KINDS, assemble
from sdtrain.evaluation.inspect_run import examine
from sdtrain.run_dir import RunDir
from tests.engines import one_rank, sdtrain
from tests.support import make_latent_manifest, tiny_page

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Data, and a run of 6 steps that uploads nothing."""
    folder = tmp_path_factory.mktemp("world")
    make_latent_manifest(folder / "data", train=40, validation=8)
    (folder / "whole").mkdir()
    with one_rank():
        assert sdtrain("train", tiny_page(folder / "whole", folder / "data" / "manifest.json")) == 0
        yield folder


def same_end(one: RunDir, other: RunDir) -> bool:
    newest = [list_checkpoints(run.checkpoints)[0] for run in (one, other)]
    assert [checkpoint.step for checkpoint in newest] == [6, 6]
    states = [[assemble(checkpoint, "denoiser", kind) for kind in KINDS] for checkpoint in newest]
    return all(
        torch.equal(mine[name], theirs[name])
        for mine, theirs in zip(*states, strict=True)
        for name in mine.keys() | theirs.keys()
    )


def test_a_lost_run_folder_costs_nothing_but_the_steps_since_the_last_copy(world: Path, tmp_path: Path) -> None:
    url = (tmp_path / "store").as_uri()
    page = tiny_page(tmp_path, world / "data" / "manifest.json", checkpoint={"upload_to": url, "upload_keep": "same"})
    run = RunDir(tmp_path / "run")
    assert sdtrain("train", page) == 0
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == [
        "ledger.jsonl",
        "step-00000004",
        "step-00000006",
    ], "the end of a run waits for its uploads"
    shutil.rmtree(tmp_path / "store" / "step-00000006")
    shutil.rmtree(run.path)
    assert sdtrain("train", page) == 0
    start = [row for row in run.ledger_rows() if row["event"] == "start"][-1]
    assert (start["resumed_from"], start["step"]) == ("step-00000004", 4)
    assert same_end(run, RunDir(world / "whole" / "run"))
    found = examine(run.path)
    assert found.lineage.problems == ()
    assert "exactly once" in found.lineage.verdict
    assert [bool(entry.uploaded) for entry in found.checkpoints] == [True, True]


def test_a_run_begins_where_a_url_says(world: Path, tmp_path: Path) -> None:
    url = (tmp_path / "store").as_uri()
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    first = tiny_page(tmp_path / "first", world / "data" / "manifest.json", checkpoint={"upload_to": url})
    assert sdtrain("train", first) == 0
    second = tiny_page(tmp_path / "second", world / "data" / "manifest.json")
    assert sdtrain("train", second, "--resume", f"{url}/step-00000002") == 0
    run = RunDir(tmp_path / "second" / "run")
    start = next(row for row in run.ledger_rows() if row["event"] == "start" and row["resumed_from"])
    assert (start["resumed_from"], start["step"]) == ("step-00000002", 2)
    assert same_end(run, RunDir(world / "whole" / "run"))
    assert sdtrain("train", second, "--resume", f"{url}/step-00000099") == 4
    left = run.read_exit()
    assert left is not None
    said = f"CheckpointError: {url}/step-00000099: no complete checkpoint lies there; {url} holds step-00000006, "
    assert left.reason.startswith(said)


def test_a_store_that_nothing_opens_is_a_config_error(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    page = tiny_page(tmp_path, world / "data" / "manifest.json", checkpoint={"upload_to": "nonsense://x"})
    assert sdtrain("train", page) == 2
    assert "nonsense://x: cannot be opened as a store of checkpoints" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
