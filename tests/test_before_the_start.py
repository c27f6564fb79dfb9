"""What cannot come to a good end is refused in one line before anything is built, read or encoded."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from apt.presets import CONFIGS
from apt.train import main as train
from apt.training.shared_memory import bytes_needed, check_shared_memory
from data_utils.cli import CommandLineError, check_writable
from data_utils.export.__main__ import main as export
from tests.data.episodes import write_episode
from tests.training.helpers import REPOSITORY
from train_utils.errors import ConfigError

COMMANDS = [
    "data_utils.export --src {episodes} --fps 2 --out {out}",
    "data_utils.convert lerobot --src {episodes} --mapping droid --out {out}",
    "data_utils.inspect {episodes} --out {out}",
    "data_utils.inspect {episodes} --frames 0 --json {out}.json",
    "apt.infer.open_loop --ckpt assets/models/blocks_prior --episodes {episodes} --out {out}",
    "apt.infer.slim assets/models/blocks_prior {out}",
    "apt.checkpoint export assets/models/blocks_prior {out}",
    "apt.checkpoint import assets/models/blocks_prior {out}/ckpt_latest.pt",
    "apt.grounding --scenes {episodes} --out {out}",
    "apt.grounding.pairs --scenes {episodes} --out {out}",
    "apt.ablate --grid table2 --config blocks --out {out}",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_that_cannot_be_written_is_named_at_once(command, tmp_path):
    episodes, file = tmp_path / "episodes", tmp_path / "file"
    episodes.mkdir()
    write_episode(episodes / "a.h5")
    file.touch()
    out = file / "out"
    arguments = command.format(episodes=episodes, out=out).split()
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    lines = [line for line in done.stderr.splitlines() if "Setting accelerator" not in line]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert "cannot be written to" in lines[0] and str(file) in lines[0]
    assert sorted(tmp_path.iterdir()) == [episodes, file]


@pytest.mark.parametrize("field", ["ckpt_dir", "log_dir", "cache_vlm_features"])
def test_a_run_names_the_folder_that_it_cannot_write_to(field, tmp_path, located, capsys):
    (tmp_path / "file").touch()
    folders = {"ckpt_dir": tmp_path / "ckpt", "log_dir": tmp_path / "log", field: tmp_path / "file" / "x"}
    flags = [part for name, folder in folders.items() for part in (f"--{name}", str(folder))]
    assert train(["--config", "debug", "--device", "cpu", "--name", "r", "--augment", "False", *flags]) == 2
    said = capsys.readouterr().err.strip()
    assert f"--{field}" in said and "cannot be written to" in said and "\n" not in said
    assert not (tmp_path / "ckpt").exists() and not (tmp_path / "log").exists()


def test_places_that_can_be_written_to_are_left_as_they_are(tmp_path):
    check_writable(tmp_path / "a" / "b", "--out")
    assert not list(tmp_path.iterdir())
    with pytest.raises(CommandLineError, match="--out /proc/here cannot be written to"):
        check_writable(Path("/proc/here"), "--out")


@pytest.mark.parametrize("fps", [0, -5, 100_000_000])
def test_absurd_frame_rates_are_refused_before_anything_is_encoded(fps, tmp_path, capsys):
    write_episode(tmp_path / "a.h5")
    assert export(["--src", str(tmp_path), "--out", str(tmp_path / "out"), "--fps", str(fps)]) == 2
    assert f"--fps is {fps}; wanted frames per second, from 1 to 1000" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_dev_shm_that_holds_less_than_the_loaders_batches_is_refused(tmp_path, located, monkeypatch, capsys):
    config = dataclasses.replace(CONFIGS["debug"], workers=2, bs=16, prefetch_factor=4, image_size=384)
    needed = bytes_needed(config)
    assert needed == (2 * 4 + 1) * 16 * 2 * 384 * 384 * 4  # two cameras, one image each

    class State:
        f_bavail, f_frsize = 64 << 20, 1

    monkeypatch.setattr("os.statvfs", lambda folder: State)
    with pytest.raises(ConfigError, match=r"/dev/shm has 64\.0 MiB free, 2 loader processes want 162\.0 MiB for 4 ba"):
        check_shared_memory(config)
    check_shared_memory(dataclasses.replace(config, workers=0))
    check_shared_memory(dataclasses.replace(config, bs=4))
    flags = "--config debug --device cpu --name r --workers 2 --bs 16 --image_size 384".split()
    assert train([*flags, "--ckpt_dir", str(tmp_path / "c"), "--log_dir", str(tmp_path / "l")]) == 2
    assert "give the container more (docker run --shm-size)" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
