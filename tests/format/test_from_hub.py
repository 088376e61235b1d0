"""Loading from the Hub: the files that are checked are the files that are loaded."""

import re

import pytest

import hf_lowrank
import tests.fake_hub
from hf_lowrank.errors import CheckpointError, ConfigError
from tests.fake_hub import OWNER, TOKENS, Repository, acting_as_the_hub
from tests.format import same_tensors

REPO = f"{OWNER}/small"


class Handler(tests.fake_hub._Handler):
    """Serves a file of the revision asked for, `main` or a commit, to those who may read it."""

    def _resolve(self, repo_id, name):
        repository = self.hub.repositories.get(repo_id)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repository is None or (repository.private and token not in TOKENS):
            self._send(404, {}, {"X-Error-Code": "RepoNotFound"})
            return
        wanted = self.path.split("/")[4]
        for number in range(len(repository.commits), 0, -1):
            past = Repository(repository.private)
            past.commits = repository.commits[:number]
            if wanted in ("main", past.sha):
                break
        else:
            self._send(404, {}, {"X-Error-Code": "RevisionNotFound"})
            return
        if name not in past.files:
            self._send(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": past.sha})
            return
        tag = tests.fake_hub._blob_id(past.files[name])
        self._send(200, past.files[name], {"ETag": f'"{tag}"', "X-Repo-Commit": past.sha})


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(tests.fake_hub, "_Handler", Handler)
    with acting_as_the_hub(monkeypatch, tmp_path) as fake:
        yield fake


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def publish(hub, *commits, private=False):
    """A repository with these commits; returns their ids."""
    repository = hub.repositories.setdefault(REPO, Repository(private))
    ids = []
    for files in commits:
        repository.commits.append(files)
        ids.append(repository.sha)
    return ids


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def test_what_is_loaded_is_one_commit(hub, llama, cache):
    (commit,) = publish(hub, files_of(llama.folder))
    model = hf_lowrank.load(REPO, cache_dir=cache)
    assert same_tensors(model, llama.model)
    assert model.name_or_path == REPO
    asked = [path for _, path in hub.requests if "/resolve/main/" in path]
    assert {path.rsplit("/", 1)[1] for path in asked} == {"config.json"}
    assert any(f"/resolve/{commit}/model.safetensors" in path for _, path in hub.requests)


def test_the_revision_that_is_loaded_is_the_one_that_is_checked(hub, llama, gpt2, cache):
    first, _ = publish(hub, files_of(llama.folder), files_of(gpt2.folder))
    assert same_tensors(hf_lowrank.load(REPO, cache_dir=cache), gpt2.model)
    assert same_tensors(hf_lowrank.load(REPO, cache_dir=cache, revision=first), llama.model)


def test_a_bad_revision_is_refused_though_main_is_good(hub, llama, dense_folder, cache):
    bad, good = publish(hub, files_of(dense_folder), files_of(llama.folder))
    assert same_tensors(hf_lowrank.load(REPO, cache_dir=cache, revision=good), llama.model)
    with pytest.raises(CheckpointError, match=f"{REPO}: not a checkpoint of hf_lowrank"):
        hf_lowrank.load(REPO, cache_dir=cache, revision=bad)


def test_a_push_between_check_and_load_changes_nothing(
    hub, llama, dense_folder, cache, monkeypatch
):
    publish(hub, files_of(llama.folder))
    check = hf_lowrank.format.strict.check_checkpoint

    def check_and_push(*args, **kwargs):
        checked = check(*args, **kwargs)
        publish(hub, files_of(dense_folder))
        return checked

    monkeypatch.setattr(hf_lowrank.format.strict, "check_checkpoint", check_and_push)
    assert same_tensors(hf_lowrank.load(REPO, cache_dir=cache), llama.model)


def test_a_token_opens_a_private_repository(hub, llama, cache, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    publish(hub, files_of(llama.folder), private=True)
    with pytest.raises(CheckpointError, match=f"{REPO}: neither a folder nor reachable"):
        hf_lowrank.load(REPO, cache_dir=cache)
    assert same_tensors(hf_lowrank.load(REPO, cache_dir=cache, token="hf_read"), llama.model)


def test_all_files_go_to_the_cache_that_was_named(hub, llama, cache, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "default"))
    publish(hub, files_of(llama.folder))
    hf_lowrank.load(REPO, cache_dir=cache)
    assert list(cache.rglob("model.safetensors"))
    assert not list(tmp_path.glob("default/*/snapshots"))
    before = len(hub.requests)
    hf_lowrank.load(REPO, cache_dir=cache, local_files_only=True)
    assert len(hub.requests) == before


@pytest.mark.parametrize("remote", [True, False])
def test_a_subfolder_is_checked_and_loaded(hub, llama, dense_folder, cache, tmp_path, remote):
    files = {f"inner/{name}": data for name, data in files_of(llama.folder).items()}
    files |= files_of(dense_folder)
    publish(hub, files)
    source = REPO if remote else tmp_path / "local"
    for name, data in files.items():
        path = tmp_path / "local" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    model = hf_lowrank.load(source, cache_dir=cache, subfolder="inner")
    assert same_tensors(model, llama.model)
    with pytest.raises(CheckpointError, match="not a checkpoint of hf_lowrank"):
        hf_lowrank.load(source, cache_dir=cache)


def test_an_adapter_in_the_repository_is_refused(hub, llama, cache):
    """It would make transformers load the base model that the adapter names instead."""
    adapter = {"adapter_config.json": b'{"base_model_name_or_path": "someone/other"}'}
    publish(hub, files_of(llama.folder) | adapter)
    with pytest.raises(CheckpointError, match="holds an adapter beside the model"):
        hf_lowrank.load(REPO, cache_dir=cache)


@pytest.mark.parametrize(
    "other",
    [{"variant": "fp16"}, {"use_safetensors": False}, {"gguf_file": "x.gguf"}, {"state_dict": {}}],
    ids=lambda other: next(iter(other)),
)
def test_keywords_for_other_weights_are_refused(llama, other):
    message = f"load reads model.safetensors, which it has checked; leave out {next(iter(other))}."
    with pytest.raises(ConfigError, match=re.escape(message)):
        hf_lowrank.load(llama.folder, **other)


def test_safetensors_may_be_asked_for(llama):
    assert same_tensors(hf_lowrank.load(llama.folder, use_safetensors=True), llama.model)
