"""A few cases of the storm over training, tests/storm.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.training
def test_four_runs_in_a_storm_end_as_the_undisturbed_one():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    counts = ["--kills", "2", "--terms", "1", "--ints", "1", "--seed", "0"]
    storm = subprocess.run(
        [sys.executable, "-m", "tests.storm", *counts], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert storm.returncode == 0, storm.stdout + storm.stderr
    assert storm.stdout.count(": equal (") == 4 and "4 of 4 ended as the undisturbed run" in storm.stdout
