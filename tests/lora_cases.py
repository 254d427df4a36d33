"""LoRA and its relatives by PEFT and by LyCORIS: several kinds on different layers of one small model, and as ours.

One network with all kinds is one program to compile.  Every factor holds noise, those that start as zero too.
"""

import copy
import functools
import logging
import pathlib
import re
import tempfile
from dataclasses import dataclass
from typing import Any

import diffusers
import jax
import peft
import safetensors.torch
import torch
from adapter_files import fresh, made
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict

from sdjax.formats.adapters import kinds, lora_start
from sdjax.methods.adapter import Adapter
from sdjax.methods.chain import Chain
from sdjax.methods.lora import Lora

PARTS = ("unet", "text_encoder")
PEFT = {
    "lora": Lora(4, 6.0, targets=r"^unet\.(conv_in|down_blocks\.0)|^text_encoder\..*layers\.(0|2)\."),
    "dora": Lora(
        4, 6.0, "dora", targets=r"^unet\.(down_blocks\.1|mid_block\.att|up_blocks\.0)|^text_encoder\..*layers\.1\."
    ),
    "loha": Lora(3, 6.0, "loha", targets=r"^unet\.(mid_block\.res|up_blocks\.1)"),
}
LYCORIS = {
    "lora": Lora(3, 2.0, targets=r"^unet\.(conv_in|down_blocks\.0)"),
    "loha": Lora(3, 2.0, "loha", targets=r"^unet\.mid_block"),
    "lokr": Lora(2, 1.0, "lokr", targets=r"^unet\.up_blocks\.1\.(attentions|resnets)\.0\."),
    "lokr, factor": Lora(2, 1.0, "lokr", targets=r"^unet\.up_blocks\.(1\.(attentions|resnets)\.1|0\.up)", factor=4),
    "oft": Lora(4, None, "oft", targets=r"^unet\.(down_blocks\.1|up_blocks\.0\.res|time_|conv_out)", constraint=2e-3),
}
METHODS = {"peft": PEFT, "lycoris": LYCORIS}


@dataclass(frozen=True)
class Case:
    """theirs: diffusers' pipeline.  held: {part: module with their factors}.  files: {method: their library's file}.

    trained: {method: factors of ours, the same numbers}.  method, joint: all of them as one Chain and its trained tree.
    """

    theirs: Any
    held: dict[str, Any]
    files: dict[str, pathlib.Path]
    trained: dict[str, Any]
    frozen: Any
    method: Chain
    joint: dict[str, Any]


@functools.cache
def case(library):
    theirs, sd, folder = fresh("sd1"), made("sd1")[1], pathlib.Path(tempfile.mkdtemp())
    held, files = (by_peft if library == "peft" else by_lycoris)(theirs, folder)
    found = [kinds.opened(path, sd)[1].edits for path in dict.fromkeys(files.values())]
    trained = {}
    for name, method in METHODS[library].items():
        start, frozen = method.split(sd)
        trained[name] = lora_start.started(Adapter(edits=chosen(found, start)), method, start)
    joint = {str(i): trained[name] for i, name in enumerate(METHODS[library])}
    return Case(theirs, held, files, trained, frozen, Chain(tuple(METHODS[library].values())), joint)


def chosen(found, start):
    """Returns the edits of the layers that a method starts with."""
    return {
        part: {name: edits[part][name] for edits in found for name in edits.get(part, {}) if name[:-7] in modules}
        for part, modules in start.items()
    }


def layers(model, part, method):
    """Returns {name: layer} of the layers of a torch model that a method trains."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and re.search(method.targets, f"{part}.{name}")
    }


@torch.no_grad()
def fill(weights, seed=0):
    """Adds noise to weights, in order."""
    generator = torch.Generator().manual_seed(seed)
    for weight in weights:
        weight.add_(0.1 * torch.randn(weight.shape, generator=generator))


# ---- PEFT -----------------------------------------------------------------------------------------


def by_peft(theirs, folder):
    names = {
        (part, name): list(layers(getattr(theirs, part), part, method))
        for part in PARTS
        for name, method in PEFT.items()
    }
    for part in PARTS:
        model = getattr(theirs, part)
        configs = {name: config(name, targets) for (of, name), targets in names.items() if of == part and targets}
        for name, settings in configs.items():
            peft.inject_adapter_in_model(settings, model, name)
        model.peft_config = configs
        for layer in filter(lambda layer: isinstance(layer, BaseTunerLayer), model.modules()):
            layer.set_adapter([name for name in configs if name in getattr(layer, layer.adapter_layer_names[0])])
        own = [weight for key, weight in model.named_parameters() if re.search(r"\.(lora|hada)_", key)]
        fill([weight.requires_grad_(True) for weight in own])
    return {part: getattr(theirs, part) for part in PARTS}, {name: saved(theirs, name, folder / name) for name in PEFT}


def config(name, targets):
    method = PEFT[name]
    if name == "loha":
        return peft.LoHaConfig(r=method.rank, alpha=method.alpha, target_modules=targets)
    return peft.LoraConfig(r=method.rank, lora_alpha=method.alpha, use_dora=name == "dora", target_modules=targets)


def saved(theirs, name, folder):
    """Writes one adapter as its library does, LoHa as PEFT, others as diffusers; returns the file's path."""
    models = {part: model for part in PARTS if name in (model := getattr(theirs, part)).peft_config}
    found = {part: get_peft_model_state_dict(model, adapter_name=name) for part, model in models.items()}
    if name == "loha":
        folder.mkdir()
        models["unet"].peft_config[name].save_pretrained(folder)
        path = folder / "adapter_model.safetensors"
        safetensors.torch.save_file({f"base_model.model.{key}": x for key, x in found["unet"].items()}, path)
        return path
    held = {f"{part}_lora_layers": convert_state_dict_to_diffusers(state) for part, state in found.items()}
    alone = {part: Holder({"default": model.peft_config[name]}) for part, model in models.items()}
    diffusers.StableDiffusionPipeline.save_lora_weights(folder, **held, **_collate_lora_metadata(alone))
    return folder / "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Holder:
    """What diffusers asks for a network's settings."""

    peft_config: dict[str, Any]


# ---- LyCORIS --------------------------------------------------------------------------------------


def by_lycoris(theirs, folder):
    network = network_of(theirs.unet, LYCORIS)
    fill(network.parameters())
    network.apply_to()
    path = folder / "lycoris.safetensors"
    network.save_weights(str(path), torch.float32, {"format": "pt"})
    return {"unet": network.train()}, dict.fromkeys(LYCORIS, path)


def network_of(unet, methods):
    """Returns LyCORIS' network of the layers that methods train, its settings given as when it trains."""
    from lycoris.wrapper import LycorisNetwork, network_module_dict

    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    network = LycorisNetwork(unet, init_only=True)
    for method in methods.values():
        make, alpha = (
            network_module_dict[{"oft": "diag-oft"}.get(method.algo, method.algo)],
            method.alpha or method.rank,
        )
        settings = {"factor": method.factor, "constraint": method.constraint}
        for name, layer in layers(unet, "unet", method).items():
            lora_name = f"lycoris_{name.replace('.', '_')}"
            network.loras.append(make(lora_name, layer, 1.0, method.rank, alpha, **settings))
            network.add_module(lora_name, network.loras[-1])
    return network


def gradients_there(library, inputs):
    """Returns (loss, {part: {name: gradient}}) of their UNet and text encoder at (latents, times, target)."""
    one = case(library)
    z, t, target = map(torch.from_numpy, inputs)
    options = {"padding": "max_length", "truncation": True, "max_length": 16, "return_tensors": "pt"}
    context = one.theirs.text_encoder(one.theirs.tokenizer(TEXTS, **options).input_ids)[0]
    made = one.theirs.unet(z.permute(0, 3, 1, 2), t, context).sample
    loss = torch.mean((made - target.permute(0, 3, 1, 2)) ** 2)
    loss.backward()
    found = {
        part: {name: copy.deepcopy(x.grad.numpy()) for name, x in held.named_parameters() if x.grad is not None}
        for part, held in one.held.items()
    }
    return float(loss.detach()), found


def gradients_here(library, inputs):
    """Returns (loss, {method: gradients}) of ours."""
    one = case(library)
    z, t, target = inputs
    ids = one.frozen.tokenize(TEXTS)

    @jax.jit
    def compute(frozen, trained):
        def loss(trained):
            sd = one.method.join(frozen, trained)
            return ((sd.denoise(z, t, sd.condition(ids))[0] - target) ** 2).mean()

        return jax.value_and_grad(loss)(trained)

    value, grads = compute(one.frozen.bare, one.joint)
    return float(value), {name: jax.device_get(grads[str(i)]) for i, name in enumerate(METHODS[library])}


TEXTS = ["a photo of a woman on the beach", "a sketch of a man in the snow"]
