"""llama.cpp writes with GGUF files what transformers writes with the checkpoints."""

import pytest
from transformers import AutoTokenizer

pytest.importorskip("cyllama", reason="an engine for GGUF files; make test-exports installs it")
from cyllama.llama import llama_cpp

FLOAT32 = 0
TEXTS = ("the weights of 12 layers", "other layer, 3!\nthe  weights", "</s>the layer")


def opened(folder):
    settings = llama_cpp.LlamaModelParams()
    settings.n_gpu_layers = 0
    return llama_cpp.LlamaModel(str(folder / "model.gguf"), settings, verbose=False)


def written(model, prompt, count):
    settings = llama_cpp.LlamaContextParams()
    settings.n_ctx = 64
    settings.n_threads = 1
    settings.type_k = settings.type_v = FLOAT32  # of the cache
    settings.flash_attn_type = 0
    context = llama_cpp.LlamaContext(model, settings, verbose=False)
    greedy = llama_cpp.LlamaSampler(llama_cpp.LlamaSamplerChainParams())
    greedy.add_greedy()
    tokens, place = list(prompt), 0
    for _ in range(count):
        new = tokens[place:]
        batch = llama_cpp.LlamaBatch(n_tokens=len(new), embd=0, n_seq_max=1, verbose=False)
        batch.set_batch(new, place, False)
        assert context.decode(batch) == 0
        place = len(tokens)
        tokens.append(greedy.sample(context, -1))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", ["plain_dense", "plain_narrowed", "plain_untied"])
def test_tokens_are_those_of_transformers(exported, name):
    folder, rows = exported(name, "gguf")
    model = opened(folder)
    for row in rows:
        assert written(model, row["prompt"], len(row["tokens"])) == row["tokens"]


@pytest.mark.parametrize("name", ["plain_narrowed", "plain_untied"])
def test_text_is_split_as_transformers_splits_it(exported, checkpoints, name):
    model = opened(exported(name, "gguf")[0])  # to outlive its vocabulary
    vocabulary = model.get_vocab()
    tokenizer = AutoTokenizer.from_pretrained(checkpoints / name)
    for text in TEXTS:
        assert vocabulary.tokenize(text, False, True) == tokenizer(text)["input_ids"]
