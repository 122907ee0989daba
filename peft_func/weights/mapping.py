"""The mapping that `Adapter.apply` returns: parameter name to tensor or operator."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from peft_func.errors import OptionError, TreeError
from peft_func.weights.around import Around
from peft_func.weights.layout import Layout
from peft_func.weights.matrix import Dense, Matrix
from peft_func.weights.operator import Operator


class Weights(dict[str, "Tensor | Operator"]):
    """Effective weights by parameter name: tensors where nothing changed, operators (or tensors) where something did.

    Attributes:
        base: the weights before any transform.
        layouts: how each is stored.
        arounds: functions around the calls of modules, in the order in which they were put there.
    """

    def __init__(
        self,
        items: Mapping[str, Tensor | Operator],
        base: Mapping[str, Tensor],
        layouts: Mapping[str, Layout],
        arounds: tuple[Around, ...] = (),
    ) -> None:
        super().__init__(items)
        self.base = base
        self.layouts = layouts
        self.arounds = arounds

    def matrix(self, path: str) -> Matrix:
        """Return a weight as a `Matrix` `[*batch, out, in]`, whatever the module stores: the way to keep structure.

        Example:
            >>> import torch, peft_func as pf
            >>> def init(weights, key):
            ...     return {p: {"u": torch.zeros(len(w), 1), "v": torch.ones(1, len(w.T))} for p, w in weights.items()}
            >>> def apply(tree, weights):
            ...     return {p: weights.matrix(p) + pf.LowRank(leaf["u"], leaf["v"]) for p, leaf in tree.items()}
            >>> rank_one = pf.on(r".*weight", pf.Transform(init, apply), name="rank_one")
        """
        value = self[path]
        return value.matrix if isinstance(value, Operator) else Dense(self.layouts[path].to_matrix(value))

    def surrounded(self, arounds: Iterable[Around]) -> "Weights":
        """Return these weights with more functions around calls of modules, outside of those that are there."""
        return Weights(self, self.base, self.layouts, (*self.arounds, *arounds))

    def restrict(self, paths: Iterable[str]) -> "Weights":
        """Return only these, in this order."""
        return Weights({path: self[path] for path in paths}, self.base, self.layouts, self.arounds)

    def updated(
        self, changes: Mapping[str, Tensor | Operator | Matrix], among: Iterable[str] | None = None
    ) -> "Weights":
        """Return these weights with some of them replaced: any, or only some among those given.

        Raises:
            TreeError: it is no mapping, a name is unknown, or a value has not the shape of the parameter.
            OptionError: a value is no tensor, operator or matrix.
        """
        result = Weights(self, self.base, self.layouts, self.arounds)
        allowed = self if among is None else frozenset(among)
        for path, value in changes.items():
            if path not in allowed:
                raise TreeError(
                    f"apply changed {path!r}, which it did not select; it sees {', '.join(sorted(allowed)[:5])}"
                )
            if isinstance(value, Matrix):
                result[path] = Operator(value, self.layouts[path], self[path].dtype, path)
                continue
            if not isinstance(value, (Tensor, Operator)):
                raise OptionError(
                    f"{path}: apply gave a {type(value).__name__}; it gives tensors, operators or matrices"
                )
            if value.shape != self[path].shape:
                raise TreeError(f"{path}: apply gave {tuple(value.shape)} for {tuple(self[path].shape)}")
            result[path] = value if value.dtype == self[path].dtype else value.to(self[path].dtype)
        return result
