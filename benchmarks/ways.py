"""The ways to personalise a model that compare.py puts side by side: a recipe, how many pictures, steps and rates.

Steps and rates of pocket are the best of a sweep on people of the validation split (compare.py --sweep); no held-out
person was looked at.
"""

from dataclasses import dataclass
from pathlib import Path

from sdjax import settings
from sdjax.training.loop import Train

RECIPES = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True)
class Way:
    """One way: its recipe in configs/, the number of pictures, what prompts call the subject, and what differs."""

    recipe: str
    pictures: int
    word: str
    overrides: tuple[str, ...] = ()

    def settings(self, model: str, path: str, more: tuple[str, ...] = ()) -> Train:
        """Returns the settings of a run on the pictures below `path`."""
        quiet = (f"model={model}", f"data.path={path}", "checkpoint=0", "preview=0")
        return settings.load(RECIPES / self.recipe, [*quiet, *self.overrides, *more])


TI = ("method.init=face", "method.word=<new>", "data.templates=face")
NEW = "<new>"
POCKET = {
    "textual inversion, 1 picture": Way("textual_inversion.py", 1, NEW, (*TI, "steps=150", "data.batch=16")),
    "textual inversion, 5": Way("textual_inversion.py", 5, NEW, (*TI, "steps=300", "data.batch=16")),
    "DreamBooth, 1": Way("dreambooth.py", 1, "sks face", ("steps=30", "data.batch=16")),
    "DreamBooth, 5": Way("dreambooth.py", 5, "sks face", ("steps=60", "data.batch=16")),
    "textual inversion + DreamBooth, 5": Way("pivotal.py", 5, NEW, ("steps=60", "data.batch=16")),
    "LoRA, 5": Way("lora.py", 5, "sks face", ("steps=100", "data.batch=16")),
    "hypernetwork, 5": Way("hypernetwork.py", 5, "face", ("steps=100", "data.batch=16")),
    "Custom Diffusion, 5": Way("custom_diffusion.py", 5, NEW, ("steps=100", "data.batch=16")),
    "E4T, 1": Way("pocket/tune.py", 1, "*s", ("steps=10",)),
}
