"""Samplers, one file each, as tables of coefficients.

sampler.py defines the interface; `known` finds every sampler in this package; plan.py runs them.  This package does not
import JAX, so programs list the names quickly.
"""

import sys

from sdjax.diffusion.samplers.sampler import Sampler
from sdjax.runtime.members import values


def known() -> dict[str, Sampler]:
    """Returns {name: Sampler} of all samplers."""
    return {one.name: one for one in values(sys.modules[__name__], Sampler)}
