"""What is added to activations at a module M: y = M(x) + d(M(x)), y = M(x) + d(x), or y = M(x + d(M(x))).

The function d, with the tensors of its place, is a *change*: `(tree, h, inner) -> what is added`, h being a tensor
whose last axis holds the features. Bottlenecks are changes, and so are averages and fusions of changes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from peft_func.addins.around import SHARED, Init, nothing
from peft_func.addins.place import Place, place_at
from peft_func.addins.values import main, main_argument, with_main, with_main_argument
from peft_func.errors import AddinError, OptionError
from peft_func.functional.model import FunctionalModel
from peft_func.functional.surround import Inner
from peft_func.transforms.transform import Part, Transform, check_name
from peft_func.trees.keys import split
from peft_func.trees.paths import Tree
from peft_func.trees.select import Where
from peft_func.weights.around import Site, at
from peft_func.weights.mapping import Weights

Change: TypeAlias = Callable[[Mapping[str, Any], Tensor, Inner], Tensor]
"""What is added: `(tree, h, inner) -> tensor`."""

FORMS = ("sequential", "parallel", "norm")
"""Where it is added, and what it is computed from: the three equations above, in order."""


@dataclass(frozen=True)
class Adds:
    """The function of an around that runs a module with a change.

    Attributes:
        form: one of `FORMS`.
        change: what is added.
    """

    form: str
    change: Change

    def __call__(self, tree: Tree, inner: Inner, *args: Any, **kwargs: Any) -> Any:
        """Run the module with the change."""
        if self.form == "parallel":
            added = self.change(tree, main_argument(args, kwargs), inner)  # first: the module may write into its input
            output = inner(*args, **kwargs)
            return with_main(output, main(output) + added)
        output = inner(*args, **kwargs)
        h = main(output)
        added = self.change(tree, h, inner)
        if self.form == "sequential":
            return with_main(output, h + added)
        args, kwargs = with_main_argument(args, kwargs, main_argument(args, kwargs) + added)
        return inner(*args, **kwargs)


def adding(
    where: Where,
    change: Change,
    init: Init,
    form: str,
    *,
    name: str,
    kind: str,
    options: dict[str, Any],
    shared: Callable[[Sequence[Place], int], Tree] | None = None,
) -> Part:
    """Make the part of a chain that adds a change at modules.

    Args:
        where: a selector over modules.
        change: what is added.
        init: the first values of the tree of a place.
        form: one of `FORMS`.
        name: the sub-tree.
        kind: the name of the constructor, for files.
        options: its options as JSON.
        shared: `(places, key) -> tree`: leaves that all places have in common, under `"shared"`.
    """

    def make(paths: tuple[str, ...], model: FunctionalModel) -> Transform:
        places = [place_at(model, path) for path in paths]
        if shared is not None and SHARED in paths:
            raise OptionError(f"{name}: a module named {SHARED!r} cannot be a place: the tree has shared leaves there")

        def draw(weights: Weights, key: int) -> Tree:
            common = {} if shared is None else {SHARED: shared(places, split(key, SHARED))}
            return common | {place.path: dict(init(place, split(key, place.path))) for place in places}

        function = Adds(form, change)
        common = () if shared is None else (SHARED,)
        sites = (Site(place.path, function, name, at(*common, place.path)) for place in places)
        return Transform(draw, nothing, sites=tuple(sites))

    return Part(where, make, check_name(name), kind, options, modules=True)


def check_features(h: Tensor, width: int, inner: Inner) -> None:
    """Refuse an activation of another width than a change was made for.

    Raises:
        AddinError: names the place and both widths.
    """
    if h.shape[-1] != width:
        raise AddinError(
            f"at {inner.path!r} an activation has {h.shape[-1]} features, and the add-in was made for {width}; "
            f"give width={h.shape[-1]}"
        )


def change_of(site: Site) -> Change:
    """Return the change at a site that `adding` made."""
    assert isinstance(site.function, Adds)
    return site.function.change
