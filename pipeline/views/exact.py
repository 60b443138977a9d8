"""exp, log, sin, cos and the normal quantile, rounded once to a grid, so that no machine's mathematical library decides a pixel.

A library's value is within a few units in the last place of the exact one, and machines differ in these. It is used where every value so
near has the same rounding; elsewhere (about one value in a thousand) the exact value is computed with integers.
"""

import math
from collections.abc import Callable
from decimal import ROUND_HALF_EVEN, Context, Decimal
from fractions import Fraction
from statistics import NormalDist

_GUARD = (
    2.0**-42
)  # more than any library's error here: results of exp are below 128, logarithms below 64, quantiles below 8.3
_DIGITS = Context(prec=60, rounding=ROUND_HALF_EVEN)
_NORMAL = NormalDist()
_BITS = 160  # fixed point of sine and cosine
_PI_180 = float.fromhex("0x1.1df46a2529d39p-6")

# AS 241, PPND16 (Wichura, Applied Statistics 37(3), 1988): numerators and denominators, highest power first.
_CENTRE = (
    ("2509.0809287301226727", "33430.575583588128105", "67265.770927008700853", "45921.953931549871457",
     "13731.693765509461125", "1971.5909503065514427", "133.14166789178437745", "3.387132872796366608"),
    ("5226.495278852854561", "28729.085735721942674", "39307.89580009271061", "21213.794301586595867",
     "5394.1960214247511077", "687.1870074920579083", "42.313330701600911252", "1"),
)  # fmt: skip
_NEAR = (
    ("7.7454501427834140764e-4", "0.0227238449892691845833", "0.24178072517745061177", "1.27045825245236838258",
     "3.64784832476320460504", "5.7694972214606914055", "4.6303378461565452959", "1.42343711074968357734"),
    ("1.05075007164441684324e-9", "5.475938084995344946e-4", "0.0151986665636164571966", "0.14810397642748007459",
     "0.68976733498510000455", "1.6763848301838038494", "2.05319162663775882187", "1"),
)  # fmt: skip
_FAR = (
    ("2.01033439929228813265e-7", "2.71155556874348757815e-5", "0.0012426609473880784386", "0.026532189526576123093",
     "0.29656057182850489123", "1.7848265399172913358", "5.4637849111641143699", "6.6579046435011037772"),
    ("2.04426310338993978564e-15", "1.4215117583164458887e-7", "1.8463183175100546818e-5", "7.868691311456132591e-4",
     "0.0148753612908506148525", "0.13692988092273580531", "0.59983220655588793769", "1"),
)  # fmt: skip


def exp(value: float) -> float:
    """Return e**value, rounded to a multiple of 2**-32; for values below 4.8."""
    return _rounded(math.exp(value), lambda: Decimal(value).exp(_DIGITS))


def log(value: float) -> float:
    """Return the natural logarithm of a positive number, rounded to a multiple of 2**-32."""
    return _rounded(math.log(value), lambda: Decimal(value).ln(_DIGITS))


def normal_quantile(share: float) -> float:
    """Return the quantile of N(0, 1) at 0 < share < 1 by AS 241, rounded to a multiple of 2**-32."""
    return _rounded(_NORMAL.inv_cdf(share), lambda: _as241(Decimal(share)))


def rotation(degrees: float) -> tuple[float, float]:
    """Return the cosine and sine of minus an angle, in binary64 and then to 15 decimals, as Pillow's `Image.rotate` uses them.

    Args:
        degrees: 0 <= degrees < 360. They become radians by one multiplication in binary64, as in `math.radians`.
    """
    cos, sin = _cos_sin(Fraction(-(degrees * _PI_180)))
    return round(cos / (1 << _BITS), 15), round(sin / (1 << _BITS), 15)  # a quotient of integers is rounded correctly


def _rounded(near: float, exact: Callable[[], Decimal]) -> float:
    """Return the exact value, rounded to a multiple of 2**-32; `near` is a library's value of it."""
    steps = near * 2.0**32
    whole = round(steps)
    if abs(abs(steps - whole) - 0.5) <= _GUARD * 2.0**32:  # one value in a thousand
        whole = int(_DIGITS.multiply(exact(), Decimal(2**32)).to_integral_value(ROUND_HALF_EVEN))
    return whole * 2.0**-32


def _as241(share: Decimal) -> Decimal:
    number = _DIGITS
    middle = number.subtract(share, Decimal("0.5"))
    if abs(middle) <= Decimal("0.425"):
        r = number.subtract(Decimal("0.180625"), number.multiply(middle, middle))
        return number.multiply(middle, _ratio(_CENTRE, r))
    tail = share if middle < 0 else number.subtract(Decimal(1), share)
    r = number.sqrt(number.minus(tail.ln(number)))
    near = r <= 5
    r = number.subtract(r, Decimal("1.6" if near else "5"))
    return _ratio(_NEAR if near else _FAR, r).copy_sign(middle)


def _ratio(polynomials: tuple[tuple[str, ...], tuple[str, ...]], r: Decimal) -> Decimal:
    above, below = (_polynomial(each, r) for each in polynomials)
    return _DIGITS.divide(above, below)


def _polynomial(coefficients: tuple[str, ...], r: Decimal) -> Decimal:
    total = Decimal(0)
    for coefficient in coefficients:
        total = _DIGITS.fma(total, r, Decimal(coefficient))
    return total


def _cos_sin(angle: Fraction) -> tuple[int, int]:
    """Return cosine and sine in units of 2**-_BITS, by their power series; |angle| is below 7."""
    one = 1 << _BITS
    x = angle.numerator * one // angle.denominator
    sums, term, power = [0, 0], one, 0
    while term:
        sums[power % 2] += -term if power % 4 > 1 else term
        power += 1
        term = (term * x >> _BITS) // power
        if term == -1:  # the floor of a negative number of less than a unit
            break
    return sums[0], sums[1]
