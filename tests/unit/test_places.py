"""Places are given in the order in which they were asked for, and waiting for one can be broken off."""

import threading

import pytest

from agent.places import Places
from migrator.errors import Cancelled


def test_they_are_given_in_order() -> None:
    places = Places(2)
    began: list[str] = []
    told: dict[str, list[int]] = {}
    doors = {name: threading.Event() for name in "abcde"}

    def work(name: str) -> None:
        places.wait(name, lambda: None, told.setdefault(name, []).append)
        began.append(name)
        doors[name].wait(20)
        places.leave(name)

    for name in "abcde":
        places.join(name)
    assert [places.position(name) for name in "abcde"] == [0, 0, 1, 2, 3]
    threads = {name: threading.Thread(target=work, args=(name,)) for name in "abcde"}
    for name in "ab":
        doors[name].set()
        threads[name].start()
        threads[name].join(20)
    assert [places.position(name) for name in "cde"] == [0, 0, 1]
    for name in "edc":
        threads[name].start()
    doors["c"].set()
    threads["c"].join(20)
    for name in "de":
        doors[name].set()
        threads[name].join(20)
    assert sorted(began) == list("abcde") and began.index("e") > began.index("c")
    assert told["e"] in ([1, 0], [])


def test_who_waits_can_give_up() -> None:
    places = Places(1)
    for name in "abc":
        places.join(name)

    def give_up() -> None:
        raise Cancelled("no more")

    told: list[int] = []
    with pytest.raises(Cancelled):
        places.wait("b", give_up, told.append)
    assert told == [1]
    places.leave("b")
    places.leave("b")
    assert places.position("c") == 1
    places.leave("a")
    assert places.position("c") == 0
