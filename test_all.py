# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "axe-playwright-python>=0.1",
#     "httpx>=0.28",
#     "hypothesis>=6.100",
#     "playwright>=1.40",
#     "prometheus-client>=0.20",
#     "pytest>=8",
#     "ruff>=0.6",
#     "sinc-prompt==1.0.0",
#     "vermin>=1.6",
# ]
# ///
"""All tests of scatter, in the order of the programs, and the bench.

    .venv/bin/python -m pytest test_all.py                 everything, in about ten minutes
    .venv/bin/python -m pytest test_all.py -k 'not real'   what needs no real server, in half a minute
    .venv/bin/python test_all.py bench                     no test: what it costs and how fast it is, in under five

A test with `real` in its name runs a real sshd, nginx, model, browser or booted Debian; where that is not installed it
is skipped, with the reason. `./install.sh test` installs what they need.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import base64
import contextlib
import ctypes
import errno
import fcntl
import functools
import gc
import gzip
import hashlib
import http.client
import itertools
import json
import math
import multiprocessing
import operator
import os
import plistlib
import pty
import random
import re
import select
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from xml.etree import ElementTree

import h11
import httpx
import pytest
import sinc_prompt
from hypothesis import HealthCheck, given
from hypothesis import settings as budget
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

import scatter_proxy as sp
import tunnel

HERE = Path(__file__).resolve().parent

# --- harness ------------------------------------------------------------------


def wait_for(ready: Callable[[], Any], seconds: float, what: str = "") -> Any:
    """Return what ready() gives once it is true; fail when that takes longer than so many seconds."""
    deadline = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what or ready}"
        time.sleep(0.01)
    return found


def finished(command: Sequence[Any], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; return its exit status and what it said."""
    return subprocess.run(command, capture_output=True, check=False, text=True, **options)


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@contextlib.contextmanager
def program(
    *argv: Any, log: Path, ready: str = "", seconds: float = 20, **environ: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program, its words going to log, until the block ends; ready is a pattern to wait for in them."""
    with log.open("ab") as words:
        env = {**os.environ, "PYTHONUNBUFFERED": "1", **environ}
        process = subprocess.Popen([*map(str, argv)], stdout=words, stderr=words, stdin=subprocess.DEVNULL, env=env)
    try:
        wait_for(lambda: re.search(ready, log.read_text()) or process.poll() is not None, seconds, f"{ready}: {argv}")
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Proxy:
    """A running scatter_proxy.py, as a client sees it."""

    def __init__(self, folder: Path, process: subprocess.Popen[bytes]) -> None:
        self.folder, self.process = folder, process
        said = (folder / "proxy.out").read_text()
        found = re.search(r"listening on (http://\S+)", said)
        assert found, said
        self.url = found[1]
        self.http = httpx.Client(base_url=self.url, timeout=60, limits=httpx.Limits(max_connections=200))

    def post(self, prompt: str, **headers: str) -> httpx.Response:
        """Ask for a document."""
        return self.http.post("/api/ai-transform", json={"prompt": prompt}, headers=headers)

    @contextlib.contextmanager
    def stream(self, prompt: str) -> Iterator[Iterator[tuple[str, Any]]]:
        """Ask for a stream; give its events as (name, data), comments as ("", text)."""

        def events(answer: httpx.Response) -> Iterator[tuple[str, Any]]:
            name = ""
            for line in answer.iter_lines():
                if line.startswith("event: "):
                    name = line[7:]
                elif line.startswith("data: "):
                    yield name, json.loads(line[6:])
                elif line:
                    yield "", line

        headers = {"accept": "text/event-stream"}
        with self.http.stream("POST", "/api/ai-transform", json={"prompt": prompt}, headers=headers) as answer:
            if answer.status_code != 200:
                answer.read()
            yield events(answer) if answer.status_code == 200 else iter([("refused", answer)])

    def health(self) -> dict[str, Any]:
        """Return /health."""
        return self.http.get("/health").json()

    def up(self, count: int = 1) -> Proxy:
        """Wait until so many backends are up."""
        wait_for(lambda: sum(b["up"] for b in self.health()["backends"]) == count, 10, f"{count} backends up")
        return self

    def gauge(self, name: str) -> float:
        """Return a number of /metrics."""
        return float(re.findall(rf"^{name} (\S+)", self.http.get("/metrics").text, re.MULTILINE)[0])

    def rss(self) -> float:
        """Return the process's resident memory in bytes."""
        return self.gauge("process_resident_memory_bytes")

    def log(self) -> list[dict[str, Any]]:
        """Return the log's records."""
        return [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]


@contextlib.contextmanager
def proxy(folder: Path, *flags: Any, setup: str = "", **environ: str) -> Iterator[Proxy]:
    """Run scatter_proxy.py on a free port with its files in folder; setup is Python that changes the module before."""
    folder.mkdir(exist_ok=True)
    (folder / "backends").mkdir(exist_ok=True)
    own = ["--port", 0, "--log", folder / "log.jsonl", "--backend-dir", folder / "backends"]
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import scatter_proxy as sp; {setup}; sys.exit(sp.main())"
    argv = [*(["-c", code] if setup else [HERE / "scatter_proxy.py"]), *own, *flags]
    (folder / "proxy.out").write_text("")
    with program(sys.executable, *argv, log=folder / "proxy.out", ready="listening on", **environ) as process:
        yield Proxy(folder, process)
        process.kill()  # its clean stop has tests of its own, and takes 0.3 s


BAND_NAMES = [band.name for band in sp.BANDS]


class Fake:
    """A model server that speaks Ollama's or OpenAI's protocol to the letter, and misbehaves where a prompt asks it to.

    A prompt may hold `!NAME` or `!NAME=VALUE`: pace (s between pieces), first (s before the first), bands (characters a
    band), and the faults of `_generate`. seen, left and done are what was asked, what the client broke off, what ended.
    """

    def __init__(self, where: str | Path = "", dialect: str = "ollama", slots: int = 0) -> None:
        self.where, self.dialect, self.slots, self.model, self.missing = where, dialect, slots, "fake-8b", False
        self.seen: list[dict[str, Any]] = []
        self.left: list[float] = []
        self.done: list[str] = []
        self.connections = self.running = self.peak = 0
        self.silent = False  # accept, and answer nothing
        self.loading = 0.0  # s until the first token after a start
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Fake:  # noqa: PYI034 (typing has no Self in 3.10)
        self._thread.start()
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    def open(self) -> None:
        """Listen, on a socket in a folder or on a free port."""
        self._tasks: set[asyncio.Task[None]] = set()

        async def start() -> asyncio.Server:
            if isinstance(self.where, Path):
                self.where.unlink(missing_ok=True)
                return await asyncio.start_unix_server(self._serve, self.where)
            return await asyncio.start_server(self._serve, "127.0.0.1", int(self.where or 0))

        self._server = asyncio.run_coroutine_threadsafe(start(), self._loop).result(5)
        if not isinstance(self.where, Path):
            self.where = str(self._server.sockets[0].getsockname()[1])
        self.url = f"http://127.0.0.1:{self.where}"

    def close(self) -> None:
        """Refuse and reset everything, as a killed program does."""

        def stop() -> None:
            self._server.close()
            for task in self._tasks:
                task.cancel()

        self._loop.call_soon_threadsafe(stop)
        wait_for(lambda: not self._tasks, 5, "connections closed")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(task := asyncio.current_task())
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: writer.transport.abort())
        self.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                method, path, _ = head.split(" ", 2)
                length = re.search(r"(?i)content-length: (\d+)", head)
                body = await reader.readexactly(int(length[1])) if length else b""
                if self.silent:
                    await asyncio.sleep(60)
                elif method == "GET":
                    self._get(path, writer)
                else:
                    await self._generate(json.loads(body), reader, writer)

    def _get(self, path: str, writer: asyncio.StreamWriter) -> None:
        known = {"/api/version": {"version": "0.34.2"}} if self.dialect == "ollama" else {"/v1/models": {"data": []}}
        if self.slots:
            known |= {"/health": {"status": "ok"}, "/props": {"total_slots": self.slots}}
        self._answer(writer, 200 if path in known else 404, json.dumps(known.get(path, {"error": "not found"})))

    def _answer(self, writer: asyncio.StreamWriter, status: int, text: str, head: str = "") -> None:
        body = text.encode()
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n{head}\r\n".encode() + body)

    def _piece(self, text: str, done: str = "") -> bytes:
        """Return one chunk of the dialect's stream."""
        if self.dialect == "ollama":
            part = {"model": self.model, "created_at": "2026-11-22T12:00:00Z", "response": text, "done": bool(done)}
            if done:
                part |= {"done_reason": done, "context": [1, 2], "total_duration": 2 * 10**9, "load_duration": 10**6}
                part |= {"prompt_eval_count": 300, "eval_count": 60, "eval_duration": 10**9}
            data = json.dumps(part).encode() + b"\n"
        else:
            choice = {"index": 0, "delta": {} if done else {"content": text}, "finish_reason": done or None}
            part = {"id": "x", "model": self.model, "choices": [choice]}
            data = b"data: " + json.dumps(part).encode() + b"\n\n"
            if done:
                usage = {"completion_tokens": 60, "prompt_tokens": 300}
                data += b": ping\n\ndata: " + json.dumps({"model": self.model, "choices": [], "usage": usage}).encode()
                data += b"\n\ndata: [DONE]\n\n"
        return b"%x\r\n%s\r\n" % (len(data), data)

    async def _generate(self, request: dict[str, Any], reader: Any, writer: asyncio.StreamWriter) -> None:
        prompt = request.get("prompt") or request["messages"][-1]["content"]
        options = request.get("options", request)
        words = (word[1:].partition("=") for word in prompt.split() if word[0] == "!")
        order = {name: value for name, _, value in words}
        warming = (options.get("num_predict") or options.get("max_tokens")) == 1
        if self.missing or "status" in order and not warming:
            says = {"context": "the input length exceeds the context length"}
            text = says.get(order.get("say", ""), "model not found")
            return self._answer(writer, int(order.get("status", 404)), json.dumps({"error": text}))
        self.seen.append(request)
        self.running += not warming
        self.peak = max(self.peak, self.running)
        watch = asyncio.ensure_future(reader.read(1))  # nothing may come while we write, so this ends with the client
        try:
            for data in self._script(order, options, warming):
                pause = data if isinstance(data, float) else 0.0
                await asyncio.wait([watch], timeout=pause) if pause else await asyncio.sleep(0)
                if watch.done():
                    self.left.append(time.monotonic())
                    raise ConnectionResetError
                if data == b"reset":
                    writer.transport.abort()
                    raise ConnectionResetError
                if not pause and data:
                    writer.write(data)
                    await writer.drain()
            self.done += [] if warming else [prompt]
        finally:
            self.running -= not warming
            watch.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await watch

    def _script(self, order: dict[str, str], options: dict[str, Any], warming: bool) -> Iterator[Any]:
        """Yield what to write, in bytes, and the seconds to wait, as floats."""
        texts = [f"{name.lower()} {'é' * int(order.get('bands', 12))}" for name in BAND_NAMES]
        text = json.dumps(dict(zip(BAND_NAMES, texts)), ensure_ascii=False)
        if "document" in order:
            text = json.dumps(sp.make_document(texts))
        if "garbage" in order or order.get("garbage_at") == str(options.get("seed")):
            text = "I am sorry, I cannot do that. " * 3
        if "raw" in order and not warming:
            yield from ANSWERS[order["raw"]][0]
            yield b"reset"
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n"
        yield head + (b"Content-Encoding: gzip\r\n" if "gzip" in order else b"") + b"\r\n"
        yield float(order.get("first", 0))
        if warming:
            yield self.loading
            yield self._piece(text[0], "length") + b"0\r\n\r\n"
            return
        if "line" in order:
            yield b"200000\r\n" + b"x" * 0x200000 + b"\r\n"
        step = max(5, len(text) // 200)
        for n, at in enumerate(range(0, len(text), step)):
            yield self._piece(text[at : at + step])
            yield float(order.get("pace", 0))
            if n == 8 and "drop" in order:
                yield b"reset"
            if n == 8 and "error" in order:
                data = b'{"error":"llama runner process has terminated"}\n'
                yield b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data)
                return
            if n == 8 and "hang" in order:
                yield 60.0
        if "unfinished" not in order:
            yield self._piece("", order.get("finish", "stop"))
        yield b"0\r\n\r\n"


def together(count: int, work: Callable[[int], Any]) -> list[Any]:
    """Do work(0), work(1) … at the same time; return what each gave."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


@pytest.fixture(scope="module")
def fake() -> Iterator[Fake]:
    """An Ollama of 16 slots that all tests share; prompts differ by test."""
    with Fake() as server:
        yield server


@pytest.fixture(scope="module")
def front(fake: Fake, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """A proxy in front of `fake` that all tests share."""
    with proxy(tmp_path_factory.mktemp("front"), "--backend", fake.url, "--slots", 16) as server:
        yield server.up()


@contextlib.contextmanager
def chain(folder: Path, *flags: Any, **kind: Any) -> Iterator[tuple[Proxy, Fake]]:
    """A proxy and a fake of one's own."""
    with Fake(**kind) as server, proxy(folder, "--backend", server.url, *flags) as running:
        yield running.up(), server


def raw(url: str, data: bytes, seconds: float = 5) -> bytes:
    """Send data as it is; return what comes until the other side closes or so many seconds have passed."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        answer, deadline = b"", time.monotonic() + seconds
        with contextlib.suppress(TimeoutError, ConnectionError):
            connection.sendall(data)
        with contextlib.suppress(TimeoutError, ConnectionError):
            while time.monotonic() < deadline and (more := connection.recv(65536)):
                answer += more
                if b"\r\n\r\n" in answer and answer.endswith(b"}"):
                    break
    return answer


def band_texts(events: list[tuple[str, Any]]) -> list[str]:
    """Return the texts of the bands that the deltas of events add up to."""
    texts = [""] * len(BAND_NAMES)
    for name, data in events:
        if name == "delta":
            texts[data["n"]] += data["x"]
    return texts


STATUSES = {code: status for code, (status, *_) in sp.REFUSALS.items()} | {"rate_limited": 429, "unavailable": 503}


def code_of(answer: httpx.Response) -> str:
    """Return an error's code; fail where an answer is not of the one shape of errors."""
    error = answer.json()["error"]
    assert set(error) == {"code", "message"} and answer.status_code == STATUSES[error["code"]]
    return error["code"]


# --- settings -----------------------------------------------------------------


def test_flag_wins_over_variable_over_default() -> None:
    environ = {"SCATTER_QUEUE": "7", "SCATTER_PORT": "1", "SCATTER_BACKEND": "http://a:1, none"}

    settings = sp.parse_settings(["--port", "2", "--allow-origin", "https://a:65535"], environ)

    assert (settings.port, settings.queue, settings.slots) == (2, 7, 0)
    assert settings.backend == ("http://a:1", "none")


@pytest.mark.parametrize(
    "flags",
    ["--port x", "--port 65536", "--backend ftp://a:1", "--backend http://a:1/x", "--backend http://a:65536"]
    + ["--prompting json", "--cache inf"]
    + ["--temperature nan", "--queue -1", "--allow-origin https://a.org/", "--log /nowhere/x", "--host 9.9.9.9"],
)
def test_setting_that_cannot_work_is_one_line_and_exit_2(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = sp.main(["--port", "0", *flags.split()])

    said = capsys.readouterr().err
    assert status == 2 and said.count("\n") == 1, said
    assert said.startswith(f"error: {flags.split()[0]}") and flags.split()[1] in said


FLAGS = st.sampled_from([f.name for f in fields(sp.Settings)])
VALUES = st.text(max_size=9) | st.integers().map(str) | st.floats().map(str) | st.sampled_from(["none", "schema", "²"])


@budget(max_examples=50, deadline=None)
@given(st.dictionaries(FLAGS, VALUES, max_size=3), st.dictionaries(FLAGS, VALUES, max_size=2))
def test_settings_are_within_their_limits_or_refused(flags: dict[str, str], variables: dict[str, str]) -> None:
    argv = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    with contextlib.suppress(sp.Unable):
        settings = sp.parse_settings(argv, {f"SCATTER_{name.upper()}": value for name, value in variables.items()})
        for setting in fields(settings):
            value, (low, *high) = getattr(settings, setting.name), setting.metadata["limits"]
            assert type(value) is type(setting.default) and (not high or low <= value <= high[0])


@pytest.mark.parametrize("argv", [["-h"], ["stats", "--help"], ["stats", "-h"]])
def test_help_is_given_where_it_is_asked_for(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        sp.main(argv)

    assert "scatter_proxy.py stats" in capsys.readouterr().out


def test_taken_port_is_one_line_and_exit_1(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = str(holder.getsockname()[1])
        status = sp.main(["--port", port])

    assert status == 1
    assert capsys.readouterr().err == f"error: port {port} is taken; pass --port, or see who holds it: ss -ltnp\n"


# --- bands --------------------------------------------------------------------

texts = st.lists(st.text(min_size=1).filter(str.strip), min_size=6, max_size=6)


@budget(max_examples=60, deadline=None)
@given(texts, st.booleans(), st.booleans(), st.sampled_from([None, 0, 2]), st.integers(0, 2**32))
def test_reader_agrees_with_parser_at_every_cut(
    parts: list[str], flat: bool, ascii_only: bool, indent: int | None, seed: int
) -> None:
    parts = [sp.LONE_SURROGATE.sub("?", part) for part in parts]
    value = dict(zip(BAND_NAMES, parts)) if flat else sp.make_document(parts)
    answer = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    assert sp.parse_bands(answer) == parts

    for step in (1, 2, 3, 5, 7, 1 + seed % 40):
        reader, found = sp.BandReader(), [""] * 6
        for at in range(0, len(answer), step):
            for n, x in reader.feed(answer[at : at + step]):
                found[n] += x
                assert parts[n].startswith(found[n])
        assert found == parts


@budget(max_examples=200, deadline=None)
@given(st.text(alphabet='{}[]:,"\\ud8Dc0nxtPERSONA fragments', max_size=200), st.integers(1, 9))
def test_reader_takes_anything(text: str, step: int) -> None:
    reader = sp.BandReader()

    for at in range(0, len(text), step):
        for n, x in reader.feed(text[at : at + step]):
            x.encode()
            assert n in range(6)


GOOD = sp.make_document([f"{name} text" for name in BAND_NAMES])


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "no json",
        "[]",
        "{}",
        '{"PERSONA": "x"}',
        json.dumps({name: " " for name in BAND_NAMES}),
        json.dumps({name: 1 for name in BAND_NAMES}),
        json.dumps(dict.fromkeys(BAND_NAMES, "x"))[:-1] + ', "TASK": "again"}',
        json.dumps(GOOD)[:-3],
        json.dumps(GOOD).replace('"n": 1', '"n": 2'),
        json.dumps(GOOD).replace('"n": 1', '"n": true'),
        json.dumps(GOOD).replace("DATA", "OTHER", 1),
        '{"a":' * 100_000,
    ],
)
def test_answer_that_is_no_document_is_refused(answer: str) -> None:
    with pytest.raises(ValueError):
        sp.parse_bands(answer)


def test_document_in_a_fence_with_a_seventh_fragment_is_read() -> None:
    value = {**GOOD, "fragments": [*GOOD["fragments"], {"n": 6, "t": "TASK_ARCHIVED", "x": "raw"}]}

    assert sp.parse_bands(f"Here:\n```json\n{json.dumps(value)}\n```") == [f["x"] for f in GOOD["fragments"]]


def test_schema_and_system_prompt_come_from_the_table() -> None:
    schema = sp.band_schema(1024)

    assert [*schema["properties"]] == schema["required"] == BAND_NAMES
    assert sum(text["maxLength"] for text in schema["properties"].values()) <= 3 * (1024 - 64)
    assert all(re.search(rf"^{band.name}: ", sp.SYSTEM, re.MULTILINE) for band in sp.BANDS)


# --- routes -------------------------------------------------------------------


def test_document_with_its_numbers(front: Proxy) -> None:
    answer = front.post("numbers")

    document = answer.json()["sinc"]
    assert answer.status_code == 200 and sinc_prompt.validate(document) == (True, [])
    assert [f["t"] for f in document["fragments"]] == BAND_NAMES
    assert answer.headers["x-tokens"] == "60" and answer.headers["x-cache"] == "miss"
    speed, spent = float(answer.headers["x-tok-per-s"]), float(answer.headers["x-gen-time"])  # the latter in whole ms
    assert 60 / (spent + 0.0006) <= speed <= 60 / (spent - 0.0006)
    assert re.fullmatch(r"queue;dur=[\d.]+, ttft;dur=[\d.]+, gen;dur=[\d.]+", answer.headers["server-timing"])
    assert re.fullmatch("[0-9a-f]{12}", answer.headers["x-request-id"])


def test_bands_stream_while_the_model_writes(front: Proxy, fake: Fake) -> None:
    with front.stream("streams !pace=0.01") as events:
        told = [next(events), next(events)]
        assert "streams !pace=0.01" not in fake.done  # the model still writes
        told += list(events)

    names = [name for name, _ in told]
    assert names[0] == "started" and names[-1] == "done" and set(names[1:-1]) == {"delta"} and len(names) > 20
    assert told[0][1] == {"backend": fake.url[7:], "model": "fake-8b"}
    assert band_texts(told) == [f["x"] for f in told[-1][1]["sinc"]["fragments"]]
    assert set(told[-1][1]["metrics"]) == {*sp.STREAM_METRICS}


def test_hit_repeats_the_document_to_the_byte(front: Proxy, fake: Fake) -> None:
    first, second = front.post("hit"), front.post("hit")
    with front.stream("hit") as events:
        told = list(events)

    assert second.content == first.content and second.headers["x-cache"] == "hit"
    assert second.headers["x-gen-time"] == first.headers["x-gen-time"]
    assert [name for name, _ in told] == ["delta"] * 6 + ["done"] and told[-1][1]["metrics"]["cache"] == "hit"
    assert told[-1][1]["sinc"] == first.json()["sinc"] and told[-1][1]["metrics"]["queue_time"] == 0
    assert fake.done.count("hit") == 1


BODIES = {
    b"": "bad_json",
    b"{": "bad_json",
    b'{"prompt": NaN}': "bad_json",
    b'{"prompt": 1e999}': "bad_request",
    b'{"prompt": "\\ud800"}': "bad_json",
    b'{"prompt": "\xff"}': "bad_json",
    b"[" * 100_000: "bad_json",
    b'{"prompt": ' + b"9" * 5000 + b"}": "bad_json",
    '{"prompt": "x"}'.encode("utf-16"): "bad_json",
    b"[]": "bad_request",
    b'"prompt"': "bad_request",
    b"null": "bad_request",
    b"{}": "bad_request",
    b'{"prompt": " \\n"}': "bad_request",
    b'{"prompt": 5}': "bad_request",
    b'{"prompt": "x", "model": "y"}': "bad_request",
    b'{"prompt": "' + b"x" * 16_001 + b'"}': "too_long",
    b"x" * (sp.BODY_LIMIT + 1): "too_long",
}


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body[:24].decode("latin-1"))
def test_body_that_is_no_prompt_is_refused(front: Proxy, fake: Fake, body: bytes) -> None:
    asked = len(fake.seen)

    answer = front.http.post("/scatter", content=body, headers={"content-type": "application/json"})

    assert code_of(answer) == BODIES[body] and len(fake.seen) == asked


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"content-type": "text/plain"}, "not_json_type"),
        ({"sec-fetch-site": "cross-site"}, "cross_site"),
        ({"sec-fetch-site": "same-site"}, "cross_site"),
        ({"origin": "https://evil.example"}, "cross_site"),
        ({"origin": "null"}, "cross_site"),
        ({"sec-fetch-site": "same-origin", "origin": "https://behind.example"}, None),
        ({"origin": "http://this.example", "host": "this.example"}, None),
        ({"sec-fetch-site": "none"}, None),
    ],
)
def test_head_decides_who_may_call(front: Proxy, headers: dict[str, str], code: str | None) -> None:
    headers = {"content-type": "application/json", **headers}

    answer = front.http.post("/scatter", content=b'{"prompt": "head"}', headers=headers)

    assert answer.status_code == 200 if code is None else code_of(answer) == code


def test_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": b"x", "more_body": True}

    monkeypatch.setattr(sp, "BODY_SECONDS", 0.1)
    with pytest.raises(sp.Refusal, match="slow_body"):
        asyncio.run(sp.read_body(receive))


ROUTES = "/scatter /api/ai-transform /health /stats /metrics / /transform.js /log /x%00"
NAMES = "Accept Origin Sec-Fetch-Site Content-Type Range If-Range Expect Upgrade Transfer-Encoding"
WORDS = st.text(st.characters(max_codepoint=255), max_size=20) | st.sampled_from(["text/event-stream", "bytes=9-1"])
JSONS = st.recursive(st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
HEADS = st.tuples(st.sampled_from(["POST", "POST", "GET", "PUT"]), st.sampled_from(ROUTES.split()))


@budget(deadline=None, suppress_health_check=[*HealthCheck])
@given(HEADS, st.dictionaries(st.sampled_from(NAMES.split()), WORDS), JSONS | st.builds(dict, prompt=st.text()))
def test_no_request_hangs_or_fails_the_service(front: Proxy, head: Any, headers: dict[str, str], content: Any) -> None:
    headers = {"Content-Type": "application/json", **headers, "Host": "x", "Connection": "close"}
    text, lines = json.dumps(content), "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    request = f"{' '.join(head)} HTTP/1.1\r\n{lines}Content-Length: {len(text)}\r\n\r\n{text}"
    began, answer = time.monotonic(), raw(front.url, request.encode("latin-1"))
    (status,) = map(int, re.findall(rb"HTTP/1.1 ([2-5]\d\d)", answer))
    assert status < 500 and time.monotonic() - began < 2
    assert status < 400 or b'{"error":{"code":' in answer


def test_slow_and_deaf_clients_are_cut_and_hold_up_nobody_real(tmp_path: Path) -> None:
    with chain(tmp_path) as (server, _), contextlib.ExitStack() as held:

        def connect(sent: bytes) -> socket.socket:
            connection = held.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", int(server.url.split(":")[2])))
            connection.setblocking(False)
            connection.send(sent)
            return connection

        server.post("first")
        fds, memory, began, held_at, times = server.gauge("process_open_fds"), server.rss(), time.monotonic(), [], []
        deaf = connect(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 400)  # never reads
        slow = [[connect(sent) for _ in range(33)] for sent in (b"", WHOLE[:60], WHOLE.replace(b"17", b"9999"))]
        while not held_at or held_at[-1] > fds:
            times.append(server.post(f"good {len(times)}").elapsed.total_seconds())
            held_at, spent = [*held_at, server.gauge("process_open_fds")], time.monotonic() - began
            assert spent < 40 and (held_at[-1] == fds + 100 if spent < 9 else spent < 13 or held_at[-1] <= fds + 1)
            for connection in slow[1] + slow[2]:
                with contextlib.suppress(OSError):
                    connection.send(b"a")
            time.sleep(0.25)
        assert {one.recv(999)[9:12] for one in slow[2]} == {b"408"} and deaf.recv(9) and spent > 29
        assert server.rss() - memory < 16e6 and max(times) < 0.5
        print(f"the deaf cut after {spent:.0f} s; the slowest of {len(times)} others took {max(times):.3f} s")


def test_what_is_not_there_is_told_in_our_words(front: Proxy) -> None:
    assert code_of(front.http.get("/nothing")) == "not_found"
    assert code_of(front.http.get("/api/ai-transform")) == "bad_method"
    assert code_of(front.http.delete("/health")) == "bad_method"
    assert code_of(front.http.get("/log.9")) == "not_found"


def test_other_site_may_call_when_it_is_allowed(fake: Fake, tmp_path: Path) -> None:
    with proxy(tmp_path, "--backend", fake.url, "--slots", 16, "--allow-origin", "https://a.example") as server:
        asks = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
        preflight = server.http.options("/api/ai-transform", headers={"origin": "https://a.example", **asks})
        answer = server.up().post("cors", origin="https://a.example", **{"sec-fetch-site": "cross-site"})
        other = server.post("cors", origin="https://b.example")

    assert preflight.headers["access-control-allow-origin"] == "https://a.example" and preflight.status_code == 200
    assert answer.status_code == 200 and "X-Tok-Per-S" in answer.headers["access-control-expose-headers"]
    assert code_of(other) == "cross_site"


PROMPT, LENGTH = b'{"prompt": "raw"}', b"Content-Length: 17"
WHOLE = b"POST /scatter HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" + LENGTH + b"\r\n\r\n" + PROMPT
CHUNKED = WHOLE.replace(LENGTH, b"Transfer-Encoding: chunked").replace(PROMPT, b"11\r\n" + PROMPT + b"\r\n0\r\n\r\n")
RAW = [  # status, a lawful request, what of it becomes each of the rest; h11's reading, which nginx narrows further
    (200, WHOLE, b"Host: x|Host: x|Host: x\r\nX: \xff|Host: x\r\nX: a\r\n b|Host: x\r\nExpect: y|Host: x\r\n" + LENGTH),
    (200, WHOLE, b"Host: x|Host: x\r\nExpect: 100-continue|Host: x\r\nUpgrade: h2c\r\nConnection: upgrade"),
    (200, WHOLE, b"/scatter|/scatter|/scatter?x=%00%ff|/api%2fai-transform"),
    (200, CHUNKED, b"Host: x|Host: x|Host: x\r\nContent-Length: 5"),
    (200, CHUNKED, b"11\r\n{|11;" + b"a" * 99999 + b"\r\n{"),
    (400, WHOLE, b"Host: x|Host: x\r\nHost: y|Host: x\r\nX : a|Host: x\r\nX: a\0b|Host: x\r\nX: a\rb|X: y|Host: \0"),
    (400, WHOLE, b"Host: x|Host: x\r\nTransfer-Encoding: gzip, chunked|Host: x\r\n" + LENGTH + b"8"),
    (400, WHOLE, b"Host: x|Host: x\r\nX: " + b"a" * 10**6),
    (400, WHOLE, b"th: 17|th: 5|th: 17, 18|th: -1|th: +17|th: 0x11|th: \xb2|th: |th: " + b"9" * 30),
    (400, WHOLE, b" HTTP/1.1|| HTTP/1.1 x| SSH-2.0-x"),
    (400, WHOLE, b"POST|\x16\x03\x01\0|\r\n\r\nPOST"),
    (400, CHUNKED, b"chunked|identity|x|chunked\r\nTransfer-Encoding: chunked"),
    (400, CHUNKED, b"11\r\n|x\r\n|-1\r\n|10\r\n|\r\n|" + b"f" * 21 + b"\r\n"),
    (404, WHOLE, b"/scatter|//scatter|/x/../scatter|/%ff%fe|/%zz|/log%00|/log/../../etc/passwd|*|/api%2fpull|http://x/scatter"),
    (405, WHOLE, b"POST|post|TRACE|BREW|CONNECT|PUT"),
    (413, WHOLE, b"17|999999999|262145"),
    (413, CHUNKED, b"11\r\n|" + (b"ffff\r\n" + b"x" * 65535 + b"\r\n") * 5 + b"11\r\n"),
    (415, WHOLE, b"application/json|text/plain|application/jsonx"),
]
RAW_REQUESTS = [(status, whole.replace(old, new, 1)) for status, whole, rest in RAW
                for old, *others in [rest.split(b"|")] for new in others]  # fmt: skip


def test_raw_request_has_one_clean_end(front: Proxy, fake: Fake) -> None:
    kept, said = front.post("raw").content, (front.folder / "proxy.out").stat().st_size
    asked, memory, port = len(fake.seen), front.rss(), int(front.url.split(":")[2])

    for status, request in RAW_REQUESTS:
        began, answer = time.monotonic(), raw(front.url, request)
        last = re.findall(rb"HTTP/1.1 ([2-5]\d\d)", answer)
        assert last == [b"%d" % status] and time.monotonic() - began < 1, (request[:200], answer[:200])
        assert answer.endswith(kept) if status == 200 else b'{"error":{"code":' in answer, request[:200]
    assert len(fake.seen) == asked and front.rss() - memory < 16e6
    three, _ = guard_ask(front.url[7:], WHOLE + WHOLE.replace(b"\r\n", b"\n") + b"GET /x HTTP/1.1\r\n\r\n")
    assert re.findall(rb"HTTP/1.1 (\d+)", three) == [b"200", b"200", b"400"]  # in turn, and none hidden in another
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(CHUNKED.partition(b"11\r\n")[0].replace(b"/scatter", b"/nothing"))
        assert b" 404 " in connection.recv(999)
        connection.sendall(b"no chunk\r\n")  # after its answer
        while connection.recv(999):
            pass
    assert "Traceback" not in (front.folder / "proxy.out").read_text()[said:]


@contextlib.contextmanager
def nginx(site: Path, front: str, is_limited: bool) -> Iterator[str]:
    """A real nginx with what install.sh writes, before a proxy at HOST:PORT and the pages in a folder; give its URL."""
    zones, shared, ours = re.findall(r"<<'CONF'\n(.*?\n)CONF", SCRIPT.read_text(), re.DOTALL)[-3:]
    (own := site / "nginx").mkdir()
    shared = shared if is_limited else re.sub(r"limit_(req|conn) [^;]*;", "", shared)
    (own / "nginx-proxy.conf").write_text(shared)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    places = " ".join(f"{kind}_temp_path {own};" for kind in kinds)
    at, ours = f"127.0.0.1:{free_port()}", ours.replace("/etc/scatter", str(own))
    (own / "conf").write_text(
        f"user root; daemon off; pid {own}/pid; error_log stderr notice; events {{}}\n"
        f"http {{ default_type text/html; access_log off; {places}\n{zones.replace('127.0.0.1:8461', front)}"
        f"server {{ listen {at}; root {site};\n{ours} }} }}\n"
    )
    with program("nginx", "-p", own, "-c", own / "conf", log=own / "out", ready="start worker"):
        yield f"http://{at}"


NEEDS_NGINX = pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("nginx"), reason="needs root and nginx")


@NEEDS_NGINX
def test_nginx_in_front_makes_at_most_one_request_of_one_real(tmp_path: Path) -> None:
    """The raw requests, each also with a second one hidden behind it, through what install.sh writes."""
    hidden = WHOLE.replace(b"/scatter", b"/hidden")
    with Played() as app, nginx(tmp_path, app.at, is_limited=False) as url:  # the limits have tests of their own
        for request in (first + second for _, first in RAW_REQUESTS for second in (b"", hidden)):
            before, sent = len(app.saw), request.replace(b"/scatter", b"/api/ai-transform")
            assert b"HTTP/1.1 500" not in raw(url, sent, 0.5)
            assert len(app.saw) <= before + 1 and app.saw[-1][0] != "/hidden", request[:200]
        assert len(app.saw) > 20


# --- backends -----------------------------------------------------------------


def test_head_and_body_leave_in_one_write(tmp_path: Path) -> None:
    firsts: list[bytes] = []  # what a POST's first read gave

    def serve(connection: socket.socket) -> None:
        with connection:
            while data := connection.recv(65536):
                if data.startswith(b"POST"):
                    firsts.append(data)
                    return
                connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 17\r\n\r\n{"version":"0.1"}')

    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        pool = stack.enter_context(ThreadPoolExecutor())
        stack.enter_context(proxy(tmp_path, "--backend", f"http://127.0.0.1:{listener.getsockname()[1]}"))
        for _ in range(2):  # the probe's connection and the slot's
            pool.submit(serve, listener.accept()[0])
        wait_for(lambda: firsts, 5, "the warming request")
    head, _, body = firsts[0].partition(b"\r\n\r\n")
    assert json.loads(body)["options"]["num_predict"] == 1 and b"Host: localhost\r\n" in head


def test_warming_asks_as_real_traffic_does(tmp_path: Path) -> None:
    with chain(tmp_path) as (server, fake):
        server.post("after warming")

    warm, real = fake.seen[0], fake.seen[-1]
    assert warm["options"] == {**real["options"], "num_predict": 1}
    assert all(warm[key] == real[key] for key in ("system", "format", "think", "truncate", "keep_alive", "model"))
    assert real["options"] == {"temperature": 0.3, "seed": 42, "num_predict": 1024, "num_ctx": 8192} and real["stream"]


def test_native_prompting_sends_the_prompt_alone(tmp_path: Path) -> None:
    with chain(tmp_path, "--prompting", "native") as (server, fake):
        answer = server.post("native !document")

    assert answer.status_code == 200 and not {"system", "format"} & set(fake.seen[-1])


@pytest.mark.parametrize(
    ("dialect", "slots", "kind", "found"),
    [("openai", 0, "openai", 16), ("openai", 3, "llama.cpp", 3), ("ollama", 0, "ollama", 1)],
)
def test_dialect_is_found_by_asking(tmp_path: Path, dialect: str, slots: int, kind: str, found: int) -> None:
    with chain(tmp_path, dialect=dialect, slots=slots) as (server, fake):
        answer = server.post("dialect")
        backend = server.health()["backends"][0]

    assert answer.status_code == 200 and answer.headers["x-tokens"] == "60"
    assert (backend["kind"], backend["slots"], backend["up"]) == (kind, found, True)
    if dialect == "openai":
        assert fake.seen[-1]["response_format"]["json_schema"]["schema"]["required"] == BAND_NAMES


def test_kept_connection_serves_the_next_request(front: Proxy, fake: Fake) -> None:
    front.post("kept 0")
    before = fake.connections

    for n in range(1, 9):
        assert front.post(f"kept {n}").status_code == 200

    assert fake.connections == before


@pytest.mark.parametrize(
    ("order", "code"),
    [
        ("!status=500", "backend_failed"),
        ("!status=400", "backend_failed"),
        ("!status=400 !say=context", "too_long"),
        ("!error", "backend_failed"),
        ("!unfinished", "bad_answer"),
        ("!finish=length", "bad_answer"),
        ("!garbage", "bad_answer"),
        ("!gzip", "bad_answer"),
        ("!line", "bad_answer"),
        ("!bands=50000", "bad_answer"),
    ],
)
def test_bad_answer_fails_its_job_alone(front: Proxy, order: str, code: str) -> None:
    answer = front.post(f"alone {order}")

    assert code_of(answer) == code
    assert front.health()["backends"][0]["up"] and front.post(f"after {code}").status_code == 200


@pytest.mark.parametrize("told", [None, -1, 0, 10**400, math.nan, math.inf, "6", [], True])
def test_numbers_that_cannot_be_cost_no_document(told: Any) -> None:
    more = dict.fromkeys(("eval_count", "prompt_eval_count", "eval_duration"), told) | {"error": None}
    more |= {"usage": {"completion_tokens": told, "prompt_tokens": told}, "timings": {"predicted_per_second": told}}
    text = json.dumps(dict.fromkeys(BAND_NAMES, "x"))
    for dialect, parts in (
        (sp.Ollama, [{"response": text}, {"response": "", "done": True, "done_reason": "stop", **more}]),
        (sp.OpenAI, [{"choices": [{"delta": {"content": text}, "finish_reason": "stop"}]}, {"choices": [], **more}]),
    ):
        job = sp.Job("x")
        job.start(SimpleNamespace(name="a", model="m"))
        for part in parts:
            job.hear(dialect, b"data: " * (dialect is sp.OpenAI) + json.dumps(part).encode())
        job.conclude()
        assert (job.metrics["tokens"], job.metrics["prompt_tokens"], job.metrics["eval_tok_per_s"]) == (1, None, None)


LINES, PART = b"HTTP/1.1 200 OK\r\nContent-Length: ", b'{"model":"m","response":"%s","done":false}\n'
CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
ANSWERS = {  # name: what the backend writes before it breaks the connection off; the code that the client is told
    "nothing": ([], "backend_failed"),
    "banner": ([b"SSH-2.0-OpenSSH_9.2p1\r\n\r\n"], "backend_failed"),
    "two-lengths": ([LINES + b"5\r\nContent-Length: 6\r\n\r\n{}"], "backend_failed"),
    "long-head": ([LINES + b"9\r\nX: " + b"a" * 200_000 + b"\r\n\r\n"], "backend_failed"),
    "length-too-long": ([LINES + b"9999\r\n\r\n" + PART % b"x"], "backend_failed"),
    "length-too-short": ([LINES + b"30\r\n\r\n" + PART % b"x" * 99], "bad_answer"),
    "no-chunk": ([CHUNKS + b"zz\r\n"], "backend_failed"),
    "cut-chunk": ([CHUNKS + b"ff\r\n" + PART % b"x"], "backend_failed"),
    "no-line": ([LINES + b"12\r\n\r\n" + b'{"response":'], "bad_answer"),
    "no-object": ([LINES + b"5\r\n\r\nnull\n"], "bad_answer"),
    "deep": ([LINES + b"100001\r\n\r\n" + b"[" * 100_000 + b"\n"], "bad_answer"),
    "elsewhere": ([b"HTTP/1.1 302 X\r\nLocation: http://x.invalid/\r\nContent-Length: 0\r\n\r\n"], "backend_failed"),
    "announced": ([b"HTTP/1.1 103 X\r\n\r\n" * 2000 + b"HTTP/1.1 500 X\r\n\r\n"], "backend_failed"),
    "bomb": ([LINES + b"9999\r\nContent-Encoding: gzip\r\n\r\n" + gzip.compress(bytes(10**7), 1) * 30], "bad_answer"),
    "long-line": ([LINES + b"67108864\r\n\r\n", *[b"x" * 2**20] * 64], "bad_answer"),
    "endless": ([LINES + b"99999999\r\n\r\n", *[PART % (b"x" * 999)] * 9999], "bad_answer"),
}


def test_broken_answer_is_told_and_the_next_is_served_real(tmp_path: Path) -> None:
    with chain(tmp_path) as (server, _):
        server.post("before")
        memory = server.rss()
        for name, (_, code) in ANSWERS.items():
            assert code_of(server.post(f"broken !raw={name}")) == code, name
            assert server.post(f"after {name}").status_code == 200
        with server.stream("shown !raw=endless") as events:
            assert list(events)[-1][1]["error"]["code"] == "bad_answer"
        assert server.rss() - memory < 16e6 and "Traceback" not in (tmp_path / "proxy.out").read_text()


def test_link_that_broke_for_one_refuses_no_other(tmp_path: Path) -> None:
    with chain(tmp_path, "--slots", 16) as (server, _):
        answers = together(16, lambda n: [server.post(f"{n} {i} {'!raw=nothing' * (n < 4)}") for i in range(8)])

        assert {answer.status_code for tries in answers[4:] for answer in tries} == {200}


@pytest.mark.parametrize(("after", "asked"), [(0.0, 2), (0.25, 1)])
def test_kept_connection_that_breaks_is_asked_again_at_once_or_not(after: float, asked: int) -> None:
    heads: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.read(999):
            heads.append(head)
            if b"/poison" in head:
                await asyncio.sleep(after)
                return writer.transport.abort()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
            if b"/idle" in head:  # RFC 9110, 15.5.9
                await asyncio.sleep(0.01)
                writer.write(b"HTTP/1.1 408 X\r\nContent-Length: 0\r\n\r\n")

    async def ask() -> None:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            lane = sp.Lane(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            for path in ("/idle", "/fine", "/poison"):
                async with lane.ask(path):
                    await lane.read_all()
                await asyncio.sleep(0.02)

    with pytest.raises(sp.LinkLost):
        asyncio.run(ask())
    assert len(heads) == 2 + asked


def test_second_seed_mends_a_bad_answer(front: Proxy, fake: Fake) -> None:
    answer = front.post("mended !garbage_at=42")

    assert answer.status_code == 200
    assert [r["options"]["seed"] for r in fake.seen if r["prompt"] == "mended !garbage_at=42"] == [42, 43]


def test_stream_that_showed_a_delta_ends_with_an_error(front: Proxy) -> None:
    with front.stream("shown !unfinished !pace=0.01") as events:
        told = list(events)

    assert told[-1] == ("error", {"error": {"code": "bad_answer", "message": sp.REFUSALS["bad_answer"][1]}})
    assert [name for name, _ in told].count("started") == 1


def test_offline_is_told_at_once_and_hits_are_served_real(tmp_path: Path) -> None:
    with chain(tmp_path) as (server, fake):
        kept = server.post("kept")
        fake.close()
        wait_for(lambda: server.health()["status"] == "offline", 2.2, "offline")
        answer, hit = server.post("other"), server.post("kept")
        health = server.http.get("/api/ai-transform/health")
        fake.open()
        wait_for(lambda: server.health()["status"] == "ok", 5, "back by itself")

        assert code_of(answer) == "model_offline" and answer.headers["retry-after"] == "5"
        assert hit.content == kept.content and hit.headers["x-cache"] == "hit"
        assert health.status_code == 503 and health.json()["reason"] == "no_tunnel" and "backends" not in health.json()
        told = [(r["event"], r["reason"]) for r in server.log() if "event" in r]
        assert told == [("up", None), ("down", "no_tunnel"), ("up", None)]


def test_lane_that_is_cancelled_while_it_tidies_up_dials_again(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    async def cancelled(_: Any) -> None:
        raise asyncio.CancelledError

    async def version(lane: sp.Lane) -> bytes:
        async with lane.ask("/api/version"):
            return await lane.read_all()

    async def ask() -> bytes:
        lane = sp.Lane(fake.url)
        with monkeypatch.context() as patch:
            patch.setattr(sp.httpcore.Response, "aclose", cancelled)
            with pytest.raises(asyncio.CancelledError):
                await version(lane)
        return await version(lane)

    assert b"version" in asyncio.run(ask())


def test_missing_model_and_silence_have_their_words_real(tmp_path: Path) -> None:
    with Fake() as fake:
        fake.missing = True
        with proxy(tmp_path, "--backend", fake.url) as server:
            wait_for(lambda: server.health()["reason"] == "model_missing", 5)
            fake.missing = False
            with server.up().stream("in flight !hang") as events:
                assert [next(events)[0] for _ in range(4)] == ["started", "delta", "delta", "delta"]
                fake.silent, cut = True, time.monotonic()  # as a link that is cut: all is accepted, nothing answered
                assert [data["error"]["code"] for name, data in events if name == "error"] == ["backend_failed"]
            assert time.monotonic() - cut < 7 and server.health()["reason"] == "silent_link"
        fake.silent, fake.loading = False, 60.0
        with proxy(tmp_path, "--backend", fake.url) as server:
            wait_for(lambda: server.health()["status"] == "warming", 5)
            fake.silent = True
            wait_for(lambda: server.health()["reason"] == "silent_link", 9, "a link that dies while weights load")


def test_bytes_of_a_job_answer_a_probe_while_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    async def probe(last: float) -> None:
        async def hear(_: str) -> None:  # a job's bytes, the last so many s after the question
            for _ in range(round(last / 0.01)):
                stage._heard_at = time.monotonic()
                await asyncio.sleep(0.01)
            await asyncio.sleep(60)

        stage = Play().queue.backends["a"]
        stage.dialect, stage._get = sp.Ollama, hear
        await stage._probe()

    monkeypatch.setattr(sp, "PROBE_SECONDS", 0.1)
    asyncio.run(probe(0.2))
    with pytest.raises(sp.LinkLost, match="silent_link"):
        asyncio.run(probe(0.02))


def test_folder_that_cannot_be_read_leaves_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(number: int) -> list[str]:
        def fail(_: str) -> None:
            raise OSError(number, "")

        queue = sp.Queue(sp.Settings(backend=("none",)), sp.LogFile(os.devnull))
        known = SimpleNamespace(place=("/a", 1, 2), prober=sp.Lane("/a"), end=lambda reason: None)
        queue.backends = {"a": known}
        monkeypatch.setattr(sp.os, "scandir", fail)
        queue.look()
        return [*queue.backends]

    assert look(errno.EMFILE) == ["a"] and look(errno.ENOENT) == []


def test_socket_joins_and_a_new_one_takes_over(tmp_path: Path) -> None:
    (tmp_path / "backends").mkdir()
    path = tmp_path / "backends" / "gpu-1a2b.sock"
    with proxy(tmp_path, "--backend", "none") as server, Fake(path) as first:
        server.up()
        assert server.health()["backends"][0]["name"] == "gpu-1a2b" and server.post("one").status_code == 200
        with Fake(path) as second:  # as a tunnel that dials again while sshd still holds the dead link's socket
            wait_for(lambda: second.seen and server.health()["status"] == "ok", 3, "the new socket is up")
            assert server.post("two").status_code == 200 and second.done == ["two"] and "two" not in first.done


def test_name_that_is_no_text_takes_nothing_down(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.bind(os.fsencode(tmp_path) + b"/\xff\n.sock")  # as whoever may forward can
        with chain(tmp_path, "--backend-dir", tmp_path) as (server, fake):
            fake.model = "\ud800"  # as JSON can
            assert [server.post(f"name {n}").status_code for n in range(3)] == [200] * 3
            assert [b["up"] for b in server.health()["backends"]] == [True]
            assert server.http.get("/metrics").status_code == 200


def test_lost_link_starts_the_job_again_elsewhere_real(tmp_path: Path) -> None:
    (tmp_path / "backends").mkdir()
    a, b = (Fake(tmp_path / "backends" / f"{name}.sock") for name in "ab")
    with proxy(tmp_path, "--backend", "none") as server, ThreadPoolExecutor() as pool, a as one, b as two:
        server.up(2)
        plain = pool.submit(server.post, "plain !pace=0.03")
        wait_for(lambda: one.running + two.running == 1, 2)
        (one if one.running else two).close()
        assert plain.result(10).status_code == 200

        (one if "plain !pace=0.03" not in one.done else two).open()
        server.up(2)
        with server.stream("shown !pace=0.03") as events:
            told = [next(events), next(events)]
            (one if one.running else two).close()
            told += list(events)
        assert told[-1][0] == "error" and told[-1][1]["error"]["code"] == "backend_failed"


def test_model_that_changed_empties_the_cache(tmp_path: Path) -> None:
    with chain(tmp_path) as (server, fake):
        server.post("same")
        fake.model = "fake-70b"
        server.post("any")

        assert server.post("same").headers["x-cache"] == "miss"


# --- jobs and queue -----------------------------------------------------------


def test_same_prompt_at_once_is_one_generation(front: Proxy, fake: Fake) -> None:
    answers = together(20, lambda n: front.post("joined !pace=0.01"))

    assert {answer.content for answer in answers} == {answers[0].content} and answers[0].status_code == 200
    assert Counter(a.headers["x-cache"] for a in answers) == {"miss": 1, "joined": 19}
    assert fake.done.count("joined !pace=0.01") == 1


def test_timing_is_of_the_call_not_of_the_generation() -> None:
    job, told = sp.Job("x"), []
    job.started_at = 100.0
    job.metrics |= {"tokens": 60, "ttft": 0.5, "gen_time": 2.0, "tok_per_s": 30.0}
    for cache, asked_at in (("miss", 99.0), ("joined", 101.0), ("hit", 103.0)):
        (reader := sp.Reader(job, cache, streams=False)).asked_at = asked_at
        headers = sp.number_headers(reader.metrics(), 1)
        told.append(re.findall(r"dur=([\d.]+)", headers["server-timing"]))
        assert headers["x-gen-time"] == "2.000"

    assert told == [["1000.0", "500.0", "2000.0"], ["0.0", "0.0", "1000.0"], ["0.0", "0.0", "0.0"]]


def test_queue_is_bounded_fair_and_honest_real(tmp_path: Path) -> None:
    def ask(n: int) -> tuple[float, list[tuple[str, Any]]]:
        with server.stream(f"prompt {n} !first=0.02") as events:
            return time.monotonic(), list(events)

    with chain(tmp_path) as (server, fake):
        with server.stream("the first !first=1") as running:
            next(running)
            start = time.monotonic()
            answers = together(49, ask)
        busy = [(at, events[0][1]) for at, events in answers if events[0][0] == "refused"]
        served = [events for _, events in answers if events[0][0] != "refused"]

        assert len(busy) == 17 and len(served) == 32 and fake.peak == 1
        for at, answer in busy:
            assert code_of(answer) == "busy" and int(answer.headers["retry-after"]) >= 1
        assert max(at for at, _ in busy) - start < 1  # told while the first still ran
        places = sorted([data["position"] for name, data in events if name == "queued"] for events in served)
        assert sorted(told[0] for told in places) == list(range(1, 33))
        assert all(told == list(range(told[0], 0, -1)) for told in places)


def test_client_that_is_told_when_gets_in_then_real(tmp_path: Path) -> None:
    with chain(tmp_path) as (server, _), ThreadPoolExecutor(100) as pool:
        server.post("pace !first=0.1")
        greedy = [pool.submit(server.post, f"greedy {n} !first={0.1 if n else 1}") for n in range(100)]
        wait_for(lambda: server.health()["queue"]["waiting"] == 32, 5)
        told = server.post("other !first=0.1")
        assert code_of(told) == "busy" and 2 <= int(told.headers["retry-after"]) <= 8  # 33 jobs of 0.1 s and more
        time.sleep(int(told.headers["retry-after"]))
        served = server.post("other !first=0.1")

        assert served.status_code == 200 and served.elapsed.total_seconds() < 2  # one was slower than those before it
        codes = Counter(one.result().status_code for one in greedy)
        assert codes.keys() == {200, 503} and codes[200] >= 33  # more where one began to ask after others were served


def test_waiter_that_leaves_frees_its_place_unseen(tmp_path: Path) -> None:
    with chain(tmp_path) as (server, fake):
        with server.stream("runs !pace=0.02") as running:
            next(running)
            with server.stream("leaves") as waiting:
                assert next(waiting) == ("queued", {"position": 1})
                assert server.health()["status"] == "busy"
            wait_for(lambda: server.health()["queue"]["waiting"] == 0, 0.2, "the place is free")
            list(running)
        assert server.post("next").status_code == 200
        assert "leaves" not in [request["prompt"] for request in fake.seen]
        told = ["cancelled", "ok", "ok"]
        wait_for(lambda: [r["code"] for r in server.log() if "code" in r] == told, 2, "a line for each")


def test_waiter_is_told_busy_after_its_time(tmp_path: Path) -> None:
    with chain(tmp_path, "--queue-seconds", 0.5) as (server, _), server.stream("runs !first=2") as running:
        next(running)
        answer = server.post("waits")

    assert code_of(answer) == "busy" and 0.4 < answer.elapsed.total_seconds() < 1.2


@pytest.mark.parametrize("order", ["!first=5", "!pace=0.02"])
def test_client_that_leaves_stops_the_model(tmp_path: Path, order: str) -> None:
    with chain(tmp_path) as (server, fake):
        with server.stream(f"left {order}") as events:
            next(events)
            if "pace" in order:
                next(events)
            wait_for(lambda: fake.running, 2)
        left = time.monotonic()
        wait_for(lambda: fake.left, 2, "the backend saw it")
        assert fake.left[0] - left < 0.1
        assert server.post("next").status_code == 200
        assert server.log()[1]["code"] == "cancelled" and server.log()[1]["status"] == 499


def test_reader_that_leaves_a_joined_job_leaves_it_running(tmp_path: Path) -> None:
    with chain(tmp_path) as (server, fake), contextlib.ExitStack() as stays:
        with server.stream("both !pace=0.02") as events:
            next(events)
            other = stays.enter_context(server.stream("both !pace=0.02"))
            next(other)
        assert list(other)[-1][0] == "done" and not fake.left


@pytest.mark.parametrize(
    ("spoke", "silent", "running", "late"),
    [(False, 119, 119, False), (False, 121, 121, True), (True, 29, 99, False), (True, 31, 99, True), (True, 1, 301, 1)],
)
def test_generation_has_its_time_limits(spoke: bool, silent: float, running: float, late: bool) -> None:
    job = sp.Job("x")
    job.started_at, job.heard_at = 1000 - running, 1000 - silent
    job.metrics["ttft"] = 0.1 if spoke else None

    assert job.is_late(1000) == late


def test_time_limits_run_on_over_pings_and_other_tries() -> None:
    job, backend = sp.Job("x"), SimpleNamespace(name="a", model="m")
    job.start(backend)
    job.started_at = job.heard_at = 1.0  # long ago
    for line in (b": ping", b'data: {"choices": [{"delta": {"content": ""}}]}'):
        job.hear(sp.OpenAI, line)
    assert job.heard_at == 1.0

    job.start(backend)
    assert job.started_at == 1.0 < job.heard_at and job.is_late(302.0)


class Stage(sp.Backend):
    """A backend whose probes and answers are played by hand: turns holds what each lane in use waits for."""

    turns: ClassVar[Any] = {}

    async def _live(self) -> None:
        await asyncio.Event().wait()

    def turn(self) -> None:
        """Come up, or be probed with success after a broken link, or go down."""
        if self.reason and not self.dialect:
            self.dialect, self.slots, self.lanes = sp.Ollama, 2, [sp.Lane("/none"), sp.Lane("/none")]
            self.idle, self.turns = self.lanes[:], {}
        self._become("") if self.reason else self.fall("no_tunnel")

    async def generate(self, lane: sp.Lane, job: sp.Job, seed: int, max_tokens: int) -> None:
        turns = self.turns
        try:
            while not job.answer.is_over:
                turns[lane] = asyncio.get_running_loop().create_future()
                job.hear(sp.Ollama, (await turns[lane]).encode())
            job.conclude()
        finally:
            del turns[lane]


class Visitor:
    """A client as uvicorn shows it: it asks, may stop reading, may leave."""

    def __init__(self, app: sp.Scatter, prompt: int, streams: bool) -> None:
        self.said, self.ends, self.left, self.reads = b"", 0, asyncio.Event(), asyncio.Event()
        self.messages = [{"type": "http.request", "body": b'{"prompt": "%d"}' % prompt}]
        head = [(b"content-type", b"application/json"), (b"accept", b"text/event-stream" if streams else b"*/*")]
        scope = {"type": "http", "method": "POST", "path": "/scatter", "headers": head}
        self.reads.set()
        self.task = asyncio.create_task(app(scope, self.receive, self.send))

    async def receive(self) -> dict[str, Any]:
        return self.messages.pop() if self.messages else await self.left.wait() and {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        await self.reads.wait()
        self.said += message.get("body", b"")
        self.ends += message["type"] == "http.response.body" and not message.get("more_body")


LAST = json.dumps({"response": json.dumps(dict.fromkeys(BAND_NAMES, "x")), "done": True, "done_reason": "stop"})
TURNS = [LAST, LAST, '{"response": "{\\"PERSONA\\": \\"a"}', '{"response": "x"}', '{"done": true}']
TURNS += [sp.LinkLost("no_model_server"), sp.BackendError(500, "x"), ArithmeticError("x")]


class Play:
    """The service over three played backends, and all that must hold of it at any moment."""

    def __init__(self) -> None:
        self.app = sp.Scatter(sp.Settings(log=os.devnull, queue=4, cache=0.01))
        self.queue, self.lines, self.visitors = self.app.queue, [], []
        write, self.queue.look = self.queue.log_file.write, lambda: None
        self.queue.log_file.write = lambda record: (self.lines.append(record), write(record))
        self.queue.backends = {name: self.stage(name) for name in "abc"}

    def stage(self, name: str) -> Stage:
        return Stage(name, ("/none",), self.app.settings, self.queue._changed)

    def act(self, what: str, n: int, streams: bool) -> None:
        """Do one thing to the nth of those that it can be done to."""
        name, visitors = "abc"[n % 3], [v for v in self.visitors if not v.task.done()]
        turns = [turn for stage in self.queue.backends.values() for turn in stage.turns.values() if not turn.done()]
        if what == "ask":
            self.visitors.append(Visitor(self.app, n % 12, streams))
        elif what == "turn" and turns:
            turn, played = turns[n % len(turns)], TURNS[n % len(TURNS)]
            turn.set_exception(played) if isinstance(played, Exception) else turn.set_result(played)
        elif what == "backend":
            self.queue.backends[name].turn()
        elif what == "new":  # as look() does where a socket was made anew
            self.queue.backends.pop(name).fall("no_tunnel")
            self.queue.backends[name] = self.stage(name)
        elif what == "late":
            self.queue.tick(time.monotonic() + 31)
        elif what in ("leave", "stall") and visitors:
            (visitor := visitors[n % len(visitors)]).reads.clear()
            what == "leave" and (visitor.left.set(), visitor.reads.set())

    def check(self) -> None:
        """Fail where a slot is lost or used twice, or where somebody waits who need not."""
        queue, jobs = self.queue, [job for stage in self.queue.backends.values() for job in stage.jobs]
        assert set(jobs) == queue.running and len(jobs) == len(queue.running)
        for stage in queue.backends.values():
            assert len(stage.lanes) == len({*stage.idle}) + len(stage.jobs) == 2 * bool(stage.dialect), "a slot lost"
            assert len(stage.turns) == len(stage.jobs), "a slot over-used"
        assert not (queue.waiting and queue.free()) and len(queue.waiting) <= 4 + 6
        assert [job.position for job in queue.waiting] == [*range(1, len(queue.waiting) + 1)]
        assert all(job.readers and not job.ended_at for job in [*queue.waiting, *jobs])
        assert set(queue._active.values()) == {*queue.waiting, *jobs}
        readers = sum(len(job.readers) for job in [*queue.waiting, *jobs])
        still = [v.reads.is_set() for v in self.visitors if not v.task.done()]
        assert readers == len(still) or not all(still), "a reader left waiting"

    async def settle(self) -> None:
        for _ in range(12):  # turns of the loop; the longest way through tasks and callbacks takes eight
            await asyncio.sleep(0)

    async def run(self, acts: list[tuple[str, int, bool]]) -> None:
        for act in [*acts, *[("turn", 0, False)] * 40]:
            self.act(*act)
            await self.settle()
            self.check()
        for visitor in self.visitors:
            visitor.reads.set()
        self.queue.drain(time.monotonic())
        await asyncio.wait_for(asyncio.gather(*(v.task for v in self.visitors)), 1)
        for visitor in (v for v in self.visitors if not v.left.is_set()):
            ends = re.findall(rb"^event: (?:done|error)$|^\{", visitor.said, re.MULTILINE)
            assert visitor.ends == len(ends) == 1 and b"cancelled" not in visitor.said, visitor.said
        codes = Counter(line["code"] for line in self.lines if "code" in line)
        assert codes == self.queue.log_file.history.codes and not codes["unavailable"]
        assert codes.total() == len(self.visitors)


ACTS = st.sampled_from(["ask", "ask", "ask", "turn", "turn", "turn", "backend", "leave", "stall", "new", "late"])


@budget(max_examples=40, deadline=None)
@given(st.lists(st.tuples(ACTS, st.integers(0, 99), st.booleans()), min_size=20, max_size=60))
def test_no_slot_and_no_reader_is_ever_lost(acts: list[tuple[str, int, bool]]) -> None:
    async def play() -> None:
        await Play().run([("backend", 0, False), *acts])

    asyncio.run(play())


def test_backend_that_loads_again_is_told_down_and_its_first_warm_up_is_not() -> None:
    async def play() -> list[tuple[str, str | None]]:
        play = Play()
        stage = play.queue.backends["a"]
        stage._become("warming")
        stage.turn()
        up_since, stage.reason = stage.since, "no_tunnel"  # in doubt, after a broken link
        stage.turn()
        assert stage.since == up_since
        stage.fall("warming")  # as llama.cpp's 503 to a probe has it
        assert stage.since > up_since
        with pytest.raises(sp.Refusal, match="model_offline"):
            play.queue.read("x", streams=False)
        return [(line["event"], line["reason"]) for line in play.lines]

    assert asyncio.run(play()) == [("up", None), ("down", "warming")]


def test_waiter_outlasts_a_redial_and_no_more() -> None:
    async def play() -> Counter[str]:
        (play := Play()).act("backend", 0, False)
        for n in range(3):
            play.act("ask", n, False)
        await play.settle()
        play.act("backend", 0, False)
        for seconds, left in ((0, 1), (2.9, 1), (3.1, 0)):
            play.queue.tick(time.monotonic() + seconds)
            assert len(play.queue.waiting) == left
        await asyncio.wait_for(asyncio.gather(*(visitor.task for visitor in play.visitors)), 1)
        return Counter(line["code"] for line in play.lines if "code" in line)

    assert asyncio.run(play()) == {"backend_failed": 2, "model_offline": 1}


def test_stop_when_idle_is_quick_and_clean(fake: Fake, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl.1").write_text(f"{'x' * 99}\n" * 99_999)
    with proxy(tmp_path, "--backend", fake.url) as server, contextlib.ExitStack() as held:
        server.up()
        at = "127.0.0.1", int(server.url.split(":")[2])
        half, deaf = (held.enter_context(socket.create_connection(at, 5)) for _ in range(2))
        half.sendall(WHOLE[:-5])
        deaf.sendall(b"GET /log.1 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert deaf.recv(9)
        start = time.monotonic()
        server.process.send_signal(signal.SIGTERM)

        assert server.process.wait(5) == 0 and time.monotonic() - start < 1
        assert [(r["event"], r["reason"]) for r in server.log()] == [("up", None), ("down", "stopping")]
        assert b" 503 " in (said := half.recv(9999)) and b'{"error":{"code":"stopping"' in said
        assert "Traceback" not in (tmp_path / "proxy.out").read_text()


def test_service_manager_is_told_wherever_it_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = SimpleNamespace(tick=lambda now: None, status=lambda: ("ok", ""))
    server = sp.Server(sp.uvicorn.Config(None), queue)
    for place in (str(tmp_path / "notify@1"), f"@scatter-{os.getpid()}@1"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind("\0" + place[1:] if place[0] == "@" else place)
            manager.settimeout(0.2)
            monkeypatch.setenv("NOTIFY_SOCKET", place)
            asyncio.run(server.on_tick(0))
            assert manager.recv(99) == b"READY=1\nSTATUS=ok \nWATCHDOG=1"


def test_signal_is_heeded_from_the_first_line_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("nobody would have ended us cleanly")

    before = signal.signal(signal.SIGTERM, fail)
    monkeypatch.setattr(sp.log, "info", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        assert sp.main(["--port", "0", "--backend", "none", "--log", str(tmp_path / "log")]) == 0
    finally:
        signal.signal(signal.SIGTERM, before)


def test_second_signal_ends_what_runs_and_tells(tmp_path: Path) -> None:
    with chain(tmp_path) as (server, _), server.stream("runs !hang") as events:
        told = [next(events)]
        for _ in range(2):
            server.process.send_signal(signal.SIGINT)
            wait_for(lambda: "stopping" in (tmp_path / "proxy.out").read_text(), 2)
        told += list(events)

        assert told[-1][0] == "error" and told[-1][1]["error"]["code"] == "stopping" and server.process.wait(5) == 0
        assert "Traceback" not in (tmp_path / "proxy.out").read_text()


def test_stop_lets_the_running_end_and_tells_the_others(tmp_path: Path) -> None:
    with chain(tmp_path) as (server, _), ThreadPoolExecutor() as pool:
        running = pool.submit(server.post, "runs !pace=0.02")
        wait_for(lambda: server.health()["queue"]["running"], 2)
        waiting = pool.submit(server.post, "waits")
        wait_for(lambda: server.health()["queue"]["waiting"], 2)
        server.process.send_signal(signal.SIGTERM)
        assert code_of(waiting.result(5)) == "stopping"
        assert code_of(server.post("new")) == "stopping"  # the door is still open
        assert running.result(20).status_code == 200
        assert server.process.wait(5) == 0


SOAK = int(os.environ.get("SCATTER_SOAK", "2000"))  # requests; 20,000 take five minutes
TASKS = """import asyncio
def tick(queue, now, tick=sp.Queue.tick):
    print(len(asyncio.all_tasks()), file=open({!r}, "w"))
    tick(queue, now)
sp.Queue.tick = tick"""


async def soak_client(port: int, number: int, count: int, told: Counter[Any]) -> None:
    """Ask so often, one after the other: a fifth is aborted, a tenth meets a fault; count what came of each."""
    chance, line = random.Random(number), None
    faults = ["!drop", "!error", "!garbage", "!unfinished", *(f"!raw={name}" for name in [*ANSWERS][:-3])]
    for n in range(count):
        kind = chance.choices(["good", "fault", "half", "stream", "plain"], [14, 2, 1, 2, 1])[0]
        order = {"good": "", "fault": chance.choice(faults)}.get(kind, "!pace=0.001")
        body = b'{"prompt": "%d %d %s"}' % (number, n, order.encode())
        head = WHOLE[: -len(PROMPT)].replace(b"17", b"%d" % len(body))
        if kind == "stream" or chance.random() < 0.3:
            head = head.replace(b"Host: x", b"Host: x\r\nAccept: text/event-stream")
        reader, writer = line = line or await asyncio.open_connection("127.0.0.1", port)
        writer.write(head + body[: 9 if kind == "half" else None])
        start = text = b"" if kind in ("half", "plain") else await reader.readuntil(b"\r\n\r\n")
        if kind in ("good", "fault"):
            length = re.search(rb"content-length: (\d+)", start)
            text = await (reader.readexactly(int(length[1])) if length else reader.readuntil(b"\r\n0\r\n\r\n"))
        told[kind, b" 200 " in start and b"event: error" not in text] += 1
        if kind not in ("good", "fault"):
            await asyncio.sleep(chance.random() * 0.01)
            line = writer.transport.abort() if n % 2 else writer.close()
    writer.close()


def test_soak_real(tmp_path: Path) -> None:
    def idle() -> tuple[int, int]:
        return int(server.gauge("process_open_fds")), int((tmp_path / "tasks").read_text() or 0)

    async def soak(fakes: list[Fake], count: int) -> None:
        port, until = int(server.url.split(":")[2]), time.monotonic() + 30 + count / 20
        clients = [asyncio.create_task(soak_client(port, n, count // 32, told)) for n in range(32)]
        while not all(client.done() for client in clients):  # two of three backends come and go
            flapping = random.choice(fakes[1:])
            await asyncio.to_thread(flapping.close)
            await asyncio.wait(clients, timeout=0.5)
            await asyncio.to_thread(flapping.open)
            await asyncio.wait(clients, timeout=2)
            assert time.monotonic() < until, told
        await asyncio.gather(*clients)

    (tmp_path / "backends").mkdir()
    told, memory, setup = Counter(), [], TASKS.format(str(tmp_path / "tasks"))
    with proxy(tmp_path, "--backend", "none", "--slots", 16, "--cache", 0.5, setup=setup) as server:
        wait_for(lambda: (tmp_path / "tasks").exists(), 2)
        before = idle()
        for count in (SOAK // 4, SOAK):  # the first fills cache and allocator
            with contextlib.ExitStack() as stack:
                fakes = [stack.enter_context(Fake(tmp_path / "backends" / f"{name}.sock")) for name in "abc"]
                server.up(3)
                asyncio.run(soak(fakes, count))
                wait_for(lambda: server.health()["queue"]["running"] == 0, 5)
                memory.append(server.rss())
            for fake in fakes:
                fake.where.unlink(missing_ok=True)
            wait_for(lambda: idle() == before, 10, f"descriptors and tasks as before: {before}")
        codes = Counter(line["code"] for line in server.log() if "code" in line)
        stats, said = server.http.get("/stats").json()["codes"], (tmp_path / "proxy.out").read_text()
    print(f"{told}, {codes}, descriptors and tasks {before}, MB {[round(rss / 1e6, 1) for rss in memory]}")
    kinds = Counter({kind: sum(n for (k, _), n in told.items() if k == kind) for kind, _ in told})
    sure = kinds["good"] + kinds["fault"] + kinds["stream"]  # reached us; of the plain ones that left, some did
    assert told["good", True] >= 0.95 * kinds["good"] > SOAK / 2 and memory[1] - memory[0] < 8e6
    assert "Traceback" not in said, said[said.index("Traceback") - 300 :][:2000]
    assert codes == stats and sure <= codes.total() <= sure + kinds["plain"]


# --- log and stats ------------------------------------------------------------


def test_log_tells_each_prompt_in_one_line_and_never_its_words(front: Proxy) -> None:
    canary = "canary-5f2a"
    front.post(canary)
    with front.stream(f"{canary} !garbage") as events:
        list(events)

    wait_for(lambda: front.log()[-1]["code"] == "bad_answer", 2)  # written once the last byte is sent
    ok, bad = front.log()[-2:]
    assert list(ok)[:5] == ["ts", "prompt_len", "tokens", "elapsed", "tok_per_s"] and ok["prompt_len"] == len(canary)
    assert (ok["status"], ok["code"], ok["cache"]) == (200, "ok", "miss")
    assert (ok["model"], ok["prompt_tokens"]) == ("fake-8b", 300)
    assert ok["eval_tok_per_s"] == 60 and abs(ok["ts"] - time.time()) < 60
    assert (bad["status"], bad["code"], bad["tokens"]) == (502, "bad_answer", None)
    assert canary not in (front.folder / "log.jsonl").read_text() + (front.folder / "proxy.out").read_text()


def test_log_survives_a_full_disk_and_a_moved_file(tmp_path: Path) -> None:
    full = sp.LogFile("/dev/full")
    full.write({"ts": 1, "code": "busy"})
    full.write({"ts": 2, "code": "busy"})
    assert full.lost == 2

    log = sp.LogFile(str(tmp_path / "x.jsonl"))
    log.write({"ts": 1, "code": "busy"})
    (tmp_path / "x.jsonl").rename(tmp_path / "moved")
    log.write({"ts": 2, "code": "busy"})
    held = [(tmp_path / name).read_text() for name in ("moved", "x.jsonl")]
    assert held == [f'{{"ts": {n}, "code": "busy"}}\n' for n in (1, 2)]


def test_killed_service_leaves_nobody_up(tmp_path: Path) -> None:
    for name in ("a", "b"):  # killed while a was up; then b comes and goes
        log = sp.LogFile(str(tmp_path / "log"))
        log.write({"ts": time.time(), "event": "up", "backend": name, "reason": None})
    log.write({"ts": time.time(), "event": "down", "backend": "b", "reason": "no_tunnel"})
    held, lines = sp.History(), (tmp_path / "log").read_text().splitlines()
    for line in lines:
        held.take(json.loads(line))

    assert [json.loads(line)["event"] for line in lines] == ["up", "start", "up", "down"]
    assert list(held.changes)[1:] == list(log.history.changes) and not held.changes[-1][1]


def test_log_is_rotated_and_five_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sp, "LOG_LIMIT", 100)
    log = sp.LogFile(str(tmp_path / "x.jsonl"))

    for n in range(100):
        log.write({"ts": n, "code": "busy"})

    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["x.jsonl", *(f"x.jsonl.{n}" for n in range(1, 6))]
    ordered = [tmp_path / name for name in [*names[:0:-1], names[0]]]
    held = [json.loads(line)["ts"] for path in ordered for line in path.read_text().splitlines()]
    assert held == list(range(100 - len(held), 100)) and all(path.stat().st_size <= 100 for path in ordered)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a small file system")
def test_log_without_room_fails_nobody_and_goes_on_real(tmp_path: Path) -> None:
    (small := tmp_path / "small").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", small], check=True)
    try:
        with chain(tmp_path, "--log", small / "log") as (server, _):
            assert {server.post("hit").status_code for _ in range(400)} == {200}
            lost, text = server.gauge("scatter_log_lines_lost_total"), (small / "log").read_text()
            os.truncate(small / "log", 0)
            server.post("hit")
            again = wait_for(lambda: (small / "log").read_text(), 2).splitlines()[-1]
            assert server.gauge("scatter_log_lines_lost_total") == lost and json.loads(again)["code"] == "ok"
    finally:
        subprocess.run(["umount", "-l", small], check=True)
    whole = [line for line in text.splitlines() if line.endswith("}") and json.loads(line)]
    assert lost > 0 and len(whole) + lost == 401 and text.count("\n") - len(whole) <= 1


def test_log_rotated_and_moved_under_load_loses_no_line_real(tmp_path: Path) -> None:
    def ask(n: int) -> int:
        if n == 100:
            (tmp_path / "log.jsonl").rename(tmp_path / "moved")
        return server.post(f"rotated {n}").status_code

    with Fake() as fake, proxy(tmp_path, "--backend", fake.url, "--slots", 8, setup="sp.LOG_LIMIT = 25_000") as server:
        server.up()
        with ThreadPoolExecutor(8) as pool:
            assert {*pool.map(ask, range(300))} == {200}
        files = [*tmp_path.glob("log.jsonl*"), tmp_path / "moved"]
        wait_for(lambda: sum(f.read_text().count('"code"') for f in files) == 300, 2, "a line for each")
    ids = [json.loads(line).get("id") for file in files for line in file.read_text().splitlines()]
    assert len({*ids}) == len(ids) == 301 and 4 <= len(files) <= 7


@pytest.mark.skipif(not (FAKETIME := [*Path("/usr/lib").glob("*/faketime/libfaketime.so.1")]), reason="no faketime")
def test_clock_that_jumps_ends_nothing_and_times_nothing_real(tmp_path: Path) -> None:
    (clock := tmp_path / "clock").write_text("+0")
    environ = {"LD_PRELOAD": str(FAKETIME[0]), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1"}
    with Fake() as fake, proxy(tmp_path, "--backend", fake.url, FAKETIME_DONT_FAKE_MONOTONIC="1", **environ) as server:
        with server.up().stream("jumps !pace=0.01") as events, ThreadPoolExecutor() as pool:
            waits = [next(events), pool.submit(server.post, "waits")][1]
            for jump in ("+1d", "-1d", "+1d"):
                clock.write_text(jump)
                assert [next(events)[0] for _ in range(9)] == ["delta"] * 9
            assert [*events][-1][0] == "done" and waits.result().status_code == 200
        assert server.post("waits").headers["x-cache"] == "hit" and server.health()["status"] == "ok"
        wait_for(lambda: len(server.log()) == 4, 2, "the last line, which comes after the answer")
        _, *lines = server.log()
    assert abs(lines[-1]["ts"] - time.time() - 86400) < 60 and [line["code"] for line in lines] == ["ok"] * 3
    assert all(0 <= line[name] < 10 for line in lines for name in ("elapsed", "ttft", "queue_time"))


def test_log_is_served_from_a_byte_on(front: Proxy) -> None:
    front.post("mirrored")
    whole = front.http.get("/log")
    size, tag = len(whole.content), whole.headers["etag"]

    assert whole.status_code == 200 and whole.content == (front.folder / "log.jsonl").read_bytes()
    for asked, status, content, span in (
        ("bytes=10-", 206, whole.content[10:], f"bytes 10-{size - 1}/{size}"),
        ("bytes=0-9", 206, whole.content[:10], f"bytes 0-9/{size}"),
        (f"bytes={size}-", 416, None, f"bytes */{size}"),
        ("lines=1", 200, whole.content, None),
        ("bytes=0-1,3-4", 200, whole.content, None),
    ):
        answer, head = (front.http.request(method, "/log", headers={"range": asked}) for method in ("GET", "HEAD"))
        assert (answer.status_code, answer.headers["etag"], answer.headers.get("content-range")) == (status, tag, span)
        assert answer.content == content if content else code_of(answer) == "no_such_bytes"
        assert (head.status_code, head.headers["content-length"], head.content) == (200, str(size), b"")
    assert front.http.get("/log.1").status_code == 404


def test_log_that_grows_and_rotates_is_served_as_it_was(tmp_path: Path) -> None:
    said: list[Any] = []

    async def send(message: dict[str, Any]) -> None:
        said.append(message)
        scatter.queue.log_file.doRollover() if len(said) == 2 else scatter.queue.log_file.write(line)

    scatter, line = sp.Scatter(sp.Settings(log=str(tmp_path / "log"))), {"ts": 1.0, "code": "busy"}
    (tmp_path / "log").write_text(text := json.dumps(line) + "\n" + f"{'x' * 99}\n" * 9000)
    asyncio.run(scatter({"type": "http", "method": "GET", "path": "/log", "headers": []}, None, send))

    head = {name.decode(): value.decode() for name, value in said[0]["headers"]}
    assert b"".join(part["body"] for part in said[1:-1]).decode() == text and int(head["content-length"]) == len(text)
    assert head["etag"] == f'"{hashlib.sha256(text[: text.index("x")].encode()).hexdigest()[:16]}"'
    assert len(said) == 6 and not said[-1].get("more_body")


@given(st.lists(st.floats(0, 1000), min_size=1, max_size=200))
def test_distribution_counts_each_value_once(values: list[float]) -> None:
    shown, ordered = sp.histogram(values), sorted(values)

    assert sum(shown["counts"]) == len(values) and len(shown["counts"]) == len(shown["edges"]) - 1 <= 24
    assert shown["edges"][0] <= ordered[0] + 1e-9 and ordered[-1] <= shown["edges"][-1] + 1e-9
    told = sp.percentiles(values)
    assert told["max"] == round(ordered[-1], 4) and told["p50"] == round(ordered[(len(values) - 1) // 2], 4)


def test_stats_and_metrics_agree_with_the_log(tmp_path: Path) -> None:
    with chain(tmp_path) as (server, _):
        for prompt in ("a", "b", "a", "c !garbage"):
            server.post(prompt)
        stats = server.http.get("/api/ai-transform/stats").json()
        families = {f.name: f for f in text_string_to_metric_families(server.http.get("/metrics").text)}
        codes = Counter(record["code"] for record in server.log() if "code" in record)

    assert stats["codes"] == codes == {"ok": 3, "bad_answer": 1}
    assert stats["cache"] == {"miss": 2, "joined": 0, "hit": 1} and stats["hit_share"] == pytest.approx(1 / 3, abs=1e-3)
    assert stats["documents"] == len(stats["recent"]) == sum(stats["histogram"]["counts"]) == 2
    assert 0 <= stats["availability"] <= 1 and stats["elapsed"]["p50"] <= stats["elapsed"]["p99"]
    assert {s.labels["code"]: s.value for s in families["scatter_requests"].samples} == codes
    count = [s.value for s in families["scatter_generation_seconds"].samples if s.name.endswith("_count")]
    assert count == [2] and families["scatter_generation_seconds"].type == "histogram"


def test_stats_of_a_log_are_what_a_plain_count_says(tmp_path: Path) -> None:
    chance, now, lines, told = random.Random(7), time.time(), [], []
    for n in range(3000):
        elapsed, cache = chance.lognormvariate(1, 0.6), chance.choice(("miss", "joined", "hit"))
        code = chance.choices(["ok", "busy", "cancelled"], [8, 1, 1])[0]
        told.append({"ts": now - 5000 + n, "code": code, "cache": cache, "elapsed": elapsed, "ttft": elapsed / 5})
        told[-1] |= {"tok_per_s": 200 / elapsed, "tokens": 200}
        lines.append(json.dumps(told[-1]))
    events = [(-5000, "up"), (-4000, "down"), (-3000, "up")]  # up for 2,999 of the 3,999 s that the log spans
    lines += [json.dumps({"ts": now + at, "event": word, "backend": "a"}) for at, word in events]
    told.append({**told[0], "ts": now - 1001})
    lines.append(json.dumps(told[-1]))
    foreign = ["", "no JSON", lines[0][:50], lines[0] + lines[1], "[]", "{}", "1", "[" * 9000, '{"ts": "x"}']
    wrong = [{"ts": now + 3600}, {"ts": -1}, {"ts": math.nan}, {"code": "x\x1b[2J"}]
    numbers = ({"cache": None}, {"elapsed": None}, {"ttft": math.nan}, {"ttft": math.inf})
    wrong += [{"code": "ok", **one} for one in numbers]
    foreign += [json.dumps({**told[0], **one}) for one in wrong]
    foreign += [json.dumps({"ts": now, "event": "up"}), json.dumps({"ts": now, "event": "up", "backend": []})]
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("\n".join([*foreign, *lines[:-2], lines[2][:30]]))
    new.write_text("\n".join(lines[-2:]))  # the last event, and the last line

    result = finished([sys.executable, HERE / "scatter_proxy.py", "stats", new, old])

    rows = [line.split() for line in result.stdout.splitlines()]
    assert result.returncode == 0 and max(map(len, result.stdout.splitlines())) <= 80
    assert f"{len(lines) + len(foreign) + 1:,} lines, {len(foreign) + 1} of them skipped" in result.stdout
    count = Counter(one["code"] for one in told)
    assert {row[1]: int(row[2].replace(",", "")) for row in rows if row and row[0] in ("200", "499", "503")} == count
    hits = sum(one["code"] == "ok" and one["cache"] == "hit" for one in told)
    assert rows[1][:3] == ["3,001", "requests;", f"{hits / count['ok']:.1%}"] and rows[1][-1] == f"{2999 / 3999:.3%}"
    for cache, name in itertools.product(("miss", "joined", "hit"), sp.NUMBERS):
        values = sorted(one[name] for one in told if (one["code"], one["cache"]) == ("ok", cache))
        nearest = [values[math.ceil(share * len(values)) - 1] for share in (0.5, 0.9, 0.95, 0.99, 1)]
        assert [cache, name, f"{len(values):,}", *(f"{value:.2f}" for value in nearest)] in rows
    assert finished([sys.executable, HERE / "scatter_proxy.py", "stats", tmp_path / "none"]).returncode == 1


# --- page ---------------------------------------------------------------------

MARKUP = '<img src=x onerror="alert(1)"></script><b>'
CHROMIUM = ["--no-sandbox", "--disable-features=LocalNetworkAccessChecks"]  # what a test makes up counts as far away
WATCH = """window.broken = []; window.shift = window.before = 0; window.before = new Set(Object.keys(window));
document.addEventListener("securitypolicyviolation", (event) => broken.push(event.violatedDirective));
new PerformanceObserver((list) => { for (const {value} of list.getEntries()) shift += value; }).observe(
  {type: "layout-shift"});"""


@contextlib.contextmanager
def visit(url: str, strict: bool = True, **options: Any) -> Iterator[Any]:
    """A page in Chromium; afterwards no script has failed, no policy was broken and no other origin was asked."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as driver:
        page = driver.chromium.launch(executable_path=path, args=CHROMIUM).new_page(**options)
        wrong, origin = [], "/".join(url.split("/")[:3])
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda one: one.url.startswith((origin, "data:")) or wrong.append(one.url))
        page.on("console", lambda one: one.type != "error" or "status of" in one.text or wrong.append(one.text))
        page.add_init_script(WATCH)
        page.goto(url)
        yield page
        assert not strict or (wrong, page.evaluate("broken")) == ([], [])


def shows(page: Any, selector: str, text: str = "") -> None:
    """Wait until an element that selector finds holds text."""
    page.locator(selector, has_text=text).first.wait_for(timeout=10_000, state="attached")


def send(page: Any, prompt: str) -> None:
    """Ask the model by the keyboard."""
    shows(page, "#send:enabled", "AI Transform")
    page.fill("#prompt", prompt)
    page.keyboard.press("Control+Enter")


def answers(page: Any, status: int = 200, body: str = "", kind: str = "text/html", **headers: str) -> None:
    """Let what stands on the way answer the next POST."""
    answer = {"status": status, "body": body, "content_type": kind, "headers": headers}
    page.route("**/api/ai-transform", lambda route: route.fulfill(**answer), times=1)


def offline(page: Any, reason: str, times: int = 1) -> None:
    """Let the next answers about health be this, and ask for one now."""
    state = {"status": "warming" if reason == "warming" else "offline", "reason": reason}
    page.route("**/health", lambda route: route.fulfill(status=503, json=state), times=times)
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")


def test_page_is_small_names_no_other_origin_and_runs_only_its_own(front: Proxy) -> None:
    assert front.http.get("/").text == front.http.get("/api/ai-transform/page").text == sp.PAGE
    policy = sp.PAGE_HEADERS["Content-Security-Policy"]
    for tag in ("style", "script"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", sp.PAGE, re.DOTALL)
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy

    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert len((sp.PAGE + sp.WIDGET).encode()) <= 40 * 1024
    assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", sp.PAGE + sp.WIDGET) == []
    assert re.findall('placeholder="(.*?)"', sp.PAGE)[0] in SCRIPT.read_text()  # what the smallest model can do


GAP = """Math.min(...[...document.querySelectorAll("dd")].map((figure, n, all) => { const range = new Range();
range.selectNodeContents(figure); return (all[n + 1]?.getBoundingClientRect().left ?? innerWidth)
- range.getBoundingClientRect().right; }))"""  # px from a figure's last digit to the next figure


def test_real_page_tells_place_bands_and_figures_and_comes_back(tmp_path: Path) -> None:
    with chain(tmp_path) as (server, model), visit(server.url) as page, ThreadPoolExecutor() as pool:
        before = [pool.submit(server.post, f"first {n} !pace=0.02") for n in range(3)]
        wait_for(lambda: server.health()["queue"]["waiting"] == 2, 5)
        send(page, "mine !pace=0.02")
        for said in ("place 3", "place 2", "you are next", "writing"):
            shows(page, "#status", said)
            page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
            page.wait_for_function("at('health').dataset.state === 'busy'")
            assert page.inner_text("#reason") == "Ctrl + Enter sends, Esc cancels."
        shows(page, "#status", "Done: 60 tokens written in")
        assert [one.result().status_code for one in before] == [200] * 3
        assert page.locator(".text").all_inner_texts() == [f"{name.lower()} {'é' * 12}" for name in BAND_NAMES]
        assert page.inner_text("#source") == f"fake-8b · {model.url[7:]}"
        figures = [page.inner_text(f"#{name}") for name in ("rate", "time", "tokens", "first")]
        assert all(re.fullmatch(r"\d+(\.\d+)?", figure) for figure in figures)
        shows(page, "#histogram .mark + text", "p50")
        shows(page, "#summary", "4 documents")
        send(page, "mine !pace=0.02")
        shows(page, "#status", "From the cache")
        assert page.evaluate("shift") < 0.001
        page.evaluate("figures({tok_per_s: 34.5, gen_time: 123.45, tokens: 4096, ttft: 12.34}, '≈')")
        page.set_viewport_size({"width": 320, "height": 640})
        assert page.evaluate(GAP) > 4
        model.close()
        shows(page, "#send:disabled[title='model offline']")
        shows(page, "#reason", "not connected. It comes back by itself; Transform works meanwhile.")
        page.click("#standard")
        shows(page, "#status", "Keyword rules in this browser filled 1 of 6 bands. This was not the model")
        page.keyboard.press("Control+Enter")
        shows(page, "#status:not([data-state=bad])", "Keyword rules")  # why is said above it, and only while it is so
        model.open()
        server.up()
        page.wait_for_selector("#send:enabled[title='']", timeout=5000)


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"status": 429, "body": '{"error":{"code":"x","message":"Slow."}}', "retry-after": "5"}, "Slow. Wait 5"),
    ({"status": 502, "body": "<b>nginx</b>"}, "not take the prompt (status 502); try again later"),
    ({"body": "<b>sign in</b>"}, "did not take the prompt (status 200)"),
    ({"kind": "text/event-stream", "body": 'event: delta\ndata: {"n":0,"x":"a"}\n\n'}, "before the answer was whole"),
    ({"kind": "text/event-stream", "body": 'event: delta\ndata: {"n":\n\n'}, "before the answer was whole"),
]


def test_real_page_tells_errors_and_reasons_in_words_and_goes_on(front: Proxy) -> None:
    with visit(front.url) as page:
        for n in range(2):
            send(page, f"stays {n}")
            shows(page, "#status", "Done")
        shows(page, "#charts:not([hidden])")
        page.route("**/stats", lambda route: route.fulfill(status=429, json={"error": {}}), times=1)
        page.evaluate("measure()")
        assert page.is_visible("#charts")
        for prompt, said in (("", "Write a prompt first."), ("refused", "Many.")):
            answers(page, 503, '{"error":{"code":"busy","message":"Many."}}', "application/json")
            send(page, prompt)
            shows(page, "#status[data-state=bad]", said)
            assert page.inner_text(".text >> nth=5").startswith("task") and page.is_enabled("#json")
        page.unroute("**/api/ai-transform")
        for answer, said in BROKEN:
            answers(page, **answer)
            send(page, "faults on the way")
            shows(page, "#status[data-state=bad]", said)
            for width in (360, 1366):  # nobody needs to scroll to see it
                page.set_viewport_size({"width": width, "height": 640})
                box = page.locator("#status").bounding_box()
                assert page.evaluate("scrollY") == 0 and box["y"] + box["height"] <= 640
        for order, code in (("!garbage", "bad_answer"), ("!error !pace=0.01", "backend_failed")):
            send(page, f"the page's {order}")
            shows(page, "#status[data-state=bad]", sp.REFUSALS[code][1])
        for reason, words in re.findall(r'(\w+): "(.*?)"', sp.SCRIPT.split("REASONS = {")[1].split("}")[0]):
            offline(page, reason)
            shows(page, "#reason", words)
            assert page.is_disabled("#send")
        send(page, "faults are over")
        shows(page, "#status", "Done")


def test_real_keyboard_alone_sends_cancels_and_copies(front: Proxy, fake: Fake) -> None:
    with visit(front.url) as page:

        def press(*keys: str) -> str:
            for key in keys:
                page.keyboard.press(key)
            return page.evaluate("document.activeElement.id")

        def hold(*keys: str) -> None:
            for key in (*keys, *keys[-1:] * 9):
                page.keyboard.down(key)
            for key in keys:
                page.keyboard.up(key)

        posts: list[str] = []
        page.on("request", lambda one: one.method == "POST" and posts.append(one.url))
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        shows(page, "#send:enabled")
        assert (press("Tab"), press("Tab")) == ("example", "prompt")  # in the order in which they are seen
        page.keyboard.type("keys alone !hang !bands=60")
        assert press("Tab") == "send" and not page.is_visible("#example")  # it would replace what was typed
        for keys in (["Enter"], ["Control", "Enter"]):
            hold(*keys)
            shows(page, "#status", "writing")
            page.evaluate("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape', isComposing: true}))")
            left = len(fake.left)
            assert page.inner_text("#send") == "Cancel"
            press("Escape")
            shows(page, "#status", "Cancelled. What was written stays.")
            wait_for(lambda before=left: len(fake.left) > before, 1, "the model is free")
        assert len(posts) == 2
        assert page.is_disabled("#json") and press("Tab", "Enter") == "standard"
        shows(page, "#status", "This was not the model")
        assert press("Tab", "Enter") == "json"
        shows(page, "#status", "Copied")
        page.evaluate("new MutationObserver((list) => { window.heard = 1; }).observe(at('status'), {childList: true})")
        press("Enter")
        page.wait_for_function("window.heard", timeout=2000)  # a second time
        assert sinc_prompt.validate(json.loads(page.evaluate("navigator.clipboard.readText()"))) == (True, [])


def test_real_markup_stays_text(tmp_path: Path) -> None:
    (tmp_path / "backends").mkdir()
    (model := Fake(tmp_path / "backends" / "gpu.sock")).model = MARKUP
    with model, proxy(tmp_path, "--backend", "none") as server, visit(server.up().url) as page:
        send(page, MARKUP)
        shows(page, "#status", "Done")
        assert page.inner_text("#source") == f"{MARKUP} · gpu"
        said = {"backend": MARKUP, "model": "x", "n": 0, "x": MARKUP, "error": {"code": MARKUP, "message": MARKUP}}
        text = "".join(f"event: {name}\ndata: {json.dumps(said)}\n\n" for name in ("started", "delta", "error"))
        answers(page, 200, text, "text/event-stream")
        send(page, MARKUP)
        shows(page, "#status", MARKUP)
        assert page.inner_text("#source") == f"x · {MARKUP}" and page.inner_text(".text >> nth=0") == MARKUP
        page.click("#standard")
        shows(page, "#status", "This was not the model")
        assert page.inner_text(".text >> nth=5") == MARKUP and page.locator("img, b").count() == 0
        assert server.log()[-1]["model"] == MARKUP
        served = [server.http.get(path).headers for path in ("/log", "/metrics", "/stats", "/health")]
        assert not [head for head in served if "html" in head["content-type"]]


EXAMPLE = re.findall("```html\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)[0]


@NEEDS_NGINX
def test_real_readme_page_works_in_another_server_block(front: Proxy, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(EXAMPLE)
    with nginx(tmp_path, front.url[7:], is_limited=True) as url, visit(url) as page:
        assert page.evaluate("Object.keys(window).filter((name) => !before.has(name))") == ["scatter"]
        page.click("button")
        shows(page, "#bands:not([aria-busy]) [data-band='5'] p", "é")
        assert page.locator("#bands strong").all_inner_texts() == BAND_NAMES
        styled = "document.styleSheets.length + document.querySelectorAll('[style], [class]').length"
        assert page.evaluate(styled) == 0
        answers(page, 503, '{"error":{"code":"busy","message":"Many."}}', "application/json")
        page.click("button")
        shows(page, "#bands [data-error=busy][role=alert]", "Many.")
        offline(page, "paused")
        shows(page, "button:disabled[title='model offline']")
        page.click("[data-scatter-standard]")
        shows(page, "#bands:not([aria-busy]) [data-band='5'] p", "picnic")
        shows(page, "button:enabled[title='']")
        assert page.evaluate("scatter('x', {signal: AbortSignal.abort()}).catch((e) => e.code)") == "cancelled"


EMPTY = "".join(f"<div data-band={n}></div>" for n in range(6))
EMPTY = f"""<div id=bands>{EMPTY}</div><p id=prompt>bare</p><button data-scatter-from=#prompt data-scatter-to=#bands>1
</button><button data-scatter-from=#prompt data-scatter-to=#gone>2</button>
<script src=/api/ai-transform/transform.js></script>"""


def test_real_widget_fills_empty_bands_and_says_what_a_page_lacks(front: Proxy) -> None:
    with visit(front.url, strict=False) as page:
        page.route("**/bare", lambda route: route.fulfill(body=EMPTY, content_type="text/html"))
        page.goto(f"{front.url}/bare")
        for _ in range(2):
            page.click("button >> nth=0")
            shows(page, "#bands:not([aria-busy]) [data-band='5'] p", "é")
            assert page.locator("#bands p").count() == 6
        with page.expect_console_message(lambda said: said.text == "scatter: there is no #gone", timeout=2000):
            page.click("button >> nth=1")
        wrong = "['', 5, null, undefined].map((one) => scatter(one).catch((e) => e.code))"
        assert page.evaluate(f"Promise.all({wrong})") == ["bad_request"] * 4


def test_real_widget_works_on_another_site_where_it_is_allowed(front: Proxy, fake: Fake, tmp_path: Path) -> None:
    site = "http://other.localhost"
    flags = ["--backend", fake.url, "--allow-origin", site]
    with visit(front.url, strict=False) as page, proxy(tmp_path, *flags) as allowed:
        page.route(f"{site}/", lambda route: route.fulfill(body=example, content_type="text/html"))
        for server in (front, allowed.up()):
            example = EXAMPLE.replace('src="', f'src="{server.url}')
            page.goto(site)
            if server is front:
                shows(page, "button:disabled[title='model offline']")
                assert page.evaluate("scatter('x').catch((e) => e.code)") == "unreachable"  # browsers hide the refusal
        page.click("button")
        shows(page, "#bands:not([aria-busy]) [data-band='5'] p", "é")
        call = {"method": "POST", "headers": {"content-type": "application/json"}, "body": '{"prompt": "x"}'}
        ask = "([url, call]) => fetch(url, call).then((reply) => reply.headers.get('x-tok-per-s'))"
        assert float(page.evaluate(ask, [f"{allowed.url}/api/ai-transform", call])) > 0


RULES: dict[str, dict[int, str]] = {
    "How do I optimize my database?": {5: "How do I optimize my database?"},
    "List my todo items; listen to unlimited input.": {5: "List my todo items; listen to unlimited input."},
    "You are a chemist. I am new here. Never guess. Answer as a table. Explain why ice floats.": {
        0: "You are a chemist.", 1: "I am new here.", 3: "Never guess.", 4: "Answer as a table.",
        5: "Answer as a table.\nExplain why ice floats."},
    "You are free. Sum up the following:\nPi is 3.14.\n\nFormat:\n- bullets\n- short": {
        2: "Pi is 3.14.", 4: "- bullets\n- short", 5: "You are free.\nSum up the following"},
    "Here is the data: 1, 2. Data: 3": {2: "1, 2. Data: 3", 5: "Here is the data"},
    "It rains. I am wet. Why?": {1: "It rains.\nI am wet.", 5: "Why?"},
    "```py\nx = 1\n```": {2: "x = 1"},
    "blue": {5: "blue"},
}  # fmt: skip
EVERYDAY = """\
Write a welcome e-mail for new customers. We are a small bakery in Porto. Plain text, never more than 120 words.
Can you help me plan a 3-day trip to Rome with two kids in July? We like museums but not crowds. Budget is 900 euros.
Translate this into French: The invoice is due on Friday.
Act as a senior developer. Review the following code and point out bugs:||def f(x):|    return x + 1||Keep it short.
Review this code:||def f(x):|    return x
Explain quantum computing like I'm five.
I have a job interview at a bank tomorrow. What questions should I prepare for?
Summarize the text below in 3 bullet points.||The quick brown fox jumps over the lazy dog. It never stops.
You are an experienced tax advisor. My wife and I earn 80k together. Should we file jointly? At most 200 words.
Give me a recipe for vegan lasagna without tofu, serves 4.
Fix the grammar: he go to school yesterday
Write a SQL query for the top 10 customers by revenue. Tables: orders(id, total), customers(id). Return only the SQL.
Create a 12-week marathon training plan as a table. I can run 3 times a week. Avoid hills.
write a haiku about rain
Please draft a polite reply to my landlord. He wants to raise the rent by 15%. I've lived here for 6 years. Be firm.
Compare the two phones in a table. Don't mention price.
Generate 5 names for a coffee shop. The names should be short. No puns!
What's the difference between TCP and UDP? Use an analogy.
Schreibe eine E-Mail an meinen Chef. Ich bin krank. Maximal drei Sätze.
Our team of 6 uses a tracker. Meetings run too long. Suggest improvements; list at most five. The readers are managers.
Role: copywriter|Context: we sell bikes|Task: write a slogan|Format: one line
Write a function to reverse a string in Rust. It must handle Unicode. Add tests.
Rewrite the paragraph. "We was happy." Keep the meaning the same.
My address is bob@example.com. Here are my notes: milk, eggs, call mum. Turn them into a to-do list.
"""  # a prompt a line; | parts its own lines
HOSTILE = ["a:" * 8000, "in " * 5333, "```" * 5000, ". " * 8000, "the following " * 1140, "#" * 16000, '"""' * 5000]


def test_real_standard_documents_are_valid_and_hold_only_what_was_said(front: Proxy) -> None:
    with visit(front.url) as page:
        for prompt in [*RULES, *HOSTILE]:
            began = time.monotonic()
            document = page.evaluate("(prompt) => scatter.standard(prompt)", prompt)
            assert time.monotonic() - began < 1 and sinc_prompt.validate(document) == (True, []), prompt[:30]
            assert prompt in HOSTILE or {one["n"]: one["x"] for one in document["fragments"]} == RULES[prompt]
        for prompt in (line.replace("|", "\n") for line in EVERYDAY.splitlines()):
            said = set(re.findall(r"\w+", re.sub(r"(?m)^\w+: ", "", prompt)))  # but for the names of bands
            kept = " ".join(one["x"] for one in page.evaluate("scatter.standard", prompt)["fragments"])
            assert said - set(re.findall(r"\w+", kept)) == set(), prompt


def test_real_page_has_no_axe_violation_in_any_state(front: Proxy) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    states = {"axe !hang !bands=60": "writing", "": "Cancelled", "axe !garbage": "try again", "axe !bands=200": "Done"}
    with visit(front.url + "/api/ai-transform/page") as page:

        def check(selector: str, text: str = "") -> None:
            shows(page, selector, text)
            for width, scheme in ((360, "dark"), (768, "light"), (1440, "light"), (1440, "dark")):
                page.set_viewport_size({"width": width, "height": 900})
                page.emulate_media(color_scheme=scheme)
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                found = axe.run(page).response["violations"]
                assert [(text, width, scheme, one["id"], one["nodes"][0]["html"][:99]) for one in found] == []

        check("#send:enabled")
        for prompt, said in states.items():
            send(page, prompt) if prompt else page.keyboard.press("Escape")
            check("#status", said)
        page.click("#whole")
        page.click("#standard")
        offline(page, "paused", times=99)
        check("#send:disabled")


FRAMES = """(() => { const tick = (now) => { times.push(now); requestAnimationFrame(tick); };
window.times = []; window.painted = 0; requestAnimationFrame(tick);
new MutationObserver((list, self) => { self.disconnect();
  requestAnimationFrame(() => setTimeout(() => { painted = Date.now(); })); }).observe(
  document.querySelector(".text"), {childList: true}); })()"""


HIDDEN = """(() => { const range = new Range(), text = document.querySelector(".text"); range.selectNodeContents(text);
return range.getBoundingClientRect().bottom - text.getBoundingClientRect().bottom; })()"""  # px below its edge


def test_real_first_words_are_painted_at_once_and_long_bands_stay_smooth(front: Proxy) -> None:
    prompt = "smooth !first=1 !pace=0.015 !bands=3335"
    with visit(front.url, viewport={"width": 1440, "height": 900}) as page:
        send(page, prompt)
        page.evaluate(FRAMES)
        with front.stream(prompt) as events:
            sent = next(time.time() for name, _ in events if name == "delta")
        shows(page, "#status", "Done")
        frames, late = page.evaluate("times"), page.evaluate("painted") - sent * 1000
        rate = (len(frames) - 1) / (frames[-1] - frames[0]) * 1000
        print(f"first words painted {late:.0f} ms after the proxy sent them; 20,000 characters at {rate:.1f} frames/s")
        assert late <= 100 and rate >= 50 and page.evaluate("shift") < 0.001
        send(page, "follow !hang !bands=5000")
        shows(page, ".text", "é" * 1300)
        assert page.evaluate(HIDDEN) < 0  # the newest words are in sight
        page.emulate_media(forced_colors="active")
        outline = "getComputedStyle(document.querySelector('.band[data-state=\\'%s\\']')).outlineStyle"
        assert [page.evaluate(outline % state) for state in ("writing", "")] == ["solid", "none"]
        page.keyboard.press("Escape")
        shows(page, "#status", "Cancelled")
        assert page.evaluate(HIDDEN) > 0  # the first ones
        page.emulate_media(media="print", forced_colors="none")
        assert page.evaluate(HIDDEN) < 0


# --- tunnel: ssh command and judging ------------------------------------------


def soon(answer: Callable[[], Any], seconds: float = 10) -> Any:
    """Return answer() as soon as it is true, where what is not there yet is no failure."""

    def asked() -> Any:
        with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
            return answer()
    return wait_for(asked, seconds)


@pytest.fixture
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SCATTER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def tunnel_settings(home: Path, **flags: str) -> tunnel.Settings:
    own = {"destination": "me@vps", "name": "gpu", "remote": "/run/x.sock", "identity": "/k", "mirror": "none"}
    return tunnel.parse_settings(home, {**own, **flags})


def test_tunnel_flag_wins_over_file_over_default(tmp_path: Path) -> None:
    (tmp_path / "tunnel.json").write_text('{"model": "m1", "context": 4096}')
    s = tunnel_settings(tmp_path, model="m2")
    assert (s.model, s.context, s.max_tokens) == ("m2", 4096, 4096)


def test_tunnel_path_is_where_it_was_typed_or_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tunnel.json").write_text('{"identity": "key2"}')
    monkeypatch.chdir(Path("/usr"))
    s = tunnel_settings(tmp_path, identity=None, mirror="../m", log_file="")
    assert (s.identity, s.mirror, s.log_file) == (str(tmp_path / "key2"), "/m", "")


UNFIT = ["--name=Bad_Name", "--name=" + "a" * 33, "--target=127.0.0.1", "--target=h:65536", "--remote=0.0.0.0:11434"]
UNFIT += ["--destination=-oProxyCommand=x", "--ssh-port=0", "--remote=/run/../x;y", "--context=x", "--model=a b"]


def test_tunnel_setting_that_cannot_work_is_named(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flag, _, value in (setting.partition("=") for setting in [*UNFIT, "--keep-alive=-2"]):
        status = tunnel.main(["run", "--", value] if flag == "--destination" else ["run", "me@vps", flag, value])
        assert status == 2 and flag in capsys.readouterr().err, (flag, value)
    at_home.mkdir()
    files = ("key", "", ""), ("key.pub", "", "no public key"), ("tunnel.json", '{"max-tokens": 5}', "max-tokens")
    for name, text, said in files:
        (at_home / name).write_text(text)
        assert not said or tunnel.main(["key"]) and said in capsys.readouterr().err
    (at_home / "tunnel.json").unlink()
    assert tunnel.main(["setup", "", "--domain", "x.org"]) == 2 and "no VPS given" in capsys.readouterr().err


def test_tunnel_ssh_command_is_valid_and_pinned(tmp_path: Path) -> None:
    home = tmp_path / r"""a home's spaces, 100%h and "q\uotes" """
    settings = tunnel_settings(home, identity=str(home / "key"))
    command = tunnel.ssh_command(settings, home, 5, str(tmp_path / "front.sock"))
    said = subprocess.run(["ssh", "-G", *command[1:]], capture_output=True, text=True, check=True).stdout
    assert f"userknownhostsfile {home}/known_hosts {Path.home()}/.ssh/known_hosts\n" in said
    assert f"identityfile {home}/key\n".replace("%", "%%") in said  # ssh -G shows it before it is expanded
    expected = "stricthostkeychecking true,batchmode yes,exitonforwardfailure yes,serveraliveinterval 3,forwardagent no"
    expected += ",serveralivecountmax 2,connecttimeout 5,controlmaster false,updatehostkeys false"
    assert set(expected.split(",")) <= set(said.splitlines())
    assert command[-2:] == ["--", "me@vps"] and "/run/x.sock:127.0.0.1:5" in command
    text = Path(tunnel.__file__).read_text().split("def ssh_command")[1].split("def front_address")[0]
    options = re.findall(r'^ {8}f?"(\w+=.*)$', text, re.MULTILINE)
    assert options and all("#" in o or "CountMax" in o or "ControlPath" in o for o in options), "one without its reason"


# kind, pace, and what ssh said (9.2 and 9.9); / parts sayings, | the lines of one
SSH_SAID = """\
network soon ssh: connect to host vps port 22: Connection refused / client_loop: send disconnect: Broken pipe / \
ssh: connect to host vps port 22: Connection timed out / ssh: connect to host vps port 22: Network is unreachable / \
Connection timed out during banner exchange / kex_exchange_identification: Connection closed by remote host
name soon ssh: Could not resolve hostname nope.invalid: Name or service not known
silent soon Timeout, server 1.2.3.4 not responding.
auth slow me@vps: Permission denied (publickey,password). / Received disconnect from 1.2.3.4 port 22:2: Too many \
authentication failures
key_file slow @ WARNING: UNPROTECTED PRIVATE KEY FILE! @|Load key "k": bad permissions|me@vps: Permission denied (x).
host_key_changed slow @ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @|Host key verification failed.
host_key_unknown slow No ED25519 host key is known for vps and you have requested|Host key verification failed.
banned slow debug1: kex_exchange_identification: banner line 0: Not allowed at this time|kex_exchange_identification: \
Connection closed by remote host
forward_refused slow debug1: Remote: port forwarding refused|Error: remote port forwarding failed for listen port 80 / \
debug1: Remote: Server has disabled streamlocal forwarding.|Error: remote port forwarding failed for listen path x
path_taken soon Error: remote port forwarding failed for listen path /x
port_taken busy Error: remote port forwarding failed for listen port 11434
front_taken soon unix_listener: cannot bind to path /h/front.sock: In use|Could not request local forwarding. / \
bind [127.0.0.1]:9: In use|channel_setup_fwd_listener_tcpip: cannot listen to port: 9
ssh_options slow command-line: line 0: Bad configuration option: identityagent
no_agreement slow Unable to negotiate with 1.2.3.4 port 22: no matching host key type found. Their offer: ssh-rsa
dropped soon channel 1: open failed: connect failed: Connection refused / """


def test_tunnel_each_end_of_ssh_is_told_apart() -> None:
    places = {"destination": "me@vps", "port": 22, "identity": "/k", "remote": "/x", "known_hosts": "/kh"}
    for kind, pace, sayings in (row.split(" ", 2) for row in SSH_SAID.split("\n")):
        for words in sayings.split(" / "):
            said = "debug1: Connecting to vps [1.2.3.4] port 22.\n" + words.replace("|", "\n")
            failure = tunnel.judge(255, said, places)
            assert (failure.kind, failure.pace) == (kind, pace), words
            assert kind != "name" or "~/.ssh/config is not read" in failure.cure
            assert failure.cure and "{" not in failure.cure and failure.seen.isprintable() and len(failure.seen) <= 200


def test_tunnel_delays_have_jitter_and_bounds() -> None:
    def upper(low: float, high: float) -> float:
        return high
    assert [tunnel.next_delay("soon", n, upper) for n in range(1, 9)] == [0.25, 0.5, 1, 2, 4, 8, 15, 15]
    assert all(0 <= tunnel.next_delay("soon", 9) <= 15 for _ in range(100))
    slow = [tunnel.next_delay("slow", n) for n in range(1, 50)]
    assert min(slow) >= 60 and max(slow) <= 300 and tunnel.next_delay("slow", 9, upper) == 300
    assert tunnel.next_delay("busy", 7) == 2.0


def test_tunnel_whose_dial_is_overtaken_by_a_wake_dials_at_once(at_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Overtaken(tunnel.Tunnel):
        async def _dial(self, front: str) -> tunnel.Failure:
            dials.append(self.redial("this machine slept") if not dials else None)
            return tunnel.judge(255, "", {})
    dials: list[None] = []
    monkeypatch.setattr(tunnel, "next_delay", lambda *_: 60)
    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(asyncio.wait_for(Overtaken(tunnel_settings(at_home), at_home)._supervise(), 0.05))
    assert len(dials) == 2


CHOICES = [("", "a sinc-scatter:latest", "a", "sinc-scatter"), ("", "a b", "b", "b"), ("", "a", "", "a")]
CHOICES += [("x", "a", "a", "x"), ("", "a b", "", None), ("", "a b", "a b", None), ("", "", "", None)]


def test_tunnel_model_is_chosen() -> None:
    for wanted, installed, loaded, model in CHOICES:
        name, note = tunnel.chosen_model(wanted, installed.split(), loaded.split())
        assert name == (model or "sinc-scatter") and bool(note) == (model is None or wanted != ""), (wanted, installed)


def test_tunnel_outlives_deep_json_from_the_vps() -> None:
    with Played() as door:
        door.get = lambda request: door.reply(request, b"[" * 200_000)
        with contextlib.closing(tunnel.Line(door.at)) as line:
            assert tunnel.probe(line)[:2] == (True, None) and tunnel.ask_once(door.at, "/health") == (200, None)


def test_tunnel_state_that_cannot_be_written_is_not_told(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held, lock = tunnel.Tunnel(tunnel_settings(at_home), at_home), tunnel.lock(at_home)
    held._save()
    assert (at_home / "state.json").exists()
    (at_home / "state.json.new").mkdir()  # as good as a full disk
    held.state["dials"] = 1
    held._save()
    with lock:
        assert tunnel.main(["status"]) == 1 and "no room" in capsys.readouterr().out


def test_tunnel_starts_though_its_lock_was_held_for_an_instant(at_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def stopped(self: tunnel.Tunnel) -> int:
        return 0
    monkeypatch.setattr(tunnel.Tunnel, "run", stopped)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    held = tunnel.lock(at_home)
    threading.Timer(0.05, held.close).start()
    assert tunnel.main(["run", "me@vps"]) == 0


def test_tunnel_probe_verdicts() -> None:
    gpu = {"name": "gpu", "up": False, "reason": "silent_link"}
    health = {"backends": [gpu, {"name": "127.0.0.1:9", "up": True, "reason": None}]}
    assert tunnel.backend_is_down(health, "/run/b/gpu.sock") and tunnel.backend_is_down(health, "/run/b/other.sock")
    assert not tunnel.backend_is_down(health, "127.0.0.1:9") and not tunnel.backend_is_down(None, "/x")
    gpu["reason"] = "paused"
    assert not tunnel.backend_is_down(health, "/run/b/gpu.sock")
    assert not tunnel.probe_verdict(1, 9.9, 10)
    assert tunnel.probe_verdict(2, 0, 10) and tunnel.probe_verdict(0, 10, 10)


@pytest.mark.parametrize("here", [True, False])
def test_tunnel_is_not_redialled_for_a_model_server_that_is_away(
        here: bool, at_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(tunnel, "PROBE_EVERY", 0.01)
    monkeypatch.setattr(tunnel, "FRONT_PATIENCE", (0.05, 1.0))
    gpu = {"name": "x", "up": False, "reason": "no_model_server"}
    with Played() as door, Played() as model:
        door.get = lambda request: door.reply(request, json.dumps({"backends": [gpu]}).encode())
        held = tunnel.Tunnel(tunnel_settings(at_home, target=model.at), at_home)
        held.up_at = 1.0
        held.state.update(front=door.at, model_server="ollama")  # as the last look saw it
        if not here:
            model.__exit__()
        with pytest.raises(asyncio.TimeoutError):
            asyncio.run(asyncio.wait_for(held._probe(), 0.3))
        assert bool(held.reason) == here


def test_tunnel_needs_the_standard_library_of_39_alone() -> None:
    subprocess.run([sys.executable, "-c", "import vermin; vermin.main()", "-t=3.9-", tunnel.__file__], check=True)
    tree = ast.parse(Path(tunnel.__file__).read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {n.split(".")[0] for n in names} <= sys.stdlib_module_names


def gone(pid: int) -> bool:
    """Return whether a process has ended, be it collected or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_tunnel_elsewhere_a_shell_ends_ssh_when_we_end(tmp_path: Path) -> None:
    command, how = tunnel.leashed(["sh", "-c", f"echo $$ > {tmp_path}/pid; exec sleep 60"], "darwin")
    shell = subprocess.Popen(command, stderr=subprocess.PIPE, **how)
    pid = int(soon(lambda: (tmp_path / "pid").read_text()))
    assert shell.stdin and not gone(pid)
    shell.stdin.close()
    wait_for(lambda: gone(pid), 3)
    assert shell.wait(3) != 0
    command, how = tunnel.leashed(["sh", "-c", "exit 7"], "darwin")
    assert subprocess.Popen(command, **how).wait(3) == 7


# --- tunnel: services ---------------------------------------------------------


@pytest.mark.parametrize("admin", [True, False])
def test_tunnel_plist_and_task_say_what_they_must(admin: bool) -> None:
    where = (Path("/o p/100%/tunnel.py"), Path('/h & "q"'), "me", Path("/home/me"))
    mac, windows = (tunnel.service(system, admin, "/usr/bin/python3", *where).text for system in ("darwin", "win32"))
    plist = plistlib.loads(mac.encode())
    assert plist["KeepAlive"] is True and plist["EnvironmentVariables"]["SCATTER_HOME"] == '/h & "q"'
    assert plist["ProgramArguments"][1:3] == ["/o p/100%/tunnel.py", "run"]
    task = ElementTree.fromstring(windows.replace('encoding="UTF-16"', ""))
    order = [e.tag.split("}")[1] for e in task]
    assert order == ["RegistrationInfo", "Triggers", "Principals", "Settings", "Actions"]  # the schema's sequence
    said = {e.tag.split("}")[1]: e.text for e in task.iter()}
    expected = {"ExecutionTimeLimit": "PT0S", "DisallowStartIfOnBatteries": "false", "StopIfGoingOnBatteries": "false"}
    expected |= {"MultipleInstancesPolicy": "IgnoreNew", "LogonType": "S4U" if admin else "InteractiveToken"}
    assert expected.items() <= said.items() and '"/o p/100%/tunnel.py" run' in str(said["Arguments"])
    assert ("BootTrigger" if admin else "LogonTrigger") in said


def test_tunnel_unit_means_any_path_as_it_is() -> None:
    unit = tunnel.service("linux", True, "/py", Path('/s$c/100%"/t.py'), Path("/h$x/100%"), "me", Path("/home/me")).text
    assert r'ExecStart="/py" "/s$$c/100%%\"/t.py" "run"' in unit and 'Environment="SCATTER_HOME=/h$x/100%%"' in unit


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze")
@pytest.mark.parametrize("admin", [True, False])
def test_tunnel_unit_is_accepted_and_confined_real(admin: bool, tmp_path: Path) -> None:
    unit, script, home = tmp_path / "scatter-tunnel.service", Path(tunnel.__file__), Path("/var/lib/scatter")
    unit.write_text(tunnel.service("linux", admin, sys.executable, script, home, "me", Path("/home/me")).text)
    verify = finished(["systemd-analyze", "verify", "--man=no", unit])
    assert verify.returncode == 0 and unit.name not in verify.stderr, verify.stderr
    score = ["systemd-analyze", "security", "--offline=true", "--threshold=15", unit]
    assert not admin or subprocess.run(score, stdout=subprocess.DEVNULL, check=False).returncode == 0


def test_tunnel_that_cannot_work_here_says_why_in_one_line(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setenv("PATH", "")
    (tmp_path / "file").touch()
    setup = ["setup", "me@vps", "--domain", "x.org"]
    cases = (["key"], "", "ssh-keygen: "), (setup, "", "ssh: No such"), (["status"], "file/x", "/x:")
    for command, home, said in cases:
        monkeypatch.setenv("SCATTER_HOME", str(tmp_path / home))
        assert tunnel.main(command) == 1
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error
    monkeypatch.setattr(tunnel, "home_folder", lambda: signal.raise_signal(signal.SIGINT))
    assert tunnel.main(["status"]) == 130


def test_tunnel_install_shows_each_file_and_changes_nothing(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tunnel.main(["install", "me@vps", "--model", "m", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert '"model": "m"' in said and "ExecStart=" in said and "systemctl" in said and not at_home.exists()
    assert "starts with this machine" not in said


@pytest.mark.skipif(bool(os.geteuid()), reason="needs root")
def test_tunnel_root_writes_and_reads_in_a_home_as_its_owner_does() -> None:
    with tempfile.TemporaryDirectory() as folder:
        where, nobody = Path(folder), 65534
        home, secret = where / "home", where / "secret"
        where.chmod(0o755)
        home.mkdir(mode=0o700)
        secret.write_text("root's own")
        secret.chmod(0o600)
        for name in ("pause.json.new", "known_hosts"):
            (home / name).symlink_to(secret)
        os.chown(home, nobody, nobody)
        env = {**os.environ, "SCATTER_HOME": folder + "/home"}
        pause = [sys.executable, tunnel.__file__, "pause", "--target", "127.0.0.1:9"]
        assert finished(pause, env=env).returncode
        assert finished([*pause[:2], "run", "me@vps", "--log-file", secret], env=env).returncode
        with tunnel.as_owner(home), pytest.raises(PermissionError):
            (home / "known_hosts").read_text()
        assert (os.geteuid(), secret.read_text(), secret.stat().st_uid) == (0, "root's own", 0)
        (home / "pause.json.new").unlink()
        assert finished(pause, env=env).returncode == 0 and (home / "pause.json").stat().st_uid == nobody


# --- tunnel: setup ------------------------------------------------------------


def test_setup_pins_the_host_keys_of_today() -> None:
    old = "vps ssh-ed25519 OLD\n[vps]:2222 ssh-rsa OLD\nother ssh-ed25519 KEPT\n"
    new = tunnel.pinned(old, "vps", 2222, ["ssh-ed25519 A", "ssh-rsa B"])
    assert new == "other ssh-ed25519 KEPT\nvps,[vps]:2222 ssh-ed25519 A\nvps,[vps]:2222 ssh-rsa B\n"
    assert tunnel.pinned(new, "vps", 2222, ["ssh-ed25519 A", "ssh-rsa B"]) == new


def test_setup_words_mean_the_same_in_the_shell_there() -> None:
    files = tunnel.bundle({"install.sh": b"printf '%s|' \"$@\"\r\nexit 7\r\n"})  # as git on Windows leaves it
    sent = subprocess.run(["sh", "-c", tunnel.RECEIVE], input=files, stdout=subprocess.PIPE, check=False)
    there = re.search(r"scatter: \d+ (\S+)", sent.stdout.decode())
    assert there
    ran = finished(["sh", "-c", tunnel.install_there(there[1], True, ["--domain", "a b'c"])])
    assert (ran.returncode, ran.stdout) == (7, "vps|--domain|a b'c|") and not Path(there[1]).exists()


def test_setup_that_cannot_log_in_says_so_in_one_line(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["setup", "me@127.0.0.1", "--ssh-port", "1", "--domain", "shop.test"]
    assert tunnel.main(command) == 1 and "ssh me@127.0.0.1: status 255; mend what it says" in capsys.readouterr().err
    assert tunnel.main([*command, "--name", "A B"]) == 2


FAKE_SSH = """#!/bin/sh
case "$*" in
*-G*) echo hostname vps.example; echo port 22 ;;
*tar*) cat >/dev/null; echo scatter: 0 /tmp/scatter.abc; echo ssh-ed25519 AAAA ;;
*) echo "$*" >>"$0.log" ;;
esac"""


def test_setup_dry_run_changes_nothing(at_home: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bin_folder = at_home.parent / "bin"
    bin_folder.mkdir()
    (bin_folder / "ssh").write_text(FAKE_SSH)
    (bin_folder / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")
    assert tunnel.main(["setup", "root@vps", "--domain", "x.org", "--dry-run"]) == 0
    said, sent = capsys.readouterr().out, (bin_folder / "ssh.log").read_text()
    assert "would write" in said and "starts with" not in said and not at_home.exists()
    assert re.search(r"--authorize .*ssh-ed25519 \S+ gpu-\w{4}\W+--dry-run", sent)


# --- tunnel: guard ------------------------------------------------------------

OWNERS_LIMITS = tunnel.Limits("my-model", 8192, 4096, "-1")


def test_guard_makes_bodies_anew() -> None:
    def remade(path: str, body: Any) -> Any:
        return json.loads(tunnel.remade_body(path, json.dumps(body).encode(), OWNERS_LIMITS))
    text = {"type": "string", "maxLength": 9}
    schema = {"type": "object", "properties": {"a": text}, "required": ["a"], "additionalProperties": False}
    hostile = {**schema, "properties": {"a": {**text, "pattern": "x", "$ref": "http://h", "minItems": 99}}}
    asked = {"model": "other", "prompt": "hi", "keep_alive": 0, "images": ["x"], "raw": True, "template": "t"}
    asked |= {"context": [1], "format": hostile, "stream": True, "think": None}
    asked["options"] = {"num_ctx": 10**9, "num_predict": -1, "num_gpu": 99, "seed": 7, "temperature": 0.3}
    made = {"model": "my-model", "prompt": "hi", "stream": True, "keep_alive": -1, "format": schema}
    made["options"] = {"num_ctx": 8192, "num_predict": 4096, "seed": 7, "temperature": 0.3}
    assert remade("/api/generate", asked) == made
    longest = {"format": sp.band_schema(10**6)}
    assert remade("/api/generate", longest)["format"] == longest["format"]
    assert remade("/api/generate", {})["options"] == {"num_predict": 4096, "num_ctx": 8192}
    chat = {"messages": [{"role": "user", "content": "é", "name": "n"}], "n": 9, "max_tokens": 99999, "tools": []}
    made = {"model": "my-model", "messages": [{"role": "user", "content": "é"}], "max_tokens": 4096}
    assert remade("/v1/chat/completions", {"model": "o", **chat}) == made


MISFITS = [b"", b"[]", b"{", b"\xff", b'{"prompt": 1}', b'{"prompt": "\\ud800"}', b'{"options": []}', b"[" * 200_000]
MISFITS += [b'{"format": "xml"}', b'{"stream": "yes"}', b'{"format": ' + b'{"items": ' * 5000 + b"{}" + b"}" * 5001]
UNFIT_OPTIONS = [b'"temperature": NaN', b'"temperature": 1e999', b'"seed": true', b'"num_ctx": "9"']


def test_guard_refuses_a_body_that_does_not_fit() -> None:
    bomb = {"properties": {f"p{n}": {"type": "string", "maxLength": 1900} for n in range(60)}}
    chat = json.dumps({"response_format": {"type": "json_schema", "json_schema": {"schema": bomb}}}).encode()
    with pytest.raises(tunnel.Refused):
        tunnel.remade_body("/v1/chat/completions", chat, OWNERS_LIMITS)
    options = [b'{"options": {%s}}' % option for option in [*UNFIT_OPTIONS, b'"seed": ' + b"9" * 100_000]]
    for body in [*MISFITS, *options, json.dumps({"format": bomb}).encode()]:
        began = time.monotonic()
        with pytest.raises(tunnel.Refused):
            tunnel.remade_body("/api/generate", body, OWNERS_LIMITS)
        assert time.monotonic() - began < 0.5, body[:40]


KEYS = st.sampled_from([*map(str, tunnel.SCHEMA), *(key for rules in tunnel.BODIES.values() for key in rules)])
THINGS = st.recursive(st.sampled_from(["json", "x", 5, None, True, -1e9]), lambda inner: st.lists(inner, max_size=3)
                      | st.dictionaries(KEYS | st.sampled_from(["$ref", "model", "num_ctx"]), inner))  # fmt: skip


@budget(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(tunnel.BODIES)), st.dictionaries(KEYS, THINGS))
def test_guard_makes_a_body_that_it_makes_the_same_again(path: str, asked: dict[str, Any]) -> None:
    with contextlib.suppress(tunnel.Refused):
        made = tunnel.remade_body(path, json.dumps(asked).encode(), OWNERS_LIMITS)
        assert tunnel.remade_body(path, made, OWNERS_LIMITS) == made and b'"$ref":' not in made
        assert {*json.loads(made)} <= {*tunnel.BODIES[path], "model", "keep_alive"}
        assert json.loads(made)["model"] == "my-model"


@budget(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 3), st.binary(max_size=3) | st.just(b"\r\n")), max_size=3))
def test_guard_reads_a_head_as_another_reader_does_or_refuses(changes: list[tuple[int, int, bytes]]) -> None:
    head = bytearray(LAWFUL.partition(b"\r\n\r\n")[0])
    for at, length, new in changes:
        head[at : at + length] = new
    with contextlib.suppress(tunnel.Refused):
        method, path, length = tunnel.read_head(bytes(head))
        assert (method, path) in tunnel.ROUTES and 0 <= length <= tunnel.BODY_LIMIT
        server = h11.Connection(h11.SERVER)  # by which the same request ends at the same byte
        server.receive_data(bytes(head) + b"\r\n\r\n" + b"x" * length + b"y")
        seen, *body, end = [server.next_event() for _ in range(2 + (length > 0))]
        assert (seen.method, seen.target, type(end)) == (method.encode(), path.encode(), h11.EndOfMessage)
        assert b"".join(part.data for part in body) == b"x" * length


class Played(ThreadingHTTPServer):
    """Either end of a tunnel: a model server that records what reaches it, and the proxy, with /health and a log."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        self.saw, self.left_at, self.loaded, self.pace = [], [], ["sinc-scatter:latest"], 0.005  # s between lines
        self.logs, self.history, self.copied = [bytearray()], bytearray(), lambda: 1 << 60
        own = {"protocol_version": "HTTP/1.1", "disable_nagle_algorithm": True, "log_message": lambda *_: None}
        own |= {"do_GET": lambda request: self.get(request), "do_POST": lambda request: self.post(request)}
        super().__init__(("127.0.0.1", port), type("Handler", (BaseHTTPRequestHandler,), own))
        self.at = f"127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def get(self, request: BaseHTTPRequestHandler) -> None:
        self.saw.append((request.path, request.headers, {}))
        models = {"models": [{"name": name} for name in self.loaded]}
        known = {"/api/tags": models, "/api/ps": models, "/api/version": {"version": "0.34.2"}}
        known["/health"] = {"status": "ok", "backends": [{"name": "gpu", "up": True, "reason": None}]}
        if not request.path.startswith("/log"):
            return self.reply(request, json.dumps(known.get(request.path, {})).encode())
        number, span = int(request.path[5:] or 0), request.headers["Range"]
        text = bytes(self.logs[number]) if number < len(self.logs) else b""
        text += b'{"half a li' if text and not number and random.random() < 0.5 else b""
        first, last = (int(place or len(text)) for place in (span or "bytes=0-")[6:].split("-"))
        if first >= len(text):
            return self.reply(request, b"", 416 if text else 404)
        etag, part = f'"{hash(text.partition(b"}")[0])}"', text[first : last + 1]
        return self.reply(request, part, 206 if span else 200, etag)

    def post(self, request: BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        self.saw.append((request.path, request.headers, body))
        if body.get("keep_alive") == 0 and not body.get("prompt"):  # Ollama answers first, and unloads then
            threading.Timer(0.3, self.loaded.remove, [body["model"]]).start()
        if not body.get("stream"):
            return self.reply(request, b'{"done":true}')
        if "die" in body["prompt"]:
            return request.connection.shutdown(socket.SHUT_RDWR)
        try:
            request.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for _ in range(10**6 if "endless" in body["prompt"] else 5):
                line = b'{"at": %.6f}\n' % time.monotonic()
                request.wfile.write(b"%x;ext=1\r\n%s\r\n" % (len(line), line))
                time.sleep(self.pace)
            request.wfile.write(b"0\r\nTrailer: x\r\n\r\n")
        except OSError:
            self.left_at.append(time.monotonic())

    def reply(self, request: BaseHTTPRequestHandler, content: bytes, code: int = 200, etag: str = "") -> None:
        tag = f"ETag: {etag}\r\n" if etag else ""
        head = f"HTTP/1.1 {code} X\r\nContent-Length: {len(content)}\r\n{tag}\r\n"
        request.wfile.write(head.encode() + content)

    def log(self, count: int) -> None:
        for _ in range(count):
            line = b'{"ts": %d, "id": "%030x"}\n' % (len(self.history), random.getrandbits(120))
            self.history += line
            self.logs[0] += line

    def rotate(self) -> None:
        """Rotate, unless what then falls off the end has not been copied."""
        if self.copied() >= len(self.history) - sum(map(len, self.logs[:4])):
            self.logs = [bytearray(), *self.logs][:6]


@pytest.fixture
def guard() -> Iterator[tunnel.Guard]:
    """A guard in a loop of its own, as the tunnel holds it, in front of guard.model; no task may outlive it."""
    with Played() as server:
        loop, held = asyncio.new_event_loop(), tunnel.Guard(server.at, lambda: OWNERS_LIMITS, lambda: False)
        held.model = server
        threading.Thread(target=loop.run_forever, daemon=True).start()
        asyncio.run_coroutine_threadsafe(held.start(), loop).result(5)
        held.at = f"127.0.0.1:{held.port}"
        yield held
        async def stop() -> int:
            held.server.close()
            held.drop(lambda c: True)
            await asyncio.sleep(0.05)
            return len(asyncio.all_tasks())
        tasks = asyncio.run_coroutine_threadsafe(stop(), loop).result(5)
        loop.call_soon_threadsafe(loop.stop)
    assert tasks == 1, "a connection's task outlived the guard"


@pytest.fixture(params=["here", "real"])
def at(guard: tunnel.Guard, request: pytest.FixtureRequest) -> Iterator[str]:
    """Where a client reaches the guard: here, and on the VPS's end of a tunnel to the same model server."""
    if request.param == "here":
        yield guard.at
    else:
        with FarHost() as far:
            far.up("--target", guard.model.at, "--model", "my-model")
            yield str(far.sock)


def guard_post(body: Any, path: str = "/api/generate", method: str = "POST") -> bytes:
    """Return a lawful request as bytes."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content


def guard_ask(at: str, request: bytes, end: bytes = b"(none)") -> tuple[bytes, list[float]]:
    """Send bytes; return what comes until this end, a close or 2 s of silence, and the lateness of each line in s."""
    answer, late, line = b"", [], tunnel.Line(at, 2)
    line.connect()
    with line.sock as connection, contextlib.suppress(OSError):
        with contextlib.suppress(OSError):
            connection.sendall(request)
        while not answer.endswith(end) and (part := connection.recv(65536)):
            answer += part
            late += [time.monotonic() - float(at) for at in re.findall(rb'\{"at": ([\d.]+)\}', part)]
    return answer, late


LAWFUL = guard_post({"prompt": "hi"})
HEADERS = [b"Content-Length: 3", b"Transfer-Encoding: chunked", b"X: " + b"a" * 65536, b"X: a\0b", b" folded: y"]
HEADERS += [b"Host: y", b"Expect: 100-continue", b"Upgrade: h2c"]
PATHS = "/api%2fgenerate /api/x/../generate http://x/api/generate /api/generate?x=1 /api/generate/ /API/generate"
SWAPS = [(b"Content-Length", b"Transfer-Encoding: chunked\r\nX"), (b"Host: x\r\n", b"Host: x\n"), (b"Host:", b"Host :")]
SWAPS += [(b"Host: x\r\n", b""), (b"HTTP/1.1", b"HTTP/1.0"), (b"HTTP/1.1", b"HTTP/2.0"), (b"POST", b"post")]
SWAPS += [(b"POST ", b"POST  ")] + [(b"Length: ", b"Length: " + sign) for sign in (b"+", b"-", b"0x")]
MALFORMED = [LAWFUL.replace(b"Host: x", b"Host: x\r\n" + header) for header in HEADERS]
MALFORMED += [guard_post({"prompt": "hi"}, path) for path in [*PATHS.split(), "//api/generate"]]
MALFORMED += [LAWFUL.replace(*swap) for swap in SWAPS] + [guard_post(b"x" * 10).replace(b": 10", b": 2000000")]
MALFORMED += [LAWFUL + LAWFUL, LAWFUL + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", b"\r\n" + LAWFUL]
MALFORMED += [guard_post(b"hello", "/health", "GET"), b"\x16\x03\x01" + b"\0" * 40 + b"\r\n\r\n"]


SHUT = {
    "GET": "/ /api/tags /api/ps /api/status /v1/models/x /slots /metrics /api/generate /debug/pprof/",
    "HEAD": "/ /api/version /api/tags /api/blobs/sha256:0",
    "POST": "/api/show /api/pull /api/push /api/create /api/copy /api/chat /api/embed /api/embeddings /api/signout"
    " /api/me /api/blobs/sha256:0 /api/experimental/web_search /api/experimental/web_fetch /v1/completions"
    " /v1/embeddings /v1/responses /v1/messages /v1/images/generations /v1/images/edits /v1/audio/transcriptions"
    " /props /completion /infill /tokenize",
    "DELETE": "/api/delete /api/user/keys/x", "PUT": "/api/version", "CONNECT": "x:1", "OPTIONS": "/api/generate",
}
SHUT_OUT = [guard_post({"model": "x"}, path, method) for method, paths in SHUT.items() for path in paths.split()]


def test_guard_keeps_all_else_from_the_model_server(guard: tunnel.Guard, at: str) -> None:
    for request in MALFORMED + SHUT_OUT:
        answer, _ = guard_ask(at, request)
        assert re.match(rb"HTTP/1.1 (400|403|413|431) ", answer), (request[:80], answer[:80])
        assert answer.count(b"Content-Length") == 1 and json.loads(answer.split(b"\r\n\r\n")[1])["error"]["code"]
    assert {path for path, *_ in guard.model.saw} <= {"/api/tags", "/api/ps", "/api/version"}  # the tunnel's own
    assert at != guard.at or guard.refused == len(MALFORMED + SHUT_OUT)


def test_guard_passes_the_allowed_routes_with_the_owners_limits(guard: tunnel.Guard, at: str) -> None:
    evil = {"model": "evil", "keep_alive": 0, "options": {"num_ctx": 10**7}, "max_tokens": 10**7, "images": ["x"]}
    guard.model.saw.clear()
    with contextlib.closing(tunnel.Line(at, 5)) as line:
        for path in ("/api/version", "/health", "/props", "/v1/models"):
            line.request("GET", path, headers={"Origin": "http://evil", "Authorization": "x"})
            line.getresponse().read()
        for path in ("/api/generate", "/v1/chat/completions"):
            assert line.ask(path, evil)[2] == b'{"done":true}'
    passed = [seen for seen in guard.model.saw if seen[0] not in ("/api/tags", "/api/ps")]  # the tunnel's own
    assert len(passed) == 6
    for _, headers, _ in passed:
        assert headers["Host"] == f"localhost:{guard.model.server_port}"
        assert not headers["Origin"] and not headers["Authorization"]
    native = {"model": "my-model", "options": {"num_predict": 4096, "num_ctx": 8192}, "keep_alive": -1}
    assert [body for *_, body in passed[4:]] == [native, {"model": "my-model", "max_tokens": 4096}]


def test_guard_passes_streams_untouched_at_once_and_leaks_nothing(guard: tunnel.Guard) -> None:
    def held() -> tuple[int, int, int]:
        return len(guard.connections), len(os.listdir("/proc/self/fd")), threading.active_count()
    stream, end = guard_post({"prompt": "hi", "stream": True}), b"0\r\nTrailer: x\r\n\r\n"
    direct, _ = guard_ask(guard.model.at, stream, end)
    text, late = guard_ask(guard.at, stream, end)
    assert re.sub(rb"[\d.]{4,}", b"", text) == re.sub(rb"[\d.]{4,}", b"", direct) and b";ext=1" in text
    assert text.endswith(end) and len(late) == 5 and sorted(late)[2] < 0.02
    guard.model.pace = 0
    wait_for(lambda: held()[0] == 0, 10)
    before = held()
    assert all(guard_ask(guard.at, stream, end)[0].endswith(end) for _ in range(200))
    wait_for(lambda: all(now <= then for now, then in zip(held(), before)), 3)


@pytest.mark.parametrize("second", [b"", LAWFUL], ids=["client leaves", "second request"])
def test_guard_ends_an_answer_at_once(guard: tunnel.Guard, second: bytes) -> None:
    with socket.create_connection(("127.0.0.1", guard.port), 5) as connection:
        connection.sendall(guard_post({"prompt": "endless", "stream": True}))
        wait_for(lambda: b'"at"' in connection.recv(100), 5)
        connection.sendall(second)
        left = time.monotonic()
        while second and connection.recv(65536):
            pass
    wait_for(lambda: guard.model.left_at, 2)
    assert guard.model.left_at[0] - left < 0.1 and len(guard.model.saw) == 1


def test_guard_says_absent_dying_and_paused_and_the_connection_stays(guard: tunnel.Guard) -> None:
    def ask(**body: Any) -> tuple[int, str | None]:
        status, _, text = line.ask("/api/generate", body)
        return status, json.loads(text or b"{}").get("error", {}).get("code")
    guard.model.__exit__()
    with contextlib.closing(tunnel.Line(guard.at, 5)) as line:
        began = time.monotonic()
        assert ask(prompt="hi") == (502, "no_model_server") and time.monotonic() - began < 0.2
        connection = line.sock
        with Played(guard.target[1]):
            assert ask(prompt="hi") == (200, None)
            assert ask(prompt="die", stream=True) == (502, "no_model_server")
            guard.paused = lambda: True
            assert ask(prompt="hi") == (503, "paused") and line.sock is connection


def test_guard_takes_no_stale_connection_or_head_for_an_answer(guard: tunnel.Guard, caplog: Any) -> None:
    resets, told = struct.pack("ii", 1, 0), [b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"]

    def post(request: BaseHTTPRequestHandler) -> None:
        request.rfile.read(int(request.headers["Content-Length"]))
        request.wfile.write(told[0] + b"HTTP/1.1 200 X\r\nContent-Length: 2\r\n\r\nok")
        time.sleep(0.02)  # the answer is read; then what the model server says when a connection is idle
        request.wfile.write(told[1]) if told[1:] else request.connection.setsockopt(socket.SOL_SOCKET, 13, resets)
        request.close_connection = True  # SO_LINGER of 0 s: a reset
    guard.model.post = post
    for end in ([], [b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n"]):
        told[1:] = end
        with contextlib.closing(tunnel.Line(guard.at, 5)) as line:
            for _ in range(3):
                assert line.ask("/api/generate", {"prompt": "hi"})[::2] == (200, b"ok")
                time.sleep(0.05)
    closing = LAWFUL.replace(b"Host: x", b"Host: x\r\nConnection: close")
    began = time.monotonic()
    assert guard_ask(guard.at, closing)[0].endswith(b"ok") and time.monotonic() - began < 1
    with socket.create_connection(("127.0.0.1", guard.port)) as refused:
        refused.sendall(SHUT_OUT[0])
        refused.recv(999)
        refused.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, resets)
    wait_for(lambda: not guard.connections, 3)
    gc.collect()
    assert "Traceback" not in caplog.text


def test_guard_ends_slow_requests_unanswered(guard: tunnel.Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended() -> bool:
        guard.server.get_loop().call_soon_threadsafe(guard.drop, lambda c: time.monotonic() > c.deadline)
        with contextlib.suppress(ConnectionResetError):
            return connection.recv(100) == b""
        return True
    monkeypatch.setattr(tunnel, "SLOW_REQUEST", 0.2)
    for request in (LAWFUL[:50], LAWFUL[:-1], LAWFUL.replace(b"\r\n", b"\n")):  # bare line feeds end no head
        with socket.create_connection(("127.0.0.1", guard.port), 0.05) as connection:
            connection.sendall(request)
            soon(ended, 3)
    assert guard.model.saw == []


# --- tunnel: mirror -----------------------------------------------------------


def test_mirror_takes_no_bytes_for_another_file_s() -> None:
    for text in (b"b's\n", b"a's\n"):  # the log is rotated before the proxy opens it, and after
        answers = iter([(206, '"a"', text), (206, '"b"', b"b")])
        assert tunnel.fetch(SimpleNamespace(ask=lambda *_, **__: next(answers)), "/log", 0) == ("", b"")  # noqa: B023


def test_mirror_writes_nothing_twice_wherever_it_goes(tmp_path: Path) -> None:
    def due(*doors: Played) -> list[bytes]:
        return sorted(b"".join(bytes(door.history) for door in doors).splitlines())
    x, y, moved = tmp_path / "x", tmp_path / "y", tmp_path / "moved"
    moved.mkdir()
    with Played() as a, Played() as b:
        a.log(50)
        x.write_bytes(a.history[:-10])  # as the last version left it, killed before it wrote the place
        old = {"file": str(x), "etag": f'"{hash(bytes(a.logs[0]).partition(b"}")[0])}"', "offset": 0, "length": 0}
        whole = len(a.history)
        old |= {"offset": whole - len(a.history.splitlines()[-1]) - 1}
        (tmp_path / "mirror.json").write_text(json.dumps({**old, "length": old["offset"]}))
        b.log(50)
        for door, copy in ((a, x), (b, x), (a, x), (a, y), (b, x), (a, x)):
            door.log(5)
            if len(door.history) > 6000:
                door.rotate()
            tunnel.mirror(door.at, tmp_path, copy)
        assert sorted(x.read_bytes().splitlines()) == due(a, b)
        for file in (x, x.with_name("x.place")):
            file.rename(moved / file.name)
        tunnel.mirror(a.at, moved, moved / "x")
        assert sorted((moved / "x").read_bytes().splitlines()) == due(a, b)
        os.truncate(moved / "x", 100)
        b.log(1)
        tunnel.mirror(b.at, moved, moved / "x")
        assert {*(moved / "x").read_bytes().splitlines()} <= {*due(a, b)}  # nothing is torn
        (moved / "x.place").write_text("{}")
        with pytest.raises(OSError, match="does not hold a place"):
            tunnel.mirror(a.at, moved, moved / "x")
        with (moved / "x").open("a") as held, pytest.raises(OSError, match="another tunnel"):
            assert tunnel.take(held)
            tunnel.mirror(a.at, moved, moved / "x")


def test_mirror_that_cannot_write_says_so_once(at_home: Path, caplog: pytest.LogCaptureFixture) -> None:
    copy = at_home / "none" / "copy"
    with Played() as door:
        held = tunnel.Tunnel(tunnel_settings(at_home, mirror=str(copy)), at_home)
        held.state["front"] = door.at
        door.log(5)
        for _ in range(2):
            asyncio.run(held._copy_log())
        told = "\n".join(tunnel.status_lines({**held.state, "up": True, "round_trip": None, "requests": 0, "refused": 0,
                                              "bytes": 0, "up_since": 0.0}))  # fmt: skip
        assert caplog.text.count("mirror: ") == 1 and f"No such file or directory: '{copy}'" in told
        copy.parent.mkdir(parents=True)
        asyncio.run(held._copy_log())
        assert held.state["mirror"] == {"file": str(copy), "position": len(door.history), "problem": ""}


def test_mirror_is_the_whole_history_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotation at any time, half a line, a kill between copy and place, an answer that ends anywhere, a rebuilt VPS."""
    random.seed(5)
    mirror, fetch = tmp_path / "copy.jsonl", tunnel.fetch

    def torn(line: tunnel.Line, path: str, start: int) -> tuple[str, bytes]:
        if random.random() < 0.1:
            raise OSError("the link went")
        if random.random() < (0.3 if start == 0 else 0.03) and len(door.logs[0]) > 2000:
            door.rotate()  # between two questions
            door.log(2)
        etag, text = fetch(line, path, start)
        cut = text.find(b"\n", random.randrange(len(text))) + 1 if text else 0  # some whole lines, at least one
        return etag, text[:cut]
    monkeypatch.setattr(tunnel, "fetch", torn)
    with Played() as door:
        door.copied = lambda: mirror.stat().st_size if mirror.exists() else 0
        for n in range(300):
            door.log(random.randrange(70))
            if random.random() < 0.1 and door.logs[0]:
                door.rotate()
            with contextlib.suppress(OSError):
                tunnel.mirror(door.at, tmp_path, mirror)
            if random.random() < 0.2 and mirror.exists():  # killed after the copy was written, before the place was
                with mirror.open("ab") as f:
                    f.write(b'{"half a li')
            if n == 200:
                soon(lambda: tunnel.mirror(door.at, tmp_path, mirror) == len(door.history))
                assert mirror.read_bytes() == door.history
                door.logs = [bytearray()]  # the VPS is rebuilt
        monkeypatch.setattr(tunnel, "fetch", fetch)
        tunnel.mirror(door.at, tmp_path, mirror)
        assert mirror.read_bytes() == door.history and door.history.count(b"\n") > 9000


# --- tunnel: over sshd --------------------------------------------------------


class Space:
    """A network namespace that its with-block is in. It has no name, so it is gone when its last user is."""

    def __init__(self, address: str) -> None:
        self.libc, self.fds = ctypes.CDLL(None), [os.open("/proc/thread-self/ns/net", os.O_RDONLY)]
        if os.geteuid() or not os.path.exists("/dev/net/tun") or self.libc.unshare(0x40000000):  # CLONE_NEWNET
            pytest.skip("needs root, TUN, and the right to make network namespaces")
        self.fds.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY))
        with self:
            self.fds.append(os.open("/dev/net/tun", os.O_RDWR))
            fcntl.ioctl(self.fds[2], 0x400454CA, struct.pack("16sH22x", b"wan", 0x1001))  # TUNSETIFF: TUN, NO_PI
            self.ip(f"link set lo up\nlink set wan up\naddress add {address}/24 dev wan")

    def __enter__(self) -> None:
        self.libc.setns(self.fds[1], 0)

    def __exit__(self, *_: object) -> None:
        self.libc.setns(self.fds[0], 0)

    def ip(self, commands: str) -> None:
        with self:
            subprocess.run(["ip", "-batch", "-"], input=commands, text=True, check=True)


class SlowLink(threading.Thread):
    """Two spaces, 20 ms there and back. Cut, it loses packets; a connection that lost one is dead from then on."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.vps, self.cut, self.closed, self.dialled_at = Space("10.77.0.1"), False, False, 0.0
        with self.vps:
            self.home = Space("10.77.0.2")  # whoever leaves it is on the VPS
        self.start()

    def run(self) -> None:
        tuns, queue, dead = [self.vps.fds[2], self.home.fds[2]], deque(), set()
        while not self.closed:
            for tun in select.select(tuns, [], [], max(0.0, queue[0][0] - time.monotonic()) if queue else 0.1)[0]:
                packet, now = os.read(tun, 2048), time.monotonic()
                ports = frozenset((packet[20:22], packet[22:24]))
                dead |= {ports} if self.cut else set()
                if ports not in dead:
                    queue.append((now + 0.010, sum(tuns) - tun, packet))
                    self.dialled_at = now if packet[33:34] == b"\2" else self.dialled_at  # TCP's SYN
            while queue and queue[0][0] <= time.monotonic():
                os.write(*queue.popleft()[1:])

    def close(self) -> None:
        self.closed = True
        self.join()
        for fd in self.vps.fds + self.home.fds:
            os.close(fd)


def children(parent: int) -> list[int]:
    """Return a process's children, the youngest last."""
    return [int(pid) for pid in finished(["pgrep", "-P", str(parent)]).stdout.split()]


TUNNEL_RULES = "MaxSessions 0\nAllowStreamLocalForwarding remote\nStreamLocalBindUnlink yes\nStreamLocalBindMask 0117"


class FarHost(contextlib.ExitStack):
    """A VPS as install.sh leaves it (sshd, a front door), and one workstation: its folder and its model server."""

    def __init__(self, rules: str = "", at: str = "127.0.0.1", inside: Any = None) -> None:
        if not shutil.which("sshd", path="/usr/sbin"):
            pytest.skip("no sshd")
        super().__init__()
        port = free_port()
        self.where = Path(self.enter_context(tempfile.TemporaryDirectory(prefix="sc")))  # a socket's path is short
        self.home, self.sock, self.log = self.where / "h", self.where / "gpu.sock", self.where / "log"
        self.inside = inside or contextlib.nullcontext()  # where the workstation is
        with self.inside:
            self.model = self.enter_context(Played())
        self.door = self.enter_context(Played())
        self.flags = [f"{os.environ.get('USER') or 'root'}@{at}", "--ssh-port", str(port), "--name", "gpu"]
        self.flags += ["--target", self.model.at, "--front", self.door.at, "--remote", str(self.sock)]
        self.home.mkdir(mode=0o700)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.where / "host"], check=True)
        (self.where / "auth").write_text(self.tell("key", "--name", "gpu").stdout)
        (self.home / "known_hosts").write_text(f"[{at}]:{port} {(self.where / 'host.pub').read_text()}")
        rules = rules or f"PermitListen {self.door.at}\nPermitOpen {self.door.at}\n{TUNNEL_RULES}"
        (self.where / "sshd").write_text(f"""Port {port}\nListenAddress {at}\nHostKey {self.where}/host\nPidFile none
StrictModes no\nAuthorizedKeysFile {self.where}/auth\nUsePAM {"no" if os.geteuid() else "yes"}\n{rules}\n""")
        if not os.geteuid():
            os.makedirs("/run/sshd", exist_ok=True)
        self.start_sshd()

    def start_sshd(self) -> None:
        (log := self.where / "sshd.log").unlink(missing_ok=True)
        command = ["/usr/sbin/sshd", "-D", "-e", "-f", self.where / "sshd"]
        self.sshd = self.enter_context(program(*command, log=log, ready="Server listening"))
        self.callback(self.end_sshd)

    def end_sshd(self) -> None:
        """End sshd and its sessions, as a reboot does; one whose link is dead would stay."""
        for pid in [*children(self.sshd.pid), self.sshd.pid] if self.sshd.poll() is None else ():
            os.kill(pid, signal.SIGKILL)
        self.sshd.wait()

    def tell(self, *argv: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "SCATTER_HOME": str(self.home)}
        return finished([sys.executable, tunnel.__file__, *argv], env=env)

    def run(self, *flags: str, setup: str = "pass", **environ: str) -> subprocess.Popen[bytes]:
        """Start a tunnel; setup is Python that changes the module before."""
        code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import tunnel; {setup}; sys.exit(tunnel.main())"
        command, environ = [sys.executable, "-c", code], {"SCATTER_HOME": str(self.home), **environ}
        with self.inside:
            return self.enter_context(program(*command, "run", *self.flags, *flags, log=self.log, **environ))

    def up(self, *flags: str, **how: str) -> subprocess.Popen[bytes]:
        """Start a tunnel, and wait until it serves."""
        child = self.run(*flags, **how)
        soon(self.serves)
        return child

    def ask(self, path: str = "/api/version", body: Any = None) -> tuple[int, Any]:
        """Ask the model server as the proxy does."""
        return tunnel.ask_once(str(self.sock), path, body, 0.5)

    def serves(self) -> bool:
        return self.ask()[0] == 200

    def state(self) -> dict[str, Any]:
        return json.loads((self.home / "state.json").read_text())


@pytest.fixture
def far() -> Iterator[FarHost]:
    with FarHost() as host:
        yield host


def test_tunnel_comes_up_says_so_is_redialled_and_leaves_nothing_real(far: FarHost) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(far.where / "notify"))
        systemd.settimeout(10)
        far.sshd.terminate()
        far.sshd.wait()
        child = far.run(NOTIFY_SOCKET=str(far.where / "notify"))
        said = systemd.recv(999).decode()
        assert "down" in said and "READY" not in said
        far.start_sshd()
        wait_for(lambda: "READY=1" in systemd.recv(999).decode(), 20)
        soon(far.serves)
        assert "already" in far.tell("run", "x@y").stderr  # one folder, one tunnel
        assert far.ask("/api/generate", {"prompt": "hi"}) == (200, {"done": True})
        assert far.model.saw[-1][2]["model"] == "sinc-scatter"
        state = soon(lambda: (s := far.state())["requests"] == 1 and s, 8)
        told = json.loads(far.tell("status", "--json").stdout)
        assert told["up"] and told["up_since"] == state["up_since"] and told["redials"] >= 1 and told["bytes"] > 0
        assert told.keys() > {"last_error", "round_trip", "refused", "model", "mirror", "paused_until", "running"}
        assert "gpu serves at" in far.tell("status").stdout
        ssh = children(child.pid)[0]
        child.terminate()
        assert child.wait(3) == 0 and gone(ssh) and far.tell("status").returncode == 1
    child = far.up()
    ssh = children(child.pid)[0]
    child.kill()
    wait_for(lambda: gone(ssh), 2)


def test_tunnel_over_a_slow_link_that_is_cut_real() -> None:
    """Deadlines are the contract's; of each of 1 s the best of several counts, since ssh's own work is most of it."""
    def redialled(seconds: float, change: Callable[[], Any]) -> float:
        """Change something; return the seconds until the redial serves, and note how many of them the dial took."""
        place, began = far.sock.stat().st_ctime_ns, time.monotonic()
        change()
        soon(lambda: link.dialled_at > began, seconds)
        soon(lambda: far.sock.stat().st_ctime_ns != place and far.serves())
        dials.append((served := time.monotonic()) - link.dialled_at)
        soon(lambda: front.health()["status"] == "ok")
        return served - began

    def kill_ssh() -> None:
        os.kill(children(child.pid)[0], signal.SIGKILL)

    def cut(answer: Future[httpx.Response] | None = None) -> None:
        link.cut, began, session = True, time.monotonic(), children(far.sshd.pid)[-1]
        assert not answer or code_of(answer.result(7)) == "backend_failed"
        soon(lambda: front.health()["status"] == "offline", began + 9 - time.monotonic())
        soon(lambda: not far.state()["up_since"] and len(model.left) == bool(answer), began + 9 - time.monotonic())
        redialled(9, lambda: setattr(link, "cut", False))
        assert not gone(session), "the dead link's sshd still held the socket"

    with contextlib.closing(SlowLink()) as link, link.vps, FarHost(at="10.77.0.1", inside=link.home) as far:
        with far.inside:
            model = far.enter_context(Fake())
        far.door.__exit__()
        own = ("--backend", "none", "--backend-dir", far.where, "--port", far.door.server_port)
        front, pool = far.enter_context(proxy(far.where / "p", *own)), far.enter_context(ThreadPoolExecutor(1))
        dials, slept = [], far.where / "slept"
        setup = f"clock = tunnel.boot_clock; late = lambda: clock() + 60 * tunnel.Path({str(slept)!r}).exists()"
        child = far.up("--target", model.url[7:], setup=setup + "; tunnel.boot_clock = late")
        soon(lambda: front.health()["status"] == "ok")
        kills = [redialled(5, kill_ssh)]
        cut()
        answer = pool.submit(front.post, "!pace=1")
        soon(lambda: model.running)
        cut(answer)
        redialled(3, lambda: link.home.ip("address delete 10.77.0.2/24 dev wan\naddress add 10.77.0.3/24 dev wan"))
        kills.append(redialled(5, kill_ssh))
        redialled(3, slept.touch)
        kills.append(redialled(5, kill_ssh))
        redialled(5, lambda: (far.end_sshd(), far.start_sshd()))
        print("ssh killed, serving again:", kills, "dialled, serving:", dials)
        overbooked = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))  # ssh's key exchange takes as much longer
        assert min(kills) <= overbooked and min(dials[1:4]) <= overbooked  # the latter over a dead link's socket
        for reason in ("no answer", "address changed from 10.77.0.2 to 10.77.0.3", "slept for 60 s"):
            assert reason in far.log.read_text()


LINK_FAULTS = {"key": "auth", "account": "auth", "changed": "host_key_changed", "unknown": "host_key_unknown"}
LINK_FAULTS |= {"name": "name", "forward": "forward_refused", "port": "port_taken", "folder": "path_taken"}


@pytest.mark.parametrize(("fault", "kind"), LINK_FAULTS.items())
def test_tunnel_faults_are_told_apart_real(far: FarHost, fault: str, kind: str) -> None:
    own_key, known = (far.home / "key.pub").read_text(), far.home / "known_hosts"
    (far.where / "auth").write_text("" if fault == "key" else own_key)
    place, whole = known.read_text().split()[0], known.read_text()
    known.write_text({"changed": f"{place} {own_key}", "unknown": ""}.get(fault, whole))
    far.flags[0] = {"name": "x@nope.invalid", "account": "nobody-here@127.0.0.1"}.get(fault, far.flags[0])
    remote = {"forward": "127.0.0.1:10", "folder": f"{far.where}/none/gpu.sock", "port": far.door.at}
    far.run("--remote", remote.get(fault, str(far.sock)), HOME=str(far.where))
    state = soon(lambda: (s := far.state())["last_error"] and s)
    status = far.tell("status").stdout
    assert state["last_error"]["kind"] == kind
    assert state["last_error"]["cure"] in status and "down" in status
    if fault in ("key", "account", "changed", "unknown", "forward"):  # what a person must mend is not tried again soon
        time.sleep(1.5)
        assert far.state()["dials"] == 1
    else:  # and said once
        soon(lambda: far.state()["dials"] > 1)
    assert far.log.read_text().count(state["last_error"]["cure"]) == 1
    if fault == "port":
        far.door.__exit__()
        soon(lambda: far.state()["up_since"], 6)


def test_tunnel_plain_account_with_a_port_and_no_way_to_the_front_real() -> None:
    with FarHost(rules="PermitOpen none") as far, Played() as unused:
        at = unused.at
        unused.__exit__()
        far.run("--remote", at)
        soon(lambda: tunnel.ask_once(at, "/api/version")[0] == 200)
        wait_for(lambda: "no probe and no mirror" in far.log.read_text(), 8)
        soon(lambda: far.state()["front"] is None)
        assert tunnel.ask_once(at, "/api/version")[0] == 200 and far.state()["redials"] == 0
        told = far.tell("check", *far.flags, "--remote", at)
        assert told.returncode == 0 and "the VPS refuses the way to its " + far.door.at in told.stdout, told


def test_tunnel_pause_gives_the_gpu_back_and_ends_by_itself_real(far: FarHost) -> None:
    far.model.loaded.append("other:7b")
    child = far.up()
    with contextlib.closing(tunnel.Line(str(far.sock), 9)) as running, pytest.raises(http.client.IncompleteRead):
        running.request("POST", "/api/generate", json.dumps({"prompt": "endless", "stream": True}))
        answer = running.getresponse()
        paused = far.tell("pause", "5s", "--target", far.model.at)
        until = time.monotonic() + 4
        assert "memory is free" in paused.stdout and far.model.loaded == [] and far.model.left_at
        answer.read()
    code, said = far.ask()
    assert (code, said["error"]["code"]) == (503, "paused")
    child.terminate()
    child.wait()
    far.run()
    soon(lambda: far.ask("/health")[0] == 503)
    assert "paused until" in far.tell("status").stdout
    soon(far.serves, 6)
    assert time.monotonic() > until - 1
    far.tell("pause", "--target", far.model.at)
    assert far.ask()[0] == 503 and far.tell("resume").returncode == 0
    soon(far.serves, 3)


def test_tunnel_pause_does_not_say_free_when_it_cannot_know(at_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(at: str) -> str:
        assert tunnel.main(["pause", "--target", at]) == 0
        return capsys.readouterr().out
    with Played() as server:
        server.get = lambda request: server.reply(request, b"{}", 401)
        assert "does not say" in said(server.at)
        server.get = lambda request: request.connection.shutdown(socket.SHUT_RDWR)
        assert "closed" in said(server.at)
    assert "is free" in said(server.at)


def test_mirror_through_cuts_kills_and_rotation_real(far: FarHost) -> None:
    random.seed(7)
    quick, mirror = "tunnel.MIRROR_EVERY = 0.05; tunnel.FIRST_WAITS = (0.05,)", far.home / "scatter-api.jsonl"
    marks = [0, 0, 0]
    child = far.run(setup=quick)
    for n in range(100):
        far.door.log(100)
        if n % 9 == 8:
            soon(lambda: mirror.stat().st_size >= marks[-3], 20)  # five files are kept; no mirror can be later
            far.door.rotate()
            marks.append(len(far.door.history))
        if n % 20 == 5:
            child.kill()
            child.wait()
            child = far.run(setup=quick)
        if random.random() < 0.1:
            with contextlib.suppress(IndexError, ProcessLookupError):
                os.kill(children(child.pid)[0], signal.SIGKILL)
        time.sleep(0.06)
    soon(lambda: mirror.read_bytes() == far.door.history, 15)
    assert far.door.history.count(b"\n") == 10_000


def test_tunnel_check_names_the_first_hop_that_fails_real(far: FarHost) -> None:
    whole = far.tell("check", *far.flags).stdout
    hops = "model server/model/warm/ssh client/key/name/TCP/host key, login, forward/front door/document"
    assert re.findall(r"^(?:ok +|FAIL +)([\w ,]+):", whole, re.MULTILINE) == hops.split("/"), whole
    far.sshd.terminate()
    far.sshd.wait()
    child = far.run()
    soon(lambda: (far.state()["last_error"] or {})["kind"] == "network")
    far.start_sshd()
    soon(far.serves)
    assert "ok    front door" in far.tell("check", *far.flags).stdout  # whatever failed before the link came up
    child.terminate()
    child.wait()
    (far.where / "auth").write_text("")
    assert "FAIL  host key, login, forward: Permission denied" in far.tell("check", *far.flags).stdout
    far.tell("pause", "--target", "127.0.0.1:1")
    asked = len(far.model.saw)
    paused = far.tell("check", *far.flags)
    assert paused.returncode == 1 and "paused until" in paused.stdout and len(far.model.saw) == asked
    far.tell("resume")
    far.model.loaded.clear()
    assert "ollama pull" in far.tell("check", *far.flags).stdout
    for url in ("localhost", "http://h:99999", "https://[::1"):
        assert far.tell("check", *far.flags, "--url", url).returncode == 2
    nothing = far.tell("check", *far.flags, "--target", "127.0.0.1:1")
    assert nothing.returncode == 1 and nothing.stdout.startswith("FAIL  model server") and "start it" in nothing.stdout


def test_tunnel_of_a_check_ends_with_it_real(far: FarHost) -> None:
    env = {**os.environ, "SCATTER_HOME": str(far.home)}
    with subprocess.Popen([sys.executable, tunnel.__file__, "check", *far.flags], env=env, stdout=-1) as check:
        assert check.stdout
        any(b"TCP" in line for line in check.stdout)
        own = soon(lambda: children(check.pid))
        own += soon(lambda: children(own[0]))
        check.kill()
    wait_for(lambda: all(map(gone, own)), 4)


# --- install: usage -----------------------------------------------------------

SCRIPT = HERE / "install.sh"
CHANGING = "apt apt-get chmod cp diff groupadd kill ln mkdir mktemp mv nginx python3 rm ssh sshd systemctl useradd"


@pytest.fixture
def traps(tmp_path: Path) -> Path:
    """Give a PATH on which each command that could change something writes its name to `ran` instead."""
    (folder := tmp_path / "stubs").mkdir()
    for name in CHANGING.split():
        (folder / name).write_text(f"#!/bin/sh\necho {name} >>{tmp_path}/ran\n")
        (folder / name).chmod(0o755)
    for name in ("dirname", "grep", "id", "readlink", "sed"):  # what is asked before anything is done
        (folder / name).symlink_to(f"/usr/bin/{name}")
    return folder


def test_install_cut_short_does_nothing(traps: Path, tmp_path: Path) -> None:
    text = SCRIPT.read_bytes()
    whole = text.rindex(b"main") + 4  # from there on it is main, without a command
    cuts = {cut for m in re.finditer(rb"^\w+|\n", text, re.MULTILINE) for cut in range(m.start() + 1, m.end() + 1)}

    def run(cut: int) -> None:
        (script := tmp_path / f"cut.{cut}").write_bytes(text[:cut])
        finished(["/bin/sh", script, "uninstall"], env={"PATH": str(traps)}, cwd=tmp_path)
        assert not (tmp_path / "ran").exists(), f"about byte {cut}: ran {(tmp_path / 'ran').read_text()}"

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, sorted(cut for cut in cuts | {*random.Random(1).sample(range(whole), 300)} if cut < whole)))


BAD_USAGE = "|x|demo --x|demo --model|model x|model 1 0|model 1 2 3|vps --x|vps --domain|vps --site \t|uninstall x"


@pytest.mark.parametrize("arguments", BAD_USAGE.split("|"))
def test_install_bad_usage(arguments: str, traps: Path, tmp_path: Path) -> None:
    command = ["/bin/sh", SCRIPT, *filter(None, arguments.split(" "))]
    ran = finished(command, env={"PATH": str(traps)})
    assert (ran.returncode, ran.stdout) == (2, "") and re.fullmatch(r"error: .+ \(try --help\)\n", ran.stderr)
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(not (shutil.which("shellcheck") and shutil.which("shfmt")), reason="no shellcheck or shfmt here")
@pytest.mark.parametrize("lint", ["shellcheck", "shellcheck -s dash", "shfmt -d -i 4 -ci", "dash -n"])
def test_install_is_clean_shell(lint: str) -> None:
    ran = finished([*lint.split(), SCRIPT])
    assert ran.returncode == 0, ran.stdout + ran.stderr


# --- install: demo ------------------------------------------------------------


def processes(*words: str) -> list[int]:
    """Return the processes that have all these words in their command line."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if all(word.encode() in line.read_bytes() for word in words):
                found.append(int(line.parent.name))
    return found


class Demo:
    """install.sh demo on a terminal of its own, as a person runs it."""

    def __init__(self, *command: Any, **environ: str) -> None:
        self.said, self.status = "", -1
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.execvpe(command[0], [*map(str, command)], {**os.environ, **environ})
        os.set_blocking(self.terminal, False)

    def says(self, pattern: str, seconds: float = 180) -> str:
        """Wait for a pattern in what it says; return its group, if it has one."""

        def found() -> re.Match[str] | None:
            with contextlib.suppress(OSError):  # nothing new, or nobody there any more
                self.said += os.read(self.terminal, 1 << 16).decode(errors="replace").replace("\r", "")
            return re.search(pattern, self.said)

        match = wait_for(found, seconds, f"{pattern!r} in what the demo said")
        return match[match.re.groups]

    def ended(self, sign: int | None = None) -> int:
        """End it, or wait until it has; return its exit status, once neither process nor folder is left."""
        if sign is not None:
            os.close(self.terminal) if sign == signal.SIGHUP else os.kill(self.pid, sign)
        found = wait_for(lambda: (pair := os.waitpid(self.pid, os.WNOHANG))[0] and pair, 20, "the demo's end")
        folder = re.search(r"/tmp/scatter\.\w+", self.said)
        assert folder and not Path(folder[0]).exists() and processes(folder[0]) == []
        return os.waitstatus_to_exitcode(found[1])


def check_document(body: str | bytes) -> None:
    assert [f["t"] for f in json.loads(body)["sinc"]["fragments"]] == [band.name for band in sp.BANDS]


def ask(page: str) -> httpx.Response:
    answer = httpx.post(f"{page}/api/ai-transform", json={"prompt": "Write a launch e-mail"}, timeout=120)
    check_document(answer.content)
    return answer


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files, whose demo has run once, so that its packages are there."""
    folder = tmp_path_factory.mktemp("copy")
    for name in ("install.sh", "scatter_proxy.py", "tunnel.py"):
        shutil.copy(HERE / name, folder)
    demo = Demo(folder / "install.sh", "demo")
    demo.says("Ctrl-C ends it")
    os.write(demo.terminal, b"\x03")
    demo.says("nothing of it is left")
    assert demo.ended() == 0
    return folder


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGHUP])
def test_demo_real(copy: Path, sign: int) -> None:
    began = time.monotonic()
    demo = Demo(copy / "install.sh", "demo", PIP_NO_INDEX="1", PIP_FIND_LINKS="/nonexistent")
    page = demo.says(r"page +(http://\S+)/")
    print(f"warm demo: up after {time.monotonic() - began:.1f} s")
    home = demo.says(r"SCATTER_HOME=(\S+)")
    assert "installing" not in demo.said and "tunnel " in demo.said
    assert {"x-tok-per-s", "x-gen-time", "x-tokens"} <= ask(page).headers.keys()
    status = ["python3", copy / "tunnel.py", "status", "--json"]
    said = finished(status, env={**os.environ, "SCATTER_HOME": home}).stdout
    assert json.loads(said)["requests"] >= 1
    assert demo.ended(sign) == 0


def test_demo_part_that_dies_real(copy: Path) -> None:
    demo = Demo(copy / "install.sh", "demo")
    folder = demo.says(r"(/tmp/scatter\.\w+)")
    demo.says("Ctrl-C ends it")
    os.kill(processes("scatter_proxy.py", folder)[0], signal.SIGKILL)
    demo.says("error: demo: the proxy has ended; the end of its log:\n.*listening on")
    assert demo.ended() == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a mount namespace")
def test_demo_with_taken_port_and_no_sshd_real(copy: Path) -> None:
    first = Demo(copy / "install.sh", "demo")
    first.says("Ctrl-C ends it")
    hide = 'mount --bind /dev/null $(command -v sshd) && exec "$0" demo'
    demo = Demo("unshare", "-m", "sh", "-c", hide, copy / "install.sh")
    page = demo.says(r"page +(http://\S+)/")
    assert "is taken" in demo.said and "tunnel   left out" in demo.said
    ask(page)
    assert [one.ended(signal.SIGTERM) for one in (demo, first)] == [0, 0]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become a plain user")
def test_demo_as_plain_user_from_nothing_real() -> None:
    user = f"scatter-{os.getpid()}"
    (folder := Path("/tmp", user)).mkdir()  # where the user may go
    subprocess.run(["useradd", "-M", "-d", folder, "-s", "/bin/sh", user], check=True)
    try:
        for name in ("install.sh", "scatter_proxy.py", "tunnel.py"):
            shutil.copy(HERE / name, folder)
        shutil.chown(folder, user)
        began = time.monotonic()
        demo = Demo("su", user, "-c", f"cd {folder} && exec ./install.sh demo", PATH="/usr/bin:/bin")
        page = demo.says(r"page +(http://\S+)/")
        print(f"cold demo: up after {time.monotonic() - began:.1f} s")
        ask(page)
        os.write(demo.terminal, b"\x03")
        demo.ended()
        assert processes(f"/{user}/") == []
    finally:
        subprocess.run(["userdel", user], check=False)
        shutil.rmtree(folder)


# --- install: a booted Debian -------------------------------------------------

NEEDED = [name for name in ("mmdebstrap", "systemd-nspawn", "ip", "nsenter") if not shutil.which(name)]
booted = pytest.mark.skipif(os.geteuid() != 0 or bool(NEEDED), reason=f"needs root and {NEEDED or 'nothing else'}")


class Vps:
    """A Debian that boots on a network namespace of its own, at 10.99.0.1, with a second one, the home, beside it."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.name, self.upper = folder / "vps", f"v{os.getpid()}{random.randrange(1000)}", folder / "upper"
        self.home = f"{self.name}h"
        lower = f"lowerdir={root},upperdir={self.upper}/files,workdir={self.upper}/work"
        wire = f"ip link add v0 netns {self.name} type veth peer name v0 netns {self.home}"
        ends = [f"-n {ns} {do}" for n, ns in ((1, self.name), (2, self.home)) for do in
                (f"addr add 10.99.0.{n}/24 dev v0", "link set v0 up", "link set lo up")]  # fmt: skip
        for step in (
            f"mkdir {self.root} {self.upper}", f"mount -t tmpfs none {self.upper}",
            f"mkdir {self.upper}/files {self.upper}/work", f"mount -t overlay -o {lower} none {self.root}",
            f"ip netns add {self.name}", f"ip netns add {self.home}", wire, *(f"ip {end}" for end in ends),
        ):  # fmt: skip
            subprocess.run(step.split(), check=True)

    def boot(self) -> None:
        command = f"systemd-nspawn -q -D {self.root} -M {self.name} --register=no --keep-unit --console=pipe -b"
        command += f" --network-namespace-path=/run/netns/{self.name}"
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.container = subprocess.Popen(command.split(), **quiet)  # type: ignore[call-overload]
        children = Path(f"/proc/{self.container.pid}/task/{self.container.pid}/children")

        def is_up() -> bool:
            self.init = (children.read_text().split() or ["0"])[0]  # nspawn's first child may be a passing one
            return self.run("systemctl is-system-running").stdout in ("running\n", "degraded\n")

        wait_for(is_up, 60, "booted")

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        environ = ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "PIP_NO_INDEX=1", "PIP_FIND_LINKS=/root/wheels"]
        inside = ["nsenter", "-t", self.init, "-a", "--", "env", "-i", *environ, "sh", "-c", command]
        return finished(inside, timeout=120)

    def install(self, arguments: str, status: int = 0) -> str:
        ran = self.run(f"sh /root/scatter/install.sh {arguments}")
        assert ran.returncode == status, ran.stdout + ran.stderr
        return ran.stdout + ran.stderr

    def curl(self, path: str, *more: str) -> tuple[int, str]:
        command = ["ip", "netns", "exec", self.home, "curl", "-s", "-w", "\n%{http_code}", "-H", "Host: shop.test"]
        said = finished([*command, *more, f"http://10.99.0.1{path}"]).stdout
        body, _, status = said.rpartition("\n")
        return int(status), body

    def ssh(self, folder: Path, options: str) -> subprocess.Popen[str]:
        (folder / "known_hosts").write_text(f"10.99.0.1 {(self.root / 'etc/ssh/ssh_host_ed25519_key.pub').read_text()}")
        command = f"ip netns exec {self.home} ssh -F none -o BatchMode=yes -o ExitOnForwardFailure=yes -i {folder}/key "
        command += f"-o UserKnownHostsFile={folder}/known_hosts scatter-tunnel@10.99.0.1 {options}"
        pipe = subprocess.PIPE
        return subprocess.Popen(command.split(), stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)

    @contextlib.contextmanager
    def on(self, space: str) -> Iterator[None]:
        """Do what follows, in this thread and in what it starts, on the network of the home or of the VPS."""
        setns = ctypes.CDLL(None).setns  # os.setns is of Python 3.12
        with open("/proc/thread-self/ns/net") as here, open(f"/run/netns/{space}") as there:
            assert setns(there.fileno(), 0) == 0
            try:
                yield
            finally:
                setns(here.fileno(), 0)

    @contextlib.contextmanager
    def dialled(self, folder: Path, target: str, name: str = "gpu-1") -> Iterator[Proxy]:
        """Dial in with a real tunnel.py; give the site as a client from there sees it. To be used at home."""
        self.ssh(folder, "-V").wait()  # writes known_hosts, which is in the tunnel's folder
        run = ["run", "scatter-tunnel@10.99.0.1", "--identity", folder / "key", "--name", name, "--target", target[7:]]
        argv, environ = ["python3", HERE / "tunnel.py", *run], {"SCATTER_HOME": str(folder)}
        with program(*argv, log=folder / "tunnel", ready=" serves at ", **environ):
            yield self.site()

    def site(self, address: str = "10.99.0.2", url: str = "http://10.99.0.1") -> Proxy:
        """Return the site, once it answers prompts, as a client at an address sees it."""
        wait_for(lambda: self.curl("/api/ai-transform/health")[0] == 200, 30, "the tunnel up")
        site = object.__new__(Proxy)  # what speaks HTTP of it; the process is another's
        way = httpx.HTTPTransport(local_address=address, limits=httpx.Limits(max_connections=200))
        site.http = httpx.Client(base_url=url, headers={"host": "shop.test"}, timeout=120, transport=way)
        return site

    def left(self) -> dict[str, tuple[Any, ...]]:
        """Return every file and setting that an installation could leave: mode, owner, a hash of what it holds."""
        found: dict[str, tuple[Any, ...]] = {}
        for top in ("etc", "opt", "usr/local", "var/lib", "srv"):
            for path in (self.root / top).rglob("*"):
                about, name = path.lstat(), str(path.relative_to(self.root))
                # Not ours: the copies that useradd makes of its files, and what a running Debian writes by itself.
                if not re.match(r"etc/.*-$|etc/\.pwd\.lock|var/lib/(systemd|apt)", name):
                    held = path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else ""
                    found[name] = (about.st_mode, about.st_uid, about.st_gid, held)
        sshd = "sshd -T -C user=root,host=x,addr=10.99.0.2"
        for setting in (sshd, "nginx -T", "getent passwd", "getent group", "systemctl list-unit-files", "ls /var/log"):
            found[setting] = (self.run(setting).stdout.replace("private\n", "").replace("scatter\n", ""),)
        return found

    def changed(self, before: dict[str, tuple[Any, ...]]) -> set[str]:
        after = self.left()
        return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}

    def close(self) -> None:
        self.run("systemctl poweroff --force --force")
        self.container.wait(30)
        for group in Path("/sys/fs/cgroup/memory").glob(self.name):  # a test's
            group.rmdir()
        for step in (f"ip netns del {self.name}", f"ip netns del {self.home}", f"umount -l {self.root} {self.upper}"):
            subprocess.run(step.split(), check=True)


@pytest.fixture(scope="session")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare Debian with nginx and sshd, the bundle, and the wheels that pip will want. Made once."""
    root = Path(os.environ.get("SCATTER_DEBIAN") or tmp_path_factory.mktemp("debian") / "root")  # one here saves time
    packages = "systemd-sysv,libpam-systemd,polkitd,dbus,openssh-server,nginx-light,python3-venv,iproute2,procps,sudo"
    packages += ",ca-certificates,python3-certbot-nginx,pebble"  # pebble is an ACME server for tests
    if not root.exists():
        options = f"--variant=minbase --skip=cleanup/apt --include={packages}"  # the cache is for --packages
        command = f"mmdebstrap -q {options} bookworm {root}"
        subprocess.run(command.split(), check=True)
    wheels = re.findall(r'^#  *"([^"]+)"', (HERE / "scatter_proxy.py").read_text(), re.MULTILINE)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "-w", root / "root/wheels", *wheels], check=True)
    (root / "root/scatter").mkdir(exist_ok=True)
    (root / "root/scatter/scatter.env").write_text("SCATTER_MAX_TOKENS=320\n")  # the small model rambles
    for name in ("install.sh", "scatter_proxy.py"):
        shutil.copy(HERE / name, root / "root/scatter")
    return root


@pytest.fixture
def vps(debian: Path, tmp_path: Path) -> Iterator[Vps]:
    machine = Vps(debian, tmp_path)
    try:
        machine.boot()
        yield machine
    finally:
        machine.close()


def make_key(folder: Path, name: str) -> str:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", folder / "key"], check=True)
    return (folder / "key.pub").read_text().strip()


@pytest.fixture
def key(tmp_path: Path) -> str:
    return make_key(tmp_path, "gpu-1")


PUBLISHED = dict.fromkeys(("stats", "page", "transform.js", "health"), 200) | {"log": 404, "pages": 404}
PRIVATE = dict.fromkeys(("health", "log", "metrics", "scatter", "stats", "transform.js"), 404)


def check_published(vps: Vps) -> None:
    """Check that nginx publishes what it must and nothing else, at once, and that the unit behind it is confined."""
    assert vps.run("systemd-analyze security --threshold=15 scatter-proxy").returncode == 0
    paths = {f"api/ai-transform/{path}": wanted for path, wanted in PUBLISHED.items()} | PRIVATE
    wait_for(lambda: {path: vps.curl(f"/{path}")[0] for path in paths} == paths, 10, f"{paths}")
    assert '"backends"' not in vps.curl("/api/ai-transform/health")[1]

    def first_delta(site: Proxy, space: str) -> float:
        with vps.on(space), site.stream("Plan a party !first=0.5 !pace=0.02") as events:
            next(name for name, _ in events if name == "delta")
            return time.monotonic()

    readers = [(vps.site(), vps.home), (vps.site("127.0.0.1", "http://127.0.0.1:8461"), vps.name)]
    times = together(2, lambda n: first_delta(*readers[n]))  # of one job: at nginx, and at the proxy itself
    assert abs(times[0] - times[1]) < 0.05


@booted
def test_vps_whole_life_real(vps: Vps, key: str, tmp_path: Path) -> None:
    install, before = f"vps --domain shop.test --authorize '{key}'", vps.left()
    dry = vps.install(install + " --dry-run")
    assert "+Match User scatter-tunnel" in dry and "would be loaded by nginx" in dry
    assert vps.changed(before) == set()
    assert "Page: http://shop.test/api/ai-transform/page" in vps.install(install)
    wait_for(lambda: '"no_tunnel"' in vps.curl("/api/ai-transform/health")[1], 5, "nginx with the new configuration")

    (tmp_path / "large").write_text("x" * 300_000)
    ready = "listening on http.*slots: "
    with vps.on(vps.home), program(SCRIPT, "model", 0, log=tmp_path / "model", ready=ready):
        target = re.findall(r"listening on (http://\S+), slots", (tmp_path / "model").read_text())[0]
        with vps.dialled(tmp_path, target) as site:
            check_document(site.post("Plan a picnic").content)
            check_published(vps)
            assert vps.curl("/")[0] == 302 and vps.curl("/api/ai-transform", "-d", f"@{tmp_path}/large")[0] == 413
            pids = "systemctl show -P MainPID -P NRestarts scatter-proxy nginx ssh; pgrep -x nginx"
            then, said = vps.run(pids).stdout, vps.install(install)
            assert {line.split(":")[0] for line in said.split("\n\n")[0].splitlines()} == {"unchanged"}
            assert vps.run(pids).stdout == then
    assert "/var/log/private/scatter" in vps.install("uninstall")
    assert (vps.root / "var/log/private/scatter/scatter-api.jsonl").stat().st_size > 0
    assert vps.changed(before) == set() and vps.install("uninstall") == "nothing to remove\n"


@booted
def test_vps_site_that_is_there_real(vps: Vps, key: str, tmp_path: Path) -> None:
    site = vps.root / "etc/nginx/sites-available/default"
    site.write_text("server {\n  listen 80 default_server;\n  server_name www.x shop.test;\n  root /var/www/html;\n}\n")
    (vps.root / "var/www/html/index.html").write_text("the shop\n")
    vps.run("systemctl reload nginx")
    before = vps.left()
    assert "conflicting server name" in vps.install("vps --domain shop.test", status=1)
    assert not [name for name in vps.changed(before) if "nginx" in name]
    said = vps.install(f"vps --domain shop.test --site /etc/nginx/sites-enabled/default --authorize '{key}'")
    assert f"wrote: /{site.relative_to(vps.root)}" in said
    wait_for(lambda: vps.curl("/api/ai-transform/page")[0] == 200, 5, "nginx with the new configuration")
    with vps.on(vps.home), Fake() as model, vps.dialled(tmp_path, model.url) as shop:
        check_document(shop.post("Plan a picnic").content)
        check_published(vps)
    assert vps.curl("/")[1] == "the shop\n"
    site.write_text((text := site.read_text()).replace("    include", "\tinclude"))
    vps.run("sed -i s,12r/m,60r/m, /etc/nginx/conf.d/scatter.conf")
    assert text.count("# scatter") == 1 and "wrote" not in vps.install("vps")  # site and limits are the owner's
    assert "serves another name" in vps.install("vps --domain other.test", status=1)
    vps.install("uninstall")
    assert vps.changed(before) == set() and vps.curl("/")[1] == "the shop\n"


@booted
def test_vps_keeps_serving_through_upgrades_and_floods_real(vps: Vps, key: str, tmp_path: Path) -> None:
    vps.install(f"vps --domain shop.test --authorize '{key}'")
    subprocess.run(f"ip -n {vps.home} addr add 10.99.0.3/24 dev v0".split(), check=True)
    with vps.on(vps.home), Fake() as model, vps.dialled(tmp_path, model.url) as site:
        other, away, script = vps.site("10.99.0.3"), [], vps.root / "root/scatter/scatter_proxy.py"
        for prompt in ("new !pace=0.01", "newer !pace=0.01"):
            script.write_text(script.read_text() + "# newer\n")
            with ThreadPoolExecutor() as pool, site.stream(prompt) as events:
                next(events)
                upgrade, times = pool.submit(vps.install, "vps"), [time.monotonic()]
                while not upgrade.done() or times[-1] > time.monotonic() - 1:  # a second longer than it takes
                    if other.http.get("/api/ai-transform/health").status_code != 200:
                        times.append(time.monotonic())
                    time.sleep(0.1)  # more often is over nginx's limit
                assert "loaded by scatter-proxy" in upgrade.result() and list(events)[-1][0] == "done"
            away.append(times[-1] - times[1])
        print(f"upgrades: away for {away} s")
        assert min(away) <= 2  # 0.8 s on two cores shared with four others; twice that where it is busier still
        vps.run("sed -i s/360s/2s/ /etc/scatter/nginx-proxy.conf; systemctl restart nginx")  # no minutes until a 504
        with site.stream("one !first=1") as first, site.stream("two") as second:
            assert [next(first)[0], next(second)[0]] == ["started", "queued"]
            third = site.post("three")  # refused by limit_conn
            assert code_of(third) == "rate_limited" and third.headers["retry-after"] == "5"
            assert other.post("four").status_code == 200
            assert [list(first)[-1][0], list(second)[-1][0]] == ["done", "done"]
        with ThreadPoolExecutor(16) as pool:
            flood = [pool.submit(site.post, f"flood {n}") for n in range(800)]
            served = [other.post(f"honest {n}") for n in range(3)]
            assert not flood[-1].done() and all(one.elapsed.total_seconds() < 1 for one in served)
        codes = Counter(one.result().status_code for one in flood)
        print(f"flood: {codes}; another address: {[one.elapsed.total_seconds() for one in served]} s")
        assert {one.status_code for one in served} == {200} and codes.keys() <= {200, 429} and codes[200] < 8
        vps.run("systemctl kill -s STOP scatter-proxy")
        assert code_of(other.http.get("/api/ai-transform/health")) == "timed_out"
        vps.run("systemctl kill -s KILL scatter-proxy; systemctl stop scatter-proxy")
        assert code_of(other.http.get("/api/ai-transform/health")) == "unavailable"


ACME = """cd $(mktemp -d); ALT=subjectAltName=DNS:localhost; echo 127.0.0.1 localhost shop.test old.test >/etc/hosts
openssl req -x509 -newkey rsa:2048 -nodes -keyout key -out /run/acme.crt -subj /CN=localhost -addext $ALT
echo '{"pebble": {"listenAddress": "127.0.0.1:14000", "certificate": "/run/acme.crt", "privateKey": "'$PWD/key'",' >conf
echo '"httpPort": 80, "tlsPort": 443}}' >>conf
systemd-run --unit=acme -E PEBBLE_VA_NOSLEEP=1 -E PEBBLE_WFE_NONCEREJECT=0 pebble -config $PWD/conf"""
CERTBOT = """REQUESTS_CA_BUNDLE=/run/acme.crt certbot -n --server https://localhost:14000/dir --nginx --redirect
--agree-tos --register-unsafely-without-email -d """.replace("\n", " ")


@booted
def test_vps_certbot_works_on_what_we_wrote_real(vps: Vps) -> None:
    vps.run(ACME)
    (vps.root / "etc/nginx/sites-available/default").write_text("server {\n  listen 80;\n  server_name old.test;\n}\n")
    vps.run("systemctl reload nginx")
    wait_for(lambda: vps.run("ss -Hltn sport = :14000").stdout, 10, "the ACME server")
    for name, own, more in (("shop.test", "zz-scatter", ""), ("old.test", "default", " --site {}")):
        site = f"/etc/nginx/sites-enabled/{own}"
        vps.install(install := f"vps --domain {name}{more.format(site)}")
        assert "Congratulations" in (ran := vps.run(CERTBOT + name)).stdout, ran.stderr
        assert "managed by Certbot" in vps.run(f"cat {site}").stdout and "wrote:" not in vps.install(install)
        with vps.on(vps.home):
            ask = f"curl -sk --resolve {name}:443:10.99.0.1 https://{name}/api/ai-transform/health"
            assert '"no_tunnel"' in finished(ask.split()).stdout
        vps.install("uninstall")
        assert "# scatter" not in vps.run("nginx -T").stdout and vps.run("nginx -t").returncode == 0
    assert "managed by Certbot" in vps.run(f"cat {site}").stdout  # the site's owner keeps what is certbot's


BAD_STARTS = {  # what breaks it: (what mends it, what must be said)
    "mv /usr/sbin/nginx /root/nginx": ("mv /root/nginx /usr/sbin/nginx", "sudo apt-get install nginx"),
    "echo oops >/etc/nginx/conf.d/x.conf": ("rm /etc/nginx/conf.d/x.conf", "nginx -t fails already"),
    "echo Oops >/etc/ssh/sshd_config.d/x.conf": ("rm /etc/ssh/sshd_config.d/x.conf", "sshd -t fails already"),
    "printf 'AllowUsers scatter-*\nAllowGroups root' >/etc/ssh/sshd_config.d/x.conf": (
        "rm /etc/ssh/sshd_config.d/x.conf", "add scatter-tunnel"),
    "mount --bind /dev/null /etc/ssh/sshd_config": ("umount /etc/ssh/sshd_config", "lacks this line"),
    "systemd-run -q --unit=thief python3 -m http.server --bind 127.0.0.1 8461; sleep 1": (
        "systemctl stop thief", "port 8461 is taken"),
    "mv /usr/lib/python3.*/ensurepip /root": ("mv /root/ensurepip /usr/lib/python3.*/", "apt-get install python3-venv"),
    "mount -t tmpfs -o size=1m none /opt": ("umount /opt", "less than 100 MiB"),
}  # fmt: skip


@booted
def test_vps_bad_starts_real(vps: Vps, key: str) -> None:
    (vps.root / "etc/nginx/empty").write_text("# no server here\n")
    before = vps.left()
    said = vps.install("vps --domain 'a b' --site /etc/nginx/empty --authorize 'ssh-rsa x y' --revoke gpu-9", status=1)
    for reason in ("'a b' is no domain", "no server block", "is no key with a name", "no key has the name 'gpu-9'"):
        assert reason in said
    for domain in ("x.test;}", "-x.test", "x..test", "x", "http://x.test", "x.test/a", "$(id).test", "a.test\nb.test"):
        ran = vps.run(f"sh /root/scatter/install.sh vps --domain '{domain}'")
        assert ran.returncode in (1, 2) and re.search("is no domain|plain characters", ran.stderr), domain
    vps.run("cp -r /root/scatter /tmp")
    assert "not root" in vps.run("su -s /bin/sh nobody -c '/tmp/scatter/install.sh vps'").stderr
    for fault, (mend, reason) in BAD_STARTS.items():
        vps.run(fault)
        assert reason in vps.install(f"vps --domain shop.test --authorize '{key}'", status=1)
        vps.run(mend)
    assert vps.changed(before) == set()
    vps.run("dpkg -P $(dpkg-query -W -f '${Package} ' '*nginx*'); cd /var/cache/apt/archives; mv nginx-common* /root")
    before = vps.left()
    assert "apt-get failed" in vps.install("vps --domain shop.test --packages", status=1)  # for want of a network
    assert vps.changed(before) == set()
    vps.run("mv /root/nginx-common* /var/cache/apt/archives")
    vps.install("vps --domain shop.test --packages")
    wait_for(lambda: '"no_tunnel"' in vps.curl("/api/ai-transform/health")[1], 10, "nginx from its package")


@booted
def test_vps_refusal_is_put_back_real(vps: Vps) -> None:
    own = "/etc/ssh/sshd_config.d/10-own.conf"
    vps.run(f"printf 'Match User *\\nMaxSessions 5\\nMatch all' >{own}")
    assert "forbids: maxsessions 0" in vps.install("vps --domain shop.test", status=1)
    vps.run(f"rm {own}; sh /root/scatter/install.sh vps --domain shop.test | sed /authorized_keys/q")  # a cut
    vps.run("echo 'server { listen 10.99.0.1:80; }' >/etc/nginx/sites-enabled/default; systemctl restart nginx")
    said = vps.install("vps --domain shop.test", status=1)
    assert "wrote: /etc/ssh/sshd_config.d/50-scatter.conf" in said and "bind() to 0.0.0.0:80 failed" in said
    vps.run("rm /etc/nginx/sites-enabled/default; systemctl restart nginx")
    vps.install("vps --domain shop.test")
    before, script = vps.left(), vps.root / "root/scatter/install.sh"
    sound = script.read_text()
    for old, new, daemon in (
        ("PermitTunnel no", "PermitTunel no", "sshd"),
        ("Match User scatter-tunnel", "Match User *", "sshd"),  # the administrator's settings would change
        ("proxy_cache off", "proxy_cache of f", "nginx"),
    ):
        script.write_text(sound.replace(old, new))
        assert f"{daemon} refuses" in vps.install("vps", status=1)
        assert vps.changed(before) <= {"opt/scatter/install.sh"}, new
    script.write_text(sound.replace("keepalive 16", "keepalive 17"))
    full = "mount -t tmpfs -o size=8k none conf.d; cp /tmp/conf.d/* conf.d; cat /dev/zero >conf.d/full"
    vps.run(f"cd /etc/nginx; cp -a conf.d /tmp; {full}")
    assert "No space left" in vps.install("vps", status=1)  # the disk was not full yet when it was looked at
    vps.run("umount /etc/nginx/conf.d")
    assert vps.changed(before) <= {"opt/scatter/install.sh"}
    script.write_text(sound)
    (vps.root / "root/scatter/scatter.env").write_text("SCATTER_QUEUE=none\n")
    assert "--queue" in vps.install("vps", status=1).lower().replace("scatter_queue", "--queue")
    assert vps.changed(before) <= {"opt/scatter/install.sh"}
    assert vps.run("systemctl is-active scatter-proxy").stdout == "active\n"


FORBIDDEN = """id|-tt|-s sftp|-N -R 127.0.0.1:9999:127.0.0.1:1|-N -R 0.0.0.0:11434:127.0.0.1:1|-N -R 9999:127.0.0.1:1
-N -R /etc/x.sock:127.0.0.1:1|-N -w 0:0|-W 127.0.0.1:22|-W 127.0.0.1:80""".replace("\n", "|")


@booted
def test_vps_tunnel_account_real(vps: Vps, key: str, tmp_path: Path) -> None:
    vps.install(f"vps --domain shop.test --authorize '{key}'")
    for use in FORBIDDEN.split("|"):
        ssh = vps.ssh(tmp_path, use)
        assert ssh.communicate(timeout=20)[0] == "" and ssh.returncode == 255, use
    listening = "ss -Hltn sport = :11434; ss -Hlxn | grep -o backends/gpu-1.sock"
    for use in ("/run/scatter/backends/gpu-1.sock", "127.0.0.1:11434", "11434"):
        ssh = vps.ssh(tmp_path, f"-N -R {use}:127.0.0.1:9")
        wait_for(lambda: vps.run(listening).stdout, 10, use)
        if use != "11434":
            ssh.terminate()
            wait_for(lambda: not vps.run(listening).stdout, 10, "the listener gone")
    assert vps.run("stat -c '%U:%G %a' /run/scatter/backends").stdout == "scatter-tunnel:scatter 2750\n"
    (folder := tmp_path / "other").mkdir()
    other = make_key(folder, "gpu-2")
    assert "another key has the name gpu-1" in vps.install(f"vps --authorize '{other[:-1]}1'", status=1)
    third = re.sub("AAAA.{60}", "AAAA" + "x" * 60, other)[:-1] + "3"
    together(2, lambda n: vps.install(f"vps --authorize '{(other, third)[n]}'"))
    vps.install("vps --revoke gpu-3")
    with vps.on(vps.home), Fake() as model, vps.dialled(folder, model.url, "gpu-2"):
        vps.install("vps --revoke gpu-1")  # which also ends what is connected
        keys = (vps.root / "etc/scatter/authorized_keys").read_text()
        assert ssh.wait(10) == 255 and keys.endswith(f" {other}\n") and keys.count("\n") == 1
        wait_for(lambda: len(re.findall(" serves at ", (folder / "tunnel").read_text())) == 2, 10, "dialled again")
        assert vps.site().post("still here").status_code == 200
    assert "Permission denied" in vps.ssh(tmp_path, "-N").communicate(timeout=20)[1]


@booted
def test_vps_unit_survives_real(vps: Vps, key: str, tmp_path: Path) -> None:
    vps.install(f"vps --domain shop.test --authorize '{key}'")

    def served_by() -> str:
        pid = vps.run("systemctl show -P MainPID scatter-proxy").stdout.strip()
        return pid if '"no_tunnel"' in vps.curl("/api/ai-transform/health")[1] else ""

    for blow in ("-9", "-STOP"):  # the second: an event loop that no longer turns
        gone = {"", wait_for(served_by, 10, "serving")}
        vps.run(f"kill {blow} {max(gone)}")
        wait_for(lambda gone=gone: served_by() not in gone, 45, f"another process after kill {blow}")
    if (group := Path("/sys/fs/cgroup/memory", vps.name)).parent.is_dir():  # from outside: inside it cannot be set
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text("16M")
        (group / "cgroup.procs").write_text(vps.init)  # what it starts from now on is in there
        vps.run("systemctl kill -s KILL scatter-proxy")
        wait_for(lambda: "oom_kill 0" not in (group / "memory.oom_control").read_text(), 20, "killed by the kernel")
        (group / "memory.limit_in_bytes").write_text("1G")
        wait_for(served_by, 20, "serving after the kernel's kill")
    full = "mount -t tmpfs -o size=8k none {0}; cat /dev/zero >{0}/full".format("/var/log/private/scatter")
    vps.run(f"systemctl stop scatter-proxy; {full}; systemctl start scatter-proxy")  # from its first line on
    with vps.on(vps.home), Fake() as model:
        ssh = vps.ssh(tmp_path, f"-N -R 127.0.0.1:11434:{model.url[7:]}")  # the article's plain tunnel, to the port
        site, told = vps.site(), "cat /var/log/scatter-api.jsonl"
        assert [site.post(f"full {n}").status_code for n in range(3)] == [200] * 3 and not vps.run(told).stdout
        vps.run("rm /var/log/scatter/full")
        assert site.post("room again").status_code == 200
        assert vps.run("systemd-analyze security --threshold=15 scatter-proxy").returncode == 0
        assert json.loads(vps.run(told).stdout.splitlines()[-1])["backend"] == "127.0.0.1:11434"
        ssh.terminate()
    vps.run("systemctl stop scatter-proxy; umount /var/log/private/scatter")
    vps.run("echo SCATTER_QUEUE=none >/etc/scatter/scatter.env; systemctl restart scatter-proxy")
    wait_for(lambda: vps.run("systemctl is-failed scatter-proxy").stdout == "failed\n", 10, "no restarts after exit 2")
    vps.run("echo >/etc/scatter/scatter.env; systemctl poweroff")
    vps.container.wait(60)
    vps.boot()
    wait_for(served_by, 20, "serving after a boot")
    assert vps.run("stat -c '%U:%G %a' /run/scatter/backends").stdout == "scatter-tunnel:scatter 2750\n"


class Home(Vps):
    """A workstation that has booted, too, in the second namespace of a VPS."""

    def __init__(self, far: Vps, debian: Path, folder: Path) -> None:
        self.root, self.name, self.upper = folder / "home", far.home, far.upper / "home"
        lower = f"lowerdir={debian},upperdir={self.upper}/files,workdir={self.upper}/work"
        folders = f"mkdir -p {self.root} {self.upper}/files {self.upper}/work"
        for step in (folders, f"mount -t overlay -o {lower} none {self.root}"):
            subprocess.run(step.split(), check=True)
        (self.root / "etc/hosts").write_text("127.0.0.1 localhost\n10.99.0.1 shop.test\n")
        for name in tunnel.BUNDLE:
            shutil.copy(HERE / name, self.root / "srv")
        self.boot()

    def close(self) -> None:
        self.run("systemctl poweroff --force --force")
        self.container.wait(30)
        subprocess.run(["umount", "-l", self.root], check=True)

    def may_log_in(self, far: Vps, user: str, there: str) -> None:
        """Let a user log in to the VPS by a key of his own; what he knows of its host keys is what they are now."""
        own = "mkdir -p ~/.ssh; cd ~/.ssh; test -e id_ed25519 || ssh-keygen -q -t ed25519 -N \"\" -f id_ed25519"
        key = self.run(f"su - {user} -c '{own}; cat id_ed25519.pub'").stdout.strip()
        known = "".join("10.99.0.1 " + k.read_text() for k in (far.root / "etc/ssh").glob("ssh_host_*_key.pub"))
        self.run(f"su - {user} -c 'echo \"{known}\" >~/.ssh/known_hosts'")
        far.run(f"su - {there} -c 'mkdir -p ~/.ssh && echo {key} >>~/.ssh/authorized_keys'")

    def setup(self, flags: str = "", at: str = "/srv") -> str:
        command = f"umask 077; python3 {at}/tunnel.py setup root@10.99.0.1 --domain shop.test --model fake-8b {flags}"
        ran = self.run(command)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout


SERVED = "ok +document from outside: .*\n\nhttp://shop.test/api/ai-transform/page\nnext, on the VPS: certbot"


@booted
def test_setup_from_ssh_access_to_a_url_and_back_real(vps: Vps, debian: Path, tmp_path: Path) -> None:
    (vps.root / "etc/pip.conf").write_text("[global]\nno-index = true\nfind-links = /root/wheels\n")
    script = "python3 /usr/local/lib/scatter/tunnel.py"

    def runs() -> list[str]:
        show = "systemctl show -P MainPID -P NRestarts -P ExecReloadStatus "
        return [vps.run(show + "scatter-proxy nginx ssh").stdout, home.run(show + "scatter-tunnel").stdout]

    with contextlib.closing(Home(vps, debian, tmp_path)) as home:
        home.run("useradd -m -s /bin/bash me")
        vps.run("useradd -m -s /bin/bash -G sudo admin; echo admin:secret | chpasswd")
        home.may_log_in(vps, "root", "root")
        before, own = home.left(), home.root / "var/lib/scatter"
        own.mkdir()
        (own / "scatter.env").write_text("SCATTER_MAX_TOKENS=160\n")
        ollama = "import test_all, time; test_all.Fake('11434').__enter__(); print('up'); time.sleep(300)"
        inside = ["ip", "netns", "exec", vps.home, sys.executable, "-c", ollama]
        with program(*inside, log=tmp_path / "model", ready="up"):
            said = home.setup("--dry-run")
            assert "would write: /etc/scatter/scatter.env" in said and f"would write: {script[8:]}" in said
            assert not (vps.root / "opt/scatter").exists() and os.listdir(own) == ["scatter.env"]
            began = time.monotonic()
            assert re.search(SERVED, home.setup())
            took = time.monotonic() - began
            print(f"from ssh access to a public URL: {took:.1f} s")
            assert took < 60
            then, said = runs(), home.setup()
            assert said.count("unchanged: ") == 18 and not re.search("wrote|loaded|systemctl", said), said
            assert runs() == then

            # a rebuilt VPS: other host keys, and nothing of ours
            vps.run("rm /etc/ssh/ssh_host_*; ssh-keygen -A; systemctl restart ssh")
            vps.run("sh /opt/scatter/install.sh uninstall")
            wait_for(lambda: "host_key_changed" in home.run(f"{script} status").stdout, 10, "another machine")
            home.may_log_in(vps, "root", "root")
            assert re.search(SERVED, home.setup(at="/usr/local/lib/scatter"))
            key = (vps.root / "etc/ssh/ssh_host_ed25519_key.pub").read_text().split()[1]
            assert key in (own / "known_hosts").read_text() and len((own / "known_hosts").read_text().split("\n")) == 4

            # another workstation, here another user, whose ssh is to ask for a password: once; then sudo does
            home.may_log_in(vps, "me", "admin")
            home.run("su - me -c 'echo PreferredAuthentications password >~/.ssh/config'")
            second = "python3 /srv/tunnel.py setup admin@10.99.0.1 --domain shop.test --model fake-8b"
            person = Demo("nsenter", "-t", home.init, "-a", "--", "su", "-", "me", "--session-command", second)
            for question in ("'s password: ", "password for admin: "):
                person.says(question, 30)
                os.write(person.terminal, b"secret\n")
            person.says(SERVED, 60)
            assert os.waitpid(person.pid, 0)[1] == 0
            health = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8461/health').read().decode())"
            assert vps.run(f'python3 -c "{health}"').stdout.count('"up":true') == 2
        assert (home.root / "var/lib/systemd/linger/me").exists()
        home.run(f"su - me -c 'python3 ~/.config/scatter/tunnel.py uninstall'; {script} uninstall")
        assert not (home.root / "var/lib/systemd/linger/me").exists() and (own / "key").stat().st_uid == 0
        assert {name for name in home.changed(before) if not name.startswith("var/lib/scatter")} == set()
        assert home.run("systemctl is-active scatter-tunnel; pgrep -x ssh").stdout == "inactive\n"


# --- the chain ----------------------------------------------------------------


class Chain(Proxy):
    """A demo that has come up, as a client sees it, and its parts."""

    def __init__(self, copy: Path, demo: Demo) -> None:
        self.url = demo.says(r"page +(http://[\d.:]+)/")
        self.model = "http://" + demo.says(r"model +\.*\S+ on ([\d.:]+)")
        self.home = demo.says(r"SCATTER_HOME=(\S+)")
        self.copy, self.folder = copy, Path(self.home).parent
        self.http = httpx.Client(base_url=self.url, timeout=120, limits=httpx.Limits(max_connections=100))
        self.up()

    def generations(self) -> int:
        """Return how many POSTs went through the guard, as `tunnel.py status` tells."""
        ask = [sys.executable, self.copy / "tunnel.py", "status", "--json"]
        told = finished(ask, env={**os.environ, "SCATTER_HOME": self.home})
        return json.loads(told.stdout)["requests"]

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "scatter-api.jsonl").read_text().splitlines()]

    def busy_slots(self) -> int:
        """Return how many slots of the model server work."""
        return sum(slot["is_processing"] for slot in httpx.get(self.model + "/slots", timeout=30).json())


@pytest.fixture(scope="module")
def chain_real(copy: Path) -> Iterator[Chain]:
    """The demo's whole chain: model, sshd, ssh, guard, proxy."""
    demo = Demo(copy / "install.sh", "demo")
    yield Chain(copy, demo)
    demo.ended(signal.SIGTERM)


def test_chain_answers_with_a_document_real(chain_real: Chain) -> None:
    before = chain_real.generations()

    answer = chain_real.post("Write a launch e-mail for our new espresso machine, under 150 words")

    assert sinc_prompt.validate(answer.json()["sinc"]) == (True, [])
    assert all(float(answer.headers[name]) > 0 for name in ("x-tok-per-s", "x-gen-time", "x-tokens"))
    wait_for(lambda: chain_real.generations() == before + 1, 8, "it went through the guard")


def test_chain_streams_then_hits_real(chain_real: Chain) -> None:
    prompt = "Plan a picnic for ten"
    with chain_real.stream(prompt) as events:
        told = [next(events), next(events)]
        assert chain_real.busy_slots() == 1  # the model still writes
        told += list(events)
    with chain_real.stream(prompt) as events:
        again = list(events)
    hit = chain_real.post(prompt)

    assert [told[0][0], told[1][0], told[-1][0]] == ["started", "delta", "done"]
    assert band_texts(told) == band_texts(again) == [f["x"] for f in hit.json()["sinc"]["fragments"]]
    assert again[-1][1]["metrics"]["cache"] == hit.headers["x-cache"] == "hit"


def test_chain_page_fills_its_bands_and_tells_a_pause_real(chain_real: Chain) -> None:
    env = {**os.environ, "SCATTER_HOME": chain_real.home}
    with visit(chain_real.url) as page:
        send(page, "Plan a picnic by the sea")
        page.wait_for_selector("#rate >> text=≈", timeout=60_000)
        page.wait_for_selector("#status >> text=Done", timeout=200_000)
        assert all(page.locator(".text").all_inner_texts()) and page.inner_text("#source") == "sinc-scatter · demo"
        for command, state, said in (("pause", "disabled", "owner is using it"), ("resume", "enabled", "Enter sends")):
            assert finished([sys.executable, chain_real.copy / "tunnel.py", command], env=env).returncode == 0
            shows(page, f"#send:{state}")
            shows(page, "#reason", said)


def test_chain_same_prompt_is_one_generation_real(chain_real: Chain) -> None:
    def settled() -> int:
        time.sleep(6)  # the tunnel keeps its counts to itself for 5 s
        return chain_real.generations()

    before = settled()
    answers = together(20, lambda n: chain_real.post("Name three trees"))

    assert len({answer.content for answer in answers}) == 1 and answers[0].status_code == 200
    assert settled() == before + 1


@pytest.mark.parametrize("after", ["started", "delta"])
def test_chain_client_that_leaves_frees_the_gpu_real(chain_real: Chain, after: str) -> None:
    with chain_real.stream(f"Describe the sea at night, {after}") as events:
        assert any(name == after for name, _ in events)
        wait_for(chain_real.busy_slots, 5)
    left = time.monotonic()
    wait_for(lambda: not chain_real.busy_slots(), 5, "the model stopped")
    print(f"slot free {time.monotonic() - left:.3f} s after the client left ({after})")


def test_chain_that_loses_ssh_says_so_and_comes_back_real(chain_real: Chain) -> None:
    chain_real.post("Kept for later")
    os.kill(processes("-NTv", f"{chain_real.folder}/backends")[0], signal.SIGKILL)
    killed = time.monotonic()
    wait_for(lambda: chain_real.health()["status"] != "ok", 2, "offline within 2 s")
    off = time.monotonic() - killed
    hit = chain_real.post("Kept for later")
    wait_for(lambda: chain_real.health()["status"] == "ok", 10, "it comes back by itself")
    print(f"noticed after {off:.3f} s, serving again after {time.monotonic() - killed:.3f} s")

    assert hit.headers["x-cache"] == "hit" and chain_real.post("Back again").status_code == 200


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A whole chain by its parts, of which each is [process, how it is started]; ssh is started by the tunnel."""
    front, target = free_port(), free_port()
    (tmp_path / "backends").mkdir()
    own = ["--backend", "none", "--backend-dir", tmp_path / "backends", "--log", tmp_path / "log", "--port", front]
    commands = {"proxy": [sys.executable, sp.__file__, *own, "--max-tokens", 128], "model": [SCRIPT, "model", target]}
    with FarHost(f"PermitOpen 127.0.0.1:{front}\n{TUNNEL_RULES}") as far:

        def start(part: str) -> Any:
            if part == "sshd":
                far.start_sshd()
                return far.sshd
            log = tmp_path / f"{part}{time.monotonic()}"
            return far.enter_context(program(*commands[part], log=log, ready="listening on http", seconds=90))

        held = {part: [start(part), lambda part=part: start(part)] for part in commands} | {"front": front}
        more = ["--front", f"127.0.0.1:{front}", "--target", f"127.0.0.1:{target}", "--remote"]
        child = far.run(*more, str(tmp_path / "backends" / "gpu.sock"))
        held |= {"sshd": [far.sshd, lambda: start("sshd")], "ssh": [None, lambda: None]}
        yield held | {"id": lambda: children(child.pid)[0]}


def test_chaos_is_outlived_real(parts: dict[str, Any]) -> None:
    """Parts are killed at random in turn; a client that retries as Retry-After says gets all its documents."""
    random.seed(11)
    url, over = f"http://127.0.0.1:{parts['front']}/scatter", time.monotonic() + 120 * (SOAK > 2000)
    tries, back, order = Counter(), [], []

    def document(prompt: str) -> None:
        began = time.monotonic()
        while time.monotonic() < began + 300:  # a document takes a second, on a machine that has nothing else to do
            try:
                answer = httpx.post(url, json={"prompt": prompt}, timeout=200)
                if answer.status_code == 200:
                    return check_document(answer.content)
                tries[code_of(answer)] += 1
                time.sleep(float(answer.headers.get("retry-after", 1)))
            except httpx.HTTPError as exc:  # the proxy itself is gone; nginx would say so, with Retry-After
                tries[type(exc).__name__] += 1
                time.sleep(1)
        raise AssertionError(f"no document in 300 s: {tries}")

    document("Before")
    while len(back) < 4 or time.monotonic() < over:
        order = order or random.sample(["ssh", "sshd", "model", "proxy"], 4)
        part = order.pop()
        with ThreadPoolExecutor() as pool:
            asked = pool.submit(document, f"Plan party number {len(back)}")
            time.sleep(random.random() * 2)  # at any stage of it
            pid, killed = parts["id"]() if part == "ssh" else parts[part][0].pid, time.monotonic()
            for one in [*children(pid), pid]:  # sshd with its sessions
                os.kill(one, signal.SIGKILL)
            time.sleep(random.random())
            parts[part][0] = parts[part][1]()  # as a service manager does
            asked.result()
        back.append(f"{part} {time.monotonic() - killed:.1f}")
    print(f"{len(back)} documents, s from a kill to one: {back}; before that {dict(tries)}")


def test_offline_answer_waits_for_nothing_real(tmp_path: Path) -> None:
    with proxy(tmp_path, "--backend", "none") as server:
        times = sorted(server.post(f"off {n}").elapsed.total_seconds() for n in range(300))

        assert code_of(server.post("off")) == "model_offline"
        print(f"503 model_offline: p50 {times[150] * 1000:.2f} ms, p99 {times[296] * 1000:.2f} ms, client included")
        assert times[-1] < 1  # no probe is waited for; the bench measures it


# --- shape --------------------------------------------------------------------

CEILINGS = {"scatter_proxy.py": 1500, "tunnel.py": 1000, "install.sh": 550, "test_all.py": 2500, "README.md": 240}
OVER = {"scatter_proxy.py", "tunnel.py", "test_all.py"}  # strict: this turns red the day that one is met
NOT_MET = pytest.mark.xfail(strict=True, reason="over its ceiling; the simpler shape is still to be found")


@pytest.mark.parametrize("name", [pytest.param(n, marks=NOT_MET) if n in OVER else n for n in CEILINGS])
def test_file_can_be_read_in_one_sitting(name: str) -> None:
    assert len((HERE / name).read_text().splitlines()) <= CEILINGS[name]


def test_top_level_holds_the_five_files() -> None:
    listed = finished(["git", "ls-files"], cwd=HERE).stdout.split()

    assert {name for name in listed if "/" not in name and name[0] != "."} <= set(CEILINGS)


def test_python_is_clean() -> None:
    files = ["scatter_proxy.py", "tunnel.py", "test_all.py"]
    result = finished([sys.executable, "-m", "ruff", "check", "--no-cache", *files], cwd=HERE)

    assert result.returncode == 0, result.stdout


RUN_BY = {"./install.sh demo": "test_demo_real", "./install.sh test": "HERE"}  # the latter is how all of this runs


def test_readme_commands_run_or_need_a_server(front: Proxy, tmp_path: Path) -> None:
    scripts = (HERE / "tunnel.py").read_text() + (HERE / "install.sh").read_text()
    env = {**os.environ, "SCATTER_HOME": str(tmp_path)}
    said = Counter()
    for part in (HERE / "README.md").read_text().split("\n## "):
        for command in "\n".join(re.findall("```sh\n(.*?)```", part, re.DOTALL)).replace("\\\n", "").splitlines():
            if re.match("curl |.* key$", command):
                here = command.replace("http://127.0.0.1:8461", front.url).replace("python3", sys.executable)
                answer = finished(["sh", "-c", here], cwd=HERE, env=env).stdout
                said.update(re.findall('^{"sinc"|^event: done|^ssh-ed25519 ', answer, re.MULTILINE))
            else:
                assert RUN_BY.get(command) in globals() or part.startswith("Put it on your server"), command
                assert all(flag in scripts for flag in re.findall(" (--[a-z-]+)", command)), command

    assert said == {'{"sinc"': 1, "event: done": 1, "ssh-ed25519 ": 1}


def test_readme_names_each_setting_with_its_default() -> None:
    text = (HERE / "README.md").read_text()

    for setting in fields(sp.Settings):
        default = " ".join(setting.default) if isinstance(setting.default, tuple) else str(setting.default)
        shown = f"`{default}`" if default else ""
        assert f"| `--{setting.name.replace('_', '-')}` | {shown} | {setting.metadata['help']} |" in text


# --- bench --------------------------------------------------------------------
# No test: it measures what is promised, beside what that is compared with. What is compared takes turns (A B A B), so
# that whatever else the machine does hits all alike; a row is the median of the rounds, with the least and the most.
# Load comes from this process, what is measured runs in others; all clocks are the kernel's monotonic one.

Row = tuple[str, str, Sequence[float], str]  # what; bound: sign, number, unit; a value a round; what stands beside it
ROUNDS, NUMBER, PACE = 3, itertools.count(), 290  # PACE: tokens a second, of the article's GPU
STAMP = re.compile(rb"@(\d+\.\d+) ")  # in each token of a paced answer: when the model server wrote it, in s
SERVE = "\nuvicorn.run(app, port=0, access_log=False, http='h11', loop='asyncio')"

BARE = """import httpx, sys, uvicorn
from starlette.applications import Starlette
from starlette.responses import Response, StreamingResponse
app, client = Starlette(), httpx.AsyncClient(base_url=sys.argv[1], timeout=300)
async def whole(request):
    return Response((await client.post("/api/generate", content=await request.body())).content)
async def stream(request):
    ask = client.build_request("POST", "/api/generate", content=await request.body())
    return StreamingResponse((await client.send(ask, stream=True)).aiter_raw())
app.add_route("/scatter", whole, ["POST"]); app.add_route("/stream", stream, ["POST"])"""

ARTICLE = """import httpx, json, sys, time, uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
app = Starlette()
async def scatter(request):
    prompt, began = (await request.json())["prompt"], time.time()
    ask = {"model": "m", "prompt": prompt, "stream": False, "options": {"temperature": 0.3}}
    async with httpx.AsyncClient(timeout=30) as client:
        answer = (await client.post(sys.argv[1] + "/api/generate", json=ask)).json()
    line = {"ts": began, "prompt_len": len(prompt), "tokens": answer["eval_count"], "elapsed": time.time() - began}
    line["tok_per_s"] = line["tokens"] / line["elapsed"]
    with open(sys.argv[2], "a") as log:
        log.write(json.dumps(line) + "\\n")
    numbers = {"X-Tok-Per-S": "tok_per_s", "X-Gen-Time": "elapsed", "X-Tokens": "tokens"}
    return JSONResponse({"sinc": json.loads(answer["response"])}, headers={k: str(line[v]) for k, v in numbers.items()})
app.add_route("/scatter", scatter, ["POST"])"""


def turns(measures: Mapping[Any, Callable[[], Any]]) -> dict[Any, list[Any]]:
    """Let each measure have its turn, round after round; return what each gave."""
    found: dict[Any, list[Any]] = {name: [] for name in measures}
    for _, name in itertools.product(range(ROUNDS), measures):
        gc.collect()
        found[name].append(measures[name]())
    return found


def spread(values: Sequence[float]) -> str:
    """Return a median with the least and the most, to three figures."""
    three = statistics.median(values), min(values), max(values)
    return "{} [{}–{}]".format(*(f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in three))


class Instant(asyncio.Protocol):
    """A model server that speaks Ollama and answers at once; for `!paced=N` with N tokens, PACE a second."""

    HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
    left: ClassVar[list[float]] = []  # when a client broke off
    idle: ClassVar[list[float]] = []  # from an answer's end to the next request, in s
    ended, whole = 0.0, json.dumps({name: "text of " + name for name in BAND_NAMES})

    def connection_made(self, transport: Any) -> None:
        self.transport, self.got, self.timer = transport, b"", None

    def connection_lost(self, _: Exception | None) -> None:
        if self.timer:
            self.timer.cancel()
            self.left.append(time.monotonic())

    def chunk(self, text: str, tokens: int = 0) -> bytes:
        """Return a line of Ollama's, as one chunk; tokens: it is the last, of so many."""
        line = {"model": "instant", "created_at": "2026-11-22T12:00:00Z", "response": text, "done": tokens > 0}
        line |= {"done_reason": "stop", "eval_count": tokens, "eval_duration": tokens * 10**6} if tokens else {}
        data = json.dumps(line).encode() + b"\n"
        return b"%x\r\n%s\r\n%s" % (len(data), data, b"0\r\n\r\n" if tokens else b"")

    def data_received(self, data: bytes) -> None:
        self.got += data
        head, blank, body = self.got.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: *(\d+)", head)
        if not blank or len(body) < int(length[1] if length else 0):
            return
        self.got, paced = b"", re.search(rb"!paced=(\d+)", body)
        if not body or b'"stream":false' in body:
            told = {"response": self.whole, "done": True, "eval_count": 40}
            said = json.dumps(told if body else {"version": "0.34.2", "left": self.left, "idle": self.idle})
            self.transport.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(said)}\r\n\r\n{said}".encode())
        elif paced:
            self.idle += [time.monotonic() - Instant.ended] if Instant.ended else []
            self.began, self.at, self.tokens = time.monotonic(), 0, int(paced[1])
            self.transport.write(self.HEAD)
            self.token()
        else:
            self.transport.write(self.HEAD + self.chunk(self.whole) + self.chunk("", 40))

    def token(self) -> None:
        """Write the next token, and see to it that the one after it comes in time, whatever this one took."""
        if self.at == self.tokens:
            self.transport.write(self.chunk('"}', self.tokens))
            self.timer, Instant.ended = None, time.monotonic()
            return
        band, within = divmod(self.at * 6, self.tokens)
        text = ('", "' if self.at else '{"') + f'{BAND_NAMES[band]}": "' if within < 6 else ""
        self.transport.write(self.chunk(f"{text}@{time.monotonic():.6f} "))
        self.at += 1
        self.timer = asyncio.get_running_loop().call_at(self.began + self.at / PACE, self.token)


async def serve_instant(door: socket.socket) -> None:
    await (await asyncio.get_running_loop().create_server(Instant, sock=door)).serve_forever()


async def serve_guard(door: socket.socket, model: str) -> None:
    guard = tunnel.Guard(model, lambda: tunnel.Limits("m", 8192, 4096, "-1"), lambda: False)
    serve: Any = lambda *pair: tunnel.Connection(guard, *pair).serve()
    await (await asyncio.start_server(serve, sock=door, limit=tunnel.HEAD_LIMIT)).serve_forever()


async def serve_link(door: socket.socket, port: int, dialled: Any) -> None:
    """Pass bytes to port, 10 ms late each way; at SIGUSR1 lose those of the connections that there are."""
    loop, lives, held = asyncio.get_running_loop(), [0], []  # held: the tasks, which the loop holds weakly
    loop.add_signal_handler(signal.SIGUSR1, lambda: lives.append(len(lives)))

    async def carry(life: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def give(data: bytes) -> None:
            if life == lives[-1]:
                writer.write(data) if data else writer.close()

        data = b"first"
        while data:
            try:
                data = await reader.read(65536)
            except OSError:  # a reset is an end too
                data = b""
            loop.call_later(0.01, give, data)

    async def accept(*near: Any) -> None:
        dialled.value, life = time.monotonic(), lives[-1]
        held.append(asyncio.current_task())
        far = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(carry(life, near[0], far[1]), carry(life, far[0], near[1]))

    await (await asyncio.start_server(accept, sock=door)).serve_forever()


@contextlib.contextmanager
def apart(serve: Callable[..., Any], *args: Any) -> Iterator[tuple[str, int]]:
    """Run one of the servers above in a process of its own; give its ADDRESS:PORT and that process."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as door:  # named: else no TCP_NODELAY
        door.bind(("127.0.0.1", 0))
        door.listen(256)
        child = multiprocessing.get_context("fork").Process(target=lambda: asyncio.run(serve(door, *args)), daemon=True)
        child.start()
        try:
            yield f"127.0.0.1:{door.getsockname()[1]}", child.pid or 0
        finally:
            child.kill()
            child.join()


class Load:
    """What clients at a URL saw: took and late in s, ascending; seconds, rate a second; cpu in s of process pid."""

    def __init__(self, url: str, prompts: Iterable[str], clients: int = 1, **how: Any) -> None:
        self.took: list[float] = []
        self.late: list[float] = []
        host, _, path = url.removeprefix("http://").partition("/")
        self.head = f"POST /{path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        self.head += f"Accept: {how.get('accept', '*/*')}\r\n"
        self.prompts, self.address, self.status = iter(prompts), host.split(":"), b"%d" % how.get("status", 200)
        used = Path(f"/proc/{how.get('pid', 'self')}/schedstat")  # its first figure is in ns
        self.cpu, self.seconds = -int(used.read_text().split()[0]) * 1e-9, -time.monotonic()
        asyncio.run(self.run(clients))
        self.cpu, self.seconds = self.cpu + int(used.read_text().split()[0]) * 1e-9, self.seconds + time.monotonic()
        self.rate, self.took, self.late = len(self.took) / self.seconds, sorted(self.took), sorted(self.late)

    async def run(self, clients: int) -> None:
        await asyncio.gather(*(self.client() for _ in range(clients)))

    async def client(self) -> None:
        """Ask one prompt after the other over one connection."""
        reader, writer = await asyncio.open_connection(*self.address)
        for prompt in self.prompts:
            body = json.dumps({"prompt": prompt})
            began = time.monotonic()
            writer.write(f"{self.head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            assert head[9:12] == self.status, head
            if length := re.search(rb"(?i)content-length: *(\d+)", head):
                await reader.readexactly(int(length[1]))
            data = b"" if length else b"?"
            while data and not data.endswith(b"0\r\n\r\n"):
                data = await reader.read(1 << 16)
                now, tokens = time.monotonic(), data.partition(b"event: done")[0]
                self.late.extend(now - float(at) for at in STAMP.findall(tokens))
            self.took.append(time.monotonic() - began)
        writer.close()


def ms(values: Sequence[float], share: float = 0.5) -> float:
    """Return a percentile of ascending seconds, in ms."""
    return values[min(len(values) - 1, int(len(values) * share))] * 1000


def added(ours: Sequence[Load], bare: Sequence[Load], what: str = "took") -> list[float]:
    """Return by how many ms, at p50, each round of ours is slower."""
    return [ms(getattr(one, what)) - ms(getattr(other, what)) for one, other in zip(ours, bare)]


def unique(count: int, order: str = "") -> Iterator[str]:
    """Return prompts that were never asked before."""
    return (f"prompt {next(NUMBER)} {order}" for _ in range(count))


def asks(url: str, count: int, clients: int = 1, order: str = "", **how: Any) -> Callable[[], Load]:
    """Return what asks so many prompts, new ones each time that it is called."""
    return lambda: Load(url, unique(count, order), clients, **how)


class Bench(contextlib.ExitStack):
    """The sections of the bench; each starts what it needs, and yields rows."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.model = self.enter_context(apart(serve_instant))[0]

    def ours(self, *flags: Any, model: str = "", name: str = "ours", count: int = 1) -> Proxy:
        """Return our proxy, before the model server if no other is named."""
        flags = ("--backend", "http://" + (model or self.model), "--slots", 16, *flags)
        return self.enter_context(proxy(self.folder / name, *flags)).up(count)

    def compared(self, code: str, model: str = "") -> tuple[str, int]:
        """Run BARE or ARTICLE, before the model server if no other is named; return its URL and process."""
        log = self.folder / f"{len(code)}.out"
        command = (sys.executable, "-c", code + SERVE, f"http://{model or self.model}", f"{log}.jsonl")
        process = self.enter_context(program(*command, log=log, ready="running on http"))
        return re.findall(r"running on (http://[\d.:]+)", log.read_text())[0], process.pid

    def requests(self) -> Iterator[Row]:
        ours, straight = self.ours(), f"http://{self.model}/api/generate"
        urls = {"straight": straight, "bare": self.compared(BARE)[0] + "/scatter"}
        urls |= {"article": self.compared(ARTICLE)[0] + "/scatter", "ours": ours.url + "/scatter"}
        one = turns({k: asks(url, 20 if k == "article" else 500) for k, url in urls.items()})
        many = turns({k: asks(url, {"article": 48, "bare": 800}.get(k, 2900), 16) for k, url in urls.items()})
        hits = turns({n: lambda n=n: Load(urls["ours"], ["hit"] * 2000, n) for n in (1, 16)})  # type: ignore[misc]
        rss = re.findall(r"VmRSS:\s+(\d+)", Path(f"/proc/{ours.process.pid}/status").read_text())
        more = {k: added(loads, one["straight"]) for k, loads in one.items()}
        rate = {k: [load.rate for load in loads] for k, loads in many.items()}
        late = {k: [ms(load.took, 0.99) for load in loads] for k, loads in many.items()}
        beside = f"bare {spread(more['bare'])}, article {spread(more['article'])}"
        yield "POST, backend instant: added, p50", "≤ 1.2 ms", more["ours"], beside
        yield "  times the bare proxy's", "≤ 2 ×", [*map(operator.truediv, more["ours"], more["bare"])], ""
        beside = f"bare {spread(rate['bare'])}, article {spread(rate['article'])}"
        yield "16 clients, 16 slots: requests", "≥ 800 /s", rate["ours"], beside
        yield "  p99", "≤ 40 ms", late["ours"], f"bare {spread(late['bare'])}, article {spread(late['article'])}"
        yield "hit, p50", "≤ 0.5 ms", [ms(load.took) for load in hits[1]], ""
        yield "hits, 16 clients", "≥ 3000 /s", [load.rate for load in hits[16]], ""
        yield "resident after 10,200 prompts", "≤ 60 MB", [int(rss[0]) * 1.024e-3], ""

    def streams(self) -> Iterator[Row]:
        ours, (bare, pid) = self.ours(), self.compared(BARE)
        two = {"ours": (ours.url + "/scatter", ours.process.pid), "bare": (bare + "/stream", pid)}
        order, accept = f"!paced={3 * PACE}", "text/event-stream"
        found = turns({k: asks(url, 16, 16, order, pid=pid, accept=accept) for k, (url, pid) in two.items()})
        cost = {k: [load.cpu / (16 * 3 * PACE) * 1e6 for load in loads] for k, loads in found.items()}
        late = {k: [ms(load.late, 0.99) for load in loads] for k, loads in found.items()}
        yield "16 streams of 290 tok/s: p99 lateness", "≤ 5 ms", late["ours"], f"bare {spread(late['bare'])}"
        beside = f"{spread(cost['ours'])} us a token, bare {spread(cost['bare'])}"
        yield "  CPU, times the bare proxy's", "≤ 1.5 ×", [*map(operator.truediv, cost["ours"], cost["bare"])], beside

    def queue(self) -> Iterator[Row]:
        off = self.enter_context(proxy(self.folder / "off", "--backend", "none"))
        refused = turns({"off": asks(off.url + "/scatter", 500, status=503)})["off"]
        yield "503 while offline, p99", "≤ 2 ms", [ms(load.took, 0.99) for load in refused], ""
        ours, gone, freed = self.ours("--slots", 1), list[float](), list[float]()

        def tell(what: str) -> list[float]:
            return httpx.get("http://" + self.model).json()[what]

        for prompt in unique(20, "!paced=9000"):
            with ours.stream(prompt) as runs, contextlib.ExitStack() as second:
                waits = second.enter_context(ours.stream(f"{prompt} second"))
                assert (next(runs)[0], next(waits)[1]) == ("started", {"position": 1})
                with ours.stream(f"{prompt} third") as events:
                    assert next(events)[1] == {"position": 2}
                    left = time.monotonic()
                    second.close()
                    assert next(events)[1] == {"position": 1}
                    freed.append((time.monotonic() - left) * 1000)
                left = time.monotonic()
            gone.append((wait_for(lambda: tell("left")[len(gone) :], 5)[-1] - left) * 1000)
        yield "client leaves: the backend sees it", "≤ 100 ms", gone, ""
        yield "  a queued one frees its place", "≤ 100 ms", freed, ""
        work = {"load": asks(ours.url + "/scatter", 60, 8, "!paced=6"), "idle": lambda: sorted(tell("idle")[-59:])}
        idle = turns(work)["idle"]  # 59 gaps between 60 answers, while the next seven wait
        beside = f"p90 {spread([ms(gaps, 0.9) for gaps in idle])}"
        yield "slot idle while work waits, p50", "≤ 2 ms", [ms(gaps) for gaps in idle], beside

    def link(self) -> Iterator[Row]:
        plain, _ = self.enter_context(apart(serve_link, self.model.partition(":")[2], multiprocessing.Value("d", 0.0)))
        links = [Link(self, self.folder / f"{n}", self.model, is_slow=True) for n in range(ROUNDS)]
        urls = {"link": plain + "/api/generate", "bare": self.compared(BARE, plain)[0] + "/scatter"}
        urls["ours"] = links[0].proxy.url + "/scatter"
        found = turns({k: asks(url, 40) for k, url in urls.items()})
        bare = f"bare, without ssh and guard {spread(added(found['bare'], found['link']))}"
        beside = f"the link itself {spread([ms(load.took) for load in found['link']])}, {bare}"
        yield "request over a 20 ms link: added, p50", "≤ 3 ms", added(found["ours"], found["link"]), beside
        yield "ssh killed: serving again", "≤ 1 s", [link.kill() for link in links], "the article's loop: 5 s and more"
        idle = together(ROUNDS, lambda n: links[n].cut(in_flight=False))
        yield "link dead, idle: noticed at both ends", "≤ 9 s", [knew for knew, _ in idle], "ssh's default: never"
        yield "  its socket taken over by a new one", "≤ 1 s", [took for _, took in idle], "a TCP port: 16 s and more"
        told = together(ROUNDS, lambda n: links[n].cut(in_flight=True))
        yield "link dead, request in flight: settled", "≤ 7 s", [knew for knew, _ in told], "ssh's default: never"

    def guard(self) -> Iterator[Row]:
        guard, _ = self.enter_context(apart(serve_guard, self.model))
        urls = {"bare": self.model + "/api/generate", "ours": guard + "/api/generate"}
        one = turns({k: asks(url, 500) for k, url in urls.items()})
        many = turns({k: asks(url, 1, 1, f"!paced={PACE}") for k, url in urls.items()})
        yield "guard: added to a request, p50", "≤ 0.5 ms", added(one["ours"], one["bare"]), "no guard"
        yield "  to a chunk, p50", "≤ 0.2 ms", added(many["ours"], many["bare"], "late"), "no guard"

    def chain(self) -> Iterator[Row]:
        """The real model on one core, all else on another."""
        code = re.findall(r"<<'PY'\n(.*?)\nPY\n", SCRIPT.read_text(), re.DOTALL)[0]
        code = code.replace("params.model.path", "params.cpuparams.n_threads = 1\nparams.model.path")  # of one core
        cores, log = os.sched_getaffinity(0), self.folder / "model"
        self.callback(os.sched_setaffinity, 0, cores)
        os.sched_setaffinity(0, {min(cores)})
        self.enter_context(program(sys.executable, "-c", code, 0, 4, log=log, ready="listening on http.*slots"))
        os.sched_setaffinity(0, {max(cores)})
        model = re.findall(r"model: listening on http://([\d.:]+)", log.read_text())[0]
        settings = ("--cache", 0, "--max-tokens", 160)
        chain = Link(self, self.folder / "chain", model, False, *settings).proxy
        asked = sp.ENCODE(sp.OpenAI.template(sp.parse_settings([*map(str, settings)], {})))

        def tell(path: str, body: Any) -> str:
            return chain.http.post(f"http://{model}/{path}", content=body).text

        def straight(prompt: str, most: int = 160) -> dict[str, Any]:
            holes = ((sp.SEED, 42), (sp.MAX_TOKENS, most), (sp.PROMPT, prompt))
            body = functools.reduce(lambda body, hole: body.replace(*map(json.dumps, hole)), holes, asked)
            last = json.loads(tell("v1/chat/completions", body).split("data: ")[-2])
            return last["timings"] | last["usage"]

        def speed(ask: Callable[[str], int], count: int) -> float:
            began = time.monotonic()
            return sum(together(count, lambda n: ask(prompts[n]))) / (time.monotonic() - began)

        prompts = [f"Plan a picnic for {n}" for n in range(4)]
        ways: dict[str, Callable[[str], int]] = {"ours": lambda prompt: int(chain.post(prompt).headers["x-tokens"])}
        ways["bare"] = lambda prompt: straight(prompt)["completion_tokens"]
        speed(lambda prompt: straight(prompt, 1)["completion_tokens"], 4)  # from here on each slot knows its prompt
        four = turns({k: lambda ask=ask: speed(ask, 4) for k, ask in ways.items()})  # type: ignore[misc]
        one = turns({k: lambda ask=ask: speed(ask, 1) for k, ask in ways.items()})  # type: ignore[misc]
        beside = f"{spread(one['ours'])} tok/s; straight to llama.cpp {spread(one['bare'])}"
        share = [100 * ours / bare for ours, bare in zip(one["ours"], one["bare"])]
        yield "real model through the chain: speed", "≥ 98 %", share, beside
        beside = f"tok/s in sum; straight {spread(four['bare'])}; one client {spread(one['ours'])}"
        yield "  4 slots, 4 clients", "", four["ours"], beside
        texts = [3 * f["x"] for f in chain.post(prompts[0]).json()["sinc"]["fragments"]]  # as long as the article's
        forms = [sp.ENCODE(dict(zip(BAND_NAMES, texts))), sp.ENCODE(sp.make_document(texts))]
        flat, whole = (len(json.loads(tell("tokenize", json.dumps({"content": form})))["tokens"]) for form in forms)
        yield "tokens, of the whole document's", "≤ 80 %", [100 * flat / whole], f"schema {flat}, whole {whole}"
        new = straight("Now something else", 1)
        yield "prompt tokens not in the KV cache", "", [new["prompt_n"]], f"of {new['prompt_tokens']}"

    def page(self) -> Iterator[Row]:
        late, ours = [], self.ours(model=self.enter_context(Fake()).url.removeprefix("http://"))
        page = self.enter_context(visit(ours.url))
        for prompt in unique(ROUNDS, "!first=0.5 !pace=0.02"):
            send(page, prompt)
            page.evaluate(FRAMES)
            with ours.stream(prompt) as events:
                sent = next(time.time() for name, _ in events if name == "delta")
            shows(page, "#status", "Done")
            late.append(page.evaluate("painted") - sent * 1000)
        yield "first token to first word painted", "≤ 100 ms", late, ""
        yield "page and widget", "≤ 40 KB", [len((sp.PAGE + sp.WIDGET).encode()) / 1000], ""

    def demo(self) -> Iterator[Row]:
        for name in ("install.sh", "scatter_proxy.py", "tunnel.py"):
            shutil.copy(HERE / name, self.folder)

        def start(**environ: str) -> float:
            began, demo = time.monotonic(), Demo(self.folder / "install.sh", "demo", **environ)
            demo.says("Ctrl-C ends it")
            took = time.monotonic() - began
            demo.ended(signal.SIGTERM)
            return took

        yield "demo, packages neither here nor cached", "≤ 120 s", [start(PIP_NO_CACHE_DIR="1")], ""
        yield "demo, again", "≤ 5 s", turns({"again": start})["again"], ""

    def units(self) -> Iterator[Row]:
        where = (sys.executable, Path("/opt/tunnel.py"), Path("/var/lib/scatter"), "me", Path("/home/me"))
        units = {"tunnel": tunnel.service("linux", True, *where).text}
        parts = (r'put "\$UNIT" cat <<CONF\n(.*?)\nCONF\n', r'^SERVICE="(.*?)"')
        form, words = (re.findall(part, SCRIPT.read_text(), re.DOTALL | re.MULTILINE)[0] for part in parts)
        units["proxy"] = re.sub(r"\$\(say .*", "\n".join(words.split()), form)
        for name, text in units.items():
            (unit := self.folder / f"scatter-{name}.service").write_text(text.replace("$APP", "/opt"))
            said = finished(["systemd-analyze", "security", "--offline=true", "--no-pager", unit]).stdout
            score = [float(re.findall(r"level for .*: ([\d.]+)", said)[0])]
            yield f"systemd-analyze security, {name}", "≤ 1.5", score, "redis-server: 1.2"

    def growth(self) -> Iterator[Row]:
        """Whether a request costs the proxy the same when there is more of everything."""
        more = [f"--backend=http://{self.enter_context(apart(serve_instant))[0]}" for _ in range(3)]
        (self.folder / "log").mkdir()
        (self.folder / "log" / "log.jsonl").write_bytes(b'{"ts": 1, "tokens": 40, "code": "ok"}\n' * 1_600_000)
        first = self.ours("--slots", 64)
        runs = {f"{n} client{'s'[: n > 1]}": (first, n) for n in (1, 4, 16, 64)}
        runs["60 MB of log"] = self.ours(name="log"), 16
        runs |= {f"{n + 1} backends": (self.ours(*more[:n], name=f"{n}", count=n + 1), 16) for n in (1, 3)}
        runs["10,000 documents"] = self.ours("--cache", 100, name="kept"), 16
        Load(runs["10,000 documents"][0].url + "/scatter", unique(10_000), 16)
        found = turns({k: asks(p.url + "/scatter", 600, n, pid=p.process.pid) for k, (p, n) in runs.items()})
        for name, loads in found.items():
            beside = f"{spread([load.rate for load in loads])} requests/s"
            yield f"CPU of a request, us: {name}", "", [load.cpu / 600 * 1e6 for load in loads], beside


class Link:
    """The whole way of a request: proxy, sshd, a link, slow or not, ssh, guard, model server."""

    def __init__(self, held: Bench, folder: Path, model: str, is_slow: bool, *flags: Any) -> None:
        self.far, self.dialled, self.pid = held.enter_context(FarHost(TUNNEL_RULES)), multiprocessing.Value("d", 0.0), 0
        known, sshd = self.far.home / "known_hosts", self.far.flags[2]
        at = f":{sshd}"
        if is_slow:
            at, self.pid = held.enter_context(apart(serve_link, sshd, self.dialled))
        known.write_text(known.read_text().replace(f":{sshd} ", f":{at.rpartition(':')[2]} "))
        flags = ("--backend", "none", "--backend-dir", self.far.where, *flags)
        self.proxy = held.enter_context(proxy(folder, *flags))
        hops = ("--ssh-port", at.rpartition(":")[2], "--target", model, "--front", self.proxy.url[7:])
        self.tunnel = self.far.run(*hops)
        self.proxy.up()

    def serves(self, begin: float) -> float:
        """Wait until a document comes; return how many s that was after begin."""
        wait_for(lambda: self.proxy.post(next(unique(1))).status_code == 200, 20)
        return time.monotonic() - begin

    def kill(self) -> float:
        """Kill ssh; return the s until a document is served again."""
        os.kill(children(self.tunnel.pid)[0], signal.SIGKILL)
        return self.serves(time.monotonic())

    def cut(self, in_flight: bool) -> tuple[float, float]:
        """Cut the link; return the s until both ends (or a reader) knew, and from the new dial to a document."""
        inode = self.far.sock.stat().st_ino

        def knows() -> bool:
            return self.proxy.health()["status"] != "ok" or self.far.sock.stat().st_ino != inode

        with self.proxy.stream(next(unique(1, "!paced=9000" if in_flight else ""))) as events:
            any(name in ("delta", "done") for name, _ in events)
            os.kill(self.pid, signal.SIGUSR1)
            began = time.monotonic()
            any(name in ("started", "error") for name, _ in events) if in_flight else wait_for(knows, 20)
            knew = time.monotonic() - began
        wait_for(lambda: self.dialled.value > began, 20)
        return knew if in_flight else max(knew, self.dialled.value - began), self.serves(self.dialled.value)


def bench(argv: Sequence[str]) -> int:
    """Measure the sections named, all without a name; print the table; return 1 where a bound is not met."""
    sections = ["requests", "streams", "queue", "link", "guard", "chain", "page", "demo", "units", "growth"]
    parser = argparse.ArgumentParser("test_all.py bench")
    parser.add_argument("--json", action="store_true", help="one object instead of the table")
    parser.add_argument("sections", nargs="*", choices=[[], *sections], metavar="SECTION", help=", ".join(sections))
    told, rows, began = parser.parse_args(argv), [], time.monotonic()
    form, words = "| {:<38} | {:>9} | {:<20} | {:<3} | {} |", sys.stderr if told.json else sys.stdout
    gc.freeze()  # what was imported, so that no collection has to look through it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    print(form.format("what", "bound", "median [min–max]", "met", "beside"), file=words)
    print("|---|--:|---|---|---|", file=words)
    for name in told.sections or sections:
        with tempfile.TemporaryDirectory(prefix="sc") as folder, Bench(Path(folder)) as running:
            try:
                for what, bound, values, beside in getattr(running, name)():
                    sign, number, _ = f"{bound} 0 ".split(" ", 2)
                    holds = {"≤": operator.le, "≥": operator.ge}.get(sign, lambda value, number: None)
                    met = holds(statistics.median(values), float(number))
                    rows.append({"what": what, "bound": bound, "values": values, "met": met, "beside": beside})
                    said = {True: "yes", False: "NO", None: ""}[met]
                    print(form.format(what, bound, spread(values), said, beside), file=words, flush=True)
            except (pytest.skip.Exception, Exception):  # noqa: BLE001  # the other sections can be measured all the same
                print(f"{name} could not be measured:\n{traceback.format_exc()}", file=sys.stderr)
    model = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    where = f"{len(model)} × {model[0]}, Python {sys.version.split()[0]}, {time.monotonic() - began:.0f} s"
    print(json.dumps({"where": where, "rows": rows}) if told.json else where)
    return int(any(row["met"] is False for row in rows))


if __name__ == "__main__":
    if sys.argv[1:2] != ["bench"]:
        sys.exit("error: try test_all.py bench --help; the tests: python -m pytest test_all.py")
    sys.exit(bench(sys.argv[2:]))
