"""Fills a run's cache before it trains: moments or pictures, and the text encoder's outputs.

    python train/cache.py CONFIG [a.b=value ...] data.cache=DIR

Recipe and settings are those of the run (train/run.py), which finds all of it there.  Only what is missing is made, so
that a run of this program that was stopped goes on; records that were damaged are made anew.  Prompts that a run draws
by chance (templates, shuffled captions) are those of `epochs` epochs, one where that is 0; a run keeps the others as it
meets them.

    python train/cache.py CONFIG --help      what the config does, and all its settings
"""

import sys

from sdjax.training import program


def main(arguments):
    """Fills the cache of one config; returns the exit status."""
    return program.fill(arguments, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
