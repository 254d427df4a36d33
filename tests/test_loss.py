"""The diffusion loss on a stand-in model: its formula, its independence of the batch, weights, masks, min-SNR."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.diffusion import noise_schedule
from sdjax.diffusion.loss import LEAST_SNR, debiased, diffusion_loss, snr_weight
from sdjax.diffusion.noise_schedule import Schedule
from sdjax.models.cond import Cond, UNetInputs


@dataclasses.dataclass
class Fake:
    """What the loss asks of a model: `predict(z, t, cond)` is the network."""

    predict: object = staticmethod(lambda z, t, cond: 0.5 * z * cond.unet.context.mean((1, 2))[:, None, None, None])
    schedule: Schedule = Schedule()
    penalty: object = None

    def encode(self, pixels, keys):
        return pixels[:, ::2, ::2] + 0.1 * jax.vmap(lambda k: jax.random.normal(k, (4, 4, 3)))(keys)

    def latents(self, moments, keys):
        mean, std = jnp.split(moments, 2, axis=-1)
        return mean + std * jax.vmap(lambda k: jax.random.normal(k, (4, 4, 2)))(keys)

    def condition(self, ids, skip=0):
        ids = ids["text_encoder"]
        return Cond(UNetInputs(jnp.ones((*ids.shape, 8)) * ids[..., None]))

    def denoise(self, z, t, cond, i=0):
        return self.predict(z, t, cond), {} if self.penalty is None else {"penalty": self.penalty(cond)}


@pytest.fixture
def batch(key):
    k1, k2 = jax.random.split(key)
    return {
        "pixels": jax.random.normal(k1, (6, 8, 8, 3)), "ids": {"text_encoder": jax.random.randint(k2, (6, 5), 0, 3)},
        "index": jnp.arange(10, 16), "weight": jnp.linspace(0.5, 2.0, 6),
    }  # fmt: skip


def rows(batch, select):
    return jax.tree.map(lambda x: x[select], batch)


def test_loss_of_an_example_is_its_own(batch):
    loss = jax.jit(
        lambda batch: diffusion_loss(
            Fake(), batch, jax.random.key(5), weighting=partial(snr_weight, gamma=5.0), noise_offset=0.1
        )[0]
    )
    alone = [loss(rows(batch, slice(i, i + 1))) for i in range(6)]
    np.testing.assert_allclose(loss(batch), np.mean(alone), rtol=1e-6)
    shuffled = rows(batch, np.array([3, 1, 5, 0, 2, 4]))
    np.testing.assert_allclose(loss(shuffled), loss(batch), rtol=1e-6)
    assert len({round(float(x), 6) for x in alone}) == 6
    assert float(loss({**batch, "index": batch["index"] + 1})) != float(loss(batch))


@pytest.mark.parametrize("prediction", noise_schedule.PREDICTIONS)
def test_perfect_predictor_has_no_loss(prediction, batch):
    schedule = Schedule(prediction_type=prediction)
    seen = {}

    def oracle(z_t, t, cond):  # the clean latent is known here: pixels encode without noise
        seen.update(t=t)
        z = batch["pixels"][:, ::2, ::2]
        return noise_schedule.from_x0(schedule, z, z_t, t)

    sd = Fake(predict=oracle, schedule=schedule)
    sd.encode = lambda pixels, keys: pixels[:, ::2, ::2]
    loss, metrics = diffusion_loss(sd, batch, jax.random.key(1))
    assert float(loss) < 1e-6 and float(metrics["error"]) < 1e-6
    assert seen["t"].dtype == jnp.int32 and len(set(seen["t"].tolist())) > 3


def test_weights_penalty_and_metrics(batch):
    ones = {**batch, "weight": jnp.ones(6)}
    base, _ = diffusion_loss(Fake(), ones, jax.random.key(2))
    doubled, _ = diffusion_loss(Fake(), {**batch, "weight": 2 * jnp.ones(6)}, jax.random.key(2))
    np.testing.assert_allclose(doubled, 2 * base, rtol=1e-6)
    without = {name: x for name, x in batch.items() if name != "weight"}
    np.testing.assert_allclose(diffusion_loss(Fake(), without, jax.random.key(2))[0], base, rtol=1e-6)
    sd = Fake(penalty=lambda cond: jnp.arange(6.0))
    loss, metrics = diffusion_loss(sd, ones, jax.random.key(2))
    np.testing.assert_allclose(loss, base + 2.5, rtol=1e-6)
    np.testing.assert_allclose(metrics["penalty"], 2.5)
    np.testing.assert_allclose(metrics["error"], base, rtol=1e-6)


def test_moments_are_drawn_per_example(batch):
    drawn = {name: x for name, x in batch.items() if name != "pixels"}
    drawn["moments"] = jnp.concatenate([jnp.full((6, 4, 4, 2), 3.0), jnp.full((6, 4, 4, 2), 0.1)], -1)
    seen = []
    sd = Fake(
        predict=lambda z, t, cond: seen.append(z) or z, schedule=Schedule(trained_betas=(0.0,), num_train_timesteps=1)
    )
    for select in (slice(0, 6), slice(2, 3)):  # without any noise of the schedule, z_t is the latent
        diffusion_loss(sd, rows(drawn, select), jax.random.key(3))
    assert 0.05 < float(jnp.std(seen[0])) < 0.2 and abs(float(jnp.mean(seen[0])) - 3) < 0.05
    np.testing.assert_allclose(seen[1][0], seen[0][2], rtol=1e-6)


def test_mask_counts_only_its_area(batch):
    def loss(mask=None, predict=Fake.predict):
        masked = batch if mask is None else {**batch, "mask": mask}
        return float(diffusion_loss(Fake(predict=predict), masked, jax.random.key(4))[0])

    top = jnp.zeros((6, 4, 4, 1)).at[:, :2].set(1.0)
    assert loss(top, lambda z, t, cond: z.at[:, 2:].add(1e3)) == loss(top, lambda z, t, cond: z) != loss()
    np.testing.assert_allclose(loss(jnp.full((6, 4, 4, 1), 0.5)), loss(), rtol=1e-5)
    assert loss(jnp.zeros((6, 4, 4, 1))) == 0


def test_min_snr_weights_are_those_of_the_paper():
    t = jnp.array([0, 100, 500, 999])
    alpha_bar = Schedule().alphas_cumprod[np.asarray(t)]
    snr = alpha_bar / (1 - alpha_bar)
    np.testing.assert_allclose(snr_weight(Schedule(), t, 5.0), np.minimum(snr, 5) / snr, rtol=1e-5)
    v = Schedule(prediction_type="v_prediction")
    np.testing.assert_allclose(snr_weight(v, t, 5.0), np.minimum(snr, 5) / (snr + 1), rtol=1e-5)
    np.testing.assert_allclose(snr_weight(Schedule(prediction_type="sample"), t, 5.0), np.minimum(snr, 5), rtol=1e-5)
    for prediction in noise_schedule.PREDICTIONS:
        flat = snr_weight(Schedule(prediction_type=prediction, rescale_betas_zero_snr=True), t, 5.0)
        assert bool(jnp.all(jnp.isfinite(flat)))


def test_debiased_weights_are_finite_at_zero_terminal_snr():
    t = jnp.array([0, 500, 999])
    for prediction in noise_schedule.PREDICTIONS:
        zero = debiased(Schedule(prediction_type=prediction, rescale_betas_zero_snr=True), t)
        assert bool(jnp.all(jnp.isfinite(zero)))
    assert debiased(Schedule(rescale_betas_zero_snr=True), t)[-1] == pytest.approx(LEAST_SNR**-0.5)
    ddpm = Schedule(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    alpha_bar = ddpm.alphas_cumprod[np.asarray(t)]
    snr = np.minimum(alpha_bar / (1 - alpha_bar), 1000)
    np.testing.assert_allclose(debiased(ddpm, t), snr**-0.5, rtol=1e-5)  # not bounded below


def test_noise_offset_is_constant_over_a_channel(batch):
    seen = []
    sd = Fake(predict=lambda z, t, cond: seen.append(z) or z)
    for offset in (0.0, 0.5):
        diffusion_loss(sd, batch, jax.random.key(6), noise_offset=offset)
    shift = seen[1] - seen[0]
    np.testing.assert_allclose(shift, jnp.broadcast_to(shift[:, :1, :1], shift.shape), atol=1e-5)
    assert float(jnp.abs(shift).max()) > 0.05


def test_gradient_flows_to_the_network(batch):
    grad = jax.grad(lambda w: diffusion_loss(Fake(predict=lambda z, t, cond: w * z), batch, jax.random.key(7))[0])(0.3)
    assert np.isfinite(float(grad)) and abs(float(grad)) > 1e-3


def test_times_come_from_a_range(batch):
    seen = []
    sd = Fake(predict=lambda z, t, cond: seen.append(t) or z)
    many = {name: jnp.concatenate([x] * 60) for name, x in {**batch, "ids": batch["ids"]["text_encoder"]}.items()}
    many = {**many, "ids": {"text_encoder": many["ids"]}, "index": jnp.arange(360)}
    for times in ((0.0, 1.0), (0.2, 0.8), (0.5, 0.5001)):
        diffusion_loss(sd, many, jax.random.key(5), times=times)
    whole, part, one = ((int(t.min()), int(t.max())) for t in seen)
    assert whole[0] < 20 and whole[1] > 980 and part[0] in range(200, 215) and part[1] in range(785, 800)
    assert one == (500, 500) and noise_schedule.bounds(Schedule(), (0.9999, 1.0)) == (999, 1000)
    default, _ = diffusion_loss(sd, batch, jax.random.key(5))
    assert float(default) == float(diffusion_loss(sd, batch, jax.random.key(5), times=(0.0, 1.0))[0])
