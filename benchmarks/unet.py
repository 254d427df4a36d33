"""Compares the full-size UNet of SD 1.5 with PyTorch's (diffusers): same random weights, runs in turn.

    python benchmarks/unet.py --rows 2 --size 64 --rounds 3 [--dtype bfloat16]

Prints the relative error, both medians, PyTorch's GFLOP, and PyTorch's time divided by ours.  Needs the extra `torch`
and 12 GB of memory.
"""

import argparse
import gc
import os
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from sdjax import trees
from sdjax.models.unet import UNet, UNetConfig

LIMITS = {"float32": 1e-4, "bfloat16": 0.1}  # relative errors
SD15 = UNetConfig(sample_size=64, cross_attention_dim=768)


def torch_model(config):
    """Returns diffusers' UNet with small random weights, all nonzero."""
    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(config.to_json())
    model = model.to_empty(device="cpu").eval().requires_grad_(False)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        fan = weight[0].numel() if weight.ndim > 1 else 1
        weight.normal_(0, 0.1 if weight.ndim == 1 else fan**-0.5)
        if weight.ndim == 1 and name.endswith("weight"):
            weight.add_(1)
    return model.to(memory_format=torch.channels_last)


def convert(model, config):
    """Returns the model's weights as our tree."""
    z, t, context = inputs(config, 1, 8)
    like = jax.eval_shape(lambda: UNet(config).init(jax.random.key(0), z, t, context))["params"]
    weights = dict(model.named_parameters())

    def leaf(name, shape):
        path, kind = name.rsplit(".", 1)
        value = weights[path + (".bias" if kind == "bias" else ".weight")]
        if value.ndim == 4:
            value = value.permute(2, 3, 1, 0)
        elif value.ndim == 2:
            value = value.T
        assert value.shape == shape.shape, name
        return jax.device_put(np.ascontiguousarray(value.numpy()))

    return trees.map_names(leaf, like)


def inputs(config, rows, size):
    """Returns latents, times and encoded prompts."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((rows, size, size, config.in_channels), np.float32)
    return z, np.full(rows, 500), rng.standard_normal((rows, 77, config.cross_attention_dim), np.float32)


@torch.no_grad()
def operations(config, rows, size):
    """Returns the GFLOP of diffusers' UNet: products and plain convolutions."""
    z, t, context = (torch.empty(x.shape, device="meta") for x in inputs(config, rows, size))
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        UNet2DConditionModel.from_config(config.to_json())(z.permute(0, 3, 1, 2), t, context)
    return counter.get_total_flops() / 1e9


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2, help="batch")
    parser.add_argument("--size", type=int, default=64, help="height and width of the latents")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each")
    parser.add_argument("--dtype", choices=LIMITS, default="float32", help="type of both networks")
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count())
    model = torch_model(SD15)
    params = trees.cast(convert(model, SD15), options.dtype)
    kind = getattr(torch, options.dtype)
    model = model.to(kind)
    gc.collect()
    z, t, context = inputs(SD15, options.rows, options.size)
    start = time.perf_counter()
    run = jax.jit(lambda params, *data: UNet(SD15, options.dtype).apply({"params": params}, *data)[0])
    run = run.lower(params, z, t, context).compile()
    print(f"compiled in {time.perf_counter() - start:.1f} s; {trees.count(params) / 1e6:.1f} M parameters", flush=True)
    data = [jnp.asarray(x) for x in (z, t, context)]
    tz, tt, tc = torch.tensor(z).permute(0, 3, 1, 2).to(kind), torch.tensor(t), torch.tensor(context).to(kind)

    def ours():
        return np.asarray(run(params, *data), np.float32)

    @torch.inference_mode()
    def theirs():
        return model(tz, tt, tc).sample.permute(0, 2, 3, 1).float().numpy()

    a, b, work = ours(), theirs(), operations(SD15, options.rows, options.size)
    error = np.abs(a - b).max() / np.abs(b).max()
    print(f"relative error {error:.2e} (largest difference over largest number)", flush=True)
    times = {ours: [], theirs: []}
    for _ in range(options.rounds):
        for call in times:
            start = time.perf_counter()
            call()
            times[call].append(time.perf_counter() - start)
        print(f"ours {times[ours][-1]:.2f} s, PyTorch {times[theirs][-1]:.2f} s", flush=True)
    mine, other = (statistics.median(times[call]) for call in (ours, theirs))
    print(f"medians: ours {mine:.2f} s, PyTorch {other:.2f} s ({work:.0f} GFLOP); ratio {other / mine:.2f}")
    return 0 if error <= LIMITS[options.dtype] else 1


if __name__ == "__main__":
    sys.exit(main())
