"""What every test run shares: `--no-root-skips`, with which a skipped test that needs root is a failure, and `--vm`."""

from collections.abc import Generator

import pytest

# A skip with a reason that begins so is the kernel's doing: root would not help.
KERNEL_LACKS = "this kernel"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-root-skips", action="store_true", help="fail tests marked root that skip, as CI must")
    parser.addoption("--vm", action="store_true", help="run the tests on virtual machines, and no others")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if bool(item.get_closest_marker("vm")) != config.getoption("--vm")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if item.config.getoption("--no-root-skips") and report.skipped and item.get_closest_marker("root"):
        reason = report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else ""
        if not reason.startswith(KERNEL_LACKS) and not hasattr(report, "wasxfail"):
            report.outcome = "failed"
            report.longrepr = f"skipped, and may not be here: {reason}"
    return report
