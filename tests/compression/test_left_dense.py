"""Models whose layers are not all what they seem: what is compressed computes the same once loaded.

Each is compressed, saved and loaded; the layers that stay dense are named with their reason.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import hf_lowrank
from hf_lowrank import LowRankConfig
from hf_lowrank.errors import TargetError
from hf_lowrank.format.forms.factors import LowRankLinear
from tests.tiny_models import (
    HIDDEN,
    INTERMEDIATE,
    LLAMA_LIKE,
    MAX_LENGTH,
    NUM_LABELS,
    VOCABULARY,
    Batch,
    build,
    equal_states,
    logits,
    sentence_batches,
    seq2seq_batches,
    snapshot,
    tiny_llama,
    token_batches,
)

READ = "other code than the layer's own reads its weight"
UNCALLED = "the first batch does not call it"
NO_GRADIENT = "no gradient of the first batch's loss reaches it"
MAMBA = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "state_size": 8,
    "num_hidden_layers": 2,
    "time_step_rank": 8,
    "initializer_range": 0.2,
}
JAMBA = {
    **LLAMA_LIKE,
    "num_hidden_layers": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "num_experts": 2,
    "use_mamba_kernels": False,
    "mamba_d_state": 8,
    "mamba_dt_rank": 8,
}
RWKV = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "context_length": MAX_LENGTH,
    "rescale_every": 1,
}
BERT_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_LENGTH,
    "num_labels": NUM_LABELS,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
DEBERTA = {
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "position_biased_input": False,
}
LED = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": INTERMEDIATE,
    "decoder_ffn_dim": INTERMEDIATE,
    "attention_window": 8,
    "max_encoder_position_embeddings": MAX_LENGTH,
    "max_decoder_position_embeddings": MAX_LENGTH,
    "pad_token_id": 0,
    "decoder_start_token_id": 2,
}
INDEXED = {
    **LLAMA_LIKE,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
# Class, settings of its config, batches, and the reason by the last part of a name left dense.
KINDS: dict[str, tuple[str, dict[str, Any], Any, dict[str, str]]] = {
    "mamba": ("MambaForCausalLM", MAMBA, token_batches, {"dt_proj": READ}),
    "jamba": ("JambaForCausalLM", JAMBA, token_batches, {"dt_proj": READ}),
    "deberta": ("DebertaForSequenceClassification", BERT_LIKE | DEBERTA, sentence_batches, {}),
    "longformer": (
        "LongformerForSequenceClassification",
        {**BERT_LIKE, "attention_window": 8},
        sentence_batches,
        {},
    ),
    "led": (
        "LEDForConditionalGeneration",
        LED,
        seq2seq_batches,
        dict.fromkeys(("query_global", "key_global", "value_global"), UNCALLED),
    ),
    "rwkv": ("RwkvForCausalLM", RWKV | {"rescale_every": 0}, token_batches, {}),
    "deepseek_v32": (
        "DeepseekV32ForCausalLM",
        INDEXED,
        token_batches,
        dict.fromkeys(("wq_b", "wk", "weights_proj"), NO_GRADIENT),
    ),
}


def tiny(kind: str) -> tuple[Any, list[Batch], dict[str, str]]:
    name, settings, batches, reasons = KINDS[kind]
    model_class = getattr(transformers, name)
    return build(model_class, model_class.config_class(**settings), 0), batches(), reasons


def lowrank_parts(model: nn.Module) -> set[str]:
    return {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, LowRankLinear)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_computes_what_was_compressed(kind: str, tmp_path: Path):
    model, batches, reasons = tiny(kind)
    dense = logits(model, batches[0])
    report = hf_lowrank.compress(model, LowRankConfig(rank=4), batches, progress=False)
    found = {name.rsplit(".", 1)[-1]: reason for name, reason in report.failures.items()}
    assert found == reasons
    assert set(report.failures).isdisjoint(report.ranks)
    assert lowrank_parts(model)
    assert lowrank_parts(model).isdisjoint(reasons)
    assert not torch.allclose(logits(model, batches[0]), dense, atol=1e-3)
    model.save_pretrained(tmp_path)
    loaded = hf_lowrank.load(tmp_path)
    assert equal_states(snapshot(loaded), snapshot(model))
    written = logits(model, batches[0])
    torch.testing.assert_close(logits(loaded, batches[0]), written, rtol=0, atol=1e-6)
    hf_lowrank.merge(model)
    torch.testing.assert_close(logits(model, batches[0]), written, rtol=1e-3, atol=1e-4)


def test_a_model_that_rescales_its_weights_is_refused():
    model = build(transformers.RwkvForCausalLM, transformers.RwkvConfig(**RWKV), 0)
    logits(model, token_batches(1)[0])  # what it divided before is not seen any more
    before = snapshot(model)
    with pytest.raises(
        TargetError,
        match=r"^RwkvForCausalLM: divides weights of its own in its first pass \(rescale_every 1\),"
        r" and would do so again with the saved ones; set rescale_every to 0 in its config\.json",
    ):
        hf_lowrank.compress(model, LowRankConfig(rank=4), token_batches(), progress=False)
    assert equal_states(snapshot(model), before)


@pytest.mark.parametrize("kind", ["mamba", "jamba"])
def test_weights_that_others_read_are_found_without_data(kind: str):
    model, batches, reasons = tiny(kind)
    config = LowRankConfig(rank=4, metric="plain")
    report = hf_lowrank.compress(model, config, progress=False)
    assert {name.rsplit(".", 1)[-1]: r for name, r in report.failures.items()} == reasons
    assert torch.isfinite(logits(model, batches[0])).all()


def test_while_loading_weights_that_others_read_stay_dense(tmp_path: Path):
    model, batches, _ = tiny("mamba")
    model.save_pretrained(tmp_path)
    config = LowRankConfig(rank=4, metric="plain")
    loaded = type(model).from_pretrained(tmp_path, quantization_config=config)
    assert lowrank_parts(loaded) == {"in_proj", "x_proj", "out_proj"}
    hf_lowrank.compress(model, config, progress=False)
    assert torch.equal(logits(loaded, batches[0]), logits(model, batches[0]))


def test_layers_that_share_a_weight_do_not_exceed_the_budget(tmp_path: Path):
    model = tiny_llama()
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    second.weight = first.weight
    batches = token_batches()
    report = hf_lowrank.compress(model, LowRankConfig(param_ratio=0.5), batches, progress=False)
    assert model.model.layers[0].mlp.up_proj.weight is model.model.layers[1].mlp.up_proj.weight
    assert set(report.failures) == {f"model.layers.{index}.mlp.up_proj" for index in (0, 1)}
    assert report.parameters.targeted_kept <= 0.5 * report.parameters.targeted_dense
    kept = sum(parameter.numel() for parameter in model.parameters())
    assert report.parameters.kept == kept


def test_an_accelerated_model_is_compressed_where_it_lies():
    accelerate = pytest.importorskip("accelerate")
    plain, placed = tiny_llama(), tiny_llama()
    accelerate.dispatch_model(placed, {"": "cpu"}, force_hooks=True)
    batches, config = token_batches(), LowRankConfig(param_ratio=0.6)
    for model in (plain, placed):
        assert not hf_lowrank.compress(model, config, batches, progress=False).failures
    assert torch.equal(logits(plain, batches[0]), logits(placed, batches[0]))
