"""Functions around the calls of modules: in which order, around which calls, and what still speaks of the module."""

import copy
import functools
import inspect
import warnings

import pytest
import torch
from torch import nn

import peft_func as pf
from peft_func.functional.surround import Surrounded, called_module, fused_layers
from peft_func.weights.around import Around
from tests.addins.small import bound, ones, scaled
from tests.zoo import ZOO, randn

F = nn.functional


def test_later_parts_are_outside():
    net = nn.Sequential(nn.Linear(4, 4)).double()
    add = pf.after("0", lambda tree, y: y + 1, name="add")
    double = pf.after("0", lambda tree, y: y * 2, name="double")
    x = randn(2, 4)
    for method, expected in ((pf.chain(add, double), (net(x) + 1) * 2), (pf.chain(double, add), net(x) * 2 + 1)):
        model, adapter, frozen, tree = bound(net, method)
        assert list(pf.leaves(tree)) == []
        assert torch.equal(model(adapter.apply(frozen, tree), x), expected)


class Quiet(nn.Module):
    """Reads the weight of a module that it never calls."""

    def __init__(self):
        super().__init__()
        self.used, self.read = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(self.used(x), self.read.weight)


def test_a_module_that_is_never_called_is_warned_of():
    model, adapter, frozen, tree = bound(Quiet(), pf.around("used|read", scaled, ones, name="ssf"))
    with pytest.warns(pf.UnusedAddinWarning, match="'ssf' did nothing at read"):
        model(adapter.apply(frozen, tree), torch.ones(1, 4))


@pytest.mark.parametrize("place", ["layers.0.linear1", "layers.1.self_attn", "layers.0"])
def test_the_fused_path_of_torchs_encoder_does_not_pass_an_addin_by(place):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net = nn.TransformerEncoder(layer, 2).double().eval()
    model, adapter, frozen, tree = bound(net, pf.after(place, _doubled, name="twice"))
    x, mask = randn(2, 3, 8), torch.tensor([[False, False, True], [False, False, False]])
    plain = copy.deepcopy(net).train()
    for part in plain.modules():
        if isinstance(part, nn.Dropout):
            part.eval()
        if isinstance(part, nn.MultiheadAttention):
            part.dropout = 0.0
    plain.get_submodule(place).register_forward_hook(lambda module, args, output: _doubled({}, output))
    expected = plain(x, src_key_padding_mask=mask)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        output = model(adapter.apply(frozen, tree), x, src_key_padding_mask=mask)
    assert torch.allclose(output[~mask], expected[~mask], atol=1e-10)


def _doubled(tree, output):
    return (output[0] * 2, *output[1:]) if isinstance(output, tuple) else output * 2


def test_other_methods_of_the_model_meet_the_addins():
    animal = ZOO["gpt2"]
    net = animal.build()
    model, adapter, frozen, tree = bound(net, pf.after(r".*mlp", lambda tree, y: -y, name="minus"))
    plain = copy.deepcopy(net)
    for block in plain.transformer.h:
        block.mlp.register_forward_hook(lambda module, args, output: -output)
    start, options = torch.tensor([[1, 2]]), {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    generated = model.method("generate")(adapter.apply(frozen, tree), start, **options)
    assert torch.equal(generated, plain.generate(start, **options))


def test_observe_sees_what_goes_in_and_out_of_the_addin():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).double()
    model, adapter, frozen, tree = bound(net, pf.around("0", scaled, ones))
    x = randn(2, 4)
    _, seen = pf.observe(model, adapter.apply(frozen, tree), ["0"], x)
    assert torch.equal(seen["0"][0].output, 1.5 * net[0](x))


def test_a_compiled_model_says_so_if_it_met_the_addin_too_late():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model, other = pf.functionalize(net), pf.functionalize(net)
    adapter = pf.bind(pf.around("0", scaled, ones), model)
    frozen, tree = adapter.init(0)
    x = torch.ones(1, 4)
    train = model.train()
    run = torch.compile(lambda tree: train(adapter.apply(frozen, tree), x), fullgraph=True, backend="aot_eager")
    assert torch.allclose(run(tree), train(adapter.apply(frozen, tree), x))
    foreign = torch.compile(lambda tree: other(adapter.apply(frozen, tree), x), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"pf\.bind"):
        foreign(tree)


def test_an_addin_around_the_whole_model_does_not_hide_what_its_forward_takes():
    """`generate` asks for the signature, and leaves out position ids for a model that has none."""
    animal = ZOO["gpt2"]
    net = animal.build()
    model, adapter, frozen, tree = bound(
        net, pf.around("", lambda tree, inner, *args, **kwargs: inner(*args, **kwargs))
    )
    ids, mask = torch.tensor([[0, 0, 3, 4], [5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    options |= {"attention_mask": mask, "return_dict_in_generate": True}
    ours = model.method("generate")(adapter.apply(frozen, tree), ids, **options)
    theirs = net.generate(ids, **options)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(ours.logits, theirs.logits, strict=True))


def test_notes_are_those_of_one_call():
    seen = []

    def noting(tree, inner, x):
        seen.append((inner.path, dict(inner.notes), inner.training, type(inner.module)))
        inner.notes[inner.path] = len(seen)
        return inner(x)

    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).train()
    model, adapter, frozen, tree = bound(net, pf.around("0|1", noting))
    weights = adapter.apply(frozen, tree)
    for _ in range(2):
        seen.clear()
        model(weights, torch.ones(1, 4))
        assert seen == [("0", {}, True, nn.Linear), ("1", {"0": 1}, True, nn.ReLU)]


@pytest.mark.parametrize("path", ["", "1", "1.layers", "1.layers.0", "1.layers.1.self_attn.out_proj"])
def test_only_what_is_around_a_place_leaves_its_fast_path(path):
    net = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 2))
    assert called_module(net, path, fused_layers(net)) is net.get_submodule(path)
    left = {
        name
        for name, module in net.named_modules()
        if vars(module).get("activation_relu_or_gelu") == 0 or vars(module).get("use_nested_tensor") is False
    }
    assert left == {name for name in ("1", "1.layers.0", "1.layers.1") if path.startswith(f"{name}.")}


class Lends(nn.Module):
    """Two layers, in the second of which are modules of the first."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True) for _ in range(2))
        self.second.linear1, self.second.self_attn = self.first.linear1, self.first.self_attn

    def forward(self, x):
        return self.second(self.first(x))


@pytest.mark.parametrize("place", ["first.linear1", "first.self_attn"])
def test_every_layer_that_has_a_module_leaves_its_fast_path(place):
    net = Lends().double().eval()
    model, adapter, frozen, tree = bound(net, pf.after(place, _doubled, name="twice"))
    plain, x = copy.deepcopy(net).train(), randn(2, 3, 8)
    plain.get_submodule(place).register_forward_hook(lambda module, args, output: _doubled({}, output))
    with torch.no_grad():
        for called in (model, model.train().eval(), copy.deepcopy(model), pf.export_module(adapter, frozen, tree)):
            weights = () if isinstance(called, nn.Module) else (adapter.apply(frozen, tree),)
            torch.testing.assert_close(called(*weights, x), plain(x), rtol=1e-10, atol=1e-10)


def test_the_layers_around_places_are_found_once_and_not_in_calls(monkeypatch):
    blocks = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)])
    assert fused_layers(blocks) == {}
    assert fused_layers(Lends())["second.linear1"] == fused_layers(Lends())["first.linear1"] == ["first", "second"]
    places = ((blocks, "1.0"), (Lends(), "first.linear1"))
    cases = [bound(net.double().eval(), pf.after(at, _doubled)) for net, at in places]

    def walked(*args, **kwargs):
        raise AssertionError("a call walks through the modules")

    for name in ("named_modules", "modules", "named_children"):
        monkeypatch.setattr(nn.Module, name, walked)
    for model, adapter, frozen, tree in cases:
        model(adapter.apply(frozen, tree), randn(2, 3, 8))


def test_what_stands_for_a_forward_says_what_it_takes():
    def forward(x, *, scale=1.0):
        return x * scale

    def standing_in(call):
        vars(module)["forward"] = call
        return Surrounded(Around("0", scaled, {}, "part"), module, {})

    module = nn.Linear(4, 4)
    of_its_class = Surrounded(Around("0", scaled, {}, "part"), module, {})
    assert inspect.signature(of_its_class) == inspect.signature(module.forward)
    assert of_its_class.__code__ is nn.Linear.forward.__code__
    assert inspect.signature(standing_in(forward)) == inspect.signature(forward)
    assert inspect.signature(standing_in(standing_in(forward))) == inspect.signature(forward)
    assert standing_in(forward).__code__ is forward.__code__
    assert standing_in(functools.partial(forward, scale=2.0)).__code__ is None


def test_places_are_those_of_every_callable_of_a_module_and_of_copies():
    model = pf.functionalize(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    twin = copy.deepcopy(model)
    others = [model.train(), model.eval(), model.method("forward")]
    pf.bind(pf.around("1", scaled, ones), model)
    assert all(other.hosts.paths == {"1"} for other in others)
    assert twin.hosts.paths == set()
    assert copy.deepcopy(model).hosts.paths == {"1"}
