"""The noise schedule of a model: the amounts of signal and noise in a latent at each training time.

    schedule = Schedule.from_json(json.load(open("scheduler/scheduler_config.json")))
    z_t = add_noise(schedule, z, noise, t)          # a_t z + s_t noise
    loss = (prediction - target(schedule, z, noise, t)) ** 2

`a` is the signal's factor, sqrt(alpha_bar), `s` the noise's, sqrt(1 - alpha_bar): a² + s² = 1.  Tables are computed on
the host in float64; compiled functions compute in float32.  Shapes: B batch, h w latent pixels, c latent channels.
"""

import dataclasses
import functools
import numbers
from collections.abc import Iterator, Mapping
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64, Num

from sdjax.settings import shown

PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "linspace", "trailing")
MOST = 100_000  # most training times, since tables hold one entry for each
CLASS_NAME = "DDIMScheduler"  # the class in our scheduler_config.json: diffusers' only one with all of our fields


def _linear(start: float, end: float, steps: int) -> Float64[np.ndarray, " T"]:
    return np.linspace(start, end, steps)


def _scaled_linear(start: float, end: float, steps: int) -> Float64[np.ndarray, " T"]:
    """Returns betas linear in their square roots, which the original Stable Diffusion code calls "linear"."""
    return np.linspace(start**0.5, end**0.5, steps) ** 2


def _squared_cosine(start: float, end: float, steps: int) -> Float64[np.ndarray, " T"]:
    """Returns betas by Nichol and Dhariwal 2021, equation 17, with its s = 0.008 and the cap of 0.999."""
    alpha_bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


BETAS = {"scaled_linear": _scaled_linear, "linear": _linear, "squaredcos_cap_v2": _squared_cosine}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The contents of scheduler_config.json, with diffusers' names and meaning.

    timestep_spacing: "leading", "linspace" or "trailing"; None, for a file without it, leaves it to the sampler.
    steps_offset: added to the times of the spacing "leading".
    set_alpha_to_one: whether DDIM's last step ends at alpha_bar = 1 instead of alpha_bar_0.
    Raises ValueError for an unknown name and for numbers out of range.  Betas are between 0 and 1 (a trained beta may
    be 1), there is at least one training time, and offsets are 0 or more.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"
    set_alpha_to_one: bool = False
    steps_offset: int = 1
    timestep_spacing: str | None = None
    rescale_betas_zero_snr: bool = False
    trained_betas: tuple[float, ...] | None = None

    def __post_init__(self):
        _check("beta_schedule", self.beta_schedule, BETAS)
        _check("prediction_type", self.prediction_type, PREDICTIONS)
        _check("timestep_spacing", self.timestep_spacing, (*SPACINGS, None))
        _whole("num_train_timesteps", self.num_train_timesteps, 1, MOST)
        _whole("steps_offset", self.steps_offset, 0, MOST)
        for name in ("beta_start", "beta_end"):
            value = getattr(self, name)
            if not (isinstance(value, numbers.Real) and 0 < float(value) < 1):
                raise ValueError(f"{name}={value!r}: expected a number above 0 and below 1")
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise ValueError(
                f"trained_betas has {len(self.trained_betas)} values: expected num_train_timesteps,"
                f" {self.num_train_timesteps}"
            )

        for i, beta in enumerate(self.trained_betas or ()):
            if not 0 <= beta <= 1:
                raise ValueError(f"trained_betas: value {i} is {beta}; expected numbers from 0 to 1")

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Self:
        """Returns the schedule of a scheduler_config.json of any diffusers class.

        Keys for one sampler (use_karras_sigmas, solver_order, ...) are ignored: users choose sampler and spacing
        independently of the model.  Missing keys default to diffusers' DDIMScheduler.  steps_offset is always 1 and
        samples are never clipped, as in diffusers' Stable Diffusion pipelines.
        Raises ValueError for an unknown beta_schedule, prediction_type or timestep_spacing, for flow matching and for
        thresholding.
        """
        for key in ("use_flow_sigmas", "thresholding"):
            _check(key, bool(config.get(key)), (False,))
        if "Flow" in config.get("_class_name", ""):
            raise ValueError(
                f"_class_name={config['_class_name']!r}: expected a scheduler of discrete-time Gaussian diffusion"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        values = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "set_alpha_to_one": True}
        values |= {key: value for key, value in config.items() if key in known}
        if values.get("trained_betas") is not None:
            values["trained_betas"] = tuple(float(beta) for beta in values["trained_betas"])
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """Returns the content of a scheduler_config.json that diffusers loads as the same schedule."""
        config = {key: value for key, value in dataclasses.asdict(self).items() if value is not None}
        if "trained_betas" in config:
            config["trained_betas"] = list(config["trained_betas"])
        return {"_class_name": CLASS_NAME, "clip_sample": False, **config}

    @property
    def alphas_cumprod(self) -> Float64[np.ndarray, " T"]:
        """alpha_bar_t for t = 0 ... num_train_timesteps - 1, decreasing: float64 [T], read-only."""
        return _alphas_cumprod(self)


def _check(name, value, accepted):
    if value not in accepted:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(str(item) for item in accepted)}")


def _whole(name, value, low, high):
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not low <= value <= high:
        raise ValueError(f"{name}={shown(value)}: expected a whole number from {low} to {high}")


@functools.lru_cache(maxsize=32)
def _alphas_cumprod(schedule: Schedule) -> Float64[np.ndarray, " T"]:
    betas = schedule.trained_betas
    if betas is None:
        betas = BETAS[schedule.beta_schedule](schedule.beta_start, schedule.beta_end, schedule.num_train_timesteps)
    alphas_cumprod = np.cumprod(1 - np.asarray(betas, np.float64))
    if schedule.rescale_betas_zero_snr:
        alphas_cumprod = _zero_terminal_snr(alphas_cumprod)
    alphas_cumprod.flags.writeable = False
    return alphas_cumprod


def _zero_terminal_snr(alphas_cumprod: Float64[np.ndarray, " T"]) -> Float64[np.ndarray, " T"]:
    """Returns alpha_bar with sqrt(alpha_bar) shifted to 0 at the last time and scaled to keep the first.

    Source: Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps Are Flawed", algorithm 1.
    """
    root = np.sqrt(alphas_cumprod)
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def zero_snr(schedule: Schedule) -> Schedule:
    """Returns the schedule with pure noise at the last time, and the spacing of sampling times that begins there.

    Source: Lin et al. 2023, sections 3.1 and 3.3.
    """
    return dataclasses.replace(schedule, rescale_betas_zero_snr=True, timestep_spacing="trailing")


def bounds(schedule: Schedule, times: tuple[float, float]) -> tuple[int, int]:
    """Returns (first, end) of the times in a range of shares: t = first ... end - 1; at least one time.

    (0.0, 0.8) are the times below 0.8 T, the less noisy ones.
    """
    first, end = (round(share * schedule.num_train_timesteps) for share in times)
    first = min(first, schedule.num_train_timesteps - 1)
    return first, max(end, first + 1)


def signal_noise(schedule: Schedule, t: Num[Array, "*t"]) -> tuple[Float32[Array, "*t"], Float32[Array, "*t"]]:
    """Returns (a, s) with z_t = a z + s noise, float32 of t's shape.

    t: integer times, or fractional ones; the angle atan2(s, a) is linear between integers (finite at zero SNR).
    """
    alpha_bar = schedule.alphas_cumprod
    if jnp.issubdtype(jnp.result_type(t), jnp.integer):
        return jnp.asarray(np.sqrt(alpha_bar), jnp.float32)[t], jnp.asarray(np.sqrt(1 - alpha_bar), jnp.float32)[t]
    angle = jnp.asarray(np.arccos(np.sqrt(alpha_bar)), jnp.float32)
    angle = jnp.interp(t, jnp.arange(len(alpha_bar), dtype=jnp.float32), angle)
    return jnp.cos(angle), jnp.sin(angle)


def _columns(
    schedule: Schedule, z: Float[Array | np.ndarray, "B ..."], t: Num[Array, " B"]
) -> Iterator[Float32[Array, "B ..."]]:
    """Yields signal_noise's (a, s), each with an axis of length 1 for every axis of z after the batch."""
    shape = (-1, *[1] * (z.ndim - 1))
    return (factor.reshape(shape) for factor in signal_noise(schedule, t))


def add_noise(
    schedule: Schedule,
    z: Float[Array | np.ndarray, "B ..."],
    noise: Float[Array | np.ndarray, "B ..."],
    t: Num[Array, " B"],
) -> Float[Array, "B ..."]:
    """Returns z_t = sqrt(alpha_bar_t) z + sqrt(1 - alpha_bar_t) noise, float32.  z, noise: [B ...]; t: [B].

    z: scaled latents, standard deviation near 1.  t: 0 (nearly clean) to T - 1; clamped by JAX's indexing.
    Source: Ho et al. 2020, equation 4.
    """
    a, s = _columns(schedule, z, t)
    return a * z + s * noise


def target(
    schedule: Schedule,
    z: Float[Array | np.ndarray, "B ..."],
    noise: Float[Array | np.ndarray, "B ..."],
    t: Num[Array, " B"],
) -> Float[Array, "B ..."]:
    """Returns the network's target at time t, [B ...]: the noise, v = a noise - s z, or z.

    Source: Ho et al. 2020, equation 14; v: Salimans and Ho 2022, section 4.
    """
    a, s = _columns(schedule, z, t)
    return {"epsilon": noise, "v_prediction": a * noise - s * z, "sample": z}[schedule.prediction_type]


def to_x0(
    schedule: Schedule, prediction: Float[Array, "B ..."], z_t: Float[Array, "B ..."], t: Num[Array, " B"]
) -> Float[Array, "B ..."]:
    """Returns the clean latent that a prediction at z_t implies, [B ...]."""
    a, s = _columns(schedule, z_t, t)
    if schedule.prediction_type == "epsilon":
        return (z_t - s * prediction) / a
    return a * z_t - s * prediction if schedule.prediction_type == "v_prediction" else prediction


def from_x0(
    schedule: Schedule, x0: Float[Array, "B ..."], z_t: Float[Array, "B ..."], t: Num[Array, " B"]
) -> Float[Array, "B ..."]:
    """Returns the prediction at z_t that implies a clean latent x0, [B ...]: the inverse of to_x0."""
    a, s = _columns(schedule, z_t, t)
    if schedule.prediction_type == "epsilon":
        return (z_t - a * x0) / s
    return (a * z_t - x0) / s if schedule.prediction_type == "v_prediction" else x0


def snr(schedule: Schedule, t: Num[Array, " B"]) -> Float32[Array, " B"]:
    """Returns the signal-to-noise ratio alpha_bar_t / (1 - alpha_bar_t), float32 [B]."""
    a, s = signal_noise(schedule, t)
    return (a / s) ** 2
