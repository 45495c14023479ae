"""YAML with the place of every key: read, override, locate, and write back.

Values follow YAML 1.2's core schema, not PyYAML's 1.1: `off` and `2026-01-01` are text, `1e-3` is a number.
Aliases are refused (a recipe never needs one, and they can grow without bound), and so is a key given twice.
Only plain values are built: text, whole numbers, numbers, true/false, null, lists, mappings with text keys.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.parser import ParserError
from yaml.scanner import ScannerError

from ..errors import UserError

Path = tuple[str | int, ...]

_PREFIX = "tag:yaml.org,2002:"
_CORE_SCHEMA = {
    "null": (r"~|null|Null|NULL|", "~nN\0"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+(_[0-9]+)*", "-+0123456789"),
    "float": (r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
}
_MAKE = {
    _PREFIX + "str": str,
    _PREFIX + "null": lambda text: None,
    _PREFIX + "bool": lambda text: text.lower() == "true",
    _PREFIX + "int": int,
    _PREFIX + "float": float,
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(
                problem=f"an alias (*{event.anchor}) is not supported; write the value out",
                problem_mark=event.start_mark,
            )
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):  # quotes what either version of YAML would not read as text
    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, (_pattern, _first) in _CORE_SCHEMA.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            _PREFIX + _name, re.compile(f"^(?:{_pattern})$"), ["" if c == "\0" else c for c in _first]
        )


@dataclass(frozen=True)
class Origin:
    """Where a key was written ("recipes/x.yaml:17" or "--set"), and its dotted path as it stands there."""

    place: str
    key: str
    line: int = 0


@dataclass
class Document:
    """A recipe's plain data, and the origin of every key in it."""

    data: Any
    origins: dict[Path, Origin] = field(default_factory=dict)

    def origin(self, path: Path) -> Origin:
        """The origin of `path`; where nobody wrote it, that of the nearest key around it, and the rest."""
        known = next(path[:n] for n in range(len(path), -1, -1) if path[:n] in self.origins)
        found = self.origins[known]
        return Origin(found.place, dotted((*filter(None, [found.key]), *path[len(known) :])), found.line)

    def error(self, path: Path, message: str) -> str:
        """One line: place, key, what is wrong."""
        origin = self.origin(path)
        if origin.place == "--set":
            return _one_line(f"--set {origin.key}: {message}")
        return _one_line(": ".join(filter(None, [origin.place, origin.key, message])))

    def copy_origins(self, source: Path, target: Path) -> None:
        """Let everything at `target` point to where `source` was written."""
        moved = {target + path[len(source) :]: o for path, o in self.origins.items() if _starts(path, source)}
        self.origins.update(moved)

    def set(self, path: Path, key: str, value: Any) -> None:
        """Override the value at `path`; mappings on the way are made where they are missing.

        key: `path` as the user wrote it. Raises UserError where something on the way is no mapping.
        """
        parent = self.data
        for depth, part in enumerate(path[:-1], start=1):
            if part not in parent:
                parent[part] = {}
                self.origins[path[:depth]] = Origin("--set", dotted(path[:depth]))
            parent = parent[part]
            if not isinstance(parent, dict):
                raise UserError(f"--set {key}: {dotted(path[:depth])} is {show(parent)}, which has no keys")
        parent[path[-1]] = value
        self.origins = {p: o for p, o in self.origins.items() if not _starts(p, path)}
        self.origins[path] = Origin("--set", key)


def read(text: bytes, file: str) -> Document:
    """Parse YAML. Raises UserError, with the line, for bad syntax and for what this module leaves out."""
    node = _compose(text, file)
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{file}:1: a recipe is a mapping of keys; the first is `name:`")
    document = Document(None, {(): Origin(f"{file}:1", "", 1)})
    document.data = _build(node, (), file, document.origins)
    return document


def parse_override(override: str) -> tuple[Path, Any]:
    """("a", "b") and the value, parsed as YAML, of "a.b=VALUE". Raises UserError."""
    key, equals, value = override.partition("=")
    path = tuple(key.split("."))
    if not equals or not all(path):
        raise UserError(f"--set {override}: write KEY=VALUE, e.g. --set stages.sft.batch_size=16")
    node = _compose(value.encode(), f"--set {key}")
    return path, None if node is None else _build(node, (), f"--set {key}", {})


def write(data: Any) -> str:
    """Plain data as YAML that `read` turns into the same data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=110, default_flow_style=None)


def dotted(path: Path) -> str:
    return ".".join(map(str, path))


def show(value: Any) -> str:
    """A value as an error message quotes it: YAML's own spelling, shortened."""
    if isinstance(value, dict):
        return "a mapping" if value else "{}"
    if isinstance(value, list):
        return "a list" if value else "[]"
    if isinstance(value, str):
        return '"' + (value if len(value) <= 40 else value[:37] + "...") + '"'
    return "an empty value" if value is None else str(value).lower()


def _starts(path: Path, prefix: Path) -> bool:
    return path[: len(prefix)] == prefix


def _compose(text: bytes, file: str) -> Any:
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        begun = f" begun on line {error.context_mark.line + 1}" if error.context_mark else ""
        problem = ", ".join(filter(None, [error.context and error.context + begun, error.problem]))
        if isinstance(error, ParserError | ScannerError):
            problem += "; check indentation, colons, quotes and brackets here"
        raise UserError(f"{_at(file, line)}: {problem}") from None
    except yaml.YAMLError as error:  # an encoding or a character that YAML forbids
        position = getattr(error, "position", None) or 0
        line = text[:position].count(b"\n") + 1
        raise UserError(f"{_at(file, line)}: {str(error).splitlines()[0]}; a recipe is UTF-8 text") from None
    except RecursionError:
        raise UserError(f"{file}: nested too deeply for a recipe") from None


def _build(node: Any, path: Path, file: str, origins: dict[Path, Origin]) -> Any:
    """The plain value of a node; the origins of what lies below it are added to `origins`."""
    if isinstance(node, yaml.MappingNode) and node.tag == _PREFIX + "map":
        return dict(_items(node, path, file, origins))
    if isinstance(node, yaml.SequenceNode) and node.tag == _PREFIX + "seq":
        values = []
        for index, item in enumerate(node.value):
            origins[(*path, index)] = _origin(item, (*path, index), file)
            values.append(_build(item, (*path, index), file, origins))
        return values
    if isinstance(node, yaml.ScalarNode) and node.tag in _MAKE:
        text = node.value.replace("_", "") if node.tag in (_PREFIX + "int", _PREFIX + "float") else node.value
        try:
            return _MAKE[node.tag](text)
        except ValueError:
            raise UserError(_problem(node, path, file, f"{show(node.value)} does not fit its type")) from None
    name = node.tag.removeprefix(_PREFIX)
    raise UserError(_problem(node, path, file, f"the tag !!{name} is not supported; write a plain value"))


def _items(node: yaml.MappingNode, path: Path, file: str, origins: dict[Path, Origin]) -> Iterator[tuple[str, Any]]:
    first: dict[str, int] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag != _PREFIX + "str":
            shown = f"the key {key.value}" if isinstance(key, yaml.ScalarNode) else "this key"
            raise UserError(_problem(key, path, file, f'{shown} is not text; put it in quotes ("...")'))
        here = (*path, key.value)
        if key.value in first:
            raise UserError(_problem(key, here, file, f"given twice (first on line {first[key.value]}); keep one"))
        first[key.value] = key.start_mark.line + 1
        origins[here] = _origin(key, here, file)
        yield key.value, _build(value, here, file, origins)


def _origin(node: yaml.Node, path: Path, file: str) -> Origin:
    line = node.start_mark.line + 1
    return Origin(_at(file, line), dotted(path), line)


def _problem(node: yaml.Node, path: Path, file: str, message: str) -> str:
    return _one_line(": ".join(filter(None, [_at(file, node.start_mark.line + 1), dotted(path), message])))


def _one_line(text: str) -> str:
    """Line breaks and control characters, which a quoted key or value may hold, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _at(file: str, line: int) -> str:
    """FILE:LINE; an override on the command line has no lines."""
    return file if file.startswith("--set") else f"{file}:{line}"
