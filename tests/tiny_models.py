"""Tiny models with two blocks and random weights, batches for them, and what is asked of models.

All offline and seeded.

Matrices are drawn with a large enough scale that the predictions depend on every layer, and no
bias or norm is left at its initial 0 or 1, so that losing one shows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_lowrank.format.forms.factors import LowRankLinear

VOCABULARY = 96
MAX_LENGTH = 64
HIDDEN = 32
INTERMEDIATE = 64
NUM_LABELS = 3
SCALE = 0.2
SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LENGTH,
    "initializer_range": SCALE,
    **SPECIAL_TOKENS,
}

Batch = dict[str, torch.Tensor]


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """`Conv1D` layers, q, k and v fused in `c_attn`, tied embeddings, biases."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=MAX_LENGTH,
        n_embd=HIDDEN,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=SCALE,
        **SPECIAL_TOKENS,
    )
    return build(GPT2LMHeadModel, config, seed)


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Grouped queries (k and v are half as tall as q), tied embeddings, no biases."""
    settings = {**LLAMA_LIKE, "tie_word_embeddings": True, **changes}
    return build(LlamaForCausalLM, LlamaConfig(**settings), seed)


def tiny_opt(seed: int = 0) -> OPTForCausalLM:
    """Biases everywhere, learned positions."""
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        word_embed_proj_dim=HIDDEN,
        ffn_dim=INTERMEDIATE,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        dropout=0.0,
        init_std=SCALE,
        **SPECIAL_TOKENS,
    )
    return build(OPTForCausalLM, config, seed)


def tiny_bert_classifier(seed: int = 0) -> BertForSequenceClassification:
    """An encoder with a pooler and a classification head over three labels."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=NUM_LABELS,
        initializer_range=SCALE,
        pad_token_id=0,
    )
    return build(BertForSequenceClassification, config, seed)


def tiny_t5(seed: int = 0) -> T5ForConditionalGeneration:
    """Encoder and decoder, tied embeddings."""
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        d_kv=HIDDEN // 4,
        d_ff=INTERMEDIATE,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )
    return build(T5ForConditionalGeneration, config, seed)


def tiny_phi3(seed: int = 0) -> Phi3ForCausalLM:
    """q, k and v fused in `qkv_proj`, gate and up in `gate_up_proj`; untied head."""
    return build(Phi3ForCausalLM, Phi3Config(**LLAMA_LIKE), seed)


def tiny_mixtral(seed: int = 0) -> MixtralForCausalLM:
    """Experts fused into 3-D parameters, and a router."""
    config = MixtralConfig(**LLAMA_LIKE, num_local_experts=4, num_experts_per_tok=2)
    return build(MixtralForCausalLM, config, seed)


def tiny_qwen2_moe(seed: int = 0) -> Qwen2MoeForCausalLM:
    """Fused experts and a router, and a shared expert of `nn.Linear` layers with its own gate."""
    config = Qwen2MoeConfig(
        **LLAMA_LIKE,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=48,
        num_experts=4,
        num_experts_per_tok=2,
    )
    return build(Qwen2MoeForCausalLM, config, seed)


TINY_MODELS: dict[str, Callable[..., Any]] = {
    "gpt2": tiny_gpt2,
    "llama": tiny_llama,
    "opt": tiny_opt,
    "bert": tiny_bert_classifier,
    "t5": tiny_t5,
    "phi3": tiny_phi3,
    "mixtral": tiny_mixtral,
    "qwen2_moe": tiny_qwen2_moe,
}


def build(model_class: Callable[[Any], Any], config: Any, seed: int) -> Any:
    """A model of the class in eval mode; the global random state is left alone."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = model_class(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def token_batches(
    num_batches: int = 4,
    batch_size: int = 2,
    length: int = 16,
    *,
    padding: int = 0,
    vocabulary: int = VOCABULARY,
    seed: int = 0,
) -> list[Batch]:
    """Random tokens (none of them special) with an attention mask.

    With `padding`, the last sequence of each batch ends in so many padding tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(num_batches):
        tokens = torch.randint(3, vocabulary, (batch_size, length), generator=generator)
        mask = torch.ones_like(tokens)
        if padding:
            tokens[-1, -padding:] = 0
            mask[-1, -padding:] = 0
        batches.append({"input_ids": tokens, "attention_mask": mask})
    return batches


def sentence_batches(num_batches: int = 4, batch_size: int = 4, seed: int = 0) -> list[Batch]:
    """Token batches with padding and one class label for each sequence."""
    generator = torch.Generator().manual_seed(seed + 1)
    return [
        {**batch, "labels": torch.randint(0, NUM_LABELS, (batch_size,), generator=generator)}
        for batch in token_batches(num_batches, batch_size, padding=4, seed=seed)
    ]


def seq2seq_batches(num_batches: int = 4, batch_size: int = 2, seed: int = 0) -> list[Batch]:
    """Token batches with label sequences of another length."""
    targets = token_batches(num_batches, batch_size, length=10, seed=seed + 1)
    return [
        {**batch, "labels": target["input_ids"]}
        for batch, target in zip(
            token_batches(num_batches, batch_size, seed=seed), targets, strict=True
        )
    ]


def batches_for(model: nn.Module, num_batches: int = 4, seed: int = 0) -> list[Batch]:
    """Random batches that the model's own task loss can be computed on."""
    if isinstance(model, BertForSequenceClassification):
        return sentence_batches(num_batches, seed=seed)
    if isinstance(model, T5ForConditionalGeneration):
        return seq2seq_batches(num_batches, seed=seed)
    return token_batches(num_batches, seed=seed)


def written_batches(
    model: Any, num_batches: int = 4, batch_size: int = 4, length: int = 16, *, seed: int = 0
) -> list[Batch]:
    """Text that a causal language model wrote itself, sampled token by token.

    No model predicts it better than its author in expectation, so damage to the author raises the
    loss. On random tokens damage may well lower it.
    """
    total = num_batches * batch_size
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY, (total, 1), generator=generator)
    with torch.no_grad():
        while tokens.shape[1] < length:
            probabilities = model(tokens).logits[:, -1].float().softmax(dim=-1)
            following = torch.multinomial(probabilities, 1, generator=generator)
            tokens = torch.cat([tokens, following], dim=1)
    return [
        {"input_ids": part, "attention_mask": torch.ones_like(part)}
        for part in tokens.split(batch_size)
    ]


@torch.no_grad()
def logits(model: Any, batch: Batch) -> torch.Tensor:
    """The model's output on a batch."""
    return model(**batch).logits


def snapshot(model: nn.Module) -> Batch:
    """A copy of every parameter and buffer, by name."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def equal_states(one: Batch, other: Batch) -> bool:
    """Whether the same names hold bitwise equal tensors of the same type."""
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name])
        for name, tensor in one.items()
    )


def num_lowrank(model: nn.Module) -> int:
    """How many of the model's layers are factorized."""
    return sum(isinstance(module, LowRankLinear) for module in model.modules())
