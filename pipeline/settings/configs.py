"""Settings of all commands except `train` and `evaluate`. The command line takes its options from these fields."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.errors import UsageError
from pipeline.labels.format import Precision, parse_pin
from pipeline.settings.fields import (
    REQUIRED,
    check_settings,
    data_option,
    measurement_option,
    output_option,
    run_option,
    settings_of,
    signature_option,
    stored_option,
    student_option,
    teacher_option,
    views_option,
)
from pipeline.storage.urls import working_folder

if TYPE_CHECKING:
    from pipeline.images.samples import SourceOptions

MAX_VIEW = 2**20  # a million epochs; the plan of a run lists every block of views
BadImagePolicy = Literal["fail", "skip"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Engine = Literal["local", "ray"]
Pixels = Literal["views", "originals"]
Encoding = Literal["png", "jpeg"]
PackBadImagePolicy = Literal["fail", "skip", "keep"]
ORIGINAL = "original"  # --include-images: keep the encoded files unchanged
MAX_SHORTER = 4096


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """How the images are read that a command names, where their layout leaves a choice. Most configs with images inherit this."""

    image_key: str | None = data_option(
        None,
        "Image of a sample: in tars the extensions to look for, such as `jpg;png`, the first that a sample has; in Parquet the"
        " name of the column. By default the only image there is.",
        "--input-key",
        free=True,
        metavar="KEY",
    )
    label_key: str | None = data_option(
        None,
        "Class label of a sample: in tars the extension of its member, such as `cls.txt`, or a field of its .json member; in"
        " Parquet or --labels-file the name of the column. By default what is plainly the label.",
        "--target-key",
        free=True,
        metavar="KEY",
    )
    image_root: str | None = data_option(
        None,
        "Folder of the image files, for Parquet rows that hold paths instead of images.",
        free=True,
        metavar="FOLDER",
    )
    labels_file: str | None = data_option(
        None,
        "File with the class labels of --data, instead of its own: CSV, TSV or JSON lines with a path and a label for each image,"
        " or ILSVRC2012_validation_ground_truth.txt.",
        free=True,
        metavar="FILE|URL",
    )
    class_depth: int | None = data_option(
        None,
        "Number of folder levels whose names make up the class in an image folder: 2 means a/b/name.jpg. By default 1.",
        free=True,
        low=1,
        high=100,
    )
    class_order: str | None = data_option(
        None,
        "Order of the classes by their names: as text (0, 1, 10, 2; torchvision), natural (0, 1, 2, 10; timm), or a file with one"
        " class name per line. By default text.",
        "--class-names",
        "--class-map",
        free=True,
        metavar="text|natural|FILE",
    )

    @property
    def options(self) -> "SourceOptions":
        """How a source is read, for `open_source`."""
        from pipeline.images.samples import SourceOptions  # not above: --help would load pydantic

        return SourceOptions(**{setting.name: getattr(self, setting.name) for setting in settings_of(SourceConfig)})

    def options_for(self, *locations: str | None) -> "SourceOptions":
        """Return `options` for images at any of these locations, which the user named or did not.

        Raises:
            UsageError: options are set, and no location is: the images of a label set are read as when they were labelled.
        """
        self.check_used(*locations)
        return self.options

    def check_used(self, *locations: str | None) -> None:
        """Raise UsageError if options are set, and none of the locations is given whose images they say how to read."""
        said = next((each for each in settings_of(SourceConfig) if getattr(self, each.name) is not None), None)
        if said is not None and not any(locations):
            raise UsageError(f"{said.flag} says how the images at --data are read: pass that too")


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The teacher networks and how they run."""

    teacher: tuple[str, ...] = teacher_option(
        ("regnety_160",),
        "Teacher: name of a timm model (regnety_160 means DeiT's teacher, regnety_160.deit_in1k), hf-hub:NAME,"
        " folder that `train` exported, or module:function (a Python function that returns the network). Its classes"
        " must be those of --data. Repeat the option to average the probabilities of several teachers.",
        "--teacher-model",
        metavar="NAME",
    )
    teacher_checkpoint: tuple[Path, ...] = teacher_option(
        (),
        "File with the weights of the teacher: safetensors, or a PyTorch state dict. Pass it once for each"
        " --teacher, in the same order, or not at all.",
        "--teacher-path",
    )
    pretrained: bool = teacher_option(True, "Load published weights; --no-pretrained uses random weights, for a trial.")
    teacher_img_size: int | None = teacher_option(
        None,
        "Size in pixels to which views are resized for the teacher; by default the size that its configuration names.",
        low=1,
        high=4096,
    )
    device: str = run_option(
        "auto", "Device: cpu, cuda, cuda:1, xpu or mps; auto means every visible GPU, or the CPU if there is none."
    )
    dtype: Dtype = run_option(
        "auto", "Number format of the teacher's forward pass; auto means bfloat16 on CUDA and XPU, else float32."
    )
    compile: bool = run_option(
        False, "Compile the teacher with torch.compile: faster on a GPU, after about a minute of compilation."
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


RenderDevice = Literal["cpu", "gpu", "auto"]
RENDER_HELP = (
    "Device that renders views, with the same pixels: the loader processes (cpu), or the GPU, for which they only decode"
    " (gpu); auto means the GPU, if it passes a comparison with the CPU first."
)


@dataclass(frozen=True, kw_only=True)
class PrecomputeConfig(SourceConfig):
    """Settings of `precompute`: the data to label, and how."""

    data: str = data_option(
        REQUIRED,
        "Images: a folder with files class/name.jpg, tars with images and labels (train-{000..127}.tar), or Parquet"
        " files with an image and a label column. A path, or the http://, s3://, gs:// or hf:// URL of tars or"
        " Parquet files.",
        planned=True,
        metavar="PATH|URL",
    )
    out: str = output_option(
        REQUIRED,
        "Label set to write: folder, or s3://, gs:// or hf:// URL. Run the same command again to continue it.",
        timed=False,
        planned=True,
        metavar="FOLDER|URL",
    )
    views: tuple[int, int] = views_option(
        (0, 30),
        "Views to label: START:STOP means the numbers START to STOP-1, N means 0:N. N views last for N epochs of"
        " training, after which they are used again.",
        planned=True,
    )
    topk: int | None = stored_option(
        None,
        "Number of classes (K) to store for each view, the most probable first; by default 10, or all classes if"
        " there are fewer. 0 stores only the most probable class (the hard label).",
        low=0,
        high=2**31,
        planned=True,
    )
    precision: Precision = stored_option(
        "float16",
        "Number format of the stored probabilities: float16 (relative error up to 0.05 %, more below 0.0001; about"
        " 33 bytes a label on disk for K = 10), float32 (larger), or log8 (logits in steps of 0.1; about 19 bytes).",
        planned=True,
    )
    views_per_shard: int = stored_option(
        30,
        "Number of views of each image in one label file. After a crash, only unfinished files are made again.",
        low=1,
        high=MAX_VIEW,
        planned=True,
    )
    batch_size: int | Literal["auto"] = run_option(
        "auto",
        "Maximum number of views in one forward pass on a GPU, halved if memory runs out; auto means the recipe's"
        " mix_block (256), the number of images among which mixup partners are drawn. A CPU always takes 32.",
        "-b",
        low=2,
        high=10**6,
    )
    workers: int | None = run_option(
        None,
        "Number of processes that render views for each teacher process; by default its CPU cores minus one, or half"
        " of them if the teacher runs on the CPU.",
        "-j",
        "--num-workers",
        low=0,
        high=1024,
    )
    render: RenderDevice = run_option("cpu", RENDER_HELP)
    engine: Engine = run_option(
        "local",
        "Engine that makes the label files: processes of this machine (local), or a Ray cluster (ray), which needs"
        " deit-cli[ray].",
        timed=False,
    )
    processes: int | None = run_option(
        None,
        "Number of teacher processes; by default one for each GPU, or a single one on the CPU, which uses all cores.",
        low=1,
        high=1024,
    )
    address: str = run_option(
        "auto",
        "Address of the Ray cluster, HOST:PORT, for --engine ray; auto means that Ray finds it, local starts Ray on"
        " this machine.",
        timed=False,
        metavar="HOST:PORT",
    )
    on_bad_image: BadImagePolicy = data_option(
        "fail",
        "Policy for an image that cannot be decoded: stop with an error (fail), or leave it out of the label set"
        " (skip).",
        timed=False,
    )
    include_images: str | None = data_option(
        None,
        "Store the images in the label set, so that training needs nothing else. Without N: the original files. With"
        " N: larger images are shrunk to N pixels (shorter side, JPEG), also for the teacher.",
        bare=ORIGINAL,
        timed=False,
        planned=True,
        metavar="[N]",
    )
    min_teacher_accuracy: float = teacher_option(
        0.0,
        "Minimum top-1 accuracy of the teacher on centre crops, in percent; a less accurate teacher is refused.",
        low=0,
        high=100,
        timed=False,
    )
    accuracy_samples: int = teacher_option(
        256,
        "Number of images with a class label on which the teacher's accuracy is measured first; 0 skips the"
        " measurement.",
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

    seconds: float = measurement_option(2.0, "Approximate number of seconds for each measurement.", low=0.1, high=600)

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, kw_only=True)
class EstimateConfig(TimingConfig):
    """The planned training, and how long to measure."""

    images: int | None = measurement_option(
        None,
        "Number of images in the whole data set, if --data holds only a part of it; by default the number of images"
        " in --data.",
        low=1,
    )
    students: int = student_option(1, "Number of students that are trained from the labels.", low=1)
    epochs: int = student_option(300, "Number of epochs for which each student is trained.", low=1)
    model: str = student_option(
        "deit_small_distilled_patch16_224",
        "Student: name of a timm model, or deit-ti, deit-s or deit-b, which mean DeiT's models with a distillation"
        " token.",
        metavar="NAME",
    )


@dataclass(frozen=True, kw_only=True)
class BenchConfig(TimingConfig):
    """The labelling that `bench stage1` runs, and how long it measures."""

    images: int = measurement_option(
        512, "Maximum number of images in the last measurement, of all parts together.", low=2
    )


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(SourceConfig):
    """Optional checks of a label set, in addition to its files and rows."""

    data: str | None = data_option(
        None,
        "Images, path or URL: all are compared with those that were labelled. By default those in the label set; if"
        " it has none, only the images of the replay probes, at the local path stored in it.",
        metavar="PATH|URL",
    )
    probes: bool = data_option(
        True,
        "Render the replay probes again (a few views whose hashes the label set stores), which needs their images.",
    )
    expect_manifest: str | None = data_option(
        None,
        "Expected hash of the manifest, as `labels info` prints it; any other manifest is a problem.",
        metavar="sha256:HEX",
    )
    public_key: Path | None = signature_option(None, "PEM file of the signer's public key; it needs deit-cli[sign].")
    identity: str | None = signature_option(
        None, "Sigstore identity of the signer, an e-mail address or the URL of a CI workflow; it needs deit-cli[sign]."
    )
    identity_provider: str | None = signature_option(
        None, "Provider of --identity, required with it, such as https://accounts.google.com."
    )
    relabel: int = teacher_option(256, "Number of random views that --teacher labels again.", low=1, high=10**7)
    relabel_seed: int = teacher_option(0, "Random seed that selects the views for --relabel.", low=0, high=2**63 - 1)
    threads: int | None = run_option(
        None,
        "Number of files that are read at the same time; by default one for each core, or eight for a URL.",
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
        self.options_for(self.data)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Settings for the export of a label set."""

    views: tuple[int, int] | None = views_option(None, "Views to export, START:STOP; by default only the first view.")
    pixels: Pixels = output_option(
        "views",
        "Images to export: the views that the teacher saw (views), or the original files with the labels of one view"
        " (originals).",
    )
    encoding: Encoding = output_option(
        "png",
        "Image format of the exported views: png is lossless (mixed views are rounded to 8 bits), jpeg (quality 95,"
        " 4:4:4) is smaller.",
    )
    format: Literal["webdataset"] = output_option("webdataset", "Format of the export.")
    workers: int | None = run_option(
        None, "Number of loader processes; by default one for each core.", "-j", "--num-workers", low=0, high=1024
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, kw_only=True)
class PackConfig(SourceConfig):
    """Settings of `pack`: how a source is written as tars."""

    samples_per_shard: int = output_option(
        1000, "Maximum number of images in a tar; the sizes of the tars differ by at most one.", low=1, high=10**6
    )
    prefix: str = output_option(
        "train",
        "Beginning of the names of the tars, PREFIX-000000.tar, and the name of the split for timm.",
        metavar="PREFIX",
    )
    shorter_side: int | None = output_option(
        None,
        "Shrink larger images to this length of the shorter side, in pixels (Lanczos, JPEG); by default all images are"
        " copied as they are.",
        low=1,
        high=MAX_SHORTER,
    )
    quality: int | None = output_option(
        None, "JPEG quality of the images that --shorter-side shrinks; by default 95.", low=1, high=100
    )
    seed: int = output_option(0, "Random seed of the order of the images.", low=0, high=2**63 - 1)
    prefix_keys: bool = data_option(
        False, "Put the name of the source shard before each key; for sources that use a key in several shards."
    )
    replace_dots: bool = data_option(
        False, "Replace dots in the file names of keys by _, because WebDataset ends a key at the first dot."
    )
    on_bad_image: PackBadImagePolicy = data_option(
        "fail",
        "Policy for an image that cannot be decoded: stop with an error (fail), leave it out (skip), or copy it"
        " unchanged (keep). keep decodes only the images that may have to be shrunk, so copying is faster.",
    )
    workers: int | None = run_option(
        None, "Number of loader processes; by default one for each core.", "-j", "--num-workers", low=0, high=1024
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if not re.fullmatch("[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", self.prefix):
            raise UsageError(
                f"--prefix must have 1 to 100 characters A-Z a-z 0-9 . _ - and begin with a letter, digit or _, got {self.prefix!r}"
            )
        if self.quality is not None and self.shorter_side is None:
            raise UsageError("--quality is that of the images that --shorter-side shrinks: pass it too")
