"""Full tuning against plain PyTorch: the same parameters, the same steps, the same numbers."""

import copy

import pytest
import torch
from torch import nn

import peft_func as pf
from tests.transforms.plain import same
from tests.zoo import ZOO, randn

NORMS = (nn.LayerNorm, nn.BatchNorm2d)


def is_norm(net, name):
    module = net.get_submodule(name.rpartition(".")[0])
    return isinstance(module, NORMS) or type(module).__name__.endswith("RMSNorm")


CASES = {
    "bitfit bert": ("bert", pf.train(r".*bias"), lambda net, name: name.endswith("bias")),
    "bitfit conv": ("conv", pf.train(r".*bias"), lambda net, name: name.endswith("bias")),
    "norms bert": ("bert", pf.train(pf.of_type(*NORMS)), is_norm),
    "norms llama": ("llama", pf.train(r".*norm.*"), is_norm),
    "norms conv": ("conv", pf.train(pf.of_type(*NORMS)), is_norm),
    "head bert": ("bert", pf.train(r"classifier\..*"), lambda net, name: name.startswith("classifier.")),
    "tied embedding": ("tied", pf.train("embed"), lambda net, name: name == "embed.weight"),
    "tied head": ("tied", pf.train("head"), lambda net, name: name == "embed.weight"),
    "shared by its second name": ("shared", pf.train(r"blocks\.2\..*"), lambda net, name: name.startswith("inner.")),
    "attention": ("attention", pf.train("packed"), lambda net, name: name.startswith("packed.in_proj")),
    "everything": ("encoder_layer", pf.train(".*"), lambda net, name: True),
}


@pytest.mark.parametrize("mode", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_five_steps_of_sgd_equal_plain_pytorch(case, mode):
    name, method, chosen = CASES[case]
    animal = ZOO[name]
    net = animal.build().train(mode)
    plain = copy.deepcopy(net)
    model = pf.functionalize(net)
    adapter = pf.bind(method, model)
    frozen, trainable = adapter.init(0)
    names = [n for n, _ in plain.named_parameters() if chosen(plain, n)]
    assert list(trainable["train"]) == names
    assert list(frozen) == [n for n, _ in plain.named_parameters() if n not in names]

    for n, param in plain.named_parameters():
        param.requires_grad_(n in names)
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    leaves = {n: leaf.requires_grad_() for n, leaf in trainable["train"].items()}
    ours = torch.optim.SGD(leaves.values(), lr=0.1, momentum=0.9)
    state = model.state
    for step in range(5):
        args, kwargs = animal.inputs(step)
        loss = animal.output(plain(*args, **kwargs)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        out, state = model.with_state(adapter.apply(frozen, trainable), state, *args, **kwargs)
        our_loss = animal.output(out).square().mean()
        ours.zero_grad()
        our_loss.backward()
        ours.step()
        same(our_loss.detach(), loss.detach(), 1e-12)
    weights = adapter.apply(frozen, trainable)
    same({n: t.detach() for n, t in model.state_dict(weights, state).items()}, plain.state_dict(), 1e-12)
    changes = {n: change.detach() for n, change in pf.delta(weights).items()}
    same(changes, {n: plain.get_parameter(n).detach() - model.params[n] for n in names}, 1e-12)


def test_trained_leaves_are_copies_that_do_not_touch_the_base():
    net = ZOO["bert"].build()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    model = pf.functionalize(net)
    adapter = pf.bind(pf.chain(pf.train(".*"), pf.lora("classifier", rank=2, name="lora")), model)
    _, first = adapter.init(0)
    _, second = adapter.init(0)
    for leaf in first["train"].values():
        leaf.fill_(7.0)
    same(dict(net.named_parameters()), before, 0.0)
    same(second["train"], before, 0.0)


def test_biases_of_lora_are_copies_too():
    net = ZOO["mlp"].build()
    before = net[0].bias.detach().clone()
    _, tree = pf.bind(pf.lora("0", rank=2, bias=True), pf.functionalize(net)).init(0)
    tree["lora"]["0.bias"]["bias"].zero_()
    assert torch.equal(net[0].bias, before)


def test_a_held_weight_is_the_base_of_the_other_parts_whatever_their_order():
    model = pf.functionalize(ZOO["mlp"].build())
    parts = [pf.lora("0", rank=2), pf.train(r"0\..*")]
    merged = []
    for order in (parts, parts[::-1]):
        adapter = pf.bind(pf.chain(*order), model)
        frozen, tree = adapter.init(0)
        tree = pf.map_leaves(lambda t: t + 0.5, tree)
        merged.append(pf.merge(adapter.apply(frozen, tree)))
        leaf = tree["lora"]["0.weight"]
        same(merged[-1]["0.weight"], tree["train"]["0.weight"] + leaf["B"] @ leaf["A"])
    same(merged[0], merged[1], 0.0)


def test_trees_in_another_precision_give_weights_in_that_precision():
    """apply: 'values, dtypes and devices are yours'; a wider run of a bound adapter is not rounded on its way."""
    net = ZOO["mlp"].build().float()
    model = pf.functionalize(net)
    adapter = pf.bind(pf.chain(pf.train(r"2\..*"), pf.lora("0", rank=2)), model)
    frozen, tree = adapter.init(0)
    wide = {n: t.double() for n, t in frozen.items()}
    tree = pf.map_leaves(lambda t: t.double() + 1e-12, tree)
    weights = adapter.apply(wide, tree)
    assert {w.dtype for w in weights.values()} == {torch.float64}
    same(pf.merge(weights)["2.bias"], net[2].bias.detach().double() + 1e-12, 1e-16)
    assert model(weights, randn(3, 5)).dtype is torch.float64


def test_float32_copies_of_a_half_precision_weight_are_rounded_to_it():
    net = ZOO["mlp"].build().bfloat16()
    model = pf.functionalize(net)
    adapter = pf.bind(pf.train(r"2\..*"), model)
    frozen, tree = adapter.init(0)
    assert {t.dtype for t in tree["train"].values()} == {torch.bfloat16}
    master = pf.map_leaves(lambda t: t.float() + 1e-6, tree)
    weights = adapter.apply(frozen, master)
    assert weights["2.weight"].dtype is torch.bfloat16
    model(weights, randn(3, 5).bfloat16())


def test_two_parts_cannot_train_the_same_weight():
    model = pf.functionalize(ZOO["mlp"].build())
    for method in (
        pf.chain(pf.train("0", name="a"), pf.train(".*bias", name="b")),
        pf.chain(pf.lora("0", rank=2, bias=True, name="a"), pf.train(".*bias", name="b")),
        pf.chain(pf.chain(pf.train("0"), name="a"), pf.train("0", name="b")),
    ):
        with pytest.raises(pf.OptionError, match=r"'a.*'.*'b'.*'0\.(bias|weight)'"):
            pf.bind(method, model)


def test_selecting_nothing_names_the_nearest():
    with pytest.raises(pf.SelectorError, match=r"train.*classifer.*classifier") as caught:
        pf.bind(pf.train(r"classifer\..*"), pf.functionalize(ZOO["bert"].build()))
    assert isinstance(caught.value, ValueError)
