"""Checks of a bucket with temporary files: writing small and large files, and keeping other writers' files."""

import os
import time

from pipeline.doctor.findings import Section
from pipeline.errors import StorageError
from pipeline.storage.atomic import temporary_name
from pipeline.storage.place import Place, open_place
from pipeline.storage.uploads import remove_url
from pipeline.text import byte_size

TRIED_BYTES = 8 * 2**20


def examine_bucket(url: str) -> Section:
    """Run the operations of label set writers at a URL with small temporary files, and return the findings."""
    section = Section(f"bucket {url}")
    try:
        place = open_place(url)
        place.refuse_unwritable()
        if place.takes_one_at_a_time:
            section.row("writing", "not tried, because each file would be a commit")
        else:
            _try_writing(section, place)
    except StorageError as error:
        section.row("writable", "no")
        section.problem(error.what, error.fix or "Check address and credentials")
    return section


def _try_writing(section: Section, place: Place) -> None:
    small, large = (place / temporary_name() for _ in range(2))
    try:
        began = time.monotonic()
        small.put(b"one")
        each = time.monotonic() - began
        second = small.put(b"two")
        kept = small.read(max_bytes=3) == b"one"
        data = os.urandom(TRIED_BYTES)
        began = time.monotonic()
        large.put(data)
        pace = len(data) / max(1e-9, time.monotonic() - began)
    finally:
        for file in (small, large):
            _delete(section, str(file))
    section.row("writable", "yes")
    section.row("a small file", f"{1000 * each:.0f} ms", {"seconds": each})
    section.row(
        "writing", f"{byte_size(pace)}/s over {byte_size(len(data))}", {"bytes_per_s": pace, "bytes": len(data)}
    )
    section.row("creating only", "yes" if kept and not second else "no", kept and not second)
    if second or not kept:
        section.warning(
            f"{place} ignores conditional writes (S3: If-None-Match), so the last of two writers of a file wins",
            "Write there from one machine at a time, or use a store that supports conditional writes",
        )


def _delete(section: Section, url: str) -> None:
    """Delete a test file; report it if this user may write but not delete."""
    try:
        remove_url(url)
    except Exception as error:  # each store has its own exceptions, and the test is over
        section.warning(f"{url} could not be deleted: {str(error)[:200]}", "Delete it if it exists")
