"""An application behind Ray Serve's proxy, which has habits of its own."""

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.server.http.request_ids import HEADER


def without_second_id(app: ASGIApp) -> ASGIApp:
    """Leave the id of a request to the proxy, which adds that of the request to each answer.

    An id that the application does not take (see `request_id_of`) is not the answer's; then the answer has both.
    """

    async def proxied(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message["headers"])
                if headers.get(HEADER) == Headers(scope=scope).get(HEADER):
                    del headers[HEADER]
            await send(message)

        await app(scope, receive, send_without_id)

    return proxied
