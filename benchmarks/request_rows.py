"""The 60 requests of same_pictures.py, as data: every task, sampler, noise schedule, grammar and kind of adapter.

A row is (name, task, model, settings): the public function sdjax.TASK gets the model (request_models.py) and the
settings under today's names; SPELLINGS has the older names.  Two settings are for request_models.py: `adapters`,
((file, arguments of attach), ...), and `control`, ((arguments of Control.on), ...) for a random ControlNet.
"""

import dataclasses

import numpy as np
from PIL import Image

# today's name of a setting: (its older name, a function from today's value to the older one)
SPELLINGS = {
    "negative_prompt": ("negative", lambda value: value),
    "clip_skip": ("skip", lambda value: value - 1),  # number of skipped layers; A1111's 1 skips none
    "variation": ("variation", lambda value: (VARIATION_SEED, value)),
    "hires_strength": ("strength", lambda value: value),
    "hires_method": ("method", lambda value: value),
    "batch": ("at_once", lambda value: value),
}
VARIATION_SEED = 7  # of all rows with a variation
FACE, CAT = "a photo of a face on the beach", "a mosaic of a cat in the city at night"
SKETCH, SNOW = "a pencil sketch of a face with a hat", "a watercolor of the snow in the forest"
LONG = ", ".join([FACE, CAT, SKETCH, SNOW])  # more than one chunk
SCHEDULES = ("normal", "karras", "exponential", "polyexponential", "align_your_steps", "sgm_uniform", "simple")
SCHEDULES += ("ddim_uniform", "automatic")
SAMPLERS = ("ddim", "ddpm", "pndm", "euler", "euler_a", "heun", "lms", "dpm2", "dpm2_a", "dpmpp_2s_a", "dpmpp_2m")
SAMPLERS += ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "unipc", "deis", "lcm", "tcd")


@dataclasses.dataclass(frozen=True)
class Request:
    """One row.  task: a public function of sdjax.  model: a name of request_models.MODELS."""

    name: str
    task: str
    model: str
    settings: dict


def picture(seed: int, height: int = 32, width: int | None = None) -> np.ndarray:
    """Returns a smooth picture uint8 [H W 3] of a seed."""
    rough = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return np.array(Image.fromarray(rough).resize((width or height, height), Image.Resampling.BICUBIC))


def mask(height: int = 32, width: int | None = None) -> np.ndarray:
    """Returns a mask uint8 [H W], 255 in a box near the middle."""
    width = width or height
    made = np.zeros((height, width), np.uint8)
    made[height // 4 : height // 4 * 3, width // 3 : width // 3 * 2] = 255
    return made


def _sampler(place):
    """Returns the row of sampler number `place`; the noise schedules take turns."""
    name = SAMPLERS[place]
    schedule = SCHEDULES[place % len(SCHEDULES)]
    return Request(
        f"{name} {schedule}", "text2img", "tiny",
        dict(prompts=[FACE], seeds=[place], steps=5, guidance=4.0, sampler=name, schedule=schedule),
    )  # fmt: skip


def _row(name, task, model, **settings):
    return Request(name, task, model, {"steps": 4, "guidance": 5.0, **settings})


def _text(name, prompt, model="tiny", **settings):
    prompts = [prompt] if isinstance(prompt, str) else prompt
    return _row(name, "text2img", model, **{"prompts": prompts, "seeds": list(range(len(prompts))), **settings})


GRAMMARS = (
    _text("weights", "a (photo:1.4) of a [face] on ((the beach))", grammar="a1111", negative_prompt="(hat:1.2)"),
    _text("AND", f"{CAT} AND the snow :0.6 AND a hat:-0.3", grammar="a1111"),
    _text("BREAK", f"{FACE} BREAK {SNOW}", grammar="a1111", negative_prompt=LONG),
    _text("prompts that change", "[a cat:a face:0.5] in [the snow|the forest], [red hair::3]", grammar="a1111"),
    _text("a1111, weighted as comfyui", "a (face:1.5) in the (snow:0.6)", grammar="a1111", weighting="comfyui"),
    _text("comfyui", f"{LONG}, (hat:1.3) \\(cat\\)", grammar="comfyui", negative_prompt="(red:1.2) hair"),
)
NUMBERS = (
    _text("eta and rescale", FACE, eta=0.7, rescale=0.7),
    _text("churn", FACE, sampler="euler", churn=2.0),
    _text("churn within", FACE, sampler="heun", schedule="karras", churn=3.0, churn_low=0.5, churn_high=9.0,
          churn_noise=1.01),
    _text("threshold", FACE, threshold=0.9, threshold_limit=2.0),
    _text("guidance interval", FACE, guidance_start=0.2, guidance_end=0.6, negative_prompt="red hair"),
    _text("clip skip", FACE, clip_skip=2),
    _text("variation", FACE, variation=0.3, variation_seed=VARIATION_SEED),
    _text("noise of torch", FACE, sampler="euler_a", noise_source="torch-cpu", ensd=31337),
    _text("no guidance", FACE, guidance=1.0),
    _text("batch", [FACE, CAT, SKETCH], seeds=[3, 2**31, 5], negative_prompt=["", "red hair", "a cat"], size=(24, 40)),
    _text("batch of lengths", [FACE, LONG, f"{CAT} AND snow"], grammar="a1111"),
    _text("v, zero SNR", FACE, "v", sampler="dpmpp_2m", rescale=0.5),
)  # fmt: skip
ADAPTERS = (
    _text("LoRA", FACE, adapters=(("lora.safetensors", {"strength": 0.8}),)),
    _text("LoHa", FACE, adapters=(("loha.safetensors", {"strength": 0.5, "unet": -1.2}),)),
    _text("embedding", "a photo of blob", adapters=(("blob.safetensors", {}),)),
    _text("embedding, comfyui", "a (photo of embedding:blob:1.2)", grammar="comfyui",
          adapters=(("blob.safetensors", {}),)),
    _text("hypernetwork", FACE, adapters=(("hyper.pt", {"strength": 0.7}),)),
    _text("all adapters", "a (blob:1.2) in the snow", grammar="a1111", negative_prompt="blob", clip_skip=2, adapters=(
        ("lora.safetensors", {"strength": 0.4}), ("loha.safetensors", {"strength": 0.3}),
        ("hyper.pt", {"strength": 0.5}), ("blob.safetensors", {}))),
)  # fmt: skip
HINT, EDGES = picture(21), picture(22)
PICTURES = (
    _row("img2img", "img2img", "tiny", prompts=[CAT], pictures=picture(1), strength=0.6, steps=6),
    _row("img2img, odd size", "img2img", "tiny", prompts=[CAT], pictures=picture(2, 27, 37), size=(25, 31),
         resize="fill", sampler="lms", noise_source="philox"),
    _row("inpaint", "inpaint", "tiny", prompts=[CAT, FACE], pictures=picture(3), masks=mask(), strength=0.8),
    _row("inpaint, 9 channels", "inpaint", "inpaint", prompts=[CAT], pictures=picture(4), masks=mask(), feather=2),
    _row("inpaint, margin", "inpaint", "inpaint", prompts=[CAT], pictures=picture(5, 60, 72), masks=mask(60, 72),
         margin=3, sampler="euler_a"),
    _row("upscale", "upscale", "upscaler", prompts=[SNOW], pictures=picture(6, 12), noise_level=80),
    _row("upscale in tiles", "upscale", "upscaler", prompts=[SNOW], pictures=picture(7, 20), tile=12, overlap=4),
    _row("LDM-SR", "super_resolve", "ldm_sr", pictures=[picture(8, 12), picture(9, 12)], guidance=1.0, eta=1.0),
    _row("hires, latent", "hires", "tiny", prompts=["[a cat:a face:1.5] in the snow"], grammar="a1111", scale=1.5),
    _row("hires, lanczos", "hires", "tiny", prompts=[CAT], hires_method="lanczos", hires_steps=6, hires_strength=0.5),
    _text("ControlNet", CAT, control=(dict(picture=HINT, weight=0.8, start=0.2, end=0.8),)),
    _text("ControlNet, guess", CAT, control=(dict(picture=HINT, guess=True),)),
    _row("two ControlNets, img2img", "img2img", "tiny", prompts=[CAT], pictures=picture(10),
         control=(dict(picture=HINT, weight=0.5), dict(picture=EDGES, weight=0.7, end=0.5))),
)  # fmt: skip
POCKET = (
    _text("pocket", [FACE, SKETCH], "pocket", sampler="dpmpp_2m", schedule="karras", steps=6),
    _row("pocket, inpaint", "inpaint", "pocket", prompts=[FACE], pictures=picture(11, 64), masks=mask(64)),
    _row("interpolate", "interpolate", "pocket", prompts=[FACE, SKETCH], frames=4, seeds=(0, 1), batch=2),
    _text("E4T", "a photo of *s on the beach", "e4t", sampler="euler_a"),
    _text("E4T, weights", "a (photo:1.2) of *s AND snow :0.4", "e4t", grammar="a1111", negative_prompt="*s"),
)
REQUESTS = (*map(_sampler, range(len(SAMPLERS))), *GRAMMARS, *NUMBERS, *ADAPTERS, *PICTURES, *POCKET)
