"""Which checkpoints of a run are sound, which are kept, and which go."""

import os
import re

import pytest

from checkpoint import manifest
from train.checkpointing import clear_after, newest, prune
from train.parts import no_room

SIZE = 2 * manifest.BLOCK + 12345


def checkpoint(folder, step, complete=True, size=100):
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "optim.pt").write_bytes(os.urandom(size))
    (path / "config.json").write_text("{}")
    (path / "empty").touch()
    if complete:
        manifest.write_manifest(path)
        (folder / "latest").write_text(path.name)
    return path


def names(folder):
    return [int(path.name[5:]) for path in sorted(folder.iterdir()) if path.is_dir()]


def flip(path, at):
    """Change one bit and nothing that a look at the file's size and time would show."""
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_newest_reads_every_byte(tmp_path):
    assert newest(tmp_path / "none") == (None, [])
    first, second = checkpoint(tmp_path, 1, size=SIZE), checkpoint(tmp_path, 2, size=SIZE)
    checkpoint(tmp_path, 3, complete=False)
    assert newest(tmp_path) == (second, [])
    flip(second / "optim.pt", SIZE - 1)
    line = f"{second / 'optim.pt'}: damaged (checksum of block 2 differs from manifest.json)"
    assert newest(tmp_path) == (first, [line])
    flip(second / "optim.pt", SIZE - 1)
    flip(second / "optim.pt", manifest.BLOCK)
    assert newest(tmp_path) == (first, [line.replace("block 2", "block 1")])
    (second / "optim.pt").unlink()
    assert newest(tmp_path) == (first, [f"{second / 'optim.pt'}: missing, though manifest.json lists it"])
    flip(first / "config.json", 0)
    found, damaged = newest(tmp_path)
    assert found is None
    assert len(damaged) == 2


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"size": 100', '"sise": 100', "damaged (KeyError('size'))"),
        ('"xxh3"', '"xxh4"', "damaged (not every block of "),
        ('"format": 2', '"format": 1', "of format 1, this version of growmerge knows 2"),
    ],
)
def test_a_damaged_manifest_is_passed_over(tmp_path, old, new, said):
    first, second = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    text = (second / "manifest.json").read_text()
    assert old in text
    (second / "manifest.json").write_text(text.replace(old, new))
    found, (line,) = newest(tmp_path)
    assert found == first
    assert line.startswith(f"{second / 'manifest.json'}: {said}")


def test_what_a_run_resumes_from_is_the_newest_left_and_the_pointer_names_it(tmp_path):
    for step in (1, 2, 3):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 4, complete=False)
    clear_after(tmp_path, tmp_path / "step-00000002")
    assert names(tmp_path) == [1, 2]
    assert (tmp_path / "latest").read_text() == "step-00000002"
    clear_after(tmp_path, None)
    assert names(tmp_path) == []
    assert not (tmp_path / "latest").exists()  # a pointer never names what is not there


def test_the_last_and_every_nth_are_kept(tmp_path):
    for step in range(10, 110, 10):
        checkpoint(tmp_path, step, complete=step != 40)
    checkpoint(tmp_path, 110, complete=False)  # being written
    prune(tmp_path, 2, every=30)
    assert names(tmp_path) == [30, 60, 90, 100, 110]
    prune(tmp_path, 2)
    assert names(tmp_path) == [90, 100, 110]
    (tmp_path / "latest").write_text("step-00000090")
    prune(tmp_path, 1)
    assert names(tmp_path) == [90, 100, 110]
    clear_after(tmp_path, tmp_path / "step-00000100")
    prune(tmp_path, 1)
    assert names(tmp_path) == [100]


def test_a_deleted_checkpoint_never_looks_complete(tmp_path):
    """The manifest goes first: where the rest cannot be deleted, what is left is no checkpoint."""
    checkpoint(tmp_path, 1)
    checkpoint(tmp_path, 2)
    seen = []

    def look(path, *_, **__):
        seen.append(manifest.is_complete(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.parts.shutil.rmtree", look)
        prune(tmp_path, 1)
    assert seen == [False]
    assert newest(tmp_path) == (tmp_path / "step-00000002", [])


def test_room_is_looked_for_before(tmp_path):
    assert no_room(tmp_path, 10**6, 10) is None
    line = no_room(tmp_path, 10**18, 10)
    assert re.fullmatch(
        re.escape(f"{tmp_path}: no space left for a checkpoint (1e+09 GB, ")
        + r"[\d.]+ GB are free\); nothing that was complete is lost",
        line,
    )
    if os.statvfs(tmp_path).f_files:
        assert "no space left for a checkpoint (1000000000000000 files, " in no_room(tmp_path, 0, 10**15)
    with pytest.raises(FileNotFoundError):
        no_room(tmp_path / "none", 0, 0)
