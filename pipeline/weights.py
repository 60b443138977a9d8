"""Weights that a command starts from: a local file or exported folder, or one behind a URL, brought here."""

import contextlib
from pathlib import Path, PurePosixPath

from pipeline.errors import RemoteFileMissing
from pipeline.storage.atomic import locked, refusals_named
from pipeline.storage.remote import receive_file
from pipeline.storage.urls import is_url, join_url, url_name, working_folder

_FILES = frozenset({".safetensors", ".pth", ".pt", ".bin", ".tar"})


def weights_here(location: str) -> Path:
    """Return the local path of a file of weights, or of a folder with `model.safetensors` and perhaps `config.json`.

    What lies behind a URL is brought each time, because a run replaces it.

    Raises:
        RemoteFileMissing: there are no weights.
        StorageError: they cannot be brought.
    """
    if not is_url(location):
        return Path(location)
    folder, name = working_folder(location), url_name(location)
    with refusals_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(folder.name + ".lock")):
        if PurePosixPath(name).suffix in _FILES:
            receive_file(location, folder / name)
            return folder / name
        receive_file(join_url(location, "model.safetensors"), folder / "model.safetensors")
        (folder / "config.json").unlink(missing_ok=True)
        with contextlib.suppress(RemoteFileMissing):
            receive_file(join_url(location, "config.json"), folder / "config.json")
    return folder
