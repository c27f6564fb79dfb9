"""Queries of several sessions in one pass: each is answered as if it had been alone, and none can harm another."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from apt.infer.batching import QueryQueue, Request, join
from apt.infer.planner import TrajPlanner
from apt.infer.realtime_chunking import RealTimeChunking
from apt.model.objectives.base import Guide
from data_utils.batches.collate import Collator
from tests.infer.helpers import frame_at, tiny_policy
from tests.model.helpers import make_sample

PROMPTS = ("go", "pick up the milk and put it into the basket, slowly", "put the red cube away")
KINDS = [("apt", "ddim"), ("pi", "flow"), ("gr00t", "flow"), ("token_insertion", "flow")]


def requests(policy, arms: tuple[int, ...] = (1, 1, 1), samples: int = 1, guided: bool = False) -> list[Request]:
    tokenize = policy.prompt_tokenizer((64, 64))
    collate = Collator(tokenize, tokenize.pad_id, 2, 2)
    made = []
    for number, (prompt, count) in enumerate(zip(PROMPTS, arms, strict=True)):
        sample = make_sample(prompt, number, cameras=1 + number % 2, arms=count)
        observation = collate([sample]).observation
        guide = None
        if guided:
            target = torch.randn(
                1, 2, policy.model.config.num_future, 10, generator=torch.Generator().manual_seed(number)
            )
            guide = Guide(target, torch.linspace(1, 0, target.shape[2]).view(1, 1, -1, 1))
        generator = policy.generator(number)
        made.append(policy.request(observation, generator, samples, 3, guide=guide, pad_id=tokenize.pad_id))
    return made


@pytest.mark.parametrize("arch, objective", KINDS)
@pytest.mark.parametrize("samples, guided", [(1, False), (3, True)])
def test_a_joint_pass_gives_each_what_it_would_get_alone(arch, objective, samples, guided):
    """Prompts of different length, one or two arms, one or two cameras, each with noise and guide of its own."""
    policy = tiny_policy(arch=arch, objective=objective)
    asked = requests(policy, (1, 2, 1), samples, guided)
    assert len({request.kind for request in asked}) == 1
    assert len({request.observation.input_ids.shape[1] for request in asked}) == 3
    together, _ = policy.infer(asked)
    for request, found in zip(asked, together, strict=True):
        (alone,), _ = policy.infer([request])
        assert found.shape == (samples, policy.model.config.num_future, 2, 17)
        np.testing.assert_allclose(found, alone, atol=1e-5)


def test_what_cannot_share_a_pass_is_of_another_kind():
    policy = tiny_policy()
    plain, guided, three = (requests(policy, **more)[0] for more in ({}, {"guided": True}, {"samples": 3}))
    assert len({plain.kind, guided.kind, three.kind}) == 3
    observation, noise, guide = join([plain, plain], pad_multiple=64)
    assert observation.batch_size == 2 and observation.input_ids.shape[1] % 64 == 0 and guide is None
    assert torch.equal(noise[0], noise[1])


# -- the queue --------------------------------------------------------------------------------------------------------


class Passes:
    """Stands for the policy: counts, and says what each pass was of."""

    def __init__(self, seconds: float = 0.0, fails_on: int | None = None) -> None:
        self.sizes, self.seconds, self.fails_on = [], seconds, fails_on

    def __call__(self, asked):
        time.sleep(self.seconds)
        self.sizes.append(len(asked))
        if self.fails_on in [request.number for request in asked]:
            raise RuntimeError(f"cannot do {self.fails_on}")
        return [np.array(request.number) for request in asked], {}


class Numbered:
    def __init__(self, number: int, kind: tuple = ()) -> None:
        self.number, self.kind = number, kind


def ask_at_once(queue: QueryQueue, prepares: dict[int, callable]) -> dict[int, object]:
    """Answers, or what was raised, by number; all ask while a pass is running."""
    found = {}

    def ask(number: int) -> None:
        try:
            answer = queue.ask(object_of[number], prepares[number])
            found[number] = answer if answer is None else int(answer.states)
        except Exception as error:
            found[number] = error

    object_of = {number: object() for number in prepares}
    with queue.turns:
        threads = [threading.Thread(target=ask, args=(number,)) for number in prepares]
        for thread in threads:
            thread.start()
        while len(queue._waiting) < len(threads):
            time.sleep(0.001)
    for thread in threads:
        thread.join(timeout=30)
    return found


def test_those_who_wait_together_are_answered_in_one_pass():
    passes = Passes()
    queue = QueryQueue(passes, max_batch=4, max_wait=0.0)
    assert ask_at_once(queue, {n: lambda n=n: Numbered(n) for n in range(6)}) == {n: n for n in range(6)}
    assert passes.sizes == [4, 2]


def test_requests_of_two_kinds_do_not_mix():
    passes = Passes()
    queue = QueryQueue(passes, max_batch=8, max_wait=0.0)
    ask_at_once(queue, {n: lambda n=n: Numbered(n, (n % 2,)) for n in range(5)})
    assert sorted(passes.sizes) == [2, 3]


def test_what_is_wrong_with_one_query_reaches_no_other():
    def wrong() -> None:
        raise ValueError("no frame")

    passes = Passes(fails_on=2)
    queue = QueryQueue(passes, max_batch=8, max_wait=0.0)
    prepares = {n: lambda n=n: Numbered(n) for n in range(4)} | {4: wrong, 5: lambda: None}
    found = ask_at_once(queue, prepares)
    assert [found[n] for n in (0, 1, 3)] == [0, 1, 3] and found[5] is None
    assert isinstance(found[2], RuntimeError) and "cannot do 2" in str(found[2])
    assert isinstance(found[4], ValueError) and "no frame" in str(found[4])
    assert not queue._waiting and not queue.turns._held


def test_a_session_is_in_a_pass_once():
    passes, session = Passes(), object()
    queue = QueryQueue(passes, max_batch=8, max_wait=0.0)
    with queue.turns:
        threads = [threading.Thread(target=queue.ask, args=(session, lambda n=n: Numbered(n))) for n in range(3)]
        for thread in threads:
            thread.start()
        while len(queue._waiting) < 3:
            time.sleep(0.001)
    for thread in threads:
        thread.join(timeout=30)
    assert passes.sizes == [1, 1, 1]


def test_a_lone_session_never_waits_and_several_meet():
    alone = Passes()
    queue = QueryQueue(alone, max_batch=8, max_wait=5.0)
    began = time.monotonic()
    for _ in range(3):
        queue.ask(queue, lambda: Numbered(0))
    assert time.monotonic() - began < 2.0 and alone.sizes == [1, 1, 1]

    several = Passes(seconds=0.02)
    queue = QueryQueue(several, max_batch=8, max_wait=0.5)

    def work() -> None:
        session = object()
        for _ in range(10):
            queue.ask(session, lambda: Numbered(0))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sum(several.sizes) == 40 and len(several.sizes) < 20


def test_a_session_that_stopped_asking_holds_up_the_others_for_no_longer_than_max_wait():
    passes = Passes()
    queue = QueryQueue(passes, max_batch=8, max_wait=0.05)
    queue.ask(object(), lambda: Numbered(0))  # a client that died
    began = time.monotonic()
    queue.ask(object(), lambda: Numbered(1))
    assert time.monotonic() - began < 1.0


@pytest.mark.parametrize("wrong", [{"max_batch": 0}, {"max_wait": -1.0}, {"max_wait": float("nan")}])
def test_limits_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match="wanted 1 or more, and 0 or more seconds"):
        QueryQueue(Passes(), **{"max_batch": 1, "max_wait": 0.0, **wrong})


# -- planners ---------------------------------------------------------------------------------------------------------


def test_planners_in_threads_share_passes_and_stay_themselves(dataset, policy):
    """With ensembles and real-time chunking, query after query, against the same sessions one after another."""
    kinds = [{"ensemble": 3}, {"chunking": RealTimeChunking(0.1)}, {}, {"ensemble": 2}]

    def queries(number: int) -> list[np.ndarray]:
        planner = TrajPlanner.of_policy(policy, seed=number, steps=2, **{"ensemble": 0, **kinds[number]})
        planner.set_prompt(PROMPTS[number % 3])
        found = []
        for frame in range(2, 8):
            planner.add_obs_frame(frame_at(dataset, 0, frame))
            found.append(planner.get_action()[0])
        return found

    wanted = {number: queries(number) for number in range(len(kinds))}
    found, sizes, infer = {}, [], policy.infer
    policy.set_batching(8, 0.5)
    policy.queue._infer = lambda asked: (sizes.append(len(asked)), infer(asked))[1]
    try:
        threads = [threading.Thread(target=lambda n=n: found.update({n: queries(n)})) for n in wanted]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
    finally:
        policy.set_batching()
    assert sum(sizes) == 24 and max(sizes) > 1
    for number, plans in wanted.items():
        np.testing.assert_allclose(found[number], plans, atol=1e-4)
