"""Many adapters of one model, together and one after the other."""

import copy
from typing import Any

import optree
import torch
from torch import Tensor

import peft_func as pf

SMALL = 1e-10


def perturbed(tree, key, scale=0.3):
    generator = torch.Generator().manual_seed(key)
    return pf.map_leaves(lambda t: t + scale * torch.randn(t.shape, generator=generator, dtype=t.dtype), tree)


class Many:
    """A module in eval mode and float64 with a method, and some trees."""

    def __init__(self, net, method, count=3, *, output=lambda out: out, train=False):
        self.net = copy.deepcopy(net).double().train(train)
        self.model = pf.functionalize(self.net)
        self.adapter = pf.bind(method, self.model)
        self.frozen, start = self.adapter.init(0)
        self.members = [perturbed(start, key) for key in range(count)]
        self.output = output

    @property
    def stacked(self):
        return pf.stack(self.members)

    def one(self, tree: Any, *args: Any, **kwargs: Any) -> Tensor:
        weights = self.model.params if tree is None else self.adapter.apply(self.frozen, tree)
        return self.output(self.model(weights, *args, **kwargs))

    def routed(self, stacked: Any, index: list[int], *args: Any, **kwargs: Any) -> Tensor:
        weights = pf.route(self.adapter, self.frozen, stacked, torch.tensor(index))
        return self.output(self.model(weights, *args, **kwargs))

    def looped(self, trees: list[Any], index: list[int], *args: Any, **kwargs: Any) -> Tensor:
        def cut(value, i):
            return value[i : i + 1] if isinstance(value, Tensor) and value.shape[:1] == (len(index),) else value

        rows = []
        for i, k in enumerate(index):
            own = {name: cut(value, i) for name, value in kwargs.items()}
            rows.append(self.one(None if k < 0 else trees[k], *(cut(value, i) for value in args), **own))
        return torch.cat(rows)

    def check_route(self, index: list[int], *args: Any, **kwargs: Any) -> None:
        same(lambda s: self.routed(s, index, *args, **kwargs), lambda t: self.looped(t, index, *args, **kwargs), self)

    def check_ensemble(self, *args: Any, options: Any = None, **kwargs: Any) -> None:
        run = pf.ensemble(self.adapter, **(options or {}))
        same(
            lambda s: self.output(run(self.frozen, s, *args, **kwargs)),
            lambda trees: torch.stack([self.one(tree, *args, **kwargs) for tree in trees]),
            self,
        )


def same(together: Any, apart: Any, many: Many) -> None:
    """Compare values, and gradients of all members, of a function of a stack and of one of a list of trees."""
    results = []
    stacked = pf.map_leaves(lambda t: t.requires_grad_(), many.stacked)
    for value in (together(stacked), apart(pf.unstack(stacked))):
        loss, flat = (value * (value + 0.3).cos()).sum(), optree.tree_leaves(stacked)
        grads = [torch.zeros_like(t) for t in flat]
        if loss.requires_grad:
            grads = torch.autograd.grad(loss, flat, materialize_grads=True)
        results.append((value.detach(), grads))
    (found, found_grads), (expected, expected_grads) = results
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=SMALL, rtol=SMALL)
    for a, b in zip(found_grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b, atol=SMALL, rtol=SMALL)
