"""The laws, for GIFT with every block that generates."""

from hypothesis import strategies as st

import peft_func as pf
from tests.laws.conformance import Laws

SMALL = ["mlp", "conv", "shared", "tied", "attention", "experts"]
NORM = st.sampled_from(["none", "l2", "ln"])
ACTIVATION = st.sampled_from(["sigmoid", "hsigmoid", "softmax", "gelu", "standard_sigmoid"])
BLOCKS = st.integers(1, 2)
BIASES = {"in_projection_bias": st.booleans(), "out_projection_bias": st.booleans()}


class Generating(Laws):
    """Laws of a block, on small models; each subclass gives the options of its block."""

    compiled = ["mlp"]
    options: dict = {}

    @classmethod
    def cases(cls, names=None):
        return super().cases([name for name in SMALL if names is None or name in names])

    @classmethod
    def methods(cls, animal, where):
        generated = {"rank": st.just(2), **BIASES, **cls.options}
        alone = st.builds(pf.gift, st.just(where), share=st.just("none"), **generated)
        return alone | st.builds(pf.gift, st.just(animal.narrow), share=st.just("target"), **generated)


class TestActivation(Generating):
    options = {"activation": ACTIVATION}
    test_11_compile_without_recompiling = None  # two other blocks are compiled


class TestMlp(Generating):
    options = {"block": st.just("mlp"), "num_blocks": BLOCKS, "norm": NORM, "mlp_ratio": st.sampled_from([1.5, 3])}


class TestMlpMixer(Generating):
    options = {"block": st.just("mlp_mixer"), "num_mixed_tokens": st.just(3), "norm": NORM}
    test_11_compile_without_recompiling = None  # two other blocks are compiled


class TestTransformer(Generating):
    options = {"block": st.just("transformer"), "num_heads": st.sampled_from([1, 2]), "norm": NORM}
    test_11_compile_without_recompiling = None  # two other blocks are compiled


class TestPamcatTransformer(Generating):
    options = {
        "block": st.just("pamcat_transformer"), "num_clusters": st.just(3), "num_blocks": BLOCKS, "norm": NORM,
        "cluster_activation": ACTIVATION, "drop_path": st.sampled_from([0.0, 0.5]),
    }  # fmt: skip


class TestPamcatAttn(Generating):
    options = {"block": st.just("pamcat_attn"), "num_clusters": st.just(3), "cluster_activation": ACTIVATION}
    test_11_compile_without_recompiling = None  # two other blocks are compiled


class TestChunks(Generating):
    """Half of every matrix, or both halves on their own."""

    options = {
        "rank": st.just(1), "block": st.sampled_from(["simple_block", "mlp"]),
        "chunks": st.sampled_from([("a", None), ("a", "b")]),
    }  # fmt: skip
    test_11_compile_without_recompiling = None

    @classmethod
    def methods(cls, animal, where):
        return st.builds(pf.gift, st.just(animal.narrow), share=st.just("none"), **BIASES, **cls.options)


del Generating  # it is no case of its own
