"""GIFT: W' = W + g(W phi) psi, which for the identity g is W (I + phi psi).

Savadikar, Song and Wu, "Generative Parameter-Efficient Fine-Tuning", arXiv 2312.00700. The update is generated from
the weight itself, so one small pair (phi, psi) serves every layer of a depth: each sees another update, because W
differs. It acts on the input side: y = (x + (x psi^T) phi^T) W^T, one product with W and no dW.
"""

from collections.abc import Mapping
from math import sqrt
from typing import Any

import torch

from peft_func.errors import OptionError
from peft_func.functional.model import FunctionalModel
from peft_func.transforms.options import check_choice, check_rank
from peft_func.transforms.transform import Changes, Part, Transform, check_name
from peft_func.trees.keys import split, uniform
from peft_func.trees.paths import Tree
from peft_func.trees.select import Where, as_selector
from peft_func.weights.mapping import Weights
from peft_func.weights.matrix import IdentityPlus, LowRank, Product


def gift(
    where: Where,
    *,
    rank: int = 16,
    share: str | Mapping[str, Where] = "target",
    block: str = "simple_block",
    name: str = "gift",
) -> Part:
    """Generate the update of every selected weight from the weight itself.

    Leaves of `trainable[name][group]`: `phi` [in, rank], drawn from U(-1/sqrt(in), 1/sqrt(in)), and `psi` [rank, in],
    zero at init; `in` counts a convolution's kernel. They have the weight's dtype, float32 for a half-precision one.

    Args:
        where: a selector; only parameters of two dimensions or more are looked at.
        rank: the rank, from 1 to that of the matrices.
        share: which places share one pair: `"target"`, those whose modules have the same last name, over depth;
            `"all"`; `"none"`, one pair for each place, under its path; or `{group: selector}`.
        block: the generator g: `"simple_block"`, the identity.
        name: the sub-tree.

    Raises:
        OptionError: at `bind`, a rank above that of a matrix, places of different width in one group, or a place in
            no group or in two.

    Example:
        >>> import torch, peft_func as pf
        >>> net = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(8, 8)) for _ in range(3)])
        >>> frozen, trainable = pf.bind(pf.gift(r".*weight", rank=2), pf.functionalize(net)).init(0)
        >>> {group: list(leaf["phi"].shape) for group, leaf in trainable["gift"].items()}
        {'0': [8, 2]}
    """
    check_choice("gift", "block", block, ("simple_block",))
    if not isinstance(share, Mapping):
        check_choice("gift", "share", share, ("target", "all", "none"))
    options: dict[str, Any] = {"rank": rank, "share": share, "block": block}

    def make(paths: tuple[str, ...], model: FunctionalModel) -> Transform:
        groups = {path: _group(path, share, model) for path in paths}
        for group, where in share.items() if isinstance(share, Mapping) else ():
            if group not in groups.values():
                raise OptionError(f"gift: the group {group!r} of share, {where!r}, has none of {', '.join(paths[:5])}")
        widths: dict[str, tuple[str, int]] = {}
        for path, group in groups.items():
            width = model.layouts[path].matrix_shape[-1]
            first, expected = widths.setdefault(group, (path, width))
            if width != expected:
                raise OptionError(
                    f"gift: {first} has {expected} inputs and {path} has {width}, but both share phi and psi in the "
                    f"group {group!r}; give each its own with share='none', or share={{group: selector}} by width"
                )
            check_rank("gift", path, rank, model.layouts[path].matrix_shape)

        def init(weights: Weights, key: int) -> Tree:
            tree: Tree = {}
            for group, (path, width) in widths.items():
                phi = uniform((width, rank), 1 / sqrt(width), split(key, group), weights.base[path])
                tree[group] = {"phi": phi, "psi": torch.zeros(rank, width, dtype=phi.dtype, device=phi.device)}
            return tree

        def apply(tree: Tree, weights: Weights) -> Changes:
            shared = {group: IdentityPlus(LowRank(leaf["phi"], leaf["psi"])) for group, leaf in tree.items()}
            return {path: Product(weights.matrix(path), shared[group]) for path, group in groups.items()}

        if isinstance(share, str):
            return Transform(init, apply)
        chosen = {group: [path for path in paths if groups[path] == group] for group in widths}
        return Transform(init, apply, options=options | {"share": chosen})

    return Part(where, make, check_name(name), "gift", options)


def _group(path: str, share: str | Mapping[str, Where], model: FunctionalModel) -> str:
    """Return the group of a place: the name of the (phi, psi) that it uses."""
    if share == "all":
        return "all"
    if share == "none":
        return path
    if isinstance(share, str):
        module, _, weight = path.rpartition(".")
        target = module.rpartition(".")[2] or weight
        # A module with several matrices (packed attention, experts) has as many targets.
        return target if weight == "weight" or not module else f"{target}.{weight}"
    info = model.infos[path]
    found = [group for group, where in share.items() if as_selector(where)(path, info)]
    if len(found) != 1:
        raise OptionError(f"gift: {path} must be in one group of share, and is in {found or 'none'} of {list(share)}")
    return found[0]
