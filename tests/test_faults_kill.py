"""The ingester is killed, at each named step and at random: nothing is lost.

What it does: SIGKILL under load, a new start, and the promise checked at the sender. What
it does not: end it politely; that is test_faults_stop.py.
"""

import random
import time
from collections.abc import Callable

import pytest

from tests.support.each import first_or_all
from tests.support.findings import Finding
from tests.support.kill_at import STEPS
from tests.support.pipeline import Pipeline, wait_until
from tests.support.trial import under_load
from tools.stack import Ingester

Report = Callable[[Finding], None]


def run_until_killed(pipeline: Pipeline, step: str, number: int) -> None:
    """Run an ingester until it kills itself at the step."""
    arguments = ("-m", "tests.support.kill_at", step, str(number))
    ingester = pipeline.ingester
    doomed = Ingester(ingester.environment, ingester.log_file, arguments=arguments)
    doomed.start()
    try:
        wait_until(lambda: not doomed.running, f"the kill at {step} {number}", 20)
        assert doomed.returncode == -9, doomed.log_tail()
    finally:
        doomed.kill()


@pytest.mark.parametrize("step", first_or_all(STEPS))
def test_killed_at_a_step_it_loses_nothing(
    running: Pipeline, report: Report, pytestconfig: pytest.Config, step: str
) -> None:
    numbers = [1, 2, 11, 100] if pytestconfig.getoption("faults") else [1, 3]
    with under_load(running, per_second=200) as trial:
        running.ingester.kill()
        for number in numbers:
            run_until_killed(running, step, number)
        running.ingester.start()
        trial.flows()
    note = f"at time {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
    report(trial.finding(f"ingester killed {step.replace('-', ' ')}, {len(numbers)} times", note))


def test_killed_at_random_moments_it_loses_nothing(
    running: Pipeline, report: Report, pytestconfig: pytest.Config
) -> None:
    randomness = random.Random(20260210)
    kills = 16 if pytestconfig.getoption("faults") else 4
    with under_load(running, per_second=200) as trial:
        for _ in range(kills):
            running.ingester.wait_for_log("DEBUG batch: ")
            time.sleep(randomness.uniform(0, 0.25))
            assert running.ingester.kill() == -9
            running.ingester.start()
        trial.flows()
    report(trial.finding(f"ingester killed at {kills} random moments"))
