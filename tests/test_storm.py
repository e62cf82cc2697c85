"""A few cases of the storm over training, tests/storm.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.training
def test_six_runs_in_a_storm_end_as_the_undisturbed_one():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    counts = ["--kills", "2", "--terms", "2", "--ints", "2", "--seed", "0"]
    storm = subprocess.run(
        [sys.executable, "-m", "tests.storm", *counts], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert storm.returncode == 0, storm.stdout + storm.stderr
    assert storm.stdout.count(": equal (") == 6 and "6 of 6 ended as the undisturbed run" in storm.stdout
