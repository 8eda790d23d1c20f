"""The protocol of a weight store, and what every store does alike."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from zo_ds.errors import ConfigError
from zo_ds.maths.directions import NoiseStructure, ParamInfo
from zo_ds.maths.names import canonical_names
from zo_ds.ops import api as ops
from zo_ds.ops.plan import Plan
from zo_ds.tensor_files import Source


@dataclass(frozen=True)
class Stored:
    """A tensor that is not whole in this process's memory.

    Attributes:
        shape, dtype: of the tensor.
        read: gives a copy of it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass
class Traffic:
    """Bytes of weights that this rank has moved since it began.

    Attributes:
        link: from host memory to the device.
        gathered: from the other ranks of its shard group.
        disk_read: from the disk.
        disk_written: to the disk.
    """

    link: int = 0
    gathered: int = 0
    disk_read: int = 0
    disk_written: int = 0

    def copy(self) -> Traffic:
        """These numbers, which do not grow."""
        return replace(self)

    def since(self, before: Traffic) -> Traffic:
        """What has been moved since then."""
        return Traffic(*[getattr(self, entry.name) - getattr(before, entry.name) for entry in fields(self)])


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
    for parameter, name in canonical_names(model).items():
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


def materialise(model: nn.Module, make: Callable[[Sequence[int], torch.dtype], Tensor]) -> None:
    """Put other parameters in place of those on the meta device, ties kept.

    Args:
        model: the model.
        make: gives the tensor for a shape and dtype.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if parameter not in made:
                # Trained vectors are held in fp32, see `trainable_parameters`.
                wide = parameter.requires_grad and parameter.dim() < 2 and parameter.is_floating_point()
                data = make(parameter.shape, torch.float32 if wide else parameter.dtype)
                made[parameter] = nn.Parameter(data, requires_grad=parameter.requires_grad)
            module._parameters[key] = made[parameter]


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
        self.traffic = Traffic()

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
            if not self.counts(parameter):
                continue
            with self.local_shard(parameter) as (start, flat):
                total += ops.state_hash(flat, info.site(self.structure, start))
        return total & 0xFFFFFFFFFFFFFFFF

    def fill(self, source: Source, *, frozen: bool = True) -> None:
        """Overwrite parameters by what a source gives for this rank's part of each, see `canonical_names`.

        Args:
            source: of the weights.
            frozen: those too that are not trained, and so are the base model's for good.
        """
        for parameter, name in canonical_names(self.module).items():
            if not frozen and parameter not in self.parameters:
                continue
            with self.local_shard(parameter) as (start, flat):
                if flat.numel():
                    source(name, start, flat)

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

    @property
    def deferred_seconds(self) -> float:
        """Time spent so far on updates that `apply` did not apply at once."""
        return 0.0

    @property
    def collective(self) -> bool:
        """Whether a whole parameter can only be read if all ranks of the replica read it; see `take_part`."""
        return False

    def counts(self, parameter: nn.Parameter) -> bool:
        """Whether this rank, of those that hold the same elements of a parameter, has them in its `state_hash`."""
        return True

    def held(self, parameter: nn.Parameter) -> tuple[int, int]:
        """What `local_shard` would give: (index of the first element, number of elements)."""
        return 0, self.parameters[parameter].numel

    @abstractmethod
    def view(self, parameter: nn.Parameter) -> Tensor | Stored:
        """The whole parameter where it lies, without a copy: nothing but `apply` and `load` changes what it shows."""

    @property
    def trained(self) -> int:
        """Elements that are trained."""
        return sum(info.numel for info in self.parameters.values())

    @property
    def total(self) -> int:
        """Elements of the model."""
        # Under ZeRO-3 a parameter that is not gathered is empty.
        return sum(int(getattr(p, "ds_numel", p.numel())) for p in self.module.parameters())

    @property
    def partial(self) -> bool:
        """Whether some parameters are frozen: a snapshot does without them, since they are the base model's."""
        return len(self.parameters) < sum(1 for _ in self.module.parameters())

    def views(self, *, frozen: bool = True) -> list[tuple[str, Tensor | Stored]]:
        """Every entry of the model's state dict, buffers included; tied weights once, see `view`.

        To be called between forwards, which show displaced copies in the module; the views themselves stay right.

        Args:
            frozen: False gives the trained parameters alone, see `canonical_names`.
        """
        if not frozen:
            return [(info.name, self.view(parameter)) for parameter, info in self.parameters.items()]
        first = {parameter: name for name, parameter in self.module.named_parameters()}
        entries: list[tuple[str, Tensor | Stored]] = []
        for name, value in self.module.state_dict(keep_vars=True).items():
            if not isinstance(value, nn.Parameter):
                entries.append((name, value.detach()))
            elif first.get(value, name) == name:
                entries.append((self.parameters[value].name if value in self.parameters else name, self.view(value)))
        return entries

    def take_part(self, *, frozen: bool = True) -> None:
        """Read every entry of `views` and let go of it, so that another rank of the replica can have them all."""
        for _, held in self.views(frozen=frozen):
            if isinstance(held, Stored):
                held.read()

    def close(self) -> None:  # noqa: B027  # most stores have nothing to let go of
        """Let go of files and of weights in host memory that are not the module's own; both are gone then."""

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
