"""A chat-completions server in a process of its own, as light as can be: what is measured is the client.

Answers every request after a latency that its body decides, with a text that its body decides, so that two
runs get the same. Prints its base URL, then serves until its standard input closes (the starter is gone).
Writes the hash of each body to ``--log_file`` as it arrives; the answer to it is ``english(hash, words)``.

``PYTHONPATH=. python benchmarks/engine_server.py --min_seconds 1 --max_seconds 3``
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import sys
from pathlib import Path
from typing import TextIO

from tests.chat_server import english


class Chat(asyncio.Protocol):
    """One connection: HTTP/1.1 with keep-alive, one request at a time."""

    def __init__(self, args: argparse.Namespace, log: TextIO | None) -> None:
        self.args, self.log = args, log
        self.buffer = b""
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember the way back."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer each request once it is whole."""
        self.buffer += data
        head, found, rest = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        if len(rest) < length:
            return
        body, self.buffer = rest[:length], rest[length:]
        digest = hashlib.sha256(body).hexdigest()
        if self.log is not None:
            self.log.write(digest + "\n")
            self.log.flush()
        args = self.args
        seconds = args.min_seconds + share(digest[:8]) * (args.max_seconds - args.min_seconds)
        if share(digest[8:16]) < args.stuck_share:
            seconds = args.stuck_seconds
        reply = answer(digest, args.words)
        if seconds > 0:
            asyncio.get_running_loop().call_later(seconds, self.send, reply)
        else:
            self.send(reply)

    def send(self, reply: bytes) -> None:
        """Send, unless the client has left."""
        if not self.transport.is_closing():
            self.transport.write(reply)


def share(digits: str) -> float:
    """Eight hexadecimal digits as a number from 0 to 1."""
    return int(digits, 16) / 0xFFFFFFFF


def answer(digest: str, words: int) -> bytes:
    """A whole HTTP response whose text follows from the digest."""
    text = english(digest, words)
    body = json.dumps(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": "local",
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
            "usage": {"prompt_tokens": 100, "completion_tokens": words, "total_tokens": 100 + words},
        }
    ).encode()
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body


async def serve(args: argparse.Namespace) -> None:
    """Serve until standard input closes."""
    loop = asyncio.get_running_loop()
    log = args.log_file.open("a", encoding="ascii") if args.log_file else None
    server = await loop.create_server(lambda: Chat(args, log), "127.0.0.1", args.port, backlog=1024)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    parser.add_argument("--min_seconds", type=float, default=0.0)
    parser.add_argument("--max_seconds", type=float, default=0.0)
    parser.add_argument("--stuck_share", type=float, default=0.0, help="requests that take --stuck_seconds instead")
    parser.add_argument("--stuck_seconds", type=float, default=10.0)
    parser.add_argument("--words", type=int, default=60, help="words of an answer")
    parser.add_argument("--log_file", type=Path)
    return parser


if __name__ == "__main__":
    asyncio.run(serve(build_parser().parse_args()))
