"""The writer: many checkpoints side by side are those written alone, and what is interrupted goes on within a file."""

import contextlib
import json
import os
import shutil
from dataclasses import dataclass, field, replace
from functools import cache, partial

import pytest
import torch
import xxhash
from tiny import tiny_config

import checkpoint.writer as writing
from checkpoint import behind, blocks, manifest
from checkpoint.layout import Fragment
from checkpoint.memory import MemorySource, ScratchSource
from checkpoint.safetensors import SafetensorsLayout, open_safetensors
from checkpoint.source import Wrapped, read_tensor
from checkpoint.writer import PROGRESS, Output, write_checkpoint, write_checkpoints
from checkpoint.zero3_layout import Zero3Layout
from parallel.errors import InputError

EMBEDDING = "model.embed_tokens.weight"


@cache
def source(seed=0, vocab_size=300_000):
    """A model whose file has three blocks; its numbers are drawn once."""
    drawn = ScratchSource(config=tiny_config(vocab_size=vocab_size), seed=seed)
    tensors = {name: read_tensor(drawn, name) for name, info in drawn.infos.items() if info.tied_to is None}
    return MemorySource(config=drawn.config, tensors=tensors)


@dataclass(frozen=True)
class Watched(Wrapped):
    """A source that notes what is read, and stops when so many boxes of the embedding are."""

    boxes: list = field(default_factory=list)
    until: int | None = None
    error: type[BaseException] = KeyboardInterrupt

    def read(self, name, box, out, stats=None):
        if name == EMBEDDING:
            if len(self.boxes) == self.until:
                raise self.error
            self.boxes.append(box[0].start)
        super().read(name, box, out, stats)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".safetensors", ".pt")}


@pytest.mark.parametrize("layout", [SafetensorsLayout(shard_size=10**5), Zero3Layout(ranks=3, bf16=False)])
@pytest.mark.parametrize("workers", [1, 3])
def test_side_by_side_or_alone_the_bytes_are_the_same(tmp_path, layout, workers):
    sources = [source(seed, vocab_size=2000) for seed in range(3)]
    outputs = [
        Output(source=one, folder=tmp_path / f"{seed}", about={"seed": seed}) for seed, one in enumerate(sources)
    ]
    hashes = write_checkpoints(outputs, layout, workers=workers)
    assert len(set(hashes)) == 3
    for seed, one in enumerate(sources):
        assert write_checkpoint(one, tmp_path / f"alone-{seed}", layout, about={"seed": seed}) == hashes[seed]
        assert files(tmp_path / f"{seed}") == files(tmp_path / f"alone-{seed}")
        manifest.check(tmp_path / f"{seed}")


def test_an_interrupted_file_goes_on_behind_its_last_block(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "EVERY_S", 0)
    about = {"name": "x"}
    whole = write_checkpoint(source(), tmp_path / "whole", SafetensorsLayout(), about=about)
    first = Watched(source(), until=25)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(first, tmp_path / "cut", SafetensorsLayout(), about=about)
    part = json.loads((tmp_path / "cut" / PROGRESS).read_text())
    assert part["part_of"] == "model.safetensors" and len(part["part"]) == 1
    again = Watched(source())
    assert write_checkpoint(again, tmp_path / "cut", SafetensorsLayout(), about=about) == whole
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    rows = 2**24 // (32 * 4)  # of a block
    assert rows - 9000 < min(again.boxes) <= rows
    manifest.check(tmp_path / "cut")


@dataclass(frozen=True, kw_only=True)
class Named(SafetensorsLayout):
    """Notes under which names files are created: torch writes them into its own, whose data then begins elsewhere."""

    names: list = field(default_factory=list, repr=False)

    def files(self, source):
        def create(path, plan):
            self.names.append(path.name)
            return plan.create(path)

        return [replace(plan, create=partial(create, plan=plan)) for plan in super().files(source)]


def test_a_file_that_is_gone_on_with_is_looked_at_under_its_own_name(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "EVERY_S", 0)
    layout = Named()
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(Watched(source(), until=25), tmp_path / "cut", layout, about={"name": "x"})
    write_checkpoint(source(), tmp_path / "cut", layout, about={"name": "x"})
    assert layout.names == ["model.safetensors"] * 2
    assert not [path for path in (tmp_path / "cut").iterdir() if path.name.endswith(".tmp")]


def test_the_slowest_of_several_decides_where_they_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "EVERY_S", 0)

    def outputs(until=None):
        return [
            Output(source=Watched(source(seed), until=until), folder=tmp_path / f"{seed}", about={"seed": seed})
            for seed in range(2)
        ]

    with pytest.raises(KeyboardInterrupt):
        write_checkpoints(outputs(until=36), SafetensorsLayout())
    note = json.loads((tmp_path / "1" / PROGRESS).read_text())
    (tmp_path / "1" / PROGRESS).write_text(json.dumps({**note, "part": note["part"][:1]}))
    write_checkpoints(outputs(), SafetensorsLayout())
    for seed in range(2):
        found = open_safetensors(tmp_path / f"{seed}")
        assert torch.equal(read_tensor(found, EMBEDDING), read_tensor(source(seed), EMBEDDING))
        manifest.check(tmp_path / f"{seed}")


def test_what_is_of_another_source_or_shorter_is_not_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "EVERY_S", 0)
    for change in ("about", "size"):
        folder = tmp_path / change
        with pytest.raises(KeyboardInterrupt):
            write_checkpoint(Watched(source(), until=25), folder, SafetensorsLayout(), about={"name": "x"})
        if change == "size":
            with (folder / "model.safetensors").open("r+b") as file:
                file.truncate(10**6)
        again = Watched(source())
        write_checkpoint(again, folder, SafetensorsLayout(), about={"name": "y" if change == "about" else "x"})
        assert min(again.boxes) == 0


def test_an_error_leaves_no_half_written_file(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "EVERY_S", 0)
    for error in (InputError, OSError):
        with pytest.raises(error):
            write_checkpoint(
                Watched(source(), until=25, error=error), tmp_path / "x", SafetensorsLayout(), about={"name": "x"}
            )
        assert [path.name for path in (tmp_path / "x").iterdir()] == [PROGRESS]


@pytest.mark.parametrize("other", [SafetensorsLayout(shard_size=10**6), Zero3Layout(ranks=2, bf16=False)])
def test_what_an_interrupted_run_of_another_layout_left_is_not_declared_whole(tmp_path, monkeypatch, other):
    monkeypatch.setattr(writing, "EVERY_S", 0)
    for first, second in ((SafetensorsLayout(), other), (other, SafetensorsLayout())):
        folder = tmp_path / f"{type(first).__name__}"
        with pytest.raises(KeyboardInterrupt):
            write_checkpoint(Watched(source(), until=25), folder, first, about={"name": "x"})
        assert files(folder)
        write_checkpoint(source(), folder, second, about={"name": "x"})
        write_checkpoint(source(), tmp_path / "fresh", second, about={"name": "x"})
        assert files(folder) == files(tmp_path / "fresh")
        shutil.rmtree(folder)
        shutil.rmtree(tmp_path / "fresh")


def test_a_claim_goes_before_the_file_that_it_is_about(tmp_path, monkeypatch):
    """Interrupted, begun anew beside another one that has nothing yet, interrupted at once, and gone on with alone."""
    monkeypatch.setattr(writing, "EVERY_S", 0)
    one = {"folder": tmp_path / "one", "about": {"name": "one"}}
    with pytest.raises(KeyboardInterrupt):
        write_checkpoints([Output(source=Watched(source(), until=25), **one)], SafetensorsLayout())
    monkeypatch.setattr(writing, "EVERY_S", 1000)
    with pytest.raises(KeyboardInterrupt):
        pair = [Output(source=Watched(source(), until=5), **one)]
        pair.append(Output(source=source(1), folder=tmp_path / "two", about={"name": "two"}))
        write_checkpoints(pair, SafetensorsLayout())
    write_checkpoints([Output(source=source(), **one)], SafetensorsLayout())
    assert torch.equal(read_tensor(open_safetensors(tmp_path / "one"), EMBEDDING), read_tensor(source(), EMBEDDING))


@pytest.mark.parametrize("layout", [SafetensorsLayout(), Zero3Layout(ranks=3, bf16=False)])
@pytest.mark.parametrize("workers", [1, 2])
def test_past_the_page_cache_the_bytes_are_the_same(tmp_path, monkeypatch, layout, workers):
    """Files that begin with a header, are longer than a block and end in no multiple of anything."""
    hash_of = write_checkpoint(source(), tmp_path / "cached", layout, about={}, workers=workers)
    monkeypatch.setattr(behind, "available_memory", lambda: 0)
    opened = []

    def opening(path, size):
        opened.append(behind.open_past_cache(path, size))
        return opened[-1]

    monkeypatch.setattr(writing, "open_past_cache", opening)
    assert write_checkpoint(source(), tmp_path / "past", layout, about={}, workers=workers) == hash_of
    assert files(tmp_path / "past") == files(tmp_path / "cached")
    assert all(len(data) % behind.ALIGN for data in files(tmp_path / "past").values())
    manifest.check(tmp_path / "past")
    assert opened
    assert None not in opened or not takes_direct(tmp_path / "probe")


def takes_direct(path):
    """Whether a file system has O_DIRECT."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        return False
    return True


def test_what_fits_the_page_cache_stays_there(tmp_path):
    path = tmp_path / "file"
    path.touch()
    assert behind.open_past_cache(path, behind.available_memory() // 2) is None


def test_what_is_no_whole_multiple_is_written_all_the_same(tmp_path):
    """A file system may want larger multiples than there are, or write a part of what it is given."""
    data = behind.aligned(2, 3 * behind.ALIGN).random_(generator=torch.Generator().manual_seed(0))
    data = data[:, : 2 * behind.ALIGN + 100]
    with behind_files(tmp_path) as (handles, past), behind.Behind(handles, past) as writer:
        writer.append(data, behind.ALIGN)
        writer.append(data[:, 7:], 4 * behind.ALIGN)  # of which the kernel takes nothing past its cache
        hashes = writer.hashes()
    for number, row in enumerate(data):
        expected = row.numpy().tobytes() + row[7:].numpy().tobytes()
        found = (tmp_path / f"{number}").read_bytes()
        start = behind.ALIGN
        assert found[start : start + len(row)] + found[4 * start :] == expected
        assert hashes[number] == xxhash.xxh3_128(expected).hexdigest()


@contextlib.contextmanager
def behind_files(folder):
    with contextlib.ExitStack() as stack:
        handles, past = [], []
        for number in range(2):
            path = folder / f"{number}"
            handles.append(os.open(path, os.O_RDWR | os.O_CREAT))
            past.append(behind.open_past_cache(path, 2 * behind.available_memory()))
            for handle in (handles[-1], past[-1]):
                if handle is not None:
                    stack.callback(os.close, handle)
        yield handles, past


@pytest.mark.parametrize(("begin", "end", "piece"), [(0, 2**16, 2**12), (2**12, 50_000, 2**13), (0, 5000, 2**20)])
def test_pieces_cover_a_block_and_end_where_rows_do(begin, end, piece):
    one = ScratchSource(config=tiny_config(vocab_size=300), seed=0)
    columns = one.infos[EMBEDDING].shape[1]
    fragment = Fragment(offset=100, tensor=EMBEDDING, slot="weight", dtype=torch.float32, start=0, stop=None)
    span = blocks.Span(fragment=fragment, first=0, start=100, stop=100 + 300 * columns * 4)
    found = [*blocks._pieces(one, blocks.Block(number=0, begin=begin, end=end, spans=[span]), piece)]
    assert [begin, *(high for _, high in found)] == [*(low for low, _ in found), end]
    assert all(0 < high - low <= piece for low, high in found)
    inside = [high for _, high in found if span.start < high < min(end, span.stop)]
    assert all((high - span.start) % (columns * 4) == 0 for high in inside)
    assert inside or piece > end
