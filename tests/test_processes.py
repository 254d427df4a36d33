"""Training runs in one process: what several, started together, are told."""

import programs
import pytest

VARIABLES = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS")
VARIABLES += ("SLURM_NTASKS", "SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE")
SEVERAL = [
    ({"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "2"}, "SLURM_NTASKS=2"),
    ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES=2"),
    ({"JAX_PROCESS_ID": "0"}, "JAX_PROCESS_ID=0"),
    ({"JAX_COORDINATOR_ADDRESS": "node1:1234"}, "JAX_COORDINATOR_ADDRESS=node1:1234"),
    ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=4"),
]
ONE = [
    {},
    {"SLURM_NTASKS": "2"},  # sbatch's script
    {"SLURM_STEP_NODELIST": "node1", "SLURM_NTASKS": "1"},
    {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": "node1:1234"},
]


@pytest.fixture
def start(monkeypatch, tmp_path, capsys):
    """Starts train/run.py with a model that is not there under these variables; returns what it says."""
    run = programs.load("train/run.py", monkeypatch)

    def started(variables):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        config = str(programs.ROOT / "configs" / "textual_inversion.py")
        assert (
            run.main(
                [config, "model=random:none", "data.path=pocketland", "data.word=<new>", f"out={tmp_path / 'run'}"]
            )
            == 1
        )
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().err

    return started


@pytest.mark.parametrize(("variables", "named"), SEVERAL)
def test_several_are_refused_in_one_line(start, variables, named):
    said = start(variables)
    assert said.startswith(f"error: {named}: training runs in one process; ") and said.count("\n") == 1


@pytest.mark.parametrize("variables", ONE)
def test_one_is_none_of_several(start, variables):
    assert "random:none" in start(variables)
