"""What selectors see of the parameters of a whole module, adapters in it included."""

from dataclasses import replace

from torch import nn

from peft_func.training.adapted import Adapted
from peft_func.training.schedule import leaf_infos
from peft_func.trees.select import Info


def infos_of(module: nn.Module) -> dict[str, Info]:
    """Return what is known of every parameter that could train, by its name in `named_parameters()`.

    A leaf of an adapter is taken for a parameter of the module whose weight it is for: `pf.of_type` and `pf.norms` see
    through `pf.Adapted`.
    """
    names: dict[int, list[str]] = {}
    kinds: dict[int, list[type]] = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        for name, parameter in owner.named_parameters(recurse=False):
            names.setdefault(id(parameter), []).append(f"{path}.{name}" if path else name)
            kinds.setdefault(id(parameter), []).append(type(owner))
    found = {
        name: Info(
            path=name,
            shape=tuple(parameter.shape),
            dtype=parameter.dtype,
            modules=tuple(dict.fromkeys(kinds[id(parameter)])),
            aliases=tuple(other for other in names[id(parameter)] if other != name),
        )
        for name, parameter in module.named_parameters()
        if parameter.is_floating_point() or parameter.is_complex()
    }
    for path, part in module.named_modules():
        if isinstance(part, Adapted):
            for leaf, info in leaf_infos(part.adapter).items():
                name = f"{path}.{leaf}" if path else leaf
                if name in found:
                    found[name] = replace(found[name], modules=info.modules)
    return found
