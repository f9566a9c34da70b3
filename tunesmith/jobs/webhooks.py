"""Telling others by HTTP: signed by Standard Webhooks, retried, and never to an address inside."""

from __future__ import annotations

import base64
import json
import secrets
import time
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
    import socket

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
        filter_host(parts.hostname, port or (443 if parts.scheme == "https" else 80), allow_loopback=False)
    except InvalidIPAddress:
        raise Forbidden("leads to a private address, which this server does not call") from None
    except (socket.gaierror, UnicodeError, ValueError):
        raise Forbidden("has a host that can't be found") from None


def deliver(store: Store, private: bool = False) -> int:
    """Try what is due; returns how many deliveries were tried. One that fails is tried again, later and later."""
    due = _claim(store)
    for delivery, url, secret in due:
        error = send(url, secret, delivery.id, delivery.payload, private)
        with store.write() as session:
            row = session.scalar(sa.select(Delivery).where(Delivery.id == delivery.id))
            if row is None:
                continue
            row.last_error = error
            if error is None:
                row.delivered_at, row.next_at = int(time.time()), None
            elif row.attempts > len(WAITS):
                row.next_at = None
            else:
                row.next_at = time.time() + WAITS[row.attempts - 1] * (0.9 + 0.2 * secrets.randbelow(100) / 100)
    return len(due)


def _claim(store: Store) -> list[tuple[Delivery, str, str]]:
    now = time.time()
    with store.read() as session:  # mostly there is nothing, and nothing is locked for that
        if session.scalar(sa.select(Delivery.n).where(Delivery.next_at <= now).limit(1)) is None:
            return []
    with store.write() as session:
        asked = (
            sa.select(Delivery, Webhook.url, Webhook.secret)
            .join(Webhook, Webhook.id == Delivery.webhook)
            .where(Delivery.next_at <= now)
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
    try:
        with Manager(config).get_session() as session:
            session.trust_env = False  # a proxy would connect for us, unfiltered
            answer = session.post(url, data=body.encode(), headers=headers, stream=True, allow_redirects=False)
            answer.close()
        return None if answer.ok and not answer.is_redirect else f"answered {answer.status_code}"
    except requests.RequestException as error:
        return type(error).__name__
