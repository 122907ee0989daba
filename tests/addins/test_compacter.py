"""Compacter against matrices formed with torch.kron, and its options."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import peft_func as pf
from tests.laws.conformance import close, perturbed
from tests.zoo import ZOO, randn


def matrix(own, rule, end):
    """W = sum_i A_i (x) B_i, formed."""
    blocks = own[end] if end in own else own[f"{end}_s"] @ own[f"{end}_t"]
    return sum(torch.kron(a.contiguous(), b.contiguous()) for a, b in zip(rule, blocks, strict=True))


def added(own, shared, h, act):
    down, up = (matrix(own, shared["rule"] if shared else own[f"{end}_rule"], end) for end in ("down", "up"))
    return F.linear(act(F.linear(h, down, own["down_bias"])), up, own["up_bias"])


OPTIONS = [
    {"n": 4, "rank": 8},
    {"n": 2, "rank": 6, "low_rank": 3},
    {"n": 4, "rank": 4, "low_rank": None},
    {"n": 2, "rank": 6, "low_rank": None, "share_rule": False},
    {"n": 8, "rank": 8, "share_rule": False},
    {"n": 1, "rank": 3, "low_rank": None},
]


class Added(nn.Module):
    def __init__(self, module, own, shared):
        super().__init__()
        self.module, self.own, self.shared = module, own, shared

    def forward(self, x):
        y = self.module(x)
        return y + added(self.own, self.shared, y, F.gelu)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("animal", ["gpt2", "vit", "bert", "llama"])
def test_values_and_gradients_are_those_of_kronecker_products(animal, options):
    net = ZOO[animal].build()
    adapter = pf.bind(pf.compacter(pf.projections(), **options), pf.functionalize(net))
    frozen, tree = adapter.init(0)
    results = []
    for ours in (True, False):
        leaves = pf.map_leaves(lambda t: t.requires_grad_(), perturbed(tree, 1, 0.5))
        args, kwargs = ZOO[animal].inputs(3)
        if ours:
            out = adapter.model(adapter.apply(frozen, leaves), *args, **kwargs)
        else:
            plain = copy.deepcopy(net)
            for place in adapter.parts[0].modules:
                holder, _, name = place.rpartition(".")
                own = leaves["compacter"][place]
                wrapped = Added(plain.get_submodule(place), own, leaves["compacter"].get("shared"))
                setattr(plain.get_submodule(holder), name, wrapped)
            out = plain(*args, **kwargs)
        y = ZOO[animal].output(out)
        (y * y.cos()).sum().backward()
        results.append((y.detach(), pf.map_leaves(lambda t: t.grad, leaves)))
    (y, grads), (plain_y, plain_grads) = results
    assert close(y, plain_y, 1e-11)
    assert close(grads, plain_grads, 1e-8)
    assert not close(y, ZOO[animal].output(net(*args, **kwargs)), 1e-3)


def test_leaves_are_few():
    """The paper's count: n^3 for the rule, and n (out + in) / n for each matrix of rank one, with its bias."""
    width, rank, n = 768, 24, 4
    net = nn.Sequential(*[nn.Linear(width, width) for _ in range(3)])
    tree = pf.bind(pf.compacter(r"\d"), pf.functionalize(net)).init(0)[1]["compacter"]
    assert sum(tensor.numel() for _, tensor in pf.leaves(tree["shared"])) == n**3
    for place in "012":
        count = sum(tensor.numel() for _, tensor in pf.leaves(tree[place]))
        assert count == 2 * (width + rank) + rank + width
    assert not torch.equal(tree["0"]["down_t"], tree["1"]["down_t"])


def test_first_values_have_the_spread_of_a_plain_bottleneck():
    for low_rank in (1, 4, None):
        model = pf.functionalize(nn.Linear(256, 512))
        tree = pf.bind(pf.compacter("", n=8, rank=128, low_rank=low_rank), model).init(0)[1]["compacter"]
        down = matrix(tree[""], tree["shared"]["rule"], "down")
        assert down.shape == (128, 512)
        assert down.std().item() == pytest.approx(1 / (3 * 512) ** 0.5, rel=0.25)
        assert not matrix(tree[""], tree["shared"]["rule"], "up").any()


def test_ensembles_and_saved_files_share_the_rule(tmp_path):
    model = pf.functionalize(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).double())
    adapter = pf.bind(pf.compacter(r"\d", n=2, rank=2), model)
    members, x = [perturbed(adapter.init(i)[1], i, 0.5) for i in range(3)], randn(4, 8)
    one = [model(adapter.apply(adapter.frozen, tree), x) for tree in members]
    assert close(pf.ensemble(adapter)(adapter.frozen, pf.stack(members), x), torch.stack(one), 1e-12)
    module = pf.export_module(adapter, adapter.frozen, members[0])
    assert sum("rule" in name for name in module.state_dict()) == 1
    assert close(module(x), one[0], 1e-12)
    pf.save(tmp_path / "a.safetensors", adapter, members[0])
    again, frozen, tree = pf.load(tmp_path / "a.safetensors", model)
    assert torch.equal(model(again.apply(frozen, tree), x), one[0])


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"n": 3}, "n=3 does not divide the 8 features in"),
        ({"n": 4, "rank": 6}, "n=4 does not divide the 6 features of the bottleneck"),
        ({"n": 0}, "n=0"),
        ({"n": None}, "n=None"),
        ({"n": 128}, "n=128"),
        ({"low_rank": 0}, "low_rank=0"),
        ({"low_rank": 2}, "low_rank=2.*rank of 1 at most"),
        ({"share_rule": "yes"}, "share_rule='yes'"),
        ({"reduction": -1}, "reduction=-1"),
        ({"activation": "swish"}, "activation='swish'"),
    ],
)
def test_options_out_of_range(options, found):
    with pytest.raises(pf.OptionError, match=found):
        pf.bind(pf.compacter("", **options), pf.functionalize(nn.Linear(8, 8)))


def test_a_place_named_as_the_shared_tree():
    net = nn.Sequential()
    net.add_module("shared", nn.Linear(4, 4))
    with pytest.raises(pf.OptionError, match="shared"):
        pf.bind(pf.compacter("shared", n=2), pf.functionalize(net))
    own = pf.bind(pf.compacter("shared", n=2, share_rule=False), pf.functionalize(net))
    assert list(own.init(0)[1]["compacter"]) == ["shared"]
