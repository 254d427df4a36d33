"""The decoder compiled while the latents are made: once, for the same pictures; and `sdjax warm`."""

import threading

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image
from tiny import pictures

import sdjax
from sdjax.__main__ import main
from sdjax.formats import pipeline
from sdjax.runtime import compile_cache
from sdjax.sampling import tiles
from sdjax.service import programs, warm

SMALL = 30_000  # bytes of a compiled program; one of few operations takes less
HOW = dict(steps=2, guidance=2.0, size=40)  # a size of no other test's, so that nothing is compiled already


@pytest.fixture
def compiled():
    """The names of what is compiled from here on, and the threads that compiled it."""
    seen = []

    def listen(event, duration, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append((about["fun_name"], threading.current_thread() is threading.main_thread()))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def test_on_an_accelerator_the_decoder_is_compiled_aside_and_once(compiled, monkeypatch, rows=3):
    sd = pipeline.load("random:tiny")
    monkeypatch.setattr(tiles, "_compiled_by_all_cores", lambda: False)
    monkeypatch.setattr(tiles, "AT_ONCE", 2 * 40 * 40)  # two rows at once
    made = sdjax.text2img(sd, ["a photo"] * rows, seeds=range(rows), **HOW)
    assert [one for one in compiled if one[0] == "jit(_decode)"] == [("jit(_decode)", False), ("jit(_decode)", True)]
    monkeypatch.undo()
    assert (made == sdjax.text2img(sd, ["a photo"] * rows, seeds=range(rows), **HOW)).all()


def test_on_a_cpu_and_for_tiles_nothing_is_compiled_aside(compiled, monkeypatch):
    sd = pipeline.load("random:tiny")
    with tiles.ahead(sd, 1, (24, 24, 4)):
        pass
    monkeypatch.setattr(tiles, "_compiled_by_all_cores", lambda: False)
    monkeypatch.setattr(tiles, "AT_ONCE", 16)
    with tiles.ahead(sd, 1, (24, 24, 4)):
        pass
    assert "jit(_decode)" not in [name for name, _ in compiled]


def test_what_fails_aside_is_left_to_decode(monkeypatch):
    monkeypatch.setattr(tiles, "_compiled_by_all_cores", lambda: False)
    monkeypatch.setattr(tiles, "_decode", None)
    with tiles.ahead(pipeline.load("random:tiny"), 1, (24, 24, 4)):
        pass


def test_warm_compiles_all_that_a_picture_needs(compiled, capsys, tmp_path):
    assert warm.main(["random:tiny", "--sizes", "24", "--batches", "2"]) == 0
    assert "24, batch 2, quiet: " in capsys.readouterr().out
    before = len(compiled)
    assert ("jit(_advance)", True) in compiled
    given = ["--model", "random:tiny", "--prompt", "a face", "--size", "24", "--count", "2", "--batch", "2"]
    given += ["--steps", "3", "--guidance", "3", "--seed", "7", "--out", str(tmp_path)]
    assert programs.main("text2img", None, given) == 0
    assert len(list(tmp_path.glob("*.png"))) == 2 and compiled[before:] == []


@pytest.mark.parametrize("task", ["img2img", "inpaint"])
def test_warm_compiles_all_that_a_picture_from_a_picture_needs(task, compiled, capsys, tmp_path):
    assert warm.main(["random:tiny", "--task", task, "--sizes", "24"]) == 0
    before = len(compiled)
    given = ["--model", "random:tiny", "--prompt", "a face", "--steps", "5", "--strength", "0.6", "--seed", "7"]
    for name in warm.PICTURES[task]:
        given += [f"--{name}", str(tmp_path / f"{name}.png")]
        Image.fromarray(pictures(1, 24)[0] // 4 * 4).save(given[-1])
    assert programs.main(task, None, [*given, "--out", str(tmp_path / "out")]) == 0
    assert ("jit(_advance)", True) in compiled[:before] and compiled[before:] == []


@pytest.fixture
def cached(tmp_path):
    """A function: the names of the larger programs in the cache of compiled programs, which is empty and takes all."""
    usual = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs

    def use(folder, least):
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
        compilation_cache.reset_cache()

    use(str(tmp_path / "compiled"), 0.0)
    there = (tmp_path / "compiled").glob
    yield lambda: {path.name for path in there("jit_*-cache") if path.stat().st_size > SMALL}
    use(*usual)


def test_warm_compiles_all_that_a_run_needs(cached, monkeypatch, tmp_path, capsys):
    """The run has another picture, and starts without the programs in memory."""
    monkeypatch.setattr(compile_cache, "keep", lambda **_: None)
    for name, picture in zip(("one", "two"), pictures(2), strict=True):
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    given = ["model=random:tiny", "method.word=<new>", "steps=3", "preview=2", "data.batch=2", "data.size=32",
             "checkpoint=0", f"out={tmp_path / 'run'}"]  # fmt: skip
    assert warm.main(["textual_inversion", *given, f"data.path={tmp_path / 'one.png'}"]) == 0
    assert "textual_inversion: " in capsys.readouterr().out and not (tmp_path / "run").exists()
    before = cached()
    jax.clear_caches()
    assert main(["train", "textual_inversion", *given, f"data.path={tmp_path / 'two.png'}"]) == 0
    assert any(name.startswith("jit_step-") for name in before)
    assert not [name for name in cached() - before if name.startswith(("jit_step", "jit__"))]


def test_warm_says_what_is_wrong_in_one_line(capsys):
    assert warm.main(["random:tiny", "--sizes", "13"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert warm.main(["none.py"]) == warm.main(["lora"]) == 1
    assert capsys.readouterr().err.count("\n") == 2
