"""Records of pictures: their settings, written into the file in A1111's format and read back.

    record = of(TextToImage(prompt="a cat", seed=7), size=(512, 768))
    save("cat.png", picture, record)              # or .jpg, .webp; cat.json beside it
    record = read("cat.png")                      # A1111's own pictures too
    again = request(record)                       # the settings that make it again

A record is a request as text: settings by name (sampling/settings.py), hashes of files, and keys of other programs.
Files hold A1111's text and the exact record, see picture_texts.py.  Settings without a key in A1111 get keys of ours,
which A1111 ignores.  `public` removes what may be private.

Source: AUTOMATIC1111's stable-diffusion-webui 1.10: processing (the text), infotext_utils (its reading), hashes.
"""

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sdjax import __version__
from sdjax.formats.adapters import kinds
from sdjax.formats.storage.files import ask_room, new_file
from sdjax.sampling.control_settings import Controls
from sdjax.sampling.fields import Field, Size, acting, checked, fields, make
from sdjax.sampling.settings import FIRST, NAMES, TASKS, VARIED, Sampling, Task
from sdjax.service import foreign, picture_texts
from sdjax.settings import SettingError

HASH_OF = {"Model": ("Model hash", "model"), "VAE": ("VAE hash", "vae")}  # key: (key of its hash, name in `hashes`)
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MOST_TEXT = 1 << 16  # characters
OPEN = ("Frame",)  # keys of `more` that reveal no texts or files


@dataclass(frozen=True)
class Record:
    """The settings and files that a picture was made from.

    task: one of settings.TASKS.  settings: {name: value} of the settings that acted; files without folders.
    hashes: {"model", "vae", "lora NAME", "hypernet NAME", "embedding NAME": hash}, see provenance.py.
    more: other entries, {A1111's key: text}.
    """

    task: str = "text2img"
    settings: dict[str, Any] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    more: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        """The value of a setting; its default if the record omits it."""
        return self.settings.get(name, fields(TASKS[self.task])[name].usual)


def of(made: Task, size: tuple[int, int] | None = None, names: dict[str, Any] | None = None, **more: Any) -> Record:
    """Returns the Record of a picture's settings.

    size: (height, width) as --size sets it.  names: {setting: name} to record for files, see provenance.of.
    more: `hashes` and `more` of the Record.
    """
    said = acting(made) | (names or {}) | ({} if size is None else {"size": Size(*map(int, size))})
    known = fields(type(made))
    return Record(NAMES[type(made)], {name: said[name] for name in said if _kept(known[name])}, **more)


def _kept(field: Field) -> bool:
    """Returns whether records hold a setting: prompts, and settings with a key."""
    return bool(field.about.word) or not field.about.file


def request(record: Record, **others: Any) -> Task:
    """Returns the settings that make a record's picture again; others: values that override recorded ones.

    The caller names the files.  Raises SettingError for a missing value and for one that sdjax does not have.
    """
    return make(TASKS[record.task], record.settings | others)


def public(record: Record) -> Record:
    """Returns the record without private data: prompts, names and hashes of files, other programs' entries."""
    known = fields(TASKS[record.task])
    settings = {name: value for name, value in record.settings.items() if not known[name].about.private}
    return Record(record.task, settings, {}, {word: text for word, text in record.more.items() if word in OPEN})


# ---- A1111's text ------------------------------------------------------------------------------


def text(record: Record) -> str:
    """Returns A1111's text of a record: the prompt, "Negative prompt: ...", and a line "Steps: 20, Sampler: ..."."""
    words: dict[str, str] = {}
    for name, one in fields(TASKS[record.task]).items():
        if word := one.about.word:
            if word in HASH_OF and HASH_OF[word][1] in record.hashes:
                words[HASH_OF[word][0]] = record.hashes[HASH_OF[word][1]]
            value = record.settings.get(name)
            if value not in (None, (), "") and (one.about.always or value != one.unsaid):
                words[word] = _shown(one, value)
    words |= {"Task": record.task, **record.more}
    words |= {word: some for word, kind in _lists().items() if (some := _hash_list(record.hashes, f"{kind} "))}
    words["Version"] = f"sdjax {__version__}"
    line = ", ".join(f"{word}: {_quoted(value)}" for word, value in words.items())
    prompt, negative = (record.settings.get(name, "") for name in ("prompt", "negative_prompt"))
    return f"{prompt}{negative and f'{chr(10)}Negative prompt: {negative}'}\n{line}".strip()


def _lists():
    """Returns {key of a list of hashes: `called` of its format}: {"Lora hashes": "lora", ...}."""
    named = [kind for kind in kinds.known().values() if kind.called]
    return {kind.listed or f"{kind.called.capitalize()} hashes": kind.called for kind in named}


def _hash_list(hashes, kind):
    found = {name.removeprefix(kind): value for name, value in hashes.items() if name.startswith(kind)}
    return ", ".join(f"{re.sub('[:,]', '', name)}: {value}" for name, value in found.items())


def _shown(one, value):
    """Returns a value as text; whole floats without a decimal point, as A1111 writes them."""
    if one.several:
        return (" " if one.kind is float else ", ").join(
            _shown(dataclasses.replace(one, several=False), x) for x in value
        )
    if one.choices is not None:
        return one.choices.get(value, value)
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _quoted(value):
    return json.dumps(value, ensure_ascii=False) if re.search("[,:\n]", value) else value


PARAMETER = re.compile(r'(\w[\w \-/]{1,60}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def parse(written: str) -> Record:
    """Returns the Record of A1111's text.  Missing keys get A1111's defaults, such as GPU noise.

    Splits sampler names from before 1.9, which end in the schedule ("DPM++ 2M Karras"); keeps unknown samplers as they
    are.  An old "Hypernet" becomes <hypernet:name:strength> in the prompt.
    Raises ValueError for a text without parameters and for a value that its key does not accept.
    """
    *lines, last = written.strip().split("\n")
    words = {word: _unquoted(value) for word, value in PARAMETER.findall(last)}
    if len(words) < 3:
        raise ValueError(f"no parameters in {written[:40]!r}: expected a last line such as 'Steps: 20, Sampler: ...'")
    prompt, negative = _texts(lines)
    if "Hypernet" in words:
        prompt += f"<hypernet:{words.pop('Hypernet')}:{words.pop('Hypernet strength', '1.0')}>"
    words.pop("Version", None)
    words.setdefault("Sampler", "Euler")
    hashes = _hashes(words)
    return _of_words(words, hashes, {"prompt": prompt, "negative_prompt": negative})


def _of_words(words, hashes, settings):
    """Returns the Record of a text's keys, removing them from `words`, and of settings without a key."""
    task = words.pop("Task", None) or _task(words)
    if task not in TASKS:
        raise ValueError(f"Task: {task!r} in the picture's text; expected one of {', '.join(TASKS)}")
    known, found = fields(TASKS[task]), dict(settings)
    said = Sampling.spelled({name: words.pop(one.about.word) for name, one in known.items() if _its(one, words, known)})
    for name, one in known.items():
        needed = one.about.needs
        if name in said:
            found[name] = _read(one, said[name])
        elif name not in found and one.about.word and (needed not in known or found.get(needed)):
            found[name] = one.unsaid
    return Record(task, found, hashes, words)


def _its(one, words, known):
    """Returns whether a key belongs to a setting; of two settings with one key, to the one that acts."""
    needs = known.get(one.about.needs)
    twice = [other for other in known.values() if other.about.word == one.about.word]
    return one.about.word in words and (len(twice) < 2 or needs is None or needs.about.word in words)


def _task(words):
    """Returns the task of a text that does not name it."""
    twice = {"Hires upscale", "Hires resize"} & words.keys()
    return "img2img" if "Denoising strength" in words and not twice else "text2img"


def _texts(lines):
    """Returns (prompt, negative prompt) from the lines before the last."""
    texts = [[]]
    for line in map(str.strip, lines):
        if line.startswith("Negative prompt:"):
            texts.append([])
            line = line.removeprefix("Negative prompt:").strip()
        texts[-1].append(line)
    prompt, *negative = ("\n".join(text) for text in texts)
    return prompt, "\n".join(negative)


def _read(one, value):
    """Returns the value of a key's text; an unknown name unchanged."""
    if one.choices is not None and not one.several:
        return one.choices.ours(value)
    parts = value.split(" " if one.kind is float else ", ") if one.several else value
    try:
        return checked(one, parts, text=True)
    except SettingError as error:
        raise ValueError(f"{one.about.word}: {value!r} in the picture's text; expected {error.expected}") from None


def _hashes(words):
    found = {name: words.pop(word) for word, name in HASH_OF.values() if word in words}
    for word, kind in _lists().items():
        for item in filter(None, words.pop(word, "").split(",")):
            name, _, value = item.rpartition(":")
            found[f"{kind} {name.strip()}"] = value.strip()
    return found


def _unquoted(value):
    if len(value) > 1 and value[0] == value[-1] == '"':
        try:
            return str(json.loads(value))
        except ValueError:
            pass  # only looks like a quoted text
    return value.strip()


# ---- the exact record ----------------------------------------------------------------------------


def to_json(record: Record) -> str:
    """Returns the record as one line of JSON, ASCII letters only."""
    settings = {name: _plain(value) for name, value in record.settings.items()}
    return json.dumps({"class": "Request", **vars(record), "settings": settings})


def _plain(value):
    return str(value) if isinstance(value, Size) or isinstance(value, float) and math.isinf(value) else value


def from_json(data: str) -> Record:
    """Returns the Record of to_json's text, of an object with it under "record", or of sdjax 0.1's form.

    Raises ValueError for anything else.
    """
    try:
        held = json.loads(data)
    except RecursionError:
        raise ValueError("the record's JSON is nested too deep") from None
    held = held.get("record", held) if isinstance(held, dict) else held
    kind = held.get("class") if isinstance(held, dict) else None
    if kind not in ("Request", "Record"):
        raise ValueError("no record; expected what to_json gave")
    parts = [held.get(name, {}) for name in ("hashes", "more")]
    if not all(isinstance(part, dict) and all(type(x) is str for x in part.values()) for part in parts):
        raise ValueError("no record; expected what to_json gave")
    if kind == "Record":
        return _of_first(held, *parts)
    task, settings = held.get("task"), held.get("settings")
    if task not in TASKS or not isinstance(settings, dict):
        raise ValueError(f"task={task!r}: expected one of {', '.join(TASKS)}")
    known = fields(TASKS[task])
    settings = Controls.spelled(settings) if "control" in known else settings
    for name in settings:
        if name not in known:
            raise SettingError(name, settings[name], f"a setting of {task}", "unknown")
    return Record(task, {name: _exact(known[name], value) for name, value in settings.items()}, *parts)


def _exact(one, value):
    """Returns a setting's value; an unknown name unchanged."""
    if one.choices is not None and isinstance(value, str):
        return one.choices.ours(value)
    return checked(one, value, text=isinstance(value, str))


def _of_first(held, hashes, more):
    """Returns the Record of sdjax 0.1's form: settings under other names, some under A1111's keys."""
    own = {
        name: value for name, value in held.items() if name not in ("class", "hashes", "more", "strength", "variation")
    }
    for old, (name, more_now) in FIRST.items():
        if old in own:
            own[name] = own.pop(old) + more_now if more_now else own.pop(old)
    own |= dict(zip(VARIED, held.get("variation") or (), strict=False))
    words = dict(more) | ({"Denoising strength": str(held["strength"])} if held.get("strength") is not None else {})
    known = {name: one for task in TASKS.values() for name, one in fields(task).items()}
    settings = {name: _exact(known[name], value) for name, value in own.items() if name in known and value != ""}
    for name in own.keys() - known.keys():
        raise SettingError(name, own[name], "a record of sdjax 0.1", "unknown")
    return _of_words(words, hashes, settings)


# ---- files -------------------------------------------------------------------------------------


def save(
    path: str | Path, picture: Any, record: Record, *, private: bool = True, beside: bool = True, quality: int = 95
) -> None:
    """Writes a picture, uint8 [H W 3], with its record, completely or not at all.

    The suffix is the format: .png .jpg .jpeg .webp.  private: False writes public(record).
    beside: also write the record as .json, before the picture, so that no picture lacks its record.
    quality: of JPEG and WebP, 1 to 100; 100 makes WebP lossless.
    Raises ValueError for another suffix and for a folder that is not writable.
    """
    from PIL import Image

    path = Path(path)
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: the format {path.suffix!r} is unknown; expected {', '.join(FORMATS)}")
    record = record if private else public(record)
    image, data = Image.fromarray(np.asarray(picture)), to_json(record)
    if beside:
        with new_file(path.with_suffix(".json")) as temporary:
            temporary.write_text(data + "\n", encoding="utf-8")
    with new_file(path) as temporary:
        ask_room(temporary, np.asarray(picture).nbytes)  # as it is at most, but for noise
        image.save(temporary, kind, **picture_texts.options(kind, text(record), data, quality))


def read(path: str | Path) -> Record:
    """Returns the Record in a picture's file, ours, A1111's or another program's (foreign/), or in the .json beside it.

    Raises ValueError naming a file that is missing, not a picture, or without a record.
    """
    path = Path(path)
    try:
        if path.suffix.lower() == ".json":
            return from_json(_within(path.read_text(encoding="utf-8")))
        held = picture_texts.of(path)
        if picture_texts.OWN in held:
            return from_json(_within(held[picture_texts.OWN]))
        written = held.get(picture_texts.A1111)
        if written is not None and not written.lstrip().startswith("{"):
            return parse(_within(written))
        if (said := foreign.read(held, path.name)) is not None:
            return _of_foreign(*said)
        raise ValueError("no record; expected A1111's text in PNG or EXIF, or another program's")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as error:  # damaged records raise many kinds of errors
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"{path}: {reason}") from None


def _of_foreign(program: str, said: dict[str, Any]) -> Record:
    """Returns the Record of what another program's picture says; what no setting accepts goes to `more`."""
    known, settings, more = fields(TASKS["text2img"]), {}, {"Made by": program}
    for name, value in said.items():
        try:
            settings[name] = _exact(known[name], value)
        except SettingError:
            more[known[name].about.word or name] = str(value)[:MOST_TEXT]
    return Record("text2img", settings, {}, more)


def own(path: Path) -> bool:
    """Returns whether a picture's file has a record of any version of sdjax."""
    try:
        return picture_texts.OWN in picture_texts.of(path)
    except (ValueError, OSError, SyntaxError):  # SyntaxError: Pillow, for a broken PNG
        return False


def _within(written):
    if len(written) > MOST_TEXT:
        raise ValueError(f"the record has {len(written)} characters; expected at most {MOST_TEXT}")
    return written
