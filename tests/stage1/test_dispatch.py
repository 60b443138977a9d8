"""Who gets which label shards, and what becomes of those of lost workers (fault 11)."""

import random
from collections import deque

import pytest

from pipeline.stage1.dispatch import TRIES, Dispatcher
from pipeline.stage1.loop import LabelTask

TASKS = [LabelTask(f"shard-{i}", range(view, view + 2)) for view in (0, 2) for i in range(5)]


def test_a_lost_worker_gives_its_tasks_back_and_gets_no_more():
    dispatcher = Dispatcher(deque(TASKS))
    first, second = dispatcher.take("a"), dispatcher.take("a")
    assert (first, second) == (TASKS[0], TASKS[1])
    assert dispatcher.lose("a") == 2
    assert list(dispatcher.waiting)[-2:] == [first, second]
    assert dispatcher.take("a") is None
    dispatcher.finish("a", TASKS[0])  # it was only out of reach, and its file is whole: the next one finds it there
    assert list(dispatcher.waiting)[-2:] == [first, second]


def test_a_suspect_goes_to_a_worker_that_has_nothing_else():
    dispatcher = Dispatcher(deque(TASKS[:3]))
    assert [dispatcher.take("a"), dispatcher.take("a"), dispatcher.take("b")] == TASKS[:3]
    dispatcher.lose("a")
    assert dispatcher.take("b") is None  # it still has one
    assert [dispatcher.take("c"), dispatcher.take("c")] == [TASKS[0], None]
    assert not dispatcher.finished
    dispatcher.finish("c", TASKS[0])
    assert dispatcher.take("d") == TASKS[1]


@pytest.mark.parametrize("seed", range(50))
def test_whatever_happens_every_task_is_finished_or_set_aside_and_only_for_its_own_fault(seed):
    """Workers take, finish and die at random; a few tasks kill whoever has them in hand."""
    chance = random.Random(seed)
    deadly = set(chance.sample(TASKS, chance.randint(0, 2)))
    dispatcher = Dispatcher(deque(TASKS))
    hands: dict[str, list[LabelTask]] = {"0": []}
    number, done = 0, set()
    for _ in range(10_000):
        if dispatcher.finished:
            break
        if len(hands) < 3:
            number += 1
            hands[f"{number}"] = []
        name = chance.choice(sorted(hands))
        mine = hands[name]
        if mine and chance.random() < 0.5:
            if mine[0] in deadly:
                assert dispatcher.lose(name) == len(hands.pop(name))
            else:
                dispatcher.finish(name, mine[0])
                done.add(mine.pop(0))
        elif len(mine) < 3 and (task := dispatcher.take(name)) is not None:
            mine.append(task)
        elif not mine:
            del hands[name]  # there was nothing for it: it ended
    assert dispatcher.finished
    assert set(dispatcher.set_aside) == deadly
    assert done == set(TASKS) - deadly
    assert all(dispatcher.losses[task] == TRIES for task in deadly)
