"""Trains any method.

    python train/run.py CONFIG [a.b=value ...] [out=DIR]

CONFIG is a Python file with a function config(), such as configs/textual_inversion.py; every setting can be changed on
the command line, e.g. optim.lr=1e-4 method.vectors=2 data.path=photos/cat.  DIR (default: the config's own, else
outputs/NAME of the config; with {picture} in it a folder for each picture) gets config.json origin.json metrics.jsonl
checkpoints/ samples/ export/.  Run the same line again and it goes on from the newest checkpoint.

    python train/run.py CONFIG --help      what the config does, and all its settings
"""

import sys

from sdjax.training import program


def main(arguments):
    """Runs one config; returns the exit status."""
    return program.main(arguments, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
