"""LoRA and its relatives as edits of weights: every spelling of their names in, one sum over a weight out.

    edits = read(tensors, sd.networks, {}, "cat.safetensors")       # {part: {weight's name: Edit}}
    tree = merge(sd.unet, {name: ((edit, 0.8),) for name, edit in edits["unet"].items()})

A merged weight is W + sum_i s_i D_i(W), with D_i from the unmerged W, so that the order of adapters does not matter.
In a file's layout W is [out in] or [out in height width], r the rank and a = alpha / r (1 where no alpha is given):

    LoRA      D = a B A              A [r in ...], B [out r]; with a middle M [r r height width]: B M A
    LoHa      D = a (A1 B1) * (A2 B2)
    LoKr      D = a kron(W1, W2)     either factor may be a product itself
    full      D is in the file, for weights and biases
    whole     D = W' - W             W' is in the file: Custom Diffusion
    DoRA      D' = m (W + D) / |W + D| - W, norms over all axes but the one that m counts

Names are never parsed: all spellings of the model's own names are generated and looked up.
Source: Hu et al. 2021 (LoRA), Liu et al. 2024 (DoRA), Yeh et al. 2023 (LyCORIS), Kumari et al. 2023 (Custom
Diffusion); names: diffusers, peft, kohya's sd-scripts, LyCORIS.
"""

import functools
import re
import weakref
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from sdjax import trees
from sdjax.formats.storage import ldm_names, parameters

PARTS = ("unet", "text_encoder")
SUFFIXES = {
    **dict.fromkeys((".lora_down.weight", ".lora.down.weight", ".lora_A.weight", ".lora_A.default.weight"), "down"),
    **dict.fromkeys((".lora_up.weight", ".lora.up.weight", ".lora_B.weight", ".lora_B.default.weight"), "up"),
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
RANKED = ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")  # tensors whose first axis is the rank
UNSUPPORTED = {  # by what a tensor's name contains
    "OFT": re.compile(r"\.b?oft_"),
    "IA3": re.compile(r"\.on_input$|\.ia3_l"),
    "GLoRA": re.compile(r"\.[ab][12]\.weight$"),
    "changes of norms": re.compile(r"\.[wb]_norm$"),
    "LoRA with biases": re.compile(r"\.lora_(B|up)\.bias$"),
    "cloneofsimo's LoRA by position": re.compile(r":\d+:(up|down)$"),
}
KEPT = 2  # merged copies of a weight that are kept for attaching again


@dataclass(frozen=True, eq=False)
class Edit:
    """The factors of one weight's change, {name: array}; what they are called decides on the formula."""

    factors: dict


# ---- reading -----------------------------------------------------------------------------------


def recognised(tensors):
    """Returns whether a file's tensors {name: array} are those of LoRA or a relative, supported or not."""
    ends = tuple(SUFFIXES)
    return any(name.endswith(ends) or _unsupported(name) for name in tensors)


def _unsupported(name):
    """Returns the kind that a tensor's name belongs to and that is not read, or None."""
    return next((kind for kind, pattern in UNSUPPORTED.items() if pattern.search(name)), None)


def read(tensors, networks, configs, path):
    """Returns {part: {dotted name of a weight: Edit}} of a file's tensors {name: array}.

    configs: {part: PEFT's settings}, of which lora_alpha, alpha_pattern and use_rslora count where a module has no
    alpha of its own; without them alpha is the rank.
    Raises ValueError naming the file and the kinds or tensors that have no place in this model.
    """
    for kind in filter(None, map(_unsupported, tensors)):
        raise ValueError(f"{path}: {kind}: not supported; LoRA, DoRA, LoHa, LoKr and full differences are")
    places, modules, unknown = spellings(networks.unet, networks.text_encoder), {}, []
    for name in tensors:
        place, role = _place(name, places)
        if place is None or role in modules.setdefault(place, {}):
            unknown.append(name)
        else:
            modules[place][role] = np.asarray(tensors[name])
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
        _check_shapes(edits[part], parameters.template(getattr(networks, part)), path)
    return edits


def _place(name, places):
    """Returns ((part, module), role) of a tensor, or (None, None)."""
    for suffix, role in SUFFIXES.items():
        if name.endswith(suffix) and name.removesuffix(suffix) in places:
            return places[name.removesuffix(suffix)], role
    return None, None


def _prepared(factors, module, config, where):
    """Returns a module's factors with the scale in place of alpha, and magnitudes named for the axis they count."""
    shape = {name: value for name, value in factors.items() if name not in ("alpha", "magnitude", "dora_scale")}
    if set(shape) not in FACTORS:
        raise ValueError(f"{where}: holds {', '.join(sorted(factors))}; these make no LoRA, LoHa, LoKr or difference")
    made = {**shape, "scale": np.float32(_scale(factors, module, config))}
    if "magnitude" in factors:  # peft: one number per output
        made["outputs"] = factors["magnitude"].reshape(-1)
    if "dora_scale" in factors:  # LyCORIS: one per input [1 in ...], or with wd_on_output one per output [out 1 ...]
        scale = factors["dora_scale"]
        made["inputs" if scale.ndim > 1 and scale.shape[0] == 1 else "outputs"] = scale.reshape(-1)
    return made


def _scale(factors, module, config):
    """Returns alpha / rank, alpha / sqrt(rank) for PEFT's rslora; 1 where there is no alpha, or no rank."""
    rank = next((len(factors[name]) for name in RANKED if name in factors), config.get("r"))
    patterns = config.get("alpha_pattern") or {}
    alpha = next((patterns[key] for key in patterns if _fits(key, module)), None)
    alpha = config.get("lora_alpha", config.get("alpha")) if alpha is None else alpha
    alpha = float(factors["alpha"].reshape(())) if "alpha" in factors else alpha
    if not rank or not alpha or factors.keys() & {"diff", "whole"}:  # sd-scripts writes 0 for "the rank"
        return 1.0
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _fits(key, module):
    """Returns whether a key of PEFT's alpha_pattern names a module: its last names, or after ^ the whole of it."""
    if not re.fullmatch(r"\^?[\w.]+", key):
        raise ValueError(f"alpha_pattern: {key!r}: expected a module's name or its end, not another pattern")
    ends = (module, module.removeprefix("text_model."))
    return key[1:] in ends if key[0] == "^" else f".{module}".endswith(f".{key}")


def _check_shapes(edits, template, path):
    shapes, wrong = trees.flatten(template), []
    for name, edit in edits.items():
        if name not in shapes:
            raise ValueError(f"{path}: a difference for {name}, which this model has not")
        try:
            jax.eval_shape(_merged, shapes[name], (edit.factors,), (np.float32(1),))
        except (TypeError, ValueError):
            sizes = ", ".join(f"{key} {list(value.shape)}" for key, value in edit.factors.items() if key != "scale")
            wrong.append(f"{name} ({sizes})")
    if wrong:
        raise ValueError(f"{path}: made for another model; misshapen: {trees.listing(wrong, 3)}")


@functools.lru_cache(maxsize=4)
def spellings(unet, text_encoder):
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
    attention, _, projection = module.removesuffix(".0").rpartition(".")
    if projection in ("to_q", "to_k", "to_v", "to_out"):  # with and without the part's name
        for part in ("", "unet."):
            processor = f"{part}{attention}.processor.{projection}"
            yield from (f"{processor}_lora", processor)  # diffusers before 0.20, Custom Diffusion


def _text_spellings(module):
    for name in (module, module.removeprefix("text_model.")):
        flat = name.replace(".", "_")
        yield from (name, f"text_encoder.{name}", f"base_model.model.{name}", f"lora_te_{flat}", f"lora_te1_{flat}")
        yield f"text_encoders.clip_l.transformer.{name}"
        attention, _, projection = name.removesuffix("_proj").rpartition(".")
        if name.endswith("_proj"):  # diffusers before 0.20
            yield f"text_encoder.{attention}.to_{projection}_lora"


# ---- merging -----------------------------------------------------------------------------------


def merge(tree, stacks):
    """Returns the tree with W + sum_i s_i D_i(W) for every W in stacks, {dotted name: ((Edit, strength), ...)}.

    The sum is float32 and cast once.  The last two sums of each weight are kept as long as the weight itself.
    """
    return trees.map_names(lambda name, weight: _kept(weight, stacks[name]) if name in stacks else weight, tree)


_copies = {}  # {id of a weight: {stack: merged weight}}; an entry goes with its weight


def _kept(weight, stack):
    if id(weight) not in _copies:
        _copies[id(weight)] = {}
        weakref.finalize(weight, _copies.pop, id(weight))
    copies = _copies[id(weight)]
    if stack not in copies:
        if len(copies) == KEPT:
            del copies[next(iter(copies))]
        edits, strengths = zip(*((edit.factors, np.float32(strength)) for edit, strength in stack), strict=True)
        copies[stack] = _merged(weight, edits, strengths)
    return copies[stack]


@jax.jit
def _merged(weight, edits, strengths):
    """Returns a weight in our layout with edits of several strengths: arrays, so that no other strength compiles."""
    to_file, from_file = parameters.TO_FILE.get(weight.ndim, (0,)), parameters.FROM_FILE.get(weight.ndim, (0,))
    base = weight.astype(jnp.float32).transpose(to_file)
    changes = (strength * change(edit, base) for edit, strength in zip(edits, strengths, strict=True))
    return (base + sum(changes)).transpose(from_file).astype(weight.dtype)


def change(factors, weight):
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
    delta = f["scale"] * made.reshape(weight.shape)
    for axis, name in enumerate(("outputs", "inputs")):
        if name in f:
            total = weight + delta
            others = tuple(k for k in range(weight.ndim) if k != axis)
            norm = jnp.sqrt(jnp.sum(total**2, others, keepdims=True))
            delta = total * f[name].reshape(norm.shape) / norm - weight
    return delta


def _product(a, b, middle=None, turned=False):
    """Returns A B [out n], or with a middle M [r s height width] the product over both of its ranks [out in h w].

    b: [r in ...], its axes after the first taken together.  With a middle A is [r out]; `turned`: [out r].
    """
    b = b.reshape(len(b), -1)
    if middle is None:
        return jnp.matmul(a, b, precision="highest")
    return jnp.einsum("rshw,ro,si->oihw", middle, a.T if turned else a, b, precision="highest")
