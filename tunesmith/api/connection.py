"""A connection that holds nothing for slow senders: uvicorn itself waits for a request's head for ever."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from tunesmith.api import frame
from tunesmith.api.errors import TOO_SLOW, ApiError


class Connection(H11Protocol):
    """uvicorn's, closed where a head is not whole in time: with a 408, or without a word to who has not begun any.

    Between requests a connection is closed by uvicorn's `timeout_keep_alive`; the next request's first byte ends that.
    """

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._rest()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP, or a head of more than 16 KiB, is told in our shape."""
        self._refuse(ApiError(400, msg, code="invalid_http", headers={"connection": "close"}))

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:  # the head is here
            self._rest()
        elif self._late is None:
            self._late = self.loop.call_later(frame.PATIENCE, self._end)

    def _rest(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _end(self) -> None:
        if self.conn.trailing_data[0]:
            self._refuse(TOO_SLOW)
        else:
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self.transport.is_closing():
            told = error.response()
            head = h11.Response(status_code=told.status_code, headers=told.raw_headers)
            for event in (head, h11.Data(data=bytes(told.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
