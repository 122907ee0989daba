"""Wired add-ins obey the laws."""

import torch
from torch import nn

import peft_func as pf
from tests.laws.addins import AddinLaws


class Bottleneck(pf.AddinBase):
    """The tutorial's kind of class, with its last layer at zero."""

    def __init__(self, width, out=None):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2), nn.Linear(2, out or width)
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, x):
        return self.fc2(torch.tanh(self.fc1(x)))

    def adapt_input(self, module, inputs):
        return inputs[0] + self.forward(inputs[0])

    def adapt_output(self, module, inputs, outputs):
        return outputs + self.forward(outputs)

    def adapt_across_input(self, module, inputs):
        return inputs[0] + self.forward(self.inputs_cache)

    def adapt_across_output(self, module, inputs, outputs):
        return outputs + self.forward(self.inputs_cache)


def eight(place):
    return Bottleneck(8)


def sixteen(place):
    return Bottleneck(16)


class TestWire(AddinLaws):
    files = False
    compiled = ["mlp", "vit"]
    SMALL = pf.wire(
        "(A.adapt_output): (blocks[0]){inout1}, (A.adapt_across_output): (blocks[0]){in1}->...->(blocks[4]){out1}",
        A=pf.built(lambda place: Bottleneck(8, 3 if place.path == "blocks.4" else None)),
    )
    CASES = {
        "mlp": [
            pf.wire("(A.adapt_input): ...->{inout1}(2)->(3){inout2.adapt_output}->...", A=eight),
            pf.wire("(A.adapt_across_input): (0){in1}->...->{in2}(4), (A.adapt_output): (1){inout1}", A=eight),
            pf.chain(
                pf.lora("0", rank=1), pf.wire("(A.adapt_across_output): ...->{in1}([2]){out1}->{in2}(3){out2}", A=eight)
            ),
        ],
        "vit": [
            pf.wire("(A.adapt_input): {inout1}(vit.layers[0:2].mlp)->...", A=sixteen),
            pf.wire(
                "(A.adapt_across_output): {in1}(vit.layers[0:2].attention)->...->(vit.layers[-2:0].mlp){out1}",
                A=sixteen,
            ),
        ],
    }
