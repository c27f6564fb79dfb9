"""Compare this code with recorded numbers of the released model and data code.

    python scripts/check_golden.py --expert golden/action_expert --geometry golden/geometry

One line per quantity: name, largest error, tolerance, PASS or FAIL. Exit code 0 when all pass, 1 when any is above its
tolerance, 2 when something is missing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: list[str] | None = None) -> int:
    """Run the checks the command line asks for; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--expert", type=Path, metavar="DIR", help="folder with the action expert's numbers")
    parser.add_argument("--geometry", type=Path, metavar="DIR", help="folder with the data and ensembling numbers")
    options = parser.parse_args(arguments)
    if options.expert is None and options.geometry is None:
        parser.error("nothing to check; give --expert DIR, --geometry DIR or both")
    for folder in (options.expert, options.geometry):
        if folder is not None and not folder.is_dir():
            print(f"check_golden: {folder} is not a folder; name one that holds the recorded numbers", file=sys.stderr)
            return 2

    results: list[bool] = []

    def report(name: str, error: float, tolerance: float) -> None:
        passed = bool(error <= tolerance)  # False for NaN
        results.append(passed)
        print(f"{'PASS' if passed else 'FAIL'}  {name:<44} error {error:9.2e}  tolerance {tolerance:7.1e}", flush=True)

    try:
        if options.geometry is not None:
            from scripts.golden_geometry import check_geometry

            check_geometry(options.geometry, report)
        if options.expert is not None:
            from scripts.golden_expert import check_expert

            check_expert(options.expert, report)
    except FileNotFoundError as error:
        print(f"check_golden: {error.filename or error} is missing", file=sys.stderr)
        return 2
    except KeyError as error:
        print(f"check_golden: an archive lacks the array {error}", file=sys.stderr)
        return 2
    failed = results.count(False)
    print(f"{len(results)} quantities, {failed} above tolerance")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
