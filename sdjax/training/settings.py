"""A run's settings.

Train(model="pocket", method=TextualInversion(word="<cat>"), data=Data(path="photos/cat", templates="object"))
"""

from dataclasses import dataclass, field
from typing import Any

from sdjax.data.batches import Data
from sdjax.methods.full import Full
from sdjax.settings import BELOW_1, FROM_0, FROM_1, SEED, check
from sdjax.training.optim import Optim

DTYPES = ("float32", "bfloat16")


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
    min_snr: gamma of min-SNR weighting, 0 for none.  noise_offset: deviation of a constant in each channel's noise.
    preserve: weight of what the model said before, for a Full with keep=True.
    checkpoint, preview, log: every so many steps, 0 for never (a SIGTERM still saves).  keep: so many checkpoints.
    prompts: of the previews, "[name]" for the word; preview=None shows them every max(50, steps / 10) steps.
    public: what is exported says nothing of the pictures: no captions, names of folders or of the base model.
    wandb: a project of Weights & Biases that is told too.
    """

    model: str = "pocket"
    vision: str = ""
    perceptual: str = ""
    method: Any = field(default_factory=Full)
    task: str = ""
    data: Data = field(default_factory=Data)
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
    min_snr: float = 0.0
    noise_offset: float = 0.0
    preserve: float = 0.0
    checkpoint: int = 500
    keep: int = 3
    log: int = 10
    preview: int | None = None
    prompts: tuple[str, ...] = ()
    public: bool = False
    wandb: str = ""

    def __post_init__(self):
        check(
            self, steps=FROM_0, seed=SEED, ema=BELOW_1, compute=DTYPES, frozen=DTYPES,
            min_snr=FROM_0, noise_offset=FROM_0, checkpoint=FROM_0, keep=FROM_1,
            log=FROM_0, preserve=FROM_0,
        )  # fmt: skip
        if self.preview is not None:
            check(self, preview=FROM_0)

    @property
    def previews(self) -> int:
        """Every so many steps there is a preview, 0 for never."""
        return (max(50, self.steps // 10) if self.prompts else 0) if self.preview is None else self.preview
