"""What `observe` sees is what plain hooks on a plain module see, and nothing is left of it."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

import peft_func as pf
from peft_func.functional.observe import module_at
from tests.zoo import Attention, Shared, bert, gpt2, ids

HOOKS = [name for name in vars(nn.Module()) if "hooks" in name]


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Sequential(nn.Linear(5, 3), nn.Sigmoid())).double()


def bound(module, method):
    model = pf.functionalize(module)
    adapter = pf.bind(method, model)
    frozen, trainable = adapter.init(0)
    generator = torch.Generator().manual_seed(1)
    trainable = pf.map_leaves(lambda t: t + 0.3 * torch.randn(t.shape, generator=generator).to(t.dtype), trainable)
    return adapter, frozen, trainable


def test_it_sees_what_plain_hooks_see_on_a_module_with_merged_weights():
    plain = bert().double()
    adapter, frozen, tree = bound(plain, pf.chain(pf.gift(r".*query", rank=2), pf.lora(r".*dense", rank=2)))
    weights = adapter.apply(frozen, tree)
    merged = copy.deepcopy(plain)
    merged.load_state_dict(adapter.model.state_dict(weights))
    names = [name for name, module in merged.named_modules() if isinstance(module, nn.Linear)]
    assert len(names) > 8
    expected = {}
    for name in names:
        merged.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: expected.setdefault(name, []).append((args[0], output))
        )
    numbers = ids(2, 5, high=32)
    reference = merged(numbers)
    output, seen = pf.observe(adapter.model, weights, names, numbers)
    torch.testing.assert_close(output.logits, reference.logits, rtol=0, atol=1e-10)
    assert set(seen) == set(names)
    called = [name for name in names if name in expected]
    for name in called:
        [(x, y)], [call] = expected[name], seen[name]
        torch.testing.assert_close(call.input, x, rtol=0, atol=1e-10)
        torch.testing.assert_close(call.output, y, rtol=0, atol=1e-10)
    assert all(seen[name] == [] for name in set(names) - set(called))


def test_a_regex_is_for_the_whole_path_and_a_list_for_names_and_last_parts():
    model, x = pf.functionalize(net()), torch.ones(2, 4).double()

    def chosen(places):
        return list(pf.observe(model, model.params, places, x)[1])

    assert chosen(["0"]) == ["0", "2.0"]
    assert chosen(["2.0", "1"]) == ["1", "2.0", "2.1"]
    assert chosen(r"2\..*") == ["2.0", "2.1"]
    assert chosen([""]) == [""]
    assert chosen("0") == ["0"]


@pytest.mark.parametrize(
    ("places", "names"),
    [(["blok"], "block"), ("block.head", "block.heads"), (["block", "headz"], "block.heads"), (["?"], "block")],
)
def test_an_unknown_module_is_an_error_with_the_nearest_names(places, names):
    module = nn.ModuleDict({"block": nn.ModuleDict({"heads": nn.Linear(2, 2)})})
    model = pf.functionalize(module)
    with pytest.raises(pf.SelectorError, match="the nearest: .*" + names):
        pf.observe(model, model.params, places)


@pytest.mark.parametrize("places", [3, [3], None, r"("])
def test_what_names_no_modules_is_refused(places):
    model = pf.functionalize(net())
    with pytest.raises(pf.SelectorError):
        pf.observe(model, model.params, places, torch.ones(2, 4).double())


def test_a_module_that_is_called_often_has_every_call():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.Linear(3, 3)

        def forward(self, x):
            for _ in range(3):
                x = self.cell(x)
            return x

    loop = Loop().double()
    model, x = pf.functionalize(loop), torch.randn(2, 3).double()
    y, seen = pf.observe(model, model.params, ["cell"], x)
    assert len(seen["cell"]) == 3
    for call, following in zip(seen["cell"], seen["cell"][1:], strict=False):
        assert torch.equal(call.output, following.input)
    assert torch.equal(seen["cell"][0].input, x)
    assert torch.equal(seen["cell"][-1].output, y)


def test_both_names_of_a_shared_module_see_all_its_calls():
    cell = nn.Linear(3, 3).double()
    model = pf.functionalize(nn.Sequential(cell, nn.Tanh(), cell))
    _, seen = pf.observe(model, model.params, ["0", "2"], torch.randn(2, 3).double())
    assert [len(calls) for calls in seen.values()] == [2, 2]


def test_tuples_and_keywords_come_as_they_are():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.LSTM(3, 4, batch_first=True)
            self.mix = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            y, _ = self.inner(input=x)
            return self.mix(y, y, value=y, need_weights=False)

    model = pf.functionalize(Outer())
    (y, none), seen = pf.observe(model, model.params, ["inner", "mix"], torch.randn(2, 5, 3))
    [inner], [mix] = seen["inner"], seen["mix"]
    assert inner.args == ()
    assert list(inner.kwargs) == ["input"]
    assert inner.input.shape == (2, 5, 3)
    output, (hidden, cell) = inner.output
    assert output.shape == (2, 5, 4)
    assert hidden.shape == cell.shape == (1, 2, 4)
    assert len(mix.args) == 2
    assert list(mix.kwargs) == ["value", "need_weights"]
    assert torch.equal(mix.output[0], y)
    assert mix.output[1] is None
    assert none is None


def test_what_is_written_in_place_later_does_not_show():
    model = pf.functionalize(nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True)))
    x = torch.tensor([[1.0, -1.0, 0.5], [-2.0, 0.0, 1.0]])
    y, seen = pf.observe(model, model.params, ["0", "1"], x)
    linear = model.params["0.weight"], model.params["0.bias"]
    for found in (seen["0"][0].output, seen["1"][0].input):
        assert torch.equal(found, nn.functional.linear(x, *linear))
    assert (seen["0"][0].output < 0).any()
    assert torch.equal(seen["1"][0].output, y)


def test_nothing_is_left_of_it():
    module = net()
    calls = []
    module[0].register_forward_hook(lambda *_: calls.append("user"))  # is part of the model, and stays
    model, x = pf.functionalize(module), torch.ones(2, 4).double()

    def hooks(root):
        return [[len(getattr(m, name)) for name in HOOKS] for m in root.modules() if hasattr(m, HOOKS[0])]

    before, own = (hooks(module), hooks(model._skeleton.root)), dict(vars(model))
    _, seen = pf.observe(model, model.params, r".*", x)
    assert len(calls) == 1
    numbers = {name: len(found) for name, found in seen.items()}
    assert all(value is own[name] for name, value in vars(model).items())
    model(model.params, x)
    module(x)
    assert (hooks(module), hooks(model._skeleton.root)) == before
    assert {name: len(found) for name, found in seen.items()} == numbers == dict.fromkeys(seen, 1)


def test_threads_see_their_own_calls():
    model = pf.functionalize(net())
    adapter = pf.bind(pf.lora("0", rank=2), model)
    frozen, tree = adapter.init(0)
    trees = [pf.map_leaves(lambda t, i=i: t + 0.1 * i, tree) for i in range(8)]
    x = torch.randn(2, 4).double()

    def seen(number):
        output, found = pf.observe(model, adapter.apply(frozen, trees[number]), ["2.0"], x + number)
        return output, [tuple(map(torch.clone, (call.input, call.output))) for call in found["2.0"]]

    expected = [seen(number) for number in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for number, (output, calls) in enumerate(pool.map(seen, [n for n in range(8) for _ in range(6)])):
            wanted, [(x_, y_)] = expected[number // 6]
            [(found_x, found_y)] = calls
            assert torch.equal(output, wanted)
            assert torch.equal(found_x, x_)
            assert torch.equal(found_y, y_)


def test_it_composes_with_vmap_and_grad():
    adapter, frozen, tree = bound(net(), pf.lora("0", rank=2))
    model, x = adapter.model, torch.randn(3, 4).double()
    stacked = pf.stack([tree, pf.map_leaves(lambda t: 2 * t, tree)])

    def inside(t, x):
        _, seen = pf.observe(model, adapter.apply(frozen, t), ["1"], x)
        return seen["1"][0].output

    every = torch.func.vmap(inside, in_dims=(0, None))(stacked, x)
    for one, t in zip(every, pf.unstack(stacked), strict=True):
        torch.testing.assert_close(one, inside(t, x))
    # d/dA of the sum of tanh(x W'^T + b) by hand.
    leaf = tree["lora"]["0.weight"]
    grads = torch.func.grad(lambda t: inside(t, x).sum())(tree)["lora"]["0.weight"]
    slope = 1 - inside(tree, x).square()
    change = slope.T @ x  # of W'
    torch.testing.assert_close(grads["A"], leaf["B"].T @ change)
    torch.testing.assert_close(grads["B"], change @ leaf["A"].T)


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_a_checkpointed_module_does_again_in_backward_is_not_seen(reentrant):
    class Saving(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(3, 3)

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=reentrant)

    model = pf.functionalize(Saving())
    x = torch.randn(2, 3, requires_grad=True)
    y, seen = pf.observe(model, model.params, ["body"], x)
    y.square().sum().backward()
    assert len(seen["body"]) == 1
    torch.testing.assert_close(x.grad, 2 * y.detach() @ model.params["body.weight"])


def test_other_methods_are_observed_too():
    model = pf.functionalize(gpt2().eval()).method("generate")
    numbers = ids(1, 4, high=32)
    output, seen = pf.observe(model, model.params, ["h.0"], numbers, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert output.shape == (1, 7)
    [calls] = seen.values()
    assert [call.input.shape[1] for call in calls] == [4, 5, 6]


def test_a_module_that_returns_its_weight_gives_the_effective_one():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3))

        def forward(self):
            return self.weight

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = Table()

        def forward(self, x):
            return x @ self.table().T

    adapter, frozen, tree = bound(Net(), pf.lora("table", rank=2))
    weights = adapter.apply(frozen, tree)
    _, seen = pf.observe(adapter.model, weights, ["table"], torch.ones(1, 3))
    assert seen["table"][0].input is None
    torch.testing.assert_close(seen["table"][0].output, pf.merge(weights)["table.weight"])


def test_what_it_cannot_do_is_refused():
    adapter, frozen, tree = bound(net(), pf.lora("0", rank=2))
    x = torch.ones(2, 4).double()
    routed = pf.route(adapter, frozen, pf.stack([tree, tree]), torch.tensor([0, 1]))
    with pytest.raises(pf.OptionError, match="functionalize"):
        pf.observe(net(), frozen, ["0"], x)
    with pytest.raises(pf.OptionError, match="vmap"):
        pf.observe(adapter.model, routed, ["0"], x)
    compiled = torch.compile(lambda x: pf.observe(adapter.model, frozen, ["0"], x)[0], backend="eager", fullgraph=True)
    with pytest.raises((pf.OptionError, torch._dynamo.exc.Unsupported)):
        compiled(x)


@pytest.mark.parametrize("entry", ["attention", "shared"])
def test_a_module_alone_is_the_module_inside(entry):
    module = (Attention() if entry == "attention" else Shared()).double()
    model = pf.functionalize(module)
    for name, part in module.named_modules(remove_duplicate=False):
        if isinstance(part, nn.Linear) and type(part) is nn.Linear:
            alone, names = module_at(model, name)
            x = torch.randn(2, part.in_features).double()
            weights = {own: model.params[full] for own, full in names.items()}
            assert torch.equal(alone(weights, x), part(x))
