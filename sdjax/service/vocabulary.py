"""Builds the embedded model's vocabulary from Pocketland's captions, or lists the rare words of any model.

main(["--rare", "pocket", "3"])          # prints three short words with little meaning, for DreamBooth
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from sdjax.data import pocketland
from sdjax.formats import pipeline
from sdjax.text.rare import rare
from sdjax.text.tokenizer import Tokenizer

USAGE = """usage: {prog} FOLDER | --rare MODEL [COUNT]

Builds the embedded model's vocabulary from Pocketland's captions, or lists the rare words of any model.

    {prog} sdjax/pocket/tokenizer
    {prog} --rare pocket 5          short words with little meaning, for DreamBooth"""
CAPTIONS, SIZE, LENGTH = 20000, 1024, 32


def main(arguments: Sequence[str], prog: str = "sdjax vocabulary") -> int:
    """Writes the tokenizer's files into the given folder, or prints a model's rare words; returns the exit status.

    prog: the program's name in its help.
    """
    if list(arguments[:1]) == ["--rare"] and len(arguments) in (2, 3) and all(map(str.isdecimal, arguments[2:])):
        return _rare(arguments[1], *map(int, arguments[2:]))
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(USAGE.format(prog=prog))
        return 0
    scenes = (pocketland.example(4 * i, cats=0.2) for i in range(CAPTIONS))
    tokenizer = Tokenizer.train([pocketland.caption(who, place, place.seed) for who, place in scenes], SIZE, LENGTH)
    Path(arguments[0]).mkdir(parents=True, exist_ok=True)
    tokenizer.save(arguments[0])
    print(f"{tokenizer.size} tokens, prompts of {LENGTH}: {arguments[0]}")
    return 0


def _rare(model: str, count: int = 20) -> int:
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
