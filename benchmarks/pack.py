"""Writing tars: `deit-cli pack` beside webdataset's ShardWriter in a loop, and the memory of `pack`.

    OMP_NUM_THREADS=1 python benchmarks/pack.py --data imagenet-sample --rounds 3 --out benchmarks/results/pack.json

*copy*: an image folder of small PNG files (32 x 32) in ten classes, copied as it is. *resize*: photographs of --data, repeated
under new keys in tars of 1,024, with the shorter side at 256 pixels, Lanczos, JPEG quality 95. The loop reads the same images in the
same order (that of `pack`), and writes tars of 1,000 with ShardWriter; for *resize* it decodes, resizes and encodes with Pillow.
Both fsync each tar when it is complete; `pack` also fsyncs folders and hashes what it writes. Loader processes are forked from
a server that runs already, and both read files that are in memory. *memory*: the command in a process of its own, for sources of
two sizes; five times a second the proportional set sizes of it and of its children are added up, and the largest sum is kept.
"""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from memory import pss_bytes
from photographs import write_source
from PIL import Image
from rounds import machine, medians, options, ratios, write_json
from webdataset.writer import ShardWriter

from pipeline.exchange.pack import pack
from pipeline.images.source import open_source
from pipeline.settings.configs import PackConfig

CLASSES = 10
SHORTER = 256
PER_TAR = 1000


def write_folder(folder: Path, count: int) -> Path:
    """Write an image folder of small PNG files, each with other pixels."""
    rng = np.random.default_rng(0)
    for label in range(CLASSES):
        (folder / f"class-{label}").mkdir(parents=True)
    for number in range(count):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(buffer, "PNG", compress_level=1)
        label = number * CLASSES // count
        (folder / f"class-{label}" / f"{number:07}.png").write_bytes(buffer.getvalue())
    return folder


def sync(name: str) -> None:
    """Fsync a tar that ShardWriter has closed."""
    descriptor = os.open(name, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def loop(samples: Iterator[dict[str, Any]], out: Path) -> None:
    """Write samples with webdataset's own writer."""
    out.mkdir()
    with ShardWriter(str(out / "train-%06d.tar"), maxcount=PER_TAR, post=sync, verbose=0, mtime=0) as sink:
        for sample in samples:
            sink.write(sample)


def shuffled(keys: list[str]) -> list[int]:
    """Return the order of `pack` with seed 0."""
    return sorted(
        range(len(keys)), key=lambda i: hashlib.blake2b(keys[i].encode(), digest_size=16, salt=bytes(16)).digest()
    )


def files_of(folder: Path, *, decoded: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the samples of an image folder in a shuffled order, as a script of a few lines does it."""
    names = sorted(path.name for path in folder.iterdir())
    paths = [path for name in names for path in sorted((folder / name).iterdir())]
    keys = [f"{path.parent.name}/{path.stem}" for path in paths]
    labels = {name: label for label, name in enumerate(names)}
    for i in shuffled(keys):
        label, image = labels[paths[i].parent.name], paths[i].read_bytes()
        if decoded:
            Image.open(io.BytesIO(image)).convert("RGB")
        yield {"__key__": keys[i], "png": image, "cls": str(label).encode()}


def resized_of(tars: str) -> Iterator[dict[str, Any]]:
    """Yield the samples of some tars in a shuffled order, resized with Pillow."""
    places = [(shard, row) for shard in open_source(tars).shards for row in range(len(shard))]
    keys = [shard.keys[row] for shard, row in places]
    for i in shuffled(keys):
        shard, row = places[i]
        sample = shard[row]
        image = Image.open(io.BytesIO(sample.image)).convert("RGB")
        width, height = image.size
        least, content = min(width, height), sample.image
        if least > SHORTER:
            buffer = io.BytesIO()
            size = (SHORTER * width // least, SHORTER * height // least)
            image.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=95, subsampling="4:2:0")
            content = buffer.getvalue()
        yield {"__key__": keys[i], "jpg": content, "cls": str(sample.class_label).encode()}


def rate(count: int, work: Callable[[Path], object], scratch: Path) -> float:
    """Return images per second."""
    out = scratch / "out"
    os.sync()
    began = time.monotonic()
    work(out)
    seconds = time.monotonic() - began
    shutil.rmtree(out)
    return count / seconds


def compare(count: int, rounds: int, competitors: dict[str, Callable[[Path], object]], scratch: Path) -> dict[str, Any]:
    """Let competitors take turns; return images per second of each, their medians, and their ratios to ShardWriter's."""
    found = []
    for _ in range(rounds):
        found.append({name: rate(count, work, scratch) for name, work in competitors.items()})
        print({name: round(value) for name, value in found[-1].items()}, flush=True)
    return {"images": count, "median": medians(found), "to_shardwriter": ratios(found, "shardwriter"), "rounds": found}


def packed(source: str | Path, **settings: Any) -> Callable[[Path], object]:
    """Return the packing of a source with these settings."""
    return lambda out: pack(str(source), out, PackConfig(samples_per_shard=PER_TAR, **settings))


def start_seconds(scratch: Path) -> dict[str, float]:
    """Return the seconds that `pack` takes for one file: what a rate for few images is made of."""
    one, found = write_folder(scratch / "one", 1), {}
    for workers in (0, 1, 2):
        began = time.monotonic()
        packed(one, workers=workers)(scratch / "out")
        found[f"-j {workers}"] = round(time.monotonic() - began, 3)
        shutil.rmtree(scratch / "out")
    return found


def peak(source: Path, out: Path, workers: int) -> dict[str, Any]:
    """Return peak memory in bytes and seconds of the command."""
    began, highest = time.monotonic(), 0
    command = [sys.executable, "-c", "import cli; cli.main()", "pack", str(source), str(out), "-j", str(workers)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        highest = max(highest, pss_bytes(process.pid))
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(process.returncode)
    size = sum(path.stat().st_size for path in out.iterdir())
    shutil.rmtree(out)
    return {"peak_bytes": highest, "seconds": time.monotonic() - began, "bytes": size}


def main() -> None:
    parser = options(__doc__, rounds=3)
    parser.add_argument("--data", required=True, help="folder with a tar of JPEG photographs")
    parser.add_argument("--files", type=int, default=40_000, help="files of *copy*")
    parser.add_argument("--photographs", type=int, default=500, help="photographs of *resize*")
    parser.add_argument("--small", type=int, default=10_000, help="files of the smaller source of *memory*")
    parser.add_argument("--large", type=int, default=100_000, help="files of the larger source of *memory*")
    args = parser.parse_args()
    result: dict[str, Any] = {"what": "images per second; peak PSS in bytes", "machine": machine()}
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        scratch = Path(folder)
        files = write_folder(scratch / "files", args.files)
        tars = write_source(scratch / "photographs", args.photographs, Path(args.data))
        packed(tars, workers=2)(scratch / "warm")  # starts the server of the loader processes
        result["copy"] = compare(
            args.files,
            args.rounds,
            {
                "shardwriter": lambda out: loop(files_of(files), out),
                "pack -j 1 --on-bad-image keep": packed(files, workers=1, on_bad_image="keep"),
                "pack -j 2 --on-bad-image keep": packed(files, workers=2, on_bad_image="keep"),
                "shardwriter, each image decoded": lambda out: loop(files_of(files, decoded=True), out),
                "pack -j 1": packed(files, workers=1),
                "pack -j 2": packed(files, workers=2),
            },
            scratch,
        )
        result["resize"] = compare(
            args.photographs,
            args.rounds,
            {
                "shardwriter": lambda out: loop(resized_of(tars), out),
                "pack -j 1": packed(tars, workers=1, shorter_side=SHORTER),
                "pack -j 2": packed(tars, workers=2, shorter_side=SHORTER),
            },
            scratch,
        )
        result["start_s"] = start_seconds(scratch)
        result["memory"] = {}
        for count in (args.small, args.large):
            source = write_folder(scratch / str(count), count)
            result["memory"][str(count)] = peak(source, scratch / "out", 2)
        print(result["memory"])
    write_json(args.out, result)


if __name__ == "__main__":
    main()
