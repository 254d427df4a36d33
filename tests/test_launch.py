"""The scripts of train/launch/ and the Dockerfile, run against stand-ins: gcloud with two hosts, Slurm, make."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from programs import ROOT

from sdjax import settings

LAUNCH = ROOT / "train" / "launch"
PODS = (ROOT / "docs" / "pods.md").read_text()
TOOL = """#!/usr/bin/env bash
printf '%s' "$(basename "$0")" >> "$SAID"; printf ' [%s]' "$@" >> "$SAID"; printf ' ACCEL=%s\\n' "${ACCEL:-}" >> "$SAID"
"""
# ssh: both hosts run the command, each in its own home.  scp: the file comes to both.
GCLOUD = """
hosts="$HOSTS/0 $HOSTS/1"
for argument in "$@"; do
    case "$argument" in --command=*) command="${argument#--command=}" ;; *.tar.gz) file="$argument" ;; esac
done
case " $* " in
*" scp "*) for host in $hosts; do mkdir -p "$host"; cp "$file" "$host"; done ;;
*" ssh "*) for host in $hosts; do mkdir -p "$host"; (cd "$host" && HOME="$host" bash -c "$command") || exit; done ;;
esac
"""
# As srun does, a process for each of two tasks; the status is the largest.
SRUN = """
while [[ "$1" == --* ]]; do shift; done
status=0
for i in 0 1; do
    SLURM_PROCID=$i "$@" || status=$?
done
exit $status
"""
PYTHON = 'mkdir -p "$HOME/.local/bin"; cp "$(dirname "$0")/uv" "$HOME/.local/bin/uv"\n'
TOOLS = {
    "gcloud": GCLOUD, "srun": SRUN, "python3": PYTHON, "sudo": '"$@"\n', "uv": "echo /usr/bin/python3.12\n",
    "make": 'exit "${MAKE_ENDS:-0}"\n', "mount": "", "apt-get": "", "scontrol": "",
}  # fmt: skip


@pytest.fixture
def launched(tmp_path):
    """A function that runs a command of the documents among stand-ins; returns (status, their lines, stderr)."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, does in TOOLS.items():
        (tools / name).write_text(TOOL + does)
        (tools / name).chmod(0o755)

    def run(*words, **variables):
        said = tmp_path / "said"
        said.write_text("")
        env = {
            **os.environ,
            "PATH": f"{tools}:{os.environ['PATH']}",
            "SAID": str(said),
            "HOSTS": str(tmp_path / "hosts"),
        }
        env.pop("ACCEL", None)
        done = subprocess.run(words, cwd=ROOT, env={**env, **variables}, capture_output=True, text=True, timeout=60)
        return done.returncode, said.read_text().splitlines(), done.stderr

    return run


def documented(start):
    """Returns the words of the commands in docs/pods.md that begin with `start`."""
    return [shlex.split(line) for line in re.findall(rf"^    ({re.escape(start)}.*)$", PODS, re.MULTILINE)]


SLICE = dict(word.split("=") for word in documented("export ")[0][1:])


# ---- a TPU slice -------------------------------------------------------------------------------


def test_a_slice_is_made_and_every_host_installs(launched, tmp_path):
    status, said, _ = launched(*documented("train/launch/tpu.sh up")[0], **SLICE)
    assert status == 0
    assert said[0].startswith("gcloud [compute] [tpus] [tpu-vm] [create] [sdjax] [--zone=us-west4-a] [--quiet]")
    assert "[--accelerator-type=v5litepod-16] [--version=v2-alpha-tpuv5-lite]" in said[0]
    mounts = [line for line in said if line.startswith("mount [")]
    assert mounts == ["mount [10.0.0.2:/share] [sdjax/outputs] ACCEL="] * 2
    installs = [line for line in said if line.startswith("make [")]
    assert installs == ["make [-C] [sdjax] [install] [ACCEL=tpu] [PYTHON=/usr/bin/python3.12] ACCEL="] * 2
    for host in ("0", "1"):
        assert (tmp_path / "hosts" / host / "sdjax" / "train" / "run.py").is_file()
        assert not (tmp_path / "hosts" / host / "sdjax" / ".venv").exists()


def test_a_command_arrives_at_every_host_as_it_was_given(launched, tmp_path):
    for host in ("0", "1"):
        (tmp_path / "hosts" / host / "sdjax").mkdir(parents=True)
    words = documented("train/launch/tpu.sh run")[0]
    status, said, _ = launched(*words, **SLICE)
    assert status == 0 and "[ssh]" in said[0] and "[--worker=all]" in said[0]
    wanted = "".join(f" [{word}]" for word in words[3:])
    assert said[1:] == [f"make{wanted} ACCEL=tpu"] * 2
    assert launched(*words, **SLICE, MAKE_ENDS="3")[0] != 0


def test_a_slice_is_removed(launched):
    status, said, _ = launched(*documented("train/launch/tpu.sh down")[0], **SLICE)
    assert status == 0 and said == [
        "gcloud [compute] [tpus] [tpu-vm] [delete] [sdjax] [--zone=us-west4-a] [--quiet] ACCEL="
    ]


@pytest.mark.parametrize("words", [[], ["run"], ["downn"]])
def test_a_slice_knows_three_words(launched, words):
    status, said, error = launched("train/launch/tpu.sh", *words, **SLICE)
    assert status == 2 and said == [] and error.startswith("usage: train/launch/tpu.sh")
    assert "ZONE" in launched("train/launch/tpu.sh", "down", NAME="sdjax", ZONE="")[2]


# ---- Slurm -------------------------------------------------------------------------------------


def test_slurm_starts_a_process_per_task(launched):
    (words,) = documented("sbatch ")
    script = [word for word in words[1:] if not word.startswith("--")]
    status, said, _ = launched(*script, SLURM_JOB_ID="7")
    assert status == 0 and script[0] == "train/launch/slurm.sh"
    wanted = "".join(f" [{word}]" for word in ["train-encoder", *script[1:]])
    assert [line for line in said if line.startswith("make")] == [f"make{wanted} ACCEL=cuda"] * 2


@pytest.mark.parametrize(("ends", "again"), [("143", True), ("1", False), ("0", False)])
def test_slurm_queues_again_after_a_signal_alone(launched, ends, again):
    status, said, _ = launched("train/launch/slurm.sh", SLURM_JOB_ID="7", MAKE_ENDS=ends)
    assert status == int(ends)
    assert [line for line in said if line.startswith("scontrol")] == ["scontrol [requeue] [7] ACCEL=cuda"] * again


# ---- one machine -------------------------------------------------------------------------------

TELLS = 'echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS"; exit "$JAX_PROCESS_ID"'


def test_processes_of_one_machine():
    line = [str(LAUNCH / "local.sh"), "3", "bash", "-c", TELLS]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1  # the first that is not 0
    assert sorted(done.stdout.splitlines()) == [f"{i} of 3 at 127.0.0.1:8476" for i in range(3)]
    assert subprocess.run([line[0], "bash"], capture_output=True, timeout=60).returncode == 2


def test_a_signal_reaches_processes_of_one_machine(tmp_path):
    waits = f"trap 'exit 143' TERM; touch {tmp_path}/$JAX_PROCESS_ID; while :; do sleep 0.05; done"
    started = subprocess.Popen([str(LAUNCH / "local.sh"), "2", "bash", "-c", waits])
    while len(list(tmp_path.iterdir())) < 2:
        assert started.poll() is None
    started.terminate()
    assert started.wait(60) == 143


# ---- Kubernetes and the image ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gke_tpu.yaml", "gke_gpu.yaml"])
def test_pods_find_each_other(name):
    service, job = yaml.safe_load_all((LAUNCH / name).read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["selector"] == {
        "job-name": job["metadata"]["name"]
    }
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] == spec["completions"] > 1
    assert pod["subdomain"] == service["metadata"]["name"]
    assert container["volumeMounts"][0]["mountPath"] == "/sdjax/outputs" == f"{workdir()}/outputs"
    if name == "gke_gpu.yaml":  # GKE says this itself for TPUs
        env = {one["name"]: one for one in container["env"]}
        assert env["JAX_NUM_PROCESSES"]["value"] == str(spec["parallelism"])
        assert env["JAX_COORDINATOR_ADDRESS"]["value"] == f"{job['metadata']['name']}-0.{pod['subdomain']}:8476"
        assert "completion-index" in env["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    else:
        rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
        assert rows * columns == spec["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    understood(container["command"])


def understood(words):
    """Checks a command of make: the program that it runs reads its settings."""
    made = subprocess.run([*words[:1], "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
    (line,) = [line for line in made.stdout.splitlines() if line.startswith(".venv/bin/python train/run.py")]
    settings.load(ROOT / shlex.split(line)[2], shlex.split(line)[3:])


def workdir():
    return re.search(r"^WORKDIR (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[1]


def test_the_workload_of_xpk_is_understood():
    (words,) = documented("xpk workload create")
    (command,) = [word.removeprefix("--command=") for word in words if word.startswith("--command=")]
    first, second = command.split(" && ")
    assert first == f"cd {workdir()}"
    understood(shlex.split(second))
    (storage,) = documented("xpk storage create")
    assert f"--mount-point={workdir()}/outputs" in storage


def test_the_image_installs_what_make_does():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert "RUN make install" in lines and lines.index("ENV ACCEL=$ACCEL PYTHONUNBUFFERED=1") < lines.index("COPY . .")
    env = {**os.environ, "ACCEL": "tpu"}
    made = subprocess.run(["make", "-n", "-B", "install"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert made.returncode == 0 and '-e ".[tpu]"' in made.stdout
    left_out = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "outputs"} <= set(left_out)


def test_scripts_can_be_started():
    scripts = [path for path in LAUNCH.iterdir() if path.suffix == ".sh"]
    assert {path.name for path in scripts} == {"local.sh", "slurm.sh", "tpu.sh"}
    for path in scripts:
        assert os.access(path, os.X_OK) and subprocess.run(["bash", "-n", path]).returncode == 0
    assert all(Path(ROOT / name).is_file() for name in re.findall(r"train/launch/[a-z_]+\.[a-z]+", PODS))
