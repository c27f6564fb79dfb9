"""The shipped policy at work: a world that goes on, its page in a real browser, the command with its video."""

from __future__ import annotations

import importlib.util
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import av
import pytest

from examples.blocks.demo import report
from examples.blocks.env import BlocksEnv
from examples.blocks.live import LiveWorld
from examples.blocks.shipped import load_planner
from examples.pickplace.rollout import EpisodeResult

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.sim,
    pytest.mark.skipif(importlib.util.find_spec("robosuite") is None, reason="the simulator is not installed"),
]


@pytest.fixture(scope="module")
def planner():
    return load_planner()


@pytest.fixture(scope="module")
def env():
    with BlocksEnv() as env:
        yield env


def others(env: BlocksEnv) -> tuple[str, str]:
    """A block and a tray that are there and not named now."""
    block = next(name for name in env.present if name != env.task.object)
    tray = next(name for name in env.scene.containers if name != env.task.container)
    return env.title(block), env.title(tray)


def test_an_episode_for_an_instruction_has_what_it_names(env):
    for seed in range(3):
        env.reset_for([seed], "Please put the BLACK cylinder into the white tray!")
        assert env.title(env.task.object) == "black cylinder" and env.title(env.task.container) == "white tray"
        assert "black cylinder" in map(env.title, env.present)


def test_an_instruction_for_what_is_not_there_says_what_is(env):
    env.reset_for([0], "put the red cube in the blue tray")
    before = env.task
    missing = next(block for block in env.world.seen_blocks if str(block) not in map(env.title, env.present))
    with pytest.raises(ValueError, match=rf"there is no {missing} here; there are .*red cube"):
        env.instruct(f"put the {missing} in the blue tray")
    assert env.task == before
    with pytest.raises(ValueError, match="does not name one block and one tray; wanted for example"):
        env.instruct("tidy up")


def test_a_second_instruction_in_the_middle_changes_what_is_done(env, planner):
    world = LiveWorld(env, planner, seed=4)
    assert world.status.state == "waiting" and world.path is None
    world.instruct(env.prompt)
    for _ in range(12):
        world.step()
    assert world.status.state == "working" and world.status.steps == 12
    before = world.path[-1, :3, 3]
    block, tray = others(env)
    world.instruct(f"put the {block} in the {tray}")
    world.step()
    assert world.status.instruction == f"put the {block} in the {tray}" and world.status.steps == 1
    assert abs(world.path[-1, :3, 3] - before).max() > 0.02  # m: it goes elsewhere
    world.instruct("put the pink cube in the blue tray")
    assert world.status.state == "waiting" and "does not name" in world.status.note


def test_a_push_moves_a_block_a_little(env, planner):
    world = LiveWorld(env, planner, seed=5)
    for _ in range(3):
        world.step()  # they come to rest
    before = {name: env.world_from_object(name)[:2, 3].copy() for name in env.present}
    world.push()
    for _ in range(8):
        world.step()
    moved = {name: abs(env.world_from_object(name)[:2, 3] - before[name]).max() for name in env.present}
    assert 0.003 < moved[env.task.object] < 0.12 and "was pushed" in world.status.note


def test_what_happened_is_said_in_a_sentence():
    result = EpisodeResult("red cube", "blue tray", "put ...", False, "red cube", None, None, 110)
    said = report(result)
    assert said == (
        "no success within 110 steps: "
        "the gripper went to the red cube first, lifted none, and the red cube is in no tray"
    )


def test_the_command_leaves_a_video_and_says_what_happened(tmp_path):
    words = "put the red cube in the blue tray"
    command = [sys.executable, "-m", "examples.blocks.demo", words, "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"success after \d+ steps|no success within \d+ steps", done.stdout)
    with av.open(str(tmp_path / "put_the_red_cube_in_the_blue_tray.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) >= 20


def test_an_instruction_that_names_nothing_ends_the_command_in_one_line(tmp_path):
    command = [sys.executable, "-m", "examples.blocks.demo", "tidy up", "--out", str(tmp_path / "none")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith('error: "tidy up" does not name')
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "none").exists()


# -- the page, in a browser --------------------------------------------------------------------------------------------


class Page:
    """The page as a person uses it."""

    def __init__(self, url: str) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        software_gl = ("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")
        for flag in ("--headless=new", "--no-sandbox", "--window-size=1200,800", *software_gl):
            options.add_argument(flag)
        options.binary_location = shutil.which("chromium")
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        self.driver.get(url)

    def wait(self, text: str, seconds: float = 60.0) -> str:
        """All text, once it holds ``text``."""
        from selenium.webdriver.common.by import By

        end = time.monotonic() + seconds
        while text not in (shown := self.driver.find_element(By.TAG_NAME, "body").text):
            assert time.monotonic() < end, f"{text!r} does not appear; the page says: {shown}"
            time.sleep(0.2)
        return shown

    def click(self, button: str) -> None:
        from selenium.webdriver.common.by import By

        self.driver.find_element(By.XPATH, f"//button[contains(., '{button}')]").click()

    def write(self, before: str, text: str) -> None:
        """Into the field that holds ``before``."""
        from selenium.webdriver.common.keys import Keys

        field = self._field(before)
        field.send_keys(Keys.CONTROL + "a")
        field.send_keys(text)

    def wait_for_field(self, value: str, seconds: float = 60.0) -> None:
        """Until a field holds ``value``, for instance since somebody else has written it."""
        end = time.monotonic() + seconds
        while self._field(value) is None:
            assert time.monotonic() < end, f"no field holds {value!r}"
            time.sleep(0.1)

    def _field(self, value: str):
        from selenium.webdriver.common.by import By

        fields = self.driver.find_elements(By.TAG_NAME, "input")
        return next((field for field in fields if field.get_attribute("value") == value), None)


@pytest.fixture
def server(planner):
    from examples.blocks.web import DemoServer

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = DemoServer(planner, BlocksEnv, port=port, seed=4)
    thread = threading.Thread(target=server.run)
    thread.start()
    yield server
    server.close()
    thread.join(30)
    assert not thread.is_alive()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromedriver") is None, reason="no browser: bash scripts/setup.sh --browser")
def test_two_people_steer_one_world_from_their_browsers(server):
    first, second = Page(server.url), Page(server.url)
    try:
        example = re.search(r"waiting: (.*?) ·", first.wait("waiting: ")).group(1)
        first.click("Go")
        assert example in second.wait(" · step ")  # working, or done already where the page is slow to read
        names = re.findall(r"\w+ (?:cube|cylinder|bar|tray)", example)
        second.write(example, "put the green moon in the blue tray")
        first.wait_for_field("put the green moon in the blue tray")  # viser sends what is typed a little later
        second.click("Go")
        first.wait("does not name one block and one tray")
        wanted = f"carry the {names[0]} over to the {names[1]}"
        second.write("put the green moon in the blue tray", wanted)
        first.wait_for_field(wanted)
        second.click("Go")
        first.wait(f": carry the {names[0]} over")  # the first one sees what the second one wants
        second.click("New scene")
        first.wait("an example")
        first.click("Push a block")
        second.wait("was pushed")
    finally:
        for page in (first, second):
            page.driver.quit()


def test_the_page_is_served_to_this_machine_alone_and_a_taken_port_is_named(server, planner):
    from examples.blocks.web import DemoServer

    host, port = server.url.removeprefix("http://").split(":")
    assert host == "127.0.0.1"
    addresses = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    assert f"0100007F:{int(port):04X}" in addresses and f"00000000:{int(port):04X}" not in addresses
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}.*give another --port"):
        DemoServer(planner, BlocksEnv, port=int(port))
