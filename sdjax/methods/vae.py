"""Autoencoder training: reconstruction, perceptual distance, KL, and a patch discriminator that joins later.

    Vae(recon="l1", perceptual=1.0, critic=0.5, critic_start=50001)        LDM's recipe
    Vae(recon="l2")                                                        plain, for high PSNR
    Vae(recon="l2", pattern=r"^(decoder|post_quant_conv)\\.")               better pictures of the same latents

The perceptual distance is LPIPS if the model was loaded with its weights (perceptual=vgg16.pth,lpips.pth, see
formats/models/lpips.py), otherwise the distance of features of the model's own image encoder.

Both players learn from one scalar, autoencoder loss + discriminator loss; each sees the other through stop_gradient.

Source: Rombach et al. 2022, LDM's contperceptual.py, with losses per pixel here.  LDM sums over pixels and averages
over the batch, so its weights of the KL (1e-6) and of the critic are relative to a sum.  Here all terms are divided by
the number of pixels, which keeps the balance.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sdjax import settings, trees
from sdjax.methods.adapter import Adapter
from sdjax.methods.method import Method
from sdjax.models import critics
from sdjax.models.clip import clip_pixels
from sdjax.settings import SettingError
from sdjax.stable_diffusion import StableDiffusion, to_pictures

RECONS = ("l1", "l2")


@dataclass(frozen=True)
class Vae(Method):
    """Trains the autoencoder, optionally against a patch discriminator.

    pattern: regular expression of the weights to train, by dotted name; "" trains all.  If only the decoder trains,
    other models keep working with its latents (as with sd-vae-ft-mse).
    recon: "l1" or "l2".  perceptual: weight of LPIPS, or of the feature distance of the image encoder.
    kl: weight of the summed KL, divided by the number of pixel values.
    critic: weight of the adversarial loss; 0 is off.  critic_start: its first step.
    critic_channels, critic_layers: size of the discriminator; LDM uses 64 and 3.
    """

    recon: str = "l1"
    perceptual: float = 0.0
    kl: float = 1e-6
    critic: float = 0.0
    critic_start: int = 50001  # LDM, autoencoder_kl_32x32x4.yaml
    critic_channels: int = 64
    critic_layers: int = 3
    pattern: str = ""
    pixels = True
    formats = ()

    @property
    def whole_batch(self) -> bool:
        """Whether the loss needs the global batch at once: the critic's weight is a quotient of its gradients."""
        return self.critic > 0

    def __post_init__(self):
        settings.check(
            self, recon=RECONS, perceptual=settings.FROM_0, kl=settings.FROM_0, critic=settings.FROM_0,
            critic_start=settings.FROM_0, critic_channels=settings.FROM_1, critic_layers=settings.FROM_1,
        )  # fmt: skip
        settings.check_pattern("pattern", self.pattern)

    def adapter(self, frozen: StableDiffusion, trained: Any) -> Adapter | None:
        """Returns None: a whole model."""
        return None

    def preview(self, sd: StableDiffusion, batch: dict[str, Any]) -> dict[str, Any]:
        """Returns up to 8 pictures and their reconstructions."""
        pixels = batch["pixels"][:8]
        return {"pictures": to_pictures(pixels), "decoded": to_pictures(sd.decode(sd.encode(pixels)))}

    def split(self, sd: StableDiffusion, key: Array | None = None) -> tuple[dict[str, Any], StableDiffusion]:
        """Returns ({"vae"[, "critic"]}, sd without the autoencoder's trained weights).

        Raises ValueError if no weight matches `pattern`, and for a perceptual loss without a network for it.
        """
        if self.perceptual and "image_encoder" not in sd.parts and sd.reference.lpips is None:
            wanted = "0, since the model has neither LPIPS nor an image_encoder; give perceptual=FILE or vision=FOLDER"
            raise SettingError("perceptual", self.perceptual, wanted)
        chosen, rest = trees.partition(sd.parts["vae"], self.pattern)
        if not chosen:
            raise SettingError("pattern", self.pattern, "a match among the names of vae's weights")
        trained = {"vae": trees.copy(chosen, jnp.float32)}
        if self.critic:
            side = max(64, 8 << self.critic_layers)  # large enough for all layers; the weights do not depend on it
            init = self._critic().init
            if key is None:
                init, key = functools.partial(jax.eval_shape, init), jax.random.key(0)
            trained["critic"] = init(key, jnp.zeros((1, side, side, 3)))["params"]
        return trained, sd.with_parts(vae=rest)

    def join(self, frozen: StableDiffusion, trained: Any, key: Array | None = None) -> StableDiffusion:
        """Returns sd with the trained autoencoder."""
        return frozen.with_parts(vae=trees.merge(frozen.parts["vae"], trained["vae"]))

    def loss(
        self,
        frozen: StableDiffusion,
        trained: Any,
        batch: dict[str, Any],
        key: Array,
        step: Array,
        axis: str | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        """Returns (autoencoder loss + discriminator loss, metrics) of pixels [B H W 3] in [-1, 1].

        axis: the mapped axis that the critic's weight is averaged over, if the batch is split (pmap).
        """
        sd, x = self.join(frozen, trained), batch["pixels"]
        moments = sd.moments(x)
        z = sd.latents(moments, trees.example_keys(key, batch["index"]))
        mean, logvar = jnp.split(moments, 2, axis=-1)
        kl = 0.5 * jnp.sum(mean**2 + jnp.exp(logvar) - 1 - logvar) / x.size
        made = sd.decode(z)
        error = self._distance(sd, x, made)
        loss = error + self.kl * kl
        metrics = {
            "error": error,
            "kl": kl,
            "psnr": jnp.mean(-10 * jnp.log10(jnp.mean((x - made) ** 2 / 4, (1, 2, 3)))),
        }
        if self.critic:
            more, seen = self._adversarial(sd, trained, x, z, made, step, axis)
            loss, metrics = loss + more, {**metrics, **seen}
        return loss, metrics

    def finish(self, frozen: StableDiffusion, trained: Any, data: Any) -> tuple[StableDiffusion, Any]:
        """Returns (frozen, trained) with scaled latents of unit variance, measured on the means of 16 batches.

        Only the weights around the latents change, since other programs assume the scaling_factor.  With s = 1 /
        (scaling_factor * std), quant_conv gives s * mean and logvar + 2 log(s), and post_quant_conv takes z / s.
        An autoencoder without these layers gets scaling_factor = 1 / std.  If the encoder did not train, nothing
        changes.
        """
        if not any(name.startswith("encoder.") for name in trees.names(trained["vae"])):
            return frozen, trained
        sd = self.join(frozen, trained)
        encode = jax.jit(lambda sd, x: jnp.split(sd.moments(x), 2, axis=-1)[0])
        means = [encode(sd, batch["pixels"]) for batch, _ in zip(data.iterate(), range(16), strict=False)]
        std = jnp.std(jnp.concatenate([mean.ravel() for mean in means]))
        network = frozen.networks["vae"]
        if not {"quant_conv.bias", "post_quant_conv.kernel"} <= trees.names(sd.parts["vae"]).keys():
            config = dataclasses.replace(network.config, scaling_factor=round(float(1 / std), 5))
            return frozen.with_networks(vae=network.clone(config=config)), trained
        s, half = 1 / (network.config.scaling_factor * std), network.config.latent_channels
        gain = jnp.concatenate([jnp.full(half, s), jnp.ones(half)])
        shift = jnp.concatenate([jnp.zeros(half), jnp.full(half, 2 * jnp.log(s))])
        changes = {
            r"^quant_conv\.kernel$": lambda _, w: w * gain[None, None, None],
            r"^quant_conv\.bias$": lambda _, w: w * gain + shift,
            r"^post_quant_conv\.kernel$": lambda _, w: w / s,
        }
        scaled, still = trained["vae"], frozen.parts["vae"]  # these layers are in one or the other
        for pattern, change in changes.items():
            scaled, still = trees.edit(scaled, pattern, change), trees.edit(still, pattern, change)
        return frozen.with_parts(vae=still), {**trained, "vae": scaled}

    def _distance(self, sd, x, made):
        error = jnp.mean(jnp.abs(x - made)) if self.recon == "l1" else jnp.mean((x - made) ** 2)
        if not self.perceptual:
            return error
        if sd.reference.lpips is not None:
            return error + self.perceptual * jnp.mean(critics.lpips(sd.reference.lpips, x, made))
        size = sd.networks["image_encoder"].config.image_size
        features = [sd.call("image_encoder", clip_pixels(pixels, size), method="states") for pixels in (x, made)]
        return error + self.perceptual * jnp.mean(critics.feature_distance(*features))

    def _critic(self) -> Any:
        return critics.PatchDiscriminator(channels=self.critic_channels, layers=self.critic_layers)

    def _adversarial(self, sd, trained, x, z, made, step, axis):
        """Returns (weight * gate * generator part + gate * hinge part, metrics); weight balances gradients.

        weight = critic * clip(|grad nll| / (|grad g| + 1e-4), 0, 1e4) with respect to the decoder's last kernel, both
        gradients of the global batch.
        """
        judge, still = self._critic(), jax.lax.stop_gradient
        gate = (step >= self.critic_start).astype(jnp.float32)

        def fool(pixels):
            return -jnp.mean(judge.apply({"params": still(trained["critic"])}, pixels))

        def decode(kernel):  # XLA merges this decoding with the first one
            return sd.with_parts(
                vae=trees.edit(sd.parts["vae"], r"^decoder\.conv_out\.kernel$", lambda _, w: kernel)
            ).decode(still(z))

        last = trees.flatten(sd.parts["vae"])["decoder.conv_out.kernel"]
        by_error = jax.grad(lambda k: self._distance(sd, x, decode(k)))(still(last))
        by_fool = jax.grad(lambda k: fool(decode(k)))(still(last))
        if axis is not None:
            by_error, by_fool = jax.lax.pmean((by_error, by_fool), axis)
        weight = jnp.clip(jnp.linalg.norm(by_error.ravel()) / (jnp.linalg.norm(by_fool.ravel()) + 1e-4), 0, 1e4)
        real = judge.apply({"params": trained["critic"]}, x)
        fake = judge.apply({"params": trained["critic"]}, still(made))
        hinge = 0.5 * (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake)))
        weight = still(self.critic * weight)
        return gate * (weight * fool(made) + hinge), {"critic": hinge, "critic_weight": weight}
