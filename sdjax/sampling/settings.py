"""Every setting of a picture, declared once: flags, rows of lists, records and errors are made from these lines.

    TextToImage(prompt="a cat", steps=30)
    fields(TextToImage)["steps"].about.help

Parts are settings that belong together; a task lists its parts as bases.  What a setting does stands in the module that
acts on it.  To add one: a line here, and the place that reads `job.settings.NAME`.
"""

import dataclasses
import secrets
from typing import Annotated, Any, ClassVar, Self

from annotated_types import Interval

from sdjax.diffusion import samplers
from sdjax.sampling.control_settings import Controls
from sdjax.sampling.fields import LARGEST, SMALLEST, Choice, Finite, From0, Setting, Share, Size, Some, declared, fields
from sdjax.settings import SettingError

SEEDS = Interval(ge=-(2**63), le=2**64 - 1)

# What records and lists of sdjax 0.1 called settings: {then: (now, how much more now)}.
FIRST = {"negative": ("negative_prompt", 0), "noise": ("noise_source", 0), "skip": ("clip_skip", 1)}
FIRST |= {"adapters": ("adapter", 0)}
VARIED = ("variation_seed", "variation")
SEEDED = ("seed", "variation_seed")  # of which -1 is a random one
SAMPLERS = Choice({name: one.word for name, one in samplers.known().items()})
SCHEDULES = Choice(
    normal="Normal", karras="Karras", exponential="Exponential", polyexponential="Polyexponential",
    align_your_steps="Align Your Steps", sgm_uniform="SGM Uniform", simple="Simple", ddim_uniform="DDIM",
    automatic="Automatic",
).also(Uniform="normal")  # fmt: skip
NOISES = Choice({"jax": "JAX", "torch-cpu": "CPU", "philox": "NV"}).also(GPU="philox")
GRAMMARS = Choice(plain="plain", a1111="a1111", comfyui="comfyui")
FITS = Choice(crop="crop", fill="fill", stretch="stretch")


@declared
class Words:
    prompt: Annotated[str, Setting("what the picture shows", api="prompt", own=True, private=True)] = ""
    negative_prompt: Annotated[
        str, Setting("what it should not show", api="negative_prompt", own=True, private=True)
    ] = ""

    @property
    def texts(self) -> tuple[str, str]:
        """What both sides of guidance read: the prompt and the negative one."""
        return self.prompt, self.negative_prompt

    def saying(self, prompt: str) -> Self:
        """Returns the settings with another prompt."""
        return dataclasses.replace(self, prompt=prompt)  # pyright: ignore[reportArgumentType]  # `declared` makes it one


@declared
class Sampling:
    steps: Annotated[int, Interval(ge=1), Setting("denoising steps", "Steps", "steps", always=True)] = 20
    sampler: Annotated[
        str, SAMPLERS, Setting("the way from noise to picture", "Sampler", "sampler_name", unsaid="euler", always=True)
    ] = "ddim"
    schedule: Annotated[
        str, SCHEDULES, Setting("of the noise", "Schedule type", "scheduler", unsaid="automatic", always=True)
    ] = "normal"
    guidance: Annotated[
        Finite,
        Setting(
            "how strongly the prompt rules; 1 for none", "CFG scale", "cfg_scale", unsaid=7.0, always=True, step=0.5
        ),
    ] = 7.5
    seed: Annotated[
        int,
        SEEDS,
        Setting(
            "of the first picture; the others count on; -1 for a random one", "Seed", "seed", own=True, always=True
        ),
    ] = 0
    size: Annotated[
        Size | None,
        Setting(
            "default: the model's, or the given picture's", "Size", "width height", unsaid=Size(512, 512), always=True
        ),
    ] = None

    @staticmethod
    def spelled(values: dict) -> dict:
        """Takes A1111's labels of before 1.9, which end in the schedule's ("DPM++ 2M Karras"), apart."""
        label = str(values.get("sampler", ""))
        head, _, tail = label.rpartition(" ")
        sampler, schedule = SAMPLERS.ours(head), SCHEDULES.ours(tail)
        if SAMPLERS.ours(label) in SAMPLERS or sampler not in SAMPLERS or schedule not in SCHEDULES:
            return values
        return {"schedule": schedule, **values, "sampler": sampler}


@declared
class Model:
    model: Annotated[
        str,
        Setting(
            "pocket, a diffusers folder, a single file, a hub id, or random:sd15 ...",
            "Model",
            unsaid="",
            file=True,
            mine=True,
            private=True,
        ),
    ] = "pocket"
    vae: Annotated[
        str | None,
        Setting(
            "an autoencoder in place of the model's: a file, a diffusers folder or a hub id",
            "VAE",
            file=True,
            mine=True,
            private=True,
        ),
    ] = None
    tokenizer: Annotated[
        str | None,
        Setting(
            "CLIP's vocab.json and merges.txt, for a single file where no hub is", file=True, mine=True, private=True
        ),
    ] = None
    ema: Annotated[
        bool, Setting("of a single file that has both: the averaged weights, not the last", "EMA", mine=True)
    ] = False
    prediction_type: Annotated[
        str | None,
        Choice(epsilon="epsilon", v_prediction="v_prediction"),
        Setting("of a single file; default: found out", "Prediction type", mine=True),
    ] = None
    dtype: Annotated[
        str,
        Choice(float32="float32", bfloat16="bfloat16", float16="float16"),
        Setting("of weights and computation", "Dtype", mine=True),
    ] = "float32"
    adapter: Annotated[
        tuple[str, ...],
        Setting(
            "LoRA, embeddings or hypernetworks: FILE[:STRENGTH], or <lora:NAME:STRENGTH> as in prompts",
            "Adapters",
            private=True,
        ),
    ] = ()

    def loading(self) -> tuple[str, dict[str, Any]]:
        """Returns (what is loaded, how: the settings of one value of this part)."""
        how = {name: getattr(self, name) for name, one in fields(Model).items() if not one.several}
        return how.pop("model"), how


@declared
class Variation:
    variation_seed: Annotated[
        int,
        SEEDS,
        Setting(
            "another seed, of which the pictures get a part; -1: random",
            "Variation seed",
            "subseed",
            own=True,
            needs="variation",
        ),
    ] = 0
    variation: Annotated[
        Share,
        Setting(
            "that part; then all have one seed, and this one counts on",
            "Variation seed strength",
            "subseed_strength",
            own=True,
        ),
    ] = 0.0


@declared
class Reading:
    grammar: Annotated[
        str, GRAMMARS, Setting("what brackets in prompts mean; plain: nothing", "Prompt grammar", unsaid="a1111")
    ] = "plain"
    weighting: Annotated[
        str | None,
        Choice(a1111="a1111", comfyui="comfyui"),
        Setting("how weights in prompts act; default: the grammar's way", "Prompt weighting"),
    ] = None
    clip_skip: Annotated[
        int,
        Interval(ge=1),
        Setting("the text encoder's layer from the end that is read; 2: the last is left out", "Clip skip"),
    ] = 1

    @property
    def plain(self) -> bool:
        """Whether prompts are read as they stand, without weights and changes."""
        return self.grammar == "plain"

    @property
    def naming(self) -> str:
        """How texts name adapters and embeddings: as their grammar has it."""
        return self.grammar

    def rule(self) -> None:
        if self.weighting and self.grammar == "plain":
            raise SettingError(
                "weighting", self.weighting, "none, or a1111 or comfyui", "grammar='plain' has no weights"
            )


@declared
class Noise:
    noise_source: Annotated[str, NOISES, Setting("whose numbers a seed stands for", "RNG", unsaid="philox")] = "jax"
    ensd: Annotated[int, SEEDS, Setting("added to the seed for fresh noise, A1111's ENSD", "ENSD")] = 0
    eta: Annotated[
        float | None, Interval(ge=0, le=1), Setting("fresh noise of samplers that take it", "Eta", "eta")
    ] = None
    churn: Annotated[
        From0, Setting("fresh noise of euler and heun, Karras' s_churn over all steps", "Sigma churn", "s_churn")
    ] = 0.0
    churn_low: Annotated[
        From0, Setting("the lowest sigma at which that noise comes in, s_tmin", "Sigma tmin", "s_tmin")
    ] = 0.0
    churn_high: Annotated[float, Interval(ge=0), Setting("the highest, s_tmax", "Sigma tmax", "s_tmax")] = 999.0
    churn_noise: Annotated[From0, Setting("its standard deviation, s_noise", "Sigma noise", "s_noise")] = 1.0

    def rule(self) -> None:
        if self.ensd and self.noise_source == "jax":
            raise SettingError("ensd", self.ensd, "0, or torch-cpu or philox", "noise_source='jax' has none")


@declared
class Guidance:
    rescale: Annotated[Share, Setting("of guidance: against too strong contrasts", "CFG rescale")] = 0.0
    guidance_start: Annotated[Share, Setting("part of the steps from which on guidance acts", "Guidance start")] = 0.0
    guidance_end: Annotated[Share, Setting("part of the steps behind which it does not", "Guidance end")] = 1.0
    threshold: Annotated[
        Share, Setting("percentile of dynamic thresholding, such as 0.995; 0 for none", "Dynamic threshold")
    ] = 0.0
    threshold_limit: Annotated[
        float,
        Interval(ge=SMALLEST, le=LARGEST),
        Setting("what it never clips, in standard deviations of latents", "Threshold limit"),
    ] = 3.0

    def rule(self) -> None:
        if self.guidance_start >= self.guidance_end:
            why = f"guidance_start={self.guidance_start}"
            raise SettingError("guidance_end", self.guidance_end, "0 <= start < end <= 1", why)


@declared
class Picture:
    image: Annotated[
        str | None,
        Setting(
            "the picture to begin with; in text2img: of the subject, for a model with an E4T encoder",
            "Image",
            own=True,
            file=True,
            private=True,
        ),
    ] = None


@declared
class Fit:
    resize: Annotated[
        str, FITS, Setting("how given pictures get to the size that is made", "Resize", needs="image")
    ] = "crop"

    def target(self: Any) -> tuple[Size | None, str]:
        """Returns (the size that given pictures are brought to, None for their own, and how)."""
        return self.size, self.resize


@declared
class Start:
    strength: Annotated[
        float | None,
        Interval(gt=0, le=1),
        Setting(
            "how much of the picture is made anew",
            "Denoising strength",
            "denoising_strength",
            always=True,
            needs="image",
        ),
    ] = None


@declared
class Hole:
    mask: Annotated[
        str | None,
        Setting(
            "a picture of the same size, white where to paint", "Mask", own=True, needs="image", file=True, private=True
        ),
    ] = None
    feather: Annotated[
        int,
        Interval(ge=0, le=100_000),
        Setting("pixels over which the painted region fades in, inside the mask", "Feather", "mask_blur", needs="mask"),
    ] = 4
    margin: Annotated[
        int | None,
        Interval(ge=0, le=100_000),
        Setting("paint only around the mask, so many pixels and more, at the model's size", "Margin", needs="mask"),
    ] = None


@declared
class Hires:
    """A second pass at a larger size."""

    hires: Annotated[
        float | None,
        Interval(gt=0, le=64),
        Setting("enlarge so many times and paint over (hires fix)", "Hires upscale", "hr_scale"),
    ] = None
    hires_strength: Annotated[
        Some, Setting("of painting over", "Denoising strength", "denoising_strength", always=True, needs="hires")
    ] = 0.7
    hires_steps: Annotated[
        int | None,
        Interval(ge=1),
        Setting("of painting over; default: as many as before", "Hires steps", "hr_second_pass_steps", needs="hires"),
    ] = None
    hires_method: Annotated[
        str,
        Choice(latent="Latent", lanczos="Lanczos").rest("lanczos"),
        Setting("how to enlarge", "Hires upscaler", "hr_upscaler", always=True, needs="hires"),
    ] = "latent"

    def again(self: Any) -> Any:
        """Returns the settings of the second pass."""
        return dataclasses.replace(self, steps=self.hires_steps or self.steps)


@declared
class Enlarging:
    preset: Annotated[
        str | None,
        Choice({"64-256": "64-256", "128-512": "128-512"}),
        Setting("bring the picture to the first size, make the second of it", "Preset"),
    ] = None  # the sizes of the original super-resolution, and of the upscaler's training
    noise_level: Annotated[
        int | None, Interval(ge=0, le=350), Setting("noise put on the small picture: more invents more", "Noise level")
    ] = 20
    tile: Annotated[
        int | None, Interval(ge=1), Setting("do squares of so many small pixels one after the other", "Tile")
    ] = None
    overlap: Annotated[
        int, Interval(ge=0), Setting("small pixels that neighbouring squares share", "Overlap", needs="tile")
    ] = 16

    def fill(self) -> dict[str, Any]:
        return {"size": Size.of(self.preset.partition("-")[0])} if self.preset else {}


@declared
class Way:
    to_prompt: Annotated[
        str | None, Setting("what the last frame shows; default: the same", "To prompt", private=True)
    ] = None
    to_seed: Annotated[
        int | None, SEEDS, Setting("the seed of the last frame; default: the first one's", "To seed")
    ] = None
    frames: Annotated[int, Interval(ge=2), Setting("how many pictures, both ends with them", "Frames")] = 16

    @staticmethod
    def spelled(values: dict) -> dict:
        """Takes two prompts as both ends."""
        prompts = values.get("prompt")
        if not isinstance(prompts, list):
            return values
        if len(prompts) > 2:
            raise SettingError("prompt", prompts, "one, or two")
        return {**values, "prompt": prompts[0], **({"to_prompt": prompts[1]} if len(prompts) > 1 else {})}

    def ends(self: Any) -> tuple[Any, Any]:
        """Returns the settings of the first and of the last frame."""
        prompt = self.prompt if self.to_prompt is None else self.to_prompt
        seed = self.seed if self.to_seed is None else self.to_seed
        return self, dataclasses.replace(self, prompt=prompt, seed=seed)


@declared
class Task(Words, Sampling, Model, Variation, Reading, Noise, Guidance):
    """What all tasks have.  asked: settings that have no usual value."""

    asked: ClassVar[tuple[str, ...]] = ("prompt",)

    def numbered(self, i: int) -> "Task":
        """Returns the settings of picture i of several: its seed counts on, with a variation the other one (A1111)."""
        name = "variation_seed" if self.variation else "seed"
        return dataclasses.replace(self, **{name: getattr(self, name) + i})

    def drawn(self) -> "Task":
        """Returns the settings with random numbers in the place of seeds -1, as A1111 does."""
        names = [name for name in SEEDED if getattr(self, name) == -1]
        return dataclasses.replace(self, **{name: secrets.randbelow(1 << 32) for name in names}) if names else self

    @property
    def ending(self) -> str:
        """What tells its file from those of other seeds."""
        return f"-{self.seed}"


@declared
class TextToImage(Task, Picture, Hires): ...


@declared
class ImageToImage(Task, Start, Picture, Fit):
    asked = ("prompt", "image")
    strength = 0.75


@declared
class Inpaint(ImageToImage, Hole):
    asked = ("prompt", "image", "mask")
    strength = 1.0


@declared
class Upscale(Task, Picture, Fit, Enlarging):
    asked = ("image",)
    guidance = 9.0
    steps = 75
    WORDLESS: ClassVar[dict[str, Any]] = {"guidance": 1.0, "noise_level": None}  # of LDM-SR, which reads neither

    def wordless(self) -> Self:
        """Returns the settings as LDM-SR takes them; raises SettingError for texts, which it cannot read."""
        for name, text in zip(("prompt", "negative_prompt"), self.texts, strict=True):
            if text:
                raise SettingError(name, text, "none", "LDM-SR reads no words")
        return dataclasses.replace(self, **self.WORDLESS)


@declared
class ControlNet(Task, Start, Picture, Fit, Hole, Hires, Controls):
    asked = ("prompt", "control", "control_image")

    def fill(self) -> dict[str, Any]:
        usual = 1.0 if self.mask else 0.75
        return {"strength": usual} if self.image and self.strength is None else {}

    def rule(self) -> None:
        if self.image and self.hires is not None:
            raise SettingError("hires", self.hires, "no image", "enlarges what words make")


@declared
class Interpolate(Task, Way): ...


TASKS = {
    "text2img": TextToImage,
    "img2img": ImageToImage,
    "inpaint": Inpaint,
    "upscale": Upscale,
    "controlnet": ControlNet,
    "interpolate": Interpolate,
}
NAMES = {task: name for name, task in TASKS.items()}
