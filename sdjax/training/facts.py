"""Facts about a run for the header of its export, see formats/adapters/about.py.

run.export(method, frozen, weights, out / "export", **told(settings, out, 400, frozen, weights))

The facts contain no times unless dates=True asks for them, so that the same run writes the same bytes.
Source: sd-scripts' train_network.py for the names of its ss_* and for what each means.
"""

import collections
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from sdjax import trees
from sdjax.data import batches, sources
from sdjax.diffusion.training_noise import LEVELS
from sdjax.formats.adapters.about import Facts, frequencies
from sdjax.formats.storage import hashes
from sdjax.formats.storage.files import HUB_ID
from sdjax.methods.chain import Chain
from sdjax.methods.lora import Lora
from sdjax.stable_diffusion import StableDiffusion
from sdjax.training import schedules
from sdjax.training.optim import factor_of

LOOKED_THROUGH = 1000  # most captions whose tags are counted


def told(
    settings: Any, out: str | Path, step: int, sd: StableDiffusion | None = None, trained: Any = None
) -> dict[str, Any]:
    """Returns run.export's arguments facts, public, picture, form and dtype for a run in the folder `out`, at a step.

    settings: Train.  picture: the newest preview; None for a public run, since previews show prompts.
    sd: the model, for the sizes of pictures.  trained: the trained tree, for the rates of its parts.
    """
    previews = sorted((Path(out) / "samples").glob("[0-9]*.png"))
    return {
        "facts": of(settings, Path(out).resolve().name, step, sd, trained),
        "public": settings.public,
        "picture": previews[-1] if previews and not settings.public else None,
        "form": settings.save_model_as,
        "dtype": settings.save_precision,
    }


def of(settings: Any, title: str, step: int, sd: StableDiffusion | None = None, trained: Any = None) -> Facts:
    """Returns the Facts of a run's settings, and of its pictures if they still exist; see told."""
    data, model, method = settings.data, settings.model, settings.method
    words = tuple(method.words) or tuple(filter(None, (data.word,))) or settings.class_data.identifiers
    unwanted = tuple(method.unwanted)
    seen, counted = _pictures(settings, step, sd)
    size = data.size or (batches.side(data, sd) if sd is not None else 0)
    return Facts(
        title=title,
        words=tuple(word for word in words if word not in unwanted),
        unwanted=unwanted,
        base=_name(model),
        base_hash=hashes.sha256(model) if Path(model).is_file() else "",
        size=(size, size) if size else None,
        clip_skip=settings.clip_skip,
        chunks=data.chunks,
        times=settings.times,
        settings={**_training(settings, step), **_rates(settings.optim, trained), **_network(method), **counted},
        author=settings.author,
        license=settings.license,
        description=settings.description,
        condition=data.condition.partition(":")[0],
        ended=time.time() if settings.dates else None,
        **seen,
    )


def _training(settings: Any, step: int) -> dict[str, Any]:
    """Returns sd-scripts' names, without ss_, of the settings of loss, optimizer and pictures."""
    data, optim, classes = settings.data, settings.optim, settings.class_data
    return {
        "learning_rate": optim.lr,
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
        "full_fp16": False,
        "fp8_base": False,
        "seed": settings.seed,
        "min_snr_gamma": settings.min_snr or None,
        "debiased_estimation": settings.debiased,
        "loss_type": "huber" if settings.huber else "l2",
        "huber_schedule": settings.huber_decay if settings.huber else None,
        "huber_c": settings.huber or None,
        "noise_offset": settings.noise_offset or None,
        "multires_noise_iterations": LEVELS if settings.pyramid else None,
        "multires_noise_discount": settings.pyramid or None,
        "ip_noise_gamma": settings.perturbation or None,
        "prior_loss_weight": classes.weight if classes.path else None,
        "caption_dropout_rate": data.dropout,
        "caption_dropout_every_n_epochs": 0,
        "caption_tag_dropout_rate": data.tag_dropout,
        "shuffle_caption": data.shuffle,
        "keep_tokens": data.keep,
        "flip_aug": data.flip > 0,
        "color_aug": False,
        "random_crop": data.crop == "random",
        "cache_latents": bool(data.encode and data.crop == "center"),
        "enable_bucket": data.buckets > 0,
        "bucket_no_upscale": data.buckets > 0,
        "validation_split": data.validation if isinstance(data.validation, float | int) else None,
        "validate_every_n_steps": settings.validate if data.validation else None,
        "validation_seed": settings.seed if data.validation else None,
    }


def _rates(optim: Any, trained: Any) -> dict[str, Any]:
    """Returns the rates of UNet and text encoder, each the commonest of its trained weights; None if none trains.

    Of a list of rates it is the first one.
    """
    if trained is None:
        return {}
    found: dict[str, Any] = {part: collections.Counter() for part in ("unet", "text_encoder")}
    lr = schedules.listed(optim.lr).rates[0] if isinstance(optim.lr, str) else optim.lr
    for name in trees.flatten(trained):
        part = next((word for word in name.split(".") if not word.isdecimal()), "")  # a Chain numbers its parts
        if part in found:
            found[part][lr * factor_of(optim, name)] += 1
    common = {part: rates.most_common(1)[0][0] if rates else None for part, rates in found.items()}
    return {"unet_lr": common["unet"], "text_encoder_lr": common["text_encoder"]}


def _network(method: Any) -> dict[str, Any]:
    """Returns the settings of a run's LoRA under sd-scripts' names, {} without one."""
    parts = method.parts if isinstance(method, Chain) else (method,)
    lora = next((part for part in parts if isinstance(part, Lora)), None)
    if lora is None:
        return {}
    more = {
        "conv_dim": lora.convolutions,
        "rank_dropout": lora.rank_dropout,
        "module_dropout": lora.module_dropout,
    }
    args = {name: str(value) for name, value in more.items() if value}
    return {
        "network_dropout": lora.dropout or None,
        "scale_weight_norms": lora.max_norm or None,
        **({"network_args": args} if args else {}),
    }


def _name(model):
    """Returns a model's name: the file name without its folder, or the hub id."""
    place = Path(model)
    if place.is_file():
        return place.stem
    return place.resolve().name if place.exists() or not (":" in model or HUB_ID.fullmatch(model)) else model


def _opened(data):
    """Returns (the pictures of these settings, their folder's name), (None, "") without any."""
    try:
        return (sources.open(data), Path(data.path).resolve().name) if data.path else (None, "")
    except (ValueError, OSError):
        return None, ""


def _pictures(settings, step, sd):
    """Returns (the fields of Facts for pictures and captions, sd-scripts' names of their counts); both {} without."""
    data, classes = settings.data, settings.class_data
    examples, name = _opened(data)
    if examples is None:
        return {}, {}
    others, other = _opened(classes.data(data)) if classes.path else (None, "")
    captions = (examples.caption(i, np.random.default_rng(i)) for i in range(min(len(examples), LOOKED_THROUGH)))
    whole, rows = len(examples.epoch()), data.batch - (classes.rows_of(data.batch) if others is not None else 0)
    fields = {
        "pictures": len(examples),
        "captions": {name: frequencies(captions)},
        "folders": {name: _repeats(examples)},
        "class_folders": {} if others is None else {other: _repeats(others)},
    }
    counted = {
        "num_reg_images": 0 if others is None else len(others),
        "num_batches_per_epoch": math.ceil(whole / rows),
        "num_epochs": math.ceil(settings.steps * rows / whole),
        "epoch": math.ceil(step * rows / whole),
    }
    return fields, {**counted, **(_buckets(data, sd, examples) if data.buckets and sd is not None else {})}


def _repeats(examples):
    """Returns (repeats per epoch, number of pictures)."""
    return max(1, round(len(examples.epoch()) / len(examples))), len(examples)


def _buckets(data, sd, examples):
    """Returns the buckets that the pictures have, as (width, height), and the extremes of their sides."""
    shapes = batches.sizes(data, sd, examples)
    sides = [side for shape in shapes for side in shape]
    listed = {str(i): {"resolution": [w, h], "count": count} for i, ((h, w), count) in enumerate(shapes.items())}
    return {
        "bucket_info": {"buckets": listed},
        "min_bucket_reso": min(sides),
        "max_bucket_reso": max(sides),
    }
