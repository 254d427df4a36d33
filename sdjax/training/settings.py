"""A run's settings.

Train(model="pocket", method=TextualInversion(word="<cat>"), data=Data(path="photos/cat", templates="object"))
"""

from dataclasses import dataclass, field
from typing import Any

from sdjax.data.batches import Data
from sdjax.data.classes import ClassData
from sdjax.diffusion import errors
from sdjax.methods.full import Full
from sdjax.models import recompute
from sdjax.runtime import mesh
from sdjax.settings import BELOW_1, FROM_0, FROM_1, SEED, TO_1, SettingError, check, check_pattern
from sdjax.training.optim import Optim
from sdjax.training.optimizers import KINDS

TYPES = ("float32", "bfloat16")  # float16 is none of them: its small gradients would become 0
PREDICTIONS = ("epsilon", "v_prediction")
FORMS = ("diffusers", "single-file", "both")
DTYPES = ("float32", "float16", "bfloat16")  # of exported numbers
BESTS = (False, True, "clip-i", "clip-t", "clip")
FITS = ("", "auto", "8GB", "12GB", "16GB", "24GB")


@dataclass(frozen=True)
class Train:
    """A run's settings.

    model: "pocket", a diffusers folder, a single file, a hub id or a random shape such as "random:tiny".
    vae: another autoencoder: a file, a diffusers folder or a hub id.
    tokenizer, prediction_type, model_ema: for a single file: a folder with CLIP's vocab.json and merges.txt; epsilon or
    v_prediction, by default detected; whether to train its averaged weights (EMA), of a file that has both.
    vision: a folder or hub id with an image encoder, for a model without one.
    perceptual: the files of LPIPS, for autoencoders.
    task: text2img, inpainting or upscaling; "" takes the model's own.  Another task adds input channels to the UNet.
    init: a file or folder with the weights to start from.
    seed: seed of initial weights, picture order, noise and times.
    parallel: single, pmap, mesh or mesh:data=N,fsdp=M,tensor=K; several processes take mesh.
    sharding: (pattern, dimensions) pairs, first match: how a mesh divides weights with a matching dotted name, such as
    ("to_q.kernel$", "fsdp,tensor"): an axis, or -, for each of the last dimensions.  runtime/mesh.py has the rules for
    the rest; leaves under 4 MiB are copied.
    out: the run's folder; "" is outputs/NAME of the recipe.  {picture} in it inserts the picture's name.
    ema: decay of the moving average of trained weights; 0 is off.
    compute: data type of the computation, "float32" or "bfloat16".  frozen: data type of the frozen weights.
    remat: recompute activations in the backward pass instead of storing them: True all inside a block; "products" all
    except the results of matrix products, convolutions and attention.
    fit: 8GB, 12GB, 16GB or 24GB of device memory, or "auto", the first device's free memory: chooses data types, remat
    and microbatches, and adafactor as the optimizer if nothing else fits; prints the choice; "" is off.
    class_data: pictures of the subject's class, DreamBooth's prior.
    min_snr: gamma of min-SNR weighting; 0 is off.  debiased: weigh errors by 1 / sqrt(SNR).
    huber: c of the pseudo-Huber error; 0 uses the squared error.  huber_decay: how c changes with noise: exponential or
    snr falls from about 1 to `huber`, constant stays at `huber`.
    noise_offset: standard deviation of a constant per channel, added to the noise.
    pyramid: discount of coarser noise; 0 is off.  perturbation: standard deviation of input noise that is not in the
    network's target; 0 is off.
    times: the range of noise levels to train, as shares of the schedule's times: (0, 0.8) leaves out the noisiest.
    zero_snr: rescale the model's noise schedule to pure noise at its last time, for models that predict v or x0; an
    exported model keeps the schedule.
    clip_skip: the text encoder's output is taken before its last clip_skip - 1 layers: 1 is the last layer, 2 the one
    before it, as A1111 counts; previews use it too.
    preserve: weight of the untrained model's predictions, for the class prompts if class_data has identifiers,
    otherwise for the pictures' own prompts.  The method Full also needs keep=True.
    checkpoint: steps between checkpoints; 0 writes none except on SIGTERM.  keep: number of checkpoints to keep.
    checkpoint_minutes: a checkpoint also when the last one is this old, for slow steps; 0 is off.  Several processes
    look at logged steps.
    preview: steps between previews; 0 is off, None is max(50, steps / 10) with prompts, prompts_file or a judge, and
    max(100, steps / 4) without.
    log: steps between lines of metrics; 0 is off.
    epochs: length in passes over the pictures instead of `steps`; 0 uses `steps`.
    minutes: length in minutes from the start of training, compilation included, and at most `steps`.  The learning
    rate's schedule follows the clock, so such a run is not reproducible.  0 uses `steps`.
    validate: steps between measurements of the error on data.validation, at fixed noise and times.
    judge: a CLIP that measures each preview: a folder or hub id of a CLIPModel, or "pocket"; "" is off.  metrics.jsonl
    gets clip-i, the likeness to the training pictures, and clip-t, the likeness to the prompts.
    best: export the weights with the smallest validation error (True), or with the largest clip-i, clip-t or their sum,
    clip, of the judge.
    patience: stop after this many measurements without improvement; 0 is off.
    export_every: steps between exports to exports/STEP; 0 is off.
    save_model_as: how exports hold a whole model or a ControlNet: diffusers (a folder), single-file (for A1111 and
    ComfyUI) or both.
    save_precision: data type of the numbers in exported files: float32, float16 or bfloat16.  float16 halves a file, as
    kohya's fp16; training continues from it in float32.
    prompts: prompts of the previews, with A1111's weights; "[name]" is the word.  () takes "a photo of" the word that
    the method trains, otherwise the first captions of the pictures.
    prompts_file: a file of further preview prompts, one per line in kohya's syntax (training/prompt_lines.py).
    public: leave captions, folder names and the base model's name out of the export.
    author, license, description: texts for the export's header and card.  dates: also write when the run ended.
    wandb: a Weights & Biases project to log to.
    """

    model: str = "pocket"
    vae: str = ""
    tokenizer: str = ""
    prediction_type: str = ""
    model_ema: bool = False
    vision: str = ""
    perceptual: str = ""
    method: Any = field(default_factory=Full)
    task: str = ""
    data: Data = field(default_factory=Data)
    class_data: ClassData = field(default_factory=ClassData)
    optim: Optim = field(default_factory=Optim)
    steps: int = 1000
    seed: int = 0
    parallel: str = "single"
    sharding: tuple[tuple[str, str], ...] = ()
    init: str = ""
    out: str = ""
    ema: float = 0.0
    compute: str = "float32"
    frozen: str = "float32"
    remat: bool | str = False
    fit: str = ""
    min_snr: float = 0.0
    debiased: bool = False
    huber: float = 0.0
    huber_decay: str = "snr"
    noise_offset: float = 0.0
    pyramid: float = 0.0
    perturbation: float = 0.0
    times: tuple[float, float] = (0.0, 1.0)
    zero_snr: bool = False
    clip_skip: int = 1
    preserve: float = 0.0
    checkpoint: int = 500
    checkpoint_minutes: float = 30.0
    keep: int = 3
    log: int = 10
    preview: int | None = None
    prompts: tuple[str, ...] = ()
    prompts_file: str = ""
    public: bool = False
    epochs: float = 0.0
    minutes: float = 0.0
    validate: int = 100
    judge: str = ""
    best: bool | str = False
    patience: int = 0
    export_every: int = 0
    save_model_as: str = "diffusers"
    save_precision: str = "float32"
    wandb: str = ""
    author: str = ""
    license: str = ""
    description: str = ""
    dates: bool = False

    def __post_init__(self):
        check(
            self, steps=FROM_0, seed=SEED, ema=BELOW_1, fit=FITS, compute=TYPES, frozen=TYPES, remat=recompute.KINDS,
            min_snr=FROM_0, noise_offset=FROM_0, checkpoint=FROM_0, checkpoint_minutes=FROM_0, keep=FROM_1, log=FROM_0,
            preserve=FROM_0, huber=TO_1, huber_decay=errors.DECAYS, pyramid=BELOW_1, perturbation=FROM_0,
            clip_skip=FROM_1, epochs=FROM_0, minutes=FROM_0, validate=FROM_1, patience=FROM_0, export_every=FROM_0,
            prediction_type=("", *PREDICTIONS), save_model_as=FORMS, save_precision=DTYPES, best=BESTS,
        )  # fmt: skip
        if self.preview is not None:
            check(self, preview=FROM_0)
        for pattern, dimensions in self.sharding:
            check_pattern("sharding", pattern)
            if not mesh.divides(dimensions):
                raise SettingError("sharding", dimensions, "an axis (data, fsdp, tensor), or -, for each dimension")
        ranked = isinstance(self.best, str)
        if ranked and not self.judge:
            raise SettingError("best", self.best, "judge with it: the CLIP that measures the previews")
        for name in ("best", "patience"):
            if getattr(self, name) and not self.data.validation and not ranked:
                raise SettingError(name, getattr(self, name), "data.validation with it: the pictures to measure")
        low, high = self.times
        if not 0 <= low < high <= 1:
            raise SettingError("times", self.times, "two rising shares from 0 to 1, such as (0, 0.8)")
        if self.judge and self.preview == 0:
            raise SettingError("preview", 0, "1 or more with a judge, which measures the previews")
        if self.minutes and (KINDS[self.optim.kind].finds or self.optim.kind == "schedule_free"):
            raise SettingError("minutes", self.minutes, f"0 with optim.kind={self.optim.kind}, which plans its length")
        if self.debiased and self.min_snr:
            raise SettingError("debiased", True, f"False with min_snr={self.min_snr}: only one weighting applies")

    @property
    def previews(self) -> int:
        """The interval of previews in steps, 0 for never."""
        if self.preview is not None:
            return self.preview
        asked = self.prompts or self.prompts_file or self.judge
        return max(50, self.steps // 10) if asked else max(100, self.steps // 4)
