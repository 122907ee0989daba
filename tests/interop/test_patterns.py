"""Regexes of files: the answers of `re`, in bounded time."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import peft_func as pf
from peft_func.interop.patterns import Pattern, first_match

atoms = st.sampled_from(["a", "b", "0", "1", ".", r"\.", r"\d", r"\w", r"\D", "[ab]", "[^a0]", "[0-9_]", "-", "_"])
quantifiers = st.sampled_from(["", "", "", "*", "+", "?", "*?", "+?", "{2}", "{1,}", "{0,2}", "{1,3}?"])


def grow(inner):
    item = st.tuples(st.one_of(atoms, st.builds("({})".format, inner), st.builds("(?:{})".format, inner)), quantifiers)
    sequence = st.lists(item.map("".join), max_size=4).map("".join)
    return st.lists(sequence, min_size=1, max_size=3).map("|".join)


patterns = st.recursive(atoms, grow, max_leaves=12)
anchored = st.builds("{}{}{}".format, st.sampled_from(["", "^"]), patterns, st.sampled_from(["", "$"]))
names = st.lists(st.sampled_from(["a", "b", "ab", "0", "10", "a_1", "b-0", ""]), max_size=4).map(".".join)


@settings(max_examples=400)
@given(anchored, names)
def test_the_answers_are_those_of_re(source, name):
    pattern = Pattern(source, "here")
    assert pattern.fullmatch(name) == bool(re.fullmatch(source, name))
    assert pattern.ends(name) == bool(re.match(rf"(.*\.)?({source})$", name))


@pytest.mark.parametrize(
    ("source", "name", "ends"),
    [
        ("q_proj", "model.layers.0.q_proj", True),
        ("q_proj", "model.layers.0.xq_proj", False),
        ("layers.0.q_proj", "model.layers.0.q_proj", True),
        ("layers.0.q_proj", "model.layers_0.q_proj", True),  # a dot is any letter, as in PEFT
        (r"layers\.0\.q_proj", "model.layers_0.q_proj", False),
        (r"^layers\.0\.q_proj", "model.layers.0.q_proj", False),
        (r"^model\.layers\.0\.q_proj$", "model.layers.0.q_proj", True),
        (r"model\.layers\.(1[0-9]|2[0-3])\..*_proj", "model.layers.23.self_attn.q_proj", True),
        (r"model\.layers\.(1[0-9]|2[0-3])\..*_proj", "model.layers.9.self_attn.q_proj", False),
        ("q_proj|v_proj", "a.v_proj", True),
        ("", "a", False),
    ],
)
def test_what_users_write(source, name, ends):
    assert Pattern(source, "here").ends(name) is ends


@pytest.mark.parametrize(
    "source",
    ["(?=a)b", "(?!a)b", "(?P<x>a)", r"(a)\1", "a*+", "a**", "(a", "a)", "[z-a]", "a{3,2}", r"\bq", "*a", "[a--b]",
     "(?i)a", "{2}", "a{,2}", "é\n", "[", "\\", "a" * 5000, "(" * 5000 + ")" * 5000],
)  # fmt: skip
def test_what_is_not_followed_is_refused_by_name(source):
    with pytest.raises(pf.FileFormatError, match="here has the regex") as error:
        Pattern(source, "here").ends("abc")
    assert repr(source[:200]) in str(error.value)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("(a+)+b", "a" * 120),
        ("(a|a){50}b", "a" * 50),
        ("(a|aa)+b", "a" * 120),
        ("((a*)*)*b", "a" * 120),
        ("(.*)*(.*)*(.*)*x", "a." * 60),
        ("((((a{1,999}){1,999}){1,999}){1,999}){1,999}b", "a" * 200),
        ("(?:){9999}" * 100, "a"),
    ],
)
def test_what_takes_re_years_is_answered_or_refused_at_once(source, name):
    start, said = time.monotonic(), ""
    try:
        matches = Pattern(source, "here").ends(name)
    except pf.FileFormatError as error:
        matches, said = False, str(error)
    assert not matches
    assert "too long to match" in said or not said
    assert time.monotonic() - start < 5.0


def test_the_first_pattern_that_matches_wins():
    patterns = [(Pattern("q", "here"), 1.0), (Pattern("a.q", "here"), 2.0), (Pattern(".*k", "here"), 3.0)]
    assert [first_match(patterns, name, 9.0) for name in ("a.q", "q", "a.k", "v")] == [1.0, 1.0, 3.0, 9.0]


def test_patterns_are_equal_by_what_they_say():
    assert Pattern("a", "here") == Pattern("a", "there") != Pattern("b", "here")
    assert len({Pattern("a", "here"), Pattern("a", "there")}) == 1
