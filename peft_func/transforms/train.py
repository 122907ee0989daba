"""Full tuning of what is selected: a weight that trains moves to the trainable tree, and is absent from the frozen one.

BitFit (Ben Zaken et al., arXiv 2106.10199) and norm tuning are two of its uses:

    pf.train(r".*bias")                                        # BitFit
    pf.train(pf.of_type(nn.LayerNorm, nn.BatchNorm2d))         # norms
"""

from peft_func.functional.model import FunctionalModel
from peft_func.transforms.transform import Changes, Part, Transform, check_name
from peft_func.trees.paths import Tree
from peft_func.trees.select import Where
from peft_func.weights.mapping import Weights


def train(where: Where, *, name: str = "train") -> Part:
    r"""Train the selected parameters themselves.

    The part holds them: their values are base weights for every other part of a chain, before it or behind it.

    Args:
        where: a selector over all parameters, biases and norms included.
        name: the sub-tree; `trainable[name][path]` is a copy of the parameter, in its shape and dtype.

    Raises:
        SelectorError: at `bind`, if nothing is selected.

    Example:
        >>> import torch, peft_func as pf
        >>> model = pf.functionalize(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)))
        >>> frozen, trainable = pf.bind(pf.train(r".*bias"), model).init(0)
        >>> list(trainable["train"])
        ['0.bias', '1.bias']
    """

    def make(paths: tuple[str, ...], model: FunctionalModel) -> Transform:
        return Transform(init=_values, apply=_nothing, holds=dict)

    return Part(where, make, check_name(name), kind="train", options={}, matrices=False)


def _values(weights: Weights, key: int) -> Tree:
    return {path: weights.base[path] for path in weights}


def _nothing(tree: Tree, weights: Weights) -> Changes:
    return {}
