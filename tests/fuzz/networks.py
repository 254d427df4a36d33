"""Seeds of further networks: ControlNets, autoencoders, E4T's encoders, critics, models of other tasks."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from fuzz.seed import SHAPE, alone, small, within
from PIL import Image

import sdjax
from sdjax.formats.models import controlnet, single_file
from sdjax.formats.storage import files, parameters, pickle_writer
from sdjax.formats.storage.tensor_file import TensorFile
from sdjax.methods.e4t import E4T
from sdjax.models.controlnet import ControlNet, ControlNetConfig
from sdjax.models.critics import Lpips
from sdjax.models.unet import UNetConfig
from sdjax.sampling.control import Control
from sdjax.tasks.inpainting import Inpainting
from sdjax.tasks.upscaling import Upscaling
from sdjax.training import run_folder

PORT = Path(__file__).parents[1] / "data" / "fuzz" / "port.json"
HINT = (16, 32)  # widths of the network that reads a ControlNet's picture; halves the sides like SHAPE's autoencoder
LPIPS = (4, 4, 6, 6, 8)  # widths of its five stages


def controlnets(folder):
    """A ControlNet as diffusers' folder, as one file with its config in the header, and as a .pth file."""
    config = ControlNetConfig.of(UNetConfig(**SHAPE["unet"]), 1, conditioning_embedding_out_channels=HINT)
    network = ControlNet(config, jnp.float32)
    control = Control(parameters.random_parameters(network, "float16"), network)
    controlnet.save_control(control, folder / "control")
    path, old = folder / "control.safetensors", folder / "old.pth"
    controlnet.save_control(control, path)
    pickle_writer.write(old, _read(path))
    return [*within("control", folder / "control"), *within("start", folder / "control"), *alone("control", path, old)]


def autoencoders(folder):
    """An autoencoder as diffusers' folder, and as single files with the original names, safetensors and .pt."""
    sd = small()
    sdjax.save(sd, folder / "model")
    (folder / "model" / "vae").rename(folder / "vae")
    single_file.write(sd, folder / "whole.safetensors")
    held = {name: value for name, value in _read(folder / "whole.safetensors").items() if name.startswith("first_")}
    path, old = folder / "vae.safetensors", folder / "vae.pt"
    files.write_safetensors(path, {name.removeprefix(single_file.VAE): _tensor(x) for name, x in held.items()}, {})
    pickle_writer.write(old, {"state_dict": held})
    return [*within("vae", folder / "vae"), *alone("vae", path, old)]


def encoders(folder):
    """A model whose e4t/ folder has an encoder and a picture; it is loaded, attached and trained further."""
    sd, method = sdjax.load("random:tiny", "float16"), E4T()
    trained, frozen = method.split(sd.with_dtype(jnp.float32), jax.random.key(0))
    frozen = method.look(frozen, trained, jnp.zeros((32, 32, 3)))
    run_folder.export(method, frozen, trained, folder / "encoder")
    every = [seed for reader in ("load", "attach", "start") for seed in within(reader, folder / "encoder")]
    return [seed for seed in every if seed.file.parent.name == "e4t"]


def ports(folder):
    """The unofficial port's folders of a pretrained encoder and of an encoder tuned on a picture.

    Names and shapes come from torch's files (foreign.py).
    """
    told, random = json.loads(PORT.read_text()), np.random.default_rng(3)
    state = {
        file: {name: (0.1 * random.standard_normal(shape)).astype(np.float16) for name, shape in tensors.items()}
        for file, tensors in told["files"].items()
    }
    sd = sdjax.load("random:tiny", "float16")
    unet, text = (
        {name: x.array() for name, x in parameters.write(sd.parts[n]).items()} for n in ("unet", "text_encoder")
    )
    table = next(name for name in text if name.endswith("token_embedding.weight"))
    text[table] = np.concatenate([text[table], text[table][:1]])  # the word's row
    pretrained = {**state, "config.json": told["config"]}
    tuned = {
        "encoder.pt": state["encoder.pt"], "unet.pt": {**unet, **state["weight_offsets.pt"]}, "text_encoder.pt": text,
        "config.json": {"pretrained_args": told["config"]},
    }  # fmt: skip
    for name, held in {"pretrained": pretrained, "tuned": tuned}.items():
        (folder / name).mkdir()
        for file, value in held.items():
            if file.endswith(".json"):
                (folder / name / file).write_text(json.dumps(value))
            else:
                pickle_writer.write(folder / name / file, value)
    Image.new("RGB", (32, 32), "red").save(folder / "tuned" / "domain.png")
    return [
        *within("attach", folder / "pretrained"), *within("attach", folder / "tuned"),
        *within("start", folder / "tuned"),
    ]  # fmt: skip


def critics(folder):
    """LPIPS' weights: VGG16 and the linear layers in two files, as torch writes them, and both in one file."""
    network, picture = Lpips(LPIPS), jnp.zeros((1, 16, 16, 3))
    like = jax.eval_shape(lambda: network.init(jax.random.key(0), picture, picture))["params"]
    held = {
        name: x.array() for name, x in parameters.write(jax.tree.map(lambda x: np.ones(x.shape, x.dtype), like)).items()
    }
    two = folder / "two"
    two.mkdir()
    for name, first in (("vgg16.pth", "features."), ("vgg.pth", "lin")):
        pickle_writer.write(two / name, {key: x for key, x in held.items() if key.startswith(first)})
    one = folder / "lpips.safetensors"
    files.write_safetensors(one, {name: _tensor(x) for name, x in held.items()}, {})
    return [*within("lpips", two), *alone("lpips", one)]


def tasks(folder):
    """An inpainting model and an upscaler: the files of their folders that differ from a plain model's."""
    for task in (Inpainting(), Upscaling()):
        sdjax.save(task.prepare(small().with_dtype(jnp.float32), jax.random.key(0)), folder / task.name)
    own = ("unet", "scheduler", "low_res_scheduler", "inpainting", "upscaling")  # the last two: the index
    return [seed for task in ("inpainting", "upscaling") for seed in within("load", folder / task)
            if seed.file.parent.name in own]  # fmt: skip


def _read(path):
    held = TensorFile(path)
    return {name: held.read(name) for name in held.names}


def _tensor(array):
    return files.Tensor(array.shape, array.dtype, lambda: array)
