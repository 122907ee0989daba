"""The number of features that a module takes and gives, on the last axis, as far as its weights tell."""

from torch import nn

from peft_func.addins.place import Place
from peft_func.errors import OptionError
from peft_func.trees.select import Info
from peft_func.weights.layout import Layout, Storage, layout_of

Widths = tuple[int, int]
"""Features in and out."""


def widths(place: Place, name: str, width: int | None = None) -> Widths:
    """Return how many features the module at a place takes and gives.

    Of a module that holds others, the first and the last weight matrix in it are asked (embeddings, which look up, are
    not), or its norms if there is none.

    Args:
        place: the module.
        name: who asks, for the error.
        width: what the user says.

    Raises:
        OptionError: no weight tells, or the features are not on the last axis.
    """
    if width is not None:
        return width, width
    if isinstance(place.module, nn.Embedding):
        return place.module.embedding_dim, place.module.embedding_dim
    matrices, norms = [], []
    for module in place.module.modules():
        inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
        if isinstance(inputs, int) and isinstance(outputs, int):
            matrices.append((inputs, outputs))  # also where the weight is stored in another way: quantised
            continue
        layout = _layout(module)
        if layout is None or isinstance(module, nn.Embedding):
            continue
        if layout.is_conv or isinstance(module, nn.modules.batchnorm._BatchNorm | nn.GroupNorm):
            raise OptionError(
                f"{name}: {place.path!r} has a {type(module).__name__}, whose features are not on the last axis; "
                "choose other modules"
            )
        if layout.storage is Storage.VECTOR:
            norms.append((layout.shape[-1], layout.shape[-1]))
        else:
            matrices.append((layout.matrix_shape[-1], layout.matrix_shape[-2]))
    found = matrices or norms
    if not found:
        raise OptionError(
            f"{name}: no weight of {place.path!r} ({type(place.module).__name__}) tells how many features it has; "
            "give width=..."
        )
    return found[0][0], found[-1][1]


def _layout(module: nn.Module) -> Layout | None:
    weight = module._parameters.get("weight")
    if weight is None or not weight.ndim:
        return None
    return layout_of(Info("weight", tuple(weight.shape), weight.dtype, (type(module),)))
