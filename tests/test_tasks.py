"""Tasks: a model made ready for one computes as before, learns by what the UNet reads beside the latent, samples so."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax import tasks, trees
from sdjax.formats import pipeline
from sdjax.methods.full import Full
from sdjax.tasks.inpainting import WHOLE, hole
from sdjax.training.settings import Train
from sdjax.training.step import default_loss

NAMES = ("inpainting", "upscaling")


@pytest.fixture(scope="module", params=NAMES)
def task(request):
    return tasks.of(pipeline.load("random:tiny"), request.param)


@pytest.fixture(scope="module")
def sd():
    return pipeline.load("random:tiny")


def rows(sd, count=3):
    random = np.random.default_rng(0)
    return {
        "pixels": jnp.asarray(random.uniform(-1, 1, (count, 32, 32, 3)), jnp.float32),
        "ids": sd.tokenize(["a face"] * count),
        "index": jnp.arange(count, dtype=jnp.int32),
    }


def test_a_widened_model_computes_as_before(task, sd):
    made, batch = task.prepare(sd, jax.random.key(0)), rows(sd)
    assert task.matches(made) and not task.matches(sd) and tasks.of(made).name == task.name
    z, t = jax.random.normal(jax.random.key(1), (3, 16, 16, 4)), jnp.array([10, 300, 900])
    cond = sd.condition(batch["ids"])
    before, _ = sd.denoise(z, t, cond)
    more = task.inputs(made, batch, jax.random.key(2))
    after, _ = made.denoise(z, t, more.over(cond))
    np.testing.assert_allclose(before, after, atol=2e-5 * float(jnp.abs(before).max()))


def test_training_reaches_what_the_task_adds(task, sd):
    """On the first step already, though the new weights are zero."""
    made = task.prepare(sd, jax.random.key(0))
    part = Full(("unet",), r"^(conv_in\.kernel|class_embedding)")
    trained, frozen = part.split(made)
    loss = default_loss(part, Train(method=part), task)
    batch = rows(made)
    grads = jax.jit(jax.grad(lambda tree, frozen: loss(frozen, tree, batch, jax.random.key(3), 0)[0]))(trained, frozen)
    kernel = trees.flatten(grads["unet"])["conv_in.kernel"]
    assert all(float(jnp.abs(kernel[:, :, i]).max()) > 0 for i in range(kernel.shape[2]))
    if task.name == "upscaling":
        moved = np.abs(trees.flatten(grads["unet"])["class_embedding.embedding"]).max(1) > 0
        assert moved.sum() == 3 and not moved[350:].any()  # a level for each row, below 350


def test_what_a_row_sees_does_not_depend_on_its_batch(task, sd):
    made, batch = task.prepare(sd, jax.random.key(0)), rows(sd)
    whole = task.inputs(made, batch, jax.random.key(2))
    alone = task.inputs(made, jax.tree.map(lambda x: x[1:2], batch), jax.random.key(2))
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(one[1:2], other, atol=1e-5)


def test_inpainting_sees_the_mask_and_the_picture_around_it(sd):
    made = tasks.of(sd, "inpainting").prepare(sd, jax.random.key(0))
    batch = rows(made)
    extra = tasks.of(made).inputs(made, batch, jax.random.key(2)).unet.channels
    assert extra.shape == (3, 16, 16, 5) and set(np.unique(extra[..., 0])) <= {0.0, 1.0}
    hidden = np.kron(extra[..., 0], np.ones((1, 2, 2)))[..., None]
    seen = made.encode(jnp.where(hidden == 1, 0.0, batch["pixels"]))
    assert float(jnp.abs(seen - extra[..., 1:]).mean()) < float(
        jnp.abs(made.encode(batch["pixels"]) - extra[..., 1:]).mean()
    )


def test_holes_are_of_all_kinds_and_sizes_and_a_quarter_is_whole():
    draw = jax.jit(lambda key: jax.vmap(lambda k: hole(k, (24, 32)))(jax.random.split(key, 800)))
    holes = np.asarray(draw(jax.random.key(0)))
    share = holes.mean((1, 2))
    assert holes.shape == (800, 24, 32) and abs((share == 1).mean() - WHOLE) < 0.05
    assert np.quantile(share, 0.15) < 0.15 and 0.15 < np.median(share[share < 1]) < 0.45
    framed = (holes[:, 0].all(1) | holes[:, -1].all(1) | holes[:, :, 0].all(1) | holes[:, :, -1].all(1)) & (share < 1)
    assert 0.1 < framed.mean() < 0.35  # all but a part: a side of the picture is missing
    rows, columns = holes.any(2).sum(1), holes.any(1).sum(1)
    filled = holes.sum((1, 2)) / np.maximum(rows * columns, 1)
    assert 0.1 < ((filled == 1) & (share < 1)).mean() < 0.3  # rectangles
    assert 0.05 < ((filled < 0.7) & (share > 0)).mean() < 0.4  # strokes
    again = np.asarray(hole(jax.random.split(jax.random.key(0), 800)[5], (24, 32)))
    np.testing.assert_array_equal(again, holes[5])


def test_a_task_that_a_model_cannot_learn_is_refused(sd):
    ready = {name: tasks.of(sd, name).prepare(sd, jax.random.key(0)) for name in NAMES}
    for model, other in ((ready["inpainting"], "upscaling"), (ready["upscaling"], "inpainting")):
        with pytest.raises(ValueError, match=f"task='{other}': expected a task of the model, whose UNet reads"):
            tasks.of(model, other).prepare(model, jax.random.key(0))
    with pytest.raises(ValueError, match="task='text2img': expected the task of the model"):
        tasks.of(ready["inpainting"], "text2img").prepare(ready["inpainting"], jax.random.key(0))
    again = tasks.of(ready["inpainting"]).prepare(ready["inpainting"], jax.random.key(1))
    assert trees.digest(again.parts["unet"]) == trees.digest(ready["inpainting"].parts["unet"])


def test_output_preservation_pulls_back_to_what_the_model_said(sd):
    """Nothing at the start; after a change, towards the weights from before."""
    part = Full(("unet",), r"^conv_in\.kernel$", keep=True)
    trained, frozen = part.split(sd)
    plain, kept = (default_loss(part, Train(method=part, preserve=strength)) for strength in (0.0, 2.0))
    value = jax.jit(
        lambda tree, frozen: [one(frozen, tree, rows(sd), jax.random.key(3), 0)[0] for one in (plain, kept)]
    )
    one, other = value(trained, frozen)
    assert float(other) == pytest.approx(float(one), rel=1e-6)
    one, other = value(jax.tree.map(lambda x: 1.3 * x, trained), frozen)
    assert float(other) > float(one) * 1.0001
    with pytest.raises(ValueError, match="preserve=1.0: expected 0, or a Full with keep=True"):
        from sdjax.training import checks

        checks.alone(Train(method=dataclasses.replace(part, keep=False), preserve=1.0))
