"""What the programs of this folder have in common: options, loading, errors in one line, and pictures written."""

import argparse
import re
import secrets
import sys
import time
from pathlib import Path

TASKS = ("text2img", "img2img", "inpaint", "upscale", "controlnet")
# Options that records keep among other words, which are A1111's where it has one.
KEPT = {"hires": "Hires upscale", "hires_steps": "Hires steps", "hires_method": "Hires upscaler", "dtype": "Dtype"}
KEPT |= {"resize": "Resize", "feather": "Feather", "margin": "Margin", "noise_level": "Noise level"}
KEPT |= {"weight": "Weight", "start": "Start", "end": "End", "guess": "Guess", "tile": "Tile"}
KEPT |= {"ema": "EMA", "prediction_type": "Prediction type"}
OF_FILES = ("tokenizer", "ema", "prediction_type")  # what only single files leave open
FILES = {"image": "Image", "mask": "Mask", "control_image": "Control image", "control": "ControlNet"}


def parser(doc, name, guidance=7.5, steps=20, prompt=None):
    """Returns a command line's parser with the options that all tasks share; doc: the program's docstring.

    prompt: the one where none is given; None asks for one.
    """
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.set_defaults(task=name)
    add = made.add_argument
    add("--from-image", metavar="FILE", help="a picture whose settings hold where none are given: makes it again")
    model_options(made)
    add("--prompt", default=None if prompt is None else [prompt], nargs="+", help="one prompt, or several")
    add("--negative-prompt", default="", help="what the pictures should not show")
    add("--seed", type=int, default=0, help="of the first picture; the others count on; -1 for a random one")
    add("--steps", type=int, default=steps, help="denoising steps")
    add("--sampler", default="ddim", help="ddim, euler, dpmpp_2m, ...")
    add("--schedule", default="normal", help="normal, karras, automatic, ...")
    add("--guidance", type=float, default=guidance, help="how strongly the prompt rules; 1 for none")
    add("--size", type=size, help="pixels, 512 or WIDTHxHEIGHT; default: the model's, or the given picture's")
    add("--batch", type=int, default=1, help="pictures per prompt")
    add("--clip-skip", type=int, default=0, help="last layers of the text encoder left out")
    add("--eta", type=float, help="fresh noise, 0 to 1, of samplers that take it")
    add("--rescale", type=float, default=0.0, help="of guidance, 0 to 1: against too strong contrasts")
    add("--guidance-start", type=float, default=0.0, help="fraction of the steps from which on guidance acts")
    add("--guidance-end", type=float, default=1.0, help="fraction of the steps behind which it does not")
    add("--threshold", type=float, default=0.0, help="percentile of dynamic thresholding, such as 0.995; 0 for none")
    add("--threshold-limit", type=float, default=3.0, help="what it never clips, in standard deviations of latents")
    add("--churn", type=float, default=0.0, help="fresh noise of euler and heun, Karras' s_churn over all steps")
    add("--churn-low", type=float, default=0.0, help="the lowest sigma at which that noise comes in, s_tmin")
    add("--churn-high", type=float, default=999.0, help="the highest, s_tmax")
    add("--churn-noise", type=float, default=1.0, help="its standard deviation, s_noise")
    add("--variation-seed", type=int, default=0, help="another seed, of which the pictures get a part; -1: random")
    add(
        "--variation",
        type=float,
        default=0.0,
        help="that part, 0 to 1; then all have one --seed, and this one counts on",
    )
    add(
        "--adapter", nargs="+", action="extend", default=[], metavar="[WORD=]FILE[:STRENGTH]",
        help="LoRA, embeddings or hypernetworks, one or several",
    )  # fmt: skip
    add(
        "--adapters",
        default="adapters",
        help="folder of those that prompts name: <lora:NAME:0.8> <hypernet:NAME:1> and"
        " embeddings' NAMES in --grammar a1111, embedding:NAME in comfyui",
    )
    add("--grammar", default="plain", help="what brackets in prompts mean: plain (nothing), a1111, comfyui")
    add("--weighting", help="how weights in prompts act: a1111, comfyui; default: the grammar's way")
    add("--noise-source", default="jax", help="whose numbers a seed stands for: jax, torch-cpu, philox")
    add("--ensd", type=int, default=0, help="added to the seed for fresh noise, A1111's ENSD")
    output_options(made, name)
    return made


def model_options(made):
    """Adds the options of which model is loaded, and how."""
    add = made.add_argument
    add("--model", default="pocket", help="pocket, a diffusers folder, a single file, a hub id, or random:sd15 ...")
    add("--tokenizer", metavar="FOLDER", help="CLIP's vocab.json and merges.txt, for a single file where no hub is")
    add("--ema", action="store_true", help="the averaged weights of a single file that has both, not the last ones")
    add("--prediction-type", choices=("epsilon", "v_prediction"), help="of a single file; default: found out")
    add("--vae", help="an autoencoder in place of the model's: a file, a diffusers folder or a hub id")
    add("--dtype", default="float32", help="float32, bfloat16, float16")


def output_options(made, name):
    """Adds the options of what is written."""
    made.add_argument("--format", default="png", choices=("png", "jpg", "webp"), help="of the pictures")
    made.add_argument("--public", action="store_true", help="leave texts and names of files out of the records")
    made.add_argument("--out", default=f"outputs/{name}", help="folder")


def picture_options(made, resize=True):
    """Adds the options of tasks that begin with a picture."""
    made.add_argument("--image", required=True, help="the picture to begin with")
    if resize:
        made.add_argument("--resize", default="crop", help="how it gets to --size: crop, fill, stretch")


def size(text):
    """Returns 512, or (height, width) of "WIDTHxHEIGHT"."""
    sides = [int(side) for side in text.lower().split("x")]
    if len(sides) > 2:
        raise ValueError(text)
    return sides[0] if len(sides) == 1 else tuple(reversed(sides))


def main(made, run, arguments=None):
    """Parses the command line, makes pictures by run(options) -> paths, and returns the exit status."""
    options, begin = made.parse_args(arguments), time.monotonic()
    try:
        if options.from_image:
            made.set_defaults(**recorded(options.from_image, options.task))
            options = made.parse_args(arguments)
            if options.model is None:
                raise ValueError(f"--from-image {options.from_image}: not of a built-in model; name it with --model")
        if options.prompt is None:
            made.error("the following arguments are required: --prompt")
        _draw_seeds(options)
        paths = run(options)
    except (ValueError, OSError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    print(f"{len(paths)} pictures in {time.monotonic() - begin:.1f} s: {paths[0].parent}")
    return 0


def _draw_seeds(options):
    """Puts random numbers in the place of seeds -1, as A1111 does, and says which."""
    for name in ("seed", "variation_seed"):
        if getattr(options, name) == -1:
            setattr(options, name, secrets.randbelow(1 << 32))
            if name == "seed" or options.variation:
                print(f"--{name.replace('_', '-')} {getattr(options, name)}")


def recorded(path, task):
    """Returns the options that a picture's record stands for, {name: value}.

    It names no file to open: of models only built-in names hold, and model=None stands for another.
    Raises ValueError for a picture that another program made from more than words.
    """
    from sdjax.service import provenance, records

    record = records.read(path)
    more = record.more
    hires = {"Hires upscale", "Hires resize"} & more.keys()
    made_by = more.get("Task") or ("text2img" if record.strength is None or hires else "img2img")
    if made_by not in ("text2img", task):
        where = f"sample/{made_by}.py" if made_by in TASKS else "another program"
        raise ValueError(f"--from-image {path}: was made by {made_by}; expected {where}, with its files")
    found = {name: getattr(record, name) for name in ("steps", "sampler", "schedule", "guidance", "size", "seed")}
    found |= {name: getattr(record, name) for name in ("eta", "grammar", "weighting", "ensd", *records.NUMBERED)}
    found |= dict(prompt=[record.prompt], negative_prompt=record.negative, clip_skip=record.skip)
    found |= dict(noise_source=record.noise)
    found["variation_seed"], found["variation"] = record.variation or (0, 0.0)
    if provenance.built_in(record.model):
        found["model"] = record.model
    elif record.model or "model" in record.hashes:
        found["model"] = None
    if record.strength is not None:
        found["hires_strength" if hires else "strength"] = record.strength
    for name, word in KEPT.items():
        if word in more:
            values = more[word].lower().split()
            found[name] = list(map(float, values)) if name in ("weight", "start", "end") else values[0]
    if "Hires resize" in more:
        found["hires"] = _scale(path, record.size, more["Hires resize"])
    if "Hires upscaler" in more:
        found["hires_method"] = _hires_method(path, more["Hires upscaler"])
    if more.get("Emphasis", "Original") != "Original":
        said = f"Emphasis: {more['Emphasis']}"
        print(f"note: {path} was made with {said}, which is not here: weights act as in Original", file=sys.stderr)
    return found


def _scale(path, size, resize):
    """Returns how many times A1111's "Hires resize: WIDTHxHEIGHT" enlarges; a side of 0 follows from the other."""
    sides = re.fullmatch(r"(\d+)x(\d+)", resize)
    scales = {int(side) / own for side, own in zip(sides.groups(), reversed(size), strict=True)} if sides else set()
    scales.discard(0)
    if len(scales) != 1:
        said = f"Hires resize {resize} of {size[1]}x{size[0]}"
        raise ValueError(f"--from-image {path}: {said}: expected WIDTHxHEIGHT of the same proportions")
    return scales.pop()


def _hires_method(path, name):
    """Returns our method of A1111's "Hires upscaler", and says where it is not the same."""
    from sdjax.sampling import upscaling

    if name.lower() in upscaling.METHODS:
        return name.lower()
    method = "latent" if name.startswith("Latent") else "lanczos"
    print(f"note: {path} was made with Hires upscaler {name}, which is not here: {method}", file=sys.stderr)
    return method


def load(options, change=lambda sd: sd):
    """Returns the model that the options name, changed, then with adapters, on all devices.

    Compiled programs are kept on disk.
    """
    from sdjax.formats.adapters import attach
    from sdjax.runtime import compile_cache, replicas

    wanted = _taken_apart(options)[1]
    compile_cache.keep()
    sd = attach.attach_all(change(model(options)), options.adapter)
    sd = attach.attach_named(sd, wanted, options.adapters)
    if sd.tokenizer is not None:
        sd = attach.attach_embeddings(sd, _texts(options), options.adapters, options.grammar)
        _say_what_plain_is(sd.tokenizer, options)
    return replicas.spread(sd)


def model(options):
    """Returns the bare model that model_options name.  Raises ValueError that names the option."""
    from sdjax.formats import pipeline

    given = {name: getattr(options, name) for name in (*OF_FILES, "vae") if getattr(options, name)}
    for name in OF_FILES:
        if name in given and not Path(options.model).is_file():
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{flag}: --model {options.model} is no single file such as v1-5.safetensors; expected one"
            )
    try:
        return pipeline.load(options.model, options.dtype, **given)
    except ValueError as error:
        raise ValueError(_with_flags(str(error))) from None


def _say_what_plain_is(tokenizer, options):
    """Says on stderr, once, where the plain grammar reads a prompt otherwise than the web interfaces."""
    if options.grammar != "plain":
        return
    texts = [*options.prompt, options.negative_prompt]
    found = next(filter(None, (re.search(r"<(lora|lyco|hypernet):[^>]*>", text) for text in texts)), None)
    room = tokenizer.length - 2  # begin and end
    longest = max(len(tokenizer.ids(text)) for text in texts)
    if found:
        print(f"note: {found[0]} is read as words; --grammar a1111 attaches the adapter", file=sys.stderr)
    elif longest > room:
        said = f"{longest} tokens, of which the first {room} are read; --grammar a1111 reads them all"
        print(f"note: a prompt of {said}", file=sys.stderr)


def _texts(options):
    """Returns the texts in which embeddings may be named."""
    return [*_taken_apart(options)[0], options.negative_prompt]


def _with_flags(message):
    """Returns an error's message with the options of the command line in place of Python's."""
    for name in ("tokenizer", "vae"):
        message = re.sub(rf"(^| ){name}=", rf"\1--{name} ", message)
    return re.sub("(^|: )ema=True: ", r"\1--ema: ", message)


def prompts(options):
    """Returns the prompts without the adapters that they name, each as often as pictures of it are wanted."""
    return [prompt for prompt in _taken_apart(options)[0] for _ in range(options.batch)]


def _taken_apart(options):
    """Returns (prompts without adapters, the grammars.Wanted that they name, alike in all prompts of a call)."""
    from sdjax.text import grammars

    if options.grammar != "a1111":
        return options.prompt, ()
    texts, wanted = zip(*map(grammars.adapters, options.prompt), strict=True)
    if len(set(wanted)) > 1:
        raise ValueError("--prompt: prompts of one call must name the same adapters; sample/batch.py takes any")
    return list(texts), wanted[0]


def settings(options):
    """Returns the settings of generate.Job that the options name, as a dict."""
    from sdjax.service import records

    count = len(prompts(options))
    # As A1111 does: pictures are variations of one, the other seed counts on.
    seeds = [options.seed] * count if options.variation else range(options.seed, options.seed + count)
    return dict(
        seeds=seeds,
        steps=options.steps,
        guidance=options.guidance,
        sampler=options.sampler,
        schedule=options.schedule,
        negative=options.negative_prompt,
        eta=options.eta,
        skip=options.clip_skip,
        grammar=options.grammar,
        weighting=options.weighting,
        noise_source=options.noise_source,
        ensd=options.ensd,
        variation=(options.variation_seed, options.variation),
        progress=True,
        **{name: getattr(options, name) for name in records.NUMBERED},
    )


def picture(path):
    """Returns an image file's pixels, uint8 [H W 3], upright and over white."""
    from sdjax.images import reading

    return reading.picture(path)


def mask(path):
    """Returns an image file's mask, uint8 [H W], 255 where to paint: its alpha where something is clear, else white."""
    from sdjax.images import reading

    return reading.mask(path)


def write(pictures, options, sd, *, size=None, strength=None, leave_out=()):
    """Writes the pictures with their records into the folder that the options name; returns their paths.

    size: what --size would be, (height, width); None is the pictures' own.  leave_out: options that did nothing.
    """
    from sdjax.sampling import generate
    from sdjax.service import records

    about = {} if options.public else origins(sd, options)
    about["more"] = {"Task": options.task, **kept(options, leave_out), **about.get("more", {})}
    said = [prompt for prompt in options.prompt for _ in range(options.batch)]  # with the adapters that they name
    job = generate.Job(said, **settings(options))
    paths = [Path(options.out) / f"{i:05d}-{seed}.{options.format}" for i, seed in enumerate(job.seeds)]
    for i, (path, made) in enumerate(zip(paths, pictures, strict=True)):
        record = records.of(job, i, size or made.shape[:2], strength=strength, **about)
        records.save(path, made, record, private=not options.public)
    return paths


def kept(options, leave_out):
    """Returns the options that records keep among other words."""
    found = {word: getattr(options, name, None) for name, word in (KEPT | FILES).items() if name not in leave_out}
    if options.dtype == "float32":
        del found["Dtype"]
    for name, word in FILES.items():
        given = getattr(options, name, None)
        found[word] = [Path(file).name for file in (given if isinstance(given, list) else [given] if given else [])]
    return {word: _text(value) for word, value in found.items() if value not in (None, []) and value is not False}


def _text(value):
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def origins(sd, options):
    """Returns the names and hashes of model and adapters, and says on what --from-image differs in them."""
    from sdjax.service import provenance, records

    wanted = _taken_apart(options)[1]
    named = provenance.adapters_named(sd, wanted, _texts(options), options.adapters, options.grammar)
    about = provenance.of(sd, options.model, options.adapter, vae=options.vae, named=named)
    if options.from_image:
        record = records.read(options.from_image)
        for name, found in record.hashes.items():
            if about["hashes"].get(name) != found:
                print(f"note: {options.from_image} was made with {name} {found}, which is not here", file=sys.stderr)
        if "Image" in record.more and not getattr(options, "image", None):
            print(f"note: {options.from_image} was made with {record.more['Image']}: --image", file=sys.stderr)
        wanted, given = (more.get("Adapters", "none") for more in (record.more, about["more"]))
        if wanted != given:
            print(f"note: {options.from_image} was made with adapters {wanted}; given: {given}", file=sys.stderr)
    return about
