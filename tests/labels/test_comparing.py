"""Which samples differ between two copies of a source: by name, and no more of them than there are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.labels.comparing import Comparison, Differences, Listing, compare_names


def listing(text: str, *, labels: str = "", hashes: str = "") -> Listing:
    """One letter for each key, class label and image; `-` is no class label."""
    numbers = [None if letter == "-" else int(letter) for letter in labels or "0" * len(text)]
    return Listing(tuple(text), numbers, [letter.encode() * 16 for letter in hashes])


def differences(mine: dict[str, Listing], theirs: dict[str, Listing]) -> Differences:
    comparison = Comparison()
    for shard in dict.fromkeys((*mine, *theirs)):
        comparison.add(shard, mine.get(shard, Listing()), theirs.get(shard, Listing()))
    return comparison.result()


ONE_SHARD = [
    # labelled, the copy, what is said
    ("abcd", "abcd", []),
    ("abcd", "acd", ["1 sample is missing: 'b' of s"]),
    ("abcd", "abxcd", ["1 sample is new: 'x' of s"]),
    ("abcd", "bcda", ["1 sample is in another place (same keys, other order): 'a' of s"]),  # and not all four
    ("abcd", "dabc", ["1 sample is in another place (same keys, other order): 'd' of s"]),
    ("abcd", "dcba", ["3 samples are in another place (same keys, other order): 'a' of s, 'b' of s, 'c' of s"]),
    ("abcd", "xbcd", ["1 sample is missing: 'a' of s", "1 sample is new: 'x' of s"]),
    ("abcd", "", ["4 samples are missing: 'a' of s, 'b' of s, 'c' of s and 1 more"]),
    ("", "ab", ["2 samples are new: 'a' of s, 'b' of s"]),
]


@pytest.mark.parametrize(("mine", "theirs", "said"), ONE_SHARD)
def test_keys_of_one_shard_are_named(mine, theirs, said):
    assert differences({"s": listing(mine)}, {"s": listing(theirs)}).describe(limit=3) == said


def test_class_labels_are_named_with_both_values():
    found = differences({"s": listing("abc", labels="01-")}, {"s": listing("abc", labels="021")})
    assert found.describe(limit=3) == [
        "2 samples are with another class label: 'b' of s (class 2, labelled as class 1), 'c' of s (class 1, labelled as unlabelled)"
    ]


def test_images_are_compared_by_key_wherever_they_lie():
    mine = {"s": listing("abc", hashes="123"), "t": listing("de", hashes="45")}
    theirs = {"s": listing("dba", hashes="421"), "t": listing("ce", hashes="39")}
    found = differences(mine, theirs)
    assert found.changed == ["'e' of t"]
    assert found.missing == found.new == []
    assert found.moved == ["'a' of s", "'c' of s (now in t)", "'d' of t (now in s)"]


def test_images_that_nobody_read_are_not_compared():
    assert differences({"s": listing("ab", hashes="12")}, {"s": listing("ab")}).describe(3) == []


def test_one_key_in_two_shards_is_two_samples():
    mine = {"s": listing("ab"), "t": listing("ab")}
    assert differences(mine, {"s": listing("ab"), "t": listing("b")}).missing == ["'a' of t"]
    assert differences(mine, mine).describe(3) == []


@given(st.permutations("abcdefgh"))
def test_what_is_not_named_as_moved_is_in_order(order):
    found = differences({"s": listing("abcdefgh")}, {"s": listing("".join(order))})
    moved = {name[1] for name in found.moved}
    stayed = [key for key in order if key not in moved]
    assert stayed == sorted(stayed)
    assert (found.moved == []) == (list(order) == sorted(order))


NAMES = [
    # labelled, the copy, what is said
    (("a", "b"), ["a", "b"], ""),
    (None, None, ""),
    ((), None, "the labelled classes have names, those of the copy have no names"),
    (("a", "b"), None, "the labelled classes have names, those of the copy have no names"),
    (None, ("a",), "the labelled classes have no names, those of the copy have names"),
    (("a", "b"), ("b", "a"), "the classes are in another order: number 0 is 'b', labelled as 'a'"),
    (("a", "b", "c"), ("a", "c"), "the copy lacks the class 'b'"),
    (("a",), ("a", "c"), "the copy has the new class 'c'"),
    (("a", "b"), ("a", "c"), "the copy lacks the class 'b' and has the new class 'c'"),
    (("a", "a"), ("a",), "the copy has 1 classes, 2 were labelled"),
]


@pytest.mark.parametrize(("mine", "theirs", "said"), NAMES)
def test_names_of_classes_are_compared_in_order(mine, theirs, said):
    assert compare_names("class", mine, theirs) == said
