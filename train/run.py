"""Trains any method.

    python train/run.py CONFIG [a.b=value ...] [out=DIR]

CONFIG is a recipe: a Python file with a function config(), such as configs/textual_inversion.py.  Override any setting
on the command line, for example optim.lr=1e-4 method.vectors=2 data.path=photos/cat.  The run writes config.json,
origin.json, metrics.jsonl, checkpoints/, samples/ and export/ to DIR.  The default DIR is the recipe's own, otherwise
outputs/NAME of the recipe; {picture} in it stands for the picture's name.  Rerun the command to resume from the newest
checkpoint.

    python train/run.py CONFIG --help      what the recipe does, and every setting
"""

import sys

from sdjax.training import program


def main(arguments):
    """Runs one recipe; returns the exit status."""
    return program.main(arguments, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
