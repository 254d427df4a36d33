"""Low-rank matrices: the best product of two thin factors for a change of a weight, by its singular values.

    up, down = split(change, Cut(rank=16))               # change [out n] ~ up [out r] down [r n]
    up, down = shortened(up, down, Cut(energy=0.99))     # of a product, without computing it

With D = sum_i s_i u_i v_i^T, s_1 >= s_2 >= ..., the factors are B = [sqrt(s_i) u_i] and A = [sqrt(s_i) v_i^T] for the
first r values.  Of all matrices of rank r, their product is nearest to D, at the distance sqrt(sum_{i>r} s_i^2).
Source: Eckart and Young 1936; kohya's resize_lora for the choice of r (rank, sv_fro and sv_ratio).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from sdjax.settings import ABOVE_0, FROM_1, check

SHARE = (lambda x: 0 < x <= 1, "a share above 0, to 1")
Matrix = Float32[np.ndarray, "rows columns"]


@dataclass(frozen=True)
class Cut:
    """The number of singular values that stay: the smallest of these limits, at least 1.

    rank: at most this many.  energy: as many as make up this share, in (0, 1], of the sum of squares.
    ratio: all that are at least 1 / ratio of the largest.
    Raises SettingError for a value out of range.
    """

    rank: int | None = None
    energy: float | None = None
    ratio: float | None = None

    def __post_init__(self):
        for name, accepted in (("rank", FROM_1), ("energy", SHARE), ("ratio", ABOVE_0)):
            if getattr(self, name) is not None:
                check(self, **{name: accepted})

    @property
    def whole(self) -> bool:
        """Whether no limit is set."""
        return self.rank is None and self.energy is None and self.ratio is None

    def count(self, values: Float32[np.ndarray, " n"]) -> int:
        """Returns r for singular values [n], the largest first."""
        found = len(values) if self.rank is None else min(self.rank, len(values))
        if self.energy is not None:
            held = np.cumsum(values.astype(np.float64) ** 2)
            found = min(found, int(np.searchsorted(held, self.energy * held[-1] * (1 - 1e-12))) + 1)
        if self.ratio is not None:
            found = min(found, int((values * self.ratio >= values[0]).sum()))
        return max(found, 1)


def split(change: Matrix, cut: Cut) -> tuple[Matrix, Matrix]:
    """Returns (up [out r], down [r n]) of a change [out n]."""
    left, values, right = np.linalg.svd(change, full_matrices=False)
    return _factors(left, values, right, cut)


def shortened(up: Matrix, down: Matrix, cut: Cut) -> tuple[Matrix, Matrix]:
    """Returns (up [out r], down [r n]) of a product of up [out R] and down [R n].

    With up = Q1 R1 and down^T = Q2 R2, the product and R1 R2^T, [R R], have the same singular values.
    """
    first, small = np.linalg.qr(up)
    second, other = np.linalg.qr(down.T)
    left, values, right = np.linalg.svd(small @ other.T, full_matrices=False)
    return _factors(first @ left, values, right @ second.T, cut)


def _factors(left, values, right, cut):
    count = cut.count(values)
    root = np.sqrt(values[:count])
    return left[:, :count] * root[None], root[:, None] * right[:count]
