"""The page and the markdown: complete, safe, the same bytes for the same numbers."""

import copy
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
import report_data

from growmerge.report import analyse, render
from growmerge.report.graph_figure import edges, layers

HOSTILE = '<script>alert("x")</script>'


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, and the words outside of tags."""

    VOID = frozenset({"meta", "br", "hr", "img", "input", "link", "use", "path"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return analyse(report_data.raw())


@pytest.fixture(scope="module")
def rendered(results: dict[str, Any]) -> tuple[str, str]:
    return render(results)


def test_page_opens_offline(rendered: tuple[str, str]) -> None:
    page = Page(rendered[0])
    assert page.open == []
    assert "http:" not in rendered[0]
    assert "https:" not in rendered[0]
    assert "@import" not in rendered[0]
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base"}
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")]
    assert not re.findall(r"url\((?!#)", rendered[0])


def test_page_is_accessible(rendered: tuple[str, str]) -> None:
    page = Page(rendered[0])
    figures = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(figures) == 3 + 1 + 4  # a panel a language; the graph; losses: bases, two languages, joint
    assert all(found["role"] == "img" and len(found["aria-label"] or "") > 40 for found in figures)
    assert all(attributes.get("scope") for tag, attributes in page.tags if tag == "th")
    assert [tag for tag, _ in page.tags].count("caption") == [tag for tag, _ in page.tags].count("table")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {found[1:] for _, a in page.tags if (found := a.get("xlink:href"))} | set(
        re.findall(r"url\(#([^)]*)\)", rendered[0])
    )
    assert targets <= set(ids)


def test_same_numbers_in_page_and_markdown(results: dict[str, Any], rendered: tuple[str, str]) -> None:
    words = " ".join(Page(rendered[0]).words)
    for text in (words, rendered[1]):
        for question in results["questions"]:
            assert question["sentence"] in text
        for scores in results["bits_per_byte"].values():
            for found in scores.values():
                assert f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]" in text
        for found in results["forgetting"].values():
            assert f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]" in text
        for expected in (
            "|loss difference",
            "2.4e-07",
            "8 min 32 s",
            "a miniature: no evidence about large models",
            "2.13.0",
        ):
            assert expected in text.replace("\\|", "|"), expected
        for expected in (
            "Home Assistant 2025.4.4",
            "The Home Assistant Authors",
            "Apache-2.0",
            "One training seed",
            "39,870",
        ):
            assert expected in text


def test_best_model_is_bold(results: dict[str, Any], rendered: tuple[str, str]) -> None:
    best = min(scores["swe"]["value"] for scores in results["bits_per_byte"].values())
    worst = max(scores["swe"]["value"] for scores in results["bits_per_byte"].values())
    assert f"<strong>{best:.3f}</strong>" in rendered[0]
    assert f"**{best:.3f}**" in rendered[1]
    assert f"<strong>{worst:.3f}" not in rendered[0]


def test_same_results_same_bytes(results: dict[str, Any], rendered: tuple[str, str]) -> None:
    stored = json.loads(json.dumps(results, allow_nan=False))
    assert render(stored) == rendered


def test_markdown_tables_are_regular(rendered: tuple[str, str]) -> None:
    width = 0
    for line in rendered[1].splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        assert not (cells and width) or cells == width, line
        width = cells


def test_hostile_text_is_shown_not_run() -> None:
    raw = json.loads(json.dumps(report_data.raw()).replace("2x-swe", json.dumps(HOSTILE)[1:-1]))
    raw["title"] = HOSTILE
    raw["languages"]["swe"] = f"{HOSTILE}](javascript:x) $x_1$"
    raw["samples"][0]["text"] = f"{HOSTILE} | a `b` *c*\nd"
    raw["corpora"]["swe"]["sources"][0]["edition"] = HOSTILE
    html, markdown = render(analyse(raw))
    page = Page(html)
    assert page.open == []
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert HOSTILE in " ".join(page.words)
    assert "<script" not in html
    assert "<script" not in markdown
    assert "](javascript" not in markdown
    assert "\\| a \\`b\\` \\*c\\* d" in markdown


def test_pipeline_without_a_study() -> None:
    raw = report_data.raw()
    del raw["study"]
    results = analyse(raw)
    assert (results["questions"], results["forgetting"]) == ([], {})
    html, markdown = render(results)
    for stage, scores in results["bits_per_byte"].items():
        assert stage in html
        assert all(f"{found['value']:.3f}" in markdown for found in scores.values())
    assert "forgotten" not in html


OPTIONAL = [
    *("baselines", "curves", "losses", "pairs", "growth", "checks", "samples"),
    *("corpora", "tokenizer", "versions", "timings"),
]


@pytest.mark.parametrize("gone", [["baselines"], ["curves"], OPTIONAL])
def test_parts_may_be_missing(gone: list[str]) -> None:
    raw = {key: value for key, value in report_data.raw().items() if key not in gone}
    html, markdown = render(analyse(raw))
    assert Page(html).open == []
    assert "than the 1x model: yes." in markdown
    assert ("5-gram" in html) == ("baselines" not in gone)
    assert ("learning-0" in html) == ("curves" not in gone)


def test_inexact_growth_and_large_models_are_said() -> None:
    raw = report_data.raw()
    raw["growth"][1]["difference"] = -0.02
    raw["models"]["2x-swe"]["parameters"] = 572_494_464
    html, markdown = render(analyse(raw))
    for text in (html, markdown):
        assert "growth NOT exact" in text
        assert "2.0e-02" in text
        assert "572,494,464" in text
        assert "a miniature" not in text


def test_graph_layers_and_edges() -> None:
    graph = [
        {"name": "seed", "verb": "train", "inputs": ["/a/checkpoint"]},
        {"name": "base", "verb": "train", "inputs": ["seed"]},
        {"name": "a", "verb": "train", "inputs": ["base"]},
        {"name": "b", "verb": "train", "inputs": ["base", "seed"]},
        {"name": "merge", "verb": "merge", "inputs": ["a", "b", "base"]},
    ]
    assert layers(graph) == [["seed"], ["base"], ["a", "b"], ["merge"]]
    assert edges(graph) == [("seed", "base"), ("base", "a"), ("base", "b"), ("a", "merge"), ("b", "merge")]
    assert layers([]) == []


def test_a_different_number_changes_the_page(results: dict[str, Any], rendered: tuple[str, str]) -> None:
    changed = copy.deepcopy(results)
    changed["bits_per_byte"]["2x-swe"]["swe"]["value"] += 0.01
    assert render(changed)[0] != rendered[0]
