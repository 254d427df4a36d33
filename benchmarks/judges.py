"""Judges of Pocketland pictures: what a picture shows, and who is in it.  They are no part of any generator.

The judges are two small convolutional networks, trained on drawn pictures of training identities.  `what` names domain,
context, style, accessory and every kind of attribute; `who` gives a unit vector of the identity.  The training of
vectors contrasts two scenes of an identity with other identities, most with exactly the same hair and skin colour, and
also predicts `Identity.vector()`.  The judges use PyTorch: they share no layer with the models that they judge, and
PyTorch trains convolutions in bfloat16 many times faster on a CPU.

    python benchmarks/judges.py train --judge what [--steps 6000] [--draw 120000] [--data outputs/judges] [--size 64]
    python benchmarks/judges.py check                 # figures on held-out identities, the table of judges/README.md
    python benchmarks/judges.py check --split validation           # on other identities, for choices

    judges = load()
    classify(judges, pictures)["context"]             # array of words, one for each picture of uint8 [N S S 3]
    s = (identity(judges, made) * identity(judges, truth)).sum(-1)

A judge of 64 pixels also judges pictures of 128, 192 ... pixels: it averages squares of 2, 3 ... pixels.
"""

import argparse
import functools
import itertools
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from sdjax.data import pocketland
from sdjax.formats.storage import files

FOLDER = Path(__file__).parent / "judges"
SCENE = {
    "domain": pocketland.DOMAINS, "context": pocketland.CONTEXTS, "style": pocketland.STYLES,
    "accessory": pocketland.ACCESSORIES,
}  # fmt: skip
MAY_LACK = ("beard", "marks", "age", "pattern")  # kinds that somebody can visibly lack
CLASSES = SCENE | {k: words + (pocketland.ABSENT,) * (k in MAY_LACK) for k, words in pocketland.ATTRIBUTES.items()}
NUMBERS = {"face": 47, "cat": 28}  # lengths of Identity.vector()
GROUP, VIEWS = 8, 4  # identities that share hair and skin colour; scenes of each
SPLITS = {"heldout": pocketland.HELDOUT[0], "validation": pocketland.VALIDATION[0]}
FIRST = 5_000_000  # seed of the judges' first training identity, within pocketland.TRAIN


class Conv(nn.Module):
    """A convolution without bias; its kernel is a matrix [out, in * size * size], as Muon needs it."""

    def __init__(self, channels, out, size=3, stride=1):
        super().__init__()
        self.shape, self.stride, self.padding = (out, channels, size, size), stride, (size - stride + 1) // 2
        self.weight = nn.Parameter(nn.init.kaiming_normal_(torch.empty(self.shape)).flatten(1))

    def forward(self, x):
        return F.conv2d(x, self.weight.view(self.shape), stride=self.stride, padding=self.padding)


class Judge(nn.Module):
    """Pictures [N 3 S S] in [-1, 1] to ({kind: logits [N classes]}, unit vectors [N 128], {domain: numbers}).

    size: S.  stem: (channels, size, stride) of the first convolution; layers: (channels, stride) of the 3x3 ones.
    vectors: whether the judge also tells who it is; without it, the last two outputs are None.
    """

    def __init__(self, size, stem, layers, vectors=False):
        super().__init__()
        self.size = size
        parts, width, side = [Conv(3, *stem)], stem[0], size // stem[2]
        for out, stride in layers:
            parts += [nn.BatchNorm2d(width, momentum=0.05), nn.ReLU(), Conv(width, out, stride=stride)]
            width, side = out, side // stride
        self.body = nn.Sequential(*parts, nn.BatchNorm2d(width, momentum=0.05), nn.ReLU())
        self.where = nn.Conv2d(width, 16, 1)
        width += 16 * side**2
        self.kinds = nn.ModuleDict({kind: nn.Linear(width, len(words)) for kind, words in CLASSES.items()})
        self.identity = nn.Linear(width, 128) if vectors else None
        self.numbers = nn.ModuleDict({d: nn.Linear(128, count) for d, count in NUMBERS.items()} if vectors else {})

    def forward(self, x):
        x = self.body(x.contiguous(memory_format=torch.channels_last))
        x = torch.cat([x.mean((2, 3)), self.where(x).relu().flatten(1)], 1)
        logits = {kind: layer(x) for kind, layer in self.kinds.items()}
        if self.identity is None:
            return logits, None, None
        vector = self.identity(x)
        return logits, F.normalize(vector), {domain: layer(vector) for domain, layer in self.numbers.items()}


JUDGES = {  # `what` needs finer first layers than `who`: freckles and wrinkles are single pixels
    64: {
        "what": ((64, 4, 2), ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1))),
        "who": ((48, 8, 4), ((96, 2), (96, 1), (192, 2), (192, 1)), True),
    },
    128: {
        "what": ((32, 4, 2), ((64, 2), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1))),
        "who": ((48, 8, 4), ((96, 2), (96, 1), (192, 2), (192, 1), (192, 2), (192, 1)), True),
    },
}


def label(who, place):
    """Returns class numbers int [kinds] in the order of CLASSES; one past the last class if a kind is unclear."""
    true = pocketland.labels(who, place) | {"domain": who.domain}
    true |= {"context": place.context, "style": place.style, "accessory": place.accessory}
    return [words.index(true[k]) if true[k] in words else len(words) for k, words in CLASSES.items()]


def crowd(group, first, cats):
    """Returns the identities of a group: cats in every `cats`-th group, else faces with one hair and skin colour."""
    seeds = range(first + group * GROUP, first + (group + 1) * GROUP)
    if group % cats == cats - 1:
        return [pocketland.identity(seed, "cat") for seed in seeds]
    model = pocketland.identity(seeds[0])
    return [pocketland.identity(seed, hair=model, skin=model) for seed in seeds]


def drawn(count, folder, cats=10, first=FIRST, size=64, workers=0):
    """Returns training data of `count` pictures, drawn into `folder` once.  workers: processes; 0 is this one."""
    if count < 8 * GROUP * VIEWS:
        raise SystemExit(f"error: --draw {count}: expected at least {8 * GROUP * VIEWS} pictures, a batch of them")
    folder.mkdir(parents=True, exist_ok=True)
    kind = f"{count}-{cats}" + (f"-{size}" if size != 64 else "")
    paths = {name: folder / f"{name}-{kind}.npy" for name in ("pictures", "classes", "numbers")}
    if not all(path.exists() for path in paths.values()):
        found = {
            "numbers": np.zeros((count // VIEWS, max(NUMBERS.values())), np.float32),
            "classes": np.empty((count, len(CLASSES)), np.int8),
            "pictures": np.empty((count, size, size, 3), np.uint8),
        }
        start, groups = time.time(), range(count // (GROUP * VIEWS))
        how = [itertools.repeat(x) for x in (first, cats, size)]
        with ProcessPoolExecutor(max(1, workers), multiprocessing.get_context("spawn")) as pool:
            for group, made in enumerate((pool.map if workers else map)(_drawn, groups, *how)):
                for name, value in made.items():
                    found[name][group * len(value) : (group + 1) * len(value)] = value
                if group % 100 == 0:
                    print(f"drawn {(group + 1) * GROUP * VIEWS} of {count} in {time.time() - start:.0f} s", flush=True)
        for name, value in found.items():
            with files.new_file(paths[name]) as temporary, open(temporary, "wb") as file:
                np.save(file, value)
    return {name: np.load(path, mmap_mode="r") for name, path in paths.items()}


def _drawn(group, first, cats, size):
    """Returns the data of group number `group`: all views of each of its identities."""
    index, made = group * GROUP * VIEWS, {"numbers": [], "classes": [], "pictures": []}
    for who in crowd(group, first, cats):
        made["numbers"].append(np.pad(who.vector(), (0, max(NUMBERS.values()) - NUMBERS[who.domain])))
        for _ in range(VIEWS):
            place = pocketland.scene(FIRST * VIEWS + index)
            made["pictures"].append(pocketland.draw(who, place, size))
            made["classes"].append(label(who, place))
            index += 1
    return {name: np.array(values) for name, values in made.items()}


def disturb(pictures, random, mirror=False):
    """Returns uint8 [N S S 3] as float [N 3 S S] in [-1, 1], with shifts, blur, light and noise as in generated ones.

    random: a generator; the pictures go to its device.
    mirror: also flips half of them left to right; this changes who it is but not what a picture shows.
    """
    on = {"generator": random, "device": random.device}

    def uniform(low=0.0, high=1.0):
        return low + (high - low) * torch.rand(len(x), 1, 1, 1, **on)

    x = torch.from_numpy(pictures).to(random.device).permute(0, 3, 1, 2).float() / 127.5 - 1
    if mirror:
        x = torch.where(uniform() < 0.5, x.flip(3), x)
    size = x.shape[-1]
    far = 2 * size // 64
    padded = F.pad(x, (far,) * 4, mode="replicate").unfold(2, size, 1).unfold(3, size, 1)  # [N 3 5 5 64 64], a view
    row, column = torch.randint(2 * far + 1, (2, len(x)), **on)
    x = padded[torch.arange(len(x), device=random.device), :, row, column]
    soft = x
    for axis in (2, 3):
        soft = 0.5 * soft + 0.25 * (soft.roll(1, axis) + soft.roll(-1, axis))
    x = x + uniform(-0.3, 0.7) * (soft - x)
    tint = torch.randn(len(x), 3, 1, 1, **on)
    light = 1 + 0.08 * torch.randn(len(x), 1, 1, 1, **on) + 0.02 * tint
    return (x + 1) * light - 1 + uniform(0.0, 0.08) * (2 * torch.rand(x.shape, **on) - 1)


def losses(judge, batch, random):
    """Returns {part: loss}: cross entropies; with vectors also the contrast of two views and the numbers' error.

    batch: pictures [2P S S 3], all first views, then all second views; classes [2P kinds]; numbers [P n].
    The cross entropy of a kind is the mean over the pictures that show it clearly.
    """
    classes, truth = (torch.from_numpy(batch[name]).to(random.device) for name in ("classes", "numbers"))
    classes, x = classes.long(), disturb(batch["pictures"], random, mirror=judge.identity is None)
    with torch.autocast(random.device.type, torch.bfloat16):
        logits, vectors, numbers = judge(x)
    named = sum(_surprise(logits[kind].float(), classes[:, index]) for index, kind in enumerate(CLASSES))
    if vectors is None:
        return {"named": named}
    first, second = vectors.float().chunk(2)
    alike = first @ second.T * 16.0  # [P P], a temperature of 1/16
    own = torch.arange(len(first), device=random.device)
    same = (F.cross_entropy(alike, own) + F.cross_entropy(alike.T, own)) / 2
    errors = [(numbers[d].float() - truth[:, :c].repeat(2, 1)).square().mean(1) for d, c in NUMBERS.items()]
    return {"named": 0.5 * named, "same": same, "numbers": torch.where(classes[:, 0] == 0, *errors).mean()}


def _surprise(logits, classes):
    """Returns the mean cross entropy over the pictures [N] whose class is one of the logits' [N classes]."""
    said = classes < logits.shape[1]
    return F.cross_entropy(logits, classes.where(said, -1), ignore_index=-1, reduction="sum") / said.sum().clamp(min=1)


def batches(data, pairs, seed):
    """Yields batches without end: `pairs` identities in whole groups, two different views of each."""
    random = np.random.default_rng(seed)
    groups = len(data["pictures"]) // (GROUP * VIEWS)
    while True:
        order = random.permutation(groups)
        for start in range(0, groups - pairs // GROUP + 1, pairs // GROUP):
            who = (order[start : start + pairs // GROUP, None] * GROUP + np.arange(GROUP)).ravel()
            views = random.random((pairs, VIEWS)).argsort(1)[:, :2]
            index = (who[:, None] * VIEWS + views).T.ravel()
            yield {"pictures": data["pictures"][index], "classes": data["classes"][index],
                   "numbers": data["numbers"][who]}  # fmt: skip


def train(name, steps, count, folder, cats, pairs=64, seed=0, rate=3e-3, every=500, size=64, workers=0, out=None):
    """Trains a judge for `steps` steps and writes OUT/NAME.safetensors: kernels by Muon, all else by AdamW.

    Every `every` steps it also writes the weights to `folder`, next to the drawn pictures.  out: default FOLDER.
    """
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = drawn(count, folder, cats, size=size, workers=workers)
    judge = Judge(size, *JUDGES[size][name]).train().to(device)
    kernels = [part.weight for part in judge.modules() if isinstance(part, Conv)]
    others = [x for x in judge.parameters() if all(x is not kernel for kernel in kernels)]
    optimizers = [
        torch.optim.Muon(kernels, lr=rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, weight_decay=0.02),
    ]
    start, random = time.time(), torch.Generator(device).manual_seed(seed)
    for number, batch in zip(range(steps), batches(data, pairs, seed), strict=False):
        parts = losses(judge, batch, random)
        judge.zero_grad()
        sum(parts.values()).backward()
        for optimizer in optimizers:
            now = rate * min(1.0, (number + 1) / 60) * (0.5 + 0.5 * np.cos(np.pi * number / steps))
            optimizer.param_groups[0]["lr"] = now
            optimizer.step()
        if number % 50 == 0:
            shown = ", ".join(f"{name} {float(value.detach()):.3f}" for name, value in parts.items())
            print(f"step {number}: {shown}; {time.time() - start:.0f} s", flush=True)
        if number % every == every - 1:
            keep(judge, folder / f"{name}.safetensors")
    out = FOLDER if out is None else out
    out.mkdir(parents=True, exist_ok=True)
    keep(judge, out / f"{name}.safetensors")  # only now: programs that measure meanwhile use the old weights
    print(f"{steps} steps of {2 * pairs} pictures in {time.time() - start:.0f} s")


def keep(judge, path):
    """Writes a judge's weights, in float16, and its size."""
    weights = {key: x.half().contiguous().cpu() for key, x in judge.state_dict().items()}
    save_file(weights, path, {"size": str(judge.size)})


@functools.lru_cache(1)
def load(folder=FOLDER):
    """Returns {name: network}, float32, as the other functions take them."""
    found = {}
    for name in JUDGES[64]:
        path = Path(folder) / f"{name}.safetensors"
        with safe_open(path, "pt") as file:
            size = int((file.metadata() or {}).get("size", 64))
        found[name] = Judge(size, *JUDGES[size][name]).eval()
        found[name].load_state_dict(load_file(path))
    return found


def reduced(pictures, size):
    """Returns uint8 pictures [N S S 3] with the side `size`: means over squares of S / size pixels, rounded.

    Raises ValueError for other shapes, and if S is not a multiple of size.
    """
    pictures = np.asarray(pictures)
    side = pictures.shape[1] if pictures.ndim == 4 else 0
    if pictures.dtype != np.uint8 or pictures.shape[1:] != (side, side, 3) or side % size or not side:
        given = f"{pictures.dtype}{list(pictures.shape)}"
        raise ValueError(f"pictures={given}: expected uint8 [N {size} {size} 3], or multiples of {size}")
    tiles = pictures.reshape(len(pictures), size, side // size, size, side // size, 3)
    return pictures if side == size else np.round(tiles.mean((2, 4), dtype=np.float32)).astype(np.uint8)


@torch.inference_mode()
def _run(judge, pictures, rows=128):
    """Yields the network's outputs for every `rows` of uint8 pictures [N S S 3]."""
    for start in range(0, len(pictures), rows):
        part = torch.tensor(reduced(pictures[start : start + rows], judge.size)).permute(0, 3, 1, 2)
        yield judge(part.float() / 127.5 - 1)


def classify(judges, pictures):
    """Returns {kind: words [N]}, the likeliest word of each kind."""
    parts = [logits for logits, _, _ in _run(judges["what"], pictures)]
    best = {kind: np.concatenate([part[kind].argmax(1).numpy() for part in parts]) for kind in CLASSES}
    return {kind: np.array(words)[best[kind]] for kind, words in CLASSES.items()}


def identity(judges, pictures):
    """Returns unit vectors [N 128]; their dot product is the similarity s of two pictures' identities."""
    return np.concatenate([vectors.numpy() for _, vectors, _ in _run(judges["who"], pictures)])


def colors(pictures):
    """Returns unit vectors [N 91] of colours alone: mean colours of 3x3 regions and a colour histogram."""
    x = reduced(pictures, 64)[:, :63, :63].astype(np.float32) / 255
    regions = x.reshape(-1, 3, 21, 3, 21, 3).mean((2, 4)).reshape(len(x), -1)
    level = np.minimum((x * 4).astype(int), 3) @ np.array([16, 4, 1])
    histogram = np.stack([np.bincount(picture.ravel(), minlength=64) for picture in level]) / 63**2
    both = np.concatenate([regions, histogram], 1)
    both = (both - both.mean(0)) / (both.std(0) + 1e-3)
    return both / np.linalg.norm(both, axis=-1, keepdims=True)


def pairs_of(count, first=pocketland.HELDOUT[0], draw=pocketland.draw):
    """Returns uint8 pictures (one, same, other) [count ...]: two renders of an identity and one of another.

    All three share context, style and accessory; pose, expression and light differ.
    """
    one, same, other = [], [], []
    for index in range(count):
        seed = 40_000_000 + 3 * index
        place = pocketland.scene(seed)
        kind = (place.context, place.style, place.accessory)
        who = pocketland.identity(first + 2 * index)
        one.append(draw(who, place))
        same.append(draw(who, pocketland.scene(seed + 1, *kind)))
        other.append(draw(pocketland.identity(first + 2 * index + 1), pocketland.scene(seed + 2, *kind)))
    return np.stack(one), np.stack(same), np.stack(other)


def lineup(trial, size=64, first=pocketland.HELDOUT[0] + 1_000_000, photo=False, draw=pocketland.draw):
    """Returns (pictures asked for, pictures to find), each [size ...], of faces with one hair and skin colour.

    All share one context, style and accessory and differ in pose, expression and light.
    photo: the pictures to find are plain photos in a room instead.
    """
    model = pocketland.identity(first + trial * size)
    people = [pocketland.identity(first + trial * size + i, hair=model, skin=model) for i in range(size)]
    seed = 50_000_000 + 2 * trial * size
    kind = pocketland.scene(seed)
    kind = (kind.context, kind.style, kind.accessory)
    ask = [draw(who, pocketland.scene(seed + 2 * i, *kind)) for i, who in enumerate(people)]
    kind = ("room", "photo", "none") if photo else kind
    find = [draw(who, pocketland.scene(seed + 2 * i + 1, *kind)) for i, who in enumerate(people)]
    return np.stack(ask), np.stack(find)


def found(ask, find):
    """Returns the share of vectors [N D] in `ask` whose nearest vector in `find` has the same number."""
    return float(((ask @ find.T).argmax(1) == np.arange(len(ask))).mean())


def check(count=4000, trials=20, first=pocketland.HELDOUT[0], folder=FOLDER, size=64):
    """Returns the judges' figures on identities from seed `first` on; no training uses the default ones.

    size: side of the drawn pictures.
    """
    draw = functools.partial(pocketland.draw, size=size)
    networks, right, told = load(folder), {kind: 0 for kind in CLASSES}, {kind: 0 for kind in CLASSES}
    people = [pocketland.identity(first + i, "cat" if i % 5 == 4 else "face") for i in range(count)]
    places = [pocketland.scene(60_000_000 + i) for i in range(count)]
    words = classify(networks, np.stack([draw(*both) for both in zip(people, places, strict=True)]))
    for index, both in enumerate(zip(people, places, strict=True)):
        for kind, number in zip(CLASSES, label(*both), strict=True):
            if number < len(CLASSES[kind]):
                told[kind] += 1
                right[kind] += words[kind][index] == CLASSES[kind][number]
    looks = [kind for kind in CLASSES if kind not in SCENE]
    for counts in (right, told):
        counts["all attributes"] = sum(counts[kind] for kind in looks)
    figures = {f"{kind} (of {told[kind]})": round(float(right[kind] / told[kind]), 4) for kind in told}
    one, same, other = (identity(networks, part) for part in pairs_of(count // 8, first, draw))
    figures |= {"s0": round(float((one * other).sum(-1).mean()), 4), "s1": round(float((one * same).sum(-1).mean()), 4)}
    for name, photo in (("same scene", False), ("photo", True)):
        lines = [lineup(trial, first=first + 1_000_000, photo=photo, draw=draw) for trial in range(trials)]
        figures[f"first of 64, {name}"] = round(
            float(np.mean([found(identity(networks, ask), identity(networks, find)) for ask, find in lines])), 4
        )
        figures[f"first of 64, {name}, colours only"] = round(
            float(np.mean([found(colors(ask), colors(find)) for ask, find in lines])), 4
        )
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("task", choices=("train", "check"))
    parser.add_argument("--judge", choices=JUDGES[64], default="what", help="which one to train")
    parser.add_argument("--steps", type=int, default=6000, help="training steps of 128 pictures")
    parser.add_argument("--draw", type=int, default=120_000, help="number of training pictures")
    parser.add_argument("--cats", type=int, default=4, help="every N-th group of identities has cats")
    parser.add_argument("--data", type=Path, default=Path("outputs/judges"), help="folder of the drawn pictures")
    parser.add_argument("--split", choices=SPLITS, default="heldout", help="split that `check` measures")
    parser.add_argument("--size", type=int, choices=JUDGES, default=64, help="side of the pictures in pixels")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw; 0: this one")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the judges' weights")
    parser.add_argument("--count", type=int, default=4000, help="pictures that `check` draws; a line-up per 200")
    options = parser.parse_args()
    if options.task == "train":
        more = {"size": options.size, "workers": options.workers, "out": options.out}
        train(options.judge, options.steps, options.draw, options.data, options.cats, **more)
        if not all((options.out / f"{name}.safetensors").exists() for name in JUDGES[64]):
            return  # the other judge does not exist yet
    first, trials = SPLITS[options.split], max(1, options.count // 200)
    print(json.dumps(check(options.count, trials, first, options.out, options.size), indent=1))


if __name__ == "__main__":
    main()
