"""What trains as a mask: an input of a compiled step, of one shape whatever is frozen."""

import warnings
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from peft_func.errors import OptionError, TreeError
from peft_func.training.repartition import chosen_paths
from peft_func.training.states import Zip
from peft_func.trees.paths import Keys, Tree, from_leaves, join, leaves, map_leaves
from peft_func.trees.select import Where

T = TypeVar("T")


class ZeroGradientWarning(UserWarning):
    """A zero gradient does not freeze a weight that decays, or that moments still move."""


def mask(tree: Mapping[str, Any], where: Where | None) -> Tree:
    r"""Return a tree of the same paths that says of every leaf whether it trains.

    Args:
        tree: the tree that is trained, with what is frozen for now.
        where: a selector over its paths, or None for nothing; see `pf.schedule`.

    Returns:
        Tensors of dtype bool without dimensions, each on its leaf's device. As they are inputs of a compiled step, a
        change of what trains compiles nothing anew.

    Raises:
        SelectorError: nothing is selected; say None if that is meant.

    Example:
        >>> import torch, peft_func as pf
        >>> pf.mask({"body": torch.ones(2), "head": torch.ones(3)}, "head")
        {'body': tensor(False), 'head': tensor(True)}
    """
    paths = set(chosen_paths(tree, where, "mask"))
    return from_leaves((keys, torch.tensor(join(keys) in paths, device=leaf.device)) for keys, leaf in leaves(tree))


def hold(mask: Mapping[str, Any], new: T, old: T) -> T:
    """Take the new value of what trains, and the old one of what does not, bit by bit.

    It freezes exactly, weights and moments alike, under every optimizer: let it step all leaves, then hold.

    Args:
        mask: a tree as `pf.mask` returns it.
        new: a tree with its paths, or the state of a functional optimizer for such a tree.
        old: the same before the step.

    Returns:
        New tensors. Of a state, what is shared by all leaves is the new one's.

    Raises:
        TreeError: the two are of different structure, or not for the paths of the mask, or the mask is none. A state to
            which the first step adds (SGD's momentum with a dampening) can be held after that step only.

    Example:
        >>> import torch, peft_func as pf
        >>> old = {"body": torch.zeros(2), "head": torch.zeros(2)}
        >>> new = pf.map_leaves(lambda leaf: leaf + 1, old)
        >>> pf.hold(pf.mask(old, "head"), new, old)
        {'body': tensor([0., 0.]), 'head': tensor([1., 1.])}
    """
    trains = _checked(mask)
    rest: list[Tensor] = []

    def by_leaf(keys: Keys, new: Tensor | None, old: Tensor | None) -> Tensor:
        if new is None or old is None:
            raise TreeError(f"the leaf {join(keys)!r} is there only {'before' if new is None else 'after'} the step")
        if new.dtype != old.dtype:
            raise TreeError(f"the leaf {join(keys)!r} is {old.dtype} before the step and {new.dtype} after it")
        return torch.where(trains[keys].to(new.device), new, old)

    def shared(new: Any, old: Any) -> Any:
        if isinstance(new, Tensor):
            rest.append(new)
        return new

    both = Zip(by_leaf, shared, trains, trains)
    result = both(new, old, "what is held")
    if rest and not both.found:
        raise TreeError(
            f"nothing of what is held has the paths of the mask ({', '.join(map(join, list(trains)[:3]))}, ...); make "
            "the mask of the tree that the optimizer steps"
        )
    return cast("T", result)


def mask_gradients(
    grads: Mapping[str, Any], mask: Mapping[str, Any], optimizer: torch.optim.Optimizer | None = None
) -> Tree:
    """Return gradients that are zero where the mask says that nothing trains.

    That is enough for plain SGD only: weight decay moves a weight whose gradient is zero, and so do momentum and
    moments from before. `pf.hold` freezes under any optimizer.

    Args:
        grads: a tree with the paths of the mask.
        mask: as `pf.mask` returns it.
        optimizer: what will step them; it is only asked whether zero gradients are enough.

    Raises:
        TreeError: the paths differ, or a leaf of the mask is no bool.

    Warns:
        ZeroGradientWarning: the optimizer moves weights whose gradient is zero, and something is masked.

    Example:
        >>> import torch, peft_func as pf
        >>> grads = {"body": torch.ones(2), "head": torch.ones(2)}
        >>> pf.mask_gradients(grads, pf.mask(grads, "head"))
        {'body': tensor([0., 0.]), 'head': tensor([1., 1.])}
    """
    trains = _checked(mask)
    if optimizer is not None and not all(bool(flag) for flag in trains.values()):
        reasons = _movers(optimizer)
        if reasons:
            warnings.warn(
                f"{type(optimizer).__name__} moves weights whose gradient is zero ({', '.join(reasons)}): they are not "
                "frozen. After its step use pf.hold(mask, new, old), or step what trains only: pf.repartition",
                ZeroGradientWarning,
                stacklevel=2,
            )
    return map_leaves(lambda grad, flag: torch.where(flag.to(grad.device), grad, 0), grads, mask)


def _movers(optimizer: torch.optim.Optimizer) -> list[str]:
    """Return the options by which an optimizer moves a weight without a gradient."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise OptionError(
            f"optimizer is one of torch.optim, not a {type(optimizer).__name__}; use pf.hold after its step"
        )
    found: dict[str, None] = {}
    for group in optimizer.param_groups:
        for name in ("weight_decay", "lambd", "momentum"):
            if group.get(name):
                found[f"{name}={group[name]}"] = None
        if "betas" in group and group["betas"][0]:
            found[f"betas={tuple(group['betas'])}"] = None
    return list(found)


def _checked(mask: Mapping[str, Any]) -> dict[Keys, Tensor]:
    trains = dict(leaves(mask))
    for keys, flag in trains.items():
        if flag.dtype != torch.bool or flag.dim():
            raise TreeError(
                f"the mask at {join(keys)!r} is {flag.dtype} {tuple(flag.shape)}; its leaves are single bools: pf.mask"
            )
    return trains
