"""Every line of the tables for people who come from tinytune or PEFT runs, and does what their call does."""

import copy
import re
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import peft_func as pf

PAGE = (Path(__file__).parents[1] / "docs" / "coming-from.md").read_text()
SETTING = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
ROWS = re.findall(r"^\| (.*?) \| `(.*?)` \|$", PAGE, re.MULTILINE)
F = nn.functional


def setting():
    names = {}
    exec(SETTING, names)
    return names


def bound(ns, method=None):
    """Bind the method that a row made, move its tree off its start, and return how it calls."""
    adapter = pf.bind(method or ns["method"], ns["model"])
    frozen, tree = adapter.init(1)
    generator = torch.Generator().manual_seed(2)
    tree = pf.map_leaves(lambda t: t + 0.1 * torch.randn(t.shape, generator=generator, dtype=t.dtype), tree)
    return tree, (lambda: ns["model"](adapter.apply(frozen, tree), ns["ids"])), adapter


def with_hooks(ns, hooks):
    """The plain net with forward hooks, removed afterwards."""
    net = copy.deepcopy(ns["net"])
    for path, hook in hooks.items():
        net.get_submodule(path).register_forward_hook(hook)
    return net(ns["ids"])


def low_rank(tree, key):
    leaf = tree[key]
    return lambda module, args, output: output + args[0] @ leaf["A"].T @ leaf["B"].T


def at_lin0(ns, tree, key="lora"):
    part = tree[key]
    return with_hooks(ns, {path.removesuffix(".weight"): low_rank(part, path) for path in part})


def same(a, b):
    return torch.allclose(a, b, atol=1e-10)


def lora_call(ns, tree):
    return at_lin0(ns, tree)


def parts_of(ns):
    tree, call, adapter = bound(ns)
    return {part.keys[-1]: set(part.paths or part.modules) for part in adapter.parts}, tree, call


def ranks(ns):
    tree, *_ = bound(ns)
    return {
        (name, path): leaf["A"].shape[0] for name, part in tree.items() for path, leaf in part.items() if "A" in leaf
    }


LIN0 = {"1.lin0.weight", "2.lin0.weight"}
LIN1 = {"1.lin1.weight", "2.lin1.weight"}


def check_lora(ns):
    tree, call, _ = bound(ns)
    return set(tree["lora"]) == LIN0 and same(call(), at_lin0(ns, tree))


def check_pre(ns):
    tree, call, _ = bound(ns)
    net, scale = copy.deepcopy(ns["net"]), tree["before"]["1.lin0"]["s"]
    net[1].lin0.register_forward_pre_hook(lambda module, args: args[0] * scale)
    return same(call(), net(ns["ids"]))


def check_post(ns):
    tree, call, _ = bound(ns)
    return same(call(), with_hooks(ns, {"1": lambda module, args, output: output + tree["after"]["1"]["b"]}))


def check_own_layer(ns):
    tree, call, _ = bound(ns)
    leaf = tree["after"]["1"]
    hook = lambda module, args, output: F.linear(output, leaf["weight"], leaf["bias"])
    return same(call(), with_hooks(ns, {"1": hook}))


def check_own_merge(ns):
    tree, call, adapter = bound(ns)
    merged = pf.merge(adapter.apply(adapter.frozen, tree))
    return same(call(), ns["model"](merged, ns["ids"])) and not same(call(), ns["net"](ns["ids"]))


def check_both(ns):
    hooks = {}
    for path in LIN0:
        one, two = (low_rank(ns[tree]["lora"], path) for tree in ("tree", "tree_b"))
        hooks[path.removesuffix(".weight")] = lambda m, a, o, one=one, two=two: two(m, a, one(m, a, o))
    return same(ns["y"], with_hooks(ns, hooks))


def check_ia3(ns):
    tree, call, _ = bound(ns)
    net = copy.deepcopy(ns["net"])
    for path, leaf in tree["ia3"].items():
        net.get_submodule(path.removesuffix(".weight")).register_forward_pre_hook(
            lambda module, args, scale=leaf["scale"]: args[0] * scale
        )
    return set(tree["ia3"]) == LIN0 and same(call(), net(ns["ids"]))


def check_one_layer(ns):
    tree, call, adapter = bound(ns)
    scale, leaf = tree["ia3"]["1.lin0.weight"]["scale"], tree["lora"]["1.lin0.weight"]
    net = copy.deepcopy(ns["net"])
    weight = net[1].lin0.weight.data * scale + leaf["B"] @ leaf["A"]  # merged and unmerged agree, in any order
    net[1].lin0.weight.data = weight
    return same(call(), net(ns["ids"])) and same(
        call(), ns["model"](pf.merge(adapter.apply(adapter.frozen, tree)), ns["ids"])
    )


def check_embedding(ns):
    tree, call, _ = bound(ns)
    leaf = tree["lora"]["0.weight"]
    hook = lambda module, args, output: output + F.embedding(args[0], (leaf["B"] @ leaf["A"]))
    return same(call(), with_hooks(ns, {"0": hook}))


def check_swap(ns):
    return same(ns["y"], at_lin0({**ns, "net": ns["other_net"]}, ns["tree"])) and unchanged(ns)


def unchanged(ns):
    fresh = setting()
    return all(map(torch.equal, fresh["net"].state_dict().values(), ns["net"].state_dict().values()))


def check_merged_net(ns):
    return same(ns["other_net"](ns["ids"]), lora_call(ns, ns["tree"]))


def check_joined(ns, weights):
    y = ns["model"](ns["merged"].apply(ns["base"], ns["joined"]), ns["ids"])
    hooks = {}
    for path in LIN0:
        one, two = (ns[tree]["lora"][path] for tree in ("tree", "tree_b"))
        dense = weights[0] * one["B"] @ one["A"] + weights[1] * two["B"] @ two["A"]
        hooks[path.removesuffix(".weight")] = lambda m, a, o, dense=dense: o + a[0] @ dense.T
    return same(y, with_hooks(ns, hooks))


def check_loaded(ns):
    return all(
        torch.allclose(loaded, own, atol=1e-6)
        for (_, loaded), (_, own) in zip(pf.leaves(ns["loaded"]), pf.leaves(ns["tree"]), strict=True)
    ) and same(ns["model"](ns["again"].apply(ns["frozen"], ns["loaded"]), ns["ids"]), lora_call(ns, ns["tree"]))


def check_peft_model(ns):
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["lin0"])
    theirs = peft.get_peft_model(copy.deepcopy(ns["net"]), config)
    ours = dict(ns["module"].named_parameters())
    for name, param in theirs.named_parameters():
        if param.requires_grad:
            path, kind = re.search(r"base_model\.model\.(.*)\.lora_([AB])", name).groups()
            param.data = (ours[f"lora.{path}.weight.{kind}"].data + 0.1).to(param.dtype)
    with torch.no_grad():
        for param in ns["module"].parameters():
            param += 0.1
    trained = sum(param.numel() for param in theirs.parameters() if param.requires_grad)
    return trained == sum(p.numel() for p in ours.values()) and torch.allclose(
        theirs.double()(ns["ids"]), ns["module"](ns["ids"]), atol=1e-5
    )


def check_rows(ns):
    rows = [ns["tree"], ns["tree_b"], None, ns["tree"]]
    alone = [(lora_call(ns, tree) if tree else ns["net"](ns["ids"]))[i : i + 1] for i, tree in enumerate(rows)]
    return same(ns["y"], torch.cat(alone))


def check_folder(ns):
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(ns["net"]), ns["folder"])
    return torch.allclose(theirs.double()(ns["ids"]), lora_call(ns, ns["tree"]), atol=1e-5)


BASE = lambda ns: torch.equal(ns["y"], ns["net"](ns["ids"])) and unchanged(ns)
SECOND = lambda ns: same(ns["y"], lora_call(ns, ns["tree_b"])) and unchanged(ns)
LEAVES = lambda ns: {".".join(keys): leaf for keys, leaf in pf.leaves(ns["tree"])}

CHECKS = {
    '`LoraConfig(target_modules="lin0", r=8)`': check_lora,
    '`LoraConfig(target_modules=["lin0", "lin1"])`': lambda ns: parts_of(ns)[0] == {"lora": LIN0 | LIN1},
    '`LoraConfig(..., mimic_layers=["3"])`': lambda ns: (
        parts_of(ns)[0]
        == {
            "lora": LIN0,
            "train": {"3.weight", "3.bias"},
        }
    ),
    '`IA3Config(target_modules="lin0")`': check_ia3,
    "`AdapterWrapper.from_config(model, config)`": lambda ns: (
        ns["adapter"].spec == pf.bind(ns["method"], ns["model"]).spec
    ),
    "`AdapterWrapper(model)`": lambda ns: torch.equal(ns["model"](ns["model"].params, ns["ids"]), ns["net"](ns["ids"])),
    '`wrapper.add_adapter("default")`': lambda ns: list(ns["trees"]) == ["default"],
    '`wrapper.add_adapter("default")` a second time: KeyError': lambda ns: list(ns["trees"]) == ["default"],
    '`wrapper.delete_adapter("b")`': lambda ns: list(ns["trees"]) == ["a"],
    '`wrapper.set_active_adapters("b")`': SECOND,
    '`wrapper.set_active_adapters(["a", "b"])`': check_both,
    '`wrapper.add_adapter_layer("a", "1.lin0", LinearLoraLayer(r=4))`, and `"2.lin0"` with `r=16`': lambda ns: (
        ranks(ns) == {("r4", "1.lin0.weight"): 4, ("r8", "2.lin0.weight"): 8}
    ),
    "`LinearLoraLayer` here, `LinearIA3Layer` there": lambda ns: (
        parts_of(ns)[0] == {"lora": {"1.lin0.weight"}, "ia3": {"2.lin0.weight"}}
    ),
    "both on one layer": check_one_layer,
    "`EmbeddingLoraLayer`": check_embedding,
    "`pre_forward(module, args, kwargs)` of one's own": check_pre,
    "`post_forward(module, args, kwargs, output)`": check_post,
    "an `AdapterLayer` with parameters of its own": check_own_layer,
    "`layer.merge` / `unmerge` of one's own": check_own_merge,
    "`wrapper.merge_adapters()`": lambda ns: same(ns["y"], lora_call(ns, ns["tree"])) and unchanged(ns),
    '`wrapper.merge_adapters(["a", "b"])`': lambda ns: check_joined(ns, (1, 1)),
    "`wrapper.unmerge_adapters()`": BASE,
    "`wrapper.unload()`": lambda ns: ns["base"] is ns["net"] and unchanged(ns),
    "`wrapper.merge_and_unload()`": check_merged_net,
    "`wrapper.swap_base_model(new)`": check_swap,
    "`wrapper.adapter_parameters()`": lambda ns: (
        [id(p) for p in ns["parameters"]] == [id(p) for p in LEAVES(ns).values()]
    ),
    "`wrapper.named_adapter_parameters()`": lambda ns: (
        ns["named"].keys() == LEAVES(ns).keys() and len(ns["named"]) == 4
    ),
    "`wrapper.named_parameters()`, for an optimizer": lambda ns: ns["named"].keys() == LEAVES(ns).keys(),
    "`wrapper.generate(...)`": lambda ns: torch.equal(
        ns["generate"](ns["model"].params, ns["ids"]), ns["net"](ns["ids"])
    ),
    "saving (not there)": check_loaded,
    '`get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["lin0"]))`': check_peft_model,
    '`target_modules="all-linear"`': lambda ns: parts_of(ns)[0] == {"lora": LIN0 | LIN1 | {"3.weight"}},
    '`exclude_modules=["lin1"]`': lambda ns: parts_of(ns)[0] == {"lora": LIN0 | {"3.weight"}},
    "`layers_to_transform=[2]`": lambda ns: parts_of(ns)[0] == {"lora": {"2.lin0.weight"}},
    '`modules_to_save=["3"]`': lambda ns: parts_of(ns)[0] == {"lora": LIN0, "train": {"3.weight", "3.bias"}},
    '`rank_pattern={"2.lin0": 2}`': lambda ns: (
        ranks(ns) == {("lora", "1.lin0.weight"): 4, ("lora", "2.lin0.weight"): 2}
    ),
    "`use_rslora=True`": lambda ns: ns["method"].options["rank_stabilized"] is True,
    "`use_dora=True`": lambda ns: set(bound(ns)[0]["dora"]["1.lin0.weight"]) == {"A", "B", "magnitude"},
    "`lora_dropout=0.1`": lambda ns: ns["method"].options["dropout"] == 0.1,
    '`bias="lora_only"`': lambda ns: "1.lin0.bias" in bound(ns)[0]["lora"] or "bias" in str(bound(ns)[2].spec),
    '`IA3Config(target_modules=["lin0"], feedforward_modules=["lin0"])`': check_ia3,
    "`model.print_trainable_parameters()`": lambda ns: "total" in ns["text"] and "lora.1.lin0.weight.A" in ns["text"],
    "`get_peft_model_state_dict(model)`": lambda ns: ns["state"].keys() == LEAVES(ns).keys(),
    '`model.set_adapter("b")`': SECOND,
    "`with model.disable_adapter():`": BASE,
    '`model(..., adapter_names=["a", "b", "__base__", "a"])`': check_rows,
    "`model.merge_and_unload()`": lambda ns: (
        ns["merged"].keys() == ns["net"].state_dict().keys()
        and same(ns["model"](ns["merged"], ns["ids"]), lora_call(ns, ns["tree"]))
    ),
    "`model.merge_adapter()`, then `model.unmerge_adapter()`": unchanged,
    '`model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "c", combination_type="cat")`': lambda ns: check_joined(
        ns, (0.7, 0.3)
    ),
    "`model.save_pretrained(folder)`": check_folder,
    "`PeftModel.from_pretrained(model, folder)`": check_loaded,
    "`model.unload()`": lambda ns: ns["base"] is ns["net"] and unchanged(ns),
}


def test_every_line_has_a_check():
    assert [theirs for theirs, _ in ROWS] == list(CHECKS)
    assert len(ROWS) == PAGE.count("\n| ") - 2  # without the heads of the two tables


@pytest.mark.parametrize(("theirs", "ours"), ROWS, ids=[theirs for theirs, _ in ROWS])
@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
def test_a_line_does_what_it_says(theirs, ours):
    names = setting()
    exec(ours, names)
    assert CHECKS[theirs](names)
