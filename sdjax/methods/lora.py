"""LoRA and its relatives: trained low-rank changes of chosen layers; the weights stay frozen.

    Lora(rank=16)                                          the UNet's transformers, 192 layers of SD 1.5
    Lora(text_encoder=True, convolutions=8)                with the text encoder, and LoCon: residual blocks at rank 8
    Lora(algo="dora", ranks=((r"up_blocks", 32), (r"attn1", 0)))
    Chain((TextualInversion("<cat>"), Lora()))             pivotal tuning

LoRA+ and rates per block are settings of the optimizer: optim.rates=((r"down_blocks.*up$", 8), (r"up$", 16)).
Sources: deltas/*.py; rsLoRA: Kalajdzievski 2023 (arXiv 2312.03732); LoRA+: Hayou et al. 2024 (arXiv 2402.12354);
dropout of ranks and modules, and the largest norm: sd-scripts.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from sdjax import settings, trees
from sdjax.methods import deltas
from sdjax.methods.adapter import Adapter
from sdjax.methods.branches import Branches
from sdjax.methods.deltas.layer import Draw
from sdjax.methods.edits import Factored
from sdjax.methods.method import Method, about
from sdjax.models.axes import to_file
from sdjax.settings import BELOW_1, FROM_0, FROM_1, SettingError
from sdjax.stable_diffusion import StableDiffusion

INITS = ("default", "pissa")
BEGUN = "lora"  # in reference.own: {part: {module: factors}} that training subtracted from the base
TEXT = r"^text_encoder(_\d)?\..*\.(self_attn|mlp)\."  # 72 layers of SD 1's
CONVOLUTIONS = r"^unet\..*\.(resnets|downsamplers|upsamplers)\."  # 86 layers of SD 1.5


@dataclass(frozen=True)
class Lora(Method):
    """Trains low-rank changes of the layers whose name matches `targets`: LoRA, DoRA, LoHa, LoKr or OFT.

    rank: r; for oft the largest block.
    alpha: the change is scaled by alpha / rank; None is the rank.  rslora: scale by alpha / sqrt(rank).
    algo: lora, dora, loha, lokr or oft.
    targets: regular expression of layer names such as "unet.mid_block.attentions.0.proj_in".
    text_encoder: also train layers of the text encoder.
    convolutions: rank of convolutions in residual blocks and resampling (LoCon); 0 is off.
    ranks: (pattern, rank) pairs; the first match sets a layer's rank, 0 leaves the layer out.  All ranks share the
    quotient alpha / rank.
    init: for lora and dora; pissa starts from the largest singular values and removes them from the base.
    dropout: rate between LoRA's factors, drawn per example.  rank_dropout: rate for ranks (loha and lokr: outputs; oft:
    blocks).  module_dropout: rate for whole changes.
    max_norm: largest norm of a change, enforced after each step; 0 is off.
    factor: for lokr, how to split sizes; -1 splits as evenly as possible.  constraint: for oft, per output; 0 is off.
    """

    rank: int = 16
    alpha: float | None = None
    algo: str = "lora"
    targets: str = r"^unet\..*\battentions\."
    text_encoder: bool = False
    convolutions: int = 0
    ranks: tuple[tuple[str, int], ...] = ()
    rslora: bool = False
    init: str = "default"
    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    max_norm: float = 0.0
    factor: int = -1
    constraint: float = 0.0
    formats = ("kohya", "diffusers", "peft")

    def __post_init__(self):
        settings.check(
            self, rank=FROM_1, algo=deltas.algorithms(), init=INITS, convolutions=FROM_0, dropout=BELOW_1,
            rank_dropout=BELOW_1, module_dropout=BELOW_1, max_norm=FROM_0, constraint=FROM_0,
        )  # fmt: skip
        settings.check_pattern("targets", self.targets)
        if self.alpha is not None:
            settings.check(self, alpha=settings.ABOVE_0)
        for pattern, rank in self.ranks:
            settings.check_pattern("ranks", pattern)
            if type(rank) is not int or rank < 0:
                raise SettingError("ranks", self.ranks, "(pattern, rank) pairs, ranks from 0")
        if self.factor != -1 and self.factor < 1:
            raise SettingError("factor", self.factor, "-1, or a number of at least 1")
        thin = self.algo in ("lora", "dora")
        if self.init != "default" and not thin:
            raise SettingError("init", self.init, f"default with algo={self.algo!r}")
        if self.dropout and not thin:
            raise SettingError("dropout", self.dropout, f"0 with algo={self.algo!r}; rank_dropout is for all")
        if self.init != "default" and (self.dropout or self.rank_dropout or self.module_dropout or self.max_norm):
            raise SettingError("init", self.init, "default with dropout or max_norm")

    # ---- which layers ----------------------------------------------------------------------------

    def _chosen(self, sd):
        """Returns {part: {module: (kernel, rank)}} of the trained layers."""
        found = {}
        for part, tree in sd.parts.items():
            if part != "unet" and not part.startswith("text_encoder"):
                continue
            for name, kernel in trees.flatten(tree).items():
                module = name.removesuffix(".kernel")
                rank = self._rank(f"{part}.{module}") if name.endswith(".kernel") and kernel.ndim in (2, 4) else 0
                if rank:
                    found.setdefault(part, {})[module] = (kernel, rank)
        if not found:
            raise SettingError(
                "targets", self.targets, "a match among names such as unet.mid_block.attentions.0.proj_in"
            )
        return found

    def _rank(self, name):
        """Returns the rank of a layer; 0 if it does not train."""
        own = next((rank for pattern, rank in self.ranks if re.search(pattern, name)), None)
        convolution = bool(self.convolutions and re.search(CONVOLUTIONS, name))
        if not (convolution or re.search(self.targets, name) or self.text_encoder and re.search(TEXT, name)):
            return 0
        return own if own is not None else self.convolutions if convolution else self.rank

    def scale(self, rank: int) -> float:
        """Returns a, the scale of the product of a layer's factors."""
        alpha = rank if self.alpha is None else self.alpha * rank / self.rank
        return alpha / rank**0.5 if self.rslora else alpha / rank

    # ---- the method ------------------------------------------------------------------------------

    def split(self, sd: StableDiffusion, key: Array | None = None) -> tuple[dict[str, Any], StableDiffusion]:
        """Returns ({part: {module: factors}}, sd); the initial change is zero.

        Raises SettingError if no layer matches or a setting does not fit one.
        """
        trained, kind = {}, deltas.named(self.algo)
        for part, modules in self._chosen(sd).items():
            trained[part] = {}
            for module, (kernel, rank) in modules.items():
                named = jax.random.key(0) if key is None else trees.named_key(key, f"{part}.{module}")
                draw = Draw(np.random.default_rng(np.asarray(jax.random.key_data(named))))

                def start(kernel, rank=rank, draw=draw):
                    return kind.start(to_file(kernel.astype(jnp.float32)), rank, draw, self)

                shapes = key is None and self.init == "default"
                trained[part][module] = jax.eval_shape(start, kernel) if shapes else start(kernel)
        return trained, self._without_start(trained, sd) if self.init != "default" else sd

    def _without_start(self, trained, sd):
        """Returns sd with the initial factors that training subtracts from its weights in reference.own."""
        if BEGUN in sd.reference.own:
            raise SettingError("init", self.init, "default: the model's weights have lost a part already")
        first = {
            part: {module: {"down": f["down"], "up": f["up"]} for module, f in modules.items()}
            for part, modules in trained.items()
        }
        return sd.with_own(**{BEGUN: trees.copy(first)})

    def join(self, frozen: StableDiffusion, trained: Any, key: Key[Array, "..."] | None = None) -> StableDiffusion:
        """Returns sd with the changes as a hook around its layers.

        key: for dropout; one per example [B], or a single one.
        """
        random = self.dropout or self.rank_dropout or self.module_dropout
        keys = None if key is None or not random else key if key.ndim else key[None]
        rates = {"units": self.dropout, "ranks": self.rank_dropout, "modules": self.module_dropout}
        frozen, factors = self._taken(frozen, trained)
        return frozen.add(hooks=Branches(factors, keys, **rates))

    def _taken(self, frozen, trained):
        """Returns (frozen without this method's own data, {part: {module: all factors of a change}})."""
        own = dict(frozen.reference.own)
        first = own.pop(BEGUN, {}) if self.init != "default" else {}
        factors = {
            part: {module: self._whole(f, first.get(part, {}).get(module)) for module, f in modules.items()}
            for part, modules in trained.items()
        }
        return frozen.with_reference(own=own), factors

    def _whole(self, f, first=None):
        """Returns a layer's factors with scale and alpha.

        first: the initial factors, which are subtracted by concatenation, at twice the rank.
        """
        if self.algo == "oft":
            blocks, side, _ = f["oft_blocks"].shape
            most = self.constraint * blocks * side
            return {**f, "alpha": np.float32(self.constraint), "constraint": np.float32(most)}
        rank, scale = self._ranked(f), self.scale_of(f)
        assert scale is not None  # only OFT has none
        alpha = scale * (rank or 1) * (2 if first else 1)
        made = {**f, "scale": np.float32(scale), "alpha": np.float32(alpha)}
        if first is not None:
            made["down"] = jnp.concatenate([f["down"], first["down"]])
            made["up"] = jnp.concatenate([f["up"], -first["up"]], axis=1)
        return made

    def scale_of(self, f: Mapping[str, Any]) -> float | None:
        """Returns the factor of a change with factors {name: array}: 1 without a rank, None for OFT."""
        rank = self._ranked(f)
        return None if self.algo == "oft" else 1.0 if rank is None else self.scale(rank)

    def _ranked(self, f):
        return next((len(f[name]) for name in deltas.named(self.algo).ranked if name in f), None)

    def edited(self, trained: Any) -> set[str]:
        """Returns the names of the kernels that train."""
        return {f"{part}.{module}.kernel" for part, modules in trained.items() for module in modules}

    def adapter(self, frozen: StableDiffusion, trained: Any) -> Adapter | None:
        """Returns the changes as edits of weights, float32."""
        _, factors = self._taken(frozen, trained)
        edits = {
            part: {f"{module}.kernel": Factored(jax.tree.map(np.asarray, f)) for module, f in modules.items()}
            for part, modules in factors.items()
        }
        return Adapter(edits=edits, about=about(self))

    @property
    def project(self) -> Callable | None:
        """Scales changes with a norm above max_norm down to it, after each step; None without a bound."""
        return self._shrunk if self.max_norm else None

    def _shrunk(self, trained):
        """Returns the trained factors with every change's norm at most max_norm; all its factors shrink equally."""
        kind = deltas.named(self.algo)

        def shrink(f):
            ratio = jnp.minimum(1.0, self.max_norm / kind.size(self._whole(f)))
            share = 1 / len(f.keys() & set(kind.multiplied))
            return {name: x * ratio**share if name in kind.multiplied else x for name, x in f.items()}

        return {part: {module: shrink(f) for module, f in modules.items()} for part, modules in trained.items()}
