"""A LightningModule over `pf.Adapted`: the usual loops around any net and any method."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from peft_func.errors import OptionError
from peft_func.training.adapted import Adapted
from peft_func.transforms.transform import Method
from peft_func.trees.keys import Key
from peft_func.trees.select import Where

Optimizers = Callable[[Iterable[tuple[str, nn.Parameter]]], Any]


def adamw(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """Return AdamW with a rate of 1e-3."""
    return torch.optim.AdamW((parameter for _, parameter in named_parameters), lr=1e-3)


class FunctionalModule(LightningModule):  # type: ignore[misc]
    """A net with an adapter, as a LightningModule; its checkpoints hold the adapter, and not the net.

    Batches are pairs `(x, target)`, or mappings of keyword arguments as Hugging Face's collators give them, with the
    target under `labels`. It logs `train_loss`, `val_loss` and `test_loss`, the first two to the progress bar, and
    every metric under `train_`, `val_` and `test_`. Override any step. As Lightning does with any module, it takes the
    net in the mode in which it is: call `net.train()` first for dropout while training.

    Args:
        net: as for `pf.Adapted`.
        method: as for `pf.Adapted`.
        key: as for `pf.Adapted`.
        loss: from `(output, target)` to a scalar; None takes the loss that the net itself returns (`output.loss`).
        optimizer: from the named parameters that train to an optimizer, or to whatever else `configure_optimizers` may
            return; the default is AdamW with a rate of 1e-3.
        metrics: functions `(output, target) -> scalar` by name.
        always_eval: as for `pf.Adapted`; for the BatchNorms of the net that should keep their statistics.

    Attributes:
        adapted: the `pf.Adapted`; the parameters are under `adapted.`

    Raises:
        OptionError: an option is none of these, or the batch has another form and no step is overridden.

    Example:
        >>> import torch, peft_func as pf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> method = pf.chain(pf.lora("0", rank=2), pf.train("2"))
        >>> module = pf.lightning.FunctionalModule(net, method, loss=torch.nn.functional.cross_entropy)
        >>> module(torch.ones(3, 4)).shape
        torch.Size([3, 2])
        >>> module.configure_optimizers().defaults["lr"]
        0.001
    """

    def __init__(
        self,
        net: nn.Module,
        method: Method,
        key: Key = 0,
        *,
        loss: Callable[[Any, Any], Tensor] | None = None,
        optimizer: Optimizers = adamw,
        metrics: Mapping[str, Callable[[Any, Any], Tensor]] | None = None,
        always_eval: Where | None = None,
    ) -> None:
        super().__init__()
        for name, option in {"loss": loss, "optimizer": optimizer, **(metrics or {})}.items():
            if option is not None and not callable(option):
                raise OptionError(f"{name} is a function, not {option!r}")
        self.adapted = Adapted(net, method, key, always_eval=always_eval)
        self.loss, self.optimizer_of, self.metrics = loss, optimizer, dict(metrics or {})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.adapted(*args, **kwargs)

    def parts(self, batch: Any) -> tuple[tuple[Any, ...], Mapping[str, Any], Any]:
        """Take a batch apart, into the arguments of the net, its keyword arguments, and the target."""
        if isinstance(batch, Mapping):
            # A net that computes the loss itself is given the target; it may do more work for it.
            given = batch if self.loss is None else {name: batch[name] for name in batch if name != "labels"}
            return (), given, batch.get("labels")
        if isinstance(batch, tuple | list) and len(batch) == 2:
            return (batch[0],), {}, batch[1]
        raise OptionError(
            f"a batch is a pair (x, target) or a mapping of keyword arguments, not a {type(batch).__name__}"
            f"{f' of {len(batch)}' if isinstance(batch, tuple | list) else ''}; override parts(batch) for another form"
        )

    def step(self, batch: Any, stage: str) -> Tensor:
        """Return the loss of a batch, and log it and the metrics under the name of the stage."""
        args, kwargs, target = self.parts(batch)
        output = self(*args, **kwargs)
        loss = getattr(output, "loss", None) if self.loss is None else self.loss(output, target)
        if not isinstance(loss, Tensor):
            raise OptionError(
                f"the net gave a {type(output).__name__} without a loss: give FunctionalModule(..., loss=...), a "
                "function of (output, target), or batches with what the net needs for its own loss, such as labels"
            )
        # Means over the processes are exact for equal batches; a training loss is shown as each process has it.
        options: dict[str, Any] = {"batch_size": _size(args, kwargs), "sync_dist": stage != "train"}
        self.log(f"{stage}_loss", loss, prog_bar=stage != "test", **options)
        with torch.no_grad():
            for name, metric in self.metrics.items():
                self.log(f"{stage}_{name}", metric(output, target), on_step=False, on_epoch=True, **options)
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.step(batch, "train")

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.step(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.step(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        if isinstance(batch, Tensor):
            return self(batch)
        args, kwargs, _ = self.parts(batch)
        return self(*args, **kwargs)

    def configure_optimizers(self) -> Any:
        return self.optimizer_of([(name, p) for name, p in self.named_parameters() if p.requires_grad])

    def merged_state_dict(self) -> dict[str, Any]:
        """Return a plain state dict for `net.load_state_dict(..., strict=True)`, with the adapter merged in."""
        return self.adapted.merged_state_dict()


def _size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim), None)
    return 1 if first is None else len(first)
