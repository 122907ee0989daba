"""Presets of groups: LoRA+, no decay on biases and norms, smaller rates for earlier layers.

Each is a function of the leaves to rules, which `pf.groups` and `pf.optimizer` apply to what their selectors gave: they
combine, and a plain function of the same form is a preset as well.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from peft_func.errors import OptionError, SelectorError, TreeError
from peft_func.functional.model import FunctionalModel
from peft_func.training.groups import Options, Preset, Rule
from peft_func.training.norms import norms
from peft_func.training.schedule import leaf_infos
from peft_func.transforms.bind import Adapter
from peft_func.trees.paths import join
from peft_func.trees.select import Info, Where, resolve


def lora_plus(
    ratio: float = 16.0,
    adapter: Adapter | FunctionalModel | None = None,
    *,
    where: Where = ("B",),
    embedding_rate: float | None = 1e-6,
) -> Preset:
    """LoRA+: the rate of B is `ratio` times that of A.

    Hayou et al., arXiv 2402.12354. As in the authors' code and in PEFT's `create_loraplus_optimizer`, vectors (biases
    and norms that train) have the rate of B, and adapters of embeddings a fixed one. PEFT's also decays no bias and no
    norm: `groups=[pf.lora_plus(16, adapter), pf.no_decay(adapter)]`.

    Args:
        ratio: of the rates, B's over A's.
        adapter: whose leaves they are; not needed where a module is grouped.
        where: which leaves are B.
        embedding_rate: the rate of adapters of embeddings; None treats them as any other.

    Returns:
        A preset for `pf.groups` and `pf.optimizer`; grouping raises SelectorError if no leaf is a B.

    Example:
        >>> import torch, peft_func as pf
        >>> adapter = pf.bind(pf.lora("weight", rank=2), pf.functionalize(torch.nn.Linear(4, 4)))
        >>> parts = pf.groups(adapter.init(0)[1], pf.lora_plus(16, adapter), lr=1e-4)
        >>> [(part["param_names"], part["lr"]) for part in parts]
        [(['lora.weight.B'], 0.0016), (['lora.weight.A'], 0.0001)]
    """
    _check_positive("lora_plus", "ratio", ratio)
    if embedding_rate is not None:
        _check_positive("lora_plus", "embedding_rate", embedding_rate)

    def rules(infos: Sequence[Info]) -> list[Rule]:
        known = _known(infos, adapter, "lora_plus")
        chosen = {*resolve(where, known, "lora_plus", "leaves"), *(info.path for info in known if info.ndim == 1)}
        tables = {
            info.path
            for info in known
            if embedding_rate is not None
            and info.path.rpartition(".")[2] in {"A", "B"}
            and any(issubclass(kind, nn.Embedding) for kind in info.modules)
        }
        found: list[tuple[set[str], Options]] = [
            (tables, {"lr": embedding_rate}),
            (chosen - tables, {"lr": lambda rate: rate * ratio}),
        ]
        return [(_exactly(paths), options) for paths, options in found if paths]

    return rules


def no_decay(adapter: Adapter | FunctionalModel | None = None) -> Preset:
    """No weight decay on biases and on the parameters of norms.

    A norm is what `pf.norms` takes for one, a bias a parameter whose name has `bias` in it.

    Args:
        adapter: whose leaves they are, or the functional model; not needed where a module is grouped.

    Returns:
        A preset for `pf.groups` and `pf.optimizer`.

    Example:
        >>> import torch, peft_func as pf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
        >>> parts = pf.groups(net, pf.no_decay(), weight_decay=0.1)
        >>> [(part["param_names"], part["weight_decay"]) for part in parts]
        [(['0.bias', '1.weight', '1.bias'], 0.0), (['0.weight'], 0.1)]
    """

    def rules(infos: Sequence[Info]) -> list[Rule]:
        is_norm = norms()
        chosen = {
            info.path
            for info in _known(infos, adapter, "no_decay")
            if "bias" in info.path.rpartition(".")[2] or is_norm(info.path, info)
        }
        return [(_exactly(chosen), {"weight_decay": 0.0})] if chosen else []

    return rules


def layer_decay(decay: float, *, depth: int | None = None, embeddings: Where | None = None) -> Preset:
    """Smaller rates for earlier layers: `rate * decay ** (depth - layer)`, layers counted from 0.

    ELECTRA (Clark et al., arXiv 2003.10555), BEiT (Bao et al., arXiv 2106.08254). The layer of a leaf is the first
    number in its path, as for `pf.index`; what has no number, such as a head, has the full rate.

    Args:
        decay: the factor from a layer to the one before, above 0 and at most 1.
        depth: how many layers the model has; 1 + the largest number by default.
        embeddings: what comes before layer 0: its rate is `rate * decay ** (depth + 1)`.

    Returns:
        A preset for `pf.groups` and `pf.optimizer`; grouping raises SelectorError if no path has a number, and
        OptionError if a layer is beyond the depth.

    Example:
        >>> import torch, peft_func as pf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
        >>> [part["lr"] for part in pf.groups(net, pf.layer_decay(0.5), lr=1.0)]
        [0.25, 0.5]
    """
    _check_positive("layer_decay", "decay", decay)
    if decay > 1:
        raise OptionError(f"layer_decay: decay={decay!r}; the factor from a layer to the one before is at most 1")

    def rules(infos: Sequence[Info]) -> list[Rule]:
        first = set() if embeddings is None else {*resolve(embeddings, infos, "layer_decay", "leaves")}
        layers: dict[int, set[str]] = {}
        for info in infos:
            number = next(filter(str.isdecimal, info.path.split(".")), None)
            if number is not None and info.path not in first:
                layers.setdefault(int(number), set()).add(info.path)
        if not layers:
            raise SelectorError(f"layer_decay: no path has a number: {', '.join(i.path for i in infos[:3])}, ...")
        count = 1 + max(layers) if depth is None else depth
        if max(layers) >= count:
            raise OptionError(f"layer_decay: depth={depth!r}, but there is a layer {max(layers)}, counted from 0")
        powers = [(first, count + 1), *((layers[layer], count - layer) for layer in sorted(layers))]
        return [
            (_exactly(paths), {"lr": lambda rate, power=power: rate * decay**power}) for paths, power in powers if paths
        ]

    return rules


def _known(infos: Sequence[Info], adapter: Adapter | FunctionalModel | None, purpose: str) -> list[Info]:
    """Return the leaves with the classes of the modules that they are for, and their shapes in one member."""
    if adapter is None:
        if not all(info.modules for info in infos):
            raise OptionError(
                f"{purpose} must know the modules that the leaves are for, and a tree does not say: write "
                f"pf.{purpose}(..., adapter=adapter), or group a module"
            )
        return list(infos)
    if not isinstance(adapter, Adapter | FunctionalModel):
        raise OptionError(f"{purpose} takes the bound adapter or the functional model, not a {type(adapter).__name__}")
    own = dict(adapter.infos) if isinstance(adapter, FunctionalModel) else {}
    if isinstance(adapter, Adapter):
        places = leaf_infos(adapter)
        for keys, shape in adapter.spec.items():
            place = places.get(join(keys))
            # An add-in is beside a module, and its leaves are none of the module's own.
            modules = place.modules if isinstance(place, Info) else ()
            own[join(keys)] = Info(join(keys), shape, infos[0].dtype, modules)
    for info in infos:
        if info.path not in own:
            raise TreeError(f"{purpose}: the adapter has no leaf {info.path!r}; give the one whose tree this is")
    return [own[info.path] for info in infos]


def _exactly(paths: set[str]) -> Where:
    return lambda path, info: path in paths


def _check_positive(purpose: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise OptionError(f"{purpose}: {name}={value!r}; it is a finite number above 0")
