"""The values that every adapter starts from: drawn once, on the CPU, for all libraries and devices alike."""

from collections.abc import Iterable, Mapping
from math import sqrt

import torch
from torch import Tensor

from benchmarks.models import Case, group


def low_rank(case: Case, rank: int) -> dict[str, Tensor]:
    """Draw A and B for every place: those of an adapter that has trained a little, so B is not zero."""
    draw = torch.Generator("cpu").manual_seed(1)
    values = {}
    for path, module in case.places.items():
        rows, columns = module.weight.shape
        values[f"{path}.A"] = _uniform(rank, columns, draw) / sqrt(columns)
        values[f"{path}.B"] = _normal(rows, rank, draw)
    return _like(case, values)


def dora(case: Case, rank: int) -> dict[str, Tensor]:
    """Draw A and B, and magnitudes near the norms of the rows."""
    draw = torch.Generator("cpu").manual_seed(2)
    values = low_rank(case, rank)
    for path, module in case.places.items():
        norms = torch.linalg.vector_norm(module.weight, dim=1)
        values[f"{path}.magnitude"] = norms * (1 + 5 * _normal(len(norms), 1, draw)[:, 0].to(norms))
    return values


def gift(case: Case, rank: int) -> dict[str, Tensor]:
    """Draw phi and psi for every group of places."""
    draw = torch.Generator("cpu").manual_seed(3)
    values = {}
    for name, columns in {group(path): module.in_features for path, module in case.places.items()}.items():
        values[f"{name}.phi"] = _uniform(columns, rank, draw) / sqrt(columns)
        values[f"{name}.psi"] = _normal(rank, columns, draw)
    return _like(case, values)


def leaves(values: Mapping[str, Tensor], names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Return tensors of their own with these values, which take gradients."""
    return {name: torch.nn.Parameter(values[name].clone()) for name in names or values}


def _uniform(rows: int, columns: int, draw: torch.Generator) -> Tensor:
    return torch.empty(rows, columns, device="cpu").uniform_(-1, 1, generator=draw)


def _normal(rows: int, columns: int, draw: torch.Generator) -> Tensor:
    return 0.02 * torch.randn(rows, columns, generator=draw, device="cpu")


def _like(case: Case, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put values where the model's weights are, in their dtype: all libraries then compute in it."""
    weight = next(iter(case.places.values())).weight
    return {name: value.to(weight) for name, value in values.items()}
