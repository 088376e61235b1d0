"""Writes tiny checkpoints, and beside each what transformers makes of it in fp32.

python -m tests.serving.exports.checkpoints FOLDER

Run by `make test-exports` in the project's own environment: an engine's pins another transformers.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_lowrank import LowRankConfig, compress
from hf_lowrank.format.rebuild import compressed_layers
from hf_lowrank.inputs.encoders import load_encoder
from hf_lowrank.inputs.sentences import tokenized
from tests.scripts import SPECIAL, lines, save_encoder
from tests.serving.vllm_engine import checkpoints as served
from tests.tiny_models import build, written_batches

EMBEDDINGS = "expected.pt"
SENTENCES = ["w01 w02 w03", "w04 w05", "w06"]
NARROWED = {"channels_only": True}
UNEVEN = {**NARROWED, "exclude_modules": ["layers.0.mlp.*"]}
# Its vocabulary holds all bytes.
LLAMA = {**served.SIZES, "vocab_size": 320, "tie_word_embeddings": True}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# name: (config, settings of the compression); these alone can be GGUF files
PLAIN: dict[str, tuple[Any, dict[str, Any] | None]] = {
    "plain_dense": (LlamaConfig(**LLAMA), None),
    "plain_narrowed": (LlamaConfig(**LLAMA), UNEVEN),
    "plain_untied": (
        LlamaConfig(**{**LLAMA, "tie_word_embeddings": False, "rope_parameters": LLAMA_3}),
        NARROWED,
    ),
}
LOW_RANK = ("llama_compact", "llama_factors", "qwen2", "gpt2")
QUANTIZED = "llama_int8"
ENCODER = "encoder"


def byte_tokenizer(vocabulary: int = 320, digits: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE as SmolLM2 has it, with or without a split into single digits."""
    tokenizer = Tokenizer(BPE())
    split = ByteLevel(add_prefix_space=False)
    single = Digits(individual_digits=True)
    tokenizer.pre_tokenizer = Sequence([single, split]) if digits else split
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["the weights of the layer and of the other layer 1 2 3"], trainer
    )
    pad, begin, end = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=begin, eos_token=end
    )


def write_plain(folder: Path, name: str) -> None:
    """A Llama whose every layer is dense or narrowed."""
    config, settings = PLAIN[name]
    model = build(LlamaForCausalLM, config, seed=0)
    if settings:
        lowrank = LowRankConfig(param_ratio=0.8, measured_prices=False, **settings)
        compress(model, lowrank, written_batches(model), progress=False)
        assert {layer.form for layer in compressed_layers(model).values()} == {"narrowed"}
    model.save_pretrained(folder)
    byte_tokenizer(digits=name == "plain_untied").save_pretrained(folder)
    if settings:
        served.write_expected(folder)
    else:
        (folder / served.EXPECTED).write_text(served.as_json(model))


def write_encoder(root: Path) -> None:
    """A compressed sentence encoder, and the embeddings of `SENTENCES`."""
    encoder = load_encoder(str(save_encoder(root / "dense_encoder")))
    batches = list(tokenized(lines(32, 0), encoder.tokenizer, 32, 4))
    config = LowRankConfig(param_ratio=0.6)
    compress(encoder.model, config, batches, loss_function=encoder.loss, progress=False)
    folder = root / ENCODER
    encoder.model.save_pretrained(folder)
    encoder.tokenizer.save_pretrained(folder)
    tokens = encoder.tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.save(encoder.loss.embed(encoder.model, dict(tokens)), folder / EMBEDDINGS)


def main() -> None:
    root = Path(sys.argv[1])
    for name in PLAIN:
        if not (root / name / served.EXPECTED).exists():
            write_plain(root / name, name)
    for name in (*LOW_RANK, QUANTIZED):
        if not (root / name / served.EXPECTED).exists():
            served.write_checkpoint(root / name, name)
    if not (root / ENCODER / EMBEDDINGS).exists():
        write_encoder(root)


if __name__ == "__main__":
    main()
