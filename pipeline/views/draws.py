"""Counter-based random draws: a pure function of (recipe id, key, view, purpose).

The bits come from BLAKE2b (RFC 7693) in counter mode: half a microsecond per stream (a NumPy Philox takes thirty to set
up), and there are five streams per view. Long runs of bits (erasing noise, the order of an epoch) come from Philox:
NumPy promises never to change its raw integers. The code below turns both into numbers, because NumPy gives no such
promise for its distributions.
"""

import hashlib
import math
import struct
from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from pipeline.views import exact

_WORDS = struct.Struct("<8Q")  # the words of one BLAKE2b digest
_NORMAL = NormalDist()


class Draws:
    """A stream of random numbers. Reading it advances it; two streams with the same name are equal."""

    def __init__(self, name: bytes) -> None:
        self._seed = hashlib.blake2b(name, digest_size=32).digest()
        self._block = 0
        self._words: list[int] = []

    def bits(self) -> int:
        """Return the next 64 random bits, an integer in [0, 2**64)."""
        if not self._words:
            digest = hashlib.blake2b(self._seed + self._block.to_bytes(8, "little")).digest()
            self._words = list(_WORDS.unpack(digest))[::-1]
            self._block += 1
        return self._words.pop()

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """Return a number in [low, high), with 53 random bits."""
        return low + (high - low) * ((self.bits() >> 11) * 2.0**-53)

    def chance(self, probability: float) -> bool:
        """Return True with this probability; the stream always advances by one."""
        return self.uniform() < probability

    def integer(self, stop: int) -> int:
        """Return an integer in [0, stop); the bias of the multiplication is below stop / 2**64."""
        return (self.bits() * stop) >> 64

    def inside(self) -> float:
        """Return a number in (0, 1), with 53 random bits."""
        return min(((self.bits() >> 11) + 0.5) * 2.0**-53, 1 - 2.0**-53)  # the largest value would round to 1

    def normal(self, quantile: Callable[[float], float] = _NORMAL.inv_cdf) -> float:
        """Return a number from N(0, 1), by inversion with a quantile function."""
        return quantile(self.inside())

    def beta(self, alpha: float) -> float:
        """Return a number from Beta(alpha, alpha), as the ratio of two gamma draws."""
        first, second = self._gamma(alpha), self._gamma(alpha)
        # Both underflow only for a tiny alpha; the distribution is then a fair coin.
        return first / (first + second) if first + second > 0 else float(self.chance(0.5))

    def exact_beta(self, alpha: float) -> float:
        """Return a number from Beta(alpha, alpha) that no machine's mathematical library decides (docs/views-v2.md, section 4)."""
        difference = self._log_gamma(alpha) - self._log_gamma(alpha)
        ratio = exact.exp(-abs(difference))
        return (1.0 if difference > 0 else ratio) / (1.0 + ratio)

    def raw(self, count: int) -> NDArray[np.uint64]:
        """Return `count` random 64-bit words, uint64 [count], from a Philox keyed by the next 128 bits."""
        key = self.bits() | self.bits() << 64
        return np.random.Philox(key=key).random_raw(count)

    def permutation(self, count: int) -> NDArray[np.int64]:
        """Return 0 .. count-1 in random order, int64 [count]."""
        return np.argsort(self.raw(count), kind="stable")

    def _gamma(self, shape: float) -> float:
        """Return a gamma draw: Marsaglia and Tsang, ACM TOMS 26(3), 2000; with their boost U**(1/shape) for shapes below one."""
        if shape < 1:
            return self._gamma(shape + 1) * (1.0 - self.uniform()) ** (1 / shape)
        d = shape - 1 / 3
        c = 1 / math.sqrt(9 * d)
        while True:
            x = self.normal()
            v = (1 + c * x) ** 3
            if v > 0 and math.log(1.0 - self.uniform()) < 0.5 * x * x + d - d * v + d * math.log(v):
                return d * v

    def _log_gamma(self, shape: float) -> float:
        """Return the logarithm of a gamma draw, as `_gamma` draws it."""
        if shape < 1:
            return self._log_gamma(shape + 1) + exact.log(1.0 - self.uniform()) / shape
        d = shape - 1 / 3
        c = 1 / math.sqrt(9 * d)
        while True:
            x = self.normal(exact.normal_quantile)
            t = 1 + c * x
            v = t * t * t
            if v > 0 and exact.log(1.0 - self.uniform()) < 0.5 * x * x + d - d * v + d * exact.log(v):
                return exact.log(d * v)


def draws_for(recipe_id: str, key: str, view: int, purpose: str) -> Draws:
    """Return the stream of one decision of one view: a pure function of its four arguments.

    Args:
        recipe_id: id of the recipe, which holds the seed.
        key: sample key.
        view: view number.
        purpose: the decision (`crop`, `flip`, `randaug`, `erase`, `mix`, `pairs`); a new decision does not change the others.
    """
    return stream_of(recipe_id, key, str(view), purpose)


def stream_of(*parts: str) -> Draws:
    """Return the stream named by these texts; each has a length prefix, so different names give different bytes."""
    return Draws(b"".join(_prefixed(part) for part in parts))


@lru_cache(2**10)  # the streams of one view share all parts of their names except the last
def _prefixed(part: str) -> bytes:
    data = part.encode()
    return len(data).to_bytes(4, "little") + data
