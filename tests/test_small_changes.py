"""Changes of a thousandth of the weights act as in float32: weights of bfloat16, and networks that compute in it.

Effect: what a change moves in the UNet's output, as a share of what it moves in float32, e . r / r . r.  Slope: by how
much the effect grows with the strength around 1, which steps of rounding would make 0 or several.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_laws import model, noised

from sdjax import trees
from sdjax.methods import edits, offsets
from sdjax.methods.e4t import E4T
from sdjax.methods.lora import Lora

SIZE, STRENGTHS = 1e-3, (1.0, 0.95, 1.05)
LORA = Lora(2, targets=r"^unet\..*attn[12]\.to_[qkv]$")  # the layers of E4T's offsets


@functools.cache
def rough():
    """Returns the model with weights that are numbers of bfloat16, and noise in all."""
    sd = model()
    return sd.with_parts(unet=trees.cast(noised(sd.parts["unet"], 0.1), jnp.bfloat16))


@functools.cache
def inputs():
    random = np.random.default_rng(1)
    z, t = random.standard_normal((16, 16, 16, 4), np.float32), np.linspace(5, 990, 16, dtype=np.float32)
    return z, t, rough().tokenize(["a photo of a face", "a cat in the snow"] * 8)


@jax.jit
def predict(sd, ids):
    z, t, _ = inputs()
    return sd.denoise(z, t, sd.condition(ids))[0].astype(jnp.float32)


def output(sd):
    return np.asarray(predict(sd.bare, inputs()[2]), np.float64)


@functools.cache
def factors():
    """Returns LoRA's trained tree, every change of the size SIZE times the weight's."""
    trained = noised(LORA.split(rough(), jax.random.key(0))[0], 0.1)
    weights = trees.flatten(rough().parts["unet"])

    def fit(module, f):
        size = jnp.linalg.norm(f["up"] @ f["down"])
        return {**f, "up": f["up"] * SIZE * jnp.linalg.norm(weights[f"{module}.kernel"].astype(jnp.float32)) / size}

    return {part: {module: fit(module, f) for module, f in modules.items()} for part, modules in trained.items()}


def lora_hook(sd, strength):
    sd = LORA.join(sd, factors())
    return sd.replace(hooks=(sd.hooks[-1].replace(strength=strength),))


def lora_file(sd, strength):
    """The change as a file's, in the weights."""
    changes = LORA.adapter(rough(), factors()).edits["unet"]
    stacks = {name: ((edit, strength),) for name, edit in changes.items()}
    return sd.with_parts(unet=edits.merge(sd.parts["unet"], stacks, sd.networks["unet"].dtype))


@functools.cache
def generators():
    """Returns E4T's offsets, each of the size SIZE at strength 1, to which its last layer is proportional."""
    trained = noised(offsets.create(rough().parts["unet"], jax.random.key(0)), 0.1)
    sizes = {
        shape: SIZE / jnp.sqrt(jnp.mean(jax.vmap(offsets.offset)(g) ** 2, (1, 2))) for shape, g in trained.items()
    }
    return {shape: scaled(g, sizes[shape]) for shape, g in trained.items()}


def scaled(generator, sizes):
    row = {name: x * sizes.reshape(-1, *(1,) * (x.ndim - 1)) for name, x in generator["linear_row"].items()}
    return {**generator, "linear_row": row}


def e4t(sd, strength):
    trained = {shape: scaled(g, jnp.float32(strength)[None]) for shape, g in generators().items()}
    method = E4T()
    start, frozen = method.split(sd, jax.random.key(0))
    return method.join(frozen, {**start, "offsets": trained}).replace(conditioners=())


WAYS = {"lora": lora_hook, "lora in weights": lora_file, "e4t": e4t}


@functools.cache
def reference(way):
    """Returns (float32's output without the change, what the change moves)."""
    sd = rough()
    sd = sd.with_parts(unet=trees.cast(sd.parts["unet"], jnp.float32))
    before = output(sd)
    return before, output(WAYS["lora in weights" if way == "lora" else way](sd, 1.0)) - before


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", WAYS)
def test_effect_and_slope_are_those_of_float32(way, compute):
    """Within 5 %; every change of 0.1 % is below half a step of bfloat16, 0.2 to 0.4 %."""
    before, wanted = reference(way)
    sd = rough().with_dtype(compute)
    before = before if compute == "float32" else output(sd)
    one, less, more = (output(WAYS[way](sd, s)) - before for s in STRENGTHS)
    effect, slope = (float((e * wanted).sum() / (wanted**2).sum()) for e in (one, (more - less) / 0.1))
    assert np.abs(wanted).max() > 0
    print(f"{way}, {compute}: effect {effect:.4f}, slope {slope:.4f}")
    assert effect == pytest.approx(1, abs=0.05) and slope == pytest.approx(1, abs=0.05)
