"""How many tokens come before those that an add-in is about."""

from peft_func.addins.structure import parts_of
from peft_func.errors import OptionError
from peft_func.functional.model import FunctionalModel

PROMPTS = "prompts"
"""The note of a call that says how many prompts are behind the prefix tokens."""

ASKING = "asking"
"""The note of a call that says whether a block is run on tokens that ask, not on those of the image."""


def prefix_of(model: FunctionalModel, given: int | None, name: str) -> int:
    """Return the number of prefix tokens of a vision transformer (class token, registers), or what the user says.

    Raises:
        OptionError: it is unknown, or no such number.
    """
    if given is not None:
        if isinstance(given, bool) or not isinstance(given, int) or given < 0:
            raise OptionError(f"{name}: prefix={given!r} is no number of tokens")
        return given
    known = parts_of(model).prefix
    if known is None:
        raise OptionError(
            f"{name}: {model!r} has no patches of images, so the number of tokens before them is unknown; give "
            "prefix=0, or how many there are"
        )
    return known
