"""Bars on a terminal, plain lines elsewhere: of text that is read, of passes over it and of searches."""

import io
import json
import sys

import pytest

from growmerge import show
from growmerge.data import _Show as Preparing
from growmerge.searching import _Progress as Searching
from growmerge.statistics_show import Show as Counting
from merge.search import Try


class Stream(io.StringIO):
    """What is printed, by something that takes it for a terminal or not."""

    terminal = False

    def isatty(self):
        return self.terminal


def prepare(folder):
    with Preparing(folder / "log.jsonl") as preparing:
        preparing.event({"event": "pass", "corpus": "swe", "pass": "scan", "done": 100, "total": 400})
        preparing.event({"event": "shard", "size": 100})
        preparing.event({"event": "done", "corpus": "swe"})


def count(folder):
    with Counting("fisher of swe", folder / "log.jsonl", done=1000, total=4000) as counting:
        counting.update(2000)


def search(folder):
    with Searching(8) as searching:
        searching.tell(1, Try(factors={}, bits_per_byte={"swe": 2.5}, seconds=1.0))
        searching.tell(2, Try(factors={}, bits_per_byte={"swe": 3.5}, seconds=1.0))


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize(
    ("work", "share", "told"),
    [
        (prepare, "50", ["swe: reading", "swe: done"]),
        (count, "50", ["fisher of swe: goes on after 1,000 of 4,000 tokens", "tokens/s"]),
        (search, "25", ["search", "2 of 8 merges, best 2.5000 bits per byte"]),
    ],
)
def test_how_far_it_is(monkeypatch, tmp_path, work, share, told, terminal):
    stream = Stream()
    stream.terminal = terminal
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(show, "EVERY", -1)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    work(tmp_path)
    text = stream.getvalue()
    for words in told:
        assert words in text
    assert ("ETA" in text and "━" in text and f"{share}%" in text) == terminal
    assert (f" {share} %, " in text and "about 0 minutes left\n" in text) == (not terminal)
    if work is count:
        events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        assert [(event["done"], event["total"]) for event in events] == [(1000, 4000), (2000, 4000)]


def test_lines_come_every_so_often(monkeypatch, capsys):
    with show.Bar("text", 100) as bar:
        for done in range(1, 50):
            bar.update(done)
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(show, "EVERY", 0.0)
        bar.update(50)
    assert capsys.readouterr().err == "text: 50 %, about 0 minutes left\n"
