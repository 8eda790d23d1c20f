"""Forward-only (zeroth-order) fine-tuning of language models as a DeepSpeed engine.

>>> engine = zo_ds.initialize(model=model, config=config)  # doctest: +SKIP
>>> out = engine.step(batch)  # doctest: +SKIP
>>> engine.save_pretrained("tuned")  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zo_ds.version import VERSION

if TYPE_CHECKING:
    from zo_ds.config.schema import ZerothOrderConfig, ZOConfig
    from zo_ds.engine.base import StepOutput
    from zo_ds.engine.engine import ZOEngine
    from zo_ds.engine.initialize import initialize
    from zo_ds.errors import ZODSError
    from zo_ds.tasks.reward import reward

__version__ = VERSION

_HOMES = {
    "initialize": "zo_ds.engine.initialize",
    "StepOutput": "zo_ds.engine.base",
    "ZOEngine": "zo_ds.engine.engine",
    "ZOConfig": "zo_ds.config.schema",
    "ZerothOrderConfig": "zo_ds.config.schema",
    "ZODSError": "zo_ds.errors",
    "reward": "zo_ds.tasks.reward",
}

__all__ = [
    "StepOutput",
    "ZOConfig",
    "ZODSError",
    "ZOEngine",
    "ZerothOrderConfig",
    "__version__",
    "initialize",
    "reward",
]


def __getattr__(name: str) -> Any:
    # Importing torch and DeepSpeed takes seconds; `zo_ds --help` should not.
    if name not in _HOMES:
        raise AttributeError(f"module 'zo_ds' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
