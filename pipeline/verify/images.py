"""Checks of images, and of the pixels rendered from them, against a label set."""

import copy
import threading

import xxhash

from pipeline.errors import DeitCliError, SourceError
from pipeline.images.source import Source
from pipeline.labels.comparing import Comparison, Listing, check_source, compare_names, labelled_part, listing_of
from pipeline.labels.format import DAMAGED_MANIFEST, MANIFEST_NAME
from pipeline.labels.labelset import LabelSet
from pipeline.labels.tables import SampleRows
from pipeline.machine.progress import Progress
from pipeline.machine.threads import ProgressCounter, in_threads
from pipeline.settings.configs import VerifyConfig
from pipeline.verify.report import Problem, Report

OTHER_DATA = "Pass the --data that was labelled, or repair this copy"
OTHER_IMAGES = (
    "The labels belong to other images than the label set contains: fetch the damaged files again, or ask its authors"
)


def check_images(
    report: Report, label_set: LabelSet, config: VerifyConfig, *, threads: int, progress: Progress
) -> Source | None:
    """Compare images and replay probes with the label set, and return the images; None after a `source` problem.

    If the set contains no images and `config.data` is None, only keys, class labels and the images of the probes are
    compared.
    """
    own = config.data is None and label_set.has_images
    location = label_set.place if own else config.data or label_set.plan.source.location
    source, before = None, len(report.problems)
    with report.noting(location, "source", "Pass --data, or --no-probes to leave the images out"):
        source = labelled_part(label_set, label_set.open_source(config.data, options=config.options))
        if config.data is None:
            check_source(label_set, source)
    if source is None:
        return None
    if own or config.data is not None:
        way_out = OTHER_IMAGES if own else OTHER_DATA
        compare_images(report, label_set, source, threads=threads, progress=progress, way_out=way_out)
    if any(problem.rule == "source" for problem in report.problems[before:]):
        return None
    if config.probes:
        _check_probes(report, label_set, source)
    return source


def compare_images(
    report: Report,
    label_set: LabelSet,
    source: Source,
    *,
    threads: int,
    progress: Progress = lambda _: None,
    way_out: str = OTHER_DATA,
) -> None:
    """Compare keys, class labels and hashes of all images with those of the labelled images; report the differences.

    Several source shards are read at a time; only differences are kept in memory.
    """
    names = [shard.name for shard in source.shards]
    for what, labelled, found in (
        ("class", label_set.plan.source.class_names, source.class_names),
        ("shard", label_set.shards, names),
    ):
        if (text := compare_names(what, labelled, found, limit=10)) != "":
            report.problems.append(Problem(source.location, "source", f"{source.location}: {text}", way_out))
    shards = list(dict.fromkeys((*label_set.shards, *names)))
    count_one = ProgressCounter("compare", len(shards), progress, unit="source shards")
    comparison, local = Comparison(), threading.local()
    report.images = 0

    def read(shard: str) -> tuple[Listing, Listing] | DeitCliError:
        own = local.__dict__.setdefault("label_set", copy.copy(label_set))  # one cache of recent files per thread
        try:
            samples = own.samples(shard) if shard in label_set.shards else None
            labelled = (
                Listing(samples.key, samples.class_label, samples.image_xxh3) if samples is not None else Listing()
            )
            found = _listed(source, shard, samples) if shard in names else Listing()
        except DeitCliError as error:
            return error
        return labelled, found

    for shard, result in in_threads(shards, read, threads):
        if isinstance(result, DeitCliError):
            with report.noting(source.location if isinstance(result, SourceError) else shard, "images", way_out):
                raise result
        else:
            report.images += len(result[1].keys)
            comparison.add(shard, *result)
        count_one()
    report.differences = comparison.result()
    report.differences.sort()
    report.problems += [
        Problem(source.location, "images", f"{source.location}: {line}", way_out)
        for line in report.differences.describe(limit=10)
    ]


def _listed(source: Source, shard: str, labelled: SampleRows | None) -> Listing:
    """Read every image of a source shard in order, and return the listing with their hashes."""
    there = source.shard(shard)
    hashes = [xxhash.xxh3_128_digest(sample.image) for sample in there]
    return listing_of(there, labelled, hashes)


def _check_probes(report: Report, label_set: LabelSet, source: Source) -> None:
    """Render all probes at once; if that fails, render them one by one, so that each failing probe is reported."""
    from pipeline.labels.replay import compare_probes  # imported here, so that the other checks do not need torch

    probes = label_set.manifest.probes
    if not probes:
        text = f"{label_set.place} has no replay probes, so its labels cannot be checked against pixels"
        report.problems.append(Problem(MANIFEST_NAME, "probe", text, DAMAGED_MANIFEST))
    try:
        report.pixels = compare_probes(probes, label_set.recipe, source, label_set.samples)
    except DeitCliError:
        for probe in probes:
            with report.noting(f"probe of row {probe.row} of {probe.shard}, view {probe.view}", "probe"):
                compare_probes([probe], label_set.recipe, source, label_set.samples)
