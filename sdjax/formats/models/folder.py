"""A model as a diffusers folder: a sub-folder for each part, and model_index.json, which says what they are.

sd = read(Path("folder"), "float16")
write(sd, "out")                        # StableDiffusionPipeline.from_pretrained("out")
"""

import os
import pathlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax.typing import DTypeLike

from sdjax.diffusion.schedule import Schedule
from sdjax.formats.storage import files, parameters
from sdjax.models.clip import MEAN, STD, ImageConfig, ImageEncoder, TextConfig, TextEncoder
from sdjax.models.unet import UNet, UNetConfig
from sdjax.models.vae import AutoencoderKL, VaeConfig
from sdjax.stable_diffusion import TOKENS, StableDiffusion
from sdjax.text.tokenizer import Tokenizer
from sdjax.trees import Tree

T = TypeVar("T")  # a config

INDEX = "model_index.json"
WRITTEN_AS = "0.42.1"  # the diffusers version whose config.json files ours are; absent, old defaults would be applied


@dataclass(frozen=True)
class Part:
    """How one part of a model lies in its folder: class in model_index.json, file of weights, config, network."""

    package: str
    class_name: str
    stem: str
    config: Any  # its class
    network: Callable[..., Any]


PARTS = {
    "unet": Part("diffusers", "UNet2DConditionModel", "diffusion_pytorch_model", UNetConfig, UNet),
    "vae": Part("diffusers", "AutoencoderKL", "diffusion_pytorch_model", VaeConfig, AutoencoderKL),
    "text_encoder": Part("transformers", "CLIPTextModel", "model", TextConfig, TextEncoder),
    "image_encoder": Part("transformers", "CLIPVisionModelWithProjection", "model", ImageConfig, ImageEncoder),
}
REQUIRED = ("unet", "vae", "text_encoder")
ENCODER = "text_encoder"
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
# LDM-SR has no words: its parts, and where they lie.
LDM_SR = "LDMSuperResolutionPipeline"
WORDLESS = {"unet": ("unet", "UNet2DModel"), "vae": ("vqvae", "VQModel")}
# Pipelines by how many channels the UNet takes for c latent channels (noisy latents, then mask or image).
PIPELINES = {
    "StableDiffusionPipeline": lambda c: c,
    "StableDiffusionInstructPix2PixPipeline": lambda c: 2 * c,
    "StableDiffusionInpaintPipeline": lambda c: 2 * c + 1,
    "StableDiffusionUpscalePipeline": lambda c: c + 3,
}
CLIP = "clip"  # the folder of what contrastive training leaves
PROJECTION = "projection"  # in it: the text projection and the temperature
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


def patterns(kind: str, ending: str = "safetensors") -> list[str]:
    """Returns the hub files of a model with weights of one kind ("" or ".fp16"); single-file copies do not travel."""
    small = [INDEX, "config.json", "*/config.json", "*/scheduler_config.json", "tokenizer/*.json", "tokenizer/*.txt"]
    weights = []
    stems = [(f"{name}/", part.stem) for name, part in PARTS.items()]
    for folder, stem in [*stems, ("vqvae/", PARTS["vae"].stem), ("", "model"), ("e4t/", "*"), (f"{CLIP}/", PROJECTION)]:
        name = folder + (stem if ending == "safetensors" else files.PICKLED.get(stem, stem))
        weights += [f"{name}{kind}.{ending}", f"{name}{kind}-?????-of-?????.{ending}"]
        weights += [f"{name}-?????-of-?????{kind}.{ending}", f"{name}.{ending}.index{kind}.json"]
    return [*small, *weights, "e4t/*.json"]


# ---- reading -----------------------------------------------------------------------------------


def assemble(
    networks: Mapping[str, Any], params: Mapping[str, Any], schedule: Schedule, tokenizers: Mapping[str, Tokenizer]
) -> StableDiffusion:
    """Returns the StableDiffusion of {part: network}, {part: parameters}, a schedule and {text encoder: tokenizer}.

    tokenizers: {} for LDM-SR, which has no text encoder either.
    Raises ValueError when a tokenizer has more ids than its encoder's token table has rows.
    """
    words: dict[str, Any] = {}
    for encoder, tokenizer in tokenizers.items():
        rows = networks[encoder].config.vocab_size
        if tokenizer.size > rows:
            raise ValueError(f"tokenizer: {tokenizer.size} ids, but the vocab_size of {encoder} is {rows}")
        for word, ids in tokenizer.words.items():
            words.setdefault(word, {})[encoder] = jnp.array(ids, jnp.int32)
    static = {"networks": FrozenDict(networks), "tokenizers": FrozenDict(tokenizers)}
    return StableDiffusion(dict(params), words=words, schedule=schedule, **static)


def read(folder: pathlib.Path, dtype: DTypeLike | None = None, variant: str | None = None) -> StableDiffusion:
    """Returns the StableDiffusion of a diffusers folder, without what is kept in its e4t/; see pipeline.load.

    Raises ValueError in one line, naming the file and what in it is missing, unknown or does not fit.
    """
    index = files.read_json(folder / INDEX)
    wordless = index.get("_class_name") == LDM_SR
    present = [name for name in PARTS if name in REQUIRED or index.get(name, [None, None])[1]]
    places = WORDLESS if wordless else {name: (name, PARTS[name].class_name) for name in present}
    _check_index(index, folder / INDEX, places)
    # An offset of 1 where a file tells none is a custom of Stable Diffusion's pipelines.
    read_schedule = (
        (lambda values: Schedule.from_json({"steps_offset": 0, **values})) if wordless else Schedule.from_json
    )
    schedule = read_config(folder / "scheduler" / "scheduler_config.json", read_schedule)
    try:
        tokenizers = {} if wordless else {ENCODER: Tokenizer.load(folder / "tokenizer")}
        networks = {name: _network(folder / place, PARTS[name], dtype) for name, (place, _) in places.items()}
        # The small files are read first, so that most mistakes show before gigabytes are read.
        opened = {
            name: files.open_weights(folder / place, PARTS[name].stem, variant) for name, (place, _) in places.items()
        }
        params = {name: parameters.read(opened[name], networks[name], name, dtype) for name in places}
        sd = assemble(networks, params, schedule, tokenizers)
        if index.get(LOW_SCHEDULER):
            low = read_config(folder / LOW_SCHEDULER / "scheduler_config.json", Schedule.from_json)
            sd = sd.replace(low_schedule=low)
        if (folder / CLIP).is_dir() and "image_encoder" in networks:
            sd = sd.with_reference(clip=_projection(folder / CLIP, networks))
        return sd
    except ValueError as error:
        raise _named(error, folder) from None


def _projection(folder: pathlib.Path, networks: Mapping[str, Any]) -> Tree:
    """Returns the text projection and the temperature that CLIP's training left, float32."""
    shape = networks["text_encoder"].config.hidden_size, networks["image_encoder"].config.projection_dim
    kernel, scale = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    like = {"text_projection": {"kernel": kernel}, "logit_scale": scale}
    return parameters.read_tree(files.open_weights(folder, PROJECTION), like, "float32", sizes="the encoders beside it")


def _check_index(index: Mapping[str, Any], path: pathlib.Path, places: Mapping[str, tuple[str, str]]) -> None:
    pipeline, known = index.get("_class_name"), (*PIPELINES, *ALSO_READ, LDM_SR)
    if pipeline not in known:
        raise ValueError(f"{path}: _class_name={pipeline!r}: expected one of {', '.join(known)}")
    expected = {place: (kind,) for place, kind in places.values()}
    expected |= {} if places is WORDLESS else {"tokenizer": TOKENIZERS}
    for name, accepted in expected.items():
        entry = index.get(name)
        if not isinstance(entry, list) or len(entry) != 2 or entry[1] not in accepted:
            raise ValueError(f"{path}: {name}={entry!r}: expected the class {' or '.join(accepted)}")


def read_config(path: pathlib.Path, make: Callable[[dict[str, Any]], T]) -> T:
    """Returns make(content) of a JSON file; raises ValueError that names the file."""
    values = files.read_json(path)
    try:
        return make(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]}") from None


def _named(error: ValueError, folder: pathlib.Path) -> ValueError:
    """Returns the error with the model's folder in it, where it is not there yet."""
    return error if str(folder) in str(error) else ValueError(f"{folder}: {error}")


def _network(folder: pathlib.Path, part: Part, dtype: DTypeLike | None) -> Any:
    return part.network(read_config(folder / "config.json", part.config.from_json), jnp.dtype(dtype or "float32"))


# ---- writing -----------------------------------------------------------------------------------


def write(
    sd: StableDiffusion,
    destination: str | pathlib.Path,
    dtype: DTypeLike | None = None,
    shard_size: int = files.SHARD_SIZE,
    extras: Iterable[Callable[[StableDiffusion, pathlib.Path], object]] = (),
) -> pathlib.Path:
    """Writes the folder of a model, whole or not at all; returns its path.  Arguments: as of pipeline.save."""
    configs = _configs(sd)
    places = {name: WORDLESS[name][0] if "text_encoder" not in sd.parts else name for name in configs}
    tensors = {name: parameters.write(sd.parts[name], dtype) for name in configs}
    size = sum(tensor.bytes for part in tensors.values() for tensor in part.values())
    index = _index(sd, configs)
    with files.new_folder(destination, INDEX, ENTRIES, size) as folder:
        for name, config in configs.items():
            (folder / places[name]).mkdir()
            files.write_json(folder / places[name] / "config.json", config)
            files.write_weights(folder / places[name], PARTS[name].stem, tensors[name], shard_size)
        for tokenizer in sd.tokenizers.values():
            (folder / "tokenizer").mkdir()
            tokenizer.save(folder / "tokenizer")
        for name, scheduler in _schedulers(sd, index).items():
            (folder / name).mkdir()
            files.write_json(folder / name / "scheduler_config.json", scheduler)
        if "image_encoder" in configs:
            (folder / "feature_extractor").mkdir()
            processor = _processor(sd.networks["image_encoder"].config.image_size)
            files.write_json(folder / "feature_extractor" / "preprocessor_config.json", processor)
            if sd.reference.clip is not None:
                (folder / CLIP).mkdir()
                files.write_weights(folder / CLIP, PROJECTION, parameters.write(sd.reference.clip, dtype))
        for add in extras:
            add(sd, folder)
        files.write_json(folder / INDEX, index)
    return pathlib.Path(os.path.realpath(destination))


def _configs(sd: StableDiffusion) -> dict[str, dict[str, Any]]:
    """Returns {part: content of its config.json} of the parts that sd has."""
    configs = {}
    for name, part in PARTS.items():
        network = sd.networks.get(name)
        if network is not None:
            configs[name] = network.config.to_json()
            if part.package == "diffusers":
                configs[name] = {"_class_name": part.class_name, **configs[name], "_diffusers_version": WRITTEN_AS}
            else:  # transformers takes the type of the file without it, diffusers float32: halves that do not fit
                configs[name]["dtype"] = "float32"
    if "text_encoder" in configs:  # words may have been added since the config was read
        configs["text_encoder"]["vocab_size"] = len(parameters.trees.flatten(sd.parts["text_encoder"])[TOKENS])
    return configs


def _index(sd: StableDiffusion, configs: Collection[str]) -> dict[str, Any]:
    """Returns the content of model_index.json; the pipeline's class follows from the UNet's input channels."""
    scheduler = {"scheduler": ["diffusers", sd.schedule.to_json()["_class_name"]]}
    if "text_encoder" not in sd.parts:
        head = {"_class_name": LDM_SR, "_diffusers_version": WRITTEN_AS}
        return {**head, **{place: ["diffusers", kind] for place, kind in WORDLESS.values()}, **scheduler}
    entering, latent = sd.networks["unet"].config.in_channels, sd.networks["vae"].config.latent_channels
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


def _schedulers(sd: StableDiffusion, index: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns {folder: content of its scheduler_config.json}."""
    version = {"_diffusers_version": WRITTEN_AS}
    made = {"scheduler": {**sd.schedule.to_json(), **version}}
    if LOW_SCHEDULER in index:
        low = {**(sd.low_schedule or sd.schedule).to_json(), **version, "_class_name": index[LOW_SCHEDULER][1]}
        made[LOW_SCHEDULER] = {name: value for name, value in low.items() if name != "set_alpha_to_one"}  # DDIM's own
    return made


def _processor(size: int) -> dict[str, Any]:
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
