"""The groups of an optimizer while what trains changes, and the schedulers that go by their number.

A group, once there, keeps its index: what freezes leaves its group, which may become empty. Schedulers hold a value for
each group, and go by the index. Which parameter is which is a matter of identity, never of equal values.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from peft_func.errors import FileFormatError

# Rates that schedulers keep for each group: in the group, and in lists of their own.
_GROUP_RATES = ("initial_lr", "max_lr", "min_lr")
_LISTED_RATES = ("base_lrs", "max_lrs", "min_lrs")
_LISTED = ("lr_lambdas", "base_momentums", "max_momentums", "_last_lr")  # what else they have for each group

Named = Mapping[str, nn.Parameter]


def held(optimizers: Iterable[Optimizer]) -> set[int]:
    """Return the identities of all parameters that the optimizers step."""
    return {
        id(parameter) for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]
    }


def names_by_group(optimizer: Optimizer, parameters: Named) -> list[list[str]]:
    """Return the names of the parameters of each group."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    return [[names[id(p)] for p in group["params"] if id(p) in names] for group in optimizer.param_groups]


def leave(optimizer: Optimizer, gone: Iterable[nn.Parameter]) -> None:
    """Take parameters out of their groups, with their state and their gradients."""
    out = {id(parameter) for parameter in gone}
    for group in optimizer.param_groups:
        stay = [position for position, parameter in enumerate(group["params"]) if id(parameter) not in out]
        for parameter in group["params"]:
            if id(parameter) in out:
                optimizer.state.pop(parameter, None)
                parameter.grad = None
        for key in {"params", "param_names"} & group.keys():
            group[key][:] = [group[key][position] for position in stay]


def join(optimizer: Optimizer, schedulers: Iterable[Any], parameters: Named, index: int | None = None) -> int:
    """Put parameters into a group of their own, with the optimizer's defaults, and return its index.

    Args:
        optimizer: what is to step them.
        schedulers: its schedulers, which get a value for the new group.
        parameters: what joins, by name; none of it is in the optimizer.
        index: an empty group to fill again; None adds one.
    """
    groups = optimizer.param_groups
    named = "param_names" in groups[0]
    if index is None:
        index = len(groups)
        optimizer.add_param_group({"params": list(parameters.items() if named else parameters.values())})
        _follow(schedulers, optimizer)
    else:
        groups[index].update(optimizer.defaults, params=list(parameters.values()))
        if named:
            groups[index]["param_names"] = list(parameters)
    for key in groups[0].keys() - groups[index].keys():  # what schedulers keep there
        groups[index][key] = groups[0][key]
    return index


def set_rate(optimizer: Optimizer, schedulers: Iterable[Any], index: int, rate: float, ratio: float | None) -> None:
    """Give a group its rate; what schedulers derive rates from becomes `ratio` times that of the first group."""
    first, group = optimizer.param_groups[0], optimizer.param_groups[index]
    group["lr"] = rate
    if ratio is None:
        return
    for key in first.keys() & _GROUP_RATES:
        group[key] = first[key] * ratio
    for scheduler in _every(schedulers):
        if getattr(scheduler, "optimizer", None) is optimizer:
            for name in vars(scheduler).keys() & _LISTED_RATES:
                values = getattr(scheduler, name)
                values[index] = values[0] * ratio


def regroup(
    optimizer: Optimizer, schedulers: Iterable[Any], groups: Sequence[Sequence[str]], parameters: Named
) -> None:
    """Make the groups hold these parameters; a state of that form may then be loaded into the optimizer.

    Raises:
        FileFormatError: a name is not known, or the optimizer has more groups.
    """
    missing = [name for names in groups for name in names if name not in parameters]
    if missing:
        raise FileFormatError(
            f"the checkpoint trains {missing[0]!r}{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}, which "
            f"this module does not have; it has {', '.join(list(parameters)[:3])}, ...: build it as it was saved"
        )
    present = optimizer.param_groups
    if len(present) > len(groups):
        raise FileFormatError(
            f"configure_optimizers made {len(present)} groups, and the checkpoint has {len(groups)}: resume with the "
            "optimizer that it was saved with"
        )
    for names, group in zip(groups, present, strict=False):
        group["params"] = [parameters[name] for name in names]
        if "param_names" in group:
            group["param_names"] = list(names)
    for names in groups[len(present) :]:
        join(optimizer, schedulers, {name: parameters[name] for name in names})


def _every(schedulers: Iterable[Any]) -> Iterable[Any]:
    """Yield the schedulers, and those that they are made of."""
    for scheduler in schedulers:
        yield scheduler
        yield from _every(getattr(scheduler, "_schedulers", ()))


def _follow(schedulers: Iterable[Any], optimizer: Optimizer) -> None:
    """Extend the lists of the schedulers that have one value for each group."""
    for scheduler in _every(schedulers):
        if getattr(scheduler, "optimizer", None) is optimizer:
            for name in vars(scheduler).keys() & {*_LISTED_RATES, *_LISTED}:
                values = getattr(scheduler, name)
                if isinstance(values, list):
                    values.append(values[0])
