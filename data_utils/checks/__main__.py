"""A checking process: requests on stdin, answers on stdout, one JSON object per line (see ``checker.py``)."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from dataclasses import asdict

from data_utils.checks.checker import Report, Request
from data_utils.words import one_line

MEMORY_LIMIT = 16 << 30  # damaged sizes must not take the machine's memory


def main() -> None:
    """Serve requests until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What a library prints must not be taken for an answer.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    import cv2

    from data_utils.checks.examine import inspect_file  # before the first answer, so that its time is not a file's

    cv2.setNumThreads(0)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, resource.getrlimit(resource.RLIMIT_AS)[1]))
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        values, timeout = json.loads(line)
        request = Request(**values)

        def beat(place: str | None = None, seconds: int = 2 * int(timeout) + 1) -> None:
            # Should the parent be gone by then, nobody else ends a reader that hangs.
            signal.alarm(seconds)
            if place is not None:
                print(json.dumps({"at": place}), file=answers)

        beat()
        try:
            report = inspect_file(request, beat)
        except Exception as error:  # whatever a damaged file brings up, the next file must be checked
            what = f"cannot be checked ({type(error).__name__}: {one_line(error)})"
            report = Report(rule="file", message=f"{request.path}: {what}; record it again")
        signal.alarm(0)
        print(json.dumps(asdict(report)), file=answers)


if __name__ == "__main__":
    main()
