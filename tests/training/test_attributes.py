"""What of a net is reached through `pf.Adapted`: what only reads, methods as pure calls, and switches."""

import inspect

import pytest
import torch
from torch import nn

import peft_func as pf
from tests.training.nets import copy_of, moved, unchanged
from tests.zoo import ZOO


def test_attributes_of_the_net_that_only_read():
    animal = ZOO["bert"]
    net = animal.build()
    module = moved(pf.Adapted(net, pf.lora(animal.where[-1], rank=2)))
    assert module.config.hidden_size == net.config.hidden_size
    assert module.device == torch.device("cpu")
    assert module.dtype == torch.float64
    assert module.main_input_name == "input_ids"
    assert inspect.signature(type(module).forward) == inspect.signature(type(net).forward)
    assert inspect.signature(module.forward) == inspect.signature(net.forward)
    assert type(module).__name__ == f"Adapted{type(net).__name__}"
    assert isinstance(module, pf.Adapted)
    module.config.use_cache = False
    assert module.train().config is module.eval().config
    assert module.model._skeleton.root.config.use_cache is False
    assert net.config.use_cache is not False
    assert module.num_parameters() == sum(param.numel() for param in net.parameters())
    for name in ("bert", "save_pretrained", "resize_token_embeddings", "_init_weights", "nonsense"):
        assert not hasattr(module, name)
    with pytest.raises(pf.AttributeRefusedError, match="merged_state_dict"):
        module.init_weights()
    with pytest.raises(pf.AttributeRefusedError, match="observe"):
        module.bert  # noqa: B018


def test_generate_uses_the_effective_weights():
    animal = ZOO["gpt2"]
    net = animal.build()
    before = copy_of(net)
    module = moved(pf.Adapted(net, pf.lora(animal.where[-1], rank=2)))
    merged = animal.build()
    merged.load_state_dict(module.merged_state_dict())
    start = torch.tensor([[1, 2, 3]])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(module.generate(start, **options), merged.generate(start, **options))
    assert not torch.equal(module.generate(start, **options), net.generate(start, **options))
    assert unchanged(net, before)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("animal", ["bert", "gpt2", "llama"])
def test_gradient_checkpointing_gives_the_same_gradients(animal, reentrant):
    animal = ZOO[animal]
    net, (args, kwargs) = animal.build(), animal.inputs(0)
    method = pf.chain(pf.lora(animal.where[-1], rank=2), pf.train(pf.of_type(nn.Embedding)))
    module = moved(pf.Adapted(net, method)).train()

    def gradients():
        module.zero_grad()
        torch.manual_seed(1)
        animal.output(module(*args, **kwargs)).square().sum().backward()
        return [param.grad.clone() for param in module.parameters()]

    plain = gradients()
    enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    for ours, theirs in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert any(getattr(part, "gradient_checkpointing", False) for part in module.model._skeleton.root.modules())
    assert not any(getattr(part, "gradient_checkpointing", False) for part in net.modules())


class Odd(nn.Module):
    """Attributes of every kind."""

    nothing = None

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(4))
        self.register_buffer("mean", torch.zeros(4))
        self.names, self.activation, self.bound = ["a"], torch.tanh, self.twice

    @property
    def total(self):
        return float(self.scale.detach().sum() + self.mean.sum())

    @staticmethod
    def plus(x):
        return x + 1

    @classmethod
    def kind(cls):
        return cls.__name__

    def twice(self, x):
        return 2 * self(x)

    def part(self):
        return self.layer

    def reset_scale(self):
        self.scale.data.zero_()

    def forward(self, x):
        return self.activation(self.layer(x)) * self.scale + self.mean


def odd():
    net = Odd().double()
    return net, moved(pf.Adapted(net, pf.chain(pf.lora("layer", rank=2), pf.train("scale"))))


def test_an_attribute_is_what_it_is_in_the_net():
    _, module = odd()
    assert module.names == ["a"]
    assert module.nothing is None
    assert module.activation is torch.tanh
    assert (module.plus(1), module.kind()) == (2, "Odd")
    assert module.total == 4.0  # of the net's own weights, which training does not change
    with pytest.raises(AttributeError, match="neither Adapted nor Odd has an attribute 'nonsense'"):
        module.nonsense  # noqa: B018


def test_a_method_is_a_pure_call_with_the_effective_weights():
    net, module = odd()
    before, x = copy_of(net), torch.randn(3, 4, dtype=torch.float64)
    for twice in (module.twice, module.bound):  # a bound method in an attribute speaks of the copy
        assert torch.equal(twice(x), 2 * module(x))
    assert not torch.equal(module.twice(x), net.twice(x))
    module.twice(x).sum().backward()
    assert all(param.grad is not None for param in module.parameters())
    assert unchanged(net, before)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda module: module.layer, r"pf.observe\(module.model, 'layer'\)"),
        (lambda module: module.scale, r"module.weights\(\)\['scale'\]"),
        (lambda module: module.mean, "named_buffers"),
        (lambda module: module.reset_scale, "merged_state_dict"),
        (lambda module: module.part(), r"part\(\) gives a module of the net \(Linear\)"),
        (lambda module: setattr(module, "scale", torch.zeros(4)), "cannot be set through Adapted"),
        (lambda module: setattr(module, "layer", nn.Identity()), "cannot be set through Adapted"),
    ],
)
def test_what_would_be_lost_is_refused(use, message):
    net, module = odd()
    before = copy_of(net)
    with pytest.raises(pf.AttributeRefusedError, match=message):
        use(module)
    assert unchanged(net, before)


def test_an_attribute_of_the_net_is_set_on_the_copy_and_others_on_the_module():
    net, module = odd()
    x = torch.randn(3, 4, dtype=torch.float64)
    first = module(x)
    module.names, module.note = ["b"], "mine"
    assert (module.names, net.names) == (["b"], ["a"])
    assert module.train().names == module.eval().names == ["b"]
    assert vars(module)["note"] == "mine"
    assert not hasattr(module.model._skeleton.root, "note")
    assert torch.equal(module(x), first)


def test_switches_change_how_both_modes_run_and_not_the_net():
    net = ZOO["bert"].build()
    module = pf.Adapted(net, pf.train(".*LayerNorm.*"))
    module.set_attn_implementation("eager")
    assert module.config._attn_implementation == "eager"
    for mode in (True, False):
        assert module.train(mode).model._skeleton.root.config._attn_implementation == "eager"
    assert net.config._attn_implementation != "eager"
