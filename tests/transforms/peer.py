"""HF PEFT beside us: the same network, the same random adapter, its outputs, gradients and merged weights."""

import copy
import warnings
from typing import Any

import peft
import torch
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import peft_func as pf
from tests.transforms.plain import GRADS, VALUES, learnable, leaves_of, same

OURS = "base_model.model."
KNOWN_WARNINGS = [
    "fan_in_fan_out is set to False but the target module is `Conv1D`",
    r"Model with `tie_word_embeddings=True` and the tied_target_modules=",
    r"Model has `tie_word_embeddings=True` and a tied layer is part of the adapter",
    "`is_gradient_checkpointing` is deprecated",  # transformers', of an attribute that PEFT reads
]


class Peer:
    """A copy of a network that PEFT has changed, with random values in everything that trains."""

    def __init__(self, net: nn.Module, config: peft.PeftConfig, seed: int = 1) -> None:
        with torch.random.fork_rng(), warnings.catch_warnings():
            for message in KNOWN_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            torch.manual_seed(seed)
            self.model = peft.get_peft_model(copy.deepcopy(net), config).double().eval()
            for name, param in self.model.named_parameters():
                if ".lora_" in name or ".ia3_" in name:
                    param.data = torch.rand_like(param) + 0.5 if "magnitude" in name else torch.randn_like(param) / 2

    @property
    def layers(self) -> dict[str, Any]:
        """Its adapted layers by the path that the module has in the base network."""
        return {
            name.removeprefix(OURS).replace(".base_layer", ""): module
            for name, module in self.model.named_modules()
            if isinstance(module, LoraLayer | IA3Layer)
        }

    def tree(self, grad: bool = False) -> dict[str, dict[str, Tensor]]:
        """Its adapter (or the gradient of it) as ours has it: path of the parameter, then A, B, magnitude or scale."""

        def get(param: nn.Parameter) -> Tensor:
            return (param.grad if grad else param.detach()).clone()

        found = {}
        for name, layer in self.layers.items():
            base = layer.get_base_layer()
            path = f"{name}.in_proj_weight" if isinstance(base, nn.MultiheadAttention) else f"{name}.weight"
            if isinstance(layer, IA3Layer):
                found[path] = {"scale": get(layer.ia3_l["default"]).flatten()}
                continue
            if isinstance(base, nn.Embedding):  # PEFT's A has the rows, and its B the features
                A, B = layer.lora_embedding_B["default"], layer.lora_embedding_A["default"]
                found[path] = {"A": get(A).T.contiguous(), "B": get(B).T.contiguous()}
            else:
                found[path] = {"A": get(layer.lora_A["default"].weight), "B": get(layer.lora_B["default"].weight)}
            if "default" in layer.lora_magnitude_vector:
                found[path]["magnitude"] = get(layer.lora_magnitude_vector["default"].weight).flatten()
        return found

    def biases(self, grad: bool = False) -> dict[str, dict[str, Tensor]]:
        """The biases of the base that train."""
        return {
            name.removeprefix(OURS).replace(".base_layer", ""): {"bias": (p.grad if grad else p.detach()).clone()}
            for name, p in self.model.named_parameters()
            if name.endswith("bias") and p.requires_grad
        }

    def merged(self) -> dict[str, Tensor]:
        """The state dict of the base network with the adapter merged into it."""
        return copy.deepcopy(self.model).merge_and_unload().state_dict()


def compare(net: nn.Module, peer: Peer, method: Any, args: tuple[Any, ...], output: Any = lambda out: out) -> Any:
    """Assert that our method, with PEFT's values, has PEFT's outputs, gradients and merged state dict."""
    model = pf.functionalize(net)
    adapter = pf.bind(method, model)
    frozen, start = adapter.init(0)
    values = peer.tree() | peer.biases()
    assert {p: {k: t.shape for k, t in v.items()} for p, v in start[method.name].items()} == {
        p: {k: t.shape for k, t in v.items()} for p, v in values.items()
    }
    tree = learnable({method.name: values})
    floats = [x for x in args if x.is_floating_point()]
    ours_in, theirs_in = ([x.clone().requires_grad_() for x in floats] for _ in range(2))
    rest = [x for x in args if not x.is_floating_point()]
    with pf.densify("error"):
        weights = adapter.apply(frozen, tree)
        ours = output(model(weights, *ours_in, *rest))
    theirs = output(peer.model(*theirs_in, *rest))
    same(ours, theirs, VALUES)

    peer.model.zero_grad()
    (theirs * theirs.cos()).sum().backward()
    (ours * ours.cos()).sum().backward()
    grads = pf.map_leaves(lambda leaf: leaf.grad, tree)
    same(grads[method.name], peer.tree(grad=True) | peer.biases(grad=True), GRADS)
    same([x.grad for x in ours_in], [x.grad for x in theirs_in], GRADS)
    assert all(leaf.grad.abs().max() > 0 for leaf in leaves_of(tree)) or not all(leaf.any() for leaf in leaves_of(tree))

    same({name: t.detach() for name, t in model.state_dict(weights).items()}, peer.merged(), VALUES)
    return adapter
