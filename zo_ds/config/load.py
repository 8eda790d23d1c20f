"""Read a recipe: YAML, then `key=value` overrides, then validation that names the key, the value and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from zo_ds.config.schema import ZOConfig
from zo_ds.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)


def load_config(path: Path, overrides: Sequence[str] = ()) -> ZOConfig:
    """The recipe in a YAML file with overrides applied.

    Args:
        path: YAML file.
        overrides: ``dotted.key=value``; the value is read as YAML.

    Raises:
        ConfigError: the file is missing or not a mapping, an override is malformed, or a key or value is refused.
    """
    tree = read_yaml(path)
    for item in overrides:
        apply_override(tree, item)
    config = validate(ZOConfig, tree, where=str(path))
    if isinstance(config.deepspeed, str):
        # A relative path means the same wherever the command is started: beside the recipe.
        beside = path.parent / config.deepspeed
        config = config.model_copy(update={"deepspeed": str(beside if beside.exists() else config.deepspeed)})
    return config


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML (or JSON) file.

    Raises:
        ConfigError: the file is missing, unreadable, or holds something else than a mapping.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot read the configuration: {error.strerror}",
            where=str(path),
            remedy="give the path of a YAML recipe, for example configs/quickstart.yaml",
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(
            f"not valid YAML: {getattr(error, 'problem', error)}", where=where, remedy="correct that line"
        ) from error
    if not isinstance(tree, dict):
        raise ConfigError(
            "a configuration is a mapping of sections", where=str(path), why=f"found {type(tree).__name__}"
        )
    return tree


def apply_override(tree: dict[str, Any], item: str) -> None:
    """Set one ``dotted.key=value`` in place.

    Raises:
        ConfigError: no ``=``, an empty key, a value that is not YAML, or a key below something that is no section.
    """
    key, sign, text = item.partition("=")
    parts = key.split(".")
    if not sign or not all(parts):
        raise ConfigError(
            f"'{item}' is not an override", where="command line", remedy="write key=value, e.g. training.steps=100"
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of '{key}' is not valid YAML: {text}", where="command line") from error
    node = tree
    for depth, part in enumerate(parts[:-1]):
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"'{'.'.join(parts[: depth + 1])}' is a value, not a section", where=item)
        node = child
    node[parts[-1]] = value


def validate(model: type[Model], tree: Mapping[str, Any], *, where: str) -> Model:
    """Build a section from plain data.

    Args:
        model: the section's class.
        tree: plain data.
        where: file or caller, named in messages.

    Raises:
        ConfigError: one message for all that is wrong; an unknown key comes with the nearest known one.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        problems = [_problem(model, item) for item in error.errors()]
    raise ConfigError(
        "the configuration is refused:\n" + "\n".join(f"  - {line}" for line in problems),
        where=where,
        remedy="correct the keys above; docs/configuration.md lists all of them",
    )


def _problem(model: type[BaseModel], item: Any) -> str:
    path = _path(model, item["loc"])
    dotted = ".".join(path) or "(whole section)"
    if item["type"] == "extra_forbidden":
        return f"unknown key '{dotted}'{_suggestion(model, path)}"
    if item["type"] == "missing":
        return f"'{dotted}' is missing"
    message = str(item["msg"]).removeprefix("Value error, ")
    shown = "" if isinstance(item["input"], (dict, BaseModel)) else f" (got {item['input']!r})"
    return f"'{dotted}': {message}{shown}"


def _path(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """The keys of a location; for a value of several types pydantic adds which one it tried."""
    path: list[str] = []
    section: type[BaseModel] | None = model
    for part in location:
        if section is not None or isinstance(part, int):
            path.append(str(part))
        section = _section(section, str(part)) if section is not None else None
    return path


def _section(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The section that a key of a section stands for, None if it is a value."""
    field = model.model_fields.get(name)
    kinds = () if field is None else (field.annotation, *get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _suggestion(model: type[BaseModel], path: Sequence[str]) -> str:
    known = all_keys(model)
    dotted = ".".join(path)
    # The right name in the wrong section is as common as a misspelling.
    near = [key for key in known if key.rsplit(".", 1)[-1] == path[-1]][:1]
    near = near or difflib.get_close_matches(dotted, known, n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


def all_keys(model: type[BaseModel]) -> list[str]:
    """Every dotted key of a section and the sections below it."""
    keys: list[str] = []
    for name in model.model_fields:
        keys.append(name)
        section = _section(model, name)
        if section is not None:
            keys += [f"{name}.{key}" for key in all_keys(section)]
    return keys
