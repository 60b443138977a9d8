"""URLs of remote files as text: recognise, split and join them, and find their local working folder."""

import hashlib
import os
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from pipeline.storage.stores import store_of


def is_url(text: str) -> bool:
    """Return True for a URL, False for a path."""
    return "://" in text


def local_path(location: str | os.PathLike[str]) -> Path | None:
    """Return the path that a location names on this machine, or None for a URL."""
    text = os.fspath(location)
    return None if is_url(text) else Path(text)


def url_name(url: str) -> str:
    """Return the last part of the path of a URL."""
    return unquote(_path(url)).rstrip("/").rpartition("/")[2]


def join_url(url: str, name: str) -> str:
    """Return the URL of a file below a folder; the query of a web address stays."""
    if not _is_web(url):
        return f"{url.rstrip('/')}/{name}"
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def parent_url(url: str) -> str:
    """Return the URL of the folder that contains a file."""
    if not _is_web(url):
        return url.rstrip("/").rpartition("/")[0]
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=parts.path.rstrip("/").rpartition("/")[0]))


def _is_web(url: str) -> bool:
    """Return True if `?` and `#` end the path of this URL."""
    return url.startswith(("http://", "https://"))


def _path(url: str) -> str:
    return urlsplit(url).path if _is_web(url) else url.partition("://")[2]


def working_folder(location: str) -> Path:
    """Return the folder to write in: the location itself, or the local working folder of a URL.

    The latter is the same for every process of a user on a machine, and for every start of a command.

    Raises:
        StorageError: the URL's scheme is not supported.
    """
    if (path := local_path(location)) is not None:
        return path
    store_of(location)
    url = location.rstrip("/")
    digest = hashlib.blake2b(url.encode(), digest_size=8).hexdigest()
    return user_cache() / "deit-cli-staging" / f"{url_name(url)[-80:] or 'root'}-{digest}"


def user_cache() -> Path:
    """Return the user's cache folder, for files that can be fetched again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute()
