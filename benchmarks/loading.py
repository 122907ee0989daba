"""Loading many adapters of one base: fifty folders in HF PEFT's format, PEFT's `load_adapter` against ours."""

import contextlib
import copy
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peft_func as pf
from benchmarks.measure import interleave

PEFT = "PEFT, load_adapter"
LEAN = "PEFT, load_adapter(low_cpu_mem_usage=True)"
ONE = "peft_func, load_peft"
BOUND = "peft_func, load_peft(adapter=)"
MANY = "peft_func, load_peft_many"

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def seconds(folders: int = 50, rounds: int = 3, *, layers: int = 6, hidden: int = 128) -> dict[str, list[float]]:
    """Load all folders of one base in each round, with every loader.

    Args:
        folders: how many adapters.
        rounds: how many times.
        layers: of a Llama; LoRA of rank 8 is at its seven linear layers.
        hidden: its width.

    Returns:
        Seconds for all folders, one for each round, by loader.

    Raises:
        AssertionError: the loaders do not load the same.
    """
    with tempfile.TemporaryDirectory() as parent, _quiet():
        net = _llama(layers, hidden)
        paths = _make(net, Path(parent), folders)
        calls = _calls(net, paths)
        _check(net, paths, calls)
        return interleave(calls, rounds, title="loading")


def ratios(times: dict[str, list[float]], peer: str = PEFT) -> dict[str, float]:
    """Return how many times as long as each of ours a peer takes: the median over the rounds."""
    return {
        name: statistics.median(a / b for a, b in zip(times[peer], own, strict=True))
        for name, own in times.items()
        if name not in (PEFT, LEAN)
    }


def _llama(layers: int, hidden: int) -> nn.Module:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * hidden,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).requires_grad_(False).eval()


def _make(net: nn.Module, parent: Path, count: int) -> list[Path]:
    """Save `count` adapters with PEFT, each with its own random values."""
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)
    paths = [parent / f"{number:03}" for number in range(count)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = peft.get_peft_model(copy.deepcopy(net), config)
        for path in paths:
            for name, param in model.named_parameters():
                if ".lora_" in name:
                    param.data = torch.randn_like(param) / 10
            model.save_pretrained(path)
    return paths


def _calls(net: nn.Module, paths: list[Path]) -> dict[str, Callable[[], Any]]:
    model = pf.functionalize(net)
    bound, _, _ = pf.load_peft(paths[0], model)

    def theirs(*, lean: bool) -> Any:
        # PEFT changes the module that it gets; a copy of this small one is a small part of the time.
        twin = copy.deepcopy(net)
        loaded = peft.PeftModel.from_pretrained(twin, paths[0], adapter_name="0", low_cpu_mem_usage=lean)
        for number, path in enumerate(paths[1:], 1):
            loaded.load_adapter(path, adapter_name=str(number), low_cpu_mem_usage=lean)
        return loaded

    return {
        PEFT: lambda: theirs(lean=False),
        LEAN: lambda: theirs(lean=True),
        ONE: lambda: [pf.load_peft(path, model) for path in paths],
        BOUND: lambda: [pf.load_peft(path, model, adapter=bound) for path in paths],
        MANY: lambda: pf.load_peft_many(paths, model),
    }


def _check(net: nn.Module, paths: list[Path], calls: dict[str, Callable[[], Any]]) -> None:
    """Check that the last adapter gives the same outputs, whoever loaded it."""
    tokens = torch.arange(16)[None]
    model = pf.functionalize(net)
    loaded = calls[PEFT]()
    loaded.set_adapter(str(len(paths) - 1))
    expected = loaded(tokens).logits
    adapter, frozen, trees = calls[MANY]()
    for tree in (trees[-1], calls[BOUND]()[-1][2], calls[ONE]()[-1][2]):
        torch.testing.assert_close(model(adapter.apply(frozen, tree), tokens).logits, expected)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        yield
