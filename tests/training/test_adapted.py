"""`pf.Adapted`: a module whose parameters are what trains, over a net that stays as it was."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.stateless import _reparametrize_module

import peft_func as pf
from tests.training.nets import copy_of, mlp, moved, unchanged
from tests.zoo import ZOO, ConvNet, randn, seeded

F = nn.functional


METHODS = {
    "lora": pf.lora(["0", "3"], rank=2),
    "chain": pf.chain(pf.lora("0", rank=2), pf.gift("3", rank=2), pf.train("3.bias")),
    "train": pf.train(".*"),
    "own": pf.on(
        r".*bias",
        pf.Transform(
            lambda weights, key: {path: {"shift": torch.zeros_like(w)} for path, w in weights.items()},
            lambda tree, weights: {path: w + tree[path]["shift"] for path, w in weights.items()},
        ),
        name="shifts",
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_parameters_are_the_leaves_of_the_tree_by_path(method):
    net = mlp()
    adapter = pf.bind(METHODS[method], pf.functionalize(net))
    _, tree = adapter.init(3)
    module = pf.Adapted(net, METHODS[method], 3)
    named = dict(module.named_parameters())
    assert named.keys() == {".".join(keys) for keys, _ in pf.leaves(tree)}
    for keys, leaf in pf.leaves(tree):
        assert torch.equal(named[".".join(keys)], leaf)
        assert named[".".join(keys)].requires_grad
        assert torch.equal(module.get_parameter(".".join(keys)), leaf)
    assert module.state_dict().keys() == named.keys()


@pytest.mark.parametrize("animal", ["bert", "gpt2", "llama", "vit", "conv", "tied", "shared", "attention"])
def test_the_call_is_that_of_the_functions(animal):
    animal = ZOO[animal]
    net, (args, kwargs) = animal.build(), animal.inputs(0)
    before = copy_of(net)
    module = moved(pf.Adapted(net, pf.lora(animal.where[-1], rank=2)))
    model = pf.functionalize(net)
    adapter = pf.bind(pf.lora(animal.where[-1], rank=2), model)
    frozen, _ = adapter.init(0)
    expected = animal.output(model(adapter.apply(frozen, module.trainable), *args, **kwargs))
    output = animal.output(module(*args, **kwargs))
    assert torch.equal(output, expected)
    output.square().sum().backward()
    merged = animal.build()
    merged.load_state_dict(module.merged_state_dict(), strict=True)
    torch.testing.assert_close(animal.output(merged(*args, **kwargs)), output, rtol=1e-10, atol=1e-10)
    assert all(param.grad is not None for param in module.parameters())
    assert unchanged(net, before)


def test_training_is_that_of_the_plain_module():
    net, x, y = mlp(), randn(16, 6), torch.arange(16) % 3
    twin, before = copy.deepcopy(net).train(), copy_of(net)
    module = pf.Adapted(net, pf.train(".*")).train()
    ours, theirs = (torch.optim.AdamW(part.parameters(), lr=1e-2) for part in (module, twin))
    for step in range(20):
        losses = []
        for part, optimizer in ((module, ours), (twin, theirs)):
            torch.manual_seed(step)  # dropout draws alike
            loss = F.cross_entropy(part(x), y)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(part.parameters(), 0.5)
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == losses[1]
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in module.merged_state_dict().items())
    assert unchanged(net, before)


def test_statistics_are_the_modules_own_and_saved_with_it():
    net = seeded(ConvNet)().train()
    before, twin = copy_of(net), copy.deepcopy(net)
    module = pf.Adapted(net, pf.train(".*"))
    x = randn(4, 4, 12, 12)
    for _ in range(3):
        torch.testing.assert_close(module(x), twin(x), rtol=1e-12, atol=1e-12)
    assert unchanged(net, before)
    merged = module.merged_state_dict()
    assert int(merged["norm.num_batches_tracked"]) == 3
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(merged[name], value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(module.eval()(x), twin.eval()(x), rtol=1e-12, atol=1e-12)
    saved = module.state_dict()
    assert "net.norm.running_mean" in saved
    again = pf.Adapted(net, pf.train(".*"), 5)
    assert str(again.load_state_dict(saved, strict=True)) == "<All keys matched successfully>"
    assert torch.equal(again.eval()(x), module(x))


def test_always_eval_keeps_the_statistics():
    net = seeded(ConvNet)().train()
    module = pf.Adapted(net, pf.train(".*"), always_eval=pf.of_type(nn.BatchNorm2d)).train()
    x, before = randn(4, 4, 12, 12), copy_of(net)
    twin = copy.deepcopy(net).train()
    twin.norm.eval()
    torch.testing.assert_close(module(x), twin(x), rtol=1e-12, atol=1e-12)
    assert int(module.state()["norm.num_batches_tracked"]) == 0
    torch.testing.assert_close(pickle.loads(pickle.dumps(module))(x), twin(x), rtol=1e-12, atol=1e-12)
    assert unchanged(net, before)
    with pytest.raises(pf.SelectorError, match="norm"):
        pf.Adapted(net, pf.train(".*"), always_eval="norms")


def test_modes_of_the_net_stay_until_somebody_changes_them():
    net = mlp().train()
    net[2].eval()
    x = randn(4, 6)
    module = pf.Adapted(net, pf.lora("0", rank=2))
    assert module.training
    assert torch.equal(module(x), net(x))
    assert not torch.equal(copy.deepcopy(module).train()(x), net(x))
    module.eval()
    module.training = True  # as Lightning restores modes after validation
    assert torch.equal(module(x), net(x))
    assert not torch.equal(module.train()(x), net(x))
    assert torch.equal(module.eval()(x), net(x))


def test_train_and_eval_reach_it_through_a_parent_and_beside_a_part_of_that_name():
    module = pf.Adapted(mlp(), pf.chain(pf.lora("0", rank=2), pf.train("3")))
    parent = nn.Sequential(module)
    x = randn(64, 6)
    for mode in (True, False, True):
        assert parent.train(mode) is parent
        assert all(part.training is mode for part in parent.modules())
        assert torch.equal(module(x), module(x)) is not mode
    assert module.train(False) is module
    assert module.eval() is module
    assert isinstance(module.get_submodule("train.3"), nn.Module)


def test_functional_call_and_frozen_flags():
    module = pf.Adapted(mlp(), pf.chain(pf.lora("0", rank=2), pf.train("3")))
    x = randn(4, 6)
    other = {name: param.detach() + 1 for name, param in module.named_parameters()}
    expected = copy.deepcopy(module)
    expected.load_state_dict(other)
    assert torch.equal(torch.func.functional_call(module, other, (x,)), expected(x))
    with _reparametrize_module(module, other):
        assert torch.equal(module(x), expected(x))
    module.get_parameter("train.3.bias").requires_grad_(False)
    module(x).sum().backward()
    assert module.get_parameter("train.3.bias").grad is None
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        flags = {name: param.requires_grad for name, param in twin.named_parameters()}
        assert [name for name, flag in flags.items() if not flag] == ["train.3.bias"]


def test_swa_averages_it():
    module = pf.Adapted(mlp(), pf.lora("0", rank=2))
    average = torch.optim.swa_utils.AveragedModel(module)
    x = randn(4, 6)
    values = []
    for seed in range(3):
        moved(module, seed)
        average.update_parameters(module)
        values.append(copy_of(module))
    for name, param in average.module.named_parameters():
        torch.testing.assert_close(param.data, sum(value[name] for value in values) / 3)
    assert average(x).shape == (4, 3)


def test_of_a_loaded_adapter(tmp_path):
    net = mlp()
    model = pf.functionalize(net)
    adapter = pf.bind(METHODS["chain"], model)
    frozen, tree = adapter.init(0)
    tree = pf.map_leaves(lambda leaf: leaf + 0.1, tree)
    pf.save(tmp_path / "a.safetensors", adapter, tree)
    adapter, frozen, tree = pf.load(tmp_path / "a.safetensors", model)
    module = pf.Adapted.of(adapter, tree)
    x = randn(4, 6)
    assert torch.equal(module(x), model(adapter.apply(frozen, tree), x))
    pf.save(tmp_path / "b.safetensors", module.adapter, module.trainable)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    module.to(torch.float32)
    assert model.params["0.weight"].dtype == torch.float64
    with pytest.raises(pf.TreeError, match="lacks"):
        pf.Adapted.of(adapter, {})


def test_to_casts_what_is_frozen_and_leaves_the_net():
    net, x = mlp(), randn(4, 6)
    before = copy_of(net)
    module = moved(pf.Adapted(net, METHODS["chain"]))
    expected = module(x)
    assert module.float() is module
    assert {tensor.dtype for tensor in (*module.frozen.values(), *module.parameters())} == {torch.float32}
    torch.testing.assert_close(module(x.float()).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.double().train().eval()(x), expected, rtol=1e-5, atol=1e-5)
    assert module.to("meta").frozen["0.weight"].is_meta
    assert unchanged(net, before)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [True, False])
def test_compile_agrees(mode):
    net = mlp().float() if mode is False else nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    module = moved(pf.Adapted(net, pf.chain(pf.lora("0", rank=2), pf.train(r"[23]\.weight")))).train(mode)
    twin = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = randn(5, 6).float()
    for _ in range(3):
        losses = [part(x).square().mean() for part in (compiled, twin)]
        torch.testing.assert_close(losses[0], losses[1])
        for part, loss in zip((module, twin), losses, strict=True):
            part.zero_grad()
            loss.backward()
            with torch.no_grad():
                for param in part.parameters():
                    param -= 0.1 * param.grad
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name])


def test_a_part_that_would_hide_a_method_is_refused():
    with pytest.raises(pf.OptionError, match="name='my_forward'"):
        pf.Adapted(mlp(), pf.lora("0", rank=2, name="forward"))
    with pytest.raises(pf.OptionError, match="adapter"):
        pf.Adapted(mlp(), pf.lora("0", rank=2, name="adapter"))
    assert pf.Adapted(mlp(), pf.lora("0", rank=2, name="train"))(randn(2, 6)).shape == (2, 3)


def test_a_forward_that_someone_replaces_is_used():
    module = pf.Adapted(mlp(), pf.lora("0", rank=2))
    first = module.forward
    module.forward = lambda *args: first(*args) * 2  # as accelerate does for mixed precision
    assert torch.equal(module(randn(2, 6)), first(randn(2, 6)) * 2)


def test_its_print_says_how_much_trains():
    text = repr(pf.Adapted(mlp(), pf.lora("0", rank=2)))
    assert "28 numbers train" in text
    assert "lora" in text


def shift_init(place, key):
    return {"shift": torch.zeros((), dtype=place.like.dtype)}


def shift(tree, output):
    return output + tree["shift"]


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_addins_are_parameters_like_others(how):
    method = pf.chain(pf.lora("0", rank=2), pf.after("3", shift, shift_init, name="shifts"))
    module = moved(pf.Adapted(mlp(), method))
    assert "shifts.3.shift" in module.state_dict()
    x = randn(4, 6)
    twin = copy.deepcopy(module) if how == "deepcopy" else pickle.loads(pickle.dumps(module))
    assert torch.equal(twin(x), module(x))
    expected = pf.export_module(module.adapter, module.frozen, module.trainable)(x)
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)
    module(x).sum().backward()
    assert module.get_parameter("shifts.3.shift").grad is not None
    with pytest.raises(pf.AddinError, match="export_module"):
        module.merged_state_dict()
