"""The command line as a user sees it: a tiny checkpoint on disk, and runs of the scripts.

The checkpoint's texts were written by the model itself, so that damage to it raises its loss.
"""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import huggingface_hub
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import WordLevelTrainer
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from tests.tiny_models import (
    HIDDEN,
    INTERMEDIATE,
    MAX_LENGTH,
    SCALE,
    VOCABULARY,
    build,
    tiny_llama,
    written_batches,
)

ROOT = Path(__file__).resolve().parents[2]
SPECIAL = ("<pad>", "<s>", "</s>")
WORDS = tuple(f"w{number:02d}" for number in range(VOCABULARY - len(SPECIAL)))
Refusal = Callable[..., str]  # runs with some changes and returns the error
_PROGRESS = re.compile(r"\d+%\||^\.\.\. ")
# What torchao writes when transformers imports it, where it is installed: kernels for GPUs.
_OF_TORCHAO = re.compile(r"^Failed to load \S*torchao|_pytree\.py:\d+\] <enum ")


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each of `WORDS`, trained on the fly; ids 0 to 2 are special."""
    tokenizer = Tokenizer(WordLevel(unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    trainer = WordLevelTrainer(vocab_size=VOCABULARY, special_tokens=list(SPECIAL))
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    pad, begin, end = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, unk_token=pad, bos_token=begin, eos_token=end
    )


def pair_tokenizer() -> PreTrainedTokenizerFast:
    """The word tokenizer with BERT's frame around a question and its context."""
    words = word_tokenizer()
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words.backend_tokenizer,
        pad_token=words.pad_token,
        unk_token=words.unk_token,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def save_encoder(folder: Path) -> Path:
    """A tiny encoder without a head, and its tokenizer."""
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=MAX_LENGTH,
        initializer_range=SCALE, pad_token_id=0,
    )  # fmt: skip
    build(BertModel, config, 0).save_pretrained(folder)
    pair_tokenizer().save_pretrained(folder)
    return folder


def save_checkpoint(folder: Path, model: Any = None, **kwargs: Any) -> Path:
    """A dense model, by default a tiny Llama, and its tokenizer in a folder."""
    (model or tiny_llama()).save_pretrained(folder, **kwargs)
    word_tokenizer().save_pretrained(folder)
    return folder


def written_text(num_tokens: int = 2048, seed: int = 0) -> str:
    """Text that the default model of `save_checkpoint` wrote, `num_tokens` tokens long."""
    (batch,) = written_batches(tiny_llama(), 1, num_tokens // 32, 32, seed=seed)
    return word_tokenizer().decode(batch["input_ids"].flatten())


def as_arguments(settings: Mapping[str, object]) -> list[str]:
    """Settings as a command line has them; None stands for one that is left out."""
    given = [(name, value) for name, value in settings.items() if value is not None]
    return [part for name, value in given for part in (f"--{name}", str(value))]


class Inputs(NamedTuple):
    """Files that a run needs."""

    model: Path
    calibration: Path
    evaluation: Path

    def arguments(self, **changes: object) -> list[str]:
        """Arguments of a run on these files in about 0.1 s; a change to None drops one."""
        settings: dict[str, object] = {
            "model": self.model,
            "calibration": self.calibration,
            "evaluation": self.evaluation,
            "foreign_evaluation": "none",
            "calibration_sequences": 16,
            "evaluation_sequences": 16,
            "held_out_sequences": 8,
            "sequence_length": 32,
            "html_report": False,
            "sample_prompt": "none",
            "speed": False,
            **changes,
        }
        return as_arguments(settings)


def make_inputs(folder: Path) -> Inputs:
    """A tiny checkpoint and two texts of 2048 tokens."""
    inputs = Inputs(
        save_checkpoint(folder / "model"), folder / "calibration.txt", folder / "evaluation.txt"
    )
    inputs.calibration.write_text(written_text(seed=0), encoding="utf-8")
    inputs.evaluation.write_text(written_text(seed=1), encoding="utf-8")
    return inputs


class Finished(NamedTuple):
    """How a run ended."""

    code: int
    out: str
    err: str

    @property
    def messages(self) -> list[str]:
        """Lines on stderr that are no progress bars and none of torchao's."""
        lines = [line.strip() for line in re.split(r"[\r\n]", self.err)]
        noise = (_PROGRESS, _OF_TORCHAO)
        return [line for line in lines if line and not any(each.search(line) for each in noise)]

    @property
    def error(self) -> str:
        """The one message of a refused run."""
        assert self.code == 2, f"exit code {self.code}\n{self.out}\n{self.err}"
        assert len(self.messages) == 1, self.err
        assert self.messages[0].startswith("error: ")
        return self.messages[0].removeprefix("error: ")


def script_module(name: str) -> Any:
    """A script of this repository as a module."""
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up here
    spec.loader.exec_module(module)
    return module


class InProcess:
    """Runs a script's `main` in this process, as `python scripts/NAME.py ARGUMENTS` would."""

    def __init__(
        self, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.name = name
        self.module = script_module(name)
        self.monkeypatch = monkeypatch
        self.capsys = capsys
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    def __call__(self, *arguments: object) -> Finished:
        """Exit code and what was printed; exceptions other than SystemExit pass through."""
        argv = [f"scripts/{self.name}.py", *(str(argument) for argument in arguments)]
        self.monkeypatch.setattr(sys, "argv", argv)
        self.capsys.readouterr()
        code = 0
        with torch.random.fork_rng(devices=[]):
            try:
                self.module.main()
            except SystemExit as ending:
                code = ending.code if isinstance(ending.code, int) else int(bool(ending.code))
        return Finished(code, *self.capsys.readouterr())


def run_python(*arguments: object, **environment: str) -> Finished:
    """Runs a new Python process in the repository, offline."""
    settings = {
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        [sys.executable, *(str(argument) for argument in arguments)],
        cwd=ROOT,
        env={**os.environ, **settings, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def must_not_happen(what: str) -> Callable[..., None]:
    """A function that fails the test when it is called."""

    def fail(*args: Any, **kwargs: Any) -> None:
        pytest.fail(what)

    return fail


def leftovers(folder: Path) -> list[str]:
    """Temporary files and folders anywhere below a folder."""
    return sorted(str(path) for path in folder.rglob("*") if ".tmp" in path.name)


def lines(count: int, seed: int) -> list[str]:
    """Random sentences of 4 to 11 of the words that the tiny tokenizer knows."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(len(WORDS), (count, 12), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in row[: 4 + row[0] % 8]) for row in numbers]


class EncoderFiles(NamedTuple):
    """Files that a run on an encoder needs."""

    model: Path
    calibration: Path
    evaluation: Path
    pairs: Path

    def arguments(self, **changes: object) -> list[str]:
        settings: dict[str, object] = {
            "model": self.model,
            "calibration": self.calibration,
            "evaluation": self.evaluation,
            "param_ratio": 0.5,
            "speed": False,
            "html_report": False,
            **changes,
        }
        return as_arguments(settings)
