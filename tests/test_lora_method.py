"""LoRA and its relatives while they train, against peft and LyCORIS with the same numbers."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from adapter_files import fresh, made
from diffusers.training_utils import _collate_lora_metadata
from test_folder import TEXTS, channels_first
from test_lora import noised

from sdjax.families.sd import Sd
from sdjax.formats.adapters import format as kinds
from sdjax.formats.adapters import lora_start, lora_tensors
from sdjax.methods.adapter import Adapter
from sdjax.methods.edits import Factored
from sdjax.methods.lora import Lora

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
WIDE = r"^unet\..*\.(to_q|to_k|to_v|to_out\.0|proj_in|proj_out|net\.0\.proj|net\.2|conv1|conv2|time_emb_proj|conv)$"
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "net.0.proj", "net.2", "conv1", "conv2"]
LAYERS += ["time_emb_proj", "conv"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
METHODS = {
    "lora": Lora(4, 6.0, targets=WIDE, text_encoder=True),
    "dora": Lora(4, 6.0, "dora", targets=WIDE, text_encoder=True),
    "loha": Lora(3, 2.0, "loha", targets=WIDE),
    "lycoris lora": Lora(3, 2.0, targets=r"^unet\."),
    "lycoris loha": Lora(3, 2.0, "loha", targets=r"^unet\."),
    "lycoris lokr": Lora(2, 1.0, "lokr", targets=r"^unet\."),
    "lycoris lokr, factor": Lora(2, 1.0, "lokr", targets=r"^unet\.", factor=4),
    "lycoris oft": Lora(4, None, "oft", targets=r"^unet\.", constraint=2e-3),
}
LYCORIS = {"oft": "diag-oft"}
KOHYA = functools.partial(lora_tensors.kohya, Sd().lora)


def by_peft(theirs, method):
    """Returns {part: peft's model} with noise in all factors."""
    if method.algo == "loha":
        config = peft.LoHaConfig(r=method.rank, alpha=method.alpha, target_modules=LAYERS)
        theirs.unet = peft.get_peft_model(theirs.unet, config)
        return {"unet": noised(theirs.unet)}
    settings = {"r": method.rank, "lora_alpha": method.alpha, "use_dora": method.algo == "dora"}
    theirs.unet.add_adapter(peft.LoraConfig(target_modules=LAYERS, **settings))
    theirs.text_encoder.add_adapter(peft.LoraConfig(target_modules=TEXT, **settings))
    return {"unet": noised(theirs.unet), "text_encoder": noised(theirs.text_encoder, 1)}


def by_lycoris(theirs, method):
    """Returns LyCORIS' network around the UNet, with noise in all factors."""
    from lycoris import create_lycoris

    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    algo = LYCORIS.get(method.algo, method.algo)
    network = create_lycoris(
        theirs.unet, 1.0, method.rank, method.alpha or method.rank, algo=algo, factor=method.factor,
        constraint=method.constraint, preset="full",
    )  # fmt: skip
    network.apply_to()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return network.train()


def state_of(theirs, method, held, folder):
    """Writes what another library holds as its file, into a folder; returns the file's path."""
    if isinstance(held, dict) and method.algo == "loha":
        theirs.unet.save_pretrained(folder)
        return folder / "adapter_model.safetensors"
    if isinstance(held, dict):
        import diffusers
        from diffusers.utils import convert_state_dict_to_diffusers
        from peft.utils import get_peft_model_state_dict

        layers = {
            f"{part}_lora_layers": convert_state_dict_to_diffusers(get_peft_model_state_dict(model))
            for part, model in held.items()
        }
        more = _collate_lora_metadata({"unet": theirs.unet, "text_encoder": theirs.text_encoder})
        diffusers.StableDiffusionPipeline.save_lora_weights(folder, **layers, **more)
        return folder / "pytorch_lora_weights.safetensors"
    path = folder / "lycoris.safetensors"
    held.save_weights(str(path), torch.float32, {"format": "pt"})
    return path


@functools.cache
def case(name):
    """Returns (their pipeline, what holds their factors, our method, trained, frozen, the file of their library)."""
    import pathlib
    import tempfile

    method, theirs, sd = METHODS[name], fresh("sd1"), made("sd1")[1]
    held = by_lycoris(theirs, method) if name.startswith("lycoris") else by_peft(theirs, method)
    path = state_of(theirs, method, held, pathlib.Path(tempfile.mkdtemp()))
    trained, frozen = method.split(sd)
    _, adapter = kinds.opened(path, sd)
    return theirs, held, method, lora_start.started(adapter, method, trained), frozen, path


def inputs():
    random = np.random.default_rng(3)
    z, target = random.standard_normal((2, 2, 8, 8, 4)).astype(np.float32)
    return z, np.array([7.0, 901.0], np.float32), target


def gradient_there(theirs, held):
    """Returns the loss of their UNet; gradients are left in the parameters."""
    z, t, target = inputs()
    options = {"padding": "max_length", "truncation": True, "max_length": 16, "return_tensors": "pt"}
    context = theirs.text_encoder(theirs.tokenizer(TEXTS[:2], **options).input_ids)[0]
    made = theirs.unet(channels_first(z), torch.from_numpy(t), context).sample
    loss = torch.mean((made - channels_first(target)) ** 2)
    for model in held.values() if isinstance(held, dict) else [held]:
        model.zero_grad()
    loss.backward()
    return float(loss.detach())


def gradient_here(method, frozen, trained):
    z, t, target = inputs()
    ids = frozen.tokenize(TEXTS[:2])

    @jax.jit
    def compute(frozen, trained):
        def loss(trained):
            sd = method.join(frozen, trained)
            return jnp.mean((sd.denoise(z, t, sd.condition(ids))[0] - target) ** 2)

        return jax.value_and_grad(loss)(trained)

    value, grads = compute(frozen.bare, trained)
    return float(value), jax.tree.map(np.asarray, grads)


def named(grads, naming):
    """Returns gradients {name in a file: array}."""
    edits = {
        part: {f"{module}.kernel": Factored({**f, "scale": np.float32(1)}) for module, f in modules.items()}
        for part, modules in grads.items()
    }
    return lora_tensors.named(Adapter(edits=edits), naming)


def gradients_of(held):
    """Returns {part: {name: gradient}} of another library's parameters."""
    if not isinstance(held, dict):
        return {"unet": {name.replace("lycoris_", "lora_unet_"): x.grad for name, x in held.named_parameters()}}
    return {
        part: {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
        for part, model in held.items()
    }


@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_those_of_other_libraries(name):
    """Relative error of every factor's gradient at most 1e-4, with noise in what starts as zero."""
    theirs, held, method, trained, frozen, _ = case(name)
    value, grads = gradient_here(method, frozen, trained)
    assert value == pytest.approx(gradient_there(theirs, held), rel=1e-5)
    naming, count = KOHYA if name.startswith("lycoris") else lora_tensors.peft, 0
    for part, wanted in gradients_of(held).items():
        ours = {key.replace("text_model.", ""): x for key, x in named({part: grads[part]}, naming).items()}
        for key, gradient in wanted.items():
            key = (
                "base_model.model." + key.replace(".default", "").removeprefix("base_model.model.")
                if (naming is lora_tensors.peft)
                else key
            )
            key = key.removesuffix(".weight") if "magnitude" in key else key
            mine, gradient = ours.pop(key), gradient.numpy()
            size = np.abs(gradient).max()
            assert np.abs(mine.reshape(gradient.shape) - gradient).max() <= 1e-4 * max(size, 1e-6), key
            count += 1
        assert not [key for key in ours if not key.endswith("alpha")]
    assert count == len(jax.tree.leaves(trained))
