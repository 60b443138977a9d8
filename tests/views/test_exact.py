"""Functions rounded to a grid: against high precision, at the boundaries of rounding, and with a library that is a little wrong.

The high precision is that of `support.defined_views`, whose own numbers are checked here, too.
"""

import math
import random
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from statistics import NormalDist

import pytest
from support import defined_views

from pipeline.views import exact

ERROR = 2.0**-44  # more than any library is wrong by, and less than exact._GUARD
GRIDS = {"exp": 2.0**-32, "log": 2.0**-32, "normal_quantile": 2.0**-32}
REFERENCES: dict[str, Callable[[float], float]] = {
    "exp": defined_views.exp_32,
    "log": defined_views.log_32,
    "normal_quantile": defined_views.normal_32,
}
FUNCTIONS: dict[str, Callable[[float], float]] = {
    "exp": exact.exp,
    "log": exact.log,
    "normal_quantile": exact.normal_quantile,
}
INVERSES: dict[str, Callable[[float], float]] = {"exp": math.log, "log": math.exp, "normal_quantile": NormalDist().cdf}


def arguments(name: str, count: int) -> list[float]:
    """Return arguments over the whole range of use."""
    generator = random.Random(name)
    match name:
        case "exp":  # log(ratio), 0.01 < ratio < 100
            return [generator.uniform(-4.7, 4.7) for _ in range(count)]
        case "log":
            return [10 ** generator.uniform(-2, 2) for _ in range(count)]
    shares = [generator.random() for _ in range(count // 2)]
    return shares + [min(max(10 ** generator.uniform(-16, 0), 2.0**-54), 1 - 2.0**-53) for _ in range(count // 2)]


EDGES = {
    "exp": [0.0, 1.0, -1.0, 2.0**-60, -(2.0**-60), 4.605170185988092, -4.605170185988092],
    "log": [1.0, 0.75, 4 / 3, 0.3, 1 / 0.3, 0.01, 100.0, math.nextafter(1, 0), math.nextafter(1, 2)],
    # the ends, the middle, and where AS 241 changes its polynomial: |p - 1/2| = 0.425, and p = exp(-25)
    "normal_quantile": [
        2.0**-54,
        1 - 2.0**-53,
        0.5,
        0.5 + 2.0**-53,
        0.075,
        0.925,
        math.nextafter(0.075, 0),
        math.nextafter(0.925, 1),
        math.exp(-25),
        math.nextafter(math.exp(-25), 0),
        math.nextafter(math.exp(-25), 1),
        1 - math.exp(-25),
    ],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_are_those_of_high_precision_rounded_once(name):
    for value in EDGES[name] + arguments(name, 2000):
        assert FUNCTIONS[name](value) == REFERENCES[name](value), value.hex()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_are_on_the_grid_and_next_to_the_librarys(name):
    for value in EDGES[name] + arguments(name, 500):
        near = {"exp": math.exp, "log": math.log, "normal_quantile": NormalDist().inv_cdf}[name](value)
        rounded = FUNCTIONS[name](value)
        assert (rounded / GRIDS[name]).is_integer()
        assert abs(rounded - near) <= 0.5 * GRIDS[name] + ERROR


def boundaries(name: str, count: int) -> list[float]:
    """Return arguments whose value is as near to half a step of the grid as real64 can be."""
    found, unit = [], GRIDS[name]
    for value in arguments(name, count):
        half = (math.floor(REFERENCES[name](value) / unit) + 0.5) * unit
        near = INVERSES[name](half)
        if not (name == "normal_quantile" and not 1e-3 < near < 1 - 1e-3):  # the tails are too flat to come near
            found += [math.nextafter(near, 0), near, math.nextafter(near, math.inf)]
    return found


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_at_boundaries_of_rounding_are_right(name, monkeypatch):
    """Here the library alone would decide, and its error with it: the exact value is computed."""
    computed = []
    exactly = exact._rounded

    def counted(near: float, value: Callable[[], Decimal]) -> float:
        return exactly(near, lambda: (computed.append(near), value())[1])

    monkeypatch.setattr(exact, "_rounded", counted)
    at_boundaries = boundaries(name, 200)
    for value in at_boundaries:
        assert FUNCTIONS[name](value) == REFERENCES[name](value), value.hex()
    assert len(computed) > 0.9 * len(at_boundaries) > 300


@pytest.mark.parametrize("error", [-ERROR, ERROR])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_error_of_a_library_changes_no_value(name, error, monkeypatch):
    """Each value is the same if the library is wrong by more than any library is."""
    values = EDGES[name] + arguments(name, 1000) + boundaries(name, 100)
    before = [FUNCTIONS[name](value) for value in values]
    rounded = exact._rounded
    monkeypatch.setattr(exact, "_rounded", lambda near, *rest: rounded(near + error, *rest))
    assert [FUNCTIONS[name](value) for value in values] == before


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_exact_path_alone_gives_the_values_of_both(name, monkeypatch):
    values = EDGES[name] + arguments(name, 500)
    before = [FUNCTIONS[name](value) for value in values]
    monkeypatch.setattr(exact, "_GUARD", 1.0)  # nothing is far enough from a boundary
    assert [FUNCTIONS[name](value) for value in values] == before


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_error_of_a_library_would_change_values_without_the_exact_path(name, monkeypatch):
    monkeypatch.setattr(exact, "_GUARD", 0.0)
    values = boundaries(name, 100)
    before = [FUNCTIONS[name](value) for value in values]
    rounded = exact._rounded
    monkeypatch.setattr(exact, "_rounded", lambda near, *rest: rounded(near + ERROR, *rest))
    assert [FUNCTIONS[name](value) for value in values] != before


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_rise(name):
    values = [FUNCTIONS[name](value) for value in sorted(arguments(name, 3000) + EDGES[name])]
    assert values == sorted(values)


def test_the_quantile_is_odd_about_one_half():
    for value in [k / 1024 for k in range(1, 512)]:
        assert exact.normal_quantile(value) == -exact.normal_quantile(1 - value)


def test_the_quantile_has_more_than_20_digits_before_it_is_rounded():
    """A wrong coefficient, or a change of polynomials at another place, is far smaller than the grid."""
    for share in EDGES["normal_quantile"] + arguments("normal_quantile", 500):
        expected = defined_views.as241(Decimal(share))
        assert abs(exact._as241(Decimal(share)) - expected) <= Decimal("1e-25"), share.hex()


def test_the_coefficients_are_those_of_the_paper():
    """Their last digits, printed with the algorithm as sums to check them by; and Python has the same algorithm."""
    tables = [exact._CENTRE, exact._NEAR, exact._FAR]
    for table, sums in zip(
        tables, ("55.8831928806149014439", "49.3320650330161028903", "47.5258331754928967163"), strict=True
    ):
        digits = sum(Decimal(c).scaleb(-Decimal(c).adjusted()) for polynomial in table for c in polynomial)
        assert digits - 1 == pytest.approx(Decimal(sums), abs=Decimal("1e-15")), "a coefficient has a wrong digit"
    for table, others in zip(tables, (defined_views.CENTRE, defined_views.NEAR, defined_views.FAR), strict=True):
        for mine, other in zip(table, others, strict=True):
            assert [Decimal(c) for c in mine] == [Decimal(c) for c in other.split()[::-1]]


# --- cosine and sine ------------------------------------------------------------------------------------------

SPECIAL = [
    # degrees, cosine and sine of minus that angle; each to 15 decimals
    (0.0, 1.0, 0.0),
    (30.0, 0.866025403784439, -0.5),
    (45.0, 0.707106781186548, -0.707106781186547),
    (60.0, 0.5, -0.866025403784439),
    (90.0, 0.0, -1.0),
    (120.0, -0.5, -0.866025403784439),
    (135.0, -0.707106781186547, -0.707106781186548),
    (150.0, -0.866025403784439, -0.5),
    (180.0, -1.0, 0.0),
    (210.0, -0.866025403784439, 0.5),
    (225.0, -0.707106781186548, 0.707106781186547),
    (270.0, 0.0, 1.0),
    (300.0, 0.5, 0.866025403784439),
    (315.0, 0.707106781186547, 0.707106781186548),
    (330.0, 0.866025403784438, 0.5),
    (360.0, 1.0, 0.0),
]


@pytest.mark.parametrize(("degrees", "cos", "sin"), SPECIAL)
def test_rotations_by_special_angles(degrees, cos, sin):
    assert exact.rotation(degrees) == pytest.approx((cos, sin), abs=2e-15)
    assert exact.rotation(degrees) == defined_views.cos_sin_15(degrees)


def test_rotations_are_those_of_high_precision():
    generator = random.Random(0)
    near_zero = [5e-324, 1e-300, 2.0**-40, math.nextafter(360, 0), math.nextafter(90, 0), math.nextafter(180, 400)]
    for degrees in [generator.uniform(0, 360) for _ in range(300)] + near_zero:
        assert exact.rotation(degrees) == defined_views.cos_sin_15(degrees), degrees


def test_rotations_have_the_librarys_15_decimals_and_lie_on_the_circle():
    """All libraries agree to 15 decimals, except where the next ones are a five and zeros."""
    generator, others = random.Random(1), 0
    for _ in range(2000):
        degrees = generator.uniform(0, 360)
        angle = -math.radians(degrees)
        cos, sin = exact.rotation(degrees)
        assert math.hypot(cos, sin) == pytest.approx(1, abs=2e-15)
        assert (cos, sin) == pytest.approx((math.cos(angle), math.sin(angle)), abs=7e-16)
        others += (cos, sin) != (round(math.cos(angle), 15), round(math.sin(angle), 15))
    assert others < 20


def test_cosines_and_sines_have_more_than_30_digits():
    """They are rounded three times; each of the roundings needs the exact value."""
    generator = random.Random(2)
    for _ in range(200):
        angle = Fraction(generator.uniform(-6.3, 6.3))
        cos, sin = (Fraction(value, 1 << exact._BITS) for value in exact._cos_sin(angle))
        assert abs(cos * cos + sin * sin - 1) < Fraction(1, 10**40)
        half = [Fraction(value, 1 << exact._BITS) for value in exact._cos_sin(angle / 2)]
        assert abs(cos - (half[0] ** 2 - half[1] ** 2)) < Fraction(1, 10**40)
        assert abs(sin - 2 * half[0] * half[1]) < Fraction(1, 10**40)
