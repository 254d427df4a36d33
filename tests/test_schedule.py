"""Schedules against diffusers' tables, conversions against each other, wrappers against their formulas."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.diffusion import noise_schedule
from sdjax.diffusion.noise_schedule import Schedule
from sdjax.diffusion.wrappers import (
    Guidance,
    KnownRegion,
    Threshold,
    mask_channels,
    rescaled,
    thresholded,
)
from sdjax.models.cond import Cond, UNetInputs

SD15 = {  # scheduler/scheduler_config.json of Stable Diffusion 1.5
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "trained_betas": None, "clip_sample": False,
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [{}, {"beta_schedule": "linear"}, {"beta_schedule": "squaredcos_cap_v2"}, {"rescale_betas_zero_snr": True},
     {"trained_betas": [0.001] * 500 + [0.01] * 500}],
)  # fmt: skip
def test_alphas_cumprod_are_those_of_diffusers(change):
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler.from_config({**SD15, **change}).alphas_cumprod.numpy()
    ours = Schedule.from_json({**SD15, **change}).alphas_cumprod
    np.testing.assert_allclose(ours, theirs, rtol=3e-5, atol=1e-6)  # theirs is a product of 1000 float32 numbers
    assert not change.get("rescale_betas_zero_snr") or ours[-1] == 0


def test_json_round_trip_and_diffusers_reads_it():
    from diffusers import DDIMScheduler

    for schedule in (
        Schedule.from_json(SD15),
        Schedule(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"),
        Schedule(num_train_timesteps=3, trained_betas=(0.1, 0.2, 0.3)),
    ):
        assert Schedule.from_json(schedule.to_json()) == schedule
        theirs = DDIMScheduler.from_config(schedule.to_json())
        np.testing.assert_allclose(schedule.alphas_cumprod, theirs.alphas_cumprod.numpy(), rtol=3e-5, atol=1e-6)
        assert theirs.config.prediction_type == schedule.prediction_type and not theirs.config.clip_sample


@pytest.mark.parametrize(
    "change, words",
    [({"beta_start": float("nan")}, "beta_start=nan: expected a number above 0 and below 1"),
     ({"beta_end": 1.5}, "beta_end=1.5: expected"), ({"beta_start": "0.1"}, "beta_start='0.1': expected"),
     ({"trained_betas": [0.1] * 999 + [float("nan")]}, "trained_betas: value 999 is nan; expected"),
     ({"num_train_timesteps": 0}, "num_train_timesteps=0: expected a whole number from 1 to 100000"),
     ({"num_train_timesteps": 10.5}, "num_train_timesteps=10.5"), ({"steps_offset": -1}, "steps_offset=-1"),
     ({"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid'"), ({"prediction_type": "flow"}, "prediction_type='flow'"),
     ({"timestep_spacing": "odd"}, "timestep_spacing='odd'"), ({"thresholding": True}, "thresholding"),
     ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatch"), ({"trained_betas": [0.1]}, "trained_betas")],
)  # fmt: skip
def test_refuses_by_name(change, words):
    with pytest.raises(ValueError, match=words) as error:
        Schedule.from_json({**SD15, **change})
    assert "expected" in str(error.value)


@pytest.mark.parametrize("prediction", noise_schedule.PREDICTIONS)
@pytest.mark.parametrize("times", [[0, 500, 999], [0.0, 499.5, 998.25]])
def test_conversions_agree(prediction, times, key):
    schedule, t = Schedule(prediction_type=prediction), jnp.asarray(times)
    z, noise = jax.random.normal(key, (2, 3, 4, 4, 2))
    z_t, made = noise_schedule.add_noise(schedule, z, noise, t), noise_schedule.target(schedule, z, noise, t)
    np.testing.assert_allclose(noise_schedule.to_x0(schedule, made, z_t, t), z, atol=2e-5)
    np.testing.assert_allclose(noise_schedule.from_x0(schedule, z, z_t, t), made, atol=1e-4)


def test_targets_are_those_of_diffusers(key):
    import torch
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler.from_config(SD15)
    z, noise = np.asarray(jax.random.normal(key, (2, 3, 4, 4, 2)))
    t = np.array([1, 400, 999])
    as_torch = [torch.from_numpy(np.array(x)) for x in (z, noise, t)]
    noised = noise_schedule.add_noise(Schedule(), z, noise, t)
    np.testing.assert_allclose(noised, theirs.add_noise(*as_torch), atol=2e-5)
    ours = noise_schedule.target(Schedule(prediction_type="v_prediction"), z, noise, t)
    np.testing.assert_allclose(ours, theirs.get_velocity(*as_torch), atol=2e-5)


def test_fractional_times_meet_integer_ones():
    schedule, t = Schedule(rescale_betas_zero_snr=True), np.array([0, 1, 500, 998, 999])
    for exact, near in zip(
        noise_schedule.signal_noise(schedule, t),
        noise_schedule.signal_noise(schedule, t.astype(np.float32)),
        strict=True,
    ):
        np.testing.assert_allclose(near, exact, atol=2e-7)


# ---- wrappers ----


def predict(z, t, cond):
    """A stand-in for the network: reads the first channels of z, t and the context of each row."""
    return jnp.tanh(z[..., :2] * cond.unet.context.mean((1, 2))[:, None, None, None] + t[:, None, None, None] / 1000)


@pytest.fixture
def scene(key):
    z, context, empty = (jax.random.normal(k, s) for k, s in zip(
        jax.random.split(key, 3), [(3, 4, 4, 2), (3, 5, 6), (3, 5, 6)], strict=True))  # fmt: skip
    return z, jnp.array([900.0, 500.0, 10.0]), Cond(UNetInputs(context)), Cond(UNetInputs(empty))


def test_guidance_is_its_formula_and_does_not_recompile(scene):
    z, t, cond, negative = scene
    traces = []

    @jax.jit
    def guided(wrapper):
        traces.append(1)
        return wrapper(None, predict, z, t, cond)

    positive, uncond = predict(z, t, cond), predict(z, t, negative)
    for scale in (7.5, 3.0):
        np.testing.assert_allclose(guided(Guidance(scale, negative)), uncond + scale * (positive - uncond), atol=1e-5)
    assert len(traces) == 1
    per_image = guided(Guidance(jnp.array([1.0, 2.0, 3.0]), negative))
    np.testing.assert_allclose(per_image[1], uncond[1] + 2 * (positive[1] - uncond[1]), atol=1e-6)
    interval = guided(Guidance(7.5, negative, first=100.0, last=600.0))
    np.testing.assert_allclose(interval[0], positive[0], atol=1e-6)
    np.testing.assert_allclose(interval[1], (uncond + 7.5 * (positive - uncond))[1], atol=1e-5)


def test_guidance_rescale_is_that_of_diffusers(scene):
    import torch
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    z, t, cond, negative = scene
    positive, uncond = predict(z, t, cond), predict(z, t, negative)
    guided = uncond + 5 * (positive - uncond)
    theirs = rescale_noise_cfg(*(torch.from_numpy(np.array(x)) for x in (guided, positive)), 0.7)
    np.testing.assert_allclose(Guidance(5.0, negative, rescale=0.7)(None, predict, z, t, cond), theirs, atol=1e-5)
    assert jnp.all(jnp.isfinite(rescaled(jnp.zeros((1, 2)), jnp.ones((1, 2)), 0.0)))


@pytest.mark.parametrize("percentile, limit", [(0.9, 1.0), (0.995, 0.5), (1.0, 100.0)])
def test_threshold_is_that_of_diffusers(percentile, limit, key):
    """diffusers knows pictures in [-1, 1] only, so its numbers are scaled by the limit."""
    import torch
    from diffusers import DDIMScheduler

    options = {"thresholding": True, "dynamic_thresholding_ratio": percentile, "sample_max_value": 1e9}
    x0 = 2 * jax.random.normal(key, (3, 4, 4, 2))
    theirs = DDIMScheduler(**options)._threshold_sample(torch.from_numpy(np.array(x0 / limit).transpose(0, 3, 1, 2)))
    ours = thresholded(x0, jnp.float32(percentile), jnp.float32(limit))
    np.testing.assert_allclose(ours, limit * theirs.numpy().transpose(0, 2, 3, 1), atol=1e-5 * limit)
    assert bool(jnp.all(ours == x0)) == (limit == 100.0)


@pytest.mark.parametrize("prediction", noise_schedule.PREDICTIONS)
def test_threshold_acts_on_what_the_prediction_stands_for(prediction, scene):
    z, t, cond, _ = scene
    sd = types.SimpleNamespace(schedule=Schedule(prediction_type=prediction))
    out = Threshold(0.8, 0.5)(sd, predict, z, t, cond)
    x0 = noise_schedule.to_x0(sd.schedule, predict(z, t, cond), z, t)
    np.testing.assert_allclose(noise_schedule.to_x0(sd.schedule, out, z, t), thresholded(x0, 0.8, 0.5), atol=1e-4)
    assert float(jnp.abs(noise_schedule.to_x0(sd.schedule, out, z, t)).max()) < 0.501 < float(jnp.abs(x0).max())


def test_keys_of_one_side_serve_both(scene):
    z, t, cond, negative = scene
    rows = jnp.arange(3.0)
    seen = []

    def call(z, t, cond):
        seen.append(cond)
        return predict(z, t, cond)

    told = cond.with_unet(channels=rows[:, None, None, None] * jnp.ones((3, 4, 4, 5))).with_own(tint=rows)
    Guidance(2.0, negative.with_unet(labels=7 * jnp.ones(3, jnp.int32)))(None, call, z, t, told)
    np.testing.assert_array_equal(seen[0].unet.channels[:, 0, 0, 0], [0, 1, 2, 0, 1, 2])
    np.testing.assert_array_equal(seen[0].own["tint"], [0, 1, 2, 0, 1, 2])
    np.testing.assert_array_equal(seen[0].unet.labels, [7] * 6)


def test_mask_channels_order():
    channels = mask_channels(jnp.ones((1, 2, 2, 1)), jnp.zeros((1, 2, 2, 4)))
    np.testing.assert_array_equal(channels[0, 0, 0], [1, 0, 0, 0, 0])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_known_region(prediction, scene, key):
    z, t, cond, _ = scene
    sd = types.SimpleNamespace(schedule=Schedule(prediction_type=prediction))
    known, noise = jax.random.normal(jax.random.fold_in(key, 9), (2, *z.shape))
    mask = jnp.zeros((3, 4, 4, 1)).at[:, 1:3, 1:3].set(1.0)
    out = KnownRegion(mask, known, noise)(sd, predict, z, t, cond)
    x0 = noise_schedule.to_x0(sd.schedule, out, z, t)
    np.testing.assert_allclose(x0[:, 0], known[:, 0], atol=1e-4)
    np.testing.assert_allclose(out[:, 1:3, 1:3], predict(z, t, cond)[:, 1:3, 1:3], atol=1e-4)
    assert float(jnp.abs(x0[:, 1:3, 1:3] - known[:, 1:3, 1:3]).max()) > 0.1
