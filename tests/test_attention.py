"""Attention's ways against the exact one; which is taken where; what a program for another platform holds."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from sdjax.models.kernels import attention, attention_cudnn, attention_parts, attention_plain
from sdjax.models.unet import UNet, UNetConfig

SD15 = UNetConfig(sample_size=64, cross_attention_dim=768)
OURS = {"plain": attention_plain.attend, "parts": lambda *qkv: attention_parts.attend(*qkv, 96)}


def example(length, others, heads, width, spread=1.0):
    """Returns q, k, v of 2 rows in bfloat16, whose logits have the deviation `spread`."""
    random = np.random.default_rng([length, width])
    q, k, v = (random.standard_normal((2, n, heads, width), np.float32) for n in (length, others, others))
    return tuple(jnp.asarray(x, jnp.bfloat16) for x in (spread * q, k, v))


def exact(q, k, v):
    """Returns attention in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdims=True), v)


def error(found, wanted):
    return np.linalg.norm(np.asarray(found, np.float64) - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("way", OURS.values(), ids=OURS)
def test_both_ways_are_attention(way):
    q, k, v = (np.asarray(x, np.float32) for x in example(200, 77, 3, 40))
    np.testing.assert_allclose(way(q, k, v), exact(q, k, v), atol=2e-6)
    grads, wanted = (
        jax.grad(lambda *qkv, f=f: jnp.square(f(*qkv)).sum(), (0, 1, 2))(q, k, v)
        for f in (way, jax.nn.dot_product_attention)
    )
    for one, other in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("shape", [(512, 512, 8, 40), (256, 77, 8, 160)])
@pytest.mark.parametrize("spread", [1, 16])
def test_bfloat16_is_as_exact_as_jaxs_own(shape, spread):
    """Each operation by itself, as devices round that have bfloat16; a compiler for a CPU rounds less."""
    qkv = example(*shape, spread)
    errors = {name: error(way(*qkv), exact(*qkv)) for name, way in OURS.items()}
    assert max(errors.values()) <= error(jax.nn.dot_product_attention(*qkv), exact(*qkv)) <= 0.0025, errors


def test_bfloat16_gradients_multiply_bfloat16_not_float32():
    qkv = example(256, 256, 2, 40)
    text = lowered(jax.grad(lambda *qkv: attention.attend(*qkv).astype(jnp.float32).sum(), (0, 1, 2)), qkv, "cuda")
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 6 and all("lhs_precision_type = bf16" in line for line in products)


def lowered(function, shapes, platform):
    """Returns the program of a function for a platform that need not be here, as text."""
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()


def shapes(rows, length, others, heads, width, dtype=jnp.bfloat16):
    return tuple(jax.ShapeDtypeStruct((rows, n, heads, width), dtype) for n in (length, others, others))


@pytest.mark.parametrize(
    ("shape", "loops"),
    [
        ((2, 4096, 4096, 8, 40), {"cpu": 2, "cuda": 0, "tpu": 0}),
        ((2, 256, 256, 8, 160), {"cpu": 0, "cuda": 0, "tpu": 0}),
        ((4, 4096, 4096, 8, 40), {"cpu": 2, "cuda": 0, "tpu": 0}),  # SCORES_AT_ONCE to the byte
        ((5, 4096, 4096, 8, 40), {"cpu": 2, "cuda": 2, "tpu": 2}),  # above it
        ((16, 4096, 77, 8, 40), {"cpu": 2, "cuda": 0, "tpu": 0}),
    ],
)
def test_the_platform_that_is_lowered_for_says_whether_scores_are_made_in_parts(shape, loops):
    found = {name: lowered(attention.attend, shapes(*shape), name).count("stablehlo.while") for name in loops}
    assert found == loops


@pytest.fixture
def card(monkeypatch):
    """Returns a function that puts a card of a compute capability into this process."""

    def put(capability):
        monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(compute_capability=capability)])
        attention_cudnn.capability.cache_clear()

    yield put
    monkeypatch.undo()
    attention_cudnn.capability.cache_clear()


@pytest.mark.parametrize(
    ("capability", "widest"), [("9.0", 256), ("10.0", 256), ("8.0", 128), ("8.9", 128), ("7.5", 0), ("gfx942", 0)]
)
def test_cudnn_is_taken_where_the_card_has_a_kernel_for_the_head(card, capability, widest):
    card(capability)
    for width in (40, 64, 80, 128, 160, 256):
        q = jax.ShapeDtypeStruct((16, 4096, 8, width), jnp.bfloat16)
        for keys in (4096, 77):
            k = jax.ShapeDtypeStruct((16, keys, 8, width), jnp.bfloat16)
            assert (attention.way("cuda", q, k) is attention_cudnn.attend) == (width <= widest)
            assert attention.way("tpu", q, k) is not attention_cudnn.attend
    assert not attention_cudnn.takes(jnp.float32, 40)
    assert not attention_cudnn.takes(jnp.bfloat16, 42)
    assert attention_cudnn.takes(jnp.float16, 40) == (widest > 0)


def test_without_a_card_cudnn_is_not_even_traced():
    assert attention_cudnn.capability() is None
    q = jax.ShapeDtypeStruct((2, 4096, 8, 40), jnp.bfloat16)
    assert attention.way("cuda", q, q) is attention_plain.attend


def test_scores_of_one_device_decide_whether_they_are_computed_in_parts():
    """A batch of 256 chips is large, the rows of each are not."""
    q, k = (jax.ShapeDtypeStruct((4096, length, 8, 40), jnp.bfloat16) for length in (1024, 77))
    assert attention.way("", q, k) is attention.fitting
    for kind, wanted in ((AxisType.Auto, attention_plain.attend), (AxisType.Manual, attention.fitting)):
        with jax.sharding.use_abstract_mesh(AbstractMesh((16, 16), ("data", "fsdp"), axis_types=(kind,) * 2)):
            assert attention.way("", q, k) is wanted


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_unet_lowered_for_another_platform_holds_nothing_of_a_cpus(dtype):
    """Stable Diffusion 1.5's, in shape alone, two rows: no Winograd, no neighbourhoods, no loop; a shape's layers share
    a function."""
    unet = UNet(SD15, jnp.dtype(dtype))
    inputs = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 64, 64, 4), (2,), (2, 77, 768)))
    params = jax.eval_shape(unet.init, jax.random.key(0), *inputs)["params"]
    traced = jax.jit(lambda params, *inputs: unet.apply({"params": params}, *inputs)[0]).trace(params, *inputs)
    convolutions = sum(leaf.ndim == 4 and leaf.shape[:2] == (3, 3) for leaf in jax.tree.leaves(params))
    for platform in ("cuda", "tpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert "stablehlo.while" not in text
        assert "stablehlo.optimization_barrier" not in text  # Winograd's
        functions = re.findall(
            r"func\.func private @(\w+)\((?:(?!func\.func).)*?stablehlo\.convolution", text, re.DOTALL
        )
        calls = sum(len(re.findall(rf"call @{name}\(", text)) for name in functions)
        assert calls == convolutions == 52 and len(functions) == text.count("stablehlo.convolution") == 21


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4096, 8, 40), (1024, 8, 80), (256, 8, 160), (64, 8, 160), (257, 16, 80)])
@pytest.mark.parametrize("keys", [0, 77])
def test_cudnns_attention_is_the_plain_one(shape, keys):
    """Of Stable Diffusion 1.5's layers and of ViT-H, to itself and to 77 words, outputs and gradients."""
    length, heads, width = shape
    if not attention_cudnn.takes(jnp.bfloat16, width):
        pytest.skip(f"no CUDA device with a kernel for heads of {width}")
    qkv = example(length, keys or length, heads, width)

    def gradients(way):
        def loss(*qkv):
            out = way(*qkv)
            return jnp.square(out.astype(jnp.float32)).sum(), out

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))

    found, plain = gradients(attention.attend), gradients(attention_plain.attend)
    assert "fmha" in found.lower(*qkv).as_text()
    ((_, out), grads), ((_, wanted), others) = found(*qkv), plain(*qkv)
    assert error(out, exact(*qkv)) <= 0.005
    for one, other in zip((out, *grads), (wanted, *others), strict=True):
        assert error(one, np.asarray(other, np.float64)) <= 0.02
