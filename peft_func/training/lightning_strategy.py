"""What the strategies of Lightning must be told when the set of what trains changes.

`DistributedDataParallel` decides which gradients it averages when it is made. It is made anew whenever that changes.
"""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from torch.nn.parallel import DistributedDataParallel

from peft_func.errors import OptionError


def check_strategy(trainer: Trainer, purpose: str) -> None:
    """Refuse a strategy under which what trains cannot change.

    Raises:
        OptionError: the strategy is another than one device or DDP.
    """
    strategy = trainer.strategy
    # DeepSpeedStrategy derives from DDPStrategy, and is not one.
    if isinstance(strategy, DeepSpeedStrategy) or not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        raise OptionError(
            f"{purpose} changes what trains, which {type(strategy).__name__} does not allow: it shards or flattens the "
            "parameters once, at the start. Use Trainer(strategy='ddp') or one device; for a set that never changes, "
            "leave the callback out and set requires_grad in the module"
        )


def wrap_again(trainer: Trainer) -> None:
    """Let DDP see anew which parameters train; for one device, do nothing."""
    strategy: Any = trainer.strategy
    wrapped = strategy.model
    if isinstance(wrapped, DistributedDataParallel):
        inner = wrapped.module
        strategy.model = inner
        # The reducer takes its hooks off the parameters when it goes; the wrapper may stay alive longer in a cycle.
        for name in ("reducer", "logger"):
            vars(wrapped).pop(name, None)
        strategy.model = strategy._setup_model(inner)
        strategy._register_ddp_hooks()
