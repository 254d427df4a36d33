"""What is asked of a run while it trains, held-out pictures, epochs, and exports on the way."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from programs import photo

from sdjax.data import batches
from sdjax.data.batches import Data
from sdjax.data.sources.drawn import Pocketland
from sdjax.formats import pipeline
from sdjax.images import grid
from sdjax.methods.textual_inversion import TextualInversion
from sdjax.training import export, preview, prompt_lines, validation
from sdjax.training.asked import Asked
from sdjax.training.loop import train
from sdjax.training.optim import Optim
from sdjax.training.settings import Train

DATA = Data(path="pocketland", size=32, batch=4, source=Pocketland(count=16), word="<new>")
RUN = Train(
    model="random:tiny", method=TextualInversion("<new>", "face"), data=DATA, optim=Optim(lr=1e-2), steps=4,
    checkpoint=0, log=1, prompts=("[name]",), preview=0,
)  # fmt: skip


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def events(out):
    return [(line["step"], line["event"]) for line in lines(out) if "event" in line]


@pytest.fixture
def drops(monkeypatch):
    """A file dropped into the run's folder before the step of its number is over."""

    def drop(folder, **at):
        steps = {}
        now = Asked.now

        def dropping(asked, together=True):
            steps["n"] = steps.get("n", 0) + 1
            for name, step in at.items():
                if step == steps["n"]:
                    (folder / name.replace("_", "-")).touch()
            return now(asked, together)

        monkeypatch.setattr(Asked, "now", dropping)

    return drop


def test_files_in_the_folder_are_obeyed_once_and_removed(tmp_path, drops, monkeypatch):
    out = tmp_path / "run"
    out.mkdir()
    shown = []
    monkeypatch.setattr(preview, "write", lambda path, *_: shown.append(path.name))
    drops(out, sample_now=1, save_now=2, stop=3)
    train(dataclasses.replace(RUN, steps=6), out)
    assert shown == ["0000001.png"]
    assert [path.name for path in (out / "exports").iterdir()] == ["0000002"]
    assert sorted(path.name for path in (out / "checkpoints").glob("[0-9]*")) == ["2", "3"]
    assert (out / "export" / "learned_embeds.safetensors").is_file()
    assert events(out) == [(0, "started"), (1, "sample-now"), (2, "save-now"), (3, "stop")]
    assert not any((out / name).exists() for name in ("sample-now", "save-now", "stop"))
    (out / "stop").touch()  # of before the run: nobody asked this one
    train(dataclasses.replace(RUN, steps=5), out)
    assert events(out)[4:] == [(3, "resumed")] and lines(out)[-1]["step"] == 5
    assert not (out / "stop").exists()


def test_epochs_are_steps_and_exports_come_on_the_way(tmp_path):
    train(dataclasses.replace(RUN, epochs=0.75, export_every=2), tmp_path)  # of 16 pictures in batches of 4
    assert lines(tmp_path)[-1]["step"] == 3
    assert [path.name for path in (tmp_path / "exports").iterdir()] == ["0000002"]
    assert export.read(tmp_path).steps == 3


def test_held_out_pictures_are_never_learned_from_and_cover_the_share(tmp_path):
    sd = pipeline.load("random:tiny")
    data = dataclasses.replace(DATA, validation=0.25, word="")
    learned, apart = batches.build(data, sd, 0), batches.held_out(data, sd, 0)
    assert len(learned.source) == 12 and len(apart.source) == 4
    assert not set(learned.source.source.numbers) & set(apart.source.source.numbers)
    assert list(batches.build(data, sd, 1).source.source.numbers) != list(learned.source.source.numbers)
    varied = batches.measured(dataclasses.replace(data, shuffle=True, tag_dropout=0.5, dropout=0.5, flip=0.5))
    assert not (varied.shuffle or varied.tag_dropout or varied.dropout or varied.flip)
    for i in range(2):
        photo(tmp_path / f"{i}.png", i)
    folder = dataclasses.replace(data, validation=str(tmp_path), source=None, word="a", path=str(tmp_path))
    assert len(batches.held_out(folder, sd, 0).source) == len(batches.build(folder, sd, 0).source) == 2
    with pytest.raises(ValueError, match="data.validation=0.5: expected 0, or a folder: there is only one"):
        batches.build(dataclasses.replace(folder, path=str(tmp_path / "0.png"), validation=0.5), sd, 0)
    with pytest.raises(ValueError, match="data.validation: data.path='none': no such"):
        train(dataclasses.replace(RUN, data=dataclasses.replace(DATA, validation="none")), tmp_path / "run")
    with pytest.raises(ValueError, match="^best=True: expected data.validation"):
        dataclasses.replace(RUN, best=True)


def test_the_error_is_measured_at_the_same_noise_and_improves(tmp_path):
    data = dataclasses.replace(DATA, validation=0.25)
    still = dataclasses.replace(RUN, data=data, validate=2, optim=Optim(lr=0.0))
    train(still, tmp_path / "still")
    first, second = validation.history(tmp_path / "still" / "validation.json")
    assert first[0] == 2 and second[0] == 4 and first[1] == second[1] > 0
    assert [line["validation"] for line in lines(tmp_path / "still") if "validation" in line] == [
        pytest.approx(first[1]), pytest.approx(first[1]),
    ]  # fmt: skip
    train(dataclasses.replace(still, optim=Optim(lr=1e-2)), tmp_path / "moved")
    assert validation.history(tmp_path / "moved" / "validation.json")[0][1] != first[1]


def test_the_best_weights_are_kept_and_exported_and_patience_ends_a_run(tmp_path, monkeypatch):
    errors = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5, 5: 4.0}
    kept = {}
    real = validation.Validation.__call__

    def told(self, step, trained):
        kept[step] = np.asarray(trained["rows"]["text_encoder"])
        self.measured = lambda *_: errors[step]
        return real(self, step, trained)

    monkeypatch.setattr(validation.Validation, "__call__", told)
    data = dataclasses.replace(DATA, validation=0.25)
    run = dataclasses.replace(RUN, data=data, validate=1, best=True, patience=3, steps=9, checkpoint=1, keep=1)
    joined = train(run, tmp_path)
    assert lines(tmp_path)[-1]["step"] == 5  # three values after the second are not smaller
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("[0-9]*")) == ["2", "5"]
    np.testing.assert_array_equal(joined.rows("<new>")["text_encoder"], kept[2])
    assert export.write(tmp_path, tmp_path / "again")[1] == 2
    train(run, tmp_path)  # it is over: nothing more is trained
    assert events(tmp_path)[-1] == (5, "resumed")


def test_the_last_step_of_a_run_that_patience_ends_is_kept_and_logged(tmp_path, monkeypatch):
    real = validation.Validation.__call__

    def rising(self, step, trained):
        self.measured = lambda *_: float(step)
        return real(self, step, trained)

    monkeypatch.setattr(validation.Validation, "__call__", rising)
    data = dataclasses.replace(DATA, validation=0.25)
    run = dataclasses.replace(RUN, data=data, validate=1, patience=2, steps=9, checkpoint=8, log=8)
    train(run, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").glob("[0-9]*")] == ["3"]
    assert [line["step"] for line in lines(tmp_path) if "loss" in line] == [3]
    assert export.write(tmp_path, tmp_path / "again")[1] == 3
    train(run, tmp_path)
    assert events(tmp_path) == [(0, "started"), (3, "resumed")] and lines(tmp_path)[-1]["step"] == 3


def test_lines_of_a_prompts_file_are_kohyas(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# comment\n\na photo of [name], 1--2 --n blurry, dark --w 512 --h 768 --s 28 --l 7.5 --d 42\n"
                    "a cat --w 64 --ss euler_a\n")  # fmt: skip
    one, other = prompt_lines.read(path, "<cat>")
    assert one == {"prompt": "a photo of <cat>, 1--2", "negative_prompt": "blurry, dark", "size": (768, 512),
                   "steps": 28, "guidance": 7.5, "seed": 42, "grammar": "a1111"}  # fmt: skip
    wanted = {"prompt": "a cat", "size": (64, 64), "steps": 20, "seed": 1, "sampler": "euler_a", "grammar": "a1111"}
    assert other == wanted
    for text, message in (
        ("a --x 3", "line 1: --x: expected one of --n, --w"),
        ("a\nb --s many", "line 2: --s many: expected a number"),
        ("a --s 0", "line 1: steps=0: expected"),
        ("# nothing", "it has none; expected a prompt on each line"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            prompt_lines.read(path)
    with pytest.raises(ValueError, match="prompts_file='none.txt': no such file or directory; expected a text file"):
        train(dataclasses.replace(RUN, prompts_file="none.txt"), tmp_path / "run")


def test_previews_of_a_file_and_a_sheet_of_the_data(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a photo of [name] --w 32 --h 48 --s 1\n")
    run = dataclasses.replace(RUN, prompts=(), prompts_file=str(path), steps=1, preview=1)
    train(run, tmp_path / "run")
    samples = tmp_path / "run" / "samples"
    assert sorted(path.name for path in samples.iterdir()) == ["0000001-00.png", "data.png"]
    with Image.open(samples / "0000001-00.png") as image:
        assert image.size == (32, 48)


def test_the_sheet_of_the_data_shows_what_is_trained_on(tmp_path):
    for i, (height, width) in enumerate([(64, 40), (40, 66), (32, 32)]):
        pixels = np.full((height, width, 4), 40 * i + 100, np.uint8)
        pixels[..., 3] = 255
        pixels[: height // 2, :, 3] = 0
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    data = Data(path=str(tmp_path), size=32, buckets=3, batch=1, word="a", mask=True)
    made = batches.build(data, pipeline.load("random:tiny"), 0)
    sheet = preview.data_sheet(made)
    assert len(made.plan.shapes) == 3 and sheet.shape[1] == 8 + 3 * (192 + 8)
    for column, step in enumerate(sorted({made.plan.at(n)[0]: n for n in reversed(range(64))}.values())):
        (h, w), i = made.plan.picture(step, 0)
        shown = sheet[8 : 8 + h, 8 + 200 * column :][:, :w].astype(int)
        np.testing.assert_allclose(shown[-4:], 40 * i + 100, atol=1)  # learned
        np.testing.assert_allclose(shown[:4], 255 / 4, atol=1)  # clear, over white, dim
    words = grid.captioned([np.zeros((8, 8, 3), np.uint8)] * 2, ["", "words"], 4)
    assert (words[:, : 8 + 192][17:] == 255).all() and (words[17:, 208:] < 255).any()
