"""ControlNets for sampling: network, condition picture, strength and steps.

    canny = sdjax.load_control("controlnet-folder")                     # or one file, or random:sd15
    text2img(sd, prompts, control=canny.on(edges, weight=0.8, end=0.5))
    text2img(sd, prompts, control=[canny.on(edges), depth.on(distances)])
    sd, trained = taken(method.join(frozen, trained))                   # from a trained model

Shapes: B batch, H W pixels.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Float32, Int, Num

from sdjax import conditions
from sdjax.diffusion.model import Cond
from sdjax.diffusion.plan import ROWS
from sdjax.diffusion.wrappers import NO_PICTURE, ControlNet
from sdjax.images import resize
from sdjax.models.conditioner import Conditioner
from sdjax.sampling import settings
from sdjax.stable_diffusion import StableDiffusion


@dataclasses.dataclass(frozen=True)
class Control:
    """A ControlNet's parameters and network, and how to use it, as set by `on`.

    picture: uint8 [H W 3], one for all prompts or one per prompt.  weight: factor of the network's output.
    start, end: the fractions of the steps, 0 to 1, between which it acts.
    guess: act only on the prompt's side of guidance, and less on fine maps; this also works without a prompt.
    soft: act less on fine maps, on both sides of guidance.
    resize: how to bring the picture to the size of the result, see resize.fit.
    preprocess: a condition (sdjax.conditions) to compute from the resized picture; None: the picture is a condition.
    """

    params: Any
    network: Any
    picture: Any = None
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess: bool = False
    soft: bool = False
    resize: str = "crop"
    preprocess: Any = None

    def on(
        self,
        picture: Any,
        weight: float = 1.0,
        start: float = 0.0,
        end: float = 1.0,
        guess: bool = False,
        resize: str = "crop",
        preprocess: Any = None,
        soft: bool = False,
    ) -> Self:
        """Returns the Control with a picture.

        preprocess: a condition or its name, such as "canny", if the picture is not a condition yet.
        Raises ValueError unless 0 <= start < end <= 1.
        """
        if not 0 <= start < end <= 1:
            raise ValueError(f"control start={start}, end={end}: expected 0 <= start < end <= 1")
        preprocess = conditions.of(preprocess) if isinstance(preprocess, str) else preprocess
        values: dict[str, Any] = dict(picture=picture, weight=weight, start=start, end=end, guess=guess, resize=resize)
        values |= {"preprocess": preprocess, "soft": soft}
        return dataclasses.replace(self, **values)

    def weights(self, steps: int) -> Float32[np.ndarray, " ROWS"]:
        """Returns the weight of each of `steps` steps, float32 [ROWS], padded so that step counts share programs.

        A step acts if it is completely within [start, end], as in diffusers' controlnet_keep.
        """
        acts = [not (i / steps < self.start or (i + 1) / steps > self.end) for i in range(steps)]
        return np.pad(np.array(acts, np.float32) * np.float32(self.weight), (0, max(ROWS - steps, 0)))


def applied(controls: Sequence[Control], made: settings.ControlNet, pictures: Sequence[np.ndarray]) -> list[Control]:
    """Returns the Controls with their pictures, one each, from a picture's settings."""
    count = len(controls)
    each = [values * (count // len(values)) for values in (made.weight, made.start, made.end)]
    modes = made.control_mode * (count // len(made.control_mode))
    makers = [maker if maker is not None and not maker.endings else None for maker in made.makers()]  # others: files
    given, (_, how) = zip(controls, pictures, makers, modes, *each, strict=True), made.target()
    return [
        one.on(picture, *numbers, mode == "control", how, maker, soft=mode == "prompt")
        for one, picture, maker, mode, *numbers in given
    ]


def near(control: Control, boxes: Sequence[tuple[slice, slice]], whole: resize.Size, size: resize.Size) -> Control:
    """Returns a Control for crops of pictures: what its picture shows in `boxes` of `whole`, resized to `size`.

    Source: sd-webui-controlnet, which crops the pictures of its units to the masked region too.
    """
    if control.picture is None:
        return control
    shown = resize.fitted(control.picture, len(boxes), whole, control.resize)
    crops = [resize.fit(one[box], size, "fill") for one, box in zip(shown, boxes, strict=True)]
    return dataclasses.replace(control, picture=crops)


def taken(sd: StableDiffusion) -> tuple[StableDiffusion, list[Control]]:
    """Returns (sd without its ControlNet wrappers, these ControlNets as Controls)."""
    found = [one for one in sd.wrappers if isinstance(one, ControlNet)]
    rest = tuple(one for one in sd.wrappers if not isinstance(one, ControlNet))
    return sd.replace(wrappers=rest), [Control(one.params, one.network) for one in found]


class Steps(struct.PyTreeNode, Conditioner):
    """The conditioner that sets a ControlNet's weight for the current step."""

    weights: Any
    name: str = struct.field(pytree_node=False, default="control")

    def __call__(
        self, sd: StableDiffusion, z: Float[Array, "B h w c"], t: Num[Array, " B"], i: Int[Array, ""] | int, cond: Cond
    ) -> tuple[Cond, dict[str, Any]]:
        weight = jnp.broadcast_to(jnp.asarray(self.weights)[i], len(z))
        return cond.with_own(**{self.name: {**cond.own[self.name], "weight": weight}}), {}


def with_controls(
    sd: StableDiffusion, controls: Iterable[Control], cond: Cond, negative: Cond | None, steps: int, size: resize.Size
) -> tuple[StableDiffusion, Cond, Cond | None]:
    """Returns (sd, cond, negative) with the ControlNets attached, for pictures of `size` (height, width).

    negative: the negative side's cond, or None without guidance.
    Raises ValueError for a Control without a picture, and one made for another text width.
    """
    for i, control in enumerate(controls):
        if control.picture is None:
            raise ValueError(NO_PICTURE)
        config, name, count = control.network.config, f"control.{i}", len(cond.unet.context)
        width = cond.unet.context.shape[-1]
        if config.unet.cross_attention_dim != width:
            raise ValueError(
                f"ControlNet for texts of width {config.unet.cross_attention_dim}: the model's are {width} wide"
            )
        shown = resize.fitted(control.picture, count, size, control.resize)
        if control.preprocess is not None:
            shown = np.stack([control.preprocess.make(one) for one in shown])
        hint = jnp.asarray(shown, jnp.float32) / 255
        cond = cond.with_own(**{name: {"hint": hint, "weight": jnp.zeros(count)}})
        wrapper = ControlNet(control.params, name, control.network, control.guess, control.soft)
        sd = sd.add(wrappers=wrapper, conditioners=Steps(control.weights(steps), name))
    if any(control.guess for control in controls):
        count = len(cond.unet.context)
        cond = cond.with_own(positive=jnp.ones(count))
        negative = negative if negative is None else negative.with_own(positive=jnp.zeros(count))
    return sd, cond, negative
