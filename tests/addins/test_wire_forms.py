"""The other two forms of a wiring: records, and a drawing over several lines."""

import json
from collections import OrderedDict

import pytest
import torch
import yaml
from torch import nn

import peft_func as pf
from peft_func.addins.wire_drawing import is_drawing, parse_drawing
from peft_func.addins.wire_records import from_records
from peft_func.addins.wiring import draw
from tests.zoo import randn

RECORD = {"name": "A", "location": [["fc", 0], ["fc", 1]], "hook": [["get_pre", "pre"], ["f", "post"]]}


@pytest.mark.parametrize(
    ("locations", "hooks", "expected"),
    [
        ([["fc2"]], [["f", "pre"]], "(A.f): ...->{inout1}(fc2)->..."),
        (["blocks[1].fc"], [["f", "post"]], "(A.f): ...->(blocks[1].fc){inout1}->..."),
        ([["blocks.1", "fc"]], [["f", "post"]], "(A.f): ...->(blocks.1.fc){inout1}->..."),
        (
            [["a"], ["b"]],
            [["get_post", "post"], ["add_post", "post"]],
            "(A.add_post): ...->(a){in1}->...->(b){out1}->...",
        ),
        (
            [["a"], ["b"], ["c"], ["d"]],
            [["get_pre", "pre"], ["f", "pre"], ["get_post", "post"], ["g", "post"]],
            "(A.f): ...->{in1}(a)->...->{out1}(b)->...->(c){in2}->...->(d){out2.g}->...",
        ),
        (
            [["n"], ["d"]],
            [["f", "pre"], ["add_post", "post"]],
            "(A.f): ...->{inout1}(n)->...->(d){inout2.add_post}->...",
        ),
        ([["b", 0], ["b", 1]], [["f", "pre"]], "(A.f): ...->{inout1}(b[0])->...->{inout2}(b[1])->..."),
    ],
)  # fmt: skip
def test_records(locations, hooks, expected):
    assert draw(from_records({"name": "A", "location": locations, "hook": hooks})) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hooks": []}, "record 0: unknown field 'hooks'; the nearest of its fields: hook"),
        ({"name": "A.f"}, "record 0: name='A.f' is not the name"),
        ({"name": 3}, "record 0: name=3 is not the name"),
        ({"location": []}, "record 0: location is a list of paths"),
        ({"location": "fc"}, "record 0: location is a list of paths"),
        ({"location": [["fc", 0]]}, "1 locations and 2 hooks"),
        ({"location": [["fc", 0], ["fc", 1], ["fc", 2]]}, "3 locations and 2 hooks"),
        ({"location": [["fc", 0], []]}, r"record 0, hook 1: the location \[\] is no path"),
        ({"location": [["fc", 0], [True]]}, "record 0, hook 1: True in the location"),
        ({"location": [["fc", 0], ["a b"]]}, "'a b' in the location .* is no name of a module"),
        ({"location": [["fc", 0], ["a[0:2]"]]}, r"'a\[0:2\]' in the location"),
        ({"hook": [["get_pre", "pre"], ["f", "after"]]}, "the side 'after' is neither 'pre' nor 'post'"),
        ({"hook": [["get_pre", "pre"], "f"]}, "'f' is no pair of a method and a side"),
        ({"hook": [["get_pre", "pre"], ["f()", "post"]]}, "'f\\(\\)' is not the name of a method"),
        ({"hook": [["get_pre", "post"], ["f", "post"]]}, "get_pre with the side 'post': at 'post' it is get_post"),
        ({"hook": [["get_pre", "pre"], ["get_pre", "pre"]]}, "record 0, hook 1: get_pre before it is used by nothing"),
        ({"hook": [["f", "pre"], ["get_pre", "pre"]]}, r"\{in2\} has no \{out2\}"),
        ({"kwargs": [1]}, "kwargs=.* is no dict of keywords"),
        ({"kwargs": {"a b": 1}}, "is no dict of keywords"),
        ({"kwargs": {"a": torch.float32}}, "A gets a=torch.float32; the keywords of a wire are numbers"),
        ({"kwargs": {"a": float("nan")}}, "A gets a=nan"),
    ],
)
def test_records_that_are_wrong(change, message):
    with pytest.raises(pf.OptionError, match=message):
        from_records([RECORD | change])


@pytest.mark.parametrize("records", [3, None, [], [3], {"addins": 3}, {"addins": [RECORD], "more": 1}])
def test_what_is_no_wiring(records):
    with pytest.raises(pf.OptionError, match=r"takes text such as|unknown field|is missing"):
        pf.wire(records, A=nn.Identity)


def test_a_field_that_is_missing():
    with pytest.raises(pf.OptionError, match="record 1: the field 'hook' is missing"):
        from_records([RECORD, {"name": "A", "location": [["fc"]]}])


def test_records_go_through_json():
    text = "(A(dim=8).f): {in1}(b[0:2].x)->(b[0:2].y){out1}, (A.g): {inout1}(c)"
    first = from_records(json.loads(json.dumps([{**RECORD, "kwargs": {"dim": 8}}])))
    assert first[0].kwargs == {"dim": 8}

    class A(pf.AddinBase):
        def __init__(self, dim=1):
            super().__init__()

        def f(self, module, inputs, outputs):
            return outputs

        def g(self, module, inputs):
            return inputs

    wires = pf.wire(text, A=A)
    assert pf.wire(json.loads(json.dumps(wires.records)), A=A).wires == wires.wires


YAML = """
addins:
  - name: Bottleneck
    location: [[fc, 0], [fc, 2]]      # one add-in for both
    hook: [[adapt_input, pre]]
    kwargs: {rank: 2, act: tanh}
  - name: Skip
    location: [[fc, 0], "fc[3]"]
    hook:
      - [get_pre, pre]
      - [adapt_output, post]
"""


def test_records_in_yaml():
    class Bottleneck(pf.AddinBase):
        def __init__(self, rank, act):
            super().__init__()
            self.down, self.up = nn.Linear(4, rank), nn.Linear(rank, 4)
            self.act = getattr(torch, act)

        def adapt_input(self, module, inputs):
            return inputs[0] + self.up(self.act(self.down(inputs[0])))

    class Skip(pf.AddinBase):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.5))

        def adapt_output(self, module, inputs, outputs):
            return outputs + self.scale * self.inputs_cache

    wires = pf.wire(yaml.safe_load(YAML), Bottleneck=Bottleneck, Skip=Skip)
    assert str(wires).splitlines() == [
        "(Bottleneck(rank=2, act='tanh').adapt_input): ...->{inout1}(fc[0])->...->{inout2}(fc[2])->...,",
        "(Skip.adapt_output): ...->{in1}(fc[0])->...->(fc[3]){out1}->...",
    ]
    assert pf.wire(yaml.safe_load(yaml.safe_dump(wires.records)), Bottleneck=Bottleneck, Skip=Skip).wires == wires.wires
    net = nn.Sequential(OrderedDict(fc=nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)]))).double()
    model = pf.functionalize(net)
    adapter = pf.bind(wires, model)
    frozen, tree = adapter.init(0)
    (own,), (skip,) = tree["wire"]["Bottleneck"].values(), tree["wire"]["Skip"].values()

    def bottleneck(h):
        return h + (h @ own["down.weight"].T + own["down.bias"]).tanh() @ own["up.weight"].T + own["up.bias"]

    x = randn(3, 4)
    first = bottleneck(x)  # what enters the first layer, also for Skip, which is wired behind
    expected = net.fc[3](net.fc[2](bottleneck(net.fc[1](net.fc[0](first))))) + skip["scale"] * first
    assert torch.allclose(model(adapter.apply(frozen, tree), x), expected, atol=1e-12)


def test_an_order_that_records_cannot_say():
    class A(pf.AddinBase):
        def f(self, module, inputs):
            return inputs[0]

    wires = pf.wire("(A.f): {in1}(a)->{out1}(b)->{inout2}(b)", A=A)
    with pytest.raises(pf.OptionError, match="cannot say the order"):
        _ = wires.records


ACROSS = """
  ...->(fc1)->|->(fc2)->|->(fc3)->...
              |->(A.f)->|
"""


@pytest.mark.parametrize(
    ("drawing", "expected"),
    [
        ("(A.f)->(fc2)->(fc3)", "(A.f): ...->{inout1}(fc2)->..."),
        ("(fc1)->(A.f)", "(A.f): ...->(fc1){inout1}->..."),
        ("(fc1)->(A.f)->(fc2)", "(A.f): ...->(fc1){inout1}->..."),
        ("...->(A(dim=2).f)->(fc2)", "(A(dim=2).f): ...->{inout1}(fc2)->..."),
        (ACROSS, "(A.f): ...->{in1}(fc2){out1}->..."),
        (ACROSS.replace("->", " -> "), "(A.f): ...->{in1}(fc2){out1}->..."),
        # A row between is a connection only.
        ("(fc1)->|->(fc2)->|->(fc3)\n       |         |\n       |->(A.f)->|", "(A.f): ...->{in1}(fc2){out1}->..."),
        # Five columns away is near enough.
        ("(fc1)->|->(second)->|->(fc3)\n            |->(A.f)->|", "(A.f): ...->{in1}(second){out1}->..."),
        ("     |->(A.f)->|\n(f)->|->(g)->|->(h)->...", "(A.f): ...->{in1}(g){out1}->..."),
        # From a module beside the add-in to the element left of the bar.
        ("     ...->(fc2)->|->(fc3)\n  (fc1)->(A.f)->|", "(A.f): ...->(fc1){in1}->...->(fc2){out1}->..."),
        ("(fc1)->|->(fc2)\n       |->(A.f)->(fc3)", "(A.f): ...->{in1}(fc2)->...->{out1}(fc3)->..."),
        ("(fc1)->|\n       |->(A.f)->(fc3)", "(A.f): ...->(fc1){in1}->...->{out1}(fc3)->..."),
        (
            "(a[0:2])->|->(b[1:3])\n          |->(A.f)->(c)",
            "(A.f): ...->{in1}(b[1])->...->{out1}(c)->...,\n(A.f): ...->{in1}(b[2])->...->{out1}(c)->...",
        ),
        ("(a)->(A.f)->(b)->(A.g)->(c)", "(A.f): ...->(a){inout1}->...,\n(A.g): ...->(b){inout1}->..."),
    ],
)
def test_drawings(drawing, expected):
    assert is_drawing(drawing, ["A"])
    assert draw(parse_drawing(drawing, ["A"])) == expected


@pytest.mark.parametrize(
    ("drawing", "message"),
    [
        ("...->(A.f)->...", "column 7: A touches no module"),
        ("(a)->|->(b)\n     |->(A.f)->...", "line 2, column 10: A gives nowhere: expected .* on its right"),
        ("(b)->|\n(A.f)->|", "line 2, column 2: A takes nowhere: expected .* on its left"),
        ("(a)->|->(b)\n           |->(A.f)->(c)", "line 2, column 12: this '|' meets none beside a module"),
        ("(a)->|->(b)->x\n     |->(A.f)->(c)", r"line 1, column 14: expected '->', '\|', '...', a \(module\)"),
        ("(a)->|->(b)->|->(c)\n         |->(A.f)->(c)", "line 2, column 10: this '|' stands between two others"),
        ("(A)->(b)", r"expected '\.'|has none of the add-ins"),
    ],
)
def test_drawings_that_are_wrong(drawing, message):
    with pytest.raises(pf.OptionError, match=message.replace("'|' ", "'\\|' ")):
        parse_drawing(drawing, ["A"])


def test_what_is_no_drawing():
    for text in ("(A.f): {inout1}(a)", "(A.f): (a)->(b)", "(B.f)->(a)", "(A.f) {inout1}(a)"):
        assert not is_drawing(text, ["A"])


def test_the_three_forms_are_one():
    class A(pf.AddinBase):
        def __init__(self, width=4):
            super().__init__()
            self.mix = nn.Linear(width, width)

        def f(self, module, inputs, outputs):
            return outputs + self.mix(self.inputs_cache)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2, self.fc3 = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.fc3(self.fc2(self.fc1(x)))

    model, x = pf.functionalize(Net().double()), randn(3, 4)
    line = "(A.f): ...->{in1}(fc2){out1}->..."
    record = {"name": "A", "location": [["fc2"], ["fc2"]], "hook": [["get_pre", "pre"], ["f", "post"]]}
    outputs = []
    for form in (line, record, ACROSS):
        wires = pf.wire(form, A=A)
        assert str(wires) == line
        assert wires.records == [record]
        adapter = pf.bind(wires, model)
        outputs.append(model(adapter.apply(*adapter.init(0)), x))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    with pytest.raises(pf.SelectorError, match=r"line 2, column 9: no module .fc9"):
        pf.bind(pf.wire(ACROSS.replace("fc1", "fc9"), A=A), model)
