"""Measures what words, vision tower and E4T's encoder know about looks, on validation people and without judges.

    python benchmarks/looks.py words      error of the noise by time: prompts with no looks, all looks, another's looks
    python benchmarks/looks.py tower      share of looks that a linear map reads from the class tokens that E4T reads
    python benchmarks/looks.py encoder    error with the subject's own picture, another's, and the plain domain word

--model: a folder instead of the embedded model, such as a run's export.
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import embedded

from sdjax.data import pocketland
from sdjax.diffusion.noise_schedule import add_noise, target
from sdjax.formats import pipeline
from sdjax.formats.adapters import e4t
from sdjax.formats.adapters.adapter_file import File
from sdjax.methods.e4t import E4T
from sdjax.models.clip import clip_pixels
from sdjax.stable_diffusion import to_pixels

PEOPLE, SCENES, ROWS = pocketland.VALIDATION[0] + 500_000, 70_000_000, 64
KINDS = ("hair_color", "skin", "hair_style", "eye_color", "face_shape", "marks")


def people_of(count):
    """Returns (people, scenes, pictures uint8 [count S S 3])."""
    people = [pocketland.identity(PEOPLE + i) for i in range(count)]
    scenes = [pocketland.scene(SCENES + i) for i in range(count)]
    return people, scenes, np.stack([embedded.draw(*both) for both in zip(people, scenes, strict=True)])


@jax.jit
def errors(sd, pixels, ids, t, noise, cond):
    """Returns the mean squared error of the predicted noise, [B]."""
    z = sd.encode(pixels).astype(jnp.float32)
    prediction, _ = sd.denoise(add_noise(sd.schedule, z, noise, t), t, sd.condition(ids).with_own(**cond))
    return ((prediction - target(sd.schedule, z, noise, t)) ** 2).mean((1, 2, 3))


def measure(sd, pictures, texts, t, concepts=None):
    """Returns `errors` of all pictures [N], in batches; a picture's noise depends only on its number."""
    ids, found = sd.tokenize(texts), []
    shape = (len(pictures), *sd.encode(to_pixels(pictures[:1])).shape[1:])
    noise = jax.random.normal(jax.random.key(0), shape)
    for start in range(0, len(pictures), ROWS):
        part = slice(start, start + ROWS)
        cond = {} if concepts is None else {"concept": to_pixels(concepts[part])}
        some = jax.tree.map(lambda x: x[part], ids)  # noqa: B023
        found.append(errors(sd, to_pixels(pictures[part]), some, t[part], noise[part], cond))
    return np.concatenate(found)


def show(found, t, first, edges):
    """Prints a line per range of times: the error of `first`, and the differences of the others from it in percent."""
    for low, high in zip(edges, edges[1:], strict=False):
        at = (t >= low) & (t < high)
        base = found[first][at].mean()
        others = [f"{k} {100 * (e[at].mean() / base - 1):+.1f} %" for k, e in found.items() if k != first]
        print(f"times {low} to {high - 1}: {first} {base:.5f}; {', '.join(others)}")


def words(options):
    """Prints how captions that name looks change the error."""
    sd, count = pipeline.load(options.model), options.count or 512
    people, scenes, pictures = people_of(count)
    t = np.arange(count) * 1000 // count
    own, others = (list(zip(some, scenes, strict=True)) for some in (people, people[1:] + people[:1]))
    texts = {
        "no looks": [pocketland.word_prompt(place, "face", i) for i, place in enumerate(scenes)],
        "all": [pocketland.caption(*both, i, 1.0) for i, both in enumerate(own)],
        "another's": [pocketland.caption(*both, i, 1.0) for i, both in enumerate(others)],
    }
    show({k: measure(sd, pictures, text, t) for k, text in texts.items()}, t, "no looks", range(0, 1001, 100))


def tower(options):
    """Prints the share of looks that ridge regression reads right; it is fitted to three quarters of the pictures."""
    sd, count = pipeline.load(options.model), options.count or 2000
    people, scenes, pictures = people_of(count)
    network = sd.networks["image_encoder"]
    see = jax.jit(lambda p, x: network.apply({"params": p}, clip_pixels(x, network.config.image_size))[1])
    seen = [see(sd.parts["image_encoder"], to_pixels(pictures[i : i + 100])) for i in range(0, count, 100)]
    x = np.concatenate(seen)[:, 1::2].reshape(count, -1)
    x = np.concatenate([(x - x.mean(0)) / (x.std(0) + 1e-6), np.ones((count, 1))], 1)
    for kind in KINDS:
        said = [pocketland.labels(*both).get(kind) for both in zip(people, scenes, strict=True)]
        told = [i for i, word in enumerate(said) if word]
        all_words = sorted({said[i] for i in told})
        y = np.eye(len(all_words))[[all_words.index(said[i]) for i in told]]
        rows, fit = x[told], len(told) * 3 // 4
        weights = np.linalg.solve(rows[:fit].T @ rows[:fit] + 30 * np.eye(x.shape[1]), rows[:fit].T @ y[:fit])
        right = ((rows[fit:] @ weights).argmax(1) == y[fit:].argmax(1)).mean()
        print(f"{kind}: {right:.3f} (the commonest word: {y[fit:].mean(0).max():.3f})")


def encoder(options):
    """Prints how the encoder's word changes the error, with the subject's own picture and with another's."""
    base, count = pipeline.load(options.model), options.count or 256
    method = E4T(penalty=0.0)
    kind = e4t.E4TFolder()
    adapter = kind.read(File(pipeline.locate(options.model)), base)
    trained, frozen = kind.start(adapter, method, *method.split(base, jax.random.key(0)))
    sd = method.join(frozen, trained)
    people, scenes, pictures = people_of(count)
    photos = [pocketland.scene(SCENES + 1_000_000 + i, style="photo", accessory="none") for i in range(count)]
    own = np.stack([embedded.draw(*both) for both in zip(people, photos, strict=True)])
    t = 400 + np.arange(count) * 600 // count
    texts = [pocketland.word_prompt(place, method.word, i) for i, place in enumerate(scenes)]
    plain = [pocketland.word_prompt(place, method.domain, i) for i, place in enumerate(scenes)]
    found = {method.domain: measure(base, pictures, plain, t), "own picture": measure(sd, pictures, texts, t, own)}
    found["another's"] = measure(sd, pictures, texts, t, np.roll(own, 1, 0))
    show(found, t, method.domain, range(400, 1001, 150))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = {"words": words, "tower": tower, "encoder": encoder}
    parser.add_argument("task", choices=tasks)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--count", type=int, help="pictures; default 512, 2000 and 256")
    options = parser.parse_args()
    tasks[options.task](options)


if __name__ == "__main__":
    main()
