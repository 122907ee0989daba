"""An `nn.Module` over the pure functions, for all that expects a module: Trainer, Lightning, DDP, optimizers."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import Tensor, nn

from peft_func.errors import ModuleRefusedError
from peft_func.functional.containers import Container, NormContainer, Place, hold_buffer, hold_parameter
from peft_func.functional.model import FunctionalModel, functionalize
from peft_func.functional.skeleton import Skeleton
from peft_func.functional.walk import resolve_modules
from peft_func.training.attributes import attribute_of, belongs_to
from peft_func.training.pickling import packed, unpacked
from peft_func.training.signature import class_for, written_class
from peft_func.transforms.bind import Adapter, bind, check_tree
from peft_func.transforms.transform import Method
from peft_func.trees.keys import Key
from peft_func.trees.paths import Keys, Tree, from_leaves, join, leaves
from peft_func.trees.select import Where
from peft_func.weights.mapping import Weights

if TYPE_CHECKING:
    from typing_extensions import Self


class Adapted(nn.Module):
    """A net with an adapter, as an ordinary module whose parameters are what trains and nothing else.

    `net` is never written, and its weights are shared, not copied. `named_parameters()` are the leaves of the adapter's
    tree under their paths (`lora.encoder.0.q_proj.weight.A`), and `state_dict()` is the adapter: these leaves, and the
    persistent buffers of the net, if it has any, under `net.` (the module has its own: BatchNorm updates them). What
    the net has besides is reachable where that is safe: attributes (`config`, `device`, ...), and methods (`generate`,
    ...) as pure calls with the effective weights.

    Args:
        net: as for `pf.functionalize`.
        method: as for `pf.bind`.
        key: as for `Adapter.init`.
        always_eval: a selector over modules that stay in eval mode under `train()`: a BatchNorm that is chosen
            normalises with its stored statistics and does not update them.

    Attributes:
        adapter: the bound method.

    Raises:
        OptionError: a part is named as something that every module has.
        SelectorError: `always_eval` matches no module.
        AttributeRefusedError: what is asked of the net is not there, or would change it.

    Example:
        >>> import torch, peft_func as pf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> module = pf.Adapted(net, pf.chain(pf.lora("0", rank=2), pf.train("2")))
        >>> [name for name, _ in module.named_parameters()]
        ['lora.0.weight.A', 'lora.0.weight.B', 'train.2.weight', 'train.2.bias']
        >>> optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
        >>> module(torch.ones(3, 4)).sum().backward()
        >>> optimizer.step()
        >>> net.load_state_dict(module.merged_state_dict(), strict=True)
        <All keys matched successfully>
    """

    adapter: Adapter

    def __new__(cls, net: nn.Module, *args: Any, **kwargs: Any) -> "Self":  # noqa: ARG004
        """Make an object of a class of its own for each class of nets: Trainer reads the signature of its forward."""
        kind: type[Self] = class_for(cls, type(net), Adapted.forward)
        return super().__new__(kind)

    def __init__(self, net: nn.Module, method: Method, key: Key = 0, *, always_eval: Where | None = None) -> None:
        model = functionalize(net)
        adapter = bind(method, model)
        self._build(adapter, adapter.init(key)[1], _chosen(always_eval, model))

    @classmethod
    def of(cls, adapter: Adapter, trainable: Mapping[str, Any], *, always_eval: Where | None = None) -> "Self":
        """Make a module of a bound adapter and its tree, such as `pf.load` and `pf.load_peft` give.

        Args:
            adapter: the bound adapter; it and its model are left as they are.
            trainable: its second tree; the parameters are copies of its leaves.
            always_eval: as for the class.

        Raises:
            TreeError: the tree is not one of the adapter's.

        Example:
            >>> import torch, peft_func as pf
            >>> model = pf.functionalize(torch.nn.Linear(4, 2))
            >>> adapter = pf.bind(pf.lora("weight", rank=2), model)
            >>> module = pf.Adapted.of(adapter, adapter.init(0)[1])
            >>> module(torch.ones(1, 4)).shape
            torch.Size([1, 2])
        """
        check_tree(trainable, adapter.spec)
        model = adapter.model
        own = FunctionalModel(model._skeleton.copy(), {**model.params}, {**model.state})
        return cast("Self", _made(cls, bind(adapter.method, own), trainable, _chosen(always_eval, own)))

    def _build(self, adapter: Adapter, trainable: Mapping[str, Any], always_eval: Sequence[str]) -> None:
        super().__init__()
        self.adapter = adapter
        self._skeleton, self._always_eval = adapter.model._skeleton, tuple(always_eval)
        root = self._skeleton.root
        self.training = root.training
        # A net some of whose modules train and some do not stays so until somebody says train() or eval().
        self._mixed = {self.training} if any(part.training != root.training for part in root.modules()) else set()
        self._models: dict[bool, FunctionalModel] = {}
        self._leaves: dict[Keys, Place] = {
            keys: hold_parameter(self, join(keys), tensor.detach().clone(), _kind(adapter.model, keys[-1]))
            for keys, tensor in leaves(trainable)
        }
        saved = root.state_dict().keys()
        self._state: dict[str, Place] = {
            name: hold_buffer(self, f"net.{name}", tensor.clone(), persistent=name in saved)
            for name, tensor in adapter.model.state.items()
        }
        part = self._modules.get("train")
        if part is not None:
            self._modules["train"] = _TrainPart(self, part)
        self.refresh()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the net with the effective weights; in train mode its buffers are updated."""
        output, state = self.model.with_state(self.weights(), self.state(), *args, **kwargs)
        if self.training:
            with torch.no_grad():
                for name, place in self._state.items():
                    place.get().copy_(state[name])  # in place: DDP and CUDA graphs hold the buffer itself
        return output

    @property
    def model(self) -> FunctionalModel:
        """The functional model in the present mode; its `params` are the weights of the net."""
        if self.training not in self._models:  # a mode that was set as an attribute
            self.refresh()
        return self._models[self.training]

    @property
    def trainable(self) -> Tree:
        """The adapter's tree; its leaves are the parameters themselves."""
        return from_leaves((keys, place.get()) for keys, place in self._leaves.items())

    @property
    def frozen(self) -> dict[str, Tensor]:
        """The base weights that do not train, by name."""
        return self.adapter.frozen

    def weights(self) -> Weights:
        """Return the effective weights, as `Adapter.apply` does; differentiable in the parameters."""
        return self.adapter.apply(self.adapter.frozen, self.trainable)

    def state(self) -> dict[str, Tensor]:
        """Return the buffers by the names that they have in the net."""
        return {name: place.get() for name, place in self._state.items()}

    def merged_state_dict(self) -> dict[str, Any]:
        """Return a plain state dict for `net.load_state_dict(..., strict=True)`, with the adapter merged in."""
        with torch.no_grad():
            return self.model.state_dict(self.weights(), self.state())

    @property
    def train(self) -> Callable[..., "Adapted"]:
        """Switch to train mode, or with `train(False)` to eval mode."""
        # Code that follows a parameter's path asks for this attribute, too: it must then find the part of that name.
        return cast("Callable[..., Adapted]", self._modules.get("train", self._set_mode))

    def _set_mode(self, mode: bool = True) -> "Self":
        if mode in self._mixed:
            self._mixed.clear()
            self._models.pop(mode, None)
        for part in self.modules():
            part.training = mode
        if mode not in self._models:
            self.refresh()
        return self

    def refresh(self) -> None:
        """Make the functional model of the present mode anew."""
        root, base = self._skeleton.root, self.adapter.model
        # Not a deep copy: a configuration is one object for the module and for its models of both modes.
        copy = self._skeleton.clone(dict(root.named_parameters()), dict(root.named_buffers()))
        if self.training not in self._mixed:
            copy.train(self.training)
        for path in self._always_eval:
            copy.get_submodule(path).eval()
        self._models[self.training] = FunctionalModel(copy, base.params, base.state, hosts=base.hosts)

    def reshape_net(self, change: Callable[[nn.Module], Any]) -> Any:
        """Apply a change of how the forward pass runs to the private copy of the net, for both modes."""
        result = change(self._skeleton.root)
        self._skeleton = Skeleton(self._skeleton.root)
        self._models.clear()
        self.refresh()
        return result

    def bound_net(self) -> nn.Module:
        """Return a copy of the net's structure that holds its base weights: for reading, not for calling."""
        return self._skeleton.clone(self.adapter.model.params, self.state())

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_skeleton" not in vars(self):
                raise
        return attribute_of(self, self._skeleton.root, name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = "_skeleton" not in vars(self) or name in vars(self) or hasattr(type(self), name)
        if not own and belongs_to(self._skeleton.root, name):
            self.reshape_net(lambda net: setattr(net, name, value))
        else:
            super().__setattr__(name, value)

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise ModuleRefusedError(
            "nn.DataParallel copies modules in every call, which Adapted is not for; use DistributedDataParallel "
            "(start the script with torchrun), or let the process see one GPU (CUDA_VISIBLE_DEVICES=0)"
        )

    def _get_name(self) -> str:
        return type(self._skeleton.root).__name__  # Trainer asks for it to see whether the loss shifts its labels

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> "Self":
        super()._apply(function, recurse)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for table in (self.adapter.model.params, self.adapter.model.state):  # what both modes' models use
                table.update({name: function(tensor).detach() for name, tensor in table.items()})
        return self

    def _contents(self) -> dict[str, Any]:
        """Return what makes this module, for copies of it; only the base weights are not copied."""
        base = self.adapter.model
        return {
            "root": self._skeleton.copy(),
            "params": {**base.params},
            "state": self.state(),
            "trainable": from_leaves((keys, place.get().detach()) for keys, place in self._leaves.items()),
            "held": [keys for keys, place in self._leaves.items() if not place.get().requires_grad],
            "always_eval": self._always_eval,
            "mixed": self._mixed,
            "training": self.training,
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> "Self":
        copy: Self = _from_contents(type(self), self.adapter.method, self._contents())
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        method = packed(self.adapter, self.adapter.method)
        return _from_pickle, (written_class(type(self)), method, self._contents())

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self.parameters())
        return f"{type(self).__name__}({self.adapter!r}, {count:,} numbers train)"


class _TrainPart(Container):
    """The part named "train" of a module, which also has the method of that name."""

    def __init__(self, owner: Adapted, part: nn.Module) -> None:
        super().__init__()
        self._parameters, self._modules = part._parameters, part._modules
        vars(self)["_owner"] = owner  # not as a module in it

    def __call__(self, mode: bool = True) -> Adapted:
        return cast("Adapted", vars(self)["_owner"]._set_mode(mode))


def _kind(model: FunctionalModel, name: str) -> type[Container]:
    """Return the container for a leaf: a weight of the net that trains itself, or anything else."""
    owners = model.infos[name].modules if name in model.infos else ()
    return NormContainer if any(issubclass(owner, nn.LayerNorm) for owner in owners) else Container


def _made(cls: type[Adapted], adapter: Adapter, trainable: Mapping[str, Any], always_eval: Sequence[str]) -> Any:
    module = nn.Module.__new__(class_for(cls, type(adapter.model._skeleton.root), Adapted.forward))
    module._build(adapter, trainable, always_eval)
    return module


def _from_contents(cls: type[Adapted], method: Method, contents: Mapping[str, Any]) -> Any:
    model = FunctionalModel(contents["root"], contents["params"], contents["state"])
    module = _made(cls, bind(method, model), contents["trainable"], contents["always_eval"])
    for keys in contents["held"]:
        module._leaves[keys].get().requires_grad_(False)
    module._mixed = set(contents["mixed"])
    if module.training != contents["training"]:
        module._set_mode(contents["training"])
    return module


def _from_pickle(cls: type[Adapted], method: Any, contents: Mapping[str, Any]) -> Any:
    model = FunctionalModel(contents["root"], contents["params"], contents["state"])
    return _from_contents(cls, unpacked(method, model), contents)


def _chosen(where: Where | None, model: FunctionalModel) -> tuple[str, ...]:
    return () if where is None else resolve_modules(where, model, "always_eval")
