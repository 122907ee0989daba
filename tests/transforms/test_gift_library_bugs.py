"""What is known to go wrong in qiauil's GIFt library, each with what happens here instead."""

import copy
import functools
import math
import pickle

import pytest
import torch
from torch import nn

import peft_func as pf
from tests.zoo import randn, seeded


class Basic(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    def __init__(self, widths=(64, 128, 256, 512), classes=1000, depth=2):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        before = widths[0]
        for i, width in enumerate(widths):
            blocks = [Basic(before if k == 0 else width, width, 2 if i and k == 0 else 1) for k in range(depth)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            before = width
        self.depth = len(widths)
        self.fc = nn.Linear(before, classes)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        for i in range(self.depth):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.fc(x.mean((2, 3)))


def resnet18():
    with torch.device("meta"):
        return pf.functionalize(ResNet())


@pytest.fixture(scope="module")
def model():
    return pf.functionalize(seeded(lambda: ResNet((4, 8), 5, 1))())


LORA = functools.partial(pf.lora, rank=3, conv="balanced")
STRATEGY = pf.first_match((pf.class_named("Linear", "Conv2d"), LORA), root=ResNet)


def total(adapter):
    return sum(math.prod(shape) for shape in adapter.spec.values())


def drawn(adapter, seed=1):
    """A tree with nothing at zero."""
    frozen, trainable = adapter.init(seed)
    generator = torch.Generator().manual_seed(seed)
    return frozen, pf.map_leaves(lambda t: torch.randn(t.shape, dtype=t.dtype, generator=generator), trainable)


# 1. The README's count, with no bias that trains unasked.


def test_resnet18_has_the_count_of_the_readme_and_no_stray_bias():
    model = resnet18()
    assert sum(tensor.numel() for tensor in model.params.values()) == 11_689_512
    adapter = pf.bind(STRATEGY, model)
    assert total(adapter) == 75_063
    assert len(adapter.spec) == 42
    assert adapter.spec[("lora", "conv1.weight", "B")] == (448, 3)
    assert adapter.spec[("lora", "conv1.weight", "A")] == (3, 21)
    assert adapter.held == frozenset()
    assert not any("bias" in name for keys in adapter.spec for name in keys)
    biased = pf.bind(pf.first_match((pf.class_named("Linear", "Conv2d"), LORA, {"bias": True})), model)
    assert total(biased) == 76_063
    assert biased.held == {"fc.bias"}


def test_the_table_of_the_readme(model):
    adapter = pf.bind(STRATEGY, model)
    table = pf.table(adapter, adapter.init(0)[1], index=True)
    assert table.total == total(adapter)
    rows = str(table).splitlines()[2:]
    assert rows[0].split()[:2] == ["0", "lora.conv1.weight.A"]
    assert rows[len(adapter.spec) - 1].split()[:2] == [str(len(adapter.spec) - 1), "lora.fc.weight.B"]


# 2. Loading after a merge.


def test_loading_after_a_merge_leaves_the_base_alone(model, tmp_path):
    adapter = pf.bind(STRATEGY, model)
    frozen, one = drawn(adapter, 1)
    _, two = drawn(adapter, 2)
    pf.save(tmp_path / "two.safetensors", adapter, two)
    before = {name: tensor.clone() for name, tensor in model.params.items()}
    merged = pf.merge(adapter.apply(frozen, one))
    again, frozen, loaded = pf.load(tmp_path / "two.safetensors", model)
    assert all(torch.equal(before[name], frozen[name]) for name in frozen)
    x = randn(2, 3, 16, 16)
    expected = pf.merge(adapter.apply(adapter.init(0)[0], two))
    torch.testing.assert_close(model(again.apply(frozen, loaded), x), model(expected, x), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(model(merged, x), model(expected, x))
    onto = pf.functionalize(ResNet((4, 8), 5, 1).double()).params.keys()
    assert onto == merged.keys()


# 3. What a checkpoint holds.


def test_a_file_holds_what_trains_and_no_more(model, tmp_path):
    methods = {"lora": STRATEGY, "svdiff": pf.first_match((pf.class_named("Linear", "Conv2d"), pf.svdiff))}
    for name, method in methods.items():
        adapter = pf.bind(method, model)
        _, trainable = adapter.init(0)
        pf.save(tmp_path / name, adapter, trainable)
        from safetensors import safe_open

        with safe_open(tmp_path / name, "pt") as file:
            held = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        assert held == {".".join(keys): list(shape) for keys, shape in adapter.spec.items()}
        assert total(adapter) < sum(tensor.numel() for tensor in model.params.values())


def test_singular_values_of_resnet18_are_few():
    adapter = pf.bind(pf.first_match((pf.class_named("Linear", "Conv2d"), pf.svdiff)), resnet18())
    assert total(adapter) == 11_157


# 4. Copies.


def test_a_copy_is_a_copy(model):
    adapter = pf.bind(STRATEGY, model)
    frozen, trainable = drawn(adapter)
    for twin in (copy.deepcopy(trainable), pickle.loads(pickle.dumps(trainable))):
        old, new = list(pf.leaves(trainable)), list(pf.leaves(twin))
        assert [keys for keys, _ in old] == [keys for keys, _ in new]
        for (_, a), (_, b) in zip(old, new, strict=True):
            assert torch.equal(a, b)
            assert a.data_ptr() != b.data_ptr()
        x = randn(1, 3, 16, 16)
        assert torch.equal(model(adapter.apply(frozen, twin), x), model(adapter.apply(frozen, trainable), x))
        before = trainable["lora"]["fc.weight"]["A"].clone()
        twin["lora"]["fc.weight"]["A"].add_(1)
        assert torch.equal(trainable["lora"]["fc.weight"]["A"], before)
    assert pickle.loads(pickle.dumps(STRATEGY)).caps[0].action.keywords == LORA.keywords


# 5. A module that was matched, and nothing done there.


def test_what_is_matched_and_left_alone_is_frozen(model):
    adapter = pf.bind(pf.first_match((["layer1"], None), (["fc"], pf.train)), model)
    frozen, trainable = adapter.init(0)
    assert {name for name in model.params if name.startswith("layer1.")} <= set(frozen)
    assert list(trainable["train"]) == ["fc.weight", "fc.bias"]


@pytest.mark.parametrize(
    "action", [pf.lora(["nothing"]), pf.first_match((["nothing"], pf.train)), pf.chain(), lambda where: pf.chain()]
)
def test_a_method_that_does_nothing_there_is_an_error_and_not_full_tuning(model, action):
    with pytest.raises(pf.SelectorError):
        pf.bind(pf.first_match((["layer1"], action), (["fc"], pf.train)), model)


# 6. Purity.


def test_calls_in_eval_mode_and_in_train_mode_change_nothing(model):
    adapter = pf.bind(STRATEGY, model)
    frozen, trainable = drawn(adapter)
    before = {name: tensor.clone() for name, tensor in model.params.items()}
    x = randn(2, 3, 16, 16)
    evaluated = model.eval()
    first = evaluated(adapter.apply(frozen, trainable), x)
    for _ in range(3):
        model.train()(adapter.apply(frozen, trainable), x)
        assert torch.equal(evaluated(adapter.apply(frozen, trainable), x), first)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.params.items())


def test_adapters_stack_in_eval_mode(model):
    adapter = pf.bind(STRATEGY, model)
    frozen, one = drawn(adapter, 1)
    _, two = drawn(adapter, 2)
    x = randn(2, 3, 16, 16)

    def loss(tree):
        return model(adapter.apply(frozen, tree), x).square().sum()

    grads = torch.vmap(torch.func.grad(loss))(pf.stack([one, two]))
    for tree, mapped in zip((one, two), pf.unstack(grads), strict=True):
        for (keys, a), (_, b) in zip(pf.leaves(torch.func.grad(loss)(tree)), pf.leaves(mapped), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=str(keys))


# 7. The debug view, defaults, subclasses, layers without a method.


def test_the_preview_names_the_right_pair_of_each_module(model):
    method = pf.first_match(
        (pf.class_named("BatchNorm2d"), pf.train),
        (pf.class_named("Linear"), LORA),
        (pf.class_named("Conv2d"), LORA, {"name": "convs"}),
    )
    numbers = {"BatchNorm2d": "0", "Linear": "1", "Conv2d": "2"}
    rows = pf.preview(method, model).rows
    assert {row.class_name for row in rows} == set(numbers)
    assert all(row.cap == numbers[row.class_name] for row in rows)
    bound = {part.keys[-1]: set(part.paths) for part in pf.bind(method, model).parts}
    assert {row.method: True for row in rows}.keys() == bound.keys()
    assert all(set(row.parameters) <= bound[row.method] for row in rows)


def test_strategies_share_nothing(model):
    one = pf.first_match((["fc"], pf.train))
    two = pf.first_match((["conv1"], pf.train), name="two")
    pf.bind(one, model)
    pf.bind(two, model)
    assert [cap.check for cap in one.caps] == [["fc"]]
    assert (one.root, one.name, len(two.caps)) == ((), None, 1)


def test_subclasses_are_matched(model):
    class MyLinear(nn.Linear):
        pass

    net = nn.Sequential(nn.Linear(4, 4), MyLinear(4, 4), nn.MultiheadAttention(4, 2))
    other = pf.functionalize(net)

    def found(check):
        return pf.bind(pf.first_match((check, pf.lora, {"rank": 1})), other).parts[0].paths

    everywhere = ("0.weight", "1.weight", "2.out_proj.weight")
    assert found(pf.class_named("Linear")) == found(pf.of_type(nn.Linear)) == everywhere
    assert found(pf.class_named("Linear", subclasses=False)) == ("0.weight",)


@pytest.mark.parametrize("build", [lambda: nn.Embedding(5, 4), lambda: nn.ConvTranspose2d(4, 3, 3)])
@pytest.mark.parametrize("conv", ["balanced", "out_as_h"])
def test_embeddings_and_transposed_convolutions_have_lora(build, conv):
    net = seeded(build)()
    other = pf.functionalize(net)
    check = pf.class_named("Embedding", "ConvTranspose2d")
    adapter = pf.bind(pf.first_match((check, pf.lora, {"rank": 2, "conv": conv})), other)
    frozen, trainable = drawn(adapter)
    x = torch.tensor([0, 3]) if isinstance(net, nn.Embedding) else randn(1, 4, 5, 5)
    weights = adapter.apply(frozen, trainable)
    torch.testing.assert_close(other(weights, x), other(pf.merge(weights), x), rtol=1e-10, atol=1e-10)


# 8. BatchNorm.


def test_batch_norm_statistics_do_not_move(model, tmp_path):
    adapter = pf.bind(STRATEGY, model)
    frozen, trainable = drawn(adapter)
    before = {name: tensor.clone() for name, tensor in model.state.items()}
    x = randn(4, 3, 16, 16)
    model.train()(adapter.apply(frozen, trainable), x)
    _, state = model.train().with_state(adapter.apply(frozen, trainable), model.state, x)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state.items())
    assert any(not torch.equal(before[name], tensor) for name, tensor in state.items())  # returned, for who wants them
    pf.save(tmp_path / "a.safetensors", adapter, trainable)
    assert not any("running" in part for keys in adapter.spec for part in keys)
