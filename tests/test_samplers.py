"""Every sampler over 20 steps against its diffusers scheduler, or k-diffusion's formula in float64 where that has none.

The denoiser is a small nonlinear function of latent and time, the same in jax, torch and numpy; noise is the same too.
"""

import importlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.diffusion.samplers import sample, tabulate
from sdjax.diffusion.schedule import Schedule

SD15 = {  # scheduler/scheduler_config.json of Stable Diffusion 1.5
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "trained_betas": None, "clip_sample": False,
}  # fmt: skip
COUNTERPARTS = {  # sampler: module of diffusers.schedulers, class, options
    "ddim": ("ddim", "DDIMScheduler", {}),
    "ddpm": ("ddpm", "DDPMScheduler", {}),
    "pndm": ("pndm", "PNDMScheduler", {}),
    "euler": ("euler_discrete", "EulerDiscreteScheduler", {}),
    "euler_a": ("euler_ancestral_discrete", "EulerAncestralDiscreteScheduler", {}),
    "heun": ("heun_discrete", "HeunDiscreteScheduler", {}),
    "lms": ("lms_discrete", "LMSDiscreteScheduler", {}),
    "dpm2": ("k_dpm_2_discrete", "KDPM2DiscreteScheduler", {}),
    "dpm2_a": ("k_dpm_2_ancestral_discrete", "KDPM2AncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("dpmsolver_multistep", "DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_sde": ("dpmsolver_multistep", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_sde": ("dpmsolver_sde", "DPMSolverSDEScheduler", {}),
    "unipc": ("unipc_multistep", "UniPCMultistepScheduler", {}),
    "deis": ("deis_multistep", "DEISMultistepScheduler", {}),
    "lcm": ("lcm", "LCMScheduler", {}),
    "tcd": ("tcd", "TCDScheduler", {}),
}
HAVE_KARRAS = ("euler", "heun", "lms", "dpm2", "dpm2_a", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_sde", "unipc", "deis")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # diffusers' own
SHAPE = (2, 8, 8, 4)
_draw = np.random.default_rng(0)
MIX = _draw.normal(size=(4, 4)) / 2
NOISE, LATENT = _draw.normal(size=(2, *SHAPE)).astype(np.float32)
STEP_NOISE = _draw.normal(size=(64, *SHAPE)).astype(np.float32)


def predict(z, t, xp):
    """A prediction [B h w c] that depends on the latent, its neighbours and the time, with slopes of order 1."""
    mix = xp.asarray(MIX.astype(np.float32)) if xp is not np else MIX
    return xp.tanh(z @ mix + 0.3 * xp.roll(z, 1, 1) + t / 500 - 1) + 0.5 * z


@jax.jit
def ours(plan, noise, step_noise, z=None):
    def denoise(z, t, i):
        return predict(z, t[:, None, None, None], jnp)

    return sample(denoise, noise, plan, step_noise=step_noise, z=z)


def theirs(monkeypatch, sampler, config, steps, start=0, z=None, eta=None):
    """Returns the latent of a diffusers scheduler made by from_config, and the class."""
    import torch

    file, name, options = COUNTERPARTS[sampler]
    if sampler == "dpmpp_sde":
        monkeypatch.setitem(
            sys.modules, "torchsde", types.ModuleType("torchsde")
        )  # only its Brownian tree, replaced below
    module = importlib.import_module(f"diffusers.schedulers.scheduling_{file}")
    scheduler = getattr(module, name).from_config({**config, **options})
    draws = iter(STEP_NOISE)
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: torch.from_numpy(next(draws)), raising=False)
    monkeypatch.setattr(module, "BrownianTreeNoiseSampler", Brownian, raising=False)
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps[start * scheduler.order :]
    x = torch.from_numpy(NOISE)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start * scheduler.order)
    x = x * scheduler.init_noise_sigma if z is None else scheduler.add_noise(torch.from_numpy(z), x, times[:1])
    for t in times:
        seen = scheduler.scale_model_input(x, t)
        prediction = predict(seen, t, Torch(torch))
        options = {} if eta is None else {"eta": eta}
        x = scheduler.step(prediction.float(), t, x, **options).prev_sample
    return x.double().numpy()


class Torch:
    """The four functions that `predict` asks for, by torch."""

    def __init__(self, torch):
        self.asarray, self.tanh = torch.from_numpy, torch.tanh
        self.roll = lambda z, shift, axis: torch.roll(z, shift, axis)


class Brownian:
    """The increments of a Brownian motion that STEP_NOISE drives, two per step, for diffusers' SDE scheduler."""

    def __init__(self, *args):
        self.calls = 0

    def __call__(self, sigma, sigma_next):
        import torch

        step, second = divmod(self.calls, 2)
        self.calls += 1
        first_half, second_half = STEP_NOISE[2 * step : 2 * step + 2]
        if not second:
            self.middle = sigma_next
            return torch.from_numpy(first_half)
        share = ((sigma - self.middle) / (sigma - sigma_next)) ** 0.5
        return share * torch.from_numpy(first_half) + (1 - share**2) ** 0.5 * torch.from_numpy(second_half)


def distance(ours, theirs):
    """Returns the largest difference in units of the largest value."""
    return float(np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max())


def config(prediction="epsilon", **options):
    return {**SD15, "prediction_type": prediction, **options}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["normal", "karras"])
@pytest.mark.parametrize("sampler", COUNTERPARTS)
def test_equal_to_diffusers(sampler, spacing, prediction, monkeypatch):
    if spacing == "karras" and sampler not in HAVE_KARRAS:
        pytest.skip("its scheduler has no Karras sigmas")
    settings = config(prediction, use_karras_sigmas=True) if spacing == "karras" else config(prediction)
    plan = tabulate(Schedule.from_json(config(prediction)), sampler, 20, spacing)
    error = distance(ours(plan, NOISE, STEP_NOISE), theirs(monkeypatch, sampler, settings, 20))
    print(f"PARITY {sampler} {prediction} {spacing} {error:.2e}")
    assert error < 1e-4
