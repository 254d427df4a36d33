"""What tests put in front of the page: texts that would be programs if they were HTML, and a small LoRA."""

import json
import shutil

import numpy as np

PAYLOADS = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    '"><svg onload=alert(3)>',
    "<iframe src=javascript:alert(4)>",
    "<a href='javascript:alert(5)'>x</a>",
    "<body onload=alert(6)>",
    "<input autofocus onfocus=alert(7)>",
    "<details open ontoggle=alert(8)>",
    "<math><mtext></form><form><mglyph><style></math><img src onerror=alert(9)>",
    "'-alert(10)-'",
    "{{constructor.constructor('alert(11)')()}}",
    "${alert(12)}",
    "[x](javascript:alert(13))",
    '![x](x"onerror="alert(14))',
    "<style>@import 'http://evil.invalid/x.css';</style>",
    "<link rel=stylesheet href=http://evil.invalid/y.css>",
    "<base href=http://evil.invalid/>",
    "<img src=http://evil.invalid/z.png>",
    "&lt;script&gt;alert(19)&lt;/script&gt;",
    "</textarea><script>alert(20)</script>",
)


def write_lora(path, word="inked <b>line</b>"):
    """Writes a LoRA of rank 2 for the embedded model, with a word as kohya writes it."""
    from safetensors.numpy import save_file

    from sdjax.formats import pipeline
    from sdjax.formats.storage.tensor_file import TensorFile

    folder = pipeline.locate("pocket") / "unet" / "diffusion_pytorch_model.safetensors"
    file, made, random = TensorFile(folder), {}, np.random.default_rng(0)
    names = [name for name in file.names if name.endswith("attn2.to_k.weight")][:2]
    for name in names:
        out, into = file.shape(name)
        key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        made[f"{key}.lora_down.weight"] = random.normal(0, 0.02, (2, into)).astype(np.float32)
        made[f"{key}.lora_up.weight"] = random.normal(0, 0.02, (out, 2)).astype(np.float32)
        made[f"{key}.alpha"] = np.array(2, np.float32)
    told = {
        "ss_tag_frequency": json.dumps({"a": {word: 3}}),
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
    }
    path.parent.mkdir(exist_ok=True)
    save_file(made, str(path), told)


def write_changed(folder):
    """Writes the embedded model with another first cross-attention."""
    from safetensors.numpy import load_file, save_file

    from sdjax.formats import pipeline

    shutil.copytree(pipeline.locate("pocket"), folder)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("attn2.to_k.weight"))
    save_file(weights | {name: weights[name] * 1.5}, file)


def write_controlnet(folder):
    """Writes an untrained ControlNet of the embedded model, which adds nothing to a picture."""
    import jax

    from sdjax.formats import controlnet, pipeline
    from sdjax.methods.controlnet import ControlNet

    method, sd = ControlNet(), pipeline.load("pocket")
    trained, frozen = method.split(sd, jax.random.key(0))
    controlnet.ControlNetFolder().write(method.adapter(frozen, trained), folder)
