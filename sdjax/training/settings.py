"""A run's settings.

Train(model="pocket", method=TextualInversion(word="<cat>"), data=Data(path="photos/cat", templates="object"))
"""

from dataclasses import dataclass, field
from typing import Any

from sdjax.data.batches import Data
from sdjax.data.classes import ClassData
from sdjax.diffusion import errors
from sdjax.methods.full import Full
from sdjax.settings import BELOW_1, FROM_0, FROM_1, SEED, TO_1, SettingError, check
from sdjax.training.optim import Optim

DTYPES = ("float32", "bfloat16")
FITS = ("", "8GB", "12GB", "16GB", "24GB")


@dataclass(frozen=True)
class Train:
    """A run's settings.

    model: "pocket", a diffusers folder, a single file, a hub id or a built-in shape ("random:tiny").
    vision: a folder with an image encoder for a model that has none.  perceptual: LPIPS' files, for autoencoders.
    task: text2img, inpainting or upscaling; "" for what the model is for.  Another one widens the UNet.
    init: a file or folder to start the trained weights from.
    seed: of the first weights, the order of the pictures, noise and times.  parallel: single, pmap, mesh or
    mesh:data=N,fsdp=M.  out: the run's folder; "" for outputs/NAME of the recipe; with {picture} in it one for each.
    ema: decay of the moving average of the trained weights, 0 for none.  compute, frozen: "float32" or "bfloat16".
    remat: compute activations a second time in place of keeping them.
    fit: 8GB, 12GB, 16GB or 24GB of a device's memory: sets types, remat, microbatches and, where nothing else does, the
    optimizer, and says what it chose; "" leaves them.
    class_data: pictures of the subject's class, DreamBooth's prior; see there.
    min_snr: gamma of min-SNR weighting, 0 for none.  debiased: weigh errors by 1 / sqrt(SNR).
    huber: c of the pseudo-Huber error, 0 for the squared one; huber_decay: from 1 to c over the times, by snr or
    exponential, or constant.
    noise_offset: deviation of a constant in each channel's noise.  pyramid: discount of coarser noise, 0 for none.
    perturbation: deviation of noise that the network sees and is not asked for, 0 for none.
    preserve: weight of what the model said before: of the class prompts where class_data has identifiers, else of the
    pictures' own.  A Full needs keep=True for it.
    checkpoint, preview, log: every so many steps, 0 for never (a SIGTERM still saves).  keep: so many checkpoints.
    epochs: so many times all pictures, in place of `steps`; 0 for `steps`.
    validate: every so many steps the error on data.validation is measured, at noise and times that stay the same.
    best: export the weights of the smallest such error.  patience: end after so many without a new smallest, 0 never.
    export_every: every so many steps the export is also written to exports/STEP, 0 for never.
    prompts: of the previews, "[name]" for the word; preview=None shows them every max(50, steps / 10) steps.
    prompts_file: prompts of further previews, a line each in kohya's syntax (training/prompt_lines.py).
    public: what is exported says nothing of the pictures: no captions, names of folders or of the base model.
    wandb: a project of Weights & Biases that is told too.
    """

    model: str = "pocket"
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
    init: str = ""
    out: str = ""
    ema: float = 0.0
    compute: str = "float32"
    frozen: str = "float32"
    remat: bool = False
    fit: str = ""
    min_snr: float = 0.0
    debiased: bool = False
    huber: float = 0.0
    huber_decay: str = "snr"
    noise_offset: float = 0.0
    pyramid: float = 0.0
    perturbation: float = 0.0
    preserve: float = 0.0
    checkpoint: int = 500
    keep: int = 3
    log: int = 10
    preview: int | None = None
    prompts: tuple[str, ...] = ()
    prompts_file: str = ""
    public: bool = False
    epochs: float = 0.0
    validate: int = 100
    best: bool = False
    patience: int = 0
    export_every: int = 0
    wandb: str = ""

    def __post_init__(self):
        check(
            self, steps=FROM_0, seed=SEED, ema=BELOW_1, fit=FITS, compute=DTYPES, frozen=DTYPES,
            min_snr=FROM_0, noise_offset=FROM_0, checkpoint=FROM_0, keep=FROM_1,
            log=FROM_0, preserve=FROM_0, huber=TO_1, huber_decay=errors.DECAYS, pyramid=BELOW_1, perturbation=FROM_0,
            epochs=FROM_0, validate=FROM_1, patience=FROM_0, export_every=FROM_0,
        )  # fmt: skip
        if self.preview is not None:
            check(self, preview=FROM_0)
        for name in ("best", "patience"):
            if getattr(self, name) and not self.data.validation:
                raise SettingError(name, getattr(self, name), "data.validation: the pictures whose error decides")
        if self.debiased and self.min_snr:
            raise SettingError("debiased", True, f"False with min_snr={self.min_snr}: one weighting of the times")

    @property
    def previews(self) -> int:
        """Every so many steps there is a preview, 0 for never."""
        if self.preview is not None:
            return self.preview
        return max(50, self.steps // 10) if self.prompts or self.prompts_file else 0
