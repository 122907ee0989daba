"""The names in a checkpoint of the original GIFT, and what they stand for in a model.

    in_projections.<target>.weight [rank, in]     phi, transposed        in_projections.<target>.bias [rank]   phi_bias
    out_projections.<target>.weight [in, rank]    psi, transposed        out_projections.<target>.bias [in]    psi_bias
    hypernets.<target>.blocks.0.mlp.fc1.weight    blocks.0.mlp.fc1.weight, and so on (see `gift_blocks`)
    backbone.<parameter>                          those with `head`, or `classifier`, in their names, which train

A target is the end of a module's path, with `:` for its dots (`attn:proj`); or `shared_projection` for all targets.
"""

from collections.abc import Mapping

from torch import nn

from peft_func.errors import OptionError
from peft_func.functional.model import FunctionalModel
from peft_func.transforms.bind import Adapter, BoundPart
from peft_func.transforms.gift_groups import base_groups
from peft_func.trees.paths import Keys
from peft_func.trees.select import Selector, exact

SHARED = "shared_projection"
"""The target that stands for all of them."""

_HEADS = ("head", "classifier")
_MODULES = {"phi": "in_projections", "psi": "out_projections"}


def places_of(target: str, model: FunctionalModel, layers: Selector | None) -> list[str]:
    """Return the weights of a target, by their rule: those of linear modules whose paths end in it, after a dot."""
    found = []
    for name, info in model.infos.items():
        owners = (owner.rpartition(".weight")[0] for owner in (name, *info.aliases) if owner.endswith(".weight"))
        linear = info.ndim == 2 and any(issubclass(kind, nn.Linear) for kind in info.modules)
        if linear and any(owner.endswith(f".{target}") for owner in owners) and (layers is None or layers(name, info)):
            found.append(name)
    return found


def heads_of(model: FunctionalModel) -> list[dict[str, str]]:
    """Return the parameters that a wrapper would save with its head: for each word, their names in it to ours."""
    names = {name: name for name in model.params} | dict(model.ties)
    return [{name: own for name, own in names.items() if word in name} for word in _HEADS]


def parts_of(adapter: Adapter) -> tuple[BoundPart, Keys | None]:
    """Return the part of an adapter that is GIFT, and the keys of the one that trains a head.

    Raises:
        OptionError: there are others, or it is one that their wrappers cannot hold.
    """
    kinds = [part.part.kind for part in adapter.parts]
    if sorted(map(str, kinds)) not in (["gift"], ["gift", "train"]):
        raise OptionError(f"a checkpoint of GIFT holds one pf.gift, and a head that trains; this adapter has {kinds}")
    part = adapter.parts[kinds.index("gift")]
    if (part.options or {}).get("chunks"):
        raise OptionError("the original GIFT cannot run fused weights in chunks; there is no checkpoint of them")
    if "train" not in kinds:
        return part, None
    head = adapter.parts[kinds.index("train")]
    complete = [set(names.values()) for names in heads_of(adapter.model)]
    if set(head.paths) not in complete:
        raise OptionError(
            f"a checkpoint of GIFT holds every parameter with 'head', or with 'classifier', in its name; this adapter "
            f"trains {', '.join(head.paths[:5])}. Save it with pf.save"
        )
    return part, head.keys


def targets_of(part: BoundPart, model: FunctionalModel, layers: Selector | None) -> dict[str, str]:
    """Return the target of every group.

    Raises:
        OptionError: there is none whose modules are those of the group.
    """
    share = (part.options or {})["share"]
    if isinstance(share, Mapping):
        share = {group: exact(paths) for group, paths in share.items()}
    groups = base_groups("gift", part.paths, share, model)
    targets: dict[str, str] = {}
    for group in dict.fromkeys(groups.values()):
        places = [path for path, own in groups.items() if own == group]
        if len({model.params[path].shape for path in places}) > 1 and share != "all":
            raise OptionError(f"the layers of one target of GIFT are of one shape; those of {group!r} are not")
        first = places[0].removesuffix(".weight").split(".")
        names = [group, *(".".join(first[i:]) for i in range(len(first) - 1, -1, -1))]
        fitting = (name for name in names if set(places_of(name, model, layers)) == set(places))
        target = SHARED if share == "all" else next(fitting, None)
        if target is None:
            raise OptionError(
                f"a target of GIFT is all linear modules whose paths end alike, in all layers or in layers=...; the "
                f"group {group!r} is {', '.join(places[:4])}. Save it with pf.save"
            )
        targets[group] = target.replace(".", ":")
    return targets


def names_of(
    keys: Keys, part: Keys, targets: Mapping[str, str], model: FunctionalModel, held: Keys | None
) -> list[tuple[str, bool]]:
    """Return the names of a leaf in the file, and whether it stands there transposed."""
    if keys[: len(part)] != part:
        (name,) = keys[len(held or ()) :]
        known = next(names for names in heads_of(model) if name in names.values())
        return [(f"backbone.{other}", False) for other, own in known.items() if own == name]
    group, leaf, *rest = keys[len(part) :]
    if leaf == "blocks":
        return [(".".join(["hypernets", targets[group], leaf, *rest]), False)]
    kind = "bias" if leaf.endswith("_bias") else "weight"
    return [(f"{_MODULES[leaf.removesuffix('_bias')]}.{targets[group]}.{kind}", kind == "weight")]
