"""Fills a run's cache before it trains: moments or pictures, and the text encoder's outputs.

    python train/cache.py CONFIG [a.b=value ...] data.cache=DIR

Use the recipe and settings of the run (train/run.py).  Rerun the command after any interruption: it computes what is
missing or damaged.  For randomly drawn prompts (templates, shuffled captions) it covers `epochs` epochs, at least one;
the run adds the others as it meets them.

    python train/cache.py CONFIG --help      what the recipe does, and every setting
"""

import sys

from sdjax.training import program


def main(arguments):
    """Fills the cache of one config; returns the exit status."""
    return program.fill(arguments, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
