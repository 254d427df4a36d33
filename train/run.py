"""Trains any method by a recipe of configs/, or by your own; `sdjax train` is the same program.

python train/run.py CONFIG [a.b=value ...] [out=DIR]
python train/run.py --help               # what a run writes, and the recipes
python train/run.py CONFIG --help        # what a recipe does, and every setting
"""

import sys

from sdjax.service import train_program


def main(arguments):
    """Runs one recipe; returns the exit status."""
    return train_program.main(arguments, "python train/run.py")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
