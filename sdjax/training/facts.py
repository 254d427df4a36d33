"""Facts about a run for the header of its export, see formats/adapters/about.py.

run.export(method, frozen, weights, out / "export", **told(settings, out, step=400))

The facts contain no times, so that the same run writes the same bytes.
"""

from pathlib import Path
from typing import Any

import numpy as np

from sdjax.data import sources
from sdjax.formats.adapters.about import Facts, frequencies
from sdjax.formats.storage import hashes
from sdjax.formats.storage.files import HUB_ID

LOOKED_THROUGH = 1000  # most captions whose tags are counted


def told(settings: Any, out: str | Path, step: int) -> dict[str, Any]:
    """Returns run.export's arguments facts, public and picture for a run in the folder `out`, at a step.

    settings: Train.  picture: the newest preview; None for a public run, since previews show prompts.
    """
    previews = sorted((Path(out) / "samples").glob("[0-9]*.png"))
    return {
        "facts": of(settings, Path(out).resolve().name, step),
        "public": settings.public,
        "picture": previews[-1] if previews and not settings.public else None,
    }


def of(settings: Any, title: str, step: int) -> Facts:
    """Returns the Facts of a run's settings, and of its pictures if they still exist."""
    data, optim, model = settings.data, settings.optim, settings.model
    known = {
        "learning_rate": optim.lr,
        "unet_lr": optim.lr,
        "lr_scheduler": optim.schedule,
        "lr_warmup_steps": optim.warmup,
        "optimizer": f"optax.{optim.kind}",
        "max_grad_norm": optim.clip,
        "gradient_accumulation_steps": optim.accumulate,
        "gradient_checkpointing": bool(settings.remat),
        "max_train_steps": settings.steps,
        "steps": step,
        "total_batch_size": data.batch,
        "mixed_precision": "bf16" if settings.compute == "bfloat16" else "no",
        "seed": settings.seed,
        "min_snr_gamma": settings.min_snr or None,
        "noise_offset": settings.noise_offset or None,
        "caption_dropout_rate": data.dropout,
        "flip_aug": data.flip > 0,
        "random_crop": data.crop == "random",
    }
    words = tuple(settings.method.words) or tuple(filter(None, (data.word,)))
    return Facts(
        title=title,
        words=words,
        base=_name(model),
        base_hash=hashes.sha256(model) if Path(model).is_file() else "",
        size=(data.size, data.size) if data.size else None,
        settings=known,
        **_pictures(data),
    )


def _name(model):
    """Returns a model's name: the file name without its folder, or the hub id."""
    place = Path(model)
    if place.is_file():
        return place.stem
    return place.resolve().name if place.exists() or not (":" in model or HUB_ID.fullmatch(model)) else model


def _pictures(data):
    """Returns the fields of Facts for pictures and captions, {} without pictures."""
    try:
        examples = sources.open(data) if data.path else None
    except (ValueError, OSError):
        return {}
    if examples is None:
        return {}
    count, name = len(examples), Path(data.path).resolve().name
    captions = (examples.caption(i, np.random.default_rng(i)) for i in range(min(count, LOOKED_THROUGH)))
    return {
        "pictures": count,
        "captions": {name: frequencies(captions)},
        "folders": {name: (max(1, round(len(examples.epoch()) / count)), count)},
    }
