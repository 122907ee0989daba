"""Groups of a batch, and weights that differ between them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import peft_func as pf
from peft_func.weights.groups import Grouped, Groups, column, spare_groups
from peft_func.weights.layout import Layout, Storage
from peft_func.weights.matrix import Dense, LowRank, Sum
from tests.zoo import randn


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_consecutive_samples_are_one_group(count, size, width):
    groups = Groups(count, size)
    x = randn(count * size, width)
    parts = groups.split(x, "this")
    assert parts.shape == (count, size, width)
    assert torch.equal(torch.cat(list(parts)), x)
    rows = randn(1, 7, width)
    if count > 1 and groups.total != 7:
        assert torch.equal(groups.split(rows, "this"), rows.expand(count, size, 7, width))


@pytest.mark.parametrize(
    ("shape", "flattened"),
    [((3, 2), False), ((8, 2), False), ((5, 2), True), ((), False), ((0, 2), True), ((2, 4, 5), False)],
)
def test_what_is_not_the_batch_is_refused(shape, flattened):
    with pytest.raises(pf.RouteError, match="product meets"):
        Groups(2, 2).split(torch.zeros(shape), "product", flattened=flattened)


def test_positions_joined_to_the_batch_are_meant_only_where_it_is_said():
    x = randn(8, 3)
    assert Groups(2, 2).split(x, "this", flattened=True).shape == (2, 4, 3)


@pytest.mark.parametrize("shape", [(4, 4, 5), (1, 4, 5), (4, 3, 4, 5)])
def test_an_axis_as_long_as_the_batch_cannot_be_told_from_it(shape):
    with pytest.raises(pf.RouteError, match="which axis is the batch"):
        Groups(4, 1).split(torch.zeros(shape), "this")
    assert Groups(1, 4).split(torch.zeros(4, 4, 5), "this").shape == (1, 4, 4, 5)  # one group: all are alike
    assert Groups(4, 1).split(torch.zeros(4, 4, 5), "conv1d", inner=()).shape == (4, 1, 4, 5)


def test_a_table_of_the_model_as_long_as_the_batch_is_not_an_activation():
    groups = Groups(4, 1, frozenset({(4, 9)}), frozenset({(4, 5), (1, 3, 5)}))
    with pytest.raises(pf.RouteError, match="cannot tell"):
        groups.split(torch.zeros(4, 5), "linear")
    groups.split(torch.zeros(4, 9), "linear")
    groups.split(torch.zeros(1, 3, 5), "linear")


def test_spare_groups_make_a_batch_of_another_length():
    assert spare_groups(4, 1, {3, 5}) == 0
    assert spare_groups(4, 2, {8, 10, 9}) == 2
    assert spare_groups(1, 4, {4}) == 0  # of one group nothing need be told apart


def test_spare_groups_are_like_the_first():
    W, B, A = randn(4, 5), randn(3, 4, 2, seed=1), randn(3, 2, 5, seed=2)
    op = Grouped(Sum(Dense(W), LowRank(B, A)), Groups(3, 1), Layout(Storage.MATRIX, (4, 5)), W.dtype, "w")
    longer = op.lengthened(Groups(5, 1))
    assert longer.matrix.tensors()[0] is W
    assert torch.equal(longer.each(), op.each()[[0, 1, 2, 0, 0]])


VECTOR = Layout(Storage.VECTOR, (5,))
NUMBER = Layout(Storage.VECTOR, ())
CONV = Layout(Storage.CONV, (3, 2, 2))
HF = Layout(Storage.TRANSPOSED, (5, 4))


@pytest.mark.parametrize("layout", [VECTOR, NUMBER, CONV, HF], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_each_group_has_its_own_value(layout, shared):
    groups, own = Groups(3, 2), [randn(1, *layout.shape, seed=0 if shared else i)[0] for i in range(3)]
    vector = layout.storage is Storage.VECTOR
    matrices = [column(t) if vector else layout.to_matrix(t) for t in own]
    op = Grouped(Dense(matrices[0] if shared else torch.stack(matrices)), groups, layout, torch.float64, "w")
    assert torch.equal(op.each(), torch.stack(own))
    tensors, axes, one = op.take_apart()
    assert axes == [None if shared else 0]
    for i in range(3):
        built = one([t if axis is None else t[i] for t, axis in zip(tensors, axes, strict=True)])
        assert torch.equal(built, own[i])


def test_a_shared_base_stays_one_tensor():
    W, B, A = randn(4, 5), randn(3, 4, 2, seed=1), randn(3, 2, 5, seed=2)
    op = Grouped(Sum(Dense(W), LowRank(B, A, 2.0)), Groups(3, 1), Layout(Storage.MATRIX, (4, 5)), W.dtype, "w")
    tensors, axes, one = op.take_apart()
    assert tensors[0] is W
    assert axes == [None, 0, 0]
    assert torch.allclose(one([W, B[1], A[1]]).materialise(), W + 2 * B[1] @ A[1])
    assert torch.allclose(op.each()[2], W + 2 * B[2] @ A[2])


def test_it_has_no_one_dense_form():
    op = Grouped(Dense(randn(3, 4, 5)), Groups(3, 1), Layout(Storage.MATRIX, (4, 5)), torch.float64, "head.weight")
    for form in (op.exact, op.materialise):
        with pytest.raises(pf.RouteError, match=r"head.weight.*3 groups"):
            form()
    with pytest.raises(pf.TreeError, match="for 2 groups"):
        Grouped(Dense(randn(3, 4, 5)), Groups(2, 1), Layout(Storage.MATRIX, (4, 5)), torch.float64, "w")
