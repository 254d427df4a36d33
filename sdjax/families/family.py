"""What a family of models is: which parts there are, how words become what the UNet is told, and how its folder looks.

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
    """How one part of a model lies in its folder: class in model_index.json, file of weights, config, network.

    place: its sub-folder where that has another name than the part.
    network: a Linen module made of (config, dtype), whose `example()` is the smallest call that makes all parameters.
    """

    package: str
    class_name: str
    stem: str
    config: Any  # its class
    network: Any
    place: str = ""


class Family(Protocol):
    """A frozen dataclass without fields that names this class as its base, which gives what it does not define itself.

    parts: {name: Part} of all parts that a model may have.  required: those that each has.
    tokenizers: {text encoder: sub-folder of its tokenizer}, in the order in which the encoders are read; {}: no words.
    pipelines: the classes in model_index.json that are of this family.
    beside: what model_index.json says beside parts, tokenizers and schedulers.
    scheduler: what a scheduler_config.json means that does not say it.
    lora: {part: prefixes of its layers in sd-scripts' LoRA files}, the one that is written first.
    rows: {text encoder: the tensor that holds a word's rows of it in an embedding's file}.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]  # of the dataclass that it is
    parts: Any = {}
    required: Any = ()
    tokenizers: Any = {}
    pipelines: Any = ()
    beside: Any = {}
    scheduler: Any = {}
    lora: Any = {}
    rows: Any = {}

    def pipeline(self, sd: StableDiffusion) -> str:
        """Returns the class that model_index.json names for a model; raises ValueError where none takes its parts."""
        return self.pipelines[0]

    def encode(
        self,
        sd: StableDiffusion,
        encoder: str,
        rows: Float[Array, "B L C"],
        ids: Int[Array, "B L"],
        skip: int,
    ) -> dict[str, Array]:
        """Returns what a text encoder makes of token rows: {"context": [B L D]}, and what is one for a text, [B ...].

        ids: the rows' tokens.  skip: the last layers to leave out, clip skip - 1.
        """
        return {"context": sd.encode_text(encoder, rows, skip)}

    def inputs(self, encoded: Mapping[str, Mapping[str, Any]]) -> UNetInputs:
        """Returns what the UNet is told of texts, of {text encoder: what `encode` returns, "context" [B N D]}.

        A text of several chunks has N = n L tokens; what is one for a text is that of its first chunk.
        """
        ...

    def told(self, sd: StableDiffusion, z: Float[Array, "B h w c"], inputs: UNetInputs) -> UNetInputs:
        """Returns the UNet's inputs with what follows from the latents z themselves, such as the picture's size."""
        return inputs
