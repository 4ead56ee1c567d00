"""Where the database may be: the addresses to try, one by one.

What it does: turns libpq's lists of hosts and ports into single addresses, by a name lookup where
that is needed. What it does not: connect.

Invariant: a server that is silent, or a name that is unknown, costs the others no more than its
own try, and each problem is told with its own address.
"""

import socket
from collections.abc import Iterator, Mapping
from typing import Any


def addresses(parameters: Mapping[str, Any], problems: list[str]) -> Iterator[dict[str, Any]]:
    """Yield what to tell libpq of each address in turn, so that none costs the others.

    libpq goes through its own list only with connect_timeout, which it ignores here, and it
    says of several failures that it has not connected, but not always why.
    """
    if not ("host" in parameters or "hostaddr" in parameters):
        yield {}  # a service file says it
        return
    # Settings has seen to it that these lists are of one length.
    hosts = str(parameters.get("host") or parameters["hostaddr"]).split(",")
    given = str(parameters["hostaddr"]).split(",") if parameters.get("hostaddr") else []
    ports = str(parameters.get("port", 5432)).split(",")
    for number, host in enumerate(hosts):
        port = ports[number if len(ports) > 1 else 0] or "5432"
        if given and given[number]:
            yield {"host": host, "hostaddr": given[number], "port": port}
        elif not host or host[0] in "/@":  # a Unix socket
            yield {"host": host, "hostaddr": "", "port": port}
        else:
            try:
                found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            except (OSError, UnicodeError) as error:
                problems.append(f"{host}: {getattr(error, 'strerror', None) or error}")
                continue
            for ip in dict.fromkeys(str(item[4][0]) for item in found):
                yield {"host": host, "hostaddr": ip, "port": port}


def where(address: Mapping[str, Any]) -> str:
    """Return the address as the text of a problem begins with it."""
    host, ip, port = address["host"], address["hostaddr"], address["port"]
    if not ip:
        return f"{host}: "  # a Unix socket
    place = f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"
    return f"{place}: " if host == ip else f"{host} ({place}): "
