"""Replay probes: proof that this machine renders the pixels that the teacher saw.

A probe holds the hash of one view's pixels, some pixels for measuring differences, and the drawn mix. They
are taken from the same batches that the teacher answered for, and rendered again before any training on the labels.
"""

import base64
import hashlib
import logging
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from pipeline.errors import LabelSetCorrupt, LabelSetMismatch, ReplayError
from pipeline.images.source import Sample, Source
from pipeline.labels.combined import Labels, sets_of
from pipeline.labels.comparing import check_names, check_shard, check_source
from pipeline.labels.labelset import LabelSet
from pipeline.labels.manifest import Probe
from pipeline.labels.tables import SampleRows
from pipeline.pixels.render import render_view
from pipeline.repeats import warn_counted
from pipeline.views.pairs import Mix, pairs_of
from pipeline.views.recipe import Recipe

log = logging.getLogger("deit_cli.replay")

SAMPLED_BYTES = 768
# Maximum mean difference, in levels of 255, that is accepted: what rounding explains in renderer 1 (for example another SIMD path of a
# library), and another image decoder in renderer 2. One level of brightness is 1.0, and another crop or resize gives more.
TOLERANCE = 0.25


class Cause(NamedTuple):
    """Why pixels differ from the labelled ones, in the words of messages.

    Attributes:
        small: cause of an accepted difference.
        limit: what TOLERANCE is.
        fix: way out of a larger difference.
    """

    small: str
    limit: str
    fix: str


CAUSES = {
    1: Cause(
        "rounding only",
        f"at most {TOLERANCE} is rounding",
        "Compare the installed versions with those in `deit-cli labels info`",
    ),
    2: Cause(
        "another image decoder, or a damaged kernel",
        f"at most {TOLERANCE} may be another image decoder",
        "Run deit-cli doctor, which tries the image decoders and the kernel, and compare the versions of simplejpeg and Pillow with"
        " those in `deit-cli labels info`",
    ),
}  # by renderer


def make_probe(pixels: NDArray[np.uint8], *, shard: str, row: int, view: int, partner: int | None, mix: Mix) -> Probe:
    """Return a probe of one rendered view, uint8 [H, W, 3]."""
    return Probe(
        shard=shard,
        row=row,
        view=view,
        pixels_sha256=_sha256(pixels),
        sample=base64.b64encode(_sampled(pixels).tobytes()).decode(),
        partner=partner,
        lam=mix.lam,
        box=mix.box,
    )


def check_image(sample: Sample, samples: SampleRows, row: int, *, shard: str) -> None:
    """Raise LabelSetMismatch unless this is the image, by key and bytes, of row `row` of `samples`."""
    if sample.key != samples.key[row]:
        raise LabelSetMismatch(
            f"{shard}: the label belongs to {samples.key[row]!r}, the source has {sample.key!r} in this row"
        )
    found = xxhash.xxh3_128_digest(sample.image)
    if found != samples.image_xxh3[row]:
        raise LabelSetMismatch(
            f"image {sample.key!r} of {shard} has other bytes than the one that was labelled"
            f" ({len(sample.image)} bytes with XXH3 {found.hex()[:8]}…, labelled: {samples.image_bytes[row]} bytes"
            f" with {samples.image_xxh3[row].hex()[:8]}…)",
            fix=("Pass the --data that was labelled; deit-cli labels verify --data lists all differences"),
        )


def check_replay(labels: Labels, source: Source) -> float:
    """Compare the whole source with the labelled one, render every probe again, and return the maximum difference.

    Of several label sets, only probes in source shards that all sets have are rendered.

    Returns:
        the maximum mean difference over the probes, in levels of 255; 0.0 if every pixel is equal.

    Raises:
        ReplayError: mixes differ, or pixels by more than TOLERANCE.
        LabelSetMismatch: an image has other bytes than the one that was labelled.
    """
    check_source(labels, source)
    return max(
        compare_probes(probes, labels.recipe, source, label_set.samples) for label_set, probes in _probes_of(labels)
    )


def check_start(labels: Labels, source: Source) -> float:
    """Check what can be checked in a second, however large the source is; return and raise as `check_replay` does.

    Compared are the names of source shards and classes, and of the source shards that have probes (eight at most for
    each label set that this version wrote) keys, class labels, images and pixels. Whoever uses another source shard calls `check_shard` first.
    """
    check_names(labels, source)
    worst = 0.0
    for label_set, probes in _probes_of(labels):
        for name in dict.fromkeys(probe.shard for probe in probes):
            check_shard(labels, source, name, label_set.samples(name))
        worst = max(worst, compare_probes(probes, labels.recipe, source, label_set.samples))
    return worst


def _probes_of(labels: Labels) -> Iterator[tuple[LabelSet, list[Probe]]]:
    """Yield each label set with its probes in source shards that all label sets have."""
    shards = {*labels.shards}
    for label_set in sets_of(labels):
        if not label_set.manifest.probes:
            raise LabelSetCorrupt(
                f"{label_set.place} has no replay probes, so its labels cannot be checked against pixels"
            )
        elsewhere = {*label_set.shards} - shards
        probes = [probe for probe in label_set.manifest.probes if probe.shard not in elsewhere]
        if not probes:
            message = (
                "no replay probe of %s is in a source shard that all label sets have: no pixels were compared for it"
            )
            log.warning(message, label_set.place)
        yield label_set, probes


def compare_probes(probes: Iterable[Probe], recipe: Recipe, source: Source, samples_of) -> float:
    """Render probes again, and return the maximum difference; `samples_of(shard)` gives the samples of a source shard."""
    worst = 0.0
    for probe in probes:
        samples = samples_of(probe.shard)
        if probe.row >= len(samples):
            raise LabelSetCorrupt(
                f"a replay probe names row {probe.row} of {probe.shard}, which has {len(samples)} rows"
            )
        sample = source.shard(probe.shard)[probe.row]
        check_image(sample, samples, probe.row, shard=probe.shard)
        _check_mix(probe, recipe, samples)
        worst = max(worst, _pixel_difference(probe, recipe, sample))
    if worst:
        message = "replayed views differ from the labelled ones by up to %.3f of 255 on average: %s"
        cause = CAUSES[recipe.renderer].small
        warn_counted(log, "comparisons of replayed views that differ a little", message, worst, cause)
    return worst


def _check_mix(probe: Probe, recipe: Recipe, samples: SampleRows) -> None:
    partner, mix = pair_of(recipe, samples, probe.row, probe.view)
    same = partner == probe.partner and mix.box == probe.box and abs(mix.lam - probe.lam) < 1e-9
    if not same:
        raise ReplayError(
            f"view {probe.view} of row {probe.row} of {probe.shard} was mixed as (partner {probe.partner},"
            f" {probe.lam}, {probe.box}), this version mixes it as (partner {partner}, {mix.lam},"
            f" {mix.box})",
            fix="Train with the deit-cli version that labelled it",
        )


def pair_of(recipe: Recipe, samples: SampleRows, row: int, view: int) -> tuple[int | None, Mix]:
    """Return the partner's row (None without one) and the mix of one sample's view."""
    pairs = pairs_of(recipe, samples.key, samples.usable, view)
    pair = pairs.take(np.flatnonzero((pairs.rows == row).any(axis=1)))
    if not len(pair.rows):
        raise ReplayError(f"row {row} is not a usable sample")
    (mix,), (first, second) = pair.mixes(view), pair.rows[0].tolist()
    partner = second if row == first else first
    return (partner if partner >= 0 else None), mix


def rendered_view(
    label_set: LabelSet, source: Source, shard: str, samples: SampleRows, row: int, view: int
) -> NDArray[np.uint8]:
    """Render one view of the labelled image before mixing, and return it, uint8 [H, W, 3]."""
    sample = source.shard(shard)[row]
    check_image(sample, samples, row, shard=shard)
    return render_view(sample.image, label_set.recipe, sample.key, view)


def _pixel_difference(probe: Probe, recipe: Recipe, sample: Sample) -> float:
    pixels = render_view(sample.image, recipe, sample.key, probe.view)
    if _sha256(pixels) == probe.pixels_sha256:
        return 0.0
    then = _probe_sample(probe)
    now = _sampled(pixels)
    difference = float(np.abs(now.astype(int) - then).mean()) if now.shape == then.shape else 255.0
    if difference > TOLERANCE:
        cause = CAUSES[recipe.renderer]
        raise ReplayError(
            f"view {probe.view} of {sample.key!r} differs from the labelled pixels by {difference:.2f} of"
            f" 255 on average ({cause.limit}): the labels do not fit",
            fix=cause.fix,
        )
    return max(difference, 1e-3)  # the hash differs, so some pixel differs, even if no sampled one


def _probe_sample(probe: Probe) -> NDArray[np.uint8]:
    try:
        return np.frombuffer(base64.b64decode(probe.sample, validate=True), np.uint8)
    except ValueError as error:
        raise LabelSetCorrupt(f"the replay probe of row {probe.row} of {probe.shard} is not base64: {error}") from error


def _sampled(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    flat = pixels.reshape(-1)
    return flat[np.linspace(0, len(flat) - 1, min(SAMPLED_BYTES, len(flat))).astype(np.int64)]


def _sha256(pixels: NDArray[np.uint8]) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()
