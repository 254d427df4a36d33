"""The unofficial E4T in PyTorch, written from its formulas (its commit a1d2593), small, with noise in every weight.

port = Port(unet, text, width=128)              # diffusers' UNet and transformers' text encoder of the base model
port.write(tmp_path / "pretrained")             # config.json encoder.pt weight_offsets.pt
vectors = port.word(...)                        # v* [B C]
"""

import copy
import json

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CONFIG = {
    "pretrained_model_name_or_path": "CompVis/stable-diffusion-v1-4",
    "clip_model_name_or_path": "ViT-H-14::laion2b_s32b_b79k",
    "placeholder_token": "*s", "domain_class_token": "face", "domain_embed_scale": 0.1, "reg_lambda": 0.01,
    "prompt_template": "face", "unfreeze_clip_vision": False, "resolution": 512, "learning_rate": 1.6e-05,
    "scale_lr": True,
}  # fmt: skip


class Block(nn.Module):
    """A block of OpenCLIP's vision transformer."""

    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 2 * width), "c_proj": nn.Linear(2 * width, width)})

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Tower(nn.Module):
    """OpenCLIP's vision tower without a projection, which gives the normed class token and the other tokens."""

    def __init__(self, width=128, side=24, patch=8, layers=2):
        super().__init__()
        self.side = side
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((side // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(Block(width, width // 64) for _ in range(layers))})

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        x = self.ln_pre(x)
        for block in self.transformer["resblocks"]:
            x = block(x)
        return self.ln_post(x[:, 0]), x[:, 1:]


class Encoder(nn.Module):
    """The head and the tower, under the names of encoder.pt."""

    def __init__(self, maps, context, width=128):
        super().__init__()
        self.clip_vision = Tower(width)
        tokens = 1 + (len(self.clip_vision.positional_embedding) - 1) // 2
        self.unet_feature_embedder = nn.Sequential(nn.Linear(maps, width), nn.LeakyReLU(), nn.Linear(width, width))
        self.feature_linear = nn.Linear(2 * width, width)
        self.first_linears = nn.ModuleList(nn.Linear(width, width) for _ in range(tokens))
        self.final_linear = nn.Linear(width, context)

    def forward(self, x, maps):
        u = self.unet_feature_embedder(torch.cat([m.mean((2, 3)) for m in maps], -1))
        side = self.clip_vision.side
        x = F.interpolate(x, (side, side), mode="bicubic", align_corners=True, antialias=False)
        x = ((x + 1) / 2 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        pooled, tokens = self.clip_vision(x)
        h = torch.cat([pooled[:, None], tokens[:, 1::2]], 1)
        each = [linear(self.feature_linear(torch.cat([h[:, i], u], -1))) for i, linear in enumerate(self.first_linears)]
        return self.final_linear(F.leaky_relu(torch.stack(each).mean(0)))


class Offset(nn.Module):
    """The generator of one weight [out in]."""

    def __init__(self, rows, columns):
        super().__init__()
        self.v = nn.Parameter(torch.ones(1))
        self.linear1, self.linear2 = nn.Linear(1, rows), nn.Linear(1, columns)
        self.linear_column, self.linear_row = nn.Linear(rows, rows), nn.Linear(columns, columns)

    def forward(self):
        matrix = self.linear1(self.v)[:, None] * self.linear2(self.v)[None]
        return self.linear_row(self.linear_column(matrix.T).T).T


class Port(nn.Module):
    """The whole of it over a base model; what trains are `encoder`, `offsets`, `unet` and `text`."""

    def __init__(self, unet, text, width=128, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.unet, self.text = copy.deepcopy(unet).requires_grad_(True), copy.deepcopy(text).requires_grad_(True)
        table = self.text.get_input_embeddings().weight
        channels = []
        for block in self.unet.down_blocks:
            channels += [resnet.out_channels for resnet in block.resnets]
            channels += [block.downsamplers[0].out_channels] if block.downsamplers else []
        maps = self.unet.conv_in.out_channels + sum(channels) + self.unet.mid_block.resnets[-1].out_channels
        self.encoder = Encoder(maps, table.shape[1], width)
        self.names = [name for name, _ in self.unet.named_parameters() if name.endswith(TARGETS)]
        weights = dict(self.unet.named_parameters())
        self.offsets = nn.ModuleList(Offset(*weights[name].shape[::-1]) for name in self.names)
        with torch.no_grad():
            for part in (self.encoder, self.offsets):
                for weight in part.parameters():
                    weight.add_(0.03 * torch.randn(weight.shape))
        self.encoder.clip_vision.requires_grad_(False)

    def weights(self):
        """Returns the UNet's weights with W (1 + D) in place of those that have an offset."""
        plain = dict(self.unet.named_parameters())
        return plain | {name: plain[name] * (1 + one()) for name, one in zip(self.names, self.offsets, strict=True)}

    def run(self, z, t, context):
        """Returns (prediction, the 12 or so maps of the way down and that of the middle)."""
        maps, hooks = [], []
        hooks.append(self.unet.conv_in.register_forward_hook(lambda module, _, out: maps.append(out)))
        for block in self.unet.down_blocks:
            hooks.append(block.register_forward_hook(lambda module, _, out: maps.extend(out[1])))
        hooks.append(self.unet.mid_block.register_forward_hook(lambda module, _, out: maps.append(out)))
        made = torch.func.functional_call(self.unet, self.weights(), (z, t, context)).sample
        for hook in hooks:
            hook.remove()
        return made, maps

    def told(self, ids, vectors=None, word=None):
        """Returns the text encoder's output, rows of the word replaced by vectors [B C]."""
        name = next(name for name, _ in self.text.named_parameters() if name.endswith("token_embedding.weight"))
        table = dict(self.text.named_parameters())[name]
        if vectors is None:
            return self.text(ids).last_hidden_state
        own = len(table) + torch.arange(len(ids))[:, None]  # each row of the batch has its own word
        ids = torch.where(ids == word, own, ids)
        return torch.func.functional_call(
            self.text, {name: torch.cat([table, vectors])}, (ids,), strict=False
        ).last_hidden_state

    def word(self, pixels, z_t, t, nothing, domain):
        """Returns v* [B C]."""
        empty = self.told(nothing).detach().expand(len(z_t), -1, -1)
        move = self.encoder(pixels.expand(len(z_t), -1, -1, -1), self.run(z_t, t, empty)[1])
        row = self.text.get_input_embeddings().weight[domain].detach()
        return row + CONFIG["domain_embed_scale"] * move

    def loss(self, pixels, seen, ids, word, nothing, domain, weight):
        """Returns the tuning loss: mean squared error and `weight` times the sum of v* squared, over the batch too."""
        vectors = self.word(pixels, seen["z_t"], seen["t"], nothing, domain)
        made, _ = self.run(seen["z_t"], seen["t"], self.told(ids, vectors, word))
        return F.mse_loss(made, seen["noise"]) + weight * vectors.pow(2).sum()

    def write(self, folder, tuned=False, tower=True, picture=None):
        """Writes the folder of pre-training, or of tuning on a picture uint8 [H W 3]; returns it."""
        folder.mkdir(parents=True)
        state = {name: value for name, value in self.encoder.state_dict().items() if tower or "clip_vision" not in name}
        torch.save(state, folder / "encoder.pt")
        named = zip(self.names, self.offsets, strict=True)
        generators = {
            f"{name.removesuffix('.weight').replace('.to_', '.wo_')}.{leaf}": value
            for name, one in named for leaf, value in one.state_dict().items()
        }  # fmt: skip
        if tuned:
            torch.save({**self.unet.state_dict(), **generators}, folder / "unet.pt")
            text = dict(self.text.state_dict())
            table = next(name for name in text if name.endswith("token_embedding.weight"))
            text[table] = torch.cat([text[table], torch.zeros(1, text[table].shape[1])])
            torch.save(text, folder / "text_encoder.pt")
            Image.fromarray(picture).save(folder / "domain.png")
        else:
            torch.save(generators, folder / "weight_offsets.pt")
        config = {"reg_lambda": 0.1, "domain_embed_scale": 0.7, "pretrained_args": CONFIG} if tuned else CONFIG
        (folder / "config.json").write_text(json.dumps(config, indent=2))
        return folder


TARGETS = tuple(f"attn{i}.to_{q}.weight" for i in (1, 2) for q in "qkv")


def photo(seed=0, size=32):
    """Returns a picture of noise, uint8 [size size 3]."""
    return np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8)
