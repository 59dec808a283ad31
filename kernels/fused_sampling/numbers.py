"""Numbers of the sampling kernels: floats that compare as integers, integer masses, noise."""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-(1 << 31))
ABOVE_ALL = tl.constexpr((1 << 31) - 1)
MINUS_INFINITY = tl.constexpr(-(0x7F800000 + 1))
"""What `ordered` makes of -inf."""
NOTHING = tl.constexpr(-(1 << 63))
"""Less than any packed score."""
UNIT = tl.constexpr(2.0**40)
"""The mass of a token with its row's highest score."""


@triton.jit
def ordered(x):
    """Map float32 to int32 of the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def unordered(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def between(low, high, step):
    """Return a key in [low, high): in turns the middle of their values and of their bits.

    The middle of the values is nearer to the middle of the scores. The middle of the bits ends
    any search within 32 steps.
    """
    value = ordered(0.5 * unordered(low) + 0.5 * unordered(high))
    bits = (low & high) + ((low ^ high) >> 1)
    pivot = tl.where((step & 1) == 0, value, bits)
    return tl.minimum(tl.maximum(pivot, low), high - 1)


@triton.jit
def packed(x, ids):
    """Pack a score and its id in one integer that orders by score, then by lower id."""
    return (ordered(x).to(tl.int64) << 32) + (0x7FFFFFFF - ids)


@triton.jit
def packed_id(packed):
    return 0x7FFFFFFF - (packed & 0xFFFFFFFF)


@triton.jit
def finite(x):
    """Replace infinities and NaN by 0, so that x can be subtracted."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def share_of(x, reference):
    """Return exp(x - reference), at most 1; 0 for NaN."""
    share = tl.exp(tl.minimum(x - reference, 0.0))
    return tl.where(share <= 1.0, share, 0.0)


@triton.jit
def mass_of(x, reference):
    return (share_of(x, reference) * UNIT).to(tl.int64)


@triton.jit
def logprob_of(x, reference, mass):
    return (x - reference) - tl.log(tl.maximum(mass, 1).to(tl.float32) * (1.0 / UNIT))


@triton.jit
def hash31(ids, key_0, key_1):
    """Compute what `kernels.sampling.hash31` does, for one key."""
    x = ids.to(tl.uint32) + key_0.to(tl.uint32, bitcast=True)
    x ^= x >> 17
    x *= 0xED5AD4BB
    x ^= x >> 11
    x += key_1.to(tl.uint32, bitcast=True)
    x *= 0xAC4C1B51
    x ^= x >> 15
    x *= 0x31848BAB
    x ^= x >> 14
    return x & 0x7FFFFFFF


@triton.jit
def gumbel(ids, key_0, key_1):
    """Compute what `kernels.sampling.gumbel_noise` does, for one key.

    The integers agree to the bit, the logarithms to about 2e-6. For u below 1/4, -log(1 - u) is
    computed as 2 atanh(u / (2 - u)) by its series, whose first omitted term is 4e-10 of it: the
    hardware's logarithm near 1, which is good to 2^-22, would leave nothing of a small u.
    """
    uniform = (hash31(ids, key_0, key_1).to(tl.float32) + 0.5) * 2.0**-31
    uniform = tl.minimum(uniform, 1 - 2.0**-24)
    r = uniform / (2.0 - uniform)
    s = r * r
    series = 2.0 * r * (1.0 + s * (1 / 3 + s * (1 / 5 + s * (1 / 7 + s * (1 / 9)))))
    exponential = tl.where(uniform < 0.25, series, -tl.log(1.0 - uniform))
    return -tl.log(exponential)
