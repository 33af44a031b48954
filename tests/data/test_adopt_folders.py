"""Shards of others with folders in them, as `tar cf` packs them: entries passed over, names as webdataset has them."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from pathlib import Path

import pytest
from webdataset.tariterators import base_plus_ext

from sdtrain.config.ingestion import ValidationSplitConfig
from sdtrain.errors import DataError
from tests.data.test_adopt import _unlimited, page, picture, run, samples_of

__all__ = ["_unlimited"]


def pack(folder: Path, target: Path, *words: str) -> None:
    """By the tar of this machine, in the order of the names."""
    target.parent.mkdir(parents=True, exist_ok=True)
    command = ["tar", "--sort=name", "--create", f"--file={target}", f"--directory={folder}", *words]
    subprocess.run(command, check=True)


def test_folders_of_tar_are_passed_over_and_keys_are_those_of_webdataset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(["dir/000", "dir/001", "dir.v2/000", "top"]):
        path = tmp_path / "loose" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
        path.with_suffix(".txt").write_text(f"a caption of {name}")
    pack(tmp_path / "loose", tmp_path / "given/0.tar", ".")
    pack(tmp_path / "loose/dir", tmp_path / "given/1.tar", "001.jpg", "001.txt")  # the same picture once more
    run(page(tmp_path / "out", tmp_path / "given", validation=ValidationSplitConfig(num_samples=0)))
    assert "metadata: 5 samples in 2 shards, 3 folder entries passed over" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out/01-metadata/summary.json").read_text())
    assert summary == {"shards": 2, "samples": 5, "rows": 5, "rejected": {}, "folders": 3}
    assert "folders" not in json.loads((tmp_path / "out/01-metadata/00001.stats.json").read_text())
    found = samples_of(tmp_path / "out/04-download").values()
    keys = {fields["json"]["adopted"]["key"]: fields["txt"].decode() for fields in found}
    assert keys == {name: f"a caption of {name[2:]}" for name in ("./dir/000", "./dir/001", "./dir.v2/000", "./top")}
    with tarfile.open(tmp_path / "given/0.tar") as tar:
        theirs = {base_plus_ext(member.name)[0] for member in tar if member.isreg()}
    assert theirs == set(keys)


@pytest.mark.parametrize(
    ("name", "kind", "size", "text"),
    [
        ("../up", tarfile.DIRTYPE, 0, r"member '\.\./up' has an absolute name or '\.\.' in it"),
        ("/etc", tarfile.DIRTYPE, 0, r"member '/etc' has an absolute name or '\.\.' in it"),
        ("full", tarfile.DIRTYPE, 512, r"member 'full' is no regular file \(type b'5'\)"),
        ("pipe", tarfile.FIFOTYPE, 0, r"member 'pipe' is no regular file \(type b'6'\)"),
    ],
)
def test_other_entries_than_plain_folders_are_refused(
    tmp_path: Path, name: str, kind: bytes, size: int, text: str
) -> None:
    (tmp_path / "given").mkdir()
    with tarfile.open(tmp_path / "given/0.tar", "w") as tar:
        for member_name, member_kind, body in (("a.jpg", tarfile.REGTYPE, picture(1)), (name, kind, bytes(size))):
            member = tarfile.TarInfo(member_name)
            member.type, member.size = member_kind, len(body)
            tar.addfile(member, io.BytesIO(body))
    with pytest.raises(DataError, match=text):
        run(page(tmp_path / "out", tmp_path / "given"))
