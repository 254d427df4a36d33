"""CLIP's byte-pair tokenizer with placeholder words for one or several trained vectors.

    tokenizer = Tokenizer.load("model/tokenizer").add("<me>", 2)
    ids = tokenizer(["a photo of <me>"])                          # int32 [1 L]

The ids equal those of transformers' CLIPTokenizer; both use the `tokenizers` package, imported on first use.
A word of several vectors has the tokens "word", "word_1", "word_2", ..., as in diffusers.
Source: "Learning Transferable Visual Models From Natural Language Supervision", Radford et al. 2021, section 2.4.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np
from jaxtyping import Int32

from sdjax.runtime.guard import named

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
# One piece of text before merging: an apostrophe ending, a run of letters, one digit, or a run of anything else.
PIECES = "|".join(
    [r"<\|startoftext\|>", r"<\|endoftext\|>", "'s", "'t", "'re", "'ve", "'m", "'ll", "'d"]
    + [r"[\p{L}]+", r"[\p{N}]", r"[^\s\p{L}\p{N}]+"]
)
PLACE = "in_place_of"  # in an added token: the text whose tokens it replaces
VECTORS = "vectors"  # of a word's first added token: how many tokens the word has
COUNTS = "placeholder_vectors"  # in our tokenizer_config.json: {word: VECTORS}
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
Token = dict[str, Any]  # "content", the FLAGS, perhaps PLACE and VECTORS
Vocabulary = tuple[dict[str, int], list[tuple[str, str]]]  # {token: id} and merges


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """CLIP's tokenizer as an immutable value: `add` returns a new one.

    vocabulary: {token: id}.  merges: pairs, the first rank first.  roles: {"bos_token": token, ...}.  added: tokens
    that match before merging, each a dict of "content" and matching flags.  length: L, including begin and end.
    Tokenizers of equal content are equal.
    """

    vocabulary: dict[str, int]
    merges: tuple[tuple[str, str], ...]
    roles: dict[str, str]
    added: tuple[Token, ...]
    length: int = 77

    def __eq__(self, other: object) -> bool:
        return self is other or isinstance(other, Tokenizer) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @functools.cached_property
    def digest(self) -> str:
        """A hash of the content, computed once: comparing vocabularies at every call is slow."""
        content = self.vocabulary, self.merges, self.roles, self.added, self.length
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @classmethod
    def load(cls, folder: str | pathlib.Path) -> Self:
        """Returns the tokenizer of a folder with vocab.json and merges.txt, or with tokenizer.json.

        Raises ValueError naming a missing or unreadable file.
        """
        folder = pathlib.Path(folder)
        with named(folder):
            return cls._read(folder)

    @classmethod
    def _read(cls, folder: pathlib.Path) -> Self:
        config = _json(folder / "tokenizer_config.json", {})
        whole = _json(folder / "tokenizer.json", None)
        vocabulary, merges = _vocabulary(folder, whole)
        decoder, roles, special = _special_tokens(folder, config, whole)
        added = _counted(_added(decoder, special), config, folder)
        tokenizer = cls(vocabulary, tuple(merges), roles, added, _length(config, folder))
        try:
            backend = tokenizer.backend
        except Exception as error:  # the Rust side raises plain Exception
            raise ValueError(f"{folder}: the merges do not fit the vocabulary: {error}") from None
        for number, token in decoder.items():
            if backend.token_to_id(token["content"]) != number:
                raise ValueError(f"{folder}: id {number} of added token {token['content']!r} leaves a gap in the ids")
        return tokenizer

    @classmethod
    def train(cls, texts: Iterable[str], size: int, length: int = 32) -> Self:
        """Returns a tokenizer with a vocabulary of `size` tokens learnt from texts; padding is the end token."""
        vocabulary, merges = train_vocabulary(texts, size)
        return cls.of(vocabulary, merges, length)

    @classmethod
    def of(
        cls, vocabulary: Mapping[str, int], merges: Iterable[tuple[str, str]], length: int = 77, pad: str = EOS
    ) -> Self:
        """Returns the tokenizer of a vocabulary {token: id} and merges [(left, right)], without placeholder words."""
        roles = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": pad}
        special = [_token(token, special=True) for token in roles.values()]
        return cls(dict(vocabulary), tuple((left, right) for left, right in merges), roles, _added({}, special), length)

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes the files that transformers 4 and 5 read, with placeholder words, into an existing folder."""
        for token in self.added:
            if PLACE in token:
                raise ValueError(
                    f"word={token[PLACE]!r}: stands in the place of tokens; attach it as another to save it"
                )
        folder = pathlib.Path(folder)
        numbers = sorted((self.backend.token_to_id(token["content"]), token["content"]) for token in self.added)
        tokens = {token["content"]: {name: x for name, x in token.items() if name != VECTORS} for token in self.added}
        decoder = {number: tokens[content] for number, content in numbers}
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": self.length, "add_prefix_space": False}
        config |= {"do_lower_case": True, "errors": "replace", **self.roles, "added_tokens_decoder": decoder}
        if counts := {token["content"]: token[VECTORS] for token in self.added if VECTORS in token}:
            config[COUNTS] = counts
        vocabulary = dict(sorted(self.vocabulary.items(), key=lambda item: item[1]))
        _write(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
        _write(folder / "merges.txt", "\n".join(["#version: 0.2", *map(" ".join, self.merges)]))
        _write(folder / "special_tokens_map.json", json.dumps(self.roles, indent=2, ensure_ascii=False))
        _write(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False))

    @functools.cached_property
    def backend(self) -> Any:
        """The object of the `tokenizers` package: normalisation, pre-tokenisation, merges and added tokens."""
        return _backend(self.vocabulary, self.merges, self.roles["unk_token"], self.added)

    @functools.cached_property
    def words(self) -> dict[str, tuple[int, ...]]:
        """The placeholder words, {word: (its ids)}, sorted by id."""
        said = {token["content"]: token[PLACE] for token in self.added if PLACE in token}
        return {said.get(names[0], names[0]): tuple(map(self.backend.token_to_id, names)) for names in self._groups()}

    def _groups(self) -> list[list[str]]:
        """Returns the tokens of every placeholder word; where a file does not tell their number, names and ids do."""
        groups, taken, last = [], set(), None
        for token in self.added:
            content = token["content"]
            if token["special"] or content in taken:
                continue
            if VECTORS in token:
                groups.append(_parts(content, token[VECTORS]))
                taken.update(groups[-1])
                last = None
            elif last is not None and content == f"{last[0]}_{len(last)}" and self._follows(last[-1], content):
                last.append(content)
            else:
                last = [content]
                groups.append(last)
        return groups

    def _follows(self, one: str, other: str) -> bool:
        """Returns whether a token's id is the one after another's."""
        return self.backend.token_to_id(other) == self.backend.token_to_id(one) + 1

    @functools.cached_property
    def placed(self) -> dict[tuple[int, ...], tuple[int, ...]]:
        """{ids of a text: the ids that replace them}, the longest first: the words added with `place`."""
        said = {tuple(self._encode(token[PLACE])): token[PLACE] for token in self.added if PLACE in token}
        return {ids: self.words[said[ids]] for ids in sorted(said, key=len, reverse=True)}

    def knows(self, word: str) -> bool:
        """Returns whether the tokenizer has this placeholder word, ignoring case and white space."""
        return self.plain(word) in self.words

    def plain(self, word: str) -> str:
        """Returns a text as the tokenizer compares it: lower case, single spaces."""
        return " ".join(self.backend.normalizer.normalize_str(word).split())

    @property
    def size(self) -> int:
        """The number of rows that a token embedding needs: the highest id + 1."""
        return 1 + max(*self.vocabulary.values(), *(self.backend.token_to_id(token["content"]) for token in self.added))

    @property
    def bos(self) -> int:
        return self.backend.token_to_id(self.roles["bos_token"])

    @property
    def eos(self) -> int:
        return self.backend.token_to_id(self.roles["eos_token"])

    @property
    def pad(self) -> int:
        return self.backend.token_to_id(self.roles["pad_token"])

    def add(self, word: str, vectors: int = 1, place: bool = False) -> Self:
        """Returns a tokenizer with a placeholder word of `vectors` new ids; itself if it already has this word.

        place: the word may be an existing token or several words; like A1111's embeddings, the new ids replace every
        sequence of its tokens.  Tokenizer files cannot hold such a word.  Without `place`, a word of letters does not
        match inside longer words.
        Raises ValueError for an existing token or several words without `place`, and for a known word with another
        number of vectors.
        """
        if not word.strip() or (word.split() != [word] and not place):
            raise ValueError(f"word={word!r}: a placeholder word must not be empty or hold white space")
        if vectors < 1:
            raise ValueError(f"vectors={vectors}: a placeholder word has at least 1 vector")
        word = self.plain(word)
        if word in self.words:
            if (known := len(self.words[word])) != vectors:
                raise ValueError(f"word={word!r}: is known with {known} vectors, not {vectors}")
            return self
        tokens = _parts(word, vectors)
        single = [token for token in tokens if len(self._encode(token)) == 1]
        if place and (single or " " in word):
            tokens = [f"embedding:{token}" for token in tokens]  # ComfyUI's name for it
        elif single:
            raise ValueError(f"word={word!r}: {single[0]!r} is one token already; choose another, such as '<{word}>'")
        whole = place and re.fullmatch(r"\w(.*\w)?", word) is not None  # "ink" is not in "pink"
        made = [_token(token, normalized=True, single_word=whole) for token in tokens]
        made[0][VECTORS] = vectors
        if tokens[0] != word:
            made[0][PLACE] = word
        return dataclasses.replace(self, added=(*self.added, *made))

    def _encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def ids(self, text: str, placed: bool = True) -> list[int]:
        """Returns the ids of a text without begin and end; a placeholder word gives all of its ids.

        placed: whether words added with `place` replace their tokens.
        """
        several, numbers, at, made = {ids[0]: ids for ids in self.words.values()}, self._encode(text), 0, []
        while at < len(numbers):
            here = (ids for ids in self.placed if tuple(numbers[at : at + len(ids)]) == ids)
            taken = next(here, None) if placed else None
            made += self.placed[taken] if taken else several.get(numbers[at], numbers[at : at + 1])
            at += len(taken or (0,))
        return made

    def __call__(self, texts: str | Sequence[str]) -> Int32[np.ndarray, "B L"]:
        """Returns int32 [B L]: begin, the tokens (cut at L - 2), end, padding."""
        texts = [texts] if isinstance(texts, str) else texts
        rows = np.full((len(texts), self.length), self.pad, np.int32)
        for row, text in zip(rows, texts, strict=True):
            ids = [self.bos, *self.ids(text)[: self.length - 2], self.eos]
            row[: len(ids)] = ids
        return rows


def train_vocabulary(texts: Iterable[str], size: int) -> Vocabulary:
    """Returns ({token: id}, [(left, right)]): a byte-pair vocabulary in CLIP's layout, learnt from texts.

    It has 256 bytes, 256 bytes that end a word, at most size - 514 merges (fewer if the texts have no more), begin and
    end.  Equal texts give equal vocabularies.  Raises ValueError if `size` is below 514.
    """
    import tokenizers

    letters = _bytes()
    if size < 2 * len(letters) + 2:
        raise ValueError(f"size={size}: a byte-pair vocabulary has at least {2 * len(letters) + 2} tokens")
    base = [*letters, *(letter + "</w>" for letter in letters)]
    # The base is given as special tokens, which fixes its ids and so the order among equal counts.
    ending: dict[str, Any] = {"end_of_word_suffix": "</w>"}
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size - 2, special_tokens=base, show_progress=False, **ending)
    learner = tokenizers.Tokenizer(tokenizers.models.BPE(**ending))
    _split_as_clip(learner)
    learner.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    tokens = [*base, *(left + right for left, right in merges), BOS, EOS]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}, merges


def byte_vocabulary(size: int = 514) -> Vocabulary:
    """Returns ({token: id}, []) for random weights: single bytes, with begin and end as the last two of `size` ids."""
    vocabulary, merges = train_vocabulary([], 514)
    return {**vocabulary, BOS: size - 2, EOS: size - 1}, merges


def _bytes() -> list[str]:
    """Returns the printable characters for the 256 bytes in CLIP's order, sorted by code point."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _split_as_clip(backend: Any) -> None:
    from tokenizers import Regex, normalizers, pre_tokenizers

    blanks = normalizers.Replace(Regex(r"\s+"), " ")
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), blanks, normalizers.Lowercase()])
    pieces = pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def _backend(
    vocabulary: dict[str, int], merges: Iterable[tuple[str, str]], unknown: str, added: Iterable[Token]
) -> Any:
    import tokenizers

    affixes = {"end_of_word_suffix": "</w>", "continuing_subword_prefix": ""}
    model = tokenizers.models.BPE(vocab=vocabulary, merges=list(merges), unk_token=unknown, **affixes)
    backend = tokenizers.Tokenizer(model)
    _split_as_clip(backend)
    for token in added:
        backend.add_tokens([tokenizers.AddedToken(token["content"], **{flag: token[flag] for flag in FLAGS})])
    return backend


def _token(token: str | Token, **flags: bool) -> Token:
    """Returns the full record of an added token; token: text, or a record with missing or other flags."""
    given = token if isinstance(token, dict) else {"content": token}
    record = {"content": given["content"], **dict.fromkeys(FLAGS, False)}
    return record | {flag: given[flag] for flag in FLAGS if flag in given} | flags


def _content(token: str | Token) -> str:
    return token["content"] if isinstance(token, dict) else token


def _json(path: pathlib.Path, default: Any) -> Any:
    """Returns the JSON object in a file, or `default` without a file."""
    if not path.is_file():
        return default
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object is expected, not {type(value).__name__}")
    return value


def _vocabulary(folder: pathlib.Path, whole: dict[str, Any] | None) -> tuple[dict[str, int], list[Any]]:
    """Returns ({token: id}, [(left, right)]) from tokenizer.json, or else from vocab.json and merges.txt."""
    if whole is not None:
        model = whole.get("model", {})
        if "vocab" not in model or "merges" not in model:
            raise ValueError(f"{folder / 'tokenizer.json'}: not a byte-pair tokenizer")
        return model["vocab"], [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).is_file():
            accepted = "a tokenizer folder holds vocab.json and merges.txt, or tokenizer.json"
            raise ValueError(f"{folder / name}: no such file; {accepted}")
    from tokenizers import models

    try:
        return models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the Rust side raises plain Exception
        raise ValueError(f"{folder}: vocab.json or merges.txt cannot be read: {error}") from None


def _special_tokens(
    folder: pathlib.Path, config: dict[str, Any], whole: dict[str, Any] | None
) -> tuple[dict[int, Token], dict[str, str], list[Token]]:
    """Returns ({id: added token}, {role: token}, [special tokens]), with transformers' precedence of files.

    If tokenizer_config.json has a list by id ("added_tokens_decoder"), only this list counts.  Otherwise it reads
    special_tokens_map.json, added_tokens.json and the list inside tokenizer.json.
    """
    decoder, settings = dict(config.get("added_tokens_decoder", {})), dict(config)
    if "added_tokens_decoder" not in config:
        settings |= _json(folder / "special_tokens_map.json", {})
        special = {_content(settings[role]) for role in ROLES if settings.get(role)}
        for content, number in _json(folder / "added_tokens.json", {}).items():
            decoder[number] = _token(content, special=content in special, normalized=content not in special)
        decoder |= {token["id"]: token for token in (whole or {}).get("added_tokens", ())}
    decoder = {int(number): _token(token) for number, token in decoder.items()}
    roles = {role: settings.get(role) or (BOS if role == "bos_token" else EOS) for role in ROLES}
    more = (
        token for name in ("additional_special_tokens", "extra_special_tokens") for token in settings.get(name) or ()
    )
    special = [_token(token, special=True) for token in (*roles.values(), *more)]
    return dict(sorted(decoder.items())), {role: _content(token) for role, token in roles.items()}, special


def _added(decoder: Mapping[int, Token], special: Iterable[Token]) -> tuple[Token, ...]:
    """Returns the added tokens in the order of their ids; special tokens without an id come last."""
    added = {token["content"]: token for token in decoder.values()}
    for token in special:
        added[token["content"]] = {**added.get(token["content"], token), "special": True}
    return tuple(added.values())


def _counted(added: tuple[Token, ...], config: Mapping[str, Any], folder: pathlib.Path) -> tuple[Token, ...]:
    """Returns added tokens with the numbers of vectors that our tokenizer_config.json tells."""
    counts = config.get(COUNTS, {})
    there = {token["content"] for token in added if not token["special"]}
    for word, count in counts.items() if isinstance(counts, dict) else [(COUNTS, counts)]:
        whole = type(count) is int and 1 <= count <= len(there)
        if not whole or not there.issuperset(_parts(word, count)):
            where = folder / "tokenizer_config.json"
            raise ValueError(f"{where}: {COUNTS}: {word!r}: {count!r}, the number of its added tokens is expected")
    told = {word: {VECTORS: count} for word, count in counts.items()}
    return tuple({**token, **told.get(token["content"], {})} for token in added)


def _parts(word: str, vectors: int) -> list[str]:
    """Returns the names of a word's tokens."""
    return [word, *(f"{word}_{i}" for i in range(1, vectors))]


def _length(config: Mapping[str, Any], folder: pathlib.Path) -> int:
    length = config.get("model_max_length", 77)
    if not isinstance(length, int) or length < 2:
        where = folder / "tokenizer_config.json"
        raise ValueError(f"{where}: model_max_length={length!r}, an integer from 2 on is expected")
    return length if length < 10**6 else 77  # transformers writes 10**30 for "no limit"


def _write(path: pathlib.Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")
