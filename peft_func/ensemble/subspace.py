"""KnOTS: low-rank matrices merged in a basis that they share.

Stoica et al., "Model merging with SVD to tie the Knots", arXiv 2410.19735. The SVD of all of them side by side,

    [D_1 ... D_K] = U diag(S) [V_1 ... V_K],    so    D_k = U diag(S) V_k,

gives every one a right factor over the same left basis; a rule (TIES, DARE) merges the V_k, entry by entry, and the
result is U diag(S) V. Here D_k = B_k A_k, and QR of the B_k side by side makes the SVD one of R rows.
"""

from collections.abc import Sequence

import torch

from peft_func.ensemble.factors import effective_rank
from peft_func.ensemble.sparsify import Rule
from peft_func.ensemble.values import wide_dtype
from peft_func.weights.matrix import LowRank


def knots(path: str, terms: Sequence[LowRank], weights: Sequence[float], rule: Rule) -> LowRank:
    """Merge low-rank matrices `[*batch, out, in]` by a rule on their right factors in a shared basis.

    Returns:
        A matrix of a rank of at most `min(out, sum of ranks)`.
    """
    dtype = wide_dtype(*(tensor for term in terms for tensor in term.tensors()))
    Q, T = torch.linalg.qr(torch.cat([term.B.to(dtype) for term in terms], -1))
    columns = T.split([term.B.shape[-1] for term in terms], -1)
    narrow = [part @ term.A.to(dtype) * term.scale for part, term in zip(columns, terms, strict=True)]
    U, S, Vh = torch.linalg.svd(torch.cat(narrow, -1), full_matrices=False)
    # Directions that are rounding only must not compete with the others for the largest entries.
    kept = effective_rank(S, max(Q.shape[-2], Vh.shape[-1]))
    left = Q @ U[..., :kept]
    # The signs of singular vectors are free, and a draw of an election is a plus: fix them by the largest entries.
    signs = left.gather(-2, left.abs().argmax(-2, keepdim=True)).sign()
    Vh = Vh[..., :kept, :] * signs.mT
    merged = rule(path, Vh.chunk(len(terms), -1), weights)
    return LowRank(left * (signs * S[..., :kept].unsqueeze(-2)), merged)
