"""Bottlenecks, Compacter and their mixtures obey the laws of add-ins."""

from torch import nn

import peft_func as pf
from tests.laws.addins import AddinLaws

LINEAR = pf.of_type(nn.Linear)


class TestBottleneck(AddinLaws):
    compiled = ["mlp"]
    SMALL = pf.bottleneck(r"blocks\.(0|2|4)", rank=2, activation="gelu")
    CASES = {
        "mlp": [
            pf.bottleneck(LINEAR, rank=2, activation="tanh", scale="learned"),
            pf.bottleneck(LINEAR, rank=2, activation="silu", form="parallel", scale=0.5, layer_norm="in"),
            pf.chain(
                pf.bottleneck("0|2", reduction=4), pf.bottleneck("2", activation="elu", name="again", dropout=0.5)
            ),
        ],
        "bert": [pf.houlsby(rank=2), pf.pfeiffer(rank=2, activation="gelu", layer_norm="out")],
        "llama": [pf.houlsby(pf.index(0)), pf.bottleneck(pf.attentions(), form="parallel", rank=2)],
        "gpt2": [pf.parallel_adapter(rank=2, activation="tanh")],
        "encoder_layer": [pf.bottleneck("norm2", form="norm", rank=2, activation="tanh")],
    }


class TestCompacter(AddinLaws):
    compiled = ["mlp"]
    SMALL = pf.compacter(r"blocks\.2", n=2, rank=4)
    CASES = {
        "mlp": [
            pf.compacter("2", n=2, rank=4, low_rank=2, activation="tanh"),
            pf.compacter("2", n=4, low_rank=None, share_rule=False, scale="learned"),
        ],
        "gpt2": [pf.compacter(pf.projections(), n=4, layer_norm="in", activation="silu")],
    }


def adapters(*places, **options):
    return [pf.bottleneck(*places, rank=2, activation=how, name=how, **options) for how in ("tanh", "gelu")]


class TestMixtures(AddinLaws):
    compiled = ["mlp"]
    SMALL = pf.fusion(adapters(r"blocks\.(0|2)"))
    CASES = {
        "mlp": [
            pf.fusion(adapters(LINEAR)),
            pf.gated([*adapters("0", form="parallel"), pf.compacter("0", n=1, form="parallel")]),
            pf.average([*adapters("2"), pf.fusion(adapters("2"), name="inside")], weights=[0.5, 0.3, -1.0]),
        ],
        "bert": [pf.fusion([pf.pfeiffer(rank=2, name="a"), pf.pfeiffer(rank=3, name="b")])],
    }
