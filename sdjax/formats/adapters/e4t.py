"""The e4t/ folder of a model: E4T's encoder and offsets, beside the parts and unknown to model_index.json.

    config.json             the method's settings and which files there are
    encoder.safetensors     head.*, and vision.* where the tower was trained
    offsets.safetensors     one generator per attention weight
    reference.safetensors   the pretrained UNet's down half and the empty prompt, where those beside it are others
    concept.png             the image that the word stands for, where there is one

The parts beside it hold no offsets, so other programs load the base model.
"""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
from PIL import Image

from sdjax import trees
from sdjax.formats.storage import files, parameters
from sdjax.images import reading
from sdjax.methods import offsets
from sdjax.methods.e4t import E4T, empty, half, look
from sdjax.stable_diffusion import to_pictures, to_pixels

FIELDS = tuple(field.name for field in dataclasses.fields(E4T))
REFERENCE = ("unet", "empty")


def write(part, tree, frozen, sd, folder):
    """Writes the folder of an E4T method: its trained tree, and the reference where it is not that of `sd`."""
    folder.mkdir()
    encoder = {name: tree[name] for name in ("head", "vision") if name in tree}
    files.write_weights(folder, "encoder", parameters.write(encoder))
    files.write_weights(
        folder, "offsets", parameters.write(offsets.by_name(parameters.template(frozen.networks.unet), tree["offsets"]))
    )
    kept = not _is_of(frozen.reference, sd)
    if kept:
        files.write_weights(folder, "reference", parameters.write({name: frozen.reference[name] for name in REFERENCE}))
    if "concept" in frozen.reference:
        Image.fromarray(to_pictures(frozen.reference["concept"])).save(folder / "concept.png")
    files.write_json(folder / "config.json", {**dataclasses.asdict(part), "reference": kept})


def _settings(folder):
    """Returns the method's settings in an e4t/ folder and "reference"; raises ValueError naming what is not there."""
    path = folder / "config.json"
    found = files.read_json(path)
    missing = [name for name in (*FIELDS, "reference") if name not in found]
    if missing:
        raise ValueError(f"{path}: has no {', '.join(missing)}; expected the settings of E4T")
    return found


def _is_of(reference, sd):
    """Returns whether what an encoder reads is sd's own: the same UNet and, by its empty prompt, text encoder."""
    if trees.digest(reference["unet"]) != trees.digest(half(sd)):
        return False
    return trees.digest(reference["empty"]) == trees.digest(empty(sd))


def start(method, trained, frozen, source):
    """Returns (trained, frozen) of an E4T method from the e4t/ folder of a model.

    A trained vision tower becomes the model's image encoder where this method does not train one.
    Raises ValueError when there is no such folder, or its settings are not the method's.
    """
    folder = Path(source) / "e4t"
    config = _settings(folder)
    for name in ("domain", "features", "scale"):
        if config[name] != getattr(method, name):
            raise ValueError(f"method.{name}={getattr(method, name)!r}: {folder} was trained with {config[name]!r}")
    like = {"head": trained["head"]}
    if config["vision"]:
        like["vision"] = frozen.image_encoder
    encoder = parameters.read_tree(files.open_weights(folder, "encoder"), like, "float32")
    unet = parameters.template(frozen.networks.unet)
    like = offsets.by_name(unet, trained["offsets"])
    generators = parameters.read_tree(files.open_weights(folder, "offsets"), like, "float32")
    if config["vision"] and not method.vision:
        frozen = frozen.replace(image_encoder=encoder.pop("vision"))
    if config["reference"]:
        like = {name: frozen.reference[name] for name in REFERENCE}
        read = parameters.read_tree(files.open_weights(folder, "reference"), like, "float32")
        frozen = frozen.replace(reference={**frozen.reference, **read})
    return {**trained, **encoder, "offsets": offsets.by_shape(unet, generators)}, frozen


def personalise(sd, source, picture=None):
    """Returns sd whose word looks at a picture, uint8 [H W 3], through the encoder in the model folder `source`.

    picture: None for the one that was kept with the model.
    Raises ValueError when there is no e4t/ folder, no picture, or sd looks at one already.
    """
    if sd.conditioners:
        raise ValueError(f"{source}: was tuned on one picture and looks at that; give the model it came from")
    folder = Path(source) / "e4t"
    config = _settings(folder)
    method = E4T(**{name: config[name] for name in FIELDS} | {"vision": False})
    trained, frozen = method.split(sd, jax.random.key(0))
    trained, frozen = start(method, trained, frozen, source)
    if picture is None:
        path = folder / "concept.png"
        if not path.is_file():
            raise ValueError(f"{folder}: holds no concept.png; give a picture")
        picture = reading.picture(path)
    return look(method.join(frozen, trained), jnp.asarray(to_pixels(picture)))


def attached(sd, folder):
    """Returns sd with the encoder and the picture of its folder's e4t/, or sd itself where no picture is kept."""
    return personalise(sd, folder) if (Path(folder) / "e4t" / "concept.png").is_file() else sd


def carried(source, dtype=None, reference=True):
    """Returns [a function (sd, folder) that copies the e4t/ of a model folder, weights in `dtype`]; [] without one.

    reference: False leaves the pretrained half out, so that the encoder reads the UNet beside it.
    """
    old = Path(source) / "e4t"

    def add(sd, folder):
        new = folder / "e4t"
        new.mkdir()
        for path in old.iterdir():
            if path.suffix != ".safetensors":
                shutil.copy(path, new / path.name)
                continue
            if path.stem == "reference" and not reference:
                continue
            weights = files.open_weights(old, path.stem)
            tensors = {name: _recast(weights, name, dtype) for name in weights.names}
            files.write_weights(new, path.stem, tensors)
        if not reference:
            files.write_json(new / "config.json", {**files.read_json(old / "config.json"), "reference": False})

    return [add] if old.is_dir() else []


def _recast(weights, name, dtype):
    kind = dtype or {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[weights.dtype(name)]
    return files.Tensor(weights.shape(name), kind, lambda: weights.read(name).astype(jnp.dtype(kind)))
