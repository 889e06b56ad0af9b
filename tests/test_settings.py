"""Settings that are stated once: their checks and what they say."""

import inspect
from dataclasses import MISSING, dataclass, fields

import pytest

from shaped_attn.checks import check_positive
from shaped_attn.sde.prediction import Settings
from shaped_attn.settings import check_settings, documented, kinds, setting, setting_of
from shaped_attn.train.settings import TrainSettings


@documented
@dataclass(frozen=True, kw_only=True)
class Some:
    """Some settings."""

    count: int = setting(MISSING, "How many.")
    size: float | None = setting(None, "Of each.", check_positive, none="as large as it is")
    name: str = setting("a", "Of all.", choices=("a", "b"))
    other: list = ()

    def __post_init__(self):
        check_settings(self)


@dataclass(frozen=True, kw_only=True)
class Same:
    size: float | None = setting_of(Some, "size")


def test_the_docstring_says_what_each_means():
    assert inspect.getdoc(Some).split("\n") == [
        "Some settings.",
        "",
        "Attributes:",
        "    count: How many.",
        "    size: Of each. Default None: as large as it is.",
        '    name: Of all. One of "a", "b". Default "a".',
    ]


def test_a_value_has_the_type_of_its_check():
    assert kinds(Some) == {"count": int, "size": float, "name": str, "other": list}
    found = Some(count=3, size=2)
    assert (found.size, type(found.size), found.name) == (2.0, float, "a")
    assert Some(count=3).size is None
    assert fields(Same)[0].metadata == fields(Some)[1].metadata


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"count": 2.5}, TypeError, "count must be an int, got 2.5"),
        ({"count": None}, TypeError, "count must be an int, got None"),
        ({"count": 1, "size": 0}, ValueError, "size must be greater than 0"),
        ({"count": 1, "name": "c"}, ValueError, "name must be one of 'a', 'b', got 'c'"),
    ],
)
def test_a_wrong_value_is_refused(values, error, message):
    with pytest.raises(error, match=message):
        Some(**values)


@pytest.mark.parametrize("owner", [Settings, TrainSettings])
def test_no_setting_takes_a_value_of_another_type(owner):
    for field in fields(owner):
        with pytest.raises((TypeError, ValueError), match=field.name):
            owner(**{field.name: ["x"]})
