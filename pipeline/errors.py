"""The exceptions of this project. Each states the rule, the value and the fix; only `cli` prints it as one line.

DeitCliError                    exit code 1: the command cannot do what was asked
├── UsageError                  exit code 2: a value that the user passed is out of range, or contradicts another
│   └── RecipeError             a recipe that cannot be rendered
├── StorageError                a file that cannot be read, written or published
│   ├── DiskFullError           a disk or a quota that is full
│   ├── RemoteFileMissing       no file exists at the URL
│   ├── RemoteFileRefused       the server denies access to a file
│   └── RemoteFileCorrupt       a downloaded file does not have the promised length or hash
├── SourceError                 original images that are missing or ambiguous, or lie in a damaged archive
│   └── BadImageError           one image that cannot be decoded; carries its key
├── TeacherError                a teacher with the wrong classes or weights, or with too low an accuracy
│   └── NonFiniteTeacherError   NaN or infinity in the teacher's outputs; carries the views' positions in the batch
├── WorkerError                 a process of this run that was killed, ran out of memory or hangs
│   └── LoaderLostError         it was a loader process
├── LabelSetError               a label set that cannot be used
│   ├── LabelSetCorrupt         files that do not have the content that the manifest promises
│   ├── LabelSetMismatch        intact, but made from another recipe, teacher, source or format
│   ├── LabelSetIncomplete      not sealed: some rows are missing
│   ├── ReplayError             pixels rendered on this machine that differ from those the teacher saw
│   └── SignatureError          a signature that is missing, damaged, by another signer or for another manifest
├── ImportedLabelsError         labels of another format that are damaged, unsafe, or not in its layout
├── CheckpointError             a checkpoint that is damaged, or belongs to another run
├── TrainingError               training cannot continue, for example because the loss is not finite
└── StoppedError                exit code 128 + signal number: a signal stopped the run after it had saved a checkpoint
"""

from typing import Self


class DeitCliError(Exception):
    """Base class of every error that this project raises on purpose. `str(error)` is `what`, followed by the fix.

    Attributes:
        what: the rule that was broken and the value that broke it, without a full stop.
        fix: what the user can do about it, a sentence without a full stop; None if there is nothing to add to `what`.
        interrupts: the command did nothing wrong, so `cli` adds how to continue it, where it is one that continues.
    """

    exit_code = 1
    interrupts = False

    def __init__(self, *args: object, fix: str | None = None) -> None:
        super().__init__(*args)
        self.fix = fix

    @property
    def what(self) -> str:
        """Return the rule and the value, without the fix."""
        return str(self.args[0]) if self.args else type(self).__name__

    def __str__(self) -> str:
        return f"{self.what}. {self.fix}" if self.fix else self.what

    def with_fix(self, fix: str) -> Self:
        """Set the fix, unless the error already has one, and return the error itself."""
        self.fix = self.fix or fix
        return self


class UsageError(DeitCliError):
    """A value that the user passed is out of range, or contradicts another."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe that cannot be rendered: it has an unknown field, or a value out of range."""


class StorageError(DeitCliError):
    """A file that cannot be read, written or published."""


class DiskFullError(StorageError):
    """A disk or a quota that is full."""

    interrupts = True


class RemoteFileMissing(StorageError):
    """No file exists at the URL."""


class RemoteFileRefused(StorageError):
    """The server denies access to a file."""


class RemoteFileCorrupt(StorageError):
    """A downloaded file does not have the promised length or hash."""


class SourceError(DeitCliError):
    """The original images are missing or ambiguous, or lie in a damaged archive."""


class BadImageError(SourceError):
    """An image that cannot be decoded.

    Attributes:
        key: sample key of the image.
        reason: why the image cannot be decoded, without the key.
    """

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(key, reason)
        self.key, self.reason = key, reason

    @property
    def what(self) -> str:
        """Return the key and the reason."""
        return f"image {self.key!r}: {self.reason}"


class TeacherError(DeitCliError):
    """The teacher cannot label this source: its classes or weights are wrong, or its accuracy is too low."""


class NonFiniteTeacherError(TeacherError):
    """The teacher answered NaN or infinity, which must never be stored: its argmax would be a valid class.

    Attributes:
        positions: positions of these views in the batch.
    """

    def __init__(self, what: str, positions: tuple[int, ...], fix: str | None = None) -> None:
        super().__init__(what, positions, fix=fix)
        self.positions = positions


class WorkerError(DeitCliError):
    """A process of this run was killed, ran out of memory, or hangs."""


class LoaderLostError(WorkerError):
    """A loader process was killed, ran out of memory, or hangs."""

    interrupts = True


class LabelSetError(DeitCliError):
    """A label set cannot be used."""


class LabelSetCorrupt(LabelSetError):
    """A file of the label set does not have the content that the manifest promises."""


class LabelSetMismatch(LabelSetError):
    """The label set is intact, but was made from another recipe, teacher, source or format version."""


class LabelSetIncomplete(LabelSetError):
    """The label set is not sealed: some of its rows do not exist yet."""


class ReplayError(LabelSetError):
    """The pixels rendered on this machine differ from those that the teacher saw."""


class SignatureError(LabelSetError):
    """The signature of the manifest is missing, damaged, by another signer, or for another manifest."""


class ImportedLabelsError(DeitCliError):
    """Labels of another format are damaged, unsafe, or not in its layout."""


class CheckpointError(DeitCliError):
    """A checkpoint is damaged, or belongs to another run."""


class TrainingError(DeitCliError):
    """Training cannot continue, for example because the loss is not finite."""


class StoppedError(DeitCliError):
    """A signal stopped the run, after it had saved a checkpoint."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message, signal_number)
        self.exit_code = 128 + signal_number
