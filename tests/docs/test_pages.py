"""All pages: links lead somewhere, rooms are as they are told, and commands are those that growmerge has."""

import ast
import re
import shlex
from pathlib import Path

import click
import pytest

from growmerge.cli import main

HOME = Path(__file__).parents[2]
PAGES = [HOME / "README.md", *sorted((HOME / "docs").glob("*.md"))]
ROOMS = ("checkpoint", "eval", "growmerge", "merge", "parallel", "slurm", "train", "upscale")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PLACEHOLDERS = re.compile(r"\[[^\]]*\]|\.\.\.")


def anchors(page: Path) -> set[str]:
    """Return what a page's headings are called in links."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(page: Path) -> list[list[str]]:
    """Return the words of every command of growmerge that is a line of its own in a page's code."""
    text = page.read_text()
    code = "".join(body for kind, body in FENCE.findall(text) if kind in ("", "bash"))
    code += "".join(re.findall(r"^    (.*\n)", FENCE.sub("", text), re.MULTILINE))
    found = []
    for line in code.replace("\\\n", " ").splitlines():
        if line.startswith("growmerge "):
            words = shlex.split(PLACEHOLDERS.sub("", line), comments=True)
            end = next((at for at, word in enumerate(words) if word in ("|", "||", ">", "2>", "&")), len(words))
            found.append(words[1:end])
    return found


def problem(words: list[str]) -> str | None:
    """Return what click says of a command's verb, options and arguments; files need not be there."""
    command: click.Command = main
    context = click.Context(main, info_name="growmerge")
    while isinstance(command, click.Group):
        if not words or (inner := command.get_command(context, words[0])) is None:
            return f"no verb {words[:1]}"
        command, words = inner, words[1:]
        context = click.Context(command, info_name=command.name, parent=context)
    try:
        command.make_context(command.name, list(words), parent=context.parent)
    except click.UsageError as error:
        message = error.format_message()
        return None if message.endswith("does not exist.") else message
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for place in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        name, _, anchor = place.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), place
        assert not anchor or anchor in anchors(target), place


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_those_that_there_are(page: Path) -> None:
    for words in commands(page):
        assert problem(words) is None, f"growmerge {' '.join(words)}: {problem(words)}"


def test_commands_are_found_and_wrong_ones_noticed() -> None:
    assert ["grow", "SmolLM2-135M", "big", "--width", "2"] in commands(HOME / "README.md")
    assert ["plan", "plan.yaml"] in commands(HOME / "docs" / "planner.md")
    assert sum(len(commands(page)) for page in PAGES) > 60
    assert problem(["grow", "a", "b", "--widht", "2"]) == "No such option '--widht'. Did you mean '--width'?"
    assert problem(["data", "prepaer", "a"]) == "no verb ['prepaer']"
    assert problem(["merge", "a"]) == "Missing argument 'TARGET'."
    assert problem(["grow", "a", "b", "--width", "two"]) == "Invalid value for '--width': 'two' is not a valid integer."
    assert problem(["convert", "a", "b", "c"]) == "Got unexpected extra argument (c)"
    assert problem(["status", "runs/that-is-not-there"]) is None


def test_rooms_are_as_told() -> None:
    parts = re.split(r"^## (\w+)$", (HOME / "docs" / "rooms.md").read_text(), flags=re.MULTILINE)
    told = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert sorted(told) == sorted(ROOMS)
    for room, text in told.items():
        body, _, tests = text.partition("\nTests: ")
        places = [HOME / room, *([HOME / "train" / "data"] if room == "train" else [])]
        for name in re.findall(r"`(\w+\.(?:py|sh))`", body):
            assert any((place / name).is_file() for place in places), (room, name)
        for name in re.findall(r"`(tests/[\w/.]+)`", tests):
            assert (HOME / name).exists(), name
    table = re.findall(r"^\| (\d) \| `(\w+)/` .*\| `(\w+\.py)` \|$", parts[0], re.MULTILINE)
    assert sorted(room for _, room, _ in table) == sorted(ROOMS)
    assert all((HOME / room / name).is_file() for _, room, name in table)
    floors = {room: int(floor) for floor, room, _ in table}
    for room in ROOMS:
        for path in (HOME / room).rglob("*.py"):
            for other in imported(path) & {*ROOMS} - {room}:
                assert floors[other] < floors[room], f"{path} imports {other}"


def imported(path: Path) -> set[str]:
    """Return the packages that a file imports anywhere in it."""
    nodes = [*ast.walk(ast.parse(path.read_text()))]
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name.partition(".")[0] for name in found}
