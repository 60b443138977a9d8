"""Doctor: check everything that the commands rely on, and report problems and their fixes before a command fails.

A failing check must not stop it: packages are imported in other processes, and a check that cannot run is a finding.
"""

import dataclasses
import json
import logging
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pipeline.doctor.findings import Finding, Row, Section
from pipeline.doctor.machine import examine_machine
from pipeline.doctor.packages import examine_packages, version_of
from pipeline.doctor.places import examine_folder
from pipeline.doctor.probing import first_line, try_all
from pipeline.errors import BadImageError, DeitCliError
from pipeline.storage.urls import local_path, working_folder
from pipeline.text import count

LABELS_TIMEOUT_S = 900.0  # the images may have to be downloaded
IMAGES_S = 600.0  # time to decode images in; one process decodes a few hundred a second
MOST_NAMED = 10  # damaged images in the report

log = logging.getLogger("deit_cli.doctor")


def examine(
    *,
    out: str | None = None,
    labels: str | None = None,
    data: str | None = None,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> list[Section]:
    """Check machine, packages and decoders, and on request a folder, a label set, and images; return the findings.

    Args:
        out: folder or URL to write to, or None.
        labels: folder or URL of the label set whose replay probes are rendered again, or None.
        data: images of the label set; None: their location at labelling. Without `labels`, images that are all decoded.
        options: how `data` is read: fields of `SourceOptions`, whose module needs packages that may be broken.
    """
    sections = [
        *_looked("machine", lambda: [examine_machine()]),
        *_looked("packages", lambda: examine_packages(Path.cwd())),
    ]
    if out is not None:
        sections += _looked(f"writing to {out}", lambda: _examine_place(out))
    if labels is not None:
        sections += _looked(
            f"labels {labels}", lambda: [_examine_apart(f"labels {labels}", tell_labels, labels, data, options)]
        )
    elif data is not None:
        sections += _looked(f"images {data}", lambda: [_examine_apart(f"images {data}", tell_images, data, options)])
    return sections


def _looked(title: str, look: Callable[[], list[Section]]) -> list[Section]:
    """Return the sections of an examination; if it fails, a section that reports the failure."""
    try:
        return look()
    except Exception as error:  # a broken machine may raise anything, and the rest of the report is still needed
        log.debug("%s", traceback.format_exc())
        section = Section(title)
        section.problem(f"this check failed: {first_line(error)}", "Run deit-cli -v doctor to see where")
        return [section]


def _examine_place(out: str) -> list[Section]:
    """Check a folder; for a URL, the bucket and its local working folder; return the findings."""
    if (folder := local_path(out)) is not None:
        return [examine_folder(folder)]
    from pipeline.doctor.buckets import examine_bucket  # imported here, so that other checks run without these packages

    return [examine_bucket(out), examine_folder(working_folder(out))]


def _examine_apart(title: str, tell: Callable[..., dict[str, Any]], *arguments: Any) -> Section:
    """Examine a label set or images in another process, because a broken decoder may end it; return the findings.

    Args:
        title: what is examined.
        tell: function of this module that returns the section as plain JSON values.
        arguments: its arguments, JSON values but for the last, a mapping of them.
    """
    given = json.dumps([*arguments[:-1], dict(arguments[-1])])
    (trial,) = try_all([f"{__name__}:{tell.__name__} {given}"], timeout_s=LABELS_TIMEOUT_S)
    section = Section(title)
    if trial.result is None:
        section.problem(f"{title} could not be checked: {trial.error}", "Repair the packages named above")
        return section
    section.rows += [Row(**row) for row in trial.result["rows"]]
    section.findings += [Finding(**finding) for finding in trial.result["findings"]]
    return section


def tell_labels(labels: str, data: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """Return the findings of `examine_labels` as plain JSON values."""
    return dataclasses.asdict(examine_labels(labels, data, options))


def examine_labels(labels: str, data: str | None, options: Mapping[str, Any] = MappingProxyType({})) -> Section:
    """Open a label set, render its replay probes again, compare package versions, and return the findings."""
    section = Section(f"labels {labels}")
    try:
        from pipeline.images.samples import SourceOptions
        from pipeline.labels.labelset import LabelSet
        from pipeline.labels.replay import CAUSES, check_replay
    except Exception as error:
        section.problem(f"a label set cannot be read: {first_line(error)}", "Repair the packages named above")
        return section
    try:
        label_set = LabelSet.open(labels)
        plan = label_set.plan
        section.row("label set", f"{plan.labelset_id[:12]}, views {label_set.views.start}:{label_set.views.stop}")
        section.row("teacher", plan.teacher.name)
        for name, text, value in compare_environments(label_set.manifest.environments):
            section.row(name, text, value)
        source = label_set.open_source(data, options=SourceOptions(**options))
        section.row("images", source.location)
        difference = check_replay(label_set, source)
    except DeitCliError as error:
        section.row("replay", "no")
        fix = error.fix or "Run deit-cli labels verify for details, or pass --data with another copy of the images"
        section.problem(error.what, fix)
        return section
    probes = len(label_set.manifest.probes)
    section.row(
        "replay",
        f"{probes} probes: {'every pixel equal' if not difference else f'differences up to {difference:.3f} of 255'}",
        {"probes": probes, "difference": difference},
    )
    if difference:
        section.warning(
            f"rendered pixels differ by up to {difference:.3f} of 255 from those that the teacher saw, which training accepts:"
            f" {CAUSES[plan.recipe.renderer].small}",
            "To get equal pixels, install the package versions that made the labels",
        )
    return section


def tell_images(data: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the findings of `examine_images` as plain JSON values."""
    return dataclasses.asdict(examine_images(data, options))


def examine_images(data: str, options: Mapping[str, Any] = MappingProxyType({})) -> Section:
    """Open images and decode them, all of them if that takes less than `IMAGES_S` seconds; return the findings."""
    section = Section(f"images {data}")
    try:
        from pipeline.images.decode import decode
        from pipeline.images.samples import SourceOptions
        from pipeline.images.source import open_source
    except Exception as error:
        section.problem(f"images cannot be read: {first_line(error)}", "Repair the packages named above")
        return section
    decoded, bad = 0, list[str]()
    end = time.monotonic() + IMAGES_S
    try:
        source = open_source(data, options=SourceOptions(**options))
        section.row("source", source.describe())
        places = ((shard, row) for shard in source.shards for row in range(len(shard)))
        for shard, row in places:
            try:
                decode(shard.read_image(row), key=shard.keys[row])
            except BadImageError as error:
                bad.append(f"{shard.file_of(row)} ({error.reason})")
            decoded += 1
            if time.monotonic() > end:
                break
    except DeitCliError as error:
        section.problem(error.what, error.fix or "Check --data")
        return section
    values = {"looked_at": decoded, "images": source.num_samples, "damaged": len(bad)}
    section.row(
        "decoded", f"{decoded - len(bad):,} of {decoded:,} that were looked at, of {source.num_samples:,}", values
    )
    if bad:
        more = f", and {len(bad) - MOST_NAMED:,} more" if len(bad) > MOST_NAMED else ""
        section.problem(
            f"{count(len(bad), 'image')} cannot be decoded: {', '.join(bad[:MOST_NAMED])}{more}",
            "Repair or delete them; precompute and pack leave them out with --on-bad-image skip",
        )
    return section


def compare_environments(recorded: Iterable[dict[str, str]]) -> list[tuple[str, str, dict[str, Any]]]:
    """Return a row for each recorded package: its name, its versions at labelling and here as text, and as values."""
    then: dict[str, list[str]] = {}
    for environment in recorded:
        for name, version in sorted(environment.items()):
            if version not in then.setdefault(name, []):
                then[name].append(version)
    rows: list[tuple[str, str, dict[str, Any]]] = []
    for name, versions in then.items():
        now = version_of(name)  # None for device and dtype, which are not packages
        made = ", ".join(versions)
        text = (
            f"{made} at labelling and here"
            if versions == [now]
            else f"{made} at labelling" + (f", {now} here" if now else "")
        )
        rows.append((name, text, {"then": versions, "here": now}))
    return rows
