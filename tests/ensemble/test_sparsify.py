"""The rules against HF PEFT's definitions, and DARE against its expectation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils import merge_utils

from peft_func.ensemble.sparsify import Rule, dare, magnitude_prune


def tensors(seed, count=3, shape=(5, 4)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(count)]


WEIGHTS = [0.7, -0.2, 0.5]


@given(st.integers(0, 999), st.sampled_from([0.1, 0.29, 0.5, 0.7]), st.sampled_from(["total", "frequency"]))
def test_pruning_and_ties_are_those_of_peft(seed, density, method):
    given, weights = tensors(seed), torch.tensor(WEIGHTS, dtype=torch.float64)
    prune = Rule("magnitude_prune", density)("x", given, WEIGHTS)
    torch.testing.assert_close(prune, merge_utils.magnitude_prune(given, weights, density), atol=1e-14, rtol=0)
    ties = Rule("ties", density, method)("x", given, WEIGHTS)
    torch.testing.assert_close(ties, merge_utils.ties(given, weights, density, method), atol=1e-14, rtol=0)
    assert torch.equal(magnitude_prune(given[0], density), merge_utils.magnitude_based_pruning(given[0], density))


def test_linear_is_the_weighted_sum():
    a, b, c = tensors(0)
    torch.testing.assert_close(Rule()("x", [a, b, c], WEIGHTS), 0.7 * a - 0.2 * b + 0.5 * c)


def test_the_sign_is_elected_as_asked():
    # Two small minuses against one large plus: the sum is positive, the majority negative.
    entries = [torch.tensor([3.0]), torch.tensor([-1.0]), torch.tensor([-1.0])]
    assert Rule("ties", 1.0, "total")("x", entries, [1.0] * 3).item() == 3.0
    assert Rule("ties", 1.0, "frequency")("x", entries, [1.0] * 3).item() == -1.0


def test_pruning_keeps_at_least_one():
    assert magnitude_prune(torch.tensor([1.0, -3.0, 2.0]), 0.1).tolist() == [0.0, -3.0, 0.0]
    assert magnitude_prune(torch.tensor([1.0, -3.0, 2.0]), 1.0).tolist() == [1.0, -3.0, 2.0]


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_dare_keeps_a_fraction_and_is_unbiased(density):
    ones = torch.ones(200, 200, dtype=torch.float64)
    kept = dare(ones, density, 0)
    assert set(kept.unique().tolist()) == {0.0, 1 / density}
    spread = 4 * (density * (1 - density) / ones.numel()) ** 0.5
    assert abs((kept != 0).double().mean().item() - density) < spread
    assert abs(kept.mean().item() - 1) < spread / density
    assert torch.equal(dare(ones, 1.0, 0), ones)


def test_dare_depends_on_the_key_the_path_and_the_number_of_the_tree_only():
    a, b = torch.ones(30, 30), torch.ones(30, 30)
    rule = Rule("dare_linear", 0.5, key=3)
    merged = rule("q.A", [a, b], [1.0, 0.0])
    before = torch.random.get_rng_state()
    assert torch.equal(merged, rule("q.A", [a, b], [1.0, 0.0]))
    assert torch.equal(before, torch.random.get_rng_state())
    others = [
        rule("q.B", [a, b], [1.0, 0.0]),
        rule("q.A", [a, b], [0.0, 1.0]),
        Rule("dare_linear", 0.5, key=4)("q.A", [a, b], [1.0, 0.0]),
    ]
    assert all(not torch.equal(merged, other) for other in others)


def test_dare_ties_is_ties_over_the_masked():
    given, weights = tensors(5), torch.tensor(WEIGHTS, dtype=torch.float64)
    rule = Rule("dare_ties", 0.6, "frequency", key=1)
    masked = [Rule("dare_linear", 0.6, key=1)("x", given, [float(n == k) for n in range(3)]) for k in range(3)]
    expected = merge_utils.ties(masked, weights, 0.999999, "frequency")  # 1 would warn; zeros are all that it drops
    torch.testing.assert_close(rule("x", given, WEIGHTS), expected, atol=1e-13, rtol=0)


def test_nothing_is_written():
    given = tensors(1)
    copies = [tensor.clone() for tensor in given]
    for name in ("linear", "magnitude_prune", "ties", "dare_linear", "dare_ties"):
        Rule(name, None if name == "linear" else 0.5, key=0)("x", given, WEIGHTS)
    assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True))
