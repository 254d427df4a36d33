"""The interface of a method: two functions, and optional members.

    @dataclass(frozen=True)
    class Bias(Method):                                                    # in a file of this package or in a recipe
        def split(self, sd, key=None):
            trained, rest = trees.partition(sd.parts["unet"], r"bias$")
            return trees.copy(trained, jnp.float32), sd.with_parts(unet=rest)

        def join(self, frozen, trained, key=None):
            return frozen.with_parts(unet=trees.merge(frozen.parts["unet"], trained))

Law: join after split leaves the model's output unchanged.  A method acts by edits of weights, by hooks and by
conditioners.  An additional network, such as a ControlNet, joins as a wrapper (sdjax.stable_diffusion).
"""

import dataclasses
from typing import Any, ClassVar, Protocol

from jax import Array

from sdjax.methods.adapter import Adapter
from sdjax.stable_diffusion import StableDiffusion


class Method(Protocol):
    """A frozen dataclass of settings; this class is its base and supplies the defaults.

    loss: loss(frozen, trained, batch, key, step, axis=None) -> (scalar, metrics), instead of the diffusion loss.
    look: look(frozen, trained, pixels) -> frozen, before the first step of a run on one picture [H W 3] in [-1, 1].
    project: project(trained) -> trained, after every step, to bound the weights.
    measure: measure(frozen, trained) -> {name: scalar}, after every step, for the metrics.
    finish: finish(frozen, trained, data) -> (frozen, trained), after the last step.
    preview: preview(sd, batch) -> {label: pictures uint8 [B H W 3]}, instead of pictures of the run's prompts.
    pixels: whether batches hold pixels instead of moments.
    condition: whether its model reads condition pictures, the setting data.condition.
    whole_batch: whether the loss needs all rows at once, so that gradients cannot be accumulated.
    words: the trained placeholders.  unwanted: placeholders for the negative prompt.
    formats: names of file formats (formats/adapters); a run writes the first that can hold the result.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]  # tells type checkers that it is a dataclass
    loss: Any = None
    look: Any = None
    project: Any = None
    measure: Any = None
    finish: Any = None
    preview: Any = None
    pixels: Any = False
    condition: Any = False
    whole_batch: Any = False
    words: Any = ()
    unwanted: Any = ()
    formats: Any = ("trained",)

    def split(self, sd: StableDiffusion, key: Array | None = None) -> tuple[Any, StableDiffusion]:
        """Returns (trained, frozen): copies of the weights to train, and the model without them.

        key: for random initial weights; None returns their shapes (jax.ShapeDtypeStruct) for a file to fill.
        Raises SettingError for a setting that does not fit the model.
        """
        ...

    def join(self, frozen: StableDiffusion, trained: Any, key: Array | None = None) -> StableDiffusion:
        """Returns the model, ready to train or to sample.

        key: for randomness in training such as dropout, one key per example [B].
        """
        ...

    def before(self, frozen: StableDiffusion) -> StableDiffusion:
        """Returns the untrained model, for a loss that preserves its predictions (loss.preservation).

        The default is `frozen`; a method whose split removes weights keeps them elsewhere, or raises SettingError.
        """
        return frozen

    def edited(self, trained: Any) -> set[str]:
        """Returns the names of the weights that the adapter edits, such as "unet.conv_in.kernel".

        A Chain refuses parts that edit the same ones, since an adapter holds one edit of each.
        """
        return set()

    def adapter(self, frozen: StableDiffusion, trained: Any) -> Adapter | None:
        """Returns the result of training, or None for a whole model.

        The default is the trained tree itself, which only the method's own code can read.
        """
        return Adapter(trees={"trained": trained}, about=about(self))


def about(method: Method) -> dict[str, Any]:
    """Returns {"method": the class's name, "settings": its fields as plain values}, for a file's header."""
    return {"method": type(method).__name__, "settings": dataclasses.asdict(method)}
