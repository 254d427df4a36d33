"""Several processes: how they are found, by JAX's own detection, and what those that have not joined are told."""

import http.server
import os
import subprocess
import sys
import threading
import types

import jax
import programs
import pytest
from jax._src import clusters
from jax._src.clusters import cloud_tpu_cluster, cluster

from sdjax.methods.clip import Clip
from sdjax.runtime import accelerator, processes, watch
from sdjax.service import teaching, worker
from sdjax.service.place import Place
from sdjax.service.queue import FAILED
from sdjax.settings import SettingError
from sdjax.training.loop import train
from sdjax.training.settings import Train
from sdjax.web import server

VARIABLES = (*processes.OWN, *processes.COUNTS, *processes.HOSTS, "SLURM_STEP_NODELIST", "KUBERNETES_SERVICE_HOST")
SLURM = {
    "SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "node[007-008,012]", "SLURM_NTASKS": "6", "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911", "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}  # fmt: skip
GKE = {"TPU_WORKER_HOSTNAMES": "localhost,sdjax-1.sdjax", "TPU_WORKER_ID": "1"}
OWN = {"JAX_COORDINATOR_ADDRESS": "node1:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
FOUND = [  # environment, whether of a TPU host, (address of process 0, number, place), devices of the process
    (OWN, False, ("node1:1234", 2, 0), None),
    (SLURM, False, ("node007:61441", 6, 5), [1]),
    ({**SLURM, **OWN}, False, ("node1:1234", 2, 0), None),
    (OPEN_MPI, False, ("10.96.0.1:62624", 4, 3), [0]),
    (GKE, True, ("localhost:8482", 2, 1), None),
    ({**GKE, "MEGASCALE_COORDINATOR_ADDRESS": "localhost", "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"},
     True, ("localhost:8482", 4, 3), None),
]  # fmt: skip
ONE = [
    {},
    {"SLURM_NTASKS": "2"},  # sbatch's script
    {"SLURM_STEP_NODELIST": "node1", "SLURM_NTASKS": "1"},
    {"TPU_WORKER_HOSTNAMES": "localhost"},
    {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": "node1:1234"},
]


@pytest.fixture
def joined(monkeypatch):
    """A function of an environment: what JAX would begin with, (address, number, place), devices; None if alone."""

    def join(variables, tpu=False):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        began = []

        def initialize(address, number, place, cluster_detection_method, **_):
            given = (address or os.environ.get("JAX_COORDINATOR_ADDRESS"), number, place, None)
            if cluster_detection_method != "deactivate":
                given = clusters.ClusterEnv.auto_detect_unset_distributed_params(*given, cluster_detection_method, 5)
            if None in given[:3]:
                raise ValueError("Number of processes must be defined.")
            began.append((given[:3], given[3]))

        monkeypatch.setattr(jax.distributed, "initialize", initialize)
        for module in (cloud_tpu_cluster, cluster):
            monkeypatch.setattr(module, "running_in_cloud_tpu_vm", tpu)
        processes.join()
        return began[0] if began else None

    return join


@pytest.fixture
def metadata(monkeypatch):
    """The metadata server of a TPU host, the second of two."""
    told = {"agent-worker-number": "1", "worker-network-endpoints": "a:b:127.0.0.1,a:b:10.0.0.2", "tpu-env": "TYPE: x"}

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(told[self.path.rpartition("/")[2]].encode())

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        yield
        server.shutdown()


@pytest.mark.parametrize(("variables", "tpu", "wanted", "devices"), FOUND)
def test_launchers_are_found(joined, metadata, variables, tpu, wanted, devices):
    assert joined(variables, tpu) == (wanted, devices)


@pytest.mark.parametrize("variables", ONE)
def test_one_is_none_of_several(joined, variables):
    assert joined(variables) is None
    processes.check_joined("training")


def test_a_tpu_slice_is_found_by_its_metadata(joined, metadata, monkeypatch):
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: name == "libtpu")
    assert joined({}, tpu=True) == (("127.0.0.1:8482", 2, 1), None)


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": "node1:1234"}, "set JAX_PROCESS_ID"),
        ({"JAX_PROCESS_ID": "0"}, "JAX_PROCESS_ID=0: the processes do not come together"),
        ({**OWN, "JAX_PROCESS_ID": "first"}, "JAX_PROCESS_ID='first': expected a whole number"),
    ],
)
def test_variables_that_do_not_fit(joined, variables, line):
    with pytest.raises(ValueError, match=line) as raised:
        joined(variables)
    assert "\n" not in str(raised.value)


def test_processes_that_have_not_joined_do_not_train(monkeypatch, tmp_path):
    for name, value in OWN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="^JAX_NUM_PROCESSES=2: training would run in each process alone"):
        train(Train(method=Clip()), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- accelerators that are not there ----------------------------------------------------------


@pytest.mark.parametrize("said", ["cuda", "tpu"])
def test_a_run_that_would_fall_back_to_the_cpu_stops_in_one_line(said, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("ACCEL", said)
    run = programs.load("train/run.py", monkeypatch)
    assert run.main([str(programs.ROOT / "configs/full.py"), "data.path=pocketland", f"out={tmp_path / 'run'}"]) == 1
    line = capsys.readouterr().err
    assert line.startswith(f"error: ACCEL='{said}': JAX finds no such device and would run on cpu; ")
    assert line.count("\n") == 1 and not (tmp_path / "run").exists()


def test_server_worker_and_benchmarks_stop_too(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("ACCEL", "cuda")
    said = "ACCEL='cuda': JAX finds no such device"
    with pytest.raises(ValueError, match=said):
        accelerator.check_apart()
    monkeypatch.setattr(accelerator, "check_apart", lambda: accelerator.check())
    assert server.main(None, ["--out", str(tmp_path / "ui"), "--api-only"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {said}")
    failed = []
    queue = types.SimpleNamespace(finish=lambda id, state, result, error: failed.append((state, error)))
    drawing = types.SimpleNamespace(result=lambda job: {}, place=Place(tmp_path))
    worker.run(queue, types.SimpleNamespace(id=1), drawing)
    assert failed[0][0] == FAILED and said in failed[0][1]
    monkeypatch.setattr(teaching, "_loaded", lambda *_: types.SimpleNamespace(steps=1))
    job = types.SimpleNamespace(request={}, key="")
    state, error = teaching._trained(Place(tmp_path), job, tmp_path)
    assert state == FAILED and said in error
    for name in ("bench", "compare"):
        program = programs.load(f"benchmarks/{name}.py", monkeypatch)
        monkeypatch.setattr(sys, "argv", [name, *(["--out", str(tmp_path)] if name == "compare" else [])])
        with pytest.raises(ValueError, match=said):
            program.main()


def test_accel_names_what_there_is(monkeypatch):
    for said in ("", "cpu"):
        monkeypatch.setenv("ACCEL", said)
        accelerator.check()
    monkeypatch.setenv("ACCEL", "gpu")
    with pytest.raises(SettingError, match="ACCEL='gpu': expected one of cpu, cuda, tpu"):
        accelerator.check()
    monkeypatch.setenv("ACCEL", "tpu")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    accelerator.check()

    def nothing():
        raise RuntimeError

    monkeypatch.setattr(jax, "default_backend", nothing)
    with pytest.raises(SettingError, match=r"would run on nothing \(RuntimeError\)"):
        accelerator.check()


# ---- one line for a lost process ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("does", "status", "wanted"),
    [
        ("os.write(2, PAGE); os.abort()", 1, f"error: {watch.LOST}\n"),
        ("os.write(2, b'from C++\\n'); sys.stderr.write('from Python\\n'); sys.exit(3)", 3, "from Python\nfrom C++\n"),
        ("sys.stderr.write('error: gone\\n'); os.write(2, PAGE); sys.exit(1)", 1, "error: gone\n"),
        ("os.write(2, PAGE); sys.exit(0)", 0, "E1 coordination_service.cc:1] lost\n#0 0x1\n"),
        ("subprocess.Popen(['sleep', '90'], stdout=-3); os.write(2, PAGE); os.abort()", 1, f"error: {watch.LOST}\n"),
        ("os.abort()", 134, ""),
        ("os.kill(os.getppid(), 15); time.sleep(9)", 143, ""),
    ],
)
def test_the_page_of_a_lost_process_becomes_one_line(does, status, wanted):
    program = f"""
import os, subprocess, sys, time
from sdjax.runtime import watch
PAGE = b"E1 coordination_service.cc:1] lost\\n#0 0x1\\n"
watch.split()
{does}
"""
    env = {**os.environ, **OWN, "PYTHONPATH": str(programs.ROOT)}
    run = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=60)
    assert run.returncode == status
    assert sorted(filter(None, run.stderr.splitlines())) == sorted(wanted.splitlines())


def test_a_process_waits_for_the_others_outside_of_what_failed_inside(monkeypatch):
    """So that the one that failed can say why: it is at the outer call, too."""
    flags = []
    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(processes, "every", lambda flag: flags.append(flag) or False)
    with pytest.raises(SystemExit) as end:
        processes.together(lambda: processes.together(lambda: 1))
    assert end.value.code == processes.FAILED and flags == [True, False]
    flags.clear()
    with pytest.raises(ValueError, match="a reason"):
        processes.together(lambda: processes.together(lambda: (_ for _ in ()).throw(ValueError("a reason"))))
    assert flags == [False, False]


def test_a_process_alone_is_not_split(monkeypatch, tmp_path):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(watch, "CHIPS", (str(tmp_path / "accel[0-9]*"),))
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("split"))
    watch.split()
    (tmp_path / "accel0").touch()
    with pytest.raises(pytest.fail.Exception, match="split"):
        watch.split()
