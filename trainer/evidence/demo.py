"""The demo: labelling and training on scikit-learn's digits, offline, in 45 seconds to two minutes on two cores.

Few images have class labels and many have none, so a teacher helps: a small CNN learns from 100 class labels and
labels all 1,000 training images once, and a small DeiT learns from its labels. For comparison, the same DeiT learns
from the 100 class labels alone. The demo calls the same functions as the commands.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import StoppedError, UsageError
from pipeline.images.decode import encode
from pipeline.images.source import open_source
from pipeline.labels.labelset import LabelSet
from pipeline.machine.ranks import resolve_device
from pipeline.settings.configs import PrecomputeConfig, TeacherConfig
from pipeline.settings.files import load_recipe
from pipeline.storage.atomic import refusals_named
from pipeline.views.recipe import Recipe
from trainer.config import EvaluateConfig, TrainConfig
from trainer.evaluate import ANSWERS
from trainer.evidence.scores import evaluate_checkpoint
from trainer.loop import train
from trainer.metrics import read_metrics

log = logging.getLogger("deit_cli.demo")

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
    "teacher": (773, 763, 758),
    "hard": (771, 767, 765),
    "soft": (765, 776, 767),
    "alone": (728, 723, 692),
}
Results = dict[str, dict[str, dict[str, float]]]  # network -> head or fusion -> score -> percent


def run_demo(
    out: Path,
    *,
    seed: int,
    load_teacher: Callable[..., Any],
    precompute: Callable[..., LabelSet | None],
    contact_sheet: Callable[..., None],
    progress: Callable[[Any], None],
) -> str:
    """Run the demo and return its table as text.

    The functions of stage 1 are arguments, because the trainer must not import the teacher.

    Args:
        out: folder for sources, runs, labels, pictures and results.json; must be empty or new.
        seed: random seed of weights, order and stochastic depth.
        load_teacher: `pipeline.teacher.loading.load_teacher`.
        precompute: `pipeline.stage1.precompute.precompute`.
        contact_sheet: `pipeline.labels.sheet.contact_sheet`.
        progress: called with the progress of labelling and training.

    Raises:
        UsageError: `out` is not empty, scikit-learn is not installed, or a launcher started several processes.
        StoppedError: a signal stopped the demo.
    """
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty", fix="Choose another --out")
    with refusals_named(out):
        data = write_digits(out / "data")
    recipe = load_recipe("deit", RECIPE)

    alone = {"data": str(data["labelled"]), "distillation_type": "none"}
    log.info("1. a CNN teacher learns from %d labelled digits", LABELLED)
    teacher = _train(out / "teacher", seed, recipe, progress, **alone, **TEACHER)
    log.info("2. the teacher labels %d views of each of %d digits, once", VIEWS, TRAINING)
    label_set = _label(out, data["training"], recipe, load_teacher, precompute, progress)
    contact_sheet(label_set, label_set.open_source(), out / "labels.png")
    runs = {"teacher": teacher}
    for kind in ("hard", "soft"):
        log.info("3. a DeiT learns from the teacher's %s labels, without the teacher", kind)
        labelled = {"labels": label_set.folder, "distillation_type": kind, "model": "deit-ti"}
        runs[kind] = _train(out / kind, seed, recipe, progress, **labelled, **STUDENT, epochs=VIEWS, warmup_epochs=3)
    log.info("4. the same DeiT learns from the %d class labels alone, with the same number of updates", LABELLED)
    epochs = VIEWS * TRAINING // LABELLED
    plain = {"model": "deit_tiny_patch16_224", "epochs": epochs, "warmup_epochs": epochs / 12}
    runs["alone"] = _train(out / "alone", seed, recipe, progress, **alone, **STUDENT, **plain)
    results = {name: _evaluate(run, data["evaluation"]) for name, run in runs.items()}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw_results(results, runs, out / "results.png")
    return _table(results, out)


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


def draw_results(results: Results, runs: dict[str, Path], path: Path) -> None:
    """Draw the top-1 accuracy of each network with the range of three seeds, and below it the training curves.

    Args:
        results: scores of this demo, network -> head or fusion -> score -> percent.
        runs: folder of the training run of each network.
        path: PNG file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.subplot_mosaic([["top1", "top1"], ["class_loss", "agreement"]], height_ratios=[1.1, 1])
    _draw_bars(axes["top1"], {name: top1_of(scores) for name, scores in results.items()})
    # Only runs on class labels: nine of ten views of a distilled run have none, so its class loss is not comparable.
    _draw_curves(axes["class_loss"], "class_loss", {name: runs[name] for name in ("teacher", "alone")})
    axes["class_loss"].set_title(f"Training on the {LABELLED} class labels only", fontsize=10)
    axes["class_loss"].set_ylabel("class loss (smoothed labels), nats")
    # Agreement with the teacher, because the losses are not comparable: cross-entropy (hard) and KL divergence (soft).
    _draw_curves(axes["agreement"], "teacher_agreement", {name: runs[name] for name in ("hard", "soft")})
    axes["agreement"].set_title("Training on the teacher's labels", fontsize=10)
    axes["agreement"].set_ylabel("training views on which student\nand teacher choose the same class")
    axes["agreement"].set_ylim(0, 1)
    axes["agreement"].yaxis.set_major_formatter("{x:.0%}")
    figure.savefig(path, dpi=110)


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


def _train(output: Path, seed: int, recipe: Recipe, progress: Callable[[Any], None], **settings: Any) -> Path:
    # Without DeiT's EMA: it averages over 25,000 updates, more than the demo has.
    config = TrainConfig(
        output=str(output), seed=seed, model_ema=False, log_interval=1, checkpoint_interval=50, **settings
    )
    try:
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
    progress: Callable[[Any], None],
) -> LabelSet:
    config = PrecomputeConfig(data=str(training), out=str(out / "labels"), views=(0, VIEWS))
    teacher = load_teacher(TeacherConfig(teacher=(str(out / "teacher" / "last"),), device=str(resolve_device("auto"))))
    label_set = precompute(config, recipe, teacher, open_source(config.data), progress=progress)
    if label_set is None:
        raise UsageError("the demo runs in one process", fix="Unset RANK and WORLD_SIZE, or run it without a launcher")
    return label_set


def _evaluate(run: Path, data: Path) -> dict[str, Any]:
    config = EvaluateConfig(checkpoint=str(run / "last"), data=str(data), workers=0, crop_pct=1.0)
    return evaluate_checkpoint(config)["scores"]


def _table(results: Results, out: Path) -> str:
    lines = [f"{'top-1, %':38}" + "".join(f"{head:>19}" for head in ANSWERS)]
    for name, title in TITLES.items():
        cells = (results[name].get(head, {}).get("top1") for head in ANSWERS)
        lines.append(f"{title:38}" + "".join(f"{'' if cell is None else f'{cell:.1f}':>19}" for cell in cells))
    lines.append(f"on {EVALUATION} other digits. Pictures: {out / 'results.png'}, {out / 'labels.png'}")
    return "\n".join(lines)
