"""The synthetic data set of `benchmarks.manifest`, small: the same content and order as one that is written plainly."""

from __future__ import annotations

import gc
import hashlib
import json
from pathlib import Path

import pytest

from benchmarks.manifest import measure_first_batch, measure_open, write_data_set
from sdtrain.data.manifest import Manifest
from sdtrain.data.plan import order_of

SHARDS, SAMPLES = 60, 7


@pytest.fixture(scope="module", params=[1, 3])
def manifest(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("scale")
    return write_data_set(folder, shards=SHARDS, samples_per_shard=SAMPLES, buckets=request.param, latent_side=4)


def test_the_digest_is_that_of_the_file_s_canonical_text(manifest: Manifest) -> None:
    page = json.loads(Path(manifest.path).read_text())
    stated = page.pop("sha256")
    text = json.dumps(page, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest() == stated == Manifest.load(manifest.path).sha256


def test_opening_counts_every_shard_and_sample(manifest: Manifest) -> None:
    found = measure_open(Path(manifest.path))
    assert (found["shards"], found["samples"]) == (SHARDS, SHARDS * SAMPLES)


@pytest.mark.parametrize("epoch", [0, 1, 1_000_000])
def test_any_epoch_deals_every_sample_once_and_begins_with_a_readable_batch(manifest: Manifest, epoch: int) -> None:
    total = SHARDS * SAMPLES
    order = order_of(manifest, "train", seed=1, window_shards=4, batch_size=SAMPLES)
    places = {order.sample_at(epoch * total + offset)[1:] for offset in range(total)}
    assert len(places) == total
    measure_first_batch(Path(manifest.path), epoch * total, SAMPLES, 4)  # asserts that nothing is unreadable


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # webdataset leaves them to the collector
def test_both_loaders_of_the_comparison_deliver_every_sample_with_its_numbers(tmp_path: Path) -> None:
    from benchmarks.loader import Ours, Webdataset, compare
    from benchmarks.loader import write_data_set as write_latents

    latents = write_latents(tmp_path, shards=3, samples_per_shard=8, latent_side=4)
    ours = Ours(latents, batch_size=1, workers=0, noise=False)
    streamed = Webdataset(latents, batch_size=1, workers=0, shuffle=0)
    shuffled = Webdataset(latents, batch_size=1, workers=0, shuffle=8)
    first, second, third = (sorted(engine._batches()) for engine in (ours, streamed, shuffled))
    assert len(first) == 24 and first == second == third
    assert compare({"ours": ours.rate, "webdataset": streamed.rate}, rounds=1)["ours"][0] > 0
    gc.collect()
