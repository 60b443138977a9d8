"""A tar of ours is the tar that `tarfile` writes, with the headers of plain names put together here."""

import io
import random
import tarfile

import pytest

from pipeline.images import tar_archive
from pipeline.images.tar_archive import timm_info, write_tar

NAMES = (
    "a",
    "folder/n01440764_10026.jpg",
    "x" * 99,
    "x" * 100,
    "x" * 101,
    "é.jpg",
    "with space.cls",
    "a" * 60 + "/" + "b" * 60,
)


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 10**6, 8**11 - 1, 8**11])
def test_headers_are_those_of_tarfile(size):
    for name in NAMES:
        info = tarfile.TarInfo(name)
        info.size = size
        assert tar_archive._header(name, size) == info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")


def test_tarfile_reads_what_was_written():
    rng = random.Random(0)
    members = [(f"{number}-{name}", rng.randbytes(rng.randrange(2000))) for number, name in enumerate(NAMES)]
    file = io.BytesIO()
    write_tar(file, members, comment="of these tests")
    file.seek(0)
    with tarfile.open(fileobj=file) as tar:
        assert [(member.name, tar.extractfile(member).read()) for member in tar] == members  # pyright: ignore[reportOptionalMemberAccess]
        assert {(member.mode, member.mtime, member.uid) for member in tar} == {(0o644, 0, 0)}


def test_timm_is_told_the_tars_and_their_sizes():
    info = timm_info({"a.tar": 2, "b.tar": 3}, split="val")
    assert info == {
        "splits": {"val": {"name": "val", "num_samples": 5, "filenames": ["a.tar", "b.tar"], "shard_lengths": [2, 3]}}
    }
    assert timm_info({}, split="val", label_field="hard")["splits"]["val"]["alt_label"] == "hard"
