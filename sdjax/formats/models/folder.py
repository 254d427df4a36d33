"""Whole models: a diffusers folder, a single file, a hub id or a built-in shape in; what diffusers loads out.

sd = load("pocket")                                      # or "folder", "v1-5.ckpt", "owner/name", "random:sd15"
sd = load("folder", "float16", vision="openai/clip-vit-large-patch14")
save(sd, "out")                                          # StableDiffusionPipeline.from_pretrained("out")
save(sd, "out.safetensors", "single-file")               # one checkpoint, as A1111 and ComfyUI have them
"""

import os
import pathlib
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sdjax.diffusion.schedule import Schedule
from sdjax.formats.adapters import e4t
from sdjax.formats.models import lpips, single_file
from sdjax.formats.models import presets as shapes
from sdjax.formats.models import vae as autoencoders
from sdjax.formats.storage import files
from sdjax.formats.storage import parameters as names
from sdjax.methods.clip import CLIP
from sdjax.models.clip import MEAN, STD, ImageConfig, ImageEncoder, TextConfig, TextEncoder
from sdjax.models.critics import LPIPS
from sdjax.models.unet import UNet, UNetConfig
from sdjax.models.vae import AutoencoderKL, VaeConfig
from sdjax.stable_diffusion import TOKENS, Networks, StableDiffusion
from sdjax.text.tokenizer import Tokenizer, byte_vocabulary

POCKET = pathlib.Path(__file__).parents[2] / "pocket"
INDEX = "model_index.json"
WRITTEN_AS = "0.42.1"  # the diffusers version whose config.json files ours are; absent, old defaults would be applied
DTYPES = ("float32", "float16", "bfloat16")
FORMATS = ("diffusers", "single-file")


@dataclass(frozen=True)
class Part:
    """How one part of a model lies in its folder: class in model_index.json, file of weights, config, network."""

    package: str
    class_name: str
    stem: str
    config: type
    network: Callable


PARTS = {
    "unet": Part("diffusers", "UNet2DConditionModel", "diffusion_pytorch_model", UNetConfig, UNet),
    "vae": Part("diffusers", "AutoencoderKL", "diffusion_pytorch_model", VaeConfig, AutoencoderKL),
    "text_encoder": Part("transformers", "CLIPTextModel", "model", TextConfig, TextEncoder),
    "image_encoder": Part("transformers", "CLIPVisionModelWithProjection", "model", ImageConfig, ImageEncoder),
}
REQUIRED = ("unet", "vae", "text_encoder")
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
# LDM-SR has no words: its parts, and where they lie.
SUPER_RESOLUTION = "LDMSuperResolutionPipeline"
WORDLESS = {"unet": ("unet", "UNet2DModel"), "vae": ("vqvae", "VQModel")}
# Pipelines by how many channels the UNet takes for c latent channels (noisy latents, then mask or image).
PIPELINES = {
    "StableDiffusionPipeline": lambda c: c,
    "StableDiffusionInstructPix2PixPipeline": lambda c: 2 * c,
    "StableDiffusionInpaintPipeline": lambda c: 2 * c + 1,
    "StableDiffusionUpscalePipeline": lambda c: c + 3,
}
PROJECTION = "projection"  # in clip/: the text projection and the temperature, where encoders were trained here
LOW_SCHEDULER = "low_res_scheduler"  # of the upscaler: the noise on its small picture
ALSO_READ = ("StableDiffusionImg2ImgPipeline", "StableDiffusionControlNetPipeline")
# Everything that belongs to a model folder; a save replaces these and keeps the rest (README.md, ...).
ENTRIES = (
    INDEX,
    *PARTS,
    "vqvae",
    "tokenizer",
    "scheduler",
    LOW_SCHEDULER,
    "feature_extractor",
    "safety_checker",
    "e4t",
    CLIP,
)


def _patterns(kind, ending="safetensors"):
    """Returns the hub files of a model with weights of one kind ("" or ".fp16"); single-file copies do not travel."""
    small = [INDEX, "config.json", "*/config.json", "*/scheduler_config.json", "tokenizer/*.json", "tokenizer/*.txt"]
    weights = []
    stems = [(f"{name}/", part.stem) for name, part in PARTS.items()]
    for folder, stem in [*stems, ("vqvae/", PARTS["vae"].stem), ("", "model"), ("e4t/", "*"), (f"{CLIP}/", PROJECTION)]:
        name = folder + (stem if ending == "safetensors" else files.PICKLED.get(stem, stem))
        weights += [f"{name}{kind}.{ending}", f"{name}{kind}-?????-of-?????.{ending}"]
        weights += [f"{name}-?????-of-?????{kind}.{ending}", f"{name}.{ending}.index{kind}.json"]
    return [*small, *weights, "e4t/*.json"]


def locate(source, variant=None):
    """Returns the local folder of "pocket", a folder or a hub id (fetched into the hub's cache).

    Raises ValueError naming the source when there is no such model.
    """
    if str(source) == "pocket":
        source = POCKET
    if str(source).startswith("random:"):
        raise ValueError(f"model {str(source)!r}: a built-in shape has no folder; save it first")
    kinds = [f".{variant}"] if variant else ["", ".fp16"]
    patterns = [_patterns(kind, ending) for ending in ("safetensors", "bin") for kind in kinds]
    return files.locate(source, patterns, lambda folder: any(folder.rglob("*.safetensors")))


# ---- loading -----------------------------------------------------------------------------------


def load(
    source, dtype="float32", *, variant=None, vision=None, prediction_type=None, ema=False, tokenizer=None, vae=None
):
    """Returns the StableDiffusion of a diffusers folder, a single-file checkpoint, a hub id "owner/name", "pocket",
    "random:NAME" or "new:NAME".

    dtype: type of the weights and of the networks' computation ("float32", "float16", "bfloat16"); None keeps every
    weight as stored and computes in float32.  variant: "fp16" takes those files of the folder.
    vision: take the image encoder from there (a folder or hub id of a CLIPModel or CLIPVisionModel, a model with an
    image encoder, or "random:vit-l", "random:vit-h").  A file, or two with a comma between, brings LPIPS' weights
    instead, for the training of autoencoders (formats/models/lpips.py).
    Beside the weights at most a few tensors are in memory.
    A folder whose e4t/ keeps a picture comes with E4T's encoder looking at it.
    prediction_type, ema, tokenizer: of a single file only, as single_file.read has them.
    vae: take the autoencoder from there, a file, folder or hub id (vae.put).
    Raises ValueError in one line, naming the file and what in it is missing, unknown or does not fit.
    """
    if dtype not in (*DTYPES, None):
        raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
    kind, _, shape = str(source).partition(":")
    if os.path.isfile(source):
        options = {"prediction_type": prediction_type, "ema": ema, "tokenizer": tokenizer}
        *parts, low = single_file.read(source, dtype, **options)
        sd = assemble(*parts).replace(low_schedule=low)
    elif prediction_type or ema or tokenizer:
        raise ValueError(f"{source}: prediction_type, ema and tokenizer are for single files; this is none")
    elif kind in ("random", "new") and shape:
        sd = _built_in(kind, shape, dtype or "float32")
    else:
        folder = locate(source, variant)
        sd = e4t.attached(_load_folder(folder, dtype, variant), folder)
    if vae is not None:
        sd = autoencoders.put(sd, vae, dtype)
    if vision is not None and lpips.is_file(vision):
        sd = sd.replace(reference={**(sd.reference or {}), LPIPS: lpips.read(vision, dtype)})
    elif vision is not None:
        network, params = _load_vision(vision, dtype, variant)
        parts = {name: getattr(sd.networks, name) for name in REQUIRED}
        # A text projection into the embeddings of another image encoder means nothing.
        others = {name: tree for name, tree in (sd.reference or {}).items() if name != CLIP}
        networks = Networks(**parts, image_encoder=network)
        sd = sd.replace(image_encoder=params, networks=networks, reference=others or None)
    return sd


def assemble(networks, params, schedule, tokenizer):
    """Returns the StableDiffusion of {part: network}, {part: parameters}, a schedule and a tokenizer.

    tokenizer: None for LDM-SR, which has no text encoder either.
    Raises ValueError when the tokenizer has more ids than the text encoder's token table has rows.
    """
    if tokenizer is None:
        return StableDiffusion(
            **params, text_encoder=None, networks=Networks(**networks, text_encoder=None), schedule=schedule
        )
    rows = networks["text_encoder"].config.vocab_size
    if tokenizer.size > rows:
        raise ValueError(f"tokenizer: {tokenizer.size} ids, but the text encoder's vocab_size is {rows}")
    words = {word: jnp.array(ids, jnp.int32) for word, ids in tokenizer.words.items()}
    return StableDiffusion(**params, words=words, networks=Networks(**networks), schedule=schedule, tokenizer=tokenizer)


def _load_folder(folder, dtype, variant):
    index = files.read_json(folder / INDEX)
    wordless = index.get("_class_name") == SUPER_RESOLUTION
    present = [name for name in PARTS if name in REQUIRED or index.get(name, [None, None])[1]]
    places = WORDLESS if wordless else {name: (name, PARTS[name].class_name) for name in present}
    _check_index(index, folder / INDEX, places)
    # An offset of 1 where a file tells none is a custom of Stable Diffusion's pipelines.
    read_schedule = (
        (lambda values: Schedule.from_json({"steps_offset": 0, **values})) if wordless else Schedule.from_json
    )
    schedule = _read(folder / "scheduler" / "scheduler_config.json", read_schedule)
    try:
        tokenizer = None if wordless else Tokenizer.load(folder / "tokenizer")
        networks = {name: _network(folder / place, PARTS[name], dtype) for name, (place, _) in places.items()}
        # The small files are read first, so that most mistakes show before gigabytes are read.
        opened = {
            name: files.open_weights(folder / place, PARTS[name].stem, variant) for name, (place, _) in places.items()
        }
        params = {name: names.read(opened[name], networks[name], name, dtype) for name in places}
        sd = assemble(networks, params, schedule, tokenizer)
        if index.get(LOW_SCHEDULER):
            low = _read(folder / LOW_SCHEDULER / "scheduler_config.json", Schedule.from_json)
            sd = sd.replace(low_schedule=low)
        if (folder / CLIP).is_dir() and "image_encoder" in networks:
            sd = sd.replace(reference={CLIP: _projection(folder / CLIP, networks)})
        return sd
    except ValueError as error:
        raise _named(error, folder) from None


def _projection(folder, networks):
    """Returns the text projection and the temperature that CLIP's training left, float32."""
    shape = networks["text_encoder"].config.hidden_size, networks["image_encoder"].config.projection_dim
    kernel, scale = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    like = {"text_projection": {"kernel": kernel}, "logit_scale": scale}
    return names.read_tree(files.open_weights(folder, PROJECTION), like, "float32", sizes="the encoders beside it")


def _check_index(index, path, places):
    pipeline, known = index.get("_class_name"), (*PIPELINES, *ALSO_READ, SUPER_RESOLUTION)
    if pipeline not in known:
        raise ValueError(f"{path}: _class_name={pipeline!r}: expected one of {', '.join(known)}")
    expected = {place: (kind,) for place, kind in places.values()}
    expected |= {} if places is WORDLESS else {"tokenizer": TOKENIZERS}
    for name, accepted in expected.items():
        entry = index.get(name)
        if not isinstance(entry, list) or len(entry) != 2 or entry[1] not in accepted:
            raise ValueError(f"{path}: {name}={entry!r}: expected the class {' or '.join(accepted)}")


def _read(path, make):
    values = files.read_json(path)
    try:
        return make(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]}") from None


def _named(error, folder):
    """Returns the error with the model's folder in it, where it is not there yet."""
    return error if str(folder) in str(error) else ValueError(f"{folder}: {error}")


def _network(folder, part, dtype):
    return part.network(_read(folder / "config.json", part.config.from_json), jnp.dtype(dtype or "float32"))


def _load_vision(source, dtype, variant):
    """Returns (network, parameters) of an image encoder."""
    if str(source).startswith("random:"):
        name = str(source).removeprefix("random:")
        if name not in shapes.TOWERS:
            raise ValueError(f"vision={str(source)!r}: expected one of {_known(shapes.TOWERS)}")
        network = ImageEncoder(ImageConfig(**shapes.TOWERS[name]), jnp.dtype(dtype or "float32"))
        return network, names.random_parameters(network, dtype or "float32")
    folder = locate(source, variant)
    if not (folder / "config.json").is_file() and (folder / "image_encoder").is_dir():
        folder = folder / "image_encoder"
    config = _read(folder / "config.json", _tower)
    network = ImageEncoder(config, jnp.dtype(dtype or "float32"))
    # A CLIPVisionModel has no projection; its embeddings are then zero, its class tokens are all there.
    bare = "CLIPVisionModel" in (files.read_json(folder / "config.json").get("architectures") or ())
    weights = files.open_weights(folder, "model", variant)
    return network, names.read(weights, network, "image_encoder", dtype, ("visual_projection.weight",) if bare else ())


def _tower(values):
    """Returns the ImageConfig of a tower's config.json, or of a CLIPModel's, which holds both towers."""
    if values.get("vision_config") is not None:
        values = {**values["vision_config"], "projection_dim": values.get("projection_dim", 512)}
    return ImageConfig.from_json(values)


def _known(table):
    return ", ".join(f"random:{name}" for name in table)


def _built_in(kind, name, dtype):
    """Returns a built-in shape with "random" weights, none of them zero, or "new" ones, from which training begins."""
    if name not in shapes.SHAPES:
        raise ValueError(f"model '{kind}:{name}': expected one of {_known(shapes.SHAPES)}")
    shape = shapes.SHAPES[name]
    tokenizer = _made(**shape["tokenizer"])
    text = {"vocab_size": tokenizer.size, "bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
    text |= {"pad_token_id": tokenizer.pad}
    configs = {part: PARTS[part].config(**shape[part]) for part in PARTS if part in shape and part != "text_encoder"}
    configs["text_encoder"] = TextConfig(**shape["text_encoder"], **text)
    networks = {part: PARTS[part].network(config, jnp.dtype(dtype)) for part, config in configs.items()}
    make = {"random": names.random_parameters, "new": names.new_parameters}[kind]
    params = {part: make(network, dtype) for part, network in networks.items()}
    return assemble(networks, params, Schedule(**shape["schedule"]), tokenizer)


def _made(size=0, length=77, texts=None, pad="<|endoftext|>", folder=None):
    if folder is not None:
        return Tokenizer.load(POCKET.parent / folder)
    if texts is None:
        return Tokenizer.of(*byte_vocabulary(size), length, pad)
    return Tokenizer.train(texts, size, length)


# ---- saving ------------------------------------------------------------------------------------


def save(sd, destination, format="diffusers", *, dtype=None, shard_size=files.SHARD_SIZE, extras=()):
    """Writes a folder that diffusers' from_pretrained loads bit for bit, whole or not at all; returns its path.

    format: "diffusers", or "single-file" for one checkpoint (single_file.write), without shards and extras.
    dtype: type of the weights in the files; None keeps each as it is.  shard_size: bytes of weights per file.
    extras: functions (sd, folder) that add further folders, such as e4t/, before the new folder takes its place.
    An old model in the destination is replaced; its README.md and other files that are no part of a model stay.
    Raises ValueError when hooks or conditioners hold weights that the files would lack, or the destination holds
    something else.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r}: expected one of {', '.join(FORMATS)}")
    if dtype not in (*DTYPES, None):
        raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
    if sd.hooks or sd.conditioners:
        held = ", ".join(type(item).__name__ for item in (*sd.hooks, *sd.conditioners))
        raise ValueError(f"{destination}: the model computes with {held} beside its weights; merge before saving")
    if format == "single-file":
        return single_file.write(sd, destination, dtype)
    configs = _configs(sd)
    places = {name: WORDLESS[name][0] if sd.text_encoder is None else name for name in configs}
    tensors = {name: names.write(getattr(sd, name), dtype) for name in configs}
    size = sum(tensor.bytes for part in tensors.values() for tensor in part.values())
    index = _index(sd, configs)
    with files.new_folder(destination, INDEX, ENTRIES, size) as folder:
        for name, config in configs.items():
            (folder / places[name]).mkdir()
            files.write_json(folder / places[name] / "config.json", config)
            files.write_weights(folder / places[name], PARTS[name].stem, tensors[name], shard_size)
        if sd.tokenizer is not None:
            (folder / "tokenizer").mkdir()
            sd.tokenizer.save(folder / "tokenizer")
        for name, scheduler in _schedulers(sd, index).items():
            (folder / name).mkdir()
            files.write_json(folder / name / "scheduler_config.json", scheduler)
        if "image_encoder" in configs:
            (folder / "feature_extractor").mkdir()
            processor = _processor(sd.networks.image_encoder.config.image_size)
            files.write_json(folder / "feature_extractor" / "preprocessor_config.json", processor)
            if CLIP in (sd.reference or {}):
                (folder / CLIP).mkdir()
                files.write_weights(folder / CLIP, PROJECTION, names.write(sd.reference[CLIP], dtype))
        for add in extras:
            add(sd, folder)
        files.write_json(folder / INDEX, index)
    return pathlib.Path(os.path.realpath(destination))


def _configs(sd):
    """Returns {part: content of its config.json} of the parts that sd has."""
    configs = {}
    for name, part in PARTS.items():
        network = getattr(sd.networks, name)
        if network is not None:
            configs[name] = network.config.to_json()
            if part.package == "diffusers":
                configs[name] = {"_class_name": part.class_name, **configs[name], "_diffusers_version": WRITTEN_AS}
    if "text_encoder" in configs:  # words may have been added since the config was read
        configs["text_encoder"]["vocab_size"] = len(names.trees.flatten(sd.text_encoder)[TOKENS])
    return configs


def _index(sd, configs):
    """Returns the content of model_index.json; the pipeline's class follows from the UNet's input channels."""
    scheduler = {"scheduler": ["diffusers", sd.schedule.to_json()["_class_name"]]}
    if sd.text_encoder is None:
        head = {"_class_name": SUPER_RESOLUTION, "_diffusers_version": WRITTEN_AS}
        return {**head, **{place: ["diffusers", kind] for place, kind in WORDLESS.values()}, **scheduler}
    entering, latent = sd.networks.unet.config.in_channels, sd.networks.vae.config.latent_channels
    fitting = [name for name, channels in PIPELINES.items() if channels(latent) == entering]
    if not fitting:
        raise ValueError(
            f"unet in_channels={entering}: no pipeline of diffusers takes that with {latent} latent channels"
        )
    index = {"_class_name": fitting[0], "_diffusers_version": WRITTEN_AS, "requires_safety_checker": False}
    index |= dict.fromkeys(("safety_checker", "image_encoder", "feature_extractor"), [None, None])
    index |= {name: [PARTS[name].package, PARTS[name].class_name] for name in configs}
    index |= {"tokenizer": ["transformers", TOKENIZERS[0]]}
    index |= scheduler
    if index["_class_name"] == "StableDiffusionUpscalePipeline":
        index[LOW_SCHEDULER] = ["diffusers", "DDPMScheduler"]
    if "image_encoder" in configs:
        index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    return index


def _schedulers(sd, index):
    """Returns {folder: content of its scheduler_config.json}."""
    version = {"_diffusers_version": WRITTEN_AS}
    made = {"scheduler": {**sd.schedule.to_json(), **version}}
    if LOW_SCHEDULER in index:
        low = {**(sd.low_schedule or sd.schedule).to_json(), **version, "_class_name": index[LOW_SCHEDULER][1]}
        made[LOW_SCHEDULER] = {name: value for name, value in low.items() if name != "set_alpha_to_one"}  # DDIM's own
    return made


def _processor(size):
    """Returns the preprocessor_config.json of CLIP's way to prepare pictures for an encoder of `size` pixels."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": size, "width": size},
        "size": {"shortest_edge": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "resample": 3,
        "rescale_factor": 1 / 255,
    }
