"""Processes that work for a parent."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]

PROGRAM = """
import os, signal
from data_utils.worker_process import WorkerProcess

def answer(job):
    return job, signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])

if __name__ == "__main__":
    for worker in [WorkerProcess(answer), WorkerProcess(answer)]:
        assert worker.outcome() is None  # ready
        os.kill(worker.process.pid, signal.SIGINT)
        worker.give(5)
        print(*worker.outcome())
        worker.kill()
"""


def test_the_first_process_too_leaves_ctrl_c_to_its_parent(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "5 True\n5 True\n", done.stderr
