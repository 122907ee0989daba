"""Selectors: which parameters each of them chooses, and what they say when they choose none."""

import re
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

import peft_func as pf
from peft_func.trees.select import Info, nearest, resolve
from tests.zoo import ZOO, Shared, Tied

LINEAR = nn.Linear


@cache
def model_of(name: str) -> pf.FunctionalModel:
    return pf.functionalize(ZOO[name].build())


def chosen(where, model) -> list[str]:
    return list(resolve(where, model.infos.values(), "test"))


def meta(build) -> pf.FunctionalModel:
    """A model without values: selectors look at names, shapes and types only."""
    with torch.device("meta"):
        return pf.functionalize(build())


def flat(*names: str) -> pf.FunctionalModel:
    """A model with a `Linear(4, 4)` at each of these module paths."""
    root = nn.Module()
    for name in names:
        module = root
        *parents, last = name.split(".")
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, nn.Module())
            module = module._modules[parent]
        module.add_module(last, nn.Linear(4, 4, device="meta"))
    return pf.functionalize(root)


LLAMA_Q = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]


@pytest.mark.parametrize(
    "where",
    [
        r".*q_proj\.weight",
        r".*\.q_proj",
        r"model\.layers\.\d\.self_attn\.q_proj",
        re.compile(r".*\.Q_PROJ", re.IGNORECASE),
        ["q_proj"],
        ("q_proj",),
        ["self_attn.q_proj"],
        ["q_proj.weight"],
        LLAMA_Q,
        [pf.suffix("q_proj")],
        ["layers.0.self_attn.q_proj", pf.path(r".*1.*q_proj")],
        pf.path(r".*\.q_proj"),
        pf.path(re.compile(r".*\.q_proj")),
        pf.glob("*.q_proj"),
        pf.glob("model.layers.[01].*.q_proj.*"),
        pf.suffix("q_proj"),
        pf.suffix("self_attn.q_proj.weight"),
        pf.exact(LLAMA_Q),
        pf.of_type(LINEAR) & ["q_proj"],
        ["q_proj"] & pf.of_type(LINEAR),
        r".*q_proj" & pf.ndim(2),
        pf.ndim(2) & r".*q_proj",
        pf.suffix("layers.0.self_attn.q_proj") | ["layers.1.self_attn.q_proj"],
        ["layers.1.self_attn.q_proj"] | pf.suffix("layers.0.self_attn.q_proj"),
        "nothing" | pf.suffix("q_proj"),
        ~~pf.suffix("q_proj"),
        ~(~pf.suffix("q_proj") | pf.ndim(1)),
        lambda path, info: path.endswith("q_proj.weight"),
        pf.index(0, 1) & "(.*)q_proj",
        (lambda path, info: "q_proj" in path) & pf.ndim(2),
        pf.ndim(2) & (lambda path, info: "q_proj" in path),
        re.compile(".*q_proj") & pf.ndim(2),
    ],
)
def test_every_way_to_say_the_queries(where):
    model = model_of("llama")
    assert chosen(where, model) == LLAMA_Q
    assert list(pf.bind(pf.lora(where, rank=1), model).parts[0].paths) == LLAMA_Q


@pytest.mark.parametrize(
    "where",
    [
        r"model\.layers\.0",  # a prefix of the path, of more than the module
        r"q_proj",  # a suffix: that is what lists are for
        r"model\.layers\.0\.self_attn\.q_pro",
        r"a|model\.layers",
        ["proj"],  # a part of a word
        ["_proj"],
        ["self_attn"],  # modules that own no parameter themselves
        ["q_proj.weight.x"],
        ["model.layers"],
        [".q_proj"],
        [r".*q_proj"],  # no regex in a list
        [],
        (),
        pf.glob("q_proj"),
        pf.glob("model.layers.?"),
        pf.suffix("proj"),
        pf.exact(["model.layers.0.self_attn.q_proj"]),  # a module
        pf.exact([]),
        pf.of_type(nn.Conv2d),
        pf.ndim(3),
        pf.index(2),
        pf.index(),
        pf.index(range(0)),
        pf.suffix("q_proj") & ~pf.suffix("q_proj"),
        lambda path, info: None,
    ],
)
def test_what_does_not_match_wholly_selects_nothing_and_says_so(where):
    with pytest.raises(pf.SelectorError) as caught:
        pf.bind(pf.lora(where, rank=1), model_of("llama"))
    assert isinstance(caught.value, ValueError)
    assert str(caught.value).startswith("lora: ")
    assert "model.layers" in str(caught.value) or not where


def test_a_str_matches_parameters_and_modules():
    model = model_of("mlp")
    assert chosen("0", model) == ["0.weight", "0.bias"]
    assert chosen(r"0\.bias", model) == ["0.bias"]
    assert chosen("", meta(lambda: nn.Linear(2, 2))) == ["weight", "bias"]


def test_selection_keeps_the_order_of_the_model():
    model = model_of("mlp")
    assert chosen(["4", "0"], model) == ["0.weight", "0.bias", "4.weight", "4.bias"]


def test_matrix_methods_never_choose_vectors_and_say_so():
    with pytest.raises(pf.SelectorError, match=r"(?s)fewer than two dimensions.*0\.bias.*pf\.train"):
        pf.bind(pf.lora(r".*bias", rank=1), model_of("mlp"))


def test_of_type_counts_subclasses_and_owners_only():
    class Mine(nn.Linear):
        pass

    model = meta(lambda: nn.Sequential(nn.Sequential(nn.Linear(2, 2), Mine(2, 2)), nn.LayerNorm(2), nn.Conv1d(2, 2, 1)))
    assert chosen(pf.of_type(LINEAR), model) == ["0.0.weight", "0.0.bias", "0.1.weight", "0.1.bias"]
    assert chosen(pf.of_type(Mine), model) == ["0.1.weight", "0.1.bias"]
    assert chosen(pf.of_type(Mine, nn.LayerNorm), model) == ["0.1.weight", "0.1.bias", "1.weight", "1.bias"]
    assert chosen(pf.of_type(nn.modules.conv._ConvNd), model) == ["2.weight", "2.bias"]
    assert len(chosen(pf.of_type(nn.Module), model)) == 8
    with pytest.raises(pf.SelectorError):
        chosen(pf.of_type(nn.Sequential), model)


def test_index_is_the_first_number_of_a_path():
    names = [f"layers.{i}.experts.{j}" for i in range(12) for j in range(2)]
    model = flat(*names, "head2")
    assert [p.removesuffix(".weight") for p in chosen(pf.index(1), model) if "weight" in p] == names[2:4]
    assert chosen(pf.index(range(10, 12)), model) == chosen(r"layers\.1[01]\..*", model)
    assert chosen(pf.index(0, [3, 11]), model) == chosen(r"layers\.(0|3|11)\..*", model)
    assert "head2.weight" in chosen(~pf.index(range(12)), model)


def test_index_survives_names_that_are_digits_but_no_numbers():
    assert chosen(pf.index(1), flat("layers.²", "layers.1")) == ["layers.1.weight", "layers.1.bias"]


def test_glob_is_a_shell_pattern_over_whole_paths():
    model = flat("encoder.0.attn.q", "encoder.1.attn.q", "encoder.1.mlp.q", "q")
    names = [p.removesuffix(".weight") for p in chosen(pf.glob("encoder.*.q") & pf.ndim(2), model)]
    assert names == ["encoder.0.attn.q", "encoder.1.attn.q", "encoder.1.mlp.q"]
    assert chosen(pf.glob("encoder.[!0].attn.?"), model) == ["encoder.1.attn.q.weight", "encoder.1.attn.q.bias"]
    assert len(chosen(pf.glob("*"), model)) == 8


@pytest.mark.parametrize(
    "where", ["head", r"head\.weight", ["head"], ["head.weight"], pf.glob("hea?"), pf.suffix("head"),
              pf.path(".*head.*"), pf.of_type(LINEAR) & ~pf.path("mix"),
              lambda path, info: "head.weight" in info.aliases],
)  # fmt: skip
def test_tied_weights_are_selected_by_an_alias(where):
    model = meta(Tied)
    assert model.ties == {"head.weight": "embed.weight"}
    assert chosen(where, model) == ["embed.weight"]


@pytest.mark.parametrize(
    "where",
    [r"blocks\.0\.0", r"blocks\.2\.0", ["inner.0"], ["2.0"], pf.glob("blocks.2.0.*"), pf.suffix("blocks.0.0")],
)
def test_shared_modules_are_selected_by_every_path(where):
    model = meta(Shared)
    assert chosen(where, model) == ["inner.0.weight", "inner.0.bias"]


def test_index_sees_the_numbers_of_aliases():
    assert chosen(pf.index(2), meta(Shared)) == ["inner.0.weight", "inner.0.bias"]
    assert chosen(pf.index(1), meta(Shared)) == ["blocks.1.weight", "blocks.1.bias"]


def test_a_tied_weight_selected_by_both_names_is_selected_once():
    assert chosen(["head", "embed"], meta(Tied)) == ["embed.weight"]


def test_a_callable_gets_the_path_and_the_whole_info_once_for_each_parameter():
    model, seen = meta(Tied), []
    chosen(lambda path, info: seen.append((path, info)) or True, model)
    assert [path for path, _ in seen] == list(model.params)
    infos = dict(seen)
    assert all(info.path == path for path, info in seen)
    embed = infos["embed.weight"]
    assert embed == Info("embed.weight", (32, 8), torch.float32, (nn.Embedding, nn.Linear), ("head.weight",))
    assert embed.ndim == 2
    assert embed.names == ("embed.weight", "head.weight", "embed", "head")
    assert infos["norm.bias"].modules == (nn.LayerNorm,)
    assert infos["norm.bias"].shape == (8,)
    assert meta(lambda: nn.Linear(2, 2).half()).infos["weight"].dtype == torch.float16


def test_info_cannot_be_changed_by_a_selector():
    with pytest.raises(AttributeError):
        model_of("mlp").infos["0.weight"].path = "x"


@pytest.mark.parametrize("answer", [0, "", None, [], torch.tensor(False)])
def test_what_a_callable_returns_counts_as_its_truth(answer):
    model = model_of("mlp")
    assert len(chosen(~pf.as_selector(lambda path, info: answer), model)) == len(model.params)


def test_selectors_compare_and_hash_by_value():
    assert pf.suffix("q") & "x" == pf.suffix("q") & pf.path("x")
    assert len({pf.ndim(2), pf.ndim(2), ~pf.ndim(2), pf.index(1), pf.index([1])}) == 3


NAMES = st.text("abcd01_.", min_size=1, max_size=6)
SELECTORS = st.recursive(
    st.sampled_from([".*0.*", ["weight"], ["2", "0"]]).map(pf.as_selector)
    | st.sampled_from([pf.ndim(1), pf.ndim(2), pf.index(0), pf.index(2, 4), pf.of_type(LINEAR), pf.exact(["2.bias"])]),
    lambda inner: (
        st.builds(lambda a, b: a & b, inner, inner)
        | st.builds(lambda a, b: a | b, inner, inner)
        | st.builds(lambda a: ~a, inner)
    ),
    max_leaves=4,
)


def selected(where) -> set[str]:
    selector = pf.as_selector(where)
    return {path for path, info in model_of("mlp").infos.items() if selector(path, info)}


@settings(max_examples=60)
@given(SELECTORS, SELECTORS)
def test_combinations_are_the_algebra_of_sets(a, b):
    everything = set(model_of("mlp").params)
    assert selected(a & b) == selected(a) & selected(b)
    assert selected(a | b) == selected(a) | selected(b)
    assert selected(~a) == everything - selected(a)


SEGMENTS = st.sampled_from(["q", "k", "q_proj", "proj", "attn", "0", "1", "10", "a_q", "mlp"])
MODULES = st.lists(SEGMENTS, min_size=1, max_size=4).map(".".join)
TARGETS = st.lists(st.lists(SEGMENTS, min_size=1, max_size=2).map(".".join), min_size=1, max_size=3)


def places(where, model) -> set[str]:
    try:
        return {path.removesuffix(".weight") for path in pf.bind(pf.lora(where, rank=1), model).parts[0].paths}
    except pf.SelectorError:
        return set()


def peft_places(targets, names) -> set[str]:
    config = SimpleNamespace(target_modules=targets, target_parameters=None)
    return {name for name in names if check_target_module_exists(config, name)}


@settings(max_examples=150)
@given(st.lists(MODULES, min_size=1, max_size=8, unique=True), TARGETS)
def test_a_list_is_the_rule_of_peft(names, targets):
    model = flat(*names)
    linears = {path.removesuffix(".weight") for path, info in model.infos.items() if info.ndim == 2}
    assert places(targets, model) == peft_places(set(targets), linears)


@settings(max_examples=80)
@given(
    st.lists(MODULES, min_size=1, max_size=8, unique=True),
    st.lists(st.sampled_from(["q", "attn", "proj", r"\.", r"\d", ".*", r"\w+", "(q|k)", "0"]), max_size=4).map("".join),
)
def test_a_str_over_modules_is_the_rule_of_peft(names, regex):
    model = flat(*names)
    linears = {path.removesuffix(".weight") for path, info in model.infos.items() if info.ndim == 2}
    assume(not any(re.fullmatch(regex, name + ".weight") for name in linears - peft_places(regex, linears)))
    assert places(regex, model) == peft_places(regex, linears)


@pytest.mark.parametrize(("name", "typo", "wanted"), [("llama", "q_pro", "q_proj"), ("bert", "quer", "query")])
@pytest.mark.parametrize(
    "where",
    [
        lambda word: word,
        lambda word: rf".*\.{word}",
        lambda word: rf".*{word}\.weight",
        lambda word: [word],
        lambda word: [f"self_attn.{word}"],
        lambda word: re.compile(rf".*\.{word}"),
        lambda word: pf.suffix(word),
        lambda word: [pf.suffix(word)],
        lambda word: pf.path(rf".*\.{word}"),
        lambda word: pf.glob(f"*.{word}"),
        lambda word: pf.suffix(word) & pf.ndim(2),
        lambda word: pf.index(0) & [word],
        lambda word: pf.suffix(word) | pf.suffix("zzz"),
    ],
    ids=[
        "str",
        "path",
        "parameter",
        "list",
        "two",
        "pattern",
        "suffix",
        "suffixes",
        "pf.path",
        "glob",
        "and",
        "rand",
        "or",
    ],
)
def test_a_typo_is_answered_with_the_nearest_names(name, typo, wanted, where):
    with pytest.raises(pf.SelectorError, match="nearest names") as caught:
        pf.bind(pf.lora(where(typo), rank=1), model_of(name))
    assert wanted in str(caught.value).split("nearest names")[1]
    assert len(str(caught.value)) < 1500


def test_every_word_of_a_list_gets_its_nearest_names():
    model = flat(*(f"layers.{i}.{word}" for i in range(12) for word in ("q_proj", "down_proj", "lm_head")))
    with pytest.raises(pf.SelectorError) as caught:
        pf.bind(pf.lora(["q_prj", "down_prj", "lm_hed"], rank=1), model)
    said = str(caught.value).split("nearest names")[1]
    assert all(word in said for word in ("q_proj", "down_proj", "lm_head"))


def test_nearest_puts_the_best_first_and_never_fails():
    names = ["encoder.0.query", "encoder.0.key", "classifier", ""]
    assert nearest("classifer", names)[0] == "classifier"
    assert nearest(r".*\.quer", names)[0] == "encoder.0.query"
    assert nearest("", names)
    assert nearest("zzz", []) == []


@pytest.mark.parametrize("regex", ["(", "*", "[", r"\q", "(?P<a>x)(?P<a>y)", "a{2,1}", "+x"])
def test_an_invalid_regex_is_an_error_that_quotes_it(regex):
    for make in (lambda: pf.path(regex), lambda: pf.as_selector(regex), lambda: pf.ndim(2) & regex):
        with pytest.raises(pf.SelectorError, match="is not a regular expression") as caught:
            make()
        assert repr(regex) in str(caught.value)


@pytest.mark.parametrize("regex", ["a{99999999999999999999}", "(" * 3000 + ")" * 3000], ids=["overflow", "depth"])
def test_a_regex_that_re_chokes_on_is_an_error_too(regex):
    with pytest.raises(pf.SelectorError):
        pf.path(regex)


@pytest.mark.parametrize("where", [None, 3, 1.5, {"q_proj"}, {"q_proj": 8}, ["q", 3], [None], [["q"]], b"q", object()])
def test_what_does_not_select_is_refused_by_type(where):
    with pytest.raises(pf.SelectorError, match=type(where).__name__):
        pf.as_selector(where)
    with pytest.raises(pf.SelectorError):
        pf.bind(pf.lora(where, rank=1), model_of("mlp"))
    with pytest.raises(pf.SelectorError):
        pf.partition({"a": torch.ones(1)}, where)


@pytest.mark.parametrize("where", [lambda: pf.ndim(2) & 3, lambda: None | pf.ndim(2), lambda: pf.ndim(2) | ["q", 3]])
def test_combining_with_what_does_not_select_is_refused(where):
    with pytest.raises(pf.SelectorError):
        where()


@pytest.mark.parametrize("where", [nn.Linear, lambda: pf.ndim(2) & nn.Linear], ids=["alone", "combined"])
def test_a_class_is_answered_with_of_type(where):
    with pytest.raises(pf.SelectorError, match="of_type"):
        pf.bind(pf.lora(where if isinstance(where, type) else where(), rank=1), model_of("mlp"))


@pytest.mark.parametrize(
    "make",
    [
        lambda: pf.path(3),
        lambda: pf.path(None),
        lambda: pf.path(b"0"),
        lambda: pf.path(re.compile(b"0")),
        lambda: pf.glob(3),
        lambda: pf.glob(b"0"),
        lambda: pf.suffix(3),
        lambda: pf.suffix(["0"]),
        lambda: pf.exact("0.weight"),  # letters, one by one
        lambda: pf.exact(3),
        lambda: pf.exact([3]),
        lambda: pf.ndim("2"),
        lambda: pf.ndim(None),
        lambda: pf.index("0"),
        lambda: pf.index(1.0),
        lambda: pf.index(["0"]),
        lambda: pf.of_type(),
        lambda: pf.of_type("Linear"),
        lambda: pf.of_type((nn.Linear, nn.Conv2d)),
        lambda: pf.of_type(nn.Linear(1, 1, device="meta")),
    ],
    ids=range(20),
)  # fmt: skip
def test_a_constructor_refuses_the_wrong_type_at_once(make):
    with pytest.raises(pf.SelectorError):
        make()
