"""Models from the Hub or a folder: what keeps them from being read, in one sentence.

One quick look whether the Hub can be reached stands in place of minutes of retries.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import huggingface_hub.constants
from huggingface_hub.utils import get_session

from hf_lowrank.errors import DataError, LowRankError
from hf_lowrank.measuring.progress import announce

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
        announce("the Hub does not answer; only what is in the local caches is read")
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        with suppress(ModuleNotFoundError):  # an extra, and slow to import
            import datasets.config

            datasets.config.HF_HUB_OFFLINE = True
        return False
    return True


@contextmanager
def reading(source: str, what: str, trusted: bool) -> Iterator[None]:
    """Says in one sentence why a model can't be read in the block.

    Args:
        source: Folder or Hub id.
        what: What is read, for the message.
        trusted: Whether code that lies beside the weights may run.

    Raises:
        DataError: In place of whatever else the block raises.
    """
    if not Path(source).is_dir():
        prefer_offline_if_unreachable()
    try:
        yield
    except LowRankError:
        raise
    except Exception as error:  # a damaged file can raise anything
        reason = one_line(error)
        if not trusted and "trust_remote_code" in str(error):
            raise DataError(
                f"{source}: comes with Python code of its own that must run to load it; read that "
                "code, and if you trust it, give --trust_remote_code."
            ) from error
        if Path(source).is_dir():
            raise DataError(f"{source}: is not a readable {what}: {reason}") from error
        raise DataError(
            f"{source}: no such folder, and the Hub has no such model or can't be reached; "
            f"offline, give a local folder, a .gguf file or 'demo'. ({reason})"
        ) from error


def one_line(error: Exception) -> str:
    """What an error says, on one line and not too long."""
    return " ".join(str(error).split())[:300]
