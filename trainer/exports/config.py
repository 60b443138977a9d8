"""Settings of `deit-cli export`."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.errors import UsageError
from pipeline.settings.configs import SourceConfig
from pipeline.settings.fields import (
    REQUIRED,
    check_settings,
    data_option,
    evaluation_option,
    option,
    output_option,
    run_option,
)

Form = Literal["timm", "onnx", "torch"]
Preprocess = Literal["none", "nhwc", "nchw"]
Precision = Literal["float32", "float16", "int8"]
_REPOSITORY = re.compile(r"hf://(?!(?:datasets|spaces|models|buckets)/)([\w.-]+/[\w.-]+)", re.ASCII)
_OF_A_GRAPH = ("answer", "preprocess", "concat_linear")  # settings that timm's folder does not have


@dataclass(frozen=True, kw_only=True)
class StudentExportConfig(SourceConfig):
    """Settings of an export of a student: its form, what the graph computes, and the images that check it."""

    to: Form = output_option(
        REQUIRED,
        "Form of the export: a folder that timm loads (timm), an ONNX file (onnx), or a torch.export program (torch).",
    )
    out: Path | None = output_option(
        None,
        "Folder for the export, new or empty, or one with an export of the same form, answers, input and precision; by default"
        " NAME-timm, NAME-onnx or NAME-torch here, where NAME is the name of the run.",
        metavar="FOLDER",
    )
    answer: tuple[str, ...] = output_option(
        (),
        "Output of the graph: class_head, distillation_head, mean_logits, sum_softmax or concat_linear. Repeat the option for"
        " several outputs. By default mean_logits, or class_head for a student with one head.",
        metavar="NAME",
    )
    preprocess: Preprocess = output_option(
        "none",
        "Input of the graph: float32 images that are normalised already (none), or uint8 pixels, which the graph normalises,"
        " as [batch, height, width, 3] (nhwc) or [batch, 3, height, width] (nchw).",
    )
    precision: Precision = output_option(
        "float32", "Number format of the weights in an ONNX file; inputs and outputs keep theirs."
    )
    concat_linear: str | None = output_option(
        None,
        "File of the linear classifier that `evaluate --fit-data` fitted, for --answer concat_linear; by default"
        " concat_linear.safetensors beside the weights.",
        metavar="FILE|URL",
    )
    data: str | None = data_option(
        None,
        "Images that check the export, path or URL: the answers of export and student are compared, and with class labels"
        " also their accuracy. By default 16 generated images.",
        metavar="PATH|URL",
    )
    samples: int = data_option(2000, "Maximum number of images, spread evenly over --data; 0 means all.", low=0)
    calibration_data: str | None = data_option(
        None,
        "Images for static quantisation with --precision int8, path or URL: their activations set the ranges. By default the"
        " ranges follow each input (dynamic quantisation), and only linear layers are quantised.",
        metavar="PATH|URL",
    )
    calibration_samples: int = data_option(
        128, "Maximum number of images, spread evenly over --calibration-data; 0 means all.", low=0
    )
    crop_pct: float | None = evaluation_option(
        None,
        "Size of the centre crop of the images as a fraction of the shorter side, such as 0.9; by default that of the model.",
        low=0.01,
        high=1,
    )
    license: str | None = option(
        None,
        "Licence in the model card, by its identifier on the Hub, such as apache-2.0; `other` if it has none.",
        group="Licence",
    )
    license_name: str | None = option(None, "Name of the licence, for --license other.", group="Licence")
    license_link: str | None = option(None, "Link to the text of the licence, for --license other.", group="Licence")
    dataset: tuple[str, ...] = option(
        (),
        "Identifier on the Hub of a dataset that the student was trained on, such as imagenet-1k, for the model card. Repeat"
        " the option for several.",
        group="Licence",
        metavar="NAME",
    )
    push: str | None = output_option(
        None,
        "Model repository on the Hugging Face Hub to which the folder is uploaded as one commit; it is created if it does not"
        " exist.",
        metavar="hf://USER/NAME",
    )
    private: bool = output_option(False, "Create the repository of --push as a private one.")
    workers: int = run_option(
        0, "Number of loader processes for --data and --calibration-data.", "-j", "--num-workers", low=0, high=1024
    )

    def __post_init__(self) -> None:
        check_settings(self)
        self.options_for(self.data, self.calibration_data)
        self._check_form()
        if self.labels_file is not None and self.data is None:
            raise UsageError("--labels-file has the class labels of --data: pass that too")
        if len(set(self.answer)) < len(self.answer):
            raise UsageError(f"each --answer must be passed once, got {' '.join(self.answer)}")
        if self.crop_pct is not None and self.data is None and self.calibration_data is None:
            raise UsageError("--crop-pct is the centre crop of --data: pass that too, or leave it out")
        if (self.license_name or self.license_link) and self.license != "other":
            raise UsageError(
                "--license-name and --license-link describe a licence without identifier: pass --license other too"
            )
        if self.private and self.push is None:
            raise UsageError("--private is about the repository of --push: pass that too")
        if self.push is not None and _REPOSITORY.fullmatch(self.push) is None:
            raise UsageError(f"--push must be a model repository, hf://USER/NAME, got {self.push!r}")

    def _check_form(self) -> None:
        """Raise UsageError for a setting that the form of the export does not have."""
        given = [name for name in _OF_A_GRAPH if getattr(self, name) not in ((), "none", None)]
        if self.to == "timm" and given:
            raise UsageError(
                f"--{given[0].replace('_', '-')} is part of a graph, and timm builds its own from config.json",
                fix="Pass --to onnx or --to torch, or leave it out",
            )
        if self.to != "onnx" and self.precision != "float32":
            raise UsageError(
                f"--precision {self.precision} is for --to onnx: the weights of --to {self.to} stay float32",
                fix="Pass --to onnx, or leave it out",
            )
        if self.calibration_data is not None and self.precision != "int8":
            raise UsageError("--calibration-data sets the ranges of --precision int8: pass that too, or leave it out")
        if self.concat_linear is not None and "concat_linear" not in self.answer:
            raise UsageError("--concat-linear is the classifier of --answer concat_linear: pass that too")

    @property
    def repository(self) -> str | None:
        """Return USER/NAME of the repository to upload to, or None."""
        return None if self.push is None else self.push.removeprefix("hf://")
