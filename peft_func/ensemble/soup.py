"""Soups: averages of whole trees of weights, uniform, chosen greedily, or weighted by Fisher information.

    uniform, weighted   sum_k w_k theta_k / sum_k w_k
    Fisher              sum_k w_k F_k theta_k / sum_k w_k F_k, element by element

Model soups, greedy soups: Wortsman et al., arXiv 2203.05482. Fisher-weighted averaging: Matena and Raffel, arXiv
2111.09832.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from peft_func.ensemble.values import readable, wide
from peft_func.errors import OptionError, TreeError
from peft_func.trees.paths import Keys, Tree, from_leaves, join, leaves
from peft_func.trees.select import Info, Where, resolve

Leaves = dict[Keys, Tensor]


def soup(trees: Sequence[Mapping[str, Any]], weights: Sequence[float] | None = None, *, where: Where = ".*") -> Tree:
    r"""Average trees of the same structure: whole models, or adapters.

    Adapters are averaged leaf by leaf: for a low-rank pair that is not the average of the products `B A`; for that, see
    `pf.merge_adapters`.

    Args:
        trees: one or more; the selected leaves are alike in paths, shapes, dtypes and devices.
        weights: a number for each tree; their sum, by which they are divided, is positive. None: all the same.
        where: a selector over paths (keys joined with dots); leaves not selected are those of the first tree, whatever
            the others hold there.

    Returns:
        A tree of new tensors where something was averaged, computed in float32 at least and rounded once.

    Raises:
        TreeError: there is no tree, they are not alike, or a selected leaf is of no floating-point dtype.
        OptionError: the weights do not fit.
        SelectorError: nothing is selected.

    Example:
        >>> import torch, peft_func as pf
        >>> pf.soup([{"a": torch.zeros(2)}, {"a": torch.ones(2)}], [1, 3])
        {'a': tensor([0.7500, 0.7500])}
    """
    columns, shares = _prepare("soup", trees, weights, where)

    def importance(keys: Keys) -> list[Tensor]:
        like = wide(columns[0][keys])
        return [like.new_full((), share) for share in shares]

    return _averaged(trees[0], columns, importance)


def greedy_soup(
    trees: Sequence[Mapping[str, Any]], score: Callable[[Tree], float | Tensor], *, where: Where = ".*"
) -> tuple[Tree, list[int]]:
    """Average the trees that help: best first, each joins the soup if the soup's score does not fall.

    Args:
        trees: one or more; the selected leaves are alike in paths, shapes, dtypes and devices.
        score: what a tree is worth on held-out data; higher is better. It is called `2 * len(trees) - 1` times.
        where: as in `pf.soup`.

    Returns:
        The soup, and the numbers of the trees in it, in the order in which they joined.

    Raises:
        TreeError: see `pf.soup`.
        OptionError: a score is no number.
        SelectorError: nothing is selected.

    Example:
        >>> import torch, peft_func as pf
        >>> trees = [{"a": torch.tensor(value)} for value in (1.0, -2.0, 9.0)]
        >>> pf.greedy_soup(trees, lambda tree: -abs(tree["a"]))
        ({'a': tensor(-0.5000)}, [0, 1])
    """
    _prepare("greedy_soup", trees, None, where)
    alone = [_number(score({**tree})) for tree in trees]
    best, *others = sorted(range(len(trees)), key=lambda i: -alone[i])
    mixed, members, level = soup([trees[best]], where=where), [best], alone[best]
    for i in others:
        candidate = soup([trees[j] for j in (*members, i)], where=where)
        found = _number(score(candidate))
        if found >= level:
            mixed, members, level = candidate, [*members, i], found
    return mixed, members


def fisher_soup(
    trees: Sequence[Mapping[str, Any]],
    fishers: Sequence[Mapping[str, Any]],
    weights: Sequence[float] | None = None,
    *,
    where: Where = ".*",
    eps: float = 1e-6,
) -> Tree:
    r"""Average trees, every element weighted by its Fisher information: the mode of the product of their posteriors.

    Args:
        trees: one or more; the selected leaves are alike in paths, shapes, dtypes and devices.
        fishers: a diagonal for each tree, from `pf.fisher`: the same paths and shapes.
        weights: a number for each tree; as in `pf.soup`.
        where: a selector over paths; leaves not selected are those of the first tree.
        eps: the least Fisher information; where no tree has more, the average is the plain one.

    Returns:
        A tree of new tensors where something was averaged, computed in float32 at least and rounded once.

    Raises:
        TreeError: trees or diagonals are not alike, or an element of a diagonal is below 0.
        OptionError: weights or `eps` do not fit.
        SelectorError: nothing is selected.

    Example:
        >>> import torch, peft_func as pf
        >>> trees = [{"a": torch.tensor([0.0, 0.0])}, {"a": torch.tensor([1.0, 1.0])}]
        >>> pf.fisher_soup(trees, [{"a": torch.tensor([1.0, 0.0])}, {"a": torch.tensor([3.0, 0.0])}])
        {'a': tensor([0.7500, 0.5000])}
    """
    columns, shares = _prepare("fisher_soup", trees, weights, where)
    if not 0 < _number(eps, "eps") < math.inf:
        raise OptionError(f"eps={eps!r} is no positive number")
    if isinstance(fishers, Mapping) or len(fishers) != len(trees):
        raise OptionError(f"fisher_soup takes one diagonal for each of the {len(trees)} trees, from pf.fisher")
    diagonals = [dict(leaves(tree)) for tree in fishers]
    for number, diagonal in enumerate(diagonals):
        for keys, like in columns[0].items():
            found = diagonal.get(keys)
            if found is None or found.shape != like.shape or found.device != like.device:
                raise TreeError(
                    f"the leaf {join(keys)!r} of diagonal {number} is {'absent' if found is None else _kind(found)}; "
                    f"the trees have {_kind(like)}"
                )
            if readable() and not bool((found >= 0).all()):
                raise TreeError(f"the leaf {join(keys)!r} of diagonal {number} has an element below 0, or a NaN")

    def importance(keys: Keys) -> list[Tensor]:
        like = wide(columns[0][keys])
        return [share * each[keys].to(like.dtype).clamp_min(eps) for share, each in zip(shares, diagonals, strict=True)]

    return _averaged(trees[0], columns, importance)


def _averaged(first: Mapping[str, Any], columns: Sequence[Leaves], importance: Callable[[Keys], list[Tensor]]) -> Tree:
    def mixed(keys: Keys, leaf: Tensor) -> Tensor:
        if keys not in columns[0]:
            return leaf
        parts = importance(keys)
        terms = [part * wide(column[keys]) for part, column in zip(parts, columns, strict=True)]
        return (functools.reduce(torch.add, terms) / functools.reduce(torch.add, parts)).to(leaf.dtype)

    return from_leaves((keys, mixed(keys, leaf)) for keys, leaf in leaves(first))


def _prepare(
    who: str, trees: Sequence[Mapping[str, Any]], weights: Sequence[float] | None, where: Where
) -> tuple[list[Leaves], list[float]]:
    """Return the leaves to average of each tree, and the trees' shares."""
    if isinstance(trees, Mapping) or not trees:
        raise TreeError(f"{who} takes a list of at least one tree")
    columns = []
    for tree in trees:
        column = dict(leaves(tree))
        infos = [Info(join(keys), tuple(leaf.shape), leaf.dtype) for keys, leaf in column.items()]
        names = set(resolve(where, infos, who))
        columns.append({keys: leaf for keys, leaf in column.items() if join(keys) in names})
    for number, column in enumerate(columns):
        for keys in sorted(columns[0].keys() ^ column.keys()):
            raise TreeError(f"the leaf {join(keys)!r} is not in both tree 0 and tree {number}; they must be alike")
        for keys, leaf in column.items():
            if _kind(leaf) != _kind(columns[0][keys]):
                raise TreeError(
                    f"the leaf {join(keys)!r} is {_kind(leaf)} in tree {number}, but {_kind(columns[0][keys])} in "
                    "tree 0; they must be alike"
                )
            if not leaf.is_floating_point():
                raise TreeError(
                    f"the leaf {join(keys)!r} is {leaf.dtype}, which has no average; leave it out: "
                    f"where=~pf.exact([{join(keys)!r}])"
                )
    numbers = [1.0] * len(trees) if weights is None else [_number(weight, "a weight") for weight in weights]
    if len(numbers) != len(trees) or not 0 < sum(numbers) < math.inf:
        raise OptionError(
            f"{who}: weights={weights!r}; they are one number for each of the {len(trees)} trees, of positive sum"
        )
    return columns, [number / sum(numbers) for number in numbers]


def _number(value: object, name: str = "a score") -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, Real) and not math.isnan(value):
        return float(value)
    raise OptionError(f"{name} is a number; it is {value!r}")


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
