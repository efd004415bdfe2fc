"""The page in a browser: tables sort, colours and curves switch, nothing overflows, hostile text does nothing."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import report_data
from browser import Unavailable, browser
from selenium.webdriver import Chrome, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from growmerge.report import analyse, render

HOSTILE = "<img src=x onerror='hacked=1'><script>hacked=1</script>\"'><svg onload='hacked=1'>"
DARK, WHITE = "rgb(17, 21, 28)", "rgb(255, 255, 255)"


@pytest.fixture(scope="module")
def driver() -> Iterator[Chrome]:
    """One browser for all tests; where none can be had they are skipped, except in CI, which must have one."""
    try:
        with browser() as found:
            yield found
    except Unavailable as error:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(str(error))


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return analyse(report_data.raw())


@pytest.fixture(scope="module")
def file(results: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render(results)[0])
    return path


@pytest.fixture
def page(driver: Chrome, file: Path) -> Iterator[Chrome]:
    """The report of the whole study, opened anew; at the end nothing is on the console."""
    emulate(driver, "light")
    driver.get(file.as_uri())
    yield driver
    assert driver.get_log("browser") == []


def emulate(driver: Chrome, scheme: str, *, media: str = "screen", width: int = 1440) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def table(driver: Chrome, caption: str) -> WebElement:
    (found,) = [
        one for one in driver.find_elements(By.TAG_NAME, "table") if one.get_attribute("innerText").startswith(caption)
    ]
    return found


def button(of: WebElement, column: int) -> WebElement:
    return of.find_elements(By.CSS_SELECTOR, "thead tr:last-child th button")[column]


def cells(of: WebElement, column: int = 0) -> list[list[str]]:
    """The texts of a column, a list a part of the table; rows whose cells span columns have fewer."""
    script = """return [...arguments[0].tBodies].map((body) =>
        [...body.rows].map((row) => row.cells[Math.min(arguments[1], row.cells.length - 1)].textContent))"""
    found: list[list[str]] = of.parent.execute_script(script, of, column)
    return found


def sorts(of: WebElement) -> list[str | None]:
    return [head.get_attribute("aria-sort") for head in of.find_elements(By.CSS_SELECTOR, "thead tr:last-child th")]


@pytest.mark.parametrize(("column", "key"), [(3, "tokens"), (4, "flops")])
def test_numbers_sort_by_value_and_the_unknown_comes_last(
    page: Chrome, results: dict[str, Any], column: int, key: str
) -> None:
    models = table(page, "Every model")
    baselines = ["unigram", "5-gram", "xz, primed"]
    assert cells(models) == [[*results["models"]], baselines]
    known = {name: model[key] for name, model in results["models"].items()}
    assert (None in known.values()) == (key == "tokens")
    for sign, word in ((1, "ascending"), (-1, "descending")):
        page.execute_script("arguments[0].scrollIntoView()", models)
        button(models, column).click()
        by_value = sorted(known, key=lambda name: float("inf") if known[name] is None else sign * known[name])
        assert cells(models) == [by_value, baselines]
        assert sorts(models) == [word if i == column else None for i in range(len(sorts(models)))]
    if key == "flops":
        first = cells(models, column)[0]
        assert first.index("3.13 T") < first.index("921.60 G")  # as text it would be the other way round


def test_sorting_by_keyboard_and_by_text(page: Chrome) -> None:
    spent = table(page, "What the run has cost")
    names = [stage["name"] for stage in report_data.stages()]
    first = button(spent, 0)
    first.send_keys(Keys.ENTER)
    assert cells(spent) == [sorted(names), ["all stages"]]
    page.switch_to.active_element.send_keys(Keys.SPACE)
    assert page.switch_to.active_element == first
    assert sorts(spent)[0] == "descending"
    assert cells(spent) == [sorted(names, reverse=True), ["all stages"]]


def test_cells_that_span_columns_sort_within_their_part(page: Chrome, results: dict[str, Any]) -> None:
    setups = table(page, "Bits per byte on held-out text")
    before = cells(setups)
    swedish_2x = 6
    button(setups, swedish_2x).click()
    assert cells(setups)[1] == ["xz, primed", "5-gram", "unigram"]
    assert {*cells(setups)[0]} == {*before[0]}
    values = [text for text in cells(setups, swedish_2x)[0] if text != "–"]
    known = [found["swe"]["value"] for name, found in results["bits_per_byte"].items() if name.startswith("2x-")]
    assert [f"{value:.3f}" for value in sorted(known)] == [v for v in values if float(v) < 3.9]
    assert cells(setups)[0][0] == "trained on Swedish"


def test_answers_stay_with_their_question(page: Chrome) -> None:
    answers = table(page, "Answers over all languages")
    before = cells(answers)
    button(answers, 2).click()
    after = cells(answers)
    assert after != before
    assert [sorted(part) for part in after] == [sorted(part) for part in before]
    assert all(part[0].startswith(f"Q{n}") for n, part in enumerate(after, 1))


def test_light_and_dark(page: Chrome) -> None:
    def colours() -> tuple[str, str, str]:
        script = """const style = (name) => getComputedStyle(document.querySelector(name));
            return [style("body").backgroundColor, style("svg text").fill, style("svg path").fill]"""
        return tuple(page.execute_script(script))

    light = colours()
    assert (light[0], light[2]) == (WHITE, WHITE)
    emulate(page, "dark")
    dark = colours()
    assert (dark[0], dark[2]) == (DARK, DARK)
    assert light[1] != dark[1]
    toggle = page.find_element(By.CLASS_NAME, "scheme")
    seen = []
    for _ in range(3):
        toggle.click()
        seen.append((toggle.text, colours()))
    assert seen == [("light", light), ("dark", dark), ("auto", dark)]
    emulate(page, "light")
    assert colours() == light
    for _ in range(2):
        toggle.click()
    assert colours() == dark
    emulate(page, "light", media="print")
    assert colours() == light


def test_curves_by_tokens_flops_and_time(page: Chrome) -> None:
    def shown() -> list[str]:
        return [
            one.get_attribute("class").split("by-")[1]
            for one in page.find_elements(By.CSS_SELECTOR, ".learning .charts")
            if one.is_displayed()
        ]

    assert shown() == ["tokens"]
    page.find_element(By.XPATH, "//label[contains(., 'FLOPs')]").click()
    assert shown() == ["flops"]
    page.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert shown() == ["time"]
    assert "training time (min)" in page.find_element(By.CSS_SELECTOR, ".learning").text


def test_without_scripts_all_is_there(driver: Chrome, file: Path) -> None:
    emulate(driver, "light")
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        driver.get(file.as_uri())
        assert not [one for one in driver.find_elements(By.TAG_NAME, "button") if one.is_displayed()]
        driver.find_element(By.XPATH, "//label[contains(., 'training time')]").click()
        shown = [one.is_displayed() for one in driver.find_elements(By.CSS_SELECTOR, ".learning .charts")]
        assert shown == [False, False, True]
    finally:
        driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


@pytest.mark.parametrize("kind", ["raw", "evaluation", "single_run", "unfinished"])
def test_nothing_overflows_a_narrow_window(driver: Chrome, file: Path, tmp_path: Path, kind: str) -> None:
    if kind != "raw":
        file = tmp_path / "report.html"
        file.write_text(render(analyse(getattr(report_data, kind)()))[0])
    emulate(driver, "light", width=400)
    driver.get(file.as_uri())
    whole, seen = "document.documentElement.scrollWidth", "document.documentElement.clientWidth"
    assert driver.execute_script(f"return [{whole} - {seen}, innerWidth]") == [0, 400]
    scrolled = driver.find_elements(By.CSS_SELECTOR, ".scroll, .wide")
    assert all(one.rect["x"] + one.rect["width"] <= 400 for one in scrolled)
    assert all(one.get_attribute("tabindex") == "0" for one in scrolled)
    assert driver.get_log("browser") == []


def test_hostile_text_runs_nothing(driver: Chrome, tmp_path: Path) -> None:
    text = json.dumps(report_data.unfinished() | {"heat": report_data.heat()})
    for name in ("Swedish", "base-1x", "step 140 of 300", "linear 2x", "swe + est", "no space left", "scaled"):
        assert name in text
        text = text.replace(name, f"{name}{json.dumps(HOSTILE)[1:-1]}")
    path = tmp_path / "report.html"
    path.write_text(render(analyse({**json.loads(text), "title": HOSTILE}))[0])
    emulate(driver, "light")
    driver.get(path.as_uri())
    assert driver.title == HOSTILE
    assert driver.execute_script("return typeof hacked") == "undefined"
    assert driver.execute_script("return document.scripts.length") == 1
    assert driver.get_log("browser") == []
    # What got into the page all the same would be refused.
    add = "const s = document.createElement('script'); s.textContent = 'hacked = 1'; document.body.append(s)"
    driver.execute_script(add)
    driver.execute_script("document.body.insertAdjacentHTML('beforeend', '<img src=\"x:\" onerror=\"hacked = 1\">')")
    assert driver.execute_script("return typeof hacked") == "undefined"
    assert "Content Security Policy" in driver.get_log("browser")[0]["message"]
