"""Folders and files that are either whole or not there: written under a temporary name first."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from safetensors import SafetensorError

from hf_lowrank.errors import StorageError

_MARGIN = 1.05


def check_cache_folder(folder: Path) -> None:
    """Refuses a cache folder that can't be written, before any long work.

    Raises:
        StorageError: With the reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder}: can't be a folder ({error.strerror or error}).") from error
    if not os.access(folder, os.W_OK):
        raise StorageError(f"{folder}: no permission to write there; name another folder.")


def check_output_folder(
    folder: Path,
    overwrite: bool,
    num_bytes: int = 0,
    source: Path | None = None,
    *,
    texts: Iterable[Path] = (),
    cache: Path | None = None,
) -> None:
    """Refuses an output folder that can't be used, before any long work.

    Args:
        folder: The folder's final name.
        overwrite: Whether an existing folder may be replaced.
        num_bytes: Space that the result will take.
        source: File or folder of the dense model, which must not be replaced; anything that is
            not on this disk, like a name on the Hub, passes.
        texts: Files that the run reads, likewise.
        cache: The run's cache folder, which would fill the output folder, or go with it.

    Raises:
        StorageError: The folder exists and holds something, is a file or a mount point, is or
            holds one of the other paths, can't be created, or the disk is too full.
    """
    try:
        is_used = folder.is_dir() and any(folder.iterdir())
        if folder.exists() and not folder.is_dir():
            raise StorageError(f"{folder}: is a file, not a folder; name another one.")
    except OSError as error:
        raise StorageError(f"{folder}: can't be created ({error.strerror or error}).") from error
    if Path.cwd().is_relative_to(folder.resolve()):
        raise StorageError(f"{folder}: is the current folder or one above it; name another.")
    if os.path.ismount(folder.resolve()):  # no other folder can take its name
        raise StorageError(f"{folder}: is a mount point; name a folder inside it.")
    _check_apart(folder, [*([source] if source else []), *texts], cache)
    if is_used and not overwrite:
        raise StorageError(
            f"{folder}: exists and is not empty; choose another --output_dir or add "
            "--overwrite_output_dir."
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
    except OSError as error:
        raise StorageError(f"{folder}: can't be created ({error.strerror or error}).") from error
    if not os.access(folder.parent, os.W_OK):
        raise StorageError(f"{folder}: no permission to write there; name another folder.")
    if free < num_bytes * _MARGIN:
        raise StorageError(
            f"{folder}: needs about {num_bytes / 1e6:.0f} MB, but the disk has only "
            f"{free / 1e6:.0f} MB left."
        )


def _check_apart(folder: Path, reads: Iterable[Path], cache: Path | None) -> None:
    place = folder.resolve()
    for path in reads:
        if os.path.exists(path) and path.resolve().is_relative_to(place):
            raise StorageError(
                f"{folder}: would replace {path}, which this run reads; name another output folder."
            )
    if cache is not None and cache.resolve().is_relative_to(place):
        raise StorageError(
            f"{cache}: the cache can't lie in the output folder {folder}; name a folder beside it."
        )


@contextmanager
def atomic_folder(folder: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name when the block ends well.

    What killed runs left there under such names is then removed.

    Raises:
        StorageError: Writing failed; nothing is left under either name.
    """
    folder = folder.resolve()
    previous = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    try:
        with _temporary(folder) as temporary:
            made = temporary.stat()
            yield temporary
            if not os.path.samestat(made, temporary.stat()):  # what was written first is lost
                raise FileNotFoundError("its temporary folder was removed meanwhile")
            if folder.exists():
                if not overwrite and any(folder.iterdir()):
                    raise FileExistsError("it holds files that another run wrote meanwhile")
                folder.rename(previous)
            temporary.rename(folder)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{folder}: could not be written ({error}).") from error
    finally:
        if previous.exists() and not folder.exists():
            previous.rename(folder)
        shutil.rmtree(previous, ignore_errors=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary name for `path`; the file takes its own name when the block ends well."""
    with _temporary(path) as temporary:
        yield temporary / path.name
        (temporary / path.name).replace(path)


def write_text(path: Path, text: str) -> None:
    """Writes a text file under a temporary name, then renames it.

    Raises:
        StorageError: Writing failed; a previous file is still there.
    """
    try:
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path}: could not be written ({error.strerror or error}).") from error


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A folder beside `path`, locked while this process lives; removed if it is still there."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    lock = None
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        lock = _lock(temporary)
        yield temporary
        start = f".{escape(path.name)}"
        for left in (*path.parent.glob(f"{start}.tmp-*"), *path.parent.glob(f"{start}.old-*")):
            if (free := _lock(left)) is not None:  # of a process that is no more
                shutil.rmtree(left, ignore_errors=True)
                os.close(free)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """A lock that ends with this process; None if another has it, or where there are no locks."""
    try:
        import fcntl  # not on Windows

        file = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        return None
    return file
