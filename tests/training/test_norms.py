"""Which parameters are those of normalisation layers: of torch, of libraries, in base weights and in adapters."""

import pytest
import torch
import transformers
from torch import nn

import peft_func as pf
from tests import zoo


class LlamaRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.weight * x


class BatchNormAct2d(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.PReLU()


class RMSNormGated(LlamaRMSNorm):
    pass


class PreNorm(nn.Module):
    """A wrapper that is named as a norm."""

    def __init__(self, inner):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(4), inner

    def forward(self, x):
        return self.inner(self.norm(x))


class NormalisedLinear(nn.Linear):
    pass


NORMS = {
    "batch 1d": nn.BatchNorm1d(4),
    "batch 2d": nn.BatchNorm2d(4),
    "batch 3d": nn.BatchNorm3d(4),
    "sync": nn.SyncBatchNorm(4),
    "layer": nn.LayerNorm(4),
    "group": nn.GroupNorm(2, 4),
    "instance": nn.InstanceNorm2d(4, affine=True),
    "rms": nn.RMSNorm(4),
    "llama": LlamaRMSNorm(),
    "gated": RMSNormGated(),
    "timm": BatchNormAct2d(4),
}
OTHERS = {"linear": nn.Linear(4, 4), "conv": nn.Conv1d(4, 4, 1), "named": NormalisedLinear(4, 4), "prelu": nn.PReLU()}


def test_norms_are_known_by_class_and_by_the_name_of_a_class():
    model = pf.functionalize(nn.ModuleDict({**NORMS, **OTHERS}))
    wanted = {f"{name}.{own}" for name, norm in NORMS.items() for own, _ in norm.named_parameters(recurse=False)}
    assert {name for name, info in model.infos.items() if pf.norms()(name, info)} == wanted
    assert set(pf.partition(model.params, pf.norms(model))[0]) == wanted
    assert set(pf.partition(model.params, ~pf.norms(model))[0]) == set(model.params) - wanted
    assert "timm.act.weight" not in wanted


def test_a_wrapper_is_no_norm_but_what_is_in_it():
    net = nn.Sequential(PreNorm(nn.Dropout(0.5)), LlamaRMSNorm(), nn.BatchNorm1d(4, affine=False)).train()
    model = pf.with_modes(pf.functionalize(net), pf.norms())
    root = model._skeleton.root
    assert [path for path, module in root.named_modules() if not module.training] == ["0.norm", "1", "2"]


@pytest.mark.parametrize("build", [zoo.bert, zoo.llama], ids=["bert", "llama"])
def test_the_norms_of_transformers(build):
    net = build()
    kinds = (nn.LayerNorm, transformers.models.llama.modeling_llama.LlamaRMSNorm)
    wanted = {
        f"{path}.{name}"
        for path, module in net.named_modules()
        if isinstance(module, kinds)
        for name, _ in module.named_parameters()
    }
    model = pf.functionalize(net)
    assert set(pf.partition(model.params, pf.norms(model))[0]) == wanted
    assert list(pf.bind(pf.train(pf.norms()), model).init(0)[1]["train"]) == [n for n in model.params if n in wanted]


def test_leaves_of_adapters_are_those_of_the_weights_that_they_are_for():
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4))
    model = pf.functionalize(net)
    adapter = pf.bind(pf.chain(pf.lora(["0", "2"], rank=2), pf.train(r"[123]\.bias", name="bits")), model)
    tree = adapter.init(0)[1]
    chosen = pf.partition(tree, pf.norms(adapter))[0]
    assert [".".join(keys) for keys, _ in pf.leaves(chosen)] == ["bits.1.bias", "bits.3.bias"]
    # Base weights of the frozen tree, as well, and combined with what else is known.
    assert set(pf.partition(model.params, pf.norms(adapter))[0]) == {"1.weight", "1.bias", "3.weight", "3.bias"}
    late = pf.schedule({0: ~pf.norms(adapter), 2: ".*"})
    frozen, trained, _ = pf.repartition({}, tree, late(0))
    assert frozen.keys() == {"bits"}
    assert pf.repartition(frozen, trained, late(2))[0] == {}


def test_an_add_in_at_a_norm_is_no_parameter_of_the_norm():
    def init(place, key):
        return {"scale": torch.ones(4)}

    around = pf.after("1", lambda tree, output: output * tree["scale"], init, name="more")
    model = pf.functionalize(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
    adapter = pf.bind(pf.chain(around, pf.train(pf.norms())), model)
    assert pf.partition(adapter.init(0)[1], pf.norms(adapter))[0].keys() == {"train"}


def test_it_takes_models_and_adapters():
    with pytest.raises(pf.OptionError, match="not a Linear"):
        pf.norms(nn.Linear(4, 4))
    assert repr(pf.norms()) == "norms()"
