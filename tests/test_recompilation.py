"""What compiles anew: another size, batch, number of chunks, kind of wrapper or adapter, or kind of noise; no more."""

import itertools
import random

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import sdjax
from sdjax import trees
from sdjax.formats import pipeline

SHORT = "a photo of a face"
LONG = ", ".join(["a very long description of a face"] * 12)  # more than one chunk
SHAPES = [(32, 2), (48, 1), (32, 1)]  # size, batch
QUIET, NOISY = ("ddim", "euler", "dpmpp_2m", "heun"), ("euler_a", "dpmpp_sde")
NAMES = ("shape", "noisy", "embedding", "guided", "text", "given")  # what makes a kind
OURS = ("_sample", "_condition", "_encoded", "_decode", "_moments", "_draw_latents", "_normal")
OURS = {f"jit({name})" for name in OURS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two embeddings of different words and two LoRAs of different weights."""
    folder = tmp_path_factory.mktemp("adapters")
    sd = pipeline.load("random:tiny")
    width = trees.flatten(sd.parts["text_encoder"])["text_model.embeddings.token_embedding.embedding"].shape[1]
    name = next(name for name in trees.flatten(sd.parts["unet"]) if name.endswith("attn2.to_q.kernel"))
    rows, columns = trees.flatten(sd.parts["unet"])[name].shape
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
            names.append(about["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def kinds():
    """Returns all that may compile, dicts of settings."""
    texts = [("plain", SHORT), ("a1111", SHORT), ("a1111", LONG)]
    values = itertools.product(SHAPES, *[(False, True)] * 3, texts, (False, True))
    return [dict(zip(NAMES, value, strict=True)) for value in values]


def job(kind, chance):
    """Returns the settings of a job of a kind, all others by chance."""
    (size, batch), (grammar, text) = kind["shape"], kind["text"]
    return dict(
        size=size, prompts=[f"{text} {chance.random()}"] * batch, seeds=[chance.randrange(1000) for _ in range(batch)],
        word=chance.choice([0, 1]) if kind["embedding"] else None, lora=chance.choice([None, 0, 1]),
        amount=chance.random(), guidance=chance.choice([3.0, 7.5]) if kind["guided"] else 1.0, grammar=grammar,
        strength=chance.choice([0.4, 0.9]) if kind["given"] else None, steps=chance.choice([3, 4, 5]),
        sampler=chance.choice(NOISY if kind["noisy"] else QUIET), rescale=chance.random(),
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


def check(folder, compiled, some, count):
    """Makes jobs of some kinds; asserts that sampling compiles once for each, and a kind seen before nothing at all."""
    base, seen, chance = pipeline.load("random:tiny"), [], random.Random(0)
    for _ in range(count):
        kind = chance.choice(some)
        settings, before = job(kind, chance), len(compiled)
        make(base, folder, settings)
        new = [name for name in compiled[before:] if name in OURS]
        assert new.count("jit(_sample)") == (kind not in seen), (kind, settings, new)
        assert not new or kind not in seen, (kind, settings, new)
        seen += [] if kind in seen else [kind]
    assert len(seen) == len(some)


def test_settings_compile_nothing(folder, compiled):
    check(folder, compiled, [dict(zip(NAMES, ((32, 1), False, True, True, ("plain", SHORT), True), strict=True))], 8)


@pytest.mark.slow
def test_two_hundred_jobs_compile_once_a_kind(folder, compiled):
    check(folder, compiled, random.Random(1).sample(kinds(), 12), 200)
