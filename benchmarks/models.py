"""The models that are trained, with one batch each, and the places that every method adapts."""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForTokenClassification, LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Case:
    """A frozen model in train mode, and what one step of it sees.

    Attributes:
        net: a transformers model; no weight of it requires a gradient, no dropout has a probability above 0.
        inputs: token numbers, int64 `[batch, tokens]`.
        labels: likewise; the model computes its own loss from them.
        pattern: a regex for the paths of the adapted modules, the linear layers of all blocks.
    """

    net: nn.Module
    inputs: Tensor
    labels: Tensor
    pattern: str

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
    )
    net = BertForTokenClassification(config)
    return _case(net, batch, tokens, vocab, 8, r"bert\.encoder\.layer\.\d+\..*(query|key|value|dense)")


def _llama() -> Case:
    vocab = 4096
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=1024,
        num_hidden_layers=6,
        num_attention_heads=16,
        intermediate_size=2816,
        use_cache=False,
        attention_dropout=0.0,
        pad_token_id=None,
    )
    return _case(LlamaForCausalLM(config), 4, 256, vocab, vocab, r"model\.layers\.\d+\..*_proj")


def _case(net: nn.Module, batch: int, tokens: int, vocab: int, labels: int, pattern: str) -> Case:
    inputs = torch.randint(vocab, (batch, tokens))
    return Case(net.requires_grad_(False).train(), inputs, torch.randint(labels, (batch, tokens)), pattern)


MODELS: dict[str, Callable[[], Case]] = {
    "bert": lambda: _bert(hidden=384, layers=6, heads=12, batch=16, tokens=128),
    "bert-base": lambda: _bert(hidden=768, layers=12, heads=12, batch=4, tokens=128),
    "llama": _llama,
    "tiny": lambda: _bert(hidden=32, layers=2, heads=2, batch=2, tokens=8, vocab=64),
}
"""MiniLM's shape, BERT-base, six layers of a Llama; "tiny" is for the tests of the benchmark itself."""

TITLES = {
    "bert": "BERT, 6 layers, hidden 384, 16 x 128 tokens",
    "bert-base": "BERT, 12 layers, hidden 768, 4 x 128 tokens",
    "llama": "Llama, 6 layers, hidden 1024, 4 x 256 tokens",
    "tiny": "BERT, 2 layers, hidden 32, 2 x 8 tokens",
}


def build(name: str, seed: int = 0) -> Case:
    """Build a model with random weights (a step costs the same as with trained ones) and a random batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name]()
