"""Waiting for the nodes of a Ray cluster that is being started meanwhile, by a batch script for instance."""

from __future__ import annotations

import time
from collections.abc import Sequence

from data_pipeline.ray_start import join_cluster, probe
from sdtrain.errors import PeerLostError

_LOOK_EVERY_SECONDS = 0.5


def wait_for_nodes(address: str, names: Sequence[str], limit_seconds: float) -> None:
    """Wait until the head of a cluster answers and all of its nodes have joined it.

    Args:
        address: The head's `host:port`.
        names: Names that the nodes were started with.
        limit_seconds: For all of it.

    Raises:
        ConfigError: The cluster does not take this process's token.
        PeerLostError: The head or a node is not there in time; the missing nodes are named.
    """
    deadline = time.monotonic() + limit_seconds
    while (reason := _silence(address)) is not None:
        if time.monotonic() > deadline:
            raise PeerLostError(
                f"the head of Ray at {address} did not answer within {limit_seconds:g} s ({reason}); see its log"
            )
        time.sleep(_LOOK_EVERY_SECONDS)
    import ray

    join_cluster(address)
    try:
        while missing := _missing(names):
            if time.monotonic() > deadline:
                raise PeerLostError(
                    f"{len(missing)} of {len(names)} nodes did not join Ray at {address} within {limit_seconds:g} s: "
                    f"{', '.join(missing)}; see their logs"
                )
            time.sleep(_LOOK_EVERY_SECONDS)
    finally:
        ray.shutdown()


def _silence(address: str) -> str | None:
    """Why the head does not answer; None where it does."""
    try:
        probe(address)
    except OSError as error:
        return str(error)
    return None


def _missing(names: Sequence[str]) -> list[str]:
    import ray

    there = {node["NodeName"] for node in ray.nodes() if node["Alive"]}
    return [name for name in names if name not in there]
