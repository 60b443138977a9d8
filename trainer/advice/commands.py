"""What to type after `init`, and how much work it is."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.advice.answers import TEACHER_EPOCHS, Answers, Machine


def next_commands(answers: Answers, folder: Path, machine: Machine) -> Iterator[str]:
    """Yield the next commands to type: as far as the trained student."""
    gpus = len(machine.gpus)
    launcher = ("torchrun", "--nproc-per-node", gpus, "--no-python") if gpus > 1 else ()
    if answers.trains_teacher:
        yield command_line(*launcher, "deit-cli", "train", "-c", folder / "teacher.yaml")
    student = {"epochs": answers.epochs, "model": answers.model} | answers.student_sizes
    yield command_line("deit-cli", "estimate", "-c", folder / "precompute.yaml", *_flags(student))
    yield command_line("deit-cli", "precompute", "-c", folder / "precompute.yaml")
    yield command_line(*launcher, "deit-cli", "train", "-c", folder / "train.yaml")


def later_commands(answers: Answers, folder: Path) -> Iterator[str]:
    """Yield the commands for what has been made: views, accuracy, a page, an export, and the list of runs."""
    labels, student = folder / "labels", folder / "student"
    remote, reading = answers.images.source.is_remote, _flags(answers.reading)
    elsewhere = ("--data", answers.images.location, *reading) if remote else ()
    yield command_line("deit-cli", "labels", "show", labels, "--out", folder / "labels.png", *elsewhere)
    evaluate = ["deit-cli", "evaluate", "--checkpoint", student / answers.student, "--labels", labels]
    if remote:
        evaluate += ["--labels-data", answers.images.location]
    if answers.evaluation is not None:
        kept = {name: value for name, value in answers.reading.items() if name != "labels_file"}
        evaluate += ["--data", answers.evaluation.location, *_flags(kept)]
    yield command_line(*evaluate)
    yield command_line("deit-cli", "report", student, labels, "--out", folder / "report.html", *elsewhere)
    yield command_line("deit-cli", "export", student, "--to", "timm", "--out", folder / "student-timm")
    yield command_line("deit-cli", "runs", folder)


def command_line(*words: Any) -> str:
    """Return words as a line for the shell."""
    return shlex.join(map(str, words))


def _flags(options: Mapping[str, Any]) -> list[str]:
    return [str(part) for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]


def work(answers: Answers) -> Iterator[str]:
    """Yield the work of each file: how often a network sees an image, and how large the image is."""
    samples, pixels = answers.images.samples, f"of {answers.sizes[0]} pixels"
    if answers.trains_teacher:
        yield f"teacher.yaml: {answers.teacher} trains on {TEACHER_EPOCHS * answers.images.labelled:,} views {pixels}"
    yield f"precompute.yaml: {answers.teacher} answers for {answers.views * samples:,} views {pixels}"
    yield f"train.yaml: {answers.model} trains on {answers.epochs * samples:,} views {pixels}"
