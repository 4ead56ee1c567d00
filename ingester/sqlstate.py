"""Whose fault a database error is, by its SQLSTATE.

What it does: maps each SQLSTATE to one of four faults. What it does not: look at an exception's
class, of which OperationalError alone means four things, or act on it (connection.py, store.py).

Invariant: what is not in the table is never an event's fault, so no valid event is refused for it.
"""

from enum import Enum


class Fault(Enum):
    """Whose fault a database error is, and so what is to be done."""

    CONNECTION = "reconnect, then try again"
    PASSING = "try again later"
    EVENT = "this event will never be stored"
    OPERATOR = "reconnect, and try again until somebody has repaired the database"


# SQLSTATE, or its first two or three characters, to fault: PostgreSQL's documentation,
# appendix A. Never the exception's class: OperationalError alone means four things.
FAULTS = {
    "08": Fault.CONNECTION,  # connection exception
    "57P": Fault.CONNECTION,  # shutdown, crash, starting up, database dropped
    # Read-only transaction: a session that began so stays so when the database no longer is.
    "25006": Fault.CONNECTION,
    "40": Fault.PASSING,  # serialization failure, deadlock
    "53": Fault.PASSING,  # disk full, out of memory, too many connections
    "55P03": Fault.PASSING,  # lock not available
    "57014": Fault.PASSING,  # query canceled: statement_timeout
    "58": Fault.PASSING,  # system error: I/O
    "22": Fault.EVENT,  # data exception
    "23": Fault.EVENT,  # integrity constraint violation
    "44": Fault.EVENT,  # a view's WITH CHECK OPTION
    "54": Fault.EVENT,  # program limit exceeded: too big, too deep
    "P0001": Fault.EVENT,  # RAISE EXCEPTION in a trigger of the owner's
}


def fault_of(sqlstate: str | None) -> Fault:
    """Return whose fault an error with this SQLSTATE is; None means no answer came."""
    if sqlstate is None:
        return Fault.CONNECTION
    for length in (5, 3, 2):
        if fault := FAULTS.get(sqlstate[:length]):
            return fault
    return Fault.OPERATOR
