"""Settings of a training run and of an evaluation: frozen, validated, and saved in the run.

Names and defaults are DeiT's and timm's where the meaning is the same (Touvron et al. 2021, table 9). Each setting is
written once, here: the command line takes its options, helps and defaults from these fields.
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import UsageError
from pipeline.labels.format import parse_pin
from pipeline.settings.fields import check_settings, option, settings_of
from pipeline.storage.urls import working_folder
from pipeline.text import parse_bytes

DistillationType = Literal["none", "soft", "hard"]
Tail = Literal["spread", "renormalise"]
Reduction = Literal["batchmean", "deit"]
AmpDtype = Literal["auto", "float32", "bfloat16"]
ViewPolicy = Literal["cycle", "random", "once"]
Resume = Literal["never", "auto"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a training run.

    A resumed run may change the settings that are `free`: they set locations and speed, and do not change the result.
    (The batch may be divided differently if the number of views in an update, over all ranks and passes, stays the same.)
    """

    labels: str | None = option(
        None,
        "Label set that `precompute` made: folder or URL; --distillation-type none works without one.",
        group="Data",
        free=True,
    )
    expect_manifest: str | None = option(
        None,
        "Pin of the manifest, sha256:HEX, as `labels info` prints it: --labels with any other manifest are refused.",
        group="Data",
        free=True,
    )
    data: str | None = option(
        None, "Images: path or URL; by default where the label set found them.", "--data-path", group="Data", free=True
    )
    cache_dir: Path | None = option(
        None, "Folder for copies of files behind URLs; by default ~/.cache/deit-cli.", group="Data", free=True
    )
    cache_size: str = option(
        "100GB",
        "Maximum size of --cache-dir; the least recently used files are deleted first.",
        group="Data",
        free=True,
    )
    output: str = option(
        "runs/student", "Folder or URL of the run.", "--output-dir", group="Run", free=True, timed=False
    )
    model: str = option(
        "deit_tiny_distilled_patch16_224", "Student: name of a timm model, or deit-ti, deit-s, deit-b.", group="Student"
    )
    img_size: int | None = option(
        None,
        "Size of the images in pixels; by default that of the views.",
        "--input-size",
        group="Student",
        low=1,
        high=4096,
    )
    patch_size: int | None = option(
        None, "Size of a patch in pixels; by default the model's.", group="Student", low=1, high=4096
    )
    embed_dim: int | None = option(
        None, "Width D of the student; by default the model's.", group="Student", low=1, high=65536
    )
    depth: int | None = option(
        None, "Number of transformer blocks; by default the model's.", group="Student", low=1, high=1000
    )
    num_heads: int | None = option(
        None, "Number of attention heads; by default the model's.", group="Student", low=1, high=1000
    )
    init: str | None = option(
        None,
        "Start from these weights, path or URL: a folder that a run exported, or a file (ours, timm's or DeiT's). Positions"
        " are interpolated to another image size; heads for other classes start anew.",
        "--initial-checkpoint",
        group="Student",
        free=True,
    )
    pretrained: bool = option(False, "Start from the weights that timm publishes.", group="Student")
    linear_probe: bool = option(
        False, "Train the heads alone, on the features of --init or --pretrained; all else is frozen.", group="Student"
    )

    distillation_type: DistillationType = option(
        "hard",
        "Target of the distillation: the teacher's most probable class (hard), its probabilities (soft), or none.",
        group="Distillation",
    )
    distillation_alpha: float = option(
        0.5, "Weight of the distillation loss, 0..1.", group="Distillation", low=0, high=1, timed=False
    )
    distillation_tau: float = option(
        1.0, "Temperature of soft distillation.", group="Distillation", low=0.01, high=1000, timed=False
    )
    tail: Tail = option(
        "spread",
        "Treatment of the probability beyond the top-k: spread it over all other classes, or leave it out.",
        group="Distillation",
    )
    soft_reduction: Reduction = option(
        "batchmean", "Divisor of the soft loss: B, or B*C as in DeiT's code.", group="Distillation"
    )
    smoothing: float = option(
        0.1, "Label smoothing of the class labels.", group="Distillation", low=0, high=0.999, timed=False
    )

    epochs: int = option(300, "Number of passes over the source.", group="Optimisation", low=1, high=10**6, timed=False)
    batch_size: int = option(
        256, "Number of views in one forward pass of a rank.", "-b", group="Optimisation", low=1, high=10**6, free=True
    )
    grad_accum_steps: int = option(
        1, "Number of forward passes of a rank for one update.", group="Optimisation", low=1, high=10**6, free=True
    )
    lr: float | None = option(
        None,
        "Highest learning rate; by default --lr-base * batch / 512, for the batch of all ranks and passes together.",
        group="Optimisation",
        low=0,
        high=1000,
        timed=False,
    )
    lr_base: float = option(
        5e-4, "Learning rate for a batch of 512 views.", group="Optimisation", low=0, high=1000, timed=False
    )
    warmup_epochs: float | None = option(
        None,
        "Number of epochs of linear warm-up; by default 5, or a tenth of --epochs where that is less.",
        group="Optimisation",
        low=0,
        high=10**6,
        timed=False,
    )
    warmup_lr: float = option(
        1e-6, "Learning rate at the start of the warm-up.", group="Optimisation", low=0, high=1000, timed=False
    )
    min_lr: float = option(
        1e-5, "Learning rate at the end of the cosine.", group="Optimisation", low=0, high=1000, timed=False
    )
    weight_decay: float = option(
        0.05,
        "Weight decay of AdamW; biases, norms, tokens and positions have none.",
        group="Optimisation",
        low=0,
        high=1000,
        timed=False,
    )
    drop_path: float = option(0.1, "Stochastic depth rate of the last block.", group="Optimisation", low=0, high=0.999)
    clip_grad: float | None = option(
        None, "Largest norm of the gradient; by default it is not limited.", group="Optimisation", low=1e-6, high=1e9
    )
    repeated_aug: int | None = option(
        None,
        "Number of views of each image in a batch; by default 3 if there are enough views, else 1.",
        group="Optimisation",
        low=1,
        high=1000,
    )
    views: tuple[int, int] | None = option(
        None, "View numbers START:STOP to train on; by default all that are labelled.", group="Data", free=True
    )
    view_policy: ViewPolicy = option(
        "cycle",
        "Order of the views over the epochs: in turn and again from the first (cycle), in a new random order each time"
        " (random), or each of them at most once (once).",
        group="Data",
        timed=False,
    )
    shuffle_window: int = option(
        64, "Number of source shards that are shuffled together.", group="Data", low=1, high=10**9
    )
    model_ema: bool = option(
        True, "Keep an exponential moving average of the weights, which is evaluated as well.", group="Optimisation"
    )
    model_ema_decay: float = option(
        0.99996, "Decay of the moving average in each update.", group="Optimisation", low=0, high=1, timed=False
    )
    model_ema_warmup: bool = option(
        False, "Start the moving average with a smaller decay, for short runs.", group="Optimisation", timed=False
    )
    seed: int = option(
        0,
        "Random seed of the initial weights, the order and stochastic depth.",
        group="Optimisation",
        low=0,
        high=2**63 - 1,
        timed=False,
    )

    eval_data: str | None = option(
        None,
        "Labelled images to evaluate on; by default the run is not evaluated.",
        group="Data",
        free=True,
        timed=False,
    )
    crop_pct: float | None = option(
        None,
        "Centre crop in evaluation, as a share of the shorter side; by default the model's.",
        group="Data",
        low=0.01,
        high=1,
        timed=False,
    )
    eval_interval: int = option(
        1, "Number of epochs between evaluations.", group="Run", low=1, high=10**6, free=True, timed=False
    )
    resume: Resume = option(
        "never",
        "Continue the run in --output, or start it where there is none (auto); --resume without a value means auto.",
        group="Run",
        bare="auto",
        free=True,
        timed=False,
    )
    checkpoint_interval: int = option(
        1,
        "Number of epochs between checkpoints; the last epoch always has one.",
        group="Run",
        low=1,
        high=10**6,
        free=True,
        timed=False,
    )
    recovery_interval: int = option(
        0,
        "Number of updates between further checkpoints within an epoch; 0 makes none.",
        group="Run",
        low=0,
        high=10**9,
        free=True,
        timed=False,
    )
    log_interval: int = option(
        50,
        "Number of updates between two lines of metrics.jsonl; stderr has a bar on a terminal, else a line each minute.",
        group="Logging",
        low=1,
        high=10**9,
        free=True,
        timed=False,
    )
    log_tensorboard: bool = option(
        False,
        "Write event files for TensorBoard to tensorboard/ in the folder of the run.",
        group="Logging",
        free=True,
        timed=False,
    )
    log_wandb: bool = option(
        False,
        "Record the run with Weights & Biases as well; WANDB_MODE=offline needs no network.",
        group="Logging",
        free=True,
        timed=False,
    )
    wandb_project: str | None = option(
        None,
        "Project in Weights & Biases; by default WANDB_PROJECT, or else W&B's own default.",
        group="Logging",
        free=True,
        timed=False,
    )
    workers: int | None = option(
        None,
        "Number of loader processes; by default it depends on the number of cores.",
        "-j",
        "--num-workers",
        group="Run",
        low=0,
        high=1024,
        free=True,
    )
    device: str = option(
        "auto", "Device: cpu, cuda or cuda:1; auto is the GPU of the rank where there is one.", group="Run", free=True
    )
    compile: bool = option(
        False,
        "Compile the student with torch.compile, which makes it faster after a minute.",
        "--torchcompile",
        group="Run",
        free=True,
    )
    amp_dtype: AmpDtype = option(
        "auto", "Number format of the forward pass; auto is bfloat16 on CUDA, else float32.", group="Run"
    )
    deterministic: bool = option(
        False,
        "Use deterministic algorithms only, which may be slower: a resumed run on a GPU then equals an uninterrupted one to"
        " the bit.",
        group="Run",
        free=True,
    )

    def __post_init__(self) -> None:
        for name in ("output", "init"):  # callers may pass a Path
            value = getattr(self, name)
            object.__setattr__(self, name, value if value is None else os.fspath(value))
        check_settings(self)
        parse_bytes(self.cache_size, what="--cache-size")
        if self.distillation_type != "none" and self.labels is None:
            raise UsageError(
                f"--distillation-type {self.distillation_type} needs --labels; without a teacher pass none"
            )
        if self.distillation_type == "none" and self.labels is None and self.data is None:
            raise UsageError("--distillation-type none needs --data (or --labels, whose views it then uses)")
        if self.expect_manifest is not None:
            parse_pin(self.expect_manifest)
            if self.labels is None:
                raise UsageError("--expect-manifest names the manifest of --labels: pass them too")
        if self.warmup > self.epochs:
            raise UsageError(f"--warmup-epochs must be at most --epochs ({self.epochs}), got {self.warmup:g}")
        if self.init is not None and self.pretrained:
            raise UsageError("start from --init or from --pretrained, not from both")
        if self.linear_probe and self.init is None and not self.pretrained:
            raise UsageError("--linear-probe trains heads on features that are there: pass --init or --pretrained too")

    @property
    def folder(self) -> Path:
        """Return the local folder of the run: `output`, or the working folder for a URL."""
        return working_folder(self.output)

    @property
    def warmup(self) -> float:
        """Return the epochs of linear warm-up: the user's value, else DeiT's 5, or a tenth of all epochs in short runs."""
        return min(5.0, self.epochs / 10) if self.warmup_epochs is None else self.warmup_epochs

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}

    def identity(self) -> dict[str, Any]:
        """Return the settings that must be the same when the run is resumed."""
        values = self.to_dict()
        same = {setting.name: values[setting.name] for setting in settings_of(TrainConfig) if not setting.free}
        return same | {"warmup_epochs": self.warmup}


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Settings of an evaluation: the student and the data."""

    checkpoint: str | None = option(
        None, "Student: folder that a run exported (last, best), or a file of weights; path or URL.", group="Student"
    )
    model: str | None = option(None, "Name of the timm model, for a file of weights or --pretrained.", group="Student")
    pretrained: bool = option(False, "Take the weights that timm publishes.", group="Student")
    num_classes: int | None = option(
        None, "Number of classes in a file of weights; by default that of --data or --labels.", group="Student", low=1
    )
    data: str | None = option(
        None, "Labelled images to measure accuracy on: a folder, tars or Parquet; path or URL.", group="Data"
    )
    labels: str | None = option(
        None, "Label set, folder or URL, on whose first view agreement with the teacher is measured.", group="Data"
    )
    labels_data: str | None = option(None, "Images of the label set; by default where it found them.", group="Data")
    expect_manifest: str | None = option(
        None,
        "Pin of the manifest, sha256:HEX, as `labels info` prints it: --labels with any other manifest are refused.",
        group="Data",
    )
    agreement_samples: int = option(
        10_000, "Largest number of views on which agreement is measured.", group="Data", low=2
    )
    crop_pct: float | None = option(
        None, "Centre crop, as a share of the shorter side; by default the model's.", group="Data", low=0.01, high=1
    )
    batch_size: int = option(256, "Number of images in one forward pass.", "-b", group="Run", low=1)
    workers: int | None = option(
        None,
        "Number of loader processes; by default it depends on the number of cores.",
        "-j",
        "--num-workers",
        group="Run",
        low=0,
        high=1024,
    )
    device: str = option("auto", "Device: cpu, cuda or cuda:1; auto is CUDA where there is one.", group="Run")
    amp_dtype: AmpDtype = option(
        "auto", "Number format of the forward pass; auto is bfloat16 on CUDA, else float32.", group="Run"
    )

    def __post_init__(self) -> None:
        if self.checkpoint is not None:  # callers may pass a Path
            object.__setattr__(self, "checkpoint", os.fspath(self.checkpoint))
        check_settings(self)
        if self.data is None and self.labels is None:
            raise UsageError("pass --data to measure accuracy, --labels to measure agreement with the teacher, or both")
