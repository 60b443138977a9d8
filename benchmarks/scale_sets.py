"""Sources and label sets of any number of samples, made in minutes: tars of tiny images, and synthetic answers.

What an operation costs for each sample and for each file does not depend on what the images show, so a few tars are made, and
the others are hard links to them under other names. The label shards of these few tars are written by the project's own writer;
for each further source shard, only its name in the footer is replaced, which no checksum of Parquet covers. The result is a valid
set: `labels verify` finds nothing in it, and its replay probes are those of the images.
"""

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from scale import TOPK, Case

from pipeline.images.source import Source, open_source
from pipeline.labels.comparing import record_of
from pipeline.labels.encoding import LabelRows, codec_of
from pipeline.labels.manifest import (
    Plan,
    Probe,
    SourceRecord,
    labels_path,
    pixel_environment,
    samples_path,
)
from pipeline.labels.replay import make_probe, pair_of
from pipeline.labels.sealing import claim
from pipeline.labels.tables import LabelsFooter, SampleRows, SamplesFooter, write_labels, write_samples
from pipeline.pixels.render import render_view
from pipeline.stage1.indexing import scan_shard
from pipeline.views.recipe import Recipe

BLOCK = 512  # of a tar
PICTURES = 64
_NOBODY = "train-999999"  # the name that is replaced; as long as every other


def make_source(folder: Path, case: Case) -> None:
    """Write the tars of a case: a few different ones, and links to them."""
    folder.mkdir(parents=True)
    (folder / "classes.txt").write_text("".join(f"class {number:05}\n" for number in range(case.classes)))
    pictures = list(_pictures())
    for number, name in enumerate(case.names):
        path = folder / f"{name}.tar"
        if number < case.pool:
            path.write_bytes(b"".join(_members(pictures, number, case)) + bytes(2 * BLOCK))
        else:
            os.link(folder / f"{case.names[number % case.pool]}.tar", path)


def make_set(folder: Path, images: Path, case: Case) -> Plan:
    """Write plan and tables of a label set that is not sealed yet; return its plan."""
    source = open_source(images)
    pooled = source.only(case.names[: case.pool])
    shards = record_of(pooled).shards
    records = [replace(shards[number % case.pool], name=name) for number, name in enumerate(case.names)]
    plan = case.plan(
        SourceRecord(kind="tar", location=str(images.absolute()), class_names=source.class_names, shards=tuple(records))
    )
    claim(folder, plan, case.view_blocks)
    for path in (samples_path("x"), *(labels_path("x", block) for block in case.view_blocks)):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
    for number in range(min(case.pool, case.shards)):
        tables = dict(_tables(plan, pooled, case.names[number], case))
        for name in case.names[number :: case.pool]:
            for path, data in tables.items():
                (folder / path.replace(_NOBODY, name)).write_bytes(data.replace(_NOBODY.encode(), name.encode()))
    return plan


def _pictures() -> Iterator[bytes]:
    rng = np.random.default_rng(0)
    for _ in range(PICTURES):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file, "PNG")
        yield file.getvalue()


def _members(pictures: list[bytes], tar: int, case: Case) -> Iterator[bytes]:
    """Yield headers and content of a tar: an image and a class label for each sample."""
    templates: dict[tuple[str, int], tuple[bytes, int]] = {}
    for number in range(case.per_shard):
        label = b"%d" % ((number * 7919 + tar) % case.classes)
        for suffix, data in (("cls", label), ("png", pictures[(number + tar) % PICTURES])):
            kind = (suffix, len(data))
            if kind not in templates:
                templates[kind] = _template(*kind)
            rest, total = templates[kind]
            name = f"{tar:04}-{number:06}.{suffix}".encode()
            total += sum(name)
            yield name.ljust(100, b"\0") + rest[:48] + b"%06o\0 " % total + rest[56:]
            yield data.ljust(-(-len(data) // BLOCK) * BLOCK, b"\0")


def _template(suffix: str, size: int) -> tuple[bytes, int]:
    """Return a header without its name, and the sum of its bytes, in which its checksum counts as eight spaces."""
    member = tarfile.TarInfo(f"x.{suffix}")
    member.size = size
    rest = member.tobuf(tarfile.USTAR_FORMAT)[100:BLOCK]
    return rest, sum(rest[:48]) + 8 * 32 + sum(rest[56:])


def _tables(plan: Plan, source: Source, name: str, case: Case) -> Iterator[tuple[str, bytes]]:
    """Yield path and bytes of the samples file and of every label shard of a tar, under a name that is replaced."""
    samples = scan_shard(source, "fail", name, lambda _: None)
    footer = SamplesFooter(labelset_id=plan.labelset_id, source_id=plan.source_id, shard=_NOBODY, rows=len(samples))
    file = io.BytesIO()
    write_samples(file, samples, footer)
    yield str(samples_path(_NOBODY)), file.getvalue()
    rows = _answers(case)
    for block in case.view_blocks:
        views, codec = [rows] * len(block), plan.codec
        labels = LabelsFooter(
            labelset_id=plan.labelset_id,
            recipe_id=plan.recipe_id,
            teacher_id=plan.teacher_id,
            source_id=plan.source_id,
            shard=_NOBODY,
            view_start=block.start,
            view_stop=block.stop,
            rows_per_view=len(rows),
            num_classes=case.classes,
            topk=TOPK,
            precision=plan.precision,
            content_xxh3=codec.content_xxh3(views),
            probes=[_probe(source, name, samples, case.recipe, block.start).model_dump(mode="json")],
            environment=pixel_environment(renderer=case.recipe.renderer, device="cpu", dtype="float32", compiled=False),
        )
        file = io.BytesIO()
        write_labels(file, views, labels)
        yield str(labels_path(_NOBODY, block)), file.getvalue()


def _answers(case: Case) -> LabelRows:
    """Return one answer for all samples: its columns compress to almost nothing, so that a large set fits on a disk."""
    size = case.per_shard
    index = np.tile(np.arange(TOPK), (size, 1))
    prob = np.tile(np.float32(0.5) ** np.arange(1, TOPK + 1, dtype=np.float32), (size, 1))
    return codec_of("float16", case.classes, TOPK).encode(np.arange(size), index[:, 0], index, prob)


def _probe(source: Source, name: str, samples: SampleRows, recipe: Recipe, view: int) -> Probe:
    partner, mix = pair_of(recipe, samples, 0, view)
    sample = source.shard(name)[0]
    pixels = render_view(sample.image, recipe, sample.key, view)
    return make_probe(pixels, shard=_NOBODY, row=0, view=view, partner=partner, mix=mix)
