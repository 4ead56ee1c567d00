"""Events that reach the database, whatever happens to the device: see Telemetry, FolderStore.

What it does: names what programs import. What it does not: connect; see umqtt_simple and
asynchronous, for the two usual MQTT clients.
"""

from telemetry.outbox import Telemetry
from telemetry.store import FolderStore

__all__ = ["FolderStore", "Telemetry"]
