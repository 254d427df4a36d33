"""Writes the card of a model that train/make_pocket.py made: README.md with its figures, and grid.png.

    python benchmarks/pocket_card.py MODEL WORK [setting=value ...]

WORK has the stages' runs and the folder `figures` of benchmarks/pocket.py.  Missing figures appear as "not measured".
"""

import json
import sys
import time
from pathlib import Path

import jax
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
import embedded
import make_pocket

import sdjax
from sdjax import trees
from sdjax.formats import pipeline
from sdjax.images import grid

PROMPTS = (
    "a photo of a face with red hair on the beach",
    "a pencil sketch of a face with long blond hair in space",
    "a watercolor painting of a face with dark skin wearing a hat in the snow",
    "a neon sign of a face wearing glasses in the city at night",
    "a comic of a cat with orange fur in the meadow wearing a scarf",
    "a mosaic of a face with blue hair and a beard in the forest",
)
SEEDS, STAGES = 4, tuple(stage.name for stage in make_pocket.STAGES)
SAMPLING = {"steps": 20, "sampler": "dpmpp_2m", "schedule": "karras", "guidance": 5.0}
NONE = "not measured"
BEGUN = ("started", "resumed")  # events of a log that mark a process's start


def main(arguments):
    """Writes the card, its grid and WORK/hires.png; returns the exit status."""
    model, work, *told = arguments
    sd = pipeline.load(model)
    rows = [sdjax.text2img(sd, [text] * SEEDS, seeds=range(SEEDS), **SAMPLING) for text in PROMPTS]
    Image.fromarray(grid.sheet([list(row) for row in rows], PROMPTS)).save(Path(model) / "grid.png")
    Image.fromarray(grid.sheet([enlarged(sd)])).save(Path(work) / "hires.png")
    (Path(model) / "README.md").write_text(card(sd, Path(model), Path(work), told))
    print(f"{model}/README.md")
    return 0


def enlarged(sd):
    """Returns pictures of twice the side, made as `--hires 2` makes them."""
    texts = PROMPTS[:SEEDS]
    return list(sdjax.hires(sd, texts, seeds=range(len(texts)), scale=2.0, **SAMPLING))


def card(sd, model, work, told):
    """Returns the card's text."""
    side, device = embedded.side(sd), jax.devices()[0]
    minutes = sum(seconds(_log(work, stage)) for stage in STAGES) / 60
    size = sum(path.stat().st_size for path in model.rglob("*.safetensors")) / 1e6
    settings = " ".join(f"`{one}`" for one in told)
    return f"""# pocket

The embedded Stable Diffusion: a diffusers folder of {side}x{side} pictures, made from nothing by `make pocket` from
pictures of Pocketland (`sdjax/data/pocketland/`), which are drawn by code and free of licences. All weights:
{size:.1f} MB in float16.

![prompts by seeds](grid.png)

| part | size | numbers |
| --- | --- | --- |
{parts(sd)}

## How it was made

`make pocket` on {time.strftime("%Y-%m-%d", time.gmtime())}, {device.device_kind} ({device.platform}), JAX
{jax.__version__}, {minutes:.1f} minutes of steps, compilation included. Settings: {settings}.

| stage | steps x batch | pictures | last loss |
| --- | --- | --- | --- |
{stages(work)}

## Figures

On held-out people, prompts and seeds, by the judges of `benchmarks/judges/`, which are no part of the model.

| figure | measured | command |
| --- | --- | --- |
{figures(work / "figures")}
"""


def parts(sd):
    """Returns the table rows of the model's parts."""
    vae, unet = sd.networks["vae"].config, sd.networks["unet"].config
    text, image = sd.networks["text_encoder"].config, sd.networks["image_encoder"].config
    towers = [f"CLIP, {one.num_hidden_layers} layers of {one.hidden_size}" for one in (text, image)]
    said = {
        "vae": f"KL, f{sd.factor}, {vae.latent_channels} latent channels, widths {_listed(vae.block_out_channels)}",
        "unet": f"widths {_listed(unet.block_out_channels)}, {unet.layers_per_block} block a level",
        "text_encoder": f"{towers[0]}, {text.vocab_size} words and pieces",
        "image_encoder": f"{towers[1]}, patches of {image.patch_size}",
    }
    return "\n".join(f"| {name} | {text} | {trees.count(sd.parts[name]) / 1e6:.2f} M |" for name, text in said.items())


def stages(work):
    """Returns the table rows of the stages' runs."""
    rows = []
    for name in STAGES:
        settings = json.loads((work / name / "config.json").read_text())
        last = [row for row in _log(work, name) if "loss" in row][-1]
        data = settings["data"]
        count = data["source"]["count"] + data["source"].get("large", 0)
        rows.append(f"| {name} | {last['step']:,} x {data['batch']} | {count:,} | {last['loss']:.4g} |")
    return "\n".join(rows)


def seconds(log):
    """Returns the seconds of a run's steps, over all its processes; each process's clock starts at 0."""
    before = now = 0.0
    for row in log:
        before, now = (before + now, 0.0) if row.get("event") in BEGUN else (before, row.get("seconds", now))
    return before + now


def figures(folder):
    """Returns the table rows of the figures."""
    vae, prompts, e4t = (_read(folder / f"{name}.json") for name in ("vae", "prompts", "e4t"))
    people = e4t.get("encoder", {})
    rows = [
        ("autoencoder, mean PSNR", _told(vae, "psnr", " dB") + _of(vae, "pictures"), "vae"),
        ("what prompts name is there", _told(prompts, "right") + _of(prompts, "prompts"), "prompts"),
        ("all of it at once", str(prompts.get("all right", NONE)), "prompts"),
    ]
    for steps in ("0", "5", "10", "15"):
        row = people.get(steps, {})
        shown = "; ".join(f"{name} {_mean(row, name)}" for name in ("identity", "prompts", "glasses", "scarf", "hat"))
        rows.append((f"E4T, {steps} steps{_of(people, 'identities')}", shown if row else NONE, "e4t --arm encoder"))
    return "\n".join(f"| {name} | {shown} | `python benchmarks/pocket.py {command}` |" for name, shown, command in rows)


def _log(work, name):
    return [json.loads(line) for line in (work / name / "metrics.jsonl").read_text().splitlines()]


def _listed(numbers):
    return ", ".join(map(str, numbers))


def _read(path):
    return json.loads(path.read_text()) if path.exists() else {}


def _told(found, name, unit=""):
    if name not in found:
        return NONE
    low, high = found["interval"]
    return f"{found[name]}{unit} ({low} to {high})"


def _of(found, name):
    return f", {found[name]} {name}" if name in found else ""


def _mean(row, name):
    if name not in row:
        return NONE
    return f"{row[name]['mean']:.2f} ({row[name]['interval'][0]:.2f} to {row[name]['interval'][1]:.2f})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
