"""The number of features that a module takes and gives, on the last axis, as far as its weights tell."""

from torch import nn

from peft_func.addins.place import Place
from peft_func.errors import OptionError
from peft_func.trees.select import Info
from peft_func.weights.layout import Storage, layout_of

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
    modules = list(place.module.modules())
    if isinstance(place.module, nn.Embedding):
        return place.module.embedding_dim, place.module.embedding_dim
    norms = []
    matrices = []
    for module in modules:
        storage = _storage(module)
        if storage in (Storage.CONV, Storage.CONV_TRANSPOSED):
            raise OptionError(
                f"{name}: {place.path!r} convolves, and the features of a convolution are not on the last axis; "
                "choose other modules"
            )
        if storage in (Storage.MATRIX, Storage.TRANSPOSED) and not isinstance(module, nn.Embedding):
            matrices.append(_features(module))
        elif storage is Storage.VECTOR:
            norms.append(_features(module))
    found = matrices or norms
    if not found:
        kind = type(place.module).__name__
        raise OptionError(
            f"{name}: {place.path!r} ({kind}) has no weights that tell how many features it has; give width=..."
        )
    return found[0][0], found[-1][1]


def _info(module: nn.Module) -> Info | None:
    weight = module._parameters.get("weight")
    return None if weight is None else Info("weight", tuple(weight.shape), weight.dtype, (type(module),))


def _storage(module: nn.Module) -> Storage | None:
    info = _info(module)
    if isinstance(getattr(module, "in_features", None), int) and isinstance(getattr(module, "out_features", None), int):
        return Storage.MATRIX  # also where the weight is stored in another way: quantised
    return None if info is None or not info.ndim else layout_of(info).storage


def _features(module: nn.Module) -> Widths:
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(inputs, int) and isinstance(outputs, int):
        return inputs, outputs
    info = _info(module)
    assert info is not None
    if info.ndim == 1:
        return info.shape[0], info.shape[0]
    out, width = layout_of(info).matrix_shape[-2:]
    return width, out
