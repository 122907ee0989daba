"""What an add-in knows of the module that it is put around."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peft_func.functional.model import FunctionalModel


@dataclass(frozen=True)
class Place:
    """A module in a model, where an add-in is.

    Attributes:
        path: its path.
        module: the module in the model's private copy: for its attributes and shapes; its tensors are on meta.
        like: a tensor whose dtype and device the module computes in.
    """

    path: str
    module: nn.Module
    like: Tensor


def place_at(model: FunctionalModel, path: str) -> Place:
    """Return what is known of the module at a path."""
    prefix = f"{path}." if path else ""
    names = [name for name in model.params if name.startswith(prefix)] or list(model.params)
    floating = [model.params[name] for name in names if model.params[name].is_floating_point()]
    like = floating[0] if floating else torch.empty(0)
    return Place(path, model._skeleton.root.get_submodule(path), like)
