"""From an adapter to a plain checkpoint, and the proof that both say the same."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

import peft_func as pf
from peft_func.interop.atomic import renamed_into
from peft_func.weights.operator import Operator


@dataclass(frozen=True)
class Comparison:
    """Two models on the same images.

    Attributes:
        images: how many.
        same_answers: on how many of them the most probable class is the same.
        difference: the largest absolute difference of two logits.
    """

    images: int
    same_answers: int
    difference: float

    @property
    def equal(self) -> bool:
        """Whether all answers are the same; a NaN among the logits is never equal."""
        return self.same_answers == self.images and math.isfinite(self.difference)


def export_merged(path: Path, model: pf.FunctionalModel, weights: Mapping[str, Tensor | Operator]) -> None:
    """Write effective weights as the plain state dict of the module, to one safetensors file.

    Args:
        path: the file; its folder must exist.
        model: the functional model.
        weights: what `adapter.apply` returned.

    Raises:
        OSError: the file cannot be written.
    """
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict(weights).items()}
    with renamed_into(path) as temporary:
        temporary.write_bytes(save(state))  # save_file would make it readable by its owner only


def compare_merged(
    path: Path, fresh: nn.Module, model: pf.FunctionalModel, weights: Mapping[str, Tensor | Operator], images: Tensor
) -> Comparison:
    """Load an exported file into a module, strictly, and compare it with the adapted model.

    Args:
        path: what `export_merged` wrote.
        fresh: a module of the class that the model was made of; its weights are overwritten.
        model: the functional model.
        weights: those that were exported.
        images: `[n, height, width]`, what both are asked about.

    Raises:
        RuntimeError: the names or shapes in the file are not those of the module.
    """
    fresh.load_state_dict(load_file(path), strict=True)
    with torch.no_grad():
        plain, adapted = fresh.eval()(images), model.eval()(weights, images)
    same = (plain.argmax(-1) == adapted.argmax(-1)).sum().item()
    return Comparison(len(images), int(same), (plain - adapted).abs().max().item())
