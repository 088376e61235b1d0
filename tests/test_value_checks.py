"""Ranges of settings, at their ends."""

import math
import re

import pytest

from hf_lowrank.errors import ConfigError
from hf_lowrank.value_checks import check_between, check_count, check_positive, check_read


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("(0, 1)", [0.5, 1e-9], [0, 0.0, 1, 1.0]),
        ("(0, 1]", [1, 0.5], [0, 1.5]),
        ("[0, 1)", [0, 0.0, 0.99], [1, -0.1]),
        ("[0, 1]", [0, 1, 0.5], [-1e-9, 1 + 1e-9]),
    ],
)
def test_an_interval_has_its_open_ends_only(
    interval: str, inside: list[float], outside: list[float]
):
    for value in inside:
        check_between("share", value, interval)
    for value in [*outside, math.nan, math.inf, None, "0.5", True]:
        message = re.escape(f"share must lie in {interval}, got {value!r}.")
        with pytest.raises(ConfigError, match=f"^{message}$"):
            check_between("share", value, interval)


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, True, "1"])
def test_what_is_not_above_0_is_refused(value: object):
    check_positive("rate", 1e-9)
    with pytest.raises(ConfigError, match=f"^rate must be a number > 0, got {value!r}\\.$"):
        check_positive("rate", value)


def test_counts_start_where_they_are_said_to():
    check_count("steps", 0, 0)
    check_count("steps", 1)
    for value, least in ((0, 1), (-1, 0), (1.0, 1), (True, 1), (2, 3)):
        with pytest.raises(ConfigError, match=f"^steps must be an integer >= {least}, got {value}"):
            check_count("steps", value, least)


def test_a_setting_that_nothing_reads_is_refused_with_its_readers():
    check_read("alpha", 0.5, "metric", "one", ("one", "two"))
    with pytest.raises(ConfigError) as raised:
        check_read("alpha", 0.5, "metric", "plain", ("one", "two"))
    assert str(raised.value) == (
        "alpha=0.5 would do nothing with metric 'plain': it is read with metric one or two. Leave "
        "it out, or choose such a metric."
    )
