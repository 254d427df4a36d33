"""Samplers, one file each: the ways from noise to a picture, as rows of numbers.

sampler.py says what a sampler is; a new file here is a new one, found by walking the package (`known`).  Nothing here
needs JAX, so that programs know the names without it; plan.py, above, runs them.
"""

import sys

from sdjax.diffusion.samplers.sampler import Sampler
from sdjax.runtime.members import values


def known() -> dict[str, Sampler]:
    """Returns {name: Sampler} of all samplers."""
    return {one.name: one for one in values(sys.modules[__name__], Sampler)}
