"""The exception tree. Every error says the rule, the value and the way out; only `cli` turns them into one line.

DeitCliError                    exit code 1: cannot
├── UsageError                  exit code 2: a value the user passed is out of its range
│   └── RecipeError             a recipe that cannot be rendered
├── StorageError                a file that cannot be read, written or published
│   ├── RemoteFileMissing       there is no file at a URL
│   ├── RemoteFileRefused       a server gives no access to it
│   └── RemoteFileCorrupt       what a URL gives has not the promised length or hash
├── SourceError                 the original images: missing, ambiguous, damaged archive
│   └── BadImageError           one image that cannot be decoded; carries its key
├── TeacherError                wrong classes, wrong weights, not accurate enough
│   └── NonFiniteTeacherError   NaN or infinity in the teacher's outputs; carries their positions in the batch
├── WorkerError                 a process was lost: killed, out of memory, hanging
├── LabelSetError               anything wrong with a label set
│   ├── LabelSetCorrupt         bytes that are not what the manifest promises
│   ├── LabelSetMismatch        sound, but made from another recipe, teacher, source or format
│   ├── LabelSetIncomplete      not sealed: rows are missing
│   ├── ReplayError             this machine renders other pixels than the teacher saw
│   └── SignatureError          a signature that is missing, damaged, or of somebody or something else
├── ImportedLabelsError         labels of another format are damaged, or not in its layout
├── CheckpointError             a checkpoint that is damaged or belongs to another run
├── TrainingError               the run cannot go on (non-finite loss, say)
└── StoppedError                exit code 128 + signal: a signal stopped the run after a checkpoint
"""

from typing import Self


class DeitCliError(Exception):
    """Base of every error that this project raises on purpose. `str(error)` is `what`, and after it the fix.

    Attributes:
        what: the rule that was broken and the value that broke it.
        fix: what the user can do about it, a sentence without its full stop; None where `what` says all.
    """

    exit_code = 1

    def __init__(self, *args: object, fix: str | None = None) -> None:
        super().__init__(*args)
        self.fix = fix

    @property
    def what(self) -> str:
        """What is wrong, without the fix."""
        return str(self.args[0]) if self.args else type(self).__name__

    def __str__(self) -> str:
        return f"{self.what}. {self.fix}" if self.fix else self.what

    def with_fix(self, fix: str) -> Self:
        """Return the error itself, with this fix unless it has one."""
        self.fix = self.fix or fix
        return self


class UsageError(DeitCliError):
    """A value that the user passed is out of its range, or two of them contradict each other."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe that cannot be rendered: unknown field, value out of range."""


class StorageError(DeitCliError):
    """A file that cannot be read, written or published."""


class RemoteFileMissing(StorageError):
    """There is no file at a URL."""


class RemoteFileRefused(StorageError):
    """A server gives no access to a file."""


class RemoteFileCorrupt(StorageError):
    """What a URL gives does not have the length or the hash that was promised."""


class SourceError(DeitCliError):
    """The original images cannot be used: missing, ambiguous, or a damaged archive."""


class BadImageError(SourceError):
    """One image cannot be decoded.

    Attributes:
        key: the sample key of the image.
        reason: what is wrong with it, without the key.
    """

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(key, reason)
        self.key, self.reason = key, reason

    @property
    def what(self) -> str:
        """The key and the reason."""
        return f"image {self.key!r}: {self.reason}"


class TeacherError(DeitCliError):
    """The teacher cannot label this source: wrong classes, wrong weights, not accurate enough."""


class NonFiniteTeacherError(TeacherError):
    """The teacher answered NaN or infinity; the argmax of that is a valid class, so it must never be stored.

    Attributes:
        positions: positions of the views in the batch.
    """

    def __init__(self, what: str, positions: tuple[int, ...], fix: str | None = None) -> None:
        super().__init__(what, positions, fix=fix)
        self.positions = positions


class WorkerError(DeitCliError):
    """A process of ours was lost: killed, out of memory, or hanging."""


class LabelSetError(DeitCliError):
    """Anything wrong with a label set."""


class LabelSetCorrupt(LabelSetError):
    """Bytes of the label set are not what its manifest promises."""


class LabelSetMismatch(LabelSetError):
    """The label set is sound, but was made from another recipe, teacher, source or format version."""


class LabelSetIncomplete(LabelSetError):
    """The label set is not sealed: some of its rows do not exist yet."""


class ReplayError(LabelSetError):
    """This machine renders other pixels than those the teacher answered for."""


class SignatureError(LabelSetError):
    """The manifest has no signature, or one that is damaged, of another signer, or of another manifest."""


class ImportedLabelsError(DeitCliError):
    """Labels of another format cannot be imported: damaged, unsafe, or not in its layout."""


class CheckpointError(DeitCliError):
    """A checkpoint is damaged, or belongs to another run."""


class TrainingError(DeitCliError):
    """The run cannot go on."""


class StoppedError(DeitCliError):
    """A signal stopped the run, and all of it is saved."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message, signal_number)
        self.exit_code = 128 + signal_number
