"""The laws, for every method and for chains of them."""

from hypothesis import strategies as st

import peft_func as pf
from tests.laws.conformance import Laws

RANKS = st.integers(1, 2)


class TestLora(Laws):
    compiled = ["mlp", "conv", "attention", "bert", "gpt2", "llama"]

    @staticmethod
    def methods(animal, where):
        return st.builds(
            pf.lora,
            st.just(where),
            rank=RANKS,
            alpha=st.sampled_from([None, 1, 5.5]),
            rank_stabilized=st.booleans(),
            init=st.sampled_from(["default", "gaussian"]),
            bias=st.booleans(),
        )


class TestGift(Laws):
    compiled = ["mlp", "conv", "attention", "bert", "llama"]

    @staticmethod
    def methods(animal, where):
        anywhere = st.builds(pf.gift, st.just(where), rank=RANKS, share=st.just("none"))
        return anywhere | st.builds(
            pf.gift, st.just(animal.narrow), rank=RANKS, share=st.sampled_from(["target", "all"])
        )


class TestIA3(Laws):
    @staticmethod
    def methods(animal, where):
        output = st.builds(pf.ia3, st.just(where), scale_bias=st.booleans())
        return output | st.builds(pf.ia3, st.just(where), side=st.just("input"))


class TestDora(Laws):
    @staticmethod
    def methods(animal, where):
        return st.builds(pf.dora, st.just(where), rank=RANKS, alpha=st.sampled_from([None, 3]), bias=st.booleans())


class TestTrain(Laws):
    @staticmethod
    def methods(animal, where):
        return st.builds(pf.train, st.sampled_from([where, ".*"]))


class TestChain(Laws):
    """LoRA, then GIFT, then a diagonal, then magnitudes over all of that, and some weights that train themselves."""

    @staticmethod
    def methods(animal, where):
        parts = {
            "lora": lambda rank: pf.lora(where, rank=rank, alpha=3),
            "gift": lambda rank: pf.gift(where, rank=rank, share="none"),
            "ia3": lambda rank: pf.ia3(where, name="in", side="input"),
            "magnitude": lambda rank: pf.magnitude(where),
            "train": lambda rank: pf.train(where, name="self"),
            "nested": lambda rank: pf.chain(pf.lora(where, rank=rank), pf.ia3(where), name="nested"),
        }
        chosen = st.lists(st.sampled_from(list(parts)), min_size=1, max_size=4, unique=True)
        return st.builds(lambda names, rank: pf.chain(*(parts[name](rank) for name in names)), chosen, RANKS)
