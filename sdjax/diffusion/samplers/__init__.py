"""Samplers, one file each, as tables of coefficients.

sampler.py has the contract; `known` finds every sampler in this package.  This package does not import JAX, so programs
list the names quickly; plan.py runs the samplers.
"""

import sys

from sdjax.diffusion.samplers.sampler import Sampler
from sdjax.runtime.members import values


def known() -> dict[str, Sampler]:
    """Returns {name: Sampler} of all samplers."""
    return {one.name: one for one in values(sys.modules[__name__], Sampler)}
