"""The laws for SVDiff."""

from hypothesis import strategies as st

import peft_func as pf
from tests.laws.conformance import Laws


class TestSvdiff(Laws):
    compiled = ["mlp", "conv"]

    @staticmethod
    def methods(animal, where):
        return st.builds(pf.svdiff, st.just(where), conv=st.sampled_from(["balanced", "out_as_h"]))
