"""Weight matching: the permutation of one network's units that brings its weights nearest to another's.

    maximise over permutations P   sum over weights of <W_to, P(W)>      (the same as: minimise |W_to - P(W)|^2)

by coordinate descent: with all permutations but one held, the best one is a linear assignment, which SciPy solves.
Ainsworth et al., "Git Re-Basin: Merging Models modulo Permutation Symmetries", arXiv 2209.04836, algorithm 1.
"""

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peft_func.ensemble.permutation import Place, Specification, check_spec, permute, reorder
from peft_func.errors import MissingExtraError, TreeError
from peft_func.trees.keys import Key, as_key, split


def align(
    params: Mapping[str, Tensor], to: Mapping[str, Tensor], spec: Specification, key: Key = 0
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Permute a network's units so that its weights are near another's; what it computes stays the same.

    Args:
        params: `{name: tensor}`, such as `model.params` after training.
        to: the other network's; the same names and shapes.
        spec: the places of each permutation; see `pf.permutation_spec`.
        key: decides the order in which permutations are improved; the result is a local optimum that depends on it.

    Returns:
        The permuted weights, and the permutations: `{name: int64 [units]}`, for `pf.permute` of the buffers.

    Raises:
        TreeError: the trees differ in names or shapes, the specification does not fit them, or a weight is not finite.
        MissingExtraError: SciPy is not installed.

    Example:
        >>> import torch, peft_func as pf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> model, (spec, _) = pf.functionalize(net), pf.permutation_spec(net)
        >>> shuffled = pf.permute(model.params, spec, {"0": torch.randperm(8)})
        >>> again, permutations = pf.align(shuffled, model.params, spec)
        >>> all(torch.equal(again[name], model.params[name]) for name in again)
        True
    """
    units = check_spec(params, spec)
    _check_alike(params, to)
    places = {name: list(found) for name, found in spec.items()}
    touched = {place[0]: params[place[0]].detach().double() for found in places.values() for place in found}
    targets = {name: to[name].detach().double() for name in touched}
    for name in touched:
        if not (touched[name].isfinite().all() and targets[name].isfinite().all()):
            raise TreeError(f"the weight {name!r} has an infinity or a NaN; nothing is near it")
    orders = {name: torch.arange(count) for name, count in units.items()}
    number, changed = as_key(key), True
    sweep = 0
    while changed:
        changed = False
        generator = torch.Generator("cpu").manual_seed(split(number, f"sweep {sweep}"))
        for i in torch.randperm(len(places), generator=generator).tolist():
            name = list(places)[i]
            step = _assign(sum((_gain(touched, targets, place) for place in places[name]), torch.zeros(())))
            if _improves(touched, targets, places[name], step):
                for place in places[name]:
                    touched[place[0]] = reorder(touched[place[0]], place, step)
                orders[name] = orders[name][step]
                changed = True
        sweep += 1
    return permute(params, places, orders), orders


def _gain(own: Mapping[str, Tensor], other: Mapping[str, Tensor], place: Place) -> Tensor:
    """Return `[i, j]`: the inner product of the other's unit `i` and our unit `j` at one place."""
    name, axis, *block = place
    size = block[0] if block else 1

    def rows(tensor: Tensor) -> Tensor:
        return tensor.movedim(axis, 0).reshape(tensor.shape[axis] // size, -1)

    return rows(other[name]) @ rows(own[name]).mT


def _improves(own: Mapping[str, Tensor], other: Mapping[str, Tensor], places: list[Place], step: Tensor) -> bool:
    """Say whether a step brings the weights nearer, by more than rounding: what keeps the descent finite.

    A permutation may be at two axes of one weight, where the assignment is only a linear model of the gain.
    """
    moved = dict(own)
    for place in places:
        moved[place[0]] = reorder(moved[place[0]], place, step)
    names = {place[0] for place in places}
    before = sum(float((other[name] * own[name]).sum()) for name in names)
    after = sum(float((other[name] * moved[name]).sum()) for name in names)
    scale = sum(float(other[name].norm() * own[name].norm()) for name in names)
    return after > before + 1e-12 * scale


def _assign(gain: Tensor) -> Tensor:
    try:
        optimize: Any = importlib.import_module("scipy.optimize")
    except ImportError as error:
        raise MissingExtraError(
            f"align needs SciPy, which cannot be imported ({error}); install it with: pip install 'peft_func[fusion]'"
        ) from error
    _, columns = optimize.linear_sum_assignment(gain.cpu().numpy(), maximize=True)
    return torch.from_numpy(columns)


def _check_alike(params: Mapping[str, Tensor], to: Mapping[str, Tensor]) -> None:
    for name in sorted(params.keys() ^ to.keys()):
        raise TreeError(f"the weight {name!r} is in one of the two networks only; align takes two of one structure")
    for name, tensor in params.items():
        if tensor.shape != to[name].shape or tensor.device != to[name].device:
            raise TreeError(
                f"the weight {name!r} is {tuple(tensor.shape)} on {tensor.device}, the other "
                f"{tuple(to[name].shape)} on {to[name].device}; align takes two networks of one structure"
            )
