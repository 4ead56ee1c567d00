"""What the bridge makes of other firmware's messages, without a broker.

What it does: holds, message by message, what those of tests/data/foreign.jsonl become, the rules
behind it row by row, and then whatever hypothesis can think of against the ingester's own decoder.
What it does not: run the bridge; test_bridge.py does.

Invariant: each recorded message has its expected events, no more and no fewer. That file was made
by the bridge, then read line by line against the formats' documented rules.
"""

import base64
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from devices.bridge import translate as bridge
from devices.bridge.deadends import KEPT_MAX, PER_MINUTE_MAX, DeadEnds
from devices.bridge.moment import moment
from devices.bridge.names import DeviceNames
from devices.bridge.presets import PRESETS
from devices.bridge.source import Source, Sources, SourceSettings
from devices.bridge.template import TemplateError, compile_template, groups, overlap
from devices.bridge.translate import Incoming, Translation, Translator
from devices.bridge.value import of_json, of_text
from devices.python import telemetry
from devices.python.telemetry.event import event_bytes, timestamp_text
from ingester.event import Event, decode
from ingester.rejection import Rejection
from tests.support.each import cases

DATA = Path(__file__).with_name("data")
BERLIN = ZoneInfo("Europe/Berlin")
NOW = datetime(2026, 11, 26, 20, 0, tzinfo=UTC)
FOREIGN = [json.loads(line) for line in (DATA / "foreign.jsonl").read_text("utf-8").splitlines()]


def payload(message: dict[str, Any]) -> bytes:
    if "payload_b64" in message:
        return base64.b64decode(message["payload_b64"])
    return str(message["payload"]).encode()


def translator(*presets: str, **settings: Any) -> Translator:
    return Translator(
        Sources(Source(SourceSettings(name, BERLIN, **settings)) for name in presets or PRESETS)
    )


def sent(to: Translator, topic: str, text: str | bytes, **how: Any) -> Translation:
    data = text if isinstance(text, bytes) else text.encode()
    return to.translate(Incoming(topic, data, **{"received_at": NOW, **how}))


def told(translation: Translation) -> dict[str, Any]:
    return {reading.event_type: reading.value for reading in translation.events}


def time_of(event: telemetry.Event) -> str | None:
    return timestamp_text(event.timestamp) if event.timestamp is not None else "now"


def meta_of(event: telemetry.Event) -> dict[str, Any]:
    return dict(event.meta or {})


def units(translation: Translation) -> dict[str, Any]:
    return {reading.event_type: reading.unit for reading in translation.events}


# --- the recorded messages ---------------------------------------------------------------

BECOMES = [json.loads(line) for line in (DATA / "foreign_events.jsonl").read_text().splitlines()]


def test_each_recorded_message_becomes_what_is_written_beside_it() -> None:
    everything = translator()
    for message, becomes in zip(FOREIGN, BECOMES, strict=True):
        zone = ZoneInfo(message["tz"]) if "tz" in message else None
        made = sent(everything, message["topic"], payload(message), zone=zone)
        events = [[e.device_id, e.event_type, e.value, e.unit, time_of(e)] for e in made.events]
        assert message["topic"] == becomes["topic"]
        assert events == becomes["events"], message["topic"]
        assert made.dead_end is None


@cases("message", FOREIGN, ids=lambda each: each["topic"])
def test_a_stored_copy_is_an_old_state(message: dict[str, Any]) -> None:
    made = sent(translator(), message["topic"], payload(message), retained=True)
    assert made.events == []
    assert made.skipped


@cases("message", FOREIGN, ids=lambda each: each["topic"])
def test_a_message_sent_twice_has_the_same_ids_if_it_has_a_time(message: dict[str, Any]) -> None:
    to = translator()
    first = sent(to, message["topic"], payload(message))
    second = sent(to, message["topic"], payload(message))
    ids = [event.event_id for event in first.events if time_of(event)]
    assert ids == [event.event_id for event in second.events if time_of(event)]
    assert len(set(ids)) == len(ids)


def test_dead_ends_are_few_also_over_restarts() -> None:
    minutes = [0]
    earlier = [f"bridge-dead-end-{number}" for number in range(KEPT_MAX - PER_MINUTE_MAX - 1)]
    dead_ends = DeadEnds(earlier, lambda: 60.0 * minutes[0])

    def made(count: int) -> list[telemetry.Event]:
        messages = [Incoming(f"a/{minutes}/{number}", b"{") for number in range(count)]
        events = [dead_ends.event(message, "not JSON", None) for message in messages]
        return [event for event in events if event is not None]

    assert len(made(PER_MINUTE_MAX + 1)) == PER_MINUTE_MAX
    minutes[0] = 1
    assert len(made(2)) == 1
    dead_ends.gone(earlier[0])
    assert len(made(3)) == 1


# --- values ------------------------------------------------------------------------------


@cases(
    ("text", "value", "unit"),
    [
        *(("21.5", 21.5, None), ("-3", -3, None), ("+4", 4, None), ("0", 0, None)),
        *(("21,5", 21.5, None), ("64.300", 64.3, None), (".5", 0.5, None), ("1.5e3", 1500, None)),
        *(("21,5 °C", 21.5, "°C"), ("42 F", 42, "°F"), ("98%", 98, "%"), ("3.4 kWh", 3.4, "kWh")),
        *(("12V", 12, "V"), ("-61 dBm", -61, "dBm"), ("true", 1, None), ("false", 0, None)),
        *(
            ("ON", "ON", None),
            ("open", "open", None),
            ("True", "True", None),
            ("none", "none", None),
        ),
        # An id, hex, a version, a duration, a date: never a number.
        *(("0119383800E5", "0119383800E5", None), ("12E4", "12E4", None), ("007", "007", None)),
        *(("0x1A", "0x1A", None), ("1.7.0", "1.7.0", None), ("12T03:44:10", "12T03:44:10", None)),
        *(("286 seconds", "286 seconds", None), ("15 s", "15 s", None), ("10m", "10m", None)),
        *(("0.056576s", "0.056576s", None), ("2026-01-04", "2026-01-04", None)),
        *(("12F", "12F", None), ("11n", "11n", None), ("0H", "0H", None)),
        ("123456789012345678901234", "123456789012345678901234", None),
        ("1e+400", "1e+400", None),
        # Finite markers are for the owner to judge.
        *(("-127", -127, None), ("3276.8", 3276.8, None), ("281474976710655", 2**48 - 1, None)),
    ],
)
def test_what_a_text_says(text: str, value: object, unit: str | None) -> None:
    assert of_text(text, "temperature") == (value, unit)


@cases(
    "text",
    ["", " ", "\0", "nan", "NaN", "-nan", "None", "null", "unavailable", "unknown", "inf", "NULL"],
)
def test_what_says_that_there_is_no_value(text: str) -> None:
    assert of_text(text, "x").value is None


@cases(
    "key", ["id", "Id", "Meter_id", "mac", "serial", "BSSId", "fw_ver", "installed_version", "eui"]
)
def test_under_the_name_of_an_id_digits_are_a_text(key: str) -> None:
    assert of_text("4711", key).value == "4711"
    assert of_json(4711, key).value == "4711"


@cases("key", ["humid", "grid", "power", "Temperature", "liquid", "period"])
def test_other_names_are_not_taken_for_that_of_an_id(key: str) -> None:
    assert of_text("4711", key).value == 4711


# --- time --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_time", "expected"),
    [
        ("2026-11-20T08:15:42.117Z", "2026-11-20T08:15:42.117Z"),
        ("2026-11-20T09:15:42+01:00", "2026-11-20T08:15:42Z"),
        ("2026-11-20T09:15:42.515791+0100", "2026-11-20T08:15:42.515791Z"),
        ("2026-11-20 09:15:42", "2026-11-20T08:15:42Z"),
        ("2026-11-20T09:15:42", "2026-11-20T08:15:42Z"),
        ("2026-11-20T08:15:42.812345678Z", "2026-11-20T08:15:42.812345Z"),
        (1795162542, "2026-11-20T08:15:42Z"),
        (1795162542.65, "2026-11-20T08:15:42.650Z"),
        (1795162542117, "2026-11-20T08:15:42.117Z"),
        ("1795162542", "2026-11-20T08:15:42Z"),
        # Summer time; the hour that the clock shows twice, and the one that it skips.
        ("2026-07-01T12:00:00", "2026-07-01T10:00:00Z"),
        ("2026-10-25T02:30:00", "2026-10-25T00:30:00Z"),
        ("2026-03-29T02:30:00", "2026-03-29T01:30:00Z"),
        *(("1970-01-01T00:00:07", None), ("2000-12-31T22:00:00", None), (12.5, None)),
        *(("2026-11-26T22:00:00", None), ("2036-02-07T06:28:16Z", None), (4294967295, None)),
        *(("@0.0s", None), ("2026-02-30T00:00:00", None), ("yesterday", None), ("", None)),
        *((None, None), (True, None), ([], None), (1e300, None), (-1, None), (float("nan"), None)),
    ],
)
def test_a_time_is_read_or_left_out(given_time: object, expected: str | None) -> None:
    found = moment(given_time, BERLIN, NOW)
    assert (timestamp_text(found) if found else None) == expected


def test_an_hour_that_comes_twice_is_the_second_one_if_it_came_then() -> None:
    at = datetime(2026, 10, 25, 1, 30, 5, tzinfo=UTC)
    found = moment("2026-10-25T02:30:00", BERLIN, at)
    assert found == datetime(2026, 10, 25, 1, 30, tzinfo=UTC)


# --- ids ---------------------------------------------------------------------------------


def test_a_name_becomes_an_id_and_is_kept_in_meta() -> None:
    made = sent(translator("zigbee2mqtt"), "zigbee2mqtt/Küche/Stecker 1", '{"power":1}')
    assert [reading.device_id for reading in made.events] == ["K_che.Stecker_1"]
    assert meta_of(made.events[0])["device"] == "Küche/Stecker 1"


def test_two_names_never_have_one_id() -> None:
    names = DeviceNames()
    assert names.device_id("hall light") == "hall_light"
    other = names.device_id("hall_light")
    both = {names.device_id("hall light"), other}
    assert len(both) == 2
    assert "hall_light" not in both
    assert all(each.startswith("hall_light-") for each in both)


def test_names_of_any_length_stay_apart_and_valid() -> None:
    names = DeviceNames()
    ids = {names.device_id("x" * 200 + str(number)) for number in range(50)}
    assert len(ids) == 50
    assert all(len(each) <= 64 for each in ids)


def test_what_was_known_before_a_restart_is_known_after_it() -> None:
    before = DeviceNames()
    before.device_id("a b")
    after = DeviceNames(before.new)
    assert after.device_id("a_b") != "a_b"


# --- formats -----------------------------------------------------------------------------


def test_zigbee2mqtt_has_its_units_from_the_list_of_devices() -> None:
    to = translator("zigbee2mqtt")
    listed = next(each for each in FOREIGN if each["topic"] == "zigbee2mqtt/bridge/devices")
    sent(to, listed["topic"], payload(listed), retained=True)
    made = sent(to, "zigbee2mqtt/living room climate", '{"voltage":2985,"temperature":21}')
    assert units(made) == {"voltage": "mV", "temperature": "°C"}


def test_a_unit_is_learnt_from_discovery_in_short_and_in_long_keys() -> None:
    to = translator("esphome", "ems-esp")
    short = {"~": "node/sensor/x", "stat_t": "~/state", "unit_of_meas": "ppm"}
    sent(to, "homeassistant/sensor/node/x/config", json.dumps(short), retained=True)
    assert units(sent(to, "node/sensor/x/state", "400")) == {"sensor.x": "ppm"}
    long = {
        "state_topic": "ems-esp/thermostat_data",
        "unit_of_measurement": "°C",
        "value_template": "{{ value_json['hc1'].seltemp | float }}",
    }
    sent(to, "homeassistant/sensor/ems-esp/t/config", json.dumps(long), retained=True)
    made = sent(to, "ems-esp/thermostat_data", '{"hc1":{"seltemp":"20.1","mode":"auto"}}')
    assert told(made) == {"thermostat_data.hc1.seltemp": 20.1, "thermostat_data.hc1.mode": "auto"}
    assert units(made)["thermostat_data.hc1.seltemp"] == "°C"


def test_zigbee2mqtt_attribute_by_attribute() -> None:
    made = sent(translator("zigbee2mqtt"), "zigbee2mqtt/hall/lamp/brightness", "254")
    assert [(r.device_id, r.event_type, r.value) for r in made.events] == [
        ("hall.lamp", "brightness", 254)
    ]


def test_tasmota_in_the_other_order_of_prefix_and_topic() -> None:
    made = sent(translator("tasmota"), "plug/tele/SENSOR", '{"ENERGY":{"Power":3}}')
    assert [(r.device_id, r.event_type, r.unit) for r in made.events] == [
        ("plug", "ENERGY.Power", "W")
    ]


def test_tasmota_with_an_empty_key_and_two_packets_run_together() -> None:
    to = translator("tasmota")
    text = '{"Time":"2026-11-20T09:15:00","":{"Power":[1,2]}}{"Time":"2026-11-20T09:15:01","a":3}'
    made = sent(to, "tele/m/SENSOR", text)
    assert told(made) == {"Power.0": 1, "Power.1": 2, "a": 3}
    assert len({event.event_id for event in made.events}) == 3


def test_tasmota_tells_the_unit_beside_the_value() -> None:
    text = '{"BME280":{"Temperature":70.1,"Pressure":29.9},"TempUnit":"F","PressureUnit":"inHg"}'
    made = sent(translator("tasmota"), "tele/m/SENSOR", text)
    assert units(made) == {"BME280.Temperature": "°F", "BME280.Pressure": "inHg"}


def test_shelly_button_is_an_event_of_its_input() -> None:
    text = (
        '{"src":"s","dst":"s/events","method":"NotifyEvent","params":{"ts":1795162542.65,"events":'
        '[{"component":"input:0","id":0,"event":"single_push","ts":1795162542.65}]}}'
    )
    made = sent(translator("shelly-gen2"), "house/s/events/rpc", text)
    assert told(made) == {"input:0.event": "single_push"}
    assert time_of(made.events[0]) == "2026-11-20T08:15:42.650Z"
    assert made.events[0].device_id == "house.s"


def test_the_same_change_by_a_second_topic_is_one_reading() -> None:
    to = translator("shelly-gen2")
    rpc = '{"params":{"ts":1795162542.65,"switch:0":{"apower":604.2}}}'
    assert told(sent(to, "s/events/rpc", rpc)) == {"switch:0.apower": 604.2}
    second = sent(to, "s/status/switch:0", '{"apower":604.2,"voltage":230}')
    assert told(second) == {"switch:0.voltage": 230}
    # A third one is a new one; so is the same value on the same topic.
    assert "switch:0.apower" in told(sent(to, "s/events/rpc", rpc))
    assert "switch:0.apower" in told(sent(to, "s/events/rpc", rpc))


def test_a_sensor_that_sends_everything_twice_at_once_is_heard_once() -> None:
    to = translator("openmqttgateway")
    topic = "home/gw/BTtoMQTT/A4C138112233"
    assert told(sent(to, topic, '{"tempc":26.9}'))
    assert not sent(to, topic, '{"tempc":26.9}').events
    later = sent(to, topic, '{"tempc":26.9}', received_at=NOW + timedelta(seconds=9))
    assert told(later) == {"tempc": 26.9}


def test_what_the_broker_delivers_again_is_never_taken_for_a_repetition() -> None:
    to = translator("openmqttgateway")
    topic = "home/gw/BTtoMQTT/A4C138112233"
    sent(to, topic, '{"tempc":26.9}')
    assert sent(to, topic, '{"tempc":26.9}', is_redelivered=True).events


def test_a_button_pressed_twice_is_two_events() -> None:
    to = translator("zigbee2mqtt")
    for _ in range(2):
        made = sent(to, "zigbee2mqtt/hall button", '{"action":"single"}')
        assert told(made) == {"action": "single"}
        assert made.events[0].event_id is None
    assert not sent(to, "zigbee2mqtt/hall button", '{"action":""}').events


def test_rtl_433_has_the_time_in_the_message_before() -> None:
    to = translator("rtl_433")
    sent(to, "rtl_433/devices/Nexus-TH/2/147/time", "2026-11-20 09:15:42")
    topic = "rtl_433/devices/Nexus-TH/2/147/temperature_C"
    assert time_of(sent(to, topic, "21.5").events[0]) == "2026-11-20T08:15:42Z"
    late = sent(to, topic, "21.5", received_at=NOW + timedelta(seconds=60))
    assert time_of(late.events[0]) is None
    other = sent(to, "rtl_433/devices/Nexus-TH/3/9/temperature_C", "21.5")
    assert time_of(other.events[0]) is None


def test_rtl_433_sends_both_forms_and_each_reading_is_stored_once() -> None:
    to = translator("rtl_433")
    whole = '{"time":"2026-11-20 09:15:42","model":"Nexus-TH","id":147,"channel":2,"humidity":47}'
    assert told(sent(to, "rtl_433/vm/events", whole)) == {"humidity": 47}
    sent(to, "rtl_433/vm/devices/Nexus-TH/2/147/time", "2026-11-20 09:15:42")
    assert not sent(to, "rtl_433/vm/devices/Nexus-TH/2/147/humidity", "47").events


def test_statestream_learns_the_unit_after_the_state() -> None:
    to = translator("ha-statestream")
    sent(to, "statestream/sensor/kitchen/unit_of_measurement", '"\\u00b0C"', retained=True)
    assert units(sent(to, "statestream/sensor/kitchen/state", "21.5")) == {"state": "°C"}


def test_collectd_sends_the_time_in_front_of_its_values() -> None:
    to = translator("collectd")
    made = sent(to, "collectd/nas/interface-eth0/if_octets", b"1795162542.554:10:20\0")
    assert told(made) == {"interface-eth0.if_octets.0": 10, "interface-eth0.if_octets.1": 20}
    made = sent(to, "collectd/nas/memory/memory-used", b"1795162542.554:913203200\0")
    assert told(made) == {"memory.memory-used": 913203200}
    assert time_of(made.events[0]) == "2026-11-20T08:15:42.554Z"


def test_an_ecowitt_passkey_is_kept_nowhere() -> None:
    secret = "0123456789ABCDEF0123456789ABCDEF"
    made = sent(translator("ecowitt2mqtt"), f"ecowitt2mqtt/{secret}", '{"temp":3}')
    assert told(made) == {"temp": 3}
    assert secret not in str(made)


def test_bytes_of_a_program_that_knows_no_utf_8_are_a_number_if_they_are_one() -> None:
    made = sent(translator("plain"), "home/kitchen/temperature", b"21,5 \xb0C")
    assert [(r.value, r.unit) for r in made.events] == [(21.5, "°C")]


@cases("topic", ["$SYS/broker/uptime", "a/b/set", "cmnd/x/POWER"])
def test_a_template_for_everything_brings_no_command_either(topic: str) -> None:
    assert not sent(translator("plain", topic="{device}/{event_type...}"), topic, "1").events


@cases(
    ("topic", "text"),
    [
        ("zigbee2mqtt/x/set", '{"state":"ON"}'),
        ("zigbee2mqtt/x/get/state", '{"state":""}'),
        ("zigbee2mqtt/bridge/logging", '{"level":"info"}'),
        ("zigbee2mqtt/bridge/request/restart", ""),
        ("shellies/x/relay/0/command", "on"),
        ("shellies/announce", "{}"),
        ("solar/116180123456/cmd/power", "1"),
        ("inverter/south/ctrl/power", "1"),
        ("evcc/loadpoints/1/mode/set", "pv"),
        ("ems-esp/boiler", '{"cmd":"seltemp"}'),
        ("wled/desk/api", "A=1"),
        ("home/OMG_hall/commands/MQTTtoBT", "{}"),
        ("cmnd/plug/POWER", "ON"),
        ("$SYS/broker/uptime", "286 seconds"),
        ("qs/v1/esp32-01/events", "{}"),
    ],
)
def test_commands_discovery_and_logs_are_no_readings(topic: str, text: str) -> None:
    made = sent(translator(), topic, text)
    assert not made.events
    assert made.dead_end is None
    assert made.skipped


# --- what is too much --------------------------------------------------------------------


@cases(
    ("text", "why"),
    [
        ("{" + '"a":1,' * 5, bridge.NOT_JSON),
        ('{"a":' + "[" * 5_000, bridge.TOO_DEEP),
        ('{"a":' * 40 + "1" + "}" * 40, bridge.TOO_DEEP),
        (json.dumps({f"k{number}": number for number in range(600)}), bridge.TOO_MANY),
        (json.dumps({f"k{number}": None for number in range(10_000)}), bridge.TOO_LARGE),
        (json.dumps({f"{number}": 0 for number in range(3_000)}), bridge.TOO_MANY),
        ('{"a":"' + "x" * 1_000_000 + '"}', bridge.TOO_LARGE),
        ('{"a":"' + "x" * 2_000 + '"}', bridge.TOO_LONG),
        ("no JSON", bridge.NOT_JSON),
        (b'{"a":"\xff"}', bridge.NOT_JSON),
    ],
    ids=lambda each: str(each)[:20],
)
def test_what_looks_like_a_reading_and_is_too_much_is_a_dead_end(
    text: str | bytes, why: str
) -> None:
    made = sent(translator("tasmota"), "tele/x/SENSOR", text)
    assert made.dead_end == why
    assert not made.events
    assert made.device_id == "x"


def test_an_uplink_that_nobody_decoded_is_a_dead_end() -> None:
    text = '{"received_at":"2026-11-20T08:15:42Z","uplink_message":{"frm_payload":"Af8AQQ=="}}'
    made = sent(translator("ttn"), "v3/a@ttn/devices/x/up", text)
    assert made.dead_end == bridge.NOT_DECODED


def test_nan_in_a_document_costs_only_itself() -> None:
    made = sent(translator("tasmota"), "tele/x/SENSOR", '{"a":nan,"b":-inf,"c":3,"d":NaN}')
    assert told(made) == {"c": 3}


# --- sources -----------------------------------------------------------------------------


def test_a_source_can_be_changed_without_code() -> None:
    to = translator(
        "plain",
        topic="site/{room}/{device}/+/{event_type...}",
        device="{room}-{device}",
        leave=("*.debug",),
        rename={"t.c": "temperature"},
        units={"temp*": "K", "t.c": "°C"},
        time=("when",),
    )
    made = sent(to, "site/attic/s1/x/t", '{"c":3,"debug":9,"when":"2026-11-20T08:15:42Z"}')
    (reading,) = made.events
    assert (reading.device_id, reading.event_type, reading.unit) == (
        "attic-s1",
        "temperature",
        "°C",
    )
    assert time_of(reading) == "2026-11-20T08:15:42Z"
    assert meta_of(reading)["type"] == "t.c"


def test_take_names_the_only_ones_that_are_stored() -> None:
    to = translator("tasmota", take=("ENERGY.Power*",))
    made = sent(to, "tele/x/SENSOR", '{"ENERGY":{"Power":1,"Total":2}}')
    assert told(made) == {"ENERGY.Power": 1}


def test_stored_copies_with_a_time_are_taken_where_that_is_wanted() -> None:
    to = translator("zigbee2mqtt", retained=True)
    with_time = '{"last_seen":"2026-11-20T08:15:42Z","power":1}'
    assert sent(to, "zigbee2mqtt/x", with_time, retained=True).events
    assert not sent(to, "zigbee2mqtt/x", '{"power":1}', retained=True).events


@cases(
    ("one", "other", "expected"),
    [
        *(("a/b", "a/b", True), ("a/+", "a/b", True), ("a/#", "a/b/c", True), ("a/#", "a", True)),
        *(("a/+", "a/b/c", False), ("+/+/state", "qs/v1/x", False), ("#", "x/y", True)),
        *(("a/b", "a", False), ("+/a", "b/+", True)),
    ],
)
def test_whether_two_filters_overlap(one: str, other: str, expected: bool) -> None:
    assert overlap(one, other) == expected
    assert overlap(other, one) == expected


def test_no_session_has_two_filters_that_overlap() -> None:
    everything = Sources(Source(SourceSettings(name, BERLIN)) for name in PRESETS)
    for group in groups(everything.filters):
        for index, one in enumerate(group):
            assert not any(overlap(one, other) for other in group[index + 1 :])


@cases("text", ["a/{device", "a/b+", "a/#", "{device}/{device}", "a/x{device}"])
def test_a_template_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(TemplateError):
        compile_template(text)


# --- whatever comes ----------------------------------------------------------------------

WORDS = st.sampled_from(
    [
        *(
            "zigbee2mqtt",
            "tele",
            "stat",
            "SENSOR",
            "shellies",
            "events",
            "rpc",
            "status",
            "switch:0",
        ),
        *(
            "home",
            "gw",
            "BTtoMQTT",
            "rtl_433",
            "devices",
            "time",
            "solar",
            "inverter",
            "N",
            "v3",
            "up",
        ),
        *(
            "statestream",
            "sensor",
            "state",
            "evcc",
            "ems-esp",
            "boiler_data",
            "wled",
            "g",
            "ecowitt",
        ),
        *(
            "bridge",
            "homeassistant",
            "config",
            "availability",
            "unit_of_measurement",
            "collectd",
            "",
        ),
    ]
)
TOPICS = st.lists(WORDS | st.text(max_size=5), min_size=1, max_size=7).map("/".join)
NAMES = st.text(max_size=5) | st.sampled_from(
    [
        *("Time", "ts", "params", "value", "events", "component", "time", "last_seen", "exposes"),
        *("uplink_message", "decoded_payload", "TempUnit", "stat_t", "unit_of_meas", "val_tpl"),
        *("friendly_name", "id", "definition", "features", "unit", "property", "model", "channel"),
    ]
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([10**400, "2026-11-20T08:15:42", 1795162542, "1e400", "\ud800", "21,5 °C"])
)
DOCUMENTS = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=20,
).map(lambda each: json.dumps(each).encode())
EVERYTHING = [name for name in PRESETS if name != "plain"]


def decoded(event: telemetry.Event) -> Event | Rejection:
    assert event.device_id is not None
    text = event_bytes(event.event_id or "by-the-outbox", event.device_id, event, None)
    (result,) = decode(event.device_id, text, UTC).results
    return result


@pytest.mark.slow
@given(topic=TOPICS, data=DOCUMENTS | st.binary(max_size=60), retained=st.booleans())
@example(topic="a/b/sensor/x/state", data=b"\xff", retained=False)
@example(topic="zigbee2mqtt/\0\ud800", data=b'{"\\ud800":"\\u0000"}', retained=False)
@example(topic="N/1/2/3/4", data=b'{"value":1e999}', retained=False)
@example(topic="home/a", data=b"[{}]", retained=False)
def test_whatever_comes_never_raises_and_gives_only_what_the_ingester_takes(
    topic: str, data: bytes, retained: bool
) -> None:
    to = Translator(
        Sources(
            [Source(SourceSettings(name, BERLIN, retained=True)) for name in EVERYTHING]
            + [Source(SourceSettings("plain", BERLIN, topic="{device}/{event_type...}"))]
        )
    )
    made = sent(to, topic, data, retained=retained)
    assert made.events or made.skipped or made.dead_end
    for event in made.events:
        assert isinstance(decoded(event), Event)
    dead_end = DeadEnds([], lambda: 0.0).event(Incoming(topic, data), "not JSON", None)
    assert dead_end is not None
    assert isinstance(decoded(dead_end), Rejection)
