"""What an optimizer must be given: options that it has, and a gradient and a state of the very tree."""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peft_func.errors import LeakError, OptionError, TreeError
from peft_func.trees.paths import Keys, join, leaves

Spec = dict[str, dict[Keys, tuple[int, ...]]]
"""The shape of every tensor of a state, by its name and its leaf."""


def tried(cls: type[torch.optim.Optimizer], params: Any, options: Mapping[str, Any]) -> torch.optim.Optimizer:
    """Make an optimizer; what the class says against it becomes an OptionError."""
    try:
        return cls(params, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(f"{cls.__name__} refuses this: {error}") from error


def probe(cls: type[torch.optim.Optimizer], options: Mapping[str, Any]) -> torch.optim.Optimizer:
    """Make an optimizer of one small matrix, to see its defaults and whether it takes the options."""
    return tried(cls, [torch.zeros(1, 1)], options)


def check_options(cls: Any, defaults: Mapping[str, Any], options: Mapping[str, Any], paths: list[str]) -> None:
    """Check the options of a group as the class checks its own: torch takes any in a group, even misspelt ones."""
    for name in options.keys() - defaults.keys():
        near = difflib.get_close_matches(name, defaults, 3, cutoff=0.5)
        raise OptionError(
            f"{cls.__name__} has no option {name!r}, which the group of {paths[0]!r} has; "
            f"it has {', '.join(near or defaults)}"
        )
    known = inspect.signature(cls).parameters
    probe(cls, {name: value for name, value in options.items() if name in known})


def check_gradient(keys: Keys, leaf: Tensor, gradient: Tensor | None) -> None:
    """Check that a leaf has a gradient that fits it, without a graph."""
    path = join(keys)
    if gradient is None:
        raise TreeError(f"there is no gradient for the leaf {path!r}; to leave it as it is, take it out: pf.partition")
    if (gradient.shape, gradient.dtype, gradient.device) != (leaf.shape, leaf.dtype, leaf.device):
        raise TreeError(
            f"the gradient of {path!r} is {tuple(gradient.shape)} {gradient.dtype} on {gradient.device}, the leaf "
            f"{tuple(leaf.shape)} {leaf.dtype} on {leaf.device}"
        )
    if gradient.requires_grad:
        raise LeakError(
            f"the gradient of {path!r} has a graph, which the update would drop: detach it, or use torchopt's "
            "optimizers, which are differentiable"
        )


def check_state(name: str, spec: Spec, state: Mapping[str, Any], tree: Mapping[Keys, Tensor], *, lazy: bool) -> None:
    """Check that a state is what `init` gives for the tree: from another one, torch would silently start again."""
    advice = "start from optimizer.init(tree), and give each step the state of the one before"
    if not isinstance(state, Mapping):
        raise TreeError(f"the state of {name} is a {type(state).__name__}; {advice}")
    for part, subtree in state.items():
        wanted = spec.get(part)
        if wanted is None and not lazy:
            raise TreeError(f"{name} has no {part!r} in its state, only {', '.join(spec) or 'nothing'}; {advice}")
        found = {keys: tuple(tensor.shape) for keys, tensor in leaves(subtree)}
        for keys in found.keys() - tree.keys():
            raise TreeError(f"the state has {part!r} for {join(keys)!r}, which the tree does not have; {advice}")
        for keys, shape in (wanted or {}).items():
            if found.get(keys) != shape:
                raise TreeError(f"{part!r} of {join(keys)!r} is {found.get(keys)}, {name}'s is {shape}; {advice}")
    for part in spec.keys() - state.keys():
        raise TreeError(f"the state lacks {part!r}; {advice}")
