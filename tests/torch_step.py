"""One step of training beside PyTorch: the same tiny model in both, the same latents, noise and times.

ours, unet, text = models()                       # noise in every weight
seen = drawn(ours, batch, key)                    # what the loss draws: z, noise, t, z_t
assert_same_gradients(update, unet.named_parameters())
"""

import dataclasses
import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch_weights import file_name, to_torch
from transformers import CLIPTextModel

import sdjax
from sdjax import trees
from sdjax.diffusion import noise_schedule
from sdjax.diffusion.loss import diffusion_loss
from sdjax.formats import pipeline
from sdjax.models.cond import Cond

SIDE = 16  # latent pixels of random:tiny


@functools.cache
def models():
    """Returns (sd, diffusers' UNet, transformers' text encoder) of the same weights, with noise in all of them."""
    sd = pipeline.load("random:tiny")
    random = np.random.default_rng(3)
    noisy = jax.tree.map(lambda x: x + np.float32(0.05) * random.standard_normal(x.shape, np.float32), sd.parts)
    sd = sd.with_parts(**noisy)
    with tempfile.TemporaryDirectory() as folder:
        sdjax.save(sd, f"{folder}/sd")
        unet = UNet2DConditionModel.from_pretrained(f"{folder}/sd/unet")
        text = CLIPTextModel.from_pretrained(f"{folder}/sd/text_encoder")
    return sd, unet, text


def batch(sd, prompts, **more):
    """Returns a batch of latents whose moments have no spread."""
    random, rows = np.random.default_rng(5), len(prompts)
    mean = random.normal(0, 1, (rows, SIDE, SIDE, 4)).astype(np.float32)
    made = {
        "moments": np.concatenate([mean, np.full_like(mean, -60)], -1),
        "ids": sd.tokenize(prompts), "index": np.arange(7, 7 + rows, dtype=np.int32),
        "weight": np.ones(rows, np.float32),
    }  # fmt: skip
    return {**made, **more}


def drawn(sd, batch, key, **settings):
    """Returns torch tensors {"z", "noise", "t", "z_t"} of what the loss draws at a key; no network runs."""
    seen = {}

    @dataclasses.dataclass
    class Seen:
        schedule: object = sd.schedule
        latents: object = sd.latents

        def condition(self, ids, skip=0):
            return Cond()

        def denoise(self, z, t, cond, i=0):
            seen.update(z_t=z)
            return jnp.zeros_like(z), {}

    def target(schedule, z, noise, t):
        seen.update(z=z, noise=noise, t=t)
        return noise_schedule.target(schedule, z, noise, t)

    diffusion_loss(Seen(), batch, key, target=target, **settings)
    return {name: torch.tensor(np.array(x)).long() if name == "t" else to_torch(x) for name, x in seen.items()}


def context(text, ids, skip=0):
    """Returns the text encoder's output of ids without its last `skip` layers, as diffusers computes its clip_skip."""
    hidden = text(torch.tensor(np.array(ids)).long(), output_hidden_states=True).hidden_states
    return getattr(text, "text_model", text).final_layer_norm(hidden[-1 - skip])


def fresh(module):
    """Returns a copy of a module whose weights collect gradients."""
    import copy

    return copy.deepcopy(module).requires_grad_(True)


def assert_same_gradients(ours, theirs, tolerance=1e-4):
    """Asserts that our tree of gradients is the named torch weights', relative to the largest, every one of them."""
    theirs, found = dict(theirs), trees.flatten(ours)
    assert found
    for name, grad in found.items():
        wanted = theirs[file_name(name)].grad
        wanted = torch.zeros_like(theirs[file_name(name)]) if wanted is None else wanted
        grad = np.asarray(grad)
        if name.endswith(".kernel"):
            grad = grad.T if grad.ndim == 2 else grad.transpose(3, 2, 0, 1)
        scale = max(float(wanted.norm()), 1e-6)
        assert np.linalg.norm(grad - wanted.numpy()) <= tolerance * scale, name
