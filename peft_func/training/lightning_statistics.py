"""Which BatchNorms keep their running statistics while a module trains: those are in eval mode, batch for batch."""

from collections.abc import Iterator

from torch import nn

from peft_func.training.adapted import Adapted


class Quiet:
    """The parts of a module that are kept from updating their statistics.

    Args:
        update: whether all parts update them, or none; None is for those whose parameters train.
    """

    def __init__(self, update: bool | None) -> None:
        self.update = update
        self.parts: list[nn.Module] = []

    def choose(self, module: nn.Module) -> None:
        """Choose anew, by what requires a gradient; what was quiet and is no more is in train mode again."""
        chosen = [] if self.update else list((_frozen if self.update is None else _with_statistics)(module))
        self.release()
        self.parts = [part for part in chosen if part.training]

    def hold(self) -> None:
        """Put the parts in eval mode."""
        for part in self.parts:
            part.training = False

    def release(self) -> None:
        """Put the parts in train mode, as they were."""
        for part in self.parts:
            part.training = True
        self.parts = []


def hides_statistics(module: nn.Module) -> bool:
    """Say whether a net inside `pf.Adapted` has such parts: they are out of reach."""
    nets = (part.bound_net() for part in module.modules() if isinstance(part, Adapted))
    return any(True for net in nets for _ in _with_statistics(net))


def _with_statistics(module: nn.Module) -> Iterator[nn.Module]:
    for part in module.modules():
        if getattr(part, "running_mean", None) is not None:
            yield part


def _frozen(module: nn.Module) -> Iterator[nn.Module]:
    """Yield those whose parameters do not train; one without any goes by the smallest part around it that has some."""
    parents = {child: parent for parent in module.modules() for child in parent.children()}
    for part in _with_statistics(module):
        around: nn.Module | None = part
        while around is not None and next(around.parameters(), None) is None:
            around = parents.get(around)
        if around is None or not any(parameter.requires_grad for parameter in around.parameters()):
            yield part
