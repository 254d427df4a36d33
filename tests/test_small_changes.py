"""Changes of a thousandth of the weights act as in float32: weights of bfloat16, and networks that compute in it.

Effect: what a change moves in the UNet's output, as a share of what it moves in float32, e . r / r . r.  Slope: by how
much the effect grows with the strength around 1, which steps of rounding would make 0 or several.

A whole network of bfloat16 rounds by ten times such an effect, so that only the mean over many pictures shows it; and
over many prompts, whose keys and values are rounded alike for all pictures, and many files, whose sums with the weights
are.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_laws import model, noised

from sdjax import trees
from sdjax.methods import branches, edits, offsets
from sdjax.methods.branches import Branches
from sdjax.methods.e4t import E4T
from sdjax.methods.lora import Lora
from sdjax.models import hooks
from sdjax.models.layers import Dense

SIZE, STRENGTHS = 1e-3, (1.0, 0.95, 1.05)
WIDE = np.array([0.0, 0.5, 1.0, 1.5, 2.0])  # strengths of the whole network
BATCHES, FILES, ROWS = 256, 1100, 16  # there: batches, batches with a file each, pictures in one
LORA = Lora(2, targets=r"^unet\..*attn[12]\.to_[qkv]$")  # the layers of E4T's offsets


@functools.cache
def rough():
    """Returns the model with weights that are numbers of bfloat16, and noise in all."""
    sd = model()
    return sd.with_parts(unet=trees.cast(noised(sd.parts["unet"], 0.1), jnp.bfloat16))


@functools.cache
def inputs():
    random = np.random.default_rng(1)
    z, t = random.standard_normal((2, 16, 16, 4), np.float32), np.array([5, 700], np.float32)
    return z, t, rough().tokenize(["a photo of a face", "a cat in the snow"])


@jax.jit
def predict(sd, ids):
    z, t, _ = inputs()
    return sd.denoise(z, t, sd.condition(ids))[0].astype(jnp.float32)


def output(sd):
    return np.asarray(predict(sd.bare, inputs()[2]), np.float64)


@functools.cache
def factors(file=0):
    """Returns LoRA's trained tree, every change of the size SIZE times the weight's; another one for another file."""
    random = np.random.default_rng(file)
    shapes = LORA.split(rough(), jax.random.key(0))[0]
    trained = jax.tree.map(lambda x: random.standard_normal(x.shape, np.float32), shapes)
    weights = trees.flatten(rough().parts["unet"])

    def fit(module, f):
        size = jnp.linalg.norm(f["up"] @ f["down"])
        return {**f, "up": f["up"] * SIZE * jnp.linalg.norm(weights[f"{module}.kernel"].astype(jnp.float32)) / size}

    return {part: {module: fit(module, f) for module, f in modules.items()} for part, modules in trained.items()}


def lora_hook(sd, strength, file=0):
    sd = LORA.join(sd, factors(file))
    return sd.replace(hooks=(sd.hooks[-1].replace(strength=strength),))


def lora_file(sd, strength, file=0):
    """The change as a file's, in the weights."""
    changes = LORA.adapter(rough(), factors(file)).edits["unet"]
    stacks = {name: ((edit, strength),) for name, edit in changes.items()}
    return sd.with_parts(unet=edits.merge(sd.parts["unet"], stacks, sd.networks["unet"].dtype))


@functools.cache
def generators():
    """Returns E4T's offsets, each of the size SIZE at strength 1, to which its last layer is proportional."""
    trained = noised(offsets.create(rough().parts["unet"], jax.random.key(0)), 0.1)
    sizes = {shape: SIZE / jnp.sqrt(jnp.mean(jax.vmap(offsets.offset)(g) ** 2, (1, 2))) for shape, g in trained.items()}
    return {shape: scaled(g, sizes[shape]) for shape, g in trained.items()}


def scaled(generator, sizes):
    row = {name: x * sizes.reshape(-1, *(1,) * (x.ndim - 1)) for name, x in generator["linear_row"].items()}
    return {**generator, "linear_row": row}


def e4t(sd, strength, file=0):
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


def test_offsets_beside_layers_become_the_weights_of_float32():
    """What a file for other programs holds is the same, whatever the networks compute in."""
    sd = rough()
    merged = branches.merged(e4t(sd.with_dtype("bfloat16"), 1.0))
    assert not merged.hooks
    one, other = (trees.flatten(made.parts["unet"]) for made in (merged, e4t(sd, 1.0)))
    assert len(one) == len(other)
    for name, x in one.items():
        assert x.dtype == other[name].dtype
        np.testing.assert_allclose(np.float32(x), np.float32(other[name]), rtol=1e-6)


def shares(wanted, before, one, less, more):
    """Returns (effect, slope)."""
    moved = (one - before, (more - less) / (STRENGTHS[2] - STRENGTHS[1]))
    return [float((x * wanted).sum() / (wanted**2).sum()) for x in moved]


@pytest.mark.parametrize("way", WAYS)
def test_weights_of_bfloat16_lose_nothing_where_the_network_computes_in_float32(way):
    """Every change, 0.1 %, is below half a step of bfloat16, 0.2 to 0.4 %."""
    before, wanted = reference(way)
    assert shares(wanted, before, *(output(WAYS[way](rough(), s)) for s in STRENGTHS)) == pytest.approx(
        [1, 1], abs=0.01
    )


@functools.cache
def layer():
    """Returns (a linear layer's weights that are numbers of bfloat16, inputs, a change [in out] of rank 2)."""
    random = np.random.default_rng(0)
    weight, x = (random.standard_normal(shape, np.float32) for shape in ((512, 512), (2048, 512)))
    up, down = random.standard_normal((512, 2), np.float32), random.standard_normal((2, 512), np.float32)
    down *= SIZE * np.linalg.norm(weight) / np.linalg.norm(up @ down)
    rounded = jnp.asarray(weight, jnp.bfloat16)
    return rounded, jnp.asarray(x), {"up": up, "down": down, "scale": np.float32(1)}


def by_hook(strength, kind):
    weight, x, f = layer()
    if kind == "e4t":
        f = {"relative": f["up"] @ f["down"]}
    made = (Branches({"unet": {"": f}}, strength=strength),)
    return hooks.apply("unet", Dense(512, False, jnp.bfloat16), {"kernel": weight}, made, x)


def in_weights(strength, _):
    weight, x, f = layer()
    merged = edits.merge({"kernel": weight}, {"kernel": ((edits.Factored(f), strength),)}, jnp.bfloat16)
    return Dense(512, False, jnp.bfloat16).apply({"params": merged}, x)


@pytest.mark.parametrize("way", WAYS)
def test_layers_that_compute_in_bfloat16_move_by_what_float32_moves(way):
    """One layer, a million outputs: in a whole network the noise of rounding is ten times such an effect."""
    weight, x, f = layer()
    change = f["up"] @ f["down"]  # in a file's axes
    change = np.asarray(weight, np.float32) * change.T if way == "e4t" else change.T
    run = in_weights if way == "lora in weights" else by_hook
    made = [np.asarray(run(s, way), np.float64) for s in (0.0, *STRENGTHS)]
    wanted = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) @ change
    assert shares(wanted, *made) == pytest.approx([1, 1], abs=0.05)


@jax.jit
def seen(sd, z, t, ids):
    return sd.denoise(z, t, sd.condition(ids))[0].astype(jnp.float32)


def outputs(sd, z, t, number):
    """Returns what a network says to random words."""
    ids = np.array(rough().tokenize(["a photo of a face"] * ROWS)["text_encoder"])
    ids[:, 1:-1] = np.random.default_rng(number).integers(1, ids.max() - 1, (ROWS, ids.shape[1] - 2))
    return np.asarray(seen(sd, z, t, {"text_encoder": ids}), np.float64)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_whole_network_of_bfloat16_moves_by_what_float32_moves(way):
    """Thousands of pictures and five strengths from 0 to 2; the errors of the means are a part of what is asked."""
    sd, found, count = rough(), [], FILES if way == "lora in weights" else BATCHES
    exact = sd.with_parts(unet=trees.cast(sd.parts["unet"], jnp.float32))
    for number in range(count):
        random, file = np.random.default_rng(number), number if way == "lora in weights" else 0
        pair = [WAYS["lora in weights" if way == "lora" else way](exact, s, file).bare for s in (0.0, 1.0)]
        made = [WAYS[way](sd.with_dtype("bfloat16"), float(s), file).bare for s in WIDE]
        given = random.standard_normal((ROWS, 16, 16, 4), np.float32), random.uniform(0, 999, ROWS).astype(np.float32)
        before, after = (outputs(one, *given, number) for one in pair)
        wanted = after - before
        along = [(outputs(one, *given, number) * wanted).sum() for one in made]
        found.append([*along, (wanted**2).sum()])
    *along, _ = np.array(found).T / np.mean(found, 0)[-1]  # [strengths] [batches]
    about = WIDE - WIDE.mean()
    for values in (along[2] - along[0], about @ np.array(along) / (about @ about)):  # effect, slope
        mean, error = values.mean(), values.std(ddof=1) / count**0.5
        print(f"{way}: {mean:.4f} +- {error:.4f}")
        assert error < 0.02 and mean == pytest.approx(1, abs=0.05)


def test_rounding_by_chance_keeps_numbers_of_the_type():
    weight, *_ = layer()
    wide = weight.astype(jnp.float32)
    for dtype in (jnp.bfloat16, jnp.float16):
        kept = wide.astype(dtype)
        assert np.array_equal(edits.dithered(kept.astype(jnp.float32), dtype), kept)
    near = edits.dithered(wide * 1.001, jnp.bfloat16).astype(jnp.float32)
    assert float(((near - wide) * wide).sum() / (wide * wide).sum()) == pytest.approx(1e-3, rel=0.02)
    assert float(jnp.max(jnp.abs(near / wide - 1.001))) < 2**-7


@pytest.mark.parametrize("number", range(3))
def test_rounding_by_chance_gives_small_layers_the_whole_change_on_average(number):
    """Over many files, in each layer: the chances of a layer must not be those of all files."""
    random = np.random.default_rng(number)
    weight = jnp.asarray(random.standard_normal((32, 32), np.float32), jnp.bfloat16).astype(jnp.float32)
    up, down = random.standard_normal((1000, 32, 2), np.float32), random.standard_normal((1000, 2, 32), np.float32)
    changes = up @ down
    changes *= SIZE * np.linalg.norm(weight) / np.linalg.norm(changes, axis=(1, 2), keepdims=True)
    rounded = jax.vmap(lambda change: edits.dithered(weight + change, jnp.bfloat16))(jnp.asarray(changes))
    moved = np.asarray(rounded, np.float32) - np.asarray(weight)
    assert (moved * changes).sum() / (changes**2).sum() == pytest.approx(1, abs=0.012)
