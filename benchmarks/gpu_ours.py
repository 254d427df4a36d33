"""The jobs of benchmarks/gpu.py that measure sdjax: pictures, training steps, E4T from a photo to pictures.

A job is a function of gpu.py's options.  It loads, compiles and computes once beside other jobs, is then timed alone,
and prints its rows.
"""

import functools
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from gpu_clock import median, phase, say, since_start
from gpu_flags import FLAGS
from PIL import Image

import sdjax
from sdjax import settings, trees
from sdjax.formats import pipeline
from sdjax.models.cond import Cond, UNetInputs
from sdjax.models.layers import GroupNorm
from sdjax.runtime import mesh
from sdjax.sampling import tiles
from sdjax.tasks.text2img import TextToImage
from sdjax.training import begin, optim, step

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
BFLOAT16 = ["compute=bfloat16", "frozen=bfloat16", "remat=false"]
WORD = "a"  # random models have a vocabulary of letters
CAPTIONS = "data.templates=captions"  # for recipes whose templates do not contain the word
RECIPES = {  # name of the row: recipe, batch in multiples of --rows, further settings
    "training step, full": ("full.py", 1, [CAPTIONS, "data.dropout=0"]),
    "training step, LoRA": ("lora.py", 1, [CAPTIONS]),
    "training step, DreamBooth": ("dreambooth.py", 1, []),
    "training step, ControlNet": ("controlnet.py", 1, [CAPTIONS]),
    "training step, E4T pretrain": ("e4t_pretrain.py", 2, [f"method.domain={WORD}"]),
    "training step, E4T tune": ("e4t_tune.py", 2, ["init=''", f"method.parts.0.domain={WORD}"]),
}
FIRST = {  # rows whose first step is measured too: the name of its row
    "training step, full": "first training step",
    "training step, E4T tune": "first E4T step",
}


class Compiled:
    """Counts this process's compilations, their seconds, and the programs that came from the cache."""

    def __init__(self):
        self.seconds = self.count = self.hits = 0
        jax.monitoring.register_event_duration_secs_listener(self._timed)
        jax.monitoring.register_event_listener(self._happened)

    def _timed(self, event, duration, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            self.seconds, self.count = self.seconds + duration, self.count + 1

    def _happened(self, event, **about):
        self.hits += event == "/jax/compilation_cache/cache_hits"

    def figures(self):
        """Returns the counts so far."""
        return {"compiled_s": self.seconds, "programs": self.count, "from_cache": self.hits}


@functools.cache
def compiled() -> Compiled:
    """Returns this process's only listener."""
    return Compiled()


def device():
    """Returns the device and JAX's version, for a row."""
    first = jax.devices()[0]
    return {"device": f"{jax.device_count()} x {first.device_kind}", "jax": jax.__version__}


def peak():
    """Returns the peak of the device's memory in GB (10^9 bytes), None if the device does not report it."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats["peak_bytes_in_use"] / 1e9 if "peak_bytes_in_use" in stats else None


# ---- pictures ----------------------------------------------------------------------------------


def pictures(options):
    """Measures text-to-image, the UNet, the decoder and a group norm; also the first picture since the start."""
    count = compiled()
    with phase("compile"):
        began = since_start()
        sd = jax.block_until_ready(pipeline.load(options.model, "bfloat16"))
        loaded = since_start() - began  # the most that compiling during the load could save
        draw(sd, 1, options)
        say("first picture", seconds=since_start(), loaded_s=loaded, warm=options.warm, **device(), **count.figures())
        if options.warm:
            return
        draw(sd, options.rows, options)
        network, decoder = unet_call(sd, options), decode_call(sd, options)
        norm, copy = norm_calls(sd, options)
    with phase("time"):
        for rows in (1, options.rows):
            seconds = median(lambda rows=rows: draw(sd, rows, options))
            say(f"text2img, batch {rows}", seconds=seconds, steps_s=options.steps / seconds, peak_GB=peak())
        say("UNet call", seconds=median(network, 10), rows=2 * options.rows)
        say("VAE decode", seconds=median(decoder, 5), rows=options.rows)
        say("group norm and silu", seconds=median(norm, 20), copy_s=median(copy, 20), rows=2 * options.rows)
        say("text2img, loop from the host", seconds=median(lambda: draw(sd, 1, options, watch=lambda progress: None)))


def flagged(options):
    """Measures text-to-image, and compiling it, in a process with other XLA flags."""
    count = compiled()
    with phase("compile"):
        sd = pipeline.load(options.model, "bfloat16")
        for rows in (1, options.rows):
            draw(sd, rows, options)
    name = options.job.partition(", ")[2]
    with phase("time"):
        for rows in (1, options.rows):
            seconds, speed = median(lambda rows=rows: draw(sd, rows, options)), options.steps
            figures = {"steps_s": speed / seconds, "peak_GB": peak(), "flags": FLAGS[options.job]}
            say(f"text2img, batch {rows}, {name}", seconds=seconds, **figures, **count.figures())


def draw(sd, rows, options, prompt=f"{WORD} photo", **more):
    """Returns `rows` pictures, with the seeds 0, 1, 2, ..."""
    return sdjax.text2img(
        sd, [prompt] * rows, seeds=list(range(rows)), steps=options.steps, guidance=7.5, size=options.size, **more
    )


def unet_call(sd, options):
    """Returns a compiled call of the UNet alone, on the batch of guidance: twice the rows."""
    rows, side = 2 * options.rows, options.size // sd.factor
    config = sd.networks["unet"].config
    z = jnp.ones((rows, side, side, config.in_channels))
    cond = Cond(UNetInputs(jnp.ones((rows, 77, config.cross_attention_dim), jnp.bfloat16)))
    run = jax.jit(lambda sd, z, t, cond: sd.predict(z, t, cond)).lower(sd.bare, z, jnp.full(rows, 500.0), cond)
    run, given = run.compile(), (sd.bare, z, jnp.full(rows, 500.0), cond)

    def call():
        jax.block_until_ready(run(*given))

    call()
    return call


def norm_calls(sd, options):
    """Returns two compiled calls: a group norm with silu on the UNet's largest map, and a copy of the map.

    If the first takes two or three times as long as the second, XLA fuses the silu into the norm.  A fused norm reads
    its map two or three times and writes it once.
    """
    config, side = sd.networks["unet"].config, options.size // sd.factor
    x = jnp.ones((2 * options.rows, side, side, config.block_out_channels[0]), jnp.bfloat16)
    network = GroupNorm(config.norm_num_groups, config.norm_eps, jnp.bfloat16)
    params = network.init(jax.random.key(0), x)
    norm, copy = jax.jit(lambda params, x: jax.nn.silu(network.apply(params, x))), jax.jit(lambda x: -x)

    def both():
        jax.block_until_ready(norm(params, x))

    def once():
        jax.block_until_ready(copy(x))

    both()
    once()
    return both, once


def decode_call(sd, options):
    """Returns a compiled call of the decoder for all pictures of a batch."""
    side = options.size // sd.factor
    z = jnp.ones((options.rows, side, side, sd.networks["vae"].config.latent_channels))

    def call():
        jax.block_until_ready(tiles.decode(sd.bare, z))

    call()
    return call


# ---- training ----------------------------------------------------------------------------------


def run_settings(name, options, folder):
    """Returns the settings of the run that a row measures."""
    recipe, times, more = RECIPES[name]
    path = folder / "0.png" if recipe == "e4t_tune.py" else folder
    given = [f"model={options.model}", f"data.path={path}", f"data.size={options.size}"]
    given += [f"data.batch={times * options.rows}", *[f"vision={options.vision}"] * recipe.startswith("e4t")]
    return settings.load(CONFIGS / recipe, [*given, *more, *BFLOAT16])


def photos(folder, options, count=8):
    """Writes random pictures with captions."""
    random = np.random.default_rng(0)
    for i in range(count):
        picture = random.integers(0, 256, (options.size, options.size, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"{WORD} photo")


def stacked(data, first):
    """Returns a batch of consecutive examples, as data.iterate prepares them but without grain."""
    rows = [data._example(first + i) for i in range(data.rows)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


class Run:
    """A recipe's run before its first step: state, frozen weights, batches, and the compiled step."""

    def __init__(self, name, options):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            photos(folder, options)
            self.settings = run_settings(name, options, folder)
            trained, self.frozen, data, _ = begin.begin(self.settings)
            self.batches = [stacked(data, i * data.rows) for i in range(4)]
        tx, evaluate = optim.optimizer(self.settings.optim, self.settings.steps)
        self.trained = trees.count(trained)
        self.state = step.initial_state(trained, tx, self.settings.ema)
        function = step.of_run(self.settings, tx, evaluate, TextToImage())
        _, jitted = mesh.compile(function, "single", self.settings.data.batch)
        start = time.perf_counter()
        traced = jitted.trace(self.state, self.frozen, self.batches[0])
        middle = time.perf_counter()
        lowered = traced.lower()
        end = time.perf_counter()
        self.step = lowered.compile()
        self.stages = {"trace_s": middle - start, "lower_s": end - middle, "compile_s": time.perf_counter() - end}

    def advance(self, n):
        """Starts a step and returns its metrics without waiting for them."""
        self.state, metrics = self.step(self.state, self.frozen, self.batches[n % len(self.batches)])
        return metrics

    def steps(self, count):
        """Runs `count` steps; returns (seconds per step, seconds per step until the host was done)."""
        jax.block_until_ready(self.state)
        start = time.perf_counter()
        for n in range(count):
            metrics = self.advance(n)
        host = time.perf_counter() - start
        float(metrics["loss"])
        return (time.perf_counter() - start) / count, host / count

    def dispatch(self):
        """Returns the median seconds of a call on an idle device: Python, trees and the launch of all kernels."""
        times = []
        for n in range(5):
            jax.block_until_ready(self.state)
            start = time.perf_counter()
            self.advance(n)
            times.append(time.perf_counter() - start)
        return sorted(times)[2]

    def nothing(self):
        """Returns the median seconds of a call with the same trees but no kernels: the cost of Python and the trees."""
        empty = jax.jit(lambda state, frozen, batch: (state, state["step"] + 0), donate_argnums=0)
        times = []
        for n in range(6):
            start = time.perf_counter()
            self.state, _ = empty(self.state, self.frozen, self.batches[n % len(self.batches)])
            times.append(time.perf_counter() - start)
            jax.block_until_ready(self.state)
        return sorted(times[1:])[2]


def training(name, options):
    """Measures a recipe's step; for the recipes in FIRST also the first step since the start of the process."""
    count = compiled()
    with phase("compile"):
        run = Run(name, options)
        float(run.advance(0)["loss"])
        if name in FIRST:
            say(FIRST[name], seconds=since_start(), warm=options.warm, **run.stages, **count.figures())
        if options.warm:
            return
        run.steps(1)
        if name == "training step, E4T tune":
            tuned = joined(run)
            draw(tuned, 4, options, prompt=f"{WORD} photo of *s")
    with phase("time"):
        seconds, host = run.steps(10)
        rows = run.settings.data.batch
        python = {"host_s": host, "dispatch_s": run.dispatch(), "python_s": run.nothing()}
        python["leaves"] = len(jax.tree.leaves((run.state, run.frozen)))
        say(name, seconds=seconds, rows=rows, peak_GB=peak(), trained=run.trained, **run.stages, **python)
        if name == "training step, E4T tune":
            start = time.perf_counter()
            run.steps(15)
            tuning = time.perf_counter() - start
            draw(joined(run), 4, options, prompt=f"{WORD} photo of *s")
            say("E4T: 15 steps and 4 pictures", seconds=time.perf_counter() - start, tuning_s=tuning)


def joined(run):
    """Returns the model with a run's trained weights, ready to sample."""
    return run.settings.method.join(run.frozen, run.state["trained"])


JOBS = {
    "pictures": pictures,
    **dict.fromkeys(FLAGS, flagged),
    **{name: functools.partial(training, name) for name in RECIPES},
}
