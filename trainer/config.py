"""Settings of training and of the commands that show its results: frozen, validated, and those of a run are saved in it.

Names and defaults are DeiT's and timm's where the meaning is the same (Touvron et al. 2021, table 9). Each setting is
written once, here: the command line takes its options, helps and defaults from these fields.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import UsageError
from pipeline.labels.format import parse_pin
from pipeline.settings.configs import RENDER_HELP, RenderDevice, SourceConfig
from pipeline.settings.fields import (
    as_written,
    check_settings,
    data_option,
    distillation_option,
    evaluation_option,
    logging_option,
    measurement_option,
    optimisation_option,
    output_option,
    run_option,
    settings_of,
    student_option,
    teacher_option,
    views_option,
)
from pipeline.storage.urls import working_folder
from pipeline.text import parse_bytes

if TYPE_CHECKING:
    from pipeline.images.samples import SourceOptions

DistillationType = Literal["none", "soft", "hard"]
Tail = Literal["spread", "renormalise"]
Reduction = Literal["batchmean", "deit"]
SecondToken = Literal["distillation", "class"]
AmpDtype = Literal["auto", "float32", "bfloat16"]
ViewPolicy = Literal["cycle", "random", "once"]
Resume = Literal["never", "auto"]
LabelMode = Literal["mean", "random"]
CompareEngine = Literal["local", "ray"]
STUDENT_SIZES = ("patch_size", "embed_dim", "depth", "num_heads")  # settings that change the size of --model
RunsOrder = Literal["name", "written", "state", "progress", "top1", "loss", "speed"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(SourceConfig):
    """Settings of a training run.

    A resumed run may change the settings that are `free`: they set locations and speed, and do not change the result.
    (The batch may be divided differently if the number of views in an update, over all ranks and passes, stays the same.
    Which label sets these locations hold, and how several of them are combined, may not change: `trainer.run.run_identity`.)
    """

    labels: tuple[str, ...] = data_option(
        (),
        "Label set that `precompute` made: folder or URL. Required, except with --distillation-type none. Repeat the"
        " option to learn from several teachers that labelled the same images with the same recipe.",
        free=True,
        metavar="FOLDER|URL",
    )
    label_weights: tuple[float, ...] = data_option(
        (),
        "Weights of the label sets, one for each --labels in the same order, such as 0.7,0.3; they are scaled to a sum"
        " of 1. By default equal.",
        low=1e-6,
        high=1e6,
        free=True,
        timed=False,
    )
    label_mode: LabelMode = data_option(
        "mean",
        "Combination of several label sets: the weighted mean of their probabilities and a weighted vote for the hard"
        " label (mean), or for each view the labels of one set, drawn with its weight (random).",
        free=True,
    )
    expect_manifest: tuple[str, ...] = data_option(
        (),
        "Expected hash of the label set's manifest, as `labels info` prints it; a label set with any other manifest"
        " is refused. Pass it once for each --labels, in the same order, or not at all.",
        free=True,
        metavar="sha256:HEX",
    )
    data: str | None = data_option(
        None,
        "Images: path or URL; by default those in the label set, or else the local path stored in it. Required"
        " without --labels.",
        "--data-path",
        free=True,
        metavar="PATH|URL",
    )
    labelled_fraction: float = data_option(
        1.0,
        "Share of the class labels that is used, above 0 and up to 1; a smaller share is a part of a larger one. Without"
        " --labels, only these images are trained on; with --labels, the others still learn from the teacher.",
        low=1e-9,
        high=1,
        timed=False,
    )
    cache_dir: Path | None = data_option(
        None, "Folder for local copies of files from URLs; by default ~/.cache/deit-cli.", free=True
    )
    cache_size: str = data_option(
        "100GB",
        "Maximum size of --cache-dir, such as 500MB or 100GB; the least recently used files are deleted first.",
        free=True,
        metavar="SIZE",
    )
    min_rate: str = data_option(
        "10kB",
        "Minimum rate a second, over a minute, at which files from URLs must arrive, such as 10kB or 1MB; a slower"
        " transfer is started again, as after an error.",
        free=True,
        metavar="SIZE",
    )
    output: str = output_option(
        "runs/student",
        "Folder or URL for checkpoints, metrics, and the exported students (last/, last-ema/, best/).",
        "--output-dir",
        free=True,
        timed=False,
        metavar="FOLDER|URL",
    )
    model: str = student_option(
        "deit_tiny_distilled_patch16_224",
        "Student: name of a timm model, or deit-ti, deit-s or deit-b, which mean DeiT's models with a distillation"
        " token.",
        metavar="NAME",
    )
    img_size: int | None = student_option(
        None,
        "Size of the student's input images in pixels; it must be the size of the views, which is the default.",
        "--input-size",
        low=1,
        high=4096,
    )
    patch_size: int | None = student_option(
        None, "Size of a patch in pixels; by default that of the model.", low=1, high=4096
    )
    embed_dim: int | None = student_option(
        None, "Embedding dimension of the student; by default that of the model.", low=1, high=65536
    )
    depth: int | None = student_option(
        None, "Number of transformer blocks; by default that of the model.", low=1, high=1000
    )
    num_heads: int | None = student_option(
        None, "Number of attention heads; by default that of the model.", low=1, high=1000
    )
    init: str | None = student_option(
        None,
        "Initial weights, path or URL: a folder that `train` exported, or a file of weights (from deit-cli, timm or"
        " DeiT). Position embeddings are interpolated to the image size; heads get random weights if the classes"
        " differ in number, names or order.",
        "--initial-checkpoint",
        free=True,
        metavar="PATH|URL",
    )
    pretrained: bool = student_option(False, "Start from the weights that timm publishes.")
    linear_probe: bool = student_option(False, "Train only the heads, on frozen features of --init or --pretrained.")

    distillation_type: DistillationType = distillation_option(
        "hard",
        "Target of distillation: the teacher's most probable class (hard), its probabilities (soft), or none, which"
        " trains on class labels alone.",
    )
    distillation_alpha: float = distillation_option(
        0.5, "Weight A of the distillation loss, 0 to 1; that of the class loss is 1 - A.", low=0, high=1, timed=False
    )
    distillation_tau: float = distillation_option(
        1.0, "Temperature of soft distillation.", low=0.01, high=1000, timed=False
    )
    tail: Tail = distillation_option(
        "spread",
        "Treatment of the probability outside the stored top-k, for soft distillation: spread it evenly over all"
        " other classes (spread), or scale the top-k to a sum of 1 (renormalise).",
    )
    soft_reduction: Reduction = distillation_option(
        "batchmean",
        "Divisor of the soft loss: number of images (batchmean), or number of images times number of classes, as in"
        " DeiT's code (deit).",
    )
    second_token: SecondToken = distillation_option(
        "distillation",
        "Task of the second token and its head: learn the teacher's answers (distillation), or learn the class labels"
        " like the first (class), with weight --distillation-alpha. The latter is the paper's control experiment and"
        " needs --distillation-type none.",
        timed=False,
    )
    smoothing: float = optimisation_option(0.1, "Label smoothing of the class labels.", low=0, high=0.999, timed=False)

    epochs: int = optimisation_option(
        300, "Number of epochs; each trains on as many views as there are images.", low=1, high=10**6, timed=False
    )
    batch_size: int = optimisation_option(
        256,
        "Number of views in one forward pass of each rank (one rank is one training process).",
        "-b",
        low=1,
        high=10**6,
        free=True,
    )
    grad_accum_steps: int = optimisation_option(
        1, "Number of forward passes of each rank for one update of the weights.", low=1, high=10**6, free=True
    )
    lr: float | None = optimisation_option(
        None,
        "Maximum learning rate; by default --lr-base * batch / 512, where batch is the total over all ranks and"
        " forward passes of an update.",
        low=0,
        high=1000,
        timed=False,
    )
    lr_base: float = optimisation_option(
        5e-4, "Learning rate for a total batch of 512 views, if --lr is not passed.", low=0, high=1000, timed=False
    )
    warmup_epochs: float | None = optimisation_option(
        None,
        "Number of epochs of linear warm-up; by default 5, or a tenth of --epochs if that is less.",
        low=0,
        high=10**6,
        timed=False,
    )
    warmup_lr: float = optimisation_option(
        1e-6, "Learning rate at the start of the warm-up.", low=0, high=1000, timed=False
    )
    min_lr: float = optimisation_option(
        1e-5, "Learning rate at the end of the cosine schedule.", low=0, high=1000, timed=False
    )
    weight_decay: float = optimisation_option(
        0.05,
        "Weight decay of AdamW; biases, norms, tokens and position embeddings have none.",
        low=0,
        high=1000,
        timed=False,
    )
    drop_path: float = optimisation_option(
        0.1,
        "Stochastic depth rate of the last block; that of earlier blocks is proportionally smaller.",
        low=0,
        high=0.999,
    )
    clip_grad: float | None = optimisation_option(
        None, "Maximum norm of the gradient; by default the gradient is not clipped.", low=1e-6, high=1e9
    )
    repeated_aug: int | None = views_option(
        None,
        "Number R of views of each image in one batch; an epoch then uses 1/R of the images. By default 3 if recipe,"
        " views and number of images allow it, else 1.",
        low=1,
        high=1000,
    )
    views: tuple[int, int] | None = views_option(
        None, "Views to train on: the numbers START to STOP-1; by default all views of the label set.", free=True
    )
    view_policy: ViewPolicy = views_option(
        "cycle",
        "Order of the views over the epochs: in turn, then again from the first (cycle); in a new random order each"
        " round (random); or in turn without repetition, which needs at least as many views as epochs (once).",
        timed=False,
    )
    shuffle_window: int = views_option(
        64,
        "Number of source shards (a tar, at least 4,096 rows of a Parquet file, or 1,024 images of a folder) whose"
        " images are shuffled together.",
        low=1,
        high=10**9,
    )
    model_ema: bool = optimisation_option(
        True, "Keep an exponential moving average (EMA) of the weights, and evaluate it as well."
    )
    model_ema_decay: float = optimisation_option(
        0.99996, "Decay of the EMA in each update.", low=0, high=1, timed=False
    )
    model_ema_warmup: bool = optimisation_option(
        False, "Start the EMA with a smaller decay, for short runs.", timed=False
    )
    seed: int = run_option(
        0,
        "Random seed of the initial weights, the order of the data and stochastic depth.",
        low=0,
        high=2**63 - 1,
        timed=False,
    )

    eval_data: str | None = evaluation_option(
        None,
        "Images with class labels for evaluation; by default the student is not evaluated. The best student is"
        " exported to best/.",
        free=True,
        timed=False,
        metavar="PATH|URL",
    )
    eval_labels_file: str | None = evaluation_option(
        None,
        "File with the class labels of --eval-data, as --labels-file has those of --data. The other options for reading images"
        " are for both.",
        free=True,
        timed=False,
        metavar="FILE|URL",
    )
    crop_pct: float | None = evaluation_option(
        None,
        "Size of the centre crop as a fraction of the shorter side, such as 0.9; by default that of the model.",
        low=0.01,
        high=1,
        timed=False,
    )
    eval_interval: int = evaluation_option(
        1, "Number of epochs between two evaluations.", low=1, high=10**6, free=True, timed=False
    )
    resume: Resume = run_option(
        "never",
        "If --output holds a run, continue it (auto) or stop with an error (never); if none, start one. --resume"
        " without a value means auto.",
        bare="auto",
        free=True,
        timed=False,
    )
    checkpoint_interval: int = run_option(
        1,
        "Number of epochs between two checkpoints; the last epoch always has one.",
        low=1,
        high=10**6,
        free=True,
        timed=False,
    )
    recovery_interval: int = run_option(
        0,
        "Number of updates between checkpoints within an epoch; 0 means none.",
        low=0,
        high=10**9,
        free=True,
        timed=False,
    )
    log_interval: int = logging_option(
        50,
        "Number of updates between two lines of metrics.jsonl; the progress on stderr does not depend on it.",
        low=1,
        high=10**9,
        free=True,
        timed=False,
    )
    probe_interval: int = logging_option(
        0,
        "Number of updates between two measurements of the similarity of class token and distillation token, for"
        " metrics.jsonl; 0 means none. They do not change the training.",
        low=0,
        high=10**9,
        free=True,
        timed=False,
    )
    log_tensorboard: bool = logging_option(
        False, "Write event files to tensorboard/ of the run; it needs deit-cli[tensorboard].", free=True, timed=False
    )
    log_wandb: bool = logging_option(
        False,
        "Record the run with Weights & Biases as well; it needs deit-cli[wandb]. WANDB_MODE=offline needs no network.",
        free=True,
        timed=False,
    )
    wandb_project: str | None = logging_option(
        None,
        "Project in Weights & Biases; by default that of WANDB_PROJECT, else W&B's own default.",
        free=True,
        timed=False,
    )
    workers: int | None = run_option(
        None,
        "Number of loader processes of each rank, to render views; by default the rank's CPU cores minus one, or"
        " half of them if it trains on the CPU.",
        "-j",
        "--num-workers",
        low=0,
        high=1024,
        free=True,
    )
    render: RenderDevice = run_option("cpu", RENDER_HELP, free=True)
    device: str = run_option(
        "auto",
        "Device: cpu, cuda, cuda:1, xpu or mps; auto means one GPU for each rank, or the CPU if there is none.",
        free=True,
    )
    compile: bool = run_option(
        False,
        "Compile the student with torch.compile: faster, after about a minute of compilation.",
        "--torchcompile",
        free=True,
    )
    amp_dtype: AmpDtype = run_option(
        "auto", "Number format of the forward pass; auto means bfloat16 on CUDA and XPU, else float32."
    )
    deterministic: bool = run_option(
        False,
        "Use only deterministic algorithms (maybe slower), so that a resumed run on a GPU is bit-identical to an"
        " uninterrupted one.",
        free=True,
    )

    def __post_init__(self) -> None:
        for name in ("output", "init"):  # callers may pass a Path
            value = getattr(self, name)
            object.__setattr__(self, name, value if value is None else os.fspath(value))
        for name in ("labels", "expect_manifest"):  # callers may pass a single one
            object.__setattr__(self, name, _texts(getattr(self, name)))
        object.__setattr__(self, "label_weights", tuple(map(float, self.label_weights)))
        check_settings(self)
        parse_bytes(self.cache_size, what="--cache-size")
        parse_bytes(self.min_rate, what="--min-rate")
        if self.distillation_type != "none" and not self.labels:
            raise UsageError(
                f"--distillation-type {self.distillation_type} needs --labels; without a teacher pass none"
            )
        if self.distillation_type == "none" and not self.labels and self.data is None:
            raise UsageError("--distillation-type none needs --data (or --labels, whose views it then uses)")
        if self.second_token == "class" and self.distillation_type != "none":
            raise UsageError(
                "--second-token class needs --distillation-type none: both heads then learn the class labels, got"
                f" {self.distillation_type}",
                fix="Pass --distillation-type none as well, or leave out --second-token",
            )
        self._check_label_sets()
        self.options_for(self.data, self.eval_data)
        if self.labels_file is not None and self.data is None:
            raise UsageError("--labels-file has the class labels of --data: pass that too")
        if self.eval_labels_file is not None and self.eval_data is None:
            raise UsageError("--eval-labels-file has the class labels of --eval-data: pass that too")
        if self.warmup > self.epochs:
            raise UsageError(f"--warmup-epochs must be at most --epochs ({self.epochs}), got {self.warmup:g}")
        if self.init is not None and self.pretrained:
            raise UsageError("start from --init or from --pretrained, not from both")
        if self.linear_probe and self.init is None and not self.pretrained:
            raise UsageError("--linear-probe trains heads on features that are there: pass --init or --pretrained too")

    def _check_label_sets(self) -> None:
        """Raise UsageError unless there are as many pins and weights as label sets, or none."""
        for pin in self.expect_manifest:
            parse_pin(pin)
        if self.expect_manifest and not self.labels:
            raise UsageError("--expect-manifest names the manifest of --labels: pass them too")
        for flag, values in (("--expect-manifest", self.expect_manifest), ("--label-weights", self.label_weights)):
            if values and len(values) != len(self.labels):
                raise UsageError(
                    f"{flag} must have one value for each of the {len(self.labels)} --labels, in the same order, or be"
                    f" left out; got {len(values)}"
                )

    @property
    def folder(self) -> Path:
        """Return the local folder of the run: `output`, or the working folder for a URL."""
        return working_folder(self.output)

    @property
    def warmup(self) -> float:
        """Return the epochs of linear warm-up: the user's value, else DeiT's 5, or a tenth of all epochs in short runs."""
        return min(5.0, self.epochs / 10) if self.warmup_epochs is None else self.warmup_epochs

    @property
    def eval_options(self) -> "SourceOptions":
        """How --eval-data is read, for `open_source`."""
        return replace(self.options, labels_file=self.eval_labels_file)

    @property
    def trains_both_heads(self) -> bool:
        """Return whether the second head of a student learns anything: a teacher's answers, or the class labels."""
        return self.distillation_type != "none" or self.second_token == "class"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        values = {each.name: as_written(getattr(self, each.name), each) for each in settings_of(TrainConfig)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    def identity(self) -> dict[str, Any]:
        """Return the settings that must be the same when the run is resumed."""
        values = self.to_dict()
        same = {setting.name: values[setting.name] for setting in settings_of(TrainConfig) if not setting.free}
        return same | {"warmup_epochs": self.warmup}


def _texts(value: Any) -> tuple[str, ...]:
    """Return the values of a setting that may be repeated, from None, one value or several; each a text or a Path."""
    if value is None or isinstance(value, str | os.PathLike):
        return () if value is None else (os.fspath(value),)
    return tuple(map(os.fspath, value))


@dataclass(frozen=True, kw_only=True)
class AnsweringConfig:
    """Settings of a command that runs trained networks on images."""

    batch_size: int = run_option(256, "Number of images in one forward pass.", "-b", low=1)
    workers: int | None = run_option(
        None,
        "Number of loader processes; by default the CPU cores minus one, or half of them if the networks run on the"
        " CPU.",
        "-j",
        "--num-workers",
        low=0,
        high=1024,
    )
    device: str = run_option(
        "auto", "Device: cpu, cuda, cuda:1, xpu or mps; auto means a GPU if there is one, else the CPU."
    )
    amp_dtype: AmpDtype = run_option(
        "auto", "Number format of the forward pass; auto means bfloat16 on CUDA and XPU, else float32."
    )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(AnsweringConfig, SourceConfig):
    """Settings of an evaluation: the student and the data."""

    checkpoint: str | None = student_option(
        None,
        "Student: folder that `train` exported (RUN/last, RUN/best), or a file of weights; path or URL.",
        metavar="PATH|URL",
    )
    model: str | None = student_option(
        None, "Name of the timm model, for a file of weights or --pretrained.", metavar="NAME"
    )
    pretrained: bool = student_option(False, "Evaluate the weights that timm publishes.")
    num_classes: int | None = student_option(
        None, "Number of classes in the file of weights; by default that of --data or --labels.", low=1
    )
    data: str | None = data_option(
        None,
        "Images with class labels, on which the accuracy is measured (--eval-data of `train`): a folder, tars or"
        " Parquet; path or URL.",
        metavar="PATH|URL",
    )
    labels: str | None = data_option(
        None,
        "Label set, folder or URL; the agreement with the teacher is measured on its first view.",
        metavar="FOLDER|URL",
    )
    labels_data: str | None = data_option(
        None,
        "Images of the label set: path or URL; by default those in it, or else the local path stored in it.",
        metavar="PATH|URL",
    )
    expect_manifest: str | None = data_option(
        None,
        "Expected hash of the label set's manifest, as `labels info` prints it; a label set with any other manifest"
        " is refused.",
        metavar="sha256:HEX",
    )
    agreement_samples: int = data_option(
        10_000, "Maximum number of views for the agreement, in whole batches only.", low=2
    )
    fit_data: str | None = data_option(
        None,
        "Images with class labels, usually those of the training, on which the linear classifier of both tokens"
        " (concat_linear) is fitted; path or URL. Only for a student with two tokens.",
        metavar="PATH|URL",
    )
    fit_labels: str | None = data_option(
        None,
        "Label set whose images are used instead of --fit-data: in plain centre crops, not in the stored views.",
        metavar="FOLDER|URL",
    )
    concat_linear: str | None = data_option(
        None,
        "File of the linear classifier: written with --fit-data or --fit-labels, else read; by default"
        " concat_linear.safetensors beside the checkpoint, if there is one.",
        metavar="FILE|URL",
    )
    out: Path | None = output_option(None, "JSON file for the complete result.", metavar="FILE.json")
    csv: Path | None = output_option(None, "CSV file for the accuracy of each class.", metavar="FILE.csv")
    predictions: Path | None = output_option(
        None,
        "Parquet file for the class and confidence of each answer to each image.",
        metavar="FILE.parquet",
    )
    img_size: tuple[int, ...] = evaluation_option(
        (),
        "Size of the images in pixels, by default that of the student; timm interpolates the position embeddings."
        " Repeat the option for several sizes; per-class results, bins and predictions are those of the first.",
        low=1,
        high=4096,
    )
    flip: bool = evaluation_option(False, "Average the answers to each image and to its mirror image.")
    crop_pct: float | None = evaluation_option(
        None,
        "Size of the centre crop as a fraction of the shorter side, such as 0.9; by default that of the model.",
        low=0.01,
        high=1,
    )

    def __post_init__(self) -> None:
        if self.checkpoint is not None:  # callers may pass a Path
            object.__setattr__(self, "checkpoint", os.fspath(self.checkpoint))
        check_settings(self)
        if self.data is None and self.labels is None:
            raise UsageError("pass --data to measure accuracy, --labels to measure agreement with the teacher, or both")
        self.options_for(self.data, self.labels_data, self.fit_data)
        if self.labels_file is not None and self.data is None:
            raise UsageError("--labels-file has the class labels of --data: pass that too")
        if self.labels is None and (of_labels := [name for name in _OF_LABELS if getattr(self, name)]):
            raise UsageError(f"--{of_labels[0].replace('_', '-')} belongs to --labels: pass that too")
        fits = self.fit_data is not None or self.fit_labels is not None
        if self.data is None and self.crop_pct is not None and not fits:
            raise UsageError(
                "--crop-pct is the centre crop of --data and --fit-data: the views of --labels have their own"
            )
        if self.data is None and (unused := [name for name in _ACCURACY if getattr(self, name)]):
            raise UsageError(f"--{unused[0].replace('_', '-')} is about the accuracy: pass --data too")
        if self.fit_data is not None and self.fit_labels is not None:
            raise UsageError("the linear classifier is fitted on --fit-data or on --fit-labels, not on both")
        if len(set(self.img_size)) < len(self.img_size):
            raise UsageError(f"each --img-size must be passed once, got {' '.join(map(str, self.img_size))}")
        files = [path for path in (self.out, self.csv, self.predictions) if path is not None]
        if len(set(files)) < len(files):
            raise UsageError(
                f"--out, --csv and --predictions must be different files, got {', '.join(map(str, files))}"
            )

    @property
    def other_options(self) -> "SourceOptions":
        """How the images beside --data are read, for `open_source`: --labels-file has the class labels of --data only."""
        return replace(self.options, labels_file=None)


_ACCURACY = ("img_size", "flip", "csv", "predictions")  # settings of an evaluation that only --data uses
_OF_LABELS = ("labels_data", "expect_manifest")  # and those that only --labels uses


@dataclass(frozen=True, kw_only=True)
class AnalyseConfig(AnsweringConfig, SourceConfig):
    """Settings of `analyse`: the images that all networks see, and what is drawn."""

    data: str | None = data_option(
        None,
        "Images, with or without class labels: a folder, tars or Parquet; path or URL. Every network sees their centre"
        " crops. Without --data and --labels, only what needs no images is shown.",
        metavar="PATH|URL",
    )
    labels: str | None = data_option(
        None,
        "Label set, folder or URL, instead of --data: every network sees its first view, and the teacher's stored"
        " answers are compared too.",
        metavar="FOLDER|URL",
    )
    labels_data: str | None = data_option(
        None,
        "Images of the label set: path or URL; by default those in it, or else the local path stored in it.",
        metavar="PATH|URL",
    )
    samples: int = data_option(
        2000,
        "Maximum number of images, spread evenly over --data; 0 means all. With --labels the number of views, in whole"
        " batches only: 2000 are 1792 in batches of 256.",
        low=0,
    )
    attention: int = output_option(
        0,
        "Number of images, the first ones, for which the attention of both tokens is drawn; it needs --out.",
        low=0,
        high=64,
    )
    key: tuple[str, ...] = output_option(
        (),
        "Key of an image of --data for which the attention is drawn, instead of the first images. Repeat the option for"
        " several.",
    )
    block: int | None = output_option(
        None, "Number of the block whose attention is drawn, from 1; by default the last.", low=1
    )
    out: Path | None = output_option(None, "Folder for analysis.json and the pictures; by default nothing is written.")
    crop_pct: float | None = evaluation_option(
        None,
        "Size of the centre crop of --data as a fraction of the shorter side, such as 0.9; by default that of each model.",
        low=0.01,
        high=1,
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.data is not None and self.labels is not None:
            raise UsageError(
                "pass --data or --labels, not both: all numbers of an analysis are of the same images",
                fix="Run the command once for each",
            )
        if self.labels_data is not None and self.labels is None:
            raise UsageError("--labels-data names the images of --labels: pass that too")
        self.options_for(self.data, self.labels_data)
        if self.key and self.data is None:
            raise UsageError("--key names an image of --data: pass that too")
        if self.crop_pct is not None and self.data is None:
            raise UsageError("--crop-pct is the centre crop of --data: pass that too, or leave it out")
        draws = bool(self.attention or self.key)
        if self.block is not None and not draws:
            raise UsageError("--block chooses the block whose attention is drawn: pass --attention or --key too")
        if draws and self.data is None and self.labels is None:
            raise UsageError("--attention draws images: pass --data or --labels too")
        if draws and self.out is None:
            raise UsageError("--attention and --key draw pictures: pass --out too, the folder for them")


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """Settings of a measurement of the speed of inference."""

    out: Path | None = output_option(None, "File to write the result to, for `report`.", metavar="FILE.json")
    batch_size: tuple[int, ...] = measurement_option(
        (1, 64), "Number of images in a batch. Repeat the option for several.", "-b", low=1, high=10**6
    )
    largest: bool = measurement_option(
        False, "Time the largest batch that fits into the memory of the GPU as well: a power of two."
    )
    seconds: float = measurement_option(
        2.0, "Number of seconds to measure each network and size of batch.", low=0.01, high=3600
    )
    compile: bool = run_option(False, "Compile the networks with torch.compile.", "--torchcompile")
    device: str = run_option(
        "auto", "Device: cpu, cuda, cuda:1, xpu or mps; auto means a GPU if there is one, else the CPU."
    )
    amp_dtype: AmpDtype = run_option(
        "auto", "Number format of the forward pass; auto means bfloat16 on CUDA and XPU, else float32."
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, kw_only=True)
class ReportConfig(AnsweringConfig, SourceConfig):
    """Settings of a report."""

    out: Path = output_option(
        Path("report.html"),
        "Page to write; FILE-data.json beside it holds every number of the page.",
        metavar="FILE.html",
    )
    title: str | None = output_option(
        None, "Title of the page; by default that of the study, or the names of the runs."
    )
    data: str | None = data_option(
        None,
        "Images of the label set for the gallery: path or URL; by default those in it, or else the local path stored in it.",
        metavar="PATH|URL",
    )
    gallery: int = data_option(
        12,
        "Number of views in the gallery: those on which student and teacher are furthest apart; 0 means none.",
        low=0,
        high=1000,
    )
    gallery_views: int = data_option(512, "Number of views among which the gallery is chosen.", low=2, high=10**6)

    def __post_init__(self) -> None:
        check_settings(self)
        self.options_for(self.data)
        if self.out.suffix.lower() not in (".html", ".htm"):
            raise UsageError(f"--out must be a page, FILE.html, got {self.out}", fix=f"Pass --out {self.out}.html")

    @property
    def data_file(self) -> Path:
        """Return the path of the JSON file beside the page."""
        return self.out.with_name(f"{self.out.stem}-data.json")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Settings of `compare`, besides the study."""

    scale: Path | None = data_option(
        None,
        "YAML file with the data, teachers, students, training settings and seeds; by default the one that the study names.",
        metavar="FILE.yaml",
    )
    data: str | None = data_option(
        None,
        "Training images with class labels, path or URL, or `digits` for scikit-learn's digits; by default those of"
        " --scale.",
        metavar="PATH|URL",
    )
    eval_data: str | None = data_option(
        None, "Images with class labels for evaluation; by default those of --scale.", metavar="PATH|URL"
    )
    out: Path | None = output_option(
        None,
        "Folder for teachers, label sets, students and the result, STUDY.json; by default studies/SCALE. All studies at one"
        " scale can share it: what is in it is used again.",
    )
    report: bool = output_option(
        True,
        "Write STUDY.html at the end: a page with the results, the tokens and the disagreement of the first seeds.",
    )
    seed: tuple[int, ...] = run_option(
        (), "Random seed of one student of each cell; repeat the option for several. By default those of --scale."
    )
    cell: tuple[str, ...] = run_option(
        (), "Name of a cell to run; repeat the option for several. By default all cells are run.", metavar="NAME"
    )
    jobs: int = run_option(
        1,
        "Number of steps that run at the same time; they share the cores and GPUs of this machine.",
        low=1,
        high=1024,
    )
    launcher: str | None = run_option(
        None,
        "Command in front of train and precompute, such as `torchrun --nproc-per-node 8 --no-python`; an update has the"
        " same number of views on any number of ranks.",
        metavar="TEXT",
    )
    engine: CompareEngine = run_option(
        "local", "Engine that runs the steps: processes of this machine (local), or tasks of a Ray cluster (ray)."
    )
    device: str = run_option(
        "auto",
        "Device of all steps: cpu, cuda or cuda:1; auto means CUDA if available, else the CPU. Without --launcher a training"
        " uses one GPU.",
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if len(set(self.seed)) < len(self.seed) or any(not 0 <= seed < 2**63 for seed in self.seed):
            raise UsageError(f"each --seed must be another whole number from 0, got {', '.join(map(str, self.seed))}")


@dataclass(frozen=True, kw_only=True)
class RunsConfig:
    """Settings of `runs`."""

    sort: RunsOrder = output_option(
        "name",
        "Order of the runs: by name or state, the last written first (written), the furthest (progress), the best (top1),"
        " the fastest (speed), or the smallest loss first (loss).",
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, kw_only=True)
class InitConfig(SourceConfig):
    """The answers that `init` does not have to ask for. None: it asks."""

    data: str | None = data_option(
        None,
        "Images to label and to train on, as for `precompute`: an image folder, tars or Parquet; path or URL.",
        "--data-path",
        metavar="PATH|URL",
    )
    eval_data: str | None = evaluation_option(
        None, "Images with class labels for evaluation; `none` means no evaluation.", metavar="PATH|URL|none"
    )
    model: str | None = student_option(
        None, "Student: deit-ti, deit-s, deit-b, or the name of a timm model.", metavar="NAME"
    )
    teacher: str | None = teacher_option(
        None,
        "Teacher, as for `precompute`. If a published network has other classes than the images, a third file trains it on them first.",
        "--teacher-model",
        metavar="NAME",
    )
    pretrained: bool = teacher_option(
        True,
        "Start from the weights that timm publishes, which the commands download: the teacher, and a student with the patches"
        " of such weights. --no-pretrained is for a machine without the network: networks of timm learn from random weights.",
    )
    epochs: int | None = optimisation_option(None, "Number of epochs of the student.", low=1, high=10**6)
    views: int | None = views_option(
        None,
        "Number of views to label of each image; N views last for N epochs, then they are used again.",
        low=1,
        high=2**20,
    )

    def __post_init__(self) -> None:
        check_settings(self)
