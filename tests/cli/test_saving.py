"""Folders that are whole or not there."""

import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from hf_lowrank import LowRankConfig, Report, compress
from hf_lowrank.cli.saving import save_compressed
from hf_lowrank.errors import StorageError
from hf_lowrank.files import atomic_folder, check_output_folder, write_text
from tests.scripts import leftovers, word_tokenizer
from tests.tiny_models import tiny_llama

DiskUsage = namedtuple("DiskUsage", "total used free")


def write(folder: Path, text: str = "new") -> None:
    (folder / "file.txt").write_text(text)


def fail_while_writing(folder: Path, error: BaseException, overwrite: bool = False) -> None:
    with atomic_folder(folder, overwrite) as temporary:
        write(temporary)
        raise error


def write_all(folder: Path, overwrite: bool = False) -> None:
    with atomic_folder(folder, overwrite) as temporary:
        write(temporary)


def compressed() -> tuple[Any, Report]:
    model = tiny_llama()
    return model, compress(model, LowRankConfig(param_ratio=0.5, metric="plain"), progress=False)


# atomic_folder


def test_the_folder_appears_only_at_the_end(tmp_path: Path):
    with atomic_folder(tmp_path / "deep" / "out") as temporary:
        write(temporary)
        assert temporary.parent == tmp_path / "deep"
        assert temporary.name.startswith(".")
        assert not (tmp_path / "deep" / "out").exists()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert (tmp_path / "deep" / "out" / "file.txt").read_text() == "new"


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)])
def test_nothing_is_left_after_an_exception(tmp_path: Path, error: BaseException):
    with pytest.raises(type(error)):
        fail_while_writing(tmp_path / "out", error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")]
)
def test_a_failed_write_is_a_storage_error_with_its_reason(tmp_path: Path, error: Exception):
    with pytest.raises(StorageError, match="No space left on device") as caught:
        fail_while_writing(tmp_path / "out", error)
    assert str(caught.value).startswith(f"{tmp_path / 'out'}: could not be written (")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_kept_unless_it_may_be_replaced(tmp_path: Path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "old")
    with pytest.raises(StorageError, match=r"written \(it holds files that another run wrote mea"):
        write_all(tmp_path / "out")
    assert (tmp_path / "out" / "file.txt").read_text() == "old"
    assert leftovers(tmp_path) == []
    write_all(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "file.txt").read_text() == "new"
    assert leftovers(tmp_path) == []


def test_the_old_folder_survives_a_failure(tmp_path: Path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "old")
    with pytest.raises(StorageError, match="full"):
        fail_while_writing(tmp_path / "out", OSError("full"), overwrite=True)
    assert (tmp_path / "out" / "file.txt").read_text() == "old"


@pytest.mark.parametrize("error", [OSError("busy"), KeyboardInterrupt("busy")])
def test_the_old_folder_survives_a_rename_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
):
    """The old folder is only gone once the new one is in its place."""
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "old")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if Path(target).name == "out" and "new" in (self / "file.txt").read_text():
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises((StorageError, KeyboardInterrupt), match="busy"):
        write_all(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "file.txt").read_text() == "old"


def test_an_empty_folder_is_taken_over(tmp_path: Path):
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as temporary:
        write(temporary)
    assert (tmp_path / "out" / "file.txt").read_text() == "new"


def test_a_stale_temporary_folder_is_not_in_the_way(tmp_path: Path):
    """Left by a killed process that had this one's id."""
    stale = tmp_path / f".out.tmp-{os.getpid()}"
    stale.mkdir()
    (stale / "stale.txt").write_text("old")
    with atomic_folder(tmp_path / "out") as temporary:
        write(temporary)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file.txt"]


@pytest.mark.parametrize("kind", ["tmp", "old"])
def test_what_killed_runs_left_is_removed_once_a_run_is_through(tmp_path: Path, kind: str):
    left, other = tmp_path / f".out.{kind}-999999", tmp_path / f".outer.{kind}-999999"
    for folder in (left, other):
        folder.mkdir()
        write(folder)
    with pytest.raises(StorageError):
        fail_while_writing(tmp_path / "out", OSError("full"))
    assert left.exists()
    write_all(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "out"]


def test_what_a_run_is_writing_is_not_removed_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with atomic_folder(tmp_path / "out", overwrite=True) as temporary:
        write(temporary, "first")
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 999_999)
            write_all(tmp_path / "out", overwrite=True)
        assert (temporary / "file.txt").read_text() == "first"
    assert (tmp_path / "out" / "file.txt").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_temporary_folder_that_was_removed_meanwhile_never_takes_the_name(tmp_path: Path):
    """Later steps of saving make it again, without what the first had written."""

    def lose_the_first_files() -> None:
        with atomic_folder(tmp_path / "out") as temporary:
            shutil.rmtree(temporary)
            temporary.mkdir()
            write(temporary)

    with pytest.raises(StorageError, match=r"written \(its temporary folder was removed meanwhile"):
        lose_the_first_files()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_write_of_a_file_is_cleaned_up_by_the_next(tmp_path: Path):
    left = tmp_path / ".report.json.tmp-999999"
    left.mkdir()
    write(left)
    write_text(tmp_path / "report.json", "{}")
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert (tmp_path / "report.json").read_text() == "{}"


def test_a_relative_folder_does_not_follow_a_change_of_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with atomic_folder(Path("out")) as temporary:
        write(temporary)
        os.chdir(tmp_path / "elsewhere")
    assert (tmp_path / "out" / "file.txt").is_file()


# check_output_folder


def test_a_usable_folder_passes_and_is_not_created(tmp_path: Path):
    check_output_folder(tmp_path / "deep" / "out", overwrite=False, num_bytes=10)
    assert not (tmp_path / "deep" / "out").exists()
    (tmp_path / "empty").mkdir()
    check_output_folder(tmp_path / "empty", overwrite=False)


def test_a_folder_that_holds_something(tmp_path: Path):
    write(tmp_path)
    with pytest.raises(StorageError, match=r"exists and is not empty; .* --overwrite_output_dir"):
        check_output_folder(tmp_path, overwrite=False)
    check_output_folder(tmp_path, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_never_replaced(tmp_path: Path, overwrite: bool):
    (tmp_path / "out").write_text("keep")
    with pytest.raises(StorageError, match=r"out: is a file, not a folder; name another one\.$"):
        check_output_folder(tmp_path / "out", overwrite)


def test_a_folder_that_cannot_be_created(tmp_path: Path):
    (tmp_path / "file").write_text("keep")
    with pytest.raises(StorageError, match=r"out: can't be created \("):
        check_output_folder(tmp_path / "file" / "out", overwrite=False)


def test_a_name_that_is_too_long(tmp_path: Path):
    with pytest.raises(StorageError, match=r"x: can't be \w+ \(File name too long\)"):
        check_output_folder(tmp_path / ("x" * 300), overwrite=False)


def test_the_root_folder_is_not_replaced():
    with pytest.raises(StorageError, match=r"^/: "):
        check_output_folder(Path("/"), overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_the_run_reads_is_not_replaced(tmp_path: Path, overwrite: bool):
    output = tmp_path / "outputs"
    (output / "base").mkdir(parents=True)
    write(output / "base")
    for path in (output, output / "base", output / "base" / "file.txt"):
        sentence = f"{output}: would replace {path}, which this run reads; name another"
        for role in ({"source": path}, {"texts": [tmp_path, path]}):
            with pytest.raises(StorageError, match=f"^{sentence} output folder\\.$"):
                check_output_folder(output, overwrite, **role)


def test_links_do_not_hide_what_the_run_reads(tmp_path: Path):
    (tmp_path / "outputs" / "base").mkdir(parents=True)
    (tmp_path / "model").symlink_to(tmp_path / "outputs" / "base")
    (tmp_path / "results").symlink_to(tmp_path / "outputs")
    for folder, source in (("outputs", "model"), ("results", "outputs/base"), ("model", "model")):
        with pytest.raises(StorageError, match=f"would replace {tmp_path / source}, which"):
            check_output_folder(tmp_path / folder, overwrite=True, source=tmp_path / source)


def test_an_output_folder_inside_or_beside_the_dense_model(tmp_path: Path):
    for name in ("base", "base-small"):
        (tmp_path / name).mkdir()
    for folder in (tmp_path / "base" / "small", tmp_path / "base-small"):
        check_output_folder(folder, overwrite=True, source=tmp_path / "base", cache=tmp_path)


def test_a_name_on_the_hub_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    text = Path("x" * 300)
    check_output_folder(Path("gpt2"), overwrite=False, source=Path("gpt2"), texts=[text])


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("cache", ["out", "out/cache", "out/../out/deep/cache"])
def test_a_cache_inside_the_output_folder(tmp_path: Path, overwrite: bool, cache: str):
    folder, cache_folder = tmp_path / "out", tmp_path / cache
    with pytest.raises(StorageError) as caught:
        check_output_folder(folder, overwrite, cache=cache_folder)
    assert str(caught.value) == (
        f"{cache_folder}: the cache can't lie in the output folder {folder}; name a folder beside "
        "it."
    )
    assert list(tmp_path.iterdir()) == []


def test_a_mount_point_is_not_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "volume").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "volume")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "volume")
    for name in ("volume", "link"):
        with pytest.raises(
            StorageError, match=rf"{name}: is a mount point; name a folder inside it\.$"
        ):
            check_output_folder(tmp_path / name, overwrite=True)
    check_output_folder(tmp_path / "volume" / "out", overwrite=False)


def test_permission_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "access", lambda path, mode: not (path == tmp_path and mode == os.W_OK))
    with pytest.raises(
        StorageError, match=r"out: no permission to write there; name another folder\.$"
    ):
        check_output_folder(tmp_path / "out", overwrite=False)


@pytest.mark.parametrize(("needed", "free", "passes"), [(100, 105, True), (100, 104, False)])
def test_space_is_asked_for_with_a_margin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needed: int, free: int, passes: bool
):
    million = 1_000_000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(0, 0, free * million))
    if passes:
        check_output_folder(tmp_path / "out", False, needed * million)
        return
    with pytest.raises(
        StorageError, match=r"out: needs about 10\d MB, but the disk has only 104 MB left\.$"
    ):
        check_output_folder(tmp_path / "out", False, needed * million)


# save_compressed


def test_model_tokenizer_and_report_are_saved_together(tmp_path: Path):
    model, report = compressed()
    save_compressed(model, word_tokenizer(), report, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "report.json"} <= names
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out") is not None


def test_a_tokenizer_is_optional(tmp_path: Path):
    model, report = compressed()
    save_compressed(model, None, report, tmp_path / "out")
    assert not list((tmp_path / "out").glob("tokenizer*"))


def test_a_processors_files_lie_beside_the_tokenizers(tmp_path: Path):
    model, report = compressed()
    files = {"processor_config.json": b'{"size": 32}\n', "tokenizer.json": b"of the dense model"}
    save_compressed(model, word_tokenizer(), report, tmp_path / "out", processor=files)
    assert (tmp_path / "out" / "processor_config.json").read_bytes() == b'{"size": 32}\n'
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() != b"of the dense model"


def test_a_report_that_cannot_be_written_takes_the_model_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, report = compressed()

    def fail(self: Report, path: Path) -> None:
        assert (path.parent / "model.safetensors").is_file()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Report, "save", fail)
    with pytest.raises(StorageError, match="No space left on device"):
        save_compressed(model, word_tokenizer(), report, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
