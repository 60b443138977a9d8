"""Photographs for benchmarks: those of a WebDataset tar, repeated under new names, or made-up ones."""

import io
import random
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

Photo = tuple[str, int, bytes]  # name, class, JPEG
SAMPLES_PER_TAR = 1024  # a whole number of mix blocks, so that all batches have one size
MADE_UP = 16


def write_source(out: Path, count: int, data: Path | None) -> str:
    """Write tars of `count` photographs below `out`, and return that folder as a source.

    Args:
        out: created.
        count: photographs.
        data: folder with a WebDataset tar of JPEGs and classes, which are repeated under new names; None: made-up ones.
    """
    photos = made_up() if data is None else read_photos(sorted(data.glob("*.tar"))[0])
    out.mkdir(parents=True, exist_ok=True)
    write_tars(out, list(repeated(photos, -(-count // len(photos))))[:count], SAMPLES_PER_TAR)
    return str(out)


def made_up() -> list[Photo]:
    """Return JPEGs of 500 x 375 pixels: smooth random colours with noise, about as many bytes as a photograph has."""
    photos = []
    for number in range(MADE_UP):
        rng = np.random.default_rng(number)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(smooth + rng.integers(-24, 25, smooth.shape), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noisy).save(file, "JPEG", quality=90)
        photos.append((f"made-up-{number:02}", number, file.getvalue()))
    return photos


def read_photos(tar: Path) -> list[Photo]:
    """Return the photographs of a WebDataset tar."""
    with tarfile.open(tar) as archive:
        members = {member.name: archive.extractfile(member).read() for member in archive if member.isfile()}  # pyright: ignore[reportOptionalMemberAccess]
    names = sorted(name.removesuffix(".jpg") for name in members if name.endswith(".jpg"))
    return [(name, int(members[f"{name}.cls"]), members[f"{name}.jpg"]) for name in names]


def repeated(photos: list[Photo], times: int) -> Iterator[Photo]:
    """Yield the photographs over and over under new names, in an order that mixes them."""
    order = [(turn, photo) for turn in range(times) for photo in photos]
    random.Random(0).shuffle(order)
    for turn, (name, label, image) in order:
        yield f"{name}-{turn:03}", label, image


def write_tars(out: Path, photos: Iterable[Photo], size: int = 1000) -> None:
    """WebDataset tars of `size` photographs."""
    everything = list(photos)
    for shard, start in enumerate(range(0, len(everything), size)):
        with tarfile.open(out / f"train-{shard:06}.tar", "w") as archive:
            for name, label, image in everything[start : start + size]:
                for ending, content in (("jpg", image), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{name}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
