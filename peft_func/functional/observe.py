"""What a module inside a pure call receives and returns.

A call runs on a clone of the model that is its own, so a forward hook may be put on the clone: nobody else's module has
it, other threads do not meet it, and it is gone with the call.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from peft_func.errors import OptionError, SelectorError
from peft_func.functional.grouped import groups_among
from peft_func.functional.model import FunctionalModel
from peft_func.functional.skeleton import Skeleton, structural_copy
from peft_func.trees.select import nearest, path
from peft_func.weights.carrier import Carrier
from peft_func.weights.operator import Operator

# The tables of nn.Module that its two methods for registering forward hooks write to.
_HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
)  # fmt: skip


class Observed(NamedTuple):
    """One call of a module: copies of what it received and returned.

    Attributes:
        args: the positional arguments of its forward.
        kwargs: the keyword arguments.
        output: what it returned.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def input(self) -> Any:
        """The first argument."""
        return next(iter((*self.args, *self.kwargs.values())), None)


def observe(
    model: FunctionalModel,
    weights: Mapping[str, Tensor | Operator],
    places: str | Sequence[str],
    /,
    *args: Any,
    **kwargs: Any,
) -> tuple[Any, dict[str, list[Observed]]]:
    """Call a model, and return what chosen modules inside it received and returned.

    It is as pure as a call: tensors are copied when a module receives and returns them, so what is written in place
    later does not show. It composes with `torch.func` and autograd, but not with `torch.compile`.

    Args:
        model: what `pf.functionalize` returned.
        weights: as in a call.
        places: which modules: a regex for the whole path, or a list of paths or of their last parts.
        *args: what the module's forward takes.
        **kwargs: likewise.

    Returns:
        `(output, {path: [call, ...]})`: for every chosen module, in the order of the modules, its calls in their order;
        none, if the model does not call it. A call has `input` (the first argument), `args`, `kwargs` and `output`.

    Raises:
        SelectorError: a name or the regex matches no module; the message names the nearest.
        OptionError: it is no functional model, its weights differ along the batch, or the call is being compiled.

    Example:
        >>> import torch, peft_func as pf
        >>> model = pf.functionalize(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU()))
        >>> y, seen = pf.observe(model, model.params, ["0"], torch.ones(2, 4))
        >>> [(call.input.shape, call.output.shape) for call in seen["0"]]
        [(torch.Size([2, 4]), torch.Size([2, 3]))]
        >>> torch.equal(seen["0"][0].output.relu(), y)
        True
    """
    if not isinstance(model, FunctionalModel):
        raise OptionError(f"observe takes a functional model, not a {type(model).__name__}; see pf.functionalize")
    if torch.compiler.is_compiling():
        raise OptionError("observe is not compiled: call it outside torch.compile")
    if groups_among(weights) is not None:
        raise OptionError("observe takes the weights of one adapter; for several, torch.func.vmap over their trees")
    seen: dict[str, list[Observed]] = {place: [] for place in modules_named(model, places)}
    twin = copy.copy(model)
    twin._skeleton = _Observing(model._skeleton, seen)
    output = twin(weights, *args, **kwargs)
    # Checkpointed modules run again in backward, and would add to the lists.
    return output, {place: list(calls) for place, calls in seen.items()}


def modules_named(model: FunctionalModel, places: str | Sequence[str]) -> list[str]:
    """Return the paths of the modules that a regex, or a list of names or last parts, chooses.

    Raises:
        SelectorError: the regex, or a name, matches none.
    """
    names = [name for name, _ in model._skeleton.root.named_modules(remove_duplicate=False)]
    if isinstance(places, str):
        pattern = path(places).pattern  # type: ignore[attr-defined]
        chosen = {places: {name for name in names if pattern.fullmatch(name)}}
    elif isinstance(places, Sequence) and all(isinstance(place, str) for place in places):
        chosen = {place: {n for n in names if n == place or (place and n.endswith("." + place))} for place in places}
    else:
        raise SelectorError(f"observe takes a regex or a list of module names, not {places!r}")
    for place, found in chosen.items():
        if not found:
            raise SelectorError(
                f"observe: {place!r} names none of the model's {len(names)} modules; the nearest: "
                f"{', '.join(nearest(place, names))}. A str is a regex over the whole path, a list holds names"
            )
    every = set().union(*chosen.values())
    return [name for name in names if name in every]


def module_at(model: FunctionalModel, place: str) -> tuple[FunctionalModel, dict[str, str]]:
    """Return one module of a model as a pure callable, and `{its parameter's name: the model's name for it}`."""
    part = model._skeleton.root.get_submodule(place)
    prefix = place + "." if place else ""

    def outer(name: str, ties: Mapping[str, str]) -> str:
        return ties.get(prefix + name, prefix + name)

    names = {name: outer(name, model.ties) for name, _ in part.named_parameters()}
    state = {name: model.state[outer(name, model._buffer_names)] for name, _ in part.named_buffers()}
    return FunctionalModel(structural_copy(part), {n: model.params[full] for n, full in names.items()}, state), names


class _Observing(Skeleton):
    """A skeleton whose clones write down what some of their modules receive and return."""

    def __init__(self, skeleton: Skeleton, seen: Mapping[str, list[Observed]]) -> None:
        vars(self).update(vars(skeleton))
        self._seen = seen

    def clone(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> nn.Module:
        root = super().clone(params, buffers)
        for place in self._seen:
            for table in _HOOKS:  # a clone shares them with its skeleton
                vars(root.get_submodule(place))[table] = getattr(root.get_submodule(place), table).copy()
        for place, calls in self._seen.items():
            before, after = _recorder(calls)
            module = root.get_submodule(place)
            module.register_forward_pre_hook(before, with_kwargs=True)
            module.register_forward_hook(after, with_kwargs=True)
        return root


def _recorder(calls: list[Observed]) -> tuple[Callable[..., None], Callable[..., None]]:
    # A module may write to its input in place, and may call itself: the input is copied before, and kept on a stack.
    received: list[tuple[Any, Any]] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        received.append((_copied(args), _copied(kwargs)))

    def after(_: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        calls.append(Observed(*received.pop(), _copied(output)))

    return before, after


def _copied(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.op.materialise() if isinstance(t, Carrier) else t.clone(), value)
