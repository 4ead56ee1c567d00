"""Which device a topic is of, where its answer goes, and which topics may be configured.

What it does: holds Topics and topic_problems() to MQTT's rules for topics and filters, and
to the ingester's own: it never publishes where it listens. What it does not: a broker;
that Mosquitto takes what is_publishable() lets through is tested in test_ingester.py.
"""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ingester.topic import TOPIC_BYTES_MAX, Topics, is_publishable, topic_problems
from tests.support.each import cases

EVENTS = "qs/v1/+/events"
ACK = "qs/v1/{device_id}/acks"
DEADLETTER = "qs/v1/deadletter"
STATUS = "qs/v1/ingester/status"

# A slow or busy machine is no reason to fail.
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

# --- whose topic it is ---------------------------------------------------------------


@cases(
    ("events", "topic", "device_id"),
    [
        (EVENTS, "qs/v1/esp32-01/events", "esp32-01"),
        (EVENTS, "qs/v1/a b/events", "a b"),
        (EVENTS, "qs/v1/ä\U0001f600/events", "ä\U0001f600"),
        (EVENTS, "qs/v1//events", ""),
        (EVENTS, "qs/v1/events", None),
        (EVENTS, "qs/v1/a/b/events", None),
        (EVENTS, "qs/v1/a/acks", None),
        (EVENTS, "qs/v1/a/events/", None),
        (EVENTS, "/qs/v1/a/events", None),
        (EVENTS, "qs/v2/a/events", None),
        (EVENTS, "QS/v1/a/events", None),
        (EVENTS, "qs/v1/a/eventsx", None),
        (EVENTS, "", None),
        ("+", "a", "a"),
        ("+", "", ""),
        ("+", "a/b", None),
        ("+/x", "a/x", "a"),
        ("+/x", "/x", ""),
        ("+/x", "x", None),
        ("+/x", "a/b/x", None),
        ("x/+", "x/a", "a"),
        ("x/+", "x/", ""),
        ("x/+", "x", None),
        ("x/+", "x/a/b", None),
        # The prefix `a/` and the suffix `/a` overlap in `a/a`.
        ("a/+/a", "a/a", None),
        ("a/+/a", "a//a", ""),
        ("a/+/a", "a/a/a", "a"),
        ("a/+/a", "a", None),
        ("aa/+/aa", "aa/aa", None),
    ],
)
def test_the_device_id_is_what_stands_at_the_plus(
    events: str, topic: str, device_id: str | None
) -> None:
    assert Topics(events, ACK, DEADLETTER, STATUS).device_id(topic) == device_id


LEVEL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/+#"), max_size=6)
LEVELS = st.lists(LEVEL | st.sampled_from(["a", ""]), max_size=3)


@given(LEVELS, LEVELS, LEVEL)
@settings(PATIENT)
def test_device_id_finds_again_what_was_put_at_the_plus(
    before: list[str], after: list[str], device_id: str
) -> None:
    topics = Topics("/".join([*before, "+", *after]), ACK, DEADLETTER, STATUS)
    assert topics.device_id("/".join([*before, device_id, *after])) == device_id


@given(LEVELS, LEVELS, st.text(st.sampled_from("aA/ "), max_size=8) | st.text())
@settings(PATIENT)
def test_device_id_names_a_device_only_if_the_filter_matches_by_mqtts_rules(
    before: list[str], after: list[str], topic: str
) -> None:
    wanted, given_levels = [*before, "+", *after], topic.split("/")
    matches = len(wanted) == len(given_levels) and all(
        want in ("+", level) for want, level in zip(wanted, given_levels, strict=True)
    )
    device_id = Topics("/".join(wanted), ACK, DEADLETTER, STATUS).device_id(topic)
    assert device_id == (given_levels[len(before)] if matches else None)


# --- where the answer goes -----------------------------------------------------------


@cases(
    ("template", "device_id", "topic"),
    [
        (ACK, "esp32-01", "qs/v1/esp32-01/acks"),
        (ACK, "", "qs/v1//acks"),
        (ACK, "a b", "qs/v1/a b/acks"),
        (ACK, "ä\U0001f600", "qs/v1/ä\U0001f600/acks"),
        ("{device_id}", "a", "a"),
        ("x{device_id}y", "a", "xay"),
        # A device may call itself anything: nothing in its name is a format.
        (ACK, "{device_id}", "qs/v1/{device_id}/acks"),
        (ACK, "{0}{device_id.__class__}%s$1\\1", "qs/v1/{0}{device_id.__class__}%s$1\\1/acks"),
        ("{device_id.__class__}/{device_id}", "a", "{device_id.__class__}/a"),
        # A device that may not be answered, because the broker would cut the connection.
        (ACK, "a+", None),
        (ACK, "+", None),
        (ACK, "#", None),
        (ACK, "a#b", None),
        (ACK, "\0", None),
        (ACK, "a\n", None),
        (ACK, "\x7f", None),
        (ACK, "\x85", None),
        (ACK, "\uffff", None),
        (ACK, "\ufffe", None),
        (ACK, "\ufdd0", None),
        (ACK, "\ud800", None),
        (ACK, "\u202e", None),
        ("{device_id}", "", None),
    ],
    ids=ascii,
)
def test_the_ack_goes_to_the_devices_topic_or_nowhere(
    template: str, device_id: str, topic: str | None
) -> None:
    assert Topics(EVENTS, template, DEADLETTER, STATUS).ack(device_id) == topic


@cases("char", ["x", "ä", "\U0001f600"])
def test_a_topic_may_have_65535_bytes(char: str) -> None:
    size = len(char.encode())
    longest = char * (65_535 // size) + "x" * (65_535 % size)
    assert TOPIC_BYTES_MAX == len(longest.encode()) == 65_535
    assert is_publishable(longest)
    assert not is_publishable(longest + "x")
    topics = Topics(EVENTS, "{device_id}/acks", DEADLETTER, STATUS)
    assert topics.ack("x" * 65_530) == "x" * 65_530 + "/acks"
    assert topics.ack("x" * 65_531) is None


@given(st.text())
@settings(PATIENT)
def test_what_is_publishable_holds_nothing_that_mqtt_forbids(topic: str) -> None:
    if is_publishable(topic):
        assert 1 <= len(topic.encode("utf-8")) <= 65_535
        for char in topic:
            assert char not in "+#\0"
            assert not 0x01 <= ord(char) <= 0x1F
            assert not 0x7F <= ord(char) <= 0x9F
            assert ord(char) & 0xFFFE != 0xFFFE
            assert not 0xFDD0 <= ord(char) <= 0xFDEF


@given(st.text(st.sampled_from("abcXYZ019_.:-"), min_size=1, max_size=64))
@settings(PATIENT)
def test_every_device_with_a_valid_id_has_an_ack_topic(device_id: str) -> None:
    topics = Topics(EVENTS, ACK, DEADLETTER, STATUS)
    assert topics.ack(device_id) == f"qs/v1/{device_id}/acks"


# --- what may be configured ----------------------------------------------------------


@cases(
    "topics",
    [
        Topics(EVENTS, ACK, DEADLETTER, STATUS),
        Topics("+", "acks/{device_id}", "deadletter/x", STATUS),
        Topics("+/x", "{device_id}/acks", DEADLETTER, STATUS),
        Topics("x/+", "y/{device_id}", DEADLETTER, STATUS),
        Topics("/+/", "/{device_id}", DEADLETTER, STATUS),
        Topics("a b/+/ä", "a b/{device_id}/\U0001f600", "ä", STATUS),
        Topics(EVENTS, "qs/v1/{device_id}/events/acks", "qs/v1/a/events/deadletter", STATUS),
        Topics(EVENTS, "qs/v1/{device_id}/{device_id.__class__}", DEADLETTER, STATUS),
    ],
    ids=str,
)
def test_good_topics_have_no_problems(topics: Topics) -> None:
    assert topic_problems(topics) == []


@cases(
    "events",
    [
        "qs/v1/events",
        "qs/+/+/events",
        "qs/v1/+x/events",
        "qs/v1/x+/events",
        "qs/+/x+/events",
        "++",
        "#",
        "+/#",
        "qs/v1/+/#",
        "qs/#/+",
        "",
        "$share/group/qs/v1/+/events",
        "$share/+/events",
        "$queue/qs/v1/+/events",
        "$SYS/+/events",
        "$/+",
        "qs\0/+/events",
        "qs/+/events\n",
        "qs/+/\uffff",
        "qs/+/\x85",
        "qs/+/" + "x" * 65_535,
        "{device_id}",
    ],
    ids=lambda text: ascii(text[:40]),
)
def test_a_bad_events_topic_is_named(events: str) -> None:
    problems = topic_problems(Topics(events, ACK, DEADLETTER, STATUS))
    assert len(problems) == 1
    assert problems[0].startswith("MQTT_EVENTS_TOPIC: ")


@cases(
    "template",
    [
        "",
        "qs/v1/acks",
        "qs/v1/{device_id.__class__}/acks",
        "qs/v1/{}/acks",
        "qs/v1/{0}/acks",
        "qs/v1/{device}/acks",
        "qs/v1/{ device_id }/acks",
        "qs/v1/{device_id!r}/acks",
        "qs/v1/{device_id:>5}/acks",
        "qs/v1/%s/acks",
        "qs/v1/$device_id/acks",
        "qs/v1/{DEVICE_ID}/acks",
        "qs/{device_id}/{device_id}/acks",
        "qs/+/{device_id}/acks",
        "qs/{device_id}/#",
        "+",
        "qs/\0{device_id}",
        "qs/{device_id}\n",
        "qs/{device_id}\uffff",
        "{device_id}/" + "x" * 65_535,
    ],
    ids=lambda text: ascii(text[:40]),
)
def test_a_bad_ack_template_is_named(template: str) -> None:
    problems = topic_problems(Topics(EVENTS, template, DEADLETTER, STATUS))
    assert len(problems) == 1
    assert problems[0].startswith("ACK_TEMPLATE: ")


@cases(
    "deadletter",
    ["", "+", "#", "qs/+/deadletter", "qs/#", "a+b", "\0", "a\n", "\uffff", "\ud800", "x" * 65_536],
    ids=lambda text: ascii(text[:40]),
)
def test_a_bad_deadletter_topic_is_named(deadletter: str) -> None:
    problems = topic_problems(Topics(EVENTS, ACK, deadletter, STATUS))
    assert len(problems) == 1
    assert problems[0].startswith("MQTT_DEADLETTER_TOPIC: ")


def test_every_bad_topic_is_named_at_once() -> None:
    problems = topic_problems(Topics("#", "acks", "+", "#"))
    assert [problem.split(":")[0] for problem in problems] == [
        "MQTT_EVENTS_TOPIC",
        "ACK_TEMPLATE",
        "MQTT_DEADLETTER_TOPIC",
        "MQTT_STATUS_TOPIC",
    ]


@pytest.mark.parametrize(
    ("events", "template"),
    [
        (EVENTS, "qs/v1/{device_id}/events"),
        (EVENTS, "qs/v1/ack-{device_id}/events"),
        (EVENTS, "qs/v1/{device_id}-ack/events"),
        ("+", "{device_id}"),
        ("+", "ack-{device_id}"),
        ("x/+", "x/{device_id}"),
        ("+/x", "{device_id}/x"),
        # Only some devices would be answered where the ingester listens. With the first of
        # these a message on `a/a` would be answered on `a/a`, for ever.
        pytest.param("a/+", "{device_id}/a", id="device a"),
        pytest.param("a/+", "{device_id}/b", id="device a, once"),
        pytest.param("aa/+", "a{device_id}/b", id="device a, in a level"),
        pytest.param("qs/v1/+/events", "qs/{device_id}/x/events", id="device v1"),
        pytest.param("+/a", "b/{device_id}", id="device a at the end"),
    ],
)
def test_an_ack_template_that_the_ingester_would_hear_is_named(events: str, template: str) -> None:
    problems = topic_problems(Topics(events, template, DEADLETTER, STATUS))
    assert len(problems) == 1
    assert problems[0].startswith("ACK_TEMPLATE: ")
    assert "MQTT_EVENTS_TOPIC" in problems[0]


@cases(
    ("events", "deadletter"),
    [
        (EVENTS, "qs/v1/deadletter/events"),
        (EVENTS, "qs/v1//events"),
        ("+", "deadletter"),
        ("qs/v1/+", DEADLETTER),
        ("+/v1/deadletter", DEADLETTER),
    ],
)
def test_a_deadletter_topic_that_the_ingester_would_hear_is_named(
    events: str, deadletter: str
) -> None:
    problems = topic_problems(Topics(events, "acks/to/a/{device_id}", deadletter, "s/t/a/t/u/s"))
    assert len(problems) == 1
    assert problems[0].startswith("MQTT_DEADLETTER_TOPIC: ")
    assert "MQTT_EVENTS_TOPIC" in problems[0]


def test_a_status_topic_that_the_ingester_would_hear_is_named() -> None:
    problems = topic_problems(Topics(EVENTS, ACK, DEADLETTER, "qs/v1/ingester/events"))
    assert [problem.split(":")[0] for problem in problems] == ["MQTT_STATUS_TOPIC"]


FEW = st.text(st.sampled_from("ab"), max_size=2)
TEMPLATE_LEVEL = st.builds("{}{{device_id}}{}".format, FEW, FEW)


@given(
    st.lists(FEW, max_size=2),
    st.lists(FEW, max_size=2),
    st.lists(FEW, max_size=2),
    TEMPLATE_LEVEL,
    st.lists(FEW, max_size=2),
    FEW,
)
@settings(PATIENT, max_examples=500)
# `//` is an ACK topic too: of the device whose id is empty.
@pytest.mark.slow
def test_no_device_of_topics_without_problems_is_answered_where_the_ingester_listens(
    events_before: list[str],
    events_after: list[str],
    ack_before: list[str],
    ack_level: str,
    ack_after: list[str],
    device_id: str,
) -> None:
    events = "/".join([*events_before, "+", *events_after])
    far = "dead/letters/are/far/off"
    topics = Topics(events, "/".join([*ack_before, ack_level, *ack_after]), far, far)
    topic = topics.ack(device_id)
    if not topic_problems(topics) and topic is not None:
        assert topics.device_id(topic) is None
