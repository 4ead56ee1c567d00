"""The settings of a database session that correctness depends on.

What it does: names each setting with its value, and builds the SQL that sets them. What it does
not: run it (connection.py), or change a setting that makes no difference to what is stored.

Invariant: in a pinned session a value is read and written in one way only, a commit is durable,
and no timeout but ours ends a statement, whatever the database or the role is set to.
"""

from collections.abc import Mapping

# The server gives a statement up before we give the server up (connection.py), so that it can say
# so.
STATEMENT_SECONDS_MAX = 9.0

# What the database or the role may have set otherwise, and correctness depends on: how values
# are read and written, how durable a commit is, and that no timeout but ours ends a statement.
# Pinned once connected, since a connection option would override the user's PGOPTIONS. Not
# standard_conforming_strings: psycopg2 quotes by what it was when it connected.
PINS = {
    "TimeZone": "UTC",  # keeps the year 1 the year 1
    "DateStyle": "ISO, YMD",
    "IntervalStyle": "postgres",
    "array_nulls": "on",  # NULL in an array is none, and not a text
    "bytea_output": "hex",
    "extra_float_digits": "1",  # the shortest text that gives the same double
    "synchronous_commit": "on",  # or what is stricter; the promise rests on it
    "default_transaction_isolation": "read committed",  # a row committed meanwhile is seen
    "search_path": "public",  # behind the owner's own
    "statement_timeout": f"{STATEMENT_SECONDS_MAX * 1000:.0f}",
    "lock_timeout": "0",
    "transaction_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0",
    "exit_on_error": "off",  # a refused event must not cost the connection
}
# Which of them this server knows: what is set, and what would be without this session.
FIND_SETTINGS = "SELECT name, setting, reset_val FROM pg_settings WHERE name = ANY(%s)"
SET_CONFIG = (
    "SELECT set_config(name, value, false)"
    " FROM unnest(%s::text[], %s::text[]) AS pins (name, value)"
)


def pin(name: str, setting: str, reset: str) -> str:
    """Return what to set, knowing what is set, and what would be without this session."""
    if name == "synchronous_commit" and "remote_apply" in (setting, reset):
        return "remote_apply"
    if name == "search_path":
        schemas = reset.split(", ") if reset else []
        return reset if PINS[name] in schemas else ", ".join([*schemas, PINS[name]])
    return PINS[name]


def set_local(pins: Mapping[str, str]) -> str:
    """Return the statements that set them for one transaction."""
    # search_path is a list of identifiers, quoted already where they need to be.
    values = {
        name: value if name == "search_path" else f"'{value}'" for name, value in pins.items()
    }
    return "".join(f"SET LOCAL {name} TO {value}; " for name, value in values.items())
