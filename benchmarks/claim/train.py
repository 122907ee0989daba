"""Members with different seeds, trained side by side as one stacked tree."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

import peft_func as pf
from benchmarks.claim.docstrings import Task

HEAD_RATE = 2e-2


class Classifier(nn.Module):
    """A pre-trained encoder, the mean of its token features, and a linear head."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits: `[batch, tokens]` to `[batch, classes]`."""
        features = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(features.dtype)
        return self.head((features * mask).sum(1) / mask.sum(1))


@dataclass(frozen=True)
class Result:
    """What came out for one method.

    Attributes:
        accuracies: on the test sentences, one for each seed.
        trained: numbers that train, without the head's.
        seconds: of training all seeds side by side.
    """

    accuracies: list[float]
    trained: int
    seconds: float


def train(
    model: pf.FunctionalModel,
    method: pf.Part | pf.Chain,
    task: Task,
    *,
    seeds: int = 5,
    epochs: int = 2,
    batch: int = 16,
    rate: float = 1e-3,
    title: str = "",
) -> Result:
    """Train one member for each seed, with AdamW and a cosine schedule; each sees the sentences in its own order.

    Args:
        model: the classifier as a pure function.
        method: what trains.
        task: the sentences.
        seeds: the number of members.
        epochs: passes over the sentences.
        batch: sentences of each member in a step.
        rate: the highest learning rate of everything but the head.
        title: for the progress bar.
    """
    adapter = pf.bind(method, model)
    frozen, _ = adapter.init(0)
    stacked = pf.stack([adapter.init(seed)[1] for seed in range(seeds)])
    trained = sum(leaf[0].numel() for keys, leaf in pf.leaves(stacked) if keys[0] != "head")
    leaves = dict(pf.leaves(stacked))
    # The head starts from nothing and needs large steps, whatever the rest takes.
    rates = {True: HEAD_RATE, False: rate}
    groups = {head: [leaf for keys, leaf in leaves.items() if (keys[0] == "head") is head] for head in rates}
    optimizer = torch.optim.AdamW(
        [{"params": some, "highest": rates[head]} for head, some in groups.items() if some], weight_decay=0.01
    )
    ids, mask, labels = task.train
    steps = epochs * (len(ids) // batch)
    orders = _orders(len(ids), epochs, batch, seeds)
    grads_of = pf.member_grads(adapter, F.cross_entropy, model=model, in_dims=0, how="fold")
    start = time.perf_counter()
    for step in tqdm(range(steps), desc=title, disable=None, leave=False):
        rows = orders[:, step]  # [seeds, batch]
        longest = int(mask[rows].sum(-1).max())
        inputs = (ids[rows][..., :longest], mask[rows][..., :longest])
        grads, _ = grads_of(frozen, stacked, inputs, (labels[rows],))
        grads, _ = pf.clip_members(grads, 1.0)
        for keys, grad in pf.leaves(grads):
            leaves[keys].grad = grad
        for group in optimizer.param_groups:
            group["lr"] = group["highest"] * min(1.0, (step + 1) / (0.1 * steps)) * 0.5 * (1 + cos(pi * step / steps))
        optimizer.step()
    seconds = time.perf_counter() - start
    accuracies = [accuracy(model, adapter.apply(frozen, tree), task) for tree in pf.unstack(stacked)]
    return Result(accuracies, trained, seconds)


def accuracy(model: Callable[..., Tensor], weights: pf.Weights, task: Task, batch: int = 128) -> float:
    """Return the share of the test sentences that is classified rightly."""
    ids, mask, labels = task.test
    with torch.no_grad():
        found = [model(weights, i, m).argmax(-1) for i, m in zip(ids.split(batch), mask.split(batch), strict=True)]
    return (torch.cat(found) == labels).double().mean().item()


def _orders(count: int, epochs: int, batch: int, seeds: int) -> Tensor:
    """Return the sentences of every step for every member: int64 `[seeds, steps, batch]`."""
    draws = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
    usable = count - count % batch
    rows = [torch.cat([torch.randperm(count, generator=draw)[:usable] for _ in range(epochs)]) for draw in draws]
    return torch.stack(rows).view(seeds, -1, batch)
