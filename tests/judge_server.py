"""A real HTTP server on a thread that speaks OpenAI's chat format and misbehaves on purpose."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType


def completion(text: str, *, logprobs: object = None) -> bytes:
    """Body of a chat completion."""
    choice = {"message": {"role": "assistant", "content": text}, "logprobs": logprobs}
    return json.dumps({"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 1}}).encode()


def truth_of(prompt: str) -> str:
    """What an honest judge says: 1 where given and correct answer are the same but for case and blanks."""
    fields = [re.search(rf"<{tag}>\n(.*)\n</{tag}>", prompt, re.DOTALL) for tag in ("correct_answer", "given_answer")]
    wanted, given = (" ".join(match.group(1).lower().split()) if match else "" for match in fields)
    return "1" if given.startswith(wanted) else "0"


async def respond(writer: asyncio.StreamWriter, body: bytes, status: str = "200 OK", headers: str = "") -> None:
    """Send one response on a connection that stays open."""
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    writer.write(head.encode() + body)
    await writer.drain()


@dataclass
class JudgeServer:
    """`with JudgeServer(misbehave)`: `misbehave(n, writer, prompt)` handles request n (from 0) or returns False."""

    misbehave: Callable[[int, asyncio.StreamWriter, str], object] | None = None
    latency_s: float = 0.0
    port: int = 0
    requests: list[dict[str, object]] = field(default_factory=list)
    headers: list[str] = field(default_factory=list)
    answered: list[str] = field(default_factory=list)
    """Prompts that were answered properly."""
    most_parallel: int = 0
    _parallel: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> JudgeServer:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.server = asyncio.run_coroutine_threadsafe(self._listen(), self.loop).result(5)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self.loop).result(5)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(5)
        self.loop.close()

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def _stop(self) -> None:
        self.server.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = int(re.search(r"content-length: (\d+)", head, re.IGNORECASE).group(1))
                body = json.loads(await reader.readexactly(length))
                self._parallel += 1
                self.most_parallel = max(self.most_parallel, self._parallel)
                try:
                    await self._answer(head, body, writer)
                finally:
                    self._parallel -= 1
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client went away, a behaviour cut the line, or the server stops
        finally:
            writer.close()

    async def _answer(self, head: str, body: dict[str, object], writer: asyncio.StreamWriter) -> None:
        number = len(self.requests)
        self.requests.append(body)
        self.headers.append(head)
        prompt = str(body["messages"][0]["content"])
        if self.latency_s:
            await asyncio.sleep(self.latency_s)
        if self.misbehave is not None:
            outcome = self.misbehave(number, writer, prompt)
            if asyncio.iscoroutine(outcome):
                outcome = await outcome
            if outcome is not False:
                return
        self.answered.append(prompt)
        await respond(writer, completion(truth_of(prompt)))
