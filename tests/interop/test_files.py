"""The library's own file: what is saved comes back, the same tree gives the same bytes, and no file is trusted."""

import copy
import json
import math
import os
import pickle
import resource
import stat
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import peft_func as pf
from peft_func.interop import files

ROOT = Path(__file__).parents[2]


class Block(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.fc1 = nn.Linear(width, 8)
        self.fc2 = nn.Linear(8, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(x + self.fc2(torch.tanh(self.fc1(self.q_proj(x) * self.v_proj(x)))))


class Net(nn.Module):
    """Blocks, a convolution, an embedding and a head that is tied to it."""

    def __init__(self, depth: int = 2, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, width)
        self.layers = nn.ModuleList([Block(width) for _ in range(depth)])
        self.conv = nn.Conv1d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.conv(x.mT).mT)


def functional(build, seed: int = 0) -> pf.FunctionalModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return pf.functionalize(build().double().eval())


def moved(tree, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    return pf.map_leaves(lambda t: t + 0.3 * torch.randn(t.shape, generator=generator).to(t.dtype), tree)


MODEL = functional(Net)
METHODS = {
    "lora": pf.lora(["q_proj", "v_proj"], rank=2),
    "lora alpha": pf.lora(["q_proj"], rank=3, alpha=7.5),
    "lora rank-stabilised": pf.lora(".*", rank=3, alpha=5, rank_stabilized=True),
    "lora rank_pattern": pf.lora(".*", rank=2, rank_pattern={r"layers\.0\..*": 1, "q_proj": 3}),
    "lora alpha_pattern": pf.lora(".*", rank=2, alpha=3, alpha_pattern={"fc1": 8, r"layers\.1\..*": 0.5}),
    "lora rank_pattern, the first wins": pf.lora(".*", rank=2, rank_pattern={r"layers\.0\.q_proj": 1, ".*q_proj": 3}),
    "lora alpha_pattern, the first wins": pf.lora(".*", rank=2, alpha_pattern={r"layers\.0\.q_proj": 64, ".*": 4}),
    "lora bias": pf.lora(["q_proj", "fc1"], rank=1, bias=True),
    "lora gaussian, dropout": pf.lora("conv|embed", rank=2, init="gaussian", dropout=0.25),
    "lora alias": pf.lora("head", rank=2),
    "gift target": pf.gift(["q_proj", "v_proj", "fc2"], rank=2),
    "gift all": pf.gift(["q_proj", "v_proj"], rank=2, share="all"),
    "gift none": pf.gift(".*", rank=2, share="none"),
    "gift groups": pf.gift(["q_proj", "v_proj", "fc2"], rank=2, share={"narrow": r".*(q|v)_proj", "z.wide": ["fc2"]}),
    "gift groups by function": pf.gift(
        ["q_proj", "v_proj"], rank=1, share={"b": lambda path, info: "q_proj" in path, "a": ~pf.suffix("q_proj")}
    ),
    "dora": pf.dora(".*", rank=2, alpha=3, bias=True),
    "dora patterns": pf.dora(["fc1", "fc2"], rank=2, rank_pattern={"fc2": 3}, alpha_pattern={"fc1": 9}),
    "magnitude": pf.magnitude(["fc1"]),
    "gift and magnitude": pf.chain(pf.gift(["fc1"], rank=2), pf.magnitude(["fc1"])),
    "ia3": pf.ia3(["v_proj"]),
    "ia3 scaled bias": pf.ia3("conv|.*fc1", scale_bias=True, name="scaled"),
    "ia3 input": pf.ia3(["fc2"], side="input"),
    "train": pf.train(r".*bias|conv"),
    "callable": pf.lora(lambda path, info: info.ndim == 2 and "fc" in path, rank=2),
    "selectors": pf.lora(pf.of_type(nn.Linear) & ~pf.index(0) | pf.glob("con*"), rank=2),
    "nested chains": pf.chain(
        pf.chain(pf.lora(["q_proj"], rank=2), pf.ia3(["fc1"]), name="first"),
        pf.chain(pf.chain(pf.lora(["v_proj"], rank=1), name="in"), pf.train(["norm"]), name="second"),
        pf.lora(["q_proj"], rank=1, alpha=0.1),
    ),
    "unit": pf.chain(),
}
EVERY_METHOD = pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))


def same_weights(adapter, frozen, tree, other) -> bool:
    left = pf.merge(adapter.apply(frozen, tree))
    right = pf.merge(other[0].apply(other[1], other[2]))
    # Not bitwise: how sums are rounded depends on where in memory a tensor begins.
    tight = {torch.float64: 1e-13, torch.bfloat16: 1e-2}
    close = lambda a, b: torch.allclose(a, b, rtol=tight[a.dtype], atol=tight[a.dtype])
    return list(left) == list(right) and all(close(left[name], right[name]) for name in left)


def trained(method, model=None, seed: int = 0):
    adapter = pf.bind(method, model or MODEL)
    frozen, tree = adapter.init(seed)
    return adapter, frozen, moved(tree)


def leaves_of(tree, prefix=()):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves_of(value, (*prefix, key))
        else:
            yield (*prefix, key), value


# What is saved comes back.


@EVERY_METHOD
def test_the_effective_weights_come_back(method, tmp_path):
    adapter, frozen, tree = trained(method)
    pf.save(tmp_path / "a.safetensors", adapter, tree)
    loaded = pf.load(tmp_path / "a.safetensors", MODEL)
    assert same_weights(adapter, frozen, tree, loaded)
    assert list(loaded[1]) == list(frozen)
    assert all(loaded[1][name] is MODEL.params[name] for name in frozen)
    wanted, found = dict(leaves_of(tree)), dict(leaves_of(loaded[2]))
    assert found.keys() == wanted.keys()
    for keys, leaf in found.items():
        assert torch.equal(leaf, wanted[keys])
        assert leaf.dtype == wanted[keys].dtype
        assert not leaf.requires_grad
    assert [part.paths for part in loaded[0].parts] == [part.paths for part in adapter.parts]
    assert [part.keys for part in loaded[0].parts] == [part.keys for part in adapter.parts]
    assert loaded[0].spec == adapter.spec
    assert loaded[0].held == adapter.held


@EVERY_METHOD
def test_a_loaded_method_draws_and_behaves_as_the_one_that_was_saved(method, tmp_path):
    adapter, frozen, tree = trained(method)
    pf.save(tmp_path / "a.safetensors", adapter, tree)
    again, _, _ = pf.load(tmp_path / "a.safetensors", MODEL)
    assert same_weights(adapter, *adapter.init(9), (again, *again.init(9)))
    x = torch.tensor([[1, 2, 3]])
    train = MODEL.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        y = train(adapter.apply(frozen, tree), x)
        torch.manual_seed(0)
        assert torch.equal(train(again.apply(frozen, tree), x), y)


@EVERY_METHOD
def test_the_same_tree_gives_the_same_bytes(method, tmp_path):
    paths = [tmp_path / f"{i}.safetensors" for i in range(4)]
    adapter, _, tree = trained(method)
    pf.save(paths[0], adapter, tree)
    pf.save(paths[1], *trained(copy.copy(method))[::2])
    shuffled = lambda t: {k: shuffled(v) if isinstance(v, dict) else v for k, v in reversed(t.items())}
    pf.save(paths[2], adapter, shuffled(tree))
    again, _, loaded = pf.load(paths[0], MODEL)
    pf.save(paths[3], again, loaded)
    assert len({path.read_bytes() for path in paths}) == 1


OTHER_PROCESS = """
import sys, hashlib, json
from pathlib import Path
import peft_func as pf
from tests.interop.test_files import METHODS, MODEL, trained
folder = Path(sys.argv[1])
for i, method in enumerate(METHODS.values()):
    adapter, _, tree = trained(method)
    pf.save(folder / f"{i}.safetensors", adapter, tree)
    again, _, loaded = pf.load(Path(sys.argv[2]) / f"{i}.safetensors", MODEL)
    pf.save(folder / f"{i}.again", again, loaded)
"""


def test_another_process_writes_the_same_bytes(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    for i, method in enumerate(METHODS.values()):
        adapter, _, tree = trained(method)
        pf.save(here / f"{i}.safetensors", adapter, tree)
    for seed in ("77",):
        env = os.environ | {"PYTHONHASHSEED": seed}
        call = [sys.executable, "-c", OTHER_PROCESS, str(there), str(here)]
        done = subprocess.run(call, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        for i, name in enumerate(METHODS):
            bytes_here = (here / f"{i}.safetensors").read_bytes()
            assert (there / f"{i}.safetensors").read_bytes() == bytes_here, name
            assert (there / f"{i}.again").read_bytes() == bytes_here, name


@pytest.mark.parametrize("kind", [str, Path, os.fspath])
def test_every_kind_of_path_is_taken(kind, tmp_path, monkeypatch):
    adapter, frozen, tree = trained(METHODS["lora"])
    pf.save(kind(tmp_path / "ä b.safetensors"), adapter, tree)
    assert same_weights(adapter, frozen, tree, pf.load(kind(tmp_path / "ä b.safetensors"), MODEL))
    monkeypatch.chdir(tmp_path)
    pf.save(kind(Path("here")), adapter, tree)
    assert same_weights(adapter, frozen, tree, pf.load(kind(Path("here")), MODEL))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_dtype_comes_back(dtype, tmp_path):
    adapter, frozen, tree = trained(METHODS["dora"])
    tree = pf.map_leaves(lambda t: t.to(dtype), tree)
    pf.save(tmp_path / "a", adapter, tree)
    loaded = pf.load(tmp_path / "a", MODEL)
    assert all(leaf.dtype == dtype for _, leaf in leaves_of(loaded[2]))
    assert same_weights(adapter, frozen, tree, loaded)


def test_a_file_loads_for_the_same_model_in_another_dtype(tmp_path):
    adapter, _, tree = trained(METHODS["lora alpha"])
    pf.save(tmp_path / "a", adapter, tree)
    again, frozen, loaded = pf.load(tmp_path / "a", MODEL.to(torch.bfloat16))
    assert all(w.dtype == torch.bfloat16 for w in again.apply(frozen, loaded).values())


def test_leaves_may_be_views_share_storage_need_gradients_and_lie_in_any_order(tmp_path):
    adapter, frozen, _ = trained(METHODS["lora"])
    whole = torch.arange(24.0).view(12, 2)
    odd = {
        path: {"A": nn.Parameter(whole[:6].T), "B": whole[::2].clone().requires_grad_() * 1.0}
        for path in adapter.parts[0].paths
    }
    tree = {"lora": odd}
    pf.save(tmp_path / "a", adapter, tree)
    loaded = pf.load(tmp_path / "a", MODEL)
    assert same_weights(adapter, frozen, pf.map_leaves(torch.Tensor.detach, tree), loaded)
    assert all(leaf.is_contiguous() and leaf.is_leaf for _, leaf in leaves_of(loaded[2]))


def test_loaded_leaves_outlive_the_file(tmp_path):
    adapter, frozen, tree = trained(METHODS["lora"])
    pf.save(tmp_path / "a", adapter, tree)
    loaded = pf.load(tmp_path / "a", MODEL)
    other = pf.map_leaves(torch.zeros_like, tree)
    pf.save(tmp_path / "a", adapter, other)
    assert same_weights(adapter, frozen, tree, loaded)
    (tmp_path / "a").unlink()
    assert same_weights(adapter, frozen, tree, loaded)


def test_loaded_leaves_begin_where_torch_lets_tensors_begin(tmp_path):
    # Elsewhere in memory, sums are rounded otherwise: the same adapter would give other last bits after a load.
    adapter, _, tree = trained(METHODS["dora"])
    pf.save(tmp_path / "a", adapter, tree)
    assert all(leaf.data_ptr() % 64 == 0 for _, leaf in leaves_of(tree))
    assert all(leaf.data_ptr() % 64 == 0 for _, leaf in leaves_of(pf.load(tmp_path / "a", MODEL)[2]))


def meta_of(path) -> dict:
    with safetensors.safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["peft_func"])


def test_the_file_holds_resolved_names_and_no_selectors(tmp_path):
    for name in ("callable", "selectors", "lora alias"):
        adapter, _, tree = trained(METHODS[name])
        pf.save(tmp_path / "a", adapter, tree)
        assert list(meta_of(tmp_path / "a")["method"]["places"]) == sorted(adapter.parts[0].paths)
    adapter, _, tree = trained(METHODS["gift groups by function"])
    pf.save(tmp_path / "a", adapter, tree)
    share = meta_of(tmp_path / "a")["method"]["options"]["share"]
    assert share == {
        "a": ["layers.0.v_proj.weight", "layers.1.v_proj.weight"],
        "b": ["layers.0.q_proj.weight", "layers.1.q_proj.weight"],
    }


def test_a_file_is_plain_safetensors_that_needs_none_of_this_library(tmp_path):
    adapter, frozen, tree = trained(METHODS["lora alpha"])
    pf.save(tmp_path / "a", adapter, tree)
    merged = pf.merge(adapter.apply(frozen, tree))
    with safetensors.safe_open(tmp_path / "a", framework="pt") as file:
        options = json.loads(file.metadata()["peft_func"])["method"]["options"]
        assert len(file.keys()) == 4
        for place in ("layers.0.q_proj.weight", "layers.1.q_proj.weight"):
            A, B = (file.get_tensor(f"lora.{place}.{leaf}") for leaf in "AB")
            weight = MODEL.params[place] + options["alpha"] / options["rank"] * B @ A
            assert torch.allclose(weight, merged[place], atol=1e-6, rtol=0)
    code = (
        "import safetensors, sys\n"
        "print(len(safetensors.safe_open(sys.argv[1], framework='pt').keys()), 'peft_func' in sys.modules)"
    )
    call = [sys.executable, "-c", code, str(tmp_path / "a")]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["4", "False"]


def test_two_models_of_one_architecture_share_files(tmp_path):
    adapter, _, tree = trained(METHODS["gift target"])
    pf.save(tmp_path / "a", adapter, tree)
    other = functional(Net, seed=5)
    assert same_weights(
        pf.bind(METHODS["gift target"], other), dict(other.params), tree, pf.load(tmp_path / "a", other)
    )


@pytest.mark.parametrize("alpha", [torch.tensor(4.0), torch.tensor(4.0, dtype=torch.float64).numpy().astype("f4")[()]])
def test_an_alpha_that_json_cannot_write_is_refused_or_written(alpha, tmp_path):
    try:
        adapter, frozen, tree = trained(pf.lora(["q_proj"], rank=2, alpha=alpha))
        pf.save(tmp_path / "a", adapter, tree)
    except pf.PeftFuncError:
        return
    assert same_weights(adapter, frozen, tree, pf.load(tmp_path / "a", MODEL))


@pytest.mark.parametrize("alpha", [math.nan, math.inf])
def test_an_alpha_that_is_not_finite_never_gets_into_a_file(alpha):
    with pytest.raises(pf.OptionError):
        trained(pf.lora(["q_proj"], rank=2, alpha=alpha))


# A user's own method.

SHIFT = pf.Transform(
    init=lambda weights, key: {path: {"shift": torch.zeros_like(w)} for path, w in weights.items()},
    apply=lambda tree, weights: {path: w + tree[path]["shift"] for path, w in weights.items()},
)
HALVE = pf.Transform(init=lambda weights, key: {}, apply=lambda tree, weights: {p: w / 2 for p, w in weights.items()})
OWN = {
    "alone": pf.on(r".*fc1\.bias", SHIFT, name="shift"),
    "in a chain": pf.chain(pf.lora(["q_proj"], rank=2), pf.chain(pf.on(["fc1"], SHIFT, name="shift"), name="mine")),
    "without leaves": pf.chain(pf.lora(["q_proj"], rank=2), pf.on(["fc1"], HALVE, name="halve")),
}


@pytest.mark.parametrize("method", OWN.values(), ids=list(OWN))
def test_an_own_method_has_to_be_given(method, tmp_path):
    adapter, frozen, tree = trained(method)
    pf.save(tmp_path / "a", adapter, tree)
    with pytest.raises(pf.OptionError, match=r"method=") as caught:
        pf.load(tmp_path / "a", MODEL)
    assert isinstance(caught.value, ValueError)
    assert str(tmp_path / "a") in str(caught.value)
    loaded = pf.load(tmp_path / "a", MODEL, method=method)
    assert same_weights(adapter, frozen, tree, loaded)
    pf.save(tmp_path / "b", loaded[0], loaded[2])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    "method",
    [
        pf.on(r".*fc2\.bias", SHIFT, name="shift"),
        pf.on(r".*bias", SHIFT, name="shift"),
        pf.on(r".*fc1\.bias", SHIFT, name="other"),
        pf.on("nothing", SHIFT, name="shift"),
        pf.chain(pf.on(r".*fc1\.bias", SHIFT, name="shift"), pf.ia3(["fc1"])),
        pf.chain(pf.on(r".*fc1\.bias", SHIFT, name="shift"), name="chain"),
        pf.train(r".*fc1\.bias", name="shift"),
        "lora",
        pf.lora,
    ],
)
def test_another_method_than_the_saved_one_is_refused(method, tmp_path):
    adapter, _, tree = trained(OWN["alone"])
    pf.save(tmp_path / "a", adapter, tree)
    with pytest.raises(pf.PeftFuncError):
        pf.load(tmp_path / "a", MODEL, method=method)


@pytest.mark.parametrize("method", [pf.lora(["q_proj"], rank=2, alpha=4), pf.lora(["v_proj"], rank=2)])
def test_a_given_method_must_have_the_options_of_the_file(method, tmp_path):
    adapter, frozen, tree = trained(pf.lora(["q_proj"], rank=2))
    pf.save(tmp_path / "a", adapter, tree)
    with pytest.raises(pf.FileFormatError, match="method"):
        pf.load(tmp_path / "a", MODEL, method=method)
    same = pf.load(tmp_path / "a", MODEL, method=pf.lora(r".*q_proj", rank=2))
    assert same_weights(adapter, frozen, tree, same)


# A file for another model.


def renamed() -> nn.Module:
    net = Net()
    net.layers[1].query = net.layers[1]._modules.pop("q_proj")
    return net


class Three(nn.Module):
    """Three places, two tensors: the third is tied to one of the others."""

    def __init__(self, tied: str) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.c.weight = getattr(self, tied).weight

    def forward(self, x):
        return self.c(self.b(self.a(x)))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (renamed, ["layers.1.q_proj"]),
        (lambda: Net(depth=1), ["layers.1."]),
        (lambda: Net(depth=3), ["names"]),
        (lambda: Net(width=8), ["shape", "layers.0.q_proj.weight"]),
        (lambda: nn.Linear(3, 3), ["layers.0.q_proj"]),
        (nn.ReLU, ["layers.0.q_proj"]),
    ],
    ids=["renamed", "fewer layers", "more layers", "wider", "another", "no parameters"],
)
def test_another_model_is_refused_with_what_differs(build, words, tmp_path):
    adapter, _, tree = trained(METHODS["lora"])
    pf.save(tmp_path / "a", adapter, tree)
    with pytest.raises(pf.FileFormatError) as caught:
        pf.load(tmp_path / "a", functional(build))
    assert isinstance(caught.value, OSError)
    for word in [str(tmp_path / "a"), *words]:
        assert word in str(caught.value)


def test_other_ties_are_refused_as_such(tmp_path):
    one, other = functional(lambda: Three("a")), functional(lambda: Three("b"))
    assert list(one.params) == list(other.params)
    adapter, _, tree = trained(pf.lora("a", rank=2), one)
    pf.save(tmp_path / "a", adapter, tree)
    with pytest.raises(pf.FileFormatError, match=r"(?i)\btie"):
        pf.load(tmp_path / "a", other)


def test_the_order_in_which_a_model_registers_its_modules_does_not_matter(tmp_path):
    class Turned(Three):
        def __init__(self) -> None:
            super().__init__("a")
            self._modules = dict(reversed(self._modules.items()))
            self.c.weight = nn.Parameter(torch.ones(4, 4))

    class Straight(Turned):
        def __init__(self) -> None:
            super().__init__()
            self._modules = dict(reversed(self._modules.items()))

    adapter, _, tree = trained(pf.lora(".*", rank=2), functional(Straight))
    pf.save(tmp_path / "a", adapter, tree)
    model = functional(Turned)
    again, frozen, loaded = pf.load(tmp_path / "a", model)
    assert len(pf.delta(again.apply(frozen, loaded))) == 3


def test_an_error_for_a_model_of_many_layers_is_readable(tmp_path):
    many = functional(lambda: nn.Sequential(*[Block() for _ in range(40)]))
    adapter, _, tree = trained(pf.lora(".*", rank=1), many)
    pf.save(tmp_path / "a", adapter, tree)
    with pytest.raises(pf.FileFormatError) as caught:
        pf.load(tmp_path / "a", MODEL)
    assert len(str(caught.value)) < 1500


# Hostile files.


def valid():
    """The metadata and tensors of a good file: LoRA of rank 2 on one place."""
    adapter, _, tree = trained(pf.lora("layers.0.q_proj", rank=2))
    described = files.method_as_data(adapter.method, adapter)
    meta = {"format": "peft_func", "version": 1, "method": described, "base": files.fingerprint(MODEL)}
    return meta, {".".join(keys): leaf for keys, leaf in leaves_of(tree)}


A_NAME, B_NAME = (f"lora.layers.0.q_proj.weight.{leaf}" for leaf in "AB")


def write(path, meta, tensors, key="peft_func") -> None:
    text = meta if isinstance(meta, str) else json.dumps(meta)
    save_file(tensors, path, metadata={key: text})


def raw(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def refused(path, *, kind=pf.FileFormatError, model=None, **options) -> str:
    """Check that loading fails as it should: as one of ours, and as an OSError."""
    with pytest.raises(kind) as caught:
        pf.load(path, model or MODEL, **options)
    assert isinstance(caught.value, pf.PeftFuncError)
    assert kind is not pf.FileFormatError or isinstance(caught.value, OSError)
    assert str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def good_bytes(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "a"
    write(path, *valid())
    pf.load(path, MODEL)
    return path.read_bytes()


def test_a_file_that_is_cut_anywhere_is_refused(good_bytes, tmp_path):
    path = tmp_path / "a"
    for length in range(len(good_bytes)):
        path.write_bytes(good_bytes[:length])
        assert str(path) in refused(path)


def test_a_file_with_more_behind_it_is_refused(good_bytes, tmp_path):
    for more in (b"\0", b"x" * 1000, good_bytes):
        (tmp_path / "a").write_bytes(good_bytes + more)
        refused(tmp_path / "a")


def test_a_file_with_one_wrong_byte_is_refused_or_read(good_bytes, tmp_path):
    path = tmp_path / "a"
    for place in range(len(good_bytes)):
        for flip in (0x01, 0x80):
            spoiled = bytearray(good_bytes)
            spoiled[place] ^= flip
            path.write_bytes(spoiled)
            try:
                pf.load(path, MODEL)
            except pf.PeftFuncError:
                continue


@settings(max_examples=60)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "random"
    for content in (data, struct.pack("<Q", len(data)) + data, struct.pack("<Q", len(data) // 2) + data):
        path.write_bytes(content)
        refused(path)


@pytest.mark.parametrize("size", [0, 1, 2**20, 10**8 + 1, 2**40, 2**63, 2**64 - 1])
def test_a_header_that_claims_any_size_is_refused(size, tmp_path):
    (tmp_path / "a").write_bytes(struct.pack("<Q", size) + b"{}" + b" " * 30)
    refused(tmp_path / "a")


def test_no_file_an_empty_one_and_a_folder_are_refused(tmp_path):
    refused(tmp_path)
    refused(tmp_path / "missing")
    refused(tmp_path / "missing" / "missing")
    refused(tmp_path / ("x" * 300))
    (tmp_path / "empty").touch()
    refused(tmp_path / "empty")
    refused(tmp_path / "empty" / "below")
    refused("")
    refused("a\0b")


@pytest.mark.parametrize("header", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a": 1}', b'{"__metadata__": 3}',
                                    b'{"__metadata__": {"peft_func": 3}}', b'{"__metadata__": {"peft_func": null}}',
                                    b"[" * 100_000, b"{}"], ids=range(11))  # fmt: skip
def test_an_odd_header_is_refused(header, tmp_path):
    (tmp_path / "a").write_bytes(raw(header))
    refused(tmp_path / "a")


def test_a_foreign_safetensors_file_is_called_that(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a")
    assert "pf.save" in refused(tmp_path / "a")
    save_file({"base_model.model.q_proj.lora_A.weight": torch.ones(2)}, tmp_path / "a", metadata={"format": "pt"})
    assert "pf.save" in refused(tmp_path / "a")


class Payload:
    def __reduce__(self):
        return (os.mkdir, (os.environ["PAYLOAD"],))


def test_a_pickle_is_refused_and_not_opened(tmp_path, monkeypatch):
    monkeypatch.setenv("PAYLOAD", str(tmp_path / "executed"))
    (tmp_path / "a").write_bytes(pickle.dumps(Payload()))
    refused(tmp_path / "a")
    torch.save({"a": torch.ones(2), "b": Payload()}, tmp_path / "a")
    refused(tmp_path / "a")
    assert not (tmp_path / "executed").exists()


def changed(meta: dict, path: tuple, value: object = ...) -> dict:
    """A copy of the metadata with another value at a path; without one, with nothing there."""
    meta = copy.deepcopy(meta)
    *way, last = path
    place = meta
    for key in way:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return meta


METHOD, OPTIONS = ("method",), ("method", "options")
MISSING = [("version",), ("method",), ("base",), ("method", "kind"), ("method", "name"), OPTIONS, ("method", "places")]
SPOILED = {
    **{f"no {'.'.join(path)}": (path, ...) for path in MISSING},
    "newer": (("version",), 2),
    "older": (("version",), 0),
    "version str": (("version",), "1"),
    "version none": (("version",), None),
    "version list": (("version",), [1]),
    "base": (("base",), "0" * 64),
    "base none": (("base",), None),
    "base dict": (("base",), {}),
    **{f"method {value!r}": (METHOD, value) for value in (None, 3, "chain", "lora", [], {}, [["chain"]], True)},
    **{f"kind {v!r}": (("method", "kind"), v) for v in ("os.system", "", "pf.lora", "__import__", 3, [], {}, True)},
    **{f"name {v!r}": (("method", "name"), v) for v in (None, "", "a.b", 3, [], {}, "other", True)},
    **{f"options {v!r}": (OPTIONS, v) for v in (None, 3, [], {}, "rank", [["rank", 2]], {"rank": 2})},
    **{
        f"places {v!r}": (("method", "places"), v)
        for v in (None, 3, [], {}, "layers.0.q_proj.weight", ["unknown"], [3], [[]], [None], ["layers.0.q_proj"],
                  ["layers.0.q_proj.weight", "unknown"], ["layers.0.q_proj.bias"], ["layers.1.q_proj.weight"],
                  ["layers.0.q_proj.weight"] * 2, {"layers.0.q_proj.weight": 1}, [".*"], ["head.weight"])
    },
    "unknown option": ((*OPTIONS, "unknown"), 1),
    "option where": ((*OPTIONS, "where"), ".*"),
    "option name": ((*OPTIONS, "name"), "lora"),
    "option dunder": ((*OPTIONS, "__class__"), "x"),
    **{f"rank {v!r}": ((*OPTIONS, "rank"), v) for v in (0, -1, 3, 10**9, 10**400, 2.0, "2", None, True, [2], {}, 1)},
    **{
        f"alpha {str(v)[:9]!r}": ((*OPTIONS, "alpha"), v)
        for v in ("4", [4], {}, 10**400, -(10**400), math.nan, math.inf, -math.inf, True)
    },
    **{f"dropout {v!r}": ((*OPTIONS, "dropout"), v) for v in (1.0, -1, "0.1", None, [], 10**400, math.nan)},
    **{f"init {v!r}": ((*OPTIONS, "init"), v) for v in ("other", None, 3, [], {})},
    **{f"conv {v!r}": ((*OPTIONS, "conv"), v) for v in ("other", None, 3)},
    **{f"rank_stabilized {v!r}": ((*OPTIONS, "rank_stabilized"), v) for v in ("no", [], None)},
    **{f"bias {v!r}": ((*OPTIONS, "bias"), v) for v in ("none", [], None)},
    **{
        f"{pattern} {v!r}"[:60]: ((*OPTIONS, pattern), v)
        for pattern in ("rank_pattern", "alpha_pattern")
        for v in (None, 3, [], "q", ["q"], {"(": 2}, {"nothing": 2}, {".*": "2"}, {".*": None}, {".*": [2]},
                  {".*": 10**400}, {"a{99999999999999999999}": 2}, {"(" * 3000 + ")" * 3000: 2})
    },
}  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=[str(name) for name in SPOILED])
def test_metadata_that_pf_save_does_not_write_is_refused(spoil, tmp_path):
    meta, tensors = valid()
    write(tmp_path / "a", changed(meta, *spoil), tensors)
    assert str(tmp_path / "a") in refused(tmp_path / "a")


def test_a_newer_version_is_called_that(tmp_path):
    meta, tensors = valid()
    write(tmp_path / "a", changed(meta, ("version",), 2), tensors)
    assert "version 2" in refused(tmp_path / "a")


@pytest.mark.parametrize(
    "text", ["", "{", "null", "3", "[]", '"x"', "{}", "NaN", "[NaN]", "1" * 5000, "\0",
             '{"version": 1}', '{"version": 1, "method": null, "base": null}'], ids=range(13)
)  # fmt: skip
def test_metadata_that_is_no_json_of_ours_is_refused(text, tmp_path):
    write(tmp_path / "a", text, valid()[1])
    refused(tmp_path / "a")


@pytest.mark.parametrize("depth", [50, 250, 400, 1000, 30_000])
@pytest.mark.parametrize("shape", ["list", "rank", "chain", "named chain"])
def test_deep_nesting_is_refused(shape, depth, tmp_path):
    meta, tensors = valid()
    text = json.dumps(changed(meta, METHOD, "HERE"))
    lists = "[" * depth + "]" * depth
    if shape == "list":
        text = lists
    elif shape == "rank":
        text = json.dumps(changed(meta, (*OPTIONS, "rank"), "HERE")).replace('"HERE"', lists)
    else:
        name = '"x"' if shape == "named chain" else "null"
        text = text.replace('"HERE"', '{"chain": [' * depth + f'], "name": {name}}}' * depth)
    write(tmp_path / "a", text, tensors)
    refused(tmp_path / "a")


def lora_at(place: str, **more) -> dict:
    return valid()[0]["method"] | {"places": [place]} | more


GIFT = {"kind": "gift", "name": "gift", "places": ["layers.0.q_proj.weight"],
        "options": {"rank": 2, "share": "none", "block": "simple_block"}}  # fmt: skip


@pytest.mark.parametrize(
    "method",
    [
        {"chain": [lora_at("layers.0.q_proj.weight")] * 2, "name": None},
        {"chain": [lora_at("layers.0.q_proj.weight")], "name": "a.b"},
        {"chain": [lora_at("layers.0.q_proj.weight")], "name": ""},
        {"chain": [lora_at("layers.0.q_proj.weight")], "name": 3},
        {"chain": [lora_at("layers.0.q_proj.weight")], "name": []},
        {"chain": [lora_at("layers.0.q_proj.weight")]},
        {"chain": lora_at("layers.0.q_proj.weight"), "name": None},
        {"chain": None, "name": None},
        {"chain": [None], "name": None},
        {"chain": 3, "name": None},
        {"chain": [GIFT, {"chain": [lora_at("layers.0.q_proj.weight")], "name": "gift"}], "name": None},
        GIFT | {"options": GIFT["options"] | {"share": {}}},
        GIFT | {"options": GIFT["options"] | {"share": {"g": []}}},
        GIFT | {"options": GIFT["options"] | {"share": {"g": 3}}},
        GIFT | {"options": GIFT["options"] | {"share": {"g": [["layers.0.q_proj.weight"]]}}},
        GIFT | {"options": GIFT["options"] | {"share": {"g": GIFT["places"], "h": GIFT["places"]}}},
        GIFT | {"options": GIFT["options"] | {"share": ["all"]}},
        GIFT | {"options": GIFT["options"] | {"share": None}},
        GIFT | {"options": GIFT["options"] | {"block": None}},
        {"kind": "train", "name": "train", "places": ["layers.0.q_proj.weight"], "options": {"rank": 2}},
        {"kind": "ia3", "name": "ia3", "places": ["layers.0.q_proj.weight"], "options": {"side": [], "scale_bias": 1}},
    ],
    ids=range(21),
)
def test_a_chain_or_a_group_that_pf_would_not_make_is_refused(method, tmp_path):
    meta, tensors = valid()
    write(tmp_path / "a", changed(meta, METHOD, method), tensors)
    refused(tmp_path / "a", kind=pf.PeftFuncError)


def test_a_file_whose_tensors_fit_a_chain_with_names_that_clash_is_refused(tmp_path):
    meta, tensors = valid()
    inner = {"chain": [lora_at("layers.0.q_proj.weight")], "name": "gift"}
    meta = changed(meta, METHOD, {"chain": [GIFT, inner], "name": None})
    tensors = {f"gift.{name}": tensor for name, tensor in tensors.items()}
    tensors |= {
        "gift.layers.0.q_proj.weight.phi": torch.ones(6, 2),
        "gift.layers.0.q_proj.weight.psi": torch.ones(2, 6),
    }
    write(tmp_path / "a", meta, tensors)
    refused(tmp_path / "a")


def test_loading_imports_and_executes_nothing(tmp_path, capfd):
    meta, tensors = valid()
    for kind in ("this", "antigravity", "this:s", "os.system", "__import__('this')", "peft_func.cli.main"):
        for path in (("method", "kind"), ("method", "name"), (*OPTIONS, "init"), ("method", "places")):
            write(tmp_path / "a", changed(meta, path, kind), tensors)
            before = set(sys.modules)
            refused(tmp_path / "a")
            assert set(sys.modules) == before
    assert capfd.readouterr() == ("", "")


READ = """
import sys, peft_func as pf
from tests.interop.test_files import MODEL
print("ready", flush=True)
try:
    pf.load(sys.argv[1], MODEL)
except pf.PeftFuncError:
    print("refused")
"""


def test_a_pattern_in_a_file_cannot_stall_the_reader(tmp_path):
    meta, tensors = valid()
    write(tmp_path / "a", changed(meta, (*OPTIONS, "rank_pattern"), {r"(.|.)*(.|.)*!": 2}), tensors)
    call = [sys.executable, "-c", READ, str(tmp_path / "a")]
    with subprocess.Popen(call, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            process.wait(timeout=3)
        except subprocess.TimeoutExpired:
            process.kill()
            pytest.fail("a regular expression in the file keeps the reader busy")
        assert process.stdout.read() == "refused\n"


WORDS = ["", "lora", "gift", "dora", "train", "all", ".*", ".", "layers.0.q_proj.weight", "embed.weight"]
KEYS = ["chain", "name", "kind", "options", "places", "rank", ".*", "q"]
NUMBERS = st.integers(-3, 5) | st.sampled_from([10**400, 2**63, 1e308, 0.5, math.nan, math.inf])
SCALARS = st.none() | st.booleans() | NUMBERS | st.sampled_from(WORDS)
JSON = SCALARS | st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=6,
)


def spots(value, prefix=()):
    yield from [prefix] if prefix else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from spots(inner, (*prefix, key))


@settings(max_examples=300)
@given(st.data())
def test_whatever_metadata_say_the_error_is_ours(tmp_path_factory, data):
    meta, tensors = valid()
    if data.draw(st.booleans()):
        meta = changed(meta, METHOD, {"chain": [meta["method"], GIFT], "name": "c"})
    for _ in range(data.draw(st.integers(1, 2))):
        meta = changed(meta, data.draw(st.sampled_from(list(spots(meta)))), data.draw(JSON))
    path = tmp_path_factory.getbasetemp() / "fuzz"
    write(path, meta, tensors)
    try:
        adapter, frozen, tree = pf.load(path, MODEL)
    except pf.PeftFuncError:
        return
    pf.merge(adapter.apply(frozen, tree))
    pf.save(path, adapter, tree)
    pf.load(path, MODEL)


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (lambda t: t | {"more": torch.ones(1)}, "more"),
        (lambda t: t | {A_NAME + ".x": torch.ones(1)}, A_NAME + ".x"),
        (lambda t: {A_NAME: t[A_NAME]}, B_NAME),
        (lambda t: {}, A_NAME),
        (lambda t: t | {A_NAME: t[A_NAME].T.contiguous()}, A_NAME),
        (lambda t: t | {A_NAME: t[A_NAME][:1].clone()}, A_NAME),
        (lambda t: t | {A_NAME: t[A_NAME].flatten()}, A_NAME),
        (lambda t: t | {A_NAME: torch.ones(())}, A_NAME),
        (lambda t: t | {A_NAME: torch.ones(0, 6)}, A_NAME),
        *[(lambda t, d=d: t | {A_NAME: t[A_NAME].to(d)}, A_NAME) for d in
          (torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.int32)],
    ],
    ids=["extra", "below", "missing", "none", "transposed", "smaller", "flat", "scalar", "empty",
         "int64", "int8", "uint8", "bool", "complex64", "int32"],
)  # fmt: skip
def test_a_tensor_too_many_too_few_or_misshapen_is_named(spoil, name, tmp_path):
    meta, tensors = valid()
    write(tmp_path / "a", meta, spoil(tensors))
    assert name in refused(tmp_path / "a")


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "F8_E4M3FNUZ", "E9", "", None, 3])
def test_a_dtype_that_no_adapter_has_is_refused(dtype, tmp_path):
    # Twelve values: two to a byte for F4, of which the last dimension counts the halves.
    size = {"F4": 6, "F6_E2M3": 9}.get(dtype, 12)
    header = {"__metadata__": {"peft_func": json.dumps(valid()[0])}}
    for i, (name, shape) in enumerate({A_NAME: [2, 6], B_NAME: [6, 2]}.items()):
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [i * size, (i + 1) * size]}
    (tmp_path / "a").write_bytes(raw(header, b"\0" * (2 * size)))
    refused(tmp_path / "a")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_are_refused_unless_allowed(value, dtype, tmp_path):
    meta, tensors = valid()
    spoiled = tensors[B_NAME].to(dtype)
    spoiled[5, 1] = value
    write(tmp_path / "a", meta, tensors | {B_NAME: spoiled})
    message = refused(tmp_path / "a")
    assert B_NAME in message
    assert "allow_nonfinite=True" in message
    _, _, tree = pf.load(tmp_path / "a", MODEL, allow_nonfinite=True)
    assert torch.equal(tree["lora"]["layers.0.q_proj.weight"]["B"].nan_to_num(), spoiled.nan_to_num())


def test_values_that_are_not_finite_can_be_saved(tmp_path):
    adapter, _, tree = trained(METHODS["ia3"])
    pf.save(tmp_path / "a", adapter, pf.map_leaves(lambda t: t * math.nan, tree))
    refused(tmp_path / "a")
    pf.load(tmp_path / "a", MODEL, allow_nonfinite=True)


@pytest.mark.parametrize("shape", [[2**30, 1], [2**30], [1, 2**30], [2**15, 2**15]])
def test_a_huge_tensor_is_refused_before_anything_is_allocated(shape, tmp_path):
    # The file is sparse: it has the size that its header says, and takes no room.
    meta, tensors = valid()
    small = tensors[A_NAME].float().numpy().tobytes()
    header = {
        "__metadata__": {"peft_func": json.dumps(meta)},
        A_NAME: {"dtype": "F32", "shape": [2, 6], "data_offsets": [0, 48]},
        B_NAME: {"dtype": "F32", "shape": shape, "data_offsets": [48, 48 + 2**32]},
    }
    start = raw(header, small)
    with (tmp_path / "a").open("wb") as file:
        file.write(start)
        file.truncate(len(start) + 2**32)
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    assert B_NAME in refused(tmp_path / "a")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
    assert time.perf_counter() - begun < 2


@pytest.mark.parametrize("shape", [[2**40, 6], [2**63, 2**63], [-1, 6], [2.0, 6], "2x6", None, [2**70]])
def test_a_header_with_a_shape_that_its_data_have_not_is_refused(shape, tmp_path):
    meta, _ = valid()
    header = {
        "__metadata__": {"peft_func": json.dumps(meta)},
        A_NAME: {"dtype": "F32", "shape": shape, "data_offsets": [0, 48]},
        B_NAME: {"dtype": "F32", "shape": [6, 2], "data_offsets": [48, 96]},
    }
    (tmp_path / "a").write_bytes(raw(header, b"\0" * 96))
    refused(tmp_path / "a")


def test_tensors_that_share_bytes_are_refused(tmp_path):
    header = {"__metadata__": {"peft_func": json.dumps(valid()[0])}}
    for name, shape in ((A_NAME, [2, 6]), (B_NAME, [6, 2])):
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [0, 48]}
    (tmp_path / "a").write_bytes(raw(header, b"\0" * 48))
    refused(tmp_path / "a")


def test_a_module_in_the_place_of_a_model_is_refused_with_the_call_that_works(tmp_path):
    write(tmp_path / "a", *valid())
    with pytest.raises(pf.PeftFuncError, match="functionalize"):
        pf.load(tmp_path / "a", nn.ReLU())


# Writing.


def names_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def saved(path):
    adapter, frozen, tree = trained(METHODS["lora"])
    pf.save(path, adapter, tree)
    return adapter, frozen, tree


def test_a_save_replaces_the_file_and_leaves_nothing_else(tmp_path):
    saved(tmp_path / "a")
    adapter, frozen, tree = trained(METHODS["ia3"])
    pf.save(tmp_path / "a", adapter, tree)
    assert same_weights(adapter, frozen, tree, pf.load(tmp_path / "a", MODEL))
    assert names_in(tmp_path) == ["a"]


def test_a_folder_that_is_missing_is_refused(tmp_path):
    adapter, _, tree = trained(METHODS["lora"])
    with pytest.raises(pf.FileFormatError, match="missing") as caught:
        pf.save(tmp_path / "missing" / "a", adapter, tree)
    assert isinstance(caught.value, OSError)
    assert names_in(tmp_path) == []


def test_a_folder_as_the_target_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "inside").touch()
    with pytest.raises(pf.FileFormatError):
        saved(tmp_path / "a")
    assert names_in(tmp_path) == ["a"]
    assert names_in(tmp_path / "a") == ["inside"]


@pytest.mark.parametrize("path", ["", "a\0b", "x" * 300])
def test_a_path_that_cannot_be_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pf.PeftFuncError):
        saved(path)
    assert names_in(tmp_path) == []


def test_a_file_name_may_be_as_long_as_the_system_allows(tmp_path):
    saved(tmp_path / ("x" * 255))
    assert names_in(tmp_path) == ["x" * 255]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tree: {},
        lambda tree: {"lora": dict(list(tree["lora"].items())[1:])},
        lambda tree: pf.stack([tree, tree]),
        lambda tree: pf.map_leaves(lambda t: t.long(), tree),
        lambda tree: {**tree, "more": {"x": torch.ones(1)}},
        lambda tree: {"lora": None},
    ],
    ids=["empty", "missing", "stacked", "integers", "too many", "none"],
)
def test_a_tree_of_another_adapter_is_refused_and_the_file_stays(spoil, tmp_path):
    adapter, _, tree = saved(tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    with pytest.raises(pf.TreeError):
        pf.save(tmp_path / "a", adapter, spoil(tree))
    assert (tmp_path / "a").read_bytes() == before
    assert names_in(tmp_path) == ["a"]


def test_leaves_without_values_are_refused(tmp_path):
    adapter, _, tree = saved(tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    with pytest.raises(pf.PeftFuncError):
        pf.save(tmp_path / "a", adapter, pf.map_leaves(lambda t: t.to("meta"), tree))
    assert (tmp_path / "a").read_bytes() == before
    assert names_in(tmp_path) == ["a"]


@pytest.mark.parametrize(
    "error",
    [OSError("disk full"), safetensors.SafetensorError("broken"), RuntimeError("odd"), KeyboardInterrupt()],
)
def test_a_failure_in_the_middle_of_writing_leaves_the_old_file_alone(error, tmp_path, monkeypatch):
    adapter, _, tree = saved(tmp_path / "a")
    before = (tmp_path / "a").read_bytes()

    def half(*args, **kwargs):
        place = next(arg for arg in [*args, *kwargs.values()] if isinstance(arg, str | Path))
        Path(place).write_bytes(before[: len(before) // 2])
        raise error

    monkeypatch.setattr(files, "save_file", half)
    ours = isinstance(error, OSError | safetensors.SafetensorError)
    with pytest.raises(pf.FileFormatError if ours else type(error)):
        pf.save(tmp_path / "a", adapter, pf.map_leaves(torch.zeros_like, tree))
    with pytest.raises(pf.FileFormatError if ours else type(error)):
        pf.save(tmp_path / "b", adapter, tree)
    assert (tmp_path / "a").read_bytes() == before
    assert names_in(tmp_path) == ["a"]


def test_a_disk_that_takes_no_more_leaves_the_old_file_alone(tmp_path):
    adapter, _, tree = saved(tmp_path / "a")
    before = (tmp_path / "a").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
        with pytest.raises(pf.FileFormatError):
            pf.save(tmp_path / "a", adapter, pf.map_leaves(torch.zeros_like, tree))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "a").read_bytes() == before
    assert names_in(tmp_path) == ["a"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002, 0o027])
def test_permissions_follow_the_umask(umask, tmp_path):
    old = os.umask(umask)
    try:
        saved(tmp_path / "a")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~umask


def test_a_save_leaves_its_tree_alone(tmp_path):
    adapter, _, tree = trained(METHODS["nested chains"])
    before = [(keys, id(leaf), leaf._version, leaf.clone()) for keys, leaf in leaves_of(tree)]
    pf.save(tmp_path / "a", adapter, tree)
    for (keys, leaf), kept in zip(leaves_of(tree), before, strict=True):
        assert (keys, id(leaf), leaf._version) == kept[:3]
        assert torch.equal(leaf, kept[3])
