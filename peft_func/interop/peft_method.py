"""Our adapter as HF PEFT sees it: one LoRA, and parameters that train themselves."""

from dataclasses import dataclass
from typing import Any

from peft_func.errors import OptionError
from peft_func.transforms.bind import Adapter
from peft_func.trees.paths import Keys, join


@dataclass(frozen=True)
class PlainLora:
    """One `lora` and any number of `train`, bound.

    Attributes:
        keys: the leaf of the adapter's tree for each `(parameter, "A")`, `(parameter, "B")` and `(parameter, "own")`.
        places: the adapted parameters.
        biases: the biases that train with them.
        saved: the other parameters that train themselves.
        rank: the LoRA's option.
        ranks: by parameter.
        alphas: likewise.
        options: its other options.
    """

    keys: dict[tuple[str, str], Keys]
    places: tuple[str, ...]
    biases: tuple[str, ...]
    saved: tuple[str, ...]
    rank: int
    ranks: dict[str, int]
    alphas: dict[str, float]
    options: dict[str, Any]


def plain_lora(adapter: Adapter) -> PlainLora:
    """Describe an adapter as a plain LoRA.

    Raises:
        OptionError: it has another part than one `lora` and `train`, or convolutions in a view that PEFT has not.
    """
    loras = [part for part in adapter.parts if part.part.kind == "lora"]
    for part in adapter.parts:
        if part.part.kind not in ("lora", "train"):
            what = part.part.kind or "a method of your own"
            raise OptionError(
                f"the part {join(part.keys)!r} of this adapter is {what}, which PEFT's format for LoRA cannot hold: it "
                "holds one pf.lora and the weights of pf.train; pf.save(path, adapter, trainable) holds every method"
            )
    if len(loras) != 1:
        names = ", ".join(join(part.keys) for part in loras) or "none"
        raise OptionError(
            f"PEFT's format holds one pf.lora; this adapter has {len(loras)} ({names}); "
            "pf.save(path, adapter, trainable) holds them all"
        )
    (lora,) = loras
    options = dict(lora.options or {})
    seen = [path for path in lora.paths if adapter.model.layouts[path].is_conv and options["conv"] != "factored"]
    if seen:
        raise OptionError(
            f"{join(lora.keys)!r} sees the convolution {seen[0]!r} as conv={options['conv']!r}, and PEFT's format "
            "holds conv='factored' only; pf.save(path, adapter, trainable) holds every view"
        )
    ranks = {path: options["rank_pattern"].get(path, options["rank"]) for path in lora.paths}
    alphas = {
        path: options["alpha_pattern"].get(path, rank if options["alpha"] is None else options["alpha"])
        for path, rank in ranks.items()
    }
    biases = tuple(path for path in lora.seen if path not in ranks)
    keys = {(path, leaf): (*lora.keys, path, leaf) for path in lora.paths for leaf in ("A", "B")}
    keys |= {(path, "own"): (*lora.keys, path, "bias") for path in biases}
    saved = {path: (*part.keys, path) for part in adapter.parts if part is not lora for path in part.paths}
    keys |= {(path, "own"): own for path, own in saved.items()}
    return PlainLora(keys, lora.paths, biases, tuple(saved), options["rank"], ranks, alphas, options)
