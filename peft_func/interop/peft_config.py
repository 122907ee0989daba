"""HF PEFT's `adapter_config.json`: read, checked, and described as options of `pf.lora`; and written.

What a field means is as in PEFT 0.21: scale `lora_alpha / r` (or `/ sqrt(r)`), with rank and alpha of a module from the
first pattern that matches the end of its path. Where the adapters are is told by the tensors, not by the config.
"""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from peft_func.errors import FileFormatError
from peft_func.interop.patterns import Pattern, first_match

CONFIG = "adapter_config.json"
LARGEST = 8 * 2**20  # bytes; one with a pattern for each of thousands of modules has some hundred thousand

MERGE = "load it with PEFT, merge it (merge_and_unload), and functionalize the merged model"

DEFAULTS: dict[str, Any] = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "task_type": None,
    "use_rslora": False,
}
"""What every PEFT since 0.9 knows; the fields that it leaves out are off in every version that has them."""

# Where and how it was trained, and for what: none of these changes what the tensors of a plain LoRA stand for.
_NEUTRAL = {*DEFAULTS, "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "loftq_config"} | {
    *("lora_ga_config", "megatron_core", "peft_version", "qalora_group_size"),
}

_VARIANTS = {
    "alora_invocation_tokens": "activated LoRA, which acts on some tokens only",
    "arrow_config": "Arrow, which routes between adapters",
    "kasa_config": "KaSA, which changes the base weights",
    "layer_replication": "replicated layers, which this model has not",
    "lora_bias": "biases inside the adapters (lora_B.bias)",
    "megatron_config": "Megatron's parallel layers",
    "monteclora_config": "Monte Carlo LoRA",
    "target_parameters": "parameters that are no module's weight, of which the file does not say which they are",
    "trainable_token_indices": "single trained rows of an embedding",
    "use_bdlora": "block-diagonal factors",
    "use_dora": "DoRA (weights with a trained magnitude)",
    "use_qalora": "QA-LoRA, whose inputs are pooled",
    "velora_config": "VeLoRA, which changes the backward pass",
}

# These leave the base weights as they are; pissa, olora, corda, loftq and lora_ga take something out of them.
_INITS = (True, False, "gaussian", "orthogonal", "eva", "mica")

_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""The modules that PEFT trains for a task without being asked."""


@dataclass(frozen=True)
class Described:
    """A plain LoRA, as a config tells it.

    Attributes:
        place: the file, for messages.
        rank: the rank where no pattern gives another.
        alpha: likewise.
        rank_stabilized: whether the scale is `alpha / sqrt(rank)`.
        dropout: on the inputs of the adapters.
        gaussian: whether A was drawn from a normal distribution.
        bias: which biases train: `"none"`, `"lora_only"` or `"all"`.
        modules_to_save: the ends of the paths of the modules that train themselves.
        heads: further such modules, if the file holds them.
        rank_pattern: ranks by pattern.
        alpha_pattern: likewise.
    """

    place: str = field(compare=False)
    rank: int
    alpha: float
    rank_stabilized: bool
    dropout: float
    gaussian: bool
    bias: str
    modules_to_save: tuple[str, ...]
    heads: tuple[str, ...]
    rank_pattern: tuple[tuple[Pattern, int], ...]
    alpha_pattern: tuple[tuple[Pattern, float], ...]

    def rank_of(self, module: str) -> int:
        """Return the rank at a module."""
        return int(first_match(self.rank_pattern, module, self.rank))

    def alpha_of(self, module: str) -> float:
        """Return alpha at a module."""
        return first_match(self.alpha_pattern, module, self.alpha)


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config of a folder as JSON; it is checked by `describe`.

    Raises:
        FileFormatError: there is none, or it is too large or no JSON object.
    """
    path = folder / CONFIG
    if not folder.is_dir():
        raise FileFormatError(f"{folder} is no folder; a PEFT adapter is a local folder that holds {CONFIG}")
    if not path.is_file():
        raise FileFormatError(f"{folder} holds no file {CONFIG}, so it is no PEFT adapter")
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST + 1)
        config = json.loads(raw if len(raw) <= LARGEST else b"", parse_constant=_no_constant)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ValueError) and len(raw) > LARGEST:
            error = ValueError(f"it is larger than {LARGEST // 2**20} MiB, which no PEFT config is")
        raise FileFormatError(f"{path} cannot be read as JSON: {str(error)[:200]}") from error
    if not isinstance(config, dict):
        raise FileFormatError(f"{path} holds a {type(config).__name__}; a PEFT config is a JSON object")
    return config


def describe(config: Mapping[str, Any], place: str, ignore: Collection[str] = ()) -> Described:
    """Check a config and describe the method.

    Args:
        config: the JSON object.
        place: the file, for messages.
        ignore: fields that this version does not know and that change nothing.

    Raises:
        FileFormatError: it is for another method or a variant, has an unknown field, or a value that cannot be.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise FileFormatError(f"{place} has peft_type {kind!r}; load_peft reads LORA. For another, {MERGE}")
    for name, what in _VARIANTS.items():
        if config.get(name) not in (None, False) and config[name] != [] and config[name] != {}:
            raise FileFormatError(f"{place} has {name}={_short(config[name])}: {what}; pf.lora is plain LoRA; {MERGE}")
    for name in config.keys() - _NEUTRAL - _VARIANTS.keys() - set(ignore):
        if config[name] not in (None, False, "") and config[name] != [] and config[name] != {}:
            raise FileFormatError(
                f"{place} has {name}={_short(config[name])}, a field that this version does not know and that may "
                f"change what the tensors stand for; if it does not, pass ignore=[{name!r}]"
            )
    init = config.get("init_lora_weights", True)
    if not any(init is known or (isinstance(known, str) and init == known) for known in _INITS):
        raise FileFormatError(
            f"{place} has init_lora_weights={_short(init)}: such an adapter is relative to base weights that its "
            "initialisation has changed; save it from PEFT with path_initial_model_for_weight_conversion, "
            "which makes it a plain LoRA"
        )
    bias = config.get("bias", "none")
    if bias not in ("none", "lora_only", "all"):
        _bad(place, "bias", bias, "none, lora_only or all")
    saved = _names(place, "modules_to_save", config.get("modules_to_save"))
    if bias == "all" and saved:
        raise FileFormatError(
            f"{place} has bias='all' together with modules_to_save, for which PEFT writes some biases three times; "
            "train with bias='lora_only', or merge it with PEFT"
        )
    task = config.get("task_type")
    return Described(
        place,
        _rank(place, "r", config.get("r", 8)),
        _number(place, "lora_alpha", config.get("lora_alpha", 8)),
        _flag(place, "use_rslora", config.get("use_rslora")),
        _number(place, "lora_dropout", config.get("lora_dropout", 0.0)),
        init == "gaussian",
        bias,
        saved,
        _HEADS.get(task, ()) if isinstance(task, str) else (),
        tuple((p, _rank(place, "rank_pattern", r)) for p, r in _patterns(place, "rank_pattern", config)),
        tuple((p, _number(place, "alpha_pattern", a)) for p, a in _patterns(place, "alpha_pattern", config)),
    )


def as_bytes(config: Mapping[str, Any]) -> bytes:
    """Return a config as PEFT writes it."""
    return json.dumps(config, indent=2, sort_keys=True, allow_nan=False).encode()


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def _short(value: object) -> str:
    return repr(value)[:80]


def _bad(place: str, name: str, value: object, wanted: str) -> NoReturn:
    raise FileFormatError(f"{place} has {name}={_short(value)}; it must be {wanted}")


def _rank(place: str, name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        _bad(place, name, value, "a whole number from 1 on")
    return value


def _number(place: str, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 2**53 or math.isnan(value):
        _bad(place, name, value, "a number")
    return value


def _flag(place: str, name: str, value: object) -> bool:
    if value is not None and not isinstance(value, bool):
        _bad(place, name, value, "true or false")
    return bool(value)


def _names(place: str, name: str, value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        _bad(place, name, value, "a list of names")
    return tuple(value)


def _patterns(place: str, name: str, config: Mapping[str, Any]) -> list[tuple[Pattern, Any]]:
    value = config.get(name) or {}
    if not isinstance(value, dict):
        _bad(place, name, value, "an object of values by pattern")
    return [(Pattern(source, f"{place}, {name},"), number) for source, number in value.items()]
