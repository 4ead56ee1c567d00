"""A stack's life as its owner sees it: upgraded, backed up, and begun again from the backup.

What it does: begins with a database of the first release, upgrades it by the documented
command, and types the commands of docs/operating.md, "Backup and restore", which are there in
```shell blocks: first to back up, second to restore. (A ```sh block holds commands that work
at any time; test_compose.py types those.) What it does not: look into the schema; that is
test_upgrade.py.

Invariant: between the tests the stack is up and healthy.
"""

from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tests.support import compose, documents
from tests.support.compose import VOLUME, Compose
from tests.support.device import Device, event
from tests.support.load import deliver_rest, load, wait_for_acks
from tests.support.pipeline import wait_until
from tests.test_upgrade import COLUMNS, FIRST_RELEASE, ROWS

pytestmark = [pytest.mark.compose, pytest.mark.timeout(300)]


class Upgraded(NamedTuple):
    """The stack, and each row as it was before the upgrade."""

    stack: Compose
    before: set[str]


@pytest.fixture(scope="module")
def whole_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upgraded]:
    """The stack of a fresh copy, upgraded from the first release."""
    with compose.only_run():
        stack = Compose(compose.copy_checkout(tmp_path_factory.mktemp("checkout")))
        with compose.cleared(stack):
            stack.up("postgres")
            stack.psql(FIRST_RELEASE.read_text())
            stack.psql(ROWS)
            before = rows(stack)
            stack.up("--build")
            yield Upgraded(stack, before)


@pytest.fixture
def stack(whole_stack: Upgraded) -> Iterator[Compose]:
    """The same; of a test that failed, pytest shows what is printed here."""
    yield whole_stack.stack
    print(whole_stack.stack.trouble())


def rows(stack: Compose) -> set[str]:
    """Every row, whole, as JSON."""
    return {
        line
        for table, columns in COLUMNS.items()
        for line in stack.psql(
            f"SELECT to_jsonb(r) FROM (SELECT {columns} FROM {table}) r"
        ).splitlines()
    }


def objects(stack: Compose) -> str:
    """Every object of ours, with what changes when it is made anew or written anew."""
    return stack.psql(
        "SELECT relname, oid, relfilenode FROM pg_class"
        " WHERE relnamespace = 'public'::regnamespace ORDER BY 1"
    )


def test_an_upgrade_keeps_every_row_and_a_second_one_changes_nothing(
    whole_stack: Upgraded, stack: Compose
) -> None:
    assert len(whole_stack.before) == 5
    assert whole_stack.before <= rows(stack)
    state = stack.schema(), objects(stack), rows(stack)
    with Device(1883, "upgraded") as device:
        with load([device], 50):
            stack.up("--build")
            wait_for_acks([device])
        deliver_rest([device])
    assert stack.event_ids("upgraded") == set(device.sent)
    stack.psql("DELETE FROM events WHERE device_id = 'upgraded'")
    assert (stack.schema(), objects(stack), rows(stack)) == state


def test_what_was_backed_up_from_a_running_stack_is_restored_into_an_empty_one(
    stack: Compose,
) -> None:
    back_up, restore = documents.blocks("Backup and restore")
    with Device(1883, "saved") as device:
        first = event("first", "saved")
        assert device.ask(first)["status"] == "stored"
        device.ask({"schema": 1})
        device.wait(lambda: bool(device.dead_letters), "the dead letter")
        last_id = device.dead_letters[0]["id"]
        kept = rows(stack)
        schema = stack.schema()
        with load([device], 50):
            wait_for_acks([device])
            heard_before = set(device.heard_at)
            stack.run("bash", "-euc", back_up)
            wait_for_acks([device])  # the backup has held up nobody
        deliver_rest([device])

        # What waits in the broker is not in the backup, and is not lost either.
        stack.compose("stop", "ingester")
        device.publish(event("queued", "saved"))
        stack.down("--volumes")
    assert VOLUME not in stack.volumes_left()
    stack.run("bash", "-euc", restore, seconds=240)

    assert stack.schema() == schema  # with all rights
    assert kept <= rows(stack)
    wait_until(lambda: "saved-queued" in stack.event_ids("saved"), "the queued event", 30)
    found = stack.event_ids("saved")
    assert heard_before <= found <= set(device.sent)
    with Device(1883, "saved") as again:
        assert again.ask(first)["status"] == "stored"
        assert again.ask(first | {"value": 0})["reason"] == "event_id_conflict"
        again.wait(lambda: bool(again.dead_letters), "the dead letter")
        assert again.dead_letters[0]["id"] > last_id
        again.deliver(device.sent.values())
    assert int(stack.psql("SELECT count(*) FROM events WHERE device_id = 'saved'")) == len(
        device.sent
    )


def test_a_backup_is_not_restored_over_what_is_there(stack: Compose) -> None:
    back_up, restore = documents.blocks("Backup and restore")
    stack.run("bash", "-euc", back_up)
    before = rows(stack)
    stack.run("bash", "-euc", line_with(" cp ", restore))
    done = stack.run("bash", "-euc", line_with("pg_restore", restore), expected=1)
    stack.run("bash", "-euc", line_with(" rm ", restore))
    assert "already exists" in done.stderr
    assert rows(stack) == before


def line_with(word: str, commands: str) -> str:
    (line,) = [line for line in commands.splitlines() if word in line]
    return line
