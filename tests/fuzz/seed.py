"""Seeds, the valid files that the fuzzer damages, and a small model for the seeds of networks."""

from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp

from sdjax.diffusion.noise_schedule import Schedule
from sdjax.families.sd import Sd
from sdjax.formats.models import folder, presets
from sdjax.formats.storage import parameters
from sdjax.text.tokenizer import Tokenizer

SHAPE = {  # the smallest sizes that a file without a config can have: its readers assume 32 groups
    "unet": dict(
        sample_size=8, cross_attention_dim=8, attention_head_dim=8, block_out_channels=(32, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ),
    "vae": dict(block_out_channels=(32, 32), sample_size=16),
    "text_encoder": dict(
        hidden_size=8, intermediate_size=16, num_attention_heads=1, num_hidden_layers=1, max_position_embeddings=16,
        projection_dim=8,
    ),
    "image_encoder": dict(
        hidden_size=8, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, image_size=16, patch_size=8,
        projection_dim=8,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Seed:
    """A valid file: `file` gets damaged; `root`, which the reader gets, is its folder or the file itself."""

    reader: str
    root: Path
    file: Path

    @property
    def name(self) -> str:
        """The file's path relative to the folder of its kind."""
        return str(self.file.relative_to(self.root.parent))


def alone(reader, *paths):
    """Returns the seeds of files that are read alone."""
    return [Seed(reader, path, path) for path in paths]


def within(reader, root):
    """Returns the seeds of all files of a folder that is read as a whole."""
    return [Seed(reader, root, path) for path in sorted(root.rglob("*")) if path.is_file() and path.suffix != ".md"]


def small():
    """Returns a model of SHAPE."""
    tokenizer = Tokenizer.train(presets.SENTENCES, 560, 16)
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
    shape = {**SHAPE, "text_encoder": {**SHAPE["text_encoder"], "vocab_size": tokenizer.size, **ids}}
    parts = Sd().parts
    networks = {name: parts[name].network(parts[name].config(**given), jnp.float32) for name, given in shape.items()}
    params = {name: parameters.random_parameters(network, "float16") for name, network in networks.items()}
    return folder.assemble(Sd(), networks, params, Schedule(), {"text_encoder": tokenizer})
