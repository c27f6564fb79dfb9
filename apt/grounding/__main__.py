"""Trains a small vision-language model of the real class on rendered scenes.

    python -m apt.grounding --scenes data/blocks_scenes --out models/blocks_vlm

Stopped, the same command goes on from the last judgement. The folder it leaves is what ``--vlm`` takes.
"""

from __future__ import annotations

import sys

from apt.grounding.config import GroundingConfig
from data_utils.cli import check_writable, parse


def main(argv: list[str]) -> int:
    try:
        config = parse(GroundingConfig, argv, "python -m apt.grounding", "Train a small vision-language model.")
        check_writable(config.out, "--out")
        from apt.grounding.training import GroundingRun  # and torch, which --help need not wait for

        judged = GroundingRun(config).run()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    said = " and ".join(f"{judged[name]:.0%}" for name in ("point_u", "point_v"))
    print(f"{config.out}: points to held-out names to within a bin in {said}, along width and height")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
