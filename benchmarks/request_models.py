"""The models and adapters of request_rows.py: built in, or written from fixed random numbers.

    models = Models(folder)                                   # an empty folder for the files
    sd = models.get("inpaint", (("lora.safetensors", {"strength": 0.8}),))

The code uses public names of sdjax, so that other versions make the same models; `module` finds the rest.
"""

import dataclasses
import importlib
import json
from pathlib import Path

import numpy as np
from request_rows import picture
from safetensors.numpy import load_file, save_file

import sdjax

WEIGHTS = "diffusion_pytorch_model.safetensors"
UNET, TEXT = "lora_unet_", "lora_te_text_model_encoder_layers_"
WIDTH, RANK = 32, 4  # of random:tiny's text encoder and first level; of the adapters
BLOCK = "down_blocks_0_attentions_0_transformer_blocks_0_"
LAYERS = tuple(f"{UNET}{BLOCK}attn{i}_to_{name}" for i in (1, 2) for name in ("q", "k", "v", "out_0"))
LAYERS += tuple(f"{TEXT}{i}_self_attn_{name}_proj" for i in (0, 1) for name in ("q", "v"))
UNET2D = {
    "in_channels": 6, "out_channels": 3, "sample_size": 64, "block_out_channels": (32, 64), "layers_per_block": 1,
    "attention_head_dim": 32, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
VQ = {
    "block_out_channels": (32, 32, 64), "num_vq_embeddings": 50, "sample_size": 256,
    "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3,
}  # fmt: skip
NOISE = {"beta_start": 0.0015, "beta_end": 0.0155, "beta_schedule": "scaled_linear", "clip_sample": False}


class Models:
    """The models by name, each made once, and the adapters' files, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made = folder, {}
        write_adapters(folder)

    def get(self, name: str, adapters: tuple = ()) -> "sdjax.StableDiffusion":
        """Returns the model of MODELS with adapters, ((file, arguments of attach), ...)."""
        if name not in self.made:
            self.made[name] = MODELS[name](self.folder / name)
        sd = self.made[name]
        for file, options in adapters:
            sd = sdjax.attach(sd, self.folder / file, **options)
        return sd

    def controls(self, uses: tuple) -> list:
        """Returns the random ControlNet on each picture of `uses`, (arguments of Control.on, ...)."""
        if "control" not in self.made:
            self.made["control"] = sdjax.load_control("random:tiny")
        return [self.made["control"].on(**use) for use in uses]


def here(place: str) -> bool:
    """Returns whether the imported sdjax has a module; another, installed sdjax does not count."""
    path = Path(sdjax.__file__).parent.joinpath(*place.split(".")[1:])
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def module(*places: str) -> object:
    """Returns the first of the modules that exists; versions of sdjax have it in different places."""
    for place in filter(here, places):
        return importlib.import_module(place)
    raise ModuleNotFoundError(f"none of {', '.join(places)}: expected one; add the new place")


# ---- models ------------------------------------------------------------------------------------


def tiny(folder):
    return sdjax.load("random:tiny")


def velocity(folder):
    """Returns random:tiny with v-prediction and zero terminal SNR."""
    sd = tiny(folder)
    options = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return sd.replace(schedule=dataclasses.replace(sd.schedule, **options))


def inpainting(folder):
    """Returns random:tiny with 5 more input channels."""
    return _changed(folder, "StableDiffusionInpaintPipeline", in_channels=9)


def upscaler(folder):
    """Returns random:tiny with 3 more input channels, 1000 noise levels and v-prediction."""
    return _changed(folder, "StableDiffusionUpscalePipeline", in_channels=7, num_class_embeds=1000)


def _changed(folder, kind, **options):
    """Saves random:tiny as another diffusers pipeline, with other options of the UNet, and loads it."""
    sdjax.save(tiny(folder), folder)
    index = _edited(folder / "model_index.json", _class_name=kind)
    _edited(folder / "unet" / "config.json", **options)
    random, path = np.random.default_rng(5), folder / "unet" / WEIGHTS
    weights = load_file(path)
    first = weights["conv_in.weight"]
    more = options["in_channels"] - first.shape[1]
    fresh = 0.1 * random.standard_normal((len(first), more, *first.shape[2:]), np.float32)
    weights["conv_in.weight"] = np.concatenate([first, fresh], axis=1)
    if "num_class_embeds" in options:
        _edited(folder / "model_index.json", low_res_scheduler=["diffusers", "DDPMScheduler"], **index)
        scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        low = {**scheduler, "_class_name": "DDPMScheduler", "beta_start": 0.0001, "beta_end": 0.02}
        (folder / "low_res_scheduler").mkdir()
        (folder / "low_res_scheduler" / "scheduler_config.json").write_text(json.dumps(low))
        _edited(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
        width = len(weights["time_embedding.linear_2.bias"])
        shape = options["num_class_embeds"], width
        weights["class_embedding.weight"] = random.standard_normal(shape, np.float32)
    save_file(weights, path)
    return sdjax.load(folder)


def _edited(path, **changes):
    """Changes entries of a JSON file and returns its content."""
    found = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(found))
    return found


def super_resolution(folder):
    """Returns a small LDM-SR with diffusers' random weights."""
    import diffusers
    import torch

    torch.manual_seed(0)
    vqvae, unet = diffusers.VQModel(**VQ), diffusers.UNet2DModel(**UNET2D)
    with torch.no_grad():  # as far apart as the encoder's outputs
        vqvae.quantize.embedding.weight.normal_()
    diffusers.LDMSuperResolutionPipeline(vqvae, unet, diffusers.DDIMScheduler(**NOISE)).save_pretrained(folder)
    return sdjax.load(folder)


def pocket(folder):
    return sdjax.load("pocket")


def e4t(folder):
    """Returns pocket with the word *s personalised on a picture."""
    reader = module("sdjax.formats.adapters.e4t", "sdjax.convert.e4t")
    pipeline = module("sdjax.formats.pipeline", "sdjax.convert.pipeline")
    return reader.personalise(pocket(folder), pipeline.locate("pocket"), picture(12, 64))


MODELS = {"tiny": tiny, "v": velocity, "inpaint": inpainting, "upscaler": upscaler, "ldm_sr": super_resolution}
MODELS |= {"pocket": pocket, "e4t": e4t}


# ---- adapters ----------------------------------------------------------------------------------


def write_adapters(folder: Path) -> None:
    """Writes lora.safetensors, loha.safetensors (kohya's names), blob.safetensors (an embedding) and hyper.pt."""
    random = np.random.default_rng(3)

    def noise(*shape):
        return 0.2 * random.standard_normal(shape, np.float32)

    alpha = np.array(2, np.float32)
    down, up = {"lora_down.weight": (RANK, WIDTH)}, {"lora_up.weight": (WIDTH, RANK)}
    pairs = {f"hada_w{i}_{side}": shape for i in (1, 2) for side, shape in (("a", (WIDTH, RANK)), ("b", (RANK, WIDTH)))}
    for name, shapes in (("lora", down | up), ("loha", pairs)):
        tensors = {f"{layer}.{key}": noise(*shape) for layer in LAYERS for key, shape in shapes.items()}
        save_file(tensors | {f"{layer}.alpha": alpha for layer in LAYERS}, folder / f"{name}.safetensors")
    save_file({"emb_params": noise(2, WIDTH)}, folder / "blob.safetensors")
    _write_hypernetwork(folder / "hyper.pt", noise)


def _write_hypernetwork(path, noise):
    import torch

    def network():
        shapes = {"linear.0.weight": (2 * WIDTH, WIDTH), "linear.0.bias": (2 * WIDTH,)}
        shapes |= {"linear.2.weight": (WIDTH, 2 * WIDTH), "linear.2.bias": (WIDTH,)}
        return {name: torch.from_numpy(noise(*shape)) for name, shape in shapes.items()}

    settings = {"layer_structure": [1, 2, 1], "activation_func": "relu", "name": "hyper"}
    torch.save({WIDTH: (network(), network()), **settings}, path)
