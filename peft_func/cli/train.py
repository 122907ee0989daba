"""Training: the network on the old digits, then all members of an ensemble at once on the new ones."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import cos, pi
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peft_func as pf
from peft_func.cli.digits import Examples
from peft_func.trees.paths import Tree, leaves

Steps: TypeAlias = Callable[[range], Iterable[int]]
"""Goes through the numbers of the steps, perhaps with a progress bar."""


@dataclass(frozen=True)
class Curves:
    """What was measured while the members learned.

    Attributes:
        loss: `[steps, members]`, the cross-entropy of each step's batch, in nats per image.
        evaluated: `[k]`, the numbers of steps taken when the accuracy was measured; 0 first, all steps last.
        accuracy: `[k, members]`, the share of held-out images that each member gets right.
    """

    loss: Tensor
    evaluated: Tensor
    accuracy: Tensor


def warm_cosine(step: int, steps: int) -> float:
    """Return the factor of the learning rate at a step: up over the first tenth, down to nearly 0 along a cosine."""
    return min(1.0, (step + 1) / (0.1 * steps)) * (1 + cos(pi * step / steps)) / 2


def batches(key: int, count: int, steps: int, size: int) -> Tensor:
    """Return the examples that each step sees: int64 `[steps, size]`, from 0 to `count - 1`.

    Every epoch goes through all examples in a new order. It depends on the key only.
    """
    generator = torch.Generator().manual_seed(key)
    epochs = -(-steps * size // count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])
    return order[: steps * size].reshape(steps, size)


def distortions(key: int, steps: int, size: int) -> Tensor:
    """Return a random affine map for each image of each step: `[steps, size, 2, 3]`, for `F.affine_grid`.

    They turn, shear, scale and shift an image by about as much as one hand differs from another.
    """
    generator = torch.Generator().manual_seed(key)
    linear = torch.eye(2) + 0.09 * torch.randn(steps, size, 2, 2, generator=generator)
    shift = 0.09 * torch.randn(steps, size, 2, 1, generator=generator)
    return torch.cat([linear, shift], dim=-1)


def distort(images: Tensor, maps: Tensor) -> Tensor:
    """Return images `[*, height, width]` under affine maps `[*, 2, 3]`."""
    flat, theta = images.flatten(0, -3).unsqueeze(1), maps.flatten(0, -3)
    grid = F.affine_grid(theta.to(flat.dtype), list(flat.shape), align_corners=False)
    return F.grid_sample(flat, grid, align_corners=False).reshape(images.shape)


def pretrain(
    net: nn.Module, examples: Examples, key: int, *, steps: int, size: int = 64, rate: float = 3e-3, each: Steps = iter
) -> None:
    """Train a network in place, the ordinary way.

    Args:
        net: takes images `[n, 8, 8]` and gives logits `[n, classes]`.
        examples: what it learns.
        key: of the order of the examples and of their distortions.
        steps: how many.
        size: of a batch.
        rate: the largest learning rate of AdamW.
        each: goes through the steps.
    """
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_cosine(step, steps))
    order = batches(key, len(examples), steps, size)
    maps = distortions(pf.split(key, "distortions"), steps, size)
    for step in each(range(steps)):
        batch = examples.take(order[step])
        optimizer.zero_grad()
        F.cross_entropy(net(distort(batch.images, maps[step])), batch.labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()


def draw_members(adapter: pf.Adapter, keys: Sequence[int]) -> tuple[dict[str, Tensor], Tree]:
    """Return the frozen weights, and one first adapter for each key, stacked: every leaf is `[members, ...]`."""
    trees = [adapter.init(pf.split(key, "init"))[1] for key in keys]
    return adapter.init(0)[0], pf.stack(trees)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the share of right answers: logits `[*, n, classes]` and labels `[n]` to float64 `[*]`."""
    return (logits.argmax(-1) == labels).double().mean(-1)


def member_log_probs(adapter: pf.Adapter, frozen: Mapping[str, Tensor], stacked: Tree, images: Tensor) -> Tensor:
    """Return what every member says of every image: log-probabilities `[members, n, classes]`."""

    def one(tree: Tree, part: Tensor) -> Tensor:
        return F.log_softmax(adapter.model(adapter.apply(frozen, tree), part), dim=-1)

    every = torch.func.vmap(one, in_dims=(0, None), chunk_size=16)
    with torch.no_grad():
        # In parts and chunks that stay in the cache: the memory does not grow, and it is faster.
        return torch.cat([every(stacked, part) for part in torch.split(images, 64)], dim=1)


def fit_members(
    adapter: pf.Adapter,
    frozen: Mapping[str, Tensor],
    stacked: Tree,
    keys: Sequence[int],
    examples: Examples,
    *,
    steps: int,
    held_out: Examples | None = None,
    size: int = 25,
    rate: float = 1e-2,
    each: Steps = iter,
) -> tuple[Tree, Curves]:
    """Train all members at once; each becomes what it would have become alone.

    One step is one call of `vmap(grad(loss))` over the stacked trees and one of AdamW on the stacked leaves. AdamW
    works value by value, so the members do not feel one another.

    Args:
        adapter: the method.
        frozen: the weights that all members share.
        stacked: their first adapters, every leaf `[members, ...]`; not written to.
        keys: one for each member, of the order in which it sees the examples and of their distortions.
        examples: what they learn.
        steps: how many.
        held_out: what their accuracy is measured on now and then, for the curves; nothing is chosen by it.
        size: of a member's batch.
        rate: the largest learning rate.
        each: goes through the steps.

    Returns:
        The trained adapters, stacked, and the curves.
    """

    def loss(tree: Tree, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(adapter.model(adapter.apply(frozen, tree), images), labels)

    gradients = torch.func.vmap(torch.func.grad_and_value(loss))
    stacked = pf.map_leaves(torch.clone, stacked)
    optimizer = torch.optim.AdamW([leaf for _, leaf in leaves(stacked)], lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_cosine(step, steps))
    order = torch.stack([batches(pf.split(key, "order"), len(examples), steps, size) for key in keys], dim=1)
    maps = torch.stack([distortions(pf.split(key, "distortions"), steps, size) for key in keys], dim=1)
    when = sorted({round(i * steps / 10) for i in range(11)})
    losses, accuracies = [], []

    def measure() -> None:
        if held_out is not None:
            log_probs = member_log_probs(adapter, frozen, stacked, held_out.images)
            accuracies.append(accuracy(log_probs, held_out.labels))

    measure()
    for step in each(range(steps)):
        batch = examples.take(order[step])
        grads, values = gradients(stacked, distort(batch.images, maps[step]), batch.labels)
        _give(stacked, grads)
        optimizer.step()
        schedule.step()
        losses.append(values)
        if step + 1 in when:
            measure()
    measured = torch.stack(accuracies) if accuracies else torch.empty(0, len(keys))
    evaluated = torch.tensor(when if held_out is not None else [], dtype=torch.int64)
    for _, leaf in leaves(stacked):
        leaf.grad = None
    return stacked, Curves(torch.stack(losses), evaluated, measured)


def _give(tree: Tree, grads: Mapping[str, Any]) -> None:
    """Give every leaf its gradient, by path."""
    by_path = dict(leaves(grads))
    for keys, leaf in leaves(tree):
        leaf.grad = by_path[keys]
