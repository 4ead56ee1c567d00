"""The script that one writes first: each event is one INSERT and one ACK, in on_message.

What it does: what the benchmark compares the ingester with; the same topics, table and ACKs
with paho's own loop and defaults. What it does not: check an event, find conflicts, keep dead
letters, or outlive an error of the database.

Invariant: an ACK is published only after the row is committed, and the event is PUBACKed
only after that, because paho PUBACKs when on_message returns.
"""

import json
import logging
import os
import signal
import sys
from typing import Any

import psycopg2
from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion

INSERT = """
    INSERT INTO events
        (event_id, device_id, schema, event_type, value_num, value_text, unit, ts_device, meta)
    VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)
    ON CONFLICT (event_id) DO NOTHING
"""
# What comes of a payload that is no event: the same again at every delivery.
NOT_AN_EVENT = (ValueError, TypeError, KeyError, psycopg2.DataError, psycopg2.IntegrityError)


def store(cursor: Any, event: dict[str, Any]) -> dict[str, Any]:
    """Insert one event; return its ACK."""
    ids = {"event_id": event["event_id"], "device_id": event["device_id"]}
    value = event.get("value")
    row = (
        *ids.values(),
        event["schema"],
        event["event_type"],
        value if type(value) in (int, float) else None,
        value if isinstance(value, str) else None,
        event.get("unit"),
        event.get("ts_device"),
        json.dumps(event.get("meta") or {}),
    )
    cursor.execute(INSERT, row)
    return {"schema": 1, **ids, "status": "stored"}


def on_connect(client: paho.Client, *_: object) -> None:
    client.subscribe("qs/v1/+/events", qos=1)


def on_message(client: paho.Client, cursor: Any, message: paho.MQTTMessage) -> None:
    try:
        payload = json.loads(message.payload)
        is_array = isinstance(payload, list)
        acks = [store(cursor, event) for event in (payload if is_array else [payload])]
    except NOT_AN_EVENT as error:
        logging.warning("%s: not stored: %r", message.topic, error)
        return
    device_id = message.topic.split("/")[2]
    answer = json.dumps(acks if is_array else acks[0])
    client.publish(f"qs/v1/{device_id}/acks", answer, qos=1)


def connect() -> Any:
    """Return a connection to the database that the variables name; each statement commits."""
    env = os.environ
    connection = psycopg2.connect(
        host=env["POSTGRES_HOST"],
        port=env["POSTGRES_PORT"],
        dbname=env["POSTGRES_DB"],
        user=env["POSTGRES_USER"],
        password=env["POSTGRES_PASSWORD"],
    )
    connection.autocommit = True
    return connection


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    client = paho.Client(
        CallbackAPIVersion.VERSION2,
        client_id="homelab-plain",
        clean_session=False,
        userdata=connect().cursor(),
    )
    client.on_connect = on_connect
    client.on_subscribe = lambda *_: print("ready", flush=True)
    client.on_message = on_message
    client.connect(os.environ["MQTT_HOST"], int(os.environ["MQTT_PORT"]))
    client.loop_forever()


if __name__ == "__main__":
    main()
