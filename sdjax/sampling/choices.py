"""The names that settings of pictures choose from, with A1111's."""

from sdjax.diffusion import samplers
from sdjax.sampling.fields import Choice

SAMPLERS = Choice({name: one.word for name, one in samplers.known().items()})
SCHEDULES = Choice(
    normal="Normal", karras="Karras", exponential="Exponential", polyexponential="Polyexponential",
    align_your_steps="Align Your Steps", sgm_uniform="SGM Uniform", simple="Simple", ddim_uniform="DDIM",
    automatic="Automatic",
).also(Uniform="normal")  # fmt: skip
NOISES = Choice({"jax": "JAX", "torch-cpu": "CPU", "philox": "NV"}).also(GPU="philox")
GRAMMARS = Choice(plain="plain", a1111="a1111", comfyui="comfyui")
CONTENTS = Choice(
    original="original", fill="fill", noise="latent noise", nothing="latent nothing"
).also(**{"0": "fill", "1": "original", "2": "noise", "3": "nothing"})  # fmt: skip  # A1111's numbers
FITS = Choice(crop="crop", fill="fill", stretch="stretch")
MODES = Choice(balanced="Balanced", prompt="My prompt is more important", control="ControlNet is more important").also(
    **{"0": "balanced", "1": "prompt", "2": "control"}
)  # A1111's numbers
