r"""Schedules of freezing: what trains is a function of the step.

Selectors see whole paths. In a tree of base weights these are the parameters' names (`head.weight`); in an adapter's
tree they begin with the part (`lora.encoder.0.q.weight.A`, `train.head.weight`). `r".*head\..*"` fits both;
`pf.leaves_for` selects in an adapter's tree by what is known of the base weights: names, modules, types, layers.
"""

import bisect
import re
from collections.abc import Mapping
from dataclasses import dataclass

from peft_func.errors import OptionError
from peft_func.functional.walk import walk
from peft_func.transforms.bind import Adapter
from peft_func.trees.modules import ModuleInfo
from peft_func.trees.paths import join
from peft_func.trees.select import AllOf, AnyOf, Exact, Info, Not, Path, Selector, Where, as_selector, resolve


@dataclass(frozen=True)
class Nothing(Selector):
    """Selects nothing, on purpose."""

    def __call__(self, path: str, info: Info) -> bool:
        return False

    def __repr__(self) -> str:
        return "None"


@dataclass(frozen=True)
class Schedule:
    """What trains from which step on, made by `pf.schedule`; equal where the steps and the selectors are.

    Attributes:
        boundaries: the steps at which an entry begins, in order; the first is 0.
        selectors: the entries.
    """

    boundaries: tuple[int, ...]
    selectors: tuple[Selector, ...]

    def __call__(self, step: float) -> Selector:
        """Return what trains at a step: the last entry that begins at it or before it.

        Args:
            step: a step or an epoch, from 0 on; also a fraction of one.

        Raises:
            OptionError: it is below 0, or no number.
        """
        if isinstance(step, bool) or not isinstance(step, int | float) or not step >= 0:
            raise OptionError(f"a schedule is asked for a step from 0 on, not for {step!r}")
        return self.selectors[bisect.bisect_right(self.boundaries, step) - 1]

    def changes_at(self, step: float) -> bool:
        """Say whether an entry begins at this very step that is another than the one before; at 0, one does."""
        chosen = self(step)
        if step not in self.boundaries:
            return False
        place = self.boundaries.index(int(step))
        return place == 0 or chosen != self.selectors[place - 1]

    def __repr__(self) -> str:
        entries = zip(self.boundaries, self.selectors, strict=True)
        return f"schedule({{{', '.join(f'{step}: {_text(selector)}' for step, selector in entries)}}})"


def schedule(mapping: Mapping[int, Where | None]) -> Schedule:
    r"""Make a schedule of freezing: from each step (or epoch) on, what trains.

    Args:
        mapping: from the step at which an entry begins to a selector over paths, or None for nothing. One begins at 0.

    Returns:
        A pure function from the step to a selector; use it with `pf.repartition`, `pf.mask` or
        `pf.lightning.FunctionalFinetuning`.

    Raises:
        OptionError: there is no entry for step 0, or a step is no whole number from 0 on.
        SelectorError: an entry is no selector.

    Example:
        >>> import torch, peft_func as pf
        >>> head, last = pf.path(r".*head\..*"), pf.path(r".*blocks\.11\..*")
        >>> unfreeze = pf.schedule({0: head, 5: head | last, 10: ".*"})
        >>> unfreeze(7) == head | last, unfreeze.changes_at(7), unfreeze.changes_at(10)
        (True, False, True)
        >>> pf.schedule({0: None, 2: r"head\..*"})
        schedule({0: None, 2: 'head\\..*'})
    """
    if not isinstance(mapping, Mapping):
        raise OptionError(f"schedule takes a dict, such as {{0: 'head.*', 5: '.*'}}, not a {type(mapping).__name__}")
    for step in mapping:
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise OptionError(f"the entries of a schedule begin at whole steps from 0 on, not at {step!r}")
    if 0 not in mapping:
        raise OptionError(
            f"the schedule says nothing about step 0; it begins at {min(mapping, default=None)}: add {{0: ...}}, "
            "with None where nothing trains yet"
        )
    entries = sorted((step, Nothing() if where is None else as_selector(where)) for step, where in mapping.items())
    return Schedule(tuple(step for step, _ in entries), tuple(selector for _, selector in entries))


def leaves_for(adapter: Adapter, where: Where) -> Selector:
    r"""Select leaves of an adapter's tree by the base weights that they are for.

    A leaf is for the parameter, or an add-in for the module, under whose path it lies: `lora.0.weight.A` and
    `train.0.weight` are for `0.weight`. What several weights share (a group of GIFT) is for none of them; select it by
    its own path.

    Args:
        adapter: the bound adapter.
        where: a selector over the parameters of the model, as for a method; it sees their names, ties and modules.

    Returns:
        A selector of paths in the trees of this adapter, for `pf.partition`, `pf.schedule`, `pf.mask`, ...

    Raises:
        SelectorError: no weight of the adapter is selected.

    Example:
        >>> import torch, peft_func as pf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2))
        >>> adapter = pf.bind(pf.chain(pf.lora("0", rank=2), pf.train("2")), pf.functionalize(net))
        >>> pf.partition(adapter.init(0)[1], pf.leaves_for(adapter, "2"))[0].keys()
        dict_keys(['train'])
    """
    places = leaf_infos(adapter)
    known = {info.path: info for info in places.values()}
    chosen = set(resolve(where, known.values(), "leaves_for", "weights of the adapter"))
    return Exact(frozenset(path for path, info in places.items() if info.path in chosen))


def leaf_infos(adapter: Adapter) -> dict[str, Info]:
    """Return what is known of the parameter, or of the module, that each leaf of an adapter's tree is for."""
    if not isinstance(adapter, Adapter):
        raise OptionError(f"this takes a bound adapter, not a {type(adapter).__name__}; see pf.bind")
    infos: dict[str, Info | ModuleInfo] = {**adapter.model.infos}
    if adapter.arounds:
        infos |= walk(adapter.model._skeleton.root)
    found: dict[str, Info] = {}
    for part in adapter.parts:
        depth = len(part.keys)
        for keys in adapter.spec:
            if keys[:depth] == part.keys and keys[depth] in {*part.paths, *part.modules}:
                found[join(keys)] = infos[keys[depth]]  # type: ignore[assignment]  # selectors read both
    return found


def _text(selector: Selector) -> str:
    """Write a selector as a user would."""
    match selector:
        case Path(pattern=re.Pattern(pattern=str(word))):
            return repr(word)
        case AllOf(parts=parts):
            return " & ".join(map(_bracketed, parts))
        case AnyOf(parts=parts):
            return " | ".join(map(_text, parts))
        case Not(part=part):
            return f"~{_bracketed(part)}"
        case _:
            return repr(selector)


def _bracketed(selector: Selector) -> str:
    text = _text(selector)
    return f"({text})" if isinstance(selector, AllOf | AnyOf) else text
