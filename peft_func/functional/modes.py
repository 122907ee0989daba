"""Train mode and eval mode, for some modules of a model only."""

from peft_func.functional.model import FunctionalModel
from peft_func.functional.walk import resolve_modules
from peft_func.trees.select import Where


def with_modes(model: FunctionalModel, where: Where, training: bool = False) -> FunctionalModel:
    """Return a new callable in which some modules, and all within them, are in eval mode (or in train mode).

    A BatchNorm in eval mode normalises with its stored statistics and leaves them as they are, whatever the mode of the
    modules around it; a Dropout does nothing. The others keep their modes. A BatchNorm that should normalise with the
    batch and still keep its statistics stays in train mode: drop the state that `with_state` returns.

    Args:
        model: what `pf.functionalize` returned, or its `train()`; a later `train()` or `eval()` sets all modes anew.
        where: a selector over modules: a regex over their whole paths, `pf.of_type(nn.BatchNorm2d)`, `pf.norms()`.
        training: the mode of the chosen modules.

    Raises:
        SelectorError: nothing is selected.

    Example:
        >>> import torch, peft_func as pf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.1))
        >>> model = pf.with_modes(pf.functionalize(net).train(), pf.norms())
        >>> _, state = model.with_state(model.params, model.state, torch.randn(8, 4))
        >>> torch.equal(state["1.running_mean"], model.state["1.running_mean"])
        True
    """
    root = model._skeleton.copy()
    for path in resolve_modules(where, model, "with_modes"):
        root.get_submodule(path).train(training)
    return FunctionalModel(root, model.params, model.state, model._entry, model.hosts)
