"""A run's range of times and its noise schedule: checked, told in the file, and followed by sampling."""

import dataclasses

import numpy as np
import pytest
import safetensors
import tiny
from diffusers import DDIMScheduler

import sdjax
from sdjax.data.batches import Data
from sdjax.data.sources.drawn import Pocketland
from sdjax.diffusion.plan import tabulate
from sdjax.methods.clip import Clip
from sdjax.methods.full import Full
from sdjax.methods.lora import Lora
from sdjax.settings import SettingError
from sdjax.training import facts, run_folder
from sdjax.training.begin import begin
from sdjax.training.settings import Train

RUN = Train(
    model="random:tiny", method=Full(("unet",), "conv_out"),
    data=Data(path="pocketland", size=32, batch=2, source=Pocketland(count=2)),
)  # fmt: skip


def exported(settings, out):
    """Returns the path that a run of no steps writes."""
    trained, frozen, _, _ = begin(settings)
    return run_folder.export(settings.method, frozen, trained, out / "export", **facts.told(settings, out, 0))[0]


def test_an_exported_model_keeps_its_zero_terminal_snr(tmp_path):
    sdjax.save(tiny.model("v_prediction"), tmp_path / "v")
    run = dataclasses.replace(RUN, model=str(tmp_path / "v"), zero_snr=True)
    assert sdjax.load(tmp_path / "v").schedule.alphas_cumprod[-1] > 1e-3
    folder = exported(run, tmp_path)
    theirs = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    ours = sdjax.load(folder).schedule
    assert ours.alphas_cumprod[-1] == 0
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.numpy(), atol=1e-5)
    theirs.set_timesteps(5)
    np.testing.assert_array_equal(tabulate(ours, "ddim", 5).t[:5], theirs.timesteps.numpy())
    assert theirs.timesteps[0] == 999


def test_files_tell_the_range_of_times(tmp_path):
    run = dataclasses.replace(RUN, method=Lora(rank=2))
    for settings, told in ((run, None), (dataclasses.replace(run, times=(0, 0.8)), "0,800")):
        with safetensors.safe_open(exported(settings, tmp_path / str(told)), "np") as file:
            said = file.metadata()
        assert said.get("modelspec.timestep_range") == told and said["ss_zero_terminal_snr"] == "False"


def test_what_does_not_fit_is_refused():
    for times in ((0.5, 0.5), (-0.1, 1), (0, 1.5)):
        with pytest.raises(SettingError, match="times=.*: expected two rising shares from 0 to 1"):
            Train(times=times)
    with pytest.raises(SettingError, match="zero_snr=True: expected False with prediction_type=epsilon"):
        begin(dataclasses.replace(RUN, zero_snr=True))
    with pytest.raises(SettingError, match=r"times=\(0, 0.8\): expected \(0.0, 1.0\): Clip has its own loss"):
        begin(dataclasses.replace(RUN, method=Clip(), times=(0, 0.8)))
