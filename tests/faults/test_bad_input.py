"""What a run must refuse: one clear message, a typed exit code, no traceback, and nothing touched."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sdtrain import cli
from sdtrain.checkpoints.manifest import MANIFEST, seal, unseal
from sdtrain.errors import ExitCode
from sdtrain.run_dir import RunDir
from tests.faults.confined import NOT_ALLOWED, everything
from tests.ranks import Ranks, Start
from tests.support import make_latent_manifest, tiny_page

pytestmark = pytest.mark.heavy

LIMIT_SECONDS = 30.0


@dataclass(frozen=True)
class Place:
    """A folder with data, a page and, after `train`, a run."""

    folder: Path

    @property
    def page(self) -> Path:
        return self.folder / "train.yaml"

    @property
    def manifest(self) -> Path:
        return self.folder / "data" / "manifest.json"

    @property
    def run(self) -> RunDir:
        return RunDir(self.folder / "run")

    @property
    def checkpoint(self) -> Path:
        return self.run.checkpoints / "step-00000003"

    def write_page(self, **sections: Any) -> Path:
        trainer = {"max_steps": 3, "timeout_seconds": LIMIT_SECONDS}
        return tiny_page(self.folder, self.manifest, trainer=trainer, checkpoint={"every_steps": 3}, **sections)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Place:
    """A run of three steps; nobody changes it, which is what all of this is about."""
    place = Place(tmp_path_factory.mktemp("stopped"))
    make_latent_manifest(place.folder / "data", train=16, validation=8)
    start = ranks.run(1, "-m", "sdtrain", "train", place.write_page(), timeout=LIMIT_SECONDS)
    assert start.codes == [0], start.said()
    return place


@pytest.fixture
def fresh(stopped: Place, tmp_path: Path) -> Place:
    """A page of its own over the same data, without a run."""
    (tmp_path / "data").symlink_to(stopped.folder / "data")
    place = Place(tmp_path)
    place.write_page()
    return place


def message(start: Start) -> str:
    """What the refused ranks said: one message, once, and nothing else."""
    said = start.log.read_text(encoding="utf-8")
    assert "Traceback" not in said
    assert said.startswith("sdtrain: ")
    assert said.count("sdtrain: ") == 1
    return said.removeprefix("sdtrain: ").rstrip("\n")


def refused(ranks: Ranks, code: ExitCode, folder: Path, *arguments: object, world_size: int = 1) -> str:
    """The message of a start that is refused by all ranks and changes nothing in `folder`."""
    before = everything(folder)
    start = ranks.run(world_size, "-m", "sdtrain", "train", *arguments, timeout=LIMIT_SECONDS)
    assert start.codes == [int(code)] * world_size, start.said()
    assert everything(folder) == before
    return message(start)


# A page that is not the run's -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "difference", "world_size"),
    [
        ("denoiser.arch.channels=[16,48]", "  denoiser.arch.channels: [16, 32] -> [16, 48]\n", 2),
        ("data.batch_size=4", "  data.batch_size: 8 -> 4\n", 1),
    ],
)
def test_another_page_cannot_resume_a_run(
    stopped: Place, ranks: Ranks, setting: str, difference: str, world_size: int
) -> None:
    said = refused(
        ranks, ExitCode.CONFIG, stopped.folder, stopped.page, "trainer.max_steps=6", setting, world_size=world_size
    )
    assert said.startswith(
        f"this page cannot resume the run that stands in its folder (checkpoint -> page):\n{difference}"
    )
    assert "Set these keys back, or start another run: run_dir=NEW_FOLDER." in said


def test_a_batch_that_its_ranks_cannot_share_is_refused_before_anything_is_made(fresh: Place, ranks: Ranks) -> None:
    said = refused(ranks, ExitCode.CONFIG, fresh.folder, fresh.page, "data.micro_batch_size=8", world_size=2)
    assert "the number of ranks may be 1" in said
    assert not fresh.run.path.exists()


def test_a_start_from_nothing_over_checkpoints_is_refused(stopped: Place, ranks: Ranks) -> None:
    said = refused(ranks, ExitCode.CONFIG, stopped.folder, stopped.page, "--resume", "never")
    assert said.startswith(
        f"{stopped.run.checkpoints}: holds 1 checkpoints (newest step-00000003) and resume is 'never'"
    )


# Data that are not the run's ------------------------------------------------------------------------------------------


def test_another_data_set_cannot_resume_a_run(stopped: Place, ranks: Ranks, tmp_path: Path) -> None:
    other = make_latent_manifest(tmp_path / "other", train=16, validation=8)
    said = refused(ranks, ExitCode.CONFIG, stopped.folder, stopped.page, f"data.manifest={other}")
    assert f'  data.manifest: "{stopped.manifest}" -> "{other}"\n' in said


def test_other_data_of_the_same_name_cannot_resume_a_run(stopped: Place, ranks: Ranks, tmp_path: Path) -> None:
    place = moved(stopped, tmp_path)
    shutil.rmtree(place.manifest.parent)
    make_latent_manifest(place.manifest.parent, train=32, validation=8)
    said = refused(ranks, ExitCode.CHECKPOINT, place.folder, place.page, world_size=2)
    assert said.startswith(f"{place.checkpoint}: belongs to another run:\n  data_manifest_sha256: ")
    assert said.endswith("restore these settings, or choose another run_dir for a new run.")


def moved(place: Place, folder: Path) -> Place:
    """A copy whose page, and the one inside its checkpoint, name the copied data."""
    copy = Place(folder / "moved")
    shutil.copytree(place.folder, copy.folder)
    copy.write_page()
    config = copy.checkpoint / "config.yaml"
    config.write_text(config.read_text().replace(str(place.folder), str(copy.folder)))
    manifest = copy.checkpoint / MANIFEST
    content = unseal(manifest.read_text())
    written = {"sha256": hashlib.sha256(config.read_bytes()).hexdigest(), "size_bytes": config.stat().st_size}
    content["files"]["config.yaml"] |= written
    manifest.write_text(seal(content))
    return copy


def edited(manifest: Path) -> None:
    manifest.write_text(manifest.read_text().replace('"num_samples": 16', '"num_samples": 15'))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [(edited, "manifests are never edited, write a new one"), (Path.unlink, "cannot read the manifest: No such file")],
    ids=["edited", "missing"],
)
def test_a_manifest_that_was_edited_or_is_gone_is_refused(
    stopped: Place, ranks: Ranks, tmp_path: Path, spoil: Callable[[Path], None], said: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(stopped.folder, folder)
    spoil(folder / "data" / "manifest.json")
    page = Place(folder).write_page()
    found = refused(ranks, ExitCode.DATA, folder, page)
    assert found.startswith(f"{folder / 'data' / 'manifest.json'}: ")
    assert said in found


# Checkpoints that are none --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nowhere", "no such checkpoint folder"),
        ("train.yaml", "no such checkpoint folder"),
        ("data", "holds no checkpoint"),
        ("run", "no checkpoint, but it holds some, the newest is {run}/checkpoints/step-00000003"),
        ("run/checkpoints", "no checkpoint, but it holds some, the newest is {run}/checkpoints/step-00000003"),
    ],
)
def test_a_path_that_is_no_checkpoint_is_refused(
    stopped: Place, capsys: pytest.CaptureFixture[str], name: str, why: str
) -> None:
    path, before = stopped.folder / name, everything(stopped.folder)
    with pytest.raises(SystemExit) as left:
        cli.main(["train", str(stopped.page), "--resume", str(path)])
    assert left.value.code == ExitCode.CONFIG
    why = why.format(run=stopped.run.path)
    assert capsys.readouterr().err == (
        f"sdtrain: --resume {path}: {why}; give auto, never, a folder such as RUN/checkpoints/step-N or a URL such as "
        "s3://BUCKET/RUN/step-N\n"
    )
    assert everything(stopped.folder) == before


# Folders that cannot be a run's ---------------------------------------------------------------------------------------


def test_a_file_is_no_run_s_folder(fresh: Place, ranks: Ranks) -> None:
    fresh.run.path.write_text("thesis")
    said = refused(ranks, ExitCode.CONFIG, fresh.folder, fresh.page)
    assert said == f"run_dir = {fresh.run.path}: {fresh.run.path} is a file; give a new folder, or the folder of a run"


def test_a_folder_of_something_else_is_not_made_a_run_s(fresh: Place, ranks: Ranks) -> None:
    fresh.run.path.mkdir()
    for name in ("photo-1.jpg", "photo-2.jpg", "slurm-17.out", "checkpoints"):
        (fresh.run.path / name).touch()
    said = refused(ranks, ExitCode.CONFIG, fresh.folder, fresh.page, world_size=2)
    assert said == (
        f"run_dir = {fresh.run.path}: not a run's folder: it holds photo-1.jpg, photo-2.jpg, and no ledger.jsonl of a "
        "run. Give a new or an empty folder, or the folder of a run to go on with it; nothing was touched"
    )


# Disks ----------------------------------------------------------------------------------------------------------------


Confined = Callable[..., tuple[Start, dict[str, Any]]]


@pytest.fixture
def confined(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Confined:
    """Run with a folder confined; how the ranks ended, and what rank 0 saw in the folder before and after."""
    answer = tmp_path_factory.mktemp("confined") / "answer"

    def run(how: str, folder: Path, *arguments: object, world_size: int = 1) -> tuple[Start, dict[str, Any]]:
        command = ("-m", "tests.faults.confined", answer, how, folder, "train", *arguments)
        start = ranks.run(world_size, *command, timeout=LIMIT_SECONDS)
        if NOT_ALLOWED in start.codes:
            pytest.skip(start.said())
        assert str(folder) not in Path("/proc/self/mounts").read_text(), "the mount ended with the process"
        return start, json.loads(Path(f"{answer}.0").read_text())

    return run


@pytest.mark.parametrize("name", ["run", "."], ids=["of a run", "of a run to be"])
def test_a_read_only_folder_is_refused(stopped: Place, fresh: Place, confined: Confined, name: str) -> None:
    place = stopped if name == "run" else fresh
    before = everything(place.folder)
    start, _ = confined("read-only", place.folder / name, place.page, "trainer.max_steps=6", world_size=2)
    assert start.codes == [ExitCode.STORAGE] * 2, start.said()
    assert message(start) == f"run_dir: {place.folder / name} cannot be written to: {READ_ONLY}"
    assert everything(place.folder) == before


READ_ONLY = "its file system is mounted read-only. Make it writable, or give another run_dir; nothing was touched"


def test_what_one_rank_alone_finds_is_told_under_its_name(fresh: Place, confined: Confined) -> None:
    """As on a node that mounted the shared folder another way."""
    before = everything(fresh.folder)
    start, _ = confined("read-only@1", fresh.folder, fresh.page, world_size=2)
    assert start.codes == [ExitCode.STORAGE] * 2, start.said()
    assert message(start) == f"rank 1: run_dir: {fresh.folder} cannot be written to: {READ_ONLY}"
    assert everything(fresh.folder) == before


NO_ROOM = " for one checkpoint: training could not save. Free some space, or give another run_dir; nothing was touched"


@pytest.mark.parametrize(
    ("disk", "why"),
    [("size=300k", "0.3 MiB free, 28.5 MiB needed"), ("size=64m,nr_inodes=4", "3 inodes free, 10 needed")],
)
def test_no_room_for_the_first_checkpoint_is_refused(fresh: Place, confined: Confined, disk: str, why: str) -> None:
    fresh.run.path.mkdir()
    start, told = confined(disk, fresh.run.path, fresh.page)
    assert start.codes == [ExitCode.STORAGE], start.said()
    assert message(start) == f"{fresh.run.checkpoints}: {why}{NO_ROOM}"
    assert told["after"] == told["before"]


def test_no_room_for_another_checkpoint_is_refused_unless_a_killed_attempt_left_some(
    stopped: Place, fresh: Place, confined: Confined
) -> None:
    shutil.copytree(stopped.run.checkpoints, fresh.run.checkpoints)
    resume = (fresh.run.path, stopped.page, f"run_dir={fresh.run.path}", "trainer.max_steps=4")
    start, told = confined("size=48m", *resume)
    assert start.codes == [ExitCode.STORAGE], start.said()
    assert message(start).endswith(NO_ROOM)
    assert told["after"] == told["before"]
    left = fresh.run.checkpoints / "step-00000004.tmp-killed"
    left.mkdir()
    (left / "denoiser.rank00000.safetensors").write_bytes(bytes(30 * 2**20))
    start, _ = confined("size=84m", *resume)
    assert start.codes == [0], start.said()


@pytest.mark.long
def test_who_keeps_more_checkpoints_than_the_disk_holds_is_warned(fresh: Place, confined: Confined) -> None:
    fresh.run.path.mkdir()
    start, _ = confined("size=64m", fresh.run.path, fresh.page, "checkpoint.every_steps=1")
    warning = f"{fresh.run.checkpoints}: 64.0 MiB free, 84.9 MiB needed for the 3 checkpoints of 28.2 MiB that section "
    assert warning + "checkpoint keeps at a time: free some space, or keep fewer, before saves fail\n" in start.said()
    assert start.codes == [ExitCode.STORAGE], "and so it came"
