"""Checkpoints of the original GIFT: read against a plain module with their names, written, and refused when odd."""

import collections
import copy
import os
import pickle
import zipfile

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import peft_func as pf
from peft_func.interop.torch_file import read_tensors
from tests.transforms.plain import random_like, same
from tests.zoo import ZOO, randn, seeded


class Block(nn.Module):
    """A transformer block's linear layers, with two modules called proj."""

    def __init__(self):
        super().__init__()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8)})
        self.mlp = nn.ModuleDict({"proj": nn.Linear(8, 8)})

    def forward(self, x):
        q, k, v = self.attn["qkv"](x).chunk(3, -1)
        x = x + self.attn["proj"](torch.tanh(q) * k + v)
        return x + self.mlp["proj"](torch.tanh(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.blocks(x))


@pytest.fixture
def net():
    return seeded(Net)()


class Generator(nn.Module):
    """A stack of one residual MLP over channels, named as theirs are."""

    def __init__(self, rank):
        super().__init__()
        block = nn.ModuleDict({"norm1": nn.LayerNorm(rank)})
        block["mlp"] = nn.ModuleDict({"fc1": nn.Linear(rank, 2 * rank), "fc2": nn.Linear(2 * rank, rank)})
        self.blocks = nn.ModuleList([block])

    def forward(self, C):
        (block,) = self.blocks
        return C + block["mlp"]["fc2"](F.gelu(block["mlp"]["fc1"](block["norm1"](C))))


class Theirs(nn.Module):
    """What their wrapper saves, and how it computes: y = x W^T + b + x dW^T with dW from one generator a target."""

    def __init__(self, backbone, targets, rank=2, bias=False, block=False, shared=False):
        super().__init__()
        self.backbone = backbone
        keys = ["shared_projection"] if shared else targets
        self.in_projections = nn.ModuleDict({key: nn.Linear(8, rank, bias=bias) for key in keys})
        self.hypernets = nn.ModuleDict({key: Generator(rank) if block else nn.Identity() for key in keys})
        self.out_projections = nn.ModuleDict({key: nn.Linear(rank, 8, bias=bias) for key in keys})
        self.targets = {target: "shared_projection" if shared else target for target in targets}

    def forward(self, x, layers=(0, 1)):
        weights = {}
        for name, module in self.backbone.named_modules():
            for target, key in self.targets.items():
                if name.endswith("." + target.replace(":", ".")) and any(f"blocks.{i}." in name for i in layers):
                    C = self.hypernets[key](self.in_projections[key](module.weight))
                    weights[f"{name}.weight"] = module.weight + self.out_projections[key](C)
        return torch.func.functional_call(self.backbone, weights, (x,))

    def saved(self, head=False):
        return {k: v for k, v in self.state_dict().items() if "backbone" not in k or (head and "head" in k)}


def wrapper(net, *args, **kwargs):
    return seeded(lambda: Theirs(net, *args, **kwargs))()


CASES = {
    "one target": ({"targets": ["attn:proj"]}, {}, {}),
    "two targets": ({"targets": ["qkv", "mlp:proj"], "rank": 3}, {}, {}),
    "both of a name": ({"targets": ["proj"]}, {}, {}),
    "biases": ({"targets": ["qkv"], "bias": True}, {}, {}),
    "a block": ({"targets": ["qkv", "attn:proj"], "block": True}, {"block": {"block_type": "mlp", "norm": "ln"}}, {}),
    "shared": ({"targets": ["attn:proj", "qkv"], "shared": True}, {"targets": ["attn:proj", "qkv"]}, {}),
    "one layer": ({"targets": ["qkv"]}, {"layers": 1}, {"layers": [1]}),
    "targets told": ({"targets": ["qkv", "mlp:proj"]}, {"targets": ["mlp.proj", "qkv"]}, {}),
}


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_computes_what_their_wrapper_does_and_is_written_back_bit_for_bit(case, head, net, tmp_path):
    made, told, called = CASES[case]
    theirs = wrapper(net, **made)
    base = copy.deepcopy(theirs.backbone)
    if head:
        nn.init.zeros_(base.head.weight)  # the one in the file is another
    model = pf.functionalize(base)
    path = tmp_path / "checkpoint.pth"
    torch.save(collections.OrderedDict(theirs.saved(head=head)), path)
    x = randn(4, 5, 8)
    expected = theirs(x, **called)
    adapter, ours, tree = pf.load_gift(tmp_path, model, **told)
    assert list(ours) == [name for name in model.params if not (head and name.startswith("head"))]
    assert list(tree) == ["gift", "train"][: 1 + head]
    same(model(adapter.apply(ours, tree), x), expected)
    written = tmp_path / "again.pth"
    pf.save_gift(written, adapter, tree, layers=told.get("layers"))
    again = torch.load(written, weights_only=True)
    assert list(again) == list(theirs.saved(head=head))
    for name, tensor in theirs.saved(head=head).items():
        assert again[name].dtype is tensor.dtype
        assert again[name].is_contiguous()
        assert torch.equal(again[name], tensor), name
    assert sorted(tmp_path.iterdir()) == [written, path]
    theirs.load_state_dict(again, strict=False)
    same(pf.load_gift(written, model, **told)[2], tree, 0.0)


BLOCKS = {
    "simple_block": {"block_type": "simple_block", "activation": "gelu"},
    "mlp": {"block_type": "mlp", "num_blocks": 2, "norm": "ln"},
    "mlp_mixer": {"block_type": "mlp_mixer", "num_mixed_tokens": 4},
    "transformer": {"block_type": "transformer", "num_heads": 2},
    "pamcat_transformer": {"block_type": "pamcat_transformer", "num_clusters": 3},
    "pamcat_attn": {"block_type": "pamcat_attn", "num_clusters": 3},
}
NAMES = {
    "simple_block": [],
    "mlp": ["norm1", "mlp.fc1", "mlp.fc2"],
    "mlp_mixer": ["mlp1.fc1", "mlp1.fc2", "mlp2.fc1", "mlp2.fc2"],
    "transformer": ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"],
    "pamcat_transformer": [
        "attn.q", "attn.k", "attn.v", "attn.cluster.cluster", "attn.proj", "mlp.fc1", "mlp.fc2",
    ],
    "pamcat_attn": ["attn.q", "attn.k", "attn.v", "attn.cluster.cluster", "attn.proj"],
}  # fmt: skip


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_has_their_names_and_comes_back(block, net, tmp_path):
    model = pf.functionalize(net)
    adapter = pf.bind(pf.gift(["qkv"], rank=4, block=BLOCKS[block]), model)
    frozen, start = adapter.init(0)
    tree = random_like(start)
    path = tmp_path / "checkpoint.pth"
    pf.save_gift(path, adapter, tree)
    names = [name for name in torch.load(path, weights_only=True) if name.startswith("hypernets.")]
    count = BLOCKS[block].get("num_blocks", 1)
    assert set(names) == {
        f"hypernets.qkv.blocks.{i}.{layer}.{leaf}" for i in range(count) for layer in NAMES[block]
        for leaf in ("weight", "bias")
    }  # fmt: skip
    again, _, loaded = pf.load_gift(path, model, block=BLOCKS[block])
    same(loaded, tree, 0.0)
    x = randn(4, 5, 8)
    same(model(again.apply(frozen, loaded), x), model(adapter.apply(frozen, tree), x), 0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_keep_their_dtype(dtype, net, tmp_path):
    model = pf.functionalize(net.float())
    adapter = pf.bind(pf.gift(["qkv"], rank=2), model)
    tree = pf.map_leaves(lambda t: (t + 0.1).to(dtype), adapter.init(0)[1])
    pf.save_gift(tmp_path / "checkpoint.pth", adapter, tree)
    _, _, loaded = pf.load_gift(tmp_path, model)
    for keys, tensor in pf.leaves(loaded):
        assert tensor.dtype is dtype
        assert torch.equal(tensor, dict(pf.leaves(tree))[keys])


def test_a_sequence_classifier_saves_its_classifier(tmp_path):
    model = pf.functionalize(ZOO["bert"].build())
    adapter = pf.bind(pf.chain(pf.gift(["query", "value"], rank=2), pf.train(r"classifier\..*")), model)
    frozen, start = adapter.init(0)
    tree = random_like(start)
    pf.save_gift(tmp_path / "checkpoint.pth", adapter, tree)
    assert list(torch.load(tmp_path / "checkpoint.pth", weights_only=True))[:2] == [
        "backbone.classifier.weight", "backbone.classifier.bias",
    ]  # fmt: skip
    again, ours, loaded = pf.load_gift(tmp_path, model)
    same(loaded, tree, 0.0)
    assert list(ours) == list(frozen)
    assert again.parts[1].paths == ("classifier.weight", "classifier.bias")


# --- what is refused --------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return bytearray, (2**40,)


class Call:
    def __reduce__(self):
        return os.getcwd, ()


def spoiled(**changes):
    def change(saved, path):
        for name, value in changes.items():
            name = name.replace("__", ".")
            saved.pop(name) if value is None else saved.update({name: value(saved.get(name))})
        torch.save(saved, path)

    return change


def compressed(saved, path):
    torch.save(saved, path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def truncated(saved, path):
    torch.save(saved, path)
    path.write_bytes(path.read_bytes()[:-200])


def shortened_storage(saved, path):
    """A pickle that claims more numbers than the archive holds."""
    torch.save(saved, path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content[:4] if "/data/" in name else content)


PHI, PSI = "in_projections__qkv__weight", "out_projections__qkv__weight"
BAD = {
    "missing psi": (spoiled(**{PSI: None}), ["lacks", "out_projections.qkv.weight"]),
    "missing phi": (spoiled(**{PHI: None}), ["no checkpoint of GIFT"]),
    "unknown": (spoiled(something=lambda _: torch.ones(2)), ["'something'"]),
    "a block": (spoiled(hypernets__qkv__blocks__0__mlp__fc1__weight=lambda _: torch.ones(4, 2)), ["fc1", "block="]),
    "one bias": (spoiled(in_projections__qkv__bias=lambda _: torch.ones(3)), ["in_projections.qkv.bias", "(2,)"]),
    "a target": (
        spoiled(in_projections__nowhere__weight=lambda _: torch.ones(2, 8)), ["'nowhere'", "no linear module"],
    ),
    "another rank": (spoiled(in_projections__proj__weight=lambda _: torch.ones(3, 8)), ["ranks", "3"]),
    "a rank too high": (spoiled(**{PHI: lambda _: torch.ones(9, 8)}), ["rank=9"]),
    "a shape": (spoiled(**{PSI: lambda _: torch.ones(8, 3)}), ["out_projections.qkv.weight", "(8, 3)", "(8, 2)"]),
    "a shape out of nothing": (
        spoiled(**{PSI: lambda _: torch.ones(1).expand(2**20, 2**20)}), ["out_projections.qkv.weight", "1048576"],
    ),
    "a vector": (spoiled(**{PHI: lambda _: torch.ones(2)}), ["no checkpoint of GIFT"]),
    "nan": (spoiled(**{PSI: lambda t: t * float("nan")}), ["not finite", "allow_nonfinite=True"]),
    "integers": (spoiled(**{PSI: lambda t: t.long()}), ["something else than tensors", "LongStorage"]),
    "a list": (spoiled(**{PSI: lambda t: [t]}), ["a list", "out_projections.qkv.weight"]),
    "a sparse tensor": (spoiled(**{PSI: lambda t: t.to_sparse()}), ["something else"]),
    "no dict": (lambda saved, path: torch.save([saved], path), ["a list"]),
    "a bomb": (spoiled(evil=lambda _: Evil()), ["bytearray"]),
    "a call": (spoiled(evil=lambda _: Call()), ["getcwd", "trust"]),
    "shared": (
        spoiled(in_projections__shared_projection__weight=lambda _: torch.ones(2, 8)), ["one projection", "targets="],
    ),
    "a head of another": (spoiled(backbone__head__scale=lambda _: torch.ones(3)), ["backbone.head.scale"]),
    "half a head": (spoiled(backbone__head__bias=lambda _: torch.ones(3)), ["backbone.head.weight"]),
    "a backbone": (spoiled(backbone__blocks__0__attn__qkv__bias=lambda _: torch.ones(24)), ["qkv.bias"]),
    "text": (lambda saved, path: path.write_text("not a zip"), ["no zip archive"]),
    "legacy": (
        lambda saved, path: torch.save(saved, path, _use_new_zipfile_serialization=False), ["no zip archive"],
    ),
    "a plain pickle": (lambda saved, path: path.write_bytes(pickle.dumps({"a": 1})), ["no zip archive"]),
    "another zip": (lambda saved, path: zipfile.ZipFile(path, "w").close(), ["list of tensors"]),
    "compressed": (compressed, ["compressed"]),
    "truncated": (truncated, []),
    "short storage": (shortened_storage, ["claims"]),
    "absent": (lambda saved, path: None, ["checkpoint.pth"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_files_that_are_odd_are_refused_by_name(case, net, tmp_path):
    spoil, words = BAD[case]
    path = tmp_path / "checkpoint.pth"
    spoil(wrapper(net, ["qkv"]).saved(), path)
    with pytest.raises((pf.FileFormatError, pf.OptionError)) as caught:
        pf.load_gift(path, pf.functionalize(net))
    assert case == "shared" or isinstance(caught.value, OSError)
    for word in words:
        assert word in str(caught.value)


def test_any_cut_of_a_file_is_an_error_of_ours(net, tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save(wrapper(net, ["qkv"]).saved(), path)
    whole, model = path.read_bytes(), pf.functionalize(net)
    for i in range(0, len(whole), 37):
        path.write_bytes(whole[:i])
        with pytest.raises(pf.FileFormatError):
            pf.load_gift(path, model)


def test_bytes_that_are_changed_give_other_values_or_an_error_of_ours(net, tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save(wrapper(net, ["qkv"]).saved(), path)
    whole, model = path.read_bytes(), pf.functionalize(net)
    refused = 0
    for i in range(0, len(whole), 23):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 0x55]) + whole[i + 1 :])
        try:
            pf.load_gift(path, model)
        except pf.FileFormatError:
            refused += 1
    assert refused > 10


def test_values_that_are_not_finite_can_be_asked_for(net, tmp_path):
    spoiled(**{PSI: lambda t: t * float("inf")})(wrapper(net, ["qkv"]).saved(), tmp_path / "checkpoint.pth")
    _, _, tree = pf.load_gift(tmp_path, pf.functionalize(net), allow_nonfinite=True)
    assert not tree["gift"]["qkv"]["psi"].isfinite().all()


def test_a_file_larger_than_the_model_could_need_is_not_read(net, tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save(wrapper(net, ["qkv"]).saved(), path)
    with pytest.raises(pf.FileFormatError, match="more than the 100"):
        read_tensors(path, largest=100)
    with path.open("ab") as file:
        file.truncate(2**31)  # sparse: takes no room
    with pytest.raises(pf.FileFormatError, match=r"2,147,483,648 bytes"):
        pf.load_gift(path, pf.functionalize(net))


@pytest.mark.parametrize(
    ("told", "error", "words"),
    [
        ({"targets": ["mlp:proj"]}, pf.FileFormatError, ["qkv", "mlp.proj"]),
        ({"targets": "qkv"}, pf.OptionError, ["['qkv']"]),
        ({"layers": 7}, pf.FileFormatError, ["'qkv'", "no linear module of these layers"]),
        ({"block": "mlp"}, pf.FileFormatError, ["hypernets.qkv.blocks.0.mlp", "block="]),
        ({"block": "nothing"}, pf.OptionError, ["'nothing'"]),
        ({"block": {"block_type": "transformer", "num_heads": 3}}, pf.FileFormatError, ["num_heads=3"]),
    ],
)
def test_what_is_told_must_fit_the_file(told, error, words, net, tmp_path):
    torch.save(wrapper(net, ["qkv"]).saved(), tmp_path / "checkpoint.pth")
    with pytest.raises(error) as caught:
        pf.load_gift(tmp_path, pf.functionalize(net), **told)
    for word in words:
        assert word in str(caught.value)


def test_a_tied_head_must_agree_with_its_twin(tmp_path):
    class TiedHeads(Net):
        def __init__(self):
            super().__init__()
            self.aux_head = self.head

    net = seeded(TiedHeads)()
    model = pf.functionalize(net)
    saved = wrapper(net, ["qkv"]).saved(head=True)
    assert "backbone.aux_head.weight" in saved
    torch.save(saved, tmp_path / "checkpoint.pth")
    adapter, _, tree = pf.load_gift(tmp_path, model)
    pf.save_gift(tmp_path / "again.pth", adapter, tree)
    assert set(torch.load(tmp_path / "again.pth", weights_only=True)) == set(saved)
    torch.save(saved | {"backbone.aux_head.bias": torch.ones(3)}, tmp_path / "checkpoint.pth")
    with pytest.raises(pf.FileFormatError, match=r"head\.bias.*another value"):
        pf.load_gift(tmp_path, model)


UNSAVED = {
    "another method": (lambda: pf.lora(["qkv"], rank=2), ["'lora'"]),
    "two parts": (lambda: pf.chain(pf.gift(["qkv"], rank=2), pf.ia3(["qkv"])), ["'ia3'"]),
    "chunks": (lambda: pf.gift(["qkv"], rank=2, chunks=("q", None, "v")), ["chunks"]),
    "a group of two ends": (lambda: pf.gift(r".*\.(qkv|mlp.proj)\..*", rank=2, share={"a": ".*"}), ["'a'"]),
    "the top": (lambda: pf.gift("head", rank=2), ["'head'"]),
    "half a head": (lambda: pf.chain(pf.gift(["qkv"], rank=2), pf.train("head.bias")), ["head.bias", "pf.save"]),
    "no head": (lambda: pf.chain(pf.gift(["qkv"], rank=2), pf.train(r".*attn.proj\..*")), ["attn.proj.weight"]),
}


@pytest.mark.parametrize("case", UNSAVED)
def test_what_their_wrapper_cannot_hold_is_not_written(case, net, tmp_path):
    make, words = UNSAVED[case]
    adapter = pf.bind(make(), pf.functionalize(net))
    with pytest.raises(pf.OptionError) as caught:
        pf.save_gift(tmp_path / "checkpoint.pth", adapter, adapter.init(0)[1])
    for word in words:
        assert word in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_modules_that_are_not_linear_are_not_written(tmp_path):
    model = pf.functionalize(ZOO["gpt2"].build())
    adapter = pf.bind(pf.gift(["c_attn"], rank=2), model)
    with pytest.raises(pf.OptionError, match="c_attn"):
        pf.save_gift(tmp_path / "checkpoint.pth", adapter, adapter.init(0)[1])


def test_a_group_is_written_as_the_end_of_its_paths(net, tmp_path):
    """`proj` over depth, of attention alone, is the target `attn:proj` to them; each place alone is its path's end."""
    model = pf.functionalize(net)
    for share, names in (
        ("target", ["attn:proj"]),
        ("none", ["0:attn:proj", "1:attn:proj"]),
        ({"attn.proj": ".*"}, ["attn:proj"]),
        ("all", ["shared_projection"]),
    ):
        adapter = pf.bind(pf.gift(r".*attn\.proj.*", rank=2, share=share), model)
        tree = random_like(adapter.init(0)[1])
        pf.save_gift(tmp_path / "checkpoint.pth", adapter, tree)
        found = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
        assert [name.split(".")[1] for name in found] == [*names, *names]
        told = {"targets": ["attn:proj"]} if share == "all" else {}
        loaded = pf.load_gift(tmp_path, model, **told)[2]["gift"]
        assert list(loaded) == ["all" if share == "all" else name.replace(":", ".") for name in names]
        same(list(loaded.values()), list(tree["gift"].values()), 0.0)


def test_some_layers_are_told_or_are_a_longer_target(net, tmp_path):
    model = pf.functionalize(net)
    adapter = pf.bind(pf.gift(pf.suffix("qkv") & pf.index(1), rank=2), model)
    tree = adapter.init(0)[1]
    for layers, key in ((1, "qkv"), (None, "1:attn:qkv")):
        pf.save_gift(tmp_path / "checkpoint.pth", adapter, tree, layers=layers)
        again, _, loaded = pf.load_gift(tmp_path, model, layers=layers)
        assert list(loaded["gift"]) == [key.replace(":", ".")]
        assert again.parts[0].paths == ("blocks.1.attn.qkv.weight",)


def test_a_failed_write_leaves_what_was_there(net, tmp_path):
    adapter = pf.bind(pf.gift(["qkv"], rank=2), pf.functionalize(net))
    with pytest.raises(pf.FileFormatError, match="cannot be written"):
        pf.save_gift(tmp_path / "nowhere" / "checkpoint.pth", adapter, adapter.init(0)[1])
    with pytest.raises(pf.TreeError):
        pf.save_gift(tmp_path / "checkpoint.pth", adapter, {"gift": {}})
    assert not list(tmp_path.iterdir())


def test_load_takes_a_functional_model(net, tmp_path):
    with pytest.raises(pf.OptionError, match="functionalize"):
        pf.load_gift(tmp_path, net)
