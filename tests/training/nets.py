"""Small nets, and states that are compared to the bit."""

import torch
from torch import nn


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double().eval()


def moved(module, seed=1):
    """Change every parameter, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in module.parameters():
            param += 0.3 * torch.randn(param.shape, generator=generator, dtype=param.dtype)
    return module


def copy_of(module):
    return {
        name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in module.state_dict().items()
    }


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def unchanged(net, before):
    """Whether a net is bitwise what it was, and no gradient has reached it."""
    return equal(net.state_dict(), before) and all(param.grad is None for param in net.parameters())
