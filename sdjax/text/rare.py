"""Rare short words of a tokenizer, as DreamBooth calls its subjects: "sks" of CLIP's.

    rare(Tokenizer.load("model/tokenizer"), 5)          # ["sks", ...]

A word that is one token, whose merge came late, was seldom in the texts that the vocabulary was made of, so the text
encoder knows little of it that a subject would have to replace.
Source: Ruiz et al. 2022, "DreamBooth" (arXiv 2208.12242), which looks up rare tokens of few letters.  Our choice: the
order of the merges stands for rarity, and words without vowels come first, since they are no words of a language.
"""

import re

from sdjax.text.tokenizer import Tokenizer

END = "</w>"


def rare(tokenizer: Tokenizer, count: int = 20, longest: int = 4) -> list[str]:
    """Returns up to `count` words of 1 to `longest` letters that are one token each, the rarest first."""
    words = (token.removesuffix(END) for token in tokenizer.vocabulary if token.endswith(END))
    short = [word for word in words if re.fullmatch(f"[a-z]{{1,{longest}}}", word)]
    short.sort(key=lambda word: (bool(re.search("[aeiouy]", word)), -tokenizer.vocabulary[word + END]))
    return [word for word in short if len(tokenizer.ids(word)) == 1][:count]
