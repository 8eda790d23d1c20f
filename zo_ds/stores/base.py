"""The protocol of a weight store, and what every store does alike."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor, nn

from zo_ds.errors import ConfigError
from zo_ds.maths.directions import NoiseStructure, ParamInfo
from zo_ds.ops import api as ops
from zo_ds.ops.plan import Plan


def trainable_parameters(model: nn.Module) -> dict[nn.Parameter, ParamInfo]:
    """The parameters a run changes, in the model's order; tied ones once, under their first name.

    Trainable vectors (norm weights, biases) held in 16 bits are turned to fp32 in place: at their size an update
    would be lost in rounding, and they are less than a thousandth of a model.

    Raises:
        ConfigError: nothing requires a gradient, a parameter is not a floating-point tensor, or two names give the
            same parameter id.
    """
    infos: dict[nn.Parameter, ParamInfo] = {}
    ids: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ConfigError(
                f"cannot train a parameter of dtype {parameter.dtype}",
                where=name,
                remedy="load the model in float32, bfloat16 or float16, or freeze it (requires_grad_(False))",
            )
        if parameter.dim() < 2 and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
        info = ParamInfo(name, tuple(parameter.shape), parameter.dtype)
        if info.param_id in ids:
            raise ConfigError(
                f"parameters '{ids[info.param_id]}' and '{name}' share the noise id {info.param_id}",
                where=name,
                why="the id is 32 bits of a hash of the name, and two directions must never be the same",
                remedy="rename one of the modules",
            )
        ids[info.param_id] = name
        infos[parameter] = info
    if not infos:
        raise ConfigError(
            "the model has no trainable parameters", where="model", remedy="call requires_grad_(True) on some"
        )
    return infos


class WeightStore(ABC):
    """Holds theta, or this rank's shard of it.

    Args:
        module: the model.
        parameters: what is trained, see `trainable_parameters`.
        structure: how directions are built.
    """

    def __init__(
        self, module: nn.Module, parameters: Mapping[nn.Parameter, ParamInfo], structure: NoiseStructure
    ) -> None:
        self.module = module
        self.parameters = dict(parameters)
        self.structure = structure

    @abstractmethod
    def local_shard(self, parameter: nn.Parameter) -> AbstractContextManager[tuple[int, Tensor]]:
        """The part of a parameter that this rank holds: (index of its first element, flat tensor to be written)."""

    @abstractmethod
    def whole(self, parameter: nn.Parameter) -> AbstractContextManager[Tensor]:
        """The whole parameter, to be read only."""

    def gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """Within this context parameters stay whole in their modules, however often those run."""
        return nullcontext()

    def apply(self, plan: Plan, structure: NoiseStructure | None = None) -> None:
        """Apply updates to all that this rank holds, in one pass however many they are.

        Args:
            plan: the updates.
            structure: of their directions, if it is not the store's own.
        """
        with ExitStack() as held:
            shards = [(info, *held.enter_context(self.local_shard(p))) for p, info in self.parameters.items()]
            sites = [info.site(structure or self.structure, start) for info, start, _ in shards]
            ops.apply_([flat for _, _, flat in shards], sites, plan)

    def state_hash(self) -> int:
        """The part of this rank in the hash of the trained weights, see `zo_ds.maths.hashing`."""
        total = 0
        for parameter, info in self.parameters.items():
            with self.local_shard(parameter) as (start, flat):
                total += ops.state_hash(flat, info.site(self.structure, start))
        return total & 0xFFFFFFFFFFFFFFFF

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite trainable parameters by name.

        Args:
            tensors: whole parameters; names that are not trained are ignored.

        Raises:
            KeyError: a trained parameter is missing; nothing was written.
            ValueError: one has another shape; nothing was written.
        """
        for info in self.parameters.values():
            if tuple(tensors[info.name].shape) != info.shape:
                raise ValueError(f"'{info.name}' has shape {tuple(tensors[info.name].shape)}, expected {info.shape}")
        for parameter, info in self.parameters.items():
            with self.local_shard(parameter) as (start, flat):
                flat.copy_(tensors[info.name].view(-1).narrow(0, start, flat.numel()))

    @abstractmethod
    def view(self, parameter: nn.Parameter) -> Tensor:
        """The whole parameter where it lies, without a copy: nothing but `apply` and `load` changes what it shows."""

    def views(self) -> list[tuple[str, Tensor]]:
        """Every entry of the model's state dict, frozen ones and buffers included; tied weights once, see `view`.

        To be called between forwards, which show displaced copies in the module; the views themselves stay right.
        """
        first = {parameter: name for name, parameter in self.module.named_parameters()}
        entries: list[tuple[str, Tensor]] = []
        for name, value in self.module.state_dict(keep_vars=True).items():
            if not isinstance(value, nn.Parameter):
                entries.append((name, value.detach()))
            elif first.get(value, name) == name:
                entries.append((name, self.view(value)))
        return entries

    def digest(self) -> str:
        """SHA-256 of the trained weights, see `weights_sha256`."""
        return weights_sha256(self._trained())

    def _trained(self) -> Iterator[tuple[str, Tensor]]:
        for parameter, info in self.parameters.items():
            with self.whole(parameter) as tensor:
                yield info.name, tensor


def weights_sha256(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and little-endian bytes, in the order given.

    Args:
        tensors: (name, tensor) pairs; a run's weights come in the model's parameter order.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
