"""Presets: what LoRA+, no decay and rates by depth mean, against PEFT and by hand."""

import copy

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn

import peft_func as pf
from peft_func.trees.paths import join, leaves
from tests.zoo import ZOO, ids, seeded


class Net(nn.Module):
    """An embedding, matrices, a bias and a norm that train."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.norm = nn.LayerNorm(6)
        self.lin = nn.Linear(6, 6)
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.lin(self.norm(self.embed(x)))).mean(1))


METHOD = pf.chain(pf.lora("embed|lin", rank=2, alpha=4), pf.train("norm|lin.bias|out"))
X, Y = ids(8, 5, high=12), ids(8, high=3, seed=1)
OPTIONS = {"lr": 0.01, "betas": (0.8, 0.9)}


def rates(parts, option="lr"):
    return {name: part[option] for part in parts for name in part["param_names"]}


def peft_parameters(model):
    """PEFT's parameters by the paths that ours have; those of the embedding are transposed."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".default", "")
            if "lora_embedding_" in name:
                path = "lora.embed.weight." + {"A": "B", "B": "A"}[name[-1]]
                found[path] = (parameter, True)
            elif "lora_" in name:
                path = name.replace(".weight", "")
                found[f"lora.{path.rpartition('.lora_')[0]}.weight.{path[-1]}"] = (parameter, False)
            else:
                found[f"train.{name}"] = (parameter, False)
    return found


def oriented(tensor, turned):
    return tensor.detach().T.clone() if turned else tensor.detach().clone()


@pytest.mark.parametrize("decay", [0.0, 0.4])
def test_lora_plus_trains_as_pefts_optimizer_does(decay):
    net = seeded(Net)()
    config = peft.LoraConfig(target_modules=["embed", "lin"], r=2, lora_alpha=4, init_lora_weights=False)
    peer = peft.get_peft_model(copy.deepcopy(net), config)
    for name, parameter in peer.named_parameters():
        if "lora_" not in name and any(part in name for part in ("norm", "lin.base_layer.bias", "out")):
            parameter.requires_grad_()
    # With a rate that moves them, so that nothing hides behind 1e-6.
    theirs = create_loraplus_optimizer(
        peer,
        torch.optim.AdamW,
        loraplus_lr_ratio=16,
        loraplus_weight_decay=decay,
        loraplus_lr_embedding=3e-3,
        **OPTIONS,
    )
    model = pf.functionalize(net)
    adapter = pf.bind(METHOD, model)
    frozen, tree = adapter.init(0)
    start = {path: oriented(p, turned).double() for path, (p, turned) in peft_parameters(peer).items()}
    assert start.keys() == {join(keys) for keys, _ in leaves(tree)}
    tree = {part: _filled(sub, start, part) for part, sub in tree.items()}
    groups = [pf.lora_plus(16, adapter, embedding_rate=3e-3), pf.no_decay(adapter)]
    adamw = pf.optimizer(torch.optim.AdamW, groups=groups, weight_decay=decay, **OPTIONS)
    loss = lambda tree: nn.functional.cross_entropy(model(adapter.apply(frozen, tree), X), Y)
    run, state = pf.step(loss, adamw), adamw.init(tree)
    for _ in range(6):
        theirs.zero_grad()
        value = nn.functional.cross_entropy(peer(X), Y)
        value.backward()
        theirs.step()
        tree, state, found = run(tree, state)
        torch.testing.assert_close(found, value.detach(), rtol=1e-10, atol=1e-10)
    expected = {path: oriented(p, turned) for path, (p, turned) in peft_parameters(peer).items()}
    for keys, leaf in leaves(tree):
        torch.testing.assert_close(leaf, expected[join(keys)], rtol=1e-9, atol=1e-9)
        assert not torch.equal(leaf, start[join(keys)])


def _filled(sub, start, prefix):
    return {
        k: _filled(v, start, f"{prefix}.{k}") if isinstance(v, dict) else start[f"{prefix}.{k}"] for k, v in sub.items()
    }


def test_lora_plus_by_name():
    model = pf.functionalize(Net().double())
    adapter = pf.bind(METHOD, model)
    tree = adapter.init(0)[1]
    expected = {
        "lora.embed.weight.A": 1e-6, "lora.embed.weight.B": 1e-6,
        "lora.lin.weight.A": 1.0, "lora.lin.weight.B": 16.0,
        "train.norm.weight": 16.0, "train.norm.bias": 16.0, "train.lin.bias": 16.0,
        "train.out.weight": 1.0, "train.out.bias": 16.0,
    }  # fmt: skip
    assert rates(pf.groups(tree, pf.lora_plus(16, adapter), lr=1.0)) == expected
    # A stack has one axis more, and the same vectors.
    assert rates(pf.groups(pf.stack([tree, tree]), pf.lora_plus(16, adapter), lr=1.0)) == expected
    assert rates(pf.groups(pf.Adapted(Net(), METHOD), pf.lora_plus(16), lr=1.0)) == expected
    plain = rates(pf.groups(tree, pf.lora_plus(4, adapter, embedding_rate=None), lr=1.0))
    assert (plain["lora.embed.weight.A"], plain["lora.embed.weight.B"]) == (1.0, 4.0)
    # A rate of one's own is scaled as well.
    mixed = rates(pf.groups(tree, [(r"lora\.lin.*", {"lr": 0.1}), pf.lora_plus(4, adapter)], lr=1.0))
    assert (mixed["lora.lin.weight.A"], mixed["lora.lin.weight.B"]) == (0.1, 0.4)


def test_lora_plus_where_only_an_embedding_is_adapted():
    adapter = pf.bind(pf.lora("embed", rank=2), pf.functionalize(Net()))
    assert set(rates(pf.groups(adapter.init(0)[1], pf.lora_plus(16, adapter), lr=1.0)).values()) == {1e-6}


def test_no_decay_knows_norms_by_their_modules():
    model = pf.functionalize(ZOO["llama"].build())
    adapter = pf.bind(pf.chain(pf.lora(["q_proj"], rank=1), pf.train(".*norm.*|.*lm_head.*")), model)
    found = rates(pf.groups(adapter.init(0)[1], pf.no_decay(adapter), weight_decay=0.5), "weight_decay")
    assert set(found.values()) == {0.0, 0.5}
    for name, decay in found.items():
        assert (decay == 0.0) == ("norm" in name), name
    bare = rates(pf.groups(dict(model.params), pf.no_decay(model), weight_decay=0.5), "weight_decay")
    assert {name for name, decay in bare.items() if decay == 0} == {name for name in model.params if "norm" in name}
    lora = pf.bind(pf.lora(["q_proj"], rank=1), model)
    assert set(rates(pf.groups(lora.init(0)[1], pf.no_decay(lora), weight_decay=0.5), "weight_decay").values()) == {0.5}


def test_no_decay_is_transformers_rule():
    from transformers.trainer_pt_utils import get_parameter_names

    bert = ZOO["bert"].build()
    decayed = {n for n in get_parameter_names(bert, [nn.LayerNorm]) if "bias" not in n}
    found = rates(pf.groups(bert, pf.no_decay(), weight_decay=0.1), "weight_decay")
    assert {name for name, decay in found.items() if decay} == decayed


def test_gift_and_shared_leaves_are_leaves_of_no_module():
    adapter = pf.bind(
        pf.gift("0|1", rank=1, share="all"), pf.functionalize(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    )
    tree = adapter.init(0)[1]
    assert len(pf.groups(tree, pf.no_decay(adapter), weight_decay=0.1)) == 1
    ratio = pf.lora_plus(4, adapter, where=["psi"])
    assert {path[-3:]: rate for path, rate in rates(pf.groups(tree, ratio, lr=1.0)).items()} == {"phi": 1.0, "psi": 4.0}
    with pytest.raises(pf.SelectorError, match=r"lora_plus: .*matches none"):
        pf.groups(tree, pf.lora_plus(4, adapter), lr=1.0)


def test_layer_decay_is_beits_formula():
    bert = ZOO["bert"].build()
    depth, decay, rate = 2, 0.7, 0.3
    found = rates(pf.groups(bert, pf.layer_decay(decay, embeddings=".*embeddings.*"), lr=rate))
    for name, value in found.items():
        # BEiT counts embeddings as 0, blocks from 1 and the head as depth + 1, which has the full rate.
        layer = 0 if "embeddings" in name else depth + 1
        if ".layer." in name:
            layer = int(name.split(".layer.")[1].split(".")[0]) + 1
        assert value == pytest.approx(rate * decay ** (depth + 1 - layer)), name
    tree = {"lora": {"layers.3.q.weight": {"A": torch.ones(1)}}, "head": torch.ones(1)}
    assert rates(pf.groups(tree, pf.layer_decay(0.5, depth=6), lr=1.0)) == {
        "lora.layers.3.q.weight.A": 0.125,
        "head": 1.0,
    }
    full = rates(pf.groups(tree, pf.layer_decay(1), lr=1.0))
    assert set(full.values()) == {1.0}


def test_groups_of_a_functional_optimizer_are_those_of_torch():
    adapter = pf.bind(METHOD, pf.functionalize(Net().double()))
    tree = adapter.init(3)[1]
    rules = [("train.out.*", {"lr": 0.5}), pf.lora_plus(8, adapter), pf.no_decay(adapter)]
    ours = pf.optimizer(torch.optim.AdamW, lr=0.1, weight_decay=0.2, groups=rules)
    own = pf.map_leaves(lambda leaf: nn.Parameter(leaf.clone()), tree)
    theirs = torch.optim.AdamW(pf.groups(own, rules, lr=0.1, weight_decay=0.2))
    for _, leaf in leaves(own):
        leaf.grad = torch.cos(leaf.detach())
    new, _ = ours.step(pf.map_leaves(torch.cos, tree), ours.init(tree), tree)
    theirs.step()
    for (keys, a), (_, b) in zip(leaves(new), leaves(own), strict=True):
        assert torch.equal(a, b), keys
    # The rate of the class itself is what is scaled where none is given.
    small = pf.optimizer(torch.optim.AdamW, groups=pf.lora_plus(8, adapter))
    assert {o["lr"] for o, _ in small._plan(tree).groups} == {1e-3, 8e-3, 1e-6}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: pf.lora_plus(0), pf.OptionError, "ratio=0; it is a finite number above 0"),
        (lambda: pf.lora_plus(True), pf.OptionError, "ratio=True"),
        (lambda: pf.lora_plus(embedding_rate=-1.0), pf.OptionError, "embedding_rate=-1.0"),
        (lambda: pf.layer_decay(1.5), pf.OptionError, "at most 1"),
        (lambda: pf.layer_decay("a"), pf.OptionError, "decay='a'"),
        (lambda: pf.lora_plus(), pf.OptionError, r"a tree does not say: write pf.lora_plus\(..., adapter=adapter\)"),
        (lambda: pf.no_decay(), pf.OptionError, "a tree does not say"),
        (lambda: pf.layer_decay(0.5), pf.SelectorError, "no path has a number: q.A, q.B"),
        (lambda: pf.layer_decay(0.5, embeddings="wte"), pf.SelectorError, "layer_decay: 'wte' matches none"),
        (lambda: pf.no_decay(pf.functionalize(nn.Linear(2, 2))), pf.TreeError, "the adapter has no leaf 'q.A'"),
        (lambda: pf.no_decay(3), pf.OptionError, "takes the bound adapter or the functional model, not a int"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        pf.groups({"q": {"A": torch.ones(2, 2), "B": torch.ones(2, 2)}}, make(), lr=1.0, weight_decay=1.0)


def test_a_layer_beyond_the_depth():
    with pytest.raises(pf.OptionError, match="depth=2, but there is a layer 5, counted from 0"):
        pf.groups({"5": torch.ones(1)}, pf.layer_decay(0.5, depth=2), lr=1.0)
