"""A model as a diffusers folder: a sub-folder per part, described by model_index.json.

sd = read(Path("folder"), "float16")
write(sd, "out")                        # StableDiffusionPipeline.from_pretrained("out")
"""

import os
import pathlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax.typing import DTypeLike

from sdjax import families
from sdjax.diffusion.noise_schedule import Schedule
from sdjax.families.family import Family, Part
from sdjax.formats.storage import files, headers, parameters
from sdjax.models.clip import MEAN, STD
from sdjax.runtime.guard import named
from sdjax.stable_diffusion import StableDiffusion
from sdjax.text.tokenizer import Tokenizer
from sdjax.trees import Tree

T = TypeVar("T")  # a config

INDEX = "model_index.json"
WRITTEN_AS = "0.42.1"  # diffusers version of our config.json files; without it, diffusers applies old defaults
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
CLIP = "clip"  # folder of the results of contrastive training
PROJECTION = "projection"  # its file with the text projection and the temperature
CLIP_TOKENIZER = ("vocab.json", "merges.txt", "tokenizer*.json", "special_tokens_map.json")  # beside a CLIPModel
LOW_SCHEDULER = "low_res_scheduler"  # the noise schedule of an upscaler's small picture
# A save replaces these entries and the parts' folders, and keeps all others (README.md, ...).
ENTRIES = (INDEX, "scheduler", LOW_SCHEDULER, "feature_extractor", "safety_checker", "e4t", CLIP, headers.NAME)


def _places() -> dict[str, str]:
    """Returns {sub-folder of a part: stem of its weights} for all families."""
    every = (item for family in families.known().values() for item in family.parts.items())
    return {part.place or name: part.stem for name, part in every}


def _tokenizers() -> list[str]:
    """Returns the sub-folders of tokenizers in all families."""
    return list(dict.fromkeys(place for family in families.known().values() for place in family.tokenizers.values()))


def patterns(kind: str, ending: str = "safetensors") -> list[str]:
    """Returns patterns of a model's hub files with one kind of weights ("" or ".fp16"), without single-file copies."""
    small = [INDEX, headers.NAME, "config.json", "*/config.json", "*/scheduler_config.json"]
    small += [f"{place}/{name}" for place in _tokenizers() for name in ("*.json", "*.txt")]
    small += CLIP_TOKENIZER
    weights = []
    stems = [(f"{place}/", stem) for place, stem in _places().items()]
    for folder, stem in [*stems, ("", "model"), ("e4t/", "*"), (f"{CLIP}/", PROJECTION)]:
        name = folder + (stem if ending == "safetensors" else files.PICKLED.get(stem, stem))
        weights += [f"{name}{kind}.{ending}", f"{name}{kind}-?????-of-?????.{ending}"]
        weights += [f"{name}-?????-of-?????{kind}.{ending}", f"{name}.{ending}.index{kind}.json"]
    return [*small, *weights, "e4t/*.json"]


# ---- reading -----------------------------------------------------------------------------------


def assemble(
    family: Family,
    networks: Mapping[str, Any],
    params: Mapping[str, Any],
    schedule: Schedule,
    tokenizers: Mapping[str, Tokenizer],
) -> StableDiffusion:
    """Returns the model of a family from its networks, parameters, schedule and tokenizers.

    networks, params: by part.  tokenizers: by text encoder.
    Raises ValueError if a tokenizer has more ids than its encoder's token table has rows.
    """
    words: dict[str, Any] = {}
    for encoder, tokenizer in tokenizers.items():
        rows = networks[encoder].config.vocab_size
        if tokenizer.size > rows:
            raise ValueError(f"tokenizer: {tokenizer.size} ids, but the vocab_size of {encoder} is {rows}")
        for word, ids in tokenizer.words.items():
            words.setdefault(word, {})[encoder] = jnp.array(ids, jnp.int32)
    static = {"networks": FrozenDict(networks), "tokenizers": FrozenDict(tokenizers), "family": family}
    return StableDiffusion(dict(params), words=words, schedule=schedule, **static)


def read(folder: pathlib.Path, dtype: DTypeLike | None = None, variant: str | None = None) -> StableDiffusion:
    """Returns the StableDiffusion of a diffusers folder, without its e4t/; see pipeline.load.

    Raises ValueError in one line, naming the file and the parts that are missing, unknown or do not fit.
    """
    index = files.read_json(folder / INDEX)
    with named(folder / INDEX):
        family = families.of_pipeline(index.get("_class_name"))
        present = {
            name: part
            for name, part in family.parts.items()
            if name in family.required or index.get(part.place or name, [None, None])[1]
        }
        places = {name: part.place or name for name, part in present.items()}
        _check_index(index, folder / INDEX, present, family)
    path = folder / "scheduler" / "scheduler_config.json"
    schedule = read_config(path, lambda values: Schedule.from_json({**family.scheduler, **values}))
    with named(folder):
        tokenizers = {encoder: Tokenizer.load(folder / place) for encoder, place in family.tokenizers.items()}
        networks = {name: _network(folder / places[name], part, dtype) for name, part in present.items()}
        # Small files first, so that most mistakes show before gigabytes are read.
        opened = {name: files.open_weights(folder / places[name], part.stem, variant) for name, part in present.items()}
        params = {name: parameters.read(opened[name], networks[name], name, dtype) for name in present}
        sd = assemble(family, networks, params, schedule, tokenizers)
        if index.get(LOW_SCHEDULER):
            low = read_config(folder / LOW_SCHEDULER / "scheduler_config.json", Schedule.from_json)
            sd = sd.replace(low_schedule=low)
        if (folder / CLIP).is_dir() and "image_encoder" in networks:
            sd = sd.with_reference(clip=_projection(folder / CLIP, networks))
        return sd


def _projection(folder: pathlib.Path, networks: Mapping[str, Any]) -> Tree:
    """Returns the text projection and the temperature from contrastive training, float32."""
    shape = networks["text_encoder"].config.hidden_size, networks["image_encoder"].config.projection_dim
    kernel, scale = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    like = {"text_projection": {"kernel": kernel}, "logit_scale": scale}
    return parameters.read_tree(files.open_weights(folder, PROJECTION), like, "float32", sizes="the encoders beside it")


def _check_index(index: Mapping[str, Any], path: pathlib.Path, parts: Mapping[str, Part], family: Family) -> None:
    """Raises ValueError if the index names another class than the family's for a part or a tokenizer."""
    expected = {part.place or name: (part.class_name,) for name, part in parts.items()}
    expected |= dict.fromkeys(family.tokenizers.values(), TOKENIZERS)
    for name, accepted in expected.items():
        entry = index.get(name)
        if not isinstance(entry, list) or len(entry) != 2 or entry[1] not in accepted:
            raise ValueError(f"{path}: {name}={entry!r}: expected the class {' or '.join(accepted)}")


def read_config(path: pathlib.Path, make: Callable[[dict[str, Any]], T]) -> T:
    """Returns make(content) of a JSON file; raises ValueError that names the file."""
    values = files.read_json(path)
    with named(path):
        return make(values)


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
    """Writes the folder of a model, completely or not at all; returns its path.  Arguments: see pipeline.save."""
    configs, parts = _configs(sd), sd.family.parts
    places = {name: parts[name].place or name for name in configs}
    tensors = {name: parameters.write(sd.parts[name], dtype) for name in configs}
    size = sum(tensor.bytes for part in tensors.values() for tensor in part.values())
    index = _index(sd, configs)
    entries = (*ENTRIES, *_places(), *_tokenizers())
    with files.new_folder(destination, INDEX, entries, size) as folder:
        for name, config in configs.items():
            (folder / places[name]).mkdir()
            files.write_json(folder / places[name] / "config.json", config)
            files.write_weights(folder / places[name], parts[name].stem, tensors[name], shard_size)
        for encoder, tokenizer in sd.tokenizers.items():
            place = folder / sd.family.tokenizers[encoder]
            place.mkdir()
            tokenizer.save(place)
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
    """Returns {part: content of its config.json} for sd's parts."""
    configs = {}
    for name, part in sd.family.parts.items():
        network = sd.networks.get(name)
        if network is not None:
            configs[name] = network.config.to_json()
            if part.package == "diffusers":
                configs[name] = {"_class_name": part.class_name, **configs[name], "_diffusers_version": WRITTEN_AS}
            else:  # without it, transformers takes the file's type but diffusers float32, which do not fit together
                configs[name]["dtype"] = "float32"
    for encoder in sd.tokenizers:  # the table may have grown with added words
        configs[encoder]["vocab_size"] = len(sd.table(encoder))
    return configs


def _index(sd: StableDiffusion, configs: Collection[str]) -> dict[str, Any]:
    """Returns the content of model_index.json."""
    family = sd.family
    index = {"_class_name": family.pipeline(sd), "_diffusers_version": WRITTEN_AS, **family.beside}
    for name in configs:
        part = family.parts[name]
        index[part.place or name] = [part.package, part.class_name]
    index |= {place: ["transformers", TOKENIZERS[0]] for place in family.tokenizers.values()}
    index |= {"scheduler": ["diffusers", sd.schedule.to_json()["_class_name"]]}
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
    """Returns the content of preprocessor_config.json, CLIP's preprocessing for an encoder of `size` pixels."""
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
