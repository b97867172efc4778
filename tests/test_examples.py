"""The examples run, and survive being killed."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest


examples = Path(__file__).parent.parent / "examples"


def _command(output, *args):
    script = examples / "hamiltonian_nn.py"
    return [
        sys.executable,
        str(script),
        "--preset",
        "smoke",
        "--output",
        str(output),
        *args,
    ]


def _run(output, *args):
    out = subprocess.run(
        _command(output, *args), capture_output=True, text=True, timeout=300
    )
    assert out.returncode == 0, out.stderr
    return out


def test_hamiltonian_nn(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    out = _run(whole)
    assert str(whole) in out.stdout
    for plot in ("loss.png", "trajectory.png", "energy.png"):
        assert (whole / plot).read_bytes().startswith(b"\x89PNG")
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["max_relative_loss_difference"] < 1e-8
    deer, tsit5 = summary["solvers"]["DEER"], summary["solvers"]["Tsit5"]
    for solver in (deer, tsit5):
        assert solver["validation_loss"] < solver["untrained_validation_loss"]

    # Killed in the middle of training, at whatever moment that is.
    with subprocess.Popen(_command(killed, "--solver", "deer")) as process:
        checkpoint = killed / "checkpoint_deer.eqx"
        while not checkpoint.exists() and process.poll() is None:
            time.sleep(0.002)
        process.kill()
    assert not (killed / "model_deer.eqx").exists()
    _run(killed, "--solver", "deer", "--resume")
    model = "model_deer.eqx"
    assert (killed / model).read_bytes() == (whole / model).read_bytes()


@pytest.mark.parametrize(
    "args,message",
    (
        (("--steps", "0"), "at least 1"),
        (("--steps", "some"), "integer"),
        (("--resume",), "no run to resume"),
    ),
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
def test_bad_arguments(args, message, tmp_path):
    out = subprocess.run(_command(tmp_path, *args), capture_output=True, text=True)
    assert out.returncode != 0
    assert message in out.stderr
