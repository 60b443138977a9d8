"""The demo: labelling and training on scikit-learn's digits, offline, in one to two minutes on two cores.

Few images have class labels and many have none, so a teacher helps: a small CNN learns from 100 class labels and
labels all 1,000 training images once, and a small DeiT learns from its labels. For comparison, the same DeiT learns
from the 100 class labels alone. The demo calls the same functions as the commands.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import StoppedError, UsageError
from pipeline.images.decode import encode
from pipeline.images.source import open_source
from pipeline.labels.labelset import LabelSet
from pipeline.machine.ranks import resolve_device
from pipeline.overview.sheet import Tile, contact_sheet, draw_tile, tiles
from pipeline.settings.configs import PrecomputeConfig, TeacherConfig
from pipeline.settings.files import load_recipe
from pipeline.storage.atomic import refusals_named, replace_file
from pipeline.storage.json import pretty_json
from pipeline.text import aligned
from pipeline.views.recipe import Recipe
from trainer.config import AnalyseConfig, EvaluateConfig, ReportConfig, TrainConfig
from trainer.evaluate import ANSWERS
from trainer.evidence.analyse import analyse
from trainer.evidence.report import write_report
from trainer.evidence.scores import evaluate_checkpoint
from trainer.loop import train
from trainer.metrics import read_metrics

log = logging.getLogger("deit_cli.demo")
Shown = Callable[[], AbstractContextManager[Callable[[Any], None]]]

LABELLED, TRAINING = 100, 1000  # of 1,797 digits; the other 797 are for evaluation
EVALUATION = 1797 - TRAINING
VIEWS = 36
STUDENT = {
    "patch_size": 4,
    "embed_dim": 64,
    "depth": 2,
    "num_heads": 4,
    "drop_path": 0.0,
    "batch_size": 24,
    "repeated_aug": 1,  # DeiT's 3 would leave only eight different images in a batch
    "lr": 2e-3,
}
TEACHER = {"model": "test_resnet", "drop_path": 0.0, "batch_size": 50, "lr": 3e-3, "epochs": 100, "warmup_epochs": 5}
# DeiT's recipe with weaker augmentation, for digits of 8 x 8 pixels at twice that size: a mirrored digit is another
# digit, and half a digit cannot be recognised.
RECIPE = {
    "img_size": 16,
    "scale": [0.85, 1.0],
    "ratio": [0.9, 1.1],
    "hflip": 0.0,
    "aa": "rand-m2-n1-p0.2-mstd0.5-inc1",
    "reprob": 0.05,
    "mixup": 0.2,
    "mixup_prob": 0.1,
}

TITLES = {
    "teacher": f"teacher CNN, {LABELLED} class labels",
    "hard": "DeiT from the teacher's hard labels",
    "soft": "DeiT from the teacher's soft labels",
    "alone": f"DeiT alone, {LABELLED} class labels",
}
SHORT = {
    "teacher": "teacher CNN",
    "hard": "DeiT, hard labels",
    "soft": "DeiT, soft labels",
    "alone": "DeiT alone",
}
# Number of correct answers for the EVALUATION digits with seeds 0, 1 and 2, by `top1_of`: measured on two virtual cores of
# an AMD EPYC (family 26) with torch 2.14.1. Counts, because the gains in README.md are differences before rounding.
THREE_SEEDS = {
    "teacher": (770, 761, 768),
    "hard": (756, 758, 762),
    "soft": (769, 767, 762),
    "alone": (719, 722, 711),
}
Results = dict[str, dict[str, dict[str, float]]]  # network -> head or fusion -> score -> percent


def run_demo(
    out: Path,
    *,
    seed: int,
    load_teacher: Callable[..., Any],
    precompute: Callable[..., LabelSet | None],
    shown: Shown,
) -> dict[str, Any]:
    """Run the demo, write its report, and return its scores and its files as plain JSON values.

    The functions of stage 1 are arguments, because the trainer must not import the teacher.

    Args:
        out: folder for sources, runs, labels, pictures, study.json and the report; must be empty or new.
        seed: random seed of weights, order and stochastic depth.
        load_teacher: `pipeline.teacher.loading.load_teacher`.
        precompute: `pipeline.stage1.precompute.precompute`.
        shown: opens a display of progress; each step has its own, whose last line comes before the next step.

    Raises:
        UsageError: `out` is not empty, scikit-learn is not installed, or a launcher started several processes.
        StoppedError: a signal stopped the demo.
    """
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty", fix="Choose another --out")
    with refusals_named(out):
        data = write_digits(out / "data")
    recipe = load_recipe("deit", RECIPE)

    clock = _Clock()
    alone = {"data": str(data["labelled"]), "distillation_type": "none"}
    log.info("1. a CNN teacher learns from %d labelled digits", LABELLED)
    runs = {"teacher": _train(out / "teacher", seed, recipe, shown, **alone, **TEACHER)}
    clock.note("teacher")
    log.info("2. the teacher labels %d views of each of %d digits, once", VIEWS, TRAINING)
    label_set = _label(out, data["training"], recipe, load_teacher, precompute, shown)
    clock.note("labels")
    for kind in ("hard", "soft"):
        log.info("3. a DeiT learns from the teacher's %s labels, without the teacher", kind)
        labelled = {"labels": label_set.folder, "distillation_type": kind, "model": "deit-ti", "probe_interval": 75}
        runs[kind] = _train(out / kind, seed, recipe, shown, **labelled, **STUDENT, epochs=VIEWS, warmup_epochs=3)
        clock.note(kind)
    log.info("4. the same DeiT learns from the %d class labels alone, with the same number of updates", LABELLED)
    epochs = VIEWS * TRAINING // LABELLED
    plain = {"model": "deit_tiny_patch16_224", "epochs": epochs, "warmup_epochs": epochs / 12}
    runs["alone"] = _train(out / "alone", seed, recipe, shown, **alone, **STUDENT, **plain)
    clock.note("alone")
    log.info("5. all of them answer %d other digits", EVALUATION)
    results = {name: _evaluate(run, data["evaluation"]) for name, run in runs.items()}
    analysis = analyse(
        [str(runs[name]) for name in ("hard", "soft", "alone", "teacher")],
        AnalyseConfig(data=str(data["evaluation"]), out=out / "analysis", crop_pct=1.0, attention=3, workers=0),
    )
    replace_file(out / "study.json", pretty_json(_study(results, clock.seconds, seed)))
    contact_sheet(label_set, label_set.open_source(), out / "labels.png")
    cosines = {run["name"]: run["tokens"]["cosine"] for run in analysis["runs"] if run["tokens"]}
    draw_results(
        results, runs, tiles(label_set, label_set.open_source(), samples=12, views=1), cosines, out / "results.png"
    )
    write_report(ReportConfig(out=out / "report.html", workers=0), [str(out), str(out / "analysis")])
    pictures = [str(out / name) for name in ("results.png", "labels.png")]
    return {"images": EVALUATION, "scores": results, "report": str(out / "report.html"), "pictures": pictures}


class _Clock:
    """The seconds of each step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def note(self, name: str) -> None:
        """Note the seconds since the last note."""
        now = time.monotonic()
        self.seconds[name], self._last = round(now - self._last, 1), now


def _study(results: Results, seconds: dict[str, float], seed: int) -> dict[str, Any]:
    """Return the demo as the content of a study: one seed of each network, and the range of the seeds measured in advance."""
    base = top1_of(results["alone"])
    cells = []
    for name in ("alone", "hard", "soft"):
        top1, before = top1_of(results[name]), three_seeds_top1(name)
        taught = name != "alone"
        costs = {
            "teacher_s": seconds["teacher"] if taught else 0.0,
            "labelling_s": seconds["labels"] if taught else 0.0,
        }
        run = {"seed": seed, "run": name, "scores_file": f"{name}/scores.json", "top1": top1, "seconds": seconds[name]}
        middle = {
            "answer": "mean_logits" if taught else "class_head",
            "mean": top1,
            "low": min(before),
            "high": max(before),
        }
        cells.append({
            "name": SHORT[name],
            "seeds": [run],
            "top1": middle | {"std": None},
            "against_baseline": {"difference": top1 - base, "p": None, "pairs": 1} if taught else None,
            "costs": costs | {"student_s": seconds[name]},
        })  # fmt: skip
    teacher = {"name": "CNN", "top1": top1_of(results["teacher"]), "run": "teacher", "seconds": seconds["teacher"]}
    return {
        "kind": "study",
        "version": 1,
        "name": "demo",
        "title": f"A teacher with {LABELLED} labelled digits, and students of its labels",
        "baseline": SHORT["alone"],
        "note": f"Bars: this run, with seed {seed}. Lines: lowest and highest of the seeds 0, 1 and 2, measured in advance on"
        " one machine.",
        "command": f"deit-cli demo --seed {seed}",
        "cells": cells,
        "teachers": [teacher | {"labels": {"path": "labels"}}],
    }


def write_digits(folder: Path, labelled: int = LABELLED) -> dict[str, Path]:
    """Write scikit-learn's digits as WebDataset tars, and return their folders: labelled, training and evaluation.

    The first `labelled` training digits have class labels.
    """
    from webdataset.writer import TarWriter

    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UsageError("the demo needs scikit-learn", fix='Run pip install "deit-cli[demo]"') from error
    digits: Any = load_digits()
    images, classes = (digits.images * 255 / 16).round().astype(np.uint8), digits.target
    order = np.random.Philox(key=0).random_raw(len(classes)).argsort()
    parts = {"labelled": order[:labelled], "training": order[:TRAINING], "evaluation": order[TRAINING:]}
    for name, chosen in parts.items():
        target = folder / name
        target.mkdir(parents=True)
        (target / "classes.txt").write_text("".join(f"{digit}\n" for digit in range(10)))
        with TarWriter(str(target / f"{name}.tar"), mtime=0) as tar:  # pyright: ignore[reportArgumentType]
            for position, i in enumerate(chosen.tolist()):
                sample: dict[str, Any] = {"__key__": f"digit-{i:04}", "png": encode(images[i], "PNG")}
                if name != "training" or position < labelled:
                    sample["cls"] = str(classes[i]).encode()
                tar.write(sample)
    return {name: folder / name for name in parts}


def draw_results(
    results: Results,
    runs: dict[str, Path],
    views: Sequence[Sequence[Tile]],
    cosines: dict[str, dict[str, Any]],
    path: Path,
) -> None:
    """Draw top-1 with the range of three seeds, views with the teacher's answers, the two tokens, and agreement in training.

    Args:
        results: scores of this demo, network -> answer -> score -> percent.
        runs: folder of the training run of each network.
        views: labelled views: twelve rows, of which the first of each is drawn.
        cosines: run with two tokens -> `cosine` of `analyse`.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 12.5), layout="constrained")
    parts: Any = figure.subfigures(3, 1, height_ratios=[1, 1.7, 0.9])
    top, middle, bottom = parts
    _draw_bars(top.subplots(), {name: top1_of(scores) for name, scores in results.items()})
    middle.suptitle("Views as the teacher saw them, with its five most probable classes", fontsize=10)
    for axis, row in zip(middle.subplots(2, 6).flat, views, strict=True):
        draw_tile(axis, row[0], fontsize=6.5)
    tokens, agreement = bottom.subplots(1, 2)
    _draw_tokens(tokens, cosines)
    # Agreement with the teacher, because the losses are not comparable: cross-entropy (hard) and KL divergence (soft).
    _draw_curves(agreement, "teacher_agreement", {name: runs[name] for name in ("hard", "soft")})
    agreement.set_title("Training: views on which student and teacher agree", fontsize=10)
    agreement.set_ylim(0, 1)
    agreement.yaxis.set_major_formatter("{x:.0%}")
    replace_file(path, lambda file: figure.savefig(file, format="png", dpi=110))


def _draw_tokens(axis: Any, cosines: dict[str, dict[str, Any]]) -> None:
    """Draw the cosine of class token and distillation token: what enters the first block, and after each block."""
    for name, cosine in cosines.items():
        values = [cosine["input"], *cosine["blocks"]]
        axis.plot(range(len(values)), values, marker="o", label=SHORT[name], color=_color(name))
    axis.set_title("Class token and distillation token", fontsize=10)
    axis.set_xlabel("block (0: what enters the first)")
    axis.set_ylabel("cosine")
    axis.set_ylim(min(0, axis.get_ylim()[0]), 1.02)
    axis.locator_params(axis="x", integer=True)
    axis.legend(fontsize=9)


def top1_of(scores: dict[str, dict[str, float]]) -> float:
    """Return the top-1 accuracy of the mean of both heads' logits, or of the only head, in percent."""
    return scores.get("mean_logits", scores["class_head"])["top1"]


def three_seeds_top1(name: str) -> list[float]:
    """Return the top-1 accuracy measured in advance with seeds 0, 1 and 2, in percent."""
    return [100 * right / EVALUATION for right in THREE_SEEDS[name]]


def _draw_bars(axis: Any, top1: dict[str, float]) -> None:
    spread = {name: three_seeds_top1(name) for name in top1}
    lowest = min(*top1.values(), *(min(seeds) for seeds in spread.values()))
    start = max(0, 5 * (int(lowest) // 5) - 5)
    axis.bar([SHORT[name] for name in top1], list(top1.values()), color=[_color(name) for name in top1], width=0.6)
    for place, name in enumerate(top1):
        axis.text(place, start + 1, f"{top1[name]:.1f}", ha="center", color="white", fontsize=13, fontweight="bold")
        low, high = min(spread[name]), max(spread[name])
        axis.errorbar(place, (low + high) / 2, yerr=(high - low) / 2, color="black", capsize=8, linewidth=1.5)
    axis.set_ylim(start, 100)
    axis.locator_params(axis="y", integer=True)
    axis.set_ylabel(f"top-1, % (axis starts at {start}, not at 0)" if start else "top-1, %")
    axis.set_title(
        f"Accuracy on {EVALUATION} digits that no network was trained on\n"
        "bars: this run, lines: range of three seeds on one machine, measured in advance",
        fontsize=10,
    )


def _draw_curves(axis: Any, number: str, runs: dict[str, Path]) -> None:
    """Draw a number from metrics.jsonl over the course of training; each point is the mean over 1/36 of it."""
    for name, run in runs.items():
        lines = [line for line in read_metrics(run) if line["kind"] == "train"]
        parts = [part for part in np.array_split([line[number] for line in lines], VIEWS) if len(part)]
        share = [(place + 1) / len(parts) for place in range(len(parts))]
        axis.plot(share, [float(part.mean()) for part in parts], label=SHORT[name], color=_color(name))
    axis.set_xlabel("progress of the training")
    axis.xaxis.set_major_formatter("{x:.0%}")
    axis.legend(fontsize=9)


def _color(name: str) -> str:
    return f"C{list(TITLES).index(name)}"


def _train(output: Path, seed: int, recipe: Recipe, shown: Shown, **settings: Any) -> Path:
    # Without DeiT's EMA: it averages over 25,000 updates, more than the demo has.
    config = TrainConfig(
        output=str(output), seed=seed, model_ema=False, log_interval=1, checkpoint_interval=50, **settings
    )
    try:
        with shown() as progress:
            return train(config, None if config.labels else recipe, progress=progress)
    except StoppedError as error:
        raise StoppedError(
            f"the demo was stopped and cannot be resumed: to start again, delete {output.parent} or choose another --out",
            error.exit_code - 128,
        ) from None


def _label(
    out: Path,
    training: Path,
    recipe: Recipe,
    load_teacher: Callable[..., Any],
    precompute: Callable[..., LabelSet | None],
    shown: Shown,
) -> LabelSet:
    config = PrecomputeConfig(data=str(training), out=str(out / "labels"), views=(0, VIEWS))
    teacher = load_teacher(TeacherConfig(teacher=(str(out / "teacher" / "last"),), device=str(resolve_device("auto"))))
    with shown() as progress:
        label_set = precompute(config, recipe, teacher, open_source(config.data), progress=progress)
    if label_set is None:
        raise UsageError("the demo runs in one process", fix="Unset RANK and WORLD_SIZE, or run it without a launcher")
    return label_set


def _evaluate(run: Path, data: Path) -> dict[str, Any]:
    config = EvaluateConfig(
        checkpoint=str(run / "last"), data=str(data), workers=0, crop_pct=1.0, out=run / "scores.json"
    )
    return evaluate_checkpoint(config)["scores"]


def demo_table(result: dict[str, Any]) -> str:
    """Return the result of `run_demo` as a table."""
    rows = [["top-1, %", *ANSWERS]]
    for name, title in TITLES.items():
        cells = (result["scores"][name].get(head, {}).get("top1") for head in ANSWERS)
        rows.append([title, *("" if cell is None else f"{cell:.1f}" for cell in cells)])
    files = f"Report: {result['report']}. Pictures: {', '.join(result['pictures'])}"
    return f"{aligned(rows)}\non {result['images']} other digits\n{files}"
