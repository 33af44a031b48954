"""A data set on a real S3 server that goes away, answers 503 and cuts bodies off, with readers that are killed."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdtrain.data.dataset import ShardDataset
from sdtrain.data.loader import train_loader
from sdtrain.data.manifest import Manifest, describe_shard, write_manifest
from sdtrain.data.plan import order_of
from sdtrain.data.shard import ShardWriter
from sdtrain.data.shard_cache import ShardCache
from sdtrain.data.takedown import Takedown, read_takedown
from sdtrain.errors import DataError, StorageError
from sdtrain.records import DrawSpec
from tests.takedowns import entry

s3fs = pytest.importorskip("s3fs")
moto_server = pytest.importorskip("moto.server")

FORK = multiprocessing.get_context("fork")
NUM_SHARDS, PER_SHARD = 6, 8
TOTAL = NUM_SHARDS * PER_SHARD
BUCKET = "bucket"
MANIFEST = f"s3://{BUCKET}/data/manifest.json"


class Proxy:
    """Stands between the reader and the server, counts what is asked for, and fails as it is told.

    `mode`: `well`; `away` closes connections; `busy` answers 503; `cut` ends large bodies early; `slow` lets them
    trickle.
    """

    def __init__(self, server: tuple[str, int]) -> None:
        self.mode = "well"
        self.files = s3fs.S3FileSystem(endpoint_url=f"http://{server[0]}:{server[1]}")  # behind it, for uploads
        self.asked: Counter[str] = Counter()
        self._server = server
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """One request without a body, and its answer; the connection is closed behind them."""
        with client, suppress(OSError):  # a killed reader takes its connections along
            request = b""
            while b"\r\n\r\n" not in request:
                if not (piece := client.recv(65536)):
                    return
                request += piece
            mode = self.mode
            if mode == "away":
                return
            method, path, _ = request.decode("latin-1").split(" ", 2)
            if mode == "busy":
                client.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                return
            self.asked[f"{method} {path.partition('?')[0]}"] += 1
            lines = [line for line in request.strip().split(b"\r\n") if not line.lower().startswith(b"connection:")]
            with socket.create_connection(self._server) as server:
                server.sendall(b"\r\n".join([*lines, b"Connection: close"]) + b"\r\n\r\n")
                self._answer(server, client, mode if method == "GET" and path.endswith(".tar") else "well")

    def _answer(self, server: socket.socket, client: socket.socket, mode: str) -> None:
        sent = 0
        while piece := server.recv(4096 if mode == "slow" else 65536):
            if mode == "cut" and sent + len(piece) > 5000:
                client.sendall(piece[: max(0, 5000 - sent)])
                return
            client.sendall(piece)
            sent += len(piece)
            if mode == "slow":
                time.sleep(0.05)

    def fetched(self) -> dict[str, int]:
        """How often the tar of each shard was asked for."""
        names = {key.rpartition("/")[2]: count for key, count in self.asked.items() if key.startswith("GET ")}
        return {name: count for name, count in sorted(names.items()) if name.endswith(".tar")}

    def close(self) -> None:
        self._listener.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set as it is uploaded."""
    folder, entries = tmp_path_factory.mktemp("data"), []
    for shard in range(NUM_SHARDS):
        path = folder / f"{shard:05d}.tar"
        with ShardWriter(path) as writer:
            for number in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
                writer.write(f"k{number}", {"moments.npy": np.full((8, 16, 16), number, dtype=np.float16)})
        entries.append(describe_shard(path, split="train", folder=folder))
    write_manifest(folder / "manifest.json", entries, fingerprint={})
    return folder


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        s3fs.S3FileSystem.clear_instance_cache()
        proxy = Proxy(server.get_host_and_port())
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        yield proxy
    s3fs.S3FileSystem.clear_instance_cache()
    proxy.close()
    server.stop()


@pytest.fixture(scope="module")
def uploaded(proxy: Proxy, folder: Path) -> None:
    proxy.files.mkdir(BUCKET)
    for path in folder.iterdir():
        proxy.files.pipe_file(f"{BUCKET}/data/{path.name}", path.read_bytes())


@pytest.fixture
def s3(proxy: Proxy, uploaded: None) -> Iterator[Proxy]:
    proxy.mode = "well"
    proxy.asked.clear()
    yield proxy
    proxy.mode = "well"


def make(tmp_path: Path, *, read_retries: int = 6, shards: int = 20) -> ShardDataset:
    cache = ShardCache(tmp_path / "cache", shards * 2**15)
    manifest = Manifest.load(MANIFEST, cache=cache)
    assert max(shard.size_bytes for shard in manifest.shards) < 2**15 * 2
    return ShardDataset(
        manifest=manifest,
        split="train",
        fields={"moments": "moments.npy"},
        order=order_of(manifest, "train", seed=1, window_shards=2),
        seed=1,
        draws=DrawSpec(normals={"noise": (4, 16, 16)}),
        read_retries=read_retries,
    )


def numbers(dataset: ShardDataset) -> list[int]:
    samples = [dataset[position] for position in range(TOTAL)]
    dataset.close()
    assert [sample.error for sample in samples] == [None] * TOTAL
    return sorted(int(sample.fields["moments"][0, 0, 0]) for sample in samples)


@contextmanager
def well_after(proxy: Proxy, mode: str, seconds: float) -> Iterator[None]:
    proxy.mode = mode
    timer = threading.Timer(seconds, setattr, (proxy, "mode", "well"))
    timer.start()
    try:
        yield
    finally:
        timer.join()


def _rank(tmp_path: Path, rank: int, pipe: Any) -> None:
    seen: list[str] = []
    loader = train_loader(
        make(tmp_path),
        start_step=0,
        max_steps=TOTAL // 8,
        batch_size=8,
        micro_batch_size=2,
        world_size=2,
        rank=rank,
        num_workers=2,
        prefetch=2,
    )
    for _, _, batch in loader:
        assert batch.errors == ()
        seen += batch.keys
    pipe.send(seen)


def test_two_ranks_with_workers_download_each_shard_once(tmp_path: Path, s3: Proxy) -> None:
    pipes, ranks = [], []
    for rank in range(2):
        receiver, sender = FORK.Pipe(duplex=False)
        ranks.append(FORK.Process(target=_rank, args=(tmp_path, rank, sender)))
        pipes.append(receiver)
    for process in ranks:
        process.start()
    seen: list[str] = []
    for pipe in pipes:
        assert pipe.poll(60)
        seen += pipe.recv()
    for process in ranks:
        process.join()
    assert sorted(seen) == sorted(f"k{number}" for number in range(TOTAL))
    assert set(s3.fetched().values()) == {1}
    assert len(s3.fetched()) == NUM_SHARDS


@pytest.mark.parametrize("mode", ["away", "busy", "cut"])
def test_a_server_that_fails_in_the_middle_costs_no_sample(tmp_path: Path, s3: Proxy, mode: str) -> None:
    dataset = make(tmp_path)
    dataset[0]
    with well_after(s3, mode, 1.0):
        assert numbers(dataset) == list(range(TOTAL))
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_server_that_stays_away_costs_samples_and_says_why(tmp_path: Path, s3: Proxy) -> None:
    dataset = make(tmp_path, read_retries=0)
    s3.mode = "away"
    error = dataset[0].error
    dataset.close()
    assert error is not None
    assert f"s3://{BUCKET}/data/{error.shard}" in error.reason
    assert "cannot be read: " in error.reason
    with pytest.raises(
        DataError, match=rf"^{MANIFEST}: cannot be read: \w+: .*; check the address, and the credentials"
    ):
        Manifest.load(MANIFEST)


def test_an_object_that_was_replaced_is_no_sample(tmp_path: Path, s3: Proxy, folder: Path) -> None:
    files, name = s3.files, f"{BUCKET}/data/00003.tar"
    data = (folder / "00003.tar").read_bytes()
    files.pipe_file(name, data[:-1] + b"x")
    try:
        dataset = make(tmp_path, read_retries=0)
        samples = [dataset[position] for position in range(TOTAL)]
        dataset.close()
    finally:
        files.pipe_file(name, data)
    bad = [sample.error for sample in samples if sample.error]
    assert [error.shard for error in bad] == ["00003.tar"] * PER_SHARD
    assert all("00003.tar: sha256 " in error.reason for error in bad)


def test_manifests_and_lists_that_are_not_there(s3: Proxy) -> None:
    with pytest.raises(
        DataError, match=r"^s3://bucket/none.json: cannot read the manifest: not there; check data.manif"
    ):
        Manifest.load("s3://bucket/none.json")
    with pytest.raises(DataError, match=r"s3://none/none.json: cannot read the manifest: "):
        Manifest.load("s3://none/none.json")
    manifest = Manifest.load(MANIFEST)
    assert read_takedown(manifest.path).keys == frozenset()
    s3.mode = "busy"
    with pytest.raises(DataError, match=r"takedown.json: cannot be read: .* Whether there is a take-down list"):
        read_takedown(manifest.path)
    s3.mode = "well"
    files = s3.files
    files.pipe_file(f"{BUCKET}/data/takedown.json", Takedown((entry("k7"),)).to_json().encode())
    try:
        assert read_takedown(manifest.path).keys == {"k7"}
        files.pipe_file(f"{BUCKET}/data/takedown.json", b"[]")
        with pytest.raises(DataError, match=r"^s3://bucket/data/takedown.json: not a take-down list"):
            read_takedown(manifest.path)
    finally:
        files.rm(f"{BUCKET}/data/takedown.json")


def test_shards_without_a_cache_are_refused_by_name(s3: Proxy) -> None:
    manifest = Manifest.load(MANIFEST)
    with pytest.raises(
        DataError, match=r"manifest.json: shards of object storage are read through a folder on this node"
    ):
        manifest.open_shard(manifest.shards[0])
    with pytest.raises(
        DataError, match=r"manifest.json: this needs the files on this machine; copy the data set here fi"
    ):
        manifest.shard_path(manifest.shards[0])


def _fetch(tmp_path: Path) -> None:
    make(tmp_path)[0]


def test_a_process_killed_in_a_download_leaves_it_to_the_next_one(tmp_path: Path, s3: Proxy) -> None:
    s3.mode = "slow"
    child = FORK.Process(target=_fetch, args=(tmp_path,))
    child.start()
    deadline = time.monotonic() + 30
    while not list((tmp_path / "cache").glob("*.tar.part")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert list((tmp_path / "cache").glob("*.tar.part"))
    s3.mode = "well"
    assert numbers(make(tmp_path)) == list(range(TOTAL))
    assert not list((tmp_path / "cache").glob("*.part"))


def test_the_next_window_is_there_before_it_is_needed(tmp_path: Path, s3: Proxy) -> None:
    dataset = make(tmp_path)
    dataset[0]
    wanted = {dataset.manifest.shards[shard].sha256 for shard in dataset.order.shards_ahead(0)}
    assert len(wanted) == 4, "two shards of this window, two of the next one"
    deadline = time.monotonic() + 20
    while {path.name.partition("-")[0] for path in (tmp_path / "cache").glob("*.tar")} != wanted:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    s3.mode = "away"
    samples = [dataset[position] for position in range(4 * PER_SHARD)]
    dataset.close()
    assert [sample.error for sample in samples] == [None] * (4 * PER_SHARD)


def test_a_cache_without_room_ends_the_run_with_one_message(tmp_path: Path, s3: Proxy) -> None:
    dataset = make(tmp_path, shards=1)
    assert dataset.manifest.cache is not None
    dataset.manifest.cache._room_seconds = 0.1
    loader = train_loader(
        dataset,
        start_step=0,
        max_steps=6,
        batch_size=8,
        micro_batch_size=8,
        world_size=1,
        rank=0,
        num_workers=1,
        prefetch=2,
    )
    try:
        list(loader)
    except StorageError as error:
        text = str(error)  # the error itself keeps the loader, and so its worker, alive
    assert text.startswith(f"{tmp_path}/cache: no room for a shard of ")
    assert "Traceback" not in text
    gc.collect()
    assert multiprocessing.active_children() == []
