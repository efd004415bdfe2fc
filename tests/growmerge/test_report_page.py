"""The page and the markdown: complete, safe, the same bytes for the same numbers."""

import copy
import hashlib
import json
import re
from base64 import b64encode
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import report_data

import growmerge.report
from growmerge.report import analyse, figures, render
from growmerge.report.drawing import LETTERS, mark

SCRIPT = (Path(growmerge.report.__file__).parent / "report.js").read_text()

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
    assert not names & {"link", "img", "iframe", "object", "embed", "base"}
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")]
    assert not re.findall(r"url\((?!#)", rendered[0])


def test_only_the_pages_own_script_may_run(rendered: tuple[str, str]) -> None:
    page = Page(rendered[0])
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [{}]
    assert page.words.count(SCRIPT) == 1
    (policy,) = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.split(" ", 1) for rule in (policy or "").split("; "))
    assert rules["default-src"] == "'none'"
    digest = b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    assert rules["script-src"] == f"'sha256-{digest}'"


def test_page_is_accessible(rendered: tuple[str, str]) -> None:
    page = Page(rendered[0])
    figures = [attributes for tag, attributes in page.tags if tag == "svg"]
    # A panel a language by tokens, FLOPs and time; the graph; losses: bases, two languages, joint; two searches.
    assert len(figures) == 3 * 3 + 1 + 4 + 2
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
    raw["tasks"][0]["name"] = raw["heat"][0]["rows"][0]["label"] = raw["comparisons"][0]["kind"] = HOSTILE
    raw["timings"]["incidents"][0]["text"] = raw["searches"]["2x-ties"]["search"]["method"] = HOSTILE
    html, markdown = render(analyse(raw))
    page = Page(html)
    assert page.open == []
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert HOSTILE in " ".join(page.words)
    assert html.replace(f"<script>{SCRIPT}</script>", "").count("<script") == 0
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
    stages = [*results["curves"]]
    assert [text for text, _, _ in figures.legend(results)] == stages
    for number, name in enumerate(report_data.LANGUAGES.values()):
        label = re.search(r'aria-label="([^"]*)"', figures.learning(results)[number])
        assert label
        assert label[1].startswith(f"Bits per byte on {name} by training tokens: ")
        assert all(f"{stage} ends at " in label[1] for stage in stages)
    assert len({mark(i) for i in range(36)}) == 36
    assert len(LETTERS) == 6


OPTIONAL = [
    *("baselines", "curves", "losses", "pairs", "growth", "checks", "samples"),
    *("corpora", "tokenizer", "versions", "timings", "searches", "tasks", "fertility", "comparisons", "heat"),
]


@pytest.mark.parametrize("gone", [["baselines"], ["curves"], OPTIONAL])
def test_parts_may_be_missing(gone: list[str]) -> None:
    raw = {key: value for key, value in report_data.raw().items() if key not in gone}
    html, markdown = render(analyse(raw))
    assert Page(html).open == []
    assert "than the 1x model: yes." in markdown
    assert ("5-gram" in html) == ("baselines" not in gone)
    assert ("learning-1" in html) == ("curves" not in gone)


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


def test_a_different_number_changes_the_page(results: dict[str, Any], rendered: tuple[str, str]) -> None:
    changed = copy.deepcopy(results)
    changed["bits_per_byte"]["2x-swe"]["swe"]["value"] += 0.01
    assert render(changed)[0] != rendered[0]
