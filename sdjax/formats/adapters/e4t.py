"""The e4t/ folder of a model: E4T's encoder and offsets, next to the model's parts and not in model_index.json.

    config.json             the method's settings, and whether reference.safetensors exists
    encoder.safetensors     head.*, and vision.* if the tower was trained
    offsets.safetensors     one generator per attention weight
    reference.safetensors   the pretrained UNet's down half and the empty prompt, if the model's own differ
    concept.png             the picture of the subject, after tuning

The model's parts do not contain the offsets, so other programs load the base model.
"""

import dataclasses
import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sdjax import trees
from sdjax.formats.adapters.adapter_file import File
from sdjax.formats.adapters.e4t_attached import acting
from sdjax.formats.adapters.format import Format
from sdjax.formats.storage import files, parameters
from sdjax.images import reading
from sdjax.methods import heads, offsets
from sdjax.methods.adapter import Adapter
from sdjax.methods.e4t import E4T, look
from sdjax.methods.method import about
from sdjax.methods.seen import ENCODER, HALF, empty, half, seen_by, with_seen
from sdjax.models.clip import ImageConfig, ImageEncoder
from sdjax.runtime.guard import named
from sdjax.settings import CLASS, SettingError, from_json
from sdjax.stable_diffusion import TOKENS, StableDiffusion, to_pictures, to_pixels

FIELDS = tuple(field.name for field in dataclasses.fields(E4T))


class E4TFolder(Format):
    """sdjax's `e4t/` folder inside a model folder: encoder, offsets, word and settings."""

    name, called, suffixes, listed = "e4t", "e4t", (), "E4T hashes"

    def matches(self, file: File) -> bool:
        """Returns whether a model's folder has an e4t/."""
        return (file.path / "e4t").is_dir()

    def holds(self, adapter: Adapter) -> bool:
        """Returns whether the adapter has an encoder, offsets and a model."""
        return {"head", "offsets"} <= set(adapter.trees) and adapter.model is not None

    def read(self, file: File, sd: StableDiffusion) -> Adapter:
        """Returns the content of a model's e4t/, with float32 weights."""
        folder = file.path / "e4t"
        config, unet = _settings(folder), parameters.template(sd.networks["unet"])
        with named(folder / "config.json"):
            told = {CLASS: "E4T", **{name: config[name] for name in FIELDS}}
            method = from_json(told, {"E4T": E4T})
        network = _network(file.path, sd)
        sized = sd.with_networks(image_encoder=network)

        def read(stem, like):
            return parameters.read_tree(files.open_weights(folder, stem), like, "float32")

        there = files.open_weights(folder, "encoder").names
        head = heads.of([name.removeprefix("head.") for name in there], method.features)
        like = {"head": head.shapes(sized), **({"vision": parameters.template(network)} if method.vision else {})}
        own = read("encoder", like)
        own["offsets"] = read(
            "offsets", jax.eval_shape(lambda stacked: offsets.by_name(unet, stacked), offsets.create(unet))
        )
        if config["reference"]:
            ids = jnp.zeros((1, sd.tokenizers[ENCODER].length), jnp.int32)
            told = jax.eval_shape(lambda: sd.condition({ENCODER: ids}).unet.context)
            own["reference"] = read("reference", {"unet": trees.partition(unet, HALF)[0], "empty": told})
        if (folder / "concept.png").is_file():
            own["concept"] = jnp.asarray(to_pixels(reading.picture(folder / "concept.png")))
        return Adapter(trees=own, about={**about(method), "file": str(folder)})

    def acts(self, adapter: Adapter, sd: StableDiffusion) -> Adapter:
        """Returns the encoder with its word, and edits for all weights that offsets and tuning changed."""
        model = Path(adapter.about["file"]).parent
        seeing = self.brings(adapter, sd)
        tower = seeing.networks["image_encoder"], seeing.parts["image_encoder"]
        return acting(sd, adapter, {part: _part(model, part, sd) for part in ("unet", ENCODER)}, tower)

    def brings(self, adapter: Adapter, sd: StableDiffusion) -> StableDiffusion:
        """Returns sd, with the folder's vision tower if it has none."""
        if "image_encoder" in sd.parts:
            return sd
        model = Path(adapter.about["file"]).parent
        network = _network(model, sd)
        weights = files.open_weights(model / "image_encoder", "model")
        params = parameters.read(weights, network, "image_encoder", "float32")
        return sd.with_networks(image_encoder=network).with_parts(image_encoder=params)

    def write(self, adapter: Adapter, folder: Path, about: Mapping[str, str] | None = None) -> Path:
        """Writes e4t/ into a model's folder; the reference only if it differs from the adapter's model.

        about: not written here; the model's folder holds it in metadata.json.
        """
        folder, own = Path(folder) / "e4t", adapter.trees
        folder.mkdir()
        encoder = {name: own[name] for name in ("head", "vision") if name in own}
        files.write_weights(folder, "encoder", parameters.write(encoder))
        files.write_weights(folder, "offsets", parameters.write(own["offsets"]))
        kept = "reference" in own and not _is_of(own["reference"], adapter.model)
        if kept:
            files.write_weights(folder, "reference", parameters.write(own["reference"]))
        if "concept" in own:
            Image.fromarray(to_pictures(own["concept"])).save(folder / "concept.png")
        files.write_json(folder / "config.json", {**adapter.about["settings"], "reference": kept})
        return folder

    def start(
        self, adapter: Adapter, method: Any, trained: Any, frozen: StableDiffusion
    ) -> tuple[Any, StableDiffusion]:
        """Returns (trained, frozen) with the file's head and offsets; its tower trains, or else becomes frozen's.

        Raises SettingError for a domain, features or scale other than the file's.
        """
        own, settings = dict(adapter.trees), adapter.about["settings"]
        for name in ("domain", "features", "scale"):
            if settings[name] != getattr(method, name):
                wanted = f"{settings[name]!r}, with which {adapter.about['file']} was trained"
                raise SettingError(name, getattr(method, name), wanted)
        own.pop("concept", None)
        if "vision" in own and not method.vision:
            frozen = frozen.with_parts(image_encoder=own.pop("vision"))
        frozen = with_seen(frozen, **own.pop("reference", {}))
        frozen = heads.of(trees.names(own["head"]), method.features).prepared(frozen)
        unet = parameters.template(frozen.networks["unet"])
        return {**trained, **own, "offsets": offsets.by_shape(unet, own["offsets"])}, frozen

    def use(self, path: Path, adapter: Adapter, model: str) -> list[str]:
        """Returns lines on the use of the word; other programs run no encoder, so they get the word as one row."""
        word = adapter.about["settings"]["word"]
        if "concept" not in adapter.trees:
            return [
                f"here       make tune MODEL={path} IMAGE=photo.png",
                f'           python -m sdjax text2img --model {path} --image photo.png --prompt "a photo of {word}"',
            ]
        quoted = shlex.quote(str(path))
        return [
            f'here       python -m sdjax text2img --model {quoted} --prompt "a photo of {word}"',
            f'diffusers  python -m sdjax.convert {quoted} DST; StableDiffusionPipeline.from_pretrained("DST"): {word}',
            f"A1111      python -m sdjax.convert {quoted} NAME.safetensors; the word is the name of the file beside it",
        ]


def _settings(folder):
    """Returns the content of an e4t/ folder's config.json.  Raises ValueError naming missing settings."""
    path = folder / "config.json"
    found = files.read_json(path)
    missing = [name for name in (*FIELDS, "reference") if name not in found]
    if missing:
        raise ValueError(f"{path}: has no {', '.join(missing)}; expected the settings of E4T")
    return found


def _network(model, sd):
    """Returns the network of sd's vision tower, or else of the model folder's."""
    if "image_encoder" in sd.parts:
        return sd.networks["image_encoder"]
    path = model / "image_encoder" / "config.json"
    values = files.read_json(path)
    with named(path):
        return ImageEncoder(ImageConfig.from_json(values))


def _part(model, part, sd):
    """Returns a part's weights from a model's folder, its token table cut to as many rows as sd's."""
    weights, network = files.open_weights(model / part, sd.family.parts[part].stem), sd.networks[part]
    if part != ENCODER:
        return parameters.read(weights, network, part, "float32")
    config, rows = network.config, len(sd.table(part))
    there = files.read_json(model / part / "config.json").get("vocab_size")
    if type(there) is not int or there < rows:
        raise ValueError(f"{model / part / 'config.json'}: vocab_size={there!r}: expected at least the model's {rows}")
    network = network.clone(config=dataclasses.replace(config, vocab_size=there))
    tree = parameters.read(weights, network, part, "float32")
    return trees.edit(tree, f"^{TOKENS}$", lambda name, weight: weight[:rows])


def _is_of(reference, sd):
    """Returns whether the encoder's reference equals sd: the UNet's half and the text encoder's empty prompt."""
    if trees.digest(reference["unet"]) != trees.digest(half(sd)):
        return False
    return trees.digest(reference["empty"]) == trees.digest(empty(sd))


def personalise(
    sd: StableDiffusion, source: str | Path, picture: UInt8[np.ndarray, "H W 3"] | None = None
) -> StableDiffusion:
    """Returns sd whose word shows the subject of a picture, by the encoder in the model folder `source`.

    picture: uint8 [H W 3]; None for the one stored with the model.
    Raises ValueError without an e4t/ folder, without a picture, and if sd already has an encoder's picture.
    """
    if sd.conditioners:
        raise ValueError(f"{source}: was tuned on one picture and looks at that; give the model it came from")
    with named(source):
        kind, adapter = E4TFolder(), E4TFolder().read(File(Path(source)), sd)
        method = E4T(**adapter.about["settings"] | {"vision": False})
        trained, frozen = kind.start(adapter, method, *method.split(sd))
    if picture is None and "concept" not in adapter.trees:
        raise ValueError(f"{adapter.about['file']}: holds no concept.png; give a picture")
    pixels = adapter.trees["concept"] if picture is None else jnp.asarray(to_pixels(picture))
    return look(method.join(frozen, trained), pixels)


def shown(sd: StableDiffusion, picture: UInt8[np.ndarray, "H W 3"] | None = None) -> StableDiffusion:
    """Returns sd with a picture for its attached encoder; None keeps the picture stored with the adapter.

    Raises SettingError without any picture, and for a picture if the adapter was tuned on its own.
    """
    kept = seen_by(sd).concept
    if picture is None and kept is None:
        raise SettingError("image", None, "a picture of the subject", "the adapter's encoder has seen none")
    if picture is None:
        return sd
    if kept is not None:
        raise SettingError("image", "a picture", "none", "the adapter was tuned on one picture and looks at that")
    return look(sd, jnp.asarray(to_pixels(picture)))


def attached(sd: StableDiffusion, folder: str | Path) -> StableDiffusion:
    """Returns sd with the encoder and picture of its folder's e4t/, or sd itself without a stored picture."""
    return personalise(sd, folder) if (Path(folder) / "e4t" / "concept.png").is_file() else sd


def carried(
    source: str | Path, dtype: str | None = None, reference: bool = True
) -> list[Callable[[StableDiffusion, Path], None]]:
    """Returns [a function (sd, folder) that copies a model folder's e4t/ with weights in `dtype`]; [] without an e4t/.

    reference: False leaves out the pretrained half, so that the encoder reads the model's own UNet.
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
