"""Finds sentences in documents that are too long or read as a translation.

    python tests/prose.py README.md docs/*.md          # one line for each; status 1 if there are any

A sentence counts its words outside code; a code span or a link's address counts as one word at most.
"""

import re
import sys
from pathlib import Path

MOST = 30  # words of a sentence
SIGNS = {
    "made anew": r"\b(made|begins?|drawn|computed|told|found|read) anew\b",
    "is said": r"\b(is|are|be) said\b|\bsays so\b|\bsays? it\b",
    "of which": r"\b(of|in|by|to|from) (which|whom|whose)\b",
    "what ... holds": r"\b[Ww]hat (?!is\b)(\w+ ){1,6}(holds|lies|stands|has|lacks)\b",
    "what is ... is": r"^What (\w+ ){1,6}(is|are)\b",
    "inverted": r"^(Read|Known|Refused|Beside|Kept|Given|Found|Written|Measured|Missing) (are|is|it|lies?|stands?)\b",
    "where there is": r"\b[Ww]here there (is|are)\b|\bthat is none\b|\bof none\b|\bwhere (one|it) is\b",
    "in whatever": r"\b(in|of) whatever\b|\bwhatever way\b",
    "goes over": r"\bgoes? (over|on from|on there)\b|\bgo on from\b",
    "stand, lie": r"\b(lies|lie|lay|stands|stand) (in|beside|there|where|below|with|under)\b",
    "are those of": r"\b(is|are) (that|those) of\b",
    "for want of": r"\blets? none\b|\bwhich it is\b|\bby itself it\b|\bis another\b|\bof before\b|\bso many\b",
}


def sentences(text):
    """Yields the sentences of a Markdown text: paragraphs, list items and table cells, code left out."""
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for block in re.split(r"\n\s*\n", text):
        lines = [line for line in block.split("\n") if not line.startswith("    ") or block.startswith("[^")]
        parts = re.split(r"\n(?=[*#|-]|\d+\. )", "\n".join(lines))
        for part in parts:
            cells = re.split(r"(?<!\\)\|", part) if part.startswith("|") else [part]
            for cell in cells:
                plain = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]*`", "CODE", cell))
                plain = re.sub(r"^([#*]+|\d+\.|\[\^\d+\]:) ", "", " ".join(plain.split()))
                yield from filter(None, re.split(r"(?<=[.!?])\)? (?=[A-Z\"'(]|CODE)", plain))


def faults(text):
    """Returns [(what is wrong, sentence)] of a Markdown text."""
    found = []
    for sentence in sentences(text):
        words = [word for word in sentence.split() if re.search(r"\w", word)]
        if len(words) > MOST:
            found.append((f"{len(words)} words", sentence))
        found += [(sign, sentence) for sign, pattern in SIGNS.items() if re.search(pattern, sentence)]
    return found


if __name__ == "__main__":
    wrong = [(path, *fault) for path in sys.argv[1:] for fault in faults(Path(path).read_text())]
    for path, sign, sentence in wrong:
        print(f"{path}: {sign}: {sentence}")
    sys.exit(bool(wrong))
