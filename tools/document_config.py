"""Write docs/configuration.md from the configuration's own descriptions: python tools/document_config.py."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from zo_ds.config.schema import ZOConfig

TARGET = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
_HEAD = """\
# Configuration

A recipe is a YAML file with the keys below; `key=value` arguments override it (`zeroth_order.lr=2e-3`). Unknown keys
are refused with the nearest known one. What was used is written to `resolved.yaml` in the run directory, which is a
recipe itself. In a DeepSpeed JSON for `zo_ds.initialize` the block `zeroth_order` takes the keys of that section.

This page is written by `python tools/document_config.py`; a test compares it with the code.
"""
_TAIL = """
## deepspeed

A path (relative to the recipe) or the JSON inline. ZeRO stage 0 keeps whole weights on every rank; stage 3 shards or,
with `offload_param: {"device": "cpu"}`, keeps them in host memory. Stages 1 and 2 are refused: they shard gradients and
optimizer states, and there are none. `optimizer`, `scheduler`, `gradient_clipping` are refused for the same reason.
`"auto"` is resolved from the recipe; one that nobody can resolve is an error, since DeepSpeed would drop it silently.
`bf16` and `fp16` blocks choose the dtype of the matrices when `zo_ds.initialize` is given the JSON; in a recipe
`model.dtype` does, and a contradiction is an error. DeepSpeed itself never sees them: it would also cast the vectors.
"""


def page() -> str:
    """The whole page."""
    return _HEAD + "".join(_section(name, model) for name, model in _sections()) + _TAIL


def _sections() -> list[tuple[str, type[BaseModel]]]:
    sections: list[tuple[str, type[BaseModel]]] = [("", ZOConfig)]
    for name, field in ZOConfig.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            sections.append((name, field.annotation))
    return sections


def _section(name: str, model: type[BaseModel]) -> str:
    rows = [
        f"| `{key}` | {_kind(field.annotation)} | {_default(field)} | {' '.join((field.description or '').split())} |"
        for key, field in model.model_fields.items()
        if field.description
    ]
    head = f"\n## {name or 'Top level'}\n\n{(model.__doc__ or '').splitlines()[0]}\n\n"
    return head + "| key | type | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"


def _kind(kind: Any) -> str:
    origin = get_origin(kind)
    if origin is Annotated:
        return _kind(get_args(kind)[0])
    if origin is Literal:
        return ", ".join(map(str, get_args(kind)))
    if origin in (Union, UnionType):
        return " or ".join(_kind(part) for part in get_args(kind) if part is not type(None))
    if origin is tuple:
        return "list of " + _kind(get_args(kind)[0])
    if origin is dict:
        return "mapping"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ", ".join(str(member.value) for member in kind)
    return str(getattr(kind, "__name__", kind))


def _default(field: Any) -> str:
    if field.default_factory is not None:
        return "empty"
    if field.default is PydanticUndefined:
        return "required"
    value = field.default.value if isinstance(field.default, Enum) else field.default
    return "none" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
