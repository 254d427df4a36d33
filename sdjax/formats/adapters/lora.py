"""LoRA and its relatives as edits of weights: every spelling of their names in, a change D of each weight out.

    edits = read(tensors, sd.networks, {}, "cat.safetensors")       # {part: {weight's name: Edit}}
    change(edits["unet"]["conv_in.kernel"].factors, weight)         # D(W), which edits.merge adds with a strength

In a file's layout W is [out in] or [out in height width], r the rank and a = alpha / r (1 where no alpha is given):

    LoRA      D = a B A              A [r in ...], B [out r]; with a middle M [r r height width]: B M A
    LoHa      D = a (A1 B1) * (A2 B2)
    LoKr      D = a kron(W1, W2)     either factor may be a product itself
    full      D is in the file, for weights and biases
    whole     D = W' - W             W' is in the file: Custom Diffusion
    DoRA      D' = m (W + D) / |W + D| - W, norms over all axes but the one that m counts
    PiSSA     D = a B A - W_r        W_r: W by its r largest singular values, which training began with as B0 A0
    OLoRA     D = a B A - a Q_r R_r  W = Q R; the first r columns and rows

Names are never parsed: all spellings of the model's own names are generated and looked up.  An adapter's own name
between a tensor's role and "weight" is left out: PEFT's lora_A.default.weight.
Source: Hu et al. 2021 (LoRA), Liu et al. 2024 (DoRA), Meng et al. 2024 (PiSSA), Büyükakyüz 2024 (OLoRA), Yeh et al.
2023 (LyCORIS), Kumari et al. 2023 (Custom Diffusion); names: diffusers, peft, kohya's sd-scripts, LyCORIS.
"""

import functools
import pathlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from sdjax import trees
from sdjax.formats.adapters import edits as sums
from sdjax.formats.adapters import peft_settings
from sdjax.formats.storage import ldm_names, parameters
from sdjax.models.clip import TextEncoder
from sdjax.models.unet import UNet

PARTS = ("unet", "text_encoder")
SUFFIXES = {
    **dict.fromkeys((".lora_down.weight", ".lora.down.weight", ".lora_A.weight"), "down"),
    **dict.fromkeys((".lora_up.weight", ".lora.up.weight", ".lora_B.weight"), "up"),
    **dict.fromkeys((".lora_linear_layer.down.weight", ".down.weight"), "down"),
    **dict.fromkeys((".lora_linear_layer.up.weight", ".up.weight"), "up"),
    **dict.fromkeys((".lora_magnitude_vector", ".lora_magnitude_vector.weight"), "magnitude"),
    ".lora_mid.weight": "mid",
    ".alpha": "alpha",
    ".dora_scale": "dora_scale",
    ".diff": "diff",
    ".diff_b": "diff_b",
    **dict.fromkeys(("_custom_diffusion.weight", "_custom_diffusion.0.weight"), "whole"),
    "_custom_diffusion.0.bias": "whole_b",
    **{f".{name}": name for name in ("hada_w1_a", "hada_w1_b", "hada_t1", "hada_w2_a", "hada_w2_b", "hada_t2")},
    **{f".{name}": name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b")},
    **{f".{name}": name for name in ("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")},
}
# What a module's tensors must be, beside alpha, magnitude and diff_b.
FACTORS = (
    {"down", "up"},
    {"down", "up", "mid"},
    {"diff"},
    {"whole"},
    {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"},
    *(
        {*one, *other}
        for one in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for other in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"), ("lokr_w2_a", "lokr_w2_b", "lokr_t2"))
    ),
)
# A tensor's role in PEFT's own state dicts, the adapter's name, and the rest.
NAMED = re.compile(r"(.+\.(?:lora_A|lora_B|lora_magnitude_vector|hada_\w+|lokr_\w+))\.(?!weight$|bias$)([^.]+)(\.\w+)?")
RANKED = ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")  # tensors whose first axis is the rank
UNSUPPORTED = {  # by what a tensor's name contains
    "OFT": re.compile(r"\.b?oft_"),
    "IA3": re.compile(r"\.on_input$|\.ia3_l"),
    "GLoRA": re.compile(r"\.[ab][12]\.weight$"),
    "changes of norms": re.compile(r"\.[wb]_norm$"),
    "LoRA with biases": re.compile(r"\.lora_(B|up)\.bias$"),
    "cloneofsimo's LoRA by position": re.compile(r":\d+:(up|down)$"),
}


@functools.partial(jax.tree_util.register_dataclass, data_fields=["factors"], meta_fields=[])
@dataclass(frozen=True, eq=False)
class Edit:
    """The factors of one weight's change, {name: array}; what they are called decides on the formula."""

    factors: dict[str, Any]

    def change(self, weight: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
        """Returns D(W), see change below."""
        return change(self.factors, weight)


# ---- reading -----------------------------------------------------------------------------------


def recognised(names: Iterable[str]) -> bool:
    """Returns whether the names of a file's tensors are those of LoRA or a relative, supported or not."""
    ends = tuple(SUFFIXES)
    return any(_unnamed(name)[0].endswith(ends) or _unsupported(name) for name in names)


def _unsupported(name):
    """Returns the kind that a tensor's name belongs to and that is not read, or None."""
    return next((kind for kind, pattern in UNSUPPORTED.items() if pattern.search(name)), None)


def _unnamed(name):
    """Returns (a tensor's name without that of the adapter, the adapter's or None)."""
    found = NAMED.fullmatch(name)
    return (found[1] + (found[3] or ""), found[2]) if found else (name, None)


def _of_one(tensors, path):
    """Returns the tensors by their names without an adapter's name; raises ValueError where there are several."""
    adapters = sorted({own for _, own in map(_unnamed, tensors) if own is not None})
    if len(adapters) > 1:
        raise ValueError(f"{path}: holds several adapters, {trees.listing(adapters)}; expected one")
    renamed = {_unnamed(name)[0]: tensor for name, tensor in tensors.items()}
    if len(renamed) < len(tensors):
        raise ValueError(
            f"{path}: holds tensors with the adapter's name {adapters[0]} and the same without; expected one"
        )
    return renamed


def read(
    tensors: Mapping[str, Any],
    networks: Mapping[str, Any],
    configs: Mapping[str, dict[str, Any]],
    path: str | pathlib.Path,
) -> dict[str, dict[str, Edit]]:
    """Returns {part: {dotted name of a weight: Edit}} of a file's tensors {name: array}.

    configs: {part: PEFT's settings}, see peft_settings; those of alpha count where a module has no alpha of its own.
    Without any alpha it is the rank.
    Raises ValueError naming the file and the kinds or tensors that have no place in this model.
    """
    tensors = _of_one(tensors, path)
    for kind in filter(None, map(_unsupported, tensors)):
        raise ValueError(f"{path}: {kind}: not supported; LoRA, DoRA, LoHa, LoKr and full differences are")
    places, modules, unknown = spellings(networks["unet"], networks["text_encoder"]), {}, []
    for name in tensors:
        place, role = _place(name, places)
        if place is None or role in modules.setdefault(place, {}):
            unknown.append(name)
        else:
            modules[place][role] = _array(tensors[name], f"{path}: {name}")
    if unknown:
        raise ValueError(f"{path}: tensors that belong to no weight of this model: {trees.listing(sorted(unknown))}")
    edits = {part: {} for part in PARTS}
    for (part, module), factors in modules.items():
        where, config = f"{path}: {module}", configs.get(part, {})
        for kind in factors.keys() & {"diff_b", "whole_b"}:
            edits[part][f"{module}.bias"] = Edit({kind.removesuffix("_b"): factors.pop(kind), "scale": np.float32(1)})
        if factors:
            edits[part][f"{module}.kernel"] = Edit(_prepared(factors, module, config, where))
    for part in PARTS:
        _check_shapes(edits[part], parameters.template(networks[part]), path)
    return edits


def _place(name, places):
    """Returns ((part, module), role) of a tensor, or (None, None)."""
    for suffix, role in SUFFIXES.items():
        if name.endswith(suffix) and name.removesuffix(suffix) in places:
            return places[name.removesuffix(suffix)], role
    return None, None


def _array(tensor, where):
    """Returns a tensor that has numbers, float8 as float32; raises ValueError for another."""
    if not isinstance(tensor, np.ndarray) or not tensor.size:
        shown = list(tensor.shape) if isinstance(tensor, np.ndarray) else type(tensor).__name__
        raise ValueError(f"{where}: {shown}: expected numbers; a rank is at least 1")
    if tensor.dtype.itemsize > 1 and jnp.issubdtype(tensor.dtype, jnp.floating):
        return tensor
    return tensor.astype(np.float32)  # float8, whose values are all in it, and an alpha that is an integer


def _prepared(factors, module, config, where):
    """Returns a module's factors with the scale in place of alpha, and magnitudes named for the axis they count."""
    shape = {name: value for name, value in factors.items() if name not in ("alpha", "magnitude", "dora_scale")}
    if set(shape) not in FACTORS:
        raise ValueError(f"{where}: holds {', '.join(sorted(factors))}; these make no LoRA, LoHa, LoKr or difference")
    if config.get("use_dora") and not factors.keys() & {"magnitude", "dora_scale"}:
        raise ValueError(f"{where}: use_dora=True, and the file holds no magnitude")
    flat = [name for name, value in shape.items() if value.ndim < 2]
    if flat:
        raise ValueError(
            f"{where}: {flat[0]} {list(shape[flat[0]].shape)}: expected a matrix or a convolution's kernel"
        )
    made = {**shape, "scale": np.float32(_scale(factors, module, config, where))}
    begun = peft_settings.changed(config)
    if begun and set(shape) != {"down", "up"}:
        raise ValueError(f"{where}: init_lora_weights={begun!r}: holds {', '.join(sorted(shape))}, which is no LoRA")
    if begun:
        made[begun] = np.float32(1) if begun == "pissa" else made["scale"]
    if "magnitude" in factors:  # peft: one number per output
        made["outputs"] = factors["magnitude"].reshape(-1)
    if "dora_scale" in factors:  # LyCORIS: one per input [1 in ...], or with wd_on_output one per output [out 1 ...]
        scale = factors["dora_scale"]
        made["inputs" if scale.ndim > 1 and scale.shape[0] == 1 else "outputs"] = scale.reshape(-1)
    return made


def _scale(factors, module, config, where):
    """Returns alpha / rank, alpha / sqrt(rank) for PEFT's rslora; 1 where there is no alpha, or no rank."""
    rank = next((len(factors[name]) for name in RANKED if name in factors), None)
    rank = peft_settings.rank(config, module, where) if rank is None else rank
    if not rank or factors.keys() & {"diff", "whole"}:
        return 1.0
    if "alpha" not in factors:
        return peft_settings.scale(config, module, rank, where)
    if factors["alpha"].size != 1 or not np.isfinite(alpha := float(factors["alpha"].reshape(()))):
        raise ValueError(f"{where}: alpha {factors['alpha'].tolist()}: expected one finite number")
    return alpha / peft_settings.divisor(config, rank) if alpha else 1.0  # sd-scripts writes 0 for "the rank"


def _check_shapes(edits, template, path):
    shapes, wrong = trees.flatten(template), []
    for name, edit in edits.items():
        if name not in shapes:
            raise ValueError(f"{path}: a difference for {name}, which this model has not")
        try:
            jax.eval_shape(sums.summed, shapes[name], (edit,), (np.float32(1),))
        except (TypeError, ValueError, ZeroDivisionError):
            sizes = ", ".join(f"{key} {list(value.shape)}" for key, value in edit.factors.items() if value.ndim)
            wrong.append(f"{name} ({sizes})")
    if wrong:
        raise ValueError(f"{path}: made for another model; misshapen: {trees.listing(wrong, 3)}")


@functools.lru_cache(maxsize=4)
def spellings(unet: UNet, text_encoder: TextEncoder) -> dict[str, tuple[str, str]]:
    """Returns {every spelling of a module's name: (part, module)} of the layers with a kernel."""
    found = {}
    original = ldm_names.unet_modules(unet.config)
    for module in _modules(unet):
        spelled = _unet_spellings(module, ldm_names.rename(module, original))
        found |= dict.fromkeys(spelled, ("unet", module))
    for module in _modules(text_encoder):
        found |= dict.fromkeys(_text_spellings(module), ("text_encoder", module))
    return found


def _modules(network):
    """Returns the dotted names of the layers that have a kernel."""
    leaves = (name.rpartition(".") for name in trees.names(parameters.template(network)))
    return [module for module, _, leaf in leaves if leaf == "kernel"]


def _unet_spellings(module, original):
    """Yields all names of a module; original: its name in the original code, which sd-scripts and ComfyUI write too."""
    yield from (module, f"unet.{module}", f"base_model.model.{module}", f"diffusion_model.{original}")
    yield from (f"lora_unet_{name.replace('.', '_')}" for name in (module, original))
    yield f"lycoris_{module.replace('.', '_')}"
    attention, _, projection = module.removesuffix(".0").rpartition(".")
    if projection in ("to_q", "to_k", "to_v", "to_out"):  # with and without the part's name
        for part in ("", "unet."):
            processor = f"{part}{attention}.processor.{projection}"
            yield from (f"{processor}_lora", processor)  # diffusers before 0.20, Custom Diffusion


def _text_spellings(module):
    for name in (module, module.removeprefix("text_model.")):
        flat = name.replace(".", "_")
        yield from (name, f"text_encoder.{name}", f"base_model.model.{name}", f"lora_te_{flat}", f"lora_te1_{flat}")
        yield from (f"text_encoders.clip_l.transformer.{name}", f"lycoris_{flat}")
        attention, _, projection = name.removesuffix("_proj").rpartition(".")
        if name.endswith("_proj"):  # diffusers before 0.20
            yield f"text_encoder.{attention}.to_{projection}_lora"


# ---- changes ---------------------------------------------------------------------------------


def change(factors: Mapping[str, Float[Array, "..."]], weight: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """Returns D(W) of one Edit's factors, W float32 in a file's layout; raises ValueError where shapes do not fit."""
    f = {name: value.astype(jnp.float32) for name, value in factors.items()}
    if "diff" in f:
        made = f["diff"]
    elif "whole" in f:
        made = f["whole"] - weight
    elif "up" in f:
        made = _product(f["up"].reshape(len(f["up"]), -1), f["down"], f.get("mid"), turned=True)
    elif "hada_w1_a" in f:
        one, other = (_product(f[f"hada_w{i}_a"], f[f"hada_w{i}_b"], f.get(f"hada_t{i}")) for i in (1, 2))
        made = one * other
    else:
        one = f["lokr_w1"] if "lokr_w1" in f else _product(f["lokr_w1_a"], f["lokr_w1_b"])
        made = f["lokr_w2"] if "lokr_w2" in f else _product(f["lokr_w2_a"], f["lokr_w2_b"], f.get("lokr_t2"))
        made = made.reshape(len(made), weight.shape[1] // one.shape[1], -1)
        made = jnp.einsum("ab,cdn->acbdn", one, made).reshape(len(one) * len(made), -1)
    if len(made) != len(weight):
        raise ValueError(f"{len(made)} outputs where the weight has {len(weight)}")
    delta = f["scale"] * made.reshape(weight.shape) - _begun(f, weight)
    for axis, name in enumerate(("outputs", "inputs")):
        if name in f:
            total = weight + delta
            others = tuple(k for k in range(weight.ndim) if k != axis)
            norm = jnp.sqrt(jnp.sum(total**2, others, keepdims=True))
            delta = total * f[name].reshape(norm.shape) / norm - weight
    return delta


def _begun(f, weight):
    """Returns what training took out of a weight [out in] to begin with: PiSSA's W_r, OLoRA's a Q_r R_r, else 0."""
    kind = next((kind for kind in peft_settings.CHANGED if kind in f), None)
    if kind is None:
        return 0
    if weight.ndim != 2:
        raise ValueError(f"{kind} on a convolution")
    rank = len(f["down"])
    if kind == "pissa":
        left, values, right = jnp.linalg.svd(weight, full_matrices=False)
        left = left[:, :rank] * values[None, :rank]
    else:
        left, right = jnp.linalg.qr(weight)
    return f[kind] * jnp.matmul(left[:, :rank], right[:rank], precision="highest")


def _product(a, b, middle=None, turned=False):
    """Returns A B [out n], or with a middle M [r s height width] the product over both of its ranks [out in h w].

    b: [r in ...], its axes after the first taken together.  With a middle A is [r out]; `turned`: [out r].
    """
    b = b.reshape(len(b), -1)
    if middle is None:
        return jnp.matmul(a, b, precision="highest")
    return jnp.einsum("rshw,ro,si->oihw", middle, a.T if turned else a, b, precision="highest")
