"""Push a folder to a repository on the Hugging Face hub, with the user's token."""

import json
import os
from pathlib import Path

from huggingface_hub import HfApi

from handspun.errors import ConfigError, OutputError

_NOT_UPLOADED = ["training_state/**", ".*"]
"""Files that are not uploaded: the state for resuming, and partial files."""


def hub(token: str | None) -> HfApi:
    """Return the hub's API for the given token, or for HF_TOKEN. Raises ConfigError without a token."""
    token = token or os.environ.get("HF_TOKEN")
    if not token:
        raise ConfigError(
            "--push needs an access token with write permission. Create one at "
            "https://huggingface.co/settings/tokens and set HF_TOKEN to it, or give --token (which your shell may "
            "keep in its history)."
        )
    return HfApi(token=token)


def check_base_on_hub(folder: Path) -> None:
    """Raise OutputError for an adapter whose base is a local path, which nobody else could open."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    base = str(config.get("base_model_name_or_path"))
    if base.startswith(("/", ".", "~")) or "\\" in base or Path(base).exists():
        raise OutputError(
            f"{folder / 'adapter_config.json'} refers to its base model by a local path, {base}, which nobody "
            "else has. Push the merged model (--merge --output-dir FOLDER), or write the base's hub id into that "
            "file."
        )


def push_folder(folder: Path, repo: str, api: HfApi, *, private: bool) -> str:
    """Upload a folder in one commit, creating the repository if needed, and return its URL.

    Args:
        folder: Folder to upload.
        repo: Repository, as in your-name/model-name.
        api: The hub's API, with the user's token.
        private: Make a new repository private. An existing one keeps its visibility.

    Raises OutputError.
    """
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message="Upload from Handspun",
            ignore_patterns=_NOT_UPLOADED,
        )
    except Exception as error:  # the network, the hub and invalid names raise many types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OutputError(
            f"{folder} could not be pushed to {repo}: {reason}\nCheck the repository (your-name/model-name), the "
            "token's write permission and the network. The folder is complete, so you can --push it again."
        ) from error
    return str(address)
