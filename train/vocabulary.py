"""Builds the embedded model's vocabulary, or lists the rare words of any model; `sdjax vocabulary` is the same program.

python train/vocabulary.py sdjax/pocket/tokenizer
python train/vocabulary.py --rare MODEL [COUNT]          # short words with little meaning, for DreamBooth
"""

import sys

from sdjax.service import vocabulary


def main(arguments):
    """Builds a vocabulary or prints rare words; returns the exit status."""
    return vocabulary.main(arguments, "python train/vocabulary.py")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
