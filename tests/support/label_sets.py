"""Small real label sets for the tests of everything that reads them: tars of coloured noise, and a teacher in closed form."""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.images.source import open_source
from pipeline.labels.labelset import LabelSet
from pipeline.labels.manifest import TeacherIdentity
from pipeline.settings.configs import PrecomputeConfig, VerifyConfig
from pipeline.stage1.precompute import precompute
from pipeline.storage.json import pretty_json, sha256_json
from pipeline.teacher.loading import weights_sha256
from pipeline.teacher.teacher import Teacher
from pipeline.verify.verify import verify
from pipeline.views.recipe import Recipe
from support.builders import teacher_from

CLASSES = ("red", "green", "blue")
RECIPE = Recipe(img_size=16, mix_block=4)


class MeanColour(nn.Module):
    """Logit c is `gain` times the mean of channel c: an answer that anybody can work out again."""

    gain: Tensor

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.register_buffer("gain", torch.tensor([gain]))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [B, 3] for images [B, 3, H, W]."""
        return self.gain * images.mean(dim=(2, 3))


def colour_teacher(gain: float = 8.0, *, name: str = "mean-colour") -> Teacher:
    """Return the teacher whose three classes are the three channels."""
    module = MeanColour(gain)
    identity = TeacherIdentity(
        name=name,
        weights_sha256=weights_sha256(module),
        img_size=RECIPE.img_size,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        num_classes=3,
        class_names=CLASSES,
    )
    return teacher_from(module, identity)


def coloured_png(number: int, *, size: int = 12) -> bytes:
    """Return a PNG of noise in which channel `number % 3` is bright; another number, other bytes."""
    pixels = np.random.default_rng(number).integers(0, 100, (size, size, 3), dtype=np.uint8)
    pixels[..., number % 3] += 150
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    """Write a tar whose bytes follow from its members."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_source(folder: Path, shards: Sequence[int] = (5, 4), *, classes: Sequence[str] = CLASSES) -> Path:
    """Write tars with that many samples each, and `classes.txt`; the last sample of all has no class label."""
    folder.mkdir(parents=True)
    (folder / "classes.txt").write_text("\n".join(classes) + "\n")
    number, total = 0, sum(shards)
    for shard, count in enumerate(shards):
        members: list[tuple[str, bytes]] = []
        for _ in range(count):
            members.append((f"n{number:03}.png", coloured_png(number)))
            members += [(f"n{number:03}.cls", b"%d" % (number % 3))] if number < total - 1 else []
            number += 1
        write_tar(folder / f"train-{shard}.tar", members)
    return folder


def config_of(data: Path, out: Path, **changes) -> PrecomputeConfig:
    """Return settings for a run that needs no worker and no measured teacher: two files of two views a shard."""
    settings = {"views": (0, 4), "views_per_shard": 2, "topk": 2, "batch_size": 4, "accuracy_samples": 0, "workers": 0}
    return PrecomputeConfig(data=str(data), out=out, **(settings | changes))


def make_label_set(data: Path, out: Path, *, recipe: Recipe = RECIPE, teacher: Teacher | None = None, **changes):
    """Precompute a label set of these images; return it, open."""
    threads = torch.get_num_threads()
    try:
        config = config_of(data, out, **changes)
        return precompute(config, recipe, teacher or colour_teacher(), open_source(data))
    finally:
        torch.set_num_threads(threads)


def read_everything(label_set: LabelSet) -> Iterator[tuple]:
    """Yield every value of a label set, samples and labels, in a form that can be compared."""
    yield label_set.plan.labelset_id, label_set.views
    for shard in label_set.shards:
        samples = label_set.samples(shard)
        arrays = (samples.image_bytes, samples.height, samples.width)
        yield samples.key, samples.class_label, samples.image_xxh3, samples.bad, *(a.tobytes() for a in arrays)
        for view in label_set.views:
            rows = label_set.read(shard, view)
            arrays = (rows.row, rows.hard, rows.topk_index, rows.topk_prob, rows.tail_mass)
            yield (shard, view, *((a.dtype.str, a.shape, a.tobytes()) for a in arrays))


def seal_again(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda manifest: None) -> None:
    """Do what an attacker would: make every hash of the manifest agree with the folder as it is now."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for entry in manifest["files"]:
        views = f"labels/views-{entry['view_start']:05d}-{entry['view_stop'] - 1:05d}"
        file = folder / ("samples" if entry["kind"] == "samples" else views) / f"{entry['shard']}.parquet"
        if file.is_file():
            entry["bytes"], entry["sha256"] = file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()
    manifest["plan_sha256"] = hashlib.sha256((folder / "plan.json").read_bytes()).hexdigest()
    change(manifest)
    manifest["content_sha256"] = sha256_json({k: v for k, v in manifest.items() if k != "content_sha256"})
    path.write_bytes(pretty_json(manifest))


def problems_in(label_set: LabelSet | Path) -> list[str]:
    """Return what `labels verify --no-probes` finds wrong with a label set, nothing for a sound one."""
    location = label_set.place if isinstance(label_set, LabelSet) else label_set
    return [str(problem) for problem in verify(str(location), VerifyConfig(probes=False)).problems]


def files_of(folder: Path) -> list[Path]:
    """Return every file of a folder, in order, but a label set's card, for which no manifest vouches."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "README.md")
