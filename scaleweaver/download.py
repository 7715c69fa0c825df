"""A repository of the Hugging Face Hub as a local folder, or an error that says what to do."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# weights as safetensors only: a repository's pickles stay where they are; pictures belong to the model card
_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.md", "*.png", "*.jpg", "*.jpeg", "*.webp")


def download(
    name: str,
    *,
    built_in: Sequence[str],
    instead: str = "",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """The folder of a Hub id, downloaded once.

    Errors name `built_in`, the other names that would have been understood, and `instead`, what does without the Hub.
    """
    without = f"; {instead}" if instead else ""
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                token=token,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                local_files_only=local_files_only,
                force_download=force_download,
                allow_patterns=list(_FILES),
            )
        )
    except HFValidationError:
        raise ValueError(f"{name!r} is no folder, and no Hub id either (user/name); check the path{without}") from None
    except GatedRepoError:
        raise ValueError(f"{name!r} is gated: accept its terms on the Hub, then log in or pass token=") from None
    except RevisionNotFoundError:
        raise ValueError(f"{name!r} has no revision {revision!r}; pass a branch, a tag or a commit") from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"{name!r} is neither built in ({', '.join(built_in)}), nor a folder, nor a repository you can see on the"
            f" Hub; check the name, or pass token= if it is private{without}"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:
        raise OSError(
            f"{name!r} is no folder and could not be had from the Hub ({str(error).splitlines()[0]}); check the"
            f" connection, or download it once while online: later runs need none{without}"
        ) from error
