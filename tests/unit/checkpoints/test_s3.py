"""Uploads to a real S3 server on this machine, which fails while a checkpoint is on its way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from sdtrain.checkpoints.protocol import commit, verify
from sdtrain.checkpoints.remote import Backoff, RemoteStore, fetch
from sdtrain.checkpoints.uploader import Uploader
from sdtrain.run_dir import RunDir

s3fs = pytest.importorskip("s3fs")
pytest.importorskip("moto")

URL = "s3://checkpoints/runs/one"
QUICK = Backoff(attempts=2, first_seconds=0.05)
LARGE = 5 * 2**20


@dataclass
class Server:
    """moto behind a gate: requests that `refuses` answers for are told to come back later."""

    app: Any
    refuses: Callable[[str, str], bool] = lambda method, path: False
    puts: list[str] = field(default_factory=list)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if self.refuses(method, path):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response("503 Slow Down", [("Content-Type", "application/xml"), ("Content-Length", "0")])
            return [b""]
        if method == "PUT":
            self.puts.append(path.rpartition("/")[2])
        return self.app(environ, start_response)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    gate = Server(DomainDispatcherApplication(create_backend_app))
    http = make_server("127.0.0.1", 0, gate, threaded=True, request_handler=MotoRequestHandler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{http.server_port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    s3 = s3fs.S3FileSystem()
    if not s3.exists("checkpoints"):  # moto keeps its state from test to test
        s3.mkdir("checkpoints")
    yield gate
    s3fs.S3FileSystem.clear_instance_cache()
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    return run


def save(run: RunDir, step: int) -> Path:
    files = {
        "denoiser.rank00000.safetensors": {"x": torch.full((LARGE // 4,), float(step))},
        "extra.rank00000.safetensors": {"y": torch.full((7,), float(step))},
    }
    path = commit(run.checkpoints, step=step, attempt="a", files=files, facts={"run": "a"})
    assert path is not None
    run.log("commit", attempt="a", step=step, checkpoint=path.name)
    return path


def events(run: RunDir) -> list[tuple[str, str]]:
    return [(row["event"], row["checkpoint"]) for row in run.ledger_rows() if row["event"] != "commit"]


def test_a_store_that_fails_in_the_middle_and_a_start_that_goes_on(
    server: Server, run: RunDir, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(run, 1)
    server.refuses = lambda method, path: method == "PUT" and path.endswith("extra.rank00000.safetensors")
    first = Uploader(run, RemoteStore(URL), backoff=QUICK)
    first.look()
    assert first.wait(30)
    assert events(run) == [("upload_failed", "step-00000001")]
    assert f"upload of step-00000001 to {URL} given up" in caplog.text
    assert (
        server.puts == ["UPLOAD", "denoiser.rank00000.safetensors"] or "denoiser.rank00000.safetensors" in server.puts
    )
    assert RemoteStore(URL).checkpoints() == [], "half a checkpoint is none"

    server.refuses = lambda method, path: False
    server.puts.clear()
    second = Uploader(run, RemoteStore(URL), backoff=QUICK)  # as after a restart
    second.look()
    assert second.wait(30)
    assert events(run)[1:] == [("upload", "step-00000001")]
    assert server.puts == ["extra.rank00000.safetensors", "MANIFEST.json", "ledger.jsonl"], "what was there is not sent"

    path = save(run, 2)
    second.look()
    assert second.wait(30)
    assert server.puts[3:-1][-1] == "MANIFEST.json"
    other = RunDir(tmp_path / "elsewhere")
    found = fetch(URL, other, attempt="b", backoff=QUICK)
    assert found is not None
    assert verify(found) == []
    for file in path.iterdir():
        assert (found.path / file.name).read_bytes() == file.read_bytes()
    assert [row["event"] for row in other.ledger_rows()] == ["commit", "upload_failed", "upload", "commit", "upload"]


def test_a_bucket_that_does_not_exist_is_an_alert(
    server: Server, run: RunDir, caplog: pytest.LogCaptureFixture
) -> None:
    save(run, 1)
    uploader = Uploader(run, RemoteStore("s3://nowhere/run"), backoff=QUICK)
    uploader.look()
    assert uploader.wait(30)
    assert "upload of step-00000001 to s3://nowhere/run given up" in caplog.text
    assert "training goes on" in caplog.text
