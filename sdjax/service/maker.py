"""Makes pictures and records from requests and keeps loaded models and adapters, up to a number of bytes.

    maker = Maker(adapters="loras")
    (picture,) = maker.make([Request(TextToImage(prompt="a <lora:ink:0.8>cat", grammar="a1111"))])

Programs, lists, page and API use it.  One call makes one group of request.grouped.
"""

import re
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax import trees
from sdjax.formats import pipeline
from sdjax.formats.adapters import attach, attachable, e4t, kinds
from sdjax.formats.models import controlnet
from sdjax.images import reading
from sdjax.runtime import replicas
from sdjax.sampling import control, generate, inpainting, memory, settings, upscaling
from sdjax.sampling.job import Job, Progress
from sdjax.sampling.latents import latent_shape, size_of, wanted_shape
from sdjax.service import provenance, records
from sdjax.service.request import Request, bare, files_of, taken_apart, texts
from sdjax.settings import SettingError
from sdjax.stable_diffusion import StableDiffusion

ROOM = 8e9  # bytes to keep loaded if free memory is unknown
HELD = (".safetensors", ".ckpt", ".pt", ".bin", ".json")  # files of a folder that change what is loaded
LEARNED = re.compile(r"<[\w-]+>|(?<!\w)\*\w\b")  # <new>, *s: default names of learned words


class Cache:
    """A cache of loaded values that drops the least recently used above `room` bytes."""

    def __init__(self, room: float | None = None) -> None:
        self.items: dict[Any, Any] = {}
        self.room = room
        self.lock = threading.RLock()

    def get(self, key: Any, load: Callable[[], Any]) -> Any:
        """Returns load(), cached by key; one thread loads, and may call `get` meanwhile, while the others wait."""
        with self.lock:
            if self.room is None:
                self.room = (memory.available() or ROOM) / 2
            if key in self.items:
                self.items[key] = self.items.pop(key)
                return self.items[key]
            self.items[key] = load()
            while len(self.items) > 1 and _bytes(*self.items.values()) > self.room:
                del self.items[next(iter(self.items))]
            return self.items[key]


def _bytes(*held: Any) -> int:
    """Returns the bytes of all arrays, each counted once."""
    return sum({id(x): x.nbytes for x in jax.tree.leaves(held) if hasattr(x, "nbytes")}.values())


class Maker:
    """Makes pictures of requests.

    adapters: the folder of adapters that prompts name.  room: bytes to keep loaded.
    """

    def __init__(self, adapters: str | Path = "adapters", room: float | None = None) -> None:
        self.adapters, self.held = Path(adapters), Cache(room)
        self.expected: dict[str, dict[str, None]] = {}  # texts of expected requests, by how they name adapters
        self.named: dict[Any, dict[str, Path]] = {}  # the embeddings in those texts, by model and grammar
        self.unread: dict[str, str] = {}  # {word: why its embedding cannot be read}

    def expect(self, requests: Iterable[Request]) -> None:
        """Attaches the words of later requests from the first request on, so that they recompile nothing."""
        self.expected, self.named = {}, {}
        for one in requests:
            self.expected.setdefault(one.settings.naming, {}).update(dict.fromkeys(texts(one.settings)))

    def make(
        self,
        requests: Sequence[Request],
        *,
        batch: int | None = None,
        progress: bool = False,
        watch: Callable[[Progress], Any] | None = None,
    ) -> np.ndarray:
        """Returns the pictures uint8 [B H W 3] of a group of requests, or the frames of an interpolation.

        batch: frames computed at once.  progress: show a bar over the steps.  watch: see Job.
        Raises SettingError for a file that is not a picture, and what the functions of sampling/ raise.
        """
        sd = self.model(requests)
        pictures = tuple(self._suited(sd, request.settings) for request in requests)
        if isinstance(pictures[0], settings.Interpolate):
            return generate.between(sd, pictures[0], batch, progress, watch)
        job = Job(pictures, control=self._controls(sd, requests[0]), progress=progress, watch=watch)
        return _draw(sd, job, requests)

    def _suited(self, sd: StableDiffusion, made: settings.Task) -> settings.Task:
        """Returns a picture's settings for this model, its prompt without adapters."""
        made = bare(made)
        return upscaling.suited(sd, made) if isinstance(made, settings.Upscale) else made

    def record(self, request: Request, size: tuple[int, int], private: bool = True, **more: str) -> records.Record:
        """Returns the Record of a request; size: (height, width) of its picture.  more: more words of the record.

        private: False leaves out prompts, and names and hashes of files.
        """
        sd, made = self.base(request)[0], request.settings
        if isinstance(made, settings.Upscale):
            made, size = upscaling.suited(sd, made), (size[0] // sd.factor, size[1] // sd.factor)
        elif upscaling.passes(made) > 1:
            height, width = wanted_shape(sd, made)[:2]
            size = height * sd.factor, width * sd.factor
        elif inpainting.cropped(made):
            size = size_of(sd, made)
        if not private:
            return records.public(records.of(made, size, more=more))
        names, hashes = provenance.of(sd, made, self._named(sd, made))
        return records.of(made, size, names, hashes=hashes, more=more)

    # ---- models ------------------------------------------------------------------------------------

    def model(self, requests: Sequence[Request]) -> StableDiffusion:
        """Returns the model of a group of requests with the adapters and embeddings that they name."""
        made, named = requests[0].settings, taken_apart(requests[0].settings)[1]
        base, key = self.base(requests[0])
        if not base.tokenizers:
            return base
        folder = attach.Folder(self.adapters)
        if named:
            files = [(one, _state(attach.find(folder, one.name))) for one in named]
            key = (key, repr(files))
            base = self.held.get(key, lambda: replicas.spread(attach.attach_named(base, named, folder, self._read)))
        said = dict.fromkeys(text for one in requests for text in texts(one.settings))
        expected = self.expected.get(made.naming, {})
        if said.keys() <= expected.keys():
            said, place = expected, (key, made.naming)
            if place not in self.named:
                self.named[place] = self._embeddings(base, said, folder, made.naming)
            found = self.named[place]
        else:
            found = self._embeddings(base, said, folder, made.naming)
        if not found:
            return base
        key = (key, repr([(word, _state(path)) for word, path in found.items()]))
        return self.held.get(key, lambda: replicas.spread(attach.attach_found(base, found)))

    def _embeddings(self, sd, said, folder, grammar):
        """Returns {word: file} of the embeddings that texts name; prints a note once for each unreadable one."""
        found, unread = attach.find_embeddings(sd, list(said), folder, grammar)
        for word, reason in unread.items():
            if word not in self.unread:
                self.unread[word] = reason
                attach.note(f"{word!r} is read as a plain word: {reason}")
        return found

    def base(self, request: Request) -> tuple[StableDiffusion, Any]:
        """Returns (the model of a request without the adapters in its prompt, its cache key)."""
        made = request.settings
        (source, how), given = made.loading(), files_of(made)
        subject = made.image if isinstance(made, settings.TextToImage) else None
        files = [source, how["vae"], how["tokenizer"], *(attach.split(one)[0] for one in given)]
        files += [request.file(subject)] if subject else []
        key = repr((source, how, given, [_state(file) for file in files]))
        return self.held.get(key, lambda: self._load(source, how, given, request, subject)), key

    def _load(self, source, how, given, request, subject):
        sd = pipeline.load(source, **how)
        seeing = any(attach.kind(attach.split(one)[0])[0].called == "e4t" for one in given)
        picture = None
        if subject:
            size = latent_shape(sd)[0] * sd.factor
            picture = _named_picture("image", request, subject, lambda path: reading.subject(path, size))
        if picture is not None and not seeing:
            sd = e4t.personalise(sd, pipeline.locate(source), picture)
        sd = attach.attach_all(sd, given, self._read)
        return replicas.spread(e4t.shown(sd, picture) if seeing else sd)

    def _read(self, path, sd, word=None):
        """Returns the adapter in a file, cached for all strengths."""
        key = ("adapter", _state(path), word, sd.networks)
        return self.held.get(key, lambda: attachable.read(path, sd, word))

    def _controls(self, sd: StableDiffusion, request: Request) -> list[Any]:
        made, dtype = request.settings, jnp.dtype(sd.networks["unet"].dtype).name
        if not isinstance(made, settings.ControlNet):
            return []
        held = []
        for source in made.control:
            key = ("control", source, dtype, _state(source))
            held.append(self.held.get(key, lambda: controlnet.load_control(source, dtype)))  # noqa: B023
        readers = [maker.read if maker is not None and maker.endings else reading.picture for maker in made.makers()]
        given = zip(made.control_image, readers, strict=True)
        pictures = [_named_picture("control_image", request, one, read) for one, read in given]
        return control.applied(held, made, pictures)

    def _named(self, sd: StableDiffusion, made: settings.Task) -> dict[str, Path]:
        if not sd.tokenizers:
            return {}
        folder = attach.Folder(self.adapters)
        return provenance.adapters_named(sd, taken_apart(made)[1], texts(made), folder, made.naming)

    def hashes(self, request: Request) -> list[Any]:
        """Returns the hashes of the adapters that a request names, None for an unreadable one."""
        sd, made = self.base(request)[0], request.settings
        found: list[Any] = []
        folder = attach.Folder(self.adapters)
        if sd.tokenizers:
            words = provenance.adapters_named(sd, (), texts(made), folder, made.naming)
            found = list(provenance.of_adapters(words).values())
        files = [attach.split(one)[0] for one in files_of(made)]
        found += [provenance.digest(file) for file in files]
        for one in taken_apart(made)[1]:
            try:
                found.append(provenance.digest(attach.find(folder, one.name)))
            except (ValueError, OSError):
                found.append(None)
        return found

    def notes(self, requests: Sequence[Request]) -> list[str]:
        """Returns notes on prompts of a group that the model reads differently from what the user may expect."""
        sd, plain = self.model(requests), requests[0].settings.plain
        if not sd.tokenizers:
            return []
        said = list(dict.fromkeys(text for one in requests for text in texts(one.settings)))
        named = re.search(rf"<({'|'.join(kinds.tags())}):[^>]{{0,1000}}>", "\n".join(said))
        tokenizer = next(iter(sd.tokenizers.values()))
        room = tokenizer.length - 2  # begin and end
        longest = max(len(tokenizer.ids(text)) for text in said)
        found = []
        if named:
            found.append(f"{named[0]} is read as words; --grammar a1111 attaches the adapter")
        elif plain and longest > room:
            first = f"a prompt has {longest} tokens; the model reads the first {room}"
            found.append(f"{first}; --grammar a1111 reads them all")
        for word in dict.fromkeys(word for text in said for word in LEARNED.findall(text)):
            if not sd.knows(word):
                how = "--adapter FILE adds a learned word, --image PICTURE the subject for a model with e4t/"
                found.append(f"{word} is not a word that the model has learned; {how}")
        return found


def _state(path: Any) -> Any:
    """Returns (path, size, time) of a file, those of the files of a model's or an adapter's folder, else None."""
    try:
        path = Path(path or "none")
        state = path.stat()
        if path.is_dir():  # whose own time says nothing of the files in its folders
            there = sorted(one for way in ("*", "*/*") for one in path.glob(way) if one.suffix in HELD)
            return tuple(_state(one) for one in there if one.is_file())
    except (OSError, ValueError):
        return None
    return str(path), state.st_size, state.st_mtime_ns


def weights(sd: StableDiffusion) -> str:
    """Returns the digest of a model's weights."""
    return trees.digest({part: sd.parts[part] for part in ("unet", "vae", *sd.tokenizers)})


# ---- drawing ---------------------------------------------------------------------------------------


def _draw(sd: StableDiffusion, job: Job, requests: Sequence[Request]) -> np.ndarray:
    """Returns the pictures of a job from the function of sampling/ for its settings."""
    shared = job.settings
    if isinstance(shared, settings.TextToImage) or not shared.image:
        return generate.drawn(sd, job) if upscaling.passes(shared) == 1 else upscaling.redone(sd, job)
    images = [_named_picture("image", one, one.settings.image, reading.picture) for one in requests]
    if isinstance(shared, settings.Upscale):
        return upscaling.enlarged(sd, job, images)
    if not getattr(shared, "mask", None):
        return generate.redrawn(sd, job, images)
    masks = [_named_picture("mask", one, one.settings.mask, reading.mask) for one in requests]
    return inpainting.repainted(sd, job, images, masks)


def _named_picture(name: str, request: Request, file: str, read: Callable[[Path], np.ndarray]) -> np.ndarray:
    """Returns the picture in a setting's file.  Raises SettingError for `name` if the file is not a picture."""
    path = request.file(file)
    if path.is_dir():
        raise SettingError(name, file, "one picture", "is a folder")
    if not path.is_file():
        raise SettingError(name, file, "a picture's file", "no such file")
    try:
        return read(path)
    except (ValueError, OSError) as error:
        raise SettingError(name, file, "a picture", str(error).splitlines()[0]) from None
