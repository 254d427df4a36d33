"""Names that become files, and links that lead out of a folder."""

import json

import pytest
from PIL import Image

from sdjax.images import reading
from sdjax.service import lists

BAD = ["..", ".", "a/b", "../a", "/etc/passwd", "a\0b", "a\\b", "C:evil", "CON", "nul.txt", "Com1", "a.", "a ", " a",
       "-a", "x" * 300, "\u202egnp.exe", "\U0001f600", "a\nb", "~", "a*", "<a>", "|", "?"]  # fmt: skip
GOOD = ["a", "cat-1", "a cat.v2", "Kaninchen_ä", "console", "x" * 200, "猫"]


def rows(tmp_path, name):
    path = tmp_path / "jobs.jsonl"
    path.write_text(json.dumps({"prompt": "a cat", "name": name}) + "\n")
    return lists.read(path)


@pytest.mark.parametrize("name", BAD)
def test_names_that_are_no_files_are_errors_of_their_row(name, tmp_path):
    requests, errors = rows(tmp_path, name)
    assert not requests and errors[0]["error"].startswith("name=") and errors[0]["error"].isprintable()


@pytest.mark.parametrize("name", GOOD)
def test_names_that_are(name, tmp_path):
    requests, errors = rows(tmp_path, name)
    assert not errors and requests[0].name == name


@pytest.mark.parametrize(
    "name", ["a.txt", "a.caption", "metadata.jsonl", "metadata.csv", "a.mask.png", "a-masklabel.png"]
)
def test_links_out_of_a_folder_are_refused(name, tmp_path):
    photos, secret = tmp_path / "photos", tmp_path / "secret"
    photos.mkdir()
    Image.new("RGB", (16, 16)).save(photos / "a.png")
    secret.write_text("a password")
    (photos / name).symlink_to(secret)
    for path in (photos, photos / "a.png"):
        if name.startswith("metadata") and path != photos:
            continue
        with pytest.raises(ValueError, match=f"{name}: a link that leads out of") as error:
            reading.find(path)
        assert "password" not in str(error.value)


def test_links_within_a_folder_and_of_pictures_are_followed(tmp_path):
    photos, other = tmp_path / "photos", tmp_path / "other"
    photos.mkdir()
    other.mkdir()
    Image.new("RGB", (16, 16)).save(other / "a.png")
    (photos / "a.png").symlink_to(other / "a.png")
    (photos / "b.txt").write_text("a cat")
    (photos / "a.txt").symlink_to(photos / "b.txt")
    assert reading.find(photos)[0].caption == "a cat"
