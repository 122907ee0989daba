"""The class that `pf.Adapted` makes for a class of nets."""

import copy
import inspect

import torch
from torch import nn

import peft_func as pf
from peft_func.training.signature import class_for, written_class
from tests.training.nets import mlp
from tests.zoo import randn

F = nn.functional


def test_a_subclass_keeps_its_own_forward_and_class():
    class Loss(pf.Adapted):
        def forward(self, x, y):
            return F.cross_entropy(super().forward(x), y)

    module = Loss(mlp(), pf.lora("0", rank=2))
    assert isinstance(module, Loss)
    assert list(inspect.signature(module.forward).parameters) == ["x", "y"]
    assert module(randn(3, 6), torch.tensor([0, 1, 2])).dim() == 0
    assert isinstance(copy.deepcopy(module), Loss)


class Named(nn.Linear):
    def forward(self, values, *, scale: float = 1.0):
        """Not what the class is documented by."""
        return super().forward(values) * scale


def test_the_forward_says_what_the_nets_takes():
    module = pf.Adapted(Named(6, 3), pf.lora("weight", rank=1))
    for forward in (module.forward, type(module).forward):
        assert list(inspect.signature(forward).parameters)[-2:] == ["values", "scale"]
    assert inspect.signature(module.forward) == inspect.signature(Named.forward.__get__(module))
    assert type(module).forward.__doc__ == pf.Adapted.forward.__doc__
    assert (type(module).__name__, type(module).__module__) == ("AdaptedNamed", pf.Adapted.__module__)
    x = torch.randn(2, 6)
    assert torch.equal(module(values=x, scale=2.0), 2 * module(x))


def test_one_class_for_one_class_of_nets():
    one, other, third = (
        pf.Adapted(net, pf.lora("weight", rank=1)) for net in (Named(6, 3), Named(4, 2), nn.Linear(4, 2))
    )
    assert type(one) is type(other)
    assert type(one) is not type(third)
    assert inspect.signature(type(third).forward) == inspect.signature(nn.Linear.forward)
    assert written_class(type(one)) is written_class(pf.Adapted) is pf.Adapted
    again = class_for(type(one), nn.Linear, pf.Adapted.forward)  # of the class that was written, not of the one made
    assert again is type(third)
    assert again.__mro__[1] is pf.Adapted
