"""Metadata of adapter files: kohya's ss_* and the modelspec.* names in the header, and A1111's card next to the file.

    told = metadata(adapter, Facts(title="cat", base="v1-5", words=("<cat>",), steps=400, captions={...}), sd)
    path = kind.write(adapter, folder, told)
    seal(path)                                    # the hash of the tensors, in their own header
    card(path, told, picture)                     # NAME.json and NAME.preview.png, for A1111's cards

Metadata never contain a path or the name of a user or machine.  A public file also reveals nothing about the pictures:
no captions, no names of folders or files, no title of the base model.
Sources: kohya's sd-scripts (names of ss_*), Stability AI's ModelSpec 1.0.1, A1111's extra networks (the card).
"""

import collections
import datetime
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdjax import __version__
from sdjax.diffusion.noise_schedule import bounds
from sdjax.formats.storage import files, headers
from sdjax.formats.storage.hashes import autov2
from sdjax.methods.adapter import Adapter
from sdjax.stable_diffusion import StableDiffusion

OUTPUT, TRIGGER, DATE = "ss_output_name", "modelspec.trigger_phrase", "modelspec.date"
# What a shared file leaves out: pictures, folders, sessions, times, base models; names of sd-scripts' train_network.py.
PRIVATE = (
    "ss_tag_frequency", "ss_dataset_dirs", "ss_reg_dataset_dirs", "ss_datasets", "ss_bucket_info", "ss_session_id",
    "ss_training_comment", "ss_training_started_at", "ss_training_finished_at", "ss_sd_model_name",
    "ss_sd_model_hash", "ss_new_sd_model_hash", "ss_vae_name", "ss_vae_hash", "ss_new_vae_hash", DATE, OUTPUT,
)  # fmt: skip
MERGED = "modelspec.merged_from"
HINT, NEGATIVE = "modelspec.usage_hint", "in the negative prompt: "
MOST_TAGS = 1000  # most tags that are written, since captions in sentences give a new tag for every picture
# ModelSpec's names of adapters, by what these hold.
KINDS = {"edits": "lora", "hook": "hypernetwork", "words": "textual-inversion", "controlnet": "controlnet"}
A1111 = {"ss_steps": "step", "ss_sd_model_hash": "sd_checkpoint", "ss_sd_model_name": "sd_checkpoint_name"}
CARD_VERSIONS = {"stable-diffusion-v1": "SD1", "stable-diffusion-v2": "SD2", "stable-diffusion-xl": "SDXL"}


@dataclass(frozen=True)
class Facts:
    """Facts about a run for the metadata; fields at their defaults are left out.

    title: the file's name.  words: its words in prompts.  unwanted: words for the negative prompt.
    base: the base model's name, without a folder.  base_hash: the SHA-256 of its file, 64 hex digits.
    size: (height, width) in pixels.  pictures: their number.  captions: {folder's name: {tag: count}}.
    folders: {folder's name: (repeats per epoch, pictures)}.
    class_folders: likewise, of class pictures.
    clip_skip: the layer of the text encoder that the run read, counted from the last one, 1.
    chunks: the number of chunks of tokens that the run read of a caption.
    times: the range of noise levels that the run trained, as shares of the schedule's times.
    settings: other ss_* names without the prefix, plain values: {"learning_rate": 1e-4, "seed": 0}.
    author, license, description: the user's own texts.  condition: what a ControlNet reads.
    began, ended: seconds since 1970.
    """

    title: str = ""
    words: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()
    base: str = ""
    base_hash: str = ""
    size: tuple[int, int] | None = None
    pictures: int = 0
    captions: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    folders: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    class_folders: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    clip_skip: int = 1
    chunks: int = 1
    times: tuple[float, float] = (0.0, 1.0)
    settings: Mapping[str, Any] = field(default_factory=dict)
    author: str = ""
    license: str = ""
    description: str = ""
    condition: str = ""
    began: float | None = None
    ended: float | None = None


def metadata(adapter: Adapter, facts: Facts, sd: StableDiffusion, public: bool = False) -> dict[str, str]:
    """Returns {name: text} for the header of an adapter's file.

    sd: the model that it was trained for.  public: leave out PRIVATE: captions, times, names of folders and of the base
    model.  A format adds its own entries, such as ss_network_dim, when it writes the file.
    """
    shape = architecture(sd)
    told = {
        OUTPUT: facts.title,
        "ss_base_model_version": _version(shape),
        "ss_v2": "v2" in shape,
        "ss_sd_model_name": facts.base,
        "ss_sd_model_hash": facts.base_hash[:10],
        "ss_new_sd_model_hash": facts.base_hash,
        "ss_resolution": str(tuple(reversed(facts.size))) if facts.size else "",  # "(width, height)"
        "ss_num_train_images": facts.pictures or "",
        "ss_tag_frequency": facts.captions,
        "ss_dataset_dirs": _folders(facts.folders),
        "ss_reg_dataset_dirs": _folders(facts.class_folders),
        "ss_zero_terminal_snr": sd.schedule.rescale_betas_zero_snr,
        "ss_clip_skip": facts.clip_skip,
        "ss_max_token_length": _tokens(facts.chunks, sd),
        "ss_training_started_at": "" if facts.began is None else facts.began,
        "ss_training_finished_at": "" if facts.ended is None else facts.ended,
        **{f"ss_{name}": value for name, value in facts.settings.items()},
        **_modelspec(adapter, facts, shape, sd),
    }
    left_out = set(PRIVATE) - {OUTPUT} if public else ()  # by OUTPUT the writer calls the file
    return {name: _text(value) for name, value in told.items() if value not in ("", {}, ()) and name not in left_out}


def _folders(counts):
    return {name: {"n_repeats": n, "img_count": m} for name, (n, m) in counts.items()}


def _text(value):
    """Returns a value as kohya's trainers write it: JSON for dicts and lists, otherwise "True", "None", "0.1"."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping | list) else str(value)


def architecture(sd: StableDiffusion) -> str:
    """Returns ModelSpec's name of a model: "stable-diffusion-v1", "stable-diffusion-v2-768-v", ...

    It follows from the UNet's channels, context width and prediction type; other shapes are "stable-diffusion".
    """
    config = sd.networks["unet"].config
    family = {768: "v1", 1024: "v2", 2048: "xl-v1-base"}.get(config.cross_attention_dim)
    if family is None:
        return "stable-diffusion"
    if config.in_channels == 9:
        return f"stable-diffusion-{family}-inpainting"
    if config.in_channels != 4:  # the upscaler, which ModelSpec does not name
        return "stable-diffusion"
    if family != "v2":
        return f"stable-diffusion-{family}"
    return f"stable-diffusion-v2-{'768-v' if sd.schedule.prediction_type == 'v_prediction' else '512'}"


def _tokens(chunks, sd):
    """Returns kohya's max_token_length, without begin and end: 150, 225; None for one chunk."""
    rooms = [tokenizer.length - 2 for tokenizer in sd.tokenizers.values()]
    return chunks * min(rooms) if chunks > 1 and rooms else None


def _version(shape):
    """Returns kohya's name of a base model: sd_v1, sd_v2, sd_v2_v, sdxl_base_v1-0."""
    if "-xl-" in shape:
        return "sdxl_base_v1-0"
    family = next((name for name in ("v1", "v2") if f"-{name}" in shape), "")
    return f"sd_{family}{'_v' * shape.endswith('-v')}" if family else ""


def _modelspec(adapter, facts, shape, sd):
    kind = next((name for part, name in KINDS.items() if {**vars(adapter), **adapter.trees}.get(part)), None)
    wanted = set(adapter.words) - set(facts.unwanted)
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{shape}/{kind}" if kind else shape,
        "modelspec.implementation": "diffusers",
        "modelspec.title": facts.title,
        "modelspec.resolution": "x".join(map(str, reversed(facts.size))) if facts.size else "",
        "modelspec.prediction_type": "v" if sd.schedule.prediction_type == "v_prediction" else "epsilon",
        "modelspec.encoder_layer": facts.clip_skip if facts.clip_skip > 1 else "",
        "modelspec.timestep_range": "" if facts.times == (0, 1) else "{},{}".format(*bounds(sd.schedule, facts.times)),
        DATE: "" if facts.ended is None else _date(facts.ended),
        "modelspec.author": facts.author,
        "modelspec.license": facts.license,
        "modelspec.description": facts.description,
        "modelspec.preprocessor": facts.condition,
        TRIGGER: ", ".join(facts.words),
        HINT: f"{NEGATIVE}{', '.join(facts.unwanted)}" if facts.unwanted else "",
        "modelspec.is_negative_embedding": "true" if kind == KINDS["words"] and not wanted else "",
        "modelspec.implementation_version": f"sdjax {__version__}",
    }


def unwanted(told: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the words for the negative prompt of a file with this metadata."""
    said = told.get(HINT, "")
    return tuple(said.removeprefix(NEGATIVE).split(", ")) if said.startswith(NEGATIVE) else ()


def triggers(paths: Iterable[Path], words: Iterable[str] = ()) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns (trigger words, words for the negative prompt) in the headers of files; words: further trigger words."""
    found, others = dict.fromkeys(words), {}
    for path in paths:
        if path.suffix == ".safetensors":
            told = headers.metadata(path)
            found |= dict.fromkeys(filter(None, (word.strip() for word in told.get(TRIGGER, "").split(","))))
            others |= dict.fromkeys(unwanted(told))
    return tuple(word for word in found if word not in others), tuple(others)


def merged(
    told: Mapping[str, str], names: Iterable[str], words: Iterable[str], others: Iterable[str]
) -> dict[str, str]:
    """Returns a model's metadata after a sum with what has these names; words, others: see triggers."""
    known = filter(None, (told.get(TRIGGER, ""), *words))
    negative = dict.fromkeys((*unwanted(told), *others))
    own = {MERGED: ", ".join(names), TRIGGER: ", ".join(known)}
    own |= {HINT: f"{NEGATIVE}{', '.join(negative)}"} if negative else {}
    return {**told, **{name: text for name, text in own.items() if text}}


def _date(seconds):
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")


def frequencies(captions: Iterable[str]) -> dict[str, int]:
    """Returns {tag: count} of captions with comma-separated tags: the MOST_TAGS commonest, in falling order."""
    found = collections.Counter(
        tag for text in captions for tag in filter(None, (tag.strip() for tag in text.split(",")))
    )
    return dict(found.most_common(MOST_TAGS))


# ---- beside and inside the written file --------------------------------------------------------------


def a1111_keys(told: Mapping[str, str]) -> dict[str, str | int]:
    """Returns the metadata for A1111's pickles under A1111's keys: the steps, the base model's hash and name."""
    return {name: int(told[ours]) if name == "step" else told[ours] for ours, name in A1111.items() if ours in told}


def seal(path: Path) -> None:
    """Writes the hash of a safetensors file's tensors into its header, as sshs_model_hash and modelspec.hash_sha256.

    Its first 12 digits are AutoV3, A1111's and Civitai's identity of the file, which does not depend on the header.
    Other files stay unchanged.
    """
    if path.suffix != ".safetensors" or path.is_dir():
        return
    found = headers.sha256(path)
    own = {"sshs_model_hash": found, "modelspec.hash_sha256": f"0x{found}"}
    headers.tell(path, {**headers.metadata(path), **own})


def card(path: Path, told: Mapping[str, str], picture: Path | None = None) -> list[Path]:
    """Writes NAME.json and NAME.preview.png next to NAME.safetensors; returns the paths of the written files.

    The JSON has the fields of A1111's card: description, sd version, activation text, preferred weight, notes.
    Existing files stay, since they may be a user's work.  A model's folder gets its picture only, as preview.png.
    told: the result of `metadata`.  picture: a PNG to copy as the preview.
    """
    if path.is_dir():
        return [] if picture is None else [_copied(picture, path / headers.PREVIEW)]
    shape = told.get("modelspec.architecture", "")
    version = next((short for name, short in CARD_VERSIONS.items() if shape.startswith(name)), "Unknown")
    hashed = f"AutoV2 {autov2(path)}" if path.is_file() else ""
    values = {
        "description": told.get("modelspec.description") or told.get("modelspec.title", ""),
        "sd version": version,
        "activation text": told.get(TRIGGER, ""),
        "preferred weight": 1.0,
        "negative text": ", ".join(unwanted(told)),
        "notes": ", ".join(filter(None, (hashed, told.get("modelspec.implementation_version", "")))),
    }
    places, written = (path.with_suffix(".json"), path.with_suffix(".preview.png")), []
    if not places[0].exists():
        with files.new_file(places[0]) as temporary:
            files.write_json(temporary, values)
        written.append(places[0])
    if picture is not None and not places[1].exists():
        written.append(_copied(picture, places[1]))
    return written


def _copied(picture, path):
    with files.new_file(path) as temporary:
        shutil.copyfile(picture, temporary)
    return path
