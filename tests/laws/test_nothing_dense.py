"""Training never forms a tensor of the size of a weight: neither `W + BA`, nor `dW`, nor the product of the factors."""

import pytest
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import peft_func as pf
from tests.zoo import ids, randn


class Watch(TorchDispatchMode):
    """Collects the operators that make new storage of one of the given shapes, in either orientation."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.shapes = {frozenset(w.shape) for w in weights}
        self.known = {w.untyped_storage().data_ptr() for w in weights}
        self.made: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if (
                isinstance(tensor, Tensor)
                and tensor.device.type != "meta"  # a carrier's shell: it has no storage
                and tensor.dim() == 2
                and frozenset(tensor.shape) in self.shapes
                and tensor.untyped_storage().data_ptr() not in self.known
            ):
                self.made.append(f"{func}{list(tensor.shape)}")
        return out


METHODS = [
    pf.lora(".*", rank=3, alpha=5),
    pf.gift(".*", rank=3, share="none"),
    pf.dora(".*", rank=3),
    pf.ia3(".*"),
    pf.chain(pf.lora(".*", rank=3), pf.gift(".*", rank=2, share="none"), pf.magnitude(".*")),
]


@pytest.mark.parametrize("method", METHODS, ids=["lora", "gift", "dora", "ia3", "chain"])
def test_a_training_step_makes_nothing_of_the_size_of_a_weight(method):
    # Extents that nothing else has: 29 samples, 53 -> 37 -> 41 -> 43.
    net = nn.Sequential(nn.Linear(53, 37), nn.GELU(), nn.Linear(37, 41), nn.Tanh(), nn.Linear(41, 43)).double()
    model = pf.functionalize(net)
    adapter = pf.bind(method, model)
    frozen, tree = adapter.init(0)
    leaves = pf.map_leaves(lambda t: (t + 0.1).requires_grad_(), tree)
    x = randn(29, 53).requires_grad_()
    matrices = [t for t in model.params.values() if t.dim() == 2]
    with Watch(matrices) as watch:
        model(adapter.apply(frozen, leaves), x).square().sum().backward()
    assert watch.made == []
    assert all(leaf.grad is not None for leaf in tree_leaves(leaves))
    with Watch(matrices) as watch:  # the watch does see a dense weight and its gradient
        model(pf.merge(adapter.apply(frozen, leaves)), x).square().sum().backward()
    assert len(watch.made) >= 6


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("kind", ["lora", "gift"])
def test_a_training_step_of_a_transformer(name, kind):
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 40, "vocab_size": 56}
    if name == "bert":
        config = transformers.BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=16)
        net = transformers.BertForMaskedLM(config)
    else:
        config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False)
        net = transformers.LlamaForCausalLM(config)
    model = pf.functionalize(net.double().train())
    linear = pf.of_type(nn.Linear)
    method = pf.lora(linear, rank=2) if kind == "lora" else pf.gift(linear, rank=2, share="none")
    adapter = pf.bind(method, model)
    frozen, tree = adapter.init(0)
    leaves = pf.map_leaves(lambda t: (t + 0.1).requires_grad_(), tree)
    adapted = [model.params[path] for path in adapter.parts[0].paths]
    tokens = ids(3, 11, high=56)
    with pf.densify("error"), Watch(adapted) as watch:
        model(adapter.apply(frozen, leaves), tokens, labels=tokens).loss.backward()
    assert watch.made == []
    assert all(leaf.grad is not None for leaf in tree_leaves(leaves))
