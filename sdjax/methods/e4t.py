"""E4T: an encoder that turns one image into a word, and weight offsets that teach the UNet a domain.

    E4T(word="*s", domain="face")                                      pre-training on a domain
    Chain((E4T(word="*s", domain="face"), Full(("unet",))))            5 to 15 steps on one image

The encoder sees the class tokens of every second CLIP layer of the concept image, and the features of the *pretrained*
UNet on the current noisy latents with the empty prompt.  Its offset E moves the domain's row of the token table:

    v* = e_domain + s E(image, z_t, t),     loss = |eps - U(z_t, t, T(prompt with v*))|^2 + lambda |E|^2

Source: Gal et al. 2023, "Encoder-based Domain Tuning" (arXiv 2302.12228), figure 2 and section 4.  Open in the paper
and our choice: one linear map per CLIP layer, the UNet's maps that are pooled, a zero start of the last map, the
penalty on E (per example, summed over C) rather than on v*.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Float32, Int, Num

from sdjax import trees
from sdjax.diffusion.schedule import add_noise
from sdjax.methods import branches, offsets
from sdjax.methods.adapter import Adapter
from sdjax.methods.method import Method, about
from sdjax.models.clip import clip_pixels
from sdjax.models.cond import Cond
from sdjax.models.conditioner import Conditioner
from sdjax.models.reference import Reference
from sdjax.models.unet import UNetConfig
from sdjax.settings import FROM_0, SettingError, check
from sdjax.stable_diffusion import StableDiffusion
from sdjax.text import conditioning
from sdjax.trees import Tree

ENCODER = "text_encoder"  # whose rows the encoder makes
E4T_OWN = "e4t"  # in reference.own: a Seen
HALF = r"^(conv_in|time_embedding|class_embedding|down_blocks|mid_block)\b"  # what `features_only` runs


class Seen(struct.PyTreeNode):
    """What the encoder reads beside latents and times.

    unet, empty [1 L C]: the pretrained UNet's down half, and what it is told of the empty prompt.  domain int32 [1]:
    the domain's token.  concept [H W 3]: the picture, None where batches bring theirs; classes [1 n D]: its class
    tokens, None where they are made anew.
    """

    unet: Any
    empty: Any
    domain: Any
    concept: Any = None
    classes: Any = None


@dataclass(frozen=True)
class E4T(Method):
    """Trains the encoder's head, the offsets and, where asked for, the vision tower.

    scale: s, the paper's 0.1.  penalty: lambda; the unofficial code's 0.01 for pre-training.
    features: "all" maps of the UNet's down half (13 for SD 1.5) or the last of each "level" (4).
    vision: train a copy of the image encoder too.
    """

    word: str = "*s"
    domain: str = "face"
    scale: float = 0.1
    penalty: float = 0.01
    features: str = "all"
    vision: bool = False
    formats = ("e4t",)

    def __post_init__(self):
        check(self, features=("all", "level"), penalty=FROM_0)

    @property
    def words(self) -> tuple[str, ...]:
        """The one placeholder."""
        return (self.word,)

    def split(self, sd: StableDiffusion, key: Array | None = None) -> tuple[dict[str, Any], StableDiffusion]:
        """Returns ({"head", "offsets"[, "vision"]}, sd that knows the word and keeps its pretrained half as reference).

        key=None: head and offsets are shapes; SD 1.5's offsets are 143 million numbers to draw, which a file replaces.
        Raises ValueError when the domain word is not one token, or the model has no image encoder or not one text
        encoder.
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
        seen = Seen(half(sd), empty(sd), domain) if seen is None else seen.replace(domain=domain)
        sd = sd.with_own(**{E4T_OWN: seen})
        trained = {"head": self.head(sd, k_head), "offsets": offsets.create(sd.parts["unet"], k_offsets)}
        if self.vision:
            trained["vision"] = trees.copy(sd.parts["image_encoder"], jnp.float32)
        return trained, sd

    def join(self, frozen: StableDiffusion, trained: Any, key: Array | None = None) -> StableDiffusion:
        """Returns sd with the encoder as a conditioner, and the offsets in its weights.

        They are a hook where the UNet computes in less than float32, which would round small ones away.
        """
        unet, stacked = frozen.parts["unet"], trained["offsets"]
        sd = frozen.add(conditioners=self._encoder(frozen, trained))
        if jnp.dtype(frozen.networks["unet"].dtype) != jnp.float32:
            return sd.add(hooks=offsets.beside(unet, stacked))
        return sd.with_parts(unet=offsets.apply(unet, stacked))

    def adapter(self, frozen: StableDiffusion, trained: Any) -> Adapter | None:
        """Returns the encoder, the offsets by weight, what the encoder reads and the picture that it looked at.

        It belongs into the model without it: `frozen` as it is.
        """
        own = {**trained, "offsets": offsets.by_name(frozen.parts["unet"], trained["offsets"])}
        seen = seen_by(frozen)
        own["reference"] = {"unet": seen.unet, "empty": seen.empty}
        if seen.concept is not None:
            own["concept"] = seen.concept
        return Adapter(trees=own, about=about(self), model=frozen)

    def look(self, frozen: StableDiffusion, trained: Any, pixels: Array) -> StableDiffusion:
        """Returns frozen that has seen the one picture of a run, [H W 3] in [-1, 1]; a tower that trains looks anew."""
        if self.vision:
            return with_seen(frozen, concept=pixels)
        return _seen(self._encoder(frozen, trained), frozen, pixels)

    def _encoder(self, frozen, trained):
        tower = trained.get("vision", frozen.parts["image_encoder"])
        word, level = frozen.words[self.word][ENCODER], self.features == "level"
        return Encoder(trained["head"], tower, word, self.scale, self.penalty, level)

    def head(self, sd: StableDiffusion, key: Array | None = None) -> dict[str, Any]:
        """Returns the head's parameters: {"clip": {layer: linear D -> D}, "final": linear -> C, zero}; or shapes."""
        if key is None:
            return jax.eval_shape(lambda: self.head(sd, jax.random.key(0)))
        vision, unet = sd.networks["image_encoder"].config, sd.networks["unet"].config
        width, layers = vision.hidden_size, vision.num_hidden_layers // 2
        maps = map_widths(unet)
        pooled = sum(maps[i] for i in level_maps(unet)) if self.features == "level" else sum(maps)
        kernels = jax.random.normal(key, (layers, width, width)) * width**-0.5
        clip = {str(i): {"kernel": kernels[i], "bias": jnp.zeros(width)} for i in range(layers)}
        context = sd.table(ENCODER).shape[1]
        return {"clip": clip, "final": {"kernel": jnp.zeros((width + pooled, context)), "bias": jnp.zeros(context)}}


def seen_by(sd: StableDiffusion) -> Seen:
    """Returns what the encoder of sd reads."""
    return sd.reference.own[E4T_OWN]


def with_seen(sd: StableDiffusion, **fields: Any) -> StableDiffusion:
    """Returns sd whose encoder reads other things, such as concept=pixels."""
    return sd.with_own(**{E4T_OWN: seen_by(sd).replace(**fields)})


def half(sd: StableDiffusion) -> Tree:
    """Returns the weights of sd's UNet that its features come from."""
    return trees.partition(sd.parts["unet"], HALF)[0]


def empty(sd: StableDiffusion) -> Float[Array, "1 L C"]:
    """Returns what the UNet is told of the empty prompt, [1 L C]."""
    return jax.jit(lambda sd, ids: sd.condition(ids).unet.context)(sd, sd.tokenize([""]))


def map_widths(config: UNetConfig) -> tuple[int, ...]:
    """Returns the channels of the UNet's feature maps: conv_in, every block and downsampler, the middle.

    SD 1.5: 13 maps, 10880 channels together.
    """
    channels, last = config.block_out_channels, len(config.block_out_channels) - 1
    widths = [channels[0]]
    for level, (width, count) in enumerate(zip(channels, config.levels("layers_per_block"), strict=True)):
        widths += [width] * (count + (level < last))
    return (*widths, channels[-1])


def level_maps(config: UNetConfig) -> tuple[int, ...]:
    """Returns which maps are the last before each downsampler and the middle: (2, 5, 8, 12) for SD 1.5."""
    ends = itertools.accumulate(count + 1 for count in config.levels("layers_per_block")[:-1])
    return (*(end - 1 for end in ends), len(map_widths(config)) - 1)


class Encoder(struct.PyTreeNode, Conditioner):
    """E4T's encoder as a conditioner: predicts v* at every denoising step and encodes the prompt again with it."""

    head: Any
    tower: Any
    word: Any  # int32 [1]
    scale: Any
    penalty: Any
    level: bool = struct.field(pytree_node=False, default=False)

    @property
    def remade(self) -> dict[str, Any]:
        """The word's id."""
        return {ENCODER: self.word}

    def __call__(
        self, sd: StableDiffusion, z: Float[Array, "B h w c"], t: Num[Array, " B"], i: Int[Array, ""] | int, cond: Cond
    ) -> tuple[Cond, dict[str, Any]]:
        move = self.offset(sd, z, t, cond)  # [B C]
        row = sd.embed(ENCODER, seen_by(sd).domain[None])[0]  # [1 C]
        vector = row + self.scale * move

        def told(one):
            ids = one.words[ENCODER]["ids"]
            emb = sd.embed(ENCODER, ids)  # [B L C]
            emb = jnp.where((ids == self.word[0])[..., None], vector[:, None].astype(emb.dtype), emb)
            return conditioning.reread(sd, one, {ENCODER: emb})

        negative = None if cond.negative is None else told(cond.negative)
        cond = told(cond).replace(also=tuple(map(told, cond.also)), negative=negative)
        return cond, {"penalty": self.penalty * jnp.sum(move**2, axis=1)}

    def offset(
        self, sd: StableDiffusion, z: Float[Array, "B h w c"], t: Num[Array, " B"], cond: Cond
    ) -> Float[Array, "B C"]:
        """Returns E [B C] for latents z [B h w c] at times t [B]: the last map of [clip, pooled maps], LeakyReLU."""
        classes = seen_by(sd).classes  # [B n D]
        classes = self.see(sd, _concept(sd, cond)) if classes is None else classes
        layers = [
            _linear(linear, classes[:, 2 * k + 1])  # layers 2, 4, ... counted from 1
            for k, linear in sorted((int(name), linear) for name, linear in self.head["clip"].items())
        ]
        clip = jax.nn.leaky_relu(sum(layers) / len(layers))  # [B D]; slope 0.01, torch's default
        clip = jnp.broadcast_to(clip, (len(z), clip.shape[1]))
        maps = self.maps(sd, z, t)
        pooled = [jax.nn.leaky_relu(m.astype(jnp.float32).mean((1, 2))) for m in maps]
        seen = jnp.concatenate([clip, *pooled], axis=1)
        return _linear(self.head["final"], seen)

    def maps(
        self, sd: StableDiffusion, z: Float[Array, "B h w c"], t: Num[Array, " B"]
    ) -> Sequence[Float[Array, "B h w D"]]:
        """Returns the pretrained UNet's feature maps of z with the empty prompt, without offsets and hooks."""
        seen = seen_by(sd)
        empty = jnp.broadcast_to(seen.empty, (len(z), *seen.empty.shape[1:]))
        _, maps = sd.networks["unet"].apply({"params": seen.unet}, z, t, empty, features_only=True)
        return [maps[k] for k in level_maps(sd.networks["unet"].config)] if self.level else maps

    def see(self, sd: StableDiffusion, pixels: Float[Array, "B H W 3"]) -> Float32[Array, "B n D"]:
        """Returns the class tokens of all CLIP layers [B n D], float32, for pixels [B H W 3] in [-1, 1]."""
        network = sd.networks["image_encoder"]
        _, classes, _ = network.apply({"params": self.tower}, clip_pixels(pixels, network.config.image_size))
        return classes.astype(jnp.float32)


def _concept(sd, cond):
    """Returns the pictures to look at, [B H W 3]: each row's own, else the one of the run."""
    if "concept" not in cond.own and seen_by(sd).concept is None:
        raise ValueError("data.concept='': the encoder needs one picture, or with several 'same' or 'other'")
    return cond.own["concept"] if "concept" in cond.own else seen_by(sd).concept[None]


def _linear(layer, x):
    return x @ layer["kernel"] + layer["bias"][None]


def look(sd: StableDiffusion, pixels: Float[Array, "H W 3"]) -> StableDiffusion:
    """Returns sd whose E4T encoder looks at one image, pixels [H W 3] in [-1, 1]; its CLIP features are computed once.

    Raises ValueError when sd has no E4T encoder.
    """
    encoders = [c for c in sd.conditioners if isinstance(c, Encoder)]
    if len(encoders) != 1:
        raise ValueError(f"the model has {len(encoders)} E4T encoders; one is needed to look at an image")
    return _seen(encoders[0], sd, pixels)


def _seen(encoder, sd, pixels):
    classes = _see(encoder, sd.bare, pixels[None])
    return with_seen(sd, concept=pixels, classes=classes)


@jax.jit
def _see(encoder, sd, pixels):
    return encoder.see(sd, pixels)


def plain(sd: StableDiffusion, levels: int = 32) -> StableDiffusion:
    """Returns sd without its encoder: the word's row is the mean of v* over `levels` noise levels of its own picture.

    What programs can load that run no encoder between the steps; the offsets are in the weights already.
    Our choice: times evenly spread over the schedule, noise of fixed seeds, one row for all times.
    Raises ValueError when sd has no E4T encoder that looks at a picture.
    """
    encoders = [c for c in sd.conditioners if isinstance(c, Encoder)]
    if len(encoders) != 1 or seen_by(sd).concept is None:
        raise ValueError("the model has no E4T encoder that looks at a picture")
    (encoder,) = encoders
    t = jnp.linspace(0, sd.schedule.num_train_timesteps - 1, levels).round().astype(jnp.int32)
    z = sd.encode(seen_by(sd).concept[None])
    noise = jax.random.normal(jax.random.key(0), (levels, *z.shape[1:]))
    noisy = add_noise(sd.schedule, jnp.broadcast_to(z, noise.shape), noise, t)
    move = jax.jit(lambda sd: encoder.offset(sd, noisy, t.astype(jnp.float32), Cond()))(sd).mean(0)
    row = sd.embed(ENCODER, seen_by(sd).domain[None])[0] + encoder.scale * move[None]  # [1 C]
    others = tuple(c for c in sd.conditioners if c is not encoder)
    bare = branches.merged(sd.replace(conditioners=others, reference=Reference()))
    return bare.with_rows({ENCODER: encoder.word}, {ENCODER: row})
