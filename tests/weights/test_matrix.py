"""The matrix algebra: every expression acts as its dense form, and every view of it as the view of that."""

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from peft_func.weights.absorb import square_norms
from peft_func.weights.matrix import Dense, Diagonal, IdentityPlus, LowRank, Matrix, Product, Sum
from tests.zoo import ids, randn

SIZES = st.integers(1, 5)


@st.composite
def matrices(draw, out: int, inn: int, depth: int = 3, batch: tuple[int, ...] = ()) -> Matrix:
    """A random expression of a shape; square ones may be diagonal or the identity plus something."""
    seed, rank = draw(st.integers(0, 10**6)), draw(st.integers(1, 3))
    leaves = [
        st.just(Dense(randn(*batch, out, inn, seed=seed))),
        st.just(LowRank(randn(*batch, out, rank, seed=seed), randn(*batch, rank, inn, seed=seed + 1), 0.7)),
        st.just(LowRank(randn(out, rank, seed=seed), randn(*batch, rank, inn, seed=seed + 1))),
    ]
    if out == inn:
        leaves.append(st.just(Diagonal(randn(*batch, out, seed=seed))))
        leaves += [st.just(Diagonal(randn(out // 2, seed=seed), repeat=2))] if out % 2 == 0 else []
    if depth == 0:
        return draw(st.one_of(leaves))
    deeper = lambda a, b: matrices(a, b, depth - 1, batch)
    middle = draw(SIZES)
    nodes = [
        st.builds(Sum, deeper(out, inn), deeper(out, inn)),
        st.builds(Product, deeper(out, middle), deeper(middle, inn)),
    ]
    if out == inn:
        nodes.append(st.builds(IdentityPlus, deeper(out, out)))
    return draw(st.one_of([*leaves, *nodes]))


@st.composite
def drawn(draw, batch: tuple[int, ...] = ()) -> Matrix:
    out = draw(SIZES)
    return draw(matrices(out, draw(st.one_of(SIZES, st.just(out))), batch=batch))


def full(matrix: Matrix) -> torch.Tensor:
    """The dense form, by the definition of each expression, written without its own methods."""
    match matrix:
        case Dense(tensor=tensor):
            return tensor
        case LowRank(B=B, A=A, scale=s):
            return s * torch.einsum("...or,...ri->...oi", B, A)
        case Diagonal(vector=v, repeat=n):
            return torch.diag_embed(torch.stack([v] * n, -1).flatten(-2))
        case IdentityPlus(inner=inner):
            return torch.eye(inner.shape[-1], dtype=torch.float64) + full(inner)
        case Sum(left=left, right=right):
            return full(left) + full(right)
        case Product(left=left, right=right):
            return full(left) @ full(right)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-10, rtol=1e-9)


@given(drawn())
def test_acts_as_its_dense_form(matrix):
    dense = full(matrix)
    x, bias = randn(2, 3, dense.shape[1], seed=9), randn(dense.shape[0], seed=8)
    assert matrix.shape == dense.shape
    assert same(matrix.dense(torch.float64), dense)
    assert same(matrix.linear(x), F.linear(x, dense))
    assert same(matrix.linear(x, bias), F.linear(x, dense, bias))


@given(drawn())
def test_transpose_rows_and_norms(matrix):
    dense = full(matrix)
    assert same(matrix.T.dense(torch.float64), dense.T)
    assert same(matrix.T.linear(randn(4, dense.shape[0], seed=3)), randn(4, dense.shape[0], seed=3) @ dense)
    index = ids(7, high=dense.shape[0], seed=4)
    assert same(matrix.take(index).dense(torch.float64), dense[index])
    part = slice(0, max(1, dense.shape[0] - 1))
    assert same(matrix.take(part).dense(torch.float64), dense[part])
    x = randn(3, dense.shape[1], seed=5)
    assert same(matrix.take(part).linear(x), x @ dense[part].T)
    assert same(square_norms(matrix), dense.square().sum(-1))


@given(drawn(batch=(3,)))
def test_a_batch_of_matrices(matrix):
    dense = full(matrix).expand(3, *matrix.shape[-2:])
    x = randn(3, 4, dense.shape[-1], seed=2)
    assert same(matrix.linear(x), x @ dense.mT)
    assert same(square_norms(matrix).expand(3, -1), dense.square().sum(-1))
    if len(matrix.shape) == 3:
        assert same(matrix.select(1).dense(torch.float64), dense[1])
        assert same(matrix.select(torch.tensor([2, 0])).linear(x[:2]), x[:2] @ dense[[2, 0]].mT)


@given(drawn())
def test_map_reaches_every_tensor(matrix):
    doubled = matrix.map(lambda tensor, ndim: tensor.float())
    assert all(tensor.dtype is torch.float32 for tensor in doubled.tensors())
    assert len(doubled.tensors()) == len(matrix.tensors())
    assert doubled.compute_dtype is torch.float32
    assert matrix.compute_dtype is torch.float64


@given(drawn())
def test_operators_build_sums_and_products(matrix):
    other = Dense(randn(*matrix.shape, seed=1))
    assert same((matrix + other).dense(torch.float64), full(matrix) + other.tensor)
    assert same((matrix @ other.T).dense(torch.float64), full(matrix) @ other.tensor.T)


def test_dropout_acts_on_the_branch_and_not_on_the_dense_form():
    low = LowRank(randn(4, 2), randn(2, 3, seed=1), dropout=0.5)
    matrix = Sum(
        Dense(randn(4, 3, seed=2)),
        Product(Dense(randn(4, 4, seed=3)), IdentityPlus(Sum(Dense(randn(4, 4)), low @ Dense(randn(3, 4))))) @ low,
    )
    x = randn(500, 3, seed=5)
    assert matrix.has_dropout
    assert not matrix.deterministic().has_dropout
    assert same(matrix.dense(torch.float64), full(matrix.deterministic()))
    assert same(matrix.deterministic().linear(x), x @ full(matrix).T)
    assert not same(matrix.linear(x), x @ full(matrix).T)
    average = torch.stack([Sum(Dense(randn(4, 3, seed=2)), low).linear(x[:5]) for _ in range(4000)]).mean(0)
    assert torch.allclose(average, Sum(Dense(randn(4, 3, seed=2)), low).deterministic().linear(x[:5]), atol=0.2)


def test_a_user_kind_of_matrix_needs_only_the_abstract_methods():
    class Circulant(Matrix):
        """A matrix whose rows are rotations of one another."""

        def __init__(self, row):
            self.row, self.shape = row, (len(row), len(row))

        def tensors(self):
            return (self.row,)

        def map(self, function):
            return Circulant(function(self.row, 1))

        def dense(self, dtype):
            return torch.stack([self.row.roll(i) for i in range(len(self.row))]).to(dtype)

        def linear(self, x, bias=None):
            return F.linear(x, self.dense(x.dtype), bias)

        @property
        def T(self):
            return Dense(self.dense(torch.float64).T)

    kind = Circulant(randn(4))
    dense = kind.dense(torch.float64)
    assert same(square_norms(kind), dense.square().sum(-1))
    assert same(kind.take(slice(1, 3)).dense(torch.float64), dense[1:3])
    assert same(Product(Dense(randn(2, 4)), kind).dense(torch.float64), randn(2, 4) @ dense)
    assert same(
        Sum(kind, LowRank(randn(4, 1), randn(1, 4))).linear(randn(3, 4)),
        randn(3, 4) @ (dense + randn(4, 1) @ randn(1, 4)).T,
    )
