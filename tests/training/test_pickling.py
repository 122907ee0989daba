"""Copies of `pf.Adapted`, by deepcopy, pickle and torch.save; and a method as something that pickles."""

import copy
import io
import pickle

import pytest
import torch

import peft_func as pf
from peft_func.training.pickling import packed, unpacked
from tests.training.nets import copy_of, mlp, moved
from tests.zoo import ConvNet, randn, seeded


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("mode", [True, False])
def test_copies_are_equal_and_independent(how, mode):
    net = seeded(ConvNet)()
    module = moved(pf.Adapted(net, pf.chain(pf.lora("stem", rank=2), pf.train("head")))).train(mode)
    x = randn(4, 4, 12, 12)
    module(x)
    if how == "deepcopy":
        twin = copy.deepcopy(module)
        assert twin.frozen["stem.weight"].data_ptr() == net.stem.weight.data_ptr()  # the base is shared
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(module))
    else:
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert type(twin) is type(module)
    assert twin.training is mode
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in module.state_dict().items())
    expected = module(x)
    assert torch.equal(twin(x), expected)
    before = copy_of(module)
    moved(twin).train()(x)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def shifts_init(weights, key):
    return {path: {"shift": torch.zeros_like(weight)} for path, weight in weights.items()}


def shifts_apply(tree, weights):
    return {path: weight + tree[path]["shift"] for path, weight in weights.items()}


def test_a_method_of_ones_own_is_copied_and_pickles_as_its_functions_do():
    x = randn(4, 6)
    own = pf.on(r".*bias", pf.Transform(shifts_init, shifts_apply), name="shifts")
    module = moved(pf.Adapted(mlp(), pf.chain(pf.lora("0", rank=2), pf.chain(own, name="inner"))))
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), module(x))
    local = pf.Transform(lambda weights, key: shifts_init(weights, key), lambda *given: shifts_apply(*given))
    module = moved(pf.Adapted(mlp(), pf.on(r".*bias", local, name="shifts")))
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(module)


def test_a_method_of_the_library_is_data_and_comes_back_for_a_twin():
    own = pf.on("3.bias", pf.Transform(shifts_init, shifts_apply), name="shifts")
    lora = pf.lora("0", rank=2, alpha=3, name="low")
    method = pf.chain(lora, pf.chain(own, pf.train("3.weight"), name="inner"))
    adapter = pf.bind(method, pf.functionalize(mlp()))
    data = packed(adapter, adapter.method)
    (_, (first, (inner, (second, third)))) = data
    assert (inner, second) == ("inner", adapter.method.parts[1].parts[0])
    for part in (first, third):
        assert not callable(part)
        assert pickle.loads(pickle.dumps(part)) == part
    twin = pf.functionalize(mlp())
    again = pf.bind(unpacked(data, twin), twin)
    (frozen, tree), (same_frozen, same_tree) = adapter.init(5), again.init(5)
    assert frozen.keys() == same_frozen.keys()
    assert [keys for keys, _ in pf.leaves(tree)] == [keys for keys, _ in pf.leaves(same_tree)]
    tree, x = pf.map_leaves(lambda leaf: leaf + 0.3, tree), randn(4, 6)
    assert torch.equal(again.model(again.apply(same_frozen, tree), x), adapter.model(adapter.apply(frozen, tree), x))
