"""The JSON of files for people is that of the standard library, indented by one space."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.storage.json import pretty_json

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


def plainly(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"


@given(VALUES)
def test_any_value_has_the_bytes_of_the_standard_library(value):
    try:
        expected = plainly(value)
    except UnicodeEncodeError:
        with pytest.raises(UnicodeEncodeError):
            pretty_json(value)
    else:
        assert pretty_json(value) == expected


@pytest.mark.parametrize(
    "value",
    [
        {"b": {"y": 1, "x": [1, 2, [3]]}, "a": []},  # keys are sorted on every level
        {1: [], 2: {3: [{}]}},  # keys that are not text
        {"a,\n b": ["], [", {": ": [","]}]},  # texts that look like separators
        [{}, [], {"a": {}}, ["", [""]]],  # nothing in a container
        "text",
        0.1,
        None,
    ],
)
def test_these_values_too(value):
    assert pretty_json(value) == plainly(value)


@pytest.mark.parametrize("value", [float("nan"), [float("inf")], {"a": {"b": [float("nan")]}}])
def test_a_number_that_json_does_not_have_is_refused(value):
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        pretty_json(value)
