"""What a method is: two functions, and what it may have beside them.

    @dataclass(frozen=True)
    class Bias(Method):                                                    # a file of this package, or a recipe's own
        def split(self, sd, key=None):
            trained, rest = trees.partition(sd.parts["unet"], r"bias$")
            return trees.copy(trained, jnp.float32), sd.with_parts(unet=rest)

        def join(self, frozen, trained, key=None):
            return frozen.with_parts(unet=trees.merge(frozen.parts["unet"], trained))

Law: join after split gives an sd that computes as before.  A method acts by edits of weights, by hooks and by
conditioners; a network beside the UNet, as a ControlNet is, joins as its wrapper (sdjax.stable_diffusion).
"""

import dataclasses
from typing import Any, ClassVar, Protocol

from jax import Array

from sdjax.methods.adapter import Adapter
from sdjax.stable_diffusion import StableDiffusion


class Method(Protocol):
    """A frozen dataclass of settings that names this class as its base, which gives what it does not define itself.

    loss: loss(frozen, trained, batch, key, step, axis=None) -> (scalar, metrics), in place of the diffusion loss.
    look: look(frozen, trained, pixels) -> frozen, before the first step of a run on one picture [H W 3] in [-1, 1].
    project: project(trained) -> trained, after every step: what bounds the size of what is trained.
    measure: measure(frozen, trained) -> {name: scalar}, after every step: what metrics tell of what is trained.
    finish: finish(frozen, trained, data) -> (frozen, trained), after the last step.
    preview: preview(sd, batch) -> {label: pictures uint8 [B H W 3]}, in place of pictures of the run's prompts.
    pixels: whether batches must hold pixels and not moments.
    whole_batch: whether the loss needs all rows at once, so that gradients cannot be accumulated.
    words: the placeholders that are trained.  unwanted: those of them that are for the negative prompt.
    formats: names of the kinds of file (formats/adapters) that hold what was learned; the first that can is written.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]  # of the dataclass that it is
    loss: Any = None
    look: Any = None
    project: Any = None
    measure: Any = None
    finish: Any = None
    preview: Any = None
    pixels: Any = False
    whole_batch: Any = False
    words: Any = ()
    unwanted: Any = ()
    formats: Any = ("trained",)

    def split(self, sd: StableDiffusion, key: Array | None = None) -> tuple[Any, StableDiffusion]:
        """Returns (trained, frozen): copies that an optimizer sees, and the model without what was taken out.

        key: of what is drawn; None leaves only shapes (jax.ShapeDtypeStruct) of that, for a file to fill.
        Raises SettingError for a setting that does not fit the model.
        """
        ...

    def join(self, frozen: StableDiffusion, trained: Any, key: Array | None = None) -> StableDiffusion:
        """Returns the model, ready to train or to sample.

        key: where training itself is random, such as dropout: one key per example [B].
        """
        ...

    def before(self, frozen: StableDiffusion) -> StableDiffusion:
        """Returns the model as it predicted before training, for a loss that holds on to that (loss.preservation).

        By default `frozen` itself: a method whose split takes weights out keeps them elsewhere, or raises SettingError.
        """
        return frozen

    def adapter(self, frozen: StableDiffusion, trained: Any) -> Adapter | None:
        """Returns what was learned, in memory; None where that is a whole model.

        Where a method defines none it is the trained tree as it is, for whoever has the method's code.
        """
        return Adapter(trees={"trained": trained}, about=about(self))


def about(method: Method) -> dict[str, Any]:
    """Returns {"method": the class's name, "settings": its fields as plain values}, for a file's header."""
    return {"method": type(method).__name__, "settings": dataclasses.asdict(method)}
