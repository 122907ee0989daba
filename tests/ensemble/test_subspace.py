"""KnOTS against the same thing written with the dense matrices."""

import pytest
import torch

from peft_func.ensemble.sparsify import Rule
from peft_func.ensemble.subspace import knots
from tests.ensemble.test_factors import dense, draw

WEIGHTS = [0.6, -0.3, 0.9]


def plain(terms, rule):
    """The SVD of the dense matrices side by side, the largest entry of every left vector positive."""
    D = torch.cat([dense(term) for term in terms], -1)
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    kept = S > 1e-9
    U, S, Vh = U[:, kept], S[kept], Vh[kept]
    signs = torch.stack([column[column.abs().argmax()].sign() for column in U.T])
    return U * (S * signs) @ rule("x", (Vh * signs[:, None]).chunk(len(terms), -1), WEIGHTS)


@pytest.mark.parametrize(
    "rule", [Rule(), Rule("magnitude_prune", 0.4), Rule("ties", 0.5), Rule("ties", 0.3, "frequency")]
)
@pytest.mark.parametrize("shape", [(7, 9), (9, 4), (3, 8)])
def test_it_is_that_of_the_dense_matrices(rule, shape):
    terms = [draw(*shape, rank, seed, scale=2.0) for seed, rank in enumerate([2, 1, 2])]
    torch.testing.assert_close(dense(knots("x", terms, WEIGHTS, rule)), plain(terms, rule), atol=1e-10, rtol=1e-10)


def test_linear_is_the_exact_sum_also_over_a_batch():
    terms = [draw(6, 5, 2, seed, batch=(3,), scale=0.5) for seed in range(3)]
    expected = sum(w * dense(term) for w, term in zip(WEIGHTS, terms, strict=True))
    torch.testing.assert_close(dense(knots("x", terms, WEIGHTS, Rule())), expected, atol=1e-11, rtol=1e-11)


def test_rounding_does_not_compete_for_the_largest_entries():
    one = draw(6, 5, 1, 0)
    merged = knots("x", [one, one], [0.5, 0.5], Rule("magnitude_prune", 1.0))
    assert merged.A.shape[-2] == 1
    torch.testing.assert_close(dense(merged), dense(one))
