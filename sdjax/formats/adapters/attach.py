"""Attaches adapters to a model for sampling; kinds.py detects the kind of a file from its contents.

    sd = attach(sd, "cat.safetensors", 0.8)          # a second call replaces the strength
    sd = attach(sd, "style.pt")                      # several act together, in any order
    sd = attach(sd, {"cat.safetensors": 0.8, "ink.safetensors": 0.5})      # sums the weights once for both
    sd = detach(sd, "cat.safetensors")               # does not reload the model
    sd = detach(sd)                                  # the model as it was, bit for bit

An adapter changes a model like a method: by edits of weights, words, a hook or a conditioner.  sd.reference.attached
keeps the original model, and every change starts from its weights.  Another strength, or another file that edits
weights, does not recompile.
"""

import functools
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import jax.numpy as jnp
from flax import struct

from sdjax import trees
from sdjax.formats.adapters import adapter_file, attachable, embeddings, kinds
from sdjax.formats.adapters.format import Format
from sdjax.formats.adapters.kinds import is_hub_id
from sdjax.methods import edits
from sdjax.methods.adapter import Adapter
from sdjax.stable_diffusion import StableDiffusion
from sdjax.text.grammars import Wanted


@dataclass(frozen=True)
class Attachment:
    """An attached adapter: its file, its strength, and its strength on the UNet.

    state: (size, time, requested word) of the file when it was read.
    """

    path: pathlib.Path
    state: tuple[int, int, str | None]
    adapter: Adapter = field(compare=False)
    strength: float
    unet: float


@dataclass(frozen=True)
class Stack:
    """The adapters of a model.  Stacks of the same files at the same strengths are equal."""

    items: tuple[Attachment, ...] = ()


class Attached(struct.PyTreeNode):
    """The record of attached adapters: the model before the first one, and the adapters."""

    base: StableDiffusion
    stack: Stack = struct.field(pytree_node=False)


def attach(
    sd: StableDiffusion,
    source: str | pathlib.Path | Mapping[str, float],
    strength: float = 1.0,
    *,
    unet: float | None = None,
    word: str | None = None,
    keep: bool = True,
) -> StableDiffusion:
    """Returns sd with the adapter of a file, or of a folder from diffusers or PEFT; weights W + sum_i s_i D_i.

    source: a file, a folder or a hub id "owner/name"; {source: s} for several sums their weights once, not per call.
    strength: s, any number; 0 is off.  A file that is already attached gets the new strength.
    unet: another strength for the UNet's weights.
    word: the embedding's word in prompts; None is the file's own word, or else its name without the ending.  A word
    that consists of tokens, such as "face" or "bad hands", replaces them in prompts, as in A1111.
    keep: False drops the original weights, which saves memory; the adapters cannot be detached then.
    Raises ValueError in one line if the file is not an adapter, of an unsupported kind, or for another model.
    """
    given = source if isinstance(source, Mapping) else {source: strength}
    sd = _with(sd, [_attachment(sd, one, s, unet, word) for one, s in given.items()])
    return sd if keep else _without_record(sd)


def _attachment(sd, source, strength, unet=None, word=None, read=attachable.read):
    path = attachable.given(source)
    about = path.stat()
    adapter = read(path, _taken(sd)[0], word)
    if adapter.only_words and strength != 1:
        raise ValueError(f"{path}: strength={strength!r}: an embedding has none; weigh its word in the prompt instead")
    state = about.st_size, about.st_mtime_ns, word
    return Attachment(path, state, adapter, float(strength), float(strength if unet is None else unet))


def detach(sd: StableDiffusion, source: str | pathlib.Path | None = None) -> StableDiffusion:
    """Returns sd without one adapter or, by default, without all; restores weights, words and hooks bit for bit.

    This also undoes changes of weights and words made after the first attachment.
    Raises ValueError if the adapter is not attached.
    """
    (base, items), path = _taken(sd), None
    if source is not None:
        path = pathlib.Path(source).resolve()
        # Without `given`, the path of a file that may have been deleted.
        path = attachable.given(source) if path.is_dir() or is_hub_id(source) else path
    left = tuple(item for item in items if path is not None and item.path != path)
    if len(left) == len(items):
        there = trees.listing(item.path for item in items)
        raise ValueError(f"{'all' if source is None else source}: not attached; attached: {there}")
    return _put(sd, base, left)


def attach_all(sd: StableDiffusion, named: Iterable[str], read: Callable = attachable.read) -> StableDiffusion:
    """Returns sd with the adapters of a command line (see split), not detachable.

    read(path, sd, word): attachable.read or a caching version of it.
    """
    items = [_attachment(sd, file, strength, word=word, read=read) for file, strength, word in map(split, named)]
    return _without_record(_with(sd, items))


def attach_named(
    sd: StableDiffusion, wanted: Sequence[Wanted], folder: "Folder", read: Callable = attachable.read
) -> StableDiffusion:
    """Returns sd with the adapters that prompts name, from a folder; not detachable.

    read: see attach_all.
    Raises ValueError if a name matches no file or several, or a file of another kind.
    """
    items = []
    for one in wanted:
        path = find(folder, one.name)
        found, _ = kind(path)
        if found.called != one.kind:
            raise ValueError(f"<{one.kind}:{one.name}>: {path} is of the kind {found.called or found.name}")
        items.append(_attachment(sd, path, one.strength, one.unet, read=read))
    return _without_record(_with(sd, items)) if wanted else sd


class Folder:
    """The adapter files in a folder and below, listed once on first use."""

    def __init__(self, root: str | pathlib.Path) -> None:
        self.root = pathlib.Path(root)

    @functools.cached_property
    def files(self) -> dict[pathlib.Path, tuple[str, ...]]:
        """{file: its names} of possible adapters, previews included, sorted by path."""
        found, endings, filled = {}, kinds.endings(), kinds.folder_names()
        for path in sorted(self.root.rglob("*")):
            if path.suffix.lower() in endings:
                own = path.name in filled and path.parent != self.root and path == kinds.chosen(path.parent)
                found[path] = (name_of(path), path.stem) if own else (path.stem,)
        return found


def find(folder: Folder, name: str) -> pathlib.Path:
    """Returns the adapter file with this name in a folder; names are compared and never become part of a path.

    A file's name excludes the ending; a file from diffusers or PEFT also has the name of its folder.
    Raises ValueError for no match or several.
    """
    endings = kinds.endings(tagged=True)  # excludes previews, whose endings embeddings share
    there = {path: names for path, names in folder.files.items() if path.suffix.lower() in endings}
    found = [path for path, names in there.items() if name in names]
    if len(found) != 1:
        known = trees.listing(names[0] for names in there.values())
        raise ValueError(f"adapter {name!r}: {len(found)} files of this name in {folder.root}; expected one of {known}")
    return found[0]


def name_of(path: str | pathlib.Path) -> str:
    """Returns an adapter's name: the file name without ending, or the name of its folder or hub repository."""
    if is_hub_id(path):
        return str(path).rpartition("/")[2]
    path = pathlib.Path(path)
    if path.is_dir():
        return path.name
    return path.parent.name if path.name in kinds.folder_names() else path.stem


def find_embeddings(
    sd: StableDiffusion, texts: Iterable[str], folder: Folder, grammar: str
) -> tuple[dict[str, pathlib.Path], dict[str, str]]:
    """Returns ({word: file}, {word: reason it is unreadable}) of the embeddings in a folder that texts name.

    Texts name them "word" in a1111 and "embedding:word" in comfyui.  Opens only files with these names and skips other
    kinds and previews.
    Raises ValueError if two embeddings share a name.
    """
    before = {"a1111": r"(?<!\w)", "comfyui": r"(?<!\S)embedding:|(?<=[(\s])embedding:"}.get(grammar)
    if before is None:
        return {}, {}
    said, found, unread = "\n".join(texts), {}, {}
    for path, names in folder.files.items():
        word = names[0]
        letters = r"\s+".join(map(re.escape, word.split()))
        if not re.search(rf"(?:{before}){letters}(?!\w)", said, re.IGNORECASE):
            continue
        try:
            if not _by_word(attachable.kind(path)):
                continue
            embeddings.check(sd, attachable.read(path, sd).words, path)
        except (ValueError, OSError) as error:
            unread[word] = str(error)
            continue
        if word in found:
            raise ValueError(f"embedding {word!r}: {found[word]} and {path} have this name; expected one")
        found[word] = path
    return found, {word: reason for word, reason in unread.items() if word not in found}


def _by_word(kind):
    """Returns whether prompts name files of a kind by their word alone; False for None."""
    return kind is not None and bool(kind.called) and not kind.tags


def note(line: str) -> None:
    """Prints a note on stderr."""
    print(f"note: {line}", file=sys.stderr)


def attach_found(sd: StableDiffusion, found: Mapping[str, pathlib.Path]) -> StableDiffusion:
    """Returns sd with the embeddings {word: file} of find_embeddings; not detachable."""
    for word, path in found.items():
        if not sd.knows(word):
            sd = attach(sd, path, word=word)
    return _without_record(sd) if found else sd


def split(text: str) -> tuple[str, float, str | None]:
    """Returns (file, strength, word) of "FILE", "FILE:0.8" or "WORD=FILE"; word: None if not given.

    Raises ValueError for a strength that is not a number.
    """
    if pathlib.Path(text).exists():
        return text, 1.0, None
    file, _, strength = text.rpartition(":")
    word, equals, rest = text.partition("=")
    if equals and word and not (file and pathlib.Path(file).exists()):
        return (*split(rest)[:2], word)
    if not file:
        return text, 1.0, None
    try:
        return file, float(strength), None
    except ValueError:
        raise ValueError(f"adapter {text!r}: no such file; expected FILE, FILE:STRENGTH or WORD=FILE") from None


def kind(source: str | pathlib.Path) -> tuple[Format, pathlib.Path]:
    """Returns (the kind of an adapter, its file); source: as in attach."""
    path = attachable.given(source)
    return attachable.kind(path) or kinds.kind_of(adapter_file.of(path)), path


# ---- the stack ---------------------------------------------------------------------------------


def _taken(sd):
    """Returns (the model before its first adapter, its attachments)."""
    record = sd.reference.attached
    return (record.base, record.stack.items) if record else (sd, ())


def _without_record(sd):
    return sd.with_reference(attached=None)


def _with(sd, items):
    """Returns sd with these attachments, which replace those of the same files; sums weights once."""
    base, there = _taken(sd)
    for item in items:
        there = (*(other for other in there if other.path != item.path), item)
    return _put(sd, base, there) if items else sd


def _put(sd, base, items):
    """Returns sd with the weights, words, hooks and conditioners of `base` and these attachments only."""
    _, old = _taken(sd)
    encoders = {name: sd.networks[name].clone(config=base.networks[name].config) for name in base.tokenizers}
    made = (
        _without_record(sd)
        .replace(words=base.words, tokenizers=base.tokenizers)
        .with_networks(**encoders)
        .with_parts(**{part: _edited(sd, base, part, items) for part in _parts((*old, *items), base)})
    )
    for item in items:
        made = embeddings.add(made, item.adapter.words, item.path)
    for kind in ("hook", "conditioner"):
        many, there = f"{kind}s", getattr(sd, f"{kind}s")
        first, added = len(getattr(base, many)), sum(getattr(item.adapter, kind) is not None for item in old)
        new = (_bound(made, item, kind) for item in items if getattr(item.adapter, kind) is not None)
        made = made.replace(**{many: (*there[:first], *new, *there[first + added :])})
    made = made.with_reference(own=_own(sd, old, items))
    if not items:
        return made
    return made.with_reference(attached=Attached(base, Stack(items)))


def _bound(sd, item, kind):
    """Returns an attachment's hook or conditioner with its strength and sd's ids of its words."""
    one = getattr(item.adapter, kind).replace(strength=jnp.float32(item.strength))
    return one.bound({word: sd.ids(word) for word in item.adapter.words}) if kind == "conditioner" else one


def _own(sd, old, items):
    """Returns the references of methods: the model's own and those of each attachment."""
    theirs = {name: (item.path, item.state) for item in old for name in item.adapter.own}
    own = {name: value for name, value in sd.reference.own.items() if name not in theirs}
    for item in items:
        for name, value in item.adapter.own.items():
            if name in own:
                raise ValueError(
                    f"{item.path}: the model looks at a picture already; detach what does, or leave it out"
                )
            own[name] = sd.reference.own[name] if theirs.get(name) == (item.path, item.state) else value
    return own


def _parts(items, base):
    """Returns the parts that adapters may have changed: UNet, text encoders, and edited parts."""
    edited = {part: None for item in items for part in item.adapter.edits}
    return [part for part in dict.fromkeys(("unet", *base.tokenizers, *edited)) if part in base.parts]


def _edited(sd, base, part, items):
    """Returns a part's weights with all edits applied, rounded for what sd computes in."""
    stacks = {}
    for item in items:
        for name, edit in item.adapter.edits.get(part, {}).items():
            stacks[name] = (*stacks.get(name, ()), (edit, item.unet if part == "unet" else item.strength))
    return edits.merge(base.parts[part], stacks, sd.networks[part].dtype) if stacks else base.parts[part]
