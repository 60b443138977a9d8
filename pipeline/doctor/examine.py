"""Doctor: check everything that the commands rely on, and report problems and their fixes before a command fails.

A failing check must not stop it: packages are imported in other processes, and a check that cannot run is a finding.
"""

import dataclasses
import json
import logging
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
from pipeline.errors import DeitCliError
from pipeline.storage.urls import local_path, working_folder

LABELS_TIMEOUT_S = 900.0  # the images may have to be downloaded

log = logging.getLogger("deit_cli.doctor")


def examine(
    *,
    out: str | None = None,
    labels: str | None = None,
    data: str | None = None,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> list[Section]:
    """Check machine, packages and decoders, and on request a folder and a label set; return the findings.

    Args:
        out: folder or URL to write to, or None.
        labels: folder or URL of the label set whose replay probes are rendered again, or None.
        data: images of the label set; None: their location at labelling.
        options: how `data` is read: fields of `SourceOptions`, whose module needs packages that may be broken.
    """
    sections = [
        *_looked("machine", lambda: [examine_machine()]),
        *_looked("packages", lambda: examine_packages(Path.cwd())),
    ]
    if out is not None:
        sections += _looked(f"writing to {out}", lambda: _examine_place(out))
    if labels is not None:
        sections += _looked(f"labels {labels}", lambda: [_examine_apart(labels, data, options)])
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


def _examine_apart(labels: str, data: str | None, options: Mapping[str, Any]) -> Section:
    """Examine a label set in another process, because a broken decoder may end it; return the findings."""
    arguments = json.dumps([labels, data, dict(options)])
    (trial,) = try_all([f"{__name__}:tell_labels {arguments}"], timeout_s=LABELS_TIMEOUT_S)
    section = Section(f"labels {labels}")
    if trial.result is None:
        section.problem(f"the label set could not be checked: {trial.error}", "Repair the packages named above")
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
