"""Kill -9 at random moments of a whole step; ``python -m benchmarks.kills construction --kills 50`` is the long form."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parents[1]


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes() -> None:
    command = [sys.executable, "-m", "benchmarks.kills", "construction", "--kills", "4", "--rows", "60"]
    environment = os.environ | {"PYTHONPATH": str(REPO_ROOT)}
    done = subprocess.run(command, cwd=REPO_ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["differences"] == {"files_that_differ": [], "n_recorded_requests_sent_again": 0}
    assert result["n_distinct_requests"] == 60 and result["n_kills"] == sum(result["kills_met"].values()) == 4
    # Sent once by every run that came to its end; each kill may cost the eight calls in flight.
    n_ended = 1 + result["n_runs"]
    assert 60 * n_ended <= result["n_requests_sent"] <= 60 * n_ended + 4 * 8
    assert result["kills_met"]["calls"] > 0
