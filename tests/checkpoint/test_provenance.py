"""What records tell of descent, and what they do not."""

from checkpoint.provenance import descend, stems_from

BASE = {"name": "base", "hash": "b", "parents": [], "ancestors": []}


def test_descent_adds_up_over_generations() -> None:
    child = {"name": "swe", "hash": "s", **descend([BASE])}
    assert child == {"name": "swe", "hash": "s", "parents": [{"name": "base", "hash": "b"}], "ancestors": ["b"]}
    assert descend([child, {}]) == {
        "parents": [{"name": "swe", "hash": "s"}, {"name": None, "hash": None}],
        "ancestors": ["b", "s"],
    }


def test_who_stems_from_a_base() -> None:
    child = {"hash": "s", **descend([BASE])}
    grandchild = {"hash": "g", **descend([child])}
    assert stems_from(BASE, BASE) is stems_from(child, BASE) is stems_from(grandchild, BASE) is True
    assert stems_from(BASE, child) is False
    assert stems_from({"hash": "o", **descend([{"hash": "p"}])}, BASE) is False


def test_who_may_stem_from_a_base() -> None:
    assert stems_from({}, BASE) is None
    assert stems_from({"hash": "x", **descend([{}])}, BASE) is None
    assert stems_from({"hash": "s", **descend([BASE])}, {"name": "base"}) is None
    assert stems_from({"hash": "m", **descend([{}, BASE])}, BASE) is True
