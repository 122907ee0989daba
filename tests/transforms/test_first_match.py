"""Each module to the first check that says yes: the walk, what each pair gets, what is refused, and the file."""

import copy
import functools
import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

import peft_func as pf
from peft_func.functional.walk import walk
from tests.zoo import ZOO, Shared, Tied, seeded


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 6)
        self.gamma = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return x + self.gamma * self.fc2(torch.tanh(self.fc1(self.norm(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv1d(3, 6, 3)
        self.blocks = nn.Sequential(Block(), Block(), Block())
        self.pool = nn.Identity()
        self.head = nn.Linear(6, 4)
        self.token = nn.Parameter(torch.zeros(6))

    def forward(self, x):
        return self.head(self.pool(self.blocks(self.conv1(x).mT + self.token)))


@pytest.fixture(scope="module")
def model():
    return pf.functionalize(seeded(Net)())


def got(method, model):
    """The names that each part trains or adapts."""
    return {".".join(part.keys): part.paths for part in pf.bind(method, model).parts}


def refused(kind, words, method, model):
    with pytest.raises(kind) as caught:
        pf.bind(method, model)
    for word in words:
        assert word in str(caught.value), str(caught.value)


LORA = functools.partial(pf.lora, rank=2)


# The walk.


def children_first_to_last(module, prefix=""):
    """The walk, written down again: the module, then its children one after the other, each with all below it."""
    found = [prefix]
    for name, child in module._modules.items():
        found += children_first_to_last(child, f"{prefix}.{name}" if prefix else name)
    return found


@pytest.mark.parametrize("name", ["mlp", "bert", "llama", "vit"])
def test_the_walk_is_in_registration_order_with_parents_first(name):
    net = ZOO[name].build()
    tree = walk(net)
    assert list(tree) == children_first_to_last(net)
    for path, info in tree.items():
        module = net.get_submodule(path)
        assert info.modules == (type(module),)
        assert list(info.children) == [f"{path}.{n}" if path else n for n, _ in module.named_children()]
        assert set(info.own) <= set(pf.functionalize(net).params)
        if path:
            parent = net.get_submodule(path.rpartition(".")[0])
            assert list(parent.children())[info.position] is module
            assert info.siblings == len(list(parent.children()))


def test_a_shared_module_is_met_once_under_all_its_paths():
    net = nn.ModuleDict({"a": nn.ModuleDict({"x": nn.Linear(2, 2)}), "y": nn.ReLU()})
    net["b"] = net["a"]["x"]
    tree = walk(net)
    assert list(tree) == ["", "a", "a.x", "y"]
    assert tree["a.x"].aliases == ("b",)
    assert (tree["a.x"].position, tree["a.x"].siblings) == (0, 1)
    assert tree[""].children == ("a", "y", "a.x")
    first = nn.ModuleDict({"x": nn.Linear(2, 2), "y": nn.ReLU()})
    first["z"] = nn.ModuleDict({"again": first["x"]})
    tree = walk(first)
    assert (tree["x"].position, tree["x"].siblings, tree["x"].aliases) == (0, 3, ("z.again",))


# What each pair gets, against the rule written down again.

PLACES = [path for path, _ in Net().named_modules()]
NAMES = sorted({path.rpartition(".")[2] for path in PLACES if path})
CLASSES = ["Linear", "LayerNorm", "Block", "Sequential", "Conv1d"]


def straightforward(net, caps):
    """A recursion over the real modules; a check is `(asks parameters, word)`: a name or a class name."""
    found = {}

    def visit(module, path):
        names = {path.rpartition(".")[2], type(module).__name__}
        for i, (of_parameter, word) in enumerate(caps):
            if not of_parameter and word in names:
                found.setdefault(i, []).extend(f"{path}.{n}".lstrip(".") for n, _ in module.named_parameters())
                return
        for name, _ in module.named_parameters(recurse=False):
            for i, (of_parameter, word) in enumerate(caps):
                if of_parameter and (word == name or word in names):
                    found.setdefault(i, []).append(f"{path}.{name}".lstrip("."))
                    break
        for name, child in module.named_children():
            visit(child, f"{path}.{name}".lstrip("."))

    visit(net, "")
    return found


words = st.sampled_from([*NAMES, *CLASSES, "weight", "bias", "gamma"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), words), min_size=1, max_size=4))
def test_it_gives_what_the_rule_gives(model, caps):
    def check(of_parameter, word):
        where = pf.named(word) | pf.class_named(word, subclasses=False)
        return pf.parameter(where) if of_parameter else where

    wanted = straightforward(Net(), caps)
    method = pf.first_match(*((check(*cap), pf.train, {"name": f"cap{i}"}) for i, cap in enumerate(caps)))
    claimed = {}
    for claim in method.claims(model):
        claimed.setdefault(claim.cap, []).extend(claim.parameters)
    assert {i: sorted(names) for i, names in claimed.items()} == {i: sorted(names) for i, names in wanted.items()}
    if all(wanted.get(i) for i in range(len(caps))):
        order = list(model.params)
        assert got(method, model) == {f"cap{i}": tuple(sorted(wanted[i], key=order.index)) for i in wanted}
    else:
        refused(pf.SelectorError, [], method, model)


def test_the_first_check_wins_and_the_walk_stops_there(model):
    method = pf.first_match(
        (["blocks.1"], pf.train, {"name": "first"}),
        (["fc1"], pf.train, {"name": "second"}),
        (pf.class_named("Linear"), LORA),
    )
    assert got(method, model) == {
        "first": tuple(name for name in model.params if name.startswith("blocks.1.")),
        "second": ("blocks.0.fc1.weight", "blocks.0.fc1.bias", "blocks.2.fc1.weight", "blocks.2.fc1.bias"),
        "lora": ("blocks.0.fc2.weight", "blocks.2.fc2.weight", "head.weight"),
    }


def test_none_leaves_what_it_gets_frozen(model):
    method = pf.first_match((["blocks"], None), (pf.class_named("Linear"), LORA))
    assert got(method, model) == {"lora": ("head.weight",)}
    adapter = pf.bind(pf.first_match((["blocks"], None)), model)
    frozen, trainable = adapter.init(0)
    assert (list(frozen), trainable) == (list(model.params), {})


def test_the_net_itself_can_be_taken(model):
    assert got(pf.first_match(("", pf.train)), model) == {"train": tuple(model.params)}
    assert got(pf.first_match((pf.class_named("Net"), pf.lora(["head"], rank=2))), model) == {"lora": ("head.weight",)}


def test_what_nothing_matched_is_frozen(model):
    frozen, trainable = pf.bind(pf.first_match((["head"], LORA)), model).init(0)
    assert set(frozen) == set(model.params)
    assert all(frozen[name] is model.params[name] for name in frozen)
    assert list(trainable) == ["lora"]


ACTIONS = {
    "a factory": pf.train,
    "a method": pf.train(".*"),
    "a method of a few": pf.train(r".*\.fc1\.bias|.*gamma"),
    "a function": lambda where: pf.chain(pf.lora(where, rank=1), pf.train(r".*bias")),
    "a chain": pf.chain(pf.gift(["fc1"], rank=1), pf.train(["norm"], name="norms")),
    "a named chain": pf.chain(pf.lora(r".*", rank=1), name="inner"),
}


@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)
def test_a_method_keeps_to_what_its_check_got(model, action):
    places = {name for name in model.params if name.startswith("blocks.1.")}
    parts = got(pf.first_match((["blocks.1"], action)), model)
    assert all(places >= set(paths) for paths in parts.values())
    whole = got(action(pf.exact(places)) if callable(action) else action, model)
    assert parts == {keys: tuple(path for path in paths if path in places) for keys, paths in whole.items()}


def test_it_is_the_chain_that_one_would_write(model):
    method = pf.first_match((["head"], pf.train), (["fc1"], LORA), (pf.parameter(["gamma"]), pf.train, {"name": "g"}))
    plain = pf.chain(pf.train("head"), pf.lora(["fc1"], rank=2), pf.train(["gamma"], name="g"))
    _, ours = pf.bind(method, model).init(3)
    _, theirs = pf.bind(plain, model).init(3)
    assert [keys for keys, _ in pf.leaves(ours)] == [keys for keys, _ in pf.leaves(theirs)]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(pf.leaves(ours), pf.leaves(theirs), strict=True))


def test_it_stands_in_a_chain_and_may_have_a_name(model):
    inner = pf.first_match((["fc1"], LORA), name="mine")
    method = pf.chain(pf.train("head"), inner, pf.first_match((["norm"], pf.train, {"name": "norms"})))
    assert list(got(method, model)) == ["train", "mine.lora", "norms"]
    unbound = pf.chain(pf.chain(pf.train("head"), inner), pf.first_match((["norm"], pf.train, {"name": "norms"})))
    assert got(unbound, model) == got(method, model)
    with pytest.raises(pf.OptionError, match="mine"):
        pf.bind(pf.chain(inner, inner), model)
    with pytest.raises(pf.OptionError, match="'lora'"):
        pf.bind(pf.first_match((["fc1"], LORA), (["fc2"], LORA)), model)
    with pytest.raises(pf.OptionError, match="'train'"):
        pf.bind(pf.chain(pf.train("head"), pf.first_match((["norm"], pf.train))), model)


def test_a_nested_strategy_walks_what_was_taken(model):
    nested = pf.first_match((["norm"], None), (pf.class_named("Linear"), LORA), (pf.parameter("blocks.*"), pf.train))
    method = pf.first_match((pf.class_named("Block") & pf.position(0, -1), nested), (["head"], pf.ia3))
    lora = tuple(f"blocks.{i}.{fc}.weight" for i in (0, 2) for fc in ("fc1", "fc2"))
    assert got(method, model) == {
        "lora": lora, "train": ("blocks.0.gamma", "blocks.2.gamma"), "ia3": ("head.weight", "head.bias")[:1],
    }  # fmt: skip
    deferred = pf.first_match((pf.class_named("Block") & pf.position(0, -1), lambda where: nested), (["head"], pf.ia3))
    assert got(deferred, model) == got(method, model)


def test_a_nested_strategy_that_does_nothing_in_one_of_its_places_is_an_error(model):
    nested = pf.first_match((pf.path(r"blocks\.0\.fc1"), LORA))
    refused(
        pf.SelectorError,
        ["'blocks.1' (Block)", "(check, None)"],
        pf.first_match((pf.class_named("Block"), nested)),
        model,
    )


def test_the_net_must_be_of_the_class_that_root_names(model):
    for root in (Net, "Net", nn.Module, "Module", [nn.Linear, Net], ("Linear", Net)):
        assert got(pf.first_match((["head"], pf.train), root=root), model)
    for root, word in ((nn.Linear, "Linear"), ("ResNet", "ResNet"), ([nn.Linear, "Other"], "Linear or Other")):
        refused(pf.OptionError, [word, "the net is a Net"], pf.first_match((["head"], pf.train), root=root), model)
    inner = pf.first_match((["fc1"], LORA), root=nn.Linear)
    refused(pf.OptionError, ["Linear", "'blocks.0' is a Block"], pf.first_match((["0"], inner)), model)


ERRORS = {
    "no such module": ([(["haed"], pf.train)], ["haed", "The nearest names: head"]),
    "no such class": ([(pf.class_named("Linaer"), pf.train)], ["Linaer", "Linear"]),
    "no such parameter": ([(pf.parameter(["gama"]), pf.train)], ["gama", "gamma", "parameter"]),
    "a predicate": ([(lambda path, info: False, pf.train)], ["pf.tour(model)"]),
    "shadowed": ([(["blocks"], pf.train), (["fc1"], LORA)], ["'blocks.0.fc1'", "'blocks' (Sequential)", "narrower"]),
    "shadowed parameter": ([(["head"], pf.train), (pf.parameter(r"head\..*"), LORA)], ["'head.weight'", "Linear"]),
    "only vectors": ([(["norm"], LORA)], ["'blocks.0.norm' (LayerNorm)", "blocks.0.norm.bias", "(check, None)"]),
    "nothing in it": ([(["pool"], pf.train)], ["'pool' (Identity)", "it has none"]),
    "one of many": ([(pf.named("fc1", "norm"), LORA)], ["'blocks.0.norm'", "LayerNorm"]),
    "a parameter of one dimension": ([(pf.parameter(["token", "gamma"]), LORA)], ["'token'"]),
    "no method": ([(["head"], lambda where: 3)], ["int", "functools.partial"]),
    "a shape": ([(pf.ndim(2), pf.train)], ["Net", "pf.parameter"]),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_what_gets_nothing_or_does_nothing_is_an_error(model, case):
    pairs, words = ERRORS[case]
    refused(pf.PeftFuncError, words, pf.first_match(*pairs), model)


BAD = {
    "nothing": (lambda: pf.first_match(), "pairs"),
    "no pair": (lambda: pf.first_match(pf.lora("head")), "pairs"),
    "a list": (lambda: pf.first_match(["head", pf.train]), "pairs"),
    "one": (lambda: pf.first_match((["head"],)), "pairs"),
    "a word": (lambda: pf.first_match((["head"], "train")), "str is no method"),
    "options of a method": (lambda: pf.first_match((["head"], pf.lora("head"), {"rank": 2})), "rank"),
    "options of nothing": (lambda: pf.first_match((["head"], None, {"rank": 2})), "rank"),
    "a class": (lambda: pf.first_match((nn.Linear, pf.train)), "pf.of_type"),
    "a number": (lambda: pf.first_match((3, pf.train)), "int"),
    "a regex": (lambda: pf.first_match(("(", pf.train)), "regular expression"),
    "root": (lambda: pf.first_match((["head"], pf.train), root=[3]), "root"),
    "name": (lambda: pf.first_match((["head"], pf.train), name="a.b"), "a.b"),
    "parameters of a strategy": (
        lambda: pf.first_match((pf.parameter(["token"]), pf.first_match((["head"], pf.train)))), "walks modules",
    ),
    "parameter of a class": (lambda: pf.parameter(nn.Linear), "pf.of_type"),
    "named nothing": (lambda: pf.named(), "named"),
    "named a number": (lambda: pf.named(3), "3"),
    "named ''": (lambda: pf.class_named(""), "class_named"),
    "position": (lambda: pf.position("0"), "'0'"),
    "no position": (lambda: pf.position(), "whole"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_pairs_are_refused_at_once(case):
    function, word = BAD[case]
    with pytest.raises(pf.PeftFuncError) as caught:
        function()
    assert word in str(caught.value)


def test_options_are_copied():
    options = {"rank": 2}
    method = pf.first_match((["head"], pf.lora, options))
    options["rank"] = 3
    model = pf.functionalize(seeded(Net)())
    assert pf.bind(method, model).spec[("lora", "head.weight", "A")] == (2, 6)


# Tied weights and shared modules.


def test_one_tensor_goes_to_one_pair():
    model = pf.functionalize(seeded(Tied)())
    names = {path for alias, name in model.ties.items() for path in (alias, name)}
    one, other = (name.removesuffix(".weight") for name in names)
    refused(
        pf.SelectorError, ["shared by", repr(one), repr(other)],
        pf.first_match((one, LORA), (other, pf.train)), model,
    )  # fmt: skip
    refused(pf.SelectorError, ["shared by", repr(one)], pf.first_match((one, LORA), (other, None)), model)
    both = pf.first_match((pf.path(one) | pf.path(other), LORA))
    assert got(both, model) == {"lora": tuple(dict.fromkeys(model.ties.values()))}
    assert got(pf.first_match((one, None), (other, None)), model) == {}


def test_a_shared_module_is_matched_by_any_of_its_paths():
    net = seeded(Shared)()
    model = pf.functionalize(net)
    shared = next(info for info in walk(net).values() if info.aliases)
    for path in shared.names:
        method = pf.first_match((pf.path(path), pf.train))
        assert [claim.path for claim in method.claims(model)] == [shared.path]  # and no second time at its other path
        found = got(method, model)["train"]
        assert found == tuple(name for name in model.params if name.startswith(shared.path + "."))


# GIFt's factories, each against what it says.

FACTORIES = {
    "mc_name_equal2": (pf.named("fc1"), lambda name, cls: name == "fc1"),
    "mc_name_equal2_sequence": (pf.named("fc1", "head"), lambda name, cls: name in ["fc1", "head"]),
    "mc_name_in": (pf.named("fc1 norm", within=True), lambda name, cls: name in "fc1 norm"),
    "mc_name_in_sequence": (
        pf.named("fc1 norm", "heads", within=True), lambda name, cls: name in "fc1 norm" or name in "heads",
    ),
    "mc_name_contains": (pf.named("*fc*"), lambda name, cls: "fc" in name),
    "mc_name_contains_sequence": (
        pf.named("*fc*", "*nv*"), lambda name, cls: any(text in name for text in ["fc", "nv"]),
    ),
    "mc_cname_equal2": (pf.class_named("Linear", subclasses=False), lambda name, cls: cls == "Linear"),
    "mc_cname_equal2_sequence": (
        pf.class_named("Linear", "Conv1d", subclasses=False), lambda name, cls: cls in ["Linear", "Conv1d"],
    ),
    "mc_cname_in": (
        pf.class_named("LinearBlock", within=True, subclasses=False), lambda name, cls: cls in "LinearBlock",
    ),
    "mc_cname_in_sequence": (
        pf.class_named("LinearBlock", "LayerNorm", within=True, subclasses=False),
        lambda name, cls: any(cls in text for text in ["LinearBlock", "LayerNorm"]),
    ),
    "mc_cname_contains": (pf.class_named("*Norm*", subclasses=False), lambda name, cls: "Norm" in cls),
    "mc_cname_contains_sequence": (
        pf.class_named("*Norm*", "*Conv*", subclasses=False),
        lambda name, cls: any(text in cls for text in ["Norm", "Conv"]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("factory", FACTORIES)
def test_every_module_check_of_gift_has_its_selector(factory):
    net = Net()
    net.out_proj = nn.modules.linear.NonDynamicallyQuantizableLinear(2, 2)
    selector, rule = FACTORIES[factory]
    tree = walk(net)
    chosen = [path for path, info in tree.items() if selector(path, info)]
    modules = dict(net.named_modules())
    assert chosen == [
        path for path in tree if path and rule(path.rpartition(".")[2], type(modules[path]).__name__)
    ]  # the net itself has no name, and is never asked there
    assert 0 < len(chosen) < len(tree)


def test_replacing_a_module_is_what_the_method_does(model):
    """ma_replace(factory) with its parameters is a method with its options."""
    method = pf.first_match((pf.named("fc1"), pf.lora, {"rank": 2, "alpha": 4}))
    adapter = pf.bind(method, model)
    assert adapter.parts[0].options["alpha"] == 4
    assert set(adapter.parts[0].paths) == {f"blocks.{i}.fc1.weight" for i in range(3)}


def test_independent_parameters_are_those_beside_modules(model):
    """pc_independent(): the owner has modules and parameters of its own."""
    net = Net()
    wanted = tuple(
        f"{path}.{name}".lstrip(".")
        for path, module in net.named_modules()
        if module._modules
        for name, _ in module.named_parameters(recurse=False)
    )
    assert set(wanted) == {"token", "blocks.0.gamma", "blocks.1.gamma", "blocks.2.gamma"}
    assert set(got(pf.first_match((pf.parameter(pf.independent()), pf.train)), model)["train"]) == set(wanted)
    inner = pf.first_match((pf.independent() & pf.named("1"), pf.train))
    assert set(got(inner, model)["train"]) == {name for name in model.params if name.startswith("blocks.1.")}


@pytest.mark.parametrize("check", [pf.independent(), pf.position(0)], ids=repr)
def test_places_in_the_tree_of_modules_are_known_only_in_a_walk(model, check):
    with pytest.raises(pf.SelectorError, match="first_match"):
        pf.bind(pf.train(check), model)


def test_positions_count_from_either_end(model):
    blocks = {i: tuple(n for n in model.params if n.startswith(f"blocks.{i}.")) for i in range(3)}
    block = pf.class_named("Block")
    assert got(pf.first_match((block & pf.position(-1), pf.train)), model)["train"] == blocks[2]
    assert got(pf.first_match((block & pf.position(0, 1), pf.train)), model)["train"] == blocks[0] + blocks[1]
    first = {"conv1.weight", "conv1.bias", *blocks[0]} | {
        f"blocks.{i}.norm.{leaf}" for i in (1, 2) for leaf in ("weight", "bias")
    }
    assert set(got(pf.first_match((pf.position(0), pf.train)), model)["train"]) == first
    assert got(pf.first_match((pf.index(range(1, 3)), pf.train)), model)["train"] == blocks[1] + blocks[2]


def test_names_and_classes_select_parameters_too(model):
    assert got(pf.lora(pf.named("fc*") & ~pf.index(0), rank=2), model)["lora"] == tuple(
        f"blocks.{i}.fc{k}.weight" for i in (1, 2) for k in (1, 2)
    )
    assert got(pf.train(pf.class_named("LayerNorm")), model) == got(pf.train(pf.of_type(nn.LayerNorm)), model)
    assert got(pf.train(pf.named("bias") | ["token"]), model)["train"][0] == "token"


def test_a_check_may_be_a_function_of_what_is_known(model):
    leaf = pf.first_match((lambda path, info: bool(info.own) and not info.children and "norm" not in path, pf.train))
    assert set(got(leaf, model)["train"]) == {
        name for name in model.params if not any(word in name for word in ("norm", "gamma", "token"))
    }


# Files, copies.


def test_a_file_needs_no_first_match(model, tmp_path):
    method = pf.first_match((["head"], pf.train), (["fc1"], LORA), name="mine")
    adapter = pf.bind(method, model)
    frozen, trainable = adapter.init(0)
    pf.save(tmp_path / "a.safetensors", adapter, trainable)
    again, base, loaded = pf.load(tmp_path / "a.safetensors", model)
    assert base.keys() == frozen.keys()
    assert again.spec == adapter.spec
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(pf.leaves(loaded), pf.leaves(trainable), strict=True))
    pf.load(tmp_path / "a.safetensors", model, method=method)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        (text,) = file.metadata().values()
    assert json.loads(text)["method"]["chain"][1]["places"].keys() == {f"blocks.{i}.fc1.weight" for i in range(3)}
    plain = pf.bind(pf.chain(pf.train("head"), pf.lora(["fc1"], rank=2), name="mine"), model)
    pf.save(tmp_path / "b.safetensors", plain, trainable)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_it_is_a_value(model):
    method = pf.first_match((["head"], pf.train), (pf.named("fc1"), pf.lora, {"rank": 2}), root="Net")
    for twin in (copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        assert got(twin, model) == got(method, model)
    with pytest.raises(AttributeError):
        method.name = "other"
    assert pf.bind(method, model).method.parts[0].name == "train"
    assert method.parts == ()


def test_the_model_is_as_it_was(model):
    before = {name: tensor.clone() for name, tensor in model.params.items()}
    adapter = pf.bind(pf.first_match((["head"], pf.train), (["fc1"], LORA)), model)
    frozen, trainable = adapter.init(0)
    x = torch.randn(2, 3, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(adapter.apply(frozen, trainable), x), model(model.params, x))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.params.items())
