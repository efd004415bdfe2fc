"""docs/guide.md, followed: every command in it is run, in order, and prints what the guide says."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import pytest

HOME = Path(__file__).parents[2]
GUIDE = HOME / "docs" / "guide.md"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NOT_RUN = "# not run by our tests: "
RUN = "growmerge run nordic.yaml > run.log"
"""Where the guide begins to take minutes."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Commands, and what the text block behind them says that they print."""

    commands: str
    said: str = ""


def fenced(page: Path) -> list[tuple[str, str]]:
    """Return the fenced blocks of a page, each with its language."""
    return FENCE.findall(page.read_text())


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    for kind, text in fenced(page):
        if kind == "bash":
            found.append(Block(commands=text))
        elif kind == "text":
            assert found and not found[-1].said, f"nothing prints\n{text}"
            found[-1] = Block(commands=found[-1].commands, said=text)
    return found


def words(text: str) -> list[str]:
    """Return the lines of a text with single spaces, without rules and padding of tables."""
    return [" ".join(line.replace("─", " ").split()) for line in text.splitlines()]


def missing(said: str, printed: str) -> str | None:
    """Return the first line of what a page says that was not printed behind the one before; `...` is anything."""
    lines = iter(words(printed))
    for line in words(said):
        pattern = re.compile(".*".join(re.escape(part.strip(" ")) for part in line.split("...")))
        if not any(pattern.search(one) for one in lines):
            return line
    return None


def run(block: Block, folder: Path, environment: dict[str, str]) -> tuple[str, Path]:
    """Run commands as a shell does that stops at the first that fails; return what they printed and where they end."""
    script = f"trap 'pwd > {folder.parent}/cwd' EXIT\n{block.commands}"
    done = subprocess.run(
        ["bash", "-e", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{block.commands}\n{done.stdout}\n{done.stderr}"
    return done.stdout, Path((folder.parent / "cwd").read_text().strip())


def follow(told: Iterable[Block], folder: Path) -> tuple[Path, list[str]]:
    """Do what a page says; return the folder in which it ends, and the commands that were not run."""
    checkout = folder / "growmerge"  # what the guide reads of one
    shutil.copytree(HOME / "configs", checkout / "configs")
    (checkout / ".venv").symlink_to(sys.prefix)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # A thread each: what these small models compute is not worth two.
    environment = {**os.environ, "PATH": path, "COLUMNS": "200", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    place, left = checkout, []
    for block in told:
        if block.commands.startswith(NOT_RUN):
            left += block.commands.splitlines()[1:]
            continue
        printed, place = run(block, place, environment)
        line = missing(block.said, printed)
        assert line is None, f"{block.commands}\ndid not print {line!r} in its place:\n{printed}"
    return place, left


@pytest.mark.network
@pytest.mark.covered
def test_all_before_the_run_does_what_the_guide_says(tmp_path: Path) -> None:
    before = [*takewhile(lambda block: RUN not in block.commands, blocks(GUIDE))]
    assert len(before) == 11
    place, left = follow(before, tmp_path)
    assert place == tmp_path / "nordic" and not left


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_command_does_what_the_guide_says(tmp_path: Path) -> None:
    folder, left = follow(blocks(GUIDE), tmp_path)
    assert left == ["hf auth login", "hf upload my-group/nordic-merged release"]
    bits = {
        name: json.loads((folder / "scores" / f"{name}.json").read_text())["tasks"]
        for name in ("grown", "swe", "dan", "linear-swe_dan")
    }
    bits = {
        name: {task: tasks[task]["bits_per_byte"]["value"] for task in ("english", "swedish", "danish")}
        for name, tasks in bits.items()
    }
    for language, task in (("swe", "swedish"), ("dan", "danish")):
        assert bits[language][task] < bits["linear-swe_dan"][task] < bits["grown"][task]
        assert bits[language]["english"] > bits["grown"]["english"]


def test_files_are_shown_as_they_are() -> None:
    shown = [text for kind, text in fenced(GUIDE) if kind == "yaml"]
    names = [re.match(r"# (\w+\.yaml): ", text)[1] for text in shown]  # type: ignore[index]
    assert shown == [(HOME / "configs" / "guide" / name).read_text() for name in names]
    assert {*names} == {path.name for path in (HOME / "configs" / "guide").glob("*.yaml")}


def test_what_is_not_said_in_order_is_found_missing() -> None:
    printed = " model   value \n ─────────────\n  swe     2.834  \n  dan 3.1\n"
    assert missing("model value\nswe 2.8...\n", printed) is None
    assert missing("swe 2.8...\nmodel\n", printed) == "model"
    assert missing("swe 2.9...\n", printed) == "swe 2.9..."
    assert missing("swe ... 3.1\n", printed) == "swe ... 3.1"
