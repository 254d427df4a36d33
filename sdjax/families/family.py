"""The interface of a model family: its parts, the UNet's inputs from text, and the folder layout.

@dataclass(frozen=True)
class Mine(Family):                                     # a file of this package; `known` finds it
    parts = {...}
    tokenizers = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    pipelines = ("MyPipeline",)

    def inputs(self, encoded): ...
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from jaxtyping import Array, Float, Int

from sdjax.models.cond import UNetInputs
from sdjax.stable_diffusion import StableDiffusion


@dataclasses.dataclass(frozen=True)
class Part:
    """One part in a model folder: class in model_index.json, weight file, config, network.

    place: its sub-folder, if the name differs from the part's.
    network: a Linen module of (config, dtype); its `example()` is the smallest call that creates all parameters.
    """

    package: str
    class_name: str
    stem: str
    config: Any  # its class
    network: Any
    place: str = ""


class Family(Protocol):
    """A frozen dataclass without fields; this class is its base and supplies the defaults.

    parts: {name: Part} of all possible parts.  required: the mandatory ones.
    tokenizers: {text encoder: sub-folder of its tokenizer}, in the order of the encoders; {} without text.
    pipelines: its classes in model_index.json.
    beside: other entries of model_index.json.
    scheduler: defaults for keys that a scheduler_config.json omits.
    lora: {part: prefixes of its layers in sd-scripts' LoRA files}; the first one is written.
    rows: {text encoder: the tensor with its rows in an embedding file}.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]  # tells type checkers that it is a dataclass
    parts: Any = {}
    required: Any = ()
    tokenizers: Any = {}
    pipelines: Any = ()
    beside: Any = {}
    scheduler: Any = {}
    lora: Any = {}
    rows: Any = {}

    def pipeline(self, sd: StableDiffusion) -> str:
        """Returns a model's class in model_index.json; raises ValueError if no class fits its parts."""
        return self.pipelines[0]

    def encode(
        self,
        sd: StableDiffusion,
        encoder: str,
        rows: Float[Array, "B L C"],
        ids: Int[Array, "B L"],
        skip: int,
    ) -> dict[str, Array]:
        """Returns a text encoder's outputs for token embeddings: {"context": [B L D]}, and arrays per text, [B ...].

        ids: the tokens.  skip: number of last layers to skip, clip skip - 1.
        """
        return {"context": sd.encode_text(encoder, rows, skip)}

    def inputs(self, encoded: Mapping[str, Mapping[str, Any]]) -> UNetInputs:
        """Returns the UNet's inputs from {text encoder: outputs of `encode`, "context" [B N D]}.

        A text of n chunks has N = n L tokens; arrays per text come from the first chunk.
        """
        ...

    def told(self, sd: StableDiffusion, z: Float[Array, "B h w c"], inputs: UNetInputs) -> UNetInputs:
        """Returns the UNet's inputs with values derived from the latents z, such as the picture's size."""
        return inputs
