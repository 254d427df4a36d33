"""Makes a picture four times as large, with Stable Diffusion's x4 upscaler or, without words, with LDM-SR.

python sample/upscale.py --model X4_FOLDER --image small.png --prompt "a white cat"
python sample/upscale.py --model X4_FOLDER --image small.png --prompt "" --preset 64-256
python sample/upscale.py --model LDM-SR.ckpt --image small.png --eta 1
"""

import sys

import options as common

PRESETS = {"64-256": 64, "128-512": 128}  # the sizes of the original super-resolution, and of the upscaler's training


def parser():
    """Returns the command line's parser."""
    made = common.parser(__doc__, "upscale", guidance=9.0, steps=75, prompt="")
    common.picture_options(made)
    add = made.add_argument
    add("--noise-level", type=int, default=20, help="0 to 350, noise put on the small picture: more invents more")
    add("--preset", choices=PRESETS, help="bring the picture to the first size, make the second of it")
    add("--tile", type=int, help="do squares of so many small pixels one after the other")
    return made


def run(options):
    """Writes the pictures that the options ask for and returns their paths."""
    from sdjax.sampling import upscaling

    sd, picture = common.load(options), common.picture(options.image)
    task = dict(size=options.size, resize=options.resize, tile=options.tile)
    if options.preset:
        task["size"] = PRESETS[options.preset]
    prompts, wordless = common.prompts(options), "text_encoder" not in sd.parts
    if not wordless:
        task["noise_level"] = options.noise_level
        made = upscaling.upscale(sd, prompts, picture, **task, **common.settings(options))
    else:
        if any((*prompts, options.negative_prompt)):
            raise ValueError(f"--prompt {' '.join(options.prompt)!r}: LDM-SR reads no words; expected none")
        options.guidance = 1.0
        made = upscaling.super_resolve(sd, [picture] * len(prompts), **task, **common.settings(options))
    size = [side // sd.factor for side in made.shape[1:3]]
    return common.write(made, options, sd, size=size, leave_out=("noise_level",) if wordless else ())


if __name__ == "__main__":
    sys.exit(common.main(parser(), run))
