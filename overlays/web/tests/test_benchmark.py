"""The benchmark's part of the page: it asks for each address, and takes no refusal for an answer.

What it does: measures with a few rows in place of 10 million. What it does not: assert a time.
"""

import pytest

from benchmark import page, queries
from tools.process import StackError
from tools.stack import Stack


def test_each_address_of_the_benchmark_is_answered() -> None:
    with Stack(with_ingester=False) as stack:
        queries.load_up_to(stack.postgres, 2_000)
        measured = page.measure(stack.folder, stack.postgres, rounds=1)
        assert set(page.LIMITED) < set(measured)
        assert all(milliseconds > 0 for milliseconds in measured.values())
        settings = "SELECT setting FROM pg_settings WHERE name = 'max_parallel_workers_per_gather'"
        assert stack.postgres.psql(settings) == "0"  # as Compose has it
        stack.postgres.psql("DROP TABLE dead_letters CASCADE")
        with pytest.raises(StackError, match="answers 503 to /deadletters"):
            page.measure(stack.folder, stack.postgres, rounds=1)
