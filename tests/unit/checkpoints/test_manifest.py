from __future__ import annotations

from pathlib import Path

import pytest

from sdtrain.checkpoints.manifest import Checkpoint, buffer_key, folder_name, list_checkpoints, rank_file, seal, unseal


def test_names_on_disk() -> None:
    assert folder_name(1000) == "step-00001000"
    assert folder_name(123456789) == "step-123456789"
    assert rank_file("denoiser", 3) == "denoiser.rank00003.safetensors"
    assert buffer_key("autoencoder", "quantizer.usage") == "autoencoder/buffer/quantizer.usage"


def test_seal_and_unseal_are_inverse() -> None:
    content = {"step": 3, "loss": 0.1 + 0.2, "names": ["ä", None], "nested": {"b": 1, "a": 1e-300}}
    assert unseal(seal(content)) == content


def test_any_changed_digit_breaks_the_seal() -> None:
    text = seal({"step": 1000, "size": 512})
    for position, letter in enumerate(text):
        if letter.isdigit():
            changed = text[:position] + str((int(letter) + 1) % 10) + text[position + 1 :]
            with pytest.raises(ValueError, match="its own digest does not fit its content"):
                unseal(changed)


def test_a_manifest_that_is_no_object_is_refused() -> None:
    with pytest.raises(ValueError, match="holds no JSON object"):
        unseal("[]")


def test_newest_comes_first_and_foreign_names_are_left_out(tmp_path: Path) -> None:
    names = ["step-00000002", "step-00000010", "step-123456789", "step-00000003.tmp-a", ".trash-step-00000001-ff"]
    for name in [*names, "step-5", "other"]:
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000099").write_text("a file")
    listed = [checkpoint.path.name for checkpoint in list_checkpoints(tmp_path)]
    assert listed == ["step-123456789", "step-00000010", "step-00000002"]


def test_no_folder_holds_no_checkpoints(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path / "absent") == []


def test_damage_is_kept_as_text_and_the_step_comes_from_the_name(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000007"
    folder.mkdir()
    assert (Checkpoint.open(folder).damage, Checkpoint.open(folder).step) == ("is missing", 7)
    (folder / "MANIFEST.json").write_text("{torn")
    assert "Expecting property name" in Checkpoint.open(folder).damage
    (folder / "MANIFEST.json").write_bytes(b"\xff\xfe")
    assert "can't decode" in Checkpoint.open(folder).damage
    assert Checkpoint.open(tmp_path).step == -1


def test_what_a_manifest_says(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000007"
    folder.mkdir()
    files = {"a": {"size_bytes": 3, "sha256": "", "rank": 0}, "b": {"size_bytes": 4, "sha256": "", "rank": 1}}
    (folder / "MANIFEST.json").write_text(
        seal({"step": 7, "world_size": 2, "files": files, "layouts": {"denoiser": [], "critic": []}})
    )
    checkpoint = Checkpoint.open(folder)
    assert (checkpoint.step, checkpoint.world_size, checkpoint.size_bytes) == (7, 2, 7)
    assert checkpoint.trainables == ("critic", "denoiser")
    assert not checkpoint.pinned
    assert not checkpoint.marked_corrupt
    (folder / "PINNED").touch()
    (folder / "CORRUPT").touch()
    marked = Checkpoint.open(folder)
    assert marked.pinned
    assert marked.marked_corrupt
