"""Builds the embedded model's vocabulary from Pocketland's captions, or lists the rare words of any model.

python train/vocabulary.py sdjax/pocket/tokenizer
python train/vocabulary.py --rare MODEL [COUNT]          # short words with little meaning, for DreamBooth
"""

import sys
from pathlib import Path

from sdjax.data import pocketland
from sdjax.formats import pipeline
from sdjax.text.rare import rare
from sdjax.text.tokenizer import Tokenizer

CAPTIONS, SIZE, LENGTH = 20000, 1024, 32


def main(arguments):
    """Writes the tokenizer's files into the folder given, or prints a model's rare words; returns the exit status."""
    if arguments[:1] == ["--rare"] and len(arguments) in (2, 3) and all(map(str.isdecimal, arguments[2:])):
        return _rare(arguments[1], *map(int, arguments[2:]))
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(__doc__)
        return 0
    scenes = (pocketland.example(4 * i, cats=0.2) for i in range(CAPTIONS))
    tokenizer = Tokenizer.train([pocketland.caption(who, place, place.seed) for who, place in scenes], SIZE, LENGTH)
    Path(arguments[0]).mkdir(parents=True, exist_ok=True)
    tokenizer.save(arguments[0])
    print(f"{tokenizer.size} tokens, prompts of {LENGTH}: {arguments[0]}")
    return 0


def _rare(model, count=20):
    """Prints a model's rare words; reads only the tokenizer if it has its own folder, otherwise the whole model."""
    try:
        folder = Path(pipeline.locate(model)) / "tokenizer"
        known = [Tokenizer.load(folder)] if folder.is_dir() else [*pipeline.load(model).tokenizers.values()]
        if not known:
            raise ValueError(f"{model}: reads no words")
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(" ".join(rare(known[0], count)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
