"""Putting a saved folder on the Hub: checked before any long work, then one commit or nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from hf_lowrank.errors import PublishError, StorageError
from hf_lowrank.report.public import public_report

_REASONS = {
    401: "the token is not valid or may not do this, log in again with `hf auth login`",
    403: "the token has no permission to write there, use one with write access",
    404: "there is no such repository, or the token may not see it",
    409: "someone else changed the repository at the same moment, try again",
    413: "a file is larger than the Hub takes",
    429: "too many requests, wait a few minutes",
}


def check_repository(repo_id: str, private: bool = False, token: str | None = None) -> str:
    """Refuses a repository that can't be published to; asks the Hub, changes nothing there.

    Args:
        repo_id: `namespace/name`, or a name alone for the token's own namespace.
        private: Whether the repository is to be private.
        token: A token with write access; by default that of `hf auth login` or HF_TOKEN.

    Returns:
        The full `namespace/name`.

    Raises:
        PublishError: The name is not valid, there is no token, it is not valid or reads only, the
            namespace is not its owner's, a public repository was to be private, or the Hub can't
            be reached.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PublishError(f"push_to_hub: {error}") from error
    if constants.HF_HUB_OFFLINE:
        raise PublishError(f"{repo_id}: can't be published in offline mode; unset HF_HUB_OFFLINE.")
    token = token or get_token()
    if token is None:
        raise PublishError(
            f"{repo_id}: publishing needs a token; log in with `hf auth login` or set HF_TOKEN."
        )
    api = HfApi(token=token)
    with _hub_errors(repo_id):
        owner = api.whoami()
    if owner.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise PublishError(f"{repo_id}: the token may only read; use one with write access.")
    if "/" not in repo_id:
        repo_id = f"{owner['name']}/{repo_id}"
    namespace = repo_id.split("/")[0]
    known = [owner["name"], *(organization["name"] for organization in owner.get("orgs", []))]
    if namespace.lower() not in {name.lower() for name in known}:
        raise PublishError(
            f"{repo_id}: belongs to {namespace}, but the token may write for {', '.join(known)}."
        )
    _check_visibility(api, repo_id, private)
    return repo_id


def publish(folder: Path, repo_id: str, private: bool = False, token: str | None = None) -> str:
    """Uploads all files of a folder as one commit; the repository is made if there is none.

    `HfApi.upload_folder` splits an upload into several commits, so that a reader can meet half a
    model; here weights are uploaded first and appear with everything else in one commit. Of local
    paths in `report.json` only the last component is uploaded; the file in the folder stays.

    Args:
        folder: What `save_pretrained` or `save_compressed` wrote.
        repo_id: See `check_repository`.
        private: Makes the repository private; it must not exist in public.
        token: See `check_repository`.

    Returns:
        Address of the commit.

    Raises:
        StorageError: The folder holds no model.
        PublishError: See `check_repository`, or the connection broke. The repository then holds
            what it held before.
    """
    if not (folder / "config.json").is_file():
        raise StorageError(f"{folder}: holds no config.json; publish the folder of a saved model.")
    repo_id = check_repository(repo_id, private, token)
    api = HfApi(token=token)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with _hub_errors(repo_id, f" Once that is mended: hf upload {repo_id} {folder}"):
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        commit = api.create_commit(
            repo_id,
            [
                CommitOperationAdd(path.relative_to(folder).as_posix(), _content(path))
                for path in files
            ],
            commit_message="Upload a model compressed with hf_lowrank",
        )
    return str(commit.commit_url)


def _content(path: Path) -> str | bytes:
    """What is uploaded of a file: the file itself, or a report without this machine's folders."""
    if path.name != "report.json":
        return os.fspath(path)
    return public_report(path.read_text("utf-8")).encode()


def _check_visibility(api: HfApi, repo_id: str, private: bool) -> None:
    with _hub_errors(repo_id):
        try:
            is_public = not api.model_info(repo_id).private
        except RepositoryNotFoundError:
            return
    if private and is_public:
        raise PublishError(
            f"{repo_id}: exists and is public; make it private in its settings, or choose another "
            "name."
        )


@contextmanager
def _hub_errors(repo_id: str, advice: str = "") -> Iterator[None]:
    """Turns whatever goes wrong between here and the Hub into one sentence."""
    try:
        yield
    except Exception as error:  # the transport's errors have no common base that stays
        cause: BaseException = error
        while cause.__cause__ is not None and not isinstance(cause, HfHubHTTPError):
            cause = cause.__cause__
        raise PublishError(
            f"{repo_id}: not published: {_reason(cause)}; an upload is one commit, so nothing is "
            f"half there.{advice}"
        ) from error


def _reason(error: BaseException) -> str:
    if not isinstance(error, HfHubHTTPError):
        text = " ".join(str(error).split())[:200] or type(error).__name__
        return f"talking to {constants.ENDPOINT} failed ({text})"
    status = error.response.status_code
    if status in _REASONS:
        return _REASONS[status]
    if status >= 500:
        return f"the Hub has a problem of its own (status {status}), try again later"
    return f"the Hub refuses ({' '.join(str(error.server_message or error).split())[:200]})"
