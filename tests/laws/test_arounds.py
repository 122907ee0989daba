"""The four primitives obey the laws, with functions and with modules."""

import torch
from torch import nn

import peft_func as pf
from tests.laws.addins import AddinLaws


def scale(tree, inner, *args, **kwargs):
    return inner(*args, **kwargs) * (1 + tree["scale"])


def scalar(place, key):
    return {"scale": torch.zeros((), dtype=place.like.dtype)}


def shifted(tree, x, *args, **kwargs):
    return x + tree["scale"]


def moved(tree, output):
    return output + tree["scale"]


def gated(tree, taken, here):
    return here + tree["scale"] * taken.mean()


class Residual(nn.Module):
    """A module of one's own, the identity at the start."""

    def __init__(self, width):
        super().__init__()
        self.down, self.up = nn.Linear(width, 2), nn.Linear(2, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x):
        return x + self.up(torch.tanh(self.down(x)))


def residual(place):
    return Residual(getattr(place.module, "out_features", None) or place.module.normalized_shape[0])


class TestFunctions(AddinLaws):
    files = False
    compiled = ["mlp", "conv"]
    SMALL = pf.chain(
        pf.around("blocks.0", scale, scalar, name="a"), pf.across("blocks.0", "blocks.2", gated, scalar, name="b")
    )
    CASES = {
        "mlp": [
            pf.chain(
                pf.around("0|4", scale, scalar),
                pf.before("2", shifted, scalar),
                pf.after("", moved, scalar),
            ),
            pf.across("0", "4", gated, scalar),
            pf.around(".*", scale, scalar, share=True),
        ],
        "conv": [pf.chain(pf.lora("stem", rank=2), pf.around("norm|up", scale, scalar))],
        "bert": [
            pf.before(r".*attention\.self", shifted, scalar),
            pf.across("bert.embeddings", r".*intermediate", gated, scalar, given="output"),
            pf.chain(
                pf.across(r".*layer\.0\.output\.dense", r".*layer\.1\.output\.dense", gated, scalar),
                pf.before(r".*layer\.0", shifted, scalar),
            ),
        ],
        "llama": [pf.around(r".*(q_proj|mlp)", scale, scalar)],
    }


class TestModules(AddinLaws):
    files = False
    compiled = ["mlp"]
    SMALL = pf.after(r"blocks\.[02]", pf.built(residual), name="own")
    CASES = {
        "mlp": [
            pf.after(pf.of_type(nn.Linear), pf.built(residual)),
            pf.before("2", pf.built(lambda p: Residual(p.module.in_features))),
        ],
        "bert": [pf.after(r".*LayerNorm", pf.built(residual))],
    }
