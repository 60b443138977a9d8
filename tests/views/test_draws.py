"""Named streams of random numbers: pinned bit by bit, because every stored label depends on them."""

import hashlib
import math

import numpy as np
import pytest
from scipy import stats

from pipeline.views import exact
from pipeline.views.draws import Draws, draws_for, stream_of

SURE = 1e-4  # smallest p-value that passes; the streams are fixed, so a test that passes once passes always


def golden() -> Draws:
    return draws_for("recipe", "n01440764/n01440764_10026", 3, "crop")


GOLDEN = [
    # what is drawn, from the start of the stream
    ("bits", lambda d: [d.bits() for _ in range(2)], [0xE87C732F0373516C, 0xBD30EA4032D4D027]),
    # the 9th and 10th word are the first of the second BLAKE2b block
    ("bits 9, 10", lambda d: [d.bits() for _ in range(10)][8:], [0xB19739E26CDA3A42, 0xD1274444E9CC50CD]),
    ("uniform", lambda d: [d.uniform() for _ in range(2)], [0.9081489553240776, 0.7390276343092694]),
    ("uniform in a range", lambda d: [d.uniform(-2, 5)], [4.357042687268543]),
    ("chance", lambda d: [d.chance(0.5) for _ in range(5)], [False, False, False, True, False]),
    ("integer", lambda d: [d.integer(stop) for stop in (10, 1000, 2**40, 1)], [9, 739, 639765778084, 0]),
    ("normal", lambda d: [d.normal() for _ in range(2)], [1.3294423023725057, 0.6403505383360901]),
    ("normal, by another quantile", lambda d: [d.normal(lambda share: 2 * share)], [1.8162979106481551]),
    ("inside", lambda d: [d.inside() for _ in range(2)], [0.9081489553240776, 0.7390276343092694]),
    # below one: with Marsaglia and Tsang's boost
    ("beta 0.8", lambda d: [d.beta(0.8) for _ in range(2)], [0.975454854129847, 0.1280374343405844]),
    ("beta 1", lambda d: [d.beta(1.0) for _ in range(2)], [0.7422484297272228, 0.7988267436365952]),
    ("beta 3", lambda d: [d.beta(3.0) for _ in range(2)], [0.6448161888979714, 0.671142620075574]),
    ("raw", lambda d: d.raw(2).tolist(), [0x603317A5D95FB930, 0xA5A573F773BB54A0]),
    ("permutation", lambda d: d.permutation(12).tolist(), [5, 3, 4, 2, 7, 11, 0, 8, 9, 1, 10, 6]),
]


@pytest.mark.parametrize(("what", "draw", "numbers"), GOLDEN, ids=[what for what, *_ in GOLDEN])
def test_a_stream_gives_the_numbers_that_stored_labels_were_made_with(what, draw, numbers):
    assert draw(golden()) == numbers, f"{what}: other numbers break every label set; raise RENDERER if it must be"


def test_bits_are_blake2b_in_counter_mode_over_length_prefixed_names():
    name = b"\x06\0\0\0recipe" + b"\x03\0\0\0key" + b"\x01\0\0\0" + b"7" + b"\x04\0\0\0flip"
    seed = hashlib.blake2b(name, digest_size=32).digest()
    blocks = [hashlib.blake2b(seed + bytes([block]) + bytes(7)).digest() for block in range(3)]
    words = np.frombuffer(b"".join(blocks), "<u8").tolist()
    stream = draws_for("recipe", "key", 7, "flip")
    assert [stream.bits() for _ in range(24)] == words


NAMES = [
    # no two of these may be the same stream
    ("ab", "c"),
    ("a", "bc"),
    ("abc",),
    ("abc", ""),
    ("", "abc"),
    ("a", "b", "c"),
    # a name that spells another one's length prefix
    ("a\x02\0\0\0bc",),
    ("1", "2"),
    ("12",),
    ("é",),
    ("e\u0301",),  # the same letter, composed otherwise: keys are compared by their bytes
]


def test_different_names_are_different_streams():
    first_words = {stream_of(*name).bits() for name in NAMES}
    assert len(first_words) == len(NAMES)


def test_each_argument_of_draws_for_names_another_stream():
    streams = [("r", "k", 1, "crop"), ("s", "k", 1, "crop"), ("r", "l", 1, "crop"), ("r", "k", 2, "crop")]
    streams += [("r", "k", 1, "flip"), ("r", "k", 11, "crop"), ("r", "k1", 1, "crop"), ("r1", "k", 1, "crop")]
    assert len({draws_for(*name).bits() for name in streams}) == len(streams)


def test_two_streams_of_one_name_are_equal_and_do_not_advance_each_other():
    first, second = golden(), golden()
    other = stream_of("other")
    ahead = [first.bits() for _ in range(20)]
    behind = [(other.bits(), second.bits())[1] for _ in range(20)]
    assert ahead == behind


class Constant(Draws):
    """A stream whose every word is the same: the ends of each range."""

    def __init__(self, word: int) -> None:
        super().__init__(b"")
        self.word = word

    def bits(self) -> int:
        return self.word


LOWEST, HIGHEST = 0, 2**64 - 1


@pytest.mark.parametrize(
    ("word", "uniform", "last"),
    [
        (LOWEST, 0.0, 0),
        (HIGHEST, 1 - 2.0**-53, 6),
        (2**63, 0.5, 3),
        (2**11 - 1, 0.0, 0),  # the lowest 11 bits do not count
    ],
)
def test_the_ends_of_the_ranges(word, uniform, last):
    stream = Constant(word)
    assert stream.uniform() == uniform
    assert stream.integer(7) == last
    assert stream.integer(1) == 0
    assert stream.chance(0.0) is False
    assert stream.chance(1.0) is True


def test_chance_is_never_true_at_0_always_at_1_and_always_reads_one_word():
    for probability in (0.0, 0.3, 1.0):
        stream, beside = stream_of("chance"), stream_of("chance")
        outcomes = [(stream.chance(probability), beside.bits())[0] for _ in range(1000)]
        assert stream.bits() == beside.bits()
        assert abs(np.mean(outcomes) - probability) < 0.05
    assert not any(stream_of("a").chance(0.0) for _ in range(100))


def test_the_lowest_normal_is_finite():
    assert -8.4 < Constant(LOWEST).normal() < -8.2


def test_the_highest_normal_is_finite():
    assert 8.0 < Constant(HIGHEST).normal() < 8.4


def sample(count: int, draw) -> np.ndarray:
    stream = stream_of("distribution")
    return np.array([draw(stream) for _ in range(count)])


DISTRIBUTIONS = [
    # name, draw, the distribution it must be, a near one that it must not be
    ("uniform", lambda d: d.uniform(), stats.uniform(), stats.uniform(0, 1.04)),
    ("uniform(-2, 5)", lambda d: d.uniform(-2, 5), stats.uniform(-2, 7), stats.uniform(-2.3, 7.3)),
    ("normal", lambda d: d.normal(), stats.norm(), stats.norm(0, 1.1)),
    ("normal(exact)", lambda d: d.normal(exact.normal_quantile), stats.norm(), stats.norm(0.06, 1)),
    ("beta(0.8)", lambda d: d.beta(0.8), stats.beta(0.8, 0.8), stats.beta(1, 1)),
    ("beta(1)", lambda d: d.beta(1.0), stats.beta(1, 1), stats.beta(0.8, 0.8)),
    ("beta(3)", lambda d: d.beta(3.0), stats.beta(3, 3), stats.beta(2.6, 2.6)),
    # strongly U-shaped: most pairs are nearly unmixed
    ("beta(0.3)", lambda d: d.beta(0.3), stats.beta(0.3, 0.3), stats.beta(0.35, 0.35)),
]


@pytest.mark.parametrize(("name", "draw", "right", "wrong"), DISTRIBUTIONS, ids=[name for name, *_ in DISTRIBUTIONS])
def test_numbers_have_the_distribution_they_are_named_after(name, draw, right, wrong):
    drawn = sample(20_000, draw)
    assert stats.kstest(drawn, right.cdf).pvalue > SURE
    assert stats.kstest(drawn, wrong.cdf).pvalue < SURE, "the test has no power: it takes a wrong distribution too"


def test_first_numbers_of_different_streams_are_independent_and_uniform():
    """Views read the first numbers of many streams, rarely many numbers of one."""
    first = np.array([[draws_for("r", f"k{i}", view, "crop").uniform() for view in range(20)] for i in range(1000)])
    assert stats.kstest(first.ravel(), stats.uniform.cdf).pvalue > SURE
    correlation = np.corrcoef(first, rowvar=False) - np.eye(20)
    assert np.abs(correlation).max() < 4.5 / math.sqrt(1000)


def test_integers_cover_their_range_evenly():
    counts = np.bincount(sample(30_000, lambda d: d.integer(15)), minlength=15)
    assert len(counts) == 15
    assert stats.chisquare(counts).pvalue > SURE


def test_a_vanishing_alpha_is_a_fair_coin():
    """Both gammas underflow to zero here."""
    sides = [stream_of(str(i)).beta(1e-7) for i in range(400)]
    assert set(sides) == {0.0, 1.0}
    assert 140 < sum(sides) < 260


def test_raw_words_are_those_of_philox_keyed_by_the_next_128_bits():
    beside, stream = golden(), golden()
    low, high = beside.bits(), beside.bits()
    expected = np.random.Philox(key=[low, high]).random_raw(1000)
    words = stream.raw(1000)
    assert words.dtype == np.uint64
    np.testing.assert_array_equal(words, expected)
    assert stream.bits() == beside.bits(), "the stream advances by two words"


@pytest.mark.parametrize("count", [0, 1, 7, 1000])
def test_fewer_raw_words_are_the_first_of_more(count):
    np.testing.assert_array_equal(golden().raw(count), golden().raw(1000)[:count])


@pytest.mark.parametrize("count", [0, 1, 2, 255, 256])
def test_a_permutation_has_every_number_once_and_keeps_its_order_when_more_are_drawn(count):
    order = golden().permutation(count)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(count))
    more = golden().permutation(1000)
    np.testing.assert_array_equal(more[more < count], order)


def test_every_permutation_is_as_likely():
    orders = [tuple(stream_of("p", str(i)).permutation(4).tolist()) for i in range(6000)]
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > SURE
