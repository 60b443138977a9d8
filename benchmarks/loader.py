"""Views per second that one loader process brings into the trainer: our stream against what people use instead.

    pip install litdata mosaicml-streaming  # beside this project, in an environment for the purpose
    python benchmarks/loader.py --data imagenet-sample --work FOLDER --out benchmarks/results/loader.json

All read the same photographs, repeated under new names, from the format of their own, which this script writes below
--work (and finds there in another run), and all have one worker process and batches of 64:

    ours_3, ours_1   trainer's batches from a label set, 3 views of an image in a batch (the default), and 1
    timm             torch's DataLoader over timm's ImageDataset and create_transform, which ends in float32 tensors
    timm_fast        the same with FastCollateMixup, as timm's train.py has it: uint8, mixed in the worker; erasing is the device's
    webdataset       WebDataset, decoded by Pillow, with that transform as in `timm`
    litdata          its StreamingDataset and StreamingDataLoader over its chunks, same transform
    streaming        MosaicML's StreamingDataset over MDS, same transform

The recipe is DeiT's: random resized crop to 224, bicubic, flip, RandAugment m9 n2 mstd0.5 inc1, erasing 0.25. Ours brings
with each batch the teacher's labels, read and checked, its images checked by their hashes, and the mixing parameters; the
others bring class labels. Mixing is the device's for all but `timm_fast`, and is left out.

Each competitor is a process of its own, and it and its worker share one core with all others, which wait meanwhile. Rounds
alternate, ratios are taken within a round. On a machine that others use too, views for each second that a competitor's processes
computed say more than views/s. The first batches of a round, which had been made before it began, and the first
batch of an epoch, with the wait for it, are not counted. All of it takes six minutes on two cores.

litdata and mosaicml-streaming are no dependencies of this project, and streaming pins an older NumPy. One that must live in
an environment of its own, besides torch and timm, is given as `--python NAME=PATH`, its interpreter. One that cannot be imported
is left out, by name.
The label set is that of a small network with random weights: what the labels say changes no speed.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

# Nothing but torch, NumPy and Pillow is imported up here: a competitor's interpreter has only what that competitor needs.
import torch
from photographs import Photo, read_photos, repeated, write_tars
from PIL import Image
from torch.utils.data import DataLoader

HERE = Path(__file__).resolve()
BATCH, WORKERS, VIEWS, ENDLESS = 64, 1, 6, 10**9
WARM_UP = 5  # batches: two wait in a queue of each loader, one in its worker's hands, and two more
LIBRARIES = (
    "torch", "torchvision", "timm", "numpy", "Pillow", "opencv-python-headless", "simplejpeg", "turbojpeg", "webdataset",
    "litdata", "mosaicml-streaming",
)  # fmt: skip


# --- the same photographs in every format -----------------------------------------------------------------------


def write_folders(out: Path, photos: Iterable[Photo]) -> None:
    """One folder a class, as timm and torchvision read it."""
    for name, label, image in photos:
        (out / f"{label:04}").mkdir(exist_ok=True)
        (out / f"{label:04}" / f"{name}.jpg").write_bytes(image)


def write_litdata(out: Path, photos: Iterable[Photo]) -> None:
    import litdata

    inputs = [{"image": image, "class": label} for _, label, image in photos]
    litdata.optimize(fn=as_it_is, inputs=inputs, output_dir=str(out), chunk_bytes="64MB", num_workers=1, verbose=False)


def as_it_is(item: Any) -> Any:
    return item


def write_mds(out: Path, photos: Iterable[Photo]) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(out), columns={"image": "bytes", "class": "int"}) as writer:
        for _, label, image in photos:
            writer.write({"image": image, "class": label})


def write_labels(out: Path, tars: Path) -> None:
    """Label the tars' photographs with a small network of random weights."""
    command = [sys.executable, HERE.parent.parent / "cli.py", "precompute", "--data", tars, "--out", out, "--views"]
    command += [f"0:{VIEWS}", "--recipe", "deit", "--teacher", "test_resnet", "--no-pretrained", "--teacher-img-size"]
    command += ["32", "--accuracy-samples", "0", "--device", "cpu", "--workers", "1"]
    subprocess.run([str(each) for each in command], check=True, stdout=sys.stderr)


def written(folder: Path, name: str, write: Callable[[Path], None]) -> Path:
    """Return the folder of a format; write it first, unless an earlier run did."""
    final, draft = folder / name, folder / f"{name}.draft"
    if not final.exists():
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        write(draft)
        draft.rename(final)
    return final


# --- competitors: each yields the batches of an epoch whenever it is called -------------------------------------


class Transform:
    """timm's, from JPEG bytes or an image to a tensor, or to what FastCollateMixup takes."""

    def __init__(self, *, for_collate: bool = False) -> None:
        from timm.data.transforms_factory import create_transform

        self._transform: Any = create_transform(
            224,
            is_training=True,
            auto_augment="rand-m9-mstd0.5-inc1",
            re_prob=0.25,
            re_mode="pixel",
            interpolation="bicubic",
            color_jitter=0.0,
            use_prefetcher=for_collate,
        )
        self._last: Any = None

    def __call__(self, image: Any) -> Any:
        opened = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image
        # Pillow 13 refuses to keep no bit at all, which timm 1.0.31 asks it for now and then (magnitudes above 10).
        with contextlib.suppress(ValueError):
            self._last = self._transform(opened.convert("RGB"))
        return self._last


class OfRecord:
    """The transform for records of image and class."""

    def __init__(self) -> None:
        self._transform = Transform()

    def __call__(self, record: Any) -> Any:
        return self._transform(record["image"]), record["class"]


def ours(labels: Path, repeats: int, batch_size: int, workers: int) -> Iterator[Any]:
    """Yield the batches of a training run without end; the one function that knows the trainer's stream."""
    from trainer.config import TrainConfig
    from trainer.run import make_order, open_data
    from trainer.stream import BatchRenderer, Catalogue, stream_batches

    config = TrainConfig(labels=str(labels), batch_size=batch_size, repeated_aug=repeats)
    data = open_data(config)
    renderer = BatchRenderer(Catalogue(data.source, data.label_set), data.recipe, make_order(config, data))
    return stream_batches(renderer, range(ENDLESS), workers=workers)


def ours_batches(repeats: int, folder: Path) -> Callable[[], Iterable[Any]]:
    return lambda: ((batch.images, batch.teacher.hard) for batch in ours(folder / "labels", repeats, BATCH, WORKERS))


def timm_batches(fast: bool, folder: Path) -> Callable[[], Iterable[Any]]:
    from timm.data.dataset import ImageDataset
    from timm.data.mixup import FastCollateMixup

    dataset = ImageDataset(str(folder / "folders"), transform=Transform(for_collate=fast))
    mixed = FastCollateMixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=1000)
    loader = DataLoader(
        dataset, BATCH, True, num_workers=WORKERS, drop_last=True, persistent_workers=True, collate_fn=mixed if fast else None
    )  # fmt: skip
    return lambda: loader


def webdataset_batches(folder: Path) -> Callable[[], Iterable[Any]]:
    import webdataset as wds

    tars = sorted(str(tar) for tar in (folder / "tars").glob("*.tar"))
    dataset: Any = wds.WebDataset(tars, shardshuffle=100, empty_check=False)  # pyright: ignore[reportAttributeAccessIssue]
    dataset = dataset.shuffle(1000).decode("pilrgb").to_tuple("jpg", "cls").map_tuple(Transform(), as_it_is)
    dataset = dataset.batched(BATCH, partial=False)
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=WORKERS, persistent_workers=True)  # pyright: ignore[reportAttributeAccessIssue]
    return lambda: loader


def litdata_batches(folder: Path) -> Callable[[], Iterable[Any]]:
    import litdata

    chunks = written(folder, "litdata", lambda out: write_litdata(out, photos_of(folder)))
    dataset = litdata.StreamingDataset(str(chunks), shuffle=True, drop_last=True, transform=OfRecord())
    loader = litdata.StreamingDataLoader(
        dataset, batch_size=BATCH, num_workers=WORKERS, drop_last=True, persistent_workers=True
    )
    return lambda: loader


def streaming_batches(folder: Path) -> Callable[[], Iterable[Any]]:
    import streaming
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    record = OfRecord()

    class Photos(streaming.StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            return record(super().__getitem__(at))

    shards = written(folder, "mds", lambda out: write_mds(out, photos_of(folder)))
    dataset = Photos(local=str(shards), shuffle=True, batch_size=BATCH)
    loader = streaming.StreamingDataLoader(
        dataset, batch_size=BATCH, num_workers=WORKERS, drop_last=True, persistent_workers=True
    )
    return lambda: loader


def photos_of(folder: Path) -> Iterator[Photo]:
    for tar in sorted((folder / "tars").glob("*.tar")):
        yield from read_photos(tar)


COMPETITORS: dict[str, Callable[[Path], Callable[[], Iterable[Any]]]] = {
    "ours_3": lambda folder: ours_batches(3, folder),
    "ours_1": lambda folder: ours_batches(1, folder),
    "timm": lambda folder: timm_batches(False, folder),
    "timm_fast": lambda folder: timm_batches(True, folder),
    "webdataset": webdataset_batches,
    "litdata": litdata_batches,
    "streaming": streaming_batches,
}


# --- a competitor's process -------------------------------------------------------------------------------------


def serve(name: str, folder: Path, core: int) -> None:
    """Say what a batch is, then answer each line of seconds with a rate, in lines of JSON; stdout is for nothing else."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    try:
        batches = endless(COMPETITORS[name](folder))
    except ImportError as error:
        print(json.dumps({"missing": f"{error} in {sys.executable}"}), file=answers)
        return
    images = next(batches)[0][0]
    batch = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
    print(json.dumps({"batch": batch, "python": platform.python_version(), "versions": versions()}), file=answers)
    for line in sys.stdin:
        print(json.dumps(rate(batches, float(line))), file=answers)


def endless(epoch: Callable[[], Iterable[Any]]) -> Iterator[tuple[Any, bool]]:
    """Yield the batches of one epoch after the other, and whether each is the first of its epoch."""
    while True:
        for number, batch in enumerate(epoch()):
            yield batch, number == 0


def rate(batches: Iterator[tuple[Any, bool]], seconds: float) -> dict[str, float]:
    """Return views/s, and views for each second that this process and those it started computed."""
    for _ in range(WARM_UP):
        next(batches)
    counted = views = 0
    spent, computed = 0.0, cpu_seconds()
    while spent < seconds:
        began = time.perf_counter()
        batch, is_first = next(batches)
        views += len(batch[0])
        if not is_first:
            counted, spent = counted + len(batch[0]), spent + time.perf_counter() - began
    return {"per_second": counted / spent, "per_cpu_second": views / (cpu_seconds() - computed)}


def cpu_seconds() -> float:
    """Return what this process and all that it started have computed; NaN where there is no /proc."""
    children: dict[int, list[int]] = {}
    ticks: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            pid, _, fields = stat.read_text().partition(" (")
            values = fields.rpartition(")")[2].split()
            children.setdefault(int(values[1]), []).append(int(pid))
            ticks[int(pid)] = int(values[11]) + int(values[12])
    total, left = 0, [os.getpid()]
    while left:
        total += ticks.get(left[-1], 0)
        left += children.get(left.pop(), [])
    return total / os.sysconf("SC_CLK_TCK") if ticks else float("nan")


def versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


class Competitor:
    """A process that renders when it is asked to, and waits otherwise."""

    def __init__(self, name: str, python: str, folder: Path, core: int) -> None:
        environment = os.environ | {"PYTHONPATH": str(HERE.parent.parent)}
        command = [python, str(HERE), "--serve", name, "--work", str(folder), "--core", str(core)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment
        )
        self.about = self._answer()

    def rate(self, seconds: float) -> dict[str, float]:
        print(seconds, file=self._process.stdin, flush=True)
        return self._answer()

    def stop(self) -> None:
        """End it as it likes to end, so that it takes its processes and shared memory along; soon, in any case."""
        with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):
            self._process.communicate(timeout=30)
        self._process.kill()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise SystemExit(f"a competitor ended ({self._process.args}); what it said stands above")
        return json.loads(line)


# --- all of them ------------------------------------------------------------------------------------------------


def summary(rounds: list[dict[str, dict[str, float]]], kind: str) -> dict[str, Any]:
    """Return medians, and those of the ratios of ours to each of the others."""
    rates = [{name: each[kind] for name, each in round_.items()} for round_ in rounds]
    mine, others = ([name for name in rates[0] if name.startswith("ours") is own] for own in (True, False))
    return {
        "median": {name: round(statistics.median(each[name] for each in rates), 1) for name in rates[0]},
        "ratio_to": {
            own: {name: round(statistics.median(each[own] / each[name] for each in rates), 2) for name in others}
            for own in mine
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with a WebDataset tar of JPEGs and classes")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is written, 4 x 110 KB a photograph")
    parser.add_argument("--repeat", type=int, default=32, help="how often each photograph is repeated")
    parser.add_argument("--only", nargs="+", choices=COMPETITORS, default=list(COMPETITORS))
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH", help="a competitor's interpreter")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each round, for each competitor")
    parser.add_argument("--core", type=int, help="by default the last one")
    parser.add_argument("--machine", help="what to call this machine; by default its processor")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", choices=COMPETITORS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {0}
    core = max(cores) if args.core is None else args.core
    if args.serve:
        return serve(args.serve, args.work, core)
    if not (args.data and args.out):
        parser.error("--data and --out are required")
    pythons = dict(each.split("=", 1) for each in args.python)
    if unknown := sorted(set(pythons) - set(COMPETITORS)):
        parser.error(f"--python names a competitor, one of {', '.join(COMPETITORS)}; got {', '.join(unknown)}")

    found = sorted(args.data.glob("*.tar"))
    if not found:
        parser.error(f"--data must hold a tar of JPEGs, and {args.data} holds none")
    photos = read_photos(found[0])
    tars = written(args.work, "tars", lambda out: write_tars(out, repeated(photos, args.repeat)))
    written(args.work, "folders", lambda out: write_folders(out, repeated(photos, args.repeat)))
    written(args.work, "labels", lambda out: write_labels(out, tars))
    running = {name: Competitor(name, pythons.get(name, sys.executable), args.work, core) for name in args.only}
    missing = {name: each.about["missing"] for name, each in running.items() if "missing" in each.about}
    for name, why in missing.items():
        print(f"{name} is left out: {why}", flush=True)
    present = {name: each for name, each in running.items() if name not in missing}
    rounds = []
    for _ in range(args.rounds):
        rounds.append({name: each.rate(args.seconds) for name, each in present.items()})
        print({name: [round(value) for value in each.values()] for name, each in rounds[-1].items()}, flush=True)
    for each in running.values():
        each.stop()

    from rounds import machine

    result = {
        "what": "views/s that one loader process brings into the trainer, both on one core; recipe deit, 224 pixels",
        "machine": args.machine or machine(),
        "photographs": len(photos) * args.repeat,
        "batch_size": BATCH,
        "workers": WORKERS,
        "seconds": args.seconds,
        "left_out": missing,
        "competitors": {name: each.about for name, each in present.items()},
        **{kind: summary(rounds, kind) for kind in ("per_second", "per_cpu_second")},
        "rounds": rounds,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("left_out", "per_second", "per_cpu_second")}, indent=1))


if __name__ == "__main__":
    main()
