"""Convolutions with a structured weight. Padding modes other than zeros are paddings of the input, done before."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_func.weights.carrier import Carrier, Rule, form, implements
from peft_func.weights.convolution import Convolution, convolve
from peft_func.weights.layout import Storage


def _act(
    dims: int,
    transposed: bool,
    name: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    options: Any,
) -> Any:
    if not isinstance(weight, Carrier) or isinstance(input, Carrier) or isinstance(bias, Carrier):
        return NotImplemented
    layout = weight.op.layout
    wanted = Storage.CONV_TRANSPOSED if transposed else Storage.CONV
    if layout.storage is not wanted or len(layout.kernel) != dims:
        return NotImplemented
    how = Convolution(dims, transposed, layout.kernel, groups, options, lambda _: layout.to_matrix(form(weight, name)))
    return convolve(weight.op.matrix, input, how, bias)


def _plain_rule(dims: int, name: str) -> Rule:
    def rule(
        input: Tensor, weight: Tensor, bias: Tensor | None = None,
        stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
    ) -> Any:  # fmt: skip
        options = {"stride": stride, "padding": padding, "dilation": dilation}
        return _act(dims, False, name, input, weight, bias, groups, options)

    return rule


def _transposed_rule(dims: int, name: str) -> Rule:
    def rule(
        input: Tensor, weight: Tensor, bias: Tensor | None = None,
        stride: Any = 1, padding: Any = 0, output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
    ) -> Any:  # fmt: skip
        options = {"stride": stride, "padding": padding, "output_padding": output_padding, "dilation": dilation}
        return _act(dims, True, name, input, weight, bias, groups, options)

    return rule


for _dims, _names in {1: "conv1d", 2: "conv2d", 3: "conv3d"}.items():
    implements(getattr(F, _names), getattr(torch, _names))(_plain_rule(_dims, _names))
for _dims, _names in {1: "conv_transpose1d", 2: "conv_transpose2d", 3: "conv_transpose3d"}.items():
    implements(getattr(F, _names), getattr(torch, _names))(_transposed_rule(_dims, _names))
