"""`python -m migrator.fill`: take the place of `criu lazy-pages`, with memory that is already on this host."""

import argparse
import contextlib
import sys
from pathlib import Path

from migrator.fill.keeper import Keeper, Places


def main() -> int:
    """Parse the command line and run the keeper."""
    parser = argparse.ArgumentParser(prog="python -m migrator.fill", description=__doc__)
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="images that were prepared")
    parser.add_argument("--store", type=Path, required=True, metavar="DIR", help="the page store")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="work directory of criu restore")
    parser.add_argument("--status", type=Path, required=True, metavar="FILE", help="where progress is told, as JSON")
    parser.add_argument(
        "--cgroup", type=Path, action="append", required=True, metavar="DIR",
        help="control group of the container, all of which is killed if its memory is lost",
    )  # fmt: skip
    options = parser.parse_args()
    # The last that may be sacrificed when memory is short.
    with contextlib.suppress(PermissionError):
        Path("/proc/self/oom_score_adj").write_text("-1000")
    return Keeper(Places(options.images, options.store, options.work, options.status, options.cgroup)).run()


if __name__ == "__main__":
    sys.exit(main())
