"""What is compared: each comparison checks first that its variants compute the same."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import peft_func as pf
from benchmarks.many.minilm import Encoder, tokens
from benchmarks.variants import DifferentComputationError

PLAIN, ONE = "plain base forward", "one adapter"
PEFT_MIXED, ROUTE, SORTED = "PEFT mixed batch", "peft_func route", "peft_func route, sorted batch"
PEFT_TURN, FOLD, VMAP = "PEFT, one after the other", "peft_func, folded", "peft_func, vmap(grad)"


@dataclass(frozen=True)
class Comparison:
    """Calls that are timed side by side.

    Attributes:
        title: the heading of the table.
        calls: what is timed, by name.
        against: the peers of each.
    """

    title: str
    calls: Mapping[str, Callable[[], Any]]
    against: Mapping[str, Sequence[str]]


def mixed_batch(encoder: Encoder, adapters: int, each: int, length: int) -> Comparison:
    """Compare ways to run a batch whose samples go through different adapters, forward only."""
    batch = tokens(adapters * each, length, vocab=encoder.net.config.vocab_size)
    mixed = torch.arange(adapters).repeat(each)
    stacked = pf.stack(encoder.trees[:adapters])
    peers = encoder.peft(list(range(adapters))).eval()
    one = encoder.adapter.apply(encoder.frozen, encoder.trees[0])
    in_order = mixed.sort(stable=True).values

    def route(index: Tensor) -> Tensor:
        weights = pf.route(encoder.adapter, encoder.frozen, stacked, index)
        return _hidden(encoder.model(weights, **batch))

    names = [f"a{number}" for number in mixed.tolist()]
    calls = {
        PLAIN: lambda: _hidden(encoder.net(**batch)),
        ONE: lambda: _hidden(encoder.model(one, **batch)),
        PEFT_MIXED: lambda: _hidden(peers(**batch, adapter_names=names)),
        ROUTE: lambda: route(mixed),
        SORTED: lambda: route(in_order),
    }
    with torch.no_grad():
        _agree(calls[ROUTE](), calls[PEFT_MIXED]())
    title = f"A mixed batch: {adapters} adapters x {each} samples x {length} tokens, forward"
    against = {ONE: [PLAIN], PEFT_MIXED: [PLAIN], ROUTE: [PLAIN, PEFT_MIXED], SORTED: [PLAIN, PEFT_MIXED]}
    return Comparison(title, {name: torch.no_grad()(call) for name, call in calls.items()}, against)


def training(encoder: Encoder, members: int, each: int, length: int, *, vmap: bool = True) -> Comparison:
    """Compare ways to get the gradients of many adapters, each on its own batch."""
    batch = tokens(members, each, length, vocab=encoder.net.config.vocab_size)
    targets = torch.randn(members, each, generator=torch.Generator().manual_seed(1))
    # One model for each, so that PEFT pays neither for switching nor for the adapters of others.
    peers = [encoder.peft([number]).train() for number in range(members)]
    leaves = [[leaf for leaf in peer.parameters() if leaf.requires_grad] for peer in peers]
    for peer in peers:
        _without_dropout(peer)

    def loss(output: Any, target: Tensor) -> Tensor:
        return (_hidden(output).mean((1, 2)) - target).square().mean()

    def in_turn() -> list[tuple[Tensor, ...]]:
        found = []
        for number, peer in enumerate(peers):
            output = peer(**{name: value[number] for name, value in batch.items()})
            found.append(torch.autograd.grad(loss(output, targets[number]), leaves[number], allow_unused=True))
        return found

    stacked = pf.stack(encoder.trees[:members])

    def together(how: str) -> Callable[[], Any]:
        grads_of = pf.member_grads(encoder.adapter, loss, in_dims=0, how=how)
        # transformers looks into a mask to choose a kernel, which vmap forbids; it hides nothing here.
        given = batch if how == "fold" else {"input_ids": batch["input_ids"]}
        return lambda: grads_of(encoder.frozen, stacked, given, (targets,))[0]

    calls: dict[str, Callable[[], Any]] = {PEFT_TURN: in_turn, FOLD: together("fold")}
    if vmap:
        calls[VMAP] = together("vmap")
    _same_gradients(encoder, calls[FOLD](), in_turn(), peers)
    title = f"Training {members} adapters, {each} x {length} tokens each, forward and backward"
    return Comparison(title, calls, {FOLD: [PEFT_TURN], VMAP: [PEFT_TURN]})


def _same_gradients(encoder: Encoder, grads: pf.Tree, theirs: Sequence[Sequence[Tensor | None]], peers: Any) -> None:
    for number, peer in enumerate(peers):
        names = [name for name, leaf in peer.named_parameters() if leaf.requires_grad]
        for name, value in zip(names, theirs[number], strict=True):
            path, _, tail = name.removeprefix("base_model.model.").partition(".lora_")
            ours = grads["lora"][f"{path}.weight"][tail[0]][number]
            _agree(ours, torch.zeros_like(ours) if value is None else value, 1e-3)


def _agree(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    error = ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6)).item()
    if not error <= tolerance:
        raise DifferentComputationError(f"the variants compute different things: they differ by {error:.1e}")


def _hidden(output: Any) -> Tensor:
    return output.last_hidden_state


def _without_dropout(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
