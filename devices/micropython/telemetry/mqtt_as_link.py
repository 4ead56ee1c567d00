"""The way to the broker over mqtt_as, for programs in asyncio.

What it does: subscribes to the ACKs at every connect, sends what Telemetry gives, and hands
it what comes. What it does not: Wi-Fi, or connecting; mqtt_as does both.

Invariant: events are sent only on a connection on which the ACKs are subscribed.
"""

import asyncio

from telemetry.outbox import Telemetry

TURN_MS = 50
RETRY_SECONDS = 5


class MqttAsLink:
    """Made with the `config` of mqtt_as before its MQTTClient is, and run beside the program:

    link = MqttAsLink(telemetry, config)
    client = MQTTClient(config)
    asyncio.create_task(link.run(client))

    What is not an ACK is handed to what config["subs_cb"] was before, and what
    config["connect_coro"] was is awaited after each connect.
    """

    def __init__(self, telemetry: Telemetry, config) -> None:
        self._telemetry = telemetry
        self._client = None
        self._sending = None  # the task of the one message that is on its way to the socket
        self._on_message = config["subs_cb"]
        self._on_connect = config["connect_coro"]
        config["client_id"] = telemetry.client_id
        config["queue_len"] = 0  # callbacks, and not the queue, which forgets what is too much
        config["subs_cb"] = self._heard
        config["connect_coro"] = self._connected

    async def run(self, client) -> None:
        """Connect, and send from then on; it does not end."""
        self._client = client
        asyncio.create_task(self._connect())
        telemetry = self._telemetry
        while True:
            if not client.isconnected():
                telemetry.disconnected()
                self._forget_sending()
            telemetry.loop(self._publish)
            if telemetry.reconnect_wanted():
                telemetry.disconnected()
                client._reconnect()  # it has no other way to give up a connection
            await asyncio.sleep_ms(TURN_MS)

    async def _connect(self) -> None:
        while True:
            try:
                await self._client.connect()
                return
            except OSError:  # only after the first time mqtt_as tries again by itself
                await asyncio.sleep(RETRY_SECONDS)

    def _publish(self, topic: str, payload: bytes) -> bool:
        if self._sending is not None:
            return False
        self._sending = asyncio.create_task(self._send(topic, payload))
        return True

    async def _send(self, topic: str, payload: bytes) -> None:
        # QoS 0: mqtt_as would wait for a PUBACK, which proves nothing. The ACK does.
        await self._client.publish(topic, payload, False, 0)
        self._sending = None

    def _forget_sending(self) -> None:
        # In an outage publish() waits, and would send before the ACKs are subscribed.
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None

    def _heard(self, topic, payload, retained, *properties) -> None:
        if not self._telemetry.on_message(topic.decode(), bytes(payload)):
            self._on_message(topic, payload, retained, *properties)

    async def _connected(self, client) -> None:
        await client.subscribe(self._telemetry.acks_topic, 1)
        self._telemetry.connected()
        await self._on_connect(client)
