"""Rematerialisation: chosen modules keep nothing for backward but what they receive, and run once more there.

    y = M(x):  keep x;  in backward, y' = M(x) anew, with its gradient

Structured weights act inside of such a segment, so that what an adapter computes there (`x A^T`, a weight that had to
be formed) is rebuilt, too. The second run finds what the first one found: the weights, buffers and notes of that call,
the state of the random generators, autocast, and every context variable.

Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (arXiv:1604.06174).
"""

import contextvars
import copy
import functools
import inspect
import types
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peft_func.errors import ModuleRefusedError, OptionError
from peft_func.functional.model import FunctionalModel
from peft_func.functional.surround import Notes, Surrounded
from peft_func.functional.walk import resolve_modules
from peft_func.trees.select import Where
from peft_func.weights.eager import in_functorch


def remat(model: FunctionalModel, where: Where) -> FunctionalModel:
    """Return a new callable in which chosen modules are run again in backward, instead of keeping what they computed.

    Values and gradients stay as they are; a training step keeps less and computes the forward pass of these modules
    twice. Add-ins at a chosen module are around its segment, and those further inside are in it. Where autograd does
    not record (`torch.no_grad`) and under `torch.func` (`grad`, `vmap`, `jvp`), which cannot keep less, the modules run
    once, as ever.

    Args:
        model: what `pf.functionalize` returned, in any mode; `train()`, `eval()`, `to()` and `method()` of the new
            callable keep the segments. Adapters bound to either serve both.
        where: a selector over modules: `pf.blocks()`, `pf.of_type(nn.TransformerEncoderLayer)`, a regex over their
            whole paths. Each call of such a module is a segment.

    Raises:
        SelectorError: nothing is selected.
        OptionError: a chosen module is inside of another one, or has no forward.
        ModuleRefusedError: in a call, if a segment writes to what it receives (a cache of keys and values, an in-place
            activation): its second run would find it written.

    Example:
        >>> import torch, peft_func as pf
        >>> net = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh()) for _ in range(3)])
        >>> model = pf.functionalize(net)
        >>> lean = pf.remat(model, "[0-2]")
        >>> adapter = pf.bind(pf.lora(".*", rank=2), lean)
        >>> y = lean(adapter.apply(*adapter.init(0)), torch.ones(2, 4))
        >>> torch.equal(y, model(adapter.apply(*adapter.init(0)), torch.ones(2, 4)))
        True
    """
    if not isinstance(model, FunctionalModel):
        raise OptionError(f"remat takes a functional model, not a {type(model).__name__}; see pf.functionalize")
    root = model._skeleton.copy()
    for path in resolve_modules(where, model, "remat"):
        module = root.get_submodule(path)
        if type(module).forward is nn.Module.forward and "forward" not in vars(module):
            raise OptionError(
                f"remat: {path!r} is a {type(module).__name__}, which is never called; choose the modules in it"
            )
        if not isinstance(vars(module).get("forward"), Segment):
            vars(module)["forward"] = Segment.of(module, vars(module).get("forward"))
    _check_apart(root)
    return FunctionalModel(root, model.params, model.state, model._entry, model.hosts)


def _check_apart(root: nn.Module) -> None:
    names = {module: path for path, module in root.named_modules()}
    segments = [module for module in names if isinstance(vars(module).get("forward"), Segment)]
    for outer in segments:
        for inner in segments:
            if inner is not outer and inner in set(outer.modules()):
                raise OptionError(
                    f"remat: {names[inner]!r} is inside of {names[outer]!r}, which runs again as a whole; choose one "
                    "of them"
                )


class Segment(functools.partial[Any]):
    """The forward of a module whose calls run again in backward.

    As a partial it is copied along with the module that it is in, for which see `Skeleton`. The module is held weakly:
    it has this as an attribute, and a cycle would keep the weights of a call until the garbage is collected.
    """

    @classmethod
    def of(cls, module: nn.Module, forward: Callable[..., Any] | None) -> "Segment":
        """Make the forward of a module; `forward` is one that it already has as an attribute."""
        return cls(_run, weakref.ref(module), forward)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Segment":
        module, forward = self.args
        return self.of(copy.deepcopy(module(), memo), copy.deepcopy(forward, memo))

    def __reduce__(self) -> Any:
        return Segment.of, (self.args[0](), self.args[1])

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(_forward_of(*self.args))

    @property
    def __code__(self) -> Any:
        return getattr(_forward_of(*self.args), "__code__", None)


def _forward_of(module: "weakref.ref[nn.Module]", forward: Callable[..., Any] | None) -> Callable[..., Any]:
    owner: Any = module()
    return functools.partial(type(owner).forward, owner) if forward is None else forward


def _run(module: "weakref.ref[nn.Module]", forward: Callable[..., Any] | None, /, *args: Any, **kwargs: Any) -> Any:
    call = _forward_of(module, forward)
    if not torch.is_grad_enabled() or in_functorch():  # grad refuses checkpoints; what vmap maps is gone in backward
        return call(*args, **kwargs)
    if torch.compiler.is_compiling():
        return checkpoint(call, *args, use_reentrant=False, **kwargs)
    start, received = _Start(module()), _marks((args, kwargs))
    # In a tuple and a dict: checkpoint has keywords of its own, and looks for devices among positional arguments only.
    output = checkpoint(functools.partial(start.run, call), args, kwargs, use_reentrant=False)
    left = _marks((args, kwargs))
    if len(left) != len(received) or any(a is not b or m != n for (a, m), (b, n) in zip(left, received, strict=True)):
        raise ModuleRefusedError(
            f"remat: a {type(module()).__name__} writes to what it receives, which it would find written when it runs "
            "again in backward; choose other modules, or leave out the cache (transformers: use_cache=False)"
        )
    return output


class _Start:
    """What a segment finds when it starts, besides its arguments."""

    def __init__(self, module: Any) -> None:
        self._started = False
        self._context = contextvars.copy_context()
        self._notes = _notes_in(module)
        self._noted = dict(self._notes)
        self._buffers = [(part._buffers, _Found(part)) for part in module.modules() if part._buffers]

    def run(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the segment; from the second time on, with what it found the first time."""
        if self._started:
            return self._context.copy().run(self._again, call, args, kwargs)
        self._started = True
        output = call(*args, **kwargs)
        for _, found in self._buffers:
            found.forget_unwritten()
        return output

    def _again(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tables = [(self._notes, self._noted), *((table, found.values()) for table, found in self._buffers)]
        now = [dict(table) for table, _ in tables]
        try:  # the recomputation ends by an exception, as soon as it has what it wants
            for table, found in tables:
                _refill(table, found)
            call(*args, **kwargs)
        finally:
            for (table, _), left in zip(tables, now, strict=True):
                _refill(table, left)


class _Found:
    """The buffers that a module has when a segment starts; those that it may write (BatchNorm's) are kept as copies."""

    def __init__(self, module: nn.Module) -> None:
        self._kept = dict(module._buffers)
        self._copies = [
            # The kernels of BatchNorm write its statistics without a change of their versions.
            (key, old, -1 if module.training and old.is_floating_point() else old._version, old.clone())
            for key, old in module._buffers.items()
            if old is not None
        ]

    def forget_unwritten(self) -> None:
        """Drop the copies of what has not been written."""
        self._copies = [copied for copied in self._copies if copied[1]._version != copied[2]]

    def values(self) -> dict[str, Tensor | None]:
        """Return the buffers as they were, for one more run."""
        return self._kept | {key: old.clone() for key, _, _, old in self._copies}


def _refill(table: dict[Any, Any], values: Mapping[Any, Any]) -> None:
    table.clear()
    table.update(values)


def _notes_in(module: nn.Module) -> Notes:
    """Return the notes of this call of the model, which are one dict for all add-ins; an own one if none is in here."""
    forwards = (vars(part).get("forward") for part in module.modules())
    return next((forward.notes for forward in forwards if isinstance(forward, Surrounded)), {})


def _marks(value: Any) -> list[tuple[Any, int]]:
    """Return everything in a value, with the versions of tensors: equal lists mean that nothing was written to it."""
    marks: list[tuple[Any, int]] = []
    seen: set[int] = set()
    ahead = [value]
    while ahead:
        part = ahead.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, Tensor):
            marks.append((part, 0 if part.is_inference() else part._version))
        elif isinstance(part, list | tuple | set):
            ahead += part
        elif isinstance(part, Mapping):
            ahead += part.values()
        elif not isinstance(part, nn.Module | type | types.FunctionType | types.ModuleType) and hasattr(
            part, "__dict__"
        ):
            ahead += vars(part).values()
        elif part is not None:
            marks.append((part, 0))
    return marks
