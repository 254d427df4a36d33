"""CLIP's towers against transformers': names, hidden states, class tokens, pooling, pictures; their configs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from torch_weights import assert_close, file_shape, fill, shapes, to_torch, tree
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from sdjax.models.clip import MEAN, STD, ImageConfig, ImageEncoder, TextConfig, TextEncoder, clip_pixels, pooled

TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "bos_token_id": 97,
    "eos_token_id": 98,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 20,
    "patch_size": 5,
    "projection_dim": 24,
}
SD1, SD2 = {"hidden_act": "quick_gelu"}, {"hidden_act": "gelu", "num_hidden_layers": 3}


def text_pair(options):
    """Returns transformers' text model full of noise, our encoder, and its parameters."""
    model = fill(CLIPTextModel(CLIPTextConfig(**TEXT | options)))
    ours = TextEncoder(TextConfig.from_json(model.config.to_dict()))
    template = jax.eval_shape(lambda: ours.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32), method="initialise"))[
        "params"
    ]
    # The files carry the prefix; transformers since 5.6 reads both and names its own modules without.
    state = {f"text_model.{name.removeprefix('text_model.')}": weight for name, weight in model.state_dict().items()}
    return model, ours, {"params": tree(state, template)}


def image_pair(options):
    """Returns transformers' vision model full of noise, our encoder, and its parameters."""
    model = fill(CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION | options)))
    ours = ImageEncoder(ImageConfig.from_json(model.config.to_dict()))
    side = ours.config.image_size
    template = jax.eval_shape(lambda: ours.init(jax.random.key(0), jnp.zeros((1, side, side, 3))))["params"]
    return model, ours, {"params": tree(model.state_dict(), template)}


TEXT_RUN = jax.jit(lambda ours, params, rows, skip: ours.apply(params, rows, skip), static_argnums=(0, 3))


def ids(rows=2, length=11):
    return np.random.default_rng(0).integers(1, 97, (rows, length)).astype(np.int32)


def context(ours, params, tokens, skip=0):
    """Returns the encoder's output for ids."""
    return TEXT_RUN(ours, params, ours.apply(params, tokens, method="embed"), skip)


@pytest.mark.parametrize("options", [SD1, SD2], ids=["quick_gelu", "gelu"])
def test_context_equals_transformers(options):
    model, ours, params = text_pair(options)
    tokens = ids()
    with torch.no_grad():
        theirs = model(torch.tensor(tokens), output_hidden_states=True)
    assert_close(context(ours, params, tokens), theirs.last_hidden_state)
    for skip in range(
        1, ours.config.num_hidden_layers
    ):  # diffusers: hidden_states[-(clip_skip + 1)], then the final norm
        with torch.no_grad():
            norm = getattr(model, "text_model", model).final_layer_norm
            assert_close(context(ours, params, tokens, skip), norm(theirs.hidden_states[-(skip + 1)]))


def test_activations_differ():
    _, quick, params = text_pair(SD1)
    _, exact, _ = text_pair({"hidden_act": "gelu"})
    difference = context(quick, params, ids()) - context(exact, params, ids())
    assert np.abs(difference).max() > 1e-3


def test_context_is_causal_and_short_texts_agree():
    _, ours, params = text_pair(SD1)
    tokens = ids()
    changed = tokens.copy()
    changed[:, -1] = 5
    whole = context(ours, params, tokens)
    np.testing.assert_array_equal(whole[:, :-1], context(ours, params, changed)[:, :-1])
    np.testing.assert_allclose(whole[:, :6], context(ours, params, tokens[:, :6]), atol=1e-5)  # 6 of 16 positions


def test_rows_of_the_caller_stand_for_words():
    _, ours, params = text_pair(SD1)
    rows = ours.apply(params, ids(), method="embed")
    table = params["params"]["text_model"]["embeddings"]["token_embedding"]["embedding"]
    np.testing.assert_array_equal(rows, table[ids()])
    gradient = jax.jit(jax.grad(lambda rows: jnp.square(ours.apply(params, rows)).sum()))(rows)
    assert np.abs(gradient).min(axis=-1).max() > 0


@pytest.mark.parametrize("eos", [98, 2])
def test_pooled_equals_transformers(eos):
    model, ours, params = text_pair({"eos_token_id": eos})
    tokens = ids(rows=3)
    tokens[0, 4:], tokens[1, 7], tokens[2, 9:] = 98, 98, 98
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).pooler_output
    assert_close(pooled(context(ours, params, tokens), tokens, ours.config.eos_token_id), theirs)


def test_text_refuses():
    _, ours, params = text_pair(SD1)
    with pytest.raises(ValueError, match="17 tokens.*at most 16"):
        ours.apply(params, jnp.zeros((1, 17, 32)))
    for skip in (-1, 2):
        with pytest.raises(ValueError, match=f"skip={skip}: expected 0 to 1"):
            ours.apply(params, jnp.zeros((1, 4, 32)), skip)


@pytest.mark.parametrize(
    "options",
    [SD1, SD2, {"image_size": 23, "patch_size": 7, "num_attention_heads": 2}],
    ids=["quick_gelu", "gelu", "rest of a patch"],
)
def test_image_equals_transformers(options):
    model, ours, params = image_pair(options)
    side, layers = ours.config.image_size, ours.config.num_hidden_layers
    pixels = np.random.default_rng(0).standard_normal((2, side, side, 3), np.float32)
    with torch.no_grad():
        theirs = model(to_torch(pixels), output_hidden_states=True)
    embeds, class_tokens, hidden = jax.jit(ours.apply)(params, pixels)
    states = jax.jit(lambda params: ours.apply(params, pixels, method="states"))(params)
    assert class_tokens.shape == (2, layers, 48) and len(states) == layers + 1
    assert_close(embeds, theirs.image_embeds)
    assert_close(hidden, theirs.hidden_states[-1])
    for i in range(layers):
        assert_close(class_tokens[:, i], theirs.hidden_states[i + 1][:, 0])
        assert_close(states[i], theirs.hidden_states[i])


def test_image_refuses_another_size():
    _, ours, params = image_pair(SD1)
    with pytest.raises(ValueError, match=r"\(21, 20, 3\).*takes \(20, 20, 3\)"):
        ours.apply(params, jnp.zeros((1, 21, 20, 3)))


def test_names_and_shapes_of_the_files():
    model, ours, params = image_pair(SD1)
    assert shapes(params["params"]) == {name: tuple(value.shape) for name, value in model.state_dict().items()}
    model, ours, params = text_pair(SD1)
    theirs = {f"text_model.{name}": tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes(params["params"]) == theirs
    assert file_shape("x.kernel", (3, 4, 5, 6)) == (6, 5, 3, 4)


def test_bfloat16_is_near():
    _, ours, params = text_pair(SD1)
    half = TextEncoder(ours.config, jnp.bfloat16)
    out = context(half, params, ids())
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(out), context(ours, params, ids()), atol=0.2)


def test_configs_return_as_they_were_and_load_in_transformers():
    for ours, theirs, values in ((TextConfig, CLIPTextConfig, TEXT), (ImageConfig, CLIPVisionConfig, VISION)):
        config = ours.from_json(values | SD2)
        assert ours.from_json(config.to_json()) == config and hash(config) == hash(ours.from_json(config.to_json()))
        read = theirs.from_dict(config.to_json()).to_dict()
        assert all(read[name] == value for name, value in (values | SD2).items())
        assert ours.from_json(read) == config
    assert TextConfig.from_json({}) == TextConfig.from_json(CLIPTextConfig().to_dict())
    assert ImageConfig.from_json({}) == ImageConfig.from_json(CLIPVisionConfig().to_dict())


@pytest.mark.parametrize(
    "options, message",
    [
        (CLIPConfig().to_dict(), "text_config"),
        ({"model_type": "bert"}, "model_type='bert'"),
        ({"hidden_act": "relu"}, "hidden_act='relu': expected one of quick_gelu, gelu"),
        ({"num_attention_heads": 7}, "num_attention_heads=7: must divide hidden_size=512"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"eos_token_id": [1, 2]}, r"eos_token_id=\[1, 2\]: expected one int"),
        ({"hidden_size": 0}, "hidden_size=0"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers='4'"),
    ],
)
def test_text_config_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        TextConfig.from_json(options)


def test_image_config_refuses():
    for options, message in (({"num_channels": 4}, "num_channels=4"), ({"patch_size": [14, 14]}, "patch_size"),
                             ({"image_size": 8}, "patch_size=32")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            ImageConfig.from_json(options)


def smooth(height, width):
    """Returns a picture with little contrast at the pixel scale, uint8 [H W 3]."""
    y, x = np.mgrid[:height, :width]
    return np.stack([128 + 90 * np.sin(x / 9 + c) * np.cos(y / 7 - c) for c in range(3)], -1).astype(np.uint8)


@pytest.mark.parametrize("shape", [(64, 64), (90, 61), (20, 33), (32, 32)])
def test_clip_pixels_equal_torch_and_the_processor(shape):
    picture, size = smooth(*shape), 32
    ours = clip_pixels(jnp.array(picture, jnp.float32)[None] / 127.5 - 1, size)
    assert ours.shape == (1, size, size, 3)
    short = min(shape)
    inner = tuple(side * size // short for side in shape)
    exact = torch.nn.functional.interpolate(
        to_torch(picture[None].astype(np.float32) / 255), inner, mode="bicubic", antialias=True
    )
    top, left = (inner[0] - size) // 2, (inner[1] - size) // 2
    exact = exact[0, :, top : top + size, left : left + size].clamp(0, 1).permute(1, 2, 0).numpy()
    assert_close(ours[0], (exact - np.float32(MEAN)) / np.float32(STD))
    processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size=size)
    theirs = processor(Image.fromarray(picture), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    assert np.abs(ours[0] - theirs).max() < 1.1 / 255 / min(STD)


def test_clip_pixels_of_random_noise_stay_in_range():
    noise = jnp.array(np.random.default_rng(0).choice([-1.0, 1.0], (1, 40, 40, 3)), jnp.float32)
    unit = np.asarray(clip_pixels(noise, 56)) * STD + MEAN
    assert unit.min() > -1e-6 and unit.max() < 1 + 1e-6
