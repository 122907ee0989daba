"""Leaves move between what is frozen and what trains, and the optimizer's moments follow."""

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from peft_func.errors import OptionError, TreeError
from peft_func.training.optimizer import Optimizer
from peft_func.training.schedule import Nothing
from peft_func.training.states import Zip
from peft_func.training.step import FunctionalOptimizer
from peft_func.trees.partition import combine, partition
from peft_func.trees.paths import Keys, Tree, join, leaves
from peft_func.trees.select import Info, Where, exact, resolve


def repartition(
    frozen: Mapping[str, Any],
    trainable: Mapping[str, Any],
    where: Where | None,
    state: Any = None,
    *,
    optimizer: Optimizer | FunctionalOptimizer | None = None,
) -> tuple[Tree, Tree, Any]:
    r"""Split two trees anew, and carry the optimizer's state over.

    The trees are those of `pf.partition`: of base weights, or of an adapter's tree (then `pf.combine` them for
    `adapter.apply`; the first tree of `adapter.init` stays out of it). To train a base weight under an adapter later,
    let `pf.train` hold it, and keep it frozen until then.

    Args:
        frozen: what did not train.
        trainable: what did.
        where: what shall train, a selector over the paths of both; None for nothing. See `pf.schedule`.
        state: the state of a functional optimizer for `trainable`.
        optimizer: what it is the state of, such as `pf.optimizer(torch.optim.AdamW)` or `torchopt.adamw(1e-3)`; its
            `init` gives the state of what is new. Without a `state`, all is new.

    Returns:
        `(frozen, trainable, state)`. The leaves are the very tensors of the input; so are, in `state`, the moments and
        counts of what stays, and what all leaves share. What freezes loses its state (to keep that, see `pf.hold`).
        Where nothing trains, or no optimizer is given, the state is None. torchopt counts the steps of a rate's
        schedule for each leaf, so what joins is at its beginning; for one rate, make the optimizer anew with the rate
        of the step.

    Raises:
        TreeError: a leaf is in both trees, or the state is not that of `optimizer` for `trainable`.
        SelectorError: nothing is selected; say None if that is meant.
        OptionError: there is a state and no functional optimizer.

    Example:
        >>> import torch, peft_func as pf
        >>> params = {"body.weight": torch.ones(2, 2), "head.weight": torch.ones(1, 2)}
        >>> unfreeze, adamw = pf.schedule({0: r"head\..*", 3: ".*"}), pf.optimizer(torch.optim.AdamW, lr=1e-3)
        >>> frozen, trainable, state = pf.repartition(params, {}, unfreeze(0), optimizer=adamw)
        >>> list(trainable), list(frozen)
        (['head.weight'], ['body.weight'])
        >>> frozen, trainable, state = pf.repartition(frozen, trainable, unfreeze(3), state, optimizer=adamw)
        >>> list(state["exp_avg"])
        ['body.weight', 'head.weight']
    """
    whole = combine(frozen, trainable)
    chosen, rest = partition(whole, exact(chosen_paths(whole, where, "repartition")))
    if optimizer is None:
        if state is not None:
            raise OptionError("what is new needs a state of the optimizer: repartition(..., state, optimizer=...)")
        return rest, chosen, None
    if not callable(getattr(optimizer, "init", None)):
        raise OptionError(
            f"optimizer is a functional one, with init(tree), not a {type(optimizer).__name__}; write "
            "pf.optimizer(torch.optim.AdamW, lr=1e-3)"
        )
    if not chosen:
        return rest, chosen, None
    fresh = optimizer.init(chosen)
    return rest, chosen, fresh if state is None else _carried(fresh, state, chosen, trainable)


def chosen_paths(tree: Mapping[str, Any], where: Where | None, purpose: str) -> tuple[str, ...]:
    """Return the paths that are selected in a tree; none only where that is meant.

    Raises:
        SelectorError: nothing is selected.
    """
    if where is None or isinstance(where, Nothing):
        return ()
    infos = (Info(join(keys), tuple(leaf.shape), leaf.dtype) for keys, leaf in leaves(tree))
    return resolve(where, infos, purpose, "leaves")


def _carried(fresh: Any, state: Any, chosen: Tree, trained: Mapping[str, Any]) -> Any:
    now, before = ({keys for keys, _ in leaves(tree)} for tree in (chosen, trained))

    def by_leaf(keys: Keys, new: Tensor | None, old: Tensor | None) -> Tensor:
        if old is None and keys in before:
            raise TreeError(f"the state has nothing for {join(keys)!r}, which trained; pass the state of the last step")
        return cast("Tensor", new if old is None else old)

    def shared(new: Any, old: Any) -> Any:
        return old

    return Zip(by_leaf, shared, now, before)(fresh, state)
