"""A bound method as something that pickles: what the library made as data, a user's own part as it is."""

from typing import Any

from peft_func.functional.model import FunctionalModel
from peft_func.interop.files import method_as_data, method_of_data
from peft_func.transforms.bind import Adapter
from peft_func.transforms.transform import Chain, Method, Part, chain
from peft_func.trees.paths import Keys


def packed(adapter: Adapter, method: Method, prefix: Keys = ()) -> Any:
    """Return what `unpacked` makes the method of; it pickles if the functions of a user's own parts do."""
    if isinstance(method, Chain):
        inner = prefix if method.name is None else (*prefix, method.name)
        return method.name, [packed(adapter, part, inner) for part in method.parts]
    return method if method.kind is None else method_as_data(method, adapter, prefix)


def unpacked(data: Any, model: FunctionalModel) -> Method:
    """Return the method, for the model that it was bound to or one of the same names and shapes."""
    if isinstance(data, tuple):
        name, parts = data
        return chain(*(unpacked(part, model) for part in parts), name=name)
    return data if isinstance(data, Part) else method_of_data("a pickled Adapted", data, model)
