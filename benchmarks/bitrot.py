"""Flip one bit, read everything: what becomes of it in our label sets, and in what people keep labels in instead.

    pip install litdata mosaicml-streaming  # beside this project, in an environment for the purpose
    python benchmarks/bitrot.py --python streaming=PATH --python litdata=PATH --out benchmarks/results/bitrot.json

Each trial flips one random bit (each bit of all files has the same chance), or cuts one file, reads all of the store as a
training run would, and puts the file back. The outcome is one of

    error      reading raised an error, hung for a minute, or crashed
    wrong      reading ended well, and a value was another one, or samples were missing
    harmless   every value was the right one

Ours are flips over a whole label set (plan, samples, label shards, manifest), asked twice: `deit-cli labels verify`'s own function, and
what `deit-cli train` does before and while it trains: open, hold the source against the set, render the probes again,
work out the order, and make every batch of as many epochs as there are views, so that every file is read.

The others hold the same number of labels: webdataset (tars, strict handler), Parquet as pyarrow writes and reads it, Parquet with page checksums
written and verified, MosaicML streaming and litdata in a local folder. What they give is compared value by value.
"""

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import platform
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["DO_NOT_TRACK"] = "1"

HERE = Path(__file__).resolve()
ROWS, SEED, PATIENCE_S = 200, 0, 60
PEERS = ("webdataset", "parquet", "parquet_checksums", "streaming", "streaming_sha1", "litdata")
IMPORTS = {"webdataset": "webdataset", "parquet": "pyarrow.parquet", "streaming": "streaming", "litdata": "litdata"}
LIBRARIES = ("pyarrow", "webdataset", "mosaicml-streaming", "litdata", "numpy")
Rows = list[tuple[int, bytes]]  # class, and 44 bytes: what a label of K = 10 takes before compression


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "README.md")  # a set's card


def damages(folder: Path, count: int, kind: str) -> Iterator[tuple[Path, bytes]]:
    """Yield a file and the bytes that it is to have instead."""
    rng = random.Random(f"{SEED} {kind}")
    files = files_of(folder)
    sizes = [path.stat().st_size for path in files]
    for path in rng.choices(files, sizes, k=count):
        data = bytearray(path.read_bytes())
        if kind == "cut":
            yield path, bytes(data[: rng.randrange(len(data))])
        else:
            bit = rng.randrange(8 * len(data))
            data[bit // 8] ^= 1 << bit % 8
            yield path, bytes(data)


@contextlib.contextmanager
def damaged(path: Path, content: bytes) -> Iterator[None]:
    sound = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(sound)


# --- ours ---------------------------------------------------------------------------------------------------------


def make_ours(folder: Path) -> tuple[Path, Path]:
    """Label 12 small pictures in two tars, 4 views each in two blocks; return source and label set."""
    import numpy as np
    from PIL import Image

    source, labels = folder / "source", folder / "shards"
    source.mkdir(parents=True)
    (source / "classes.txt").write_text("red\ngreen\nblue\n")
    rng = np.random.default_rng(SEED)
    for shard in range(2):
        with tarfile.open(source / f"train-{shard}.tar", "w") as archive:
            for number in range(6):
                picture = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (14, 14, 3), dtype=np.uint8)).save(picture, "PNG")
                for ending, content in (("png", picture.getvalue()), ("cls", b"%d" % (number % 3))):
                    member = tarfile.TarInfo(f"s{shard}-{number}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    command = [sys.executable, HERE.parent.parent / "cli.py", "precompute", "--data", source, "--out", labels]
    command += [
        "--views",
        "0:4",
        "--views-per-shard",
        "2",
        "--topk",
        "2",
        "--teacher",
        "test_resnet",
        "--no-pretrained",
    ]
    command += ["--teacher-img-size", "16", "--set", "img_size=16", "--set", "mix_block=6", "--accuracy-samples", "0"]
    subprocess.run([*map(str, command), "--device", "cpu", "--workers", "0"], check=True, stderr=subprocess.DEVNULL)
    return source, labels


def by_verify(source: Path, labels: Path) -> Any:
    """Return nothing if the label set is sound; raise what is wrong with it."""
    from pipeline.errors import LabelSetError
    from pipeline.settings.configs import VerifyConfig
    from pipeline.verify.verify import verify

    if problems := verify(str(labels), VerifyConfig(probes=False, threads=1)).problems:
        raise LabelSetError("; ".join(map(str, problems)))


def by_train(source: Path, labels: Path) -> Any:
    """Return a hash of all that training would see of the label set; raise what stops it."""
    from trainer.config import TrainConfig
    from trainer.run import make_order, open_data
    from trainer.stream import BatchRenderer, Catalogue

    config = TrainConfig(
        labels=str(labels), data=str(source), output=str(labels.parent / "run"), epochs=4, batch_size=12, repeated_aug=1
    )
    data = open_data(config)
    order = make_order(config, data)
    renderer = BatchRenderer(Catalogue(data.source, data.label_set), data.recipe, order)
    digest = hashlib.sha256()
    for index in range(config.epochs * order.steps_per_epoch):
        batch = renderer.render_here(index)
        for tensor in (batch.images, *vars(batch.teacher).values(), batch.classes.class_label):
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def measure_ours(work: Path, counts: dict[str, int]) -> dict[str, Any]:
    from pipeline.errors import DeitCliError

    sys.path.insert(0, str(HERE.parent.parent))
    source, labels = make_ours(work / "ours")
    readers: dict[str, Callable[[Path, Path], Any]] = {"verify": by_verify, "train": by_train}
    sound = {name: read(source, labels) for name, read in readers.items()}
    found: dict[str, Counter[str]] = {}
    files = {str(path.relative_to(labels)): path.stat().st_size for path in files_of(labels)}
    began = time.monotonic()
    for kind, count in counts.items():
        for path, content in damages(labels, count, kind):
            with damaged(path, content):
                for name, read in readers.items():
                    try:
                        what = "harmless" if read(source, labels) == sound[name] else "wrong"
                    except DeitCliError:
                        what = "error"
                    found.setdefault(f"{kind}, {name}", Counter())[what] += 1
    assert {name: read(source, labels) for name, read in readers.items()} == sound  # all of it was put back
    return {"files": files, "seconds": round(time.monotonic() - began), "outcomes": found}


# --- the others ---------------------------------------------------------------------------------------------------


def rows() -> Rows:
    rng = random.Random(SEED)
    return [(rng.randrange(1000), rng.randbytes(44)) for _ in range(ROWS)]


def write_store(name: str, out: Path) -> None:
    out.mkdir(parents=True)
    if name == "webdataset":
        from webdataset import TarWriter

        with TarWriter(str(out / "labels-000000.tar")) as tar:
            for number, (hard, label) in enumerate(rows()):
                tar.write({"__key__": f"n{number:06}", "cls": str(hard), "bin": label})
    elif name.startswith("parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table({"hard": [hard for hard, _ in rows()], "label": [label for _, label in rows()]})
        pq.write_table(table, out / "labels.parquet", write_page_checksum=name == "parquet_checksums")
    elif name.startswith("streaming"):
        from streaming import MDSWriter

        hashes = ["sha1"] if name == "streaming_sha1" else None
        with MDSWriter(out=str(out), columns={"hard": "int", "label": "bytes"}, hashes=hashes) as writer:
            for hard, label in rows():
                writer.write({"hard": hard, "label": label})
    else:
        import litdata

        inputs = [{"hard": hard, "label": label} for hard, label in rows()]
        litdata.optimize(fn=as_it_is, inputs=inputs, output_dir=str(out), chunk_size=ROWS, num_workers=1, verbose=False)


def as_it_is(item: Any) -> Any:
    return item


def read_store(name: str, folder: Path) -> Rows:
    if name == "webdataset":
        import webdataset

        tars = webdataset.WebDataset(
            [str(path) for path in files_of(folder)], shardshuffle=False, handler=webdataset.reraise_exception
        )
        return [(int(sample["cls"]), sample["bin"]) for sample in tars]
    if name.startswith("parquet"):
        import pyarrow.parquet as pq

        table = pq.read_table(folder / "labels.parquet", page_checksum_verification=name == "parquet_checksums")
        return list(zip(table["hard"].to_pylist(), table["label"].to_pylist(), strict=True))
    if name.startswith("streaming"):
        import streaming
        from streaming.base.util import clean_stale_shared_memory

        clean_stale_shared_memory()
        hashing = "sha1" if name == "streaming_sha1" else None
        samples: Any = streaming.StreamingDataset(local=str(folder), batch_size=1, shuffle=False, validate_hash=hashing)
    else:
        import litdata

        samples = litdata.StreamingDataset(str(folder), shuffle=False)
    return [(int(sample["hard"]), bytes(sample["label"])) for sample in (samples[at] for at in range(len(samples)))]


def one_read(name: str, folder: Path, answer: Any) -> None:
    """Read a store in a process of its own: some of these hang or crash over damaged bytes."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    try:
        answer.send(read_store(name, folder) == rows())
    except BaseException as error:
        answer.send(f"{type(error).__name__}: {error}"[:200])
    os._exit(0)


def outcome(name: str, folder: Path) -> str:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=one_read, args=(name, folder, theirs))
    process.start()
    theirs.close()
    said: Any = "hung"
    if ours.poll(PATIENCE_S):
        try:
            said = ours.recv()
        except EOFError:
            said = "crashed"
    if process.is_alive():
        process.kill()
    process.join()
    if isinstance(said, str):
        return "error"
    return "harmless" if said else "wrong"


def measure_peer(name: str, work: Path, counts: dict[str, int]) -> dict[str, Any]:
    """Called in the peer's own interpreter."""
    warnings.simplefilter("ignore")
    folder = work / name
    write_store(name, folder)
    importlib.import_module(IMPORTS[name.split("_")[0]])  # once, not in every process
    assert outcome(name, folder) == "harmless", f"{name} does not read what it wrote"
    found = {kind: Counter[str]() for kind in counts}
    for kind, count in counts.items():
        for path, content in damages(folder, count, kind):
            with damaged(path, content):
                found[kind][outcome(name, folder)] += 1
    files = {str(path.relative_to(folder)): path.stat().st_size for path in files_of(folder)}
    return {"files": files, "outcomes": found}


def run_peer(name: str, python: str, work: Path, counts: dict[str, int]) -> dict[str, Any]:
    command = [python, str(HERE), "--peer", name, "--work", str(work), "--counts", json.dumps(counts)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"left_out": " ".join(done.stderr.split())[-300:]}
    return json.loads(done.stdout.splitlines()[-1])


def versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=10_000, help="single-bit flips of a label set")
    parser.add_argument("--cuts", type=int, default=1_000, help="truncations of a file of a label set")
    parser.add_argument("--peer-flips", type=int, default=400, help="flips of each other store")
    parser.add_argument("--slow-flips", type=int, default=100, help="flips of streaming and litdata, a second each")
    parser.add_argument(
        "--peer-cuts", type=int, default=100, help="truncations of each other store; a quarter of the slow"
    )
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH", help="a peer's interpreter")
    parser.add_argument("--only", nargs="*", default=["ours", *PEERS], help="which stores")
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--counts", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.peer:
        result = measure_peer(asked.peer, asked.work, json.loads(asked.counts))
        print(json.dumps(result | {"versions": versions()}))
        return
    work = Path(tempfile.mkdtemp())
    pythons = dict(pair.split("=", 1) for pair in asked.python)
    results: dict[str, Any] = {}
    for name in asked.only:
        slow = name.startswith(("streaming", "litdata"))
        if name == "ours":
            sys.path.insert(0, str(HERE.parent.parent))
            results[name] = measure_ours(work, {"flip": asked.flips, "cut": asked.cuts})
        else:
            counts = {"flip": asked.slow_flips if slow else asked.peer_flips}
            counts["cut"] = asked.peer_cuts // 4 if slow else asked.peer_cuts
            python = pythons.get(name.split("_")[0], sys.executable)
            results[name] = run_peer(name, python, work, counts)
        print(name, json.dumps(results[name].get("outcomes", results[name])), file=sys.stderr, flush=True)
        if asked.out:
            machine = {"python": platform.python_version(), "versions": versions(), "seed": SEED, "rows_of_peers": ROWS}
            asked.out.write_text(json.dumps({"machine": machine, "results": results}, indent=1, sort_keys=True) + "\n")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
