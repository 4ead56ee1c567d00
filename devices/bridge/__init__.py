"""The bridge: events of the contract from what other firmware publishes; docs/bridge.md."""
