"""How Ray is started on this machine, or a running cluster joined, with its tokens; and how its death is noticed."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sdtrain.errors import ConfigError, PeerLostError

_OBJECT_STORE_BYTES = 128 << 20  # units travel as paths, so the store stays almost empty
_PROBE_SECONDS = 10.0
_REFUSED = b"InvalidAuthToken"  # what Ray's words say of a token that is missing or wrong
_HOW_TO_START = "start a cluster with `ray start --head`, or leave the key out to run on this machine"


def start_private(workers: int, memory_per_worker_bytes: int | None) -> None:
    """Start Ray on loopback; its processes are children of this one and die with it.

    Args:
        workers: CPU slots.
        memory_per_worker_bytes: What each may reserve; None declares what the machine has.

    Raises:
        PeerLostError: One of Ray's processes died meanwhile, or could not be started.
    """
    _set_environment()
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # else Ray listens on every interface
    # Else the raylet answers its driver only once as many workers have registered as it has CPUs, and waits for ever
    # for one that has died or was too slow (ray-project/ray#40131), while the driver holds the GIL.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    if token_source() is None:  # Ray would leave one in the home folder, readable by everybody
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    import ray

    try:
        ray.init(
            address="local",
            num_cpus=workers,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=_OBJECT_STORE_BYTES,
            _memory=None if memory_per_worker_bytes is None else memory_per_worker_bytes * workers,
            _node_ip_address="127.0.0.1",
        )
    except Exception as error:  # Ray raises no narrower one where its gcs_server or raylet dies, or cannot start
        logs = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir(), "ray")
        raise PeerLostError(
            f"Ray did not start on this machine: {str(error).rstrip('.')}. Its logs are under {logs}. What is "
            "committed stands: start the same command again"
        ) from error


def _set_environment() -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # leave CUDA_VISIBLE_DEVICES of CPU tasks alone


def join_cluster(address: str) -> None:
    """Join a running cluster.

    Where RAY_AUTH_MODE is not set, Ray uses a token that it finds if the address is `auto`, and none otherwise; here it
    is used for every address.

    Raises:
        ConfigError: Nothing answers, or the cluster does not take this process's token.
    """
    where = f"runner.address: {address!r}"
    try:
        probe(address)
    except OSError as error:
        raise ConfigError(f"{where}: no Ray cluster answers ({error}); {_HOW_TO_START}") from None
    _set_environment()
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "5")  # seconds; something listens there already
    import ray
    from ray._private.authentication import authentication_token_setup
    from ray.exceptions import AuthenticationError

    token = token_source()
    with tempfile.TemporaryFile() as words:
        try:
            with _stderr_into(words):
                authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, AuthenticationError) as error:
            first_line = str(error).splitlines()[0]
            words.seek(0)
            is_token = isinstance(error, AuthenticationError) or _REFUSED in words.read()
            advice = f"{token_advice(token)}; {_HOW_TO_START}" if is_token else _HOW_TO_START
            raise ConfigError(f"{where}: cannot join ({first_line}): {advice}") from None


@contextmanager
def _stderr_into(file: IO[bytes]) -> Iterator[None]:
    """Let what this process writes to stderr, Ray's C++ parts included, go into a file: a line for every attempt."""
    sys.stderr.flush()
    kept = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def token_source() -> str | None:
    """Where Ray finds this process's token, in its own order; None where there is none."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "the environment variable RAY_AUTH_TOKEN"
    if os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return f"the file {os.environ['RAY_AUTH_TOKEN_PATH']} (RAY_AUTH_TOKEN_PATH)"
    path = Path.home() / ".ray" / "auth_token"
    return f"the file {path}" if path.is_file() else None


def token_advice(source: str | None) -> str:
    """What to do where a cluster has refused this process's token."""
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        return "the cluster asks for a token, and RAY_AUTH_MODE=disabled sends none: unset it"
    if source is None:
        return (
            "the cluster asks for a token, and there is none here: put the head's "
            "(`ray get-auth-token` there) into a file of mode 600 and set RAY_AUTH_TOKEN_PATH to it"
        )
    return f"the cluster refuses the token from {source}: compare it with `ray get-auth-token` on the head"


def probe(address: str) -> None:
    """Fail within seconds where `host:port` does not answer; Ray itself would wait for minutes.

    Raises:
        OSError: Nothing listens there, or the address has no such form.
    """
    host, separator, port = address.rpartition(":")
    if separator and "//" not in address and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_SECONDS).close()


def dead_services() -> list[str]:
    """Names of those processes of a private Ray that are dead; it does not end by itself without them."""
    from ray._private import worker

    node = worker._global_node
    found = [] if node is None else node.dead_processes()
    return sorted({str(name) for name, _ in found} & {"raylet", "gcs_server"})
