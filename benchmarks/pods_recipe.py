"""The recipe of benchmarks/pods.py: a small UNet whose weights count as large, so that a mesh divides them.

python train/run.py benchmarks/pods_recipe.py parallel=mesh:data=2,fsdp=2
"""

from sdjax.data.batches import Data
from sdjax.data.sources.drawn import Pocketland
from sdjax.methods.full import Full
from sdjax.runtime import mesh
from sdjax.training.optim import Optim
from sdjax.training.settings import Train

mesh.SHARD_FROM = 1 << 10  # bytes


def config():
    """Returns the run's settings."""
    return Train(
        model="random:tiny",
        method=Full(("unet",), "attn|conv[12]|ff"),
        data=Data(path="pocketland", size=32, batch=8, dropout=0.1, source=Pocketland(count=16)),
        optim=Optim(lr=1e-3),
        steps=10,
        ema=0.9,
        checkpoint=0,
        log=1,
    )
