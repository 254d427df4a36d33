"""E4T: an encoder that turns one image into a word, and weight offsets that teach the UNet a domain.

    E4T(word="*s", domain="face")                                      pre-training on a domain
    Chain((E4T(word="*s", domain="face"), Full(("unet",))))            5 to 15 steps on one image

A head (methods/heads/) computes an offset E from a vision tower's features of the concept image, and from the UNet's
features of the current noisy latents with the empty prompt.  E moves the domain's row of the token table:

    v* = e_domain + s E(image, z_t, t),     loss = |eps - U(z_t, t, T(prompt with v*))|^2 + lambda |E|^2

Source: Gal et al. 2023, "Encoder-based Domain Tuning" (arXiv 2302.12228), figure 2 and section 4.  The paper does not
define the penalty; our choice is E (per example, summed over C) rather than v*.  Pre-training creates the paper's head.
Tuning takes the head of its initial file, so it also works with the public encoder of the unofficial E4T, which has its
penalty on v* (heads/tokens.py).
"""

from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Float32, Int, Num

from sdjax import trees
from sdjax.diffusion.noise_schedule import add_noise
from sdjax.methods import branches, heads, offsets
from sdjax.methods.adapter import Adapter
from sdjax.methods.heads.head import Head
from sdjax.methods.heads.layers import Layers
from sdjax.methods.method import Method, about
from sdjax.methods.seen import E4T_OWN, ENCODER, Seen, empty, half, seen_by, with_seen
from sdjax.models.cond import Cond
from sdjax.models.conditioner import Conditioner
from sdjax.settings import FACTOR, FROM_0, SettingError, check
from sdjax.stable_diffusion import StableDiffusion
from sdjax.text import conditioning


@dataclass(frozen=True)
class E4T(Method):
    """Trains E4T's encoder head and weight offsets, optionally the vision tower.

    word: the placeholder in prompts.  domain: the word that it starts from.
    scale: s, 0.1 in the paper.
    penalty: lambda, per example; the unofficial code's 0.01 for pre-training applies to the sum over the batch, so
    multiply it by the batch size.
    features: "all" maps of the UNet's encoder (13 for SD 1.5), or the last of each "level" (4).
    vision: also train a copy of the image encoder.
    """

    word: str = "*s"
    domain: str = "face"
    scale: float = 0.1
    penalty: float = 0.01
    features: str = "all"
    vision: bool = False
    formats = ("e4t", "e4t-port")

    def __post_init__(self):
        check(self, features=("all", "level"), penalty=FROM_0, scale=FACTOR)

    @property
    def words(self) -> tuple[str, ...]:
        """The one placeholder."""
        return (self.word,)

    def split(self, sd: StableDiffusion, key: Array | None = None) -> tuple[dict[str, Any], StableDiffusion]:
        """Returns ({"head", "offsets"[, "vision"]}, sd with the word, and its pretrained encoder half in `reference`).

        key=None: head and offsets are shapes, for a file to fill; SD 1.5's offsets would be 143 million random numbers.
        Raises ValueError if the domain word is not one token, the model has no image encoder, or has several text
        encoders.
        """
        if "image_encoder" not in sd.parts:
            raise ValueError("method=E4T: the model has no image_encoder; give it one with vision=FOLDER")
        if tuple(sd.tokenizers) != (ENCODER,):
            raise ValueError(f"method=E4T: the model has {len(sd.tokenizers)} text encoders; expected one")
        domain = sd.tokenizers[ENCODER].ids(self.domain)
        if len(domain) != 1:
            raise SettingError("domain", self.domain, f"a word of one token for this model, not of {len(domain)}")
        sd = sd.add_word(self.word, 1, self.domain)
        k_head, k_offsets = (None, None) if key is None else jax.random.split(key)
        seen, domain = sd.reference.own.get(E4T_OWN), jnp.array(domain, jnp.int32)
        nothing = jnp.asarray(sd.tokenize([""])[ENCODER])
        seen = Seen(half(sd), empty(sd), domain, nothing) if seen is None else seen.replace(domain=domain)
        sd = sd.with_own(**{E4T_OWN: seen})
        trained = {"head": self.head(sd, k_head), "offsets": offsets.create(sd.parts["unet"], k_offsets)}
        if self.vision:
            trained["vision"] = trees.copy(sd.parts["image_encoder"], jnp.float32)
        return trained, sd

    def join(self, frozen: StableDiffusion, trained: Any, key: Array | None = None) -> StableDiffusion:
        """Returns sd with the encoder as a conditioner and the offsets in its weights.

        If the UNet computes in less than float32, the offsets are a hook: rounding the weights would lose small ones.
        """
        unet, stacked = frozen.parts["unet"], trained["offsets"]
        sd = frozen.add(conditioners=self._encoder(frozen, trained))
        if jnp.dtype(frozen.networks["unet"].dtype) != jnp.float32:
            return sd.add(hooks=offsets.beside(unet, stacked))
        return sd.with_parts(unet=offsets.apply(unet, stacked))

    def adapter(self, frozen: StableDiffusion, trained: Any) -> Adapter | None:
        """Returns the encoder, the offsets by weight, the encoder's reference models and its picture.

        The adapter is for the model without E4T: `frozen`.
        """
        own = {**trained, "offsets": offsets.by_name(frozen.parts["unet"], trained["offsets"])}
        seen = seen_by(frozen)
        if seen.unet is not None:
            own["reference"] = {"unet": seen.unet, "empty": seen.empty}
        if seen.concept is not None:
            own["concept"] = seen.concept
        return Adapter(trees=own, about=about(self), model=frozen)

    def look(self, frozen: StableDiffusion, trained: Any, pixels: Array) -> StableDiffusion:
        """Returns frozen with the run's only picture, [H W 3] in [-1, 1], and its features.

        If the tower trains, features are computed at every step instead.
        """
        if self.vision:
            return with_seen(frozen, concept=pixels)
        return _seen(self._encoder(frozen, trained), frozen, pixels)

    def _encoder(self, frozen, trained):
        tower = trained.get("vision", frozen.parts["image_encoder"])
        head = heads.of(trees.names(trained["head"]), self.features)
        static = {"kind": head, "network": frozen.networks["image_encoder"]}
        return Encoder(trained["head"], tower, frozen.ids(self.word)[ENCODER], self.scale, self.penalty, **static)

    def head(self, sd: StableDiffusion, key: Array | None = None) -> dict[str, Any]:
        """Returns the initial weights of the paper's head, see heads/layers.py; without a key, their shapes."""
        made = Layers(self.features)
        return made.shapes(sd) if key is None else made.create(sd, key)


class Encoder(struct.PyTreeNode, Conditioner):
    """E4T's encoder as a conditioner: predicts v* at every denoising step and encodes the prompt with it.

    head: the weights of `kind`.  tower: the weights of the vision tower `network`.  word: int32 [1], the word's id.
    strength: another factor of E, from an adapter; 0 gives the domain word.
    """

    head: Any
    tower: Any
    word: Any
    scale: Any
    penalty: Any
    strength: Any = 1.0
    kind: Head = struct.field(pytree_node=False, default=Layers())  # noqa: RUF009 a frozen value
    network: Any = struct.field(pytree_node=False, default=None)

    @property
    def remade(self) -> dict[str, Any]:
        """The word's id."""
        return {ENCODER: self.word}

    def bound(self, words: dict[str, dict[str, Any]]) -> Self:
        """Returns the encoder with the id that its word has in a model."""
        (ids,) = words.values()
        return self.replace(word=ids[ENCODER])

    def __call__(
        self, sd: StableDiffusion, z: Float[Array, "B h w c"], t: Num[Array, " B"], i: Int[Array, ""] | int, cond: Cond
    ) -> tuple[Cond, dict[str, Any]]:
        move = self.offset(sd, z, t, cond)  # [B C]
        row = sd.embed(ENCODER, seen_by(sd).domain[None])[0]  # [1 C]
        row = jax.lax.stop_gradient(row) if self.kind.still else row
        vector = row + self.strength * self.scale * move

        def told(one):
            ids = one.words[ENCODER]["ids"]
            emb = sd.embed(ENCODER, ids)  # [B L C]
            emb = jnp.where((ids == self.word[0])[..., None], vector[:, None].astype(emb.dtype), emb)
            return conditioning.reread(sd, one, {ENCODER: emb})

        negative = None if cond.negative is None else told(cond.negative)
        cond = told(cond).replace(also=tuple(map(told, cond.also)), negative=negative)
        return cond, {"penalty": self.penalty * jnp.sum(self.kind.penalised(move, vector) ** 2, axis=1)}

    def offset(
        self, sd: StableDiffusion, z: Float[Array, "B h w c"], t: Num[Array, " B"], cond: Cond
    ) -> Float[Array, "B C"]:
        """Returns E [B C] for latents z [B h w c] at times t [B]."""
        features = seen_by(sd).features  # [1 n D] or [B n D]
        features = self.see(_concept(sd, cond)) if features is None else features
        return self.kind.move(self.head, features, self.kind.maps(sd, z, t))

    def see(self, pixels: Float[Array, "B H W 3"]) -> Float32[Array, "B n D"]:
        """Returns the head's features of pixels [B H W 3] in [-1, 1], from the vision tower, float32 [B n D]."""
        return self.kind.see(self.network, self.tower, pixels)


def _concept(sd, cond):
    """Returns the pictures for the encoder, [B H W 3]: each row's own, or else the run's only one."""
    if "concept" not in cond.own and seen_by(sd).concept is None:
        raise ValueError("data.concept='': the encoder needs one picture, or with several 'same' or 'other'")
    return cond.own["concept"] if "concept" in cond.own else seen_by(sd).concept[None]


def look(sd: StableDiffusion, pixels: Float[Array, "H W 3"]) -> StableDiffusion:
    """Returns sd with one picture for its E4T encoder, pixels [H W 3] in [-1, 1]; computes its CLIP features once.

    Raises ValueError if sd has no E4T encoder.
    """
    encoders = [c for c in sd.conditioners if isinstance(c, Encoder)]
    if len(encoders) != 1:
        raise ValueError(f"the model has {len(encoders)} E4T encoders; one is needed to look at an image")
    return _seen(encoders[0], sd, pixels)


def _seen(encoder, sd, pixels):
    return with_seen(sd, concept=pixels, features=features(encoder, pixels))


def features(encoder: Encoder, pixels: Float[Array, "H W 3"]) -> Float32[Array, "1 n D"]:
    """Returns the features of one picture for an encoder's head, pixels [H W 3] in [-1, 1]."""
    return _see(encoder, pixels[None])


@jax.jit
def _see(encoder, pixels):
    return encoder.see(pixels)


def plain_model(sd: StableDiffusion, levels: int = 32) -> StableDiffusion:
    """Returns sd without its encoder; the word's embedding is the mean of v* over `levels` noise levels of its own
    picture.

    Programs without an encoder can load the result; the weights already contain the offsets.
    Our choice: times spread evenly over the schedule, noise from fixed seeds, one embedding for all times.
    Raises ValueError if sd has no E4T encoder with a picture.
    """
    encoders = [c for c in sd.conditioners if isinstance(c, Encoder)]
    if len(encoders) != 1 or seen_by(sd).concept is None:
        raise ValueError("the model has no E4T encoder that looks at a picture")
    (encoder,) = encoders
    t = jnp.linspace(0, sd.schedule.num_train_timesteps - 1, levels).round().astype(jnp.int32)
    z = sd.encode(seen_by(sd).concept[None])
    noise = jax.random.normal(jax.random.key(0), (levels, *z.shape[1:]))
    noisy = add_noise(sd.schedule, jnp.broadcast_to(z, noise.shape), noise, t)
    move = jax.jit(Encoder.offset)(encoder, sd, noisy, t.astype(jnp.float32), Cond()).mean(0)
    row = sd.embed(ENCODER, seen_by(sd).domain[None])[0] + encoder.strength * encoder.scale * move[None]  # [1 C]
    others = tuple(c for c in sd.conditioners if c is not encoder)
    own = {name: tree for name, tree in sd.reference.own.items() if name != E4T_OWN}
    bare = branches.merged(sd.replace(conditioners=others).with_reference(own=own, attached=None))
    return bare.with_rows({ENCODER: encoder.word}, {ENCODER: row})
