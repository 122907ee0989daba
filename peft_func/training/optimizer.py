"""Any `torch.optim` optimizer as two pure functions over trees, `init` and `update`.

The optimizer itself runs, in place, on copies of the leaves that nobody else sees: what it computes is what it always
does, bit for bit. The protocol is that of optax and torchopt, so each may stand in for the other.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from peft_func.errors import OptionError, TreeError
from peft_func.training.groups import Groups, assign, described
from peft_func.training.optimizer_checks import Spec, check_gradient, check_options, check_state, probe, tried
from peft_func.trees.paths import Keys, Tree, from_leaves, insert, join, leaves, map_leaves

# Their statistics are of whole tensors: over a stacked tree they would mix the members.
_WHOLE = (torch.optim.Adafactor, *filter(None, [getattr(torch.optim, "Muon", None)]))
_REFUSED = {
    torch.optim.LBFGS: "it calls the loss several times in a step, which (grads, state) cannot say",
    torch.optim.SparseAdam: "it takes sparse gradients only",
}


@dataclass(frozen=True)
class Plan:
    """What an optimizer does with trees of one structure.

    Attributes:
        groups: the options of each group, and its leaves.
        spec: the shape of every tensor of the state after `init`, by its name and its leaf.
        lazy: whether the first update may add to the state.
    """

    groups: list[tuple[dict[str, Any], list[Keys]]]
    spec: Spec
    lazy: bool


@dataclass(frozen=True, eq=False)
class Optimizer:
    """A `torch.optim` class and its options, as pure functions; `pf.optimizer` makes it.

    Attributes:
        cls: the class.
        groups: what some leaves have of their own, as in `pf.groups`.
        options: the options of all others.
        rate: what every learning rate is multiplied by.
    """

    cls: type[torch.optim.Optimizer]
    groups: Groups
    options: dict[str, Any]
    rate: float = 1.0
    _plans: dict[Any, Plan] = field(default_factory=dict, repr=False)

    def init(self, params: Mapping[str, Any]) -> Tree:
        """Return the state before the first step.

        Args:
            params: the tree that is to train, or a stacked one.

        Returns:
            `{name: {paths of the tree}}`, such as `{"step": {...}, "exp_avg": {...}}`: tensors only. Every leaf has a
            step of its own. What an optimizer makes only in its first step (SGD's momentum with a dampening) is absent.

        Raises:
            OptionError: the options do not fit the class, or the class these leaves.
            SelectorError: a selector of the groups matches nothing.
            TreeError: the tree has no leaves, or one that is no floating-point tensor.
        """
        plan = self._plan(params)
        return _state(*self._made(plan, params, fresh=True))

    def update(
        self, updates: Mapping[str, Any], state: Mapping[str, Any], *, params: Mapping[str, Any], inplace: bool = False
    ) -> tuple[Tree, Tree]:
        """Return what to add to the leaves, and the new state, as optax and torchopt do.

        Args:
            updates: the gradients.
            state: what `init`, or the update before, returned.
            params: the tree.
            inplace: must be False; nothing is written.

        Raises:
            TreeError: gradients or state are not of this tree.
            OptionError: `inplace=True`.
        """
        if inplace:
            raise OptionError("update writes nothing in place: take what it returns, and leave inplace=False")
        new, new_state = self.step(updates, state, params)
        return map_leaves(lambda after, before: after - before.detach(), new, params), new_state

    @_disable_dynamo  # torch.compiler.disable does the same, and imports all of the compiler at once
    def step(self, grads: Mapping[str, Any], state: Mapping[str, Any], tree: Mapping[str, Any]) -> tuple[Tree, Tree]:
        """Return the new tree and the new state: exactly the values that the class computes in place.

        Args:
            grads: a tree of the same paths, shapes and dtypes.
            state: what `init`, or the step before, returned.
            tree: the leaves; they are not written, and what comes back has no graph.

        Raises:
            TreeError: gradients or state are not of this tree.
            LeakError: a gradient has a graph, which would be lost.

        Example:
            >>> import torch, peft_func as pf
            >>> sgd = pf.optimizer(torch.optim.SGD, lr=0.5)
            >>> tree, grads = {"a": torch.ones(2)}, {"a": torch.ones(2)}
            >>> sgd.step(grads, sgd.init(tree), tree)[0]
            {'a': tensor([0.5000, 0.5000])}
        """
        plan, given = self._plan(tree), dict(leaves(grads))
        for keys, leaf in leaves(tree):
            check_gradient(keys, leaf, given.pop(keys, None))
        for keys in given:
            raise TreeError(f"there is a gradient for {join(keys)!r}, which the tree does not have")
        check_state(self.cls.__name__, plan.spec, state, dict(leaves(tree)), lazy=plan.lazy)
        optimizer, own = self._made(plan, tree)
        for keys, gradient in leaves(grads):
            own[keys].grad = gradient.detach().clone()  # some classes write into it: SGD with foreach and nesterov does
        for name, part in state.items():
            for keys, tensor in leaves(part):
                optimizer.state[own[keys]][name] = tensor.detach().clone()
        optimizer.step()
        return from_leaves((keys, own[keys].detach()) for keys, _ in leaves(tree)), _state(optimizer, own)

    def scaled(self, factor: float) -> "Optimizer":
        """Return the same optimizer with every learning rate multiplied by a factor: one step of a schedule.

        The state is the same, so warming up is `pf.step(loss, optimizer.scaled(min(1, step / 100)))`.

        Example:
            >>> import torch, peft_func as pf
            >>> pf.optimizer(torch.optim.SGD, lr=0.5).scaled(0.1).rate
            0.1
        """
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 <= factor < float("inf"):
            raise OptionError(f"scaled: {factor!r}; a rate is multiplied by a finite number from 0 on")
        return replace(self, rate=self.rate * factor)

    @property
    def elementwise(self) -> bool:
        """Whether members of a stacked tree train as if alone; False for Adafactor and Muon.

        Unknown classes are taken for elementwise. Those that look at whole tensors, such as LAMB or Shampoo, are not.
        """
        return not issubclass(self.cls, _WHOLE)

    def _plan(self, tree: Mapping[str, Any]) -> Plan:
        structure = tuple((keys, tuple(leaf.shape), leaf.dtype) for keys, leaf in leaves(tree))
        if structure not in self._plans:
            self._plans[structure] = self._planned(tree)
        return self._plans[structure]

    def _planned(self, tree: Mapping[str, Any]) -> Plan:
        flat = {join(keys): (keys, leaf) for keys, leaf in leaves(tree)}
        if not flat:
            raise TreeError("the tree has no leaves; there is nothing to train")
        for keys, _ in leaves(tree):
            if flat[join(keys)][0] != keys:
                raise TreeError(f"two leaves of the tree have the path {join(keys)!r}")
        for path, (_, leaf) in flat.items():
            if not (leaf.is_floating_point() or leaf.is_complex()):
                raise TreeError(f"the leaf {path!r} is {leaf.dtype}; what trains is floating-point")
        defaults = probe(self.cls, self.options).defaults
        found = assign(described(tree), self.groups, defaults)
        for options, paths in found:
            check_options(self.cls, defaults, options, paths)
        groups = [(options, [flat[path][0] for path in paths]) for options, paths in found]
        lazy = not hasattr(self.cls, "_init_group") or any(
            options.get("momentum") and options.get("dampening") for options, _ in found
        )
        # Names and shapes are found without a value, and in whatever transform this is called: on the meta device.
        plain = {"fused": None, "foreach": None, "capturable": False}
        off = {name: value for name, value in plain.items() if name in defaults}
        twin = Plan([({**options, **off}, keys) for options, keys in groups], {}, lazy)
        empty = from_leaves((k, torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")) for k, leaf in flat.values())
        state = _state(*self._made(twin, empty, fresh=True))
        spec = {name: {keys: tuple(leaf.shape) for keys, leaf in leaves(part)} for name, part in state.items()}
        return Plan(groups, spec, lazy)

    def _made(
        self, plan: Plan, tree: Mapping[str, Any], *, fresh: bool = False
    ) -> tuple[torch.optim.Optimizer, dict[Keys, Tensor]]:
        """Return an optimizer over copies of the leaves, with the state that comes before a first step if `fresh`."""
        own = {keys: leaf.detach().clone() for keys, leaf in leaves(tree)}
        parts = [
            {
                **options,
                **({"lr": options["lr"] * self.rate} if self.rate != 1.0 else {}),
                "params": [*map(own.get, keys)],
            }
            for options, keys in plan.groups
        ]
        optimizer: Any = tried(self.cls, parts, self.options)
        if fresh and hasattr(optimizer, "_init_group"):
            for leaf in own.values():
                leaf.grad = torch.zeros_like(leaf)
            for group in optimizer.param_groups:
                lists = inspect.signature(optimizer._init_group).parameters
                optimizer._init_group(group, *([] for _ in range(len(lists) - 1)))
                if issubclass(self.cls, torch.optim.SGD) and group["momentum"] and not group["dampening"]:
                    for leaf in group["params"]:  # a buffer of zeros is then the same as none
                        optimizer.state[leaf]["momentum_buffer"] = torch.zeros_like(leaf)
        return optimizer, own


def optimizer(cls: type[torch.optim.Optimizer], *, groups: Groups | None = None, **options: Any) -> Optimizer:
    r"""Make pure functions of a `torch.optim` class: `init(params) -> state`, `update(grads, state, params=...)`.

    It takes plain trees and stacked ones. Over a stacked tree what works entry by entry (SGD, Adam, AdamW, Adagrad,
    RMSprop, NAdam, RAdam, ...) trains every member as if alone; Adafactor and Muon do not, nor do others that look at
    whole tensors. Members share the count of steps: to hold one, hold its part of the tree (`pf.hold_members`).

    `torch.compile` runs an update outside of its graph: with `fullgraph=True` compile what comes before it. An update
    is not differentiable, and most do not run under `vmap` (nor need to).

    Args:
        cls: a class such as `torch.optim.AdamW`; not LBFGS and not SparseAdam.
        groups: options of some leaves, by selectors over the paths of the tree and by presets, as in `pf.groups`.
        **options: the options of the class: `lr`, `weight_decay`, ...

    Raises:
        OptionError: the class is refused, or refuses an option.

    Example:
        >>> import torch, peft_func as pf
        >>> adamw = pf.optimizer(torch.optim.AdamW, lr=1e-3, groups=[(r".*\.B", {"lr": 1e-2})])
        >>> tree = {"A": torch.ones(2, 4), "q.B": torch.zeros(4, 2)}
        >>> state = adamw.init(tree)
        >>> sorted(state), state["exp_avg"]["A"].shape
        (['exp_avg', 'exp_avg_sq', 'step'], torch.Size([2, 4]))
        >>> updates, state = adamw.update(pf.map_leaves(torch.ones_like, tree), state, params=tree)
        >>> updates["q.B"][0]
        tensor([-0.0100, -0.0100])
    """
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise OptionError(f"optimizer takes a class of torch.optim, such as torch.optim.AdamW, not {cls!r}")
    for refused, why in _REFUSED.items():
        if issubclass(cls, refused):
            raise OptionError(f"{cls.__name__} cannot be an update of (grads, state): {why}; use torch.optim.AdamW")
    if options.get("differentiable"):
        raise OptionError("an update of pf.optimizer is not differentiable; torchopt's are, and pf.step takes them")
    probe(cls, options)
    return Optimizer(cls, () if groups is None else groups, options)


def _state(optimizer: torch.optim.Optimizer, own: Mapping[Keys, Tensor]) -> Tree:
    state: Tree = {}
    for keys, leaf in own.items():
        for name, value in optimizer.state.get(leaf, {}).items():
            if value is None:
                continue
            if not isinstance(value, Tensor):
                raise OptionError(
                    f"{type(optimizer).__name__} keeps {name!r} as a {type(value).__name__}; only optimizers whose "
                    "state is tensors can be pure functions over trees"
                )
            insert(state, (name, *keys), value.detach())
    return state
