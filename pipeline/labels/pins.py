"""A pin names one manifest by the SHA-256 of its bytes, and by that every byte of its label set.

Whoever writes it into a training configuration gets those labels or an error, whatever happens to the folder or the bucket.
"""

import re

from pipeline.errors import LabelSetMismatch, UsageError
from pipeline.labels.remedies import PULL

PIN = re.compile("sha256:[0-9a-fA-F]{64}")


def parse_pin(text: str) -> str:
    """Return the SHA-256 that a pin such as `sha256:3fa1...` names, or raise UsageError."""
    if not PIN.fullmatch(text):
        raise UsageError(
            f"--expect-manifest must be sha256: and 64 hex digits, as `deit-cli labels info` prints it, got {text[:100]!r}"
        )
    return text.partition(":")[2].lower()


def pin_of(sha256: str) -> str:
    """Return the pin of a manifest whose bytes have this SHA-256."""
    return f"sha256:{sha256}"


def check_pin(pin: str | None, sha256: str, name: object) -> None:
    """Raise LabelSetMismatch unless the bytes of a manifest have the SHA-256 that a pin names; None allows any.

    Args:
        pin: `sha256:` and 64 hex digits.
        sha256: of the bytes that are about to be parsed.
        name: of the manifest, for the error.
    """
    if pin is not None and parse_pin(pin) != sha256:
        raise LabelSetMismatch(
            f"{name} is not the pinned one: --expect-manifest says {pin_of(parse_pin(pin))}, it has {pin_of(sha256)}."
            f" The label set was changed, extended or replaced: {PULL} from where the pinned one lies, or, where you know"
            " why it changed, pass the new pin"
        )
