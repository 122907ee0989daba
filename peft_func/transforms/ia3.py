"""IA3: W' = diag(l) W on the output side, W diag(l) on the input side.

Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
arXiv 2205.05638: keys and values are scaled at their output, feed-forward layers at the input of the second one.
"""

import torch
from torch import Tensor

from peft_func.errors import OptionError
from peft_func.functional.model import FunctionalModel
from peft_func.transforms.options import SEPARATE_PROJECTIONS, biases, check_choice, check_flag
from peft_func.transforms.transform import Changes, Part, Transform, check_name
from peft_func.trees.keys import uniform
from peft_func.trees.paths import Tree
from peft_func.trees.select import Where
from peft_func.weights.layout import Layout
from peft_func.weights.mapping import Weights
from peft_func.weights.matrix import Diagonal, Matrix, Product


def ia3(where: Where, *, side: str = "output", scale_bias: bool = False, name: str = "ia3") -> Part:
    """Scale the outputs, or the inputs, of every selected weight.

    Leaves of `trainable[name][path]`: `scale`, ones at init: [out] on the output side, [in] on the input side (for a
    convolution its channels, [in / groups]); with the batch of experts in front.

    Args:
        where: a selector; only parameters of two dimensions or more are looked at.
        side: `"output"` or `"input"`.
        scale_bias: on the output side, scale the module's bias too, as HF PEFT does: the whole output is scaled.
        name: the sub-tree.

    Raises:
        OptionError: another side, or `scale_bias` on the input side.

    Example:
        >>> import torch, peft_func as pf
        >>> model = pf.functionalize(torch.nn.Linear(4, 3))
        >>> pf.bind(pf.ia3("weight", side="input"), model).init(0)[1]["ia3"]["weight"]["scale"]
        tensor([1., 1., 1., 1.])
    """
    check_choice("ia3", "side", side, ("output", "input"))
    check_flag("ia3", "scale_bias", scale_bias)
    if scale_bias and side == "input":
        raise OptionError("ia3: scale_bias goes with side='output'; inputs are scaled before the bias is added")

    def make(paths: tuple[str, ...], model: FunctionalModel) -> Transform:
        layouts = {path: model.layouts[path] for path in paths}
        bias_of = {path: biases((path,), model) for path in paths} if scale_bias else {}

        def init(weights: Weights, key: int) -> Tree:
            return {
                path: {"scale": torch.ones_like(uniform(_extent(layout, side), 0.0, 0, weights.base[path]))}
                for path, layout in layouts.items()
            }

        def apply(tree: Tree, weights: Weights) -> Changes:
            changes: dict[str, Tensor | Matrix] = {}
            factors: dict[str, Tensor | float] = {}
            for path, layout in layouts.items():
                scale, matrix = tree[path]["scale"], weights.matrix(path)
                if side == "input":
                    changes[path] = Product(matrix, Diagonal(scale, layout.taps))
                else:
                    changes[path] = Product(Diagonal(scale), matrix)
                for bias in bias_of.get(path, ()):
                    factors[bias] = factors.get(bias, 1.0) * _bias_scale(path, bias, scale, weights[bias].shape[0])
            for bias, factor in factors.items():
                changes[bias] = torch.mul(weights[bias], factor)  # type: ignore[arg-type]  # or an Operator
            return changes

        return Transform(init, apply)

    also = biases if scale_bias else None
    options = {"side": side, "scale_bias": scale_bias}
    return Part(where, make, check_name(name), "ia3", options, also=also)


def _bias_scale(path: str, bias: str, scale: Tensor, count: int) -> Tensor:
    """Return the scale of every entry of a bias that belongs to a scaled weight."""
    weight = path.rpartition(".")[2]
    if weight in SEPARATE_PROJECTIONS and bias.endswith("in_proj_bias"):
        ones = torch.ones_like(scale)
        return torch.cat([scale if name == weight else ones for name in SEPARATE_PROJECTIONS])
    # A grouped transposed convolution has one row of its matrix for the same output of every group.
    return scale.repeat(count // len(scale))


def _extent(layout: Layout, side: str) -> tuple[int, ...]:
    *_, rows, columns = layout.matrix_shape
    return (*layout.batch, rows if side == "output" else columns // layout.taps)
