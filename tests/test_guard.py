"""Attacks on a server: every one is refused before anything is done."""

import base64
import contextlib
import io
import json
import os
import stat
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from sdjax.service import uploads
from sdjax.service.place import Place
from sdjax.web import auth, guard, server
from tests.serving import ask, form

SECRET = "a secret that nobody may read"


def made(tmp_path):
    (tmp_path / "secret.txt").write_text(SECRET)
    (tmp_path / "secret.png").write_bytes(png())
    for name in ("models", "loras", "data"):
        (tmp_path / name).mkdir()
    return Place(tmp_path / "ui", "random:tiny", tmp_path / "models", tmp_path / "loras", tmp_path / "data").made()


@pytest.fixture
def place(tmp_path):
    return made(tmp_path)


@pytest.fixture
def app(place):
    return server.create_app(place)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A server that refuses all that it is asked, and so stays as it is."""
    return server.create_app(made(tmp_path_factory.mktemp("shared")))


def png(width=32, height=32, **more):
    image = Image.fromarray(np.zeros((height, width, 3), np.uint8))
    image.save(written := io.BytesIO(), "PNG", **more)
    return written.getvalue()


def b64(data):
    return base64.b64encode(data).decode()


def jobs(app):
    return ask(app, "GET", "/api/jobs").json()["jobs"]


# ---- names that want to be paths -------------------------------------------------------------------

TRAVERSALS = [
    "../secret.png", "..%2fsecret.png", "%2e%2e%2fsecret.png", "..%252fsecret.png", "%252e%252e%252fsecret.png",
    "....//secret.png", "..../secret.png", "..\\secret.png", "..%5csecret.png", "%2e%2e%5csecret.png",
    "..%c0%afsecret.png", "..%ef%bc%8fsecret.png", "..;/secret.png", "../../secret.png", "../../../etc/passwd",
    "/etc/passwd", "//etc/passwd", "%2fetc%2fpasswd", "C:\\secret.png", "C:/secret.png", "\\\\host\\share\\secret.png",
    "file:///etc/passwd", "secret.png%00.png", "..%00/secret.png", "~/secret.png", "./../secret.png",
    "uploads/../../secret.png", "0" * 32 + "/../../secret.png", "0" * 32 + ".png/../../../secret.png",
    "0" * 32 + ".png\n", " ../secret.png", "queue.db", "../queue.db", "../run.lock",
]  # fmt: skip


def test_there_are_thirty_spellings():
    assert len(set(TRAVERSALS)) >= 30


@pytest.mark.parametrize("name", TRAVERSALS)
def test_no_name_leads_out_of_a_folder(shared, name):
    from urllib.parse import quote, unquote

    plain = unquote(name)
    for path in (f"/api/uploads/{quote(name, safe='%/')}", f"/api/uploads/{plain}", f"/api/library/model/{plain}"):
        assert ask(shared, "GET", path).status in (400, 404, 405, 422), path
    assert ask(shared, "GET", f"/api/library/lora/preview?name={quote(plain)}").status in (404, 422)
    for one in {name, plain}:
        for settings in ({"image": one, "prompt": "a"}, {"prompt": "a", "model": one}, {"prompt": "a", "vae": one}):
            task = "img2img" if "image" in settings else "text2img"
            got = ask(shared, "POST", "/api/jobs", {"task": task, "settings": settings})
            assert got.status == 422 and SECRET not in got.body.decode(), got
        control = {"prompt": "a", "control": [one], "control_image": [one]}
        assert ask(shared, "POST", "/api/jobs", {"task": "controlnet", "settings": control}).status == 422
        lora = {"prompt": f"<lora:{one}:1> a", "grammar": "a1111"}
        assert ask(shared, "POST", "/api/jobs", {"settings": lora}).status == 422
        assert ask(shared, "POST", "/api/jobs", {"settings": {"prompt": "a", "adapter": [one]}}).status == 422
        train = {"recipe": "textual_inversion", "data": {"set": one}}
        assert ask(shared, "POST", "/api/training", train).status == 422
        assert ask(shared, "POST", "/api/training", train | {"data": {"folder": one}}).status == 422
        assert ask(shared, "POST", "/api/training", {"recipe": one}).status == 422
        with_option = {"sd_model_checkpoint": one, "sd_vae": one}
        assert ask(shared, "POST", "/sdapi/v1/options", with_option).status == 422
    assert jobs(shared) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"out": "x"}, {"data.path": "/etc"}, {"model": "x"}, {"init": "/etc/passwd"}, {"data.cache": "x"},
        {"vision": "x"}, {"wandb": "me"}, {"data.templates": "/etc/passwd"}, {"data.word": "../x"},
        {"data.word": "a/b"}, {"vae": "x"}, {"tokenizer": "x"}, {"save_model_as": "both"},
        {"data.source.path": "x"}, {"perceptual": "x"}, {"data.templates": "README.md"}, {"a b": 1}, {"seed": {}},
        {"class_data.path": "x"}, {"data.validation": "/etc"}, {"data.templates": "~/x"},
        {"data.templates": "x\\y"}, {"nothing": 1}, {"steps": "many"},
    ],
)  # fmt: skip
def test_a_training_request_names_no_file(shared, settings):
    order = {"recipe": "textual_inversion", "data": {"drawn": "pocketland"}, "settings": settings}
    assert ask(shared, "POST", "/api/training", order).status == 422 and jobs(shared) == []


def test_what_who_starts_the_server_says_is_not_for_requests(shared):
    for settings in ({"dtype": "float16"}, {"tokenizer": "x"}, {"ema": True}, {"prediction_type": "epsilon"}):
        got = ask(shared, "POST", "/api/jobs", {"settings": {"prompt": "a", **settings}})
        assert got.status == 422 and "the server was started with" in got.json()["detail"]


# ---- other sites' pages ------------------------------------------------------------------------------

UNSAFE = [
    ("POST", "/api/queue/clear"),
    ("POST", "/sdapi/v1/interrupt"),
    ("POST", "/api/jobs"),
    ("DELETE", "/api/jobs/1"),
]


@pytest.mark.parametrize("method, path", [*UNSAFE, ("GET", "/api/jobs"), ("GET", "/sdapi/v1/options")])
@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:7861"},
        {"origin": "http://127.0.0.1.evil.example:7860"},
        {"origin": ""},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
        {"host": "evil.example"},
        {"host": "evil.example:7860"},
        {"host": "127.0.0.1.evil.example"},
        {"host": ""},
    ],
    ids=lambda headers: next(iter(headers.items()))[0] + "=" + next(iter(headers.values())),
)
def test_another_sites_page_is_refused(shared, method, path, headers):
    got = ask(shared, method, path, {"settings": {"prompt": "a"}}, headers)
    assert got.status == 403, got
    assert not [name for name in got.headers if name.startswith("access-control")]
    assert jobs(shared) == []


def test_our_own_page_and_programs_are_heard(shared):
    for headers in ({}, {"origin": "http://127.0.0.1:7860"}, {"sec-fetch-site": "same-origin"}):
        assert ask(shared, "POST", "/api/queue/clear", {}, headers).status == 200
    assert (
        ask(shared, "GET", "/docs", headers={"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}).status
        == 200
    )
    assert (
        ask(shared, "GET", "/docs", host="[::1]:7860").status
        == ask(shared, "GET", "/docs", host="localhost").status
        == 200
    )


def test_no_answer_opens_the_server_to_others(shared):
    got = ask(shared, "OPTIONS", "/api/jobs", headers={"origin": "https://evil.example"})
    assert got.status in (403, 405)
    got = ask(shared, "GET", "/api/jobs")
    assert got.headers["x-content-type-options"] == "nosniff" and got.headers["x-frame-options"] == "SAMEORIGIN"
    assert not [name for name in got.headers if name.startswith("access-control")]


# ---- addresses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:1/x.png", "https://evil.example/x.png", "file:///etc/passwd", "ftp://x/y", "//x/y"]
)
def test_no_address_is_opened(shared, address, monkeypatch):
    import socket

    def refuse(*_, **__):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for body in (
        {"init_images": [address], "prompt": "a"},
        {"init_images": [b64(png())], "mask": address, "prompt": "a"},
    ):
        got = ask(shared, "POST", "/sdapi/v1/img2img", body)
        assert got.status == 422 and "base64" in got.json()["detail"], got
    for path in ("png-info", "extra-single-image"):
        assert ask(shared, "POST", f"/sdapi/v1/{path}", {"image": address}).status == 422
    unit = {"alwayson_scripts": {"controlnet": {"args": [{"image": address, "model": "x"}]}}, "prompt": "a"}
    assert ask(shared, "POST", "/sdapi/v1/txt2img", unit).status == 422
    assert ask(shared, "POST", "/api/jobs", {"settings": {"prompt": "a", "model": address}}).status == 422
    assert jobs(shared) == []


def test_a_hub_id_of_a_request_is_no_model(shared):
    got = ask(shared, "POST", "/api/jobs", {"settings": {"prompt": "a", "model": "owner/name"}})
    assert got.status == 422 and "pocket" in got.json()["detail"]


# ---- bombs ---------------------------------------------------------------------------------------------


def bomb(width, height):
    """Returns a PNG of very many pixels in few bytes."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    row = zlib.compress(b"\0" * (width // 8 + 1) * min(height, 4000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", row) + chunk(b"IEND", b"")


def text_bomb():
    about = PngImagePlugin.PngInfo()
    about.add_text("parameters", "x" * (8 << 20), zip=True)
    return png(pnginfo=about)


BAD = {
    "pixels": lambda: bomb(50_000, 50_000),
    "a little too large": lambda: bomb(4104, 4096),
    "text": text_bomb,
    "svg": lambda: b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
    "html": lambda: b"<html><script>alert(1)</script></html>",
    "gif": lambda: b"GIF89a" + b"\0" * 100,
    "tiff": lambda: b"II*\0" + b"\0" * 100,
    "cut off": lambda: png()[:60],
    "empty": lambda: b"",
    "tiny": lambda: png(4, 4),
    "pickle": lambda: b"\x80\x04cos\nsystem\n.",
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_good_picture_is_refused_and_not_kept(app, place, name):
    data = BAD[name]()
    got = ask(app, "POST", "/api/uploads", data, {"content-type": "application/octet-stream"})
    assert got.status == 422 and str(place.root) not in got.body.decode(), got
    assert ask(app, "POST", "/sdapi/v1/img2img", {"init_images": [b64(data)], "prompt": "a"}).status == 422
    body, headers = form(("image", "x.png", data), prompt="a")
    assert ask(app, "POST", "/v1/images/edits", body, headers).status == 400
    assert list((place.root / "uploads").iterdir()) == [] and jobs(app) == []


def archive(*files, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(written := io.BytesIO(), "w", method) as made:
        for name, data in files:
            made.writestr(name, data)
    return written.getvalue()


def lying():
    """Returns an archive whose directory says less than there is."""
    data = bytearray(archive(("a.png", b"\0" * (40 << 20))))
    place = data.index(b"PK\1\2") + 24
    data[place : place + 4] = (100).to_bytes(4, "little")
    return bytes(data)


ARCHIVES = {
    "bomb": lambda: archive(*((f"{i}.png", b"\0" * (40 << 20)) for i in range(2))),
    "lying": lying,
    "many": lambda: archive(*((f"{i}.txt", b"") for i in range(2 * uploads.MOST_FILES + 1)), method=zipfile.ZIP_STORED),
    "in itself": lambda: archive(("a.zip", archive(("b.png", png())))),
    "program": lambda: archive(("a.py", b"print()")),
    "no zip": lambda: b"PK\3\4" + b"\0" * 50,
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_bad_archives_are_refused(app, place, name):
    body, headers = form(("files", "set.zip", ARCHIVES[name]()))
    got = ask(app, "POST", "/api/sets", body, headers)
    assert got.status == 422, got
    kept = [path for path in (place.root / "sets").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in kept) < 1 << 20


def test_names_in_an_archive_never_lead_out_of_it(app, place):
    names = [
        "../../secret.png",
        "/etc/cron.d/x.png",
        "..\\..\\x.png",
        "a/b/../../../c.png",
        "\u202egnp.exe.png",
        ".png",
        "-rf.png",
    ]
    body, headers = form(
        ("files", "set.zip", archive(*((name, png()) for name in names))), ("files", "../../../up.png", png())
    )
    got = ask(app, "POST", "/api/sets", body, headers)
    assert got.status == 201, got
    folder = place.root / "sets" / got.json()["set"]
    for path in place.root.parent.rglob("*.png"):
        assert path.parent in (folder, place.root.parent), path
    assert all(path.name.isascii() and not path.name.startswith((".", "-.")) for path in folder.iterdir())
    assert (place.root.parent / "secret.png").read_bytes() == png()


# ---- too much ------------------------------------------------------------------------------------------


def test_long_bodies_are_refused_by_what_they_say_and_by_what_they_are(app, monkeypatch):
    monkeypatch.setattr(guard, "MOST_JSON", 1000)
    assert ask(app, "POST", "/api/jobs", b"x" * 2000).status == 413
    assert ask(app, "POST", "/api/jobs", b"x" * 2000, {"content-length": None}).status == 413
    assert ask(app, "POST", "/api/jobs", b"x" * 2000, {"content-length": "10"}).status == 413
    assert ask(app, "POST", "/api/jobs", b"x", {"content-length": "-1"}).status == 413
    assert ask(app, "POST", "/api/jobs", b"x", {"content-length": "9" * 5000}).status == 413


@pytest.mark.parametrize(
    "body", [b"[" * 100_000, b"{" * 1000, b"[]", b"1", b"\xff\xfe", b'{"a": ' + b"9" * 5000 + b"}"]
)
@pytest.mark.parametrize("path", ["/api/jobs", "/sdapi/v1/txt2img", "/v1/images/generations", "/sdapi/v1/options"])
def test_bodies_that_are_no_json_are_refused(shared, path, body):
    assert ask(shared, "POST", path, body).status == 400


def test_few_pictures_of_one_request(shared):
    for body in ({"prompt": "a", "batch_size": 1000}, {"prompt": "a", "n_iter": 100, "batch_size": 100}):
        assert ask(shared, "POST", "/sdapi/v1/txt2img", body).status == 422
    assert ask(shared, "POST", "/v1/images/generations", {"prompt": "a", "n": 10**6}).status == 400
    assert ask(shared, "POST", "/api/jobs", {"settings": {"prompt": "a"}, "count": 10**6}).status == 422
    units = [{"image": b64(png()), "model": "x"}] * 20
    body = {"prompt": "a", "alwayson_scripts": {"controlnet": {"args": units}}}
    assert ask(shared, "POST", "/sdapi/v1/txt2img", body).status == 422


def test_many_send_the_same_picture_at_once(place):
    data = png(300, 300)
    with ThreadPoolExecutor(8) as threads:
        names = set(threads.map(lambda _: uploads.keep(place, data), range(32)))
    assert [path.name for path in (place.root / "uploads").iterdir()] == list(names)


def test_a_large_picture_is_taken(app):
    noise = np.random.default_rng(0).integers(0, 255, (1500, 2000, 3), np.uint8)
    Image.fromarray(noise).save(written := io.BytesIO(), "PNG", compress_level=0)
    data = written.getvalue()
    assert len(data) > 8 << 20
    assert ask(app, "POST", "/api/uploads", data, {"content-type": "image/png"}).status == 201
    got = ask(app, "POST", "/sdapi/v1/png-info", {"image": b64(data)})
    assert got.status == 200 and got.json()["info"] == ""


def test_old_uploads_go_and_those_that_jobs_wait_for_stay(place):
    names = [uploads.keep(place, png(32 + i)) for i in range(5)]
    for i, name in enumerate(names):
        os.utime(place.upload(name), (i, i))
    assert uploads.pruned(place, [f'{{"image": "{names[0]}"}}'], most=2) == 2
    assert sorted(path.name for path in (place.root / "uploads").iterdir()) == sorted([names[0], *names[3:]])


# ---- passwords -----------------------------------------------------------------------------------------


def basic(name, password):
    return {"authorization": f"Basic {b64(f'{name}:{password}'.encode())}"}


@pytest.fixture
def guarded(place, monkeypatch):
    monkeypatch.setattr(auth, "COST", (1 << 10, 8, 1))
    path = place.root.parent / "users"
    auth.add_user(path, "ann", "right password")
    return server.create_app(place, None, auth.Auth(path)), path


def test_who_knows_a_password_is_let_in(guarded):
    app, path = guarded
    for headers in (basic("ann", "right password"), {"authorization": "Bearer ann:right password"}):
        assert ask(app, "GET", "/api/jobs", headers=headers, host="somewhere").status == 200
    for headers in (
        {}, basic("ann", "right passwore"), basic("bob", "right password"), basic("ann", ""), basic("", ""),
        {"authorization": "Basic ???"}, {"authorization": "Bearer ann"}, {"authorization": "Digest ann"},
    ):  # fmt: skip
        got = ask(app, "GET", "/api/jobs", headers=headers, host="somewhere", client=str(headers))
        assert got.status == 401 and got.headers["www-authenticate"].startswith("Basic")
    assert ask(app, "GET", "/docs").status == ask(app, "GET", "/openapi.json").status == 401
    assert "right password" not in path.read_text() and path.stat().st_mode & 0o077 == 0


def test_guesses_are_few(guarded):
    app, _ = guarded
    statuses = [
        ask(app, "GET", "/api/jobs", headers=basic("ann", f"guess {i}"), client="10.0.0.1").status for i in range(8)
    ]
    assert statuses == [401] * auth.TRIES + [429] * (8 - auth.TRIES)
    got = ask(app, "GET", "/api/jobs", headers=basic("ann", "right password"), client="10.0.0.1")
    assert got.status == 429 and int(got.headers["retry-after"]) > 0
    assert ask(app, "GET", "/api/jobs", headers=basic("ann", "right password"), client="10.0.0.2").status == 200


def test_guesses_from_many_addresses_are_few_too(guarded, monkeypatch):
    app, _ = guarded
    monkeypatch.setattr(auth, "ALL_TRIES", 6)
    statuses = [ask(app, "GET", "/", headers=basic("ann", f"{i}"), client=f"10.0.1.{i}").status for i in range(9)]
    assert statuses.count(401) == 6 and statuses[-1] == 429


def test_many_guesses_at_once_are_few_too(guarded, monkeypatch):
    checks = auth.Auth(guarded[1])
    hashed, hashing = [], auth._scrypt
    monkeypatch.setattr(auth, "_scrypt", lambda *given: hashed.append(given) or hashing(*given))

    def guess(i):
        with contextlib.suppress(auth.Wait):
            assert not checks.check(basic("ann", str(i))["authorization"], "x")

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(guess, range(16)))
    assert len(hashed) == len(checks.failed["x"]) == auth.TRIES
    with pytest.raises(auth.Wait):
        checks.check(basic("ann", "right password")["authorization"], "x")


def test_guesses_lock_nobody_out_who_was_let_in(guarded, monkeypatch):
    app, _ = guarded
    monkeypatch.setattr(auth, "ALL_TRIES", 6)
    right = basic("ann", "right password")
    assert [ask(app, "GET", "/api/jobs", headers=right, client="home").status for _ in range(8)] == [200] * 8
    for i in range(8):
        ask(app, "GET", "/api/jobs", headers=basic("ann", f"{i}"), client="home")
        ask(app, "GET", "/api/jobs", headers=basic("ann", f"{i}"), client=f"10.0.1.{i}")
    assert ask(app, "GET", "/api/jobs", headers=right, client="home").status == 200
    assert ask(app, "GET", "/api/jobs", headers=basic("ann", "other"), client="home").status == 429
    assert ask(app, "GET", "/api/jobs", client="home").status == 401  # no attempt


def test_password_files_that_are_none_are_refused(tmp_path):
    path = tmp_path / "users"
    for text in ("ann:plain\n", "ann:scrypt:x:8:1:00:00\n", "", ":scrypt:1:1:1:0:0\n"):
        path.write_text(text)
        path.chmod(0o600)
        with pytest.raises(ValueError) as error:
            auth.Auth(path)
        assert "plain" not in str(error.value)
    auth.add_user(path.with_name("new"), "ann", "long enough")
    path.with_name("new").chmod(0o644)
    with pytest.raises(ValueError, match="other users can read this file"):
        auth.Auth(path.with_name("new"))
    for name, password in (("a:b", "long enough"), ("", "long enough"), ("ann", "short")):
        with pytest.raises(ValueError):
            auth.add_user(path.with_name("new"), name, password)


def test_another_host_needs_passwords(capsys, tmp_path):
    for host in ("0.0.0.0", "192.168.1.2", "::", "myhost"):
        assert server.main("", ["--host", host, "--out", str(tmp_path / "ui")]) == 1
        assert "--auth" in capsys.readouterr().err
    assert not (tmp_path / "ui").exists()


# ---- what others on the machine see ------------------------------------------------------------------------


def test_files_are_their_owners_alone(app, place):
    os.umask(0o022)
    name = ask(app, "POST", "/api/uploads", png(), {"content-type": "image/png"}).json()["name"]
    assert place.upload(name).is_file()
    body, headers = form(("files", "a.png", png()))
    ask(app, "POST", "/api/sets", body, headers)
    assert stat.S_IMODE(place.root.stat().st_mode) == 0o700 and place.queue.stat().st_mode & 0o077 == 0
    for path in place.root.iterdir():
        assert not path.is_dir() or path.stat().st_mode & 0o077 == 0, path


def test_answers_do_not_tell_the_servers_paths(app, place):
    (place.models / "cat.safetensors").write_bytes(b"broken")
    own = ["/api/library", "/api/jobs", "/api/settings", "/api/sets", "/v1/models", "/openapi.json"]
    for path in (*own, *(f"/sdapi/v1/{name}" for name in ("sd-models", "cmd-flags", "options", "loras"))):
        assert str(place.root.parent) not in ask(app, "GET", path).body.decode(), path
    for order in ({"recipe": "full", "data": {"drawn": "pocketland"}, "settings": {"steps": -1}}, {"recipe": "x"}):
        got = ask(app, "POST", "/api/training", order)
        assert got.status == 422 and str(Path(__file__).parents[1]) not in got.body.decode(), got


def test_the_documents_load_nothing(shared):
    got = ask(shared, "GET", "/docs")
    assert b"/sdapi/v1/txt2img" in got.body and b"//" not in got.body.split(b"<body>")[0]
    assert "default-src 'none'" in got.headers["content-security-policy"] and b"<script" not in got.body
    described = ask(shared, "GET", "/openapi.json").json()
    held = json.dumps(described["paths"]["/api/jobs"]["post"])
    assert "control_mode" in held and "dpmpp_2m" in held and "tokenizer" not in held
