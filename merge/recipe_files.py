"""Reading merge recipes: mergekit's YAML, as published, every key with its line."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from merge.recipe import DTYPES, Given, Input, Parameters, Recipe, Setting, Slice, plain
from merge.search_settings import SEARCH, Search, search_of
from merge.table import METHODS
from parallel.document import Item, parse_document, read_document
from parallel.errors import InputError, one_of

TOP = (
    *("merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype"),
    *("tokenizer_source", "tokenizer", "chat_template", "seed", "search"),
)
ALSO = {
    "model": ("parameters", "checkpoints"),
    "slice": ("base_model", "parameters", "residual_weight"),
    "module": ("parameters",),
}


def read_recipe(path: Path, *, lenient: bool = False) -> Recipe:
    """Read a recipe.

    Args:
        lenient: warn of unknown keys instead of refusing them.

    Raises:
        InputError: not a recipe: the line, what is given there and what is allowed.
    """
    return _Reader(path, lenient).recipe(read_document(path), path.read_text())


def parse_recipe(text: str, path: Path) -> Recipe:
    """Read a recipe that is no file yet; a path is what messages call it."""
    return _Reader(path, lenient=False).recipe(parse_document(text, path), text)


class _Reader:
    def __init__(self, path: Path, lenient: bool) -> None:
        self._path = path
        self._lenient = lenient
        self._warnings: list[str] = []
        self._method = ""

    def recipe(self, top: Item, text: str) -> Recipe:
        keys = _given(self._keys(top, "", TOP), but=("merge_method", "search"))
        given = [name for name in ("models", "slices", "modules") if name in keys]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise self._error(top.line, f"a recipe has exactly one of models, slices, modules; this one has {found}")
        if "merge_method" not in keys:
            raise self._error(top.line, "merge_method is missing: which method merges?")
        if "tokenizer" in keys and "tokenizer_source" in keys:
            raise self._error(keys["tokenizer"].line, "tokenizer and tokenizer_source are both given: one is needed")
        search = self._search(keys)
        self._method = method = self._text(keys["merge_method"], "merge_method") if search is None else search.method
        if method not in METHODS:
            raise self._error(keys["merge_method"].line, one_of("merge_method", method, [*METHODS, SEARCH]))
        module: Parameters = {}
        if "modules" in keys:
            keys, module = self._module(keys)
        texts = {
            name: self._text(keys[name], name, several_lines=name == "chat_template")
            for name in ("dtype", "out_dtype", "tokenizer_source", "chat_template")
            if name in keys
        }
        for name in ("dtype", "out_dtype"):
            if texts.get(name, "float32") not in DTYPES:
                raise self._error(keys[name].line, one_of(name, texts[name], DTYPES))
        return Recipe(
            file=self._path,
            method=method,
            slices=self._slices(keys),
            whole="models" in keys,
            base=self._model(keys["base_model"], "base_model") if "base_model" in keys else None,
            parameters=self._parameters(keys.get("parameters"), method),
            module=module,
            dtype=texts.get("out_dtype") or texts.get("dtype"),
            tokenizer_source=texts.get("tokenizer_source"),
            tokenizer=plain(keys["tokenizer"]) if "tokenizer" in keys else None,
            chat_template=texts.get("chat_template"),
            seed=self._whole(keys["seed"], "seed", least=0) if "seed" in keys else None,
            lines={name: item.line for name, item in keys.items()},
            warnings=tuple(self._warnings),
            text=text,
            search=search,
        )

    def _search(self, keys: Mapping[str, Item]) -> Search | None:
        """Return what `merge_method: search` searches for."""
        if self._text(keys["merge_method"], "merge_method") != SEARCH:
            if SEARCH in keys:
                raise self._error(keys[SEARCH].line, f"search has a meaning with merge_method {SEARCH} alone")
            return None
        if SEARCH not in keys:
            raise self._error(
                keys["merge_method"].line, "merge_method search lacks the key search: what, on which texts?"
            )
        inner = self._keys(keys[SEARCH], SEARCH, [one.name for one in fields(Search)])
        try:
            return search_of({name: plain(item) for name, item in inner.items()})
        except InputError as error:
            raise self._error(keys[SEARCH].line, f"search: {error}") from None

    def _module(self, keys: Mapping[str, Item]) -> tuple[dict[str, Item], Parameters]:
        """Return the keys of a recipe with its only module's in their place."""
        modules = self._mapping(keys["modules"], "modules")
        if len(modules) != 1:
            line = keys["modules"].line
            raise self._error(line, f"{len(modules)} modules: models of these families have one")
        ((name, item),) = modules.items()
        inner = _given(self._keys(item, f"module {name}", ("models", "slices", *ALSO["module"])))
        if ("models" in inner) == ("slices" in inner):
            raise self._error(item.line, f"module {name} has exactly one of models and slices")
        own = self._parameters(inner.pop("parameters", None), self._method)
        return {**{key: value for key, value in keys.items() if key != "modules"}, **inner}, own

    def _slices(self, keys: Mapping[str, Item]) -> tuple[Slice, ...]:
        method = self._method
        if "models" in keys:
            line = keys["models"].line
            models = [self._input(item, method) for item in self._list(keys["models"], "models")]
            return (Slice(inputs=tuple(models), line=line),)
        found = []
        for item in self._list(keys["slices"], "slices"):
            part = _given(self._keys(item, "a slice", ("sources", *ALSO["slice"])))
            if "sources" not in part:
                raise self._error(item.line, "a slice has no sources: which layers of which models?")
            if "residual_weight" in part:
                self._warn(part["residual_weight"].line, "residual_weight changes nothing")
            sources = [self._input(one, method, layers=True) for one in self._list(part["sources"], "sources")]
            base = self._model(part["base_model"], "base_model") if "base_model" in part else None
            parameters = self._parameters(part.get("parameters"), method)
            found.append(Slice(inputs=tuple(sources), line=item.line, base=base, parameters=parameters))
        return tuple(found)

    def _input(self, item: Item, method: str, *, layers: bool = False) -> Input:
        allowed = ("model", *(("layer_range",) if layers else ()), *ALSO["model"])
        keys = _given(self._keys(item, "a source" if layers else "a model", allowed))
        if "model" not in keys:
            raise self._error(item.line, "the key model is missing: which one?")
        span = None
        if layers:
            if "layer_range" not in keys:
                raise self._error(item.line, "the key layer_range is missing, such as [0, 12]")
            span = self._span(keys["layer_range"])
        return Input(
            model=self._model(keys["model"], "model"),
            line=keys["model"].line,
            layers=span,
            parameters=self._parameters(keys.get("parameters"), method),
            checkpoints=self._whole(keys["checkpoints"], "checkpoints", least=1) if "checkpoints" in keys else None,
        )

    def _whole(self, item: Item, name: str, *, least: int) -> int:
        number = plain(item)
        if type(number) is not int or number < least:
            raise self._error(item.line, f"{name} is {item.given}: a whole number, {least} or more, is needed")
        return number

    def _model(self, item: Item, what: str) -> str:
        """Return a model as one text; mergekit takes a mapping as well."""
        if not isinstance(item.value, dict):
            return self._text(item, what)
        keys = _given(self._keys(item, what, ("model", "lora", "override_architecture")))
        texts = {}
        for name in ("model", "lora"):
            if name not in keys:
                continue
            if not isinstance(keys[name].value, dict):
                texts[name] = self._text(keys[name], name)
                continue
            parts = _given(self._keys(keys[name], name, ("path", "revision")))
            if "path" not in parts:
                raise self._error(keys[name].line, f"{name}: the key path is missing: which one?")
            texts[name] = "@".join(self._text(parts[key], key) for key in ("path", "revision") if key in parts)
        if "override_architecture" in keys:
            self._warn(keys["override_architecture"].line, "override_architecture changes nothing: config.json decides")
        if "model" not in texts:
            raise self._error(item.line, "the key model is missing: which one?")
        return texts["model"] + (f"+{texts['lora']}" if "lora" in texts else "")

    def _span(self, item: Item) -> tuple[int, int]:
        parts = [plain(part) for part in item.value] if isinstance(item.value, tuple) else []
        if len(parts) != 2 or not all(type(part) is int for part in parts) or not 0 <= parts[0] < parts[1]:
            raise self._error(item.line, f"layer_range is {plain(item)}: two layers are needed, such as [0, 12]")
        return parts[0], parts[1]

    def _parameters(self, item: Item | None, method: str) -> dict[str, Given]:
        if item is None or item.tag == "null":
            return {}
        takes, found = METHODS[method].parameters, {}
        for name, value in self._mapping(item, "parameters").items():
            if name in takes:
                if takes[name].unused:
                    self._warn(value.line, f"{name} changes nothing in {method}")
                found[name] = Given(name=name, line=value.line, settings=tuple(self._settings(name, value)))
            elif any(name in other.parameters for other in METHODS.values()):
                self._warn(value.line, f"{method} has no parameter {name}: it changes nothing")
            else:
                self._unknown(value.line, one_of(f"parameter of {method}", name, takes))
        return found

    def _settings(self, name: str, item: Item) -> Iterator[Setting]:
        if isinstance(item.value, str):
            yield Setting(values=(item,), gradient=False, filter=None, line=item.line)
        elif isinstance(item.value, dict):
            yield self._conditional(name, item)
        elif not item.value:
            raise self._error(item.line, f"{name}: the list is empty")
        elif all(isinstance(part.value, str) for part in item.value):
            yield Setting(values=item.value, gradient=True, filter=None, line=item.line)
        else:
            for part in item.value:
                yield self._conditional(name, part)

    def _conditional(self, name: str, item: Item) -> Setting:
        if not isinstance(item.value, dict):
            raise self._error(item.line, f"{name}: {item.given} among filters: each has `value` and perhaps `filter`")
        keys = self._keys(item, name, ("value", "filter"))
        if "value" not in keys:
            raise self._error(item.line, f"{name}: a filter without a value")
        value = keys["value"].value
        parts = value if isinstance(value, tuple) else (keys["value"],)
        if not parts or not all(isinstance(part.value, str) for part in parts):
            raise self._error(item.line, f"{name}: a value is a number or a list of numbers")
        chosen = keys.get("filter")
        text = self._text(chosen, "filter") if chosen and chosen.tag != "null" else None
        line = keys["value"].line
        return Setting(values=parts, gradient=isinstance(value, tuple), filter=None if text == "*" else text, line=line)

    def _keys(self, item: Item, where: str, allowed: Sequence[str]) -> dict[str, Item]:
        found = {}
        for name, value in self._mapping(item, where or "the recipe").items():
            if name in allowed:
                found[name] = value
            else:
                self._unknown(value.line, one_of(f"key of {where}" if where else "key", name, allowed))
        return found

    def _mapping(self, item: Item, where: str) -> dict[str, Item]:
        if not isinstance(item.value, dict):
            raise self._error(item.line, f"{where}: {item.given} is given; a mapping of keys to values is needed")
        return item.value

    def _list(self, item: Item, name: str) -> tuple[Item, ...]:
        if not isinstance(item.value, tuple) or not item.value:
            raise self._error(item.line, f"{name}: {item.given} is given; a list with one entry at least is needed")
        return item.value

    def _text(self, item: Item, name: str, *, several_lines: bool = False) -> str:
        text = item.value if isinstance(item.value, str) and item.tag != "null" else None
        if text is None or not (re.sub(r"[\n\t]", "", text) if several_lines else text).isprintable():
            raise self._error(item.line, f"{name}: {item.given} is given; text is needed")
        return text

    def _unknown(self, line: int, problem: str) -> None:
        if not self._lenient:
            raise self._error(line, f"{problem} (--lenient passes over it)")
        self._warn(line, problem)

    def _warn(self, line: int, problem: str) -> None:
        self._warnings.append(f"{self._path}:{line}: {problem}")

    def _error(self, line: int, problem: str) -> InputError:
        return InputError(f"{self._path}:{line}: {problem}")


def _given(keys: Mapping[str, Item], *, but: Sequence[str] = ()) -> dict[str, Item]:
    """Return the keys that have a value: null is as good as none, as in mergekit, but for some."""
    return {name: item for name, item in keys.items() if item.tag != "null" or name in but}
