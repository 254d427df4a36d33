"""Noise against torch.randn bit for bit, and Philox against its published vectors and torch's CUDA numbers."""

import jax
import numpy as np
import pytest
import torch

import sdjax
from sdjax.diffusion.plan import sample, tabulate
from sdjax.diffusion.wrappers import Guidance
from sdjax.formats import pipeline
from sdjax.sampling import foreign_noise
from sdjax.stable_diffusion import to_pictures
from sdjax.text import conditioning

SHAPES = [(4, 8, 8), (3,), (17,), (2, 3, 5), (16,), (1,), (15,), (4, 16, 24), (33,), (7,)]
SEEDS = [*range(94), 2**31, 2**32 - 1, 2**32 + 7, 2**63 - 1, -1, 123456789012]


def randn(seed, shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).numpy() for shape in shapes]


def same(ours, theirs):
    if "AVX" in torch.backends.cpu.get_cpu_capability():
        np.testing.assert_array_equal(ours, theirs)
    else:  # other code, other roundings
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


def test_torch_cpu_is_torch_bit_for_bit_for_100_seeds_and_shapes():
    """Ten shapes per seed from one generator, in turns of another order: what is kept between draws counts too."""
    assert len(SEEDS) == 100
    for i, seed in enumerate(SEEDS):
        shapes = SHAPES[i % 10 :] + SHAPES[: i % 10]
        for ours, theirs in zip(foreign_noise.draw("torch-cpu", seed, shapes), randn(seed, shapes), strict=True):
            same(ours, theirs)


def test_a_large_draw_has_no_odd_number():
    same(foreign_noise.draw("torch-cpu", 5, [(1 << 20,)])[0], randn(5, [(1 << 20,)])[0])


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, key, words):
    """Source: Random123's kat_vectors, philox 4x32 10."""
    made = foreign_noise.philox4x32(np.array(counter, np.uint32)[:, None], key)[:, 0]
    assert " ".join(f"{word:08x}" for word in made) == words


def test_philox_is_what_torch_gives_on_a_gpu():
    """torch.manual_seed(0); torch.randn(3, 4, device="cuda"): values that A1111 publishes with its emulation."""
    expected = [
        [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
        [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
        [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
    ]
    np.testing.assert_allclose(foreign_noise.draw("philox", 0, [(3, 4)])[0], expected, atol=1e-6)


def box_muller(seed, offset, count):
    """torch's CUDA normals in double precision: the sine half of the first pair of each thread's four words."""
    counter = np.zeros((4, count), np.uint32)
    counter[0], counter[2] = offset, np.arange(count)
    x, y = foreign_noise.philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32)).astype(np.float64)[:2] + 0.5
    return np.sqrt(-2 * np.log(x / 2**32)) * np.sin(2 * np.pi * y / 2**32)


def test_each_draw_of_philox_moves_the_counter_by_one():
    first, second = foreign_noise.draw("philox", 2**40 + 3, [(4, 6), (5, 7)])
    np.testing.assert_allclose(first.reshape(-1), box_muller(2**40 + 3, 0, 24), atol=2e-6)
    np.testing.assert_allclose(second.reshape(-1), box_muller(2**40 + 3, 1, 35), atol=2e-6)
    many = foreign_noise.draw("philox", 9, [(100_000,)])[0]
    assert abs(many.mean()) < 0.02 and abs(many.std() - 1) < 0.01 and np.isfinite(many).all()


@pytest.mark.parametrize("delta", [0, 31337])
def test_start_and_steps_are_what_a1111_and_diffusers_draw(delta):
    """One generator per picture, [c h w]; ENSD starts it anew from another seed after the first draw."""
    seeds, shape, count = [3, 11], (6, 5, 4), 3
    made, fresh = (
        foreign_noise.start("torch-cpu", seeds, shape),
        foreign_noise.steps("torch-cpu", seeds, shape, count, delta),
    )
    assert made.shape == (2, 6, 5, 4) and fresh.shape == (foreign_noise.ROOM, 2, 6, 5, 4)
    for b, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        same(made[b], torch.randn((1, 4, 6, 5), generator=generator)[0].permute(1, 2, 0).numpy())
        generator = torch.Generator().manual_seed(seed + delta) if delta else generator
        for n in range(count):
            same(fresh[n, b], torch.randn((1, 4, 6, 5), generator=generator)[0].permute(1, 2, 0).numpy())
    assert (fresh[count:] == 0).all()


@pytest.mark.parametrize("source", ["torch-cpu", "philox"])
def test_a_seed_gives_its_noise_in_any_batch(source):
    together = foreign_noise.start(source, [1, 2, 3], (4, 4, 4))
    np.testing.assert_array_equal(together[1], foreign_noise.start(source, [2], (4, 4, 4))[0])
    assert together.dtype == np.float32 and np.abs(together[0] - together[1]).max() > 0.1


def test_room_for_steps_is_one_of_few_sizes():
    counts = {foreign_noise.steps("philox", [0], (2, 2, 1), count).shape[0] for count in (1, 60, 65, 130, 300)}
    assert counts == {64, 128, 256, 512}


def test_sampling_draws_the_default_noise_by_itself():
    assert foreign_noise.start("jax", [0], (2, 2, 1)) is foreign_noise.steps("jax", [0], (2, 2, 1), 4) is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # diffusers' own
def test_a_seed_of_diffusers_gives_its_picture(tmp_path):
    """Start and fresh noise from one torch generator per picture, prompts with weights and in two chunks."""
    from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionPipeline

    sd, random = pipeline.load("random:tiny"), np.random.default_rng(3)
    parts = {name: sd.parts[name] for name in ("unet", "vae", "text_encoder")}
    parts = jax.tree.map(np.asarray, parts)  # on the host: nothing to compile per shape
    sd = sd.with_parts(
        **jax.tree.map(lambda x: x + np.float32(0.03) * random.standard_normal(x.shape, np.float32), parts)
    )
    sdjax.save(sd, tmp_path / "model")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "model", low_cpu_mem_usage=False)
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)

    texts, seeds = ["a (photo:1.4) of a [face] on the (beach:0.6), a mosaic of a cat", "a cat"], [5, 2**33 + 1]
    sd, cond, negative = conditioning.condition(sd, texts, ["", "(red:1.2)"], steps=4)
    plan = tabulate(sd.schedule, "euler_a", 4)
    start, fresh = (
        make("torch-cpu", seeds, (16, 16, 4), *n)
        for make, n in ((foreign_noise.start, ()), (foreign_noise.steps, (4,)))
    )
    guided = sd.add(wrappers=Guidance(5.0, negative))

    @jax.jit
    def run(sd, cond, plan, start, fresh):
        z, _ = sample(lambda z, t, i: sd.denoise(z, t, cond, i)[0], start, plan, step_noise=fresh)
        return sd.decode(z)

    ours = to_pictures(run(guided, cond, plan, start, fresh))
    theirs = pipe(
        prompt_embeds=torch.from_numpy(np.array(cond.unet.context)), num_inference_steps=4, guidance_scale=5.0,
        negative_prompt_embeds=torch.from_numpy(np.array(negative.unet.context)), height=32, width=32,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds], output_type="np",
    ).images  # fmt: skip
    assert np.abs(ours.astype(int) - np.round(theirs * 255).astype(int)).max() <= 1
    assert np.abs(ours[0].astype(int) - ours[1]).max() > 8


def test_unknown_source():
    for make in (
        lambda: foreign_noise.start("cuda", [0], (2, 2, 1)),
        lambda: foreign_noise.steps("cuda", [0], (2, 2, 1), 1),
    ):
        with pytest.raises(ValueError, match="noise='cuda': expected one of jax, torch-cpu, philox"):
            make()
