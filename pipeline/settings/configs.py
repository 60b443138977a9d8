"""Every setting of stage 1 but the recipe. The command line takes its options from here."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import UsageError
from pipeline.labels.format import Precision, parse_pin
from pipeline.storage.urls import working_folder

MAX_VIEW = 2**20  # a million epochs; the plan of a run lists every block of views
BadImagePolicy = Literal["fail", "skip"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Engine = Literal["local", "ray"]
ORIGINAL = "original"  # --include-images: the encoded files as they are
MAX_SHORTER = 4096


def option(default: Any, text: str, *flags: str, bare: str | None = None) -> Any:
    """Return a config field with its help text and further flags for the command line.

    Args:
        default: value of the field.
        text: help.
        flags: other names of the option.
        bare: what the option means when no value follows it; None: one must.
    """
    return field(default=default, metadata={"help": text, "flags": flags, "bare": bare})


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Which networks answer, and how they run."""

    teacher: tuple[str, ...] = option(
        ("regnety_160",),
        "timm or hf-hub: name, exported folder, or module:function; repeat for several: their probabilities are averaged.",
        "--teacher-model",
    )
    teacher_checkpoint: tuple[Path, ...] = option(
        (), "Weights: safetensors or a state dict; one for each --teacher, or none.", "--teacher-path"
    )
    pretrained: bool = option(True, "Published weights, or random ones for a trial.")
    teacher_img_size: int | None = option(None, "Pixels that the teacher sees; by default its configuration's.")
    device: str = option("auto", "cpu, cuda, cuda:1; auto is every visible GPU, or the CPU where there is none.")
    dtype: Dtype = option("auto", "Of the teacher's forward pass; auto is bfloat16 on CUDA, else float32.")
    compile: bool = option(False, "Compile the teacher (torch.compile): faster on a GPU after a minute.")

    def __post_init__(self) -> None:
        if not self.teacher:
            raise UsageError("--teacher must be passed at least once")
        if self.teacher_checkpoint and len(self.teacher_checkpoint) != len(self.teacher):
            raise UsageError(
                f"--teacher-checkpoint must be passed once for each of the {len(self.teacher)} --teacher,"
                f" or not at all; got {len(self.teacher_checkpoint)}"
            )
        size = self.teacher_img_size
        if size is not None and not 1 <= size <= 4096:
            raise UsageError(f"--teacher-img-size must be in 1..4096, got {size}")


@dataclass(frozen=True, kw_only=True)
class PrecomputeConfig:
    """What to label, and how."""

    data: str = field(
        metadata={"help": "Images: a folder class/name.jpg, tars (train-{000..127}.tar), or image Parquet."}
    )
    out: str = field(metadata={"help": "Folder or URL of the label set; run the same command again to continue it."})
    views: tuple[int, int] = option(
        (0, 30), "View numbers START:STOP, or how many from 0; one view for each epoch of training."
    )
    topk: int | None = option(None, "Most probable classes to store, by default 10 or all; 0: the hard label alone.")
    precision: Precision = option(
        "float16",
        "Of the stored probabilities: float32; float16 (0.05 % off at most, 33 bytes a label at K = 10); log8 (5 %,"
        " 19 bytes, 1.7e-4 nats of KL divergence).",
    )
    views_per_shard: int = option(30, "Views in one file: the unit of work, and of loss at a crash.")
    batch_size: int | Literal["auto"] = option(
        "auto",
        "Views in one forward pass on a GPU, at most; auto: a mix block. What does not fit is halved. On a CPU always 32.",
        "-b",
    )
    workers: int | None = option(
        None, "Loader processes for each teacher process; by default from the number of cores.", "-j", "--num-workers"
    )
    engine: Engine = option("local", "Who runs the label shards: processes on this machine, or a Ray cluster.")
    processes: int | None = option(
        None, "Teacher processes; by default one for each GPU, else one, which uses all cores."
    )
    address: str = option("auto", "Of the Ray cluster (--engine ray).")
    on_bad_image: BadImagePolicy = option("fail", "An image that cannot be decoded stops the run, or is left out.")
    include_images: str | None = option(
        None,
        "Make the set self-contained: pack the images into it, as they are, or (a number of pixels) shrunk to this"
        " shorter side, which is then what teacher and students see.",
        bare=ORIGINAL,
    )
    min_teacher_accuracy: float = option(0.0, "Refuse a teacher below this top-1 on centre crops, percent.")
    accuracy_samples: int = option(256, "Labelled images on which the teacher is measured first; 0: none.")

    @property
    def folder(self) -> Path:
        """Where this machine writes the label set: `out`, or the folder that stands for a URL."""
        return working_folder(self.out)

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", os.fspath(self.out))  # a Path will do
        start, stop = self.views
        if not 0 <= start < stop <= MAX_VIEW:
            raise UsageError(f"--views must be START:STOP with 0 <= START < STOP <= {MAX_VIEW}, got {start}:{stop}")
        for name, low, high in (
            ("topk", 0, 2**31),
            ("batch_size", 2, 10**6),
            ("views_per_shard", 1, MAX_VIEW),
            ("accuracy_samples", 0, 10**7),
            ("workers", 0, 1024),
            ("processes", 1, 1024),
        ):
            value = getattr(self, name)
            if isinstance(value, int) and not low <= value <= high:
                raise UsageError(f"--{name.replace('_', '-')} must be in {low}..{high}, got {value}")
        if not 0 <= self.min_teacher_accuracy <= 100:
            raise UsageError(f"--min-teacher-accuracy is a percentage, 0..100, got {self.min_teacher_accuracy}")
        asked = self.include_images
        if asked not in (None, ORIGINAL) and not (asked.isdecimal() and 1 <= int(asked) <= MAX_SHORTER):
            raise UsageError(
                f"--include-images takes {ORIGINAL} (the files as they are) or the pixels of the shorter side,"
                f" 1..{MAX_SHORTER}, got {asked}"
            )
        if self.min_teacher_accuracy and not self.accuracy_samples:
            raise UsageError("--min-teacher-accuracy needs --accuracy-samples above 0, got 0")
        if self.address != "auto" and self.engine != "ray":
            raise UsageError(f"--address {self.address} is of a Ray cluster: pass --engine ray as well")

    @property
    def shorter_side(self) -> int | None:
        """Pixels to which included images are shrunk; None: not at all."""
        return None if self.include_images in (None, ORIGINAL) else int(self.include_images)


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """What of a label set to check, beside every byte and row of it."""

    data: str | None = option(
        None, "A copy of the images, all of which are compared; without it only those of the probes are looked at."
    )
    probes: bool = option(True, "Render the replay probes again (needs the images).")
    expect_manifest: str | None = option(
        None, "sha256:HEX, as `labels info` prints it: a manifest of other bytes is a problem."
    )
    public_key: Path | None = option(None, "PEM of the key that must have signed the manifest.")
    identity: str | None = option(
        None, "Of Sigstore, that must have signed the manifest: a mail address, or a CI workflow's URL."
    )
    identity_provider: str | None = option(None, "Who vouches for it, such as https://accounts.google.com.")
    relabel: int = option(256, "Random views that --teacher is asked for again.")
    relabel_seed: int = option(0, "Of the choice of those views.")
    threads: int | None = option(None, "Files read at a time; by default one for each core, or eight for a URL.")

    def __post_init__(self) -> None:
        if self.expect_manifest is not None:
            parse_pin(self.expect_manifest)
        if self.public_key is not None and self.identity is not None:
            raise UsageError("pass --public-key or --identity, whichever signed the manifest, not both")
        if (self.identity is None) != (self.identity_provider is None):
            raise UsageError("--identity and --identity-provider belong together: pass both or none")
        for name, low, high in (("relabel", 1, 10**7), ("relabel_seed", 0, 2**63 - 1), ("threads", 1, 256)):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UsageError(f"--{name.replace('_', '-')} must be in {low}..{high}, got {value}")
