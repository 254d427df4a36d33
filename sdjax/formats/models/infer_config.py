"""Infers configs of networks from the shapes of their weights, for files of the original code without a config.json.

    unet_config({"input_blocks.0.0.weight": (320, 4, 3, 3), ...})   # UNetConfig(block_out_channels=(320, ...), ...)

shapes: {name in the original code, without the part's prefix: shape in the file}.  All functions raise ValueError
naming a missing weight that every Stable Diffusion 1 or 2 has.
Source: CompVis latent-diffusion and Stability-AI stablediffusion, configs/, for everything that shapes do not show.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sdjax.models.clip import TextConfig
from sdjax.models.unet import ATTENTIVE, PLAIN, UNetConfig
from sdjax.models.vae import VaeConfig

HEADS = 8  # attention heads in the UNets of Stable Diffusion 1 and the upscaler
HEAD_WIDTH = 64  # width of a head in Stable Diffusion 2's UNets and in all text encoders
SCALING, UPSCALER_SCALING = 0.18215, 0.08333
PLAIN_HEAD_WIDTH = 32  # width of a head in LDM-SR: CompVis latent-diffusion, models/ldm/bsr_sr/config.yaml
Shapes = Mapping[str, tuple[int, ...]]


def _shape(shapes: Shapes, name: str) -> tuple[int, ...]:
    if name not in shapes:
        raise ValueError(f"no weight {name}: not a whole Stable Diffusion 1 or 2")
    return shapes[name]


def shape_of(shapes: Shapes, name: str, axes: int) -> tuple[int, ...]:
    """Returns the shape of a weight.  Raises ValueError if it is missing, empty or has another number of axes."""
    found = shapes.get(name, ())
    if len(found) != axes or 0 in found:
        raise ValueError(f"{name}: expected a weight of {axes} axes; the file has {list(found) or 'none'}")
    return shapes[name]


def _alike(values: Sequence[Any]) -> Any:
    """Returns the common value of all levels, or else the tuple of values."""
    return values[0] if len(set(values)) == 1 else tuple(values)


def unet_config(shapes: Shapes) -> UNetConfig:
    """Returns the UNetConfig of a UNet; sample_size is for 512 pixels."""
    blocks, plain = "transformer_blocks.0.", "middle_block.1.qkv.weight" in shapes
    context = None if plain else _shape(shapes, f"middle_block.1.{blocks}attn2.to_k.weight")[1]
    linear = not plain and len(_shape(shapes, "middle_block.1.proj_in.weight")) == 2
    levels, place = [[]], 1
    while f"input_blocks.{place}.0.op.weight" in shapes or f"input_blocks.{place}.0.in_layers.2.weight" in shapes:
        if f"input_blocks.{place}.0.op.weight" in shapes:
            levels.append([])
        else:
            levels[-1].append(f"input_blocks.{place}.")
        place += 1
    first: list[tuple[int, ...]] = [
        _shape(shapes, f"{level[0]}0.in_layers.2.weight") if level else () for level in levels
    ]
    if () in first:
        raise ValueError(f"input_blocks.{place}: a level without layers: not a whole Stable Diffusion 1 or 2")
    widths = tuple(shape[0] for shape in first)
    attends = [f"{level[0]}1.norm.weight" in shapes for level in levels]
    # Keys as wide as the context, not the map, mean that the layer attends only to the text.
    keys = [shapes.get(f"{level[0]}1.{blocks}attn1.to_k.weight", (1, 1)) for level in levels]
    labels = shapes.get("label_emb.weight", (None,))[0]
    down, up = PLAIN if plain else ATTENTIVE
    heads = tuple(width // PLAIN_HEAD_WIDTH for width in widths) if plain else HEADS
    return UNetConfig(
        sample_size=64 if labels is None else 128,
        in_channels=_shape(shapes, "input_blocks.0.0.weight")[1],
        out_channels=_shape(shapes, "out.2.weight")[0],
        block_out_channels=widths,
        layers_per_block=_alike([len(level) for level in levels]),
        down_block_types=tuple(down if one else "DownBlock2D" for one in attends),
        up_block_types=tuple(up if one else "UpBlock2D" for one in attends[::-1]),
        only_cross_attention=_alike([shape[1] != shape[0] for shape in keys]),
        cross_attention_dim=context,
        attention_head_dim=_heads(widths) if linear and labels is None else heads,
        use_linear_projection=linear,
        num_class_embeds=labels,
        # In half precision the scores of 2.1 overflow, and the weights do not distinguish 2.1 from 2.0.
        upcast_attention=linear and labels is None,
    )


def _heads(widths: Iterable[int]) -> tuple[int, ...]:
    return tuple(max(1, width // HEAD_WIDTH) for width in widths)


def vae_config(shapes: Shapes, unet: UNetConfig) -> VaeConfig:
    """Returns the VaeConfig of the autoencoder for a UNet with this UNetConfig."""
    widths, layers = [], 0
    while f"encoder.down.{len(widths)}.block.0.conv1.weight" in shapes:
        widths.append(shapes[f"encoder.down.{len(widths)}.block.0.conv1.weight"][0])
    codes = shapes.get("quantize.embedding.weight", (None,))[0]
    kinds: dict[int | None, float] = {None: SCALING if unet.num_class_embeds is None else UPSCALER_SCALING}
    while f"encoder.down.0.block.{layers}.conv1.weight" in shapes:
        layers += 1
    return VaeConfig(
        in_channels=_shape(shapes, "encoder.conv_in.weight")[1],
        out_channels=_shape(shapes, "decoder.conv_out.weight")[0],
        block_out_channels=tuple(widths),
        layers_per_block=layers,
        latent_channels=_shape(shapes, "decoder.conv_in.weight")[1],
        sample_size=unet.sample_size * 2 ** (len(widths) - 1),
        scaling_factor=kinds.get(codes, 1.0),
        force_upcast=codes is None,
        num_vq_embeddings=codes,
        use_quant_conv="quant_conv.weight" in shapes,
        use_post_quant_conv="post_quant_conv.weight" in shapes,
        mid_block_add_attention="encoder.mid.attn_1.norm.weight" in shapes,
    )


def clip_config(shapes: Shapes, tokens: Mapping[str, Any]) -> TextConfig:
    """Returns the TextConfig of Stable Diffusion 1's text encoder.

    shapes: with transformers' names, with or without text_model.  tokens: {"bos_token_id": ..., ...} of the tokenizer.
    """
    shapes = {name.removeprefix("text_model."): shape for name, shape in shapes.items()}
    rows, width = _shape(shapes, "embeddings.token_embedding.weight")
    return TextConfig(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=_shape(shapes, "encoder.layers.0.mlp.fc1.weight")[0],
        num_hidden_layers=_count(shapes, "encoder.layers.{}.mlp.fc1.weight"),
        num_attention_heads=max(1, width // HEAD_WIDTH),
        max_position_embeddings=_shape(shapes, "embeddings.position_embedding.weight")[0],
        projection_dim=width,
        **tokens,
    )


def open_clip_config(shapes: Shapes, tokens: Mapping[str, Any]) -> TextConfig:
    """Returns the TextConfig of Stable Diffusion 2's text encoder, without its last layer; shapes: OpenCLIP's names.

    The context comes from the last but one layer; some converters leave out the last of 24.
    """
    rows, width = _shape(shapes, "token_embedding.weight")
    layers = _count(shapes, "transformer.resblocks.{}.mlp.c_fc.weight")
    return TextConfig(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=_shape(shapes, "transformer.resblocks.0.mlp.c_fc.weight")[0],
        num_hidden_layers=layers if layers == 23 else layers - 1,
        num_attention_heads=max(1, width // HEAD_WIDTH),
        max_position_embeddings=_shape(shapes, "positional_embedding")[0],
        hidden_act="gelu",
        projection_dim=width,
        **tokens,
    )


def _count(shapes: Shapes, pattern: str) -> int:
    count = 0
    while pattern.format(count) in shapes:
        count += 1
    return count
