"""Hooks meet the core of every attention, see the step's cond, and pass gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

import sdjax
from sdjax.diffusion.wrappers import Guidance


class Replaced(struct.PyTreeNode):
    """Puts `gain` times the mean of v in the place of what attention gives."""

    gain: object
    part: str = struct.field(pytree_node=False, default="unet")
    seen: list = struct.field(pytree_node=False, default_factory=list)

    def intercept(self, part, layer, args, kwargs, at, cond):
        if part != self.part or at.method_name != "attend":
            return layer(*args, **kwargs)
        q, k, v, *_ = args
        self.seen.append(("/".join(at.module.path), q.shape, k.shape, v.shape))
        out = layer(*args, **kwargs)
        assert out.shape == q.shape and out.dtype == q.dtype
        return jnp.broadcast_to(self.gain * v.mean(1, keepdims=True), q.shape)


class Tinted(struct.PyTreeNode):
    """Adds `gain` times cond.own["tint"] [B] to what attention to the text gives."""

    gain: object

    def intercept(self, part, layer, args, kwargs, at, cond):
        out = layer(*args, **kwargs)
        if part != "unet":
            assert cond is None
        elif at.method_name == "attend" and at.module.name == "attn2":
            out = out + self.gain * cond.own["tint"][:, None, None, None]
        return out


@pytest.fixture(scope="module")
def sd():
    return sdjax.load("random:tiny")


def inputs(sd, rows=2):
    z = np.random.default_rng(0).standard_normal((rows, 8, 8, 4), np.float32)
    return jnp.asarray(z), jnp.full(rows, 500), sd.condition(sd.tokenize(["a cat"] * rows))


@pytest.mark.parametrize("remat", [False, True])
def test_a_hook_replaces_the_core_of_attention_and_learns(sd, remat):
    sd = sd.with_dtype("float32", remat=remat)
    z, t, cond = inputs(sd)

    seen = []

    def loss(gain, sd):
        return jnp.square(sd.add(hooks=Replaced(gain, seen=seen)).denoise(z, t, cond)[0]).mean()

    learn = jax.jit(jax.value_and_grad(loss))
    value, grad = learn(1.0, sd)
    names = {name for name, *_ in seen}
    blocks = [name.removesuffix("/attn1") for name in names if name.endswith("/attn1")]
    assert blocks and names == {f"{block}/{one}" for block in blocks for one in ("attn1", "attn2")}
    heads = sd.networks["unet"].config.levels("attention_head_dim")
    assert all(len(q) == 4 and q[2] in heads and k == v for _, q, k, v in seen)
    step = (learn(1.01, sd)[0] - learn(0.99, sd)[0]) / 0.02
    assert abs(grad) > 1e-6 and np.isclose(grad, step, rtol=0.02)
    plain = jax.jit(lambda sd: jnp.square(sd.denoise(z, t, cond)[0]).mean())(sd)
    assert not np.isclose(value, plain, rtol=1e-3)


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_every_part_has_a_core_of_attention(sd, part):
    hook = Replaced(0.5, part)
    changed = sd.add(hooks=hook)
    if part == "vae":
        one, other = (x.decode(inputs(sd)[0]) for x in (sd, changed))
    else:
        one, other = (x.condition(sd.tokenize(["a cat"])).unet.context for x in (sd, changed))
    assert hook.seen and not np.allclose(one, other, atol=1e-3)


def test_a_hook_reads_cond_and_learns(sd):
    z, t, cond = inputs(sd)

    @jax.jit
    def predict(gain, tint, sd):
        return sd.add(hooks=Tinted(gain)).denoise(z, t, cond.with_own(tint=tint))[0]

    one = jnp.array([0.0, 1.0])
    plain, same, tinted = predict(0.0, jnp.ones(2), sd), predict(1.0, jnp.zeros(2), sd), predict(1.0, one, sd)
    np.testing.assert_allclose(same, plain, atol=1e-6)
    np.testing.assert_allclose(tinted[0], plain[0], atol=1e-5)  # each row its own
    assert np.abs(tinted[1] - plain[1]).max() > 1e-3
    grads = jax.jit(jax.grad(lambda *given: jnp.square(predict(*given)).sum(), (0, 1)))(1.0, one, sd)
    assert abs(grads[0]) > 1e-4 and np.abs(grads[1]).min() > 1e-4


def test_with_guidance_cond_has_the_rows_of_the_call(sd):
    z, t, cond = inputs(sd)
    none = sd.condition(sd.tokenize([""] * 2)).with_own(tint=jnp.zeros(2))
    tinted, cond = sd.add(hooks=Tinted(1.0)), cond.with_own(tint=jnp.ones(2))
    guided = tinted.add(wrappers=Guidance(scale=1.0, negative=none))
    found, wanted = (jax.jit(lambda one: one.denoise(z, t, cond)[0])(one) for one in (guided, tinted))
    np.testing.assert_allclose(found, wanted, atol=1e-5)
