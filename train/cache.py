"""Fills a run's cache before it trains; `sdjax cache` is the same program.

python train/cache.py CONFIG [a.b=value ...] data.cache=DIR
python train/cache.py --help             # what it covers
"""

import sys

from sdjax.training import program


def main(arguments):
    """Fills the cache of one recipe; returns the exit status."""
    return program.fill(arguments, "python train/cache.py")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
