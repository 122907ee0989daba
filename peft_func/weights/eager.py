"""Who looks on at what is computed: a transform of `torch.func`, or a compiler."""

import torch
from torch._C import _functorch


def in_transform() -> bool:
    """Whether `torch.func` or `torch.compile` looks on: in-place products and autograd's functions are not for them."""
    return torch.compiler.is_compiling() or _functorch.peek_interpreter_stack() is not None


def in_functorch() -> bool:
    """Whether `torch.func` looks on, in a compiled call too."""
    return _functorch.peek_interpreter_stack() is not None


def in_vmap() -> bool:
    """Whether a `vmap` looks on, in a compiled call too."""
    stack = _functorch.get_interpreter_stack() or []
    return any(level.key() == _functorch.TransformType.Vmap for level in stack)


# Dynamo has the same stack while it traces, so it may ask then, and take the answer for a constant. The decorator
# torch.compiler.assume_constant_result sets this, too, but it imports Dynamo.
for _question in (in_functorch, in_vmap):
    vars(_question)["_dynamo_marked_constant"] = True
