"""Keyed permutations of 0 .. n-1 with random access: no table, no state, any n.

The generalised Feistel cipher with cycle walking of Black & Rogaway, "Ciphers with Arbitrary Finite
Domains" (CT-RSA 2002), methods 2 and 3. With s = ceil(sqrt(n)), x < s*s is split into x = L*s + R,
and a round maps (L, R) to (R, (L + F_k(R)) mod s), which can be undone whatever F is. An image >= n
is mapped again until it falls below n: the walk stays on one cycle of a permutation of s*s, so
what is left is a permutation of n. Since s*s - n <= 2*sqrt(n), walks are rare and short.

It shuffles; it does not keep secrets: F is splitmix64's finaliser (Steele et al., OOPSLA 2014).
All is integer arithmetic modulo 2**64: the same on every machine and with every version of numpy.
"""

import hashlib

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]

ROUNDS = 10  # four look random (Luby & Rackoff 1988); halves of two or three values need these
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, odd
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_30, _27, _31 = np.uint64(30), np.uint64(27), np.uint64(31)


def mix64(values: U64) -> U64:
    """A bijection of 64-bit words whose every output bit hangs on every input bit."""
    x = values ^ (values >> _30)
    x *= _MIX_1
    x ^= x >> _27
    x *= _MIX_2
    x ^= x >> _31
    return x


def key_of(*parts: int | str) -> U64:
    """A 64-bit key, shape (1,), of integers and strings; without torch, which takes seconds to
    import."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def derive(key: U64, *parts: npt.NDArray[np.int64]) -> U64:
    """A key for each tuple of integers >= 0: arrays that broadcast; other tuples, other streams."""
    for part in parts:
        key = mix64(key + (part.astype(np.uint64) + np.uint64(1)) * GOLDEN)
    return key


def permute(values: U64, sizes: U64, keys: U64) -> U64:
    """Where each value goes in the permutation of 0 .. size-1 that its key picks; shapes (n,).

    Values must be below their sizes, sizes below 2**52.
    """
    sides = _side(sizes)
    images = _rounds(values, sides, keys)
    walking = np.flatnonzero(images >= sizes)
    while walking.size:
        again = _rounds(images[walking], sides[walking], keys[walking])
        images[walking] = again
        walking = walking[again >= sizes[walking]]
    return images


def _side(sizes: U64) -> U64:
    """ceil(sqrt(size)); the float is a guess that integers set right."""
    one = np.uint64(1)
    side: U64 = np.sqrt(sizes.astype(np.float64)).astype(np.uint64)
    side += side * side < sizes
    side -= (side - one) * (side - one) >= sizes
    return side


def _rounds(values: U64, sides: U64, keys: U64) -> U64:
    left = values // sides
    right = values - left * sides
    key = keys
    for _ in range(ROUNDS):
        key = key + GOLDEN
        # Shifted, so that the sum cannot wrap; what modulo leaves uneven is below 2**-30.
        left, right = right, (left + (mix64(right + key) >> np.uint64(1))) % sides
    images = left * sides + right
    # Where s is odd, every round is odd as a permutation, and ten of them even: half of all
    # permutations would be missing, which tells for a handful of samples. A bit of the key
    # exchanges 0 and 1 (where there is a 1).
    swapped = (keys >> np.uint64(63)).astype(np.bool_) & (sides > np.uint64(1))
    images ^= (images < np.uint64(2)) & swapped
    return images
