"""Stable Diffusion as one pytree: parameters, and the changes that methods add to the noise predictor.

Parameters are leaves and networks are static, so a StableDiffusion passes through jit, grad and checkpoints like any
tree.  This module does not depend on files, sampling or training.

    sd = sdjax.load("pocket")
    cond = sd.condition(sd.tokenize(["a photo of a face"]))
    prediction, aux = sd.denoise(z, t, cond)            # z [B h w 4], t [B]

Shapes: B batch, H W pixels, h w latent pixels, c latent channels, L tokens, C text width.
"""

import functools
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.core import FrozenDict
from jaxtyping import Array, Float, Float32, Int, Key, Num, UInt8

import sdjax.models.hooks
from sdjax import trees
from sdjax.models.cond import Cond
from sdjax.models.reference import Reference
from sdjax.text import conditioning
from sdjax.trees import Tree

TOKENS = "text_model.embeddings.token_embedding.embedding"
Ids = dict[str, Any]  # {text encoder: token ids int32}
Rows = dict[str, Any]  # {text encoder: rows of its token table [n C]}


class StableDiffusion(struct.PyTreeNode):
    """Parameters of the parts, and the conditioners, wrappers and hooks that methods add.

    parts: {name: parameters} of "unet", "vae", "text_encoder" and "image_encoder"; LDM-SR reads no text and has neither
    text_encoder nor tokenizers.
    networks: {name: Linen module} of the parts; configs hold the sizes, `dtype` the compute type.
    tokenizers: {text encoder: Tokenizer}, in the order of the encoders.
    words: {placeholder: {text encoder: int32 [n]}}, the placeholder's rows in the token tables.
    reference: other data for methods, such as weights from before training.
    family: the model family, see families/family.py.
    low_schedule: noise schedule of an upscaler's small picture; None means `schedule`.
    """

    parts: Any
    reference: Reference = struct.field(default_factory=Reference)
    words: Any = struct.field(default_factory=dict)
    conditioners: tuple = ()
    wrappers: tuple = ()
    hooks: tuple = ()
    networks: Any = struct.field(pytree_node=False, default=FrozenDict())
    schedule: Any = struct.field(pytree_node=False, default=None)
    family: Any = struct.field(pytree_node=False, default=None)
    tokenizers: Any = struct.field(pytree_node=False, default=FrozenDict())
    low_schedule: Any = struct.field(pytree_node=False, default=None)

    @property
    def bare(self) -> Self:
        """sd without host-only state: tokenizers, placeholders and the record of attached adapters.

        Another word or adapter then has the same tree structure and does not recompile.
        """
        return self.replace(words={}, tokenizers=FrozenDict(), reference=self.reference.replace(attached=None))

    # ---- words ---------------------------------------------------------------------------------

    def tokenize(self, prompts: Iterable[str]) -> Ids:
        """Returns {text encoder: token ids int32 [B L]} of a list of prompts."""
        prompts = list(prompts)
        return {encoder: tokenizer(prompts) for encoder, tokenizer in self.tokenizers.items()}

    def embed(self, encoder: str, ids: Int[Array, "B L"]) -> Float[Array, "B L C"]:
        """Returns the token embeddings [B L C] of ids [B L], without positions."""
        return self.call(encoder, ids, method="embed")

    def encode_text(self, encoder: str, embeddings: Float[Array, "B L C"], skip: int = 0) -> Float[Array, "B L C"]:
        """Returns a text encoder's output [B L C] for token embeddings [B L C], without its last `skip` layers."""
        return self.call(encoder, embeddings, skip=skip)

    def condition(self, ids: Ids, skip: int = 0) -> Cond:
        """Returns the Cond of prompts: the UNet's inputs, and the ids for conditioners.

        ids: {text encoder: [B L]}, or [B n L] for texts of n chunks, which are encoded one by one and concatenated.
        """
        words = {encoder: conditioning.said(some) for encoder, some in ids.items()}
        encoded = {
            encoder: conditioning.encode(self, encoder, self.embed(encoder, some["ids"]), some, skip)
            for encoder, some in words.items()
        }
        return Cond(self.family.inputs(encoded), words=words, skip=skip)

    def knows(self, word: str) -> bool:
        """Returns whether `word` is a placeholder, ignoring case and white space."""
        return any(tokenizer.knows(word) for tokenizer in self.tokenizers.values())

    def ids(self, word: str) -> Ids:
        """Returns {text encoder: int32 [n]}, the ids of a placeholder, ignoring case and white space."""
        spelt = self._spelt(word)
        if spelt is None:
            raise KeyError(word)
        return self.words[spelt]

    def _spelt(self, word):
        """Returns a placeholder as `words` spells it; None for an unknown one."""
        if word in self.words or not self.tokenizers:
            return word if word in self.words else None
        plain = next(iter(self.tokenizers.values())).plain
        return next((known for known in self.words if plain(known) == plain(word)), None)

    def add_word(self, word: str, vectors: int = 1, init: str | None = None, place: bool = False) -> Self:
        """Returns sd with the placeholder `word`: `vectors` new rows in every text encoder's token table.

        place: allow a word that consists of tokens; it replaces them in prompts, see Tokenizer.add.
        init: a text whose token rows initialise the new rows, repeated in order; None is the mean row.
        A known word stays unchanged.  Raises ValueError if it has another number of vectors.
        """
        if self._spelt(word) is not None:
            known = len(next(iter(self.ids(word).values())))
            if known != vectors:
                raise ValueError(f"word={word!r}: the model knows it with {known} vectors, not {vectors}")
            return self
        sd, word_ids, word_rows = self, {}, {}
        for encoder, old in self.tokenizers.items():
            table = sd.table(encoder)
            start = old.ids(init) if init else []
            word_rows[encoder] = jnp.stack(
                [table[start[i % len(start)]] if start else table.mean(0) for i in range(vectors)]
            )
            tokenizer = old.add(word, vectors, place)
            word_ids[encoder] = jnp.array(tokenizer.ids(word), jnp.int32)
            sd = sd.with_room(encoder, tokenizer.size)
            network = sd.networks[encoder]
            network = network.clone(config=replace(network.config, vocab_size=len(sd.table(encoder))))
            sd = sd.with_networks(**{encoder: network}).replace(
                tokenizers=FrozenDict({**sd.tokenizers, encoder: tokenizer})
            )
        return sd.replace(words={**sd.words, word: word_ids}).with_rows(word_ids, word_rows)

    def table(self, encoder: str) -> Float[Array, "V C"]:
        """Returns a text encoder's token table [V C]."""
        return trees.flatten(self.parts[encoder])[TOKENS]

    def rows(self, word: str) -> Rows:
        """Returns {text encoder: rows [n C]} of a placeholder."""
        return {encoder: self.table(encoder)[ids] for encoder, ids in self.ids(word).items()}

    def with_rows(self, ids: Ids, rows: Rows) -> Self:
        """Returns sd with rows {text encoder: [n C]} in the token tables at ids {text encoder: [n]}."""
        sd = self
        for encoder, some in rows.items():
            table = sd.table(encoder)
            sd = sd._with_table(encoder, table.at[ids[encoder]].set(some.astype(table.dtype)))
        return sd

    def with_room(self, encoder: str, size: int) -> Self:
        """Returns sd with at least `size` rows in a text encoder's token table; new rows are 0."""
        table = self.table(encoder)
        if size <= len(table):
            return self
        new = jnp.zeros((size - len(table), table.shape[1]), table.dtype)
        return self._with_table(encoder, jnp.concatenate([table, new]))

    def _with_table(self, encoder: str, table: Float[Array, "V C"]) -> Self:
        return self.with_parts(**{encoder: trees.edit(self.parts[encoder], f"^{TOKENS}$", lambda name, w: table)})

    # ---- pictures ------------------------------------------------------------------------------

    @property
    def scaling(self) -> float:
        """The factor between the autoencoder's latents and the diffusion's, 0.18215 for SD 1 and 2."""
        return self.networks["vae"].config.scaling_factor

    @property
    def factor(self) -> int:
        """Pixels per latent pixel along one side, 8 for SD 1 and 2."""
        return 2 ** (len(self.networks["vae"].config.block_out_channels) - 1)

    def moments(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B h w 2*c"]:
        """Returns the posterior's mean and log variance, [B h w 2c], of pixels [B H W 3] in [-1, 1]."""
        return jnp.concatenate(self.call("vae", pixels, method="encode"), axis=-1)

    def latents(
        self, moments: Float[Array, "B h w 2*c"], keys: Key[Array, " B"] | None = None
    ) -> Float[Array, "B h w c"]:
        """Returns scaled latents [B h w c]: scaling * (mean + exp(logvar / 2) * noise), noise 0 without keys.

        moments [B h w 2c]; keys: one key per example, [B].  Source: Rombach et al. 2022, LDM's DiagonalGaussian.
        """
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        if keys is not None:
            noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
            mean = mean + jnp.exp(0.5 * logvar) * noise
        return self.scaling * mean

    def encode(self, pixels: Float[Array, "B H W 3"], keys: Key[Array, " B"] | None = None) -> Float[Array, "B h w c"]:
        """Returns scaled latents [B h w c] of pixels [B H W 3] in [-1, 1]; sampled if keys [B] are given."""
        return self.latents(self.moments(pixels), keys)

    def decode(self, latents: Float[Array, "B h w c"]) -> Float[Array, "B H W 3"]:
        """Returns pixels [B H W 3], about [-1, 1], of scaled latents [B h w c]."""
        return self.call("vae", latents / self.scaling, method="decode").astype(jnp.float32)

    # ---- noise ---------------------------------------------------------------------------------

    def call(self, part: str, *args: Any, **kwargs: Any) -> Any:
        """Returns the output of a part's network with this model's parameters and hooks; cond=: the Cond for hooks."""
        return sdjax.models.hooks.apply(part, self.networks[part], self.parts[part], self.hooks, *args, **kwargs)

    def predict(self, z: Float[Array, "B h w c"], t: Num[Array, " B"], cond: Cond) -> Float[Array, "B h w c"]:
        """Returns the UNet's prediction [B h w c] as float32, without conditioners and wrappers."""
        told = self.family.told(self, z, cond.unet)
        if told.channels is not None:
            z = jnp.concatenate([z, told.channels.astype(z.dtype)], axis=-1)
        more = {name: value for name in ("pooled", "size") if (value := getattr(told, name)) is not None}
        prediction, _ = self.call(
            "unet", z, t, told.context, class_labels=told.labels, residuals=told.residuals, **more, cond=cond
        )
        return prediction.astype(jnp.float32)

    def denoise(
        self, z: Float[Array, "B h w c"], t: Num[Array, " B"], cond: Cond, i: Int[Array, ""] | int = 0
    ) -> tuple[Float[Array, "B h w c"], dict[str, Any]]:
        """Returns (prediction [B h w c], aux) at latents z [B h w c], times t [B], denoising step i.

        Conditioners come first, on B rows; then the wrappers, outermost first by rank; then the UNet.
        aux: values from conditioners for the loss, such as {"penalty" [B]}.
        """
        aux = {}
        for conditioner in self.conditioners:
            cond, more = conditioner(self, z, t, i, cond)
            aux |= more
        call = self.predict
        for wrapper in sorted(self.wrappers, key=lambda w: -w.rank):  # innermost first
            call = functools.partial(wrapper, self, call)
        return call(z, t, cond), aux

    def add(self, **kinds: Any) -> Self:
        """Returns sd with one more conditioner, wrapper or hook: sd.add(hooks=hook)."""
        return self.replace(**{kind: (*getattr(self, kind), item) for kind, item in kinds.items()})

    def fold(self) -> Self:
        """Returns sd with its hooks folded into weights for sampling; hooks whose `fold` returns None stay."""
        sd = self
        for hook in self.hooks:
            others = tuple(other for other in sd.hooks if other is not hook)
            folded = hook.fold(sd.replace(hooks=others)) if hasattr(hook, "fold") else None
            sd = sd if folded is None else folded
        return sd

    def with_parts(self, **parts: Tree | None) -> Self:
        """Returns sd with other parameters for some parts, sd.with_parts(unet=params); None removes a part."""
        kept = {name: tree for name, tree in {**self.parts, **parts}.items() if tree is not None}
        return self.replace(parts=kept)

    def with_reference(self, **fields: Any) -> Self:
        """Returns sd with other fields in its reference, such as base={"unet": weights}."""
        return self.replace(reference=self.reference.replace(**fields))

    def with_own(self, **own: Any) -> Self:
        """Returns sd with more entries in reference.own, where methods keep their data by name."""
        return self.with_reference(own={**self.reference.own, **own})

    def with_networks(self, **networks: Any) -> Self:
        """Returns sd with other Linen modules for some parts."""
        return self.replace(networks=FrozenDict({**self.networks, **networks}))

    def with_dtype(self, dtype: Any, remat: bool | str | None = None) -> Self:
        """Returns sd with networks that compute in `dtype`, parameters unchanged; remat: see recompute.py."""

        def change(network):
            fields: dict[str, Any] = {"dtype": jnp.dtype(dtype)}
            if remat is not None and hasattr(network, "remat"):
                fields["remat"] = remat
            return network.clone(**fields)

        return self.with_networks(**{name: change(network) for name, network in self.networks.items()})


def to_pixels(pictures: UInt8[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
    """Returns float32 in [-1, 1] of uint8 pictures: x / 127.5 - 1."""
    return np.asarray(pictures, np.float32) / 127.5 - 1


def to_pictures(pixels: Float[Array | np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """Returns uint8 pictures of pixels in [-1, 1]: round(127.5 (x + 1)), clipped."""
    return np.asarray(jnp.round(jnp.clip((pixels + 1) * 127.5, 0, 255)).astype(jnp.uint8))
