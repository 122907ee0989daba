"""A module as a pure function of its weights."""

import copy
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import optree
import torch
from torch import Tensor, nn

from peft_func.errors import NameMismatchError, OptionError
from peft_func.functional.attention import attention_in_transforms
from peft_func.functional.checks import check_fit, name_difference
from peft_func.functional.grouped import batch_second, call_routed, groups_among, is_mapped, mixing_norm
from peft_func.functional.refuse import check_module
from peft_func.functional.skeleton import Skeleton, structural_copy
from peft_func.functional.surround import Hosts, fused_layers, surround, warn_of_unused
from peft_func.trees.select import Info
from peft_func.weights.carrier import Carrier, carry, shells_need_grad
from peft_func.weights.chunks import form
from peft_func.weights.eager import in_vmap
from peft_func.weights.layout import Layout, layout_of
from peft_func.weights.matrix import Dense
from peft_func.weights.merge import arounds_of, refuse_arounds
from peft_func.weights.operator import Operator


def functionalize(net: nn.Module) -> "FunctionalModel":
    """Turn a module into a pure callable `model(weights, *args, **kwargs)`.

    The module is copied in structure; its tensors are shared, never written, and it is never used again.

    Args:
        net: any module whose forward is Python: transformers, torchvision, timm, your own. Modes (train or eval, for
            each of its modules) are kept as they are.

    Raises:
        ModuleRefusedError: scripted, parametrized, lazy or data-parallel modules.

    Example:
        >>> import torch, peft_func as pf
        >>> net = torch.nn.Linear(4, 3)
        >>> model, x = pf.functionalize(net), torch.ones(2, 4)
        >>> torch.equal(model(model.params, x), net(x))
        True
    """
    check_module(net)
    params = {name: param.detach() for name, param in net.named_parameters()}
    state = {name: buffer.detach() for name, buffer in net.named_buffers()}
    return FunctionalModel(structural_copy(net), params, state)


class FunctionalModel:
    """A pure function of weights, made by `functionalize`.

    Calls are thread-safe, composable with `torch.func` and `torch.compile`, and leave no trace: buffers are written on
    copies that are dropped, or returned by `with_state`.

    Attributes:
        params: the weights by name, tied ones once; they share storage with the module's.
        state: the buffers by name, persistent or not.
        ties: `{alias: canonical name}` for every further name of a parameter.
        infos: what selectors see of each parameter.
        layouts: how each parameter is stored.
        mixing_norm: the path of a module that normalises over the batch it meets (BatchNorm in train mode), or None.
        batch_second: the path of a module whose activations have the batch on their second axis, or None.
        trains: whether any of its modules is in train mode.
        weight_shapes: those of all parameters, without scalars.
        table_shapes: those of the parameters and buffers that the model may use as activations (queries, positions).
        sights: the kinds of calls that have shown the batch to be the leading axis; see `call_routed`.
        hosts: where add-ins may be; shared with the other callables of the module.
    """

    def __init__(
        self,
        root: nn.Module,
        params: dict[str, Tensor],
        state: dict[str, Tensor],
        entry: str = "forward",
        hosts: Hosts | None = None,
    ) -> None:
        self._skeleton = Skeleton(root)
        self._entry = entry
        self.hosts = Hosts() if hosts is None else hosts
        self._traced = self.hosts.entry(root, entry)
        self.sights: set[Hashable] = set()
        self.params = params
        self.state = state
        self._state_names = frozenset(state)
        every = dict(root.named_parameters(remove_duplicate=False))
        canonical = {id(tensor): name for name, tensor in root.named_parameters()}
        self.ties = {name: canonical[id(tensor)] for name, tensor in every.items() if name not in params}
        self.infos = {name: self._info(name) for name in params}
        self.layouts: dict[str, Layout] = {name: layout_of(info) for name, info in self.infos.items()}
        self._encoders = [path for path, part in root.named_modules() if isinstance(part, nn.TransformerEncoder)]
        self._fused = fused_layers(root)
        self.trains = any(module.training for module in root.modules())
        self.mixing_norm, self.batch_second = mixing_norm(root), batch_second(root)
        self._training = {name: self._owner(name).training for name in params}
        self._renormed = [
            name
            for name in params
            if any(
                getattr(self._owner(path), "max_norm", None) is not None for path in (name, *self.infos[name].aliases)
            )
        ]

        self.weight_shapes, self.table_shapes = _shapes(params.values()), _shapes((*self._loose(), *state.values()))
        self._padded = [name for name in params if name not in self._renormed and self._pads(name)]

    def __call__(self, weights: Mapping[str, Tensor | Operator], *args: Any, **kwargs: Any) -> Any:
        """Call the module with these weights; its buffers are read from `state`, and what it writes to them is dropped.

        Args:
            weights: `model.params`, what `adapter.apply` returned, or any mapping with exactly the names of `params`.
            *args: what the module's forward takes.
            **kwargs: likewise.

        Raises:
            NameMismatchError: a name is missing or unknown.
            TreeError: a weight has another shape, or a dtype or device that does not fit the others.
        """
        groups = groups_among(weights)
        if groups is None:
            return self.with_state(weights, self.state, *args, **kwargs)[0]
        return call_routed(self, weights, groups, args, kwargs)

    def with_state(
        self, weights: Mapping[str, Tensor | Operator], state: Mapping[str, Tensor], *args: Any, **kwargs: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        """Call the module with these weights and buffers; return its output and the new buffers.

        Args:
            weights: as in a call.
            state: the buffers, with exactly the names of `model.state`; they are read, never written.
            *args: what the module's forward takes.
            **kwargs: likewise.

        Returns:
            `(output, new state)`; in train mode, BatchNorm's new running statistics are in the second.

        Example:
            >>> import torch, peft_func as pf
            >>> model = pf.functionalize(torch.nn.BatchNorm1d(3)).train()
            >>> y, state = model.with_state(model.params, model.state, torch.randn(8, 3))
            >>> int(model.state["num_batches_tracked"]), int(state["num_batches_tracked"])
            (0, 1)
        """
        bound, arounds = self._bind(weights), arounds_of(weights)
        if state.keys() != self._state_names:  # a compiled call would tell self.state from other states
            raise NameMismatchError(name_difference("state", state, self.state))
        buffers = {name: tensor.clone() for name, tensor in state.items()}
        if buffers and self.trains and in_vmap():
            given = (tensor for name, tensor in bound.items() if tensor is not self.params[name])
            buffers = _mapped_like((*given, *args, *kwargs.values()), buffers)
        if torch.compiler.is_compiling():
            # Dynamo follows functional_call, but not a module that is made inside the graph; what it traces runs
            # without the skeleton, so the swapping that functional_call does is never seen by another thread.
            every = {"root." + name: tensor for name, tensor in {**bound, **buffers}.items()}
            output = torch.func.functional_call(self._traced, every, (arounds, *args), kwargs, strict=True)
            return _without_carriers(output), {name: every["root." + name] for name in buffers}
        clone = self._skeleton.clone(bound, buffers)
        if self._encoders and any(isinstance(tensor, Carrier) for tensor in bound.values()):
            # TransformerEncoder asks its first layer only before it makes nested tensors, which a structured weight in
            # a later one cannot take.
            for path in self._encoders:
                vars(clone.get_submodule(path))["use_nested_tensor"] = False
        installed = surround(clone, arounds, self._fused) if arounds else ()
        with attention_in_transforms():
            call = clone if self._entry == "forward" else getattr(clone, self._entry)
            output = call(*args, **kwargs)
        warn_of_unused(installed)
        return _without_carriers(output), dict(clone.named_buffers()) if buffers else {}

    def method(self, name: str) -> "FunctionalModel":
        """Return the same pure callable for another method of the module, such as `"generate"`.

        Raises:
            OptionError: the module has no such method.
        """
        if not callable(getattr(self._skeleton.root, name, None)):
            raise OptionError(f"{type(self._skeleton.root).__name__} has no method {name!r}")
        twin = copy.copy(self)
        twin._entry, twin._traced, twin.sights = name, self.hosts.entry(self._skeleton.root, name), set()
        return twin

    def train(self, mode: bool = True) -> "FunctionalModel":
        """Return a new callable in train mode (or eval mode), over the same tensors."""
        root = self._skeleton.copy().train(mode)
        return FunctionalModel(root, self.params, self.state, self._entry, self.hosts)

    def eval(self) -> "FunctionalModel":
        """Return a new callable in eval mode, over the same tensors."""
        return self.train(False)

    def to(self, *args: Any, **kwargs: Any) -> "FunctionalModel":
        """Return a new callable whose tensors are moved or cast as `Tensor.to` does; only floating ones are cast."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None, non_blocking)

        params = {name: move(tensor) for name, tensor in self.params.items()}
        state = {name: move(tensor) for name, tensor in self.state.items()}
        return FunctionalModel(self._skeleton.copy(), params, state, self._entry, self.hosts)

    def state_dict(
        self, weights: Mapping[str, Tensor | Operator], state: Mapping[str, Tensor] | None = None
    ) -> dict[str, Any]:
        """Return a plain state dict, with every name that the module's own has (ties, persistent buffers, extra state).

        Args:
            weights: as in a call.
            state: the buffers; those of the model by default.

        Returns:
            A dict for `net.load_state_dict(sd, strict=True)`, of plain tensors.

        Raises:
            AddinError: there are add-ins, which no state dict of the module can hold.
        """
        refuse_arounds(weights)
        state = self.state if state is None else state
        params: dict[str, Tensor | Operator] = {**weights}
        self._check_names(weights)
        formed: dict[str, Tensor] = {}
        result: dict[str, Any] = {}
        for name, value in self._skeleton.root.state_dict().items():
            source = self.ties.get(name, name)
            if source in params:
                if source not in formed:
                    weight = params[source]
                    formed[source] = form(weight) if isinstance(weight, Operator) else weight
                result[name] = formed[source]
            else:
                result[name] = state[self._buffer_names.get(name, name)] if name in self._buffer_names else value
        return result

    @property
    def _buffer_names(self) -> dict[str, str]:
        root = self._skeleton.root
        canonical = {id(tensor): name for name, tensor in root.named_buffers()}
        return {name: canonical[id(tensor)] for name, tensor in root.named_buffers(remove_duplicate=False)}

    def _owner(self, name: str) -> nn.Module:
        return self._skeleton.root.get_submodule(name.rpartition(".")[0])

    def _pads(self, name: str) -> bool:
        owner = self._owner(name)
        return isinstance(owner, nn.Embedding) and owner.padding_idx is not None and not owner.scale_grad_by_freq

    def _loose(self) -> Iterable[Tensor]:
        # Modules of torch use their own matrices as matrices, but for an embedding's, which a model may read as it is.
        for name, tensor in self.params.items():
            kinds = self.infos[name].modules
            if any(kind is nn.Embedding or not kind.__module__.startswith("torch.nn.") for kind in kinds):
                yield tensor

    def _info(self, name: str) -> Info:
        aliases = tuple(alias for alias, target in self.ties.items() if target == name)
        owners = dict.fromkeys(type(self._owner(path)) for path in (name, *aliases))
        return Info(name, tuple(self.params[name].shape), self.params[name].dtype, tuple(owners), aliases)

    def _check_names(self, weights: Mapping[str, Any]) -> None:
        if weights.keys() != self.params.keys():
            raise NameMismatchError(name_difference("weights", weights, self.params, self.ties))

    def _bind(self, weights: Mapping[str, Tensor | Operator]) -> dict[str, Tensor]:
        """Return tensors for every parameter, carriers for operators, after checking all of them."""
        self._check_names(weights)
        bound: dict[str, Tensor] = {}
        kinds: dict[Any, tuple[str, Any]] = {}
        need_grad = shells_need_grad()
        for name, own in self.params.items():
            weight = weights[name]
            check_fit(name, weight, own, kinds)
            if isinstance(weight, Operator):
                if not self._training[name] and weight.has_dropout:
                    weight = weight.replace(weight.matrix.deterministic())
                bound[name] = carry(weight, need_grad)
            else:
                bound[name] = weight
        for name in self._renormed:
            bound[name] = bound[name].clone()  # Embedding(max_norm=...) scales rows of its weight in place
        for name in self._padded:
            if not isinstance(bound[name], Carrier) and is_mapped(bound[name]):
                # Under vmap, torch's own lookup gives the row of the padding a gradient; the rule for operators
                # does not.
                layout, dtype = self.layouts[name], bound[name].dtype
                bound[name] = carry(Operator(Dense(layout.to_matrix(bound[name])), layout, dtype, name))
        return bound

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._traced = self.hosts.entry(self._skeleton.root, self._entry)

    def __repr__(self) -> str:
        count = sum(tensor.numel() for tensor in self.params.values())
        return f"FunctionalModel({type(self._skeleton.root).__name__}.{self._entry}, {count:,} parameters)"


def _mapped_like(values: Iterable[Any], buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make every buffer a separate one for each member that a `vmap` maps any of the values over.

    BatchNorm in train mode writes statistics of mapped activations into its buffers, which vmap allows only if they
    are mapped themselves.
    """
    zero = torch.zeros(())
    for value in values:
        for tensor in value.op.tensors() if isinstance(value, Carrier) else (value,):
            if isinstance(tensor, Tensor):
                # new_zeros has no graph and no values, but is mapped wherever its tensor is.
                zero = zero + tensor.new_zeros((), dtype=zero.dtype, device="cpu")
    return {name: buffer + zero.to(buffer.device, buffer.dtype) for name, buffer in buffers.items()}


def _shapes(tensors: Iterable[Tensor]) -> frozenset[tuple[int, ...]]:
    return frozenset(tuple(tensor.shape) for tensor in tensors if tensor.dim())


def _without_carriers(output: Any) -> Any:
    """Form the weights that a module returned as they are."""
    if isinstance(output, Tensor) and not isinstance(output, Carrier):
        return output
    return optree.tree_map(lambda leaf: leaf.op.materialise() if isinstance(leaf, Carrier) else leaf, output)
