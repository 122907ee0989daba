"""Rules that merge several tensors of one shape into one: weighted sums of what pruning and sign election leave.

    magnitude_prune   sum_k w_k top(t_k)                            top: a fraction `density`, the largest
    dare_linear       sum_k w_k m_k t_k / density                   m_k: Bernoulli(density), unbiased
    ties              sum_k w_k agree_k top(t_k) / sum_k agree_k    agree_k: has the elected sign
    dare_ties         the same over m_k t_k / density

TIES: Yadav et al., arXiv 2306.01708. DARE: Yu et al., arXiv 2311.03099. Definitions are those of HF PEFT: the sign is
elected before the weights are applied, a draw is a plus, and the mean is over the entries that agree; the weights are
factors of the sum, and do not count in the mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_func.trees.keys import split, uniform


@dataclass(frozen=True)
class Rule:
    """One of the rules, with its options.

    Attributes:
        name: `"linear"`, `"magnitude_prune"`, `"ties"`, `"dare_linear"` or `"dare_ties"`.
        density: the fraction of entries that pruning keeps.
        majority_sign_method: elects the sign of the sum (`"total"`) or of the majority (`"frequency"`).
        key: the randomness of DARE.
    """

    name: str = "linear"
    density: float | None = None
    majority_sign_method: str = "total"
    key: int | None = None

    def __call__(self, path: str, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """Merge tensors of one shape; `path` names them, and is all that a random mask depends on besides the key."""
        stacked = torch.stack([self._prune(f"{path}.{n}", tensor) for n, tensor in enumerate(tensors)])
        column = torch.tensor(weights, dtype=stacked.dtype, device=stacked.device)
        weighted = stacked * column.view(-1, *[1] * (stacked.dim() - 1))
        if not self.name.endswith("ties"):
            return weighted.sum(0)
        agrees = agreement(stacked, self.majority_sign_method)
        return (weighted * agrees).sum(0) / agrees.sum(0).clamp_min(1)

    def _prune(self, path: str, tensor: Tensor) -> Tensor:
        if self.density is None:
            return tensor
        if self.name.startswith("dare"):
            assert self.key is not None
            return dare(tensor, self.density, split(self.key, path))
        return magnitude_prune(tensor, self.density)


def magnitude_prune(tensor: Tensor, density: float) -> Tensor:
    """Return the tensor with all but its largest entries set to zero: `int(density * numel)` stay, at least one."""
    count = max(1, int(density * tensor.numel()))
    kept = torch.zeros(tensor.numel(), dtype=torch.bool, device=tensor.device)
    kept[tensor.abs().flatten().topk(min(count, tensor.numel())).indices] = True
    return torch.where(kept.view(tensor.shape), tensor, 0)


def dare(tensor: Tensor, density: float, key: int) -> Tensor:
    """Return the tensor with each entry kept with probability `density`, and divided by it: unbiased."""
    kept = uniform(tuple(tensor.shape), 1.0, key, tensor) < 2 * density - 1
    return torch.where(kept, tensor / density, 0)


def agreement(stacked: Tensor, method: str) -> Tensor:
    """Return where each of the tensors, stacked first, has the sign that all of them elect."""
    signs = stacked.sign()
    votes = (stacked if method == "total" else signs).sum(0)
    return signs == torch.where(votes >= 0, 1, -1)
