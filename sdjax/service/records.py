"""What a picture was made from, written into its file as A1111 writes it and read back from there.

    record = Record("a cat", seed=7, size=(512, 768), model="v1-5", hashes={"model": "6ce0161689"})  # see provenance.py
    save("cat.png", picture, record)              # or .jpg, .webp; cat.json beside it
    record = read("cat.png")                      # A1111's own pictures too
    again = text2img(sd, **settings(record))      # and records.of(job, i, size) makes them

PNG files hold A1111's text under `parameters` and the record itself, exactly, under `sdjax`; JPEG and WebP files hold
the text in EXIF's UserComment and the record in its ImageDescription.  Settings that A1111 has no word for are written
in its form under words of ours, which it passes over.  `public` leaves out what may be private.

Source: AUTOMATIC1111's stable-diffusion-webui 1.10: processing (the text), infotext_utils (its reading), hashes.
"""

import dataclasses
import functools
import json
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import sdjax.settings
from sdjax import __version__
from sdjax.formats.storage.files import new_file

SAMPLERS = {
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "pndm": "PLMS",
    "euler": "Euler",
    "euler_a": "Euler a",
    "heun": "Heun",
    "lms": "LMS",
    "dpm2": "DPM2",
    "dpm2_a": "DPM2 a",
    "dpmpp_2s_a": "DPM++ 2S a",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_sde": "DPM++ SDE",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "unipc": "UniPC",
    "deis": "DEIS",
    "lcm": "LCM",
    "tcd": "TCD",
}
SCHEDULES = {
    "automatic": "Automatic",
    "normal": "Normal",
    "karras": "Karras",
    "exponential": "Exponential",
    "polyexponential": "Polyexponential",
    "sgm_uniform": "SGM Uniform",
    "simple": "Simple",
    "ddim_uniform": "DDIM",
    "align_your_steps": "Align Your Steps",
}
NOISE = {"jax": "JAX", "torch-cpu": "CPU", "philox": "NV"}
SAMPLER_OF = {label: name for name, label in SAMPLERS.items()}
SCHEDULE_OF = {"Uniform": "normal", **{label: name for name, label in SCHEDULES.items()}}
NOISE_OF = {"GPU": "philox", **{label: name for name, label in NOISE.items()}}
HASHES = {"Lora hashes": "lora", "Hypernet hashes": "hypernet", "TI hashes": "embedding"}  # the second is ours
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
OWN = "sdjax"  # the PNG chunk of the exact record
MOST_TEXT = 1 << 16  # characters
DESCRIPTION, EXIF, USER_COMMENT = (
    0x010E,
    0x8769,
    0x9286,
)  # EXIF 2.3; the second holds the third
ENCODINGS = {b"UNICODE\0": "utf-16-be", b"ASCII\0\0\0": "utf-8", b"\0" * 8: "utf-8"}


# Numbers among the settings of generate.Job, under A1111's words or, where it has none, ours; usual ones are left out.
NUMBERED = {
    "rescale": "CFG rescale",
    "guidance_start": "Guidance start",
    "guidance_end": "Guidance end",
    "threshold": "Dynamic threshold",
    "threshold_limit": "Threshold limit",
    "churn": "Sigma churn",
    "churn_low": "Sigma tmin",
    "churn_high": "Sigma tmax",
    "churn_noise": "Sigma noise",
}


@dataclass(frozen=True)
class Record:
    """The settings of one picture, named as in generate.

    size: (height, width).  skip: the text encoder's layers left out, A1111's clip skip less one.
    strength, eta, variation (seed, amount): None where they do not apply.  ensd: added to the seed of fresh noise.
    model, vae: names.  hashes: {"model", "vae", "lora NAME", "hypernet NAME", "embedding NAME": hash}, provenance.py.
    more: anything else, {A1111's word: text}; "Task" is the program's and "Adapters" "NAME:STRENGTH, ...".
    """

    prompt: str = ""
    negative: str = ""
    steps: int = 20
    sampler: str = "ddim"
    schedule: str = "normal"
    guidance: float = 7.5
    seed: int = 0
    size: tuple[int, int] = (512, 512)
    grammar: str = "plain"
    weighting: str | None = None
    noise: str = "jax"
    skip: int = 0
    rescale: float = 0.0
    guidance_start: float = 0.0
    guidance_end: float = 1.0
    threshold: float = 0.0
    threshold_limit: float = 3.0
    churn: float = 0.0
    churn_low: float = 0.0
    churn_high: float = 999.0
    churn_noise: float = 1.0
    strength: float | None = None
    eta: float | None = None
    ensd: int = 0
    variation: tuple[int, float] | None = None
    model: str = ""
    vae: str = ""
    hashes: dict = field(default_factory=dict)
    more: dict = field(default_factory=dict)


def of(job, i, size, **more):
    """Returns the Record of picture i of a generate.Job; size: (height, width) in pixels; more: other fields of it."""
    seed, amount = job.variation
    return Record(
        prompt=job.prompts[i],
        negative=job.negative[i],
        steps=job.steps,
        sampler=job.sampler,
        schedule=job.schedule,
        guidance=float(job.guidance),
        seed=int(job.seeds[i]),
        size=tuple(map(int, size)),
        grammar=job.grammar,
        weighting=job.weighting,
        noise=job.noise_source,
        skip=job.skip,
        eta=job.eta,
        ensd=job.ensd,
        variation=(int(seed) + i, float(amount)) if amount else None,
        **{name: float(getattr(job, name)) for name in NUMBERED},
        **more,
    )


def settings(record):
    """Returns the arguments of generate.text2img that make a record's picture again: {"prompts": [text], ...}.

    Model and adapters are the caller's to load; `strength` and a picture belong to img2img.
    """
    made = {name: getattr(record, name) for name in ("negative", "steps", "sampler", "schedule", "guidance", "size")}
    made |= {name: getattr(record, name) for name in ("grammar", "weighting", "skip", "eta", "ensd", *NUMBERED)}
    made |= {"prompts": [record.prompt], "seeds": [record.seed], "noise_source": record.noise}
    return made | {"variation": record.variation or (0, 0.0)}


PRIVATE = ("prompt", "negative", "model", "vae", "hashes")
# Words of `more` that tell nothing of texts and files.
OPEN = ("Task", "Dtype", "Hires upscale", "Hires steps", "Hires upscaler", "Resize", "Feather", "Margin", "Noise level")
OPEN += ("Weight", "Start", "End", "Guess", "Tile", "EMA", "Prediction type")


def public(record):
    """Returns the record without what may be private: texts, names and hashes of files, other programs' words."""
    blank, more = Record(), {word: text for word, text in record.more.items() if word in OPEN}
    return dataclasses.replace(record, **{name: getattr(blank, name) for name in PRIVATE}, more=more)


# ---- A1111's text ------------------------------------------------------------------------------


def text(record):
    """Returns A1111's text of a record: the prompt, "Negative prompt: ...", and a line "Steps: 20, Sampler: ...".

    Raises ValueError for a sampler, schedule or noise that has no word there.
    """
    hashes = record.hashes
    height, width = record.size
    seed, amount = record.variation or (None, None)
    words = {
        "Steps": record.steps,
        "Sampler": _word(SAMPLERS, "sampler", record.sampler),
        "Schedule type": _word(SCHEDULES, "schedule", record.schedule),
        "CFG scale": record.guidance,
        "Seed": record.seed,
        "Size": f"{width}x{height}",
        "Model hash": hashes.get("model"),
        "Model": record.model or None,
        "VAE hash": hashes.get("vae"),
        "VAE": record.vae or None,
        "Variation seed": seed,
        "Variation seed strength": amount,
        "Denoising strength": record.strength,
        "Clip skip": record.skip + 1 if record.skip else None,
        "ENSD": record.ensd or None,
        "RNG": _word(NOISE, "noise", record.noise),
        "Eta": record.eta,
        **{word: _unusual(record, name) for name, word in NUMBERED.items()},
        "Prompt grammar": None if record.grammar == "a1111" else record.grammar,
        "Prompt weighting": record.weighting,
        **record.more,
        **{word: _hash_list(hashes, f"{kind} ") for word, kind in HASHES.items()},
        "Version": f"sdjax {__version__}",
    }
    line = ", ".join(f"{word}: {_quoted(_shown(value))}" for word, value in words.items() if value is not None)
    negative = f"\nNegative prompt: {record.negative}" if record.negative else ""
    return f"{record.prompt}{negative}\n{line}".strip()


def _unusual(record, name):
    value = getattr(record, name)
    return None if value == getattr(Record, name) else value


def _word(table, setting, name):
    if name not in table:
        raise ValueError(f"{setting}={name!r}: expected one of {', '.join(table)}")
    return table[name]


def _hash_list(hashes, kind):
    found = {name.removeprefix(kind): value for name, value in hashes.items() if name.startswith(kind)}
    return ", ".join(f"{re.sub('[:,]', '', name)}: {value}" for name, value in found.items()) or None


def _shown(value):
    """Returns a value as text; whole floats without their point, as A1111's sliders give them."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _quoted(value):
    return json.dumps(value, ensure_ascii=False) if re.search("[,:\n]", value) else value


PARAMETER = re.compile(r'(\w[\w \-/]{1,60}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def parse(written):
    """Returns the Record of A1111's text.  What A1111 leaves out has its defaults there: noise of the GPU, "automatic".

    Sampler names of before 1.9, which end in the schedule's ("DPM++ 2M Karras"), are understood; samplers that we do
    not have are kept as they are.  An old "Hypernet" becomes <hypernet:name:strength> in the prompt.
    Raises ValueError for a text without parameters, and for a value that is not what its word stands for.
    """
    *lines, last = written.strip().split("\n")
    words = {word: _unquoted(value) for word, value in PARAMETER.findall(last)}
    if len(words) < 3:
        raise ValueError(f"no parameters in {written[:40]!r}: expected a last line such as 'Steps: 20, Sampler: ...'")
    prompt, negative = _texts(lines)
    if "Hypernet" in words:
        prompt += f"<hypernet:{words.pop('Hypernet')}:{words.pop('Hypernet strength', '1.0')}>"
    words.pop("Version", None)
    sampler, schedule = _sampler(words)
    take = functools.partial(_take, words)
    size = take("Size", _size, (512, 512))
    variation = take("Variation seed", int, None)
    amount = take("Variation seed strength", float, 0.0)
    return Record(
        prompt=prompt,
        negative=negative,
        steps=take("Steps", int, 20),
        sampler=sampler,
        schedule=schedule,
        guidance=take("CFG scale", float, 7.0),
        seed=take("Seed", int, 0),
        size=size,
        grammar=take("Prompt grammar", str, "a1111"),
        weighting=take("Prompt weighting", str, None),
        noise=take("RNG", _noise, "philox"),
        skip=take("Clip skip", int, 1) - 1,
        **{name: take(word, float, getattr(Record, name)) for name, word in NUMBERED.items()},
        strength=take("Denoising strength", float, None),
        eta=take("Eta", float, None),
        ensd=take("ENSD", int, 0),
        variation=None if variation is None else (variation, amount),
        model=take("Model", str, ""),
        vae=take("VAE", str, ""),
        hashes=_hashes(words),
        more=words,
    )


def _texts(lines):
    """Returns (prompt, negative prompt) of the lines before the last."""
    texts = [[]]
    for line in map(str.strip, lines):
        if line.startswith("Negative prompt:"):
            texts.append([])
            line = line.removeprefix("Negative prompt:").strip()
        texts[-1].append(line)
    prompt, *negative = ("\n".join(text) for text in texts)
    return prompt, "\n".join(negative)


def _take(words, word, kind, default):
    """Returns the value of a word, which is taken out of `words`."""
    if word not in words:
        return default
    value = words.pop(word)
    try:
        return kind(value)
    except (ValueError, KeyError):
        raise ValueError(f"{word}: {value!r} in the picture's text; expected {EXPECTED[kind]}") from None


def _size(value):
    width, height = value.split("x")
    return int(height), int(width)


def _noise(value):
    return NOISE_OF[value]


EXPECTED = {int: "a whole number", float: "a number", _size: "WIDTHxHEIGHT", _noise: f"one of {', '.join(NOISE_OF)}"}


def _sampler(words):
    label, schedule = words.pop("Sampler", "Euler"), words.pop("Schedule type", None)
    if schedule is None and label not in SAMPLER_OF:
        head, _, tail = label.rpartition(" ")
        label, schedule = (head, tail) if tail in SCHEDULE_OF and head in SAMPLER_OF else (label, None)
    return SAMPLER_OF.get(label, label), SCHEDULE_OF.get(schedule or "Automatic", schedule)


def _hashes(words):
    names = (("Model hash", "model"), ("VAE hash", "vae"))
    found = {name: words.pop(word) for word, name in names if word in words}
    for word, kind in HASHES.items():
        for item in filter(None, words.pop(word, "").split(",")):
            name, _, value = item.rpartition(":")
            found[f"{kind} {name.strip()}"] = value.strip()
    return found


def _unquoted(value):
    if len(value) > 1 and value[0] == value[-1] == '"':
        try:
            return str(json.loads(value))
        except ValueError:
            pass  # a value that only looks so
    return value.strip()


# ---- files -------------------------------------------------------------------------------------


def save(path, picture, record, *, private=True, beside=True, quality=95):
    """Writes a picture, uint8 [H W 3], with its record: whole or not at all.

    The format is the suffix's: .png .jpg .jpeg .webp.  private: False writes public(record).
    beside: the record as .json too, which is written first, so that a picture never stands without its record.
    quality: of JPEG and WebP, 1 to 100; 100 makes WebP lossless.
    Raises ValueError for another suffix and for a folder that cannot be written.
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
        image.save(temporary, kind, **_options(kind, text(record), data, quality))


def _options(kind, written, data, quality):
    """Returns the arguments of Pillow's save for a format."""
    from PIL.PngImagePlugin import PngInfo

    if kind == "PNG":
        chunks = PngInfo()
        chunks.add_text("parameters", written)
        chunks.add_text(OWN, data)
        return {"pnginfo": chunks}
    lossless = {"lossless": True} if kind == "WEBP" and quality == 100 else {}
    return {"exif": _exif(data, written), "quality": quality, **lossless}


def _exif(description, comment):
    """Returns an EXIF block of two texts, as TIFF 6.0 lays it out: a directory, its text, a second one, its text.

    By hand because Pillow writes the comment as type BYTE, which readers of EXIF's UNDEFINED do not take.
    """
    description, comment = description.encode("ascii") + b"\0", b"UNICODE\0" + comment.encode("utf-16-be")
    filled = description + b"\0" * (len(description) % 2)  # directories begin at even places
    inner = 8 + 2 + 2 * 12 + 4 + len(filled)  # where the second directory is
    ascii_, long, undefined = 2, 4, 7  # types
    first = struct.pack(">2sHIH", b"MM", 42, 8, 2)
    first += struct.pack(">HHII", DESCRIPTION, ascii_, len(description), 38) + struct.pack(
        ">HHII", EXIF, long, 1, inner
    )
    second = struct.pack(">HHHII", 1, USER_COMMENT, undefined, len(comment), inner + 2 + 12 + 4)
    end = bytes(4)  # no further directory
    return b"Exif\0\0" + first + end + filled + second + end + comment


def to_json(record):
    """Returns the record as one line of JSON, ASCII letters only."""
    return json.dumps(sdjax.settings.to_json(record))


def from_json(data):
    """Returns the Record of what to_json gave, or of an object that has it under "record".

    Raises ValueError for anything else.
    """
    try:
        held = json.loads(data)
        held = held.get("record", held) if isinstance(held, dict) else held
        made = sdjax.settings.from_json(held, {"Record": Record})
    except RecursionError:
        raise ValueError("the record's JSON is nested too deep") from None
    if not isinstance(made, Record) or not all(type(x) is str for x in (*made.hashes.values(), *made.more.values())):
        raise ValueError("no record; expected what to_json gave")
    return made


def read(path):
    """Returns the Record of a picture's file, ours or A1111's, or of the .json beside it.

    Raises ValueError naming a file that is missing, is no picture, or holds no record.
    """
    path = Path(path)
    try:
        if path.suffix.lower() == ".json":
            return from_json(_within(path.read_text(encoding="utf-8")))
        own, written = _held(path)
        if own is None and written is None:
            raise ValueError("holds no record; expected A1111's text in PNG or EXIF")
        return parse(_within(written)) if own is None else from_json(_within(own))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (ValueError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: {reason}") from None


def own(path: Path) -> bool:
    """Returns whether a picture's file holds a record that this library wrote, in whatever version."""
    try:
        return _held(path)[0] is not None
    except (ValueError, OSError, SyntaxError):  # SyntaxError: Pillow, for a broken PNG
        return False


def _within(written):
    if len(written) > MOST_TEXT:
        raise ValueError(f"a record of {len(written)} characters; expected at most {MOST_TEXT}")
    return written


def _held(path):
    """Returns (our JSON, A1111's text) of a picture's file, None for what it does not hold; pixels are not decoded."""
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
            held = {name: value for name, value in image.info.items() if isinstance(value, str)}
            exif = image.getexif()
            described, comment = exif.get(DESCRIPTION, ""), exif.get_ifd(EXIF).get(USER_COMMENT)
    except OSError:
        raise
    except Exception as error:  # a damaged file makes Pillow raise anything
        raise ValueError(f"cannot be read ({str(error) or type(error).__name__})") from None
    own = described if isinstance(described, str) and described.startswith('{"class": "Record"') else None
    return held.get(OWN, own), held.get("parameters", _comment(comment))


def _comment(comment):
    """Returns the text of EXIF's UserComment: 8 bytes that name the encoding, then the letters."""
    if not isinstance(comment, bytes) or comment[:8] not in ENCODINGS:
        return None
    letters, encoding = comment[8:], ENCODINGS[comment[:8]]
    if encoding == "utf-16-be" and letters[1::2].count(0) > letters[::2].count(0):
        encoding = "utf-16-le"  # some programs write it in their processor's order
    return letters.decode(encoding, "replace").lstrip("\ufeff").strip("\0") or None
