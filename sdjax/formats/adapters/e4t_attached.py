"""E4T's encoder as an adapter for another model: its word, its conditioner, and edits for the weights that it changed.

    acting(sd, adapter, {"unet": tuned}, (network, tower))         # Adapter(edits, words, conditioner, own)

adapter: the content of an E4T folder: "head", "offsets" and perhaps "reference" and "concept" in its `trees`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from sdjax import trees
from sdjax.formats.storage import parameters
from sdjax.methods import heads, offsets
from sdjax.methods.adapter import Adapter
from sdjax.methods.e4t import E4T, Encoder, features
from sdjax.methods.edits import Factored
from sdjax.methods.seen import E4T_OWN, ENCODER, Seen, empty, half
from sdjax.models.axes import to_file
from sdjax.stable_diffusion import TOKENS, StableDiffusion
from sdjax.trees import Tree


def acting(sd: StableDiffusion, adapter: Adapter, tuned: Mapping[str, Tree], tower: tuple[Any, Tree]) -> Adapter:
    """Returns the Adapter that gives sd E4T's encoder.

    It has edits W -> W' for all weights of the encoder's own model that differ from sd's, offsets included.  Its word
    starts as the domain's row, and its conditioner computes the word in every step.
    tuned: {part: weights} of the encoder's own model, for parts that may differ from sd's.  tower: (network, weights).
    A stored picture is encoded here, once, so that memory need not hold the tower.
    """
    own, method = adapter.trees, E4T(**adapter.about["settings"] | {"vision": False})
    domain = sd.tokenizers[ENCODER].ids(method.domain)
    if len(domain) != 1:
        raise ValueError(f"{adapter.about['file']}: its domain {method.domain!r} is {len(domain)} tokens in this model")
    head = heads.of(trees.names(own["head"]), method.features)
    other = sd.with_parts(**tuned)
    network, weights = tower
    encoder = Encoder(
        own["head"], own.get("vision", weights), jnp.zeros(1, jnp.int32), method.scale, method.penalty,
        kind=head, network=network,
    )  # fmt: skip
    seen = _seen(other, own, jnp.array(domain, jnp.int32), head)
    if "concept" in own:
        seen = seen.replace(concept=own["concept"], features=features(encoder, own["concept"]))
        encoder = encoder.replace(tower=None)
    row = np.asarray(trees.flatten(other.parts[ENCODER])[TOKENS])[domain]
    return replace(
        adapter, trees={}, edits=_edits(sd, other, own["offsets"]), words={method.word: {ENCODER: row}},
        conditioner=encoder, own={E4T_OWN: seen},
    )  # fmt: skip


def _seen(sd: StableDiffusion, own: Mapping[str, Any], domain: Any, head: Any) -> Seen:
    """Returns the encoder's reference; sd: the encoder's own model."""
    held = own.get("reference") or {"unet": half(sd), "empty": empty(sd)}
    made = sd.with_own(**{E4T_OWN: Seen(**held, domain=domain, nothing=jnp.asarray(sd.tokenize([""])[ENCODER]))})
    return head.prepared(made).reference.own[E4T_OWN]


def _edits(sd: StableDiffusion, other: StableDiffusion, generators: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {part: {name: edit}} that turn sd's weights into those of another model with offsets."""
    unet = parameters.template(other.networks["unet"])
    other = other.with_parts(unet=offsets.apply(other.parts["unet"], offsets.by_shape(unet, generators)))
    found = {}
    for part in ("unet", ENCODER):
        ours = trees.flatten(sd.parts[part])
        for name, weight in trees.flatten(other.parts[part]).items():
            if weight is not ours[name] and not np.array_equal(weight, ours[name]):
                factors = {"whole": np.asarray(to_file(weight), np.float32), "scale": 1.0}
                found.setdefault(part, {})[name] = Factored(factors)
    return found
