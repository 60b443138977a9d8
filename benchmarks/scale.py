"""What operations on large sources and label sets cost: seconds, MiB, and their growth with samples and files.

    python benchmarks/scale.py --scales 10k,100k,1.28m --work FOLDER --out benchmarks/results/scale.json
    python benchmarks/scale.py --rehearse --work FOLDER --out FOLDER/scale.json      # toy sizes: does everything run?
    python benchmarks/scale.py --table benchmarks/results/scale.json                 # the results as Markdown

Sources and sets are made by `scale_sets.py` in --work, which needs 35 GB for all scales, and are used again by a later run. Each
operation runs in a process of its own, which reports how long the operation took, how long it computed (on a machine that others
share, only this can be compared), how far its memory rose above what the imports took (peak), and how much of that stayed when it
was done (kept; kept_own without mapped files, which processes share). Files come from the page cache, so the figures are of the work and not of a disk. Results of another run are kept in --out where this run does not measure them again.
"""

import argparse
import gc
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.labels.manifest import Plan, SourceRecord, TeacherIdentity
from pipeline.views.recipe import Recipe

TOPK = 10


@dataclass(frozen=True)
class Case:
    """The size of a source and its label set.

    Attributes:
        samples: number of samples; rounded up to whole source shards.
        views: number of views of each sample.
        classes: C.
        per_shard: number of samples of a source shard.
        blocks: number of blocks of views, and so of label shards of each source shard.
        pool: number of different tars.
    """

    samples: int
    views: int
    classes: int
    per_shard: int = 1000
    blocks: int = 10
    pool: int = 32

    @property
    def shards(self) -> int:
        """Number of source shards."""
        return -(-self.samples // self.per_shard)

    @property
    def label_shards(self) -> int:
        """Number of label shards."""
        return self.shards * self.blocks

    @property
    def names(self) -> list[str]:
        """Names of the source shards."""
        return [f"train-{number:06}" for number in range(self.shards)]

    @cached_property
    def view_blocks(self) -> list[range]:
        """The blocks of views."""
        size = self.views // self.blocks
        return [range(start, start + size) for start in range(0, size * self.blocks, size)]

    @property
    def recipe(self) -> Recipe:
        """The recipe: DeiT's with views of 16 pixels."""
        return Recipe(img_size=16)

    @property
    def teacher(self) -> TeacherIdentity:
        """The teacher that would have given these answers."""
        return TeacherIdentity(
            name="synthetic",
            weights_sha256="0" * 64,
            img_size=16,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            num_classes=self.classes,
            class_names=None,
        )

    def plan(self, record: SourceRecord) -> Plan:
        """Return the plan of the set."""
        return Plan.make(recipe=self.recipe, teacher=self.teacher, source=record, topk=TOPK, precision="float16")


CASES = {
    "10k": Case(samples=10_000, views=30, classes=1000),
    "10k-300": Case(samples=10_000, views=300, classes=1000),
    "100k": Case(samples=100_000, views=30, classes=1000),
    "1.28m": Case(samples=1_281_000, views=30, classes=1000),
    "14m": Case(samples=14_000_000, views=30, classes=21_841),
}
REHEARSAL = {"tiny": Case(samples=80, views=4, classes=11, per_shard=8, blocks=2, pool=2)}
SECONDS = 600  # of one operation
MIB = 2**20


class Place:
    """The files of one case."""

    def __init__(self, work: Path, name: str) -> None:
        self.folder = work / name
        self.images = self.folder / "images"
        self.set = self.folder / "set"

    def new(self, name: str) -> Path:
        """Return an empty folder beside the set."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        return folder


class Meter:
    """Measures the calls of one process: seconds, CPU seconds, and MiB above what it had before."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def __call__(self, name: str, call: Callable[[], Any]) -> Any:
        """Return `call()`, and note what it cost."""
        gc.collect()
        before, own = _status("VmRSS"), _status("RssAnon")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        began, worked = time.perf_counter(), _computed()
        result = call()
        seconds, worked = time.perf_counter() - began, _computed() - worked
        peak = _status("VmHWM")
        gc.collect()
        self.found[name] = {
            "seconds": round(seconds, 4),
            "cpu_seconds": round(worked, 4),
            "peak_mib": round(peak - before, 1),
            "kept_mib": round(_status("VmRSS") - before, 1),
            "kept_own_mib": round(_status("RssAnon") - own, 1),
        }
        return result


def _computed() -> float:
    """Return the CPU seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


# Operations: each runs in a process of its own


def measure_source(place: Place, case: Case, meter: Meter) -> None:
    from pipeline.images.source import open_source

    def use() -> Any:
        source = open_source(place.images)
        assert source.num_samples == case.shards * case.per_shard
        return source

    source = meter("open, count", use)
    meter("describe", source.describe)
    meter("identity", source.identity)
    del source
    meter("open, count again", use)
    meter.found["pickled source, MiB"] = len(pickle.dumps(open_source(place.images))) / MIB


def measure_source_again(place: Place, case: Case, meter: Meter) -> None:
    measure_source(place, case, meter)


def measure_plan(place: Place, case: Case, meter: Meter) -> None:
    from pipeline.labels.manifest import read_plan
    from pipeline.labels.sealing import claim

    work = _work(place, case, place.new("planned"), meter)
    meter("claim", lambda: claim(place.folder / "planned", work.plan, work.blocks))
    meter.found["plan, MiB"] = (place.folder / "planned/plan.json").stat().st_size / MIB
    meter("read plan", lambda: read_plan(place.folder / "planned"))


def measure_resume(place: Place, case: Case, meter: Meter) -> None:
    """A run that is continued after half of its label shards: everything before the first view is rendered."""
    from pipeline.labels.sealing import check_untouched, claim
    from pipeline.stage1.indexing import Reading, index_samples
    from pipeline.stage1.loop import Job, LabelTask, is_done, paths_of
    from pipeline.storage.atomic import sweep_temporaries

    half = place.new("half")
    halves = [f"{name}.parquet" for name in case.names[: case.shards // 2]]
    link(place.set, half, lambda path: path.parts[0] != "labels" or path.name in halves)
    work = _work(place, case, half, meter)
    meter("claim", lambda: claim(half, work.plan, work.blocks))
    meter("check_untouched", lambda: check_untouched(half, work.blocks))
    meter("sweep", lambda: sweep_temporaries(half))
    tasks = [LabelTask(shard.name, views) for views in work.blocks for shard in work.source.shards]
    reading = Reading(work.source, tuple(case.names), "fail", 0, lambda _: None)
    meter("samples", lambda: index_samples(half, work.plan, reading))
    meter("list", lambda: [path.is_file() for path in paths_of(half, tasks)])
    config: Any = SimpleNamespace(folder=half)
    job = Job(config, work.plan, work.plan.recipe, work.source, 0, 1)
    done = [task for task in tasks if (half / paths_of(half, [task])[0]).is_file()][:: max(1, len(tasks) // 2000)]
    meter("check what is done", lambda: [is_done(job, task, job.samples(task.shard)) for task in done])
    meter.found["label shards checked"] = len(done)
    shutil.rmtree(half)


def measure_seal(place: Place, case: Case, meter: Meter) -> None:
    from pipeline.labels.format import MANIFEST_NAME
    from pipeline.labels.manifest import read_plan
    from pipeline.labels.sealing import seal

    plan = read_plan(place.set)
    meter("seal", lambda: seal(place.set, plan, case.view_blocks))
    meter.found["manifest, MiB"] = (place.set / MANIFEST_NAME).stat().st_size / MIB


def measure_open(place: Place, case: Case, meter: Meter) -> None:
    from pipeline.labels.labelset import LabelSet
    from pipeline.labels.manifest import read_manifest, read_plan
    from pipeline.labels.sealing import check_complete

    meter("read plan", lambda: read_plan(place.set))
    meter("read manifest", lambda: read_manifest(place.set))
    label_set = meter("open", lambda: LabelSet.open(place.set))
    assert len(label_set.manifest.files) == case.label_shards + case.shards
    meter("check_complete", lambda: check_complete(label_set.manifest, label_set.shards, label_set.place))
    data = meter("send to a loader", lambda: pickle.dumps(label_set))
    meter("receive in a loader", lambda: pickle.loads(data))
    meter.found["pickled, MiB"] = len(data) / MIB
    some = case.names[:: max(1, case.shards // 100)]
    meter("read a view of 100 shards", lambda: [label_set.read(name, case.views - 1) for name in some])


def measure_info(place: Place, case: Case, meter: Meter) -> None:
    from pipeline.labels.labelset import LabelSet
    from pipeline.overview.summary import info_table, summarise

    label_set = LabelSet.open(place.set)
    meter("info", lambda: info_table(summarise(label_set)))


def measure_verify(place: Place, case: Case, meter: Meter) -> None:
    from pipeline.settings.configs import VerifyConfig
    from pipeline.verify.verify import verify

    report = meter("verify", lambda: verify(str(place.set), VerifyConfig(probes=False, threads=1)))
    assert not report.problems, report.problems[:3]


def measure_pull(place: Place, case: Case, meter: Meter) -> None:
    """A tenth of the source shards, of which the names are listed."""
    from pipeline.sharing.transfer import pull

    out, tenth = place.new("pulled"), case.names[:: 10 if case.shards >= 10 else 2]
    moved = meter("pull", lambda: pull(str(place.set), out, shards=tenth))
    assert moved.sent_files == len(tenth) * (1 + case.blocks)
    meter.found["files pulled"] = moved.sent_files
    shutil.rmtree(out)


def measure_merge(place: Place, case: Case, meter: Meter) -> None:
    """Two unsealed halves, as two ranks leave them, are merged and sealed."""
    from pipeline.sharing.merging import merge

    halves = [place.new("first"), place.new("second")]
    for at, half in enumerate(halves):
        mine = {f"{name}.parquet" for name in case.names[at::2]}
        link(place.set, half, lambda path, mine=mine: path.parts[0] not in ("labels", "samples") or path.name in mine)
        (half / "manifest.json").unlink(missing_ok=True)
    out = place.new("merged")
    merged = meter("merge", lambda: merge(out, [str(half) for half in halves]))
    assert merged.label_set is not None
    for folder in (*halves, out):
        shutil.rmtree(folder)


def measure_order(place: Place, case: Case, meter: Meter) -> None:
    from trainer.order import Order

    units = (case.per_shard // 2,) * case.shards
    batch = min(1024, 2 * sum(units))
    order = Order(units, 2, batch, 1, range(case.views), 64, 0)
    meter("first step of an epoch", lambda: order.step_units(0, 0))
    steps = range(1, min(1000, order.steps_per_epoch))
    meter("next steps", lambda: [order.step_units(0, step) for step in steps])
    meter.found["steps"] = len(steps)
    meter("first step of the next epoch", lambda: order.step_units(1, 0))


def _work(place: Place, case: Case, out: Path, meter: Meter) -> Any:
    """Open the source, and plan a run into a folder."""
    from pipeline.images.source import open_source
    from pipeline.settings.configs import PrecomputeConfig
    from pipeline.stage1.plan import plan_work

    source = open_source(place.images)
    meter("source", source.identity)
    size = case.views // case.blocks
    config = PrecomputeConfig(data=str(place.images), out=str(out), views=(0, size * case.blocks), views_per_shard=size)
    teacher: Any = SimpleNamespace(identity=case.teacher)
    return meter("plan", lambda: plan_work(config, case.recipe, teacher, source))


OPERATIONS: dict[str, Callable[[Place, Case, Meter], None]] = {
    "source": measure_source,
    "source again": measure_source_again,
    "plan": measure_plan,
    "resume": measure_resume,
    "seal": measure_seal,
    "open": measure_open,
    "info": measure_info,
    "verify": measure_verify,
    "pull": measure_pull,
    "merge": measure_merge,
    "order": measure_order,
}


def link(folder: Path, out: Path, wanted: Callable[[Path], bool]) -> None:
    """Copy the plan of a set, and link the wanted tables of it."""
    for root, _, names in os.walk(folder):
        inside = Path(root).relative_to(folder)
        (out / inside).mkdir(parents=True, exist_ok=True)
        for name in names:
            if inside.parts and wanted(inside / name):
                os.link(Path(root) / name, out / inside / name)
    shutil.copyfile(folder / "plan.json", out / "plan.json")


# The program


OF_SOURCES = {"source", "source again", "plan"}  # operations that need no label set


def make(place: Place, case: Case, phases: list[str]) -> dict[str, Any]:
    """Make source and set of a case where they are needed and not there yet; return what that took."""
    from scale_sets import make_set, make_source  # imports torch, which the operations do not all need

    found: dict[str, Any] = {}
    for name, folder, write in (
        ("source", place.images, lambda folder: make_source(folder, case)),
        ("set", place.set, lambda folder: make_set(folder, place.images, case)),
    ):
        if not folder.is_dir() and (name == "source" or not OF_SOURCES.issuperset(phases)):
            draft, began = place.new(f"{name}-draft"), time.perf_counter()
            write(draft)
            draft.rename(folder)
            found[f"{name}, seconds"] = round(time.perf_counter() - began, 1)
    return found


def run(name: str, operation: str, work: Path, rehearse: bool) -> dict[str, Any]:
    """Run one operation in a process of its own, and return what it found."""
    command = [sys.executable, __file__, "--one", name, operation, "--work", str(work)]
    command += ["--rehearse"] if rehearse else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(Place(work, name).folder / "cache")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        return {"left out": f"it takes more than {SECONDS} s"}
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1:], "stderr": done.stderr[-2000:]}
    return json.loads(done.stdout.splitlines()[-1])


def table(results: dict[str, Any]) -> Iterator[str]:
    """Yield the results as Markdown: CPU seconds and peak MiB of each step."""
    names = list(results["cases"])
    yield "| | " + " | ".join(names) + " |"
    yield "|---|" + "--:|" * len(names)
    for operation in OPERATIONS:
        steps = dict.fromkeys(step for name in names for step in results["cases"][name].get(operation, {}))
        for step in steps:
            cells = [_cell(results["cases"][name].get(operation, {}).get(step)) for name in names]
            yield f"| {operation}: {step} | " + " | ".join(cells) + " |"


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['cpu_seconds']:,.3g} s, {value['peak_mib']:,.0f} MiB"
    return f"{value:,.3g}" if isinstance(value, (int, float)) else "" if value is None else str(value)


@contextmanager
def noted(path: Path, results: dict[str, Any]) -> Iterator[None]:
    """Write all results after the block."""
    from rounds import write_json

    yield
    write_json(path, results)


def measure_all(args: argparse.Namespace, cases: dict[str, Case]) -> int:
    """Make the cases and measure the operations that were asked for; return the number of failed operations."""
    from rounds import machine

    results: dict[str, Any] = {"what": "seconds and MiB of operations on large sources and label sets", "cases": {}}
    if args.out.is_file():
        results = json.loads(args.out.read_text())
    results["machine"] = machine()
    failed = 0
    for name, case in cases.items():
        place = Place(args.work, name)
        found = results["cases"].setdefault(name, {})
        found["case"] = asdict(case) | {"shards": case.shards, "label_shards": case.label_shards}
        with noted(args.out, results):
            found["made"] = found.get("made", {}) | make(place, case, args.phases)
        if "source" in args.phases:
            shutil.rmtree(place.folder / "cache", ignore_errors=True)
        for operation in args.phases:
            with noted(args.out, results):
                found[operation] = run(name, operation, args.work, args.rehearse)
            failed += "failed" in found[operation]
            print(name, operation, json.dumps(found[operation]), flush=True)
        if not args.keep:
            shutil.rmtree(place.folder)
    return failed


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scales", default="10k,100k,1.28m,14m", help=f"of {', '.join(CASES)}, separated by commas")
    parser.add_argument("--phases", default=",".join(OPERATIONS), help="operations, separated by commas")
    parser.add_argument("--work", type=Path, help="folder for sources and sets")
    parser.add_argument("--keep", action="store_true", help="keep sources and sets for another run")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes")
    parser.add_argument("--out", type=Path, help="JSON to write")
    parser.add_argument("--table", type=Path, help="print these results as Markdown, and measure nothing")
    parser.add_argument("--one", nargs=2, metavar=("SCALE", "PHASE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.phases = [phase.strip() for phase in args.phases.split(",")]
    known = REHEARSAL if args.rehearse else CASES
    args.cases = known if args.rehearse else {name: known.get(name) for name in args.scales.split(",")}
    if unknown := [name for name, case in args.cases.items() if case is None]:
        parser.error(f"--scales must be of {', '.join(CASES)}, got {unknown[0]}")
    if unknown := [phase for phase in args.phases if phase not in OPERATIONS]:
        parser.error(f"--phases must be of {', '.join(OPERATIONS)}, got {unknown[0]}")
    if args.table is None and args.work is None:
        parser.error("--work is needed")
    if args.table is None and args.one is None and args.out is None:
        parser.error("--out is needed")
    return args


def main() -> int:
    args = parse()
    if args.table is not None:
        print("\n".join(table(json.loads(args.table.read_text()))))
        return 0
    if args.one is not None:
        name, operation = args.one
        meter, cases = Meter(), REHEARSAL if args.rehearse else CASES
        OPERATIONS[operation](Place(args.work, name), cases[name], meter)
        print(json.dumps(meter.found))
        return 0
    return 1 if measure_all(args, args.cases) else 0


if __name__ == "__main__":
    sys.exit(main())
