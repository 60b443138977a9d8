"""Students whose heads answer differently from image to image, and the photos that they answer for."""

import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from webdataset.writer import TarWriter

from support.builders import photo
from trainer.export import export_model, hub_config
from trainer.parallel import Running, World
from trainer.student import Student, create_student, normalise

CPU = torch.device("cpu")
TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}
# Resized to a shorter side of 16 / 0.8 = 20 pixels, these images stay as they are: the centre crop is a plain slice.
CROP_PCT, HEIGHT, WIDTH = 0.8, 20, 28
CENTRE = (slice(2, 18), slice(6, 22))
CLASSES = 8


def running(batch_size: int = 4, **changes) -> Running:
    workers = changes.pop("workers", 0)
    return Running(**({"world": World(0, 1, CPU, workers), "dtype": torch.float32, "batch_size": batch_size} | changes))


def write_photos(folder: Path, labels: list[int | None], *, names: int | None = CLASSES) -> str:
    """Write photos with these class labels; `names` classes are named, None: the source does not say."""
    folder.mkdir(parents=True)
    if names is not None:
        (folder / "classes.txt").write_text("".join(f"class {number}\n" for number in range(names)))
    with TarWriter(str(folder / "photos.tar"), mtime=0) as tar:  # pyright: ignore[reportArgumentType]
        for number, label in enumerate(labels):
            buffer = io.BytesIO()
            Image.fromarray(photo(number, HEIGHT, WIDTH)).save(buffer, "PNG")
            sample: dict[str, Any] = {"__key__": f"p{number:03}", "png": buffer.getvalue()}
            if label is not None:
                sample["cls"] = str(label).encode()
            tar.write(sample)
    return str(folder)


def lively(student: Student, seed: int = 0) -> Student:
    """Give the heads weights with which they answer differently, from each other and from image to image."""
    generator = torch.Generator().manual_seed(seed)
    for name in ("head", "head_dist", "fc"):
        head = getattr(student.model, name, None)
        if isinstance(head, nn.Linear):
            nn.init.normal_(head.weight, generator=generator)
    return student


def make_student(model: str = "deit-ti", num_classes: int = CLASSES, **changes) -> Student:
    torch.manual_seed(0)
    shape = TINY if "deit" in model else {"img_size": 16}
    student = lively(create_student(model, num_classes=num_classes, **(shape | changes)))
    with torch.no_grad():  # centred on the photos: no class is answered to everything
        pixels = torch.stack([torch.from_numpy(photo(i, HEIGHT, WIDTH)[CENTRE]) for i in range(40)])
        heads = student.eval()(normalise(pixels.permute(0, 3, 1, 2).float(), student))
        for name, logits in (
            ("head", heads.class_logits),
            ("fc", heads.class_logits),
            ("head_dist", heads.distill_logits),
        ):
            head = getattr(student.model, name, None)
            if isinstance(head, nn.Linear) and logits is not None:
                head.bias -= logits.mean(0)
    return student.train()


def exported(folder: Path, student: Student) -> Path:
    export_model(folder, student.model.state_dict(), hub_config=hub_config(student))
    return folder
