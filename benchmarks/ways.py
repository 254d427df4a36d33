"""The ways to personalise a model that compare.py compares: recipe, number of pictures, steps and learning rates.

    of("pocket", "face")["LoRA, 5"].settings("pocket", "photos")

For pocket, steps and rates are the best of sweeps on validation people (compare.py --sweep), or first guesses;
docs/log/2026-11.md tells which.  No choice used a held-out person.  Other models use the recipes' own values.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from sdjax import settings
from sdjax.training.settings import Train

CONFIGS = Path(__file__).parents[1] / "configs"
NEW, RARE = "<new>", "sks"


@dataclass(frozen=True)
class Way:
    """A way: its recipe in configs/, the number of pictures, the subject's word in prompts, and further settings."""

    recipe: str
    pictures: int
    word: str
    overrides: tuple[str, ...] = ()

    def settings(self, model: str, path: str, more: tuple[str, ...] = (), init: str = "", vision: str = "") -> Train:
        """Returns the settings of a run on the pictures below `path`.

        init, vision: E4T's encoder, if the model does not hold it, and its image encoder; other ways ignore them.
        """
        quiet = [f"model={model}", f"data.path={path}", "checkpoint=0", "preview=0"]
        told = settings.load(CONFIGS / self.recipe, quiet)
        encoder = {"init": init or model, "vision": vision} if told.init else {}
        return settings.override(replace(told, **encoder), [*self.overrides, *more])


# min_snr: times of low noise, at which words hardly matter, count less.
FEW = ("data.batch=8", "min_snr=0.5", "optim.weight_decay=0.0", "optim.warmup=0")
MUON = ("optim.kind=muon", 'optim.rates=(("(bias|scale)$", 0.3),)')
BOTH = ("optim.kind=muon", 'optim.rates=(("rows", 5.0), ("(bias|scale)$", 0.3))')
POCKET = {
    "textual inversion, 1 picture": (*FEW, "steps=60", "optim.lr=2e-2"),
    "textual inversion, 5": (*FEW, "steps=120", "optim.lr=5e-3"),
    "DreamBooth, 1": (*FEW, *MUON, "steps=20", "optim.lr=2.4e-3", "preserve=0"),
    "DreamBooth, 5": (*FEW, *MUON, "steps=40", "optim.lr=2.4e-3", "preserve=0"),
    "textual inversion + DreamBooth, 5": (*FEW, *BOTH, "steps=40", "optim.lr=2.4e-3", "preserve=0"),
    "LoRA, 5": (*FEW, "steps=60", "optim.lr=2e-3", "method.convolutions=16"),
    "hypernetwork, 5": (*FEW, "steps=120", "optim.lr=2e-3"),
    "Custom Diffusion, 5": (*FEW, 'optim.rates=(("rows", 5.0),)', "steps=60", "optim.lr=2e-3"),
    "E4T, 1": ("steps=10",),
}


def of(model: str, domain: str) -> dict[str, Way]:
    """Returns {name: Way} of a model, for subjects of a domain such as "face"; E4T takes its last word."""
    rare = f"{RARE} {domain}"
    called = lambda word: (f"data.word={word}", "data.templates=trigger")  # noqa: E731
    init = (f"method.init={domain}", f"data.templates={'face' if domain == 'face' else 'object'}")
    own = ("e4t_tune.py", (f"method.parts.0.domain={domain.split()[-1]}",))
    e4t = ("pocket/tune.py", ()) if model == "pocket" else own
    ways = {
        "textual inversion, 1 picture": Way("textual_inversion.py", 1, NEW, init),
        "textual inversion, 5": Way("textual_inversion.py", 5, NEW, init),
        "DreamBooth, 1": Way("dreambooth.py", 1, rare, called(rare)),
        "DreamBooth, 5": Way("dreambooth.py", 5, rare, called(rare)),
        "textual inversion + DreamBooth, 5": Way("dreambooth_word.py", 5, NEW, (f"method.parts.0.init={domain}",)),
        "LoRA, 5": Way("lora.py", 5, rare, called(rare)),
        "hypernetwork, 5": Way("hypernetwork.py", 5, domain, called(domain)),
        "Custom Diffusion, 5": Way("custom_diffusion.py", 5, NEW, (f"method.parts.0.init={domain}",)),
        "E4T, 1": Way(e4t[0], 1, "*s", e4t[1]),
    }
    chosen = POCKET if model == "pocket" else {}
    return {name: replace(way, overrides=(*way.overrides, *chosen.get(name, ()))) for name, way in ways.items()}
