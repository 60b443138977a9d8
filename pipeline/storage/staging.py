"""Where a command writes that was asked to write to a URL: a folder of this machine, kept in step with it."""

import hashlib
import os
from pathlib import Path

from pipeline.storage.urls import check_url, is_url, url_name


def working_folder(location: str) -> Path:
    """Return the folder to write in: the location itself, or the local one that stands for a URL.

    The latter is the same for every process of a user on a machine, and for every start of a command.

    Raises:
        StorageError: the URL's scheme is none of ours.
    """
    if not is_url(location):
        return Path(location)
    check_url(location)
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute()
    url = location.rstrip("/")
    digest = hashlib.blake2b(url.encode(), digest_size=8).hexdigest()
    return root / "deit-cli-staging" / f"{url_name(url)[-80:] or 'root'}-{digest}"
