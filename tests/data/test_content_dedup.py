"""Equal and alike pictures: hashes that survive re-encoding, pairs without comparing all, one that is kept."""

from __future__ import annotations

import hashlib
import io
import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipeline import perceptual
from data_pipeline.build import stages_for
from data_pipeline.cluster import InlineExecutor
from data_pipeline.perceptual import band_masks, hash_of_file, hash_text, pairs_within, perceptual_hash
from data_pipeline.runner import Runner
from data_pipeline.stages import content_dedup as content_dedup_module
from data_pipeline.stages.content_dedup import content_dedup_stages
from data_pipeline.stages.select import SelectStage
from sdtrain.config.curation import ContentDedupConfig
from sdtrain.config.ingestion import DigitsSource, DownloadConfig, IngestionConfig, ValidationSplitConfig
from sdtrain.data.manifest import Manifest
from sdtrain.data.shard import ShardReader, ShardWriter
from sdtrain.errors import DataError

SIDE = 64


def picture(seed: int, size: tuple[int, int] = (66, 72)) -> Image.Image:
    """Soft patches of colour by chance."""
    patches = np.random.default_rng(seed).integers(0, 256, (6, 5, 3)).astype(np.uint8)
    return Image.fromarray(patches).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def distance(first: int, second: int) -> int:
    return (first ^ second).bit_count()


@pytest.mark.parametrize(
    ("seed", "expected"), [(0, "f31b293bb4913326"), (1, "922cdcc9d9acf419"), (2, "939b037353c61bc3")]
)
def test_the_hash_is_that_of_the_package_imagehash(seed: int, expected: str) -> None:
    blocks = np.random.default_rng(seed).integers(0, 256, (8, 6, 3))
    image = Image.fromarray(np.kron(blocks, np.ones((9, 11, 1))).astype(np.uint8))
    assert hash_text(perceptual_hash(image)) == expected  # str(imagehash.phash(image)), imagehash 4.3.2


def test_the_hash_survives_encoding_and_resizing_and_tells_pictures_apart() -> None:
    originals = [picture(seed, (400, 300)) for seed in range(30)]
    hashes = [perceptual_hash(image) for image in originals]
    for index, image in enumerate(originals):
        copies = [
            encoded(image, quality=95),
            encoded(image, quality=60),
            encoded(image, "WEBP", quality=80),
            encoded(image, "PNG"),
            encoded(image.resize((200, 150), Image.Resampling.LANCZOS), quality=90),
            encoded(image.resize((800, 600), Image.Resampling.BICUBIC), quality=90),
        ]
        assert max(distance(hash_of_file(copy), hashes[index]) for copy in copies) <= 4
    apart = [distance(first, second) for index, first in enumerate(hashes) for second in hashes[:index]]
    assert min(apart) >= 12 and 28 < np.mean(apart) < 36


def test_plain_pictures_have_one_hash() -> None:
    colours = [(255, 255, 255), (3, 70, 9), (200, 0, 0)]
    assert (
        len({perceptual_hash(Image.new("RGB", (50 + index, 90), colour)) for index, colour in enumerate(colours)}) == 1
    )


def clustered(count: int, radius: int, seed: int = 0) -> np.ndarray:
    """Hashes, some of which differ from others in a few bits."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, count, dtype=np.uint64)
    for target in range(0, count, 3):
        flipped = rng.choice(64, rng.integers(0, radius + 3), replace=False)
        hashes[target] = hashes[rng.integers(count)] ^ np.uint64(sum(1 << int(bit) for bit in flipped))
    return hashes


@pytest.mark.parametrize("radius", [0, 1, 4, 10])
def test_bands_find_the_pairs_that_a_comparison_of_all_finds(radius: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perceptual, "_PAIRS_AT_ONCE", 50)  # several pieces
    hashes = clustered(600, radius)
    far = np.bitwise_count(hashes[:, None] ^ hashes[None, :])
    expected = set(zip(*np.nonzero(far <= radius), strict=True))
    found = set()
    for mask in band_masks(len(hashes), radius):
        for mine, theirs in pairs_within(hashes, hashes, mask, radius):
            found |= set(zip(mine.tolist(), theirs.tolist(), strict=True))
    assert found == expected and len(expected) > 700


def test_few_pairs_are_compared_and_masks_leave_the_radius_out() -> None:
    hashes = np.random.default_rng(1).integers(0, 2**64, 200_000, dtype=np.uint64)
    masks = band_masks(len(hashes), 4)
    compared = 0
    for mask in masks:
        counts = np.unique(hashes & np.uint64(mask), return_counts=True)[1].astype(np.int64)
        compared += int((counts * (counts - 1) // 2).sum())
    assert compared * 1000 < 200_000**2 // 2
    for few, radius in product((10, 10**6, 10**9), range(11)):
        masks = band_masks(few, radius)
        assert all(mask.bit_count() >= 5 for mask in masks)
        assert len(masks) == len(set(masks))


def write_shards(folder: Path, shards: list[list[tuple[str, bytes]]]) -> None:
    """Image shards of (key, picture); the last one is of the validation split."""
    for index, samples in enumerate(shards):
        split = "validation" if index == len(shards) - 1 else "train"
        with ShardWriter(folder / f"{index:05d}.tar") as writer:
            for key, body in samples:
                facts = {"sha256": hashlib.sha256(body).hexdigest(), "split": split, "caption": key, "url": key}
                writer.write(key, {"jpg": body, "txt": key, "json": facts})


def a_world() -> list[list[tuple[str, bytes]]]:
    """Three shards: originals, copies of other quality, equal files, and a chain of which each is near the next."""
    images = [picture(seed) for seed in range(12)]
    first = [(f"a{index}", encoded(image, quality=95)) for index, image in enumerate(images[:8])]
    second = [(f"b{index}", encoded(image, quality=70)) for index, image in enumerate(images[4:12])]
    third = [("c0", first[0][1]), ("c1", encoded(images[9], "PNG")), ("c2", encoded(picture(77), quality=95))]
    return [first, second, third]


def run(out: Path, **settings: Any) -> dict[str, dict[str, Any]]:
    """Verdicts by key."""
    config = ContentDedupConfig(**settings)
    stages = content_dedup_stages(config, DownloadConfig(image_size=SIDE), out / "images", out / "04-content-dedup")
    Runner(output=out, executor=InlineExecutor()).run(stages)
    tables = [pq.read_table(path) for path in sorted((out / "04-content-dedup").glob("0*.parquet"))]
    return {row["key"]: row for table in tables for row in table.to_pylist()}


def greedy(hashes: dict[str, int], radius: int, out: tuple[int, ...] = ()) -> dict[str, tuple[str, str | None]]:
    """What comparing each picture with all that are kept before it says."""
    kept: dict[str, int] = {}
    verdicts: dict[str, tuple[str, str | None]] = {}
    for key, value in hashes.items():
        near = next((other for other, known in kept.items() if distance(value, known) <= radius), None)
        if any(distance(value, known) <= radius for known in out):
            verdicts[key] = ("excluded", None)
        elif near is None:
            kept[key] = value
            verdicts[key] = ("kept", hash_text(value))
        else:
            verdicts[key] = ("duplicate", hash_text(kept[near]))
    return verdicts


@pytest.mark.parametrize("radius", [0, 4, 10])
@pytest.mark.parametrize("is_small", [False, True])
def test_a_picture_is_dropped_where_one_that_is_kept_before_it_is_near(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, radius: int, is_small: bool
) -> None:
    if is_small:  # several buckets, gathered files and windows
        monkeypatch.setattr(content_dedup_module, "PICTURES_PER_BUCKET", 6)
        monkeypatch.setattr(content_dedup_module, "SHARDS_AT_ONCE", 2)
        monkeypatch.setattr(content_dedup_module, "_IDS_AT_ONCE", 4)
    shards = a_world()
    write_shards(tmp_path / "images", shards)
    found = run(tmp_path, radius=radius)
    hashes = {key: hash_of_file(body) for samples in shards for key, body in samples}
    expected = greedy(hashes, radius)
    assert {key: (row["verdict"], row["group"]) for key, row in found.items()} == expected
    for row in found.values():
        members = [key for key, (_, group) in expected.items() if group == row["group"]]
        assert row["size"] == len(members)
        assert row["distance"] == distance(hashes[row["key"]], int(row["group"], 16)) <= radius
    assert sum(row["verdict"] == "duplicate" for row in found.values()) >= (5 if radius else 1)
    told = json.loads((tmp_path / "04-content-dedup/duplicates.json").read_text())
    assert told["pictures"] == 19 == told["kept"] + told["duplicate"] and told["excluded"] == 0


def test_chains_do_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = np.cumsum(
        [0] + [0b111 << (3 * step) for step in range(8)], dtype=np.uint64
    )  # 3 bits from each to the next
    kept = np.arange(9)
    parts = [np.array([(later, later - 1) for later in range(1, 9)], np.int64)]
    monkeypatch.setattr(content_dedup_module, "_IDS_AT_ONCE", 3)
    content_dedup_module._follow_near(kept, parts)
    assert distance(int(hashes[1]), int(hashes[0])) == 3
    assert kept.tolist() == [0, 0, 2, 2, 4, 4, 6, 6, 8]


def test_by_bytes_only_equal_files_are_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = a_world()
    write_shards(tmp_path / "images", shards)
    found = run(tmp_path, by="bytes")
    digest = hashlib.sha256(shards[0][0][1]).hexdigest()
    assert [key for key, row in found.items() if row["verdict"] != "kept"] == ["c0"]
    assert found["c0"]["group"] == found["a0"]["group"] == digest and found["a0"]["size"] == found["c0"]["size"] == 2
    assert "content-dedup: 1 of 19 pictures are duplicates in 1 groups, 18 left" in capsys.readouterr().out


def test_an_evaluation_set_is_left_out_by_picture_digest_and_hash(tmp_path: Path) -> None:
    shards = a_world()
    write_shards(tmp_path / "images", shards)
    evaluation, listed = tmp_path / "evaluation", tmp_path / "list.txt"
    (evaluation / "inner").mkdir(parents=True)
    (evaluation / "inner/two.webp").write_bytes(encoded(picture(2).resize((132, 144)), "WEBP", quality=80))
    digest, hashed = hashlib.sha256(shards[0][3][1]).hexdigest(), hash_text(hash_of_file(shards[1][7][1]) ^ 0b101)
    listed.write_text(f"# an evaluation set\n{digest.upper()}\n\n{hashed}\n")
    found = run(tmp_path, exclude=(evaluation, listed))
    out = {key for key, row in found.items() if row["verdict"] == "excluded"}
    assert out == {"a2", "a3", "b7"} and found["a2"]["group"] is None
    assert found["a4"]["size"] == 2  # what is excluded takes no other picture's place
    by_bytes = run(tmp_path, by="bytes", exclude=(evaluation, listed))
    assert {key for key, row in by_bytes.items() if row["verdict"] == "excluded"} == {"a3"}
    told = json.loads((tmp_path / "04-content-dedup/duplicates.json").read_text())
    assert told["excluded"] == 1


def test_pictures_of_an_evaluation_set_are_cut_as_stored_ones_are(tmp_path: Path) -> None:
    wide = picture(5, (400, 200))
    square = encoded(wide.crop((100, 0, 300, 200)).resize((SIDE, SIDE), Image.Resampling.BOX), quality=95)
    write_shards(tmp_path / "images", [[("a", square)], [("b", encoded(picture(6, (SIDE, SIDE))))]])
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation/wide.png").write_bytes(encoded(wide, "PNG"))
    assert distance(perceptual_hash(wide), hash_of_file(square)) > 10
    found = run(tmp_path, exclude=(tmp_path / "evaluation",))
    assert [row["verdict"] for row in found.values()] == ["excluded", "kept"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, r"content_dedup\.exclude: .*none\.txt: no such file or folder"),
        ("empty.txt", b"# nothing\n", r"content_dedup\.exclude: .*empty\.txt is empty; give a hash in each line"),
        ("bytes.txt", b"\xff\xfe\x00", r"content_dedup\.exclude: .*bytes\.txt: is no text \(.*\); give a hash in each"),
        (
            "odd.txt",
            b"ab" * 32 + b"\n12345\n",
            r"odd\.txt: '12345' is no hash; give 64 hexadecimal digits for a sha",
        ),
        (
            "folder/",
            None,
            r"content_dedup\.exclude: .*folder: no picture in it; known are \.jpeg, \.jpg",
        ),
        (
            "cut.png",
            b"\x89PNG\r\n\x1a\n",
            r"content_dedup\.exclude: .*cut\.png: no readable picture \(.*\); take it",
        ),
    ],
)
def test_lists_that_cannot_be_used_are_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    write_shards(tmp_path / "images", [[("a", encoded(picture(0)))]])
    path = tmp_path / name.rstrip("/")
    if content is not None:
        path.write_bytes(content)
    elif name.endswith("/"):
        path.mkdir()
    with pytest.raises(DataError, match=message):
        run(tmp_path, exclude=(path,))


def test_a_changed_evaluation_set_is_noticed_and_hashes_are_kept(tmp_path: Path) -> None:
    write_shards(tmp_path / "images", a_world())
    listed = tmp_path / "list.txt"
    listed.write_text("0" * 16)
    run(tmp_path, exclude=(listed,))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "04-content-dedup-hash").glob("0*")}
    listed.write_text(hash_text(hash_of_file(a_world()[0][0][1])))
    found = run(tmp_path, exclude=(listed,))
    assert found["a0"]["verdict"] == "excluded"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "04-content-dedup-hash").glob("0*")} == before


def page(out: Path, **sections: Any) -> IngestionConfig:
    """The digits world, which needs no network."""
    return IngestionConfig(
        schema_version=1,
        kind="ingestion",
        output=out,
        source=DigitsSource(type="digits", num_images=300),
        validation=ValidationSplitConfig(num_samples=8),
        download=DownloadConfig(image_size=32, samples_per_shard=150),
        **sections,
    )


def test_a_page_drops_duplicates_before_the_manifest_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, config = page(tmp_path), page(tmp_path, content_dedup=ContentDedupConfig())
    names = [stage.name for stage in stages_for(plain)]
    assert names == ["digits", "images", "manifest"]  # nothing changes where the section is left out
    Runner(output=tmp_path, executor=InlineExecutor()).run(stages_for(config))
    funnel = json.loads((tmp_path / "04-select/funnel.json").read_text())
    dropped = {rule["rule"]: rule["rejected"] for rule in funnel["rules"]}
    assert funnel["rules"][1]["setting"] == "perceptual hash within 4 bits"
    assert funnel["rows_in"] == 300 and dropped["duplicate"] > 0 and dropped["excluded"] == 0
    manifest = Manifest.load(tmp_path / "manifest.json")
    assert sum(entry.num_samples for entry in manifest.shards) == funnel["rows_out"] == 300 - dropped["duplicate"]
    sizes = []
    for path in sorted((tmp_path / "04-select").glob("0*.tar")):
        with ShardReader(path) as shard, ShardReader(tmp_path / "04-download" / path.name) as before:
            for sample, key in enumerate(shard.keys):
                sizes.append(shard.decode(sample, "json")["content_group"]["size"])
                assert shard.read(sample, "jpg") == before.read(before.keys.index(key), "jpg")
    assert sum(sizes) == 300
    assert "survival funnel" in capsys.readouterr().out


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    write_shards(tmp_path / "images", a_world())
    listed = tmp_path / "all.txt"
    listed.write_text("\n".join(hash_text(hash_of_file(body)) for samples in a_world() for _, body in samples))
    run(tmp_path, exclude=(listed,))
    select = SelectStage(tmp_path / "images", tmp_path / "04-content-dedup", None, None, (), tmp_path / "04-select")
    with pytest.raises(DataError, match=r"select: none of 19 pictures is left; .*funnel\.json shows which rule"):
        Runner(output=tmp_path, executor=InlineExecutor()).run([select])
