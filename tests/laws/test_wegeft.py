"""The laws, for WeGeFT: each side, each way to share; with dropout, which a model in eval mode has not."""

import pytest
from hypothesis import strategies as st

import peft_func as pf
from tests.laws.conformance import Case, Laws
from tests.zoo import ZOO

RANKS = st.integers(1, 2)
ALPHAS = st.sampled_from([None, 3])


class TestInputSide(Laws):
    compiled = ["mlp", "conv", "attention"]

    @staticmethod
    def methods(animal, where):
        anywhere = st.builds(pf.wegeft, st.just(where), rank=RANKS, alpha=ALPHAS, share=st.just("none"))
        shared = st.builds(
            pf.wegeft, st.just(animal.narrow), rank=RANKS, alpha=ALPHAS, share=st.sampled_from(["target", "all"])
        )
        return anywhere | shared


class TestOutputSide(Laws):
    compiled = ["mlp", "conv"]

    @staticmethod
    def methods(animal, where):
        return st.builds(
            pf.wegeft, st.just(where), rank=RANKS, alpha=ALPHAS, side=st.just("output"), share=st.just("none")
        )


class TestDropout(Laws):
    """In eval mode, in which the laws run, it is as if there were none."""

    compiled = ["mlp"]

    @staticmethod
    def methods(animal, where):
        return st.builds(
            pf.wegeft,
            st.just(where),
            rank=RANKS,
            side=st.sampled_from(["input", "output"]),
            share=st.just("none"),
            dropout=st.just(0.3),
        )

    @staticmethod
    @pytest.mark.parametrize("name", ["mlp", "conv", "gpt2", "attention", "experts", "tied"])
    def test_06_purity(name):
        """Training draws its masks from the global generator, as dropout does; nothing else changes."""
        case = Case(name, pf.wegeft(ZOO[name].where[0], rank=1, share="none", dropout=0.5), 3)
        kept = {path: (t, t._version, t.clone()) for path, t in case.model.params.items()}
        leaves = pf.map_leaves(lambda t: t.clone().requires_grad_(), case.tree)
        case.run(case.adapter.apply(case.frozen, leaves), case.model.train()).sum().backward()
        for path, (tensor, version, value) in kept.items():
            assert case.model.params[path] is tensor
            assert tensor._version == version
            assert tensor.equal(value)
