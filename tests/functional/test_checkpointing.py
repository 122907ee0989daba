"""Activation checkpointing inside the model gives the gradients that the plain model gives."""

import optree
import pytest
import torch
import transformers
from torch import nn

import peft_func as pf
from tests.zoo import ids


def grads(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor | None]:
    model = pf.functionalize(net)
    method = pf.chain(pf.dora(pf.of_type(nn.Linear), rank=2), pf.train(pf.of_type(nn.Embedding, nn.LayerNorm)))
    adapter = pf.bind(method, model)
    frozen, tree = adapter.init(0)
    leaves = pf.map_leaves(lambda t: (t + 0.1 * t.cos()).requires_grad_(), tree)
    model(adapter.apply(frozen, leaves), x)[0].square().sum().backward()
    return [leaf.grad for leaf in optree.tree_leaves(leaves)]


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertModel(config, add_pooling_layer=False)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("options", [None, {"use_reentrant": False}, {"use_reentrant": True}])
@pytest.mark.parametrize("build", [llama, bert])
def test_gradient_checkpointing_of_transformers(build, options):
    torch.manual_seed(1)
    net, x = build().double().train(), ids(2, 5, high=32)
    plain = grads(net, x)
    net.gradient_checkpointing_enable(options)
    assert any(getattr(module, "gradient_checkpointing", False) for module in net.modules())
    checkpointed = grads(net, x)
    for a, b in zip(plain, checkpointed, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, atol=1e-10)
    assert sum(grad is not None and bool(grad.any()) for grad in plain) > len(plain) / 2
