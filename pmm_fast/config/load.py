"""Configurations to and from plain mappings and YAML, strictly: an unknown key or a value of the wrong type is an error
that names the file, the full key, and what was expected.

Presets are the YAML files in ``presets/``.  A file may say ``extends: OTHER`` (a preset or a file beside it) and then
only what differs; lists are replaced, mappings merged.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

import yaml

from pmm_fast.config.schema import Config

PRESETS = Path(__file__).parent / "presets"
EXTENDS = "extends"

# YAML 1.1, which PyYAML follows, reads 5e-4 as a string; this is the rule of YAML 1.2
_FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$")
_TYPE_NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}


class ConfigError(ValueError):
    """An option is unknown, of the wrong type, out of range, or contradicts another; the message names it."""


# --- values -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=32)
def field_types(cls: type) -> dict[str, Any]:
    """Field names of a dataclass and their resolved type annotations, in order of declaration."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def optional_type(kind: Any) -> tuple[Any, bool]:
    """``X | None`` to ``(X, True)``, any other type to ``(type, False)``."""
    members = get_args(kind)
    if type(None) not in members:
        return kind, False
    return next(member for member in members if member is not type(None)), True


def expectation(kind: Any) -> str:
    """A type annotation in words, as error messages say it."""
    kind, optional = optional_type(kind)
    if get_origin(kind) is Literal:
        words = "one of " + ", ".join(map(str, get_args(kind)))
    elif get_origin(kind) is list:
        words = "a list, each " + expectation(get_args(kind)[0])
    elif get_origin(kind) is dict or dataclasses.is_dataclass(kind):
        words = "a mapping"
    else:
        words = _TYPE_NAMES[kind]
    return words + (" or null" if optional else "")


def _convert(value: Any, kind: Any, key: str, origin: str, base: Any) -> Any:
    """``value`` as the type ``kind``; mappings are merged onto ``base``."""
    inner, optional = optional_type(kind)
    if value is None and optional:
        return None
    if dataclasses.is_dataclass(inner):
        return _build(cast(type, inner), value, key, origin, base)
    if get_origin(inner) is list and isinstance(value, list | tuple):
        member = get_args(inner)[0]
        return [_convert(item, member, f"{key}[{i}]", origin, None) for i, item in enumerate(value)]
    if get_origin(inner) is dict and isinstance(value, Mapping):
        member, merged = get_args(inner)[1], copy.deepcopy(dict(base or {}))
        for name, item in value.items():
            merged[str(name)] = _convert(item, member, f"{key}.{name}", origin, merged.get(str(name)))
        return merged
    # `type is` and not isinstance: true is no number of iterations, and 1 is not true
    if get_origin(inner) is Literal and any(type(value) is type(item) and value == item for item in get_args(inner)):
        return value
    if inner is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if inner in (int, str, bool) and type(value) is inner:
        return value
    raise ConfigError(f"{_prefix(origin)}{key}: expected {expectation(kind)}, got {value!r}")


def _build(cls: type, mapping: Any, key: str, origin: str, base: Any) -> Any:
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{_prefix(origin)}{key or 'configuration'}: expected a mapping, got {mapping!r}")
    types = field_types(cls)
    result = copy.deepcopy(base) if base is not None else cls()
    for name, value in mapping.items():
        full = f"{key}.{name}" if key else str(name)
        if name not in types:
            raise ConfigError(f"{_prefix(origin)}unknown key {full}{_nearest_key(full, key, types)}")
        setattr(result, name, _convert(value, types[name], full, origin, getattr(result, name)))
    return result


def _prefix(origin: str) -> str:
    return f"{origin}: " if origin else ""


def _nearest_key(full: str, section: str, types: Mapping[str, Any]) -> str:
    siblings = [f"{section}.{sibling}" if section else sibling for sibling in types]
    near = nearest_key(full, [*siblings, *option_types()])
    return f"; did you mean {near}?" if near else f" (known: {', '.join(siblings)})"


def nearest_key(key: str, known: Sequence[str]) -> str | None:
    """The key that was probably meant: misspelt in its section, else in the wrong section, else anything similar.

    Args:
        key: the unknown key.
        known: full keys, dotted.
    """
    section, _, name = key.rpartition(".")
    siblings = [other for other in known if other.rpartition(".")[0] == section]
    misspelt = difflib.get_close_matches(name, [sibling.rpartition(".")[2] for sibling in siblings], n=1, cutoff=0.8)
    if misspelt:
        return f"{section}.{misspelt[0]}" if section else misspelt[0]
    misplaced = [other for other in known if other.rpartition(".")[2] == name]
    return next(iter(difflib.get_close_matches(key, misplaced or known, n=1, cutoff=0.0 if misplaced else 0.6)), None)


@lru_cache(maxsize=1)
def option_types() -> dict[str, Any]:
    """Every option by its full key (``optim.lr``, ``seed``) and its type, in order of declaration."""
    options: dict[str, Any] = {}
    for name, kind in field_types(Config).items():
        if dataclasses.is_dataclass(kind):
            options.update({f"{name}.{inner}": t for inner, t in field_types(cast(type, kind)).items()})
        else:
            options[name] = kind
    return options


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the nearest known one, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


# --- mappings -----------------------------------------------------------------------------------------------------


def from_dict(mapping: Mapping[str, Any], origin: str, base: Config | None = None) -> Config:
    """Build a configuration from nested mappings.

    Args:
        mapping: sections to fields to values, as ``to_dict`` gives them; what is missing stays as in ``base``.
        origin: where the mapping came from, for error messages; may be empty.
        base: configuration to start from, left unchanged; default: the defaults of the schema.

    Returns:
        A new configuration.  It is not validated: ``validate`` does that once everything is merged.

    Raises:
        ConfigError: an unknown key (the nearest is suggested) or a value of the wrong type.
    """
    return cast(Config, _build(Config, mapping, "", origin, base))


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as nested plain mappings, lists and scalars; a copy.  ``from_dict`` inverts it exactly."""
    return dataclasses.asdict(config)


# --- YAML ---------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML with floats as in YAML 1.2, and without repeated keys, of which PyYAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key if isinstance(key, str) else id(key_node))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Safe YAML with lists on one line, and with the loader's rule for floats, so that strings like 1e5 are quoted."""

    def represent_list_inline(self, data: list[Any]) -> yaml.Node:
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Dumper.add_representer(list, _Dumper.represent_list_inline)


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML, every option with its value; reading it back gives an equal configuration."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except yaml.MarkedYAMLError as error:
        where = f"{path}, line {error.problem_mark.line + 1}" if error.problem_mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, got a {type(content).__name__}")
    return content


def load_file(path: str | Path) -> Config:
    """Read a YAML file and, before it, what it extends.

    Args:
        path: the file.  ``extends`` in it names a preset, or a YAML file relative to the folder of this one.

    Returns:
        The configuration, not validated.

    Raises:
        ConfigError: the file cannot be read, is no YAML, extends itself, or holds an unknown key or a wrong type.
    """
    return _load(Path(path), ())


def _load(path: Path, below: tuple[Path, ...]) -> Config:
    path = path.resolve()
    if path in below:
        chain = " -> ".join(p.name for p in (*below, path))
        raise ConfigError(f"{path.name}: extends itself: {chain}")
    mapping = _read(path)
    parent = mapping.pop(EXTENDS, None)
    base = None
    if parent is not None:
        if not isinstance(parent, str):
            raise ConfigError(f"{path.name}: {EXTENDS}: expected a preset or a file, got {parent!r}")
        try:
            base = _load(_locate(parent, path.parent), (*below, path))
        except ConfigError as error:
            raise ConfigError(f"{path.name}, {EXTENDS}: {error}") from error
    return from_dict(mapping, path.name, base)


def _locate(name: str, folder: Path) -> Path:
    """The file of a preset or of a path (relative to ``folder``)."""
    if name in preset_names():
        return PRESETS / f"{name}.yaml"
    path = folder / Path(name).expanduser()
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml"):
        raise ConfigError(f"no such file: {path}")
    names = preset_names()
    raise ConfigError(f"unknown preset {name!r}{suggest(name, names)} (presets: {', '.join(names)}; or a YAML file)")


def preset_names() -> list[str]:
    """Names of the presets that come with the package, sorted."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_preset(name: str) -> Config:
    """The preset called ``name``.

    Raises:
        ConfigError: there is none; the message suggests the nearest and lists all.
    """
    names = preset_names()
    if name not in names:
        raise ConfigError(f"unknown preset {name!r}{suggest(name, names)} (presets: {', '.join(names)})")
    return load_file(PRESETS / f"{name}.yaml")


def load_config(name_or_file: str) -> Config:
    """A preset by name or a YAML file by path, as ``--config`` takes them.

    Raises:
        ConfigError: neither exists, or the file is wrong.
    """
    return load_file(_locate(name_or_file, Path()))
