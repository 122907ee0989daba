"""The peers: other libraries' LoRA and DoRA, GIFT as first published, and a factored backward written by hand.

Each is made as `(case, rank) -> (leaves, loss)`: the tensors that train, by the path of the adapted module and the
field's letter, and the forward as a function of nothing.
"""

import importlib
import re
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, TypeAlias

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import values
from benchmarks.models import Case, group

Made: TypeAlias = tuple[Mapping[str, Tensor], Callable[[], Tensor]]

INSTALL = {"loralib": "pip install loralib", "torchtune": 'pip install torchtune "torchao>=0.16,<0.18"'}
"""Libraries that are compared with where they are installed, and how to install them."""


def missing() -> dict[str, str]:
    """Return the libraries of `INSTALL` that are not here, each with a line that says why and how to get it."""
    reasons = {name: _reason(name) for name in INSTALL}
    return {name: f"without {name} ({why}): {INSTALL[name]}" for name, why in reasons.items() if why}


def _reason(name: str) -> str:
    try:
        _library(name)
    except ImportError as error:
        return str(error).strip().splitlines()[0]
    return ""


def _library(name: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, on import: of versions, of extensions that were not built
        return importlib.import_module({"torchtune": "torchtune.modules.peft"}.get(name, name))


def loss_of(call: Callable[..., Any], case: Case) -> Tensor:
    """Return the model's own loss of the case's batch."""
    return call(input_ids=case.inputs, labels=case.labels).loss


def floor(case: Case, rank: int) -> Made:
    """Take no adapter at all: the frozen model, backward to the embedded inputs."""
    net = case.net
    embedded = net.get_input_embeddings()(case.inputs).requires_grad_()
    return {"inputs": embedded}, lambda: net(inputs_embeds=embedded, labels=case.labels).loss


def peft_model(net: nn.Module, config: peft.LoraConfig) -> nn.Module:
    """Wrap a module as PEFT does, in train mode; it draws from the global generator, which is put back."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), warnings.catch_warnings():
        # PEFT reads an attribute that newer versions of transformers have renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        # The adapter in the dtype of the base, as for all others here.
        return peft.get_peft_model(net, config, autocast_adapter_dtype=False).train()


def with_peft(case: Case, rank: int, *, dora: bool = False, compiled: bool = False, checkpointed: bool = False) -> Made:
    """Take Hugging Face PEFT; checkpointing is the model's own."""
    net = case.twin()
    if checkpointed:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`gradient_checkpointing_enable`", FutureWarning)  # gets another name
            net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=case.pattern, use_dora=dora, bias="none"
    )
    net = peft_model(net, config)
    letters = {"lora_A.default.weight": "A", "lora_B.default.weight": "B"}
    letters["lora_magnitude_vector.default.weight"] = "magnitude"
    leaves = {}
    for name, leaf in net.named_parameters():
        if leaf.requires_grad:
            path, tail = re.fullmatch(r"base_model\.model\.(.*)\.(lora_.*)", name).groups()
            leaves[f"{path}.{letters[tail]}"] = leaf
    for name, value in (values.dora if dora else values.low_rank)(case, rank).items():
        leaves[name].data.copy_(value)
    call = torch.compile(net) if compiled else net
    return leaves, lambda: loss_of(call, case)


def _replaced(case: Case, leaves: Mapping[str, Tensor], make: Callable[[nn.Linear, str], nn.Module]) -> Made:
    net = case.twin()
    for path, linear in case.places.items():
        net.set_submodule(path, make(linear, path))
    return leaves, lambda: loss_of(net, case)


def with_loralib(case: Case, rank: int) -> Made:
    """Take loralib's linear layers, weights not merged."""
    lora = _library("loralib")
    leaves = values.leaves(values.low_rank(case, rank))

    def make(linear: nn.Linear, path: str) -> nn.Module:
        with torch.device("meta"):
            new = lora.Linear(linear.in_features, linear.out_features, r=rank, lora_alpha=2 * rank, merge_weights=False)
        new.weight, new.bias = linear.weight, linear.bias
        new.lora_A, new.lora_B = leaves[f"{path}.A"], leaves[f"{path}.B"]
        return new

    return _replaced(case, leaves, make)


def with_torchtune(case: Case, rank: int) -> Made:
    """Take torchtune's linear layers."""
    tune = _library("torchtune")
    leaves = values.leaves(values.low_rank(case, rank))

    def make(linear: nn.Linear, path: str) -> nn.Module:
        with torch.device("meta"):
            new = tune.LoRALinear(linear.in_features, linear.out_features, rank, 2 * rank, use_bias=True)
        new.weight, new.bias = linear.weight, linear.bias
        new.lora_a.weight, new.lora_b.weight = leaves[f"{path}.A"], leaves[f"{path}.B"]
        return new

    return _replaced(case, leaves, make)


class _FactoredProduct(torch.autograd.Function):
    """`x W^T + b + s (x A^T) B^T`, its gradients from factors: `dW` is never formed.

    Written the old way, with all of it in `forward`, for first derivatives and nothing else: no `vmap`, no `jvp`, no
    second derivative. What remains is the least that plain PyTorch calls can do.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
        flat = x.flatten(0, -2)
        out = F.linear(flat, weight, bias)
        low = flat @ A.T
        out.addmm_(low, B.T, alpha=scale)
        ctx.save_for_backward(flat, weight, A, B, low)
        ctx.scale, ctx.shape = scale, x.shape
        return out.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, A, B, low = ctx.saved_tensors
        grad = grad.flatten(0, -2)
        grad_low = torch.mm(grad, B).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad, weight).addmm_(grad_low, A).view(ctx.shape)
        return grad_x, None, None, grad_low.T @ flat, (grad.T @ low).mul_(ctx.scale), None


class Factored(nn.Module):
    """A linear layer with LoRA by `_FactoredProduct`."""

    def __init__(self, linear: nn.Linear, A: Tensor, B: Tensor, scale: float) -> None:
        super().__init__()
        self.weight, self.bias, self.A, self.B, self.scale = linear.weight, linear.bias, A, B, scale

    def forward(self, x: Tensor) -> Tensor:
        """Return `x W^T + b + s (x A^T) B^T`."""
        return _FactoredProduct.apply(x, self.weight, self.bias, self.A, self.B, self.scale)


def factored(case: Case, rank: int) -> Made:
    """Take the backward written by hand."""
    leaves = values.leaves(values.low_rank(case, rank))
    return _replaced(case, leaves, lambda linear, path: Factored(linear, leaves[f"{path}.A"], leaves[f"{path}.B"], 2.0))


class DenseDelta(nn.Module):
    """A linear layer with GIFT's update as it was first published: dW = (W phi) psi is formed, and multiplied too."""

    def __init__(self, linear: nn.Linear, phi: Tensor, psi: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.phi, self.psi = phi, psi

    def forward(self, x: Tensor) -> Tensor:
        """Return `x W^T + b + x dW^T`."""
        delta = (self.weight @ self.phi) @ self.psi
        return F.linear(x, self.weight, self.bias) + F.linear(x, delta)


def dense_gift(case: Case, rank: int) -> Made:
    """Take the dense delta in every layer; layers of a group share their phi and psi."""
    leaves = values.leaves(values.gift(case, rank))
    return _replaced(
        case,
        leaves,
        lambda linear, path: DenseDelta(linear, leaves[f"{group(path)}.phi"], leaves[f"{group(path)}.psi"]),
    )
