"""Format v1 in brief: names, limits, precisions, pins of a manifest, and repairs of a damaged set.

A pin names one manifest by the SHA-256 of its bytes, and so fixes every byte of its label set. A training configuration with
a pin gets these labels or an error, whatever happens to the folder or the bucket.
"""

import hashlib
import re
from typing import Literal

from pipeline.errors import LabelSetMismatch, UsageError

FORMAT = "deit-cli-labels"
VERSION = 1
Precision = Literal["float16", "float32", "log8"]
PLAN_NAME = "plan.json"
MANIFEST_NAME = "manifest.json"
SIGNATURE_NAME = "manifest.json.sig"  # next to the manifest, but not one of the set's files
NO_WEIGHTS = hashlib.sha256().hexdigest()  # weights_sha256 of a teacher of which no tensor was seen
IMPORT_NAME = "import.json"  # in a folder of imported labels, which is not a label set
IMPORT_FORMAT = "deit-cli-import"  # its version is VERSION too
IMAGES_FOLDER = "images"
MAX_TOPK = 4096
MAX_SHARD_SAMPLES = 2**22  # samples of one source shard, whose samples file is read as a whole
MAX_FILE_BYTES = 2**30  # size of a table of the set, which is read as a whole; ImageNet's take some MB
MAX_PROBES = 64  # each is rendered before training; 8 are stored
PIN = re.compile("sha256:[0-9a-fA-F]{64}")

# Repairs of a damaged label set. The maker of a set can compute a lost file again; a person who received the set can fetch
# it again. An error cannot know who reads it, so it names both repairs.
PULL = "fetch it again with deit-cli labels pull"
DAMAGED_FILE = "Fetch it again with deit-cli labels pull; if you made the set, delete it and run the same deit-cli precompute again"
MISSING_FILE = "Fetch it with deit-cli labels pull; if you made the set, run the same deit-cli precompute again"
INCOMPLETE_SET = "If you are making the set, run the same deit-cli precompute again to complete it; otherwise fetch it with deit-cli labels pull"
DAMAGED_PLAN = (
    "Fetch it again with deit-cli labels pull, or restore a copy of it; if you made the set, run the same deit-cli precompute"
    " with an empty --out to make it again"
)
DAMAGED_MANIFEST = (
    "Fetch it again with deit-cli labels pull; if you made the set, delete it and run the same deit-cli precompute"
    " again with --views for all views of the set: it checks every file and seals the set again"
)
REMOTE_FILE = "Ask the publisher of the set to repair it with deit-cli labels push"


def parse_pin(text: str) -> str:
    """Return the SHA-256 in a pin such as `sha256:3fa1...`, or raise UsageError."""
    if not PIN.fullmatch(text):
        raise UsageError(
            f"--expect-manifest must be sha256: and 64 hex digits, as `deit-cli labels info` prints it, got {text[:100]!r}"
        )
    return text.partition(":")[2].lower()


def pin_of(sha256: str) -> str:
    """Return the pin of a manifest with this SHA-256."""
    return f"sha256:{sha256}"


def check_pin(pin: str | None, sha256: str, name: object) -> None:
    """Raise LabelSetMismatch unless the bytes of a manifest have the SHA-256 of a pin; None allows any.

    Args:
        pin: `sha256:` and 64 hex digits.
        sha256: SHA-256 of the bytes to parse.
        name: name of the manifest in errors.
    """
    if pin is not None and parse_pin(pin) != sha256:
        raise LabelSetMismatch(
            f"{name} is not the pinned manifest: --expect-manifest says {pin_of(parse_pin(pin))}, it has {pin_of(sha256)}",
            fix=(
                f"The label set was changed, extended or replaced: {PULL} from a location that has the pinned one,"
                " or, if you know why it changed, pass the new pin"
            ),
        )


def damaged_json(name: object) -> str:
    """Return how to repair a damaged plan or manifest, by its file name."""
    return DAMAGED_PLAN if str(name).endswith("plan.json") else DAMAGED_MANIFEST


def damaged_file(views: range | None = None) -> str:
    """Return how to repair a damaged file of tables; `views` are those of a label shard."""
    return DAMAGED_FILE + _with_views(views)


def missing_file(views: range | None = None) -> str:
    """Return how to repair a missing file; `views` are those of a label shard."""
    return MISSING_FILE + _with_views(views)


def _with_views(views: range | None) -> str:
    return f" (--views {views.start}:{views.stop})" if views else ""
