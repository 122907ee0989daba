"""The names and the config that HF PEFT has for one of our adapters."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from peft_func.errors import FileFormatError, OptionError
from peft_func.interop.patterns import Pattern
from peft_func.interop.peft_config import DEFAULTS, describe
from peft_func.interop.peft_method import PlainLora, plain_lora
from peft_func.interop.peft_names import bias_name, factor_names, module_names, obstacle
from peft_func.interop.peft_plan import all_biases, under
from peft_func.transforms.bind import Adapter
from peft_func.trees.paths import Keys
from peft_func.weights.layout import Storage

_HOLDS = "pf.save(path, adapter, trainable) holds it as it is"


class Export(NamedTuple):
    """What to write.

    Attributes:
        names: the name in the file of every leaf, and whether the transpose is written.
        config: the JSON object.
    """

    names: dict[Keys, tuple[str, bool]]
    config: dict[str, Any]


def export(adapter: Adapter, config: Mapping[str, Any] | None = None) -> Export:
    """Give an adapter PEFT's names and config.

    Args:
        adapter: one `lora`, and `train` of whole modules or of biases.
        config: fields to keep; those that say what the adapter is are kept only if they say this one.

    Raises:
        OptionError: PEFT's format cannot hold the adapter.
    """
    model, method = adapter.model, plain_lora(adapter)
    modules = {path: path.rpartition(".")[0] for path in method.places}
    names: dict[Keys, tuple[str, bool]] = {}
    for path, module in modules.items():
        _check_place(path, module, adapter)
        for leaf, entry in factor_names(module, model).items():
            names[method.keys[path, leaf]] = entry
    for path in (*method.biases, *method.saved):
        if model.infos[path].aliases:
            raise OptionError(_tied(path, adapter))
        names[method.keys[path, "own"]] = (bias_name(path, set(modules.values())), False)
    bias, saved = _trained(method, modules.values(), adapter)
    derived = _derived(method, modules, adapter) | {"bias": bias, "modules_to_save": saved}
    return Export(names, _merged(config or {}, derived, method, modules, adapter))


def _check_place(path: str, module: str, adapter: Adapter) -> None:
    model = adapter.model
    if not module or path != f"{module}.weight":
        raise OptionError(f"PEFT adapts the weights of modules inside a module, and {path!r} is none; {_HOLDS}")
    if model.infos[path].aliases:
        raise OptionError(_tied(path, adapter))
    reason = obstacle(module, path, model)
    if reason is not None:
        raise OptionError(f"{path!r} cannot be saved for PEFT: {reason}; {_HOLDS}")


def _tied(path: str, adapter: Adapter) -> str:
    return (
        f"{path!r} has further names ({', '.join(adapter.model.infos[path].aliases)}), and PEFT would change what one "
        f"of them does only; {_HOLDS}, and pf.merge(adapter.apply(frozen, trainable)) gives plain weights"
    )


def _trained(method: PlainLora, adapted: Iterable[str], adapter: Adapter) -> tuple[str, list[str] | None]:
    """Return PEFT's `bias` and `modules_to_save` for the parameters that train themselves.

    Raises:
        OptionError: they are neither whole modules nor biases as PEFT trains them.
    """
    model, saved = adapter.model, set(method.saved)
    bias = "lora_only" if method.biases else "none"
    if not saved:
        return bias, None
    modules = sorted({path.rpartition(".")[0] for path in saved})
    taken = set(under(modules, model).values()) if all(modules) else set()
    if taken == saved and not any(module in modules for module in adapted):
        return bias, modules
    if saved.union(method.biases) == set(all_biases(model)):
        return "all", None
    odd = sorted(taken - saved) or sorted(saved)
    raise OptionError(
        "PEFT trains whole modules (modules_to_save, by the ends of their paths), the biases of the adapted modules "
        f"(pf.lora(bias=True)) or all biases; with {', '.join(sorted(saved)[:3])} it would train "
        f"{', '.join(odd[:3])} too, or cannot name them; {_HOLDS}"
    )


def _derived(method: PlainLora, modules: Mapping[str, str], adapter: Adapter) -> dict[str, Any]:
    alpha = method.options["alpha"]
    alpha = method.rank if alpha is None else alpha
    return {
        "peft_type": "LORA",
        "r": method.rank,
        "lora_alpha": alpha,
        "lora_dropout": method.options["dropout"],
        "use_rslora": method.options["rank_stabilized"],
        "rank_pattern": _by_module(method.ranks, method.rank, modules),
        "alpha_pattern": _by_module(method.alphas, alpha, modules),
        "target_modules": targets(modules.values(), module_names(adapter.model)),
        "init_lora_weights": "gaussian" if method.options["init"] == "gaussian" else True,
        # PEFT warns where this is not what the layers are; it is one flag for all of them.
        "fan_in_fan_out": any(adapter.model.layouts[path].storage is Storage.TRANSPOSED for path in modules),
    }


def _by_module(values: Mapping[str, float], default: float, modules: Mapping[str, str]) -> dict[str, float]:
    return {f"^{re.escape(modules[path])}": value for path, value in values.items() if value != default}


def targets(wanted: Iterable[str], every: Iterable[str]) -> list[str] | str:
    """Return the shortest `target_modules` that chooses these modules alone: last names, paths, or a regex."""
    wanted, every = set(wanted), set(every)
    for names in ({module.rpartition(".")[2] for module in wanted}, wanted):
        if {module for module in every if _listed(module, names)} == wanted:
            return sorted(names)
    return "|".join(map(re.escape, sorted(wanted)))


def _listed(module: str, names: Iterable[str]) -> bool:
    parts = module.split(".")
    return any(".".join(parts[start:]) in names for start in range(len(parts)))


def _merged(
    config: Mapping[str, Any],
    derived: Mapping[str, Any],
    method: PlainLora,
    modules: Mapping[str, str],
    adapter: Adapter,
) -> dict[str, Any]:
    """Return the given config where it says this adapter, and with what says it replaced where it does not."""
    if config and _says(config, derived, method, modules, adapter):
        return dict(config)
    rest = {"exclude_modules": None} if config.get("exclude_modules") else {}
    places = {"layers_to_transform": None, "layers_pattern": None}
    merged = {**DEFAULTS, **config, **rest, **places, **derived}
    try:
        describe(merged, "config", ignore=config.keys())
    except FileFormatError as error:
        raise OptionError(f"the given config does not go with a plain LoRA: {error}") from None
    return merged


def _says(
    config: Mapping[str, Any],
    derived: Mapping[str, Any],
    method: PlainLora,
    modules: Mapping[str, str],
    adapter: Adapter,
) -> bool:
    try:
        given = describe(config, "config", ignore=config.keys())
        pattern = config.get("target_modules")
        regex = Pattern(pattern, "target_modules") if isinstance(pattern, str) else None
    except FileFormatError:
        return False
    if any(given.rank_of(m) != method.ranks[p] or given.alpha_of(m) != method.alphas[p] for p, m in modules.items()):
        return False
    if given.rank_stabilized != derived["use_rslora"] or given.dropout != derived["lora_dropout"]:
        return False
    saved = set(under((*given.modules_to_save, *given.heads), adapter.model).values())
    if given.bias != derived["bias"] or saved != (set(method.saved) if given.bias != "all" else set()):
        return False
    chosen = {
        module
        for module in module_names(adapter.model)
        if (regex.fullmatch(module) if regex else _listed(module, pattern or ()))
    }
    narrowed = config.get("exclude_modules") or config.get("layers_to_transform") is not None
    return chosen >= set(modules.values()) if narrowed else chosen == set(modules.values())
