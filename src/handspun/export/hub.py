"""A folder to a repository on the hub, with a token that the user gives."""

import json
import os
from pathlib import Path

from huggingface_hub import HfApi

from handspun.errors import ConfigError, OutputError

_NOT_SENT = ["training_state/**", ".*"]
"""What a run needs to go on, and what is half written."""


def hub(token: str | None) -> HfApi:
    """The hub as the owner of the token sees it: the one given, or HF_TOKEN's. Raises ConfigError without one."""
    token = token or os.environ.get("HF_TOKEN")
    if not token:
        raise ConfigError(
            "--push needs a token of yours with the right to write, from https://huggingface.co/settings/tokens: "
            "set HF_TOKEN to it, or give --token (which the shell may remember)."
        )
    return HfApi(token=token)


def check_base_on_hub(folder: Path) -> None:
    """Raise OutputError for an adapter whose base is a path of this machine, which nobody else could open."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    base = str(config.get("base_model_name_or_path"))
    if base.startswith(("/", ".", "~")) or "\\" in base or Path(base).exists():
        raise OutputError(
            f"{folder / 'adapter_config.json'} names its base by a path of this machine, {base}, where nobody "
            "else has it. Push the merged model (--merge --output-dir FOLDER), or write the base's hub id into "
            "that file."
        )


def push_folder(folder: Path, repo: str, api: HfApi, *, private: bool) -> str:
    """Uploads a folder in one commit, and makes the repository if there is none; returns its address.

    private: of a repository that is made; one that is there stays as it is. Raises OutputError.
    """
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message="Upload from Handspun",
            ignore_patterns=_NOT_SENT,
        )
    except Exception as error:  # whatever the network, the hub or the name brings about
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OutputError(
            f"{folder} could not be pushed to {repo}: {reason}\nExpected a repository as in your-name/model-name, "
            "a token that may write there, and a network. What is in the folder is whole: --push it again."
        ) from error
    return str(address)
