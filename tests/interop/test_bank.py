"""A bank of adapters: a mixed batch is the loop over its samples, the bookkeeping a dict's, and threads do not meet."""

import gc
import json
import random
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounter

import peft_func as pf
from peft_func.interop import bank as bank_file
from peft_func.interop import bank_files
from tests.laws.conformance import built, perturbed
from tests.zoo import ZOO, ids, randn

METHODS = {
    "lora": lambda where, head: pf.lora(where, rank=2, alpha=3),
    "dora": lambda where, head: pf.dora(where, rank=2),
    "chain": lambda where, head: pf.chain(pf.lora(where, rank=1), pf.ia3(where), pf.train(head)),
}
PLACES = {"mlp": (["0", "2"], "4"), "bert": (["query", "value", "dense"], "classifier")}


def case(name, method, count=4):
    """An adapter with some trees away from their inits, and a batch of seven."""
    adapter = pf.bind(METHODS[method](*PLACES[name]), built(name)[1])
    trees = {f"user {key}": perturbed(adapter.init(key)[1], key) for key in range(count)}
    x = randn(7, 5) if name == "mlp" else ids(7, 5, high=32)
    return adapter, trees, x


def filled(adapter, trees, **options):
    bank = pf.AdapterBank(adapter, **options)
    for name, tree in trees.items():
        bank.add(name, tree)
    return bank


def loop(adapter, trees, names, x, animal):
    """Every sample by itself, through its adapter or the untouched net."""
    frozen, base = adapter.init(0)[0], adapter.model.params
    weights = [base if name is None else adapter.apply(frozen, trees[name]) for name in names]
    return torch.cat([ZOO[animal].output(adapter.model(w, x[i : i + 1])) for i, w in enumerate(weights)])


def same(left, right):
    left, right = dict(pf.leaves(left)), dict(pf.leaves(right))
    return left.keys() == right.keys() and all(
        torch.equal(left[keys], right[keys]) and left[keys].dtype == right[keys].dtype for keys in left
    )


BATCHES = [
    ["user 2", "user 0", None, "user 2", "user 3", None, "user 0"],
    ["user 1"] * 7,
    [None] * 7,
    ["user 3", "user 2", "user 1", "user 0", "user 3", "user 2", "user 1"],
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("animal", PLACES)
def test_a_mixed_batch_is_the_loop(animal, method):
    adapter, trees, x = case(animal, method)
    bank = filled(adapter, trees)
    out = ZOO[animal].output
    for names in BATCHES:
        expected = loop(adapter, trees, names, x, animal)
        assert expected.dtype is torch.float64
        calls = {
            "route": adapter.model(bank.route(names), x),
            "call": bank(names, x),
            "static": adapter.model(pf.route(adapter, bank.frozen, *bank.gather(names, static=True)), x),
        }
        for way, found in calls.items():
            torch.testing.assert_close(out(found), expected, atol=1e-10, rtol=1e-10, msg=f"{way}, {names}")


def test_gather_has_a_row_for_each_distinct_name_or_each_sample():
    adapter, trees, _ = case("mlp", "chain")
    bank = filled(adapter, trees)
    names = ["user 2", None, "user 0", "user 2"]
    stacked, index = bank.gather(names)
    assert same(stacked, pf.stack([trees["user 2"], trees["user 0"]]))
    assert index.tolist() == [0, -1, 1, 0]
    assert index.dtype is torch.int64
    stacked, index = bank.gather(names, static=True)
    assert index.tolist() == [0, -1, 2, 3]
    rows = pf.unstack(stacked)
    assert len(rows) == 4
    assert all(same(rows[i], trees[names[i]]) for i in (0, 2, 3))
    assert bank.gather([None, None])[1].tolist() == [-1, -1]


def test_adapters_that_are_not_finite_spoil_no_other_sample():
    adapter, trees, x = case("mlp", "lora", 2)
    bank = filled(adapter, trees)
    bank.add("bad", pf.map_leaves(lambda t: torch.full_like(t, float("nan")), trees["user 0"]))
    names = ["user 0", "bad", None, "user 1", "bad", None, None]
    y = bank(names, x)
    good = [0, 2, 3, 5, 6]
    expected = loop(adapter, trees, [names[i] for i in good], x[good], "mlp")
    torch.testing.assert_close(y[good], expected, atol=1e-10, rtol=1e-10)
    assert y[[1, 4]].isnan().all()


def test_nothing_that_goes_in_or_comes_out_is_shared():
    adapter, trees, _ = case("mlp", "chain", 2)
    given = pf.map_leaves(lambda t: t.clone().requires_grad_(), trees["user 0"])
    bank = pf.AdapterBank(adapter)
    bank.add("a", given)
    for _, leaf in pf.leaves(given):
        leaf.data.zero_()
    for got in (bank.gather(["a"])[0], bank.tree("a"), bank.gather(["a", None], static=True)[0]):
        for _, leaf in pf.leaves(got):
            assert not leaf.requires_grad
            leaf.fill_(5.0)
    kept = bank.gather(["a"])[0]
    bank.replace("a", trees["user 1"])
    assert same(pf.unstack(kept)[0], trees["user 0"])
    assert same(bank.tree("a"), trees["user 1"])
    storages = [leaf.untyped_storage().data_ptr() for _, leaf in pf.leaves(bank.tree("a"))]
    assert len(set(storages)) == len(storages)


@pytest.mark.parametrize(("animal", "method"), [("mlp", "lora"), ("mlp", "chain"), ("bert", "dora")])
def test_other_names_do_not_compile_again(animal, method):
    adapter, trees, x = case(animal, method)
    bank, counter = filled(adapter, trees), CompileCounter()
    frozen, out = bank.frozen, ZOO[animal].output
    function = lambda stacked, index, x: out(adapter.model(pf.route(adapter, frozen, stacked, index), x))
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=counter)

    def check(names):
        y = compiled(*bank.gather(names, static=True), x)
        torch.testing.assert_close(y, loop(adapter, trees, names, x, animal), atol=1e-10, rtol=1e-10)

    for names in BATCHES:
        check(names)
    trees["new"] = pf.map_leaves(lambda t: t + 0.3, trees["user 1"])
    bank.add("new", trees["new"])
    check(["new", None, "user 0", "new", "user 2", "user 2", None])
    trees["user 2"] = pf.map_leaves(lambda t: t - 0.2, trees["user 2"])
    bank.replace("user 2", trees["user 2"])
    bank.remove("user 0")
    check(["user 2", "user 2", "new", "user 3", None, "user 1", "user 2"])
    assert counter.frame_count == 1
    if animal == "mlp":  # the counter sees what static is for
        compiled(*bank.gather(BATCHES[1]), x)
        assert counter.frame_count == 2
    torch._dynamo.reset()


# Bookkeeping


@pytest.fixture(scope="module")
def small():
    """A method of one number a leaf: a tree is known by it."""
    adapter = pf.bind(pf.lora("weight", rank=1), pf.functionalize(nn.Linear(3, 2, bias=False)))
    assert adapter.spec.keys() == {("lora", "weight", "A"), ("lora", "weight", "B")}
    return adapter


BYTES = 4 * (3 + 2)


def constant(adapter, value):
    return pf.map_leaves(lambda t: torch.full_like(t, value), adapter.init(0)[1])


def values(stacked):
    """The number of every row, after checking that all of the row is that number."""
    rows = torch.cat([leaf.flatten(1) for _, leaf in pf.leaves(stacked)], 1)
    assert (rows == rows[:, :1]).all()
    return rows[:, 0].tolist()


class Model:
    """What a bank of a given capacity does, as a dict and a list."""

    def __init__(self, capacity):
        self.capacity, self.held, self.recent = capacity, {}, []

    def touch(self, name):
        if name in self.recent:
            self.recent.remove(name)
        elif self.capacity is not None:
            self.recent = self.recent[max(0, len(self.recent) - self.capacity + 1) :]
        self.recent.append(name)

    def gather(self, names):
        distinct = list(dict.fromkeys(name for name in names if name is not None))
        there = [name for name in distinct if name in self.recent]
        for name in there + [name for name in distinct if name not in there]:
            self.touch(name)
        return [self.held[name] for name in distinct]


NAMES = "abcde"


@pytest.mark.parametrize("capacity", [None, 1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_a_bank_is_a_dict_and_its_memory_a_list(small, tmp_path, capacity, seed):
    limit = {} if capacity is None else {"memory_limit": capacity * BYTES + BYTES - 1, "folder": tmp_path}
    bank, model, rng = pf.AdapterBank(small, **limit), Model(capacity), random.Random(seed)
    for number in range(120):
        name, what = rng.choice(NAMES), rng.choices(["put", "remove", "tree", "gather"], [4, 1, 2, 5])[0]
        if what == "gather":
            batch = rng.choices([*NAMES, None], k=rng.randrange(1, 7))
            if not all(one is None or one in model.held for one in batch):
                with pytest.raises(pf.NameMismatchError):
                    bank.gather(batch)
            elif any(batch):
                assert values(bank.gather(batch)[0]) == model.gather(batch)
        elif what == "put":
            (bank.replace if name in model.held else bank.add)(name, constant(small, number))
            with pytest.raises(pf.NameMismatchError, match="already"):
                bank.add(name, constant(small, -1))
            model.touch(name)
            model.held[name] = number
        elif name not in model.held:
            for call in (bank.remove, bank.tree, lambda name: bank.replace(name, constant(small, -1))):
                with pytest.raises(pf.NameMismatchError, match=f"no adapter {name!r}"):
                    call(name)
        elif what == "remove":
            bank.remove(name)
            del model.held[name]
            model.recent = [other for other in model.recent if other != name]
        else:
            assert {leaf.unique().item() for _, leaf in pf.leaves(bank.tree(name))} == {model.held[name]}
            model.touch(name)
        check_state(bank, model, tmp_path)


def check_state(bank, model, folder):
    assert bank.names() == list(model.held)
    assert len(bank) == len(model.held)
    assert bank.in_memory() == model.recent
    assert bank.memory == BYTES * len(model.recent)
    assert all((one in bank) == (one in model.held) for one in NAMES)
    there = [load_file(path)["lora.weight.A"][0, 0].item() for path in folder.rglob("*.safetensors")]
    gone = {model.held[name] for name in model.held if name not in model.recent}
    assert gone <= set(there) <= set(model.held.values())  # no file of what was removed or replaced is left
    assert len(there) == len(set(there))


def test_what_is_beyond_the_limit_is_not_in_memory():
    adapter = pf.bind(pf.ia3("weight"), pf.functionalize(nn.Linear(2, 12347, bias=False)))
    count = lambda: sum(type(o) is torch.Tensor and o.shape == (12347,) for o in gc.get_objects())
    bank = pf.AdapterBank(adapter)
    gc.collect()
    before = count()
    for key in range(5):
        bank.add(str(key), adapter.init(0)[1])
    assert count() == before + 5
    for key in range(5):
        bank.remove(str(key))
    assert count() == before


def test_what_is_evicted_is_freed(tmp_path):
    adapter = pf.bind(pf.ia3("weight"), pf.functionalize(nn.Linear(2, 12346, bias=False)))
    count = lambda: sum(type(o) is torch.Tensor and o.shape == (12346,) for o in gc.get_objects())
    bank = pf.AdapterBank(adapter, memory_limit=2 * 4 * 12346, folder=tmp_path)
    before = count()
    for key in range(5):
        bank.add(str(key), adapter.init(0)[1])
    assert count() == before + 2
    bank.gather([str(key) for key in range(5)])
    assert count() == before + 2


@pytest.mark.parametrize("method", METHODS)
def test_the_disk_gives_back_every_bit(tmp_path, method):
    adapter, trees, x = case("mlp", method, 6)
    odd = [float("nan"), float("inf"), -0.0, 5e-324]
    trees["odd"] = pf.map_leaves(
        lambda t: torch.tensor(odd * t.numel()).double()[: t.numel()].view_as(t), trees["user 0"]
    )
    size = sum(leaf.numel() * 8 for _, leaf in pf.leaves(trees["user 0"]))
    bank = filled(adapter, trees, memory_limit=2 * size, folder=tmp_path)
    assert bank.memory == 2 * size
    for _ in range(2):
        for name, tree in trees.items():
            again = bank.tree(name)
            for (_, a), (_, b) in zip(pf.leaves(again), pf.leaves(tree), strict=True):
                assert torch.equal(a.view(torch.int64), b.view(torch.int64))
    names = ["user 5", "user 0", None, "user 1", "user 2", "user 3", "user 5"]
    expected = loop(adapter, trees, names, x, "mlp")
    torch.testing.assert_close(bank(names, x), expected, atol=1e-10, rtol=1e-10)
    files = list(tmp_path.rglob("*.safetensors"))
    assert len(files) >= 5
    for path in files:
        written = pf.load(path, adapter.model, allow_nonfinite=True)[2]
        name = next(name for name in trees if name.replace(" ", "_") in path.name)
        assert name == "odd" or same(written, trees[name])


def test_files_go_with_the_bank(small, tmp_path):
    bank = filled(small, {str(i): constant(small, i) for i in range(4)}, memory_limit=BYTES, folder=tmp_path)
    (own,) = tmp_path.iterdir()
    assert len(list(own.iterdir())) == 3
    other = filled(small, {str(i): constant(small, -i) for i in range(4)}, memory_limit=BYTES, folder=tmp_path)
    assert values(bank.gather(list("0123"))[0]) == [0, 1, 2, 3]
    del bank
    assert not own.exists()  # without waiting for the garbage collector
    assert values(other.gather(list("0123"))[0]) == [0, -1, -2, -3]
    assert list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["../../up", "/etc/x", "", ".", "..", "a\0b", "x" * 5000, "ü\n", "\ud800", "a.b", "C:\\x"]
)
def test_any_name_is_a_safe_file(small, tmp_path, name):
    folder = tmp_path / "deep" / "deeper"
    folder.mkdir(parents=True)
    bank = filled(small, {name: constant(small, 3), "other": constant(small, 4)}, memory_limit=BYTES, folder=folder)
    (path,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert path.parent.parent == folder
    assert bank.in_memory() == ["other"]
    assert values(bank.gather([name])[0]) == [3]


def test_when_the_disk_fails_nothing_is_added(small, tmp_path):
    bank = filled(small, {"a": constant(small, 1), "b": constant(small, 2)}, memory_limit=2 * BYTES, folder=tmp_path)
    (own,) = tmp_path.iterdir()
    shutil.rmtree(own)
    with pytest.raises(pf.FileFormatError, match="cannot be written"):
        bank.add("c", constant(small, 3))
    assert bank.names() == bank.in_memory() == ["a", "b"]
    own.mkdir()
    bank.add("c", constant(small, 3))
    assert bank.in_memory() == ["b", "c"]
    shutil.rmtree(own)
    with pytest.raises(pf.FileFormatError, match="cannot be read again"):
        bank.gather(["a"])
    assert values(bank.gather(["b", "c"])[0]) == [2, 3]


def test_a_limit_without_a_folder_says_what_to_do(small):
    bank = filled(small, {"a": constant(small, 1), "b": constant(small, 2)}, memory_limit=2 * BYTES)
    with pytest.raises(pf.OptionError, match=r"pf.AdapterBank\(..., folder=...\)"):
        bank.add("c", constant(small, 3))
    bank.replace("a", constant(small, 4))
    bank.remove("b")
    bank.add("c", constant(small, 3))
    assert bank.names() == ["a", "c"]
    assert values(bank.gather(["c", "a"])[0]) == [3, 4]


@pytest.mark.parametrize("then", ["replace", "remove", "nothing"])
def test_a_file_that_goes_while_it_is_read(small, tmp_path, monkeypatch, then):
    bank = filled(small, {"a": constant(small, 1), "b": constant(small, 2)}, memory_limit=BYTES, folder=tmp_path)

    def interrupted(path):
        monkeypatch.undo()
        if then == "replace":
            bank.replace("a", constant(small, 3))
        elif then == "remove":
            bank.remove("a")
        raise RuntimeError("No such file or directory")  # torch's, when it opens the file for the values

    monkeypatch.setattr(bank_files, "load_file", interrupted)
    if then == "replace":
        assert values(bank.gather(["a"])[0]) == [3]
    else:
        error = pf.NameMismatchError if then == "remove" else pf.FileFormatError
        with pytest.raises(error):
            bank.gather(["a"])
    assert values(bank.gather(["b"])[0]) == [2]


# Threads


class Traffic:
    """Threads that each write one adapter and read all; the last two adapters come and go.

    A tree's number is 1000 times its name's, plus a version that only grows. What a thread reads must be no older than
    the last write that was over before it began, and no newer than the last one that had begun when it was over.
    """

    COUNT = 8

    def __init__(self, bank, adapter, capacity):
        self.bank, self.adapter, self.capacity = bank, adapter, capacity
        self.names = [f"n{i}" for i in range(self.COUNT)]
        self.done, self.begun = [0] * self.COUNT, [0] * self.COUNT
        self.problems, self.kept = [], []
        self.barrier = threading.Barrier(self.COUNT)
        for i, name in enumerate(self.names):
            bank.add(name, constant(adapter, 1000 * i))

    def run(self, steps):
        threads = [threading.Thread(target=self.work, args=(me, steps), daemon=True) for me in range(self.COUNT)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads), "a deadlock"
        assert not self.problems, self.problems[:5]

    def work(self, me, steps):
        rng = random.Random(me)
        try:
            self.barrier.wait()
            for _ in range(steps):
                self.write(me) if rng.random() < 0.4 else self.read(rng)
                if self.capacity is not None and len(self.bank.in_memory()) > self.capacity:
                    self.problems.append("more in memory than the limit")
        except Exception as error:  # noqa: BLE001 - whatever it is, the test must fail
            self.problems.append(repr(error))

    def write(self, me):
        self.begun[me] += 1
        tree = constant(self.adapter, 1000 * me + self.begun[me])
        if me < self.COUNT - 2:
            self.bank.replace(self.names[me], tree)
        else:
            self.bank.remove(self.names[me])
            self.bank.add(self.names[me], tree)
        self.done[me] = self.begun[me]

    def read(self, rng):
        batch = [rng.randrange(self.COUNT) for _ in range(rng.randrange(1, 6))]
        before = list(self.done)
        try:
            found = self.bank.gather([self.names[i] for i in batch], static=True)[0]
        except pf.NameMismatchError:
            if max(batch) < self.COUNT - 2:
                self.problems.append(f"{batch} were always there")
            return
        after = list(self.begun)
        if rng.random() < 0.1:
            self.kept.append((found, pf.map_leaves(torch.clone, found)))
        for i, value in zip(batch, values(found), strict=True):
            if not before[i] <= value - 1000 * i <= after[i]:
                self.problems.append(f"{self.names[i]} is {value}, not from {before[i]} to {after[i]}")


@pytest.mark.parametrize("capacity", [None, 1, 3])
def test_threads_see_each_adapter_before_or_after(small, tmp_path, capacity):
    limit = {} if capacity is None else {"memory_limit": capacity * BYTES, "folder": tmp_path}
    traffic = Traffic(pf.AdapterBank(small, **limit), small, capacity)
    traffic.run(150 if capacity is None else 40)
    assert all(same(a, b) for a, b in traffic.kept)
    assert sorted(traffic.bank.names()) == traffic.names
    newest = [1000 * i + traffic.done[i] for i in range(traffic.COUNT)]
    assert values(traffic.bank.gather(traffic.names)[0]) == newest
    files = [load_file(path)["lora.weight.A"][0, 0].item() for path in tmp_path.rglob("*.safetensors")]
    assert len(files) == len(set(files)) <= traffic.COUNT  # one file each, of what is there now
    assert set(files) <= set(newest)


def test_threads_call_mixed_batches(tmp_path):
    adapter, trees, x = case("mlp", "chain")
    size = sum(leaf.numel() * 8 for _, leaf in pf.leaves(trees["user 0"]))
    bank = filled(adapter, trees, memory_limit=2 * size, folder=tmp_path)
    expected = [loop(adapter, trees, names, x, "mlp") for names in BATCHES]
    wrong = []

    def work(i):
        for step in range(30):
            names, right = BATCHES[(i + step) % 4], expected[(i + step) % 4]
            if not torch.allclose(bank(names, x), right, atol=1e-10, rtol=1e-10):
                wrong.append(names)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Files


@pytest.fixture
def shelf(tmp_path):
    """A float64 method, some of its trees, and files of both kinds that hold them."""
    adapter, trees, _ = case("mlp", "lora", 6)
    paths = {}
    for i, (name, tree) in enumerate(trees.items()):
        paths[name] = tmp_path / (f"{i}.safetensors" if i % 2 else f"peft-{i}")
        if i % 2:
            pf.save(paths[name], adapter, tree)
        else:
            pf.save_peft(paths[name], adapter, tree)
    return adapter, trees, paths


@pytest.mark.parametrize("workers", [1, 3])
def test_files_of_both_kinds_are_added(shelf, workers):
    adapter, trees, paths = shelf
    bank = pf.AdapterBank(adapter)
    bank.add_files({name: str(path) for name, path in paths.items()}, workers=workers)
    assert bank.names() == bank.in_memory() == list(trees)
    assert all(same(bank.tree(name), tree) for name, tree in trees.items())
    bank.add_files({})
    assert len(bank) == 6


def test_files_are_not_written_again(shelf, tmp_path, monkeypatch):
    adapter, trees, paths = shelf
    size = sum(leaf.numel() * 8 for _, leaf in pf.leaves(trees["user 0"]))
    own = tmp_path / "own"
    own.mkdir()
    bank = pf.AdapterBank(adapter, memory_limit=2 * size, folder=own)
    monkeypatch.chdir(tmp_path)
    bank.add_files({name: path.name for name, path in paths.items()})
    monkeypatch.chdir("/")
    assert bank.in_memory() == []
    assert len(list(own.rglob("*.safetensors"))) == 3  # those in PEFT's format
    for _ in range(2):
        assert all(same(bank.tree(name), tree) for name, tree in trees.items())
        assert bank.in_memory() == ["user 4", "user 5"]
    assert len(list(own.rglob("*.safetensors"))) == 3
    for name in trees:
        bank.remove(name)
    assert not list(own.rglob("*.safetensors"))
    assert all(path.exists() for path in paths.values())


def test_a_file_that_changes_is_noticed(shelf, tmp_path):
    adapter, trees, paths = shelf
    bank = pf.AdapterBank(adapter, memory_limit=1000, folder=tmp_path)
    bank.add_files(paths)
    pf.save(paths["user 1"], adapter, trees["user 2"])
    with pytest.raises(pf.FileFormatError, match="has changed since"):
        bank.gather(["user 0", "user 1"])
    paths["user 3"].unlink()
    with pytest.raises(pf.FileFormatError, match="cannot be read"):
        bank.tree("user 3")
    bank.replace("user 1", pf.load(paths["user 1"], adapter.model)[2])
    assert same(bank.tree("user 1"), trees["user 2"])


def spoil(kind, adapter, tree, folder):
    """Make a file or folder that cannot be added, and return it with what the error says."""
    path = folder / "bad.safetensors"
    where = PLACES["mlp"][0]
    if kind == "missing":
        return path, pf.FileFormatError, "cannot be read"
    if kind == "rank":
        other = pf.bind(pf.lora(where, rank=3, alpha=3), adapter.model)
        pf.save(path, other, other.init(0)[1])
        return path, pf.FileFormatError, "other options"
    if kind == "alpha":  # the same shapes: only the method tells them apart
        other = pf.bind(pf.lora(where, rank=2, alpha=4), adapter.model)
        pf.save(path, other, tree)
        return path, pf.FileFormatError, "other options"
    if kind == "peft rank":
        other = pf.bind(pf.lora(where, rank=3, alpha=3), adapter.model)
        pf.save_peft(folder / "bad", other, other.init(0)[1])
        return folder / "bad", pf.FileFormatError, "bad"
    if kind == "peft alpha":
        other = pf.bind(pf.lora(where, rank=2, alpha=4), adapter.model)
        pf.save_peft(folder / "bad", other, tree)
        return folder / "bad", pf.FileFormatError, "bad"
    if kind == "empty folder":
        (folder / "bad").mkdir()
        return folder / "bad", pf.FileFormatError, "bad"
    if kind == "model":
        model = pf.functionalize(nn.Sequential(*ZOO["mlp"].build(), nn.Linear(3, 3)).double())
        other = pf.bind(adapter.method, model)
        pf.save(path, other, other.init(0)[1])
        return path, pf.FileFormatError, "saved for a model with other"
    pf.save(path, adapter, tree)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-8])
        return path, pf.FileFormatError, "cannot be read"
    if kind == "not finite":
        pf.save(path, adapter, pf.map_leaves(lambda t: t / 0, tree))
        return path, pf.FileFormatError, "not finite"
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["peft_func"])
    del meta["base"]
    save_file(load_file(path), path, {"peft_func": json.dumps(meta)})
    return path, pf.FileFormatError, "bad.safetensors"


KINDS = [
    "missing", "rank", "alpha", "peft rank", "peft alpha", "empty folder", "model", "truncated", "not finite",
    "metadata",
]  # fmt: skip


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_one_bad_file_and_none_is_added(shelf, tmp_path, kind, limited):
    adapter, trees, paths = shelf
    own = tmp_path / "own"
    own.mkdir()
    bank = pf.AdapterBank(adapter, **({"memory_limit": 10000, "folder": own} if limited else {}))
    bank.add("there", trees["user 1"])
    path, error, text = spoil(kind, adapter, trees["user 0"], tmp_path)
    last = paths.popitem()
    with pytest.raises(error, match=rf"'the bad one': [\s\S]*{text}"):
        bank.add_files({**paths, "the bad one": path, last[0]: last[1]}, workers=2)
    assert bank.names() == bank.in_memory() == ["there"]
    assert not list(own.rglob("*.safetensors"))
    assert same(bank.tree("there"), trees["user 1"])
    bank.add_files(paths)
    assert len(bank) == 6


def test_the_first_bad_file_in_order_is_named(shelf, tmp_path):
    adapter, _, paths = shelf
    bank = pf.AdapterBank(adapter)
    wanted = {**paths, **{f"bad {i}": tmp_path / f"no-{i}" for i in range(4)}}
    for _ in range(5):
        with pytest.raises(pf.FileFormatError, match="'bad 0'"):
            bank.add_files(wanted, workers=4)
    bank.add("x", bank.adapter.init(0)[1])
    with pytest.raises(pf.NameMismatchError, match="already"):
        bank.add_files({**paths, "x": tmp_path})
    assert bank.names() == ["x"]
    bank.add_files({"inf": spoil("not finite", adapter, adapter.init(0)[1], tmp_path)[0]}, allow_nonfinite=True)
    for bad in (0, True, "2", None):
        with pytest.raises(pf.OptionError, match="workers"):
            bank.add_files(paths, workers=bad)
    with pytest.raises(pf.OptionError, match="dict of paths"):
        bank.add_files(list(paths.values()))


def test_files_need_room_too(shelf):
    adapter, trees, paths = shelf
    size = sum(leaf.numel() * 8 for _, leaf in pf.leaves(trees["user 0"]))
    bank = pf.AdapterBank(adapter, memory_limit=5 * size)
    with pytest.raises(pf.OptionError, match="room for 5"):
        bank.add_files(paths)
    assert bank.names() == []


# Dtypes and base weights


def half_model():
    torch.manual_seed(0)
    return pf.functionalize(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).bfloat16())


def test_leaves_of_several_dtypes(tmp_path):
    adapter = pf.bind(pf.chain(pf.lora("0", rank=2), pf.train("2")), half_model())
    trees = {str(key): perturbed(adapter.init(key)[1], key) for key in range(5)}
    assert {leaf.dtype for _, leaf in pf.leaves(trees["0"])} == {torch.float32, torch.bfloat16}
    size = sum(leaf.numel() * leaf.itemsize for _, leaf in pf.leaves(trees["0"]))
    bank = filled(adapter, trees, memory_limit=2 * size, folder=tmp_path)
    assert bank.memory == 2 * size
    assert all(same(bank.tree(name), tree) for name, tree in trees.items())
    x = randn(4, 6).bfloat16()
    names = ["3", None, "0", "3"]
    torch.testing.assert_close(bank(names, x), loop(adapter, trees, names, x, "mlp"), atol=0.02, rtol=0.02)


def test_a_wider_dtype_is_refused_unless_asked_for(tmp_path):
    adapter = pf.bind(pf.lora("0", rank=2), half_model())  # float32 factors
    tree = perturbed(adapter.init(0)[1], 1)
    bank = pf.AdapterBank(adapter)
    for dtype in (torch.float16, torch.bfloat16):
        bank.add(str(dtype), pf.map_leaves(lambda t, d=dtype: t.to(d), tree))
        assert same(bank.tree(str(dtype)), pf.map_leaves(lambda t, d=dtype: t.to(d).float(), tree))
    with pytest.raises(pf.TreeError, match=r"is torch.float64, and the bank keeps it in torch.float32"):
        bank.add("wide", pf.map_leaves(lambda t: t.double(), tree))
    pf.save(tmp_path / "wide.safetensors", adapter, pf.map_leaves(lambda t: t.double(), tree))
    with pytest.raises(pf.TreeError, match=r"'wide': .* is torch.float64"):
        bank.add_files({"wide": tmp_path / "wide.safetensors"})
    assert len(bank) == 2
    half = pf.AdapterBank(adapter, dtype=torch.bfloat16, memory_limit=2 * (6 + 8) * 2, folder=tmp_path)
    half.add_files({"wide": tmp_path / "wide.safetensors"})
    half.add("a", tree)
    assert half.memory == 2 * (6 + 8) * 2
    rounded = pf.map_leaves(lambda t: t.bfloat16(), tree)
    assert same(half.tree("a"), rounded)
    assert same(half.tree("wide"), rounded)
    assert half.in_memory() == ["wide"]
    assert same(half.tree("a"), rounded)


def test_other_base_weights():
    adapter, trees, x = case("mlp", "chain", 2)
    frozen = {name: weight + 0.1 for name, weight in adapter.init(0)[0].items()}
    bank = pf.AdapterBank(adapter, frozen)
    bank.add("a", trees["user 0"])
    expected = adapter.model(adapter.apply(frozen, trees["user 0"]), x)
    torch.testing.assert_close(bank(["a"] * 7, x), expected, atol=1e-10, rtol=1e-10)
    with pytest.raises(pf.NameMismatchError, match="frozen must hold"):
        pf.AdapterBank(adapter, adapter.model.params)


def test_leaves_go_to_the_device_of_the_base_weights():
    adapter, _, _ = case("mlp", "lora", 1)
    bank = pf.AdapterBank(adapter, {name: weight.to("meta") for name, weight in adapter.model.params.items()})
    bank.add("a", adapter.init(0)[1])
    assert {leaf.device.type for _, leaf in pf.leaves(bank.gather(["a"])[0])} == {"meta"}
    with pytest.raises(pf.TreeError, match="on meta and has no values"):
        pf.AdapterBank(adapter).add("a", pf.map_leaves(lambda t: t.to("meta"), adapter.init(0)[1]))


# The order of a batch


@pytest.fixture
def seen(monkeypatch):
    """The indices that the bank routes by."""
    found, route = [], bank_file.route
    monkeypatch.setattr(bank_file, "route", lambda *args: found.append(args[-1].tolist()) or route(*args))
    return found


PAIRS = ["user 0", "user 1", None, "user 1", None, "user 0"]


def test_a_batch_is_sorted_where_that_shares_more(seen):
    adapter, trees, x = case("bert", "dora", 3)
    bank, x = filled(adapter, trees), x[:6]
    mask = torch.ones(6, 5, dtype=torch.int64)
    mask[2, 3:] = mask[4, 1:] = 0
    y = bank(PAIRS, input_ids=x, attention_mask=mask).logits
    assert seen == [[0, 0, 1, 1, -1, -1]]
    expected = adapter.model(bank.route(PAIRS), x, mask).logits
    torch.testing.assert_close(y, expected, atol=1e-10, rtol=1e-10)
    assert not torch.allclose(expected, adapter.model(bank.route(PAIRS), x).logits)  # the mask counts
    assert torch.equal(x, ids(7, 5, high=32)[:6])
    seen.clear()
    for names in (["user 0", "user 1", "user 0"], ["user 0", "user 0", "user 1", "user 1"], [None] * 3):
        bank(names, x[: len(names)])  # three and one, two and two already, one run: nothing to be gained
        assert seen.pop() == bank.gather(names)[1].tolist()


class Plain(nn.Module):
    """Returns what it is told to, of a linear layer."""

    def __init__(self, output):
        super().__init__()
        self.layer = nn.Linear(4, 4).double()
        self.output = output

    def forward(self, x, other=None):
        return self.output(self.layer(x), other)


def plain(output):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapter = pf.bind(pf.lora("layer", rank=2), pf.functionalize(Plain(output)))
    trees = {f"user {key}": perturbed(adapter.init(key)[1], key) for key in range(2)}
    return adapter, filled(adapter, trees)


@pytest.mark.parametrize(
    ("other", "sorts"),
    [
        (None, True), (2.0, True), (randn(6, 4), True), (randn(4), True), (randn(1, 4), True), (randn(6, 1, 4), True),
        (randn(6), False), ([randn(6, 4)], False), ([1.0] * 6, False), (randn(4, 6), False), (randn(6, 6), False),
    ],
    ids=str,
)  # fmt: skip
def test_arguments_that_could_be_anything_keep_the_order(seen, other, sorts):
    def output(y, other):
        if isinstance(other, list):
            other = other[0] if isinstance(other[0], torch.Tensor) else torch.tensor(other).unsqueeze(1)
        if isinstance(other, torch.Tensor) and other.shape[-1] == 6:
            other = other[:, :4] if other.dim() == 2 and len(other) > 4 else other.mean()
        if isinstance(other, torch.Tensor) and other.dim() == 3:
            other = other[:, 0]
        return y if other is None else y * other

    adapter, bank = plain(output)
    y = bank(PAIRS, randn(6, 4), other)
    assert seen == [[0, 0, 1, 1, -1, -1] if sorts else [0, 1, -1, 1, -1, 0]]
    expected = adapter.model(bank.route(PAIRS), randn(6, 4), other)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("output", "sorts"),
    [
        (lambda y, _: {"y": (y, y.sum(), None)}, True),
        (lambda y, _: (y, "text"), False),
        (lambda y, _: y.T, False),
        (lambda y, _: y @ y.T, False),
        (lambda y, _: y.flatten(), False),
        (lambda y, _: [y, [row.sum().item() for row in y]], False),
    ],
)
def test_outputs_that_could_be_anything_keep_the_order(seen, output, sorts):
    adapter, bank = plain(output)
    expected = adapter.model(bank.route(PAIRS), randn(6, 4))
    seen.clear()
    for first in (True, False):
        found = bank(PAIRS, randn(6, 4))
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12) if sorts else None
        assert repr(found) == repr(expected) or sorts
        assert len(seen) == (2 if first and not sorts else 1)  # once to find out, then never again
        assert (seen[-1] == [0, 0, 1, 1, -1, -1]) == sorts
        seen.clear()


def test_gradients_of_a_sorted_batch():
    adapter, bank = plain(lambda y, _: y)
    xs = [randn(6, 4).requires_grad_() for _ in range(2)]
    (bank(PAIRS, xs[0]) * randn(6, 4, seed=1)).sum().backward()
    (adapter.model(bank.route(PAIRS), xs[1]) * randn(6, 4, seed=1)).sum().backward()
    torch.testing.assert_close(xs[0].grad, xs[1].grad, atol=1e-12, rtol=1e-12)


# Bad input


def test_unknown_names_come_with_the_nearest(small):
    bank = filled(small, {"alice": constant(small, 1), "alicia": constant(small, 2), "bob": constant(small, 3)})
    with pytest.raises(pf.NameMismatchError, match="no adapter 'alise' among its 3; the nearest names: 'alice'"):
        bank.gather(["bob", "alise"])
    with pytest.raises(pf.NameMismatchError, match=r"bank.add\('x', tree\)"):
        pf.AdapterBank(small).tree("x")


@pytest.mark.parametrize("names", ["alice", [], (), None, {"a": 1}, torch.tensor([0]), ["a", 1]])
def test_batches_are_lists_of_names(small, names):
    bank = filled(small, {"a": constant(small, 1)})
    for call in (bank.gather, bank.route, lambda names: bank(names, torch.ones(1, 3))):
        with pytest.raises(pf.OptionError, match=r"such as \['ann', None\]|the name of an adapter is a str"):
            call(names)


def test_wrong_trees_leave_the_bank_as_it_was(small):
    bank = filled(small, {"a": constant(small, 1)})
    good = constant(small, 2)
    bad = [{}, {"lora": {}}, {**good, "more": torch.ones(1)}, pf.map_leaves(lambda t: t[:0], good)]
    bad += [pf.map_leaves(lambda t: t.to(torch.int32), good), pf.stack([good, good]), [1], None]
    for tree in bad:
        with pytest.raises(pf.TreeError):
            bank.add("b", tree)
        with pytest.raises(pf.TreeError):
            bank.replace("a", tree)
    for name in (1, None, b"b", ["b"]):
        with pytest.raises(pf.OptionError, match="the name of an adapter is a str"):
            bank.add(name, good)
        assert (name in bank) is False if not isinstance(name, list) else True
    assert bank.names() == ["a"]
    assert values(bank.gather(["a"])[0]) == [1]


def test_options_that_cannot_work(small, tmp_path):
    with pytest.raises(pf.OptionError, match="bound adapter"):
        pf.AdapterBank(pf.lora("weight"))
    with pytest.raises(pf.OptionError, match="nothing that trains"):
        pf.AdapterBank(pf.bind(pf.chain(), small.model))
    for limit in (0, -1, BYTES - 1, 1e9, True, "1 GB"):
        with pytest.raises(pf.OptionError, match=f"room for one adapter, {BYTES}"):
            pf.AdapterBank(small, memory_limit=limit, folder=tmp_path)
    with pytest.raises(pf.OptionError, match="give one, in bytes"):
        pf.AdapterBank(small, folder=tmp_path)
    with pytest.raises(pf.OptionError, match="must exist already"):
        pf.AdapterBank(small, memory_limit=1000, folder=tmp_path / "none")
    for dtype in (torch.int8, "bfloat16", float):
        with pytest.raises(pf.OptionError, match="floating-point dtype"):
            pf.AdapterBank(small, dtype=dtype)
    assert not list(Path(tmp_path).iterdir())


def test_a_bank_says_what_it_is(small):
    bank = filled(small, {"a": constant(small, 1)})
    assert repr(bank) == f"AdapterBank(1 of {small!r}, 1 in memory: {BYTES} bytes)"


@pytest.mark.parametrize("static", [False, True])
def test_a_default_device_changes_nothing(small, static):
    bank = filled(small, {"a": constant(small, 1)})
    with torch.device("meta"):
        stacked, index = bank.gather(["a", None], static=static)
    assert index.tolist() == [0, -1]
    assert not any(leaf.is_meta for _, leaf in pf.leaves(stacked))
