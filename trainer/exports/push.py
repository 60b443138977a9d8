"""Upload of an export to the Hugging Face Hub: one commit to a model repository."""

from pathlib import Path
from typing import Any

from pipeline.errors import RemoteFileRefused, StorageError


def push_folder(folder: Path, names: list[str], repository: str, *, private: bool, message: str) -> str:
    """Upload files of a folder as one commit, and return the address of the repository.

    Args:
        folder: folder of the export, which stays as it is.
        names: names of its files to upload; other files in the repository are kept.
        repository: USER/NAME; created if it does not exist.
        private: whether a new repository is private.
        message: first line of the commit.

    Raises:
        RemoteFileRefused: the Hub denies access.
        StorageError: the upload failed.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(library_name="deit-cli")
    try:
        # None: an account or organisation has a default of its own.
        address = api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=names, commit_message=message)
    except HfHubHTTPError as error:
        raise _named(repository, folder, error) from error
    except (
        Exception
    ) as error:  # no network, no token, an impossible name: other exceptions in each version of the library
        raise StorageError(
            f"hf://{repository}: {' '.join(str(error).split())[:300]}", fix=f"The export is complete in {folder}"
        ) from error
    return str(address)


def _named(repository: str, folder: Path, error: Any) -> StorageError:
    """Return our error for an answer of the Hub."""
    status = getattr(error.response, "status_code", None)
    if status in (401, 403):
        return RemoteFileRefused(
            f"hf://{repository}: access is refused ({status})",
            fix=f"Run `hf auth login` with a token that may write, and the same command again; the export is complete in {folder}",
        )
    said = getattr(error, "server_message", None) or " ".join(str(error).split())[:300]
    return StorageError(
        f"hf://{repository}: the Hub answers {status}: {said}", fix=f"The export is complete in {folder}"
    )
