"""Law 11 once more with Inductor, the default backend, where a C++ compiler is found."""

import shutil

import pytest
import torch

import peft_func as pf
from tests.laws.conformance import GRADS, Case, close

COMPILER = shutil.which("g++") or shutil.which("clang++")


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="Inductor needs a C++ compiler on the CPU")
@pytest.mark.parametrize(
    ("name", "method", "ways"),
    [
        ("mlp", pf.chain(pf.lora(".*", rank=2), pf.gift(".*", rank=2, share="none"), pf.magnitude(".*")), "both"),
        ("bert", pf.lora(["query", "value"], rank=2), "call"),
    ],
)
def test_inductor_agrees_without_recompiling(name, method, ways):
    case = Case(name, method, 5)
    members = case.members(3)
    torch._dynamo.reset()
    for function in (case.call, torch.func.grad(case.loss))[: 2 if ways == "both" else 1]:
        compiled = torch.compile(function, fullgraph=True)
        first = compiled(members[0])
        with torch._dynamo.config.patch(error_on_recompile=True):
            others = [compiled(tree) for tree in members[1:]]
        assert close([first, *others], [function(tree) for tree in members], GRADS)
