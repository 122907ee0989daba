"""Edits of representations obey the laws."""

from hypothesis import given
from hypothesis import strategies as st

import peft_func as pf
from tests.laws.addins import AddinLaws
from tests.laws.conformance import VALUES, close

EVERY = pf.blocks()


class TestLoreft(AddinLaws):
    """The paper's init edits at once; the one that promises the identity is among the cases."""

    compiled = ["llama"]
    SMALL = pf.loreft(r"blocks\.[02]", rank=2, positions="all")
    CASES = {
        "mlp": [pf.loreft("0|2", rank=2, positions="all", init="identity")],
        "llama": [pf.loreft(EVERY, rank=2, positions="f1+l2", tied=False, init="identity")],
        "bert": [pf.loreft(EVERY, rank=3, positions="f2", init="identity")],
        "vit": [pf.loreft(pf.blocks(1), rank=1, positions=[0, -1], init="identity")],
    }


class TestOthers(AddinLaws):
    compiled = ["mlp"]
    SMALL = pf.direft(r"blocks\.[02]", rank=2, positions="all")
    CASES = {
        "gpt2": [pf.noreft(EVERY, rank=2, positions="f1+l1", tied=False)],
        "mlp": [pf.direft("0|2", rank=2, positions="all")],
        "bert": [pf.chain(pf.direft(EVERY, rank=2, positions="1:4"), pf.noreft(EVERY, positions="l1"))],
    }

    @given(st.data())
    def test_01_identity_at_init(self, data):
        """The paper's init draws all maps, so the edits are there from the start."""
        case = data.draw(self.cases())
        expected = case.animal.output(case.net(*case.args, **case.kwargs))
        assert not close(case.call(case.start), expected, VALUES)
