"""One step of the diffusion loss in torch, on the noise and times that ours draws: what tests of gradients share."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import torch
from test_folder import channels_first

from sdjax.diffusion import schedule as noising
from sdjax.diffusion.loss import diffusion_loss

TIGHT = 1e-4  # relative error of a gradient


def batch(sd, texts, seed=0):
    """Returns a batch of latents' moments [B 8 8 8] for texts."""
    random = np.random.default_rng(seed)
    moments = random.standard_normal((len(texts), 8, 8, 8)).astype(np.float32)
    return {
        "moments": jnp.asarray(moments),
        "ids": jnp.asarray(sd.tokenize(texts)),
        "index": jnp.arange(3, 3 + len(texts)),
    }


def drawn(sd, batch, key):
    """Returns {"z", "noise", "t"} that diffusion_loss draws for a batch."""
    seen = {}

    def target(schedule, z, noise, t):
        seen.update(z=z, noise=noise, t=t)
        return noising.target(schedule, z, noise, t)

    blind = SimpleNamespace(
        schedule=sd.schedule,
        latents=sd.latents,
        condition=sd.condition,
        denoise=lambda z, t, cond, i: (jnp.zeros_like(z), {}),
    )
    diffusion_loss(blind, batch, key, target=target)
    return seen


def loss(theirs, sd, batch, key):
    """Returns diffusers' squared error, a torch scalar, of a pipeline's UNet and text encoder on this batch."""
    seen = drawn(sd, batch, key)
    z_t = noising.add_noise(sd.schedule, seen["z"], seen["noise"], seen["t"])
    wanted = noising.target(sd.schedule, seen["z"], seen["noise"], seen["t"])
    ids = torch.from_numpy(np.array(batch["ids"], np.int64))
    context = theirs.text_encoder(ids)[0]
    t = torch.from_numpy(np.array(seen["t"], np.int64))
    prediction = theirs.unet(channels_first(np.asarray(z_t)), t, context).sample
    return ((prediction - channels_first(np.asarray(wanted))) ** 2).mean()


def assert_close(ours, theirs):
    """Asserts that gradients {name: array} are torch's within TIGHT, each by the norm of the difference.

    Where torch's is zero but for rounding, such as that of a constant in all keys, ours is too.
    """
    assert set(ours) == set(theirs)
    norms = {name: np.linalg.norm(np.asarray(value, np.float64)) for name, value in theirs.items()}
    most = max(norms.values())
    assert most > 0
    for name, norm in norms.items():
        apart = np.linalg.norm(np.asarray(ours[name], np.float64) - np.asarray(theirs[name], np.float64))
        assert apart <= TIGHT * norm if norm > 1e-6 * most else apart <= 1e-5 * most, (name, apart, norm, most)
