"""What a bucket can do that label sets are written to: take a file once and not a second time, and how fast."""

import os
import time

from pipeline.doctor.findings import Section
from pipeline.errors import StorageError
from pipeline.storage.atomic import temporary_name
from pipeline.storage.remote import file_system, read_url
from pipeline.storage.uploads import put_bytes
from pipeline.storage.urls import check_url, is_web, join_url
from pipeline.text import byte_size

TRIED_BYTES = 8 * 2**20


def examine_bucket(url: str) -> Section:
    """Try what writers of label sets do at a URL, with small files that are deleted again."""
    section = Section(f"bucket {url}")
    try:
        scheme = check_url(url)
        if is_web(url):
            section.problem(f"{url} is on a web server, which takes no files", "Use s3://, gs:// or hf://, or a folder")
        elif scheme == "hf":
            section.row("writing", "not tried: each file would be a commit of its own")
        else:
            _try_writing(section, url)
    except StorageError as error:
        section.row("writable", "no")
        what, _, way_out = str(error).partition(". ")
        section.problem(what, way_out or "Check address and credentials")
    return section


def _try_writing(section: Section, url: str) -> None:
    small, large = (join_url(url, temporary_name()) for _ in range(2))
    try:
        began = time.monotonic()
        put_bytes(b"one", small)
        each = time.monotonic() - began
        second = put_bytes(b"two", small)
        kept = read_url(small, max_bytes=3) == b"one"
        data = os.urandom(TRIED_BYTES)
        began = time.monotonic()
        put_bytes(data, large)
        pace = len(data) / max(1e-9, time.monotonic() - began)
    finally:
        for place in (small, large):
            _delete(section, place)
    section.row("writable", "yes")
    section.row("a small file", f"{1000 * each:.0f} ms", {"seconds": each})
    section.row(
        "writing", f"{byte_size(pace)}/s over {byte_size(len(data))}", {"bytes_per_s": pace, "bytes": len(data)}
    )
    section.row("creating only", "yes" if kept and not second else "no", kept and not second)
    if second or not kept:
        section.warning(
            f"{url} gives a name a second time when it is asked not to (S3: If-None-Match), so that of two writers the last wins",
            "Let one machine at a time write there, or use a store that knows conditional writes",
        )


def _delete(section: Section, url: str) -> None:
    """Delete a file that was written to be deleted; who may write may not always do that."""
    try:
        system, path = file_system(url)
        if system.exists(path):
            system.rm_file(path)
    except Exception as error:  # each store has its own, and the trial is over
        section.warning(f"{url} could not be deleted again: {str(error)[:200]}", "Delete it, should it be there")
