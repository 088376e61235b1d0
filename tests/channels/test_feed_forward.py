"""Feed-forwards by name, in architectures that are not among the tiny models."""

import pytest
import torch
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    FalconConfig,
    FalconForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)

from hf_lowrank import LowRankConfig, compress, load, merge
from hf_lowrank.errors import TargetError
from hf_lowrank.format.feed_forward import find_feed_forwards
from hf_lowrank.modeling.targets import find_targets
from tests.tiny_models import logits, tiny_llama, token_batches

CONFIG = LowRankConfig(param_ratio=0.6, channels=True)
GPT_LIKE = {"vocab_size": 96, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
MODELS = {
    "gptj": (GPTJForCausalLM, GPTJConfig(**GPT_LIKE, rotary_dim=4)),
    "bloom": (BloomForCausalLM, BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4)),
    "falcon": (
        FalconForCausalLM,
        FalconConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    ),
    "gpt_neox": (
        GPTNeoXForCausalLM,
        GPTNeoXConfig(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
        ),
    ),
    "distilbert": (
        DistilBertForMaskedLM,
        DistilBertConfig(vocab_size=96, dim=32, hidden_dim=64, n_layers=2, n_heads=4),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_channels_go_and_the_checkpoint_loads(name, tmp_path):
    torch.manual_seed(0)
    model_class, config = MODELS[name]
    model = model_class(config).eval()
    batches = [batch | {"labels": batch["input_ids"]} for batch in token_batches(2)]
    assert len(find_feed_forwards(model, find_targets(model, CONFIG))) == 2
    report = compress(model, CONFIG, batches, progress=False)
    assert report.narrowed
    expected = logits(model, batches[0])
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path), batches[0]), expected)
    merge(model)
    torch.testing.assert_close(logits(model, batches[0]), expected, rtol=1e-4, atol=1e-5)


class GatedInOne(nn.Module):
    """Gate and value in one layer, as in Moonshine's decoder."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(32, 128), nn.Linear(64, 32)


class NormOverChannels(nn.Module):
    """As in BitNet and Kosmos-2."""

    def __init__(self):
        super().__init__()
        self.fc1, self.ffn_layernorm, self.fc2 = (
            nn.Linear(32, 64),
            nn.LayerNorm(64),
            nn.Linear(64, 32),
        )


class NormBefore(NormOverChannels):
    """This one may lose channels."""

    def __init__(self):
        super().__init__()
        self.ffn_layernorm = nn.LayerNorm(32)


@pytest.mark.parametrize("kind", [GatedInOne, NormOverChannels])
def test_channels_that_do_not_act_one_by_one_stay(kind):
    with pytest.raises(TargetError, match="no feed-forward of a known kind"):
        find_feed_forwards(nn.Sequential(kind()), ["0.fc1", "0.fc2"])
    (block,) = find_feed_forwards(
        nn.Sequential(kind(), NormBefore()), ["0.fc1", "0.fc2", "1.fc1", "1.fc2"]
    )
    assert block.names == ("1.fc1", "1.fc2")


def test_a_feed_forward_counts_only_as_a_whole():
    model = tiny_llama()
    left = LowRankConfig(param_ratio=0.6, exclude_modules=["layers.0.mlp.gate_proj"])
    (block,) = find_feed_forwards(model, find_targets(model, left))
    assert block.output == "model.layers.1.mlp.down_proj"
    assert block.inputs == ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj")
