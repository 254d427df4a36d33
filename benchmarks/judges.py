"""Judges of Pocketland pictures: what a picture shows, and who is in it.  No part of any generator.

Two small convolutional networks, trained on drawn pictures of training identities: `what` names domain, context, style,
accessory and every kind of attribute; `who` gives a unit vector of the identity.  Vectors are trained by contrast
between two scenes of the same identity, against others who mostly share its exact hair and skin colour, and to
predict `Identity.vector()`.

    python benchmarks/judges.py train --judge what [--seconds 700] [--draw 40000] [--data outputs/judges]
    python benchmarks/judges.py check                 # figures on held-out identities, the table of judges/README.md

    judges = load()
    classify(judges, pictures)["context"]             # array of words, one for each picture of uint8 [N 64 64 3]
    s = (identity(judges, made) * identity(judges, truth)).sum(-1)
"""

import argparse
import json
import time
from functools import lru_cache, partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon
from safetensors.numpy import load_file, save_file

from sdjax import trees
from sdjax.data import pocketland as land
from sdjax.models.layers import Conv

FOLDER = Path(__file__).parent / "judges"
SCENE = {"domain": land.DOMAINS, "context": land.CONTEXTS, "style": land.STYLES, "accessory": land.ACCESSORIES}
MAY_LACK = ("beard", "marks", "age", "pattern")  # kinds that somebody can clearly not have
CLASSES = SCENE | {k: words + (land.ABSENT,) * (k in MAY_LACK) for k, words in land.ATTRIBUTES.items()}
NUMBERS = {"face": 47, "cat": 28}  # lengths of Identity.vector()
GROUP, VIEWS = 8, 4  # identities that share hair and skin colour; scenes of each
FIRST = 5_000_000  # seed of the first identity that the judges are trained on, within land.TRAIN


class Judge(nn.Module):
    """Pictures [N 64 64 3] in [-1, 1] to ({kind: logits [N classes]}, unit vectors [N 128], {domain: numbers}).

    stem: (channels, size, stride) of the first convolution; layers: (channels, stride) of the 3x3 ones.
    vectors: also who it is, not only what is shown; the last two are None without.
    """

    stem: tuple
    layers: tuple
    vectors: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        width, size, stride = self.stem
        x = nn.Conv(width, (size, size), strides=stride, use_bias=False, name="eye")(x)
        for width, stride in self.layers:
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.95)(x))
            x = Conv(width, strides=stride, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.95)(x))
        where = nn.Conv(16, (1, 1))(x).reshape(x.shape[0], -1)
        x = jnp.concatenate([x.mean((1, 2)), nn.relu(where)], -1)
        logits = {kind: nn.Dense(len(words), name=kind)(x) for kind, words in CLASSES.items()}
        if not self.vectors:
            return logits, None, None
        vector = nn.Dense(128, name="identity")(x)
        numbers = {domain: nn.Dense(count, name=f"{domain}_numbers")(vector) for domain, count in NUMBERS.items()}
        return logits, vector / jnp.linalg.norm(vector + 1e-6, axis=-1, keepdims=True), numbers


JUDGES = {  # freckles and wrinkles are single pixels: what is shown needs a finer first layer than who it is
    "what": Judge((32, 4, 2), ((64, 2), (64, 1), (128, 2), (128, 1))),
    "who": Judge((48, 8, 4), ((96, 2), (96, 1), (192, 2), (192, 1)), vectors=True),
}


def label(who, place):
    """Returns class numbers int [kinds] in the order of CLASSES; one past the last class where it cannot be said."""
    true = land.labels(who, place) | {"domain": who.domain}
    true |= {"context": place.context, "style": place.style, "accessory": place.accessory}
    return [words.index(true[k]) if true[k] in words else len(words) for k, words in CLASSES.items()]


def crowd(group, first, cats):
    """Returns the GROUP identities number `group`: one group in `cats` is of cats, others share hair and skin."""
    seeds = range(first + group * GROUP, first + (group + 1) * GROUP)
    if group % cats == cats - 1:
        return [land.identity(seed, "cat") for seed in seeds]
    model = land.identity(seeds[0])
    return [land.identity(seed, hair=model, skin=model) for seed in seeds]


def drawn(count, folder, cats=10, first=FIRST):
    """Returns training data of `count` pictures, drawn into `folder` once."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}-{count}-{cats}.npy" for name in ("pictures", "classes", "numbers")}
    if not all(path.exists() for path in files.values()):
        pictures = np.empty((count, 64, 64, 3), np.uint8)
        classes = np.empty((count, len(CLASSES)), np.int8)
        numbers = np.zeros((count // VIEWS, max(NUMBERS.values())), np.float32)
        index, start = 0, time.time()
        for group in range(count // (GROUP * VIEWS)):
            for who in crowd(group, first, cats):
                numbers[index // VIEWS, : NUMBERS[who.domain]] = who.vector()
                for _ in range(VIEWS):
                    place = land.scene(FIRST * VIEWS + index)
                    pictures[index], classes[index] = land.draw(who, place), label(who, place)
                    index += 1
            if group % 100 == 0:
                print(f"drawn {index} of {count} in {time.time() - start:.0f} s", flush=True)
        for name, value in (("numbers", numbers), ("classes", classes), ("pictures", pictures)):
            np.save(files[name], value)
    return {name: np.load(path, mmap_mode="r") for name, path in files.items()}


def disturb(pictures, key, mirror=False):
    """Returns uint8 pictures as float in [-1, 1], moved, blurred, relit and made noisy as a generator's may be.

    mirror: half of them also left to right, which changes who it is and not what is shown.
    """
    x = pictures.astype(jnp.float32) / 127.5 - 1
    k_blur, k_light, k_tint, k_noise, k_level, k_move, k_mirror = jax.random.split(key, 7)
    count = x.shape[0]
    if mirror:
        x = jnp.where(jax.random.bernoulli(k_mirror, shape=(count, 1, 1, 1)), x[:, :, ::-1], x)
    padded = jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    corner = jax.random.randint(k_move, (count, 2), 0, 5)
    x = jax.vmap(lambda p, c: jax.lax.dynamic_slice(p, (c[0], c[1], 0), (64, 64, 3)))(padded, corner)
    soft = x
    for axis in (1, 2):
        soft = 0.5 * soft + 0.25 * (jnp.roll(soft, 1, axis) + jnp.roll(soft, -1, axis))
    x += jax.random.uniform(k_blur, (count, 1, 1, 1), minval=-0.3, maxval=0.7) * (soft - x)
    light = 1 + 0.08 * jax.random.normal(k_light, (count, 1, 1, 1)) + 0.02 * jax.random.normal(k_tint, (count, 1, 1, 3))
    level = jax.random.uniform(k_level, (count, 1, 1, 1), maxval=0.08)
    return (x + 1) * light - 1 + level * jax.random.uniform(k_noise, x.shape, minval=-1.0)


def losses(params, stats, batch, key, judge):
    """Returns (loss, (batch statistics, parts)): cross entropies + contrast of two views + error of the numbers.

    batch: pictures [2 P 64 64 3], first all first views then all second views; classes; numbers and domain of [P].
    Cross entropies are means over the pictures of which a kind can be said.
    """
    x = disturb(batch["pictures"], key, mirror=not judge.vectors)
    (logits, vectors, numbers), new = judge.apply(
        {"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"]
    )
    named = sum(_surprise(logits[kind], batch["classes"][:, index]) for index, kind in enumerate(CLASSES))
    if not judge.vectors:
        return named, (new["batch_stats"], {"named": named})
    first, second = jnp.split(vectors, 2)
    alike = first @ second.T * 16.0  # [P P], a temperature of 1/16
    same = -(jnp.diag(jax.nn.log_softmax(alike)) + jnp.diag(jax.nn.log_softmax(alike.T))).mean() / 2
    cat = jnp.tile(batch["classes"][: len(first), 0], 2)[:, None]
    truth = jnp.concatenate([batch["numbers"]] * 2)
    errors = [((numbers[d] - truth[:, :c]) ** 2).mean(-1, keepdims=True) for d, c in NUMBERS.items()]
    error = jnp.where(cat == 0, *errors).mean()
    return 0.5 * named + same + error, (new["batch_stats"], {"named": named, "same": same, "numbers": error})


def _surprise(logits, classes):
    """Returns the mean cross entropy over the pictures [N] whose class is one of the logits' [N classes]."""
    said = classes < logits.shape[-1]
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(said, classes, 0))
    return jnp.sum(said * entropy) / jnp.maximum(jnp.sum(said), 1)


def batches(data, pairs, seed):
    """Yields endless batches: `pairs` identities in whole groups, two different views of each."""
    random = np.random.default_rng(seed)
    groups = len(data["pictures"]) // (GROUP * VIEWS)
    while True:
        order = random.permutation(groups)
        for start in range(0, groups - pairs // GROUP + 1, pairs // GROUP):
            who = (order[start : start + pairs // GROUP, None] * GROUP + np.arange(GROUP)).ravel()
            views = random.random((pairs, VIEWS)).argsort(1)[:, :2]
            index = (who[:, None] * VIEWS + views).T.ravel()
            yield {"pictures": data["pictures"][index], "classes": data["classes"][index].astype(np.int32),
                   "numbers": data["numbers"][who]}  # fmt: skip


def matrices(params):
    """Returns how Muon sees each leaf: a convolution's kernel as a matrix [a b in, out], all else (None) is Adam's."""
    return jax.tree.map(lambda leaf: MuonDimensionNumbers((0, 1, 2), 3) if leaf.ndim == 4 else None, params)


def train(name, seconds, count, folder, cats, steps=None, pairs=64, seed=0, rate=3e-3):
    """Trains a judge for `steps` (default: as many as fit into `seconds`) and writes judges/NAME.safetensors."""
    judge, data = JUDGES[name], drawn(count, folder, cats)
    variables = judge.init(jax.random.key(seed), jnp.zeros((1, 64, 64, 3)))
    params, stats = variables["params"], variables["batch_stats"]
    optimizer = muon(1.0, weight_decay=0.02, consistent_rms=0.2, muon_weight_dimension_numbers=matrices)
    opt = optimizer.init(params)

    @partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params, stats, opt, batch, key, rate):
        gradients, (stats, parts) = jax.grad(losses, has_aux=True)(params, stats, batch, key, judge)
        updates, opt = optimizer.update(gradients, opt, params)
        return optax.apply_updates(params, jax.tree.map(lambda u: rate * u, updates)), stats, opt, parts

    start, root = time.time(), jax.random.key(seed + 1)
    for number, batch in enumerate(batches(data, pairs, seed)):
        done = number / steps if steps else (time.time() - start) / seconds
        if done >= 1:
            break
        now = jnp.float32(rate * min(1.0, (number + 1) / 60) * (0.5 + 0.5 * np.cos(np.pi * done)))
        params, stats, opt, parts = step(params, stats, opt, batch, jax.random.fold_in(root, number), now)
        if number % 300 == 299:
            keep(name, params, stats)
        if number % 50 == 0:
            shown = ", ".join(f"{name} {float(value):.3f}" for name, value in parts.items())
            print(f"step {number}: {shown}; {time.time() - start:.0f} s", flush=True)
    print(f"{number} steps of {2 * pairs} pictures in {time.time() - start:.0f} s")
    keep(name, params, stats)


def keep(name, params, stats):
    """Writes judges/NAME.safetensors in float16."""
    flat = trees.flatten({"params": params, "batch_stats": stats})
    FOLDER.mkdir(exist_ok=True)
    small = {path: np.asarray(leaf).astype(np.float16) for path, leaf in flat.items()}
    save_file(small, FOLDER / f"{name}.safetensors")


@lru_cache(1)
def load(folder=FOLDER):
    """Returns {judge: variables}, float32, as the other functions take them."""
    found = {}
    for name, judge in JUDGES.items():
        like = jax.eval_shape(judge.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
        flat = load_file(Path(folder) / f"{name}.safetensors")
        found[name] = trees.unflatten({name: jnp.asarray(leaf, jnp.float32) for name, leaf in flat.items()}, dict(like))
    return found


@partial(jax.jit, static_argnames="name")
def _judge(name, variables, pictures):
    return JUDGES[name].apply(variables, pictures.astype(jnp.float32) / 127.5 - 1)


def _run(name, judges, pictures, size=128):
    """Outputs of the network for uint8 [N 64 64 3], in batches of one size, so that it compiles once."""
    pictures = np.asarray(pictures)
    if pictures.dtype != np.uint8 or pictures.shape[1:] != (64, 64, 3):
        raise ValueError(f"pictures={pictures.dtype}{list(pictures.shape)}: expected uint8 [N 64 64 3]")
    parts = []
    for start in range(0, len(pictures), size):
        part = pictures[start : start + size]
        full = np.concatenate([part, np.zeros((size - len(part), 64, 64, 3), np.uint8)])
        parts.append(jax.tree.map(lambda leaf, n=len(part): np.asarray(leaf)[:n], _judge(name, judges[name], full)))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def classify(judges, pictures):
    """Returns {kind: words [N]}, the likeliest word of each kind."""
    logits = _run("what", judges, pictures)[0]
    return {kind: np.array(words)[logits[kind].argmax(-1)] for kind, words in CLASSES.items()}


def identity(judges, pictures):
    """Returns unit vectors [N 128]; their dot product is the similarity s of two pictures' identities."""
    return _run("who", judges, pictures)[1]


def colors(pictures):
    """Returns what a judge that sees colours only sees: mean colours of 3x3 regions and a colour histogram, [N 91]."""
    x = np.asarray(pictures, np.float32)[:, :63, :63] / 255
    regions = x.reshape(-1, 3, 21, 3, 21, 3).mean((2, 4)).reshape(len(x), -1)
    level = np.minimum((x * 4).astype(int), 3) @ np.array([16, 4, 1])
    histogram = np.stack([np.bincount(picture.ravel(), minlength=64) for picture in level]) / 63**2
    both = np.concatenate([regions, histogram], 1)
    both = (both - both.mean(0)) / (both.std(0) + 1e-3)
    return both / np.linalg.norm(both, axis=-1, keepdims=True)


def pairs_of(count, first=land.HELDOUT[0]):
    """Returns uint8 pictures (one, same, other) [count ...]: two renders of an identity and one of another.

    All three share context, style and accessory; pose, expression and light differ.
    """
    one, same, other = [], [], []
    for index in range(count):
        seed = 40_000_000 + 3 * index
        place = land.scene(seed)
        kind = (place.context, place.style, place.accessory)
        who = land.identity(first + 2 * index)
        one.append(land.draw(who, place))
        same.append(land.draw(who, land.scene(seed + 1, *kind)))
        other.append(land.draw(land.identity(first + 2 * index + 1), land.scene(seed + 2, *kind)))
    return np.stack(one), np.stack(same), np.stack(other)


def lineup(trial, size=64, first=land.HELDOUT[0] + 1_000_000, photo=False):
    """Returns (pictures asked for, pictures to find), each [size ...], of faces with one hair and skin colour.

    All stand in one context, style and accessory and differ in pose, expression and light.
    photo: what to find is a plain photo in a room instead.
    """
    model = land.identity(first + trial * size)
    people = [land.identity(first + trial * size + i, hair=model, skin=model) for i in range(size)]
    seed = 50_000_000 + 2 * trial * size
    kind = land.scene(seed)
    kind = (kind.context, kind.style, kind.accessory)
    ask = [land.draw(who, land.scene(seed + 2 * i, *kind)) for i, who in enumerate(people)]
    kind = ("room", "photo", "none") if photo else kind
    find = [land.draw(who, land.scene(seed + 2 * i + 1, *kind)) for i, who in enumerate(people)]
    return np.stack(ask), np.stack(find)


def found(ask, find):
    """Returns the share of vectors [N D] in `ask` whose nearest in `find` is their own."""
    return float(((ask @ find.T).argmax(1) == np.arange(len(ask))).mean())


def check(count=4000, trials=20, first=land.HELDOUT[0]):
    """Returns the judges' figures on identities that nothing was trained on."""
    variables, right, told = load(), {kind: 0 for kind in CLASSES}, {kind: 0 for kind in CLASSES}
    people = [land.identity(first + i, "cat" if i % 5 == 4 else "face") for i in range(count)]
    places = [land.scene(60_000_000 + i) for i in range(count)]
    words = classify(variables, np.stack([land.draw(*both) for both in zip(people, places, strict=True)]))
    for index, both in enumerate(zip(people, places, strict=True)):
        for kind, number in zip(CLASSES, label(*both), strict=True):
            if number < len(CLASSES[kind]):
                told[kind] += 1
                right[kind] += words[kind][index] == CLASSES[kind][number]
    figures = {f"{kind} (of {told[kind]})": round(float(right[kind] / told[kind]), 4) for kind in CLASSES}
    one, same, other = (identity(variables, part) for part in pairs_of(count // 8))
    figures |= {"s0": round(float((one * other).sum(-1).mean()), 4), "s1": round(float((one * same).sum(-1).mean()), 4)}
    for name, photo in (("same scene", False), ("photo", True)):
        lines = [lineup(trial, photo=photo) for trial in range(trials)]
        figures[f"first of 64, {name}"] = round(
            float(np.mean([found(identity(variables, ask), identity(variables, find)) for ask, find in lines])), 4
        )
        figures[f"first of 64, {name}, colours only"] = round(
            float(np.mean([found(colors(ask), colors(find)) for ask, find in lines])), 4
        )
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("task", choices=("train", "check"))
    parser.add_argument("--judge", choices=JUDGES, default="what", help="which one to train")
    parser.add_argument("--seconds", type=float, default=700, help="training time after drawing")
    parser.add_argument("--steps", type=int, help="number of steps instead of a time")
    parser.add_argument("--draw", type=int, default=40_000, help="number of training pictures")
    parser.add_argument("--cats", type=int, default=10, help="one group of identities in so many is of cats")
    parser.add_argument("--data", type=Path, default=Path("outputs/judges"), help="where drawn pictures are kept")
    options = parser.parse_args()
    if options.task == "train":
        train(options.judge, options.seconds, options.draw, options.data, options.cats, options.steps)
    print(json.dumps(check(), indent=1))


if __name__ == "__main__":
    main()
