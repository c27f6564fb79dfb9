"""Damage of any kind to an episode file is named by its rule, or has changed nothing that a sample holds."""

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_utils.checks.checker import FileChecker, Request
from data_utils.errors import RULES, DataError
from data_utils.samples.dataset import H5DatasetMapBase
from tests.data.episodes import CAMERAS, config, edited, write_episode

FRAMES = 5
CONFIG = config(ee_indices=(0, 1), ee_ref_cams=(("front",), ("wrist",)))
HANG_S = 4.0  # a healthy file of this size takes milliseconds


def make_episode(path, legacy=False):
    """Two arms, two cameras, commands, a mask, sub-tasks and paraphrases: something of everything."""
    write_episode(path, frames=FRAMES, num_arms=2, desired=True, prompts=["lift it", "raise it"])
    with edited(path) as file:
        file["wrist/mask"] = np.ones((FRAMES, 24, 32), bool)
        file["subtask_description"], file["subtask_start_index"] = ["grasp", "place"], [0, 3]
        if legacy:
            del file.attrs["schema_version"]
    return path


@pytest.fixture(scope="module")
def checker():
    with FileChecker(workers=1, timeout=HANG_S) as checker:
        yield checker


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An episode file that is never changed."""
    return make_episode(tmp_path_factory.mktemp("whole") / "a.h5")


@pytest.fixture(scope="module")
def whole_legacy(tmp_path_factory):
    return make_episode(tmp_path_factory.mktemp("legacy") / "a.h5", legacy=True)


def samples(path):
    dataset = H5DatasetMapBase([path], CONFIG)
    return [dataset.sample(0, np.random.default_rng(frame), frame) for frame in range(FRAMES)]


def assert_equal(made, wanted):
    for ours, theirs in zip(made, wanted, strict=True):
        for name, value in vars(theirs).items():
            if name != "source":
                np.testing.assert_array_equal(getattr(ours, name), value, err_msg=name)


@st.composite
def mutations(draw, length):
    """A change of the bytes of a file of ``length``: flipped bits, overwritten, copied or missing stretches."""
    kind = draw(st.sampled_from(["flip", "flip", "flip", "zeros", "ones", "copy", "cut", "insert"]))
    at = draw(st.integers(0, length - 1))
    size = draw(st.sampled_from([1, 2, 8, 64, 512]))
    seed = draw(st.integers(0, 2**32 - 1))
    return kind, at, size, seed


def mutate(data, mutation):
    kind, at, size, seed = mutation
    changed = bytearray(data)
    size = min(size, len(data) - at)
    rng = np.random.default_rng(seed)
    if kind == "flip":
        for place in rng.integers(at, at + size, min(size, 4)):
            changed[place] ^= 1 << rng.integers(8)
    elif kind == "cut":
        del changed[at:]
    elif kind == "insert":
        changed[at:at] = rng.bytes(size)
    else:
        source = int(rng.integers(len(data) - size + 1))
        filling = {"zeros": bytes(size), "ones": b"\xff" * size, "copy": data[source : source + size]}
        changed[at : at + size] = filling[kind]
    return bytes(changed)


def read_or_refuse(checker, path):
    """The file's samples, or None where it is refused: in one line that names it and a rule."""
    report = checker.check([Request(str(path), depth="frames")])[0]
    refused = [(rule, message) for rule, message in [(report.rule, report.message)] if rule]
    refused += report.camera_faults.values()
    made = None
    if not refused:  # what the reader survives in a process of its own, it survives here
        try:
            made = samples(path)
        except DataError as error:
            refused = [(error.rule, str(error))]
    for rule, message in refused:
        assert rule in RULES and path.name in message and "\n" not in message
    return made


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_with_any_byte_changed_is_refused_or_gives_the_same_samples(whole, checker, tmp_path, data):
    path = tmp_path / "mutated.h5"
    path.write_bytes(mutate(whole.read_bytes(), data.draw(mutations(whole.stat().st_size))))
    made = read_or_refuse(checker, path)
    if made is not None:
        assert_equal(made, samples(whole))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_without_checksums_is_refused_or_gives_samples_by_the_rules(whole_legacy, checker, tmp_path, data):
    path = tmp_path / "mutated.h5"
    path.write_bytes(mutate(whole_legacy.read_bytes(), data.draw(mutations(whole_legacy.stat().st_size))))
    for sample in read_or_refuse(checker, path) or []:
        poses = np.concatenate([sample.future[..., :16], sample.history[..., :16]]).reshape(-1, 4, 4)
        assert np.abs(poses[:, :3, :3] @ poses[:, :3, :3].transpose(0, 2, 1) - np.eye(3)).max() < 5e-3
        assert np.isfinite(sample.future).all() and np.isfinite(sample.K).all()


def overwrite(key, value):
    def damage(file, frame, rng):
        file[key][frame] = value(file[key][frame], rng) if callable(value) else value

    return damage


def jpeg(change):
    def damage(file, frame, rng):
        camera = CAMERAS[rng.integers(2)]
        stored = file[f"{camera}/rgb"][frame]
        file[f"{camera}/rgb"][frame] = change(stored, rng)

    return damage


def scaled(poses, rng):
    return poses * [[1.2], [1.2], [1.2], [1.0]]


def mirrored(poses, rng):
    return poses @ np.diag([1, 1, -1, 1])


FAULTS = {
    "a pose that is not a number": ("pose", overwrite("ee_pose", np.nan)),
    "a commanded pose that is not a number": ("pose", overwrite("ee_pose_desired", np.inf)),
    "a scaled rotation": ("rotation", overwrite("ee_pose", scaled)),
    "a mirrored frame": ("rotation", overwrite("ee_pose", mirrored)),
    "a camera's pose that is no rotation": ("rotation", overwrite("front/pose", 2.0)),
    "openness in per cent": ("gripper", overwrite("gripper", 80.0)),
    "openness that is not a number": ("gripper", overwrite("gripper", np.nan)),
    "a time that goes backwards": ("time", lambda file, frame, rng: file["timestamp"].__setitem__(frame, -1e6)),
    "a time that is not a number": ("time", overwrite("timestamp", np.nan)),
    "a cut JPEG": ("image", jpeg(lambda data, rng: data[: rng.integers(0, len(data) - 2)])),
    "bytes that are no JPEG": ("image", jpeg(lambda data, rng: rng.integers(0, 255, 200).astype(np.uint8))),
    "a focal length of zero": ("intrinsics", lambda file, frame, rng: file["wrist/K"].__setitem__((0, 0), 0.0)),
    "a sub-task beyond the end": ("subtask", lambda file, *_: file["subtask_start_index"].__setitem__(1, 99)),
    "an empty instruction": ("prompt", lambda file, *_: file.attrs.__setitem__("prompt_text", " ")),
    "an arm that is not there": ("arms", lambda file, *_: file.attrs.__setitem__("ee_indices", [0, 7])),
    "a missing array": ("schema", lambda file, *_: file.__delitem__("gripper")),
    "a missing frame": ("schema", lambda file, *_: shorten(file, "ee_pose")),
}


def shorten(file, key):
    values = file[key][:-1]
    del file[key]
    file[key] = values


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_breaks_a_rule_is_named_by_it(fault, legacy, checker, tmp_path):
    rule, damage = FAULTS[fault]
    rng = np.random.default_rng(list(fault.encode()))
    for frame in (1, FRAMES - 1):
        path = make_episode(tmp_path / f"{frame}.h5", legacy)
        with edited(path) as file:
            damage(file, frame, rng)
        report = checker.check([Request(str(path), depth="frames")])[0]
        found = [report.rule, *(rule for rule, _ in report.camera_faults.values())]
        assert rule in found, report


def test_a_stretch_that_hdf5_never_leaves_is_given_up(tmp_path):
    """HDF5 walks for ever over a heap object of size zero."""
    path = make_episode(tmp_path / "a.h5")
    data = bytearray(path.read_bytes())
    with h5py.File(path) as file:
        jpegs = [file["front/rgb"][frame].tobytes() for frame in range(FRAMES)]
    for jpeg_bytes in jpegs:  # the 16 bytes before an object are its header: index, count, size
        at = bytes(data).index(jpeg_bytes)
        data[at - 16 : at] = bytes(16)
    path.write_bytes(data)
    with FileChecker(workers=1, timeout=1.0) as impatient:
        report = impatient.check([Request(str(path), depth="frames")])[0]
    faults = [report.message, *(message for _, message in report.camera_faults.values())]
    assert any("a.h5" in message for message in faults)
