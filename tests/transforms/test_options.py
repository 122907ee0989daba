"""Options out of range: the message names the method, the place, what was given and what would work."""

import math

import pytest
import torch
from torch import nn

import peft_func as pf
from tests.zoo import ZOO, seeded

RANKED = {
    "lora": lambda rank, where="2.weight": pf.lora(where, rank=rank),
    "gift": lambda rank, where="2.weight": pf.gift(where, rank=rank),
    "dora": lambda rank, where="2.weight": pf.dora(where, rank=rank),
}


def refused(method, words, net=None):
    with pytest.raises(pf.OptionError) as caught:
        pf.bind(method(), pf.functionalize(net or ZOO["mlp"].build()))
    assert isinstance(caught.value, ValueError)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("rank", [0, -1, True, False, 2.5, 2.0, "2", None, 9, math.inf])
@pytest.mark.parametrize("name", RANKED)
def test_a_rank_that_the_matrix_cannot_have_names_the_place_and_its_highest(name, rank):
    refused(lambda: RANKED[name](rank), ["2.weight", f"rank={rank!r}", "8 x 8", "1 to 8"])


@pytest.mark.parametrize("name", RANKED)
@pytest.mark.parametrize(
    ("layer", "highest"),
    [
        (lambda: nn.Linear(6, 4), 4), (lambda: nn.Conv2d(2, 9, 2), 8), (lambda: nn.Conv2d(8, 8, 1, groups=4), 2),
        (lambda: nn.ConvTranspose2d(6, 4, 3, groups=2), 2), (lambda: nn.Embedding(50, 3), 3),
        (lambda: nn.Conv1d(4, 8, 1), 4),
    ],
)  # fmt: skip
def test_the_highest_rank_is_that_of_the_matrix_and_works(name, layer, highest):
    net = seeded(layer)()
    model = pf.functionalize(net)
    pf.bind(RANKED[name](highest, "weight"), model).init(0)
    refused(lambda: RANKED[name](highest + 1, "weight"), ["weight", f"1 to {highest}"], net)


LORA = {
    "init": (lambda: pf.lora("0", rank=2, init="pissa_niter_4"), ["'pissa_niter_4'", "'default'", "'gaussian'"]),
    "init True": (lambda: pf.lora("0", rank=2, init=True), ["True", "'default'"]),
    "conv": (lambda: pf.lora("0", rank=2, conv="unfold"), ["'unfold'", "'factored'"]),
    "dropout 1": (lambda: pf.lora("0", rank=2, dropout=1.0), ["dropout=1.0"]),
    "dropout below 0": (lambda: pf.lora("0", rank=2, dropout=-0.1), ["dropout=-0.1"]),
    "dropout nan": (lambda: pf.lora("0", rank=2, dropout=math.nan), ["dropout=nan"]),
    "dropout text": (lambda: pf.lora("0", rank=2, dropout="0.1"), ["dropout='0.1'"]),
    "alpha nan": (lambda: pf.lora("0", rank=2, alpha=math.nan), ["alpha=nan"]),
    "alpha inf": (lambda: pf.lora("0", rank=2, alpha=math.inf), ["alpha=inf"]),
    "alpha text": (lambda: pf.lora("0", rank=2, alpha="16"), ["alpha='16'"]),
    "alpha of a tensor": (lambda: pf.lora("0", rank=2, alpha=torch.tensor(2.0)), ["alpha"]),
    "rank_pattern of nothing": (
        lambda: pf.lora("0", rank=2, rank_pattern={"q_proj": 3}), ["rank_pattern", "'q_proj'", "0.weight"],
    ),
    "alpha_pattern of nothing": (
        lambda: pf.lora("0|2", rank=2, alpha_pattern={"0": 1, "4": 3}), ["alpha_pattern", "'4'", "2.weight"],
    ),
    "alpha_pattern of a part of a name": (
        lambda: pf.lora("0", rank=2, alpha_pattern={"weigh": 3}), ["alpha_pattern", "'weigh'"],
    ),
    "rank_pattern no regex": (lambda: pf.lora("0", rank=2, rank_pattern={"(": 3}), ["rank_pattern", "'('"]),
    "rank_pattern above": (lambda: pf.lora(".*", rank=2, rank_pattern={"2": 9}), ["rank=9", "2.weight", "1 to 8"]),
    "rank_pattern half": (lambda: pf.lora(".*", rank=2, rank_pattern={"2": 1.5}), ["rank=1.5", "2.weight"]),
    "alpha_pattern text": (lambda: pf.lora("0", rank=2, alpha_pattern={"0": "4"}), ["alpha", "'4'"]),
    "alpha_pattern nan": (lambda: pf.lora("0", rank=2, alpha_pattern={"0": math.nan}), ["alpha", "nan"]),
    "rank_pattern a list": (lambda: pf.lora("0", rank=2, rank_pattern=["0"]), ["rank_pattern", "list"]),
}  # fmt: skip


@pytest.mark.parametrize("case", LORA)
def test_options_of_lora_that_cannot_work_are_named(case):
    make, words = LORA[case]
    refused(make, ["lora", *words])


def test_rank_above_names_a_way_out_that_works():
    net = ZOO["mlp"].build()
    refused(lambda: pf.lora(".*", rank=4), ["rank_pattern", "pf.exact(['4.weight'])", "4.weight", "1 to 3"], net)
    model = pf.functionalize(net)
    pf.bind(pf.lora(".*", rank=4, rank_pattern={"4": 3}), model)
    assert len(pf.bind(pf.lora(pf.as_selector(".*") & ~pf.exact(["4.weight"]), rank=4), model).parts[0].paths) == 2


@pytest.mark.parametrize("alpha", [0, -1, 0.5, 3])
def test_any_finite_alpha_works(alpha):
    model = pf.functionalize(ZOO["mlp"].build())
    adapter = pf.bind(pf.lora("0", rank=2, alpha=alpha), model)
    frozen, start = adapter.init(0)
    tree = pf.map_leaves(torch.ones_like, start)
    change = pf.delta(adapter.apply(frozen, tree))["0.weight"]
    torch.testing.assert_close(change, torch.full_like(change, float(alpha)))
