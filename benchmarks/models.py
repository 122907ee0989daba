"""The models that are trained, with one batch each, and the places that every method adapts."""

import contextlib
import copy
import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertForTokenClassification, LlamaConfig, LlamaForCausalLM

from benchmarks import devices
from benchmarks.many import minilm

RANDOM = "random weights"
PRETRAINED = "pre-trained MiniLM"


@dataclass(frozen=True)
class Case:
    """A frozen model in train mode, and what one step of it sees.

    Attributes:
        net: a transformers model; no weight of it requires a gradient, no dropout has a probability above 0.
        inputs: token numbers, int64 `[batch, tokens]`.
        labels: likewise; the model computes its own loss from them.
        pattern: a regex for the paths of the adapted modules, the linear layers of all blocks.
        blocks: a regex for the paths of the blocks.
        weights: where the weights are from.
    """

    net: nn.Module
    inputs: Tensor
    labels: Tensor
    pattern: str
    blocks: str
    weights: str = RANDOM

    @property
    def places(self) -> dict[str, nn.Linear]:
        """The adapted modules by path."""
        return {
            path: module
            for path, module in self.net.named_modules()
            if isinstance(module, nn.Linear) and re.fullmatch(self.pattern, path)
        }

    def twin(self) -> nn.Module:
        """Return a copy of the net with modules of its own, and the very same tensors."""
        tensors = [*self.net.parameters(), *self.net.buffers()]
        return copy.deepcopy(self.net, {id(tensor): tensor for tensor in tensors})


def group(path: str) -> str:
    """Return the name that a place shares with the same place of the other layers: its path without the number."""
    return re.sub(r".*\.\d+\.", "", path)


def _bert(*, hidden: int, layers: int, heads: int, batch: int, tokens: int, vocab: int = 30522) -> Case:
    config = BertConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        num_labels=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        use_cache=False,
    )
    blocks = r"bert\.encoder\.layer\.\d+"
    net = BertForTokenClassification(config)
    return _case(net, (batch, tokens), vocab, 8, blocks, r"\..*(query|key|value|dense)")


def _minilm() -> Case:
    """The shape of MiniLM; its trained weights too, where the package that holds them is installed."""
    case = _bert(hidden=384, layers=6, heads=12, batch=16, tokens=128)
    if importlib.util.find_spec(minilm.PACKAGE) is None:
        return case
    trained = load_file(minilm.folder() / "model.safetensors")
    wanted = case.net.bert.state_dict()  # the file also has a pooler
    case.net.bert.load_state_dict({name: trained[name] for name in wanted})
    return replace(case, weights=PRETRAINED)


def _llama(
    *,
    hidden: int,
    layers: int,
    heads: int,
    ffn: int,
    vocab: int,
    batch: int,
    tokens: int,
    shared_heads: int | None = None,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Case:
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=shared_heads,
        intermediate_size=ffn,
        tie_word_embeddings=tied,
        max_position_embeddings=max(2048, tokens),
        use_cache=False,
        attention_dropout=0.0,
        pad_token_id=None,
    )
    with _default(dtype):
        net = LlamaForCausalLM(config)
    return _case(net, (batch, tokens), vocab, vocab, r"model\.layers\.\d+", r"\..*_proj")


@contextlib.contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    """Make weights in a dtype from the start: a model of 8e9 numbers is never there in float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _case(net: nn.Module, shape: tuple[int, int], vocab: int, labels: int, blocks: str, inner: str) -> Case:
    inputs = torch.randint(vocab, shape)
    return Case(net.requires_grad_(False).train(), inputs, torch.randint(labels, shape), blocks + inner, blocks)


MODELS: dict[str, Callable[[], Case]] = {
    "bert": _minilm,
    "bert-base": lambda: _bert(hidden=768, layers=12, heads=12, batch=4, tokens=128),
    "llama": lambda: _llama(hidden=1024, layers=6, heads=16, ffn=2816, vocab=4096, batch=4, tokens=256),
    "llama-1b": lambda: _llama(
        hidden=2048, layers=16, heads=32, shared_heads=8, ffn=8192, vocab=128256, tied=True, batch=1, tokens=2048,
        dtype=torch.bfloat16,
    ),
    "llama-8b": lambda: _llama(
        hidden=4096, layers=32, heads=32, shared_heads=8, ffn=14336, vocab=128256, batch=1, tokens=2048,
        dtype=torch.bfloat16,
    ),
    "tiny": lambda: _bert(hidden=64, layers=2, heads=2, batch=2, tokens=8, vocab=64),
    "tiny-bf16": lambda: _llama(
        hidden=32, layers=2, heads=4, shared_heads=2, ffn=64, vocab=64, tied=True, batch=1, tokens=16,
        dtype=torch.bfloat16,
    ),
}  # fmt: skip
"""By name; the tiny ones are for the tests of the benchmark itself."""

TITLES = {
    "bert": "MiniLM, 16 x 128",
    "bert-base": "BERT-base, 4 x 128",
    "llama": "Llama, 4 x 256",
    "llama-1b": "Llama 1B, 1 x 2048",
    "llama-8b": "Llama 8B, 1 x 2048",
    "tiny": "tiny BERT, 2 x 8",
    "tiny-bf16": "tiny Llama, 1 x 16",
}


def build(name: str, device: torch.device | str = "cpu", seed: int = 0) -> Case:
    """Build a model, on the device from the start, and a random batch.

    Weights are random (a step costs the same as with trained ones), except those of "bert", where a package brings
    trained ones.

    Args:
        name: one of `MODELS`.
        device: where weights and batch are made.
        seed: of the random weights and of the batch; the global generators are put back.
    """
    device = torch.device(device)
    with devices.forked(device, seed), device:
        return MODELS[name]()
