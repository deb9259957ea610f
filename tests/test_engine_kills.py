"""Kill -9 at random moments of a whole step; ``python -m benchmarks.engine_kills --kills 50`` is the long form."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parents[1]


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes() -> None:
    command = [sys.executable, "-m", "benchmarks.engine_kills", "--kills", "4", "--records", "60"]
    environment = os.environ | {"PYTHONPATH": str(REPO_ROOT)}
    done = subprocess.run(command, cwd=REPO_ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["files_equal"] == {"output": True, "failed": True}
    assert result["n_recorded_requests_sent_again"] == 0 and result["n_distinct_requests"] == 60
    # Each kill may cost the eight calls in flight, and some did cost something.
    assert 60 <= result["n_requests_sent"] <= 60 + 4 * 8
    assert max(result["n_recorded_at_kills"]) > 0
