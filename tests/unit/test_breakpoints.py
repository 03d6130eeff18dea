"""A perf event is there as long as it is wanted."""

from pathlib import Path

from agent.breakpoints import Breakpoints


def events() -> int:
    links = (Path(f"/proc/self/fd/{number}") for number in range(1024))
    return sum(str(link.readlink()) == "anon_inode:[perf_event]" for link in links if link.is_symlink())


def test_it_holds_one_event_until_it_is_closed() -> None:
    before = events()
    made = Breakpoints()
    during = events()
    made.close()
    made.close()
    assert during - before in (1, 0)  # none where the kernel does not allow it
    assert events() == before
