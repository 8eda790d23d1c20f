"""What `zo_ds doctor` tells: the machine, versions, and which compiled ops are active and why."""

from __future__ import annotations

import os
import shutil
from typing import Any

from zo_ds.fetch import cache_dir
from zo_ds.trainer.environment import GIB, describe, op_reports, use_threads

_LEFT_OUT = ("ranks", "command", "ops")


def examine() -> dict[str, Any]:
    """All that is known, as JSON takes it."""
    tree = describe(world_size=1, threads=use_threads("auto", 1))
    cache = cache_dir()
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    return {
        **{key: value for key, value in tree.items() if key not in _LEFT_OUT},
        "cache": str(cache),
        "cache_writable": os.access(existing, os.W_OK),
        "cache_free_gib": round(shutil.disk_usage(existing).free / GIB, 1),
        "ops": [{"name": op.name, "active": op.active, "why": op.why} for op in op_reports()],
    }


def as_text(tree: dict[str, Any]) -> str:
    """The same for people."""
    lines = [f"{key:<18}{value}" for key, value in tree.items() if not isinstance(value, dict | list)]
    lines += [f"  {name:<16}{version or 'not installed'}" for name, version in tree["packages"].items()]
    lines += ["", f"{'op library':<18}{'active':<18}why"]
    lines += [f"{op['name']:<18}{op['active']:<18}{op['why']}" for op in tree["ops"]]
    return "\n".join(lines)
