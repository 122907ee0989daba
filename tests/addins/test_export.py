"""`pf.export_module`: a plain module that carries what no weight can."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import peft_func as pf
from tests.addins.small import added, gate
from tests.laws.conformance import perturbed
from tests.threads import wrong_answers
from tests.zoo import ZOO, ids, randn


def scaled(tree, inner, *args, **kwargs):
    return inner(*args, **kwargs) * tree["gate"]


def exported(net, method):
    model = pf.functionalize(net)
    adapter = pf.bind(method, model)
    frozen, tree = adapter.init(0)
    tree = pf.map_leaves(lambda leaf: leaf + 0.1, tree)
    return pf.export_module(adapter, frozen, tree), (lambda *args: model(adapter.apply(frozen, tree), *args)), tree


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()


METHOD = pf.chain(
    pf.lora("0", rank=2), pf.around("0", scaled, gate, name="ssf"), pf.across("0", "2", added, gate, name="skip")
)


def test_it_is_a_copy_that_shares_nothing():
    net = mlp()
    before = copy.deepcopy(net.state_dict())
    module, call, _ = exported(net, METHOD)
    x = randn(3, 4)
    expected = call(x)
    assert type(module) is type(net)
    assert torch.allclose(module(x), expected)
    with torch.no_grad():
        for param in module.parameters():
            param.add_(1)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())
    assert torch.equal(call(x), expected)
    assert not torch.allclose(module(x), expected)


def test_its_state_dict_has_the_nets_names_and_the_addins():
    module, _, tree = exported(mlp(), METHOD)
    names = [*mlp().state_dict(), "addins.ssf.0.gate", "addins.skip.2.gate"]
    assert list(module.state_dict()) == names
    assert all(param.requires_grad for param in module.parameters())
    assert torch.equal(module.addins.get_parameter("ssf.0.gate"), tree["ssf"]["0"]["gate"])


def test_a_shared_leaf_is_one_parameter():
    module, call, _ = exported(mlp(), pf.around("0|2", scaled, gate, share=True, name="ssf"))
    assert [name for name in module.state_dict() if name.startswith("addins")] == ["addins.ssf.shared.gate"]
    x = randn(3, 4)
    assert torch.allclose(module(x), call(x))


def test_without_addins_it_is_the_merged_net():
    net = mlp()
    module, call, _ = exported(net, pf.lora("0", rank=2))
    x = randn(3, 4)
    assert list(module.state_dict()) == list(net.state_dict())
    assert torch.allclose(module(x), call(x), atol=1e-12)
    assert "forward" not in vars(module)


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save"])
def test_copies(how, tmp_path):
    module, _, _ = exported(mlp(), METHOD)
    x = randn(3, 4)
    expected = module(x)
    if how == "torch.save":
        torch.save(module, tmp_path / "module.pt")
        twin = torch.load(tmp_path / "module.pt", weights_only=False)
    else:
        twin = copy.deepcopy(module) if how == "deepcopy" else pickle.loads(pickle.dumps(module))
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        twin.get_parameter("addins.skip.2.gate").add_(1)
    assert not torch.equal(twin(x), expected)
    assert torch.equal(module(x), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*:FutureWarning")  # torch.export's own
@pytest.mark.parametrize("method", [pf.houlsby(rank=4), pf.pfeiffer(rank=2), pf.parallel_adapter(rank=2)])
def test_torch_export_of_a_bert_with_bottlenecks_for_any_batch(method):
    net = ZOO["bert"].build()
    model = pf.functionalize(net)
    adapter = pf.bind(pf.chain(method, pf.lora(["query"], rank=2)), model)
    frozen, tree = adapter.init(0)
    tree = perturbed(tree, 1, 0.5)
    module = pf.export_module(adapter, frozen, tree)
    sizes = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("tokens", min=2, max=16)}

    def given(*shape):
        mask = torch.ones(shape, dtype=torch.long)
        mask[0, -1] = 0
        return {"input_ids": ids(*shape, high=32), "attention_mask": mask}

    call = given(2, 5)
    program = torch.export.export(module, (), call, dynamic_shapes=dict.fromkeys(call, sizes))
    assert [name for name in program.state_dict if name.startswith("addins.")]
    for other in (call, given(3, 7)):
        found = program.module()(**other).logits
        assert torch.allclose(found, model(adapter.apply(frozen, tree), **other).logits, atol=1e-10)
        assert not torch.allclose(found, net(**other).logits, atol=1e-2)


@pytest.mark.parametrize("strict", [False, True])
def test_torch_export(strict):
    method = pf.chain(pf.lora("0", rank=2), pf.around("0", scaled, gate, name="ssf")) if strict else METHOD
    module, call, _ = exported(mlp(), method)
    x = randn(3, 4)
    program = torch.export.export(module.eval(), (x,), strict=strict)
    assert torch.allclose(program.module()(x), call(x), atol=1e-12)
    assert "addins.ssf.0.gate" in program.state_dict
    assert torch.allclose(module(x), call(x), atol=1e-12)


def test_it_trains_as_the_functions_do():
    net, x = mlp(), randn(5, 4)
    module, _, tree = exported(net, METHOD)
    model = pf.functionalize(net)
    adapter = pf.bind(METHOD, model)
    leaves = pf.map_leaves(lambda leaf: leaf.requires_grad_(), tree)
    model(adapter.apply(adapter.frozen, leaves), x).square().sum().backward()
    module(x).square().sum().backward()
    for keys in (("ssf", "0", "gate"), ("skip", "2", "gate")):
        ours = module.get_parameter(".".join(("addins", *keys))).grad
        assert torch.allclose(ours, leaves[keys[0]][keys[1]][keys[2]].grad)


class Segments(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = mlp()

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


def test_checkpointing_and_threads_with_an_across():
    method = pf.across("layers.0", "layers.2", added, gate)
    module, call, _ = exported(Segments(), method)
    x = randn(3, 4).requires_grad_()
    module(x).square().sum().backward()
    ours = x.grad.clone()
    x.grad = None
    call(x).square().sum().backward()
    assert torch.allclose(ours, x.grad)
    inputs = [randn(2, 4, seed=i) for i in range(4)]
    assert not wrong_answers(lambda i: module(inputs[i]), [module(value) for value in inputs], times=50)


def test_a_hugging_face_net_keeps_its_class_and_methods():
    animal = ZOO["gpt2"]
    net = animal.build()
    module, call, _ = exported(net, pf.chain(pf.lora(["c_attn"], rank=2), pf.around(["mlp"], scaled, gate)))
    (args, kwargs) = animal.inputs(0)
    assert type(module) is type(net)
    assert torch.allclose(module(*args, **kwargs).logits, call(*args).logits, atol=1e-12)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert module.generate(torch.tensor([[1, 2]]), **options).shape == (1, 6)
    assert module.lm_head.weight is module.transformer.wte.weight  # ties stay
