"""The formats of common firmware, as tables: where its topics have what, and which units it has.

What it does: nothing; it is data, and one table's meaning is in the comments of Rule and Preset.
What it does not: read a message (translate.py).

Invariant: what no rule of a preset names is a reading, so a new field of a new release is stored.
"""

from dataclasses import dataclass, field

# Why nothing of a topic is stored.
COMMAND, DISCOVERY, LOG, ABOUT_ITSELF, NO_READING = (
    *("command", "discovery", "log", "about itself", "no reading"),
)


@dataclass(frozen=True)
class Rule:
    """What the messages of one topic template are.

    {prefix} is the source's. {event_type} stands before the path of keys in the event type.
    """

    topic: str
    # Nothing is stored, for this reason.
    ignore: str = ""
    # What is learnt from it: "units" (discovery), "zigbee2mqtt", "unit", "time".
    learn: str = ""
    # The device's name, of placeholders and words; and the keys of the payload that make one.
    device: str = "{device}"
    device_keys: tuple[str, ...] = ()
    # What stands before the path of keys, beside {event_type}.
    event_type: str = ""
    # Where in the document the readings are; it must be there.
    at: tuple[str, ...] = ()
    # The payload must be JSON. What else comes is a dead end, and not a text.
    json_only: bool = False
    # A payload that is no object: the last level of {device...} is its type.
    text_has_type: bool = False
    # A text `time:value:value`, as collectd has it.
    timed_text: bool = False
    # Regular expressions of placeholders.
    where: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Preset:
    """A format: its rules, the first that matches a topic counts.

    `leave` and `units` are patterns of event types, in which * stands for anything.
    """

    prefix: str
    rules: tuple[Rule, ...]
    # Keys, by their path, of which the first that holds a time is the message's.
    time: tuple[str, ...] = ()
    leave: tuple[str, ...] = ()
    units: tuple[tuple[str, str], ...] = ()
    # A message that comes once more within so long, on its topic or from another receiver of the
    # same sender, is the same one.
    repeat_seconds: float = 0.0
    # A reading that comes on a second topic within so long is the same one.
    echo_seconds: float = 0.0
    # A device's name that is a secret, by a regular expression: it is neither stored nor logged.
    secret: str = ""
    # The topic filter that brings all of its topics, where that is not plain from the rules.
    subscribe: str = ""
    # Keys whose value is the unit of others in the same message.
    unit_keys: tuple[tuple[str, tuple[str, ...]], ...] = ()


def _units(text: str) -> tuple[tuple[str, str], ...]:
    """Return a table of lines `unit: pattern pattern`."""
    lines = (line.strip().partition(": ") for line in text.strip().splitlines())
    return tuple((pattern, unit) for unit, _, patterns in lines for pattern in patterns.split())


# As rtl_433 and others put a unit behind a key's name.
SUFFIX_UNITS = _units(
    """
    °C: *_C
    °F: *_F
    hPa: *_hPa
    kPa: *_kPa
    PSI: *_PSI
    bar: *_bar
    mm/h: *_mm_h
    in/h: *_in_h
    mm: *_mm
    in: *_in *_inch
    km/h: *_km_h
    mph: *_mi_h *_mph
    m/s: *_m_s
    km: *_km
    m: *_m
    cm: *_cm
    kWh: *_kWh
    Wh: *_Wh
    kW: *_kW
    W: *_W
    mV: *_mV
    V: *_V
    mA: *_mA
    A: *_A
    Hz: *_Hz
    MHz: *_MHz
    °: *_deg
    %: *_pct
    ppm: *_ppm
    ppb: *_ppb
    µg/m³: *_ug_m3
    lx: *_lux
    klx: *_klx
    kg: *_kg
    g: *_g
    L: *_L
    m³: *_m3
    dB: *_dB *_db
    dBm: *_dBm *_dbm
    W/m²: *_W_m2 *_wm2
    """
)

ZIGBEE2MQTT = Preset(
    "zigbee2mqtt",
    (
        Rule("{prefix}/bridge/devices", learn="zigbee2mqtt"),
        Rule("{prefix}/bridge/logging", ignore=LOG),
        Rule("{prefix}/bridge/log", ignore=LOG),
        Rule("{prefix}/bridge/request/{rest...}", ignore=COMMAND),
        Rule("{prefix}/bridge/response/{rest...}", ignore=COMMAND),
        Rule("{prefix}/bridge/{rest...}", ignore=ABOUT_ITSELF),
        Rule("{prefix}/{device...}/set", ignore=COMMAND),
        Rule("{prefix}/{device...}/get", ignore=COMMAND),
        Rule("{prefix}/{device...}/set/{rest...}", ignore=COMMAND),
        Rule("{prefix}/{device...}/get/{rest...}", ignore=COMMAND),
        Rule("{prefix}/{device...}/availability", event_type="availability"),
        Rule("{prefix}/{device...}", text_has_type=True),
    ),
    time=("last_seen",),
    leave=(
        *("last_seen", "device.*", "elapsed", "update.installed_version", "update.latest_version"),
        *("update.latest_source", "update.latest_release_notes"),
    ),
    # What is the same for every model. Not voltage, which is in V or mV.
    units=_units(
        """
        °C: temperature local_temperature device_temperature *_heating_setpoint
        %: humidity battery soil_moisture
        hPa: pressure
        W: power
        kWh: energy
        A: current
        ppm: co2
        """
    ),
)

_TASMOTA_NETWORK = ("Wifi.SSId", "Wifi.BSSId", "*.Wifi.SSId", "*.Wifi.BSSId")
TASMOTA = Preset(
    "tele",
    (
        # %prefix%/%topic%/, the usual order, and %topic%/%prefix%/.
        Rule("{prefix}/{device...}/SENSOR", json_only=True),
        Rule("{prefix}/{device...}/STATE", json_only=True),
        Rule("{prefix}/{device...}/RESULT", json_only=True),
        Rule("{prefix}/{device...}/LWT", event_type="LWT"),
        Rule("{prefix}/{device...}/INFO1", ignore=ABOUT_ITSELF),
        Rule("{prefix}/{device...}/INFO2", ignore=ABOUT_ITSELF),
        Rule("{prefix}/{device...}/INFO3", ignore=ABOUT_ITSELF),
        Rule("{prefix}/{device...}/LOGGING", ignore=LOG),
        Rule("{prefix}/{device...}/{event_type}"),
        Rule("stat/{device...}/RESULT", json_only=True),
        Rule("stat/{device...}/LOGGING", ignore=LOG),
        Rule(
            "stat/{device...}/{event_type}",
            where={"event_type": "STATUS(?:[0-7]|11)?"},
            ignore=ABOUT_ITSELF,
        ),
        Rule("stat/{device...}/{kind}", where={"kind": "STATUS(?:8|10)"}, at=("StatusSNS",)),
        Rule("stat/{device...}/{event_type}"),
        Rule("{device}/{prefix}/SENSOR", json_only=True),
        Rule("{device}/{prefix}/STATE", json_only=True),
        Rule("{device}/{prefix}/LWT", event_type="LWT"),
        Rule("{device}/stat/RESULT", json_only=True),
        Rule("{device}/stat/{event_type}", where={"event_type": "POWER[0-9]*"}),
    ),
    time=("Time", "StatusSNS.Time"),
    leave=(
        *("Time", "*.Time", "TempUnit", "PressureUnit", "SpeedUnit", "*.TempUnit"),
        *("*.PressureUnit", *_TASMOTA_NETWORK, "ENERGY.TotalStartTime", "*.TotalStartTime"),
    ),
    units=_units(
        """
        kWh: ENERGY.Total* ENERGY.Yesterday* ENERGY.Today* ENERGY.Export*
        Wh: ENERGY.Period*
        W: ENERGY.Power ENERGY.Power.*
        VA: ENERGY.ApparentPower*
        var: ENERGY.ReactivePower*
        V: ENERGY.Voltage*
        A: ENERGY.Current*
        Hz: ENERGY.Frequency*
        dBm: Wifi.Signal
        %: Wifi.RSSI *.Humidity
        s: UptimeSec
        lx: *.Illuminance
        ppm: *.CarbonDioxide *.eCO2
        ppb: *.TVOC
        """
    ),
    echo_seconds=2.0,
    unit_keys=(
        ("TempUnit", ("Temperature", "*.Temperature", "*.DewPoint", "Temperature*")),
        ("PressureUnit", ("*.Pressure", "*.SeaPressure")),
        ("SpeedUnit", ("*.Speed*",)),
    ),
)

_ESPHOME_KINDS = (
    "(?:sensor|binary_sensor|text_sensor|switch|light|fan|cover|climate|number|select|text|lock"
    "|button|event|valve|update|datetime|date|time|alarm_control_panel|water_heater|media_player)"
)
ESPHOME = Preset(
    "",
    (
        Rule(
            "{device}/{event_type...}/state",
            where={"event_type": f"{_ESPHOME_KINDS}/[^/]+(?:/[^/]+)?"},
        ),
        Rule("{device}/status", event_type="status"),
        Rule("{device}/debug", ignore=LOG),
        Rule("{device}/{rest...}/command", ignore=COMMAND),
    ),
)

SHELLY_GEN1 = Preset(
    "shellies",
    (
        Rule("{prefix}/announce", ignore=DISCOVERY),
        Rule("{prefix}/command", ignore=COMMAND),
        Rule("{prefix}/{device}/announce", ignore=DISCOVERY),
        Rule("{prefix}/{device}/info", ignore=ABOUT_ITSELF),
        Rule("{prefix}/{device}/command", ignore=COMMAND),
        Rule("{prefix}/{device}/{rest...}/command", ignore=COMMAND),
        Rule("{prefix}/{device}/{rest...}/set", ignore=COMMAND),
        Rule("{prefix}/{device}/{event_type...}"),
    ),
    units=_units(
        """
        W: relay.*.power meter.*.power light.*.power roller.*.power emeter.*.power
        W·min: relay.*.energy meter.*.energy light.*.energy roller.*.energy
        W·min: relay.energy roller.energy light.energy
        Wh: emeter.*.total emeter.*.total_returned emeter.*.energy emeter.*.returned_energy
        V: emeter.*.voltage voltage adc.*
        var: emeter.*.reactive_power
        A: emeter.*.current emeter_n.current
        °C: temperature ext_temperature.*
        °F: temperature_f ext_temperature_f.*
        °F: ext_temperatures_f.*
        °C: ext_temperatures.*
        %: sensor.humidity sensor.battery ext_humidity.* ext_humidities.* roller.*.pos
        lx: sensor.lux
        ppm: sensor.concentration
        """
    ),
)

_SHELLY_LEAVE = (
    *("*.id", "id", "src", "dst", "method", "ts", "*.ts", "*.minute_ts", "*.source", "sys.mac"),
    *(
        "sys.unixtime",
        "sys.time",
        "sys.available_updates.*",
        "sys.*_rev",
        "wifi.ssid",
        "wifi.bssid",
    ),
    *("wifi.sta_ip*", "eth.ip*", "wifi.*.ip*", "sys.last_sync_ts", "cloud.*", "mqtt.*", "ws.*"),
    "*.started_at",
)
# Of a component there is one, as `sys`, or several, as `switch:0`.
_SHELLY_COMPONENTS = "[a-z0-9_]+:[0-9]+|sys|wifi|eth|ble|cloud|mqtt|ws|ui|modbus|knx|matter|bthome"
SHELLY_GEN2 = Preset(
    "",
    (
        Rule("{device...}/events/rpc", at=("params",), json_only=True),
        Rule("{device...}/status/{event_type}", where={"event_type": _SHELLY_COMPONENTS}),
        Rule("{device...}/online", event_type="online"),
    ),
    time=("params.ts",),
    leave=_SHELLY_LEAVE,
    units=_units(
        """
        W: *.apower *.act_power *_act_power
        VA: *.aprt_power *_aprt_power
        mWh: *.by_minute.*
        Wh: *energy.total *total_act_energy *total_act_ret_energy
        V: *.voltage *_voltage *.V
        A: *.current *_current
        Hz: *.freq *_freq
        °C: *.tC
        °F: *.tF
        %: *.rh *.percent *.brightness *.current_pos *.target_pos *.humidity.value
        lx: *.lux
        dBm: *.rssi
        s: sys.uptime
        B: sys.ram_size sys.ram_free sys.fs_size sys.fs_free
        """
    ),
    echo_seconds=2.0,
)

OPENMQTTGATEWAY = Preset(
    "home",
    (
        Rule("{prefix}/{gateway}/BTtoMQTT/{device}", json_only=True),
        Rule("{prefix}/{gateway}/BTtoMQTT", device="{gateway}", json_only=True),
        Rule("{prefix}/{gateway}/RTL_433toMQTT/{device...}", json_only=True),
        Rule("{prefix}/{gateway}/LORAtoMQTT/{device}", json_only=True),
        Rule("{prefix}/{gateway}/SYStoMQTT", device="{gateway}", json_only=True),
        Rule("{prefix}/{gateway}/LWT", device="{gateway}", event_type="LWT"),
        Rule("{prefix}/{gateway}/version", ignore=ABOUT_ITSELF),
        Rule("{prefix}/{gateway}/undecoded/{rest...}", ignore=NO_READING),
        Rule("{prefix}/{gateway}/commands/{rest...}", ignore=COMMAND),
        Rule(
            "{prefix}/{gateway}/{event_type...}",
            device="{gateway}",
            where={"event_type": "[A-Za-z0-9_]+toMQTT(?:/[^/]+)*"},
        ),
    ),
    leave=(
        *("id", "mac", "name", "brand", "model", "model_id", "type", "mac_type", "servicedata"),
        *("servicedatauuid", "manufacturerdata", "adv_type", "track", "prmac", "cidc", "acts"),
        *("cont", "encr", "modules.*", "SSID", "ip", "version", "env", "mod", "host", "receiver"),
        *("raw", "mic", "protocol", "message"),
    ),
    units=(
        *_units(
            """
            °C: *tempc *tempc[0-9] *tempc_*
            °F: *tempf *tempf[0-9] *tempf_*
            %: *hum *batt *moi
            V: *volt
            dBm: *rssi
            lx: *lux
            hPa: *pres
            m: *distance
            ppm: *co2
            µg/m³: *pm10 *pm25
            s: uptime
            B: freemem
            """
        ),
        *SUFFIX_UNITS,
    ),
    repeat_seconds=1.0,
    echo_seconds=1.0,
)

RTL_433 = Preset(
    "rtl_433",
    (
        Rule(
            "{prefix}/events",
            device="",
            device_keys=("type", "model", "subtype", "channel", "id"),
            json_only=True,
        ),
        Rule(
            "{prefix}/{host}/events",
            device="",
            device_keys=("type", "model", "subtype", "channel", "id"),
            json_only=True,
        ),
        Rule("{prefix}/devices/{device...}/time", learn="time"),
        Rule("{prefix}/{host}/devices/{device...}/time", learn="time"),
        Rule("{prefix}/devices/{device...}/{event_type}"),
        Rule("{prefix}/{host}/devices/{device...}/{event_type}"),
        Rule("{prefix}/{host}/availability", device="{host}", event_type="availability"),
        Rule("{prefix}/{host}/states", ignore=ABOUT_ITSELF),
        Rule("{prefix}/states", ignore=ABOUT_ITSELF),
        Rule("{prefix}/log", ignore=LOG),
        Rule("{prefix}/{host}/log", ignore=LOG),
    ),
    subscribe="{prefix}/#",
    echo_seconds=2.0,  # by default it sends both forms of everything
    time=("time",),
    leave=(
        *("time", "type", "model", "subtype", "channel", "id", "protocol", "mod", "mic"),
        *("codes.*", "rows.*", "data", "raw_msg", "sid"),
    ),
    units=(
        *_units(
            """
            %: humidity moisture *.humidity
            dB: rssi snr noise
            MHz: freq freq1 freq2
            """
        ),
        *SUFFIX_UNITS,
    ),
)

OPENDTU = Preset(
    "solar",
    (
        Rule("{prefix}/dtu/{event_type...}", device="dtu"),
        Rule("{prefix}/{device}/cmd/{rest...}", ignore=COMMAND),
        Rule("{prefix}/{device}/{event_type...}"),
    ),
    leave=(
        *("status.last_update", "name", "*.name", "device.*", "ip", "hostname", "bssid"),
        "status.last_update_success",
    ),
    units=_units(
        """
        kWh: *yieldtotal
        Wh: *yieldday
        W: *.power power *.powerdc powerdc status.limit_absolute
        V: *.voltage *.voltage_*
        A: *.current *.current_*
        var: *.reactivepower
        Hz: *.frequency
        °C: *temperature
        %: *efficiency *irradiation status.limit_relative
        dBm: rssi
        s: uptime
        """
    ),
)

AHOYDTU = Preset(
    "inverter",
    (
        Rule("{prefix}/{device}/ctrl/{rest...}", ignore=COMMAND),
        Rule("{prefix}/ctrl/{rest...}", ignore=COMMAND),
        Rule("{prefix}/setup/{rest...}", ignore=COMMAND),
        Rule("{prefix}/{device}/{event_type...}"),
        Rule(
            "{prefix}/{event_type}",
            where={"event_type": "uptime|wifi_rssi|free_heap|heap_frag|mqtt|status"},
            device="{prefix}",
        ),
        Rule("{prefix}/{event_type}", ignore=ABOUT_ITSELF),
    ),
    leave=(
        *("last_success", "*.last_success", "*FWVersion", "*FWBuild*", "*HWPart*", "*HWVersion"),
        *("*Bootloader*", "*.HW*", "*version", "*.FWBuildYear", "*.FWBuildMonthDay"),
    ),
    units=_units(
        """
        kWh: *YieldTotal
        Wh: *YieldDay
        W: *P_AC *P_DC *MaxPower *active_PowerLimit_W
        V: *U_AC* *U_DC
        A: *I_AC* *I_DC
        var: *Q_AC
        Hz: *F_AC
        °C: *Temp
        %: *Efficiency *Irradiation *active_PowerLimit
        dBm: wifi_rssi
        s: uptime
        """
    ),
)

VICTRON = Preset(
    "N",
    (
        Rule(
            "{prefix}/{portal}/{service}/{instance}/Mgmt/{rest...}",
            ignore=ABOUT_ITSELF,
        ),
        Rule(
            "{prefix}/{portal}/{service}/{instance}/{event_type...}",
            device="{portal}/{service}/{instance}",
            at=("value",),
            json_only=True,
        ),
        Rule("{prefix}/{portal}/{about}", ignore=ABOUT_ITSELF),
    ),
    units=_units(
        """
        kWh: *Energy.Forward *Energy.Reverse *Yield.User *Yield.System *.Energy*
        W: *Power *.P *.Pac Yield.Power
        V: *Voltage *.V *.Voltage.*
        A: *Current *.I
        Hz: *Frequency *.F
        %: *Soc *.Soh *SOC
        °C: *Temperature
        Ah: *ConsumedAmphours
        """
    ),
)

TTN = Preset(
    "v3",
    (
        Rule(
            "{prefix}/{application}/devices/{device}/up",
            at=("uplink_message", "decoded_payload"),
            json_only=True,
        ),
        Rule("{prefix}/{application}/devices/{device}/join", ignore=NO_READING),
        Rule("{prefix}/{application}/devices/{device}/down/{rest...}", ignore=COMMAND),
        Rule("{prefix}/{application}/devices/{device}/{rest...}", ignore=NO_READING),
    ),
    time=("received_at", "uplink_message.received_at"),
)

HA_STATESTREAM = Preset(
    "statestream",
    (
        Rule(
            "{prefix}/{domain}/{entity}/unit_of_measurement",
            device="{domain}/{entity}",
            learn="unit",
        ),
        Rule("{prefix}/{domain}/{entity}/{event_type}", device="{domain}/{entity}"),
    ),
    leave=(
        *("last_changed", "last_updated", "last_reported", "friendly_name", "icon", "device_class"),
        *("state_class", "attribution", "supported_features", "entity_picture", "options*"),
        *("supported_color_modes*", "restored", "editable", "id", "*_modes*", "hidden"),
        "assumed_state",
    ),
)

EVCC = Preset(
    "evcc",
    (
        Rule("{prefix}/{rest...}/set", ignore=COMMAND),
        Rule("{prefix}/{rest...}/set/{more...}", ignore=COMMAND),
        Rule("{prefix}/updated", ignore=NO_READING),
        Rule("{prefix}/{event_type...}", device="{prefix}"),
    ),
    leave=("*.title", "*title", "version", "site.siteTitle"),
    units=_units(
        """
        W: *Power *.power *Power.* *Powers.*
        kWh: *Import *Export *.pv.*.energy *grid.energy *battery.*.capacity *batteryCapacity
        Wh: *Energy *ChargeRemainingEnergy
        %: *Soc *.soc *SolarPercentage *sessionSolarPercentage
        A: *Current *Currents.* *.currents.* *.maxCurrent *.minCurrent
        V: *Voltages.* *.voltages.*
        s: *Duration *RemainingDuration *.enableDelay *.disableDelay
        km: *vehicleRange *vehicleOdometer
        """
    ),
)

EMS_ESP = Preset(
    "ems-esp",
    (
        Rule("{prefix}/info", ignore=ABOUT_ITSELF),
        Rule("{prefix}/response", ignore=COMMAND),
        Rule("{prefix}/status", device="{prefix}", event_type="status"),
        Rule("{prefix}/heartbeat", device="{prefix}", event_type="heartbeat"),
        Rule(
            "{prefix}/{event_type...}",
            device="{prefix}",
            where={"event_type": "[^/]*_data[^/]*(?:/[^/]+)*"},
        ),
        Rule("{prefix}/{rest...}", ignore=COMMAND),
    ),
    leave=("heartbeat.bus_status_text", "heartbeat.version"),
    units=_units("dBm: heartbeat.rssi\ns: heartbeat.uptime_sec"),
)

WLED = Preset(
    "wled",
    (
        Rule("{prefix}/{device}/v", ignore=NO_READING),
        Rule("{prefix}/{device}/api", ignore=COMMAND),
        Rule("{prefix}/{device}/col", ignore=COMMAND),
        Rule("{prefix}/{device}/{event_type}"),
        Rule("{prefix}/{device}", ignore=COMMAND),
    ),
)

ECOWITT2MQTT = Preset(
    "ecowitt",
    (
        Rule("{prefix}/{device}"),
        Rule("ecowitt2mqtt/{device}"),
        Rule("homeassistant/{kind}/{device}/{event_type}/state"),
    ),
    leave=("dateutc", "PASSKEY", "passkey", "stationtype", "model"),
    secret="[0-9A-Fa-f]{32}",
)

COLLECTD = Preset(
    "collectd",
    (Rule("{prefix}/{device}/{event_type...}", timed_text=True),),
    time=("time",),
    leave=("*.time",),
)

PLAIN = Preset(
    "home",
    (
        Rule("{prefix}/{device}/set", ignore=COMMAND),
        Rule("{prefix}/{device}/{event_type}"),
    ),
)

PRESETS = {
    "zigbee2mqtt": ZIGBEE2MQTT,
    "tasmota": TASMOTA,
    "esphome": ESPHOME,
    "shelly-gen1": SHELLY_GEN1,
    "shelly-gen2": SHELLY_GEN2,
    "openmqttgateway": OPENMQTTGATEWAY,
    "rtl_433": RTL_433,
    "opendtu": OPENDTU,
    "ahoydtu": AHOYDTU,
    "victron": VICTRON,
    "ttn": TTN,
    "ha-statestream": HA_STATESTREAM,
    "evcc": EVCC,
    "ems-esp": EMS_ESP,
    "wled": WLED,
    "ecowitt2mqtt": ECOWITT2MQTT,
    "collectd": COLLECTD,
    "plain": PLAIN,
}

# The last level of a command's topic, whatever the source; and the first one of Tasmota's.
COMMAND_LEVELS = {"set", "get", "command", "cmnd"}

# Where units are learnt, whatever the source: Home Assistant's discovery.
DISCOVERY_RULES = (
    Rule("homeassistant/{component}/{object}/config", learn="units"),
    Rule("homeassistant/{component}/{node}/{object}/config", learn="units"),
)
