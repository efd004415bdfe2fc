"""A YAML file as a tree of plain text values, each with its line; nothing of it is interpreted or executed here."""

import difflib
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from parallel.errors import InputError

MOST = 1_000_000
"""Values in a file at most, aliases written out: a few lines of aliases to aliases could else fill the memory."""
DEEPEST = 50
"""Levels of nesting at most."""
_STANDARD = "tag:yaml.org,2002:"
_SCALARS = ("str", "int", "float", "bool", "null", "timestamp", "value", "merge")


@dataclass(frozen=True, kw_only=True)
class Item:
    """A value of the file."""

    value: "str | tuple[Item, ...] | dict[str, Item]"
    """A scalar's text as written, a list, or a mapping."""
    tag: str
    """What YAML 1.1 takes it for: str, int, float, bool, null, timestamp, ..., seq, map; `filled` if a variable was."""
    line: int
    """Where it is written, from 1: the line of its key, if it has one."""
    size: int = 1
    """Values in it, itself included."""
    file: Path
    """The file that it is written in."""

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def given(self) -> str:
        """The value in the words of an error message."""
        if not isinstance(self.value, str):
            return "a mapping" if self.tag == "map" else "a list"
        if self.tag == "null":
            return "nothing"
        text = self.value if len(self.value) <= 60 else self.value[:57] + "..."
        return text if self.tag in ("int", "float", "bool") and text.isprintable() else repr(text)


def read_document(path: Path) -> Item:
    """Read a YAML file whose top is a mapping.

    Raises:
        InputError: no such file, not readable, not UTF-8; as `parse_document`.
    """
    return parse_document(_text(path), path)


def parse_document(text: str, path: Path) -> Item:
    """Read YAML whose top is a mapping; a path is what messages call it.

    Anchors, aliases and merge keys (`<<`) are written out.

    Raises:
        InputError: not valid YAML, a key given twice, an alias of itself.
    """
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        raise InputError(f"{path}:{_reason(error)}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InputError(f"{path}:{line}: not valid YAML: it holds the character {text[error.position]!r}") from error
    except (ValueError, OverflowError, RecursionError) as error:
        problem = "nested too deeply" if isinstance(error, RecursionError) else "a number or character is too large"
        raise InputError(f"{path}:{loader.line + 1 if loader else 1}: not valid YAML: {problem}") from None
    if root is None:
        raise InputError(f"{path}: the file is empty")
    item = _Tree(path).item(root)
    if item.tag != "map":
        raise InputError(f"{path}:{item.line}: expected keys such as `name:` and `stages:`, not {item.given}")
    return item


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig")
    except FileNotFoundError:
        siblings = sorted(other.name for other in path.parent.glob("*"))
        near = difflib.get_close_matches(path.name, siblings, n=1)
        raise InputError(f"{path}: no such file" + (f"; did you mean {near[0]!r}?" if near else "")) from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder, not a YAML file") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def _reason(error: yaml.MarkedYAMLError) -> str:
    """Return the line and what YAML says of it."""
    mark, begun = error.problem_mark or error.context_mark, error.context_mark
    line = mark.line + 1 if mark else 1
    reason = " ".join(f"{error.context or ''} {error.problem or ''}".split())
    since = f" (begun in line {begun.line + 1})" if begun and begun.line + 1 != line else ""
    return f"{line}: not valid YAML: {reason}{since}"


class _Tree:
    """Turns YAML's nodes into items; a node that aliases share is turned once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._done: dict[int, Item] = {}
        self._open: set[int] = set()

    def item(self, node: yaml.Node) -> Item:
        line = node.start_mark.line + 1
        if id(node) in self._open:
            raise self._error(line, "an alias in it refers to itself")
        if len(self._open) > DEEPEST:
            raise self._error(line, f"nested too deeply: allowed are {DEEPEST} levels")
        if id(node) not in self._done:
            self._open.add(id(node))
            self._done[id(node)] = self._item(node, line)
            self._open.discard(id(node))
        return self._done[id(node)]

    def _item(self, node: yaml.Node, line: int) -> Item:
        tag = node.tag.removeprefix(_STANDARD)
        value: str | tuple[Item, ...] | dict[str, Item]
        parts: tuple[Item, ...] = ()
        if isinstance(node, yaml.ScalarNode) and tag in _SCALARS:
            value = node.value
        elif isinstance(node, yaml.SequenceNode) and tag == "seq":
            value = parts = tuple(self.item(child) for child in node.value)
        elif isinstance(node, yaml.MappingNode) and tag == "map":
            value = self._mapping(node)
            parts = tuple(value.values())
        else:
            raise self._error(line, f"the YAML tag {node.tag!r} is not allowed: write plain values")
        size = 1 + sum(part.size for part in parts)
        if size > MOST:
            raise self._error(line, f"aliases come to {size} values here; allowed are {MOST}")
        return Item(value=value, tag=tag, line=line, size=size, file=self._path)

    def _mapping(self, node: yaml.MappingNode) -> dict[str, Item]:
        """Return the mapping's values by key; its own keys go before merged ones, an earlier merge before a later."""
        own: dict[str, Item] = {}
        merged: dict[str, Item] = {}
        seen: dict[str, int] = {}
        for key, child in node.value:
            line = key.start_mark.line + 1
            name = self._key(key)
            if name in seen:
                raise self._error(line, f"the key {name!r} is given twice; the first is in line {seen[name]}")
            seen[name] = line
            if key.tag == _STANDARD + "merge":
                merged = self._merge(child)
            else:
                own[name] = replace(self.item(child), line=line)
        return {**merged, **own}

    def _key(self, key: yaml.Node) -> str:
        line = key.start_mark.line + 1
        tag = key.tag.removeprefix(_STANDARD)
        if not isinstance(key, yaml.ScalarNode):
            raise self._error(
                line, "a key has to be text, not a list or mapping (quote keys that begin with a bracket)"
            )
        if tag not in ("str", "merge"):
            raise self._error(line, f"the key {key.value!r} is read as {tag} by YAML: write it in quotes")
        if not key.value.isprintable():
            raise self._error(line, f"the key {key.value!r} holds a control character")
        return str(key.value)

    def _merge(self, node: yaml.Node) -> dict[str, Item]:
        item = self.item(node)
        merged: dict[str, Item] = {}
        for part in item.value if isinstance(item.value, tuple) else (item,):
            if not isinstance(part.value, dict):
                raise self._error(node.start_mark.line + 1, f"<< takes a mapping or a list of them, not {part.given}")
            merged = {**part.value, **merged}
        return merged

    def _error(self, line: int, problem: str) -> InputError:
        return InputError(f"{self._path}:{line}: {problem}")
