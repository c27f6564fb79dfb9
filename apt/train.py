"""The trainer: ``python -m apt.train --config NAME --name RUN [--field value ...]``, alone or under torchrun.

``scripts/train.sh`` and ``scripts/finetune.sh`` are the commands users run; they call this once per stage.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

from apt.configs import TrainConfig
from apt.training.cli import CommandLineError, parse_train_config
from data_utils.errors import DataError
from train_utils.errors import ConfigError
from train_utils.failures import MISTAKE, RESUME_VARIABLE, fail, stop_with_parent

if TYPE_CHECKING:
    from train_utils.backend import Backend


def select_backend(config: TrainConfig) -> Backend:
    """Raises ``ConfigError`` or ``ValueError`` where it cannot run here."""
    from train_utils.backend import DDPBackend

    if config.backend != "deepspeed":
        return DDPBackend(config.device)
    from train_utils.deepspeed_backend import DeepSpeedBackend

    return DeepSpeedBackend(config)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    stop_with_parent()
    try:
        config = parse_train_config([argument for argument in argv if argument != "--dry-run"])
    except (CommandLineError, ConfigError, DataError, ValueError) as error:
        return _mistake(error)
    # torch and the model's libraries take seconds to import; help and mistakes need not wait for them.
    from apt.checkpoint import CheckpointError
    from apt.model.encoders.hub import VLMLoadError
    from apt.model.pretrained import CheckpointMismatch
    from apt.training.plan import describe_plan
    from apt.training.resume_command import continue_stage
    from apt.training.run_dir import check_run_dir
    from apt.training.shared_memory import check_shared_memory
    from apt.training.trainer import Trainer

    # Everything a user can get wrong: reported as one line, without a traceback.
    user_errors = (CommandLineError, ConfigError, CheckpointError, CheckpointMismatch, DataError, VLMLoadError)
    try:
        if "--dry-run" in argv:
            check_run_dir(config)
            check_shared_memory(config)
            print(describe_plan(config, int(os.environ.get("WORLD_SIZE", 1))))
            return 0
        backend = select_backend(config)
    except (*user_errors, ValueError) as error:
        return _mistake(error)
    try:
        Trainer(config, backend).run(os.environ.get(RESUME_VARIABLE) or continue_stage(argv))
        backend.close()
    except Exception as error:
        return fail(error, user_errors)
    except KeyboardInterrupt:
        print("error: interrupted before it could save", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _mistake(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return MISTAKE


if __name__ == "__main__":
    sys.exit(main())
