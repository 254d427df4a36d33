"""The jobs of benchmarks/gpu.py that measure diffusers on PyTorch: eager, and compiled by torch.compile.

Networks, sizes and settings match sdjax's rows: DDIM with guidance 7.5 in bfloat16; training with float32 master
weights under autocast, AdamW and clipping; channels last.  Only LoRA differs: here it changes 128 projections of the
attentions, in sdjax's row 192 layers of the transformers, so its ratio favours PyTorch.
"""

import functools
import time

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from gpu_clock import median, phase, say, since_start
from transformers import CLIPTextConfig, CLIPTextModel

PLACE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = {"eager": "diffusers", "default": "torch.compile"}
RANK = 16


def setting():
    """Sets the options that PyTorch users set for speed."""
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)


def wait():
    """Waits for the device."""
    if PLACE == "cuda":
        torch.cuda.synchronize()


def peak():
    """Returns the peak of the device's memory in GB, None on a CPU."""
    return torch.cuda.max_memory_allocated() / 1e9 if PLACE == "cuda" else None


def unet(tiny):
    """Returns the UNet of Stable Diffusion 1.5, or a tiny one."""
    if not tiny:
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=32, layers_per_block=1,
    )  # fmt: skip


def text_encoder(tiny):
    """Returns the text encoder of Stable Diffusion 1.5, or a tiny one."""
    size = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=2)
    full = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12)
    return CLIPTextModel(CLIPTextConfig(**(size if tiny else full))).to(PLACE, torch.bfloat16).eval()


def autoencoder(tiny):
    """Returns the autoencoder of Stable Diffusion 1.5, or a tiny one."""
    widths = (32, 64) if tiny else (128, 256, 512, 512)
    kinds = dict(
        down_block_types=("DownEncoderBlock2D",) * len(widths), up_block_types=("UpDecoderBlock2D",) * len(widths)
    )
    return AutoencoderKL(block_out_channels=widths, latent_channels=4, layers_per_block=2, **kinds)


def inference(network):
    """Returns a network ready to sample: bfloat16, channels last, no gradients."""
    return network.to(PLACE, torch.bfloat16).to(memory_format=torch.channels_last).eval().requires_grad_(False)


@torch.no_grad()
def pictures(mode, options):
    """Measures text-to-image, the UNet alone and the decoder."""
    setting()
    with phase("compile"):
        network, vae = inference(unet(options.tiny)), inference(autoencoder(options.tiny))
        schedule = DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            set_alpha_to_one=False, steps_offset=1,
        )  # fmt: skip
        text = text_encoder(options.tiny)
        pipe = StableDiffusionPipeline(
            vae=vae, text_encoder=text, tokenizer=None, unet=network, scheduler=schedule, safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        pipe.set_progress_bar_config(disable=True)
        if mode != "eager":
            pipe.unet = torch.compile(pipe.unet, mode=mode, fullgraph=True)
            pipe.vae.decode = torch.compile(pipe.vae.decode, mode=mode, fullgraph=True)
        draw(pipe, 1, options)
        first = since_start()
        draw(pipe, options.rows, options)
        side, rows = options.size // 2 ** (len(vae.config.block_out_channels) - 1), 2 * options.rows
        z = torch.ones(rows, 4, side, side, device=PLACE, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        told = torch.ones(rows, 77, network.config.cross_attention_dim, device=PLACE, dtype=torch.bfloat16)

        def predict():
            pipe.unet(z, torch.tensor(500, device=PLACE), encoder_hidden_states=told)
            wait()

        def decode():
            pipe.vae.decode(z[: options.rows])
            wait()

        predict(), decode()
    say("first picture", NAMES[mode], seconds=first, torch=torch.__version__)
    with phase("time"):
        for rows in (1, options.rows):
            seconds = median(lambda rows=rows: draw(pipe, rows, options))
            say(
                f"text2img, batch {rows}", NAMES[mode], seconds=seconds, steps_s=options.steps / seconds, peak_GB=peak()
            )
        say("UNet call", NAMES[mode], seconds=median(predict, 10))
        say("VAE decode", NAMES[mode], seconds=median(decode, 5))


def draw(pipe, rows, options):
    """Returns `rows` pictures, with the seeds 0, 1, 2, ..."""
    told = pipe.text_encoder(torch.ones(rows, 77, dtype=torch.long, device=PLACE))[0]
    noise = [torch.Generator(PLACE).manual_seed(i) for i in range(rows)]
    return pipe(
        prompt_embeds=told, negative_prompt_embeds=told, num_inference_steps=options.steps, guidance_scale=7.5,
        height=options.size, width=options.size, generator=noise, output_type="np",
    ).images  # fmt: skip


class Beside(torch.nn.Module):
    """A linear layer with a LoRA beside it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.down = torch.nn.Linear(layer.in_features, RANK, bias=False)
        self.up = torch.nn.Linear(RANK, layer.out_features, bias=False)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


def with_lora(network):
    """Returns the network, frozen in bfloat16, with LoRAs beside the attentions' projections."""
    network = network.to(torch.bfloat16).requires_grad_(False)
    for name, module in list(network.named_modules()):
        if name.endswith(("attn1", "attn2")):
            for part in ("to_q", "to_k", "to_v"):
                setattr(module, part, Beside(getattr(module, part)))
            module.to_out[0] = Beside(module.to_out[0])
    return network


def training(mode, options, lora=False):
    """Measures a training step of the UNet, or of a LoRA on it."""
    setting()
    torch._dynamo.reset()
    row = "training step, LoRA" if lora else "training step, full"
    with phase("compile"):
        network = unet(options.tiny)
        network = (with_lora(network) if lora else network).to(PLACE).train().to(memory_format=torch.channels_last)
        text = text_encoder(options.tiny)
        weights = [weight for weight in network.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=PLACE == "cuda")
        model = network if mode == "eager" else torch.compile(network, mode=mode, fullgraph=True)
        side = options.size // (2 if options.tiny else 8)
        z = torch.randn(options.rows, 4, side, side, device=PLACE)
        ids = torch.ones(options.rows, 77, dtype=torch.long, device=PLACE)
        signal = torch.linspace(0.999, 0.01, 1000, device=PLACE)

        def step():
            noise, t = torch.randn_like(z), torch.randint(0, 1000, (len(z),), device=PLACE)
            a = signal[t][:, None, None, None]
            noisy = (a.sqrt() * z + (1 - a).sqrt() * noise).contiguous(memory_format=torch.channels_last)
            with torch.no_grad():
                told = text(ids)[0]
            with torch.autocast(PLACE, torch.bfloat16):
                predicted = model(noisy, t, told).sample
            loss = torch.nn.functional.mse_loss(predicted.float(), noise)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        step(), wait()
        first = since_start()
    if not lora:
        say("first training step", NAMES[mode], seconds=first)
    with phase("time"):
        for _ in range(3):
            step()
        wait()
        start = time.perf_counter()
        for _ in range(10):
            step()
        host = (time.perf_counter() - start) / 10
        wait()
        seconds = (time.perf_counter() - start) / 10
    say(row, NAMES[mode], seconds=seconds, host_s=host, rows=options.rows, peak_GB=peak())


JOBS = {
    "eager pictures": functools.partial(pictures, "eager"),
    "compiled pictures": functools.partial(pictures, "default"),
    "eager training": functools.partial(training, "eager"),
    "compiled training": functools.partial(training, "default"),
    "eager LoRA": functools.partial(training, "eager", lora=True),
    "compiled LoRA": functools.partial(training, "default", lora=True),
}
