"""Makes frames on the way from one seed and prompt to another, and a moving picture of them.

python sample/interpolate.py --model pocket --prompt "a photo of a face" --seed 1 --to-seed 2 --frames 16
python sample/interpolate.py --model pocket --prompt "a photo of a cat" "a photo of a dog" --frames 16 --at-once 8
"""

import sys
from pathlib import Path

import options as common


def parser():
    """Returns the command line's parser."""
    made = common.parser(__doc__, "interpolate")
    add = made.add_argument
    add("--to-seed", type=int, help="the seed of the last frame; default: the first one's")
    add("--frames", type=int, default=16, help="how many pictures, both ends with them")
    add("--at-once", type=int, default=4, help="how many of them are made together")
    add("--milliseconds", type=int, default=100, help="that the moving picture, moving.webp, shows each frame")
    return made


def run(options):
    """Writes the frames and their moving picture; returns the frames' paths."""
    from PIL import Image

    from sdjax.sampling import generate

    texts = common.prompts(options)
    if options.batch != 1 or len(texts) > 2:
        raise ValueError(f"--prompt: {len(texts)} with --batch {options.batch}; expected one or two, and --batch 1")
    if options.milliseconds < 1:
        raise ValueError(f"--milliseconds={options.milliseconds}: expected 1 or more")
    settings = common.settings(options)
    settings["seeds"] = (options.seed, options.seed if options.to_seed is None else options.to_seed)
    sd, task = common.load(options), dict(size=options.size, at_once=min(options.at_once, options.frames))
    made = generate.interpolate(sd, (texts[0], texts[-1]), options.frames, **task, **settings)
    paths = write(made, options, sd, settings)
    first, *others = map(Image.fromarray, made)
    moving = dict(save_all=True, append_images=others, duration=options.milliseconds, loop=0)
    first.save(Path(options.out) / "moving.webp", **moving)
    return paths


def write(frames, options, sd, settings):
    """Writes the frames, each with the record of the first and its place; returns their paths."""
    from sdjax.sampling import generate
    from sdjax.service import records

    (first, last), said = settings["seeds"], options.prompt
    about = {} if options.public else common.origins(sd, options)
    job, paths = generate.Job(said[:1], **{**settings, "seeds": first}), []
    for i, frame in enumerate(frames):
        more = {"Task": options.task, "Frame": f"{i + 1}/{len(frames)}", "To seed": f"{last}"}
        more |= {} if options.public or len(said) == 1 else {"To prompt": said[1]}
        more |= common.kept(options, ()) | about.get("more", {})
        record = records.of(job, 0, frame.shape[:2], **{**about, "more": more})
        paths.append(Path(options.out) / f"{i:05d}.{options.format}")
        records.save(paths[-1], frame, record, private=not options.public)
    return paths


if __name__ == "__main__":
    sys.exit(common.main(parser(), run))
