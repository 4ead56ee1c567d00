"""The ingester: takes events off MQTT and stores each in PostgreSQL exactly once."""
