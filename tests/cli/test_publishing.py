"""Publishing to the Hub, against a local fake of its HTTP interface: all of it or nothing."""

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM

import hf_lowrank
from hf_lowrank import LowRankConfig
from hf_lowrank.cli.publishing import check_repository, publish
from hf_lowrank.cli.saving import save_compressed
from hf_lowrank.errors import PublishError, StorageError
from tests.fake_hub import FakeHub, Repository, acting_as_the_hub, published
from tests.scripts import InProcess, Inputs, make_inputs, run_python, word_tokenizer
from tests.tiny_models import tiny_llama

# huggingface_hub's upload of a large file by plain LFS.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<:DeprecationWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed model with tokenizer, report and card."""
    target = tmp_path_factory.mktemp("saved") / "small"
    model = tiny_llama()
    report = hf_lowrank.compress(
        model, LowRankConfig(param_ratio=0.6, metric="plain"), progress=False
    )
    save_compressed(model, word_tokenizer(), report, target, repo_id="ada/small", page=False)
    return target


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with acting_as_the_hub(monkeypatch, tmp_path) as fake:
        yield fake


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 19)[None]).logits


def writes(hub: FakeHub) -> list[tuple[str, str]]:
    """Requests that could change something."""
    return [(method, path) for method, path in hub.requests if method in ("POST", "PUT")]


# publish


@pytest.mark.parametrize("mode", ["regular", "lfs"])
def test_a_published_model_comes_back_with_equal_logits(
    hub: FakeHub, folder: Path, tmp_path: Path, mode: str
):
    hub.upload_mode = mode
    address = publish(folder, "ada/small")
    repository = hub.repositories["ada/small"]
    assert address.startswith(f"{hub.url}/ada/small/commit/")
    assert len(repository.commits) == 1
    assert repository.files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"README.md", "report.json", "modeling_lowrank.py", "tokenizer.json"} <= set(
        repository.files
    )
    assert bool(hub.blobs) == (mode == "lfs")
    back = Path(snapshot_download("ada/small", cache_dir=tmp_path / "cache"))
    assert torch.equal(logits(hf_lowrank.load(back)), logits(hf_lowrank.load(folder)))


def test_from_pretrained_loads_it_by_its_name(hub: FakeHub, folder: Path, tmp_path: Path):
    publish(folder, "ada/small")
    model = AutoModelForCausalLM.from_pretrained("ada/small", cache_dir=tmp_path / "cache")
    assert torch.equal(logits(model), logits(hf_lowrank.load(folder)))


def test_it_loads_without_hf_lowrank_through_the_code_beside_it(
    hub: FakeHub, folder: Path, tmp_path: Path
):
    publish(folder, "ada/small")
    code = (
        "import sys, torch\n"
        "sys.modules['hf_lowrank'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('ada/small', trust_remote_code=True)\n"
        "torch.save(model.eval()(torch.arange(3, 19)[None]).logits, sys.argv[1])\n"
    )
    done = run_python(
        "-c",
        code,
        tmp_path / "logits.pt",
        HF_ENDPOINT=hub.url,
        HF_HUB_OFFLINE="0",
        HF_HOME=str(tmp_path / "home"),
        HF_MODULES_CACHE=str(tmp_path / "modules"),
    )
    assert done.code == 0, done.err
    expected = logits(hf_lowrank.load(folder))
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


def test_transformers_own_push_to_hub_uploads_the_loading_code_too(hub: FakeHub, folder: Path):
    hf_lowrank.load(folder).push_to_hub("ada/other")
    files = hub.repositories["ada/other"].files
    assert {"config.json", "model.safetensors", "modeling_lowrank.py"} <= set(files)
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_a_private_repository(hub: FakeHub, folder: Path):
    publish(folder, "ada/small", private=True)
    assert hub.repositories["ada/small"].private
    publish(folder, "ada/public")
    assert not hub.repositories["ada/public"].private


def test_a_second_push_is_a_second_commit_on_what_is_there(hub: FakeHub, folder: Path):
    hub.repositories["ada/small"] = Repository(private=False)
    hub.repositories["ada/small"].commits.append({"NOTES.md": b"keep", "README.md": b"old"})
    publish(folder, "ada/small")
    files = hub.repositories["ada/small"].files
    assert len(hub.repositories["ada/small"].commits) == 2
    assert files["NOTES.md"] == b"keep"
    assert files["README.md"] == (folder / "README.md").read_bytes()


def test_a_folder_without_a_model(hub: FakeHub, tmp_path: Path):
    with pytest.raises(StorageError, match=r"holds no config\.json"):
        publish(tmp_path, "ada/small")
    assert hub.requests == []


@pytest.mark.parametrize("part", ["preupload", "storage", "/commit/"])
@pytest.mark.parametrize("failure", ["refused", "gone"])
def test_nothing_is_half_published_when_a_push_breaks_off(
    hub: FakeHub, folder: Path, part: str, failure: str
):
    hub.upload_mode = "lfs"
    if failure == "refused":
        hub.refuse = {part: 403}
        reason = "not published: the token has no permission to write there"
    else:
        hub.hang_up = part
        reason = f"not published: talking to {hub.url} failed \\("
    with pytest.raises(PublishError, match=f"^ada/small: {reason}") as caught:
        publish(folder, "ada/small")
    assert str(caught.value).endswith(f"hf upload ada/small {folder}")
    assert "\n" not in str(caught.value)
    assert hub.repositories["ada/small"].commits == []
    hub.refuse, hub.hang_up = {}, ""
    publish(folder, "ada/small")
    assert "model.safetensors" in hub.repositories["ada/small"].files


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (409, "someone else changed the repository"),
        (418, "the Hub refuses (refused)"),
        (500, "a problem of its own (status 500)"),
    ],
)
def test_what_the_hub_says_becomes_a_sentence(hub: FakeHub, folder: Path, status: int, reason: str):
    hub.refuse = {"/commit/": status}
    with pytest.raises(PublishError) as caught:
        publish(folder, "ada/small")
    assert reason in str(caught.value)
    assert hub.repositories["ada/small"].commits == []


# check_repository


def test_a_good_name_is_completed_and_nothing_is_changed(hub: FakeHub):
    assert check_repository("small") == "ada/small"
    assert check_repository("engines/small") == "engines/small"
    assert writes(hub) == []
    assert hub.repositories == {}


@pytest.mark.parametrize("name", ["a/b/c", "ada/bad name", "ada/x.git"])
def test_a_name_that_is_no_name(hub: FakeHub, name: str):
    with pytest.raises(PublishError, match=r"^push_to_hub: .*" + name.replace(".", r"\.")):
        check_repository(name)
    assert hub.requests == []


def test_offline_mode(hub: FakeHub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PublishError, match="offline mode; unset HF_HUB_OFFLINE"):
        check_repository("ada/small")
    assert hub.requests == []


def test_no_token(hub: FakeHub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PublishError, match="publishing needs a token; log in with `hf auth login`"):
        check_repository("ada/small")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("token", "reason"),
    [("hf_typo", "the token is not valid"), ("hf_read", "the token may only read")],
)
def test_a_token_that_does_not_do(hub: FakeHub, token: str, reason: str):
    with pytest.raises(PublishError, match=reason):
        check_repository("ada/small", token=token)
    assert writes(hub) == []


def test_a_repository_of_someone_else(hub: FakeHub):
    with pytest.raises(
        PublishError, match=r"^bob/small: belongs to bob, but the token may write for ada, engines"
    ):
        check_repository("bob/small")


def test_a_public_repository_that_was_to_be_private(hub: FakeHub, folder: Path):
    hub.repositories["ada/small"] = Repository(private=False)
    with pytest.raises(PublishError, match="exists and is public"):
        publish(folder, "ada/small", private=True)
    assert hub.repositories["ada/small"].commits == []
    assert check_repository("ada/small", private=False) == "ada/small"


def test_a_hub_that_does_not_answer(hub: FakeHub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PublishError, match=r"talking to http://127\.0\.0\.1:9 failed"):
        check_repository("ada/small")


# scripts/compress_llm.py --push_to_hub


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def compress_llm(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> InProcess:
    script = InProcess("compress_llm", monkeypatch, capsys)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return script


def test_the_script_publishes_what_it_saved(
    compress_llm: InProcess, hub: FakeHub, inputs: Inputs, tmp_path: Path
):
    arguments = inputs.arguments(param_ratio=0.6, output_dir=tmp_path / "out", push_to_hub="small")
    done = compress_llm(*arguments, "--private")
    assert done.code == 0, done.err
    repository = hub.repositories["ada/small"]
    assert repository.private
    assert repository.files == published(tmp_path / "out")
    assert 'from_pretrained("ada/small")' in repository.files["README.md"].decode()
    assert f"published as {hub.url}/ada/small/commit/" in done.out


def test_no_published_file_names_a_folder_of_this_machine(
    compress_llm: InProcess, hub: FakeHub, inputs: Inputs, tmp_path: Path
):
    pytest.importorskip("matplotlib")
    arguments = inputs.arguments(
        param_ratio=0.6, output_dir=tmp_path / "out", push_to_hub="ada/small", html_report=True
    )
    assert compress_llm(*arguments).code == 0
    files = hub.repositories["ada/small"].files
    assert "report.html" in files
    folder = str(inputs.model.parent).encode()
    assert [name for name, content in files.items() if folder in content] == []
    kept, published = (
        json.loads(text)
        for text in ((tmp_path / "out" / "report.json").read_bytes(), files["report.json"])
    )
    assert kept["data"]["calibration"] == str(inputs.calibration)
    assert published["data"]["calibration"] == inputs.calibration.name
    assert published["model"] == inputs.model.name
    changed = {"model": "", "data": {}, "command": ""}
    assert published | changed == kept | changed


def test_each_of_several_sizes_gets_a_repository(
    compress_llm: InProcess, hub: FakeHub, inputs: Inputs, tmp_path: Path
):
    arguments = inputs.arguments(output_dir=tmp_path / "out", push_to_hub="ada/small")
    assert compress_llm(*arguments, "--param_ratio", "0.8", "0.5").code == 0
    assert set(hub.repositories) == {"ada/small-0.8", "ada/small-0.5"}
    for ratio in ("0.8", "0.5"):
        files = hub.repositories[f"ada/small-{ratio}"].files
        weights = tmp_path / "out" / ratio / "model.safetensors"
        assert files["model.safetensors"] == weights.read_bytes()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"push_to_hub": "bob/small"}, "belongs to bob"),
        ({"push_to_hub": "ada/small", "output_dir": None}, "give --output_dir as well"),
    ],
)
def test_a_mistake_is_found_before_the_model_is_loaded(
    compress_llm: InProcess,
    hub: FakeHub,
    inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    reason: str,
):
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded")
    )
    settings = {"param_ratio": 0.6, "output_dir": tmp_path / "out"} | changes
    assert reason in compress_llm(*inputs.arguments(**settings)).error
    assert not (tmp_path / "out").exists()
    assert hub.repositories == {}


def test_a_failed_push_leaves_the_saved_model(
    compress_llm: InProcess, hub: FakeHub, inputs: Inputs, tmp_path: Path
):
    hub.refuse = {"/commit/": 403}
    output = tmp_path / "out"
    arguments = inputs.arguments(param_ratio=0.6, output_dir=output, push_to_hub="ada/small")
    assert f"hf upload ada/small {output}" in compress_llm(*arguments).error
    assert hf_lowrank.load(output) is not None
    assert hub.repositories["ada/small"].commits == []
