"""Alarms: how they are written, when they go off, and what they say."""

import math
import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from eval.tasks import summarise_documents
from parallel.errors import InputError
from train.alarms import Alarm, Bound, bits_per_byte, check, parse_alarms

LANGUAGES = ("eng", "swe", "fin")


def test_alarms_as_a_yaml_file_has_them():
    text = "{eng: +0.05, swe: +5%, fin: +0.1 stop}"
    assert parse_alarms(yaml.safe_load(text), LANGUAGES, action="branch") == (
        Bound(language="eng", rise=0.05, action="branch"),
        Bound(language="swe", rise=0.05, relative=True, action="branch"),
        Bound(language="fin", rise=0.1, action="stop"),
    )
    assert parse_alarms({"eng": ".5 %  warn", "swe": 0, "fin": 1e-05}, LANGUAGES) == (
        Bound(language="eng", rise=0.005, relative=True),
        Bound(language="swe", rise=0.0),
        Bound(language="fin", rise=1e-05),
    )
    assert [str(bound) for bound in parse_alarms({"eng": "7%", "swe": "+0.05"}, LANGUAGES)] == ["+7%", "+0.05"]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (
            {"swa": 0.1},
            "alarms: unknown language with held-out text 'swa': allowed are eng, swe, fin; did you mean 'swe'?",
        ),
        ({"eng": "+0.1 halt"}, "alarms.eng: unknown action 'halt': allowed are warn, stop, branch"),
        *(
            (
                {"eng": value},
                f"alarms.eng: {value!r} is no rise: write bits per byte (+0.05) or a share (+5%), and after it, if you "
                "like, one of warn, stop, branch",
            )
            for value in (-0.1, "-5%", True, None, math.nan, math.inf, "a lot", "5% warn stop", [0.1])
        ),
    ],
)
def test_what_is_no_alarm_is_one_line(given, line):
    with pytest.raises(InputError, match=f"^{re.escape(line)}$"):
        parse_alarms(given, LANGUAGES)


def test_an_alarm_goes_off_above_its_bound_and_says_so():
    alarms = parse_alarms({"eng": "+0.05 stop", "swe": "+5%", "fin": "+0.05"}, LANGUAGES)
    first = {"eng": 1.0, "swe": 2.0, "fin": 3.0}
    assert check(alarms, first, first) == []
    assert check(alarms, first, {"eng": 0.5, "swe": 2.099, "fin": 3.049}) == []
    found = check(alarms, first, {"eng": 1.061, "swe": 2.2, "fin": math.nan})
    assert [(alarm.bound.language, alarm.bound.action) for alarm in found] == [
        ("eng", "stop"),
        ("swe", "warn"),
        ("fin", "warn"),
    ]
    assert found[0].text == (
        "eng: 1.0610 bits per byte held out, +0.0610, +6.1% from 1.0000 at the run's start; the alarm is at +0.05"
    )
    assert found[1].text == (
        "swe: 2.2000 bits per byte held out, +0.2000, +10.0% from 2.0000 at the run's start; the alarm is at +5%"
    )
    assert found[2].text.startswith("fin: nan bits per byte held out, +nan")
    nothing = Alarm(bound=Bound(language="eng", rise=0.1), first=0.0, now=0.2)
    assert "+0.2000 from 0.0000" in nothing.text


@given(st.floats(0.1, 10), st.floats(0, 3), st.floats(-5, 5), st.booleans())
def test_a_bound_is_met_or_broken_as_its_arithmetic_says(before, rise, change, relative):
    bound = Bound(language="eng", rise=rise, relative=relative)
    limit = before + (before * rise if relative else rise)
    if abs(before + change - limit) > 1e-9:
        broken = check([bound], {"eng": before}, {"eng": before + change})
        assert bool(broken) == (before + change > limit)


def test_bits_per_byte_are_those_of_the_report():
    documents = {
        "eng": [["a", 100.5, 80, 20], ["b", 40.25, 30, 9]],
        "swe": [["c", 9.0, 3, 1], ["d", 1.5, 3, 2]],
        "fin": [],
    }
    result = {"languages": {name: {"documents": rows} for name, rows in documents.items()}}
    found = bits_per_byte(result)
    assert found == {"eng": (100.5 + 40.25) / 110, "swe": 10.5 / 6}
    for name, value in found.items():
        report = summarise_documents(documents[name], resamples=100, confidence=0.95, seed=0)
        assert report["bits_per_byte"]["value"] == value
