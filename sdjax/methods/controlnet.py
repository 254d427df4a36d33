"""ControlNet: a copy of the UNet's encoder that reads a condition picture and adds to the UNet's feature maps.

    ControlNet()        with data.condition=canny, or another of sdjax.conditions

The copy reads the latent only, so a ControlNet of an inpainting model also serves a plain one.  Everything else stays
frozen; Chain((ControlNet(), Full(("unet",), r"^(up_blocks|conv_)"))) trains the decoder too ("sd_locked=False").

Source: Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models", section 3; the ControlNet
repository, cldm/cldm.py (convolutions of the hint's encoder, zero convolutions).  Half of the prompts are empty there:
data.dropout=0.5.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sdjax import settings, trees
from sdjax.diffusion import wrappers
from sdjax.methods.adapter import Adapter
from sdjax.methods.method import Method, about
from sdjax.models import controlnet
from sdjax.settings import SettingError
from sdjax.stable_diffusion import StableDiffusion
from sdjax.trees import Tree

COPIED = r"^(conv_in|time_embedding|class_embedding|down_blocks\.\d+|mid_block)\."
HINT, ADDED = "controlnet_cond_embedding", ("controlnet_down_blocks.", "controlnet_mid_block.")


@dataclass(frozen=True)
class ControlNet(Method):
    """Trains a ControlNet that starts as a copy of the UNet's encoder.

    order: colour order of its condition pictures, "rgb" or "bgr", as in its config.json.
    """

    order: str = "rgb"
    condition = True
    formats = ("controlnet",)

    def __post_init__(self):
        settings.check(self, order=("rgb", "bgr"))

    def split(self, sd: StableDiffusion, key: Array | None = None) -> tuple[dict[str, Any], StableDiffusion]:
        """Returns ({"controlnet": its weights}, sd).

        It adds zero at first, because its output convolutions and the last one of the condition's encoder are zero.
        Raises SettingError for an unknown colour order, and for a model without a text encoder.
        """
        if "text_encoder" not in sd.parts:
            raise SettingError("class", "ControlNet", "another method for a model that reads no words")
        network = self._network(sd)
        return {"controlnet": begun(network, sd.parts["unet"], key)}, sd

    def join(self, frozen: StableDiffusion, trained: Any, key: Array | None = None) -> StableDiffusion:
        """Returns sd with the ControlNet as a wrapper; it reads cond.own["control"]["hint"]."""
        return frozen.add(wrappers=wrappers.ControlNet(trained["controlnet"], network=self._network(frozen)))

    def adapter(self, frozen: StableDiffusion, trained: Any) -> Adapter | None:
        """Returns the weights, with the content of config.json in `about`."""
        config = self._network(frozen).config.to_json()
        return Adapter(trees={"controlnet": trained["controlnet"]}, about={**about(self), "config": config})

    def _network(self, sd: StableDiffusion) -> controlnet.ControlNet:
        unet = sd.networks["unet"]
        order = {"controlnet_conditioning_channel_order": self.order}
        config = controlnet.ControlNetConfig.of(unet.config, sd.factor, **order)
        return controlnet.ControlNet(config, unet.dtype, unet.remat)


def begun(network: controlnet.ControlNet, unet: Tree, key: Array | None) -> Tree:
    """Returns a ControlNet's initial weights, float32: copies of the UNet's, and the encoder of the condition.

    key: for that encoder's convolutions, with Linen's initialisers (our choice); None returns their shapes.
    """
    like = _shapes(network)
    half = trees.copy(trees.partition(unet, COPIED)[0], jnp.float32)
    found = trees.flatten(half)
    found["conv_in.kernel"] = found["conv_in.kernel"][:, :, : network.config.unet.in_channels]
    drawn = {f"{HINT}.{name}": leaf for name, leaf in trees.flatten(_hint_encoder(network, key)).items()}
    zero = {name: jnp.zeros(leaf.shape) for name, leaf in trees.flatten(like).items() if name.startswith(ADDED)}
    return trees.unflatten({**found, **drawn, **zero}, like)


def _hint_encoder(network, key):
    """Returns the weights of a new hint encoder; without a key, their shapes."""
    init, hint = controlnet.HintEncoder(network.config).init, network.example()["hint"]
    if key is None:
        return jax.eval_shape(init, jax.random.key(0), hint)["params"]
    return jax.jit(init)(key, hint)["params"]


def _shapes(network):
    """Returns the tree of shapes of a ControlNet's weights; computes nothing."""
    return jax.eval_shape(lambda: network.init(jax.random.key(0), **network.example()))["params"]
