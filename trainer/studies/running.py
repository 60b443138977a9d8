"""Runs the steps of a study: at most so many at a time, each in a process of its own, and none twice.

The folder of a study has a folder for each step, `KIND/NAME-ID`:

    settings.yaml   the settings; `deit-cli COMMAND -c settings.yaml` runs the step by hand
    run/ or set/    what `train` or `precompute` writes
    scores.json     what `evaluate` prints
    log.txt         messages of all attempts
    attempts.json   when each attempt began and ended
    done.json       written last: a step without it is not finished

Every file appears whole, so a study can be killed at any moment. The same command then continues: finished steps stay, and a
training or labelling that was interrupted continues by itself.
"""

import contextlib
import importlib.metadata
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import DeitCliError, StorageError, UsageError, WorkerError
from pipeline.machine.threads import usable_cores
from pipeline.repeats import warn_counted
from pipeline.settings.options import without_options
from pipeline.settings.program import Terminated
from pipeline.storage.atomic import locked, make_folder, replace_file, sha256_file
from pipeline.storage.json import parse_json, pretty_json, read_json
from pipeline.storage.yaml import to_yaml
from trainer.studies.steps import Plan, Step

log = logging.getLogger("deit_cli.compare")

ROOT = Path(__file__).parents[2]  # where cli.py is
KEEPER = Path(__file__).with_name("keeper.py")
FOLDERS = {"teacher": "teachers", "labels": "labels", "student": "students"}
DONE, ATTEMPTS, LOG, OUTPUT, SETTINGS, SCORES = (
    "done.json", "attempts.json", "log.txt", "output.txt", "settings.yaml", "scores.json",
)  # fmt: skip
POLL_S = 0.05
PACKAGES = ("deit-cli", "torch", "torchvision", "timm", "numpy", "scipy")
LAST_LINES = 8  # of the log of a failed step
ID_DIGITS = 12


@dataclass(frozen=True)
class Record:
    """A finished step: its folder, and what done.json says."""

    folder: Path
    done: Mapping[str, Any]

    @property
    def seconds(self) -> float:
        """Return the time of all attempts."""
        return float(self.done["seconds"])


@dataclass(frozen=True)
class Placed:
    """A step whose inputs are finished: its id and its folder."""

    step: Step
    id: str
    folder: Path
    inputs: Mapping[str, Record]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What an engine runs.

    Attributes:
        folder: folder of the step.
        arguments: arguments of `deit-cli`.
        launcher: words in front of the command.
        environment: variables that are changed.
        cores: number of cores that the job may use.
    """

    folder: Path
    arguments: tuple[str, ...]
    launcher: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    cores: int = 1


def program(*arguments: str) -> list[str]:
    """Return the command line that calls this very program."""
    return [sys.executable, "-P", "-m", "cli", *arguments]


def environment_of(changes: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment with changes, in which `program` finds the program.

    It lacks the variables that set options: they would go before the settings of the steps.
    """
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**without_options(os.environ), "PYTHONPATH": path, **changes}


class LocalEngine:
    """Runs jobs as processes of this machine; none outlives this process."""

    def start(self, job: Job) -> Any:
        """Start a job; its messages are appended to its log, and its output replaces that of an earlier attempt."""
        command = [*job.launcher, *program(*job.arguments)]
        with (job.folder / OUTPUT).open("wb") as output, (job.folder / LOG).open("ab") as messages:
            return subprocess.Popen(
                [sys.executable, "-P", str(KEEPER), str(job.folder / "lock"), *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=messages,
                env=environment_of(job.environment),
                start_new_session=True,  # Ctrl-C on the terminal reaches only this process, which passes it on
            )

    def poll(self, running: Any) -> int | None:
        """Return the exit code of a job, or None while it runs."""
        code = running.poll()
        if code is not None:
            running.stdin.close()
            with contextlib.suppress(OSError):
                os.killpg(running.pid, signal.SIGKILL)  # what a killed keeper has left
        return code

    def stop(self, running: Any, number: int) -> None:
        """Send a signal to a job."""
        with contextlib.suppress(OSError):
            running.send_signal(number)


class RayEngine:
    """Runs jobs as tasks of a Ray cluster, whose machines share the folder of the study."""

    def __init__(self) -> None:
        try:
            import ray
        except ImportError:
            raise UsageError("--engine ray needs Ray: pip install 'deit-cli[ray]'") from None
        self._ray: Any = ray
        try:
            if not ray.is_initialized():
                ray.init(log_to_driver=False, logging_level=logging.WARNING)
        except (OSError, ValueError, RuntimeError, ConnectionError) as error:
            raise WorkerError(
                f"no Ray cluster can be used ({str(error).splitlines()[0]})",
                fix="Start one with `ray start --head`, or unset RAY_ADDRESS to use only this machine",
            ) from error
        self._gpus = 1 if ray.cluster_resources().get("GPU") else 0

    def start(self, job: Job) -> Any:
        """Start a job on some machine of the cluster."""
        cores = min(job.cores, int(self._ray.cluster_resources().get("CPU", 1)))
        task = self._ray.remote(run_here).options(num_cpus=cores, num_gpus=self._gpus, max_retries=0)
        return task.remote(job)

    def poll(self, running: Any) -> int | None:
        """Return the exit code of a job, or None while it runs."""
        ended, _ = self._ray.wait([running], timeout=0)
        if not ended:
            return None
        try:
            return int(self._ray.get(running))
        except self._ray.exceptions.RayError as error:
            warn_counted(log, "lost Ray tasks", "a Ray task was lost: %s", str(error).splitlines()[0])
            return 1

    def stop(self, running: Any, number: int) -> None:
        """Ask a job to stop; on its machine it gets SIGINT."""
        self._ray.cancel(running, force=False)


def run_here(job: Job) -> int:
    """Run a job on this machine and return its exit code; KeyboardInterrupt, by which Ray cancels, is passed on."""
    engine = LocalEngine()
    running = engine.start(job)
    while True:
        try:
            if (code := engine.poll(running)) is not None:
                return code
            time.sleep(POLL_S)
        except KeyboardInterrupt:
            engine.stop(running, signal.SIGINT)


class Session:
    """One start of a study: what is done, what failed, and what is left."""

    def __init__(
        self,
        plan: Plan,
        out: Path,
        engine: Any,
        *,
        jobs: int = 1,
        launcher: str | None = None,
        device: str = "auto",
        changed: Callable[["Session"], None] = lambda _: None,
    ) -> None:
        """Look at what is done.

        Args:
            plan: the steps.
            out: folder of the study.
            engine: LocalEngine or RayEngine.
            jobs: number of steps that run at the same time.
            launcher: command in front of `train` and `precompute`.
            device: device of all steps.
            changed: called after each finished step.
        """
        self.plan, self.out = plan, out
        self.records: dict[str, Record] = {}
        self.failed: dict[str, str] = {}  # key of a step -> reason
        self._engine, self._jobs, self._device, self._changed = engine, jobs, device, changed
        self._launcher = tuple(shlex.split(launcher or ""))
        self._running: dict[int, tuple[Placed, Any]] = {}  # by place: 0 .. jobs - 1
        self._cores = max(1, usable_cores() // jobs)
        for step in (*plan.steps, *plan.others):
            self._is_done(step)

    @property
    def done(self) -> int:
        """Return how many of the steps to run are finished."""
        return sum(step.key in self.records for step in self.plan.steps)

    def run(self) -> None:
        """Run all steps that are left; a step that needs a failed one is left out.

        Raises:
            KeyboardInterrupt, Terminated: a signal; the running steps got it too, and have ended.
        """
        left = [step for step in self.plan.steps if step.key not in self.records]
        log.info("%d of %d steps are done", len(self.plan.steps) - len(left), len(self.plan.steps))
        try:
            while left or self._running:
                left = [step for step in left if not self._begin(step)]
                if self._running:
                    time.sleep(POLL_S)
                    self._collect()
        except BaseException as error:
            self._stop(signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)
            raise

    def placed(self, step: Step) -> Placed | None:
        """Return id and folder of a step; None before its inputs are finished."""
        inputs = {role: self.records[each.key] for role, each in step.inputs.items() if each.key in self.records}
        if len(inputs) < len(step.inputs):
            return None
        number = step.id({role: record.done["content"] for role, record in inputs.items()})
        above, short = self.out / FOLDERS.get(step.kind, ""), number[:ID_DIGITS]
        if step.kind == "evaluation":
            return Placed(step, number, inputs["of"].folder / f"evaluation-{short}", inputs)
        known = next(iter(sorted(above.glob(f"*-{short}"))), None)  # another study may have named it differently
        return Placed(step, number, known or above / f"{step.name}-{short}", inputs)

    def _is_done(self, step: Step) -> bool:
        placed = self.placed(step)
        path = placed and placed.folder / DONE
        if placed is None or path is None or not path.is_file():
            return False
        done = read_json(path)
        if not isinstance(done, dict) or done.get("id") != placed.id or "content" not in done:
            raise StorageError(f"{path} is not the record of this step", fix=f"Delete {placed.folder}, and start again")
        if done.get("views", 0) >= step.stop and _result_of(step, placed.folder).exists():
            self.records[step.key] = Record(placed.folder, done)
        return step.key in self.records

    def _begin(self, step: Step) -> bool:
        """Start a step if it can be started; return whether it needs no further attention here."""
        if blocked := next((each for each in step.inputs.values() if each.key in self.failed), None):
            self.failed[step.key] = f"it needs {blocked.kind} {blocked.name}, which failed"
            return True
        if len(self._running) >= self._jobs or any(each.key not in self.records for each in step.inputs.values()):
            return False
        if self._is_done(step):
            return True
        placed = self.placed(step)
        assert placed is not None
        place = next(number for number in range(self._jobs) if number not in self._running)
        log.info("%s %s: %s", step.kind, step.name, self._command(placed))
        try:
            job = self._prepared(placed, place)
            self._running[place] = placed, self._engine.start(job)
        except OSError as error:
            raise StorageError(f"{placed.folder}: {error.strerror or error}") from error
        return True

    def _command(self, placed: Placed) -> str:
        words = (*self._words(placed.step), "deit-cli", placed.step.command, "-c", str(placed.folder / SETTINGS))
        return shlex.join(words)

    def _words(self, step: Step) -> tuple[str, ...]:
        return () if step.command == "evaluate" else self._launcher

    def _prepared(self, placed: Placed, place: int) -> Job:
        """Write what the command needs to its folder."""
        step, folder = placed.step, placed.folder.absolute()
        make_folder(folder)
        folders = {role: record.folder.absolute() for role, record in placed.inputs.items()}
        settings = step.settings_for(folder, folders) | {"device": self._device}
        environment: dict[str, str] = {}
        if self._jobs > 1:
            environment["OMP_NUM_THREADS"] = str(
                min(self._cores, int(os.environ.get("OMP_NUM_THREADS") or self._cores))
            )
            settings.setdefault("workers", max(1, self._cores // 2 if self._device == "cpu" else self._cores - 1))
            if (gpus := self._gpus_of(place)) is not None:
                environment["CUDA_VISIBLE_DEVICES"] = gpus
        header = f"# deit-cli {step.command} -c THIS_FILE runs this step by hand\n".encode()
        replace_file(folder / SETTINGS, header + to_yaml(settings))
        began = time.time()
        replace_file(folder / ATTEMPTS, pretty_json([*_closed(folder), [began, None]]))
        arguments = (step.command, "-c", str(folder / SETTINGS), *(("--json",) if step.command == "evaluate" else ()))
        return Job(
            folder=folder, arguments=arguments, launcher=self._words(step), environment=environment, cores=self._cores
        )

    def _gpus_of(self, place: int) -> str | None:
        """Return the GPUs of the steps at a place; None if there are none, or if Ray deals them out."""
        if self._device == "cpu" or isinstance(self._engine, RayEngine):
            return None
        return share_of_gpus(visible_gpus(), place, self._jobs)

    def _collect(self) -> None:
        """Record the steps that have ended."""
        for place, (placed, running) in list(self._running.items()):
            code = self._engine.poll(running)
            if code is None:
                continue
            del self._running[place]
            attempts = _closed(placed.folder, time.time())
            replace_file(placed.folder / ATTEMPTS, pretty_json(attempts))
            try:
                if code:
                    raise WorkerError(f"it ended with exit code {code}")
                self._finish(placed, sum(ended - began for began, ended in attempts))
            except DeitCliError as error:
                self._fail(placed, str(error))
            self._changed(self)

    def _finish(self, placed: Placed, seconds: float) -> None:
        """Write done.json: from now on the step is finished."""
        step, folder = placed.step, placed.folder
        if step.command == "evaluate":
            _keep_scores(folder)
        done = {
            "kind": "step",
            "version": 1,
            "step": step.kind,
            "name": step.name,
            "id": placed.id,
            "decides": step.decides,
            "inputs": {role: record.done["content"] for role, record in placed.inputs.items()},
            "content": _content_of(step, folder),
            "seconds": round(seconds, 3),
            "work": step.work,
            "like": step.like,
            "command": self._command(placed),
            "versions": versions(),
            "host": {"cores": self._cores, "gpu": gpu_name(self._device)},
        }
        if step.stop:
            done["views"] = step.stop
        replace_file(folder / DONE, pretty_json(done))
        self.records[step.key] = Record(folder, done)
        log.info("%s %s: done in %.1f s (%d of %d)", step.kind, step.name, seconds, self.done, len(self.plan.steps))

    def _fail(self, placed: Placed, reason: str) -> None:
        path = placed.folder / LOG
        lines = path.read_text(errors="replace").splitlines()[-LAST_LINES:] if path.is_file() else []
        shown = "".join(f"\n    {line}" for line in lines)
        self.failed[placed.step.key] = f"{reason}; its messages are in {path}"
        log.error("%s %s failed: %s; the last lines of %s:%s", placed.step.kind, placed.step.name, reason, path, shown)

    def _stop(self, number: int) -> None:
        """Send a signal to the running steps, and wait until they have saved their work and ended."""
        if self._running:
            log.warning("stopping %d running steps; they save their work first", len(self._running))
        for _, running in self._running.values():
            self._engine.stop(running, number)
        while self._running:
            for place, (placed, running) in list(self._running.items()):
                if (code := self._engine.poll(running)) is not None:
                    del self._running[place]
                    attempts = _closed(placed.folder, time.time())
                    replace_file(placed.folder / ATTEMPTS, pretty_json(attempts))
                    if code == 0:
                        with contextlib.suppress(DeitCliError):
                            self._finish(placed, sum(ended - began for began, ended in attempts))
            time.sleep(POLL_S)


def _result_of(step: Step, folder: Path) -> Path:
    """Return the file without which a step has no result."""
    return (
        folder
        / {"train": "run/last/model.safetensors", "precompute": "set/manifest.json", "evaluate": SCORES}[step.command]
    )


def _content_of(step: Step, folder: Path) -> str:
    """Return the id of what a step made: of the weights, of the label set, or of the scores."""
    if step.command == "precompute":
        return str(read_json(folder / "set/plan.json")["labelset_id"])
    return sha256_file(_result_of(step, folder))


def _keep_scores(folder: Path) -> None:
    """Write what `evaluate --json` printed as scores.json."""
    path = folder / OUTPUT
    try:
        scores = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise WorkerError(f"{path} is not what `evaluate --json` prints: {error}") from error
    if not isinstance(scores, dict) or "scores" not in scores:
        raise WorkerError(f"{path} has no scores")
    replace_file(folder / SCORES, pretty_json({"kind": "scores", "version": 1} | scores))


def _closed(folder: Path, now: float | None = None) -> list[list[float]]:
    """Return the attempts of a step, each with its end; an attempt that was killed ended when it last wrote a message."""
    path = folder / ATTEMPTS
    attempts = read_json(path) if path.is_file() else []
    messages = folder / LOG
    last = messages.stat().st_mtime if messages.is_file() else 0.0
    return [[began, max(began, last if now is None else now) if ended is None else ended] for began, ended in attempts]


def share_of_gpus(gpus: list[str], place: int, jobs: int) -> str | None:
    """Return the GPUs of one of several jobs, for CUDA_VISIBLE_DEVICES; None without GPUs.

    With fewer GPUs than jobs, several jobs share one.
    """
    if not gpus:
        return None
    return ",".join(gpus[place::jobs] or [gpus[place % len(gpus)]])


def visible_gpus() -> list[str]:
    """Return the names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES has them."""
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    if asked is not None:
        return [each for each in asked.split(",") if each]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def gpu_name(device: str) -> str | None:
    """Return the product name of the first GPU, or None."""
    if device == "cpu":
        return None
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages on which results depend."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@contextlib.contextmanager
def only_study_in(out: Path) -> Iterator[None]:
    """Lock the folder of a study inside the block; a killed process releases its lock.

    Raises:
        UsageError: another process compares in this folder.
    """
    make_folder(out)
    with locked(out / "lock", wait=False) as held:
        if not held:
            raise UsageError(f"another compare runs in {out}", fix="Wait until it ends, or choose another --out")
        yield


def measured(arguments: Iterable[str], timeout_s: float = 600) -> dict[str, Any] | None:
    """Run this program with --json, and return what it prints; None if it fails."""
    command = program(*arguments, "--json")
    try:
        ended = subprocess.run(command, env=environment_of({}), capture_output=True, timeout=timeout_s)
        found = parse_json(ended.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return found if ended.returncode == 0 and isinstance(found, dict) else None
