"""The files of `labels audit --out`: the complete result as JSON, the suspects as CSV, and a page with pictures.

The page is one file: styles and pictures are in it, it has no script, and a browser loads nothing for it.
"""

import base64
import csv
import io
import logging
from collections.abc import Iterable
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from pipeline.errors import SourceError, UsageError
from pipeline.images.decode import decode, encode
from pipeline.images.source import NO_OPTIONS, Source, SourceOptions
from pipeline.labels.replay import check_image
from pipeline.storage.atomic import refusals_named, replace_file
from pipeline.storage.json import pretty_json
from trainer.evidence.audit import Audit, Image, class_text, differ, percent
from trainer.evidence.page import templates

log = logging.getLogger("deit_cli.audit")

PIXELS = 128  # of the longer side of a picture
COLUMNS = ("key", "class_label", "class_name", "answer", "answer_name", "score", "contradicted", "shard")


def write_audit(
    found: Audit, folder: Path, *, top: int, data: str | None = None, options: SourceOptions = NO_OPTIONS
) -> None:
    """Write `audit.json`, `suspects.csv` and `gallery.html`.

    Args:
        found: result of the audit.
        folder: created if it does not exist; its files of these names are replaced.
        top: number of entries of each list on the page; the other files are complete.
        data: source of the images; None: those of the label set, or, if they cannot be opened, a page without pictures.

    Raises:
        SourceError: `data` cannot be opened.
        LabelSetMismatch: an image has other bytes than the one that was labelled.
    """
    source = _open(found, data, options)
    shown = _shown(found, top)
    pictures = {} if source is None else _pictures(found, source, shown)
    page = _page(found, top, pictures, has_pictures=source is not None)
    files = {"audit.json": pretty_json(found.to_dict()), "suspects.csv": _csv(found), "gallery.html": page.encode()}
    with refusals_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            replace_file(folder / name, lambda file, content=content: file.write(content))
    log.info("wrote %s in %s", ", ".join(files), folder)


def _open(found: Audit, data: str | None, options: SourceOptions) -> Source | None:
    """Return the images; None if none were asked for and those of the label set cannot be opened."""
    try:
        return found.label_set.open_source(data, options=options)
    except (SourceError, UsageError) as error:
        if data is not None:
            raise
        log.warning("gallery.html has no pictures: %s. Pass --data with the images that were labelled", error)
        return None


def _shown(found: Audit, top: int) -> set[Image]:
    """Return the images of the first `top` entries of each list."""
    single = [each.image for each in (*found.suspects[:top], *found.unsure[:top])]
    return {*single, *(image for group in found.duplicates[:top] for image in group)}


def _pictures(found: Audit, source: Source, images: Iterable[Image]) -> dict[Image, str]:
    """Return a picture of each image as a data URI; each image must have the bytes that were labelled."""
    pictures: dict[Image, str] = {}
    for name, group in groupby(sorted(images, key=attrgetter("shard", "row")), key=attrgetter("shard")):
        shard, samples = source.shard(name), found.label_set.samples(name)
        for image in group:
            sample = shard[image.row]
            check_image(sample, samples, image.row, shard=name)
            pictures[image] = thumbnail(sample.image, key=image.key)
    return pictures


def thumbnail(image: bytes, *, key: str) -> str:
    """Return an encoded image as a JPEG of at most PIXELS pixels a side, as a data URI."""
    small = PIL.Image.fromarray(decode(image, key=key))
    small.thumbnail((PIXELS, PIXELS))
    return f"data:image/jpeg;base64,{base64.b64encode(encode(np.asarray(small), 'JPEG')).decode()}"


def _csv(found: Audit) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(found.to_dict()["suspects"] or ())
    return text.getvalue().encode()


def _page(found: Audit, top: int, pictures: dict[Image, str], *, has_pictures: bool) -> str:
    environment = templates()
    environment.filters["percent"] = lambda share: percent(share).replace(" ", "\N{NO-BREAK SPACE}")
    names: dict[str, Any] = {"found": found, "top": top, "pictures": pictures, "has_pictures": has_pictures}
    text = {"class_text": lambda label: class_text(found, label), "differ": differ}
    return environment.get_template("audit.html").render(**names, **text)
