"""Every setting of a picture, declared once: flags, list rows, records and errors derive from these lines.

    TextToImage(prompt="a cat", steps=30)
    fields(TextToImage)["steps"].about.help

A part groups related settings; a task lists its parts as bases.  The module that reads `job.settings.NAME` documents
the effect of a setting.  To add a setting, add a line here and read it in such a module.
"""

import dataclasses
import secrets
from typing import Annotated, Any, ClassVar, Self

from annotated_types import Interval

from sdjax.sampling.choices import GRAMMARS, NOISES, SAMPLERS, SCHEDULES
from sdjax.sampling.control_settings import Controls
from sdjax.sampling.fields import LARGEST, SMALLEST, Choice, Finite, From0, Setting, Share, Size, declared, fields
from sdjax.sampling.given_settings import Fit, Masking, Picture, Start
from sdjax.sampling.hires_settings import Hires
from sdjax.settings import SettingError

SEEDS = Interval(ge=-(2**63), le=2**64 - 1)

# Names of settings in records and lists of sdjax 0.1: {old name: (new name, how much the value grew)}.
FIRST = {"negative": ("negative_prompt", 0), "noise": ("noise_source", 0), "skip": ("clip_skip", 1)}
FIRST |= {"adapters": ("adapter", 0)}
VARIED = ("variation_seed", "variation")
SEEDED = ("seed", "variation_seed")  # -1 draws a random seed


@declared
class Prompt:
    prompt: Annotated[str, Setting("what the picture shows", api="prompt", own=True, private=True)] = ""
    negative_prompt: Annotated[
        str, Setting("what the picture should not show", api="negative_prompt", own=True, private=True)
    ] = ""

    @property
    def texts(self) -> tuple[str, str]:
        """The prompts of both sides of guidance: the prompt and the negative prompt."""
        return self.prompt, self.negative_prompt

    def saying(self, prompt: str) -> Self:
        """Returns the settings with another prompt."""
        return dataclasses.replace(self, prompt=prompt)  # pyright: ignore[reportArgumentType]  # `declared` makes it one


@declared
class Sampling:
    steps: Annotated[int, Interval(ge=1), Setting("denoising steps", "Steps", "steps", always=True)] = 20
    sampler: Annotated[
        str, SAMPLERS, Setting("the sampler", "Sampler", "sampler_name", unsaid="euler", always=True)
    ] = "ddim"
    schedule: Annotated[
        str,
        SCHEDULES,
        Setting("spacing of the noise levels", "Schedule type", "scheduler", unsaid="automatic", always=True),
    ] = "normal"
    guidance: Annotated[
        Finite,
        Setting(
            "strength of the prompt (classifier-free guidance); 1 is off",
            "CFG scale",
            "cfg_scale",
            unsaid=7.0,
            always=True,
            step=0.5,
        ),
    ] = 7.5
    seed: Annotated[
        int,
        SEEDS,
        Setting("seed of the first picture; later ones count up; -1 is random", "Seed", "seed", own=True, always=True),
    ] = 0
    size: Annotated[
        Size | None,
        Setting(
            "size of the picture, or with margin of the masked region; default: the model's, or the given picture's",
            "Size",
            "width height",
            unsaid=Size(512, 512),
            always=True,
        ),
    ] = None

    seamless: Annotated[
        bool, Setting("make a picture whose opposite edges meet, for tiles and textures", "Tiling", "tiling")
    ] = False

    @staticmethod
    def spelled(values: dict) -> dict:
        """Splits A1111's labels from before 1.9, which end with the schedule ("DPM++ 2M Karras")."""
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
            "pocket, a diffusers folder, a single file, a hub id, or a random shape such as random:sd15",
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
            "another autoencoder: a file, a diffusers folder or a hub id",
            "VAE",
            file=True,
            mine=True,
            private=True,
        ),
    ] = None
    tokenizer: Annotated[
        str | None,
        Setting(
            "folder with CLIP's vocab.json and merges.txt, for a single file without the hub",
            file=True,
            mine=True,
            private=True,
        ),
    ] = None
    ema: Annotated[bool, Setting("use the averaged weights of a single file that has both", "EMA", mine=True)] = False
    prediction_type: Annotated[
        str | None,
        Choice(epsilon="epsilon", v_prediction="v_prediction"),
        Setting("prediction type of a single file; default: detected", "Prediction type", mine=True),
    ] = None
    dtype: Annotated[
        str,
        Choice(float32="float32", bfloat16="bfloat16", float16="float16"),
        Setting("data type of weights and computation", "Dtype", mine=True),
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
        """Returns (the model, {name: value} of the other settings for loading it)."""
        how = {name: getattr(self, name) for name, one in fields(Model).items() if not one.several}
        return how.pop("model"), how


@declared
class Variation:
    variation_seed: Annotated[
        int,
        SEEDS,
        Setting(
            "a second seed to mix in; -1 is random",
            "Variation seed",
            "subseed",
            own=True,
            needs="variation",
        ),
    ] = 0
    variation: Annotated[
        Share,
        Setting(
            "share of the second seed; above 0 the variation seed counts up instead of the seed",
            "Variation seed strength",
            "subseed_strength",
            own=True,
        ),
    ] = 0.0


@declared
class Reading:
    grammar: Annotated[
        str, GRAMMARS, Setting("prompt syntax; plain reads the text as it is", "Prompt grammar", unsaid="a1111")
    ] = "plain"
    weighting: Annotated[
        str | None,
        Choice(a1111="a1111", comfyui="comfyui"),
        Setting("how prompt weights act; default: as in the grammar", "Prompt weighting"),
    ] = None
    clip_skip: Annotated[
        int,
        Interval(ge=1),
        Setting("text encoder layer to read, from the end; 2 skips the last layer", "Clip skip"),
    ] = 1

    @property
    def plain(self) -> bool:
        """Whether prompts are read literally, without weights and edits."""
        return self.grammar == "plain"

    @property
    def naming(self) -> str:
        """The grammar for names of adapters and embeddings in prompts."""
        return self.grammar

    def rule(self) -> None:
        if self.weighting and self.grammar == "plain":
            raise SettingError(
                "weighting", self.weighting, "none, or a1111 or comfyui", "grammar='plain' has no weights"
            )


@declared
class Noise:
    noise_source: Annotated[str, NOISES, Setting("random generator that seeds refer to", "RNG", unsaid="philox")] = (
        "jax"
    )
    ensd: Annotated[int, SEEDS, Setting("offset of the seed of fresh noise (A1111's ENSD)", "ENSD")] = 0
    eta: Annotated[
        float | None, Interval(ge=0, le=1), Setting("amount of fresh noise, for samplers that take it", "Eta", "eta")
    ] = None
    churn: Annotated[
        From0, Setting("fresh noise of euler and heun, summed over all steps (s_churn)", "Sigma churn", "s_churn")
    ] = 0.0
    churn_low: Annotated[From0, Setting("lowest sigma with churn noise (s_tmin)", "Sigma tmin", "s_tmin")] = 0.0
    churn_high: Annotated[
        float, Interval(ge=0), Setting("highest sigma with churn noise (s_tmax)", "Sigma tmax", "s_tmax")
    ] = 999.0
    churn_noise: Annotated[From0, Setting("standard deviation of churn noise (s_noise)", "Sigma noise", "s_noise")] = (
        1.0
    )

    def rule(self) -> None:
        if self.ensd and self.noise_source == "jax":
            raise SettingError("ensd", self.ensd, "0, or torch-cpu or philox", "noise_source='jax' has none")


@declared
class Guidance:
    rescale: Annotated[Share, Setting("rescale guidance to reduce excess contrast", "CFG rescale")] = 0.0
    guidance_start: Annotated[Share, Setting("share of the steps at which guidance starts", "Guidance start")] = 0.0
    guidance_end: Annotated[Share, Setting("share of the steps at which guidance ends", "Guidance end")] = 1.0
    threshold: Annotated[
        Share, Setting("percentile of dynamic thresholding, such as 0.995; 0 is off", "Dynamic threshold")
    ] = 0.0
    threshold_limit: Annotated[
        float,
        Interval(ge=SMALLEST, le=LARGEST),
        Setting("value that thresholding never clips, in standard deviations of latents", "Threshold limit"),
    ] = 3.0

    def rule(self) -> None:
        if self.guidance_start >= self.guidance_end:
            why = f"guidance_start={self.guidance_start}"
            raise SettingError("guidance_end", self.guidance_end, "0 <= start < end <= 1", why)


@declared
class Enlarging:
    preset: Annotated[
        str | None,
        Choice({"64-256": "64-256", "128-512": "128-512"}),
        Setting("resize the picture to the first size and enlarge it to the second", "Preset"),
    ] = None  # the sizes of the original super-resolution, and of the upscaler's training
    noise_level: Annotated[
        int | None,
        Interval(ge=0, le=350),
        Setting("noise added to the small picture; more noise invents more detail", "Noise level"),
    ] = 20
    tile: Annotated[int | None, Interval(ge=1), Setting("work in square tiles of this many small pixels", "Tile")] = (
        None
    )
    overlap: Annotated[
        int,
        Interval(ge=0),
        Setting("small pixels shared by neighbouring tiles, at most half a tile", "Overlap", needs="tile"),
    ] = 16

    def fill(self) -> dict[str, Any]:
        return {"size": Size.of(self.preset.partition("-")[0])} if self.preset else {}


@declared
class Frames:
    to_prompt: Annotated[
        str | None, Setting("prompt of the last frame; default: that of the first", "To prompt", private=True)
    ] = None
    to_seed: Annotated[int | None, SEEDS, Setting("seed of the last frame; default: that of the first", "To seed")] = (
        None
    )
    frames: Annotated[int, Interval(ge=2, le=1000), Setting("number of frames, both ends included", "Frames")] = 16

    @staticmethod
    def spelled(values: dict) -> dict:
        """Returns the values with two prompts as first and last frame."""
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
class Task(Prompt, Sampling, Model, Variation, Reading, Noise, Guidance):
    """The settings that all tasks share.  asked: settings without a default."""

    asked: ClassVar[tuple[str, ...]] = ("prompt",)

    def check_most(self, most: int) -> None:
        """Raises SettingError if one request makes more pictures than `most`."""

    def numbered(self, i: int) -> "Task":
        """Returns the settings of picture i: its seed counts up or, with a variation, its variation seed (A1111)."""
        name = "variation_seed" if self.variation else "seed"
        return dataclasses.replace(self, **{name: getattr(self, name) + i})

    def drawn(self) -> "Task":
        """Returns the settings with random numbers instead of seeds -1, as in A1111."""
        names = [name for name in SEEDED if getattr(self, name) == -1]
        return dataclasses.replace(self, **{name: secrets.randbelow(1 << 32) for name in names}) if names else self

    @property
    def ending(self) -> str:
        """The suffix of its file name: the seed."""
        return f"-{self.seed}"


@declared
class TextToImage(Task, Picture, Hires): ...


@declared
class ImageToImage(Task, Start, Picture, Fit):
    asked = ("prompt", "image")
    strength = 0.75


@declared
class Inpaint(ImageToImage, Masking):
    asked = ("prompt", "image", "mask")
    strength = 1.0


@declared
class Upscale(Task, Picture, Fit, Enlarging):
    asked = ("image",)
    guidance = 9.0
    steps = 75

    def rule(self) -> None:
        if self.seamless and self.tile is not None:
            raise SettingError("seamless", True, "no tile", "the edges of tiles would meet")

    WORDLESS: ClassVar[dict[str, Any]] = {"guidance": 1.0, "noise_level": None}  # for LDM-SR, which reads neither

    def wordless(self) -> Self:
        """Returns the settings for LDM-SR; raises SettingError for prompts, which it cannot read."""
        for name, text in zip(("prompt", "negative_prompt"), self.texts, strict=True):
            if text:
                raise SettingError(name, text, "none", "LDM-SR reads no words")
        return dataclasses.replace(self, **self.WORDLESS)


@declared
class ControlNet(Task, Start, Picture, Fit, Masking, Hires, Controls):
    asked = ("prompt", "control", "control_image")

    def fill(self) -> dict[str, Any]:
        usual = 1.0 if self.mask else 0.75
        return {"strength": usual} if self.image and self.strength is None else {}

    def rule(self) -> None:
        if self.image and self.hires is not None:
            raise SettingError("hires", self.hires, "no image", "enlarges what words make")


@declared
class Interpolate(Task, Frames):
    def check_most(self, most: int) -> None:
        """Raises SettingError for more frames than `most`."""
        if self.frames > most:
            raise SettingError("frames", self.frames, f"at most {most}, as pictures of one job")


TASKS = {
    "text2img": TextToImage,
    "img2img": ImageToImage,
    "inpaint": Inpaint,
    "upscale": Upscale,
    "controlnet": ControlNet,
    "interpolate": Interpolate,
}
NAMES = {task: name for name, task in TASKS.items()}
