"""The table of what trains: totals, per cent, shapes, and its refusals."""

import pytest
import torch
from torch import nn

import peft_func as pf
from tests.zoo import Shared, Tied, seeded


def empty(build) -> pf.FunctionalModel:
    with torch.device("meta"):
        net = build()
    return pf.functionalize(net.to_empty(device="cpu"))


def table_of(method, model) -> pf.Table:
    adapter = pf.bind(method, model)
    return pf.table(adapter, adapter.init(0)[1])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))


def test_rows_are_the_leaves_in_their_order():
    table = table_of(pf.chain(pf.lora(".*", rank=2), pf.train("2", name="head")), empty(mlp))
    assert table.rows == (
        ("lora.0.weight.A", (2, 8), 16),
        ("lora.0.weight.B", (4, 2), 8),
        ("lora.2.weight.A", (2, 4), 8),
        ("lora.2.weight.B", (2, 2), 4),
        ("head.2.weight", (2, 4), 8),
        ("head.2.bias", (2,), 2),
    )
    assert table.total == 46
    assert table.base == 8 * 4 + 4 + 4 * 2 + 2
    assert table.percent == pytest.approx(100 * 46 / 46)


def test_totals_agree_with_the_tensors():
    model = empty(mlp)
    for method in (pf.dora(".*", rank=1, bias=True), pf.gift(".*", rank=2, share="none"), pf.ia3(".*"), pf.train("0")):
        adapter = pf.bind(method, model)
        _, trainable = adapter.init(0)
        table = pf.table(adapter, trainable)
        counts = []
        pf.map_leaves(lambda t, counts=counts: counts.append(t.numel()) or t, trainable)
        assert table.total == sum(counts) == sum(count for *_, count in table.rows)
        assert table.base == sum(t.numel() for t in model.params.values())
        assert table.percent == pytest.approx(100 * table.total / table.base)


def test_full_tuning_is_a_hundred_per_cent():
    assert table_of(pf.train(".*"), empty(mlp)).percent == 100.0


@pytest.mark.parametrize("build", [Tied, Shared])
def test_what_is_shared_counts_once(build):
    net = seeded(build)()
    model = pf.functionalize(net)
    table = table_of(pf.train(".*"), model)
    assert table.base == table.total == sum(p.numel() for p in net.parameters())
    assert len({name for name, *_ in table.rows}) == len(table.rows) == len(model.params)
    assert table.percent == 100.0


def scalars(shape=()) -> pf.Transform:
    return pf.Transform(
        init=lambda weights, key: {path: {"gain": torch.ones(shape)} for path in weights},
        apply=lambda tree, weights: {path: w * tree[path]["gain"].sum() for path, w in weights.items()},
    )


def test_a_scalar_leaf_counts_one_and_is_called_scalar():
    table = table_of(pf.on("0.weight", scalars(), name="gain"), empty(mlp))
    assert table.rows == (("gain.0.weight.gain", (), 1),)
    assert table.total == 1
    line = next(line for line in str(table).splitlines() if line.startswith("gain.0.weight.gain"))
    assert line.split() == ["gain.0.weight.gain", "scalar", "1"]


def test_an_empty_leaf_counts_nothing():
    table = table_of(pf.on("0.weight", scalars((0, 3)), name="gain"), empty(mlp))
    assert (table.rows[0][1:], table.total, table.percent) == (((0, 3), 0), 0, 0.0)
    assert "0 x 3" in str(table)


def test_an_adapter_without_leaves_has_an_empty_table():
    table = table_of(pf.chain(), empty(mlp))
    assert (table.rows, table.total, table.percent) == ((), 0, 0.0)
    assert "0 % of the 46 values" in str(table)


def test_a_model_without_parameters_has_no_per_cent():
    table = table_of(pf.chain(), empty(nn.ReLU))
    assert (table.base, table.percent) == (0, 0.0)
    assert str(table)


def test_the_text_has_every_row_aligned_the_totals_and_the_per_cent():
    table = table_of(pf.lora(".*", rank=1), empty(lambda: nn.Linear(2000, 1000)))
    lines = str(table).splitlines()
    assert lines[0].split() == ["name", "shape", "count"]
    assert lines[2].split() == ["lora.weight.A", "1", "x", "2000", "2,000"]
    assert lines[3].split() == ["lora.weight.B", "1000", "x", "1", "1,000"]
    assert lines[5].split() == ["total", "3,000"]
    assert lines[6] == "0.1499 % of the 2,001,000 values of the model train"
    assert len({len(line) for line in lines[:6]}) == 1
    assert set(lines[1]) == set(lines[4]) == {"-"}
    assert not any(line != line.rstrip() for line in lines)


def test_named_chains_and_groups_are_paths():
    method = pf.chain(pf.chain(pf.gift(".*", rank=1, share={"g": ".*"}), name="inner"), name="outer")
    table = table_of(method, empty(lambda: nn.Linear(3, 3)))
    assert [name for name, *_ in table.rows] == ["outer.inner.gift.g.phi", "outer.inner.gift.g.psi"]


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda tree: {}, "lora.weight.A"),
        (lambda tree: {"lora": {"weight": {"A": tree["lora"]["weight"]["A"]}}}, "lora.weight.B"),
        (lambda tree: {**tree, "more": {"x": torch.ones(1)}}, "more.x"),
        (lambda tree: pf.stack([tree, tree]), "lora.weight.A"),
        (lambda tree: pf.map_leaves(lambda t: t.long(), tree), "int64"),
        (lambda tree: {"lora": {"weight": None}}, "lora.weight"),
    ],
    ids=["empty", "missing", "too many", "stacked", "integers", "no tensor"],
)
def test_a_tree_of_another_adapter_is_refused_by_name(spoil, word):
    adapter = pf.bind(pf.lora("weight", rank=1), empty(lambda: nn.Linear(2, 2)))
    with pytest.raises(pf.TreeError, match=word):
        pf.table(adapter, spoil(adapter.init(0)[1]))


def test_the_two_trees_swapped_are_refused():
    adapter = pf.bind(pf.lora("weight", rank=1), empty(lambda: nn.Linear(2, 2)))
    with pytest.raises(pf.TreeError, match="'weight'"):
        pf.table(adapter, adapter.init(0)[0])


def test_a_table_is_a_value():
    model = empty(mlp)
    assert table_of(pf.lora("0", rank=1), model) == table_of(pf.lora("0", rank=1), model)
    with pytest.raises(AttributeError):
        table_of(pf.lora("0", rank=1), model).total = 3


def test_rows_can_be_numbered():
    adapter = pf.bind(pf.lora(".*", rank=1), empty(mlp))
    trainable = adapter.init(0)[1]
    table = pf.table(adapter, trainable, index=True)
    plain = pf.table(adapter, trainable)
    assert (table.rows, table.total, table.base) == (plain.rows, plain.total, plain.base)
    lines = str(table).splitlines()
    assert lines[0].split() == ["index", "name", "shape", "count"]
    assert [line.split()[0] for line in lines[2:6]] == ["0", "1", "2", "3"]
    assert lines[2].split() == ["0", "lora.0.weight.A", "1", "x", "8", "8"]
    assert lines[7].split() == ["total", "18"]
    assert len({len(line) for line in lines[:8]}) == 1
    assert [line.split()[:1] for line in str(plain).splitlines()[2:3]] == [["lora.0.weight.A"]]
