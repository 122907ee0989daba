"""REPAIR: give an averaged network the activation statistics that its endpoints have.

The mean of two networks, even when aligned, has activations of too small a variance, layer after layer. For every
unit of a layer, with mean m and standard deviation s over data,

    W' = W s_goal / s,   b' = (b - m) s_goal / s + m_goal,   m_goal = sum_k w_k m_k,   s_goal = sum_k w_k s_k

In networks with BatchNorm, whose own statistics do this, they are measured anew instead.
Jordan et al., "REPAIR: REnormalizing Permuted Activations for Interpolation Repair", arXiv 2211.08403.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_func.errors import OptionError, TreeError
from peft_func.functional.model import FunctionalModel

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Moments:
    """What is known of the outputs of one layer.

    Attributes:
        count: how many values each unit gave.
        total: `[units]`, their sum.
        squares: `[units]`, the sum of their squares.
    """

    count: int
    total: Tensor
    squares: Tensor

    @property
    def mean(self) -> Tensor:
        """The mean of each unit, `[units]`."""
        return self.total / self.count

    @property
    def std(self) -> Tensor:
        """The standard deviation of each unit, `[units]`."""
        return (self.squares / self.count - self.mean.square()).clamp_min(0.0).sqrt()


def repair(
    model: FunctionalModel,
    params: Mapping[str, Tensor],
    endpoints: Sequence[Mapping[str, Tensor]],
    batches: Iterable[Any],
    *,
    weights: Sequence[float] | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Rescale the units of an averaged network, so that their statistics are the average of its endpoints'.

    Layers are corrected in the order in which they run, each with those before it already corrected: one pass over the
    batches for every layer. The last layer stays as it is. A layer without a bias gets the scale only.

    Args:
        model: the network; it is run in eval mode. It has no BatchNorm: for those, `pf.reset_statistics`.
        params: the averaged weights, `pf.soup([first, second])`.
        endpoints: the weights that were averaged, as they were aligned.
        batches: inputs, no labels: tensors, or tuples of arguments. A few hundred samples are enough.
        weights: a number for each endpoint; their sum is 1. None: all the same.
        state: the buffers; those of the model by default.

    Returns:
        New parameters: those of corrected layers are new tensors, rounded once to their dtype, the others the same
        objects.

    Raises:
        OptionError: there is BatchNorm in the model, or weights do not fit the endpoints.
        TreeError: there are no batches or endpoints, or fewer than two layers to correct.

    Example:
        >>> import torch, peft_func as pf
        >>> model = pf.functionalize(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1)))
        >>> ends = [model.params, {name: -value for name, value in model.params.items()}]
        >>> mean = pf.soup(ends)  # all zero
        >>> sorted(pf.repair(model, mean, ends, [torch.randn(8, 2)])) == sorted(mean)
        True
    """
    model = model.eval()
    if any(isinstance(module, BATCH_NORMS) for module in model._skeleton.root.modules()):
        raise OptionError(
            "repair is for networks without BatchNorm; with it, pf.reset_statistics(model, params, batches) measures "
            "its statistics anew, which corrects the activations"
        )
    for name, value in params.items():
        if not isinstance(value, Tensor):
            raise TreeError(f"{name!r} is a {type(value).__name__}; plain tensors come from pf.merge(weights)")
    data = _as_arguments(batches)
    if isinstance(endpoints, Mapping) or not endpoints:
        raise TreeError("repair takes a list of endpoints, the weights that were averaged")
    shares = [1 / len(endpoints)] * len(endpoints) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(endpoints) or abs(sum(shares) - 1) > 1e-6:
        raise OptionError(f"weights={weights!r}; they are one number for each of {len(endpoints)} endpoints, of sum 1")
    buffers = model.state if state is None else state
    ends = [_moments(model, end, buffers, data) for end in endpoints]
    layers = list(ends[0])[:-1]
    if not layers:
        raise TreeError("repair corrects all linear layers and convolutions but the last; this network has no other")
    result = dict(params)
    for layer in layers:
        now = _moments(model, result, buffers, data)[layer]
        mean = sum((share * end[layer].mean for share, end in zip(shares, ends, strict=True)), torch.zeros(()))
        std = sum((share * end[layer].std for share, end in zip(shares, ends, strict=True)), torch.zeros(()))
        # A unit that gives the same for all inputs has no statistics to correct but its mean.
        scale = torch.where(now.std > 1e-6 * std, std / now.std, torch.ones_like(std))
        weight = result[f"{layer}.weight"]
        wide = weight.double() * scale.reshape(-1, *[1] * (weight.ndim - 1))
        result[f"{layer}.weight"] = wide.to(weight.dtype)
        bias = result.get(f"{layer}.bias")
        if bias is not None:
            result[f"{layer}.bias"] = ((bias.double() - now.mean) * scale + mean).to(bias.dtype)
    return result


def reset_statistics(
    model: FunctionalModel,
    params: Mapping[str, Tensor],
    batches: Iterable[Any],
    *,
    state: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Measure the running statistics of every BatchNorm anew, for weights that were averaged.

    The statistics are the plain means over the batches. Other modules run in eval mode.

    Args:
        model: the network.
        params: its weights; anything that can be called with `model`.
        batches: inputs, no labels: tensors, or tuples of arguments.
        state: the buffers to start from; those of the model by default. Only the statistics change.

    Returns:
        New buffers, for `model.with_state` and `model.state_dict`.

    Raises:
        OptionError: there is no BatchNorm with running statistics in the model.
        TreeError: there are no batches.

    Example:
        >>> import torch, peft_func as pf
        >>> model = pf.functionalize(torch.nn.BatchNorm1d(1))
        >>> pf.reset_statistics(model, model.params, [torch.tensor([[1.0], [3.0]])])["running_mean"]
        tensor([2.])
    """
    root = model._skeleton.copy().eval()
    buffers = {**(model.state if state is None else state)}
    found = False
    for path, module in root.named_modules():
        if isinstance(module, BATCH_NORMS) and module.running_mean is not None:
            module.train()
            module.momentum = None  # what makes them plain means
            prefix = f"{path}." if path else ""
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                buffers[prefix + name] = torch.zeros_like(buffers[prefix + name])
            found = True
    if not found:
        raise OptionError("there is no BatchNorm with running statistics in this model; see pf.repair")
    training = FunctionalModel(root, model.params, model.state, model._entry)
    with torch.no_grad():
        for arguments in _as_arguments(batches):
            buffers = training.with_state(params, buffers, *arguments)[1]
    return buffers


def _moments(
    model: FunctionalModel, params: Mapping[str, Tensor], state: Mapping[str, Tensor], data: list[tuple[Any, ...]]
) -> dict[str, Moments]:
    """Return the moments of the outputs of every layer, by its path, in the order in which they run."""
    found: dict[str, Moments] = {}

    def record(path: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        pixels = 0 if isinstance(module, nn.Linear) else params[f"{path}.weight"].ndim - 2
        axis = output.ndim - 1 - pixels
        values = output.detach().double().movedim(axis, -1).flatten(0, -2)
        old = found.get(path, Moments(0, torch.zeros(()), torch.zeros(())))
        found[path] = Moments(old.count + len(values), old.total + values.sum(0), old.squares + values.square().sum(0))

    root = model._skeleton.copy()
    for path, module in root.named_modules():
        if isinstance(module, LAYERS) and f"{path}.weight" in params:
            module.register_forward_hook(functools.partial(record, path))
    observed = FunctionalModel(root, model.params, model.state, model._entry)
    with torch.no_grad():
        for arguments in data:
            observed.with_state(params, state, *arguments)
    return found


def _as_arguments(batches: Iterable[Any]) -> list[tuple[Any, ...]]:
    data = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
    if not data or isinstance(batches, Tensor):
        raise TreeError("batches are a list of inputs, with one or more: [x] for a single one")
    return data
