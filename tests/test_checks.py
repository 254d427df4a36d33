"""What a run refuses before it begins: words that nobody trains or says, models and losses that do not fit."""

import dataclasses

import jax
import numpy as np
import pytest
from programs import photo

from sdjax import trees
from sdjax.data.batches import Data
from sdjax.data.sources.drawn import Pocketland
from sdjax.formats import pipeline
from sdjax.methods.chain import Chain
from sdjax.methods.clip import Clip
from sdjax.methods.e4t import E4T
from sdjax.methods.full import Full
from sdjax.methods.lora import Lora
from sdjax.methods.textual_inversion import TextualInversion
from sdjax.methods.vae import Vae
from sdjax.training.begin import begin, task_of
from sdjax.training.settings import Train

DATA = Data(path="pocketland", size=32, batch=4, source=Pocketland(count=16))
RUN = Train(model="random:tiny", data=DATA)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(method=TextualInversion("<cat>")),
            "data.word='<new>': expected the word that the method trains: '<cat>'",
        ),
        (dict(method=Chain((TextualInversion("<cat>"), Full(("unet",))))), "data.word='<new>'"),
    ],
)
def test_a_word_that_nobody_trains_is_refused(changes, message):
    settings = dataclasses.replace(RUN, data=dataclasses.replace(DATA, word="<new>"))
    with pytest.raises(ValueError, match=message):
        begin(dataclasses.replace(settings, **changes))
    begin(dataclasses.replace(settings, method=TextualInversion("<new>")))


def test_a_word_that_no_prompt_holds_is_refused(tmp_path):
    photo(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a face")
    data = Data(path=str(tmp_path), size=32, word="<new>")
    settings = dataclasses.replace(RUN, method=TextualInversion("<new>"), data=data)
    with pytest.raises(ValueError, match="data.word='<new>': no prompt holds '<new>', which the method trains"):
        begin(settings)
    (tmp_path / "a.txt").write_text("a photo of <new>")
    begin(settings)


def test_models_that_the_loss_is_not_for_are_refused():
    sd = pipeline.load("random:tiny")
    wide = sd.networks["unet"].clone(config=dataclasses.replace(sd.networks["unet"].config, in_channels=8))
    wide = sd.with_networks(unet=wide)
    with pytest.raises(
        ValueError, match="task='': expected a model for one of .*; its UNet takes 8 channels, a latent"
    ):
        task_of(RUN, wide)
    assert task_of(dataclasses.replace(RUN, method=Vae()), wide).name == "text2img"  # whose loss reads no UNet


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(method=Full(("vae",))), r"method.parts=\('vae',\): expected parts that the diffusion loss trains: unet"),
        (dict(method=Full(("image_encoder",))), "method.parts"),
        (dict(method=Vae(), min_snr=5.0), "min_snr=5.0: expected none: Vae has its own loss, which ignores it"),
        (dict(method=Clip(), noise_offset=0.1), "noise_offset=0.1: expected none: Clip"),
        (dict(method=Vae(), data=dataclasses.replace(DATA, mask=True)), "data.mask=True: expected none: Vae"),
    ],
)
def test_methods_and_losses_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        begin(dataclasses.replace(RUN, **changes))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Vae(critic=-1.0), "critic=-1.0: expected a number from 0"),
        (lambda: Vae(critic_layers=0), "critic_layers=0: expected a number from 1"),
        (lambda: E4T(penalty=-1.0), "penalty=-1.0: expected a number from 0"),
    ],
)
def test_numbers_of_methods_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_critic_of_five_layers_is_made_whatever_the_pictures():
    trained, _ = Vae(critic=0.5, critic_channels=2, critic_layers=5).split(
        pipeline.load("random:tiny"), jax.random.key(0)
    )
    assert trained["critic"]


def test_a_seed_counts_with_all_of_its_bits():
    def noise(seed):
        settings = dataclasses.replace(RUN, method=Lora(rank=2, targets=r"attn2\.to_k"), seed=seed)
        trained, *_ = begin(settings, pictures=False)
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(trained)])

    assert not np.array_equal(noise(2**32), noise(0))
    for seed in (0, 2**31, 2**32 - 1):  # as before seeds of more bits counted
        np.testing.assert_array_equal(
            jax.random.key_data(trees.seed_key(seed)), jax.random.key_data(jax.random.key(np.uint32(seed)))
        )
