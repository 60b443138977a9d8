"""Settings of all commands except `train` and `evaluate`. The command line takes its options from these fields."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.errors import UsageError
from pipeline.labels.format import Precision, parse_pin
from pipeline.settings.fields import REQUIRED, check_settings, option
from pipeline.storage.urls import working_folder

MAX_VIEW = 2**20  # a million epochs; the plan of a run lists every block of views
BadImagePolicy = Literal["fail", "skip"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Engine = Literal["local", "ray"]
Pixels = Literal["views", "originals"]
Encoding = Literal["png", "jpeg"]
ORIGINAL = "original"  # --include-images: keep the encoded files unchanged
MAX_SHORTER = 4096


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The teacher networks and how they run."""

    teacher: tuple[str, ...] = option(
        ("regnety_160",),
        "Teacher: name of a timm model, hf-hub:NAME, folder that `train` exported, or module:function. Repeat the option to"
        " average the probabilities of several teachers.",
        "--teacher-model",
        group="Teacher",
    )
    teacher_checkpoint: tuple[Path, ...] = option(
        (),
        "Weights of the teacher: a safetensors file or a state dict. Pass it once for each --teacher, or not at all.",
        "--teacher-path",
        group="Teacher",
    )
    pretrained: bool = option(
        True, "Load published weights; --no-pretrained draws random ones for a trial.", group="Teacher"
    )
    teacher_img_size: int | None = option(
        None,
        "Size in pixels of the images that the teacher sees; by default that of its configuration.",
        group="Teacher",
        low=1,
        high=4096,
    )
    device: str = option(
        "auto", "Device: cpu, cuda or cuda:1; auto is every visible GPU, or the CPU where there is none.", group="Run"
    )
    dtype: Dtype = option(
        "auto", "Number format of the teacher's forward pass; auto is bfloat16 on CUDA, else float32.", group="Run"
    )
    compile: bool = option(
        False, "Compile the teacher with torch.compile, which makes it faster on a GPU after a minute.", group="Run"
    )

    def __post_init__(self) -> None:
        if not self.teacher:
            raise UsageError("--teacher must be passed at least once")
        if self.teacher_checkpoint and len(self.teacher_checkpoint) != len(self.teacher):
            raise UsageError(
                f"--teacher-checkpoint must be passed once for each of the {len(self.teacher)} --teacher,"
                f" or not at all; got {len(self.teacher_checkpoint)}"
            )
        check_settings(self)


@dataclass(frozen=True, kw_only=True)
class PrecomputeConfig:
    """Settings of `precompute`: the data to label, and how."""

    data: str = option(
        REQUIRED,
        "Images: a folder with files class/name.jpg, tars (train-{000..127}.tar), or image Parquet.",
        group="Data",
        planned=True,
    )
    out: str = option(
        REQUIRED,
        "Folder or URL of the label set; run the same command again to continue it.",
        group="Data",
        timed=False,
        planned=True,
    )
    views: tuple[int, int] = option(
        (0, 30),
        "View numbers START:STOP, or a number of views from 0; each epoch of training needs one view.",
        group="Data",
        planned=True,
    )
    topk: int | None = option(
        None,
        "Number of most probable classes to store for each view; by default 10, or all where there are fewer. 0 stores the"
        " hard label alone.",
        group="Distillation",
        low=0,
        high=2**31,
        planned=True,
    )
    precision: Precision = option(
        "float16",
        "Number format of the stored probabilities: float32; float16 (at most 0.05 % off, 33 bytes a label at K = 10); log8"
        " (5 %, 19 bytes, 1.7e-4 nats of KL divergence).",
        group="Distillation",
        planned=True,
    )
    views_per_shard: int = option(
        30,
        "Number of views in one file, the unit of work; a crash loses the files that were being made.",
        group="Run",
        low=1,
        high=MAX_VIEW,
        planned=True,
    )
    batch_size: int | Literal["auto"] = option(
        "auto",
        "Largest number of views in one forward pass on a GPU; auto is a mix block. It is halved when they do not fit into"
        " memory. A CPU always takes 32.",
        "-b",
        group="Run",
        low=2,
        high=10**6,
    )
    workers: int | None = option(
        None,
        "Number of loader processes for each teacher process; by default it depends on the number of cores.",
        "-j",
        "--num-workers",
        group="Run",
        low=0,
        high=1024,
    )
    engine: Engine = option(
        "local",
        "Engine that runs the label shards: processes on this machine, or a Ray cluster.",
        group="Run",
        timed=False,
    )
    processes: int | None = option(
        None,
        "Number of teacher processes; by default one for each GPU, or without a GPU one that uses all cores.",
        group="Run",
        low=1,
        high=1024,
    )
    address: str = option(
        "auto", "Address of the Ray cluster, for --engine ray; auto lets Ray find it.", group="Run", timed=False
    )
    on_bad_image: BadImagePolicy = option(
        "fail",
        "Reaction to an image that cannot be decoded: stop the run (fail), or leave the image out (skip).",
        group="Data",
        timed=False,
    )
    include_images: str | None = option(
        None,
        "Pack the images into the label set, which makes it self-contained: as they are, or shrunk to a shorter side of this"
        " many pixels, which is then what teacher and students see.",
        group="Data",
        bare=ORIGINAL,
        timed=False,
        planned=True,
    )
    min_teacher_accuracy: float = option(
        0.0,
        "Lowest top-1 accuracy of the teacher on centre crops, in percent; a teacher below it is refused.",
        group="Teacher",
        low=0,
        high=100,
        timed=False,
    )
    accuracy_samples: int = option(
        256,
        "Number of labelled images on which the teacher's accuracy is measured before it labels; 0 leaves this out.",
        group="Teacher",
        low=0,
        high=10**7,
        timed=False,
    )

    @property
    def folder(self) -> Path:
        """Local folder of the label set: `out`, or the folder that stands for a URL."""
        return working_folder(self.out)

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", os.fspath(self.out))  # callers may pass a Path
        start, stop = self.views
        if not 0 <= start < stop <= MAX_VIEW:
            raise UsageError(f"--views must be START:STOP with 0 <= START < STOP <= {MAX_VIEW}, got {start}:{stop}")
        check_settings(self)
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
        """Size in pixels to which included images are shrunk; None: images are not shrunk."""
        return None if self.include_images in (None, ORIGINAL) else int(self.include_images)


@dataclass(frozen=True, kw_only=True)
class TimingConfig:
    """Measuring times of `estimate` and `bench`."""

    seconds: float = option(2.0, "Seconds to spend on each measurement, approximately.", group="Run", low=0.1, high=600)

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, kw_only=True)
class EstimateConfig(TimingConfig):
    """The planned training, and how long to measure."""

    images: int | None = option(
        None,
        "Number of images in the whole set, where --data is a part of it; by default the images of --data.",
        group="Data",
        low=1,
    )
    students: int = option(1, "Number of students that will learn from the labels.", group="Student", low=1)
    epochs: int = option(300, "Number of epochs for which each student is trained.", group="Student", low=1)
    model: str = option(
        "deit_small_distilled_patch16_224",
        "Student: name of a timm model, or deit-ti, deit-s, deit-b.",
        group="Student",
    )


@dataclass(frozen=True, kw_only=True)
class BenchConfig(TimingConfig):
    """The labelling that `bench stage1` runs, and how long it measures."""

    images: int = option(512, "Largest number of images for the run of all parts together.", group="Data", low=2)


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Optional checks of a label set, in addition to its files and rows."""

    data: str | None = option(
        None,
        "Copy of the images, all of which are compared with the labelled ones; without it only those of the probes are read.",
        group="Data",
    )
    probes: bool = option(True, "Render the replay probes again, which needs the images.", group="Data")
    expect_manifest: str | None = option(
        None,
        "Pin of the manifest, sha256:HEX, as `labels info` prints it: a manifest with other bytes is a problem.",
        group="Data",
    )
    public_key: Path | None = option(
        None, "PEM file of the public key whose owner must have signed the manifest.", group="Data"
    )
    identity: str | None = option(
        None,
        "Sigstore identity that must have signed the manifest: a mail address, or the URL of a CI workflow.",
        group="Data",
    )
    identity_provider: str | None = option(
        None, "Provider that vouches for --identity, such as https://accounts.google.com.", group="Data"
    )
    relabel: int = option(
        256, "Number of random views that --teacher labels again.", group="Teacher", low=1, high=10**7
    )
    relabel_seed: int = option(
        0, "Random seed for choosing the views of --relabel.", group="Teacher", low=0, high=2**63 - 1
    )
    threads: int | None = option(
        None,
        "Number of files read at the same time; by default one for each core, or eight for a URL.",
        group="Run",
        low=1,
        high=256,
    )

    def __post_init__(self) -> None:
        if self.expect_manifest is not None:
            parse_pin(self.expect_manifest)
        if self.public_key is not None and self.identity is not None:
            raise UsageError("pass --public-key or --identity, whichever signed the manifest, not both")
        if (self.identity is None) != (self.identity_provider is None):
            raise UsageError("--identity and --identity-provider belong together: pass both or none")
        check_settings(self)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Settings for the export of a label set."""

    views: tuple[int, int] | None = option(
        None, "View numbers START:STOP to export; by default the first view alone.", group="Data"
    )
    pixels: Pixels = option(
        "views",
        "Pixels to export: the views as the teacher saw them, or the original files, which the teacher saw only where the"
        " recipe changes nothing.",
        group="Data",
    )
    encoding: Encoding = option(
        "png",
        "Encoding of the views: png is lossless but for the rounding of mixup, jpeg (quality 95, 4:4:4) is smaller.",
        group="Data",
    )
    format: Literal["webdataset"] = option("webdataset", "Format of the export.", group="Data")
    workers: int | None = option(
        None,
        "Number of loader processes; by default one for each core.",
        "-j",
        "--num-workers",
        group="Run",
        low=0,
        high=1024,
    )

    def __post_init__(self) -> None:
        check_settings(self)
