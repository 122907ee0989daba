"""The grammar: what every string means, and where and how the wrong ones fail."""

import contextlib
import keyword

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

import peft_func as pf
from peft_func.addins.wire_drawing import parse_drawing
from peft_func.addins.wire_parser import parse
from peft_func.addins.wire_records import from_records, to_records
from peft_func.addins.wiring import End, Wire, draw


def ends(text):
    return [[(end.kind + str(end.number), end.path, end.side) for end in wire.ends] for wire in parse(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(A.f): ...->{inout1}(a)->...", [[("inout1", ("a",), "pre")]]),
        ("(A.f): ...->(a){inout1}->...", [[("inout1", ("a",), "post")]]),
        # Left wins when both sides are modules.
        ("(A.f): (a){inout1}(b)", [[("inout1", ("a",), "post")]]),
        ("(A.f): (a)->{inout1}(b)", [[("inout1", ("b",), "pre")]]),
        ("(A.f): {in1}(a){out1}", [[("in1", ("a",), "pre"), ("out1", ("a",), "post")]]),
        ("(A.f):(b.c[2].d[-1]){inout7}", [[("inout7", ("b", "c", 2, "d", -1), "post")]]),
        # Blanks and newlines are free (there: no add-in at all, or an error).
        ("( A . f ) :\n ... -> ( a ) { inout 1 } -> ...", [[("inout1", ("a",), "post")]]),
        # Adjacent markers belong to the same module (there: the neighbour became a module's name).
        ("(A.f): (a){in2}->{in1}(b)->(c){out1}{out2}",
         [[("in2", ("a",), "post"), ("in1", ("b",), "pre"), ("out1", ("c",), "post"), ("out2", ("c",), "post")]]),
        ("(A.f): ->{in1}{inout2}(b){out1}",
         [[("in1", ("b",), "pre"), ("inout2", ("b",), "pre"), ("out1", ("b",), "post")]]),
        # The tutorial's second in is the out end, pair by pair.
        ("(A.f): (a){in1}->{in2}(b)", [[("in1", ("a",), "post"), ("out1", ("b",), "pre")]]),
        ("(A.f): {in1}(a)->{in2}(b)->{in5}(c)->{in9}(d)",
         [[("in1", ("a",), "pre"), ("out1", ("b",), "pre"), ("in5", ("c",), "pre"), ("out5", ("d",), "pre")]]),
        # One in may serve several outs.
        ("(A.f): {in1}(a)->{out1}(b)->{out1}(c)",
         [[("in1", ("a",), "pre"), ("out1", ("b",), "pre"), ("out1", ("c",), "pre")]]),
        # Ranges: half-open, in lock-step, identical ones once.
        ("(A.f): {inout1}(a[0:2])", [[("inout1", ("a", 0), "pre")], [("inout1", ("a", 1), "pre")]]),
        ("(A.f): {in1}(a[0:2].x)->(b)->{out1}(a[1:3].x)",
         [[("in1", ("a", 0, "x"), "pre"), ("out1", ("a", 1, "x"), "pre")],
          [("in1", ("a", 1, "x"), "pre"), ("out1", ("a", 2, "x"), "pre")]]),
        ("(A.f): {in1}(a[-2:0])->{out1}(a[-2:0].b[3])",
         [[("in1", ("a", -2), "pre"), ("out1", ("a", -2, "b", 3), "pre")],
          [("in1", ("a", -1), "pre"), ("out1", ("a", -1, "b", 3), "pre")]]),
        ("(A.f): {inout1}(a), (B.g): (b){inout1}", [[("inout1", ("a",), "pre")], [("inout1", ("b",), "post")]]),
        ("(A.f): input->{inout1}(0.fc-1)->output", [[("inout1", ("0", "fc-1"), "pre")]]),
    ],
)  # fmt: skip
def test_what_it_means(text, expected):
    assert ends(text) == expected


@pytest.mark.parametrize(
    ("text", "where", "message"),
    [
        # ZhiJian's list of surprises: what is silent there, or fails far from the text.
        ("(A.f): ...->{in1}(a)->(b){out2}->...", "column 14", r"\{in1\} has no \{out1\}; there is \{out2\}"),
        ("(A.f): ...->(fc1)->...", "column 2", "A is wired to nothing: expected a marker"),
        ("(A.f): ...->(fc2){out1}{in2}", "column 19", r"\{out1\} has no \{in1\}; there is \{in2\}"),
        ("(A): ...->{inout1}(a)", "column 3", r"expected '\.' and a method of A, as in \(A.adapt_input\), found '\)'"),
        ("(A.f): ...->{inout1}(block[i].x)->...", "column 28",
         "expected an integer, or a range such as 0:12, found 'i'"),
        ("(A.f): {inout1}(a[0:2])->(b[0:3])", "column 27", r"\[0:3\] has 3 steps, and \[0:2\] has 2"),
        # Numbers.
        ("(A.f): {in1}(a)", "column 9", r"\{in1\} has no \{out1\}"),
        ("(A.f): (a){out3}", "column 12", r"\{out3\} has no \{in3\}; there is no \{in...\} at all"),
        ("(A.f): (a){in1}->{in2}(b)->{in3}(c)", "column 29", r"\{in3\} has no \{out3\}; there is \{out1\}"),
        ("(A.f): {in2}(a)->{in1}(b)", "column 19", "their numbers, which must rise from left to right"),
        ("(A.f): {in1}(a)->{in1}(b)->{out1}(c)", "column 19", r"a second \{in1\}"),
        ("(A.f): {out1}(a)->{in1}(b)", "column 9", r"\{out1\} stands before its \{in1\}"),
        ("(A.f): (a){in1}->{out1}(a)", "column 19", r"what leaves \(a\) cannot change what has entered it"),
        # Syntax.
        ("", "column 1", r"expected '\(' and an add-in with its method, .*found the end"),
        ("A.f: {inout1}(a)", "column 1", r"expected '\(' and an add-in.*found 'A'"),
        ("(A.f) {inout1}(a)", "column 7", "expected ':' and a sequence of modules and markers, found '{'"),
        ("(A.f.g): {inout1}(a)", "column 5", r"expected '\)', found '\.'"),
        ("(A.f): {inout1}(a),", "column 20", r"expected '\(' and an add-in.*found the end"),
        ("(A.f): {inout1}(a) x", "column 20",
         r"expected '->', '...', a \(module\), a \{marker\}, ',' or the end, found 'x'"),
        ("(A.f): {inout1}->(a)", "column 9", r"\{inout1\} touches no module: expected a \(module\) beside it"),
        ("(A.f): ...{inout1}...", "column 12", "touches no module"),
        ("(A.f): {inout}(a)", "column 14", r"expected a number, such as \{inout1\}, found '\}'"),
        ("(A.f): {input1}(a)", "column 11", "expected a number, such as {in1}, found 'put1'"),
        ("(A.f): {foo1}(a)", "column 9",
         "expected a marker: inout, in or out with a number, such as {inout1}, found 'foo1'"),
        ("(A.f): {inout1(a)", "column 15", r"expected '\}', found '\('"),
        ("(A.f): {in1.g}(a)->{out1}(b)", "column 9", r"\{in\} marker has no method of its own"),
        ("(A.f): {inout1.g}(a)", "column 2", "A.f is used at no marker"),
        ("(A.f): {inout1}()", "column 17", r"expected a module's path, such as fc2 .*found '\)'"),
        ("(A.f): {inout1}(a", "column 18", r"expected '\.', '\[' or '\)', found the end"),
        ("(A.f): {inout1}(a[)", "column 19", "expected an integer"),
        ("(A.f): {inout1}(a[0)", "column 20", r"expected '\]', found '\)'"),
        ("(A.f): {inout1}(a[0:])", "column 21", "expected the integer at which the range stops"),
        ("(A.f): {inout1}(a[2:2])", "column 19", r"the range \[2:2\] is empty"),
        ("(A.f): {inout1}(a.)", "column 19", "expected a name"),
        ("(A(1).f): {inout1}(a)", "column 4", "expected keywords with plain values"),
        ("(A(x=y).f): {inout1}(a)", "column 4", "expected keywords with plain values"),
        ("(A(x=1.f): {inout1}(a)", "column 4", "expected keywords with plain values"),
        ("(A.f): {inout1}(a),\n (B.g): {inout1}(b)\n ,,", "line 3, column 3", "expected '\\('"),
    ],
)  # fmt: skip
def test_errors_point_at_the_column(text, where, message):
    with pytest.raises(pf.OptionError, match=message.replace("{in", r"\{in").replace(r"\\{", r"\{")) as error:
        parse(text)
    said = str(error.value)
    assert said.startswith(f"wire: {where}: ")
    line, caret = said.splitlines()[-2:]
    number, column = ([*map(int, where.replace("line ", "").split(", column "))] if "line" in where else
                      [1, int(where.split()[1])])  # fmt: skip
    assert line == (text.splitlines() or [""])[number - 1]
    assert caret == " " * (column - 1) + "^"


NAMES = st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_]{0,5}", fullmatch=True).filter(lambda word: not keyword.iskeyword(word))
PATHS = st.builds(
    lambda first, rest: (first, *rest),
    st.one_of(NAMES, st.integers(-9, 99), st.sampled_from(["0", "fc-1"])),
    st.lists(st.one_of(NAMES, st.integers(-9, 99), st.just("12")), max_size=3),
).map(tuple)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(), inner, max_size=2)),
    max_leaves=4,
)


@st.composite
def wires(draw_from):
    """A wire with some pairs and some insertions, each in and its outs in the order of the flow."""
    plan = draw_from(st.lists(st.sampled_from(["inout", "pair", "fan"]), min_size=1, max_size=4))
    rows = []  # (position, kind, number)
    for number, kind in enumerate(plan, draw_from(st.integers(0, 5))):
        if kind == "inout":
            rows.append((draw_from(st.floats(0, 1)), "inout", number))
            continue
        start = draw_from(st.floats(0, 0.5))
        rows.append((start, "in", number))
        rows += [(start + 1 + i, "out", number) for i in range(2 if kind == "fan" else 1)]
    rows.sort(key=lambda row: row[0])
    method, other = draw_from(NAMES), draw_from(NAMES)
    found, paths = [], draw_from(st.lists(PATHS, min_size=1, max_size=3))
    for _, kind, number in rows:
        first = not any(end.method for end in found)
        own = method if first else draw_from(st.sampled_from([method, other]))
        path, side = draw_from(st.sampled_from(paths)), draw_from(st.sampled_from(["pre", "post"]))
        if kind == "out":
            source = next(end for end in found if (end.kind, end.number) == ("in", number))
            side = "post" if source.path == path else side
        found.append(End(kind, number, path, side, None if kind == "in" else own))
    kwargs = draw_from(st.dictionaries(NAMES, VALUES, max_size=2))
    return Wire(draw_from(NAMES), tuple(found), kwargs)


def spaced(text, seed):
    """The same text with white space between its tokens."""
    spaces = ["", " ", "\n", " \t "]
    out = []
    for i, token in enumerate(text):
        out.append(token)
        if token in "(){}[],:>" and token + text[i + 1 : i + 2] != "..":
            out.append(spaces[(seed + 7 * i) % 4])
    return "".join(out)


@given(st.lists(wires(), min_size=1, max_size=3))
def test_parsing_what_is_printed_gives_the_same_wires(several):
    several = tuple(several)
    assert parse(draw(several)) == several


@given(st.lists(wires().map(lambda w: Wire(w.name, w.ends)), min_size=1, max_size=3), st.integers(0, 9))
def test_white_space_is_free(several, seed):
    assert parse(spaced(draw(several), seed)) == tuple(several)


@settings(max_examples=20)
@given(wires())
def test_records_say_the_same(wire):
    try:
        records = to_records([wire])
    except pf.OptionError:
        reject()
    (again,) = from_records(records)
    # Numbers are counted anew; insertions stand first.
    assert to_records([again]) == records
    assert sorted((str(e.path), e.side, e.hook) for e in again.ends) == sorted(
        (str(e.path), e.side, e.hook) for e in wire.ends
    )
    assert (again.name, again.kwargs) == (wire.name, wire.kwargs)
    pairs = []
    for one in (wire, again):
        notes = {e.number: (e.path, e.side) for e in one.ends if e.kind == "in"}
        pairs.append(sorted(str((notes[e.number], e.path, e.side, e.hook)) for e in one.ends if e.kind == "out"))
    assert pairs[0] == pairs[1]
    assert parse(draw([again])) == (again,)


@given(st.text("(){}[]AfB.->:,1in out\n'=", max_size=40))
def test_any_text_gives_wires_or_our_error(text):
    for read in (parse, lambda text: parse_drawing(text, ["A"])):
        with contextlib.suppress(pf.OptionError):
            found = read(text)
            assert parse(draw(found)) == found
