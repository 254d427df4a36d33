"""Makes pictures from words.

python sample/text2img.py --model pocket --prompt "a photo of a face on the beach" --seed 1 --batch 4
"""

import sys

import options as common


def parser():
    """Returns the command line's parser."""
    made = common.parser(__doc__, "text2img")
    made.add_argument(
        "--image", help="a picture of the subject, for a model with an E4T encoder; the prompt names it by its word, *s"
    )
    made.add_argument("--hires", type=float, help="enlarge so many times and paint over (hires fix)")
    made.add_argument("--hires-strength", type=float, default=0.7, help="of painting over")
    made.add_argument("--hires-steps", type=int, help="of painting over; default: as many as before")
    made.add_argument("--hires-method", default="latent", help="how to enlarge: latent, lanczos")
    return made


def run(options):
    """Writes the pictures that the options ask for and returns their paths."""
    from sdjax.formats import pipeline
    from sdjax.formats.adapters import e4t
    from sdjax.images import reading
    from sdjax.sampling import generate, upscaling

    def personalised(sd):
        if options.image is None:
            return sd
        size = generate.latent_shape(sd)[0] * sd.factor
        picture = reading.subject(options.image, size)
        return e4t.personalise(sd, pipeline.locate(options.model), picture)

    sd = common.load(options, personalised)
    job = dict(prompts=common.prompts(options), size=options.size, **common.settings(options))
    if options.hires is None:
        unused = ("hires", "hires_steps", "hires_method")
        return common.write(generate.text2img(sd, **job), options, sd, leave_out=unused)
    larger = dict(scale=options.hires, strength=options.hires_strength, method=options.hires_method)
    made = upscaling.hires(sd, **job, **larger, hires_steps=options.hires_steps)
    small = [side * sd.factor for side in generate.latent_shape(sd, options.size)[:2]]
    return common.write(made, options, sd, size=small, strength=options.hires_strength)


if __name__ == "__main__":
    sys.exit(common.main(parser(), run))
