"""Whole models in one file with the original code's names: .safetensors and .ckpt.

    family, networks, params, schedule, tokenizers, low = read("v1-5-pruned.ckpt", "float16", ema=True)
    write(sd, "cat.safetensors", "float16")

Such files lack sizes, schedule and vocabulary.  Sizes follow from the shapes; the rest comes from Stable Diffusion 1
and 2 or LDM-SR.  Files written by sdjax have everything as JSON in their metadata, so models of any size load again.
Source: ldm_names.py for the names; Stability-AI's ModelSpec 1.0.1 for metadata; openai/clip-vit-large-patch14 for the
vocabulary.
"""

import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jax.typing import DTypeLike
from jaxtyping import Float64

from sdjax.diffusion.noise_schedule import Schedule
from sdjax.families.family import Family
from sdjax.families.ldm_sr import LdmSr
from sdjax.families.sd import Sd
from sdjax.formats.models import infer_config
from sdjax.formats.models.folder import LOW_SCHEDULER
from sdjax.formats.storage import checkpoints, files, headers, ldm_names, parameters
from sdjax.models.clip import TextConfig, TextEncoder
from sdjax.models.unet import UNet, UNetConfig
from sdjax.models.vae import AutoencoderKL, VaeConfig
from sdjax.runtime.guard import named
from sdjax.settings import UNSAID, SettingError
from sdjax.stable_diffusion import StableDiffusion
from sdjax.tasks import upscaling
from sdjax.text.tokenizer import Tokenizer
from sdjax.trees import Tree

UNET, VAE, EMA = "model.diffusion_model.", "first_stage_model.", "model_ema."
CLIP_PREFIX, OPEN_CLIP_PREFIX = (
    "cond_stage_model.transformer.",
    "cond_stage_model.model.",
)  # the text encoders of Stable Diffusion 1 and 2
ENCODER = "text_encoder"
NETWORKS = {"unet": (UNetConfig, UNet), "vae": (VaeConfig, AutoencoderKL), "text_encoder": (TextConfig, TextEncoder)}
# Prefixes of weights that no part needs.
IGNORED = (
    f"{VAE}loss.",
    *(f"{CLIP_PREFIX}{name}" for name in ("logit_scale", "text_projection.")),
    *(f"{OPEN_CLIP_PREFIX}{name}" for name in ("logit_scale", "text_projection", "attn_mask", "visual.")),
)
QKV = {"q_proj": 0, "k_proj": 1, "v_proj": 2, "to_q": 0, "to_k": 1, "to_v": 2}
CODEBOOK = f"{VAE}quantize.embedding.weight"
VOCABULARY = "openai/clip-vit-large-patch14"
VOCABULARY_FILES = ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json")
LANDMARKS = {"a</w>": 320, "photo</w>": 1125, "<|endoftext|>": 49407}  # ids that identify CLIP's vocabulary
LDM_SR_BETAS: dict[str, Any] = {  # latent-diffusion, models/ldm/bsr_sr/config.yaml
    "beta_start": 0.0015,
    "beta_end": 0.0155,
}
BASE_STEPS = 875_000  # global_step of 512-base-ema.ckpt, the model of 2.0 that predicts noise
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction"}  # modelspec.prediction_type
NOTES = "sdjax"  # the key of our metadata
OWN = ("modelspec.architecture", "modelspec.implementation", "modelspec.prediction_type")  # a file's own, in any case
Whole = tuple[
    Family, dict[str, Any], dict[str, Tree], Schedule, dict[str, Tokenizer], Schedule | None
]  # what `read` returns
Place = tuple[str, tuple[int, int | None] | None]  # see View


# ---- reading -----------------------------------------------------------------------------------


def read(
    path: str | pathlib.Path,
    dtype: DTypeLike | None = "float32",
    *,
    prediction_type: str | None = None,
    ema: bool = False,
    tokenizer: str | pathlib.Path | None = None,
) -> Whole:
    """Returns (family, {part: network}, {part: parameters}, Schedule, {text encoder: Tokenizer}, low) of a checkpoint.

    A codebook identifies LDM-SR, which has no text encoder and no tokenizer.
    low: the Schedule of an upscaler's small picture; None if it equals the latents' schedule.
    dtype: of weights and computation; None keeps every weight as stored.  ema: take the UNet's averaged weights.
    prediction_type: of the UNet.  None takes it from the metadata or the kind of model.  For 2.x with four channels
    these may not decide it; then the network's output at the noisiest time does.
    tokenizer: a folder or hub id with CLIP's vocabulary; None takes the file's own, or openai/clip-vit-large-patch14.
    Raises ValueError in one line, naming the file, for weights that are missing, unexpected or misshapen, for missing
    averaged weights, and for files of other kinds.
    """
    with named(path):
        return _read(path, dtype, prediction_type, ema, tokenizer)


def _read(
    path: str | pathlib.Path,
    dtype: DTypeLike | None,
    prediction_type: str | None,
    ema: bool,
    tokenizer: str | pathlib.Path | None,
) -> Whole:
    weights, metadata, steps = checkpoints.opened(path)
    notes = _notes(metadata)
    text = OPEN_CLIP_PREFIX if any(name.startswith(OPEN_CLIP_PREFIX) for name in weights.names) else CLIP_PREFIX
    if CODEBOOK in weights.names:
        text = None
    words = None if text is None else _tokenizer(tokenizer, notes, text)
    configs = _configs(weights, notes, text, words)
    networks = {name: NETWORKS[name][1](config, jnp.dtype(dtype or "float32")) for name, config in configs.items()}
    for network in networks.values():
        parameters.check_layers(weights, network.config)
    prefixes = {"unet": UNET, "vae": VAE, "text_encoder": text}
    views = {name: _view(weights, network, prefixes[name], ema) for name, network in networks.items()}
    params = {name: parameters.read(views[name], network, name, dtype) for name, network in networks.items()}
    schedule = _schedule(weights, notes, configs["unet"])
    if not notes:
        prediction_type = (
            prediction_type
            or _told(weights, metadata, steps, configs["unet"])
            or _shown(networks["unet"], params["unet"])
        )
        if prediction_type == "v_prediction" and _is_two(configs["unet"]):
            networks["unet"] = UNet(dataclasses.replace(configs["unet"], sample_size=96), networks["unet"].dtype)
    schedule = dataclasses.replace(schedule, prediction_type=prediction_type or schedule.prediction_type)
    low = Schedule.from_json(notes[LOW_SCHEDULER]) if LOW_SCHEDULER in notes else None
    family, tokenizers = (LdmSr(), {}) if words is None else (Sd(), {ENCODER: words})
    return family, networks, params, schedule, tokenizers, low


@dataclasses.dataclass(frozen=True)
class View:
    """The weights of one part under our names, a files.Stored.

    places: {our name: (name in the file, third)}.  third: None for all rows of the file's matrix, or (k, n) for third k
    of its rows.  The thirds alternate in groups of n rows; with n = None each third is contiguous.
    """

    weights: files.Stored
    places: Mapping[str, Place]

    @property
    def path(self) -> str | pathlib.Path:
        return self.weights.path

    @property
    def names(self) -> Collection[str]:
        return self.places.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        place, third = self.places[name]
        shape = self.weights.shape(place)
        return shape if third is None else (shape[0] // 3, *shape[1:])

    def dtype(self, name: str) -> str:
        return self.weights.dtype(self.places[name][0])

    def read(self, name: str) -> np.ndarray:
        place, third = self.places[name]
        array = self.weights.read(place)
        if third is None:
            return array
        parts = array.reshape(-1, 3, third[1] or len(array) // 3, *array.shape[1:])
        return parts[:, third[0]].reshape(-1, *array.shape[1:])


def _view(weights: files.Stored, network: Any, prefix: str, ema: bool = False) -> View:
    """Returns the weights under a prefix, with our names; unknown weights keep their own name."""
    there = {name for name in weights.names if name.startswith(prefix) and not name.startswith(IGNORED)}
    if prefix == CLIP_PREFIX:
        return View(weights, {name.removeprefix(CLIP_PREFIX): (name, None) for name in there})
    if prefix == OPEN_CLIP_PREFIX:  # without the unused layer after the last used one
        last = f"{OPEN_CLIP_PREFIX}transformer.resblocks.{network.config.num_hidden_layers}."
        there = {name for name in there if not name.startswith(last)}
    places = _places(network, prefix)
    if prefix == UNET and ema:
        places = {name: (averaged(place), third) for name, (place, third) in places.items()}
        there = {name for name in weights.names if name.startswith(EMA)} - {f"{EMA}decay", f"{EMA}num_updates"}
        if not there:
            raise SettingError(
                "ema", True, "a file with averaged weights", "the file holds no averaged ones (model_ema.)"
            )
    found = {name: place for name, place in places.items() if place[0] in there}
    unknown = there - {place for place, _ in found.values()}
    return View(weights, found | {name: (name, None) for name in unknown})


def vae_view(weights: files.Stored, network: AutoencoderKL) -> View:
    """Returns the autoencoder's weights in a file, under our names."""
    return _view(weights, network, VAE)


def averaged(name: str) -> str:
    """Returns the name of a weight's running average: without the prefix "model." and without dots.

    Source: CompVis latent-diffusion, ldm/modules/ema.py.
    """
    return EMA + name.removeprefix("model.").replace(".", "")


def _places(network: Any, prefix: str) -> dict[str, Place]:
    """Returns {our name: Place in a single file} for all weights of a network; see View."""
    make = {
        UNET: ldm_names.unet_modules,
        VAE: ldm_names.vae_modules,
        OPEN_CLIP_PREFIX: ldm_names.open_clip_modules,
        CLIP_PREFIX: lambda config: {},
    }
    modules = make[prefix](network.config)
    ours = parameters.file_names(parameters.template(network))
    return {name: (prefix + ldm_names.rename(name, modules), _third(name, prefix, network.config)) for name in ours}


def _third(name: str, prefix: str, config: Any) -> tuple[int, int | None] | None:
    """Returns a weight's third of a joint matrix of queries, keys and values, or None; see View.

    OpenCLIP stores all queries first; LDM-SR's UNet stores queries, keys and values head by head.
    """
    part = name.split(".")[-2]
    plain = prefix == UNET and config.cross_attention_dim is None
    if part not in QKV or not (plain or prefix == OPEN_CLIP_PREFIX):
        return None
    return QKV[part], config.head_width if plain else None


def _notes(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Returns the metadata of a file written by sdjax, {} for other files."""
    try:
        notes = json.loads(metadata.get(NOTES, "{}"))
    except (ValueError, RecursionError):
        raise ValueError(f"metadata {NOTES!r} is not JSON") from None
    if notes == {}:
        return notes
    needed = ("unet", "vae", "scheduler")
    whole = type(notes) is dict and all(type(one) is dict for one in notes.values()) and notes.keys() >= set(needed)
    if not whole:
        raise ValueError(f"metadata {NOTES!r}: expected the configs of {', '.join(needed)}")
    return notes


def _configs(
    weights: files.Stored, notes: dict[str, Any], text: str | None, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """Returns {part: config} from our metadata, or else from the shapes of the weights."""
    if notes:
        present = [name for name in NETWORKS if text is not None or name != "text_encoder"]
        if not notes.keys() >= set(present):
            raise ValueError(f"metadata {NOTES!r}: expected the configs of {', '.join(present)}")
        return {name: NETWORKS[name][0].from_json(notes[name]) for name in present}

    def shapes(prefix: str) -> dict[str, tuple[int, ...]]:
        found = {name.removeprefix(prefix): weights.shape(name) for name in weights.names if name.startswith(prefix)}
        if not found:
            raise ValueError(f"no weights {prefix}*: not a whole Stable Diffusion 1 or 2 with the original names")
        return found

    unet = infer_config.unet_config(shapes(UNET))
    vae = infer_config.vae_config(shapes(VAE), unet)
    if text is None or tokenizer is None:
        return {"unet": unet, "vae": vae}
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
    read_text = infer_config.clip_config if text == CLIP_PREFIX else infer_config.open_clip_config
    return {"unet": unet, "vae": vae, "text_encoder": read_text(shapes(text), ids)}


def _tokenizer(source: str | pathlib.Path | None, notes: Mapping[str, Any], text: str) -> Tokenizer:
    if source is None and "tokenizer" in notes:
        with tempfile.TemporaryDirectory() as folder:
            for name in VOCABULARY_FILES:
                pathlib.Path(folder, name).write_text(str(notes["tokenizer"].get(name, "{}")), encoding="utf-8")
            return Tokenizer.load(folder)
    try:
        folder = files.locate(source or VOCABULARY, [list(VOCABULARY_FILES)], lambda folder: True)
    except ValueError as error:
        why = f"a single file has no vocabulary: {error}"
        raise SettingError("tokenizer", UNSAID if source is None else source, "a folder with CLIP's", why) from None
    tokenizer = Tokenizer.load(folder)
    if text == OPEN_CLIP_PREFIX and tokenizer.pad == tokenizer.eos:
        return Tokenizer.of(tokenizer.vocabulary, tokenizer.merges, tokenizer.length, pad="!")  # open_clip: id 0
    return tokenizer


def _schedule(weights: files.Stored, notes: Mapping[str, Any], unet: UNetConfig) -> Schedule:
    """Returns the schedule from the file, or else the usual one of its kind; does not decide prediction_type."""
    if notes:
        return Schedule.from_json(notes["scheduler"])
    zero: dict[str, Any] = {"rescale_betas_zero_snr": "ztsnr" in weights.names}
    kind: dict[str, Any] = upscaling.BETAS if unet.num_class_embeds is not None else {}
    usual = Schedule(**zero, **(LDM_SR_BETAS if unet.cross_attention_dim is None else kind))
    if "betas" not in weights.names or weights.dtype("betas") not in ("F32", "F64"):
        return usual
    betas = weights.read("betas").astype(np.float64)
    ends: dict[str, Any] = {
        "beta_start": float(betas[0]),
        "beta_end": float(betas[-1]),
        "num_train_timesteps": len(betas),
    }
    made = [usual] + [Schedule(**ends, **zero, beta_schedule=kind) for kind in ("scaled_linear", "linear")]
    fitting = [one for one in made if _has(one, betas)]
    return fitting[0] if fitting else Schedule(num_train_timesteps=len(betas), trained_betas=tuple(betas.tolist()))


def _has(schedule: Schedule, betas: Float64[np.ndarray, " T"]) -> bool:
    """Returns whether a schedule has these betas, up to float32 rounding."""
    plain = dataclasses.replace(schedule, rescale_betas_zero_snr=False)
    same = plain.num_train_timesteps == len(betas)
    return same and np.allclose(plain.alphas_cumprod, np.cumprod(1 - betas), rtol=1e-4, atol=0)


def _told(weights: files.Stored, metadata: Mapping[str, str], steps: int | None, unet: UNetConfig) -> str | None:
    """Returns the prediction type from the file or from the kind of model; None if these do not decide it.

    For 2.0 and 2.1, 512-base predicts noise and 768 velocity, with weights of the same shapes.
    """
    said = metadata.get("modelspec.prediction_type"), metadata.get("modelspec.architecture", "")
    if "v_pred" in weights.names or said[1].endswith("-768-v"):
        return "v_prediction"
    if said[0] in PREDICTIONS:
        return PREDICTIONS[said[0]]
    if unet.num_class_embeds is not None:
        return "v_prediction"  # the x4 upscaler
    return None if _is_two(unet) and steps != BASE_STEPS else "epsilon"


def _is_two(unet: UNetConfig) -> bool:
    """Returns whether a config has the sizes of 2.0 and 2.1, which exist for noise and for velocity."""
    return unet.use_linear_projection and unet.in_channels == unet.out_channels


def _shown(network: UNet, params: Tree) -> str:
    """Returns a UNet's prediction type, from its output for a constant map at the noisiest time.

    A network that predicts noise returns about the same map; velocity is far lower.
    Source: AUTOMATIC1111 stable-diffusion-webui, sd_models_config.py, is_using_v_parameterization_for_sd2.
    """
    z = jnp.full((1, 8, 8, network.config.in_channels), 0.5)
    context = jnp.full((1, 2, network.config.cross_attention_dim), 0.5)
    prediction, _ = jax.jit(network.apply)({"params": params}, z, jnp.array([999.0]), context)
    return "v_prediction" if (prediction - z).mean() < -1 else "epsilon"


# ---- writing -----------------------------------------------------------------------------------


def write(
    sd: StableDiffusion,
    destination: str | pathlib.Path,
    dtype: DTypeLike | None = None,
    about: Mapping[str, str] = FrozenDict(),
) -> pathlib.Path:
    """Writes unet, vae and text encoder as one .safetensors file that other tools load; returns its path.

    The file has no image encoder and nothing of E4T.  dtype: type of the weights; None keeps each.
    about: metadata of its training; the architecture and the hash of the tensors are the file's own.
    Raises ValueError for another ending, for families without single files, and for words added to CLIP's vocabulary,
    which other tools refuse.
    """
    path = pathlib.Path(destination)
    if path.suffix != ".safetensors" or path.is_dir():
        raise ValueError(f"{path}: a single file; a name that ends in .safetensors is expected")
    if sd.family not in (Sd(), LdmSr()):
        raise ValueError(f"{path}: {type(sd.family).__name__} has no single file; save a diffusers folder instead")
    usual = has_usual_words(sd)
    if usual and sd.words:
        words = ", ".join(sd.words)
        raise ValueError(f"{path}: a single file has no place for the words {words}; save a diffusers folder instead")
    prefixes, tensors = {"unet": UNET, "vae": VAE}, {}
    if "text_encoder" in sd.parts:
        prefixes["text_encoder"] = (
            OPEN_CLIP_PREFIX if sd.networks["text_encoder"].config.hidden_act == "gelu" else CLIP_PREFIX
        )
    for part, prefix in prefixes.items():
        tensors |= _renamed(parameters.write(sd.parts[part], dtype), sd.networks[part], prefix)
    own = _modelspec(sd, path.stem)
    told = {**own, **about, **{name: own[name] for name in OWN if name in own}}
    metadata = {"format": "pt", NOTES: json.dumps(_said(sd, usual)), **dict(sorted(told.items())), **headers.unsealed()}
    with files.new_file(path) as temporary:
        files.write_safetensors(temporary, tensors, metadata)
        headers.seal_new(temporary)
    return path


def has_usual_words(sd: StableDiffusion) -> bool:
    """Returns whether a model has CLIP's vocabulary, which files need not contain, or no tokenizer."""
    vocabularies = [tokenizer.vocabulary for tokenizer in sd.tokenizers.values()]
    return all(known.get(token) == number for known in vocabularies for token, number in LANDMARKS.items())


def _renamed(tensors: Mapping[str, files.Tensor], network: Any, prefix: str) -> dict[str, files.Tensor]:
    """Returns {name in a single file: Tensor} of {our name: Tensor}."""
    places, fused, written = _places(network, prefix), {}, {}
    for name, tensor in tensors.items():
        place, third = places[name]
        if third is not None:
            fused.setdefault((place, third[1]), [None] * 3)[third[0]] = tensor
        else:
            written[place] = tensor
    written |= {place: _joined(parts, rows) for (place, rows), parts in fused.items()}
    written = {place: _reshaped(tensor, _ones(place, prefix, network.config)) for place, tensor in written.items()}
    return written | _unused(written, network.config) if prefix == OPEN_CLIP_PREFIX else written


def _ones(place: str, prefix: str, config: Any) -> tuple[int, ...]:
    """Returns the trailing axes of length 1: LDM's self-attention of maps consists of convolutions."""
    if prefix == VAE and ".mid.attn_1." in place:
        return 1, 1
    plain = prefix == UNET and config.cross_attention_dim is None
    return (1,) if plain and place.endswith((".qkv.weight", ".proj_out.weight")) else ()


def _reshaped(tensor: files.Tensor, ones: tuple[int, ...]) -> files.Tensor:
    if len(tensor.shape) != 2 or not ones:
        return tensor
    shape = *tensor.shape, *ones
    return files.Tensor(shape, tensor.dtype, lambda: tensor.array().reshape(shape))


def _joined(parts: Sequence[files.Tensor], rows: int | None = None) -> files.Tensor:
    """Returns one Tensor from three, alternating in groups of `rows` rows; None concatenates them."""
    height, *others = parts[0].shape

    def array() -> np.ndarray:
        return np.stack([part.array().reshape(-1, rows or height, *others) for part in parts], 1)

    return files.Tensor((3 * height, *others), parts[0].dtype, lambda: array().reshape(3 * height, *others))


def _unused(written: Mapping[str, files.Tensor], config: TextConfig) -> dict[str, files.Tensor]:
    """Returns OpenCLIP's weights that Stable Diffusion 2 never uses but old loaders need."""
    last, behind = (f"{OPEN_CLIP_PREFIX}transformer.resblocks.{config.num_hidden_layers - 1 + i}." for i in range(2))
    layer = {behind + name.removeprefix(last): one for name, one in written.items() if name.startswith(last)}
    width, dtype = config.hidden_size, next(iter(layer.values())).dtype
    projection = files.Tensor((width, width), dtype, lambda: np.eye(width).astype(jnp.dtype(dtype)))
    return {**layer, f"{OPEN_CLIP_PREFIX}text_projection": projection}


def _said(sd: StableDiffusion, usual: bool) -> dict[str, Any]:
    """Returns our metadata: everything that the weights do not show, with the vocabulary unless it is CLIP's."""
    networks = {name: sd.networks.get(name) for name in NETWORKS}
    notes = {name: network.config.to_json() for name, network in networks.items() if network is not None}
    notes["scheduler"] = sd.schedule.to_json()
    if sd.low_schedule is not None:
        notes[LOW_SCHEDULER] = sd.low_schedule.to_json()
    if not usual:
        with tempfile.TemporaryDirectory() as folder:
            sd.tokenizers[ENCODER].save(folder)
            texts = {name: pathlib.Path(folder, name).read_text(encoding="utf-8") for name in VOCABULARY_FILES}
        notes["tokenizer"] = texts
    return notes


def _modelspec(sd: StableDiffusion, title: str) -> dict[str, str]:
    """Returns ModelSpec's metadata for a known architecture, {} for other sizes."""
    unet = sd.networks["unet"].config
    velocity, size = sd.schedule.prediction_type == "v_prediction", unet.sample_size * sd.factor
    kinds = {
        (768, 4): "stable-diffusion-v1",
        (768, 9): "stable-diffusion-v1-inpainting",
        (1024, 4): "stable-diffusion-v2-768-v" if velocity else "stable-diffusion-v2-512",
        (1024, 5): "stable-diffusion-v2-depth",
        (1024, 9): "stable-diffusion-v2-inpainting",
    }
    kind = kinds.get((unet.cross_attention_dim, unet.in_channels))
    if kind is None:
        return {}
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": kind,
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
        "modelspec.resolution": f"{size}x{size}",
        "modelspec.prediction_type": "v" if velocity else "epsilon",
    }
