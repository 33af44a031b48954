"""Copies of checkpoints in a store: complete or not there, sent on after an interruption, verified on the way back."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from sdtrain.checkpoints import remote
from sdtrain.checkpoints.manifest import Checkpoint, list_aside, list_checkpoints, set_aside
from sdtrain.checkpoints.protocol import commit, verify
from sdtrain.checkpoints.remote import JOURNAL, Backoff, RemoteStore, fetch, find_or_fetch, is_url
from sdtrain.checkpoints.retention import Retention
from sdtrain.checkpoints.uploader import Uploader
from sdtrain.errors import CheckpointError, ConfigError, ExitCode, StorageError
from sdtrain.run_dir import RunDir

FILE = "extra.rank00000.safetensors"
OTHER = "denoiser.rank00000.safetensors"
QUICK = Backoff(attempts=3, first_seconds=0.01)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    return run


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"memory://{uuid.uuid4().hex}/run" if request.param == "memory" else (tmp_path / "store" / "run").as_uri()


@pytest.fixture
def place(tmp_path: Path) -> str:
    return (tmp_path / "store").as_uri()


def save(run: RunDir, step: int, *, name: str = "first", loss: float | None = None, value: float = 0.0) -> Checkpoint:
    """Commit a checkpoint and its ledger row."""
    facts: dict[str, Any] = {"run": name} if loss is None else {"run": name, "figures": {"validation/loss": loss}}
    files = {file: {"x": torch.full((2000,), step + value)} for file in (FILE, OTHER)}
    path = commit(run.checkpoints, step=step, attempt="a", files=files, facts=facts, texts={"config.yaml": "a: 1\n"})
    assert path is not None
    run.log("commit", attempt="a", step=step, checkpoint=path.name)
    return Checkpoint.open(path)


def names(store: RemoteStore) -> list[str]:
    return [checkpoint.path.name for checkpoint in store.checkpoints()]


def local(url: str) -> Path:
    return Path(url.removeprefix("file://"))


# The store ------------------------------------------------------------------------------------------------------------


def test_what_was_sent_comes_back_bit_by_bit(url: str, run: RunDir, tmp_path: Path) -> None:
    store = RemoteStore(url)
    assert names(store) == []
    for step in (1, 2):
        assert store.upload(save(run, step)) > 16_000
    assert names(store) == ["step-00000002", "step-00000001"]
    assert store.upload(Checkpoint.open(run.checkpoints / "step-00000001")) == 0
    store.put_ledger(run)
    other = RunDir(tmp_path / "other")
    found = fetch(f"{url}/", other, attempt="b", backoff=QUICK)
    assert found is not None
    assert found.path == other.checkpoints / "step-00000002"
    assert verify(found) == []
    assert found.manifest == Checkpoint.open(run.checkpoints / "step-00000002").manifest
    assert (found.path / "MANIFEST.json").read_bytes() == (
        run.checkpoints / "step-00000002" / "MANIFEST.json"
    ).read_bytes()
    assert other.ledger.read_bytes() == run.ledger.read_bytes()
    named = fetch(f"{url}/step-00000001", other, attempt="b", backoff=QUICK)
    assert named is not None
    assert named.step == 1
    assert sorted(path.name for path in other.checkpoints.iterdir()) == ["LATEST", "step-00000001", "step-00000002"]


def test_the_manifest_comes_last_and_an_interrupted_upload_goes_on(
    url: str, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, store = save(run, 1), RemoteStore(url)
    sent: list[str] = []
    real = RemoteStore._put

    def put(self: RemoteStore, source: Path, target: str) -> int:
        if len(sent) == 1:
            raise ConnectionError("reset by peer")
        sent.append(source.name)
        return real(self, source, target)

    monkeypatch.setattr(RemoteStore, "_put", put)
    with pytest.raises(ConnectionError):
        store.upload(checkpoint)
    assert names(store) == []
    first = sent[:]
    sent += ["go on"]
    RemoteStore(url).upload(checkpoint)
    assert sent == [*first, "go on", *[file for file in checkpoint.files if file not in first], "MANIFEST.json"]
    assert names(store) == ["step-00000001"]
    assert set(store._listing()["step-00000001"]) == {*checkpoint.files, "MANIFEST.json"}, "no journal is left"


def test_leftovers_of_other_bytes_are_not_taken_for_this_checkpoint(place: str, run: RunDir, tmp_path: Path) -> None:
    """A file may have the right length and belong to another attempt at the same step."""
    store, other = RemoteStore(place), RunDir(tmp_path / "other")
    store.upload(save(other, 1, value=0.5))
    (local(place) / "step-00000001" / "MANIFEST.json").unlink()
    (local(place) / "step-00000001" / JOURNAL).write_text("of another manifest")
    checkpoint = save(run, 1)
    store.upload(checkpoint)
    for file in checkpoint.files:
        assert (local(place) / "step-00000001" / file).read_bytes() == (checkpoint.path / file).read_bytes()


def test_a_replayed_step_replaces_its_copy_and_another_run_s_is_refused(url: str, run: RunDir, tmp_path: Path) -> None:
    store, again, foreign = RemoteStore(url), RunDir(tmp_path / "again"), RunDir(tmp_path / "foreign")
    store.upload(save(run, 1))
    replayed = save(again, 1, value=0.25)
    store.upload(replayed)
    assert store.checkpoints()[0].manifest == replayed.manifest
    with pytest.raises(ConfigError) as raised:
        store.upload(save(foreign, 1, name="second"))
    assert str(raised.value) == (
        f"{url}: holds step-00000001 of another run (started as first, this one as second): nothing is overwritten. "
        "Give checkpoint.upload_to a folder of its own."
    )
    assert RemoteStore(url).checkpoints()[0].manifest == replayed.manifest


def test_a_file_that_arrives_short_is_noticed(place: str, run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RemoteStore(place)
    real = store._fs.put_file

    def cut(source: str, target: str) -> None:
        real(source, target)
        Path(target).write_bytes(Path(target).read_bytes()[:-1])

    monkeypatch.setattr(store._fs, "put_file", cut)
    with pytest.raises(OSError, match=r"of \d+ bytes arrived"):
        store.upload(save(run, 1))
    assert names(store) == []


def test_a_half_deleted_one_is_none(place: str, run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RemoteStore(place)
    store.upload(save(run, 1))

    def stop(path: str, recursive: bool) -> None:
        raise OSError("gone away")

    monkeypatch.setattr(store._fs, "rm", stop)
    with pytest.raises(OSError, match="gone away"):
        store.delete("step-00000001")
    assert sorted(path.name for path in (local(place) / "step-00000001").iterdir()) == ["config.yaml", OTHER, FILE]
    assert names(store) == []


@pytest.mark.parametrize(
    ("text", "expected"), [("s3://b/run", True), ("file:///x", True), ("/x/y", False), ("x", False)]
)
def test_urls_are_told_from_folders(text: str, expected: bool) -> None:
    assert is_url(text) is expected


def test_a_url_that_nothing_opens_is_refused() -> None:
    with pytest.raises(ConfigError) as raised:
        RemoteStore("nonsense://x/y")
    assert str(raised.value).startswith("nonsense://x/y: cannot be opened as a store of checkpoints: ")
    assert "Give a URL such as s3://BUCKET/RUN (needs the package s3fs)" in str(raised.value)


# Resuming -------------------------------------------------------------------------------------------------------------


def damage(place: str, step: int) -> None:
    path = local(place) / f"step-{step:08d}" / FILE
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")


@pytest.fixture
def filled(place: str, run: RunDir) -> str:
    for step in (1, 2):
        RemoteStore(place).upload(save(run, step))
    return place


def test_a_damaged_copy_is_named_and_the_older_one_is_taken(
    filled: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(filled, 2)
    run = RunDir(tmp_path / "new")
    found = find_or_fetch(run, "auto", store_url=filled, attempt="b")
    assert found is not None
    assert found.step == 1
    assert f"{filled}/step-00000002 is damaged and not used: {FILE}: bytes were changed" in caplog.text
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["LATEST", "step-00000001"]


def test_where_all_copies_are_damaged_nothing_starts(filled: str, tmp_path: Path) -> None:
    damage(filled, 1)
    damage(filled, 2)
    with pytest.raises(CheckpointError) as raised:
        fetch(filled, RunDir(tmp_path / "new"), attempt="b", backoff=QUICK)
    assert raised.value.exit_code == ExitCode.CHECKPOINT
    assert str(raised.value) == (
        f"{filled}: 2 checkpoints are there and none is valid:\n"
        f"  step-00000002: {FILE}: bytes were changed\n"
        f"  step-00000001: {FILE}: bytes were changed\n"
        "Nothing was changed. Restore one of them, or start afresh with --resume never and another "
        "checkpoint.upload_to."
    )


def test_the_run_s_own_folder_comes_first(filled: str, run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **more: Any) -> None:
        raise AssertionError("the store was asked")

    monkeypatch.setattr(remote, "fetch", refuse)
    found = find_or_fetch(run, "auto", store_url=filled, attempt="b")
    assert found is not None
    assert found.path == run.checkpoints / "step-00000002"


def test_a_store_that_cannot_be_asked_is_no_fresh_start(
    filled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def refuse(self: RemoteStore) -> list[Checkpoint]:
        calls.append(1)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(RemoteStore, "checkpoints", refuse)
    with pytest.raises(StorageError) as raised:
        fetch(filled, RunDir(tmp_path / "new"), attempt="b", backoff=QUICK)
    assert str(raised.value) == (
        f"{filled}: cannot be asked for checkpoints: ConnectionError: no route to host. Start again when it can be "
        "reached; --resume never starts afresh without asking."
    )
    assert len(calls) == 3


def test_a_download_that_breaks_is_tried_again_and_then_ends_the_start(
    filled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = RemoteStore.download, [2]

    def flaky(self: RemoteStore, name: str, file: str, target: Path) -> Any:
        if left[0]:
            left[0] -= 1
            target.write_bytes(b"half")
            raise ConnectionError("reset by peer")
        return real(self, name, file, target)

    monkeypatch.setattr(RemoteStore, "download", flaky)
    run = RunDir(tmp_path / "new")
    found = fetch(filled, run, attempt="b", backoff=QUICK)
    assert found is not None
    assert verify(found) == []
    left[0] = 99
    other = RunDir(tmp_path / "other")
    with pytest.raises(StorageError) as raised:
        fetch(filled, other, attempt="b", backoff=QUICK)
    assert str(raised.value) == (
        f"{filled}/step-00000002: could not be brought to {other.checkpoints} (the log says why). Start again when "
        "store and disk can be used."
    )
    assert list(other.checkpoints.iterdir()) == []


def test_never_asks_the_store_too(filled: str, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "new")
    with pytest.raises(ConfigError) as raised:
        find_or_fetch(run, "never", store_url=filled, attempt="b")
    assert str(raised.value) == (
        f"checkpoint.upload_to = {filled}: holds 2 checkpoints (newest step-00000002) and resume is 'never'; resume "
        "with 'auto', or give checkpoint.upload_to a folder of its own: nothing is overwritten"
    )
    empty = filled.replace("store", "empty")
    assert find_or_fetch(run, "never", store_url=empty, attempt="b") is None
    assert find_or_fetch(run, "auto", store_url=empty, attempt="b") is None


def test_what_is_named_must_be_there(filled: str, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "new")
    with pytest.raises(CheckpointError) as raised:
        find_or_fetch(run, f"{filled}/step-00000007", store_url=None, attempt="b")
    assert str(raised.value) == (
        f"{filled}/step-00000007: no complete checkpoint lies there; {filled} holds step-00000002, step-00000001"
    )
    empty = filled.replace("store", "empty")
    with pytest.raises(CheckpointError, match=f"{empty}: holds no complete checkpoint to resume from"):
        find_or_fetch(run, empty, store_url=None, attempt="b")


def test_another_checkpoint_of_the_same_step_is_not_overwritten(filled: str, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "new")
    mine = save(run, 2, value=0.5)
    with pytest.raises(ConfigError) as raised:
        fetch(filled, run, attempt="b", backoff=QUICK)
    assert str(raised.value) == (
        f"{mine.path}: stands already and is another checkpoint than {filled}/step-00000002: nothing is overwritten. "
        "Resume from the local one, or choose another run_dir, or move the folder away."
    )


def test_a_ledger_that_cannot_be_read_costs_only_the_proof(
    filled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: RemoteStore, run: RunDir) -> str:
        raise PermissionError("denied")

    monkeypatch.setattr(RemoteStore, "ledger", refuse)
    assert fetch(filled, RunDir(tmp_path / "new"), attempt="b", backoff=QUICK) is not None
    assert "its ledger could not be read (denied): the order of samples cannot be proven" in caplog.text


# Beside training ------------------------------------------------------------------------------------------------------

MakeUploader = Callable[..., Uploader]


@pytest.fixture
def uploader(run: RunDir, url: str) -> MakeUploader:
    return lambda **more: Uploader(run, RemoteStore(url), **({"backoff": QUICK} | more))


def uploads(run: RunDir, event: str = "upload") -> list[str]:
    return [row["checkpoint"] for row in run.ledger_rows() if row["event"] == event]


def test_everything_gets_there_newest_first_and_is_told_once(run: RunDir, url: str, uploader: MakeUploader) -> None:
    for step in (1, 2):
        save(run, step)
    thread = uploader()
    thread.look()
    assert thread.wait(10)
    assert uploads(run) == ["step-00000002", "step-00000001"]
    save(run, 3)
    thread.look()
    assert thread.wait(10)
    assert names(RemoteStore(url)) == ["step-00000003", "step-00000002", "step-00000001"]
    again = uploader()
    again.look()
    assert again.wait(10)
    assert uploads(run) == ["step-00000002", "step-00000001", "step-00000003"]
    row = next(row for row in run.ledger_rows() if row["event"] == "upload")
    assert (row["url"], row["size_bytes"] > 16_000, row["seconds"] >= 0) == (url, True, True)
    assert RemoteStore(url).ledger(run) == run.ledger.read_text()


def test_damaged_ones_are_not_sent(run: RunDir, url: str, uploader: MakeUploader) -> None:
    for step in (1, 2, 3):
        save(run, step)
    (run.checkpoints / "step-00000003" / "CORRUPT").touch()
    (run.checkpoints / "step-00000002" / "MANIFEST.json").write_text("{}")
    thread = uploader()
    thread.look()
    assert thread.wait(10)
    assert names(RemoteStore(url)) == ["step-00000001"]


def test_a_store_that_is_down_is_an_alert_and_the_next_commit_tries_again(
    run: RunDir, url: str, uploader: MakeUploader, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    down = [True]
    real = RemoteStore.upload

    def upload(self: RemoteStore, checkpoint: Checkpoint) -> int:
        if down[0]:
            raise ConnectionError("no route to host")
        return real(self, checkpoint)

    monkeypatch.setattr(RemoteStore, "upload", upload)
    thread = uploader()
    save(run, 1)
    thread.look()
    assert thread.wait(10)
    assert caplog.text.count("upload of step-00000001") == 3
    assert (
        f"upload of step-00000001 to {url} given up (ConnectionError: no route to host); training goes on, tried again "
        "after the next checkpoint"
    ) in caplog.text
    assert (uploads(run), uploads(run, "upload_failed")) == ([], ["step-00000001"])
    down[0] = False
    save(run, 2)
    thread.look()
    assert thread.wait(10)
    assert uploads(run) == ["step-00000002", "step-00000001"]


def test_another_run_s_folder_is_an_alert_and_nothing_is_sent_any_more(
    run: RunDir, url: str, uploader: MakeUploader, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    RemoteStore(url).upload(save(RunDir(tmp_path / "other"), 1, name="second"))
    save(run, 1)
    thread = uploader()
    thread.look()
    assert thread.wait(10)
    assert "holds step-00000001 of another run (started as second, this one as first)" in caplog.text
    assert "training goes on, nothing is uploaded any more" in caplog.text
    save(run, 2)
    thread.look()
    assert thread.wait(10)
    assert names(RemoteStore(url)) == ["step-00000001"]


def test_the_store_may_keep_what_the_folder_keeps(run: RunDir, url: str, uploader: MakeUploader) -> None:
    thread = uploader(retention=Retention(keep_last=2, keep_best=1))
    thread.resumed_from = "step-00000001"
    for step, loss in ((1, 0.9), (2, 0.1), (3, 0.4), (4, 0.3), (5, 0.5), (6, 0.6)):
        save(run, step, loss=loss)
        if step == 3:
            (run.checkpoints / "step-00000003" / "PINNED").touch()
        thread.look()
        assert thread.wait(10)
    assert names(RemoteStore(url)) == [f"step-0000000{step}" for step in (6, 5, 3, 2, 1)]


def test_one_that_went_before_it_was_sent_leaves_nothing(
    run: RunDir, url: str, uploader: MakeUploader, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(run, 1)
    real = RemoteStore._put
    seen: list[str | None] = []
    thread = uploader()

    def put(self: RemoteStore, source: Path, target: str) -> int:
        sent = real(self, source, target)
        seen.append(thread.uploading)
        source.parent.rename(run.path / "gone")
        return sent

    monkeypatch.setattr(RemoteStore, "_put", put)
    thread.look()
    assert thread.wait(10)
    assert seen == ["step-00000001"]
    assert uploads(run) == uploads(run, "upload_failed") == []
    fs, root = fsspec.url_to_fs(url)
    fs.invalidate_cache()
    assert [path for path in fs.find(root) if "step-" in path] == []


def aside(run: RunDir, step: int) -> None:
    """What a rollback does in the folder; it dies, or nobody looks, right after."""
    set_aside(Checkpoint.open(run.checkpoints / f"step-{step:08d}"))


def test_what_was_rolled_back_goes_from_the_store_even_by_the_next_attempt(
    run: RunDir, url: str, uploader: MakeUploader, tmp_path: Path
) -> None:
    for step in (1, 2, 3):
        save(run, step)
    thread = uploader()
    thread.look()
    assert thread.wait(10)
    for step in (3, 2):
        aside(run, step)
    assert names(RemoteStore(url))[0] == "step-00000003", "killed before the store heard of it"
    run.log("rollback", attempt="a", checkpoint="step-00000001")
    follower = uploader()
    follower.look()
    assert follower.wait(10)
    assert names(RemoteStore(url)) == ["step-00000001"]
    assert sorted(uploads(run, "withdraw")) == ["step-00000002", "step-00000003"]
    assert RemoteStore(url).ledger(run) == run.ledger.read_text(), "the store knows what was left out"
    found = find_or_fetch(RunDir(tmp_path / "new"), "auto", store_url=url, attempt="b")
    assert found is not None
    assert found.step == 1


def test_a_step_that_was_committed_again_stays_in_the_store(run: RunDir, url: str, uploader: MakeUploader) -> None:
    save(run, 1)
    save(run, 2)
    thread = uploader()
    thread.look()
    assert thread.wait(10)
    aside(run, 2)
    again = save(run, 2, value=0.5)
    for one in (thread, uploader()):
        one.look()
        assert one.wait(10)
        assert RemoteStore(url).checkpoints()[0].manifest == again.manifest
    assert names(RemoteStore(url)) == ["step-00000002", "step-00000001"]


def test_a_store_that_is_down_is_asked_again_for_what_was_rolled_back(
    run: RunDir, url: str, uploader: MakeUploader, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(run, 1)
    save(run, 2)
    thread = uploader()
    thread.look()
    assert thread.wait(10)
    aside(run, 2)
    real, failures = RemoteStore.delete, [4]

    def delete(self: RemoteStore, name: str) -> None:
        failures[0] -= 1
        if failures[0] >= 0:
            raise ConnectionError("no route to host")
        real(self, name)

    monkeypatch.setattr(RemoteStore, "delete", delete)
    thread.look()
    assert thread.wait(10)
    assert f"withdrawal from {url} of what was rolled back failed (ConnectionError: no route to host)" in caplog.text
    assert names(RemoteStore(url))[0] == "step-00000002"
    thread.look()
    assert thread.wait(10)
    assert names(RemoteStore(url)) == ["step-00000001"]


def test_only_whole_names_count_as_set_aside(run: RunDir) -> None:
    for step in (1, 2):
        save(run, step)
    aside(run, 2)
    (run.checkpoints / "step-00000001.corrupt-a-1234").mkdir()
    assert [checkpoint.step for checkpoint in list_aside(run.checkpoints)] == [2]
    assert [checkpoint.step for checkpoint in list_checkpoints(run.checkpoints)] == [1]
    assert list_aside(run.path / "nowhere") == []
