"""Metadata of model and adapter files: hashes, base model, trigger words, training.

    of("lora", Path("ink.safetensors"))
    # {"hashes": {"sha256": ..., "autov2": ..., "autov3": ...}, "base": "sd1", "words": [["ink", 40]], ...}

The texts are untrusted; sdjax only displays them.
Source: kohya's sd-scripts (ss_*), Stability's modelspec, Civitai's AutoV2 and AutoV3, Civitai Helper's
NAME.civitai.info and A1111's NAME.json beside a file.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from sdjax.formats.adapters import adapter_file
from sdjax.formats.storage import headers
from sdjax.formats.storage.hashes import autov3, sha256
from sdjax.formats.storage.tensor_file import TensorFile
from sdjax.service import provenance

PREVIEWS = (".preview.png", ".png", ".preview.jpg", ".jpg", ".jpeg", ".preview.webp", ".webp")
MOST = 1 << 20  # bytes of a card file
LONGEST = 2000  # characters of one text
WORDS = 50  # trigger words kept
WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}  # width of the text encoder's output
# kohya's metadata shown, and our names for it.
TRAINING = {
    "ss_network_dim": "rank", "ss_network_alpha": "alpha", "ss_network_module": "module", "ss_steps": "steps",
    "ss_num_epochs": "epochs", "ss_learning_rate": "rate", "ss_unet_lr": "rate of the UNet",
    "ss_text_encoder_lr": "rate of the text encoder", "ss_optimizer": "optimizer", "ss_lr_scheduler": "schedule",
    "ss_num_train_images": "pictures", "ss_resolution": "size", "ss_clip_skip": "clip skip", "ss_seed": "seed",
    "ss_sd_model_name": "base model", "ss_output_name": "name", "ss_training_comment": "comment",
}  # fmt: skip


def of(kind: str, path: Path) -> dict[str, Any]:
    """Returns {"hashes", "base", "words", "training", "title", "card", "size"} of a file or folder.

    words: [[text, count or 0]].  Reads the whole file for its hashes.  Raises OSError for an unreadable file.
    """
    metadata, names = _header(path)
    card = _card(path)
    return {
        "hashes": hashes(path),
        "base": _base(metadata, path, names) or card.pop("base", ""),
        "words": _words(metadata) or [[word, 0] for word in card.pop("words", [])],
        "training": {word: _text(metadata[name]) for name, word in TRAINING.items() if metadata.get(name)},
        "title": _text(metadata.get("modelspec.title", "")),
        "card": card,
        "size": path.stat().st_size if path.is_file() else sum(one.stat().st_size for one in path.rglob("*")),
    }


def hashes(path: Path) -> dict[str, str]:
    """Returns {"sha256", "autov2", "autov3"} of a file; {"autov2"} of a folder, by a rule of ours."""
    if path.is_dir():
        return {"autov2": provenance.model_hash(path)}
    whole = sha256(path)
    return {"sha256": whole, "autov2": whole[:10], "autov3": autov3(path)}


def preview(path: Path) -> Path | None:
    """Returns the preview picture in a model's folder, or the one that another tool left beside a file, or None."""
    stem = path.with_suffix("") if path.is_file() else path
    if (own := path / headers.PREVIEW).is_file():
        return own
    return next((found for end in PREVIEWS if (found := stem.parent / f"{stem.name}{end}").is_file()), None)


def whole_kind(names: Collection[str]) -> str | None:
    """Returns the kind of a single file with these tensor names: "model", "vae" or "controlnet", else None."""
    if any("input_hint_block." in name or "controlnet_cond_embedding." in name for name in names):
        return "controlnet"
    if any(name.startswith("model.diffusion_model.") for name in names):
        return "model"
    if any(name.removeprefix("first_stage_model.").startswith("decoder.conv_in.") for name in names):
        return "vae"
    return None


def _header(path: Path) -> tuple[dict[str, str], Collection[str]]:
    try:
        held = adapter_file.of(path)
        metadata = headers.described(path) if path.is_dir() else held.metadata
    except (ValueError, OSError):
        return {}, ()
    return metadata, held.names or ()


def _base(metadata: dict[str, str], path: Path, names: Collection[str]) -> str:
    """Returns "sd1", "sd2", "sdxl" or "" from metadata, else from the width of cross-attention's keys."""
    said = f"{metadata.get('ss_base_model_version', '')} {metadata.get('modelspec.architecture', '')}".lower()
    for word, base in (("sdxl", "sdxl"), ("xl-v1", "sdxl"), ("sd_v2", "sd2"), ("-v2", "sd2"), ("sd_v1", "sd1")):
        if word in said:
            return base
    reads = [name for name in names if "attn2" in name and "to_k" in name]
    if not reads:
        return ""
    file = TensorFile(path)
    widths = {side for name in reads[:8] for side in file.shape(name)[1:2]}
    return next((base for width, base in WIDTHS.items() if width in widths), "")


def _words(metadata: dict[str, str]) -> list[list[Any]]:
    """Returns [[tag, count]] of kohya's ss_tag_frequency, the commonest first; else modelspec's trigger phrase."""
    counts: dict[str, int] = {}
    for tags in _json(metadata.get("ss_tag_frequency", "")).values():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if isinstance(count, int):
                counts[tag.strip()] = counts.get(tag.strip(), 0) + count
    found: list[list[Any]] = [[_text(tag), n] for tag, n in sorted(counts.items(), key=lambda item: -item[1])[:WORDS]]
    phrase = _text(metadata.get("modelspec.trigger_phrase", ""))
    return found or ([[phrase, 0]] if phrase else [])


def _card(path: Path) -> dict[str, Any]:
    """Returns {"words", "base", "notes", "weight", "description"} from another tool's card beside a file."""
    stem = path.with_suffix("") if path.is_file() else path
    own, theirs = (_json_file(stem.parent / f"{stem.name}{end}") for end in (".json", ".civitai.info"))
    found: dict[str, Any] = {}
    words = theirs.get("trainedWords")
    if isinstance(words, list):
        found["words"] = [_text(word) for word in words[:WORDS] if isinstance(word, str)]
    if isinstance(own.get("activation text"), str) and own["activation text"]:
        found["words"] = [_text(own["activation text"])]
    for name, value in {
        "base": theirs.get("baseModel", own.get("sd version")),
        "notes": own.get("notes"),
        "weight": own.get("preferred weight"),
        "description": theirs.get("description", own.get("description")),
    }.items():
        if isinstance(value, (str, int, float)) and value not in ("", 0):
            found[name] = _text(value) if isinstance(value, str) else value
    return found


def _json_file(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MOST:
            return {}
        return _json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return {}


def _json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    """Returns a text for display: printable characters only, shortened."""
    shown = "".join(letter for letter in str(value) if letter.isprintable() or letter in "\n\t")
    return shown[:LONGEST]
