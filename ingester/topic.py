"""The topics: where events arrive, and where ACKs, dead letters and the status go.

What it does: tells the device of a topic, and the ACK topic of a device. What it does
not: publish or subscribe.

Invariant: no reply ever goes to a topic that the broker refuses (it would disconnect the
ingester, and the reply would be sent again after every reconnect), or to one that the
ingester itself reads.
"""

from dataclasses import dataclass

TOPIC_BYTES_MAX = 65_535  # MQTT 3.1.1, section 1.5.3


@dataclass(frozen=True, slots=True)
class Topics:
    """The topics as configured. `events` holds one `+`, `ack_template` {device_id}."""

    events: str
    ack_template: str
    deadletter: str
    status: str

    def device_id(self, topic: str) -> str | None:
        """Return what stands at the `+`; None if the topic is not one of `events`."""
        prefix, suffix = self.events.split("+")
        device_id = topic[len(prefix) : len(topic) - len(suffix)]
        # Put together again it is the same topic only if prefix and suffix do not overlap.
        if "/" in device_id or prefix + device_id + suffix != topic:
            return None
        return device_id

    def ack(self, device_id: str) -> str | None:
        """Return the device's ACK topic; None if it has none that can be published on."""
        # Not str.format: {device_id.__class__} would reach into the object.
        topic = self.ack_template.replace("{device_id}", device_id)
        return topic if is_publishable(topic) else None

    def matches_acks(self) -> bool:
        """Tell whether the ACK topic of any device, whatever its id, is one of `events`."""
        events, acks = self.events.split("/"), self.ack_template.split("/")
        return len(events) == len(acks) and all(map(_overlap, acks, events))


def _overlap(ack_level: str, events_level: str) -> bool:
    if events_level == "+" or "{device_id}" not in ack_level:
        return events_level in ("+", ack_level)
    prefix, suffix = ack_level.split("{device_id}")
    return (
        events_level.startswith(prefix)
        and events_level.endswith(suffix)
        and len(events_level) >= len(prefix) + len(suffix)
    )


def is_publishable(topic: str) -> bool:
    """Tell whether any broker takes a message on this topic.

    Stricter than MQTT 3.1.1, section 4.7: what is not printable (control characters,
    non-characters) is refused by some brokers and not by others.
    """
    return (
        topic.isprintable()
        and "+" not in topic
        and "#" not in topic
        and 1 <= len(topic.encode("utf-8")) <= TOPIC_BYTES_MAX
    )


def topic_problems(topics: Topics) -> list[str]:
    """Say what is wrong with the configured topics, each by its variable; [] if nothing."""
    problems = []
    levels = topics.events.split("/")
    if levels.count("+") != 1 or topics.events.count("+") != 1 or "#" in topics.events:
        problems.append(
            "MQTT_EVENTS_TOPIC: expected exactly one level that is `+`, and no `#`, "
            f"got {topics.events!r}"
        )
    elif levels[0].startswith("$"):
        problems.append(
            "MQTT_EVENTS_TOPIC: shared subscriptions and $-topics lose events, "
            f"got {topics.events!r}"
        )
    elif not is_publishable(topics.events.replace("+", "x")):
        problems.append(f"MQTT_EVENTS_TOPIC: not a topic, got {topics.events!r}")
    if topics.ack_template.count("{device_id}") != 1 or topics.ack("x") is None:
        problems.append(
            f"ACK_TEMPLATE: expected a topic with {{device_id}} in it, got {topics.ack_template!r}"
        )
    ours = {"MQTT_DEADLETTER_TOPIC": topics.deadletter, "MQTT_STATUS_TOPIC": topics.status}
    problems += [
        f"{name}: expected a topic without wildcards, got {topic!r}"
        for name, topic in ours.items()
        if not is_publishable(topic)
    ]
    if problems:
        return problems
    heard = [name for name, topic in ours.items() if topics.device_id(topic) is not None]
    if topics.matches_acks():
        heard.append("ACK_TEMPLATE")
    return [
        f"{name}: matches MQTT_EVENTS_TOPIC, so the ingester would hear itself" for name in heard
    ]
