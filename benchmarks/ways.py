"""The ways to personalise a model that compare.py puts side by side: a recipe, how many pictures, steps and rates.

Steps and rates of pocket are the best of a sweep on people of the validation split (compare.py --sweep); no held-out
person was looked at.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdjax import settings
from sdjax.methods.chain import Chain
from sdjax.methods.full import Full
from sdjax.methods.textual_inversion import TextualInversion
from sdjax.training.settings import Train

RECIPES = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True)
class Way:
    """One way: its recipe in configs/, the number of pictures, what prompts call the subject, and what differs.

    method: in place of the recipe's.
    """

    recipe: str
    pictures: int
    word: str
    overrides: tuple[str, ...] = ()
    method: Any = None

    def settings(self, model: str, path: str, more: tuple[str, ...] = ()) -> Train:
        """Returns the settings of a run on the pictures below `path`."""
        told = settings.load(
            RECIPES / self.recipe, [f"model={model}", f"data.path={path}", "checkpoint=0", "preview=0"]
        )
        told = replace(told, method=self.method or told.method, init=model if told.init else "")
        return settings.override(told, [*self.overrides, *more])


NEW, RARE = "<new>", "sks face"
FEW = ("data.batch=8", "min_snr=0.5", "optim.weight_decay=0.0", "optim.warmup=0")  # errors count where words do
TI = (*FEW, "method.init=face", "data.templates=face")
RARELY = (*FEW, "data.word=sks face", "data.templates=trigger")
MUON = ("optim.kind=muon", 'optim.rates=(("(bias|scale)$", 0.3),)')
BOTH = Chain((TextualInversion(NEW, init="face"), Full(("unet",), keep=True)))
POCKET = {
    "textual inversion, 1 picture": Way("textual_inversion.py", 1, NEW, (*TI, "steps=100", "optim.lr=2e-2")),
    "textual inversion, 5": Way("textual_inversion.py", 5, NEW, (*TI, "steps=100", "optim.lr=2e-2")),
    "DreamBooth, 1": Way("dreambooth.py", 1, RARE, (*RARELY, *MUON, "steps=40", "optim.lr=2.4e-3")),
    "DreamBooth, 5": Way("dreambooth.py", 5, RARE, (*RARELY, *MUON, "steps=40", "optim.lr=2.4e-3")),
    "textual inversion + DreamBooth, 5": Way(
        "pivotal.py", 5, NEW, (*FEW, *MUON, "steps=40", "optim.lr=2.4e-3"), BOTH
    ),
    "LoRA, 5": Way("lora.py", 5, RARE, (*RARELY, "steps=60", "optim.lr=2e-3")),
    "hypernetwork, 5": Way(
        "hypernetwork.py", 5, "face", (*FEW, "data.word=face", "data.templates=trigger", "steps=60", "optim.lr=2e-3")
    ),
    "Custom Diffusion, 5": Way(
        "custom_diffusion.py", 5, NEW,
        (*FEW, "method.parts.0.init=face", 'optim.rates=(("rows", 5.0),)', "steps=60", "optim.lr=2e-3"),
    ),
    "E4T, 1": Way("pocket/tune.py", 1, "*s", ("steps=10",)),
}  # fmt: skip
