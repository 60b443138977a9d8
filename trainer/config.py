"""TrainConfig: every setting of a training run, frozen, validated, and saved in the run.

Names and defaults are DeiT's and timm's where the meaning is the same (Touvron et al. 2021, table 9). Each default is
written once, here: the command line takes its options, helps and defaults from these fields.
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pipeline.errors import UsageError
from pipeline.labels.format import parse_pin
from pipeline.settings.configs import option
from pipeline.storage.urls import working_folder
from pipeline.text import parse_bytes

DistillationType = Literal["none", "soft", "hard"]
Tail = Literal["spread", "renormalise"]
Reduction = Literal["batchmean", "deit"]
AmpDtype = Literal["auto", "float32", "bfloat16"]
ViewPolicy = Literal["cycle", "random", "once"]
Resume = Literal["never", "auto"]

# What may differ between a run and its continuation: where things lie and how fast they go, never what is computed. (The
# batch may be cut in other ways: what must stay is the number of views of an update, over all ranks and passes.)
FREE_ON_RESUME = frozenset(
    {
        "batch_size",
        "grad_accum_steps",
        "compile",
        "deterministic",
        "views",
        "labels",
        "expect_manifest",
        "cache_dir",
        "cache_size",
        "data",
        "eval_data",
        "output",
        "resume",
        "workers",
        "device",
        "log_interval",
        "log_tensorboard",
        "log_wandb",
        "wandb_project",
        "eval_interval",
        "checkpoint_interval",
        "recovery_interval",
        "init",
    }
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What to train, on what, and how."""

    labels: str | None = option(
        None, "Label set made by precompute, folder or URL; not needed for --distillation-type none."
    )
    expect_manifest: str | None = option(
        None, "sha256:HEX, as `labels info` prints it: refuse --labels whose manifest has other bytes."
    )
    data: str | None = option(None, "Images; by default where the label set found them.", "--data-path")
    cache_dir: Path | None = option(None, "Where files behind URLs are kept; by default ~/.cache/deit-cli.")
    cache_size: str = option("100GB", "Of that folder, at most; what was used longest ago goes first.")
    output: str = option("runs/student", "Folder or URL of the run.", "--output-dir")
    model: str = option("deit_tiny_distilled_patch16_224", "timm name, or deit-ti, deit-s, deit-b.")
    img_size: int | None = option(None, "Pixels; by default the views'.", "--input-size")
    patch_size: int | None = option(None, "Pixels; by default the model's.")
    embed_dim: int | None = option(None, "Width D; by default the model's.")
    depth: int | None = option(None, "Transformer blocks; by default the model's.")
    num_heads: int | None = option(None, "Attention heads; by default the model's.")
    init: str | None = option(
        None,
        "Start from these weights, path or URL: a folder that a run exported, or a file (ours, timm's or DeiT's). Positions are"
        " interpolated to another image size; heads of other classes are made anew.",
        "--initial-checkpoint",
    )
    pretrained: bool = option(False, "Start from timm's published weights.")
    linear_probe: bool = option(
        False, "Train the heads alone, on what --init or --pretrained has learned; all else is frozen."
    )

    distillation_type: DistillationType = option("hard", "Teacher's argmax, its soft labels, or class labels alone.")
    distillation_alpha: float = option(0.5, "Weight of the distillation loss, 0..1.")
    distillation_tau: float = option(1.0, "Temperature of soft distillation.")
    tail: Tail = option("spread", "Probability beyond top-k: spread over all other classes, or left out.")
    soft_reduction: Reduction = option("batchmean", "Divide the soft loss by B, or by B*C as DeiT's code does.")
    smoothing: float = option(0.1, "Label smoothing of the class labels.")

    epochs: int = option(300, "Passes over the source.")
    batch_size: int = option(256, "Views in one forward pass of a rank.", "-b")
    grad_accum_steps: int = option(1, "Forward passes of a rank for one update.")
    lr: float | None = option(
        None, "Top learning rate; by default --lr-base * batch / 512, the batch being of all ranks and passes."
    )
    lr_base: float = option(5e-4, "Learning rate for a batch of 512.")
    warmup_epochs: float | None = option(
        None, "Epochs of linear warm-up; by default 5, or a tenth of --epochs where that is less."
    )
    warmup_lr: float = option(1e-6, "Learning rate at the start of the warm-up.")
    min_lr: float = option(1e-5, "Learning rate at the end of the cosine.")
    weight_decay: float = option(0.05, "AdamW's; not on biases, norms, tokens and positions.")
    drop_path: float = option(0.1, "Stochastic depth rate of the last block.")
    clip_grad: float | None = option(None, "Largest gradient norm; by default none.")
    repeated_aug: int | None = option(
        None, "Views of an image in one batch; by default 3 where the views allow it, else 1."
    )
    views: tuple[int, int] | None = option(
        None, "View numbers START:STOP to train on; by default all that are labelled."
    )
    view_policy: ViewPolicy = option(
        "cycle",
        "Views of the epochs: in turn and again from the first; in a new drawn order each time through; or each once at most.",
    )
    shuffle_window: int = option(64, "Source shards that are shuffled together.")
    model_ema: bool = option(True, "Keep an exponential moving average of the weights, and evaluate it.")
    model_ema_decay: float = option(0.99996, "Its decay per update.")
    model_ema_warmup: bool = option(False, "Start with a smaller decay; for short runs.")
    seed: int = option(0, "Of initial weights, order and stochastic depth.")

    eval_data: str | None = option(None, "Images to evaluate on.")
    crop_pct: float | None = option(
        None, "Centre crop in evaluation, share of the shorter side; by default the model's."
    )
    eval_interval: int = option(1, "Epochs between evaluations.")
    resume: Resume = option(
        "never",
        "auto: continue the run in --output, start it where there is none. --resume alone is auto.",
        bare="auto",
    )
    checkpoint_interval: int = option(1, "Epochs between checkpoints; the last epoch always has one.")
    recovery_interval: int = option(0, "Updates between further checkpoints; 0: none within an epoch.")
    log_interval: int = option(50, "Updates between lines of metrics.jsonl; without a terminal one a minute is shown.")
    log_tensorboard: bool = option(False, "Also write TensorBoard's event files, to tensorboard/ in the run's folder.")
    log_wandb: bool = option(False, "Also record with Weights & Biases; WANDB_MODE=offline needs no network.")
    wandb_project: str | None = option(None, "Its project; by default WANDB_PROJECT, or W&B's own default.")
    workers: int | None = option(None, "Loader processes; by default from the number of cores.", "-j", "--num-workers")
    device: str = option("auto", "cpu, cuda, cuda:1; by default the GPU of the rank where there is one.")
    compile: bool = option(False, "Compile the student (torch.compile): faster after a minute.", "--torchcompile")
    amp_dtype: AmpDtype = option("auto", "Of the forward pass; by default bfloat16 on CUDA, else float32.")
    deterministic: bool = option(
        False,
        "Use deterministic algorithms only, which may be slower: a resumed run on a GPU equals an uninterrupted one to the bit.",
    )

    def __post_init__(self) -> None:
        for name in ("output", "init"):  # a Path will do
            value = getattr(self, name)
            object.__setattr__(self, name, value if value is None else os.fspath(value))
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UsageError(f"--{name.replace('_', '-')} must be in {low:g}..{high:g}, got {value}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise UsageError(
                    f"--{name.replace('_', '-')} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
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
        """Where this machine writes the run: `output`, or the folder that stands for a URL."""
        return working_folder(self.output)

    @property
    def warmup(self) -> float:
        """Epochs of linear warm-up: DeiT's 5, but in short runs, where the user did not choose, a tenth of all."""
        return min(5.0, self.epochs / 10) if self.warmup_epochs is None else self.warmup_epochs

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}

    def identity(self) -> dict[str, Any]:
        """Return what must be the same in a continuation."""
        same = {name: value for name, value in self.to_dict().items() if name not in FREE_ON_RESUME}
        return same | {"warmup_epochs": self.warmup}


_RANGES: list[tuple[str, float, float]] = [
    ("img_size", 1, 4096),
    ("patch_size", 1, 4096),
    ("embed_dim", 1, 65536),
    ("depth", 1, 1000),
    ("num_heads", 1, 1000),
    ("distillation_alpha", 0, 1),
    ("distillation_tau", 0.01, 1000),
    ("smoothing", 0, 0.999),
    ("epochs", 1, 10**6),
    ("batch_size", 1, 10**6),
    ("grad_accum_steps", 1, 10**6),
    ("lr", 0, 1e3),
    ("lr_base", 0, 1e3),
    ("warmup_epochs", 0, 10**6),
    ("warmup_lr", 0, 1e3),
    ("min_lr", 0, 1e3),
    ("weight_decay", 0, 1e3),
    ("drop_path", 0, 0.999),
    ("clip_grad", 1e-6, 1e9),
    ("repeated_aug", 1, 1000),
    ("shuffle_window", 1, 10**9),
    ("model_ema_decay", 0, 1),
    ("seed", 0, 2**63 - 1),
    ("eval_interval", 1, 10**6),
    ("checkpoint_interval", 1, 10**6),
    ("recovery_interval", 0, 10**9),
    ("crop_pct", 0.01, 1),
    ("log_interval", 1, 10**9),
    ("workers", 0, 1024),
]
_CHOICES: dict[str, tuple[str, ...]] = {
    "distillation_type": get_args(DistillationType),
    "tail": get_args(Tail),
    "view_policy": get_args(ViewPolicy),
    "resume": get_args(Resume),
    "soft_reduction": get_args(Reduction),
    "amp_dtype": get_args(AmpDtype),
}
