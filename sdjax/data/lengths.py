"""Counts the captions that are longer than a run reads.

print(cut(data.captions(), sd.tokenizers, chunks=1))
"""

from collections.abc import Iterable, Mapping

from sdjax.text import conditioning
from sdjax.text.tokenizer import Tokenizer

CHUNKS = (1, 2, 3)  # as in kohya's sd-scripts; every chunk makes every cross-attention larger


def cut(captions: Iterable[str], tokenizers: Mapping[str, Tokenizer], chunks: int) -> str:
    """Returns a line on how many captions have more than `chunks` chunks of tokens; "" for none."""
    if not tokenizers:
        return ""
    several = list(tokenizers.values())
    needed = [max(len(conditioning.literal(one, caption)) for one in several) for caption in captions]
    long = [count for count in needed if count > chunks]
    if not long:
        return ""
    room, more = min(one.length - 2 for one in several), min(max(long), CHUNKS[-1])
    advice = f"; data.chunks={more} reads up to {more * room}" if more > chunks else ""
    return f"captions: {len(long)} of {len(needed)} are longer than {chunks * room} tokens and are cut off{advice}"
