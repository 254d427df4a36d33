"""Encodes prompts as conditions: weighted tokens, texts of any length, scheduled texts, several texts at once.

    text, wanted = grammars.adapters("a cat <lora:ink:0.8>", tags)    # attach `wanted` first; no file is read here
    sd, cond, negative = condition(sd, ["a (red:1.3) [cat:dog:0.5] AND snow"], ["blurry"], steps=20)
    sd = sd.add(wrappers=Guidance(7.5, negative))
    prediction, aux = sd.denoise(z, t, cond, i)                # i: the denoising step, 0 the first

    plain      the literal text, including brackets, cut off at the model's length, as in diffusers
    a1111      (x) [x] (x:1.3) weights; \\( \\[ letters; [a:b:0.5] [b:0.5] [a::0.5] change at that part of the steps, or
               at step 12 of "12"; [a|b] takes turns; BREAK begins a chunk; a AND b:0.8 guides by both
    comfyui    (x) (x:1.3) weights; \\( \\) letters; embedding:name

Texts longer than the model's length become chunks, each with its own begin and end token, which are encoded one by one
and concatenated.  All prompts and negative prompts of a `condition` call get the same number of chunks, filled up with
empty ones; see `sizes`.  Another prompt or timeline does not recompile, unless it has more chunks, more parts (AND) or
more than ROOM different texts.

Sources: AUTOMATIC1111's stable-diffusion-webui 1.10 (sd_hijack_clip, sd_emphasis, sd_samplers_cfg_denoiser) and ComfyUI
(sd1_clip): their behaviour and constants.

Shapes: B prompts, n chunks, L tokens of a chunk, N = n L, C text width, R different texts of a prompt, S steps.
"""

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Float32, Int, Int32, Num

from sdjax.models.cond import Cond
from sdjax.models.conditioner import Conditioner
from sdjax.models.reference import Reference
from sdjax.text import grammars
from sdjax.text.tokenizer import Tokenizer

GRAMMARS = ("plain", "a1111", "comfyui")
WEIGHTINGS = ("a1111", "comfyui")
BACKTRACK = 20  # tokens before a chunk's end within which text after a comma moves to the next; A1111's default
WHOLE = 8  # tokens of equal weight; ComfyUI moves shorter runs as a whole to the next chunk
SHALLOW = 1e-3  # relative to the mean absolute value; our choice: after a new layer norm, the mean is only rounding
ROOM, STEPS = 8, 1024  # different texts of a prompt, and steps, that fit without recompiling
Chunk = list[tuple[int, float]]  # (id, weight) without begin, end and padding
Timed = tuple[tuple[int, str], ...]  # (last step, text)
Stream = list[tuple[float, Timed]]  # (weight, timeline) of each prompt: of one part of AND, or of the negatives


class TextModel(Protocol):
    """The interface of a model for this module; StableDiffusion provides it."""

    @property
    def tokenizers(self) -> Any: ...

    @property
    def family(self) -> Any: ...

    @property
    def bare(self) -> Self: ...

    @property
    def conditioners(self) -> tuple[Any, ...]: ...

    def embed(self, encoder: str, ids: Int[Array, "B L"]) -> Float[Array, "B L C"]: ...

    def replace(self, **changes: Any) -> Self: ...


M = TypeVar("M", bound=TextModel)


# ---- tokens ------------------------------------------------------------------------------------


def chunks(tokenizer: Tokenizer, text: str, grammar: str = "a1111") -> list[Chunk]:
    """Returns the chunks of a text, lists of (id, weight) without begin, end and padding tokens; at least one chunk.

    text: the text of one step, without scheduled changes, alternation and AND.
    Raises ValueError for an unknown grammar, words that do not fit into a chunk, and an unknown "embedding:" name.
    """
    room = tokenizer.length - 2
    if grammar == "plain":
        return [[(number, 1.0) for number in tokenizer.ids(text)[:room]]]
    if grammar == "comfyui":
        stretches = grammars.comfy_emphasis(text)
        return _comfy_chunks([group for pair in stretches for group in _comfy_groups(tokenizer, *pair)], room)
    if grammar != "a1111":
        raise ValueError(f"grammar={grammar!r}: expected one of {', '.join(GRAMMARS)}")
    return _a1111_chunks(tokenizer, grammars.emphasis(text), room)


def _words(tokenizer: Tokenizer, text: str) -> list[tuple[int, ...]]:
    """Returns the ids of a text as tuples: one id each, but all ids of a placeholder word together."""
    several = {ids[0]: ids for ids in tokenizer.words.values()}
    numbers, at, found = tokenizer.ids(text), 0, []
    while at < len(numbers):
        found.append(tuple(several.get(numbers[at], numbers[at : at + 1])))
        at += len(found[-1])
    return found


def _a1111_chunks(tokenizer: Tokenizer, pairs: Iterable[tuple[str, float]], room: int) -> list[Chunk]:
    done, chunk, comma = [], [], None  # comma: the place of the chunk's last comma

    def close(keep: int = 0) -> None:
        nonlocal chunk, comma
        split = len(chunk) - keep
        done.append(chunk[:split])
        chunk, comma = chunk[split:], None

    for text, weight in pairs:
        if (text, weight) == grammars.BREAK:
            close()
            continue
        for ids in _words(tokenizer, text):
            if len(ids) > room:
                raise ValueError(f"prompt {text!r}: a word of {len(ids)} vectors; expected at most {room}")
            if ids == (tokenizer.vocabulary.get(",</w>"),):
                comma = len(chunk)
            elif len(chunk) == room and comma is not None and room - comma <= BACKTRACK:
                close(keep=room - comma - 1)
            if len(chunk) + len(ids) > room:
                close()
            chunk += [(number, weight) for number in ids]
    if chunk or not done:
        close()
    return done


def _comfy_groups(tokenizer: Tokenizer, text: str, weight: float) -> Iterator[Chunk]:
    """Yields lists of (id, weight) that belong together: an embedding's vectors, or tokens of one weight."""
    first, *others = re.split(r"(?<=\s)embedding:", text)
    pieces = [(False, first), *((True, other) for other in others)]
    if first.startswith("embedding:"):
        pieces[0] = (True, first.removeprefix("embedding:"))
    for named, piece in pieces:
        if named:
            ids, piece = _embedding(tokenizer, piece)
            yield [(number, weight) for number in ids]
        yield [(number, weight) for number in tokenizer.ids(piece, placed=False)]


def _embedding(tokenizer: Tokenizer, text: str) -> tuple[tuple[int, ...], str]:
    """Returns (ids, the rest of the text) for the placeholder word at the start of a text."""
    name = re.split(r"\s", text, maxsplit=1)[0]
    several = (text[: len(word)] for word in sorted(tokenizer.words, key=len, reverse=True) if " " in word)
    for known in (*several, name, name.strip(","), re.split(r"[<\[]", name)[0]):
        if known.lower() in tokenizer.words:
            at = text.index(known) + len(known)
            return tokenizer.words[known.lower()], text[at:]
    words = ", ".join(tokenizer.words) or "none"
    raise ValueError(f"prompt: embedding:{name} is not known; the model has {words}")


def _comfy_chunks(groups: Iterable[Chunk], room: int) -> list[Chunk]:
    done, chunk = [], []
    for group in groups:
        breaks = len(group) >= min(WHOLE, room + 1)
        while len(chunk) + len(group) > room:
            rest = room - len(chunk) if breaks else 0
            done.append(chunk + group[:rest])
            chunk, group = [], group[rest:]
        chunk = chunk + group
    return [*done, chunk]


def rows(
    tokenizer: Tokenizer, made: Sequence[Chunk], count: int
) -> tuple[Int32[np.ndarray, "count L"], Float32[np.ndarray, "count L"]]:
    """Returns (ids int32, weights float32), both [count L]: begin, tokens, end, padding; missing chunks are empty."""
    ids = np.full((count, tokenizer.length), tokenizer.pad, np.int32)
    weights = np.ones((count, tokenizer.length), np.float32)
    for i in range(count):
        chunk = made[i] if i < len(made) else []
        line = [tokenizer.bos, *(number for number, _ in chunk), tokenizer.eos]
        ids[i, : len(line)] = line
        weights[i, 1 : len(chunk) + 1] = [weight for _, weight in chunk]
    return ids, weights


def literal(tokenizer: Tokenizer, text: str) -> list[Chunk]:
    """Returns the chunks of a text without a grammar, divided as A1111 divides a prompt; at least one chunk."""
    return _a1111_chunks(tokenizer, [(text, 1.0)], tokenizer.length - 2)


def tokens(tokenizers: Mapping[str, Tokenizer], texts: Sequence[str], count: int = 1) -> dict[str, Any]:
    """Returns {text encoder: ids int32 [B L]} of literal texts for StableDiffusion.condition, cut off at L.

    count: number of chunks; above 1 the ids are [B count L], cut off after that many chunks.
    """
    if count == 1:
        return {encoder: tokenizer(texts) for encoder, tokenizer in tokenizers.items()}
    return {
        encoder: np.stack([rows(tokenizer, literal(tokenizer, text), count)[0] for text in texts])
        for encoder, tokenizer in tokenizers.items()
    }


# ---- conditions --------------------------------------------------------------------------------


def sizes(
    sd: TextModel,
    prompts: Sequence[str],
    negatives: Sequence[str] | None = None,
    *,
    steps: int = 20,
    grammar: str = "a1111",
    before: int | None = None,
) -> list[tuple[int, int]]:
    """Returns [(chunks, parts), ...], one pair per prompt and its negative; prompts with equal pairs can share a batch.

    In a mixed batch the shorter prompts get empty chunks, which changes their pictures a little; so sampling makes one
    batch per size.  Arguments: see `condition`.
    """
    streams = _streams(prompts, negatives, steps, grammar, before)
    texts = [[text for stream in streams for _, text in stream[b][1]] for b in range(len(prompts))]
    counts = [
        max(len(chunks(tokenizer, text, grammar)) for text in set(several) for tokenizer in sd.tokenizers.values())
        for several in texts
    ]
    return [(count, len(_parts(prompt, grammar))) for count, prompt in zip(counts, prompts, strict=True)]


def most_parts(prompts: Iterable[str], grammar: str) -> int:
    """Returns the largest number of texts joined by AND in one prompt; 1 without AND."""
    return max(len(_parts(prompt, grammar)) for prompt in prompts)


def condition(
    sd: M,
    prompts: Sequence[str],
    negatives: Sequence[str] | None = None,
    *,
    steps: int = 20,
    skip: int = 0,
    grammar: str = "a1111",
    weighting: str | None = None,
    before: int | None = None,
) -> tuple[M, Cond, Cond | None]:
    """Returns (sd, cond, negative): the conditions of one picture per prompt, for sd.denoise.

    sd: has a conditioner that puts the texts of step i into cond, if the grammar schedules texts.  cond: for step 0.
    With AND, cond has `also` and `share` [B parts], and needs Guidance, even at scale 1.  negative: a Cond; None
    without `negatives`.
    steps: of the whole run, also for image-to-image.  skip: number of the text encoder's last layers to skip ("clip
    skip 2" is 1).
    weighting: "a1111" multiplies a token's vector by its weight and restores the chunk's mean; "comfyui" scales the
    vector's difference from the empty text's; None: the grammar's own.
    before: steps of the first pass, if this is the second.
    Raises ValueError for an unknown grammar or weighting, unequal counts, adapters left in a prompt, AND without
    negatives, and the errors of `adapters`, `timeline` and `chunks`.
    """
    weighting = weighting or {"comfyui": "comfyui"}.get(grammar, "a1111")
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting={weighting!r}: expected one of {', '.join(WEIGHTINGS)}")
    streams = _streams(prompts, negatives, steps, grammar, before)
    shares = np.array([[share for share, _ in stream] for stream in streams], np.float32)  # [streams B]
    count = len(streams) - (negatives is not None)
    composed = count > 1 or bool((shares[0] != 1).any())
    if composed and negatives is None:
        raise ValueError("prompt: weighted texts (AND) need a negative prompt; '' is enough")

    plain = sd.bare.replace(conditioners=(), wrappers=(), reference=Reference())
    table = _stacked(sd.tokenizers, streams, grammar, steps)
    made = _encoded(plain, table, skip=skip, comfy=weighting == "comfyui")
    batch = len(prompts)
    made = [jax.tree.map(lambda x, k=k: x[k * batch : (k + 1) * batch], made) for k in range(len(streams))]
    texts = Texts(made[0], tuple(made[1:count]), made[count] if negatives is not None else None, skip)
    first, _ = texts(sd, None, None, 0, Cond(share=jnp.asarray(shares[:count].T) if composed else None))
    first, negative = first.replace(negative=None), first.negative
    if grammar == "a1111":
        sd = sd.replace(conditioners=(texts, *sd.conditioners))
    return sd, first, negative


class Texts(struct.PyTreeNode, Conditioner):
    """The conditioner that puts the texts of step i into cond; it runs before all others.

    positive, others (a tuple, the further parts of AND), negative: {"index" int32 [B S], and by index "words" {text
    encoder: {"ids" [B R N], "weights" [B R n L]}} and "unet" UNetInputs [B R ...], and for all steps "empty" {text
    encoder: {"empty" [B L C]}} or {text encoder: {}}}.
    """

    positive: Any
    others: Any = ()
    negative: Any = None
    skip: int = struct.field(pytree_node=False, default=0)

    def __call__(
        self,
        sd: Any,
        z: Float[Array, "B h w c"] | None,
        t: Num[Array, " B"] | None,
        i: Int[Array, ""] | int,
        cond: Cond,
    ) -> tuple[Cond, dict[str, Any]]:
        also = tuple(self._at(other, i) for other in self.others)
        negative = None if self.negative is None else self._at(self.negative, i)
        return self._at(self.positive, i).over(cond).replace(also=also, share=cond.share, negative=negative), {}

    def _at(self, table: Mapping[str, Any], i: Int[Array, ""] | int) -> Cond:
        """Returns the cond of step i."""
        index = jnp.take(table["index"], i, axis=1, mode="clip")  # [B]
        chosen = table["words"], table["unet"]
        words, unet = jax.tree.map(lambda x: jax.vmap(jnp.take, (0, 0, None))(x, index, 0), chosen)
        words = {encoder: {**some, **table["empty"][encoder]} for encoder, some in words.items()}
        return Cond(unet, words=words, skip=self.skip)


def reread(sd: TextModel, cond: Cond, rows: Mapping[str, Float[Array, "B N C"]]) -> Cond:
    """Returns the cond with its words encoded again from token embeddings that a conditioner changed.

    rows: {text encoder: [B N C]}; a missing text encoder uses its own embeddings.
    """
    encoded = {}
    for encoder, words in cond.words.items():
        own = rows[encoder] if encoder in rows else sd.embed(encoder, words["ids"])
        encoded[encoder] = encode(sd, encoder, own, words, cond.skip)
    said = {name: value for name, value in vars(sd.family.inputs(encoded)).items() if value is not None}
    return cond.with_unet(**said)


def said(ids: Int[Array, "B L"] | Int[Array, "B n L"]) -> dict[str, Any]:
    """Returns the entry in Cond.words of ids [B L], or of the ids of n chunks [B n L], with weights of 1."""
    if ids.ndim == 2:
        return {"ids": ids}
    return {"ids": ids.reshape(len(ids), -1), "weights": jnp.ones(ids.shape, jnp.float32)}


def encode(
    sd: TextModel, encoder: str, rows: Float[Array, "B N C"], words: Mapping[str, Any], skip: int
) -> dict[str, Any]:
    """Returns the family's outputs for token rows [B N C]; words with weights are encoded chunk by chunk."""
    ids = words["ids"]
    if "weights" not in words:
        return sd.family.encode(sd, encoder, rows, ids, skip)
    batch, count, length = words["weights"].shape
    shape = batch * count, length
    made = sd.family.encode(sd, encoder, rows.reshape(*shape, -1), ids.reshape(shape), skip)
    made = jax.tree.map(lambda x: x.reshape(batch, 1, count, *x.shape[1:]), made)
    made = _together(made, words["weights"][:, None], words.get("empty"))
    return jax.tree.map(lambda x: x[:, 0], made)


def _together(
    made: Mapping[str, Any],
    weights: Float[Array, "B R n L"],
    empty: Float[Array, "B L C"] | None,
    uses: Float[Array, "B R"] | float = 1.0,
) -> dict[str, Any]:
    """Returns {"context" [B R N C], others [B R ...]} from a family's {"context" [B R n L C], others [B R n ...]}.

    The context is weighted and its chunks are concatenated; other arrays come from the first chunk.
    """
    context = _weighed(made["context"], weights, empty, uses)
    batch, room, count, length = weights.shape
    others = {name: x[:, :, 0] for name, x in made.items() if name != "context"}
    return {**others, "context": context.reshape(batch, room, count * length, -1)}


def _weighed(
    z: Float[Array, "B R n L C"],
    weights: Float[Array, "B R n L"],
    empty: Float[Array, "B L C"] | None,
    uses: Float[Array, "B R"] | float = 1.0,
) -> Float[Array, "B R n L C"]:
    """Returns vectors z [B R n L C] with weights [B R n L].

    empty [B L C]: the empty text's vectors, for empty + w (z - empty).  None: w z, times the factor that restores each
    chunk's old mean.  A1111 encodes the texts of a timeline together, so the mean is over all of them, weighted by
    their `uses` [B R].  If the old mean is tiny compared with the vectors (SHALLOW), the factor is 1: otherwise it
    would consist of rounding errors.
    """
    w, z, kind = weights[..., None], z.astype(jnp.float32), z.dtype
    if empty is not None:
        empty = empty[:, None, None].astype(jnp.float32)
        return jnp.where(w == 1, z, empty + w * (z - empty)).astype(kind)
    uses = jnp.broadcast_to(uses, z.shape[:2])[..., None]  # [B R 1]
    old, new, size = (jnp.sum(uses * jnp.mean(x, (-2, -1)), 1) for x in (z, w * z, jnp.abs(z)))  # [B n]
    alike = jnp.all((weights == 1) | (uses == 0)[..., None], (1, 3)) | (jnp.abs(old) <= SHALLOW * size)  # [B n]
    factor = jnp.where(alike, 1, old / jnp.where(alike, 1, new))
    return (w * z * factor[:, None, :, None, None]).astype(kind)


def _parts(prompt: str, grammar: str) -> tuple[tuple[str, float], ...]:
    return grammars.parts(prompt) if grammar == "a1111" else ((prompt, 1.0),)


def _streams(
    prompts: Sequence[str], negatives: Sequence[str] | None, steps: int, grammar: str, before: int | None
) -> list[Stream]:
    """Returns a Stream for each part of AND, and one for the negatives."""
    if grammar not in GRAMMARS:
        raise ValueError(f"grammar={grammar!r}: expected one of {', '.join(GRAMMARS)}")
    if negatives is not None and len(negatives) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts, {len(negatives)} negative prompts: expected as many")

    def timed(text: str) -> Timed:
        return grammars.timeline(text, steps, before) if grammar == "a1111" else ((steps, text),)

    split = [_parts(prompt, grammar) for prompt in prompts]
    for prompt in prompts if grammar == "a1111" else ():
        if grammars.ADAPTER.search(prompt):
            raise ValueError(f"prompt {prompt!r}: take adapters out with grammars.adapters and attach them first")
    most = max(map(len, split))
    streams = [[(p[k][1], timed(p[k][0])) if k < len(p) else (0.0, timed(p[0][0])) for p in split] for k in range(most)]
    return streams + ([] if negatives is None else [[(1.0, timed(text)) for text in negatives]])


def _turns(texts: Timed, steps: int) -> tuple[list[str], Int32[np.ndarray, " S"], Int32[np.ndarray, " R"]]:
    """Returns (the different texts of a timeline, the index of each step's text, each text's number of ends).

    A1111 uses the text with the first end that is not below the number of steps done: a text until step 3 has 4 steps.
    """
    different = list(dict.fromkeys(text for _, text in texts))
    place = [different.index(text) for _, text in texts]
    ends = np.array([end for end, _ in texts])
    steps_done = np.minimum(np.arange(max(STEPS, steps)), steps)
    return different, np.array(place, np.int32)[np.searchsorted(ends, steps_done)], np.bincount(place)


def _stacked(
    tokenizers: Mapping[str, Tokenizer], streams: Sequence[Stream], grammar: str, steps: int
) -> dict[str, Any]:
    """Returns the tables of all streams' prompts, as {"words", "uses", "index", "count"}; B counts all these prompts.

    words: {text encoder: {"ids", "weights" [B R n L], "empty" [1 L]}}.  uses: [B R].  index: [B S].  count: the largest
    number of different texts.
    """
    turns = [_turns(texts, steps) for stream in streams for _, texts in stream]
    count = max(len(different) for different, _, _ in turns)
    room = max(ROOM if grammar == "a1111" else 1, 1 << (count - 1).bit_length())
    uses = np.zeros((len(turns), room), np.float32)
    for (_, _, some), line in zip(turns, uses, strict=True):
        line[: len(some)] = some
    made = {
        encoder: [[chunks(tokenizer, text, grammar) for text in different] for different, _, _ in turns]
        for encoder, tokenizer in tokenizers.items()
    }
    long = max(len(chunked) for prompts in made.values() for texts in prompts for chunked in texts)
    words = {encoder: _filled(tokenizers[encoder], prompts, room, long) for encoder, prompts in made.items()}
    return {"words": words, "uses": uses, "index": np.array([index for _, index, _ in turns]), "count": np.int32(count)}


def _filled(tokenizer: Tokenizer, prompts: Sequence[Sequence[list[Chunk]]], room: int, long: int) -> dict[str, Any]:
    """Returns {"ids", "weights" [B R n L], "empty" [1 L]} for the prompts' texts; R = room and n = long."""
    filled = [
        [rows(tokenizer, chunked, long) for chunked in [*texts, *[[]] * (room - len(texts))]] for texts in prompts
    ]
    return {
        "ids": np.array([[ids for ids, _ in texts] for texts in filled]),
        "weights": np.array([[weights for _, weights in texts] for texts in filled]),
        "empty": rows(tokenizer, [], 1)[0],
    }


@functools.partial(jax.jit, static_argnames=("skip", "comfy"))
def _encoded(sd: TextModel, table: dict[str, Any], *, skip: int, comfy: bool) -> dict[str, Any]:
    """Returns the tables of Texts."""
    each = {encoder: _read(sd, encoder, table, skip, comfy) for encoder in table["words"]}
    words = {
        encoder: {"ids": some["ids"].reshape(*some["ids"].shape[:2], -1), "weights": some["weights"]}
        for encoder, some in table["words"].items()
    }
    unet = jax.vmap(sd.family.inputs, in_axes=1, out_axes=1)({encoder: made for encoder, (made, _) in each.items()})
    empty = {encoder: some for encoder, (_, some) in each.items()}
    return {"index": table["index"], "words": words, "unet": unet, "empty": empty}


def _read(sd, encoder, table, skip, comfy):
    """Returns ({"context" [B R N C], others [B R ...]}, {} or {"empty" [B L C]}) of one text encoder.

    It runs once per existing text, not for all of the room.
    """
    words = table["words"][encoder]
    batch, room, count, length = words["ids"].shape

    def read(ids):
        return sd.family.encode(sd, encoder, sd.embed(encoder, ids), ids, skip)

    def one(r, made):
        ids = jax.lax.dynamic_index_in_dim(words["ids"], r, 1, keepdims=False).reshape(-1, length)

        def put(whole, part):
            return jax.lax.dynamic_update_slice_in_dim(whole, part.reshape(batch, 1, count, *part.shape[1:]), r, 1)

        return jax.tree.map(put, made, read(ids))

    shapes = jax.eval_shape(read, words["empty"])
    made = jax.tree.map(lambda x: jnp.zeros((batch, room, count, *x.shape[1:]), x.dtype), shapes)
    made = jax.lax.fori_loop(0, table["count"], one, made)
    empty = {}
    if comfy:
        alone = read(words["empty"])["context"]
        empty["empty"] = jnp.broadcast_to(alone, (batch, *alone.shape[1:]))
    return _together(made, words["weights"], empty.get("empty"), table["uses"]), empty
