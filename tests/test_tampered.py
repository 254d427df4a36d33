"""Checkpoints that were damaged in many ways: the one before is taken, bit for bit, or one line says why not."""

import json
import shutil

import jax
import numpy as np
import pytest

from sdjax.training.checkpoint import Checkpoints

FLIP, HALF = "a flipped bit", "half of it"
DAMAGES = ("gone", "empty", HALF, FLIP, "other bytes", "longer")


def state(step):
    random = np.random.default_rng(step)
    trained = {"w": random.normal(size=(64, 64)).astype(np.float32), "b": random.normal(size=7).astype(np.float32)}
    return {"step": np.int32(step), "trained": trained}


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A folder with checkpoints 1 and 2."""
    folder = tmp_path_factory.mktemp("whole") / "checkpoints"
    made = Checkpoints(folder)
    for step in (1, 2):
        made.save(state(step), "base", wait=True)
    made.close()
    return folder


def files(folder):
    """The files of checkpoint 2, sorted."""
    return sorted(path for path in (folder / "2").rglob("*") if path.is_file())


def damage(path, how):
    data = path.read_bytes()
    changed = {
        "empty": b"",
        HALF: data[: len(data) // 2],
        FLIP: data[: len(data) // 2] + bytes([(data[len(data) // 2] if data else 0) ^ 4]) + data[len(data) // 2 + 1 :],
        "other bytes": bytes(len(data)),
        "longer": data + b"\0" * 100,
    }
    path.unlink() if how == "gone" else path.write_bytes(changed[how])


def tell(folder, change):
    """Changes the meta file's JSON."""
    (path,) = (folder / "2" / "meta").glob("metadata")
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def renamed(old, new):
    return lambda meta: {new if name == old else name: value for name, value in meta.items()}


def move(old, new):
    return lambda folder: (folder / old).rename(folder / new)


OTHERS = {
    "no folder": lambda folder: shutil.rmtree(folder / "2"),
    "an empty folder": lambda folder: [shutil.rmtree(folder / "2"), (folder / "2").mkdir()],
    "no state": lambda folder: shutil.rmtree(folder / "2" / "state"),
    "no meta": lambda folder: shutil.rmtree(folder / "2" / "meta"),
    "an empty state": lambda folder: [shutil.rmtree(folder / "2" / "state"), (folder / "2" / "state").mkdir()],
    "an empty meta": lambda folder: [shutil.rmtree(folder / "2" / "meta"), (folder / "2" / "meta").mkdir()],
    "state under another name": move("2/state", "2/stat"),
    "meta under another name": move("2/meta", "2/mate"),
    "state and meta swapped": lambda folder: [
        move("2/state", "2/x")(folder), move("2/meta", "2/state")(folder), move("2/x", "2/meta")(folder)
    ],
    "the state of the one before": lambda folder: [
        shutil.rmtree(folder / "2" / "state"), shutil.copytree(folder / "1" / "state", folder / "2" / "state")
    ],
    "the one before under its number": lambda folder: [
        shutil.rmtree(folder / "2"), shutil.copytree(folder / "1", folder / "2")
    ],
    "under a later number": move("2", "7"),
    "a file in its place": lambda folder: [shutil.rmtree(folder / "2"), (folder / "2").write_text("2")],
    "base renamed": lambda folder: tell(folder, renamed("base", "bass")),
    "sums renamed": lambda folder: tell(folder, renamed("sums", "sum")),
    "shapes renamed": lambda folder: tell(folder, renamed("shapes", "shape")),
    "seal renamed": lambda folder: tell(folder, renamed("seal", "seals")),
    "no base": lambda folder: tell(folder, lambda meta: {k: v for k, v in meta.items() if k != "base"}),
    "another base": lambda folder: tell(folder, lambda meta: {**meta, "base": "other"}),
    "no sums": lambda folder: tell(folder, lambda meta: {**meta, "sums": {}}),
    "other sums": lambda folder: tell(folder, lambda meta: {**meta, "sums": {k: 1 for k in meta["sums"]}}),
    "other shapes": lambda folder: tell(folder, lambda meta: {**meta, "shapes": {"x": [1]}}),
    "shapes that are no dict": lambda folder: tell(folder, lambda meta: {**meta, "shapes": 3}),
    "a seal that is no number": lambda folder: tell(folder, lambda meta: {**meta, "seal": "x"}),
    "one thing more": lambda folder: tell(folder, lambda meta: {**meta, "more": 1}),
    "meta a list": lambda folder: tell(folder, lambda meta: [meta]),
    "meta nested deep": lambda folder: (folder / "2" / "meta" / "metadata").write_text("[" * 100_000),
}  # fmt: skip


def taken(folder, capsys):
    """Returns the step of the state that is found, which is that state bit for bit; None where one line refuses."""
    capsys.readouterr()
    checkpoints = Checkpoints(folder)
    try:
        found = checkpoints.restore(state(1), "base")
    except (ValueError, OSError) as error:
        assert "\n" not in str(error)
        return None
    finally:
        checkpoints.close()
    said = capsys.readouterr().err
    assert "Traceback" not in said and len(said.splitlines()) <= 1, said
    if found is None:
        return None
    step = int(found["step"])
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (found, state(step))), strict=True))
    if step == 1 and list(folder.glob("*.damaged")):
        assert "note: " in said and "damaged" in said
    return step


def ways(folder):
    """Returns {name: change of a folder} of all damages."""
    each = {
        f"{path.relative_to(folder / '2')}: {how}": lambda copy, path=path, how=how: damage(
            copy / path.relative_to(folder), how
        )
        for path in files(folder)
        for how in DAMAGES
    }
    return {**OTHERS, **each}


def tried(whole, names, tmp_path, capsys):
    """Asserts of each way that checkpoint 1 or an unharmed 2 is taken; returns {name: step}."""
    steps, every = {}, ways(whole)
    for number, name in enumerate(names):
        copy = tmp_path / f"{number}"
        shutil.copytree(whole, copy)
        every[name](copy)
        steps[name] = taken(copy, capsys)
        if steps[name] == 1 and name not in ("no folder", "a file in its place"):
            assert list(copy.glob("*.damaged")), name
        assert steps[name] in (1, 2), name
    return steps


def test_damage_of_every_kind_falls_back(whole, tmp_path, capsys):
    """A short form: the changes of meta and folders of which each had a fault of its own, and five of files."""
    names = [*list(OTHERS)[1:16:3], "sums renamed", "another base", "meta a list"]
    steps = tried(whole, [*names, *list(ways(whole))[len(OTHERS) :: 13]], tmp_path, capsys)
    assert all(steps[name] == 1 for name in names)


@pytest.mark.slow
def test_sixty_ways_of_damage_and_more(whole, tmp_path, capsys):
    every = list(ways(whole))
    assert len(every) > 60
    steps = tried(whole, every, tmp_path, capsys)
    print(len(every), {name: step for name, step in steps.items() if step == 2})
    assert all(steps[name] == 1 for name in OTHERS)


def test_nothing_is_left_where_both_are_damaged(whole, tmp_path, capsys):
    copy = tmp_path / "checkpoints"
    shutil.copytree(whole, copy)
    for step in ("1", "2"):
        shutil.rmtree(copy / step / "state")
    checkpoints = Checkpoints(copy)
    assert checkpoints.restore(state(1), "base") is None and checkpoints.damaged == {"1.damaged", "2.damaged"}
    checkpoints.close()
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_an_older_checkpoint_without_a_seal_is_read(whole, tmp_path, capsys):
    copy = tmp_path / "checkpoints"
    shutil.copytree(whole, copy)
    tell(copy, lambda meta: {name: value for name, value in meta.items() if name != "seal"})
    assert taken(copy, capsys) == 2


def test_a_second_damaged_one_of_a_step_takes_no_ones_place(whole, tmp_path, capsys):
    copy = tmp_path / "checkpoints"
    shutil.copytree(whole, copy)
    (copy / "2.damaged").mkdir()
    (copy / "2.damaged" / "mine").write_text("x")
    shutil.rmtree(copy / "2" / "state")
    assert taken(copy, capsys) == 1
    assert (copy / "2.damaged" / "mine").is_file() and (copy / "2.damaged-2" / "meta").is_dir()
