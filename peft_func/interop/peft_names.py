"""HF PEFT's names of tensors, and what each is in our trees.

base_model.model.P.lora_A.weight, .lora_B.weight       P.weight: A, B          Linear, HF Conv1D, Conv1d/2d/3d
base_model.model.P.lora_embedding_A, .lora_embedding_B P.weight: B^T, A^T      Embedding, whose rows are our outputs
base_model.model.P.base_layer.bias                     P.bias                  a bias of an adapted module
base_model.model.N                                     N                       all others that train themselves
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn

from peft_func.errors import FileFormatError
from peft_func.functional.model import FunctionalModel
from peft_func.trees.select import nearest
from peft_func.weights.layout import Storage

PREFIX = "base_model.model."
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.")
_FACTORS = {
    ".lora_A.weight": ("A", False),
    ".lora_B.weight": ("B", False),
    ".lora_embedding_A": ("B", True),
    ".lora_embedding_B": ("A", True),
}
_FOREIGN = {
    ".lora_magnitude_vector": "it is of DoRA, though the config says nothing of it",
    ".lora_B.bias": "it is a bias inside an adapter (lora_bias)",
    "trainable_tokens_delta": "it holds single rows of an embedding",
    "prompt_embeddings": "it is of prompt tuning",
}


_ATTENTION = (
    "it is in an nn.MultiheadAttention, where PEFT adapts the packed projection and the output one together, "
    "or, at out_proj alone, nothing at all"
)


class Slot(NamedTuple):
    """What a tensor of a file is: a leaf of our tree, seen from the parameter.

    Attributes:
        path: the parameter.
        leaf: `"A"` or `"B"`, a factor of its change; `"own"`, the parameter itself; `"base"`, an unchanged base weight.
        transposed: whether the file holds the leaf's transpose.
        module: the path of the module, as the file has it.
    """

    path: str
    leaf: str
    transposed: bool
    module: str


def read_name(file: object, name: str, model: FunctionalModel) -> Slot:
    """Tell what a tensor of a file is.

    Raises:
        FileFormatError: the name is not of this format, or not of this model.
    """
    clean = name
    for wrapper in _WRAPPERS:
        if wrapper in clean:
            clean = clean.replace(wrapper, "")
    if not clean.startswith(PREFIX):
        raise FileFormatError(f"{file} has a tensor {name!r}; the names of PEFT's LoRA begin with {PREFIX!r}")
    inner = clean[len(PREFIX) :]
    for suffix, (leaf, transposed) in _FACTORS.items():
        if inner.endswith(suffix):
            module = inner.removesuffix(suffix)
            return Slot(_known(file, name, f"{module}.weight", model), leaf, transposed, module)
    for ending, what in _FOREIGN.items():
        if inner.endswith(ending):
            raise FileFormatError(f"{file} has a tensor {name!r}: {what}; load_peft reads plain LoRA")
    module, _, last = inner.rpartition(".")
    if module.endswith(".base_layer") and last in ("weight", "bias"):
        module = module.removesuffix(".base_layer")
        path = _known(file, name, f"{module}.{last}", model)
        return Slot(path, "own" if last == "bias" else "base", False, module)
    return Slot(_known(file, name, inner, model), "own", False, module)


def factor_names(module: str, model: FunctionalModel) -> dict[str, tuple[str, bool]]:
    """Return the name in a file, and whether the transpose is there, for `"A"` and `"B"` of a module."""
    *_, owner = _along(module, model)
    embedding = isinstance(owner, nn.Embedding)
    return {
        leaf: (PREFIX + module + suffix, transposed)
        for suffix, (leaf, transposed) in _FACTORS.items()
        if transposed == embedding
    }


def bias_name(path: str, modules: Iterable[str]) -> str:
    """Return the name of a parameter that trains itself; the bias of an adapted module is inside its wrapper."""
    module, _, last = path.rpartition(".")
    return f"{PREFIX}{module}.base_layer.{last}" if module in modules else PREFIX + path


def obstacle(module: str, path: str, model: FunctionalModel) -> str | None:
    """Say why PEFT's adapter of a module and ours of its weight are not the same function; None where they are."""
    layout, (*above, owner) = model.layouts[path], _along(module, model)
    if isinstance(owner, nn.MultiheadAttention) or isinstance(above[-1], nn.MultiheadAttention):
        return _ATTENTION
    match layout.storage:
        case Storage.CONV:
            return _conv_obstacle(owner)
        case Storage.CONV_TRANSPOSED:
            return "PEFT has no LoRA for transposed convolutions"
        case Storage.MATRIX if isinstance(owner, nn.Embedding) and owner.max_norm is not None:
            return "its max_norm makes PEFT rescale rows of the factor too, in place"
        case Storage.MATRIX if len(layout.shape) == 2 and isinstance(owner, nn.Linear | nn.Embedding):
            return None
        case Storage.TRANSPOSED:
            return None
        case _:
            return (
                f"it is a {type(owner).__name__}; PEFT's LoRA is for Linear, HF Conv1D, Embedding and convolutions "
                "(of experts' and other parameters a file does not say which they are)"
            )


def _conv_obstacle(conv: Any) -> str | None:
    if conv.groups != 1:
        return f"it has {conv.groups} groups, and PEFT's factors mix what the groups of the weight keep apart"
    if any(step > 1 and extent > 1 for step, extent in zip(conv.dilation, conv.kernel_size, strict=True)):
        return "it is dilated, and PEFT's branch is not: it is another function than any change of the weight"
    if conv.padding_mode != "zeros" and conv.padding not in ("valid", (0,) * len(conv.kernel_size)):
        return f"it pads with padding_mode={conv.padding_mode!r}, and PEFT's branch with zeros"
    return None


def module_names(model: FunctionalModel) -> list[str]:
    """Return the paths of all modules of a model, each as often as it can be reached."""
    return [name for name, _ in model._skeleton.root.named_modules(remove_duplicate=False)]


def _along(path: str, model: FunctionalModel) -> Iterator[nn.Module]:
    """Yield the root and the modules on the way to a path, as far as there are any."""
    module = model._skeleton.root
    yield module
    for part in path.split("."):
        inner = module._modules.get(part)
        if inner is None:
            return
        module = inner
        yield module


def _known(file: object, name: str, path: str, model: FunctionalModel) -> str:
    own = model.ties.get(path, path)
    if own in model.params:
        return own
    if any(isinstance(module, nn.MultiheadAttention) for module in _along(path, model)):
        raise FileFormatError(f"{file} has a tensor {name!r}: {_ATTENTION}")
    if path in model.state:
        raise FileFormatError(f"{file} has a tensor {name!r}, which is a buffer of this model; trees hold parameters")
    close = ", ".join(nearest(path, (*model.params, *model.ties), 2))
    raise FileFormatError(
        f"{file} has a tensor {name!r}, and this model has no parameter {path!r}; the nearest names: {close}"
    )
