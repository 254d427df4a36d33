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

from sdjax.diffusion import samplers, sigmas
from sdjax.diffusion.noise_schedule import Schedule
from sdjax.diffusion.plan import ROWS, fill, guided_times, sample, tabulate
from sdjax.diffusion.samplers import row

SAMPLERS = samplers.known()
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
TOLERANCE = 2e-5  # of the largest value; times that are not rounded as theirs are, or one wrong digit, cost 1e-4
SHAPE = (2, 8, 8, 4)
_draw = np.random.default_rng(0)
MIX = _draw.normal(size=(4, 4)) / 2
NOISE, LATENT = _draw.normal(size=(2, *SHAPE)).astype(np.float32)
STEP_NOISE = _draw.normal(size=(64, *SHAPE)).astype(np.float32)


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_a_sampler_says_of_fresh_noise(name):
    assert SAMPLERS[name].fresh == bool(tabulate(Schedule.from_json(SD15), name, 6).stochastic)


def predict(z, t, xp):
    """A prediction [B h w c] of the latent, its neighbours and the time; half a time step moves it by 0.02."""
    mix = xp.asarray(MIX.astype(np.float32)) if xp is not np else MIX
    return xp.tanh(z @ mix + 0.3 * xp.roll(z, 1, 1) + xp.sin(t / 20)) + 0.5 * z


@jax.jit
def ours(plan, noise, step_noise, z=None):
    def denoise(z, t, i):
        return predict(z, t[:, None, None, None], jnp)

    return sample(denoise, noise, plan, step_noise=step_noise, z=z)[0]


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
    if start and sampler == "pndm":  # the second level is looked at twice, not the one that happens to be there
        times = torch.cat([times[1:3], times[2:]])
    if start and sampler == "lms":  # no weights for slopes that were never computed
        scheduler.timesteps, scheduler.sigmas, start = times, scheduler.sigmas[start:], 0
    x = torch.from_numpy(NOISE)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start * scheduler.order)
    x = x * scheduler.init_noise_sigma if z is None else scheduler.add_noise(torch.from_numpy(z), x, times[:1])
    for t in times:
        seen = scheduler.scale_model_input(x, t)
        prediction = predict(seen, t.float(), Torch(torch))
        options = {} if eta is None else {"eta": eta}
        x = scheduler.step(prediction.float(), t, x, **options).prev_sample
    return x.double().numpy()


class Torch:
    """The functions that `predict` asks for, by torch."""

    def __init__(self, torch):
        self.asarray, self.tanh, self.sin = torch.from_numpy, torch.tanh, torch.sin
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
    assert error < TOLERANCE


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", ["euler", "heun", "lms"])
def test_exponential_is_that_of_diffusers(sampler, prediction, monkeypatch):
    plan = tabulate(Schedule.from_json(config(prediction)), sampler, 20, "exponential")
    settings = config(prediction, use_exponential_sigmas=True)
    assert distance(ours(plan, NOISE, STEP_NOISE), theirs(monkeypatch, sampler, settings, 20)) < TOLERANCE


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("sampler", sorted(set(COUNTERPARTS) - {"lcm", "tcd"}))
def test_the_spacing_of_the_file_is_that_of_diffusers(sampler, spacing, monkeypatch):
    if (sampler, spacing) == ("pndm", "linspace"):
        pytest.skip("diffusers' PNDM does not step to its own next time there")
    steps = 20 if sampler == "pndm" else {"leading": 7}.get(spacing, 30)  # its first step is off its times at 30
    settings = config("v_prediction", timestep_spacing=spacing)
    plan = tabulate(Schedule.from_json(settings), sampler, steps)
    assert distance(ours(plan, NOISE, STEP_NOISE), theirs(monkeypatch, sampler, settings, steps)) < TOLERANCE


@pytest.mark.parametrize(
    "sampler", ["ddim", "ddpm", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "lcm", "tcd"]
)
def test_zero_terminal_snr(sampler, monkeypatch):
    settings = config("v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    plan = tabulate(Schedule.from_json(settings), sampler, 20)
    error = distance(ours(plan, NOISE, STEP_NOISE), theirs(monkeypatch, sampler, settings, 20))
    print(f"ZERO {sampler} {error:.2e}")
    assert error < TOLERANCE


@pytest.mark.parametrize("sampler, eta", [("ddim", 0.5), ("ddim", 1.0), ("tcd", 0.0), ("tcd", 1.0)])
def test_eta(sampler, eta, monkeypatch):
    plan = tabulate(Schedule.from_json(SD15), sampler, 20, eta=eta)
    assert distance(ours(plan, NOISE, STEP_NOISE), theirs(monkeypatch, sampler, SD15, 20, eta=eta)) < TOLERANCE


@pytest.mark.parametrize("sampler", sorted(set(COUNTERPARTS) - {"lcm", "tcd"}))
def test_image_to_image(sampler, monkeypatch):
    """LCM and TCD of diffusers spread their steps over what is left, which we do not; see `theirs` for PNDM and LMS."""
    start = 8
    plan = tabulate(Schedule.from_json(SD15), sampler, 20, start=start)
    error = distance(ours(plan, NOISE, STEP_NOISE, LATENT), theirs(monkeypatch, sampler, SD15, 20, start, LATENT))
    print(f"IMG2IMG {sampler} {error:.2e}")
    assert error < TOLERANCE and plan.steps == 20 - start


# ---- k-diffusion's formulas, where diffusers lacks the sampler or the noise schedule ----


def kdiffusion(formula, schedule, levels):
    """Returns formula(denoised, x, sigmas) in float64, in k-diffusion's terms, at the levels of a scheduler."""
    from diffusers import EulerDiscreteScheduler

    euler = EulerDiscreteScheduler.from_config(SD15)
    logs = np.log(((1 - euler.alphas_cumprod) / euler.alphas_cumprod).numpy() ** 0.5)
    sigmas, times = np.asarray(levels.sigmas, np.float64), np.asarray(levels.timesteps, np.float64)
    known = dict(zip(sigmas, times, strict=False))

    def denoised(x, sigma):
        t = known.get(sigma, euler._sigma_to_t(np.array([sigma]), logs)[0])
        seen = x / np.hypot(1, sigma)
        prediction = predict(seen, t, np)
        if schedule.prediction_type == "epsilon":
            return x - sigma * prediction
        return (seen - sigma * prediction) / np.hypot(1, sigma)

    scale = sigmas[0] if isinstance(levels, EulerDiscreteScheduler) else np.hypot(1, sigmas[0])
    return formula(denoised, NOISE.astype(np.float64) * scale, sigmas)


def euler_ancestral(denoised, x, sigmas):
    for i, (here, there) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        up = there * np.sqrt(here**2 - there**2) / here
        down = np.sqrt(there**2 - up**2)
        x = x + (x - denoised(x, here)) / here * (down - here) + up * STEP_NOISE[i]
    return x


def dpmpp_2s_ancestral(denoised, x, sigmas):
    for i, (here, there) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        d = denoised(x, here)
        if there == 0:
            return d
        up = there * np.sqrt(here**2 - there**2) / here
        t, t_next = -np.log(here), -np.log(np.sqrt(there**2 - up**2))
        h = t_next - t
        middle = np.exp(-(t + h / 2))
        half = middle / here * x - np.expm1(-h / 2) * d
        x = np.exp(t - t_next) * x - np.expm1(-h) * denoised(half, middle) + up * STEP_NOISE[i]
    return x


def dpmpp_3m_sde(denoised, x, sigmas, eta=1.0):
    outputs, hs = [], []
    for i, (here, there) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        outputs.append(denoised(x, here))
        if there == 0:
            return outputs[-1]
        h = np.log(here / there)
        g = h * (1 + eta)
        x = np.exp(-g) * x - np.expm1(-g) * outputs[-1]
        phi_2 = np.expm1(-g) / g + 1
        if i == 1:
            x = x + phi_2 * (outputs[-1] - outputs[-2]) / (hs[-1] / h)
        elif i > 1:
            r0, r1 = hs[-1] / h, hs[-2] / h
            new, old = (outputs[-1] - outputs[-2]) / r0, (outputs[-2] - outputs[-3]) / r1
            first, second = new + (new - old) * r0 / (r0 + r1), (new - old) / (r0 + r1)
            x = x + phi_2 * first - (phi_2 / g - 0.5) * second
        x = x + STEP_NOISE[i] * there * np.sqrt(-np.expm1(-2 * h * eta))
        hs.append(h)
    return x


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["normal", "karras"])
@pytest.mark.parametrize(
    "sampler, formula, levels",
    [
        ("euler_a", euler_ancestral, "EulerDiscreteScheduler"),
        ("dpmpp_2s_a", dpmpp_2s_ancestral, "EulerDiscreteScheduler"),
        ("dpmpp_3m_sde", dpmpp_3m_sde, "DPMSolverMultistepScheduler"),
    ],
)
def test_equal_to_the_formula(sampler, formula, levels, spacing, prediction):
    import diffusers

    schedule = Schedule.from_json(config(prediction))
    levels = getattr(diffusers, levels).from_config({**SD15, "use_karras_sigmas": spacing == "karras"})
    levels.set_timesteps(20)
    error = distance(
        ours(tabulate(schedule, sampler, 20, spacing), NOISE, STEP_NOISE), kdiffusion(formula, schedule, levels)
    )
    print(f"FORMULA {sampler} {prediction} {spacing} {error:.2e}")
    assert error < TOLERANCE


CHURN = 15.0, 0.3, 12.0, 1.01  # not at the first level
CHURN_ALL = 30.0, 0.0, 999.0, 0.9  # the limit of one step


def churned(churn, x, sigmas, i, draws):
    amount, low, high, noise = churn
    gamma = min(amount / (len(sigmas) - 1), 2**0.5 - 1) if low <= sigmas[i] <= high else 0.0
    above = sigmas[i] * (1 + gamma)
    return above, x + next(draws) * noise * np.sqrt(above**2 - sigmas[i] ** 2) if gamma else x


def euler_churned(denoised, x, sigmas, churn):
    draws = iter(STEP_NOISE.astype(np.float64))
    for i, there in enumerate(sigmas[1:]):
        above, x = churned(churn, x, sigmas, i, draws)
        x = x + (x - denoised(x, above)) / above * (there - above)
    return x


def heun_churned(denoised, x, sigmas, churn):
    draws = iter(STEP_NOISE.astype(np.float64))
    for i, there in enumerate(sigmas[1:]):
        above, x = churned(churn, x, sigmas, i, draws)
        d = (x - denoised(x, above)) / above
        made = x + d * (there - above)
        if there:
            d = (d + (made - denoised(made, there)) / there) / 2
        x = x + d * (there - above)
    return x


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("churn", [CHURN, CHURN_ALL])
@pytest.mark.parametrize("sampler, formula", [("euler", euler_churned), ("heun", heun_churned)])
def test_churn_is_that_of_k_diffusion(sampler, formula, churn, prediction):
    from diffusers import EulerDiscreteScheduler

    levels = EulerDiscreteScheduler.from_config({**SD15, "use_karras_sigmas": True})
    levels.set_timesteps(20)
    schedule = Schedule.from_json(config(prediction))
    plan = tabulate(schedule, sampler, 20, "karras", churn=churn)
    expected = kdiffusion(lambda *args: formula(*args, churn), schedule, levels)
    error = distance(ours(plan, NOISE, STEP_NOISE), expected)
    print(f"CHURN {sampler} {prediction} {churn[0]} {error:.2e}")
    assert error < TOLERANCE and plan.draws == sum(churn[1] <= s <= churn[2] for s in levels.sigmas[:-1])


def test_churn_of_nothing_is_the_sampler_itself():
    for sampler in ("euler", "heun"):
        plain, none = (tabulate(Schedule(), sampler, 7, churn=churn) for churn in (None, (0.0, 0.0, 999.0, 1.0)))
        assert not none.stochastic and np.array_equal(plain.x, none.x) and none.churn == 0


def test_times_at_which_guidance_acts():
    plan = tabulate(Schedule.from_json(SD15), "heun", 5)  # steps at 999, 749.25, 499.5, 249.75, 0

    def inside(start, end):
        first, last = guided_times(plan, start, end)
        return sorted({float(t) for t in plan.t[: plan.rows] if first <= t <= last})

    assert inside(0.0, 1.0) == [0, 249.75, 499.5, 749.25, 999] and inside(0.9, 1.0) == []
    assert inside(0.2, 0.6) == [499.5, 749.25] and inside(0.0, 0.2) == [999]


# ---- noise schedules ----


def sigmas_of(spacing, steps, grid="sigmas", **options):
    return np.array([level.sigma for level in sigmas.levels(Schedule(**options), steps, spacing, grid).levels])


def test_spacings_are_those_of_their_origin():
    alpha_bar = Schedule().alphas_cumprod
    table = np.sqrt((1 - alpha_bar) / alpha_bar)
    np.testing.assert_allclose(sigmas_of("simple", 7), [table[-1 - int(k * 1000 / 7)] for k in range(7)])
    np.testing.assert_allclose(sigmas_of("ddim_uniform", 20), table[1:1000:50][::-1])
    line = np.interp(np.linspace(999, 0, 11)[:-1], np.arange(1000), table)
    np.testing.assert_allclose(sigmas_of("sgm_uniform", 10), line)
    np.testing.assert_allclose(sigmas_of("align_your_steps", 11), sigmas.ALIGN_YOUR_STEPS)
    np.testing.assert_allclose(sigmas_of("align_your_steps", 21)[::2], sigmas.ALIGN_YOUR_STEPS)
    np.testing.assert_allclose(sigmas.polyexponential(10.0, 0.1, 9, rho=1.0), sigmas.exponential(10.0, 0.1, 9))
    np.testing.assert_allclose(sigmas.karras(80.0, 0.002, 3), [80.0, 2.515, 0.002], rtol=1e-3)
    for spacing in sigmas.SPACINGS:
        for steps in (1, 2, 13, 50):
            made = sigmas_of(spacing, steps)
            assert len(made) == steps and np.all(np.diff(made) < 0) and made[-1] > 0, (spacing, steps)


# A1111 1.10, modules/sd_samplers_kdiffusion.py: "scheduler" and "discard_next_to_last_sigma" of each sampler.
A1111 = {
    "euler": (None, False), "euler_a": (None, False), "heun": (None, False), "lms": (None, False),
    "dpm2": ("karras", True), "dpm2_a": ("karras", True), "dpmpp_2s_a": ("karras", False),
    "dpmpp_2m": ("karras", False), "dpmpp_sde": ("karras", False), "dpmpp_2m_sde": ("exponential", False),
    "dpmpp_3m_sde": ("exponential", True),
}  # fmt: skip


def k_diffusion(name, n, table):
    """Returns (sigmas with the zero, times without) as A1111 and k-diffusion make them of a model's sigmas."""
    scheduler, discard = A1111[name]
    n += discard
    if scheduler is None:  # DiscreteSchedule.get_sigmas
        found = np.exp(np.interp(np.linspace(len(table) - 1, 0, n), np.arange(len(table)), np.log(table)))
    elif scheduler == "karras":  # get_sigmas_karras
        ramp, low, high = np.linspace(0, 1, n), table[0] ** (1 / 7), table[-1] ** (1 / 7)
        found = (high + ramp * (low - high)) ** 7
    else:  # get_sigmas_exponential
        found = np.exp(np.linspace(np.log(table[-1]), np.log(table[0]), n))
    found = np.append(found, 0.0)
    found = np.append(found[:-2], found[-1:]) if discard else found
    logs = np.log(found[:-1])
    above = np.clip(np.searchsorted(np.log(table), logs), 1, len(table) - 1)  # sigma_to_t without quantize
    low, high = np.log(table)[above - 1], np.log(table)[above]
    return found, above - 1 + np.clip((logs - low) / (high - low), 0, 1)


@pytest.mark.parametrize("steps", [1, 7, 20])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", None])
@pytest.mark.parametrize("name", A1111)
def test_automatic_is_that_of_a1111(name, spacing, steps, monkeypatch):
    schedule = Schedule.from_json(SD15 | {"timestep_spacing": spacing})
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    table = np.sqrt(1 / np.cumprod(1 - betas) - 1)
    wanted, times = k_diffusion(name, steps, table)
    paths, levels = [], sigmas.levels
    monkeypatch.setattr(sigmas, "levels", lambda *args: paths.append(levels(*args)) or paths[-1])
    plan = tabulate(schedule, name, steps, "automatic")
    (path,) = paths
    np.testing.assert_allclose([level.sigma for level in path.levels], wanted[:-1], rtol=1e-6)
    np.testing.assert_allclose([level.sigma for level in path.ends], wanted[1:], rtol=1e-6)
    np.testing.assert_allclose([level.t for level in path.levels], times, atol=1e-4)
    assert plan.scale == pytest.approx(wanted[0] / np.hypot(1, wanted[0]))  # x = noise * sigma, seen by the network


def test_automatic_of_other_samplers_is_normal():
    for name in SAMPLERS.keys() - A1111.keys():
        one, other = (tabulate(Schedule.from_json(SD15), name, 5, spacing) for spacing in ("automatic", "normal"))
        assert np.array_equal(one.x, other.x) and np.array_equal(one.t, other.t)


def differences(made):
    return {(one, other): distance(made[one], made[other]) for one in made for other in made if one < other}


def test_no_two_names_give_the_same_picture():
    """Exempt are ddpm's times, which are DDIM-uniform by definition.

    Simple and SGM-uniform times differ by rounding only, so a fifth digit is all that can be asked of a sampler that
    forgets nothing; a float32 run agrees to the sixth.
    """
    schedule = Schedule.from_json(SD15)
    for spacing in ("normal", "karras"):
        made = {name: np.asarray(ours(tabulate(schedule, name, 20, spacing), NOISE, STEP_NOISE)) for name in SAMPLERS}
        assert min(differences(made).values()) > 1e-3
    for name in SAMPLERS:
        spacings = set(sigmas.SPACINGS) - ({"ddim_uniform"} if name == "ddpm" else set())
        made = {s: np.asarray(ours(tabulate(schedule, name, 20, s), NOISE, STEP_NOISE)) for s in spacings}
        assert min(differences(made).values()) > 1e-5, name


# ---- order of convergence ----

MEAN, WIDTH = 0.7, 0.5  # of the data, a Gaussian


def gaussian_path(count, graded):
    """A path from sigma 10 to 0.1; graded: with short first steps, so that a start of low order does not count."""
    position = np.linspace(0, 1, count + 1) ** (3 if graded else 1)
    made = 10 * 0.01**position
    made = [sigmas.Level(float(i), 1 / np.hypot(1, x), x / np.hypot(1, x)) for i, x in enumerate(made)]
    at = lambda t: made[int(t)]  # noqa: E731
    return sigmas.Path(tuple(made[:-1]), tuple(made[1:]), count, 1.0, at, lambda sigma: 0.0, "epsilon")


def run_rows(path, rows, output, x):
    """Returns (the last x, the last base) of a scalar run in float64 with the exact denoiser of the Gaussian."""
    base, past = 0.0, [0.0] * len(row.M)
    for r in rows:
        a, s = r.level.a, r.level.s
        x0 = (WIDTH**2 * a * x + s**2 * MEAN) / (WIDTH**2 * a**2 + s**2)
        to_output = row.outputs("epsilon", r.level, output)
        past = [to_output @ [x, (x - a * x0) / s], *past[:-1]]
        registers = np.array([x, base, *past, 0.0])
        x, base = r.x @ registers, r.base @ registers
    return x, base


def exact(level, x, start):
    """The probability flow of the Gaussian from one level to another."""
    spread = [np.sqrt((WIDTH * where.a) ** 2 + where.s**2) for where in (level, start)]
    return level.a * MEAN + spread[0] / spread[1] * (x - start.a * MEAN)


@pytest.mark.parametrize(
    "sampler, order, graded",
    [
        ("ddim", 1, False), ("tcd", 1, False), ("euler", 1, False), ("heun", 2, False), ("dpm2", 2, False),
        ("dpmpp_2s_a", 2, False), ("dpmpp_sde", 2, False), ("dpmpp_2m", 2, False), ("dpmpp_2m_sde", 2, False),
        ("dpmpp_3m_sde", 2, True), ("unipc", 3, True), ("deis", 2, False), ("lms", 4, True), ("pndm", 2, False),
    ],
)  # fmt: skip
def test_order_of_convergence(sampler, order, graded):
    """Fresh noise is off.

    unipc: its corrected latent at the last level, since its last step is of order 1 by choice.  dpmpp_3m_sde: the
    formula of k-diffusion takes half of the second derivative, which costs it the third order.
    """
    errors = []
    for count in (64, 128, 256):
        path = gaussian_path(count, graded)
        rows = SAMPLERS[sampler].rows(path, 0.0)
        reached, base = run_rows(path, rows, SAMPLERS[sampler].output, 0.9)
        there = path.levels[-1] if sampler == "unipc" else path.ends[-1]
        errors.append(abs((base if sampler == "unipc" else reached) - exact(there, 0.9, path.levels[0])))
    slope = np.log2(np.array(errors[:-1]) / errors[1:])
    print(f"ORDER {sampler} {order} {slope}")
    assert slope[-1] > order - 0.15, (slope, errors)


# ---- the loop ----


def test_nothing_recompiles():
    traces = []

    @jax.jit
    def run(plan, noise, keys):
        def denoise(z, t, i):
            traces.append(1)
            return predict(z, t[:, None, None, None], jnp)

        return sample(denoise, noise, plan, keys)[0]

    keys = jax.random.split(jax.random.key(0), 2)
    schedule = Schedule.from_json(SD15)
    for sampler in ("ddim", "euler", "heun", "dpmpp_2m", "pndm"):
        for steps, start, spacing in ((3, 0, "normal"), (20, 5, "karras"), (33, 0, "normal")):
            run(tabulate(schedule, sampler, steps, spacing, start=start), NOISE, jax.random.clone(keys))
    assert len(traces) == 1
    for sampler in ("euler_a", "lcm", "dpmpp_sde"):
        run(tabulate(schedule, sampler, 4), NOISE, jax.random.clone(keys))
    assert len(traces) == 2  # whether fresh noise is drawn is the one thing that is compiled in


def test_steps_and_times_that_the_network_is_told():
    seen = []
    plan = tabulate(Schedule.from_json(SD15), "heun", 5, start=2)

    def denoise(z, t, i):
        jax.debug.callback(lambda t, i: seen.append((float(t[0]), int(i))), t, i, ordered=True)
        return z

    jax.block_until_ready(sample(denoise, jnp.asarray(NOISE), plan))
    jax.effects_barrier()
    assert seen == [(499.5, 0), (249.75, 0), (249.75, 1), (0.0, 1), (0.0, 2)]
    assert plan.rows == 5 and plan.steps == 3


@pytest.mark.parametrize("sampler", ["euler_a", "dpmpp_sde"])
def test_an_image_depends_on_its_own_key(sampler):
    plan = tabulate(Schedule.from_json(SD15), sampler, 6)
    noise = np.concatenate([NOISE, LATENT[:1]])

    @jax.jit
    def run(noise, keys):
        return sample(lambda z, t, i: predict(z, t[:, None, None, None], jnp), noise, plan, keys)[0]

    def keys():
        return jax.random.split(jax.random.key(3), 3)

    together = run(noise, keys())
    np.testing.assert_allclose(run(noise[1:2], keys()[1:2])[0], together[1], atol=1e-5)
    np.testing.assert_allclose(run(noise[::-1], keys()[::-1])[::-1], together, atol=1e-5)
    assert distance(run(noise, jax.random.split(jax.random.key(4), 3)), np.asarray(together)) > 1e-2
    drawn = np.stack([
        jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, n), noise.shape[1:]))(keys())  # noqa: B023
        for n in range(int(plan.draws))
    ])  # fmt: skip
    np.testing.assert_allclose(ours(plan, noise, drawn), together, atol=1e-5)


def test_more_rows_than_a_table_has_room_for():
    plan = tabulate(Schedule(num_train_timesteps=1500), "heun", 1500)
    assert plan.rows == 2999 and len(plan.t) == 2 * ROWS
    assert len(tabulate(Schedule(), "dpm2", 500).t) == ROWS


@pytest.mark.parametrize(
    "options, words",
    [
        ({"sampler": "euler_b"}, "sampler='euler_b'.*dpmpp_2m"), ({"spacing": "cosine"}, "schedule='cosine'.*karras"),
        ({"steps": 0}, "steps=0"), ({"steps": 1001}, "steps=1001"), ({"sampler": "lcm", "steps": 51}, "1 to 50"),
        ({"start": 20}, "start=20"), ({"eta": 0.5, "sampler": "heun"}, "heun has no eta"), ({"eta": 2.0}, "eta=2.0"),
        ({"steps": 1000, "sampler": "dpmpp_2m"}, "steps=1000: too many"),
        ({"sampler": "ddim", "churn": CHURN}, "churn=15.0: ddim has none; expected 0, or one of euler, heun"),
        ({"sampler": "heun", "churn": (-1.0, 0, 1, 1)}, "none below 0"),
    ],
)  # fmt: skip
def test_refuses_by_name(options, words):
    with pytest.raises(ValueError, match=words):
        tabulate(Schedule(), **options)


def test_refuses_missing_noise():
    plan = tabulate(Schedule(), "euler_a", 4)
    with pytest.raises(ValueError, match="keys=None"):
        sample(lambda z, t, i: z, jnp.asarray(NOISE), plan)
    with pytest.raises(ValueError, match="expected 3"):
        sample(lambda z, t, i: z, jnp.asarray(NOISE), plan, step_noise=STEP_NOISE[:2])
    assert fill(sigmas.levels(Schedule(), 3), [], "x0").rows == 0
