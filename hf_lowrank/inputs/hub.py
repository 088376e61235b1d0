"""One quick look whether the Hub can be reached, in place of minutes of retries."""

from __future__ import annotations

import datasets.config
import huggingface_hub.constants
from huggingface_hub.utils import get_session

_SECONDS = 5.0


def prefer_offline_if_unreachable() -> bool:
    """Turns on the libraries' offline mode if the Hub does not answer within five seconds.

    What is in the local caches then still loads, and what is not fails at once.

    Returns:
        Whether the Hub can be reached.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(huggingface_hub.constants.ENDPOINT, timeout=_SECONDS)
    except Exception:  # whatever the transport raises: no answer
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True
        return False
    return True
