"""`nn.MultiheadAttention` hands its packed weights to one function, which takes them apart itself."""

import types
from typing import Any

import torch.nn.functional as F

from peft_func.weights.carrier import implements

# torch's own code, but for the question whether an argument overrides torch functions: one that answers "no" runs
# the function's body, whose `linear`, `split` and `chunk` then come to the rules for structured weights.
_body = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda _: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


@implements(F.multi_head_attention_forward)
def multi_head_attention_forward(*args: Any, **kwargs: Any) -> Any:
    return _body(*args, **kwargs)
