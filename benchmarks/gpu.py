"""Everything that a GPU must show, in one program with a time limit, so that a borrowed machine needs no thought.

    python benchmarks/gpu.py --out FOLDER --budget 540
    python benchmarks/gpu.py --out FOLDER --rehearse        # all of it at toy size, on a CPU too

It runs from a checkout; nothing needs to be installed but the libraries. The compiled kernel of views is built there if it is
missing. Each phase is a process of its own with a share of the time, so a crash, a hang or a full memory in one of them takes nothing from the others. What a phase has found stands in
FOLDER/gpu.json at once, with its traceback if it failed; FOLDER/gpu.log has everything that was printed. Time that a phase does
not need goes to those after it. What no time is left for is named in the JSON, and the next run goes on there: `--known` names the JSON
of an earlier run on such a card, whose results of stage 1 and 2 and of the phase `views` are kept and not measured again; `--phases` names
some phases. `--phases views --budget 110` is enough to know whether this card renders the same views as a CPU, and how fast.

Exit code: 0, or 1 where a phase failed or was cut short; a phase for which no time was left is no failure. 2 for misuse, and where a library
is missing or too old: then nothing is run.
"""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PIXELS = ROOT / "pipeline/pixels"
POLL_S = 0.2
GRACE_S = 5.0  # after its time a phase may finish the measurement that it is at


@dataclass(frozen=True)
class Phase:
    """One part of the program.

    Attributes:
        module: whose `on_gpu(job)` it is.
        share: of the time, against the shares of the phases after it.
        least_s: without so many seconds it is not begun.
        shows: what, in a few words.
    """

    module: str
    share: float
    least_s: float
    shows: str


PHASES = {
    "facts": Phase("ceilings", 1, 15, "the machine and its ceilings"),
    "tests": Phase("gpu_tests", 6, 110, "pytest -m gpu"),
    "views": Phase("gpu_views", 6, 60, "views that the GPU renders: the CPU's pixels, and their cost"),
    "parity": Phase("parity", 5, 80, "stored labels against the teacher online"),
    "stage1": Phase("stage1", 9, 100, "precompute against its parts"),
    "stage2": Phase("stage2", 17, 130, "training from labels, alone and with the teacher"),
    "losses": Phase("losses", 1.5, 20, "time and memory of the losses"),
    "cifar10": Phase("cifar10", 8, 155, "accuracy on CIFAR-10"),
}


def main() -> None:
    args = parse()
    if args.part:
        sys.exit(run_phase(args))
    if lacking := unmet(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]):
        print(f"{'; '.join(lacking)}: put wheels into a folder, and the folder on PYTHONPATH", file=sys.stderr)
        sys.exit(2)
    sys.exit(run_all(args))


def unmet(requirements: Iterable[str]) -> list[str]:
    """Return what is missing or too old of what this project asks for, before any time is spent on it."""
    lacking = []
    for requirement in map(Requirement, requirements):
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            lacking.append(f"{requirement.name} is not installed, {requirement} is needed")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            lacking.append(f"{requirement.name} {version} is here, {requirement} is needed")
    return lacking


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = os.environ.get("DEIT_CLI_DATA")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything; default 540")
    parser.add_argument("--phases", default=",".join(PHASES), help="some of them, by commas; default all, in order")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes: does everything run?")
    parser.add_argument("--photographs", type=Path, default=found(data, "imagenet-sample"), help="folder with a tar of JPEGs and classes; default DEIT_CLI_DATA's imagenet-sample, else made-up images")  # fmt: skip
    parser.add_argument("--cifar10", type=Path, default=found(data, "cifar10"), help="folder with CIFAR-10 as Parquet; default DEIT_CLI_DATA's cifar10")  # fmt: skip
    parser.add_argument("--known", type=Path, help="gpu.json of an earlier run on such a card: what it has is not measured again")  # fmt: skip
    parser.add_argument("--work", type=Path, help="folder for large files; default a temporary one")
    parser.add_argument("--fail", metavar="PHASE:HOW", help=argparse.SUPPRESS)  # for the tests of this program
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)  # where a phase's own process writes
    args = parser.parse_args()
    if unknown := sorted(set(args.phases.split(",")) - set(PHASES)):
        parser.error(f"--phases must be of {', '.join(PHASES)}; got {', '.join(unknown)}")
    if args.known and not args.known.is_file():
        parser.error(f"--known {args.known}: no such file")
    for name in ("photographs", "cifar10"):
        if (folder := getattr(args, name)) is not None and not folder.is_dir():
            parser.error(f"--{name} {folder}: no such folder")
    return args


def found(data: str | None, name: str) -> Path | None:
    """Return a folder of the images that DEIT_CLI_DATA names, if it is there."""
    folder = Path(data or ".") / name
    return folder if data and folder.is_dir() else None


def kernel_here() -> str:
    """Compile the kernel of views into the checkout, unless it is there; say what was done, or why it failed.

    Without it torch renders on the CPU, so slowly that no figure of the loader processes means anything.
    """
    sys.path.insert(0, str(ROOT))
    from pipeline.pixels import kernel

    return "it was there" if kernel.is_compiled() else compile_kernel(PIXELS)


def compile_kernel(folder: Path) -> str:
    """Compile the kernel into its folder; say that it was done, or why it failed."""
    (extension,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
    command = [os.environ.get("CC", "cc"), *extension["extra-compile-args"], "-shared", "-fPIC", "-fvisibility=hidden"]
    command += [f"-I{sysconfig.get_path('include')}", str(folder / "_kernel.c"), "-o", str(folder / "_kernel.draft")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"it is missing: {error}"
    if done.returncode:
        return f"it is missing: {(done.stderr.strip().splitlines() or [done.returncode])[-1]}"
    (folder / "_kernel.draft").replace(folder / "_kernel.abi3.so")
    return "it was compiled"


def run_phase(args: argparse.Namespace) -> int:
    """Run one phase in this process; return its exit code."""
    from rounds import Job, write_json

    found: dict[str, Any] = {}
    try:
        found = known_results(args) if args.known else {}
        job = Job(
            seconds=args.budget,
            work=args.work,
            out=args.out,
            part=args.part,
            photographs=args.photographs,
            cifar10=args.cifar10,
            rehearse=args.rehearse,
            found=found,
        )
        job.note("card", job.card)
        if args.fail and args.fail.startswith(f"{args.phases}:"):
            fail(args.fail.partition(":")[2])
        importlib.import_module(PHASES[args.phases].module).on_gpu(job)
    except BaseException:
        traceback.print_exc()
        write_json(args.part, found | {"error": traceback.format_exc()})
        return 1
    return 0


def known_results(args: argparse.Namespace) -> dict[str, Any]:
    """Return what an earlier run has found of a phase, on a card like this one."""
    from rounds import Job

    phases = json.loads(args.known.read_text())["phases"]
    found = phases.get(args.phases, {}).get("result", {})
    here = Job(seconds=0, work=args.work, out=args.out).card
    if found.get("card", here) != here:
        raise ValueError(f"{args.known} has results of {found['card']}, this is {here}: leave --known out")
    return {name: value for name, value in found.items() if name != "left_out"}


def fail(how: str) -> None:
    """Fail on purpose: with an error, by being killed, or by never ending."""
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    while how == "hangs":
        time.sleep(1)
    raise RuntimeError(f"failed on purpose ({how})")


def run_all(args: argparse.Namespace) -> int:
    """Run the phases one after the other; return the exit code."""
    began = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    asked = [name for name in PHASES if name in args.phases.split(",")]
    results: dict[str, Any] = {
        "what": "what a GPU must show",
        "cpu_kernel": kernel_here(),
        "budget_s": args.budget,
        "rehearsal": args.rehearse,
        "photographs": "made-up" if args.photographs is None else args.photographs.name,
        "phases": {},
    }
    with tempfile.TemporaryDirectory() as temporary, (args.out / "gpu.log").open("ab") as log:
        work = args.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        for number, name in enumerate(asked):
            left = args.budget - (time.monotonic() - began)
            allowed = left * PHASES[name].share / sum(PHASES[each].share for each in asked[number:])
            least_s = 0.0 if args.rehearse else PHASES[name].least_s
            PhaseRun(args, name, work, results, log).run(min(left, max(allowed, least_s)), least_s)
    results["seconds"] = round(time.monotonic() - began, 1)
    save(args.out, results)
    print(table(results), flush=True)
    return int(any(each["status"] in ("failed", "cut") for each in results["phases"].values()))


class PhaseRun:
    """One phase as a process of its own, and its entry in the results."""

    def __init__(self, args: argparse.Namespace, name: str, work: Path, results: dict[str, Any], log: Any) -> None:
        self._args, self._name, self._work, self._results, self._log = args, name, work, results, log
        self._part = work / f"{name}.json"

    def run(self, seconds: float, least_s: float) -> None:
        """Run it for so many seconds at most, or say that there is no time for it: less than it needs at least."""
        if seconds < least_s or seconds <= 0:
            text = f"{max(0.0, seconds):.0f} s were left of --budget, it needs {least_s:.0f}: ask for it with --phases {self._name}"
            self._keep("left out", 0.0, error=text)
            print(f"{self._name} is left out: {text}", flush=True)
            return
        began, seen = time.monotonic(), None
        self._part.unlink(missing_ok=True)  # of an earlier run in the same --work
        process = self._start(seconds)
        try:
            while (code := process.poll()) is None and time.monotonic() - began < seconds + GRACE_S:
                time.sleep(POLL_S)
                if self._part.is_file() and (changed := self._part.stat().st_mtime_ns) != seen:
                    seen = changed
                    self._keep("running", time.monotonic() - began)
        finally:  # Ctrl-C does not reach it: it has a session of its own
            if process.poll() is None:
                end(process)
        status = {0: "done", None: "cut"}.get(code, "failed")
        error = None if code in (0, 1) else f"ended after its {seconds:.0f} s" if code is None else f"exit code {code}"
        self._keep(status, time.monotonic() - began, error=error)

    def _start(self, seconds: float) -> subprocess.Popen[bytes]:
        args = self._args
        command = [sys.executable, str(HERE / "gpu.py"), "--part", str(self._part), "--phases", self._name]
        command += ["--out", str(args.out), "--work", str(self._work), "--budget", f"{seconds:.1f}"]
        for name in ("photographs", "cifar10", "known", "fail"):
            command += [f"--{name}", str(value)] if (value := getattr(args, name)) is not None else []
        command += ["--rehearse"] if args.rehearse else []
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        print(f"--- {self._name}: {PHASES[self._name].shows}, {seconds:.0f} s", flush=True)
        self._log.write(f"--- {self._name}\n".encode())
        self._log.flush()
        return subprocess.Popen(
            command,
            env=os.environ
            | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
            | ({"OMP_NUM_THREADS": "1"} if args.rehearse else {}),
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )

    def _keep(self, status: str, seconds: float, error: str | None = None) -> None:
        result = json.loads(self._part.read_text()) if self._part.is_file() else {}
        said = result.pop("error", None) or error
        entry = {"status": status, "seconds": round(seconds, 1), **({"error": said} if said else {}), "result": result}
        self._results["phases"][self._name] = entry
        save(self._args.out, self._results)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a phase and what it has started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def save(out: Path, results: dict[str, Any]) -> None:
    """Replace gpu.json; a reader never sees half of it."""
    draft = out / "gpu.json.draft"
    draft.write_text(json.dumps(results, indent=1) + "\n")
    draft.replace(out / "gpu.json")


def table(results: dict[str, Any]) -> str:
    """Return a line for each phase: how it ended, and its last words if it failed."""
    lines = ["", f"{'phase':10}{'status':>10}{'seconds':>9}"]
    for name, entry in results["phases"].items():
        said = (entry.get("error") or "").strip().splitlines()
        left = entry["result"].get("left_out")
        words = said[-1] if said else f"left out: {', '.join(left)}" if left else ""
        lines.append(f"{name:10}{entry['status']:>10}{entry['seconds']:9.1f}  {words}"[:200])
    return "\n".join(lines)


if __name__ == "__main__":
    main()
