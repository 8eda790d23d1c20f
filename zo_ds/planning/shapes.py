"""What the planner knows of a model: its weights by fetch unit, and the widths that activations have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

VECTOR_BYTES = 4
"""Norm weights and biases are held in fp32 whatever the matrices are."""


_ONE_KERNEL = {"GELU", "GELUActivation", "GELUTanh", "SiLUActivation"}
"""Activation modules that allocate nothing but their result, of those that are named GELU or Activation."""


@dataclass(frozen=True)
class Unit:
    """What is fetched and released together: a decoder layer, or one module outside of the layers.

    Attributes:
        name: of the module in the model.
        parameters: names of its parameters; tied ones under their first name.
        matrix_elements, vector_elements: elements with two axes or more, and with fewer.
        trained_matrix_elements, trained_vector_elements: those of them that require a gradient.
        largest_elements: of its largest parameter.
        uses: fetches in one pass of the model: 2 for an embedding that is also the head.
        is_block: one of the repeated layers.
    """

    name: str
    parameters: tuple[str, ...]
    matrix_elements: int
    vector_elements: int
    trained_matrix_elements: int
    trained_vector_elements: int
    largest_elements: int
    uses: int = 1
    is_block: bool = False

    @property
    def elements(self) -> int:
        """All of its elements."""
        return self.matrix_elements + self.vector_elements

    def bytes(self, dtype_bytes: int) -> int:
        """Bytes of its weights.

        Args:
            dtype_bytes: of one element of a matrix.
        """
        return self.matrix_elements * dtype_bytes + self.vector_elements * VECTOR_BYTES

    def trained_bytes(self, dtype_bytes: int) -> int:
        """Bytes of its weights that a step changes."""
        return self.trained_matrix_elements * dtype_bytes + self.trained_vector_elements * VECTOR_BYTES


@dataclass(frozen=True)
class ModelShapes:
    """A model's weights and widths; made by `of`.

    Attributes:
        units: in the model's order; every parameter is in exactly one.
        order: names of units as a pass uses them; a tied embedding comes twice.
        hidden: width of the residual stream, elements.
        widest: widest activation within a layer, elements a token (the MLP's).
        wide_alive: how many of those are alive at once: 2, 3 where the MLP is gated, 4 where its activation function is
            made of several operations.
        narrow: elements a token that a layer's other products give together (queries, keys, values, attention's own).
        tables: embeddings outside of the layers, whose results stay while the layers run.
        vocabulary: rows of the head, 0 if there is none.
        layer_products: matrix elements that every token is multiplied with, head excluded.
        trained_layer_products: those of them that are displaced.
        head_products: matrix elements of the head, which only labelled positions meet.
        head_is_trained: whether the head is displaced.
        copied_matrix_elements, copied_vector_elements: one copy of each distinct shape that the sequential check keeps.
        whole_block_elements: largest matrix that is displaced whole (GPT-2's Conv1D), 0 if all go block by block.
        unknown_elements: matrix elements of modules that the batched forward does not know and copies whole.
        buffer_bytes: of buffers, which are always on the device.
    """

    units: tuple[Unit, ...]
    order: tuple[str, ...]
    hidden: int
    widest: int
    wide_alive: int
    narrow: int
    tables: int
    vocabulary: int
    layer_products: int
    trained_layer_products: int
    head_products: int
    head_is_trained: bool
    copied_matrix_elements: int
    copied_vector_elements: int
    whole_block_elements: int
    unknown_elements: int
    buffer_bytes: int

    @staticmethod
    def of(model: nn.Module) -> ModelShapes:
        """Read a model, on any device (``meta`` too).

        Only shapes and module types are looked at. Experts of a mixture count as if every token met all of them.
        """
        return _Reader(model).read()

    @property
    def elements(self) -> int:
        """All parameters, tied ones once."""
        return sum(unit.elements for unit in self.units)

    @property
    def largest_elements(self) -> int:
        """Elements of the largest parameter."""
        return max((unit.largest_elements for unit in self.units), default=0)

    @property
    def largest_unit(self) -> Unit:
        """The unit with most elements."""
        return max(self.units, key=lambda unit: unit.elements)

    def bytes(self, dtype_bytes: int) -> int:
        """Bytes of all weights, tied ones once, buffers excluded."""
        return sum(unit.bytes(dtype_bytes) for unit in self.units)

    def trained_bytes(self, dtype_bytes: int) -> int:
        """Bytes of the weights that a step changes."""
        return sum(unit.trained_bytes(dtype_bytes) for unit in self.units)


def blocks_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The repeated layers: children of the outermost lists whose members are of one type and hold parameters."""
    return list(_blocks(model, ""))


def _blocks(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        where = f"{path}.{name}" if path else name
        members = list(child.named_children())
        alike = len({type(member) for _, member in members}) == 1
        if isinstance(child, nn.ModuleList) and alike and any(True for _ in child.parameters()):
            yield from ((f"{where}.{key}", member) for key, member in members)
        else:
            yield from _blocks(child, where)


class _Reader:
    """Walks a model once."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._owner: dict[nn.Parameter, str] = {}
        self._order: list[str] = []
        self._held: dict[str, list[nn.Parameter]] = {}
        self._blocks = dict(blocks_of(model))
        self._inside = {child for block in self._blocks.values() for child in block.modules()}

    def read(self) -> ModelShapes:
        for name, module in self._model.named_modules():
            if name in self._blocks:
                self._use(name, list(module.parameters()))
            elif module not in self._inside:
                self._use(name, list(module.parameters(recurse=False)))
        uses = Counter(self._order)
        units = tuple(self._unit(name, held, uses[name]) for name, held in self._held.items())
        matrices = [p for block in self._blocks.values() for p in block.parameters() if p.dim() >= 2]
        widths = Counter(width for p in matrices or self._names for width in p.shape[-2:])
        hidden = max(widths, key=lambda width: (widths[width], width), default=0)
        widest = max(widths, default=0)
        head = self._head()
        products = self._products(head)
        ups, narrow = self._outputs(hidden, widest)
        copies = self._copies()
        whole = [p.numel() for m in self._model.modules() if _is_transposed(m) for p in m.parameters() if p.dim() == 2]
        return ModelShapes(
            units=units,
            order=tuple(self._order),
            hidden=hidden,
            widest=widest,
            wide_alive=max(3 if ups >= 2 else 2, 4 if self._has_long_activation() else 0),
            narrow=narrow,
            tables=sum(isinstance(m, nn.Embedding) for m in self._model.modules() if m not in self._inside),
            vocabulary=0 if head is None else head.shape[0],
            layer_products=sum(p.numel() for p in products),
            trained_layer_products=sum(p.numel() for p in products if p.requires_grad),
            head_products=0 if head is None else head.numel(),
            head_is_trained=head is not None and head.requires_grad,
            copied_matrix_elements=sum(_count(shape) for shape in copies if len(shape) >= 2),
            copied_vector_elements=sum(_count(shape) for shape in copies if len(shape) < 2),
            whole_block_elements=max(whole, default=0),
            unknown_elements=sum(map(_count, self._copies(known=(nn.Linear,)))),
            buffer_bytes=sum(buffer.numel() * buffer.element_size() for buffer in self._model.buffers()),
        )

    def _use(self, name: str, held: list[nn.Parameter]) -> None:
        """A unit is used, and with it those of which it borrows tied parameters."""
        own = [p for p in dict.fromkeys(held) if p not in self._owner]
        lenders = dict.fromkeys(self._owner[p] for p in held if p in self._owner)
        self._order.extend(lenders)
        if own:
            self._owner.update(dict.fromkeys(own, name))
            self._held[name] = own
            self._order.append(name)

    def _unit(self, name: str, held: list[nn.Parameter], uses: int) -> Unit:
        def count(*, matrices: bool, trained: bool) -> int:
            return sum(p.numel() for p in held if (p.dim() >= 2) == matrices and (p.requires_grad or not trained))

        return Unit(
            name=name,
            parameters=tuple(self._names[p] for p in held),
            matrix_elements=count(matrices=True, trained=False),
            vector_elements=count(matrices=False, trained=False),
            trained_matrix_elements=count(matrices=True, trained=True),
            trained_vector_elements=count(matrices=False, trained=True),
            largest_elements=max(p.numel() for p in held),
            uses=uses,
            is_block=name in self._blocks,
        )

    def _head(self) -> nn.Parameter | None:
        """The matrix that gives logits: the last Linear outside of the layers, if it is the widest there."""
        outside = [m for m in self._model.modules() if m not in self._inside]
        linears = [m.weight for m in outside if isinstance(m, nn.Linear)]
        rows = [m.weight.shape[0] for m in outside if isinstance(m, (nn.Linear, nn.Embedding))]
        if not self._blocks or not linears or linears[-1].shape[0] < max(rows):
            return None
        return next(parameter for parameter in self._names if parameter is linears[-1])

    def _products(self, head: nn.Parameter | None) -> list[nn.Parameter]:
        tables = {p for m in self._model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        return [p for p in self._names if p.dim() >= 2 and p is not head and p not in tables]

    def _has_long_activation(self) -> bool:
        """Whether a layer's activation function holds results of its own, as transformers' NewGELU does."""
        names = {type(m).__name__ for m in self._inside if not list(m.children()) and not list(m.parameters())}
        return any(("GELU" in name or "Activation" in name) and name not in _ONE_KERNEL for name in names)

    def _outputs(self, hidden: int, widest: int) -> tuple[int, int]:
        """In one layer: how many products give the widest activation; the other outputs that come from the stream."""
        wide = narrow = 0
        for module in next(iter(self._blocks.values()), nn.Identity()).modules():
            for parameter in module.parameters(recurse=False):
                if parameter.dim() < 2:
                    continue
                fan_out, fan_in = parameter.shape[-2:][:: -1 if _is_transposed(module) else 1]
                wide += fan_out == widest
                narrow += fan_out if fan_out != widest and fan_in == hidden else 0
        return wide, narrow

    def _copies(self, known: tuple[type[nn.Module], ...] = ()) -> set[tuple[int, ...]]:
        """Distinct shapes of displaced parameters that are copied whole: not of tables that are only looked up."""
        modules = [m for m in self._model.modules() if type(m) is not nn.Embedding and not isinstance(m, known)]
        shapes = {tuple(p.shape) for m in modules for p in m.parameters(recurse=False) if p.requires_grad}
        return {shape for shape in shapes if len(shape) >= 2} if known else shapes


def _is_transposed(module: nn.Module) -> bool:
    # By name, since this layer does without transformers.
    return type(module).__name__ == "Conv1D"


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
