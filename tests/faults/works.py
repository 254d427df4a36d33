"""The programs that kills.py kills, with the files that they leave and their progress.

work = Run(outside, place)
process = work.start()
work.done()           # {finished piece of work: a value that changes if it is done again}
work.result()         # {name: bytes} at the end
"""

import json
import os
import shutil
import subprocess
import sys
import zlib

import tiny
from PIL import Image
from programs import ROOT

from sdjax.data import store

CLASSES, PICTURES, STEPS = 8, 12, 24
TRAINED = [
    "model=random:tiny", "data.size=32", "data.buckets=2", "data.batch=2", "data.shuffle=true", "preview=0",
    "checkpoint=1", "log=1", f"steps={STEPS}",
]  # fmt: skip
RUNS = {
    "lora": ["method.dropout=0.1"],
    "dreambooth": [
        "data.word=sks dog", "preserve=0", f"class_data.count={CLASSES}", "method.pattern=attn2", "data.batch=4",
    ],
    "controlnet": ["data.dropout=0.5"],
}  # fmt: skip


def photos(folder):
    """Writes five pictures of two shapes with captions of several phrases, unless they exist; returns the folder."""
    if not (folder / "4.txt").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate(tiny.pictures(5, 64)):
            Image.fromarray(picture[:, :40] if i % 2 else picture).save(folder / f"{i}.png")
            (folder / f"{i}.txt").write_text("a face, on the beach, at night, smiling")
    return folder


def tensors(path):
    """Returns the bytes of a safetensors file after its header; the header depends on time and folder."""
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


# Replaces itself with the program in its arguments, which ends with its parent: PR_SET_PDEATHSIG is 1.
WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


class Work:
    """A program and the folder `place` that it fills; programs share `outside`, the files that they only read."""

    def __init__(self, outside, place):
        self.outside, self.place = outside, place
        place.mkdir(parents=True, exist_ok=True)
        self.said = place / "said.txt"

    def start(self):
        """Starts the program, which ends with its parent."""
        env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore"}
        env.pop("XLA_FLAGS", None)
        with self.said.open("a") as said:
            line = [sys.executable, "-c", WITH_PARENT, *self.line()]
            return subprocess.Popen(line, cwd=ROOT, env=env, stdout=said, stderr=said)

    def writing(self):
        """Returns whether the program is writing a file that does not have its final name yet."""
        return any(self.place.rglob(".*saving-*")) or any(self.place.rglob("*orbax-checkpoint-tmp*"))

    def progress(self):
        """Returns a number that grows with the finished work."""
        return len(self.done())

    def lost(self, before):
        """Returns (finished work that is gone, work done twice) since `before`, an earlier result of done()."""
        now = self.done()
        return sorted(set(before) - set(now)), sorted(one for one in before if now.get(one, before[one]) != before[one])


def _identity(path):
    state = path.stat()
    return state.st_ino, state.st_mtime_ns


class Run(Work):
    """A training run: its checkpoints, and the export at its end."""

    recipe = "lora"

    def line(self):
        out, own = self.place / "run", [*TRAINED, *RUNS[self.recipe]]
        own += [f"data.path={photos(self.outside / 'photos')}", f"out={out}"]
        own += [f"class_data.path={self.outside / 'dogs'}"] if self.recipe == "dreambooth" else []
        own += [f"data.cache={self.place / 'cache'}"] if self.recipe != "controlnet" else []
        return ["train/run.py", f"configs/{self.recipe}.py", *own]

    def done(self):
        """Returns {step of the newest checkpoint: 0}; the run may delete older checkpoints."""
        places = (self.place / "run" / "checkpoints").glob("[0-9]*")
        return {max((int(path.name) for path in places if path.name.isdigit()), default=0): 0}

    def progress(self):
        return max(self.done())

    def lost(self, before):
        """Returns ([the step that the run started from], []) if it is before the newest checkpoint's, else ([], [])."""
        (step,) = before
        begun = [line["step"] for line in self._lines() if line.get("event") in ("started", "resumed")]
        lost = [one for one in begun[-1:] if one < step and len(begun) > self.begun]
        return lost, []

    def start(self):
        self.begun = sum(line.get("event") in ("started", "resumed") for line in self._lines())
        return super().start()

    def _lines(self):
        path = self.place / "run" / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def result(self):
        """Returns the losses of all steps and the export's tensors as bytes."""
        losses = {line["step"]: line["loss"] for line in self._lines() if "loss" in line}
        again = {(line["step"], line["loss"]) for line in self._lines() if "loss" in line}
        assert len(losses) == STEPS and len(again) == STEPS, "a step is missing, or had two losses"
        out = self.place / "run"
        files = sorted((out / "export").rglob("*.safetensors"))
        found = {str(path.relative_to(out).with_stem("x")): tensors(path) for path in files}
        return {"losses": json.dumps(sorted(losses.items())).encode(), **found}


class DreamBooth(Run):
    recipe = "dreambooth"

    def start(self):
        drawing = Classes(self.outside, self.outside / "classes")
        drawing.folder = self.outside / "dogs"
        if len(list(drawing.folder.glob("class-*.png"))) < CLASSES:
            assert drawing.start().wait() == 0, drawing.said.read_text()[-2000:]
        return super().start()


class ControlNet(Run):
    recipe = "controlnet"


class Pictures(Work):
    """A list of pictures."""

    def __init__(self, outside, place):
        super().__init__(outside, place)
        self.folder, self.count = place / "pictures", PICTURES

    def line(self):
        jobs = self.outside / "jobs.jsonl"
        rows = [{"prompt": f"a cat {i}", "seed": i, "size": "32x32", "steps": 3} for i in range(PICTURES)]
        jobs.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return ["sample/batch.py", str(jobs), "--out", str(self.folder), "--model", "random:tiny", "--batch", "2"]

    def done(self):
        """Returns {name of a picture with a record: its file's identity}."""
        records = [path for path in self.folder.glob("*.json") if path.with_suffix(".png").exists()]
        return {path.stem: _identity(path.with_suffix(".png")) for path in records}

    def result(self):
        found = {path.name: path.read_bytes() for path in self.folder.glob("*.png")}
        assert len(found) == self.count and not (self.folder / "errors.jsonl").exists(), sorted(found)
        return found


class Classes(Pictures):
    """Class pictures of DreamBooth."""

    def __init__(self, outside, place):
        super().__init__(outside, place)
        self.folder, self.count = place / "dogs", CLASSES

    def line(self):
        own = [*TRAINED, *RUNS["dreambooth"], f"data.path={photos(self.outside / 'photos')}"]
        given = [*own, f"class_data.path={self.folder}", "--batch", "1", "--set", "steps=3"]
        return ["train/class_images.py", "configs/dreambooth.py", *given]


class Cache(Work):
    """The cache of a run's pictures and prompts, filled before the run."""

    def line(self):
        own = [*TRAINED, *RUNS["lora"], f"data.path={photos(self.outside / 'photos')}", "epochs=4"]
        return ["train/cache.py", "configs/lora.py", *own, f"data.cache={self.place / 'cache'}"]

    def _records(self):
        """Yields (file and key, bytes) of each complete record."""
        for path in sorted(self.place.glob("cache/*.records")):
            data, at = path.read_bytes(), len(store.MAGIC)
            while at + store.HEAD.size <= len(data):
                name, length, _, _ = store.HEAD.unpack_from(data, at)
                end = at + store.HEAD.size + length
                if end > len(data):
                    break
                yield f"{path.name} {name.hex()}", data[at:end]
                at = end

    def done(self):
        return {name: zlib.crc32(data) for name, data in self._records()}

    def result(self):
        every = list(self._records())
        assert len(every) == len(dict(every)) > 0, "a record is there twice"
        return dict(every)


class Conversion(Work):
    """The conversion of a model to a folder, over another model."""

    ending = ""

    def line(self):
        source, old = self.outside / "model", self.outside / "old"
        for place, dtype in ((source, "float16"), (old, "float32")):
            if not place.exists():
                made = [sys.executable, "-m", "sdjax.convert", "random:tiny", str(place), "--dtype", dtype]
                subprocess.run(made, cwd=ROOT, check=True, capture_output=True)
        self.target = self.place / f"model{self.ending}"
        if not self.ending and not self.target.exists():
            shutil.copytree(old, self.target)
        return ["-m", "sdjax.convert", str(source), str(self.target)]

    def done(self):
        return {}

    def lost(self, before):
        """Returns (["model"], []) unless the old or the new model is there, complete; else ([], [])."""
        if not self.target.exists():
            return ([] if self.ending else ["model"]), []
        old, new = (self.outside / name / "unet" / "diffusion_pytorch_model.safetensors" for name in ("old", "model"))
        if self.ending:
            return ([] if len(tensors(self.target)) > new.stat().st_size else ["model"]), []
        sizes = {path.stat().st_size for path in self.target.glob("unet/*.safetensors")}
        whole = sizes in ({old.stat().st_size}, {new.stat().st_size})
        return ([] if whole and (self.target / "vae" / "config.json").exists() else ["model"]), []

    def result(self):
        if self.ending:
            return {"numbers": tensors(self.target)}
        files = [path for path in self.target.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.target)): path.read_bytes() for path in files}


class SingleFile(Conversion):
    ending = ".safetensors"


# How many of 30 kills each program gets.
WORKS = {
    Run: 9, DreamBooth: 3, ControlNet: 3, Pictures: 5, Classes: 3, Cache: 3, Conversion: 2, SingleFile: 2,
}  # fmt: skip
assert sum(WORKS.values()) == 30
