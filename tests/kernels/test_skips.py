"""Which tests of the kernels may be skipped is a list of at most five, held by conftest.py."""

from types import SimpleNamespace

import pytest


@pytest.fixture
def conftest(request):
    """tests/kernels/conftest.py as pytest has loaded it."""
    plugins = request.config.pluginmanager.get_plugins()
    (found,) = (plugin for plugin in plugins if hasattr(plugin, "ALLOWED_SKIPS"))
    return found


def reported(conftest, reason):
    report = SimpleNamespace(skipped=True, outcome="skipped", longrepr=("f.py", 1, reason))
    hook = conftest.pytest_runtest_makereport(None, None)
    next(hook)
    with pytest.raises(StopIteration) as stopped:
        hook.send(report)
    return stopped.value.value


def test_the_list_is_short_and_says_what_runs_instead(conftest):
    assert len(conftest.ALLOWED_SKIPS) <= 5
    assert all(conftest.ALLOWED_SKIPS.values())


def test_a_skip_for_another_reason_is_a_failure(conftest):
    for reason in conftest.ALLOWED_SKIPS:
        assert reported(conftest, f"Skipped: {reason}").outcome == "skipped"
    report = reported(conftest, "Skipped: it is late")
    assert report.outcome == "failed"
    assert "'it is late'" in report.longrepr
