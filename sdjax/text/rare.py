"""Rare short words of a tokenizer for DreamBooth's subjects, such as CLIP's "sks".

    rare(Tokenizer.load("model/tokenizer"), 5)          # ["sks", ...]

A one-token word with a late merge was rare in the vocabulary's training texts, so it has little meaning that training
would overwrite.
Source: Ruiz et al. 2022, "DreamBooth" (arXiv 2208.12242), which looks up rare tokens of few letters.  Our choice: the
order of the merges measures rarity, and words without vowels come first, because no language has them.
"""

import re

from sdjax.text.tokenizer import Tokenizer

END = "</w>"


def rare(tokenizer: Tokenizer, count: int = 20, longest: int = 4) -> list[str]:
    """Returns up to `count` one-token words of 1 to `longest` letters, the rarest first."""
    words = (token.removesuffix(END) for token in tokenizer.vocabulary if token.endswith(END))
    short = [word for word in words if re.fullmatch(f"[a-z]{{1,{longest}}}", word)]
    short.sort(key=lambda word: (bool(re.search("[aeiouy]", word)), -tokenizer.vocabulary[word + END]))
    return [word for word in short if len(tokenizer.ids(word)) == 1][:count]
