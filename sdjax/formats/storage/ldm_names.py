"""Names of weights in the original latent-diffusion code (LDM), which single-file checkpoints and some adapters keep.

    modules = unet_modules(config)      # {"down_blocks.0.resnets.0.conv1": "input_blocks.1.0.in_layers.2", ...}
    rename("down_blocks.0.resnets.0.conv1.weight", modules)     # "input_blocks.1.0.in_layers.2.weight"

Each table is {our module: LDM's module} for a network's config; our names are diffusers' and transformers'.
Source: CompVis latent-diffusion, openaimodel.py and model.py; OpenCLIP, transformer.py.
"""

from collections.abc import Mapping

from sdjax.models.clip import ImageConfig, TextConfig
from sdjax.models.unet import UNetConfig
from sdjax.models.vae import VaeConfig

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
MAP_ATTENTION = {"group_norm": "norm", "to_q": "qkv", "to_k": "qkv", "to_v": "qkv", "to_out.0": "proj_out"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
    # One matrix with three blocks of rows; the names of its weight and bias have no dot.
    "self_attn.q_proj.weight": "attn.in_proj_weight",
    "self_attn.k_proj.weight": "attn.in_proj_weight",
    "self_attn.v_proj.weight": "attn.in_proj_weight",
    "self_attn.q_proj.bias": "attn.in_proj_bias",
    "self_attn.k_proj.bias": "attn.in_proj_bias",
    "self_attn.v_proj.bias": "attn.in_proj_bias",
}


def rename(name: str, modules: Mapping[str, str]) -> str:
    """Returns a weight's name with its longest leading module that is in the table replaced, or the name itself."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        module = ".".join(parts[:end])
        if module in modules:
            return ".".join([modules[module], *parts[end:]])
    return name


def _inside(table: Mapping[str, str], ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.{one}": f"{theirs}.{other}" for one, other in table.items()}


def unet_modules(config: UNetConfig) -> dict[str, str]:
    """Returns {our module: LDM's} for this UNetConfig; LDM numbers blocks through all levels."""
    table = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "class_embedding": "label_emb",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        **_attention(config, "mid_block.attentions.0", "middle_block.1"),
        **_inside(RESNET, "mid_block.resnets.0", "middle_block.0"),
        **_inside(RESNET, "mid_block.resnets.1", "middle_block.2"),
    }
    layers, coarsest, place = config.levels("layers_per_block"), len(config.block_out_channels) - 1, 1
    for level, count in enumerate(layers):
        for i in range(count):
            table |= _layer(config, f"down_blocks.{level}", i, f"input_blocks.{place}")
            place += 1
        if level < coarsest:
            table[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{place}.0.op"
            place += 1
    place = 0
    for block, count in enumerate(reversed(layers)):
        for i in range(count + 1):
            table |= _layer(config, f"up_blocks.{block}", i, f"output_blocks.{place}")
            place += 1
        behind = 1 if config.up_block_types[block] == "UpBlock2D" else 2
        table[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{place - 1}.{behind}.conv"
    return table


def _layer(config: UNetConfig, block: str, i: int, theirs: str) -> dict[str, str]:
    resnet = _inside(RESNET, f"{block}.resnets.{i}", f"{theirs}.0")
    return {**_attention(config, f"{block}.attentions.{i}", f"{theirs}.1"), **resnet}


def _attention(config: UNetConfig, ours: str, theirs: str) -> dict[str, str]:
    """Returns {our module: LDM's} for an attention block.

    A transformer's inner names are the same; attention without text has one matrix instead of our three.
    """
    return {ours: theirs} if config.cross_attention_dim is not None else _inside(MAP_ATTENTION, ours, theirs)


def vae_modules(config: VaeConfig) -> dict[str, str]:
    """Returns {our module: LDM's} for this VaeConfig; LDM numbers the up levels from the last."""
    levels, layers, table = len(config.block_out_channels), config.layers_per_block, {}
    for half in ("encoder", "decoder"):
        table[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        table |= _inside(VAE_ATTENTION, f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1")
        for i in range(2):
            table[f"{half}.mid_block.resnets.{i}"] = f"{half}.mid.block_{i + 1}"
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        table[f"{down}.downsamplers.0"] = f"encoder.down.{level}.downsample"
        table[f"{up}.upsamplers.0"] = f"decoder.up.{level}.upsample"
        for ours, theirs, count in ((down, "encoder.down", layers), (up, "decoder.up", layers + 1)):
            for i in range(count):
                table[f"{ours}.resnets.{i}"] = f"{theirs}.{level}.block.{i}"
                table[f"{ours}.resnets.{i}.conv_shortcut"] = f"{theirs}.{level}.block.{i}.nin_shortcut"
    return table


def open_clip_modules(config: TextConfig) -> dict[str, str]:
    """Returns {our module: OpenCLIP's} for a text encoder's TextConfig."""
    table = {
        "text_model.embeddings.token_embedding": "token_embedding",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm": "ln_final",
    }
    for i in range(config.num_hidden_layers):
        table |= _inside(OPEN_CLIP_LAYER, f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}")
    return table


def open_clip_vision_modules(config: ImageConfig) -> dict[str, str]:
    """Returns {our module or weight: OpenCLIP's} for a vision tower's ImageConfig."""
    table = {
        "vision_model.embeddings.patch_embedding": "conv1",
        "vision_model.embeddings.class_embedding": "class_embedding",
        "vision_model.embeddings.position_embedding.weight": "positional_embedding",
        "vision_model.pre_layrnorm": "ln_pre",
        "vision_model.post_layernorm": "ln_post",
        "visual_projection.weight": "proj",
    }
    for i in range(config.num_hidden_layers):
        table |= _inside(OPEN_CLIP_LAYER, f"vision_model.encoder.layers.{i}", f"transformer.resblocks.{i}")
    return table
