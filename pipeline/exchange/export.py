"""Export labels for readers without views: WebDataset tars with each image and its hard label.

A label belongs to the pixels that the teacher saw, so these pixels are exported: each view is rendered, mixed, rounded to
whole levels, and encoded. timm's `wds/` reader and `datasets` can train on the export without any further augmentation.
"""

import dataclasses
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from pipeline.errors import UsageError
from pipeline.images.decode import encode
from pipeline.images.source import Source
from pipeline.images.tar_archive import INFO_NAME, check_member_key, member_extension, timm_info
from pipeline.labels.encoding import LabelRows
from pipeline.labels.labelset import LabelSet
from pipeline.labels.replay import check_image, check_replay
from pipeline.labels.tables import SampleRows
from pipeline.machine.loaders import Note, in_processes
from pipeline.machine.progress import Progress
from pipeline.machine.threads import ProgressCounter, usable_cores
from pipeline.overview.card import CARD_NAME, code_span
from pipeline.settings.configs import Encoding, ExportConfig, Pixels
from pipeline.stage1.rendering import Block, BlockRenderer
from pipeline.storage.atomic import publish_file, replace_file, sweep_temporaries
from pipeline.storage.json import pretty_json, read_json
from pipeline.storage.yaml import to_yaml
from pipeline.views.mixing import apply_mix
from pipeline.views.pairs import mix_blocks
from pipeline.views.recipe import Recipe

log = logging.getLogger("deit_cli.exporting")

ABOUT_NAME = "export.json"
SPLIT = "train"


@dataclass(frozen=True)
class Export:
    """The content of an export: everything that its bytes depend on.

    Attributes:
        labelset_id: id of the label set.
        content_sha256: content hash of the label set's manifest.
        views: view numbers.
        pixels: kind of pixels, see `ExportConfig`.
        encoding: image encoding, see `ExportConfig`; None if the pixels are the originals.
    """

    labelset_id: str
    content_sha256: str
    views: range
    pixels: Pixels
    encoding: Encoding | None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return dataclasses.asdict(self) | {
            "views": [self.views.start, self.views.stop],
            "format": "deit-cli-export",
            "version": 1,
        }


@dataclass(frozen=True)
class _Job:
    """The data that every process of an export needs."""

    label_set: LabelSet
    source: Source
    out: Path
    export: Export
    class_labels: bool


def export_labels(
    label_set: LabelSet, source: Source, out: Path, config: ExportConfig, *, progress: Progress = lambda _: None
) -> int:
    """Write tars of images with their labels and the metadata for timm and `datasets`, and return the number of images.

    One tar holds one view of one source shard. The same call continues an export that was killed.

    Args:
        label_set: label set to export.
        source: images of the label set.
        out: new folder, or the folder of the same export.
        config: settings of the export.
        progress: receives the number of finished tars.

    Returns:
        number of images exported.

    Raises:
        UsageError: the set does not have these views, or the folder holds something else.
        LabelSetError: labels or images differ from the manifest.
    """
    export = plan_export(label_set, config)
    names = {name: label_set.samples(name) for name in label_set.shards}
    for name, samples in names.items():
        for key in samples.key:
            check_member_key(key, name)
    check_replay(label_set, source)
    if config.pixels == "originals" and changes_images(label_set.recipe):
        log.warning(
            "the recipe crops, changes or mixes images: the exported answers belong to view %d of each image, not to the"
            " exported original. Omit --pixels to export the pixels that the teacher saw",
            export.views[0],
        )
    begin(out, export)
    labelled = all(label is not None for samples in names.values() for label in samples.class_label)
    tasks = [(name, view) for view in export.views for name in label_set.shards]
    workers = usable_cores() if config.workers is None else config.workers
    job = _Job(label_set, source, out, export, labelled)
    counts, count_one = [], ProgressCounter("export", len(tasks), progress, unit="tars")
    for count in in_processes(partial(_export_one, job), tasks, workers=min(workers, len(tasks))):
        counts.append(count)
        count_one()
    files = {tar_name(*task): count for task, count in zip(tasks, counts, strict=True)}
    replace_file(out / CARD_NAME, _readme(label_set, export, labelled).encode())
    info = timm_info(files, split=SPLIT, label_field="hard")
    replace_file(out / INFO_NAME, pretty_json(info))  # written last: timm needs it
    return sum(counts)


def plan_export(label_set: LabelSet, config: ExportConfig) -> Export:
    """Return the content of an export.

    Raises:
        UsageError: the set does not have these views, or originals are requested with more than one view.
    """
    held = label_set.views
    start, stop = config.views or (held.start, held.start + 1)
    if not held.start <= start < stop <= held.stop:
        raise UsageError(
            f"--views must be START:STOP within the labelled views {held.start}:{held.stop}, got {start}:{stop}"
        )
    if config.pixels == "originals" and stop - start > 1:
        raise UsageError(
            f"--pixels originals exports one view, because an image has only one file, got --views {start}:{stop}",
            fix=f"Pass --views {start}:{start + 1}, or omit --pixels",
        )
    return Export(
        label_set.plan.labelset_id,
        str(label_set.manifest.content_sha256),
        range(start, stop),
        config.pixels,
        config.encoding if config.pixels == "views" else None,
    )


def changes_images(recipe: Recipe) -> bool:
    """Return whether a view differs from the unchanged, whole centre of its image."""
    return recipe.crop == "random" or recipe.mixes or bool(recipe.hflip or recipe.aa or recipe.reprob)


def begin(out: Path, export: Export) -> None:
    """Claim a folder for an export, create-only, or continue the same export in it.

    Raises:
        UsageError: the folder holds something else.
    """
    path = out / ABOUT_NAME
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file: choose a folder")
    if not path.is_file() and out.is_dir() and any(not child.name.startswith(".tmp-") for child in out.iterdir()):
        raise UsageError(f"{out} is not empty and holds no export: choose another folder")
    publish_file(path, pretty_json(export.to_json()))
    if (found := read_json(path)) != export.to_json():
        differing = [name for name, value in export.to_json().items() if (found or {}).get(name) != value]
        raise UsageError(f"{out} holds another export ({', '.join(differing)} differ): choose another folder")
    sweep_temporaries(out)


def tar_name(shard: str, view: int) -> str:
    """Return the name of the tar of one view of one source shard."""
    return f"{shard}-view-{view:05d}.tar"


def _export_one(job: _Job, task: tuple[str, int], note: Note) -> int:
    """Write the tar of one view of a source shard, and return its number of images."""
    name, view = task
    rows = job.label_set.read(name, view)
    path = job.out / tar_name(name, view)
    if not path.is_file():
        publish_file(path, partial(_write_samples, samples=_samples(job, name, view, rows, note)))
    return len(rows)


def _write_samples(file: BinaryIO, samples: Iterable[dict[str, Any]]) -> None:
    """Write samples as webdataset does; the same samples give the same bytes."""
    from webdataset.writer import TarWriter  # this import takes a second

    with TarWriter(file, encoder=False, user="", group="", mode=0o644, mtime=0) as tar:
        for sample in samples:
            tar.write(sample)


def _samples(job: _Job, name: str, view: int, rows: LabelRows, note: Note) -> Iterator[dict[str, Any]]:
    """Yield the samples of one tar: key, image, class label, labels."""
    samples, export = job.label_set.samples(name), job.export
    as_seen = export.pixels == "views"
    images = _views(job, name, samples, view, note) if as_seen else _originals(job, name, samples, note)
    for at, (row, image, lam) in enumerate(images):
        key, label = samples.key[row], samples.class_label[row]
        stem = f"{key}-view-{view:05d}" if as_seen else key
        sample: dict[str, Any] = {"__key__": stem, member_extension(image).removeprefix("."): image}
        if job.class_labels:
            sample["cls"] = b"%d" % label
        about = {"key": key, "view": view, "hard": int(rows.hard[at]), "labelset_id": export.labelset_id}
        if lam is not None:
            about["lam"] = lam
        if job.class_labels:  # `datasets` cannot infer the type of a field that some samples lack
            about["class_label"] = label
        if rows.topk_prob.shape[1]:
            about["topk_index"] = rows.topk_index[at].tolist()
            about["topk_prob"] = rows.topk_prob[at].tolist()
            about["tail_mass"] = float(rows.tail_mass[at])
        yield sample | {"json": json.dumps(about, ensure_ascii=False, sort_keys=True).encode()}


def _views(job: _Job, name: str, samples: SampleRows, view: int, note: Note) -> Iterator[tuple[int, bytes, float]]:
    """Yield the row, the encoded view, and the weight of the sample's own view in the mix, for every usable sample in row order."""
    recipe, encoding = job.label_set.recipe, job.export.encoding
    renderer, alone = BlockRenderer(job.source, recipe), range(view, view + 1)
    out = torch.empty(min(recipe.mix_block, len(samples)), recipe.img_size, recipe.img_size, 3, dtype=torch.uint8)
    for rows in mix_blocks(recipe, samples.usable):
        batch = renderer((Block(name, alone, alone, rows, samples.take(rows)), view), out, note)
        mixed = apply_mix(batch.images, batch.mix).round().clamp(0, 255).byte()
        pixels = mixed.permute(0, 2, 3, 1).contiguous().numpy()
        for at in np.argsort(batch.rows.numpy()).tolist():
            image = encode(pixels[at], "PNG" if encoding == "png" else "JPEG")
            yield int(batch.rows[at]), image, float(batch.mix.lam[at])


def _originals(job: _Job, name: str, samples: SampleRows, note: Note) -> Iterator[tuple[int, bytes, None]]:
    shard = job.source.shard(name)
    for row in samples.usable.tolist():
        note(f"image {samples.key[row]!r} of {name}")
        sample = shard[row]
        check_image(sample, samples, row, shard=name)
        yield row, sample.image, None


def _readme(label_set: LabelSet, export: Export, labelled: bool) -> str:
    """Return the text of README.md, for the Hub, `datasets` and people."""
    files = [{"split": SPLIT, "path": "*.tar"}]
    header = to_yaml({"configs": [{"config_name": "default", "data_files": files}]}).decode()
    views = export.views
    what = {
        "png": "Each image is one view as the teacher saw it, mixed, rounded to whole levels, as PNG.",
        "jpeg": "Each image is one view as the teacher saw it, mixed, rounded to whole levels, as JPEG of quality 95 (4:4:4),"
        " which changes its pixels slightly.",
        None: f"Each image is an original, with the teacher's answer for its view {views.start}: these are the pixels that the"
        " teacher saw only if the recipe changes nothing.",
    }[export.encoding]
    return "\n".join(
        (
            f"---\n{header}---",
            "",
            f"# Hard labels of {code_span(label_set.plan.teacher.name)}",
            "",
            f"Views {views.start}..{views.stop - 1} of label set `{export.labelset_id}`, exported by deit-cli. {what}"
            " The `.json` beside an image holds the teacher's class, `hard`, and its top K"
            f"{'; `.cls` is the class label of the image that KEY names' if labelled else ''}."
            " If views are mixed, `lam` is the weight of that image.",
            "",
            "A label belongs to these pixels, so train without further augmentation. timm:",
            "",
            f"    python train.py --data-dir . --dataset wds/labels --target-key hard --num-classes {label_set.num_classes}"
            f" --img-size {label_set.recipe.img_size} --no-aug",
            "",
            "`datasets`:",
            "",
            "    from datasets import load_dataset",
            '    load_dataset("webdataset", data_files={"train": "*.tar"}, split="train")[0]["json"]["hard"]',
            "",
        )
    )
