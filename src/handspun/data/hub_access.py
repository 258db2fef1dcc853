"""Whether the hub answers: asked once, in place of five times for each file with up to 27 seconds between them."""

from collections.abc import Callable
from http import HTTPStatus
from typing import Literal

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError


def stay_offline_if_unreachable(
    name: str, notice: Callable[[str], None], *, repo_type: Literal["model", "dataset"] = "model"
) -> None:
    """Ask the hub for a file of the repository. If nothing answers, only the hub's cache is used from here on.

    That is the library's own switch (HF_HUB_OFFLINE), for the whole process. What is not in the cache is then an
    error at once.
    """
    if constants.HF_HUB_OFFLINE:
        return
    try:
        url = hf_hub_url(name, "README.md", repo_type=repo_type)
        get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except HfHubHTTPError as error:  # an answer: no such file, no access; of a proxy, that there is no way
        if error.response.status_code < HTTPStatus.INTERNAL_SERVER_ERROR:
            return
        reason = f"status {error.response.status_code}"
    except Exception as error:  # httpx's many kinds, and what proxies and certificates bring about
        reason = str(error) or type(error).__name__
    else:
        return
    constants.HF_HUB_OFFLINE = True
    notice(f"the hub does not answer ({reason}): only what is in its cache can be used")
