"""Methods as plain data: what a description builds, that it comes back, what is refused and where, and files."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import peft_func as pf
from peft_func.interop import description
from peft_func.interop.checks import check_from, describe_check
from peft_func.interop.files import KINDS
from tests.zoo import ZOO

ROOT = Path(__file__).parents[2]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 6)
        self.gamma = nn.Parameter(torch.ones(6))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv1d(3, 6, 3)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(6, 4)


MODEL = pf.functionalize(Net())


def places(method):
    """All that a method is in a model: its parts, their options, and where they are."""
    return [(part.keys, part.part.kind, part.options, part.paths) for part in pf.bind(method, MODEL).parts]


SAME = {
    "a part": ({"lora": {"where": ["fc1"], "rank": 2}}, pf.lora(["fc1"], rank=2)),
    "a regex": ({"train": {"where": r"head\..*"}}, pf.train(r"head\..*")),
    "a chain": (
        {"chain": [{"lora": {"where": ["fc1"], "rank": 2, "bias": True}}, {"train": {"where": "head"}}], "name": "m"},
        pf.chain(pf.lora(["fc1"], rank=2, bias=True), pf.train("head"), name="m"),
    ),
    "patterns": (
        {"dora": {"where": ["fc1", "fc2"], "rank": 2, "rank_pattern": {"fc2": 3}, "alpha_pattern": {"fc1": 4}}},
        pf.dora(["fc1", "fc2"], rank=2, rank_pattern={"fc2": 3}, alpha_pattern={"fc1": 4}),
    ),
    "groups": (
        {"gift": {"where": ["fc1", "fc2"], "rank": 2, "share": {"a": {"name": "fc1"}, "b": ["fc2"]}}},
        pf.gift(["fc1", "fc2"], rank=2, share={"a": pf.named("fc1"), "b": ["fc2"]}),
    ),
    "several checks": (
        {"lora": {"where": {"class": "Linear", "not": {"name": "head"}, "index": [0, 1]}, "rank": 1}},
        pf.lora(pf.class_named("Linear") & ~pf.named("head") & pf.index(0, 1), rank=1),
    ),
    "a list of checks": (
        {"train": {"where": ["stem", {"glob": "*.gamma"}]}}, pf.train(["stem", pf.glob("*.gamma")]),
    ),
    "pairs": (
        {
            "first_match": [
                {"name": "head", "method": "train"},
                {"class": {"names": ["Linear"], "subclasses": False}, "index": 0, "method": {"lora": {"rank": 3}}},
                {"path": r"layers\.1", "method": None},
                {"parameter": {"independent": True}, "method": {"train": {"name": "gammas"}}},
            ],
            "root": "Net",
        },
        pf.first_match(
            (pf.named("head"), pf.train),
            (pf.class_named("Linear", subclasses=False) & pf.index(0), pf.lora, {"rank": 3}),
            (r"layers\.1", None),
            (pf.parameter(pf.independent()), pf.train, {"name": "gammas"}),
            root=Net,
        ),
    ),
    "a method of its own choice": (
        {"first_match": [{"suffix": "layers.0", "method": {"lora": {"where": ["fc1"], "rank": 2}}}]},
        pf.first_match((["layers.0"], pf.lora(["fc1"], rank=2))),
    ),
    "a chain in a pair": (
        {"first_match": [{"name": "fc*", "method": {"chain": [{"lora": {"rank": 2}}, {"train": {"where": ".*s"}}]}}]},
        pf.first_match((pf.named("fc*"), lambda where: pf.chain(pf.lora(where, rank=2), pf.train(".*s")))),
    ),
    "nested": (
        {
            "first_match": [
                {
                    "class": "Block", "position": -1,
                    "method": {
                        "first_match": [{"name": "norm", "method": None}, {"class": "Linear", "method": "ia3"}],
                        "name": "inner",
                    },
                }
            ]
        },
        pf.first_match(
            (
                pf.class_named("Block") & pf.position(-1),
                pf.first_match((["norm"], None), (pf.of_type(nn.Linear), pf.ia3), name="inner"),
            )
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SAME)
def test_a_description_is_the_method_that_it_says(case):
    described, method = SAME[case]
    assert places(pf.method_from(described)) == places(method)


@pytest.mark.parametrize("case", SAME)
def test_descriptions_come_back(case):
    found = pf.describe(pf.method_from(SAME[case][0]))
    assert json.loads(json.dumps(found)) == found
    assert pf.describe(pf.method_from(found)) == found
    assert places(pf.method_from(found)) == places(SAME[case][1])


@pytest.mark.parametrize("case", sorted(set(SAME) - {"nested"}))
def test_methods_come_back(case):
    found = pf.describe(SAME[case][1])
    assert places(pf.method_from(found)) == places(SAME[case][1])


OPTIONS = {
    "lora": {"rank": 3, "alpha": 5, "rank_stabilized": True, "dropout": 0.1, "init": "gaussian", "bias": True,
             "conv": "balanced", "rank_pattern": {"fc1": 1}, "alpha_pattern": {"fc2": 2.5}, "name": "mine"},
    "dora": {"rank": 3, "alpha": 5, "rank_stabilized": True, "rank_pattern": {"fc1": 1}, "alpha_pattern": {"fc2": 2.5},
             "name": "mine"},
    "gift": {"rank": 3, "share": "none", "block": "mlp", "in_projection_bias": True, "name": "mine"},
    "ia3": {"side": "input", "name": "mine"},
    "magnitude": {"name": "mine"},
    "train": {"name": "mine"},
}  # fmt: skip


LOW_RANK = {"rank": 3, "alpha": 5, "rank_pattern": {"fc1": 1}, "alpha_pattern": {"fc2": 2.5}}

REFT = {"rank": 2, "positions": "f2+l1", "tied": False, "dropout": 0.1, "width": 8}
BOTTLENECK = {"rank": 4, "activation": "tanh", "scale": 0.5, "layer_norm": "in", "dropout": 0.1, "form": "parallel"}
# What is only for some models: an animal, a place (None where the method knows it), options.
ADDINS = {
    "adaptformer": ("vit", None, {"form": "sequential", "rank": 2, "scale": "learned", "dropout": 0.2}),
    "adaption_prompt": ("llama", pf.attentions(-1), {"tokens": 3, "tanh": True}),
    "bottleneck": ("bert", pf.projections(), BOTTLENECK),
    "compacter": ("bert", pf.blocks(0) & ~pf.head(), {**BOTTLENECK, "n": 2, "low_rank": None, "share_rule": False}),
    "convpass": ("vit", None, {"rank": 2, "scale": 0.1, "init": "xavier", "dropout": 0.2}),
    "direft": ("bert", pf.blocks(), REFT),
    "fact": ("vit", pf.blocks(), {"rank": 2, "scale": 0.5, "how": "tk", "width": 8}),
    "loreft": ("llama", pf.blocks(0, 1), REFT),
    "noreft": ("gpt2", pf.blocks(), REFT),
    "parallel_adapter": ("vit", None, {"rank": 3}),
    "prefix_tuning": ("llama", pf.attentions(), {"tokens": 3, "reparameterize": "mlp", "hidden": 5}),
    "prompt_tuning": ("gpt2", ["wte"], {"tokens": 3, "reparameterize": "mlp", "hidden": 5, "keep": True}),
    "ssf": ("mlp", "0", {"form": "activations"}),
    "vpt": ("vit", None, {"tokens": 2, "deep": False, "keep": True, "dropout": 0.1}),
    "vqt": ("vit", None, {"tokens": 2, "pool": "mean"}),
}
MIXED = [pf.bottleneck(pf.mlps(), rank=2, name="a"), pf.bottleneck(pf.mlps(), rank=4, name="b")]
MIXTURES = {
    "average": pf.average(MIXED, weights=[0.3, 0.7], name="mine"),
    "gated": pf.gated(MIXED, name="mine"),
    "fusion": pf.fusion(MIXED, dropout=0.1, name="mine"),
}


def bound_options(method, model):
    (part,) = pf.bind(method, model).parts
    return part.options, part.paths, part.modules


@pytest.mark.parametrize("kind", MIXTURES)
def test_mixtures_come_back(kind):
    model, found = pf.functionalize(ZOO["bert"].build()), pf.describe(MIXTURES[kind])
    assert json.loads(json.dumps(found)) == found
    assert bound_options(pf.method_from(found), model) == bound_options(MIXTURES[kind], model)
    with pytest.raises(pf.OptionError, match=r"methods\[0\]: there is no 'bottle'"):
        pf.method_from({kind: {"methods": [{"bottle": {}}], "name": "mine"}})
    with pytest.raises(pf.OptionError, match="a list of add-ins"):
        pf.method_from({kind: {"name": "mine"}})


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - MIXTURES.keys()))
def test_no_option_is_lost(kind):
    known = description.known_options(kind)
    if kind in ADDINS:
        animal, where, options = ADDINS[kind]
        model = pf.functionalize(ZOO[animal].build())
        method = KINDS[kind](where, **options, name="mine")
    else:
        model, where = MODEL, ["fc1", "fc2"]
        options = OPTIONS.get(kind, {"name": "mine", **{name: LOW_RANK[name] for name in LOW_RANK if name in known}})
        method = KINDS[kind](where, **options)
    found = pf.describe(method)
    assert json.loads(json.dumps(found)) == found
    again = pf.method_from(found)
    assert bound_options(again, model) == bound_options(method, model)
    assert again.name == "mine"
    for option, value in options.items():
        assert option in pf.describe(KINDS[kind](where, **{option: value}))[kind], f"{option} is lost"


def test_every_option_of_low_rank_is_in_the_test_above():
    assert set(description.known_options("lora")) - {"where"} <= set(OPTIONS["lora"])


def test_options_at_their_defaults_are_left_out():
    assert pf.describe(pf.lora("head")) == {"lora": {"where": "head"}}
    assert pf.describe(pf.dora("head", rank=8)) == {"dora": {"where": "head"}}
    assert pf.describe(pf.chain()) == {"chain": []}
    assert pf.describe(pf.first_match((["a"], functools.partial(pf.lora, rank=3)))) == {
        "first_match": [{"suffix": ["a"], "method": {"lora": {"rank": 3}}}]
    }


leaf_checks = st.one_of(
    st.sampled_from(["layers.*", ".*bias", ""]),
    st.lists(st.sampled_from(["fc1", "head", "layers.0"]), min_size=1, max_size=2),
    st.builds(lambda v: {"name": v}, st.sampled_from(["*", ["fc1", "norm"], {"names": "fc1fc2", "within": True}])),
    st.builds(lambda v: {"class": v}, st.sampled_from(["Linear", {"names": ["*Norm", "Block"], "subclasses": False}])),
    st.builds(lambda v: {"glob": v}, st.sampled_from(["*.fc1", "head.*"])),
    st.builds(lambda v: {"suffix": v}, st.sampled_from(["fc1", ["fc1", "fc2.bias"]])),
    st.builds(lambda v: {"exact": v}, st.sampled_from([["head.bias"], ["head.bias", "stem.weight"]])),
    st.builds(lambda v: {"ndim": v}, st.integers(0, 3)),
    st.builds(lambda v: {"index": v}, st.sampled_from([0, [0, 1], [1]])),
)  # fmt: skip
checks = st.recursive(
    leaf_checks,
    lambda inner: st.one_of(
        st.builds(lambda v: {"not": v}, inner),
        st.builds(lambda v: {"all": v}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(lambda v: {"any": v}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(lambda a, b: {"not": a, "any": [b]}, inner, inner),
    ),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(checks)
def test_checks_come_back(found):
    selector = pf.as_selector(check_from(found, ""))
    again = pf.as_selector(check_from(json.loads(json.dumps(describe_check(selector))), ""))
    for path, info in MODEL.infos.items():
        assert selector(path, info) == again(path, info)


REFUSED = {
    "an unknown method": ({"lroa": {}}, "there is no 'lroa'; the nearest is 'lora'"),
    "an unknown option": ({"lora": {"where": "0", "rnak": 1}}, "lora: there is no 'rnak'; the nearest is 'rank'"),
    "of dora": ({"dora": {"where": "0", "alhpa": 1}}, "dora: there is no 'alhpa'; the nearest is 'alpha'"),
    "of a block": ({"gift": {"where": "0", "shaer": 1}}, "gift: .*shaer"),
    "an unknown check": (
        {"first_match": [{"clas": "Linear", "method": "train"}]}, r"first_match\[0\]: .*'clas'; the nearest is 'class'",
    ),
    "deep": (
        {"first_match": [{"name": "a", "method": None}, {"name": "b", "method": {"chain": [{"lora": {"rnk": 1}}]}}]},
        r"first_match\[1\].method.chain\[0\].lora: there is no 'rnk'; the nearest is 'rank'",
    ),
    "a method in a pair": (
        {"first_match": [{"name": "a", "method": "trian"}]}, r"first_match\[0\].method: .*'trian'.* nearest is 'train'",
    ),
    "where twice over": ({"lora": {"rank": 2}}, "lora: where is missing"),
    "no method": ({"first_match": [{"name": "a"}]}, r"first_match\[0\]: method is missing; .*null"),
    "no check": ({"first_match": [{"method": "train"}]}, r"first_match\[0\]: a place is"),
    "beside parameter": (
        {"first_match": [{"parameter": "a", "name": "b", "method": "train"}]}, r"first_match\[0\]: \['name'\] beside",
    ),
    "no pairs": ({"first_match": []}, "first_match: .*pairs"),
    "a chain of a word": ({"chain": "train"}, "chain: this is a list"),
    "an unknown key": ({"chain": [], "nam": "x"}, "there is no 'nam'; the nearest is 'name'"),
    "two methods": ({"lora": {"where": "a"}, "train": {"where": "a"}}, "one name"),
    "no methods": ({}, "one name"),
    "a number": (3, "not 3"),
    "None": (None, "not None"),
    "a list": ([{"train": {"where": "a"}}], "mapping"),
    "options as a list": ({"lora": ["rank"]}, "lora: this is a mapping"),
    "keys that are no words": ({"lora": {3: 4}}, "lora: this is a mapping by name"),
    "a value": ({"lora": {"where": "a", "dropout": 2}}, "lora: .*dropout"),
    "a value of no type": ({"lora": {"where": "a", "alpha": "high"}}, "lora: .*alpha"),
    "a regex": ({"train": {"where": "("}}, "train.where: .*regular expression"),
    "a regex in a pair": ({"first_match": [{"path": "(", "method": None}]}, r"first_match\[0\].path: .*regular expr"),
    "a number as a place": ({"train": {"where": 3}}, "train.where: a place is"),
    "an empty place": ({"train": {"where": {}}}, "train.where: a place is"),
    "a list of numbers": ({"train": {"where": [3]}}, r"train.where\[0\]: a place is"),
    "deep in a place": (
        {"train": {"where": {"any": ["a", {"not": {"indx": 3}}]}}},
        r"train.where.any\[1\].not: .*'indx'; the nearest is 'index'",
    ),
    "an index": ({"train": {"where": {"index": ["a"]}}}, "train.where.index: .*whole numbers"),
    "a name": ({"train": {"where": {"name": 3}}}, "train.where.name: .*names"),
    "a flag": ({"train": {"where": {"class": {"names": "a", "subclasses": 1}}}}, "where.class: subclasses is true or"),
    "an unknown flag": ({"train": {"where": {"class": {"names": "a", "sub": 1}}}}, "where.class: there is no 'sub'"),
    "no names": ({"train": {"where": {"class": {"subclasses": True}}}}, "where.class: .*names"),
    "all of a word": ({"train": {"where": {"all": "a"}}}, "where.all: this is a list"),
    "not independent": ({"train": {"where": {"independent": False}}}, "where.independent: this is true"),
    "exact": ({"train": {"where": {"exact": "head.bias"}}}, "where.exact: .*list"),
    "a group": ({"gift": {"where": "a", "share": {"g": {"nme": "b"}}}}, "gift.share.g: there is no 'nme'"),
    "names twice": (
        {"chain": [{"train": {"where": "a"}}, {"train": {"where": "b"}}]}, "chain: two parts .* 'train'",
    ),
    "an import": ({"torch.optim.Adam": {"lr": 1}}, "there is no 'torch.optim.Adam'"),
    "root": ({"first_match": [{"name": "a", "method": None}], "root": [3]}, "first_match: .*root"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_said_with_its_key(case):
    described, words = REFUSED[case]
    with pytest.raises(pf.OptionError, match=words):
        pf.method_from(described)


def test_what_plain_data_cannot_say_is_refused():
    own = pf.on("head", pf.Transform(lambda w, k: {}, lambda t, w: {}), name="mine")
    import re

    for method, word in (
        (own, "'mine' is a method of your own"),
        (pf.chain(pf.train("head"), own), "'mine'"),
        (pf.train(lambda path, info: True), "no place"),
        (pf.train(pf.of_type(nn.Linear)), "pf.class_named"),
        (pf.train(re.compile("HEAD", re.IGNORECASE)), "flags"),
        (pf.first_match((pf.of_type(nn.Linear), pf.train)), "pf.class_named"),
        (pf.first_match((["a"], lambda where: own)), "'mine'"),
        (pf.train, "takes a method"),
    ):
        with pytest.raises(pf.OptionError, match=re.escape(word)):
            pf.describe(method)


def test_a_described_method_stays_a_value():
    described = {"first_match": [{"name": "head", "method": {"lora": {"rank": 3}}}]}
    method = pf.method_from(described)
    before = pf.describe(method)
    found = pf.describe(method)
    found["first_match"].clear()
    assert pf.describe(method) == before
    assert described == {"first_match": [{"name": "head", "method": {"lora": {"rank": 3}}}]}


# Files.

YAML = """
first_match:
  - {name: head, method: train}
  - class: Linear
    method:
      lora: {rank: 3}
  - path: layers\\..*\\.norm
    method: null
  - parameter: .*gamma
    method: {train: {name: gammas}}
root: Net
"""


def test_yaml_is_read_and_written(tmp_path):
    (tmp_path / "a.yaml").write_text(YAML)
    method = pf.method_from(tmp_path / "a.yaml")
    kinds = [(keys, kind, len(paths)) for keys, kind, _, paths in places(method)]
    assert kinds == [(("train",), "train", 2), (("lora",), "lora", 4), (("gammas",), "train", 2)]
    for name in ("b.yaml", "b.yml", "b.json"):
        pf.write_method(tmp_path / name, method)
        assert pf.describe(pf.method_from(str(tmp_path / name))) == pf.describe(method)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.yaml", "b.json", "b.yaml", "b.yml"]


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
FILES = {
    "no such file": ("x.yaml", None, pf.FileFormatError, "cannot be read"),
    "a folder": ("folder.yaml", None, pf.FileFormatError, "cannot be read"),
    "another kind": ("x.toml", "a = 1", pf.FileFormatError, "no .json, .yaml or .yml"),
    "text instead of a path": ("train: {where: head}", None, pf.FileFormatError, "no .json"),
    "bad yaml": ("x.yaml", "a: [", pf.FileFormatError, "cannot be read"),
    "bad json": ("x.json", "{", pf.FileFormatError, "cannot be read"),
    "not text": ("x.yaml", b"\xff\xfe\x00", pf.FileFormatError, "cannot be read"),
    "deep": ("x.json", "[" * 100_000, pf.FileFormatError, "cannot be read"),
    "empty": ("x.yaml", "", pf.OptionError, "not None"),
    "a python object": ("x.yaml", "!!python/object/apply:os.getcwd []", pf.FileFormatError, "cannot be read"),
    "aliases that multiply": ("x.yaml", BOMB, pf.OptionError, "aliases"),
    "an alias of itself": ("x.yaml", "chain: &a [*a]", pf.OptionError, "aliases"),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_files_are_refused(case, tmp_path):
    name, content, kind, word = FILES[case]
    (tmp_path / "folder.yaml").mkdir()
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(kind, match=word):
        pf.method_from(tmp_path / name)


def test_a_method_that_cannot_be_described_leaves_the_file_as_it_was(tmp_path):
    (tmp_path / "a.yaml").write_text("old")
    with pytest.raises(pf.OptionError):
        pf.write_method(tmp_path / "a.yaml", pf.train(lambda path, info: True))
    with pytest.raises(pf.FileFormatError, match="cannot be written"):
        pf.write_method(tmp_path / "none" / "a.yaml", pf.train("head"))
    with pytest.raises(pf.FileFormatError, match=r"no \.json"):
        pf.write_method(tmp_path / "a.txt", pf.train("head"))
    assert (tmp_path / "a.yaml").read_text() == "old"


def test_yaml_is_an_extra(monkeypatch, tmp_path):
    (tmp_path / "a.yaml").write_text("train: {where: head}")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(pf.MissingExtraError, match=r"pip install 'peft_func\[yaml\]'"):
        pf.method_from(tmp_path / "a.yaml")
    pf.write_method(tmp_path / "a.json", pf.train("head"))
    assert places(pf.method_from(tmp_path / "a.json")) == places(pf.train("head"))


def test_the_library_is_imported_without_yaml():
    code = "import sys, peft_func; assert 'yaml' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
