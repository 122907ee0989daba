"""The methods that are compared; all train the head as well."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

import peft_func as pf


@dataclass(frozen=True)
class Entry:
    """A method and its learning rate.

    Attributes:
        name: as in the table.
        parts: makes what is added to the head.
        rates: learning rates to choose from, by one short run each on other seeds, on sentences held out of training.
    """

    name: str
    parts: Callable[[], list[pf.Part | pf.Chain]]
    rates: tuple[float, ...]

    @property
    def method(self) -> pf.Chain:
        """The whole method."""
        return pf.chain(*self.parts(), pf.train(r"head\..*", name="head"))


ATTENTION = ["query", "value"]
LINEAR = pf.of_type(nn.Linear) & pf.path(r"encoder\.encoder\..*")
# One generator for places of one kind, over depth: BERT's three layers called `dense` have different widths.
BY_KIND = {
    "query": r".*\.query",
    "key": r".*\.key",
    "value": r".*\.value",
    "attention_output": r".*\.attention\.output\.dense",
    "up": r".*\.intermediate\.dense",
    "down": r".*\.\d+\.output\.dense",
}

METHODS = [
    Entry("linear probe", list, (1e-3,)),
    Entry(
        "IA3",
        lambda: [pf.ia3(["key", "value"]), pf.ia3(r".*\.\d+\.output\.dense", side="input", name="feed_forward")],
        (3e-3, 1e-2, 3e-2),
    ),
    Entry("BitFit", lambda: [pf.train(r"encoder\.encoder\..*bias")], (1e-3, 3e-3, 1e-2)),
    Entry("GIFT r16, q v", lambda: [pf.gift(ATTENTION, rank=16)], (1e-3, 3e-3, 1e-2)),
    Entry("WeGeFT r16, q v", lambda: [pf.wegeft(ATTENTION, rank=16)], (1e-3, 3e-3, 1e-2)),
    Entry("LoRA r8, q v", lambda: [pf.lora(ATTENTION, rank=8)], (1e-3, 3e-3, 1e-2)),
    Entry("GIFT r16, all linear", lambda: [pf.gift(LINEAR, rank=16, share=BY_KIND)], (3e-4, 1e-3, 3e-3)),
    Entry("LoRA r8, all linear", lambda: [pf.lora(LINEAR, rank=8)], (3e-4, 1e-3, 3e-3)),
    Entry("full tuning", lambda: [pf.train(r"encoder\..*")], (3e-5, 1e-4, 3e-4)),
]
