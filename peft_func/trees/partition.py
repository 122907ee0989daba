"""A partition is data, not a flag: what trains is which tree a leaf is in."""

from collections.abc import Mapping
from typing import Any

from peft_func.trees.paths import Tree, from_leaves, insert, join, leaves
from peft_func.trees.select import Info, Where, as_selector


def partition(tree: Mapping[str, Any], where: Where) -> tuple[Tree, Tree]:
    r"""Split a tree into `(selected, rest)`; each holds the very tensors of the input, and absent keys, not holes.

    Args:
        tree: a flat dict by dotted name, or a nested dict; its leaves are tensors of any shape and dtype.
        where: a selector over paths; the keys of a nested tree are joined with dots. Both halves may be empty.

    Raises:
        TreeError: a leaf is not a tensor.
        SelectorError: the selector is malformed.

    Example:
        >>> import torch, peft_func as pf
        >>> tree = {"lora": {"q.weight": {"A": torch.ones(2, 4), "B": torch.zeros(4, 2)}}}
        >>> frozen, trained = pf.partition(tree, r".*\.A")       # LoRA-FA: A stays as drawn
        >>> list(trained["lora"]["q.weight"])
        ['B']
    """
    selector = as_selector(where)
    halves: tuple[Tree, Tree] = ({}, {})
    for keys, tensor in leaves(tree):
        name = join(keys)
        chosen = selector(name, Info(name, tuple(tensor.shape), tensor.dtype))
        insert(halves[0 if chosen else 1], keys, tensor)
    return halves


def combine(*trees: Mapping[str, Any]) -> Tree:
    r"""Join trees that share no leaf: `combine(*partition(tree, where))` is the tree again.

    Raises:
        TreeError: two trees hold the same leaf, or one holds a leaf where the other holds a tree.

    Example:
        >>> import torch, peft_func as pf
        >>> params = {"body.weight": torch.ones(2), "head.weight": torch.zeros(2)}
        >>> head, body = pf.partition(params, r"head\..*")
        >>> pf.combine(head, body).keys() == params.keys()
        True
    """
    return from_leaves(item for tree in trees for item in leaves(tree))
