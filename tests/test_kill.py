"""SIGKILL at random moments, in both stages: the resumed result equals the uninterrupted one (faults 1 and 18).

Kills follow progress, not the clock: a run is killed a few milliseconds after it has come to a place drawn at random,
and a gate keeps it from going much further, however late the kill comes. Every run is a fork of one server that has
imported everything, in a session of its own.
"""

import contextlib
import io
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from support.builders import confident_cnn, files_of, make_labels, named_files, teacher_of, write_tars
from support.forks import Run, Server, kill, serving
from support.label_sets import problems_in
from torch import nn

from pipeline.errors import LabelSetIncomplete
from pipeline.labels import sealing
from pipeline.labels.labelset import LabelSet
from pipeline.storage import atomic as storage
from trainer import loop
from trainer.checkpoint import load_state
from trainer.config import TrainConfig
from trainer.metrics import read_metrics
from trainer.run import STATE_NAME

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sessions are read from /proc"),
]

SETTINGS = {"views": (0, 16), "views_per_shard": 2, "processes": 2, "engine": "local", "accuracy_samples": 0}
SIZES = (24, 16, 16)
LABELS = 8 * len(SIZES)  # label shards
INDEX = 2 + len(SIZES)  # plan, open manifest, samples files
FILES = INDEX + LABELS
SEALING = FILES + 1  # the place after all files

ROUNDS = 10
THIRDS = (
    range(6, 11),
    range(11, 16),
    range(16, 21),
)  # places among the labels; the gate lets a run go a little further
TRAIN_KILLS = 30


@pytest.fixture(scope="module")
def server():
    with serving("test_kill") as started:
        yield started


# --- in the forks: the work, stretched where it is too short to be hit -----------------------------------------


def in_halves(write_file: Callable[..., Any]) -> Callable[..., Any]:
    """Make `publish_file` or `replace_file` write half of the content, and after a pause the rest."""

    def call(path: Path, written: bytes | Callable[[BinaryIO], None]) -> Any:
        def write_in_halves(file: BinaryIO) -> None:
            content = written
            if not isinstance(content, bytes):
                buffer = io.BytesIO()
                content(buffer)
                content = buffer.getvalue()
            file.write(content[: len(content) // 2])
            file.flush()
            time.sleep(0.004)
            file.write(content[len(content) // 2 :])

        return write_file(path, write_in_halves)

    return call


def paused(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    """Make a function wait before and after its work."""

    def call(*args: Any) -> Any:
        time.sleep(seconds)
        result = function(*args)
        time.sleep(seconds)
        return result

    return call


def gated_cnn() -> tuple[nn.Module, dict[str, Any]]:
    """The confident CNN; it does not answer while the gate is closed."""
    network, config = confident_cnn()
    network.register_forward_pre_hook(wait_at_gate)
    return network, config


def wait_at_gate(*_: object) -> None:
    """Wait while a file `gate` beside the label set names a number of files, and so many are there."""
    out = Path(os.environ["KILL_OUT"])
    with contextlib.suppress(FileNotFoundError):
        while len(final_names(out)) >= int((out.parent / "gate").read_text()):
            time.sleep(0.002)


def gated(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function wait at the gate before its work."""

    def call(*args: Any) -> Any:
        wait_at_gate()
        return function(*args)

    return call


class ForkContext:
    """Does for the engine what multiprocessing's spawn context does, by fork: that saves its processes the imports.

    As after a spawn, a process has no end of a pipe but its own, and hears when its parent is gone.
    """

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("fork")
        self._ours: list[Any] = []

    def Pipe(self) -> tuple[Any, Any]:
        ours, theirs = self._context.Pipe()
        self._ours.append(ours)
        return ours, theirs

    def Process(self, *, target: Callable[..., None], args: tuple[Any, ...], name: str) -> Any:
        return self._context.Process(target=self._run, args=(target, *args), name=name)

    def _run(self, target: Callable[..., None], *args: Any) -> None:
        for end in self._ours:
            end.close()
        target(*args)


def label(out: str, data: str, *, spawn: bool, workers: int) -> None:
    """Make or continue a label set.

    Spawned processes are not patched. The teacher's gate holds them too, but only a few files later.
    """
    os.environ["KILL_OUT"] = out
    patch = pytest.MonkeyPatch()
    for user in ("stage1.drafts", "stage1.indexing", "labels.sealing"):
        patch.setattr(f"pipeline.{user}.publish_file", in_halves(storage.publish_file))
    patch.setattr(sealing, "replace_file", marked(in_halves(storage.replace_file), Path(out).with_name("sealing")))
    patch.setattr(os, "link", gated(paused(os.link, 0.003)))
    patch.setattr(os, "replace", paused(os.replace, 0.06))
    if not spawn:
        context, contexts = ForkContext(), multiprocessing.get_context
        patch.setattr(multiprocessing, "get_context", lambda kind: context if kind == "spawn" else contexts(kind))
    make_labels(Path(out), data, teacher=teacher_of("test_kill:gated_cnn"), workers=workers, **SETTINGS)


def marked(function: Callable[..., Any], mark: Path) -> Callable[..., Any]:
    """Make a function leave a mark when it is called."""

    def call(*args: Any) -> Any:
        mark.touch()
        return function(*args)

    return call


def train(out: str, labels: str, *, limit: int | None) -> None:
    """Train a student or continue; with a limit, stop and wait once a state is saved at or after that batch."""

    def replace_and_stop(source: str, target: str) -> None:
        replace(source, target)
        if limit is not None and Path(target).name == STATE_NAME and position(Path(target)) >= limit:
            signal.pause()

    torch.set_num_threads(1)
    patch, replace = pytest.MonkeyPatch(), paused(os.replace, 0.002)
    patch.setattr("trainer.checkpoint.replace_file", in_halves(storage.replace_file))
    patch.setattr(os, "replace", replace_and_stop)
    loop.train(
        TrainConfig(
            labels=Path(labels),
            output=Path(out),
            model="deit-ti",
            patch_size=8,
            embed_dim=32,
            depth=2,
            num_heads=2,
            batch_size=12,
            epochs=50,
            warmup_epochs=1,
            lr=1e-3,
            workers=0,
            resume="auto",
            recovery_interval=2,
            repeated_aug=1,
        )
    )


RUNS: dict[str, Callable[..., None]] = {"label": label, "train": train}


# --- stage 1 --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Aim:
    """When to kill, and whom.

    Attributes:
        files: how many files must stand under their final names; 0: whatever is there; SEALING: the last step.
        victim: `group` is all processes of the run, `parent` its first one, `teacher` one of the others.
        delay_s: from then on.
    """

    files: int
    victim: str
    delay_s: float


def draw_aims(moments: random.Random) -> list[list[Aim]]:
    """Draw five kills for each round: three further and further among the labels, one before or after, one at any time.

    Of the kills among the labels, each round has two of all processes and one of the parent or of a teacher process.
    """
    rounds: list[list[Aim]] = []
    for number in range(ROUNDS):
        victims = moments.sample(["group", "group", ("parent", "teacher")[number % 2]], 3)
        aims = [
            Aim(moments.choice(third), victim, moments.uniform(0, 0.03))
            for third, victim in zip(THIRDS, victims, strict=True)
        ]
        if number % 3:
            aims.insert(0, Aim(moments.randint(1, INDEX), "group", moments.uniform(0, 0.03)))
        else:
            aims.append(Aim(SEALING, "group", moments.uniform(0, 0.12)))
        aims.insert(moments.randrange(len(aims) + 1), Aim(0, "group", moments.uniform(0, 0.5)))
        rounds.append(aims)
    return rounds


class Stage1:
    """One label set that is made under kills, and the files that it must come to."""

    def __init__(self, server: Server, folder: Path, data: str, whole: dict[str, bytes]) -> None:
        self._server, self._folder, self._data = server, folder, data
        self._gate, self._mark = folder / "gate", folder / "sealing"
        self.out, self.whole = folder / "set", whole

    def start(self, *, spawn: bool = False, workers: int = 0) -> Run:
        self._mark.unlink(missing_ok=True)
        arguments = {"out": str(self.out), "data": self._data, "spawn": spawn, "workers": workers}
        return Run(self._server, "label", self._folder / "log", **arguments)

    def finish(self) -> None:
        """Let a run come to its end."""
        self._gate.unlink(missing_ok=True)
        with self.start() as run:
            assert run.wait_gone() == 0, run.log

    def finish_and_compare(self) -> None:
        """Let a run come to its end: the same files, and no others. Then begin anew."""
        self.finish()
        assert files_of(self.out) == self.whole
        assert problems_in(LabelSet.open(self.out)) == []
        shutil.rmtree(self.out)

    def kill(self, aim: Aim, **how: Any) -> bool:
        """Start a run and kill; return whether the kill came before the run was through."""
        before = len(final_names(self.out))
        files = aim.files and max(aim.files, before + 1)
        self._gate.write_text(str(max(files, before) + 2))
        with self.start(**how) as run:
            run.wait_for(lambda: self._is_at(files))
            time.sleep(aim.delay_s)
            if aim.victim == "group":
                os.killpg(run.pid, signal.SIGKILL)
            else:
                kill(run.pid if aim.victim == "parent" else min(run.teachers()))
            self._gate.unlink()
            code = run.wait_gone()
            if aim.victim == "teacher":
                assert code == 0, run.log  # another takes its place
                assert "was lost (SIGKILL)" in run.log
                return True
            assert code in (0, -signal.SIGKILL), run.log
            return code != 0

    def _is_at(self, files: int) -> bool:
        return self._mark.exists() if files == SEALING else len(final_names(self.out)) >= files

    def check(self) -> tuple[int, bool]:
        """Check that nothing wrong stands under a final name; return the number of label shards, and if it is sealed."""
        found = named_files(self.out)
        manifest = found.pop("manifest.json", None)
        assert [name for name, content in found.items() if content != self.whole.get(name)] == []
        if manifest == self.whole["manifest.json"]:
            assert problems_in(LabelSet.open(self.out)) == []
        elif manifest is not None:
            with pytest.raises(LabelSetIncomplete):
                LabelSet.open(self.out)
        return sum(name.startswith("labels") for name in found), manifest == self.whole["manifest.json"]

    def kill_and_check(self, aim: Aim, **how: Any) -> str:
        """Kill runs until one was hit; return in what of the work that was."""
        while not self.kill(aim, **how):
            self.finish_and_compare()
        labels, sealed = self.check()
        if sealed:
            self.finish_and_compare()  # sweeps, too
        if aim.victim == "teacher":
            assert sealed
        midst = 0 < labels < LABELS or aim.victim == "teacher"
        return "labelling" if midst else "sealing" if labels else "indexing"


def final_names(folder: Path) -> list[str]:
    """Return the names of all files but the temporary ones, and the card, which comes after everything is sealed."""
    names = [name for _, _, names in os.walk(folder) for name in names]
    return [name for name in names if not name.startswith(".tmp-") and name != "README.md"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_tars(tmp_path_factory.mktemp("data"), SIZES)


@pytest.fixture(scope="module")
def whole(server, data, tmp_path_factory) -> dict[str, bytes]:
    """The files of an uninterrupted run."""
    stage = Stage1(server, tmp_path_factory.mktemp("whole"), data, {})
    stage.finish()
    files = files_of(stage.out)
    assert len(files) == FILES + 1  # and the card
    return files


@pytest.fixture
def stage(server, data, whole, tmp_path) -> Stage1:
    return Stage1(server, tmp_path, data, whole)


def test_precompute_killed_at_fifty_random_moments_makes_the_same_files(stage):
    kills: Counter[str] = Counter()
    for aims in draw_aims(random.Random(0)):
        for aim in aims:
            kills[stage.kill_and_check(aim)] += 1
        stage.finish_and_compare()
    assert kills.total() == 50
    assert kills["labelling"] >= 3 * ROUNDS  # the gate holds every run that is to be killed there
    assert min(kills["indexing"], kills["sealing"]) >= 4


@pytest.mark.parametrize(
    ("aim", "workers"),
    [
        (Aim(INDEX, "parent", 1.5), 0),  # while the teacher processes import
        (Aim(INDEX + 3, "group", 0.01), 0),
        (Aim(INDEX + 6, "teacher", 0.01), 0),  # another one is spawned
        (Aim(INDEX + 2, "parent", 0.02), 1),  # its teacher processes have loader processes of their own
    ],
    ids=lambda value: value.victim if isinstance(value, Aim) else f"workers-{value}",
)
def test_precompute_killed_with_spawned_processes_makes_the_same_files(stage, aim, workers):
    stage.kill_and_check(aim, spawn=True, workers=workers)
    stage.finish_and_compare()


# --- stage 2 --------------------------------------------------------------------------------------------------


def position(state: Path) -> int:
    """Return the batch with which a saved run goes on; it must load."""
    return load_state(state)[1]["next_update"] if state.exists() else 0


def test_training_killed_at_random_moments_ends_with_the_same_weights(server, tmp_path):
    label_set = make_labels(tmp_path / "labels", write_tars(tmp_path / "data", (24, 16)))
    whole, cut = tmp_path / "whole", tmp_path / "cut"

    def start(out: Path, limit: int | None = None) -> Run:
        return Run(server, "train", tmp_path / "log", out=str(out), labels=str(label_set.folder), limit=limit)

    with start(whole) as run:
        assert run.wait_gone() == 0, run.log
    moments, torn = random.Random(1), 0
    for number in range(TRAIN_KILLS):
        before = position(cut / STATE_NAME)
        further = moments.randint(0, 5)
        with start(cut, before + further + 2) as run:
            run.wait_for(lambda place=before + further: position(cut / STATE_NAME) >= place)
            if number % 3:  # while it writes a file, of the state or of the exported model
                place = before + further
                run.wait_for(lambda place=place: any(cut.rglob(".tmp-*")) or position(cut / STATE_NAME) > place)
            else:
                time.sleep(moments.uniform(0, 0.03 if further else 0.5))
            os.killpg(run.pid, signal.SIGKILL)
            assert run.wait_gone() == -signal.SIGKILL, run.log
        torn += bool(list(cut.rglob(".tmp-*")))
        assert position(cut / STATE_NAME) >= before + further
    assert torn >= TRAIN_KILLS // 3  # kills that came in the middle of a checkpoint
    with start(cut) as run:
        assert run.wait_gone() == 0, run.log
    expected, found = (load_state(folder / STATE_NAME)[0] for folder in (whole, cut))
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert files_of(cut / "last") == files_of(whole / "last")
    assert list(cut.rglob(".tmp-*")) == []
    assert losses_of(cut) == losses_of(whole)


def losses_of(folder: Path) -> list[tuple[int, float]]:
    return [(line["index"], line["loss"]) for line in read_metrics(folder)]
