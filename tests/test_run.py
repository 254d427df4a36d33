"""What train/run.py says of settings and inputs that do not fit: one line that names them."""

import dataclasses
import re
from pathlib import Path

import programs
import pytest
from programs import ROOT, photo

import sdjax.settings
from sdjax.data import sources
from sdjax.formats import pipeline
from sdjax.methods.chain import Chain
from sdjax.methods.e4t import E4T
from sdjax.methods.full import Full
from sdjax.training import checks, loop, previewed, run_folder
from sdjax.training.begin import begin
from sdjax.training.settings import Train

RUN = Train(model="random:tiny", method=Full(("unet",), "attn2"))


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("steps=-1", "steps=-1: expected a number from 0"),
        ("seed=-1", "seed=-1: expected a number from 0"),
        ("seed=18446744073709551616", "seed=18446744073709551616: expected a number from 0 to below 2"),
        ("method.pattern=(", "method.pattern='[(]': expected a regular expression"),
        ("ema=1", "ema=1.0: expected a number from 0 to below 1"),
        ("ema=-0.1", "ema=-0.1"),
        ("min_snr=-5", "min_snr=-5.0: expected a number from 0"),
        ("noise_offset=-1", "noise_offset=-1.0"),
        ("checkpoint=-1", "checkpoint=-1: expected a number from 0"),
        ("preview=-1", "preview=-1"),
        ("log=-1", "log=-1"),
        ("keep=0", "keep=0: expected a number from 1"),
        ("compute=foo", "compute='foo': expected one of float32, bfloat16"),
        ("frozen=int8", "frozen='int8': expected one of float32, bfloat16"),
        ("data.size=-64", "data.size=-64: expected a number from 0"),
        ("data.batch=0", "data.batch=0: expected a number from 1"),
        ("data.dropout=1.5", "data.dropout=1.5: expected a number from 0 to 1"),
        ("data.dropout=-0.1", "data.dropout=-0.1"),
        ("data.flip=2", "data.flip=2.0: expected a number from 0 to 1"),
        ("data.crop=middle", "data.crop='middle': expected one of center, random"),
        ("data.concept=some", "data.concept='some': expected one of '', same, other"),
        ("optim.lr=-1e-4", "optim.lr=-0.0001: expected a number from 0"),
        ("optim.lr=1e999", "optim.lr=inf"),
        ("optim.kind=adam", "optim.kind='adam': expected one of adamw, muon, adafactor, sgd"),
        ("optim.warmup=-1", "optim.warmup=-1"),
        ("optim.end=2", "optim.end=2.0: expected a number from 0 to 1"),
        ("optim.weight_decay=-1", "optim.weight_decay=-1.0"),
        ("optim.betas=(0.9, 1)", r"optim.betas=\(0.9, 1.0\): expected two numbers from 0 to below 1"),
        ("optim.clip=-1", "optim.clip=-1.0: expected a number above 0"),
        ("optim.accumulate=0", "optim.accumulate=0: expected a number from 1"),
        ("optim.rates=(('(', 1),)", "optim.rates=.* expected a regular expression"),
        ("optim.rates=(('unet', -1),)", "optim.rates=.*: expected factors from 0"),
    ],
)
def test_settings_out_of_range_are_refused_in_one_line(item, message):
    with pytest.raises(ValueError, match=message) as error:
        sdjax.settings.override(RUN, [item])
    assert "\n" not in str(error.value)


def test_a_setting_of_a_part_is_called_by_its_whole_name():
    settings = dataclasses.replace(RUN, method=Chain((E4T(), Full())))
    for item, message in (
        ("1.pattern=(", "method.parts.1.pattern='[(]': expected a reg"),
        ("0.features=x", "method.parts.0.feat"),
    ):
        with pytest.raises(ValueError, match=message):
            sdjax.settings.override(settings, [f"method.parts.{item}"])


@pytest.fixture
def program(monkeypatch):
    """The program's main()."""
    return programs.load("train/run.py", monkeypatch).main


TINY = ["model=random:tiny", "data.size=32", "steps=1"]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (["compute=foo"], "compute='foo': expected one of"),
        (["data.path=pocketland", "data.mask=true"], "data.mask=True: expected False for data.path=pocketland"),
        (["data.path=pocketland", "data.count=0"], "data.count=0: expected a number from 1"),
        (["data.path=pocketland", "data.cuont=16"], "data.cuont: Data has no 'cuont'; did you mean 'count'?"),
        (["data.path={photo}", "data.domain=face"], "data.domain: Data has no 'domain'; accepted: path, source"),
        (["data.path={photo}.txt"], "data.path='{photo}.txt': no such file or folder"),
        (["data.path={text}"], f"a.txt': expected {sources.EXPECTED} (.jpg .png .webp), {sources.OTHERS}"),
        (["data.path=pocketland", "method.pattern=("], "method.pattern='(': expected a regular expression"),
        (["data.path=pocketland", "out={photo}/run"], "Not a directory"),
    ],
)
def test_bad_input_is_one_line_of_error(program, items, message, tmp_path, capsys):
    path = photo(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a face")
    items = [f"out={tmp_path / 'out'}", *TINY, *(item.format(photo=path, text=tmp_path / "a.txt") for item in items)]
    assert program([str(ROOT / "configs" / "full.py"), *items]) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and message.format(photo=path) in said and "\n" not in said
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_is_no_python_is_one_line_of_error(program, tmp_path, capsys):
    (tmp_path / "recipe.py").write_text("def config():\n    return Train(\n")
    assert program([str(tmp_path / "recipe.py")]) == 1
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: config '.*recipe.py': .* \(.*recipe.py, line 2\)\n", said), said


def test_long_errors_are_one_line_and_bugs_keep_their_traceback(program, tmp_path, monkeypatch, capsys):
    recipe = [str(ROOT / "configs" / "full.py"), "data.path=pocketland"]

    def fails(error):
        def train(settings, out):
            raise error

        monkeypatch.setattr(loop, "train", train)

    fails(PermissionError(13, "Permission denied", "outputs"))
    assert program(recipe) == 1 and "error: [Errno 13] Permission denied: 'outputs'\n" == capsys.readouterr().err
    fails(OSError("first line.\n\n  second line\n"))
    assert program(recipe) == 1 and "error: first line. second line\n" == capsys.readouterr().err
    fails(KeyError("mask"))
    with pytest.raises(KeyError):
        program(recipe)


TUNE = ROOT / "configs" / "pocket" / "tune.py"


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model ends the test."""
    monkeypatch.setattr(pipeline, "load", lambda *_, **__: pytest.fail("a model was loaded"))


def broken(path):
    """Writes a picture that is cut short."""
    photo(path)
    path.write_bytes(path.read_bytes()[:900])
    return path


def test_what_is_wrong_with_pictures_is_said_before_the_model_is_loaded(program, no_model, tmp_path, capsys):
    many = tmp_path / "photos"
    many.mkdir()
    for i in range(3):
        photo(many / f"{i}.png", i)
    (tmp_path / "photos.tar").write_bytes(bytes(512))
    cut = tmp_path / "cut"
    cut.mkdir()
    photo(cut / "a.png"), broken(cut / "b.png")
    word = "data.word=cat"
    for recipe, items, message in (
        (TUNE, [f"data.path={many}"], "photos': expected one picture, not 3: this method reads one"),
        (TUNE, [f"data.path={tmp_path / 'none.png'}"], "none.png'"),
        (TUNE, [f"data.path={tmp_path / 'photos.tar'}"], "photos.tar: no pictures"),
        (
            TUNE,
            [],
            "data.path='': expected a folder of images, one image, tar shards, parquet or Arrow files, or 'pocketland'",
        ),
        (ROOT / "configs" / "full.py", [f"data.path={cut}", word], "b.png: "),
        (
            ROOT / "configs" / "textual_inversion.py",
            [f"data.path={tmp_path / 'photos.tar'}"],
            "photos.tar: no pictures",
        ),
    ):
        assert program([str(recipe), f"out={tmp_path / 'out'}", *items]) == 1
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, said


def test_every_photo_has_a_folder_of_its_own(tmp_path):
    """One of the same name from elsewhere, or changed, is NAME-2; the same one comes back to its own."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()

    def place(path, **changes):
        settings = sdjax.settings.load(TUNE, [f"data.path={path}", f"out={tmp_path}/tune/{{picture}}"])
        settings = checks.worded(dataclasses.replace(settings, **changes))
        return settings, run_folder.place(settings, "outputs/x")

    def begun(path, **changes):
        settings, folder = place(path, **changes)
        run_folder.write_settings(folder, settings, "base", run_folder.mark(checks.pictures(settings)))
        (folder / "export").mkdir(exist_ok=True)
        return folder.name

    one, other = photo(tmp_path / "a" / "cat.png", 0), photo(tmp_path / "b" / "cat.png", 1)
    assert [begun(one), begun(other), begun(photo(tmp_path / "a" / "dog.png"))] == ["cat", "cat-2", "dog"]
    assert [begun(one), begun(other)] == ["cat", "cat-2"]  # again
    photo(tmp_path / "a" / "cat.png", 2)
    assert begun(one) == "cat-3"
    assert begun(one, model="other") == "cat-4"
    assert place(one, out="here")[1] == Path("here") and place(one, out="")[1] == Path("outputs/x")


def test_the_methods_word_alone_is_enough(tmp_path):
    photo(tmp_path / "a.png")
    recipe = ROOT / "configs" / "textual_inversion.py"
    settings = sdjax.settings.load(recipe, ["method.word=<cat>", "model=random:tiny", f"data.path={tmp_path}"])
    data = begin(settings)[2]
    assert data.data.word == "<cat>" and data.data.templates == "object"
    assert previewed.prompts(checks.worded(settings)) == ("a photo of <cat>",)
    with pytest.raises(ValueError, match="data.word='<dog>': expected the word that the method trains: '<cat>'"):
        begin(sdjax.settings.override(settings, ["data.word=<dog>"]))


@pytest.mark.parametrize(
    ("changes", "every"),
    [
        (dict(prompts=("a",), steps=100), 50),
        (dict(prompts=("a",), steps=3000), 300),
        (dict(prompts_file="prompts.txt", steps=3000), 300),
        (dict(steps=3), 100),
        (dict(steps=3000), 750),
        (dict(preview=0), 0),
        (dict(preview=7), 7),
    ],
)
def test_previews_come_ten_times_a_run_and_four_times_if_nobody_asked(changes, every):
    assert dataclasses.replace(RUN, **changes).previews == every


def test_a_run_says_what_it_has_and_how_its_result_is_used(program, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        photo(folder / f"{i}.png", i)
    (folder / "0.txt").write_text("a <cat>")
    (folder / "x.heic").write_bytes(b"")
    items = [*TINY, f"data.path={folder}", "data.batch=2", "method.word=<cat>", f"out={tmp_path / 'out'}"]
    assert program([str(ROOT / "configs" / "textual_inversion.py"), *items]) == 0
    said = capsys.readouterr().out
    assert f"1 cpu; {folder}: 3 pictures, 1 caption; passed over: 1 .heic" in said
    path = tmp_path / "out" / "export" / "learned_embeds.safetensors"
    for line in (
        f'python -m sdjax text2img --model random:tiny --adapter {path} --prompt "a photo of <cat>"',
        f'pipe.load_textual_inversion("{path}"), then prompt <cat>',
        "copy it to embeddings/ under a name of your choice: the word there is the file's name",
    ):
        assert line in said
