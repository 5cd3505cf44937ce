# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "httpx>=0.28",
#     "hypothesis>=6.100",
#     "prometheus-client>=0.20",
#     "pytest>=8",
#     "ruff>=0.6",
#     "sinc-prompt==1.0.0",
# ]
# ///
"""All tests of scatter, in the order of the programs, and the bench.

    .venv/bin/python -m pytest test_all.py                 everything, in about ten minutes
    .venv/bin/python -m pytest test_all.py -k 'not real'   what needs no real server, in half a minute

A test with `real` in its name runs a real sshd, nginx, model, browser or booted Debian; where that is not installed it
is skipped, with the reason. `./install.sh test` installs what they need.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx
import pytest
import sinc_prompt
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

import scatter_proxy as sp

HERE = Path(__file__).resolve().parent

# --- harness ------------------------------------------------------------------


def wait_for(ready: Callable[[], Any], seconds: float, what: str = "") -> Any:
    """Return what ready() gives once it is true; fail when that takes longer than so many seconds."""
    deadline = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what or ready}"
        time.sleep(0.01)
    return found


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
        assert (found := re.search(r"listening on (http://\S+)", said)), said
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
        with self.http.stream("POST", "/scatter", json={"prompt": prompt}, headers=headers) as answer:
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

    def log(self) -> list[dict[str, Any]]:
        """Return the log's records."""
        return [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]


@contextlib.contextmanager
def proxy(folder: Path, *flags: Any, **environ: str) -> Iterator[Proxy]:
    """Run scatter_proxy.py on a free port with its files in folder."""
    folder.mkdir(exist_ok=True)
    (folder / "backends").mkdir(exist_ok=True)
    own = ["--port", 0, "--log", folder / "log.jsonl", "--backend-dir", folder / "backends"]
    argv = [HERE / "scatter_proxy.py", *own, *flags]
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
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Fake:
        self._thread.start()
        self.open()
        return self

    def __exit__(self, *_: Any) -> None:
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
            text = {"context": "the input length exceeds the context length"}.get(order.get("say", ""), "model not found")
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
        if "close" in order and not warming:
            yield b"reset"
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n"
        yield head + (b"Content-Encoding: gzip\r\n" if "gzip" in order else b"") + b"\r\n"
        yield float(order.get("first", 0))
        if warming:
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
        connection.sendall(data)
        answer, deadline = b"", time.monotonic() + seconds
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


def code_of(answer: httpx.Response) -> str:
    """Return an error's code; fail where an answer is not of the one shape of errors."""
    error = answer.json()["error"]
    assert set(error) == {"code", "message"} and answer.status_code == sp.REFUSALS[error["code"]][0]
    return error["code"]


# --- settings -----------------------------------------------------------------


def test_flag_wins_over_variable_over_default() -> None:
    environ = {"SCATTER_QUEUE": "7", "SCATTER_PORT": "1", "SCATTER_BACKEND": "http://a:1, none"}

    settings = sp.parse_settings(["--port", "2"], environ)

    assert (settings.port, settings.queue, settings.slots) == (2, 7, 0)
    assert settings.backend == ("http://a:1", "none")


@pytest.mark.parametrize(
    "flags",
    ["--port x", "--port 65536", "--backend ftp://a:1", "--backend http://a:1/x", "--prompting json", "--cache inf"]
    + ["--temperature nan", "--queue -1", "--allow-origin https://a.org/", "--log /nowhere/x", "--host 9.9.9.9"],
)
def test_setting_that_cannot_work_is_one_line_and_exit_2(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = sp.main(["--port", "0", *flags.split()])

    said = capsys.readouterr().err
    assert status == 2 and said.count("\n") == 1, said
    assert said.startswith(f"error: {flags.split()[0]}") and flags.split()[1] in said


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
    assert sum(text["maxLength"] for text in schema["properties"].values()) <= 3 * 1024
    assert all(re.search(rf"^{band.name}: ", sp.SYSTEM, re.MULTILINE) for band in sp.BANDS)


# --- routes -------------------------------------------------------------------


def test_document_with_its_numbers(front: Proxy) -> None:
    answer = front.post("numbers")

    document = answer.json()["sinc"]
    assert answer.status_code == 200 and sinc_prompt.validate(document) == (True, [])
    assert [f["t"] for f in document["fragments"]] == BAND_NAMES
    assert answer.headers["x-tokens"] == "60" and answer.headers["x-cache"] == "miss"
    assert float(answer.headers["x-tok-per-s"]) == pytest.approx(60 / float(answer.headers["x-gen-time"]), rel=0.2)
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

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor() as pool:
        with proxy(tmp_path, "--backend", f"http://127.0.0.1:{listener.getsockname()[1]}"):
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


def test_second_seed_mends_a_bad_answer(front: Proxy, fake: Fake) -> None:
    answer = front.post("mended !garbage_at=42")

    assert answer.status_code == 200
    assert [r["options"]["seed"] for r in fake.seen if r["prompt"] == "mended !garbage_at=42"] == [42, 43]


def test_stream_that_showed_a_delta_ends_with_an_error(front: Proxy) -> None:
    with front.stream("shown !unfinished !pace=0.01") as events:
        told = list(events)

    assert told[-1] == ("error", {"error": {"code": "bad_answer", "message": sp.REFUSALS["bad_answer"][1]}})
    assert [name for name, _ in told].count("started") == 1


def test_offline_is_told_at_once_and_hits_are_served(tmp_path: Path) -> None:
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


def test_missing_model_and_silence_have_their_words(tmp_path: Path) -> None:
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


def test_socket_joins_and_a_new_one_takes_over(tmp_path: Path) -> None:
    (tmp_path / "backends").mkdir()
    path = tmp_path / "backends" / "gpu-1a2b.sock"
    with proxy(tmp_path, "--backend", "none") as server, Fake(path) as first:
        server.up()
        assert server.health()["backends"][0]["name"] == "gpu-1a2b" and server.post("one").status_code == 200
        with Fake(path) as second:  # as a tunnel that dials again while sshd still holds the dead link's socket
            wait_for(lambda: second.seen and server.health()["status"] == "ok", 3, "the new socket is up")
            assert server.post("two").status_code == 200 and second.done == ["two"] and "two" not in first.done


def test_lost_link_starts_the_job_again_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "backends").mkdir()
    with proxy(tmp_path, "--backend", "none") as server, ThreadPoolExecutor() as pool:
        with Fake(tmp_path / "backends" / "a.sock") as one, Fake(tmp_path / "backends" / "b.sock") as two:
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


def test_queue_is_bounded_fair_and_honest(tmp_path: Path) -> None:
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


def test_waiter_that_leaves_frees_its_place_unseen(tmp_path: Path) -> None:
    with chain(tmp_path) as (server, fake):
        with server.stream("runs !pace=0.03") as running:
            next(running)
            with server.stream("leaves") as waiting:
                assert next(waiting) == ("queued", {"position": 1})
                assert server.health()["status"] == "busy"
            wait_for(lambda: server.health()["queue"]["waiting"] == 0, 0.2, "the place is free")
            list(running)
        assert server.post("next").status_code == 200
        assert "leaves" not in [request["prompt"] for request in fake.seen]
        assert [r["code"] for r in server.log() if "code" in r] == ["cancelled", "ok", "ok"]


def test_waiter_is_told_busy_after_its_time(tmp_path: Path) -> None:
    with chain(tmp_path, "--queue-seconds", 0.5) as (server, _):
        with server.stream("runs !first=2") as running:
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
    with chain(tmp_path) as (server, fake), ThreadPoolExecutor() as pool:
        with server.stream("both !pace=0.02") as events:
            next(events)
            other = pool.submit(server.post, "both !pace=0.02")
            wait_for(lambda: "joined" in server.http.get("/stats").text and server.health()["queue"]["running"], 2)
        assert other.result(10).status_code == 200 and not fake.left


@pytest.mark.parametrize(
    ("spoke", "silent", "running", "late"),
    [(False, 119, 119, False), (False, 121, 121, True), (True, 29, 99, False), (True, 31, 99, True), (True, 1, 301, True)],
)
def test_generation_has_its_time_limits(spoke: bool, silent: float, running: float, late: bool) -> None:
    job = sp.Job("x")
    job.started_at, job.heard_at = 1000 - running, 1000 - silent
    job.metrics["ttft"] = 0.1 if spoke else None

    assert job.is_late(1000) is late


def test_stop_when_idle_is_quick_and_clean(fake: Fake, tmp_path: Path) -> None:
    with proxy(tmp_path, "--backend", fake.url) as server:
        server.up()
        start = time.monotonic()
        server.process.send_signal(signal.SIGTERM)

        assert server.process.wait(5) == 0 and time.monotonic() - start < 1


def test_stop_lets_the_running_end_and_tells_the_others(tmp_path: Path) -> None:
    with chain(tmp_path) as (server, _), ThreadPoolExecutor() as pool:
        running = pool.submit(server.post, "runs !pace=0.04")
        wait_for(lambda: server.health()["queue"]["running"], 2)
        waiting = pool.submit(server.post, "waits")
        wait_for(lambda: server.health()["queue"]["waiting"], 2)
        server.process.send_signal(signal.SIGTERM)
        assert code_of(waiting.result(5)) == "stopping"
        assert code_of(server.post("new")) == "stopping"  # the door is still open
        assert running.result(20).status_code == 200
        assert server.process.wait(5) == 0


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
    full.write({"a": 1})
    full.write({"a": 2})
    assert full.lost == 2

    log = sp.LogFile(str(tmp_path / "x.jsonl"))
    log.write({"n": 1})
    (tmp_path / "x.jsonl").rename(tmp_path / "moved")
    log.write({"n": 2})
    assert (tmp_path / "moved").read_text() == '{"n": 1}\n' and (tmp_path / "x.jsonl").read_text() == '{"n": 2}\n'


def test_log_is_rotated_and_five_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sp, "LOG_LIMIT", 100)
    log = sp.LogFile(str(tmp_path / "x.jsonl"))

    for n in range(100):
        log.write({"n": n, "pad": "x" * 20})

    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["x.jsonl", *(f"x.jsonl.{n}" for n in range(1, 6))]
    ordered = [tmp_path / name for name in [*names[:0:-1], names[0]]]
    held = [json.loads(line)["n"] for path in ordered for line in path.read_text().splitlines()]
    assert held == list(range(100 - len(held), 100)) and all(path.stat().st_size <= 100 for path in ordered)


def test_log_is_served_from_a_byte_on(front: Proxy) -> None:
    front.post("mirrored")
    whole = front.http.get("/log")
    size = len(whole.content)
    part, none = (front.http.get("/log", headers={"range": f"bytes={at}-"}) for at in (10, size))

    assert whole.status_code == 200 and whole.content == (front.folder / "log.jsonl").read_bytes()
    assert part.status_code == 206 and part.content == whole.content[10:]
    assert part.headers["etag"] == whole.headers["etag"]
    assert none.status_code == 416 and front.http.get("/log.1").status_code == 404


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


# --- shape --------------------------------------------------------------------

CEILINGS = {"scatter_proxy.py": 1500, "tunnel.py": 1000, "install.sh": 550, "test_all.py": 2500, "README.md": 240}


@pytest.mark.parametrize("name", CEILINGS)
def test_file_can_be_read_in_one_sitting(name: str) -> None:
    assert len((HERE / name).read_text().splitlines()) <= CEILINGS[name]


def test_top_level_holds_the_five_files() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=HERE, capture_output=True, text=True).stdout.split()

    assert {name for name in listed if "/" not in name and name[0] != "."} <= set(CEILINGS)


def test_python_is_clean() -> None:
    ruff = [sys.executable, "-m", "ruff", "check", "--line-length", "120", "--no-cache"]
    files = ["scatter_proxy.py", "tunnel.py", "test_all.py"]
    result = subprocess.run([*ruff, "--extend-select", "E501", *files], cwd=HERE, capture_output=True, text=True)

    assert result.returncode == 0, result.stdout


def test_readme_names_each_setting_with_its_default() -> None:
    text = (HERE / "README.md").read_text()

    for setting in fields(sp.Settings):
        default = " ".join(setting.default) if isinstance(setting.default, tuple) else str(setting.default)
        shown = f"`{default}`" if default else ""
        assert f"| `--{setting.name.replace('_', '-')}` | {shown} | {setting.metadata['help']} |" in text
