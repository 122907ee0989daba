"""The laws for LoRA and DoRA over the other views of a convolution's weight."""

from hypothesis import strategies as st

import peft_func as pf
from tests.laws.conformance import Laws

VIEWS = st.sampled_from(["balanced", "out_as_h"])


class _OnConvolutions(Laws):
    """Drawn on the network of convolutions only: elsewhere these are the methods that test_methods.py has."""

    compiled = []

    @classmethod
    def cases(cls, names=None):
        return super().cases(["conv"])


class TestLora(_OnConvolutions):
    compiled = ["conv"]  # the others are these, and methods that test_methods.py compiles

    @staticmethod
    def methods(animal, where):
        return st.builds(
            pf.lora,
            st.just(where),
            rank=st.integers(1, 2),
            alpha=st.sampled_from([None, 5.5]),
            bias=st.booleans(),
            conv=VIEWS,
        )


class TestDora(_OnConvolutions):
    @staticmethod
    def methods(animal, where):
        return st.builds(pf.dora, st.just(where), rank=st.integers(1, 2), alpha=st.just(3), conv=VIEWS)


class TestChain(_OnConvolutions):
    """Both views, a generated update, a diagonal on each side, and magnitudes over all of that."""

    @staticmethod
    def methods(animal, where):
        parts = {
            "lora": lambda: pf.lora(where, rank=2, alpha=3, conv="balanced"),
            "more": lambda: pf.lora(where, rank=1, conv="balanced", name="more"),
            "flat": lambda: pf.lora(where, rank=1, conv="out_as_h", name="flat"),
            "gift": lambda: pf.gift(where, rank=1, share="none"),
            "svdiff": lambda: pf.svdiff(where),
            "out": lambda: pf.ia3(where, name="out"),
            "in": lambda: pf.ia3(where, name="in", side="input"),
            "magnitude": lambda: pf.magnitude(where),
        }
        chosen = st.lists(st.sampled_from(list(parts)), min_size=2, max_size=4, unique=True)
        return st.builds(lambda names: pf.chain(*(parts[name]() for name in names)), chosen)
