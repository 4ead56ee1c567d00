"""The ingester: takes events off MQTT and stores each in PostgreSQL exactly once."""

__version__ = "0.7.3"
