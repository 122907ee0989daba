"""Padded adapters are the adapters they were: outputs, gradients of what was there, none for what was not."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import peft_func as pf
from tests.laws.conformance import built, close, perturbed
from tests.zoo import ZOO

MODELS = st.sampled_from(["mlp", "conv", "tied", "experts", "gpt2"])


def bound(name, **options):
    return pf.bind(pf.lora(ZOO[name].where[0], **options), built(name)[1])


def call(name, adapter, frozen, tree):
    args, kwargs = ZOO[name].inputs(3)
    return ZOO[name].output(built(name)[1](adapter.apply(frozen, tree), *args, **kwargs))


@given(
    MODELS, st.lists(st.tuples(st.integers(1, 2), st.sampled_from([None, 3.0]), st.booleans()), min_size=1, max_size=3)
)
def test_every_tree_gives_what_it_gave(name, options):
    adapters = [bound(name, rank=r, alpha=a, rank_stabilized=s, bias=s) for r, a, s in options]
    trees = [perturbed(adapter.init(i)[1], i) for i, adapter in enumerate(adapters)]
    whole, frozen, padded = pf.pad_ranks(adapters, trees)
    pf.stack(padded)
    for adapter, tree, pad in zip(adapters, trees, padded, strict=True):
        assert close(call(name, whole, frozen, pad), call(name, adapter, adapter.init(0)[0], tree), 1e-10)


@pytest.mark.parametrize("conv", ["balanced", "out_as_h"])
def test_other_views_of_a_convolution(conv):
    adapters = [bound("conv", rank=rank, conv=conv) for rank in (1, 2)]
    trees = [perturbed(adapter.init(i)[1], i) for i, adapter in enumerate(adapters)]
    whole, frozen, padded = pf.pad_ranks(adapters, trees)
    for adapter, tree, pad in zip(adapters, trees, padded, strict=True):
        assert close(call("conv", whole, frozen, pad), call("conv", adapter, adapter.init(0)[0], tree), 1e-10)


def test_training_keeps_the_padding_at_zero_and_is_that_of_each_alone():
    adapters = [bound("mlp", rank=1), bound("mlp", rank=2), bound("mlp", rank=3)]
    trees = [perturbed(adapter.init(i)[1], i) for i, adapter in enumerate(adapters)]
    whole, frozen, padded = pf.pad_ranks(adapters, trees)
    (x,), _ = ZOO["mlp"].inputs(0)
    loss = lambda output: output.square().mean()

    def trained(adapter, frozen, stacked):
        grads_of = pf.member_grads(adapter, loss)
        leaves = dict(pf.leaves(stacked))
        optimizer = torch.optim.AdamW(leaves.values(), lr=0.05, weight_decay=0.1)
        for _ in range(10):
            for keys, grad in pf.leaves(grads_of(frozen, stacked, (x,))[0]):
                leaves[keys].grad = grad
            optimizer.step()
        return pf.unstack(stacked)

    together = trained(whole, frozen, pf.stack(padded))
    for rank, adapter, tree, mine in zip((1, 2, 3), adapters, trees, together, strict=True):
        (alone,) = trained(adapter, adapter.init(0)[0], pf.stack([tree]))
        for path, leaf in mine["lora"].items():
            assert not leaf["A"][rank:].any()
            assert not leaf["B"][:, rank:].any()
            assert close(leaf["A"][:rank], alone["lora"][path]["A"], 1e-10)
            assert close(leaf["B"][:, :rank], alone["lora"][path]["B"], 1e-10)


def test_places_are_joined():
    model = built("mlp")[1]
    method = lambda where: pf.chain(pf.lora(where, rank=2), pf.train("4"))
    left, right = pf.bind(method("0"), model), pf.bind(method("2"), model)
    trees = [perturbed(left.init(0)[1], 0), perturbed(right.init(1)[1], 1)]
    whole, frozen, padded = pf.pad_ranks([left, right], trees)
    assert list(padded[0]["lora"]) == ["0.weight", "2.weight"]
    assert not padded[0]["lora"]["2.weight"]["B"].any()
    for adapter, tree, pad in zip((left, right), trees, padded, strict=True):
        assert close(call("mlp", whole, frozen, pad), call("mlp", adapter, adapter.init(0)[0], tree), 1e-10)


def test_the_trees_are_new():
    adapter = pf.bind(pf.chain(pf.lora("0", rank=2), pf.train("4")), built("mlp")[1])
    tree = adapter.init(0)[1]
    padded = pf.pad_ranks([adapter], [tree])[2][0]
    for keys, leaf in pf.leaves(padded):
        assert leaf.data_ptr() != dict(pf.leaves(tree))[keys].data_ptr()


@pytest.mark.parametrize(
    ("methods", "found"),
    [
        ([pf.lora("0", rank=1), pf.ia3("0")], "other parts"),
        ([pf.lora("0", rank=1), pf.chain(pf.lora("0", rank=1), pf.train("2"))], "other parts"),
        (
            [pf.chain(pf.lora("0", rank=1), pf.train("2")), pf.chain(pf.lora("0", rank=1), pf.train("4"))],
            "'train' differs",
        ),
        ([pf.lora("0", rank=1, dropout=0.1), pf.lora("0", rank=1)], "options of 'lora' differ"),
    ],
)
def test_what_cannot_be_padded_is_refused(methods, found):
    adapters = [pf.bind(method, built("mlp")[1]) for method in methods]
    with pytest.raises(pf.OptionError, match=found):
        pf.pad_ranks(adapters, [adapter.init(0)[1] for adapter in adapters])


def test_another_model_another_number_of_trees_or_a_foreign_tree_are_refused():
    adapter, other = bound("mlp", rank=1), pf.bind(pf.lora(".*", rank=1), pf.functionalize(ZOO["mlp"].build()))
    tree = adapter.init(0)[1]
    with pytest.raises(pf.OptionError, match="another model"):
        pf.pad_ranks([adapter, other], [tree, tree])
    with pytest.raises(pf.OptionError, match="as many trees"):
        pf.pad_ranks([adapter], [tree, tree])
    with pytest.raises(pf.TreeError):
        pf.pad_ranks([bound("mlp", rank=2)], [tree])
