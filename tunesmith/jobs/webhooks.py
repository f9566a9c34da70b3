"""Telling others by HTTP: signed by Standard Webhooks, retried, and never to an address inside."""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import json
import secrets
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import sqlalchemy as sa

from tunesmith.store.tables import Delivery, Webhook

if TYPE_CHECKING:
    from tunesmith.store.database import Store

EVENTS = tuple(f"fine_tuning.job.{status}" for status in ("succeeded", "failed", "cancelled"))
WAITS = (5, 60, 300, 1800, 7200, 21600, 43200)  # seconds before each further attempt
TIMEOUT = 10.0
CLAIMED = 60.0  # seconds in which no other process tries the same delivery
AT_ONCE = 20
EACH = 4  # of these, for one webhook
LONGEST = 20.0  # seconds for an answer, however it comes
HANDED_OUT = ipaddress.ip_network("2000::/3")


class Forbidden(ValueError):
    """An address that webhooks may not go to."""


def new_secret() -> str:
    return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()


def check_url(url: str, private: bool = False) -> None:
    """Refuse what is no web address, and what leads inside.

    Where the name leads is looked at again at each delivery, and the connection goes to the very address that was
    looked at.

    Raises:
        Forbidden: says why.
    """
    from requests_hardened.ip_filter import InvalidIPAddress, filter_host

    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise Forbidden("is not a URL") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise Forbidden("is not an http or https URL")
    if parts.username or parts.password:
        raise Forbidden("holds a user name or password")
    if private:
        return
    try:
        found = filter_host(parts.hostname, port or (443 if parts.scheme == "https" else 80), allow_loopback=False)
        if not _outside(found):
            raise InvalidIPAddress(found)
    except InvalidIPAddress:
        raise Forbidden("leads to a private address, which this server does not call") from None
    except (OSError, UnicodeError, ValueError):  # requests' own errors are OSErrors
        raise Forbidden("has a host that can't be found") from None


def _outside(address: str) -> bool:
    """Whether an address is one of the internet's. Of IPv6, those alone that are handed out (RFC 4291, 2.5.4): others
    may hold one of IPv4, or a site's own."""
    ip = ipaddress.ip_address(address.strip("[]"))
    return ip.is_global and (ip.version == 4 or ip in HANDED_OUT)


def deliver(store: Store, private: bool = False) -> int:
    """Try what is due, all at the same time; returns how many deliveries were tried. One that fails is tried again,
    later and later."""
    due = _claim(store)
    if due:
        with ThreadPoolExecutor(len(due)) as pool:
            list(pool.map(lambda claimed: _try(store, private, *claimed), due))
    return len(due)


def _try(store: Store, private: bool, delivery: Delivery, url: str, secret: str) -> None:
    error = send(url, secret, delivery.id, delivery.payload, private)
    with store.write() as session:
        row = session.scalar(sa.select(Delivery).where(Delivery.id == delivery.id))
        if row is None:
            return
        row.last_error = error
        if error is None:
            row.delivered_at, row.next_at = int(time.time()), None
        elif row.attempts > len(WAITS):
            row.next_at = None
        else:
            row.next_at = time.time() + WAITS[row.attempts - 1] * (0.9 + 0.2 * secrets.randbelow(100) / 100)


def _claim(store: Store) -> list[tuple[Delivery, str, str]]:
    now = time.time()
    with store.read() as session:  # mostly there is nothing, and nothing is locked for that
        if session.scalar(sa.select(Delivery.n).where(Delivery.next_at <= now).limit(1)) is None:
            return []
    with store.write() as session:
        place = sa.func.row_number().over(partition_by=Delivery.webhook, order_by=Delivery.n).label("place")
        ranked = sa.select(Delivery.n, place).where(Delivery.next_at <= now).subquery()
        asked = (
            sa.select(Delivery, Webhook.url, Webhook.secret)
            .join(Webhook, Webhook.id == Delivery.webhook)
            .where(Delivery.n.in_(sa.select(ranked.c.n).where(ranked.c.place <= EACH)), Delivery.next_at <= now)
            .order_by(Delivery.n)
            .limit(AT_ONCE)
            .with_for_update(skip_locked=True, of=Delivery)
        )
        found = [(row[0], row[1], row[2]) for row in session.execute(asked)]
        for delivery, _, _ in found:
            delivery.attempts += 1
            delivery.next_at = now + CLAIMED
        return found


def send(url: str, secret: str, id: str, payload: dict[str, Any], private: bool = False) -> str | None:
    """Post an event; what went wrong, or None."""
    import requests
    from requests_hardened import Config, Manager
    from standardwebhooks import Webhook as Signer

    body, when = json.dumps(payload), datetime.now(tz=UTC)
    headers = {
        "content-type": "application/json",
        "user-agent": "tunesmith",
        "webhook-id": id,
        "webhook-timestamp": str(int(when.timestamp())),
        "webhook-signature": Signer(secret).sign(id, when, body),
    }
    config = Config(
        ip_filter_enable=not private,
        ip_filter_allow_loopback_ips=False,
        never_redirect=True,
        default_timeout=(TIMEOUT, TIMEOUT),
    )
    connections: list[Any] = []
    end = threading.Timer(LONGEST, _cut, [connections])
    end.daemon = True
    end.start()
    try:
        with Manager(config).get_session() as session:
            session.trust_env = False  # a proxy would connect for us, unfiltered
            for scheme in ("http://", "https://"):
                adapter = session.get_adapter(scheme)
                adapter.get_connection_with_tls_context = _noted(
                    adapter.get_connection_with_tls_context, connections, private
                )
            answer = session.post(url, data=body.encode(), headers=headers, stream=True, allow_redirects=False)
            answer.close()
        return None if answer.ok and not answer.is_redirect else f"answered {answer.status_code}"
    except requests.RequestException as error:
        return type(error).__name__
    finally:
        end.cancel()


def _noted(get: Callable[..., Any], connections: list[Any], private: bool) -> Callable[..., Any]:
    """What gives pools of connections; where they lead is looked at, and each connection is noted."""
    from requests_hardened.ip_filter import InvalidIPAddress

    def pool(*args: Any, **more: Any) -> Any:
        found = get(*args, **more)
        if not private and not _outside(found.host):
            raise InvalidIPAddress(found.host)

        class Noted(found.ConnectionCls):  # type: ignore[name-defined]
            def connect(self) -> None:
                connections.append(self)
                super().connect()

        found.ConnectionCls = Noted
        return found

    return pool


def _cut(connections: list[Any]) -> None:
    """End connections. Timeouts alone hold for one read, and a byte now and then would outlast them."""
    for connection in connections:
        with contextlib.suppress(OSError, AttributeError):  # it has not begun, or has ended
            connection.sock.shutdown(socket.SHUT_RDWR)
