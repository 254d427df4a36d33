"""Words in, pictures out.

    images = text2img(sd, ["a photo of a face"], seeds=[0], steps=20, guidance=7.5)     # uint8 [B H W 3]

Image i depends on its own prompt and seed, never on the batch that it is made in.  Another prompt, seed, guidance or
number of steps compiles nothing, nor does another sampler of the same kind of noise; another size or batch does.

Shapes: B batch, H W pixels, h w latent pixels, c latent channels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from sdjax.diffusion import samplers
from sdjax.diffusion.wrappers import Guidance
from sdjax.stable_diffusion import to_pictures

DECODE_AT_ONCE = 1 << 20  # pixels; a full-size decoder needs about 3 GB for them


def text2img(
    sd, prompts, *, seeds=None, steps=20, guidance=7.5, sampler="ddim", schedule="normal", negative="", size=None,
    noise=None, eta=None, skip=0, rescale=0.0, progress=False,
):  # fmt: skip
    """Returns pictures uint8 [B H W 3], one per prompt.

    seeds: one int per prompt; None counts from 0.  guidance: 1 for none.  negative: a text, or one per prompt.
    size: pixels, or (height, width); None is the model's.  noise: standard normal [B h w c] in place of the seeds'.
    eta: fresh noise of samplers that take it.  skip: the text encoder's last layers left out ("clip skip 2" is 1).
    rescale: of guidance, 0 to 1.  progress: a bar over the steps.
    Raises ValueError for an unknown sampler or schedule, counts that differ, and a size that the model cannot make.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    seeds = range(len(prompts)) if seeds is None else [seeds] if isinstance(seeds, int) else list(seeds)
    negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
    if not prompts or not len(prompts) == len(seeds) == len(negatives):
        raise ValueError(
            f"{len(prompts)} prompts, {len(seeds)} seeds, {len(negatives)} negative prompts: expected as many"
        )
    shape = latent_shape(sd, size)
    if noise is not None and noise.shape != (len(prompts), *shape):
        raise ValueError(f"noise {tuple(noise.shape)}: expected {(len(prompts), *shape)}")
    keys = jax.vmap(jax.random.key)(np.array([seed % (1 << 32) for seed in seeds], np.uint32))
    plan = samplers.tabulate(sd.schedule, sampler, steps, schedule, eta)
    ids = sd.tokenize(prompts)
    unwanted = sd.tokenize(negatives) if guidance != 1 else None
    values = {"guidance": np.float32(guidance), "rescale": np.float32(rescale)}
    with _bar(int(plan.rows), progress) as tick:
        z = _sample(sd, ids, unwanted, noise, keys, plan, values, shape=shape, skip=skip, tick=tick)
        z.block_until_ready()
    return decode(sd, z)


def latent_shape(sd, size=None):
    """Returns (h, w, c) of the latents of pictures of `size` pixels, (height, width), or the model's size.

    Raises ValueError for a side that is not a positive multiple of what the model halves it to.
    """
    config = sd.networks.unet.config
    if size is None:
        sides = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else tuple(config.sample_size)
        return (*sides, sd.networks.vae.config.latent_channels)
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < sd.factor or height % sd.factor or width % sd.factor:
        raise ValueError(f"size={size!r}: sides must be positive multiples of {sd.factor}")
    return height // sd.factor, width // sd.factor, sd.networks.vae.config.latent_channels


def decode(sd, z):
    """Returns pictures uint8 [B H W 3] of scaled latents [B h w c]; large ones one after the other, to save memory."""
    rows = max(1, DECODE_AT_ONCE // (z.shape[1] * z.shape[2] * sd.factor**2))
    return np.concatenate([to_pictures(_decode(sd, z[i : i + rows])) for i in range(0, len(z), rows)])


@jax.jit
def _decode(sd, z):
    return sd.decode(z)


@functools.partial(jax.jit, static_argnames=("shape", "skip", "tick"))
def _sample(sd, ids, unwanted, noise, keys, plan, values, *, shape, skip, tick):
    start, fresh = jax.vmap(lambda key: tuple(jax.random.split(key)))(keys)
    if noise is None:
        noise = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(start)
    if unwanted is not None:
        sd = sd.add(wrappers=Guidance(values["guidance"], sd.condition(unwanted, skip), values["rescale"]))
    cond = sd.condition(ids, skip)

    def denoise(z, t, i):
        if tick is not None:
            jax.debug.callback(tick)
        return sd.denoise(z, t, cond, i)[0]

    return samplers.sample(denoise, noise, plan, fresh)


class _bar:
    """A progress bar as a context; yields what each evaluation of the network calls, None without a bar."""

    current = None

    def __init__(self, total, wanted):
        self.total, self.wanted = total, wanted

    def __enter__(self):
        if not self.wanted:
            return None
        _bar.current = tqdm(total=self.total, desc="sampling", unit="step", dynamic_ncols=True)
        return _tick

    def __exit__(self, *_):
        if self.wanted:
            _bar.current.close()
            _bar.current = None


def _tick():
    if _bar.current is not None:
        _bar.current.update()
