"""The examples run, and survive being killed."""

import importlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest


examples = Path(__file__).parent.parent / "examples"


def _command(name, output, *args):
    return [
        sys.executable,
        str(examples / f"{name}.py"),
        "--preset",
        "smoke",
        "--output",
        str(output),
        *args,
    ]


def _run(name, output, *args):
    out = subprocess.run(
        _command(name, output, *args), capture_output=True, text=True, timeout=300
    )
    assert out.returncode == 0, out.stderr
    return out


def _check_plots(output, *plots):
    for plot in plots:
        assert (output / plot).read_bytes().startswith(b"\x89PNG")


def _check_resume(name, whole, killed, solver, *args):
    """Killed in the middle of training, at whatever moment that is."""
    with subprocess.Popen(_command(name, killed, "--solver", solver, *args)) as process:
        checkpoint = killed / f"checkpoint_{solver}.eqx"
        while not checkpoint.exists() and process.poll() is None:
            time.sleep(0.002)
        process.kill()
    model = f"model_{solver}.eqx"
    assert not (killed / model).exists()
    _run(name, killed, "--solver", solver, "--resume", *args)
    assert (killed / model).read_bytes() == (whole / model).read_bytes()


def _check_training(name, output, plot, *args):
    out = _run(name, output, *args)
    # No progress, where there is no terminal.
    assert str(output) in out.stdout and out.stderr == ""
    _check_plots(output, "loss.png", plot)
    return json.loads((output / "summary.json").read_text())


def test_hamiltonian_nn(tmp_path):
    summary = _check_training("hamiltonian_nn", tmp_path, "trajectory.png")
    assert len(summary["solvers"]) == 3
    assert summary["max_relative_loss_difference"] < 1e-8
    for solver in summary["solvers"].values():
        assert solver["test_loss"] < solver["untrained_test_loss"]
    # The batch and the time axis over the devices of two processes.
    with socket.socket() as server:
        server.bind(("localhost", 0))
        address = f"localhost:{server.getsockname()[1]}"
    several = tmp_path / "several"
    arguments = ("--mesh", "2x4", "--processes", address, "2")
    environment = os.environ | dict(XLA_FLAGS=f"{_FOUR} {os.environ['XLA_FLAGS']}")
    processes = [
        subprocess.Popen(
            _command("hamiltonian_nn", several, *arguments, index), env=environment
        )
        for index in ("0", "1")
    ]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    expected = _leaves(tmp_path / "model_deer.eqx")
    for output in (several, several / "process_1"):
        actual = _leaves(output / "model_deer.eqx")
        assert len(actual) == len(expected) > 0
        for x, y in zip(actual, expected):
            np.testing.assert_allclose(x, y, atol=1e-6)


_FOUR = "--xla_force_host_platform_device_count=4"


def _leaves(path):
    leaves = []
    with path.open("rb") as file:
        while file.peek(1):
            leaves.append(np.load(file))
    return leaves


def test_gru_long_sequence(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    summary = _check_training("gru_long_sequence", whole, "sequences.png")
    assert len(summary["solvers"]) == 2
    assert summary["max_relative_loss_difference"] < 1e-8
    for solver in summary["solvers"].values():
        assert solver["training_loss"][-1] < solver["training_loss"][0]
    # The other examples share what makes this possible.
    _check_resume("gru_long_sequence", whole, killed, "deer_scan")


@pytest.mark.parametrize(
    "name,plot,metric",
    (
        ("neural_cde", "spirals.png", "test_loss"),
        ("neural_sde", "sde.png", "error_of_diffusion"),
        ("cnf", "density.png", "test_loss"),
    ),
)
def test_deer_only(name, plot, metric, tmp_path):
    summary = _check_training(name, tmp_path, plot, "--solver", "deer")
    [deer] = summary["solvers"].values()
    assert deer[metric] < deer[f"untrained_{metric}"]
    assert deer["mean_iterations"] > 0
    if name == "cnf":
        # Which it is only if the logarithm of the density changes as it should.
        assert abs(deer["integral_of_density"] - 1) < 1e-3


def test_gru_long_sequence_data(tmp_path):
    rng = np.random.default_rng(0)
    data, output = tmp_path / "data.npz", tmp_path / "output"
    x = rng.normal(loc=5, scale=100, size=(21, 30, 3))
    np.savez(data, x=x, y=rng.integers(5, 8, size=21))
    args = ("--data", str(data), "--steps", "3")
    _run("gru_long_sequence", output, "--solver", "lax.scan", *args)
    _check_plots(output, "loss.png", "sequences.png")
    settings = json.loads((output / "settings.json").read_text())
    assert (settings["length"], settings["num_train"]) == (30, 18)


@pytest.fixture
def read_data(monkeypatch):
    monkeypatch.syspath_prepend(examples)
    return importlib.import_module("_sequences").read_data


@pytest.fixture
def common(monkeypatch):
    monkeypatch.syspath_prepend(examples)
    return importlib.import_module("_common")


_good_x, _good_y = np.zeros((10, 4, 1)), np.arange(10) % 2


@pytest.mark.parametrize(
    "arrays,message",
    (
        (dict(x=_good_x), "no array `y`"),
        (dict(z=_good_x, y=_good_y), "no array `x`"),
        (dict(x=_good_x[0], y=_good_y), "(samples, length, channels)"),
        (dict(x=_good_x, y=_good_y[:9]), "shape (10,)"),
        (dict(x=_good_x, y=_good_y / 2), "integers"),
        (dict(x=_good_x * np.nan, y=_good_y), "not finite"),
        (dict(x=_good_x, y=0 * _good_y), "2 classes"),
    ),
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_arrays(arrays, message, tmp_path, read_data):
    path = tmp_path / "data.npz"
    np.savez(path, **arrays)
    with pytest.raises(SystemExit, match=re.escape(message)):
        read_data(path)


@pytest.mark.parametrize(
    "name,message",
    (
        ("absent.npz", "no file"),
        ("text.npz", "not a file of arrays"),
        ("text.csv", ".npz or .ts"),
    ),
)
def test_bad_data_file(name, message, tmp_path, read_data):
    path = tmp_path / name
    if name != "absent.npz":
        path.write_text("1,2,3")
    with pytest.raises(SystemExit, match=message):
        read_data(path)


def test_ts_without_aeon(tmp_path, read_data, monkeypatch):
    monkeypatch.setitem(sys.modules, "aeon.datasets", None)
    path = tmp_path / "data.ts"
    path.touch()
    with pytest.raises(SystemExit, match="pip install aeon"):
        read_data(path)


@pytest.mark.parametrize("steps,message", (("0", "at least 1"), ("some", "integer")))
def test_bad_steps(steps, message, common, capsys):
    with pytest.raises(SystemExit):
        common.cli(None, {"quick": None}, {}).parse_args(["--steps", steps])
    assert message in capsys.readouterr().err


def test_nothing_to_resume(common, tmp_path):
    with pytest.raises(SystemExit, match="no run to resume"):
        common.start_run(tmp_path, {}, resume=True)


def test_resume_with_other_settings(common, tmp_path):
    common.start_run(tmp_path, {"data_sha256": "some", "times": (1, 2)}, resume=False)
    common.start_run(tmp_path, {"data_sha256": "some", "times": (1, 2)}, resume=True)
    with pytest.raises(SystemExit, match="data_sha256 = other"):
        common.start_run(tmp_path, {"data_sha256": "other"}, resume=True)
