"""Modules that register hooks on themselves when they are called: what they register is gone with the call."""

import pytest
import torch
from torch import nn

import peft_func as pf
from tests.zoo import ZOO, randn


def hooks(root):
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in root.modules())


@pytest.mark.parametrize("animal", ["bert", "gpt2", "llama"])
def test_hidden_states_are_those_of_the_net_in_every_call(animal):
    net, (args, kwargs) = ZOO[animal].build(), ZOO[animal].inputs(0)
    model = pf.functionalize(net)
    expected = net(*args, **kwargs, output_hidden_states=True).hidden_states
    for _ in range(3):  # transformers collects them with hooks, which the first call registers
        found = model(model.params, *args, **kwargs, output_hidden_states=True).hidden_states
        assert len(found) == len(expected)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert hooks(model._skeleton.root) == 0


def test_hooks_of_the_net_and_of_a_call():
    class Counting(nn.Linear):
        def forward(self, x):
            self.register_forward_hook(lambda module, inputs, output: 2 * output)
            return super().forward(x)

    net = Counting(3, 3).double()
    net.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    model, x = pf.functionalize(net), randn(2, 3)
    for _ in range(3):
        expected = nn.functional.linear(x + 1, net.weight, net.bias)
        assert torch.equal(model(model.params, x), 2 * expected)
    assert hooks(net) == 1
