"""What compiles anew: another size, batch, number of chunks, kind of wrapper or adapter, or kind of noise; no more."""

import random

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import sdjax
from sdjax import trees
from sdjax.convert import pipeline

LONG = ", ".join(["a very long description of a face"] * 12)  # more than one chunk
SHAPES = [(32, 2), (48, 1), (32, 1)]  # size, batch
SAMPLERS = ["ddim", "euler", "dpmpp_2m", "heun", "euler_a", "dpmpp_sde"]
NOISY = ("euler_a", "dpmpp_sde")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two embeddings of different words and two LoRAs of different weights."""
    folder = tmp_path_factory.mktemp("adapters")
    sd = pipeline.load("random:tiny")
    width = trees.flatten(sd.text_encoder)["text_model.embeddings.token_embedding.embedding"].shape[1]
    name = next(name for name in trees.flatten(sd.unet) if name.endswith("attn2.to_q.kernel"))
    rows, columns = trees.flatten(sd.unet)[name].shape
    for i, word in enumerate(("<cat>", "<dog>")):
        noise = np.random.default_rng(i).standard_normal
        save_file({word: noise((1, width), np.float32)}, folder / f"word{i}.safetensors")
        key = f"unet.{name.removesuffix('.kernel')}.lora"
        down, up = noise((2, rows), np.float32), noise((columns, 2), np.float32)
        save_file({f"{key}_A.weight": down, f"{key}_B.weight": up}, folder / f"lora{i}.safetensors")
    return folder


@pytest.fixture
def compiled():
    """The names of what is compiled from here on."""
    names = []

    def listen(event, duration, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(about.get("fun_name", ""))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def jobs(count, seed=0, shapes=SHAPES, samplers=SAMPLERS):
    """Yields (what may compile, settings): jobs of mixed settings."""
    chance = random.Random(seed)
    for _ in range(count):
        size, batch = chance.choice(shapes)
        sampler = chance.choice(samplers)
        word, lora = chance.choice([None, None, 0, 1]), chance.choice([None, None, 0, 1])
        guidance = chance.choice([1.0, 3.0, 7.5])
        grammar = chance.choice(["plain", "a1111"])
        text = LONG if grammar == "a1111" and chance.random() < 0.3 else "a photo of a face"
        strength = chance.choice([None, None, 0.4, 0.9])
        kind = (size, batch, sampler in NOISY, word is None, guidance == 1, grammar, text, strength is None)
        yield kind, dict(
            size=size, word=word, lora=lora, amount=chance.random(), strength=strength, guidance=guidance,
            prompts=[f"{text} {chance.random()}"] * batch, seeds=[chance.randrange(1000)] * batch, grammar=grammar,
            steps=chance.choice([3, 4, 5]), sampler=sampler, rescale=chance.random(),
            schedule=chance.choice(["normal", "karras"]),
        )  # fmt: skip


def make(base, folder, settings):
    """Makes the pictures of a job."""
    settings, sd = dict(settings), base
    word, lora, amount, strength = (settings.pop(name) for name in ("word", "lora", "amount", "strength"))
    if lora is not None:
        sd = sdjax.attach(sd, folder / f"lora{lora}.safetensors", amount)
    if word is not None:
        sd = sdjax.attach(sd, folder / f"word{word}.safetensors")
    if strength is None:
        return sdjax.text2img(sd, **settings)
    size = settings["size"]
    return sdjax.img2img(sd, pictures=np.full((size, size, 3), 90, np.uint8), strength=strength, **settings)


def check(folder, compiled, work):
    """Makes all jobs; asserts that sampling compiles once per kind, and that a kind seen before compiles nothing."""
    base, seen = pipeline.load("random:tiny"), set()
    for kind, settings in work:
        before = len(compiled)
        make(base, folder, settings)
        new = [name for name in compiled[before:] if "_sample" in name]
        assert len(new) == (kind not in seen), (kind, settings, new)
        ours = [name for name in compiled[before:] if any(part in name for part in OURS)]
        assert kind not in seen or not ours, (kind, settings, ours)
        seen.add(kind)
    return len(seen)


OURS = ("_sample", "_condition", "_encoded", "_decode", "_moments", "_draw_latents", "_normal")


def test_settings_compile_nothing(folder, compiled):
    work = list(jobs(600, shapes=[(32, 1)], samplers=["ddim", "heun"]))
    kind = (32, 1, False, False, False, "plain", "a photo of a face", False)
    found = [(this, settings) for this, settings in work if this == kind][:8]
    assert len({settings["steps"] for _, settings in found}) > 1 and len({s["word"] for _, s in found}) == 2
    assert check(folder, compiled, found) == 1


@pytest.mark.slow
def test_two_hundred_jobs_compile_once_a_kind(folder, compiled):
    print(check(folder, compiled, jobs(200)), "kinds")
