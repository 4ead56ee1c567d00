"""A single stack that becomes the cluster, as the README has it, loses nodes, and comes back.

What it does: one fault of each kind under load, a third partition, the tools in a cluster, and the
moves. What it does not: every node and every fault (faults.py).

Invariant: what was lost is counted at the sender.
"""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from cluster import SINGLE, Cluster, kill, more_partitions, under_fault
from paho.mqtt.client import MQTTv311
from sender import Sender

from benchmark.fleet import connect
from tests.support import compose, documents
from tests.support.device import Device, event
from tests.support.secure import Client

pytestmark = [pytest.mark.compose, pytest.mark.timeout(600)]

# Of one stream, NATS 2.15 (default_max_consumers).
CONSUMERS_MAX_BY_DEFAULT = 1_000

MOVE_IN, MOVE_BACK = documents.blocks("Moving in and back")


def stored(name: str) -> None:
    with Device(1883, name, hears=name) as device:
        assert device.ask(event(1, name))["status"] == "stored"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The overlay, up, with the rows of a single stack, in a checkout under umask 077."""
    with compose.only_run():
        cluster = Cluster(compose.copy_checkout(tmp_path_factory.mktemp("cluster")))
        cluster.look_often()
        with compose.cleared(cluster):
            cluster.run("docker", "compose", "up", "-d", "--build", "--wait",
                        seconds=240, variables=SINGLE)  # fmt: skip
            stored("before")
            cluster.run("sh", "-ec", MOVE_IN, seconds=240, variables=SINGLE)
            yield cluster


def test_what_was_stored_before_has_moved_in(cluster: Cluster) -> None:
    assert cluster.query("SELECT event_id FROM events") == [("before-1",)]
    stored("before")  # sent again
    assert cluster.query("SELECT count(*) FROM events") == [(1,)]


def test_each_partition_answers_its_devices_and_the_tools_see_all_of_them(cluster: Cluster) -> None:
    names = [f"esp-{number}" for number in range(8)]
    for name in names:
        with Device(1883, name, hears=name) as device:
            assert device.ask(event(1, name))["status"] == "stored"
            assert device.ask({"schema": 1, "device_id": name, "event_id": "bad"}) == {
                "schema": 1, "event_id": "bad", "device_id": name, "status": "rejected",
                "reason": "missing_field", "error": "event_type is required",
            }  # fmt: skip
    letters = cluster.query("SELECT topic, device_id FROM dead_letters")
    topics = {topic.removesuffix(f"/{device}/events") for topic, device in letters}
    assert topics == {"qs/v1/part/0", "qs/v1/part/1"}
    # Either's tool looks after the letters of both, and sees both.
    tool = ("exec", "-T", "ingester-0", "python", "-m")
    done = cluster.run("docker", "compose", *tool, "ingester.deadletters",
                       "replay", "--reason", "missing_field", expected=1).stdout  # fmt: skip
    assert done == "replayed 8 of 8 dead letters: 8 refused as missing_field\n"
    frame = cluster.compose(*tool, "ingester.top", "--once")
    assert "ingester  2 online" in frame
    with Client(None, "ws", port=9001, transport="websockets", protocol=MQTTv311) as browser:
        assert browser.ask(event(1, "ws"))["status"] == "stored"


def test_more_devices_than_nats_allows_by_default_may_hear_their_acks(cluster: Cluster) -> None:
    with ExitStack() as connections:
        for number in range(CONSUMERS_MAX_BY_DEFAULT + 1):
            topic = f"qs/v1/one-of-many-{number}/acks"
            sock = connect(1883, f"one-of-many-{number}", [topic], qos=1)  # raises if refused
            connections.enter_context(sock)
        stored("one-more")


def test_a_killed_node_of_each_kind_loses_nothing(cluster: Cluster) -> None:
    with Sender(1883) as sender:
        for fault in (
            lambda: kill(cluster, "nats-1", seconds=5),
            lambda: kill(cluster, "ingester-0", seconds=5),
            lambda: kill(cluster, cluster.primary(), seconds=5),
        ):
            result = under_fault(cluster, sender, fault)
            assert result.is_kept, json.dumps(result._asdict())


def test_a_third_partition_under_load_loses_nothing(cluster: Cluster) -> None:
    for number in ("", "0", "5", "x"):
        cluster.run("overlays/cluster/partitions", number, expected=2)
    with Sender(1883) as sender:
        result = under_fault(cluster, sender, lambda: more_partitions(cluster))
    assert result.is_kept, json.dumps(result._asdict())
    frame = cluster.compose("exec", "-T", "ingester-2", "python", "-m", "ingester.top", "--once")
    assert "ingester  3 online" in frame
    assert re.search("stored [1-9]", cluster.log("ingester-2"))
    members = cluster.compose("exec", "-T", "postgres-1", "patronictl",
                              "-c", "/cluster/patroni.yml", "list")  # fmt: skip
    assert members.count("Quorum Standby") == 2
    count = "SELECT device_id, count(*) FROM events GROUP BY device_id"
    table = cluster.compose("run", "--rm", "--no-deps", "-T", "schema",
                            "psql", "-P", "pager=off", "-c", count)  # fmt: skip
    assert "device-49" in table


def test_the_single_stack_comes_back_with_every_row(cluster: Cluster) -> None:
    ids = set(cluster.query("SELECT event_id FROM events"))
    cluster.run("sh", "-ec", MOVE_BACK, seconds=240)
    assert set(cluster.query("SELECT event_id FROM events")) == ids
    stored("after")
