"""The findings of a verification: problems, each with its fix, and what was checked."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.errors import DeitCliError, UsageError
from pipeline.images.source import Source
from pipeline.labels.comparing import Differences
from pipeline.labels.format import pin_of
from pipeline.labels.labelset import LabelSet
from pipeline.text import byte_size, count


@dataclass(frozen=True)
class Problem:
    """A problem found by verification.

    Attributes:
        file: the file with the problem: a path inside the set, or the location of the images.
        rule: name of the check: `plan`, `manifest`, `pin`, `signature`, `sealed`, `present`, `length`, `sha256`, `content`,
            `source`, `images`, `probe`, `teacher`.
        text: found and expected values, with the full name of the file.
        way_out: instructions for fixing the problem.
    """

    file: str
    rule: str
    text: str
    way_out: str

    def __str__(self) -> str:
        return f"{self.text}. {self.way_out}" if self.way_out else self.text


@dataclass(frozen=True)
class Flip:
    """A view for which the teacher now gives another class than the stored one.

    Attributes:
        margin: difference between the two largest probabilities, 0..1; the maximum of the stored and the new one.
    """

    shard: str
    key: str
    view: int
    stored: int
    now: int
    margin: float

    def __str__(self) -> str:
        return (
            f"view {self.view} of {self.key!r} of {self.shard}: class {self.stored} is stored, the teacher says"
            f" {self.now} with a margin of {self.margin:.2g}"
        )


@dataclass(frozen=True)
class Relabelled:
    """The agreement of stored and new answers.

    Attributes:
        views: number of views that were compared.
        agreeing: number of views whose hard label is the same.
        mean_kl: mean KL(stored || new) in nats over the kept classes and the rest; None with K = 0.
        max_kl: maximum KL divergence of a view, in nats; None with K = 0.
        max_difference: maximum change of a kept probability; None with K = 0.
        flips: views whose hard label changed, in descending order of margin.
        rounding: maximum change of a probability that rounding on the old and new devices and dtypes explains.
        stored_rounding: maximum change of a probability that the precision of the stored values explains.
    """

    views: int
    agreeing: int
    mean_kl: float | None
    max_kl: float | None
    max_difference: float | None
    flips: tuple[Flip, ...]
    rounding: float
    stored_rounding: float

    def problems(self) -> list[str]:
        """Return the differences that rounding does not explain, one line each."""
        wrong = [flip for flip in self.flips if flip.margin > self.rounding]
        lines = [str(flip) for flip in wrong[:10]]
        if len(wrong) > 10:
            lines.append(f"and {len(wrong) - 10:,} more views with another class")
        limit = self.rounding + self.stored_rounding
        if self.max_difference is not None and self.max_difference > limit:
            lines.append(
                f"a stored probability differs by {self.max_difference:.3g}, rounding explains at most {limit:.3g}"
            )
        return lines

    def describe(self) -> str:
        """Return the comparison as one readable line."""
        text = f"{self.views:,} views labelled again: {100 * self.agreeing / self.views:.2f} % of hard labels agree"
        if self.mean_kl is not None:
            text += f", KL {self.mean_kl:.2g} nats (maximum {self.max_kl:.2g}), probabilities within {self.max_difference:.2g}"
        near = self.near_flips()
        return text + (
            f"; {count(len(near), 'flip')} with a margin up to {near[0].margin:.2g}, explained by rounding"
            if near
            else ""
        )

    def near_flips(self) -> list[Flip]:
        """Return the flips that rounding explains, in descending order of margin."""
        return [flip for flip in self.flips if flip.margin <= self.rounding]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self) | {"flips": [asdict(flip) for flip in self.flips]}


@dataclass
class Report:
    """The result of a verification: the checks made and the problems found.

    Attributes:
        location: folder or URL of the label set.
        label_set: label set; None if plan or manifest are damaged.
        manifest_sha256: hash of the bytes of the manifest; None without a manifest.
        files: number of files that were read.
        bytes: size of these files.
        problems: all problems that were found.
        notes: useful information that is not a problem.
        source: images; None if they were not opened.
        pixels: maximum mean pixel difference of a replay probe, in levels of 255; None if none was rendered.
        images: number of images that were compared; None if none were.
        differences: differences between these images and the labelled images.
        signed_by: key or identity that signed the manifest; None if signatures were not checked.
        relabelled: comparison with new answers of the teacher; None if it was not requested.
    """

    location: str
    label_set: LabelSet | None = None
    manifest_sha256: str | None = None
    files: int = 0
    bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    source: Source | None = None
    pixels: float | None = None
    images: int | None = None
    differences: Differences = field(default_factory=Differences)
    signed_by: str | None = None
    relabelled: Relabelled | None = None

    @contextlib.contextmanager
    def noting(self, file: object, rule: str, way_out: str = "") -> Iterator[None]:
        """Turn an error raised inside the block into a problem; a UsageError is raised as usual."""
        try:
            yield
        except UsageError:
            raise
        except DeitCliError as error:
            if all(error.what != known.text for known in self.problems):  # otherwise already reported
                self.problems.append(Problem(str(file), rule, error.what, error.fix or way_out))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, for machines."""
        return {
            "location": self.location,
            "sound": not self.problems,
            "labelset_id": self.label_set.plan.labelset_id if self.label_set else None,
            "manifest": pin_of(self.manifest_sha256) if self.manifest_sha256 else None,
            "files": self.files,
            "bytes": self.bytes,
            "problems": [vars(problem) for problem in self.problems],
            "notes": self.notes,
            "probes": None if self.pixels is None else {"mean_difference_of_255": self.pixels},
            "images": None if self.images is None else {"compared": self.images} | vars(self.differences),
            "signed_by": self.signed_by,
            "teacher": self.relabelled.to_dict() if self.relabelled else None,
        }

    def summary(self) -> str:
        """Return the number of problems, and their rules, as text."""
        rules = Counter(problem.rule for problem in self.problems)
        kinds = ", ".join(f"{count:,} {rule}" for rule, count in rules.most_common())
        return f"{len(self.problems):,} {'problem' if len(self.problems) == 1 else 'problems'} ({kinds})"


def verify_lines(report: Report) -> str:
    """Return a report as lines: all problems, then notes, then the checks that passed."""
    lines = [
        *(f"{problem.rule}: {problem}" for problem in report.problems),
        *(f"note: {note}" for note in report.notes),
    ]
    bad = {problem.rule for problem in report.problems}
    if not bad & {"plan", "manifest", "sealed", "present", "length", "sha256", "content"}:
        lines.append(
            f"{count(report.files, 'file')}: lengths, hashes, schemas and rows match the manifest ({byte_size(report.bytes)})"
        )
    else:
        lines.append(f"{count(report.files, 'file')} checked ({byte_size(report.bytes)})")
    if report.manifest_sha256:
        lines.append(
            f"manifest {pin_of(report.manifest_sha256)}{f', signed by {report.signed_by}' if report.signed_by else ''}"
        )
    if report.pixels is not None:
        exact = "every pixel equal" if not report.pixels else f"mean difference up to {report.pixels:.3f} of 255"
        probes = len(report.label_set.manifest.probes) if report.label_set else 0
        lines.append(f"{count(probes, 'replay probe')} rendered again: {exact}")
    if report.images is not None and not bad & {"source", "images"}:
        lines.append(
            f"{count(report.images, 'image')} compared: keys, class labels and bytes are those of the labelled images"
        )
    if report.relabelled:
        lines.append(report.relabelled.describe())
        lines += [f"note: {flip}" for flip in report.relabelled.near_flips()[:10]]
    return "\n".join(lines)
