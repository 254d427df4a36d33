"""A1111's hypernetworks: small networks on the inputs of attention's keys and values; the model stays frozen.

    Hypernetwork()                                                        A1111's defaults: 1, 2, 1, linear
    Hypernetwork(layer_structure=(1, 2, 2, 1), activation="mish", layer_norm=True, dropout=(0, 0.3, 0.3, 0))

Source: AUTOMATIC1111's stable-diffusion-webui (settings, initialisations, file).  Our choice: the last layer starts at
zero, so training starts from the unchanged model; zero=False initialises it like the others, as A1111 does.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sdjax import trees
from sdjax.methods.adapter import Adapter
from sdjax.methods.method import Method, about
from sdjax.models import hypernetworks
from sdjax.models.hypernetworks import ACTIVATIONS, PROJECTIONS, Row
from sdjax.settings import SettingError, check
from sdjax.stable_diffusion import StableDiffusion
from sdjax.trees import Tree

LINEAR = "linear"
INITIALISATIONS = ("Normal", "XavierUniform", "XavierNormal", "KaimingUniform", "KaimingNormal")  # A1111's names
DEVIATION = 0.01  # standard deviation of Normal, and of norms in every initialisation: A1111


@dataclass(frozen=True)
class Hypernetwork(Method):
    """Trains two small networks per input width of attention, one for keys and one for values.

    layer_structure: widths as multiples of the input width; the first and last are 1.
    activation: "linear", "relu", "leakyrelu", "mish" ...: torch's activations in lower case.
    activate_output: also apply the activation after the last layer.  layer_norm: normalise after each layer.
    dropout: a rate per width of layer_structure, such as (0, 0.3, 0), with 0 at both ends; () is off.
    weight_init: Normal, XavierUniform, XavierNormal, KaimingUniform or KaimingNormal; biases start at 0.
    zero: start the last layer at zero, so that the model is unchanged before training.
    sizes: the input widths, such as (768, 320, 640, 1280) for SD 1; () takes all of the model.
    """

    layer_structure: tuple[float, ...] = (1, 2, 1)
    activation: str = LINEAR
    activate_output: bool = False
    layer_norm: bool = False
    dropout: tuple[float, ...] = ()
    weight_init: str = "Normal"
    zero: bool = True
    sizes: tuple[int, ...] = ()
    formats = ("hypernetwork",)

    def __post_init__(self):
        structure, rates = self.layer_structure, self.dropout
        check(self, activation=(LINEAR, *ACTIVATIONS), weight_init=INITIALISATIONS)
        if len(structure) < 2 or {structure[0], structure[-1]} != {1} or min(structure) <= 0:
            raise SettingError("layer_structure", structure, "numbers above 0 that begin and end with 1")
        right = len(rates) == len(structure) and all(0 <= rate < 1 for rate in rates) and rates[0] == rates[-1] == 0
        if rates and not right:
            raise SettingError("dropout", rates, f"{len(structure)} rates below 1, the first and the last 0, or ()")
        if self.zero and not _learns(self.rows[-1]):
            said = f"{self.activation} behind a last layer of zeros is not zero, or never learns"
            raise SettingError("activate_output", True, "activate_output=false, or zero=false", said)

    @property
    def rows(self) -> tuple[Row, ...]:
        """The layers of one network."""
        activation = None if self.activation == LINEAR else self.activation
        rates = self.dropout or (0,) * len(self.layer_structure)
        return hypernetworks.layout(self.layer_structure, activation, self.layer_norm, self.activate_output, rates)

    def split(self, sd: StableDiffusion, key: Array | None = None) -> tuple[dict[str, Any], StableDiffusion]:
        """Returns ({width: {"to_k" | "to_v": layers}}, sd unchanged).

        Raises SettingError for an input width that no attention layer has.
        """
        there = widths(sd)
        for size in self.sizes:
            if size not in there:
                raise SettingError("sizes", self.sizes, f"some of this model's {', '.join(map(str, there))}")
        draw = lambda key: self.draw(self.sizes or there, key)  # noqa: E731
        return (jax.eval_shape(draw, jax.random.key(0)) if key is None else draw(key)), sd

    def draw(self, sizes: tuple[int, ...], key: Array) -> dict[str, Any]:
        """Returns the initial weights {width: {"to_k" | "to_v": {place: weights}}}, float32."""

        def network(size, name):
            rows = {}
            for row in self.rows:
                scale = 0.0 if self.zero and row == self.rows[-1] else 1.0
                rows[str(row.place)] = self._first(row, size, scale, trees.named_key(key, f"{size}.{name}.{row.place}"))
            return rows

        return {str(size): {name: network(size, name) for name in PROJECTIONS} for size in sizes}

    def _first(self, row, size, scale, key):
        """Returns a row's initial weights, times `scale`."""
        (name, shape), (bias, width) = hypernetworks.shapes(row, size).items()
        kind = "Normal" if row.norm else self.weight_init
        return {name: scale * _drawn(kind, shape, key), bias: jnp.zeros(width)}

    def join(self, frozen: StableDiffusion, trained: Any, key: Array | None = None) -> StableDiffusion:
        """Returns sd with the networks as a hook of strength 1.  key [B]: for dropout.

        It is the outermost hook, so hooks on the weights of to_k and to_v, such as LoRA's, get its output.
        """
        key = key if any(self.dropout) else None
        hook = hypernetworks.Hypernetwork(trained, jnp.float32(1), key, self.rows)
        return frozen.replace(hooks=(hook, *frozen.hooks))

    def adapter(self, frozen: StableDiffusion, trained: Any) -> Adapter | None:
        """Returns the hook."""
        return Adapter(hook=hypernetworks.Hypernetwork(trained, jnp.float32(1), rows=self.rows), about=about(self))


def widths(sd: StableDiffusion) -> tuple[int, ...]:
    """Returns the input widths of keys and values in the UNet's attention layers: 320, 640, 768, 1280 for SD 1.5."""
    kernels = trees.matching(sd.parts["unet"], r"attn\d\.to_k\.kernel$")
    return tuple(sorted({kernel.shape[0] for kernel in kernels.values()}))


def _learns(last):
    """Returns whether a last layer of zeros outputs zero but still gets a gradient."""
    if last.norm or last.activation is None:
        return True
    value, slope = jax.value_and_grad(ACTIVATIONS[last.activation])(0.0)
    return bool(value == 0 and slope != 0)


def _drawn(kind: str, shape: tuple[int, ...], key: Array) -> Tree | Array:
    """Returns weights [in out] or [out] by one of A1111's initialisations: torch's, with a gain for ReLU."""
    if kind == "Normal":
        return DEVIATION * jax.random.normal(key, shape)
    entering, leaving = shape
    variance = 2 / entering if kind.startswith("Kaiming") else 2 / (entering + leaving)
    if kind.endswith("Normal"):
        return math.sqrt(variance) * jax.random.normal(key, shape)
    bound = math.sqrt(3 * variance)
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)
