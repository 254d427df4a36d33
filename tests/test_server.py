"""A server and its worker as processes: what clients ask for is made, once, whatever dies meanwhile."""

import base64
import io
import json
import random
import socket
import time

import numpy as np
import pytest
from PIL import Image

from sdjax.client import ServerError
from sdjax.service import records
from sdjax.service.queue import Queue
from tests.serving import Served, gone, wait_for

STEPS = 3
LONG = {"steps": 900, "size": "128x128", "sampler": "euler"}


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    server = Served(tmp_path_factory.mktemp("served") / "ui", "--batch", 1).start()
    yield server
    if server.process.poll() is None:
        assert server.stop() == 0


@pytest.fixture
def served(process):
    """A server that lives, whatever the test before did to it."""
    return process if process.process.poll() is None else process.start()


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def over(client, job, seconds=120):
    return wait_for(
        lambda: (now := client.job(job["id"]))["state"] in ("done", "failed", "cancelled", "stopped") and now, seconds
    )


def long(client, **more):
    """Puts a job that lasts until it is stopped, and waits until it samples."""
    job = client.submit(prompt="a long one", **LONG, **more)
    wait_for(lambda: (now := client.job(job["id"]))["phase"] == "sampling" or now["error"])
    assert client.job(job["id"])["state"] == "running"
    return job


def test_a_job_is_followed_and_fetched(served):
    client = served.client()
    job = client.submit("text2img", prompt="a face", steps=STEPS, seed=7, count=2)
    seen = list(client.watch(job["id"]))
    assert seen[-1]["state"] == "done" and seen[-1]["progress"] == 1 and seen[-1]["pictures"] == 2
    assert {one["state"] for one in seen} == {"waiting", "running", "done"}
    first, second = client.fetch(job["id"])
    again = client.submit("text2img", prompt="a face", steps=STEPS, seed=8)
    over(client, again)
    np.testing.assert_allclose(pixels(client.fetch(again["id"])[0]), pixels(second), atol=1)
    same = client.submit("text2img", prompt="a face", steps=STEPS, seed=7, count=2)
    over(client, same)
    assert client.fetch(same["id"]) == [first, second]  # byte for byte


def test_pictures_are_the_command_lines(served, tmp_path):
    from sdjax.service import programs

    client, out = served.client(), tmp_path / "made"
    line = ["--model", "random:tiny", "--prompt", "a (face:1.2)", "--seed", "5", "--steps", "4", "--out", str(out)]
    assert programs.main("text2img", "", [*line, "--sampler", "dpmpp_2m"]) == 0
    settings = {"prompt": "a (face:1.2)", "seed": 5, "steps": 4, "sampler": "dpmpp_2m", "grammar": "a1111"}
    job = client.submit(**settings)
    assert over(client, job)["state"] == "done"
    (data,), (path,) = client.fetch(job["id"]), out.glob("*.png")
    np.testing.assert_allclose(pixels(data).astype(int), pixels(path.read_bytes()), atol=1)
    (tmp_path / "served.png").write_bytes(data)
    ours, theirs = (records.text(records.read(one)) for one in (tmp_path / "served.png", path))
    assert ours == theirs


def test_what_cannot_be_made_is_said_at_once(served):
    client = served.client()
    for settings, said in (
        ({"prompt": "a", "stepz": 3}, "stepz: unknown; expected steps"),
        ({"prompt": "a", "steps": 0}, "steps=0"),
        ({"prompt": "a", "image": "x.png"}, "the name of an upload"),
        ({}, "prompt: missing"),
    ):
        with pytest.raises(ServerError, match=said):
            client.submit(**settings)
    job = client.submit(prompt="a", size="33x33")
    assert over(client, job)["state"] == "failed" and "multiples" in client.job(job["id"])["error"]
    with pytest.raises(ServerError, match="multiples"):
        client.fetch(job["id"])


def test_a_picture_to_begin_with(served, tmp_path):
    client = served.client()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save(tmp_path / "a.png")
    name = client.upload(tmp_path / "a.png")
    assert client.upload(tmp_path / "a.png") == name
    job = client.submit("img2img", prompt="a", image=name, steps=4, strength=0.5)
    assert over(client, job)["state"] == "done" and pixels(client.fetch(job["id"])[0]).shape == (32, 32, 3)
    assert client._call(f"/api/uploads/{name}") == (tmp_path / "a.png").read_bytes()


def test_stop_frees_the_device_between_steps_and_resume_goes_on(served):
    client = served.client()
    job, next_one = long(client), client.submit(prompt="next", steps=STEPS)
    before = client.job(job["id"])["step"]
    client.stop(job["id"])
    begin = time.monotonic()
    assert over(client, job)["state"] == "cancelled" and time.monotonic() - begin < 5
    assert client.job(job["id"])["step"] >= before and over(client, next_one)["state"] == "done"
    client.post(f"/api/jobs/{job['id']}/resume")
    wait_for(lambda: client.job(job["id"])["state"] == "running")
    client.stop(job["id"])
    over(client, job)


def test_skip_leaves_one_batch_out(served):
    client = served.client()
    job = long(client, count=2)
    client.post(f"/api/jobs/{job['id']}/skip")
    wait_for(lambda: client.job(job["id"])["asked"] == "" and client.job(job["id"])["state"] == "running")
    time.sleep(0.3)
    assert client.job(job["id"])["state"] == "running"
    client.post(f"/api/jobs/{job['id']}/skip")
    assert over(client, job)["state"] == "done" and client.job(job["id"])["pictures"] == 0


def test_pause_reorder_clear(served):
    client = served.client()
    client.post("/api/queue/pause")
    a, b, c = (client.submit(prompt=word, steps=STEPS) for word in "abc")
    client.post(f"/api/jobs/{c['id']}/move", {"before": a["id"]})
    assert client.get("/api/jobs")["order"][-3:] == [c["id"], a["id"], b["id"]]
    time.sleep(0.3)
    assert client.job(c["id"])["state"] == "waiting"
    client.stop(b["id"])
    client.post("/api/queue/go")
    assert over(client, c)["state"] == over(client, a)["state"] == "done"
    assert client.job(c["id"])["started"] < client.job(a["id"])["started"]
    assert client.job(b["id"])["state"] == "cancelled"
    client.post("/api/queue/pause")
    client.submit(prompt="d")
    client.post("/api/queue/clear")
    client.post("/api/queue/go")
    assert client.get("/api/jobs")["order"] == []


def test_a_preview_is_seen_while_a_picture_is_made(served):
    client = served.client()
    job = long(client)
    shown = wait_for(lambda: client._call(f"/api/jobs/{job['id']}/preview"))
    assert pixels(shown).ndim == 3
    progress = client.get("/sdapi/v1/progress")
    assert progress["textinfo"] == "sampling" and progress["state"]["job_count"] == 1
    assert pixels(base64.b64decode(progress["current_image"])).ndim == 3
    client.stop(job["id"])
    over(client, job)
    assert client._call(f"/api/jobs/{job['id']}/preview") == b""
    idle = client.get("/sdapi/v1/progress")
    assert (idle["progress"], idle["state"]["job_count"], idle["current_image"]) == (0, 0, None)


def test_a_client_that_goes_away_cancels_its_job(served):
    client = served.client()
    host, _, port = served.url.removeprefix("http://").partition(":")
    body = json.dumps({"prompt": "a", "steps": 900, "width": 128, "height": 128, "sampler_name": "Euler"}).encode()
    head = f"POST /sdapi/v1/txt2img HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        newest = lambda: [one for one in client.get("/api/jobs")["jobs"] if one["source"] == "sdapi"]  # noqa: E731
        job = wait_for(newest)[0]
        wait_for(lambda: client.job(job["id"])["phase"] == "sampling")
    assert over(client, job)["state"] == "cancelled"


def test_events_go_on_where_they_ended(served):
    client = served.client()
    job = client.submit(prompt="a", steps=STEPS)
    over(client, job)
    with client._open("/api/events?after=0") as stream:
        lines = [stream.readline().decode() for _ in range(6)]
    assert lines[0].startswith(":") and "event: job\n" in lines
    identity = next(line for line in lines if line.startswith("id: "))
    assert int(identity.split()[1]) > 0


def test_two_servers_on_one_folder_are_refused(served):
    import subprocess
    import sys

    from tests.serving import ROOT, environment

    line = [sys.executable, "-m", "sdjax", "ui", "--out", str(served.out), "--port", "0"]
    run = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert run.returncode == 1 and "another process" in run.stderr or "has it" in run.stderr
    assert len(run.stderr.splitlines()) == 1


# ---- whatever dies ---------------------------------------------------------------------------------


def wanted(i):
    return {"prompt": f"a face {i}", "steps": 2 + i % 3, "seed": i, "sampler": ("euler", "dpmpp_2m")[i % 2]}


def all_done(server, jobs, seconds=240):
    """Returns the pictures of jobs, each of which was made once."""
    client = server.client()
    made = []
    for job in jobs:
        now = over(client, job, seconds)
        assert now["state"] == "done", now
        made.append(client.fetch(job["id"]))
        assert len(made[-1]) == job["count"]
    files = list((server.out / "pictures").iterdir())
    assert all(not path.name.startswith(".") for path in files) and len({path.name for path in files}) == len(files)
    return made


def faults(server, kill, count, moments):
    """Kills something at random moments while jobs wait; returns the pictures of all jobs."""
    client, jobs = server.client(), []
    for moment in moments:
        jobs += [client.submit(count=1 + (len(jobs) + i) % 2, **wanted(len(jobs) + i)) for i in range(count)]
        time.sleep(moment)
        kill(server)
        client = server.client()
    return jobs, all_done(server, jobs)


def restarted(server):
    server.kill()
    server.start()


def test_killed_servers_and_workers_lose_nothing(served):
    """The short form of benchmarks/faults_queue.py."""
    random.seed(0)
    before = len(list((served.out / "pictures").iterdir()))
    jobs, made = faults(served, Served.kill_worker, 2, [0.4, 3.0])
    more, again = faults(served, restarted, 2, [0.5, 1.0])
    client = served.client()
    assert len(list((served.out / "pictures").iterdir())) == before + sum(job["count"] for job in jobs + more)
    for job, pictures in zip(jobs + more, made + again, strict=True):
        settings = {name: value for name, value in job["settings"].items() if name != "model"}
        same = client.submit(count=job["count"], **settings)
        over(client, same)
        assert client.fetch(same["id"]) == pictures


# ---- training ------------------------------------------------------------------------------------------


def photos(folder, count=3):
    folder.mkdir()
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 255, (40, 32, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return sorted(folder.iterdir())


TRAINS = {"steps": 6, "checkpoint": 5, "log": 1, "data.batch": 2, "method.init": "", "preview": 0}


@pytest.mark.slow
def test_training_is_killed_and_goes_on(served, tmp_path):
    client, files = served.client(), photos(tmp_path / "photos")
    job = client.train("textual_inversion", files, settings={**TRAINS, "steps": 60}, name="noise")
    step = wait_for(lambda: (now := client.job(job["id"])["step"]) > 5 and now, 180)
    picture = client.submit(prompt="after", steps=STEPS)
    assert served.kill_worker()
    wait_for(lambda: client.job(job["id"])["step"] > step, 180)
    assert client.job(picture["id"])["state"] == "waiting"
    client.post(f"/api/jobs/{job['id']}/sample")
    done = over(client, job, 240)
    assert done["state"] == "done" and done["step"] == 60, done
    events = [line["event"] for line in client.get(f"/api/jobs/{job['id']}/figures") if "event" in line]
    assert events[:2] == ["started", "resumed"] and client.get(f"/api/jobs/{job['id']}/samples")
    figures = [line for line in client.get(f"/api/jobs/{job['id']}/figures") if "loss" in line]
    assert figures[-1]["step"] == 60 and "result:" in client._call(f"/api/jobs/{job['id']}/log").decode()
    sizes = {path.name: path.stat().st_size for path in client.export(job["id"], tmp_path / "export")}
    assert sizes["learned_embeds.safetensors"] > 100
    client.post(f"/api/jobs/{job['id']}/keep", {"name": "noise"})
    assert "noise" in client.get("/sdapi/v1/embeddings")["loaded"]
    for name in ("noise", "../noise", "", 3):
        with pytest.raises(ServerError, match="name"):
            client.post(f"/api/jobs/{job['id']}/keep", {"name": name})


def test_a_worker_without_a_server_ends_its_jobs_and_then_itself(served):
    client = served.client()
    jobs = [client.submit(**wanted(i)) for i in range(3)]
    wait_for(lambda: client.job(jobs[0]["id"])["state"] in ("running", "done"))
    pid = served.worker()
    served.kill()
    queue = Queue(served.out / "queue.db")
    wait_for(lambda: all(queue.get(job["id"]).state == "done" for job in jobs))
    assert gone(pid, 30)
