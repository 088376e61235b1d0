"""Folders and files that are either whole or not there: written under a temporary name first."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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
        raise StorageError(f"{folder}: no permission to write there.")


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
            raise StorageError(f"{folder}: is a file, not a folder.")
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
        raise StorageError(f"{folder}: no permission to write there.")
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

    Raises:
        StorageError: Writing failed; nothing is left under either name.
    """
    folder = folder.resolve()
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    previous = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        if folder.exists() and (overwrite or not any(folder.iterdir())):
            folder.rename(previous)
        temporary.rename(folder)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{folder}: could not be written ({error}).") from error
    finally:
        if previous.exists() and not folder.exists():
            previous.rename(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(previous, ignore_errors=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; the file takes its own name when the block ends well."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes a text file under a temporary name, then renames it.

    Raises:
        StorageError: Writing failed; a previous file is still there.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"{path}: could not be written ({error.strerror or error}).") from error
    finally:
        temporary.unlink(missing_ok=True)
