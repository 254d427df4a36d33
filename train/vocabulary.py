"""Makes the embedded model's vocabulary from Pocketland's captions, in CLIP's format.

python train/vocabulary.py sdjax/pocket/tokenizer
"""

import sys
from pathlib import Path

from sdjax.data import pocketland
from sdjax.text.tokenizer import Tokenizer

CAPTIONS, SIZE, LENGTH = 20000, 1024, 32


def main(arguments):
    """Writes the tokenizer's files into the folder given; returns the exit status."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(__doc__)
        return 0
    scenes = (pocketland.example(4 * i, cats=0.2) for i in range(CAPTIONS))
    tokenizer = Tokenizer.train([pocketland.caption(who, place, place.seed) for who, place in scenes], SIZE, LENGTH)
    Path(arguments[0]).mkdir(parents=True, exist_ok=True)
    tokenizer.save(arguments[0])
    print(f"{tokenizer.size} tokens, prompts of {LENGTH}: {arguments[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
