"""What an adapter adds to a weight, low-rank where it is."""

import pytest
import torch

import peft_func as pf
from peft_func.ensemble.deltas import delta_at, formed
from tests.ensemble.merging import deltas, every, trees_of


@pytest.mark.parametrize("where", ["linear", "conv", "up", "embed", "gpt", "experts"])
def test_low_rank_changes_are_their_factors(where):
    _, model = every()
    adapter = pf.bind(pf.chain(pf.lora(where, rank=2, alpha=3, dropout=0.5), pf.lora(where, rank=1, name="b")), model)
    (tree,) = trees_of(adapter, 1)
    weights = adapter.apply(adapter.frozen, tree)
    (path,) = adapter.parts[0].paths
    terms = delta_at(weights, path)
    assert [(term.A.shape[-2], term.scale, term.dropout) for term in terms] == [(2, 1.5, 0.0), (1, 1.0, 0.0)]
    torch.testing.assert_close(formed(terms, weights, path), deltas(adapter, tree)[path])
    assert delta_at(weights, "norm.bias") == []
    assert not formed([], weights, "norm.bias").any()


@pytest.mark.parametrize(
    "method",
    [
        pf.train("linear"),
        pf.ia3("linear"),
        pf.dora("linear", rank=2),
        pf.chain(pf.lora("linear", rank=2), pf.train("linear")),
        pf.chain(pf.lora("linear", rank=2), pf.gift("linear", rank=2)),
        pf.chain(pf.ia3("linear"), pf.lora("linear", rank=2)),
    ],
)
def test_others_are_formed(method):
    _, model = every()
    adapter = pf.bind(method, model)
    (tree,) = trees_of(adapter, 1)
    delta = delta_at(adapter.apply(adapter.frozen, tree), "linear.weight")
    torch.testing.assert_close(delta, deltas(adapter, tree)["linear.weight"])


def test_a_half_precision_difference_is_not_rounded():
    model = pf.functionalize(torch.nn.Linear(4, 3).to(torch.bfloat16))
    adapter = pf.bind(pf.ia3("weight"), model)
    scale = torch.full((3,), 1 + 2**-12)
    change = delta_at(adapter.apply(adapter.frozen, {"ia3": {"weight": {"scale": scale}}}), "weight")
    torch.testing.assert_close(change, model.params["weight"].float() * 2**-12, rtol=1e-2, atol=0)


def test_what_is_no_weight_is_refused():
    _, model = every()
    adapter = pf.bind(pf.lora("linear", rank=2), model)
    weights = adapter.apply(*adapter.init(0))
    weights["linear.weight"] = print
    with pytest.raises(pf.OptionError, match="acts on activations"):
        delta_at(weights, "linear.weight")
