"""The images of a study: what identifies them, and the files that a scale makes of them.

The id of images covers their keys and class labels, not their bytes: those of a large source take an hour to read. So a study
remembers the bytes of a few images, and refuses others under the same names.

scikit-learn's digits and the first images of Parquet files are written to a folder, from which all steps read.
"""

import bisect
import contextlib
import hashlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UsageError
from pipeline.settings.configs import SourceConfig
from pipeline.storage.atomic import make_folder, replace_file
from pipeline.storage.json import pretty_json, read_json, sha256_json
from pipeline.storage.urls import local_path
from trainer.studies.study import DIGITS, Scale

if TYPE_CHECKING:
    from pipeline.images.source import Source

LOOKED_AT = 16  # images whose bytes are remembered
REMEMBERED = "images.json"  # in the folder of a study: id of images -> SHA-256 of the bytes of some of them


@dataclass(frozen=True)
class Images:
    """A source of images.

    Attributes:
        location: path or URL.
        id: id of its keys and class labels.
        count: number of images; 0 if it is not known.
        sha256: hash of the bytes of some of its images; None if none were read.
    """

    location: str
    id: str
    count: int
    sha256: str | None = None


def images_at(location: str, **reading: Any) -> Images:
    """Open a source and return what identifies it: the id that a label set records, for a remote one its location.

    Args:
        location: as in `open_source`.
        reading: how the images are read, settings of `SourceConfig`.
    """
    from pipeline.images.source import open_source
    from pipeline.labels.comparing import record_of

    source = open_source(location, options=SourceConfig(**reading).options)
    if source.is_remote:  # its keys are known only after all of it was downloaded
        names = [shard.name for shard in source.shards]
        return Images(location, sha256_json([location, names, source.class_names, *([reading] if reading else [])]), 0)
    here = str(Path(location).absolute()) if local_path(location) is not None and Path(location).exists() else location
    identity = record_of(source).id
    if source.options.image_key is not None:  # the record's id has no images
        identity = sha256_json([identity, source.options.image_key])
    return Images(here, identity, source.num_samples, _sha256_of_some(source))


def _sha256_of_some(source: "Source") -> str:
    """Return the SHA-256 of the bytes of LOOKED_AT images, spread evenly over a source; of all if it has fewer."""
    starts = list(itertools.accumulate((len(shard) for shard in source.shards), initial=0))
    found = hashlib.sha256()
    for at in sorted({number * starts[-1] // LOOKED_AT for number in range(LOOKED_AT)} if starts[-1] else ()):
        shard = bisect.bisect_right(starts, at) - 1
        found.update(hashlib.sha256(source.shards[shard][at - starts[shard]].image).digest())
    return found.hexdigest()


def check_remembered(images: Sequence[Images], out: Path) -> dict[str, str]:
    """Return what a study remembers of its images, with these added: id -> SHA-256 of some bytes.

    Raises:
        UsageError: images have the keys and class labels of those that finished steps used, and other bytes.
    """
    path = out / REMEMBERED
    known: dict[str, str] = read_json(path) if path.is_file() else {}
    for each in images:
        if each.sha256 is not None and known.setdefault(each.id, each.sha256) != each.sha256:
            raise UsageError(
                f"{each.location} has the names and class labels of images that the steps in {out} used, but other bytes",
                fix=f"Pass another --out, or the same images; to use {out} all the same, delete {path}",
            )
    return known


def remember(images: Sequence[Images], out: Path) -> None:
    """Check images, see `check_remembered`, and remember them for the next start of a study."""
    replace_file(out / REMEMBERED, pretty_json(check_remembered(images, out)))


def images_of(scale: Scale, folder: Path) -> tuple[Images, Images]:
    """Return training and evaluation images; scikit-learn's digits are written to a folder."""
    training, evaluation = scale.data, scale.eval_data
    if DIGITS in (training, evaluation):
        _write_digits(folder)
    training = str(folder / "training") if training == DIGITS else training
    evaluation = str(folder / "evaluation") if evaluation in (DIGITS, None) else evaluation
    if scale.images is not None:
        training = _first_images(training, scale.images, folder)
    return images_at(training, **scale.reading), images_at(evaluation, **scale.eval_reading)


def _first_images(location: str, number: int, folder: Path) -> str:
    """Write the first images of Parquet files, with their class names, to a folder, and return the path.

    Raises:
        UsageError: the images are not in local Parquet files, or there are too few.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = Path(location)
    files = sorted(source.glob("*.parquet")) if source.is_dir() else [source]
    if not files or not all(file.suffix == ".parquet" and file.is_file() for file in files):
        raise UsageError(
            f"images: {number} needs --data in local Parquet files, got {location}", fix="Leave out `images`"
        )
    known = [[str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    # A folder for each choice of files. The name of the file stays the same, because it is a part of the source's id.
    path = folder / sha256_json(known)[:12] / f"first-{number}.parquet"
    if not path.is_file():
        table = pa.concat_tables([pq.read_table(file) for file in files])
        if len(table) < number:
            raise UsageError(f"{location} has {len(table):,} images, the scale asks for {number:,}")
        replace_file(path, lambda file: pq.write_table(table.slice(0, number), file, row_group_size=1024))
    return str(path)


def _write_digits(folder: Path) -> None:
    """Write the digits, all with their class labels; each folder appears whole."""
    if (folder / "training").is_dir():
        return
    from trainer.evidence.demo import TRAINING, write_digits

    make_folder(folder)
    for remains in folder.glob(".tmp-digits-*"):
        shutil.rmtree(remains)
    temporary = Path(tempfile.mkdtemp(prefix=".tmp-digits-", dir=folder))
    write_digits(temporary, labelled=TRAINING)
    os.replace(temporary / "evaluation", folder / "evaluation")
    os.replace(temporary / "training", folder / "training")  # last: it says that both are there
    shutil.rmtree(temporary)


@contextlib.contextmanager
def data_folder(scale: Scale, out: Path) -> Iterator[Path]:
    """Return the folder for such files: that of the study, or else one that is removed at the end."""
    if (DIGITS not in (scale.data, scale.eval_data) and scale.images is None) or (out / "data").is_dir():
        yield out / "data"
        return
    temporary = Path(tempfile.mkdtemp(prefix="deit-cli-compare-"))
    try:
        yield temporary / "data"
    finally:
        shutil.rmtree(temporary)
