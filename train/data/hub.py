"""Data sets of the Hugging Face Hub, or folders in their form, read as a stream; no code of theirs is ever run."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from parallel.errors import InputError


class HubOptions(Protocol):
    """What reading from the Hub needs of a source; `growmerge.schema_data.DataSource` says what each field means."""

    @property
    def hub(self) -> str | None: ...
    @property
    def config(self) -> str | None: ...
    @property
    def split(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def data_files(self) -> tuple[str, ...]: ...
    @property
    def field(self) -> str: ...


def hub_stamps(source: HubOptions, base: Path) -> list[Any]:
    """Return what a data set is known by: for a folder names, sizes and times of its files, else nothing.

    One of the Hub is known by its `revision`, which belongs to the source; without one it is taken as unchanged.

    Raises:
        InputError: the folder is empty.
    """
    folder = _folder(source, base)
    if folder is None:
        return []
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    if not files:
        raise InputError(f"{folder}: the folder holds no files")
    stats = [(path.relative_to(folder).as_posix(), path.stat()) for path in files]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def hub_configs(source: HubOptions, base: Path) -> list[str]:
    """Return the names of all configurations of a data set.

    Raises:
        InputError: as `hub_shards`.
    """
    import datasets

    place, _, _, revision, _ = _spec(source, base)
    try:
        return [str(name) for name in datasets.get_dataset_config_names(place, revision=revision)]
    except Exception as error:
        raise _problem(source.hub, error) from error


def hub_shards(source: HubOptions, base: Path) -> int:
    """Return how many pieces of its own the data set has: its files, as a rule.

    Raises:
        InputError: no such data set, configuration, split or revision, or no way to reach it.
    """
    return max(1, int(_dataset(_spec(source, base)).num_shards))


def hub_texts(source: HubOptions, base: Path, number: int, count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of one of `count` pieces, each with a name that does not depend on who reads it.

    Raises:
        InputError: as `hub_shards`; or a file of it is damaged.
    """
    spec = _spec(source, base)
    dataset = _dataset(spec)
    if dataset.num_shards != count and count > 1:
        raise InputError(f"hub: {source.hub}: it has {dataset.num_shards} files, and had {count} a moment ago")
    piece = dataset.shard(num_shards=count, index=number) if count > 1 else dataset
    known = piece.column_names
    if known is not None and source.field in known:
        piece = piece.select_columns([source.field] + ["id"] * ("id" in known and source.field != "id"))
    try:
        for row, record in enumerate(piece):
            yield f"{source.hub}/{source.split}/{number}:{row}", record
    except InputError:
        raise
    except Exception as error:  # datasets, pyarrow, fsspec and the network raise errors of many kinds
        raise _problem(source.hub, error) from error


def _folder(source: HubOptions, base: Path) -> Path | None:
    """Return the folder that a data set is, if it is one."""
    folder = base / str(source.hub)
    return folder if folder.is_dir() else None


def _fetched(source: HubOptions) -> Path | None:
    """Return where `growmerge fetch` has put a data set, if there is no network."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if not constants.HF_HUB_OFFLINE:
        return None
    try:
        name, revision = str(source.hub), source.revision
        return Path(snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):
        return None


def _spec(source: HubOptions, base: Path) -> tuple[Any, ...]:
    place = str(_folder(source, base) or _fetched(source) or source.hub)
    return place, source.config, source.split, source.revision, tuple(source.data_files)


@lru_cache(maxsize=4)
def _dataset(spec: tuple[Any, ...]) -> Any:
    import datasets

    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    place, config, split, revision, data_files = spec
    try:
        return datasets.load_dataset(
            place, config, split=split, revision=revision, data_files=list(data_files) or None, streaming=True
        )
    except Exception as error:
        raise _problem(place, error) from error


def _problem(name: object, error: Exception) -> InputError:
    """Return the line of an error of `datasets`, whose first line says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return InputError(f"hub: {name}: {lines[0] if lines else type(error).__name__}")
