"""Say offline whether a checkpoint fits, and what a load would copy, leave fresh or drop. Exit code 0 or 2."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a clone, without an installation


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--ckpt", required=True, help="a ckpt_*.pt, an exported folder, a run's name, or org/name of the Hub"
    )
    parser.add_argument(
        "--train-stage", required=True, type=int, choices=(0, 1), help="stage of the model to load into"
    )
    parser.add_argument("--load-from-va", action="store_true", help="expand a VA prior (stage 0) into a VLA (stage 1)")
    parser.add_argument("--model", help="size of the model, tiny, small or base (default: the file's own)")
    parser.add_argument("--names", action="store_true", help="list every tensor's name")
    args = parser.parse_args(argv)
    if args.load_from_va and args.train_stage == 0:
        print("error: --load-from-va makes a stage-1 model; give --train-stage 1", file=sys.stderr)
        return 2
    from apt.hub import located

    try:
        path = located(args.ckpt)
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a VLM that is not here is not asked for elsewhere
        from apt.infer.fit_report import report_fit  # and torch, which --help need not wait for

        problem = report_fit(path, args.train_stage, args.load_from_va, args.model, args.names)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if problem:
        print(f"error: {path} does not fit: {problem}", file=sys.stderr)
        return 2
    print("fits")
    return 0


if __name__ == "__main__":
    sys.exit(main())
