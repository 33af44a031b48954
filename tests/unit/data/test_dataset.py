"""Positions become samples: the same ones with the same draws anywhere, and damage never moves one."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdtrain.data import dataset as dataset_module
from sdtrain.data.dataset import Sample, ShardDataset
from sdtrain.data.manifest import Manifest, describe_shard, write_manifest
from sdtrain.data.plan import Order, order_of
from sdtrain.data.randomness import normals, uniforms
from sdtrain.data.shard import ShardWriter
from sdtrain.errors import DataError
from sdtrain.records import DrawSpec
from tests.takedowns import take_down

DRAWS = DrawSpec(normals={"noise": (4, 2, 2), "posterior": (4, 2, 2)}, uniforms=("timestep", "drop"))
FIELDS = {"moments": "moments.npy", "tokens": "tokens.npy"}
NUM_SHARDS, PER_SHARD = 6, 5


def write_data(folder: Path) -> Manifest:
    entries = []
    for shard in range(NUM_SHARDS):
        path = folder / f"{shard:05d}.tar"
        with ShardWriter(path) as writer:
            for number in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
                fields = {
                    "moments.npy": np.full((8, 2, 2), number, dtype=np.float16),
                    "tokens.npy": np.full(7, 40000 + number, dtype=np.uint16),
                    "txt": f"caption {number}",
                }
                writer.write(f"k{number}", fields)
        entries.append(describe_shard(path, split="train", folder=folder))
    return write_manifest(folder / "manifest.json", entries, fingerprint={})


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_data(tmp_path)


def make(manifest: Manifest, **changes: Any) -> ShardDataset:
    arguments: dict[str, Any] = {
        "manifest": manifest,
        "split": "train",
        "fields": FIELDS,
        "order": order_of(manifest, "train", seed=3, window_shards=2),
        "seed": 3,
        "draws": DRAWS,
        "read_retries": 0,
    }
    return ShardDataset(**(arguments | changes))


@pytest.fixture
def dataset(manifest: Manifest) -> Iterator[ShardDataset]:
    made = make(manifest)
    yield made
    made.close()


def same(a: Sample, b: Sample) -> bool:
    arrays = [(a.fields, b.fields), (a.normals, b.normals)]
    return (a.key, a.position, a.uniforms, a.weight, a.error) == (
        b.key,
        b.position,
        b.uniforms,
        b.weight,
        b.error,
    ) and (
        all(mine.keys() == theirs.keys() and all((mine[n] == theirs[n]).all() for n in mine) for mine, theirs in arrays)
    )


def test_an_epoch_reads_every_sample_once_with_its_own_content(dataset: ShardDataset):
    samples = [dataset[position] for position in range(len(dataset))]
    assert sorted(int(sample.key[1:]) for sample in samples) == list(range(30))
    for sample in samples:
        number = int(sample.key[1:])
        assert sample.fields["moments"].dtype == np.float16
        assert sample.fields["tokens"].dtype == np.int64
        assert (sample.fields["moments"] == number).all()
        assert (sample.fields["tokens"] == 40000 + number).all()  # above int16: an unsigned type must not wrap
        assert (sample.weight, sample.error) == (1.0, None)


def test_draws_are_those_of_the_global_position(dataset: ShardDataset):
    for position in (0, 31, 1_000_003):
        sample = dataset[position]
        np.testing.assert_array_equal(sample.normals["noise"], normals(3, "noise", position, (4, 2, 2)))
        np.testing.assert_array_equal(sample.normals["posterior"], normals(3, "posterior", position, (4, 2, 2)))
        assert sample.uniforms == {name: uniforms(3, name, position)[0] for name in ("timestep", "drop")}


def test_the_next_epoch_draws_anew(dataset: ShardDataset):
    first = {sample.key: sample for sample in map(dataset.__getitem__, range(30))}
    for position in range(30, 60):
        sample = dataset[position]
        assert (sample.fields["moments"] == first[sample.key].fields["moments"]).all()
        assert not (sample.normals["noise"] == first[sample.key].normals["noise"]).any()


def test_a_position_is_the_same_in_any_order_of_asking_and_in_any_process(dataset: ShardDataset, manifest: Manifest):
    forward = [dataset[position] for position in range(40)]
    backward = [make(manifest, max_open_shards=1)[position] for position in reversed(range(40))][::-1]
    copied = pickle.loads(pickle.dumps(dataset))
    for position, sample in enumerate(forward):
        assert same(sample, backward[position])
        assert same(sample, copied[position])
    copied.close()


def _read_in_child(dataset: ShardDataset, pipe: Any) -> None:
    before = set(Path("/proc/self/fd").iterdir())
    sample = dataset[0]
    pipe.send((sample.key, sample.error, len(set(Path("/proc/self/fd").iterdir()) - before)))


def test_a_forked_worker_opens_files_of_its_own(dataset: ShardDataset):
    expected = dataset[0].key
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_read_in_child, args=(dataset, sender))
    child.start()
    assert receiver.poll(20)
    key, error, opened = receiver.recv()
    child.join()
    assert (key, error, opened) == (expected, None, 1)
    assert dataset[0].error is None


def test_open_files_are_bounded_and_closed(manifest: Manifest):
    def open_tars() -> int:
        links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        return sum(link.readlink().is_relative_to(manifest.folder) for link in links)

    dataset = make(manifest, max_open_shards=2)
    for position in range(30):
        assert dataset[position].error is None
        assert open_tars() <= 2
    assert open_tars() == 2
    dataset.close()
    assert open_tars() == 0


def damage(manifest: Manifest, shard: int, sample: int) -> str:
    entry = manifest.shards[shard]
    path = manifest.shard_path(entry)
    with manifest.open_shard(entry) as reader:
        offset, key = reader.index.fields["moments.npy"].offset[sample], reader.keys[sample]
    data = bytearray(path.read_bytes())
    data[offset + 130] ^= 4
    path.write_bytes(data)
    return key


def test_a_damaged_sample_becomes_a_tombstone_in_its_place(manifest: Manifest):
    whole = [make(manifest)[position] for position in range(30)]
    key = damage(manifest, 2, 3)
    for sample, before in zip(map(make(manifest).__getitem__, range(30)), whole, strict=True):
        if sample.key != key:
            assert same(sample, before)
            continue
        assert before.key == key
        assert sample.weight == 0
        assert sample.error is not None
        assert sample.error[:2] == (key, "00002.tar")
        assert sample.error.reason.endswith(f"00002.tar: field 'moments.npy' of sample '{key}' fails its checksum")
        assert {name: (field.shape, field.dtype, field.any()) for name, field in sample.fields.items()} == {
            "moments": ((8, 2, 2), np.float16, False),
            "tokens": ((7,), np.int64, False),
        }
        np.testing.assert_array_equal(sample.normals["noise"], before.normals["noise"])
    assert key in [sample.key for sample in whole]


def test_a_lost_shard_becomes_tombstones_and_comes_back(manifest: Manifest):
    lost = manifest.folder / "00004.tar"
    hidden = lost.rename(manifest.folder / "hidden")
    dataset = make(manifest)
    samples = [dataset[position] for position in range(30)]
    bad = [sample for sample in samples if sample.error]
    assert sorted(sample.key for sample in bad) == [f"00004.tar#{number}" for number in range(PER_SHARD)]
    assert all("00004.tar: cannot open the shard: No such file or directory" in str(sample.error) for sample in bad)
    hidden.rename(lost)
    assert all(dataset[position].weight == 1 for position in range(30))


def test_a_sample_of_another_shape_becomes_a_tombstone(tmp_path: Path):
    with ShardWriter(tmp_path / "0.tar") as writer:
        writer.write("a", {"moments.npy": np.ones((8, 2, 2), np.float16)})
        writer.write("b", {"moments.npy": np.ones((8, 2, 3), np.float16)})
    entry = describe_shard(tmp_path / "0.tar", split="train", folder=tmp_path)
    manifest = write_manifest(tmp_path / "m.json", [entry], fingerprint={})
    order = order_of(manifest, "train", seed=0, window_shards=1, shuffle=False)
    dataset = make(manifest, fields={"moments": "moments.npy"}, order=order)
    assert dataset[0].weight == 1
    assert dataset[1].fields["moments"].shape == (8, 2, 2)
    assert str(dataset[1].error).endswith("0.tar: field 'moments.npy' is (8, 2, 3), the manifest says (8, 2, 2)")


def test_taken_down_keys_are_masked_without_moving_others(manifest: Manifest):
    whole = [make(manifest)[position] for position in range(30)]
    take_down(manifest.path, "k7")
    manifest = Manifest.load(manifest.path)
    for sample, before in zip(map(make(manifest).__getitem__, range(30)), whole, strict=True):
        assert sample.key == before.key
        assert sample.error is None
        assert sample.weight == (0 if sample.key == "k7" else 1)
        assert sample.fields["tokens"].any() == (sample.key != "k7")


def test_samples_stay_in_memory_as_far_as_there_is_room(manifest: Manifest):
    """One sample is 64 bytes of moments, 56 of tokens and 512 of Python around them."""
    plain, kept = make(manifest), make(manifest, ram_cache_bytes=10 * 632)
    for position in range(60):
        assert same(plain[position], kept[position])
    memory = kept._mine().memory
    assert (memory.used_bytes, memory.hits, memory.misses) == (6320, 10, 50)
    for path in manifest.folder.glob("*.tar"):
        path.unlink()
    assert sum(kept[position].weight for position in range(30)) == 10


def test_neither_masked_nor_unreadable_samples_stay_in_memory(manifest: Manifest):
    take_down(manifest.path, "k7")
    damage(manifest, 2, 3)
    kept = make(manifest, ram_cache_bytes=10**6)
    for _ in range(2):
        assert sum(kept[position].weight for position in range(30)) == 28
    assert (kept._mine().memory.hits, kept._mine().memory.used_bytes) == (28, 28 * 632)


def test_pixels_are_read_channels_first(tmp_path: Path):
    import io

    from PIL import Image

    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    with ShardWriter(tmp_path / "0.tar") as writer:
        writer.write("a", {"png": stream.getvalue(), "attributes.npy": np.array([1, -1, 0], dtype=np.int8)})
    entry = describe_shard(tmp_path / "0.tar", split="train", folder=tmp_path)
    manifest = write_manifest(tmp_path / "m.json", [entry], fingerprint={})
    order = order_of(manifest, "train", seed=0, window_shards=1)
    dataset = make(manifest, fields={"pixels": "png", "attributes": "attributes.npy"}, order=order, draws=DrawSpec())
    sample = dataset[0]
    assert sample.error is None
    np.testing.assert_array_equal(sample.fields["pixels"], pixels.transpose(2, 0, 1))
    assert sample.fields["attributes"].dtype == np.int8
    assert sample.fields["attributes"].tolist() == [1, -1, 0]


def test_wrong_set_ups_are_refused(manifest: Manifest, tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"batch fields \['latents'\] are unknown; known are \['attributes', 'moments'"
    ):
        make(manifest, fields={"latents": "moments.npy"})
    with pytest.raises(DataError, match=r"manifest.json: shard 00000.tar has no field 'jpg'; it has \['moments.npy', "):
        make(manifest, fields={"pixels": "jpg"})
    with pytest.raises(
        DataError, match=r"manifest.json: no shape of field 'txt' in field_shapes, which has \['moments"
    ):
        make(manifest, fields={"tokens": "txt"})
    with pytest.raises(
        ValueError, match=r"draws \['noise'\] are named twice; equal names would be equal random numbers"
    ):
        make(manifest, draws=DrawSpec(normals={"noise": (1,)}, uniforms=("noise",)))
    other = Order(shard_sizes=[4], manifest_sha256="x", seed=0, window_shards=1)
    with pytest.raises(
        DataError, match=r"manifest.json: split 'train' has 30 samples, the order was made for 4; make i"
    ):
        make(manifest, order=other)


def write_flips(folder: Path, shards_with: int = 3) -> Manifest:
    """Shards whose moments hold their number, and those of the mirrored pictures the number below zero."""
    entries = []
    for shard in range(3):
        with ShardWriter(folder / f"{shard}.tar") as writer:
            for number in range(shard * 20, shard * 20 + 20):
                fields = {"moments.npy": np.full((8, 2, 2), number + 1, np.float16)}
                if shard < shards_with:
                    fields["moments_flipped.npy"] = -fields["moments.npy"]
                writer.write(f"k{number}", fields)
        entries.append(describe_shard(folder / f"{shard}.tar", split="train", folder=folder))
    return write_manifest(folder / "manifest.json", entries, fingerprint={})


def read_flips(manifest: Manifest, seed: int = 7, ram_cache_bytes: int = 0, draws: DrawSpec = DRAWS) -> list[Sample]:
    order = order_of(manifest, "train", seed=1, window_shards=2)
    dataset = ShardDataset(
        manifest=manifest,
        split="train",
        fields={"moments": "moments.npy"},
        order=order,
        seed=seed,
        draws=draws,
        ram_cache_bytes=ram_cache_bytes,
    )
    samples = [dataset[position] for position in range(4 * len(dataset))]
    dataset.close()
    return samples


@pytest.mark.parametrize("ram_cache_bytes", [0, 2**20])
def test_each_sample_is_read_mirrored_or_not_by_its_own_draw(tmp_path: Path, ram_cache_bytes: int):
    samples = read_flips(write_flips(tmp_path), ram_cache_bytes=ram_cache_bytes)
    for sample in samples:
        number = int(sample.key[1:]) + 1
        is_flipped = uniforms(7, "flip", sample.position)[0] < 0.5
        assert sample.is_flipped == is_flipped
        assert (sample.fields["moments"] == (-number if is_flipped else number)).all()
    assert 80 < sum(sample.is_flipped for sample in samples) < 160, "of 240"
    assert len({(sample.key, sample.is_flipped) for sample in samples}) > 100, "both of nearly every picture"


def test_shards_without_mirrored_pictures_are_read_as_they_are(tmp_path: Path):
    samples = read_flips(write_flips(tmp_path, shards_with=0))
    assert not any(sample.is_flipped for sample in samples)
    assert all((sample.fields["moments"] > 0).all() for sample in samples)


def test_shards_hold_mirrored_pictures_all_or_none(tmp_path: Path):
    with pytest.raises(DataError, match=r"shard 2.tar has no field 'moments_flipped.npy'; it has \['moments.npy'\]"):
        read_flips(write_flips(tmp_path, shards_with=2))


def test_a_draw_of_the_task_cannot_be_the_one_of_flips(tmp_path: Path):
    manifest = write_flips(tmp_path)
    with pytest.raises(ValueError, match=r"draws \['flip'\] are named twice"):
        read_flips(manifest, draws=DrawSpec(uniforms=("flip",)))


def test_every_half_is_known_to_be_finite_or_not():
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    found = [dataset_module._is_finite(halves[number : number + 1]) for number in range(2**16)]
    np.testing.assert_array_equal(found, np.isfinite(halves))
    assert dataset_module._is_finite(halves[:0])
    assert not dataset_module._is_finite(halves[::-1].reshape(256, 256).T)
