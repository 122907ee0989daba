"""DoRA against HF PEFT's, where both take the norms of the rows, and against the plain formula elsewhere."""

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft_func as pf
from tests.transforms.peer import Peer, compare
from tests.transforms.plain import (
    GRADS,
    VALUES,
    as_matrix,
    as_stored,
    call,
    grads_of,
    learnable,
    low_rank,
    random_like,
    same,
)
from tests.zoo import ZOO, randn, seeded

LAYERS = {
    "linear": (lambda: nn.Linear(5, 7), (4, 5)),
    "linear_without_bias": (lambda: nn.Linear(5, 7, bias=False), (2, 3, 5)),
    "hf_conv1d": (lambda: Conv1D(7, 5), (2, 4, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 8)),
    "conv2d_without_bias": (lambda: nn.Conv2d(4, 6, (1, 3), bias=False), (2, 4, 7, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 6, 2), (2, 2, 4, 3, 4)),
}


@pytest.mark.parametrize("stabilized", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_layer_equals_peft_in_outputs_gradients_and_merged_weights(layer, stabilized):
    build, shape = LAYERS[layer]
    net = seeded(lambda: nn.Sequential(build()))()
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"], use_dora=True, use_rslora=stabilized)
    method = pf.dora(["0"], rank=3, alpha=5, rank_stabilized=stabilized)
    compare(net, Peer(net, config), method, (randn(*shape),))


@pytest.mark.parametrize(
    ("name", "where"),
    [("bert", ["query", "dense"]), ("gpt2", ["c_attn", "c_fc"]), ("llama", ["q_proj", "v_proj", "down_proj"])],
)
def test_transformer_equals_peft(name, where):
    animal = ZOO[name]
    net = animal.build()
    peer = Peer(net, peft.LoraConfig(r=2, lora_alpha=3, target_modules=where, use_dora=True, bias="lora_only"))
    compare(net, peer, pf.dora(where, rank=2, alpha=3, bias=True), animal.inputs(0)[0], animal.output)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_first_magnitudes_are_those_of_peft():
    animal = ZOO["llama"]
    net = animal.build()
    with torch.random.fork_rng():
        model = peft.get_peft_model(animal.build(), peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    theirs = [p.detach() for n, p in model.named_parameters() if "magnitude" in n]
    tree = pf.bind(pf.dora(["q_proj"], rank=2), pf.functionalize(net)).init(0)[1]["dora"]
    same([leaf["magnitude"] for leaf in tree.values()], theirs, 1e-12)


MATRICES = ~pf.suffix("bias_k") & ~pf.suffix("bias_v")


def decomposed(net, path, leaf, scale):
    """diag(m / |V|) V, where the norm is a constant in backward."""
    V = as_matrix(net, path, net.get_parameter(path).detach() + low_rank(net, path, leaf, scale))
    norm = V.detach().norm(dim=-1)
    return as_stored(net, path, (leaf["magnitude"] / norm.where(norm != 0, 1.0)).unsqueeze(-1) * V)


@pytest.mark.parametrize("name", ["conv", "tied", "shared", "attention", "encoder_layer", "experts", "gpt2"])
def test_every_matrix_of_a_model_equals_the_formula(name):
    animal = ZOO[name]
    net = animal.build()
    model = pf.functionalize(net)
    adapter = pf.bind(pf.dora(MATRICES, rank=2, alpha=3), model)
    frozen, start = adapter.init(0)
    ours, theirs = learnable(random_like(start)), learnable(random_like(start))
    args, kwargs = animal.inputs(1)
    out = animal.output(model(adapter.apply(frozen, ours), *args, **kwargs))
    expected = call(net, {p: decomposed(net, p, leaf, 1.5) for p, leaf in theirs["dora"].items()}, animal, 1)
    same(out, expected, VALUES)
    same(grads_of(out, ours), grads_of(expected, theirs), GRADS)


def test_dora_is_lora_and_magnitude_in_one_part():
    animal = ZOO["llama"]
    model = pf.functionalize(animal.build())
    where = ["q_proj", "up_proj"]
    one, two = (
        pf.bind(method, model)
        for method in (
            pf.dora(where, rank=3, alpha=4),
            pf.chain(pf.lora(where, rank=3, alpha=4), pf.magnitude(where)),
        )
    )
    frozen, start = one.init(0)
    tree = random_like(start)
    split = {
        "lora": {path: {k: leaf[k] for k in "AB"} for path, leaf in tree["dora"].items()},
        "magnitude": {path: {"magnitude": leaf["magnitude"]} for path, leaf in tree["dora"].items()},
    }
    (x,), _ = animal.inputs(0)
    same(model(one.apply(frozen, tree), x).logits, model(two.apply(frozen, split), x).logits, 0.0)


def test_dropout_of_dora_leaves_norms_and_base_alone():
    net = seeded(lambda: nn.Linear(5, 4))()
    model = pf.functionalize(net).train()
    adapter = pf.bind(pf.dora("weight", rank=2, dropout=0.5), model)
    frozen, start = adapter.init(0)
    tree, x = random_like(start), randn(6, 5)
    torch.manual_seed(0)
    out = model(adapter.apply(frozen, tree), x)
    leaf = tree["dora"]["weight"]
    V = net.weight.detach() + leaf["B"] @ leaf["A"]
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5)
    branch = x @ net.weight.detach().T + dropped @ leaf["A"].T @ leaf["B"].T
    same(out, branch * leaf["magnitude"] / V.norm(dim=1) + net.bias.detach())


ERRORS = {
    "unknown option": (lambda: pf.dora(".*", rank=2, ranks=3), TypeError, ["ranks"]),
    "init": (lambda: pf.dora(".*", rank=2, init="pissa"), pf.OptionError, ["dora", "'pissa'", "'gaussian'"]),
    "rank": (lambda: pf.dora("0", rank=9), pf.OptionError, ["dora", "0.weight", "1 to 5"]),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_method_that_the_user_wrote(case):
    make, kind, words = ERRORS[case]
    with pytest.raises(kind) as caught:
        pf.bind(make(), pf.functionalize(ZOO["mlp"].build()))
    for word in words:
        assert word in str(caught.value)
