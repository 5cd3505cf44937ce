#!/usr/bin/env python3
"""Hold the tunnel that puts this machine's model server behind a website, and let nothing else through.

    tunnel.py run scatter-tunnel@vps [options]   hold the tunnel (what the service runs)
    tunnel.py status [--json]                    is it up, since when, redials, last error, requests, round trip
    tunnel.py key                                make the key if there is none; print the line the VPS must authorise

The life of a tunnel: settings are read, the guard listens on a loopback port, ssh dials the VPS and
lets it reach the guard and nothing else, the link is watched, and dialled again whenever it ends.

Words: the *tunnel* is the ssh link; the *guard* is the filter in front of the model server; a *probe* is
a question that proves life; a *backend* is this machine as the VPS sees it; a *client* is who calls.

Everything lives in one folder: SCATTER_HOME, by default ~/.config/scatter (Linux, below XDG_CONFIG_HOME
if set), ~/Library/Application Support/scatter (macOS), %LOCALAPPDATA%\\scatter (Windows).

No ssh outlives this program. SIGTERM and Ctrl-C end it in order. If we are killed outright: on Linux the
kernel ends ssh (PR_SET_PDEATHSIG); on macOS and other Unix a shell between us ends it when its pipe from
us closes; on Windows ssh is in a job that ends with us (not run by the authors, see README).

Needs Python 3.9 or newer, nothing outside its standard library, and the system's ssh (OpenSSH 8.4 or newer).
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hashlib
import http.client
import json
import logging
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

VERSION = "0.1.0"
log = logging.getLogger("tunnel")

# --- settings ----------------------------------------------------------------

WINDOWS = os.name == "nt"
PLACEHOLDER_MODEL = "sinc-scatter"  # the name the VPS uses; the guard puts the real one in its place


class Fatal(Exception):
    """One line for a person: what was seen, with the value, and what to do. Ends the command with status 1."""


class BadSetting(Fatal):
    """A setting that cannot work. Ends the command with status 2."""


def option(default: Any, pattern: str, help: str) -> Any:
    """Declare a setting: its default, the whole form of its value, and the line --help prints."""
    return field(default=default, metadata={"pattern": pattern, "help": help})


@dataclass(frozen=True)
class Settings:
    """Everything an owner can set. A flag wins over tunnel.json, which wins over the default."""

    destination: str = option("", r"([A-Za-z0-9_][\w.-]*@)?[A-Za-z0-9\[:][\w.:%\[\]-]*", "the account on the VPS")
    name: str = option("", r"[a-z0-9-]{1,32}", "this workstation's name on the VPS (default: gpu- and 4 hex digits)")
    model: str = option("", r"[\w.:/@+-]{1,200}", "the model to serve (default: sinc-scatter, the one loaded, or the only one)")
    target: str = option("127.0.0.1:11434", r"[\w.-]+:\d{1,5}", "where the model server listens")
    remote: str = option("", r"/[\w./-]{1,100}|127\.0\.0\.1:\d{1,5}",
                         "where the VPS finds us (default: /run/scatter/backends/NAME.sock); 127.0.0.1:PORT for a TCP port")
    front: str = option("127.0.0.1:8461", r"[\w.-]+:\d{1,5}", "where the proxy listens on the VPS")
    identity: str = option("", r".+", "the private key (default: key in SCATTER_HOME)")
    ssh_port: int = option(22, r"\d{1,5}", "the port of the VPS's sshd")
    context: int = option(8192, r"\d{2,7}", "the longest context a request may ask for, in tokens")
    max_tokens: int = option(4096, r"\d{1,7}", "the most tokens a request may generate")
    keep_alive: str = option("-1", r"-1|\d+[smh]?", "how long Ollama keeps the model in memory; -1: for ever")
    mirror: str = option("", r".+", "where the VPS's log is kept at home (default: scatter-api.jsonl in SCATTER_HOME); none: nowhere")
    log_file: str = option("", r".+", "write our log to this file, rotated at 1 MiB (default: standard error)")


def home_folder() -> Path:
    """Return the one folder that holds settings, key, known hosts, state and pause."""
    if os.environ.get("SCATTER_HOME"):
        return Path(os.environ["SCATTER_HOME"]).absolute()
    if WINDOWS:
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "scatter"
    if sys.platform == "darwin":
        return Path.home() / "Library/Application Support/scatter"
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "scatter"


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, or None where there is none or it is not whole."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_atomically(path: Path, text: str, mode: int = 0o600) -> None:
    """Put text in place of the file in one step, so that no reader ever sees half of it."""
    beside = path.with_name(path.name + ".new")
    with open(beside, "w", encoding="utf-8", newline="\n") as f:
        f.write(text)
    beside.chmod(mode)
    beside.replace(path)


def parse_settings(home: Path, flags: dict[str, Any]) -> Settings:
    """Return the settings of flags over tunnel.json over defaults; raise BadSetting for one that cannot work."""
    path = home / "tunnel.json"
    saved = read_json(path)
    if saved is None and path.exists():
        raise BadSetting(f"{path}: not a JSON object; mend it or remove it")
    values: dict[str, Any] = {}
    for f in fields(Settings):
        source = "--" + f.name.replace("_", "-") if flags.get(f.name) is not None else f"{path}: {f.name}"
        value = flags.get(f.name) if flags.get(f.name) is not None else (saved or {}).get(f.name, f.default)
        if value != f.default and not re.fullmatch(f.metadata["pattern"], str(value)):
            raise BadSetting(f"{source}: {str(value)[:80]!r} does not fit; it is {f.metadata['help']}")
        values[f.name] = type(f.default)(value)
    ports = [("--ssh-port", values["ssh_port"])]
    ports += [("--" + k, int(values[k].rpartition(":")[2])) for k in ("target", "front", "remote") if ":" in values[k]]
    for flag, port in ports:
        if not 1 <= port <= 65535:
            raise BadSetting(f"{flag}: {port} is no port; give one from 1 to 65535")
    return Settings(**values)


def completed(settings: Settings, home: Path) -> Settings:
    """Return the settings with every default that depends on the key or the folder filled in."""
    identity = settings.identity or str(home / "key")
    name = settings.name or "gpu-" + hashlib.sha256(base64.b64decode(public_key(Path(identity))[1])).hexdigest()[:4]
    return replace(settings, identity=identity, name=name, remote=settings.remote or f"/run/scatter/backends/{name}.sock",
                   mirror=settings.mirror or str(home / "scatter-api.jsonl"))


def public_key(identity: Path) -> list[str]:
    """Return type and base64 blob of the public key, making the pair if there is none."""
    if not identity.exists():
        identity.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        made = subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "scatter", "-f", str(identity)],
                              capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if made.returncode:
            raise Fatal(f"ssh-keygen could not make {identity}: {made.stderr.strip()[:200]}")
        if WINDOWS:  # ssh.exe refuses a key that others may read, and a new file inherits the folder's rights
            user = os.environ.get("USERNAME", "")
            subprocess.run(["icacls", str(identity), "/inheritance:r", "/grant:r", f"{user}:F", "SYSTEM:F"], capture_output=True)
    try:
        return Path(f"{identity}.pub").read_text("utf-8").split()[:2]
    except OSError as e:
        raise Fatal(f"{identity}.pub: {e.strerror}; make it: ssh-keygen -y -f {identity} > {identity}.pub") from None


def boot_clock() -> float:
    """Return monotonic seconds that go on counting while the machine sleeps."""
    for clock in ("CLOCK_BOOTTIME", "CLOCK_MONOTONIC"):  # Linux; macOS, where time.monotonic() stops in sleep
        if hasattr(time, clock):
            return time.clock_gettime(getattr(time, clock))
    return time.monotonic()  # Windows: counts sleep


# --- ssh command -------------------------------------------------------------

def ssh_command(settings: Settings, home: Path, guard_port: int, front_at: str) -> list[str]:
    """Return the command that holds the tunnel; front_at is a socket's path or ADDRESS:PORT on this machine.

    -v makes ssh say what judging needs: the peer's address, sshd's version, that the forward stands, and why not.
    """
    known = " ".join('"' + Path(p).as_posix().replace("%", "%%") + '"' for p in (home / "known_hosts", Path.home() / ".ssh/known_hosts"))
    options = (
        "BatchMode=yes",  # a question that nobody answers would hang the service for ever
        "IdentitiesOnly=yes",  # an agent's other keys would use up sshd's MaxAuthTries
        "IdentityAgent=none",  # a locked agent asks its owner and waits
        "PreferredAuthentications=publickey",  # each further method tried is a failure that a banning sshd counts
        "StrictHostKeyChecking=yes",  # anyone on the way could be the VPS and read every prompt
        f"UserKnownHostsFile={known}",  # pinned by setup; the user's own file is where a plain account's key is
        "UpdateHostKeys=no",  # a VPS taken over could add keys to the pinned ones
        "ExitOnForwardFailure=yes",  # a link without its forward looks up and serves nobody
        "ConnectTimeout=5",  # a black hole holds a dial for two minutes
        "ConnectionAttempts=1",  # ssh's own retries know no jitter and no cause
        "ServerAliveInterval=3",  # a link that dies silently is noticed after 3 x (2 + 1) s at most; by default never
        "ServerAliveCountMax=2",
        "ForwardAgent=no",  # with the agent a VPS taken over could log in elsewhere as the owner
        "ForwardX11=no",  # with X11 it could read the keyboard
        "ControlMaster=no",  # a shared connection outlives this process and its options are not ours
        "ControlPath=none",
        "Compression=no",  # compressing many tiny chunks costs time and saves nothing
        "IPQoS=none",  # some routers freeze or starve marked packets
        "StreamLocalBindUnlink=yes",  # the -L socket of a run that was killed would make the next one fail
    )
    command = ["ssh", "-F", "none", "-N", "-T", "-v", "-i", settings.identity.replace("%", "%%"), "-p", str(settings.ssh_port)]
    for o in options:
        command += ["-o", o]
    return command + ["-R", f"{settings.remote}:127.0.0.1:{guard_port}", "-L", f"{front_at}:{settings.front}", "--", settings.destination]


def front_address(home: Path) -> str:
    """Return where ssh shall listen on this machine for probe and mirror: a socket, on Windows a free port."""
    if WINDOWS:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            return f"127.0.0.1:{s.getsockname()[1]}"
    path = str(home / "front.sock")
    # 100: a socket's path ends at 104 bytes on macOS; other characters would need ssh's own quoting
    if len(path.encode()) <= 100 and re.fullmatch(r"[\w./-]+", path, re.ASCII):
        return path
    folder = Path(tempfile.gettempdir()) / f"scatter-{os.getuid()}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise Fatal(f"{folder}: belongs to another user; set TMPDIR to a folder of your own")
    return str(folder / "front.sock")

# --- judging -----------------------------------------------------------------
# ssh says 255 for nearly everything, so its words decide; the first row that matches names the failure.
#
# What mends itself (the network, a name server, a restarted sshd, a link that was cut) is tried again for ever:
# at once, then within 0.5, 1, 2, 4, 8 and 15 s, each time a random part of that, so that many tunnels cut by one
# outage do not come back in the same second. After 30 s up the waits start again from the first.
#
# What a person must mend (key, host key, account, a forward that the VPS does not allow) is tried every 60 to
# 300 s: sshd from 9.8 on and fail2ban shut out an address that fails often. What to do is said once, and
# in `status`, until another failure or success takes its place.
#
# A port that is taken (TCP form) is tried every 2 s: sshd holds the port of a dead link until it notices the
# death, 16 s to 16 min, and logins that succeed are not what gets banned.

FIRST_WAITS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0)  # seconds, upper ends; 15 is the longest that a mended link waits
SLOW_WAITS = (60.0, 120.0, 240.0, 300.0)  # seconds; PerSourcePenalties forgive an address in at most 600
BUSY_WAIT = 2.0  # seconds between tries for a taken port
STEADY_AFTER = 30.0  # seconds up after which an end is a new failure, not the next of the last


@dataclass(frozen=True)
class Failure:
    """Why a tunnel ended: its kind, what was seen, what mends it, and the pace of the tries to come."""

    kind: str
    seen: str
    cure: str
    pace: str = "soon"  # soon | slow | busy


FAILURES = (  # kind, pace, pattern in ssh's words, cure
    ("no_ssh", "slow", r"cannot start ssh.*", "install the OpenSSH client, 8.4 or newer"),
    ("ssh_options", "slow", r"Bad configuration option.*|unknown option.*|Bad .* specification.*",
     "this ssh is too old, or no OpenSSH; install 8.4 or newer"),
    ("host_key_changed", "slow", r"REMOTE HOST IDENTIFICATION HAS CHANGED",
     "if the VPS was rebuilt, remove its old line from {known_hosts} and pin the new key; if not, somebody else answers in its place"),
    ("host_key_unknown", "slow", r"No \S+ host key is known for.*|Host key verification failed.*",
     "run `ssh -p {port} {destination}` once and compare the fingerprint with the VPS's own"),
    ("key_file", "slow", r"UNPROTECTED PRIVATE KEY FILE|Load key .*|Identity file .* not accessible.*",
     "make {identity} readable by its owner alone and whole, or remove it and run `tunnel.py key`"),
    ("auth", "slow", r"Permission denied \(.*|Too many authentication failures.*|No supported authentication methods.*",
     "let the VPS authorise the line that `tunnel.py key` prints, for the account of {destination}"),
    ("banned", "slow", r"Not allowed at this time.*|Exceeded MaxStartups.*",
     "the VPS's sshd shuts this address out for a while; wait, and see what else here dials it"),
    ("no_agreement", "slow", r"no matching .* found.*", "ssh here and sshd on the VPS share no algorithm; upgrade the older one"),
    ("forward_refused", "slow", r"Remote: (?:port forwarding refused|Server has disabled .*)",
     "the VPS does not let this account listen on {remote}: see PermitListen, AllowTcpForwarding and "
     "AllowStreamLocalForwarding in its sshd_config"),
    ("path_taken", "soon", r"remote port forwarding failed for listen path.*",
     "the VPS cannot make {remote}: its folder is missing or not this account's, or an old socket stands there and "
     "sshd lacks `StreamLocalBindUnlink yes`"),
    ("port_taken", "busy", r"remote port forwarding failed for listen port.*",
     "the VPS still holds {remote}, most likely for our last link; it lets go in 16 s to 16 min, or when that sshd is ended"),
    ("name", "soon", r"Could not resolve hostname.*", "check the name in {destination} and this machine's name server"),
    ("silent", "soon", r"Timeout, server .* not responding.*", "nothing to do: the link went silent and is dialled again"),
    ("network", "soon", r"(?:connect to|kex_exchange|Connection |client_loop|ssh_dispatch|banner exchange).*(?:refused|timed out|unreachable"
     r"|No route|closed|[Rr]eset|Broken pipe|aborted).*", "check that the VPS is up and that its sshd listens on port {port}"),
)
CHATTER = re.compile(r"(?m)^(?:debug1: )?channel .*\n?")  # a refused -L would else be read as the reason of a later end


def judge(status: int, words: str, places: dict[str, Any], asked: str = "") -> Failure:
    """Return why ssh ended, from its exit status, its words on stderr, and our own reason if we ended it.

    places fills the cure: destination, port, identity, remote, known_hosts. The words come from the network: cut and cleaned.
    """
    if asked:
        return Failure("ended", asked, "nothing to do: the tunnel is dialled again")
    plain = CHATTER.sub("", words)
    for kind, pace, pattern, cure in FAILURES:
        found = re.search(pattern, plain)
        if found:
            seen = "".join(c if c.isprintable() else " " for c in found.group())[:200].strip()
            return Failure(kind, seen, cure.format(**places), pace)
    how = f"signal {-status}" if status < 0 else f"status {status}"
    return Failure("dropped", f"ssh ended with {how}", "nothing to do: the tunnel is dialled again")


def next_delay(pace: str, failures: int, chance: Callable[[float, float], float] = random.uniform) -> float:
    """Return the seconds to wait before the next try, after this many failures in a row (1 is the first)."""
    if pace == "busy":
        return BUSY_WAIT
    if pace == "slow":
        longest = SLOW_WAITS[min(failures, len(SLOW_WAITS)) - 1]
        return chance(max(SLOW_WAITS[0], longest / 2), longest)
    return chance(0.0, FIRST_WAITS[min(failures, len(FIRST_WAITS)) - 1])

# --- guard -------------------------------------------------------------------
# The VPS may be taken over, so what arrives here is hostile. One request at a time on a connection; its head is
# read by a grammar narrower than HTTP's, so that no two readers can differ about where it ends; its body is taken
# apart and made anew from the keys below, so that nothing we do not know reaches the model server. Of the client's
# headers none is passed on. Answers pass untouched: the model server is the owner's.

HEAD_LIMIT = 16 * 1024  # bytes; the proxy's heads are below 300
BODY_LIMIT = 1024 * 1024  # bytes; a prompt is at most 16,000 characters
ANSWER_HEAD_LIMIT = 64 * 1024  # bytes; the model server is trusted, not unbounded
CONNECTIONS = 128  # at once; the proxy holds one per slot and one for probes
SLOW_CONNECT = 5.0  # seconds; the model server is on this machine or beside it
KEPT_CONNECTION = 2.0  # seconds; llama.cpp holds a thread for each, and it and uvicorn close theirs after 5
SLOW_REQUEST = 10.0  # seconds from a request's first byte to its last
IDLE_CONNECTION = 900.0  # seconds; the proxy keeps connections for minutes, so that a request costs one round trip
SILENT_ANSWER = 330.0  # seconds without a byte; the proxy gives up after 300
ROUTES = {("POST", "/api/generate"), ("POST", "/v1/chat/completions"), ("GET", "/api/version"), ("GET", "/health"),
          ("GET", "/props"), ("GET", "/v1/models")}
REQUEST_LINE = re.compile(rb"([A-Z]{1,16}) ([!-~]{1,1024}) HTTP/1\.1")
HEADER_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}):[ \t]*([ -~\t]*)")
PHRASES = {400: "Bad Request", 403: "Forbidden", 413: "Content Too Large", 431: "Request Header Fields Too Large",
           502: "Bad Gateway", 503: "Service Unavailable"}


class Refused(Exception):
    """A request that does not pass: its HTTP status, one word, one sentence for a person."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


NO_MODEL_SERVER = Refused(502, "no_model_server", "no model server answers on the workstation")


def malformed(message: str) -> Refused:
    return Refused(400, "bad_request", message)


def read_head(head: bytes) -> tuple[str, str, int]:
    """Return method, path and body length of a request's head (without its blank line); raise Refused for any doubt."""
    first, *lines = head.split(b"\r\n")
    request = REQUEST_LINE.fullmatch(first)
    if not request:
        raise malformed("this is no HTTP/1.1 request line")
    headers: dict[str, str] = {}
    for line in lines:
        header = HEADER_LINE.fullmatch(line)
        if not header:
            raise malformed("a header line is malformed")
        name = header[1].decode().lower()
        if name in headers and name in ("content-length", "host"):
            raise malformed(f"{name} is there twice")
        headers[name] = header[2].decode().strip()
    method, path = request[1].decode(), request[2].decode()
    for name in ("transfer-encoding", "upgrade", "expect"):
        if name in headers:
            raise malformed(f"{name} is not spoken here")
    if "host" not in headers:
        raise malformed("there is no host")
    length = headers.get("content-length", "0" if method == "GET" else "")
    if not re.fullmatch(r"[0-9]{1,12}", length):
        raise malformed("content-length is missing or no number")
    if (method, path) not in ROUTES:
        raise Refused(403, "forbidden", "the guard of this workstation does not pass this request")
    if method == "GET" and int(length):
        raise malformed("a GET has no body here")
    if int(length) > BODY_LIMIT:
        raise Refused(413, "too_long", f"the body is over {BODY_LIMIT} bytes")
    return method, path, int(length)


def need(fits: bool, value: Any) -> Any:
    """Return the value if it fits; raise ValueError if not."""
    if not fits:
        raise ValueError
    return value


def a_text(value: Any) -> str:
    return need(isinstance(value, str), value)


def a_bool(value: Any) -> bool:
    return need(isinstance(value, bool), value)


def a_number(low: float, high: float) -> Callable[[Any], float]:
    return lambda v: need(type(v) in (int, float) and low <= v <= high, v)


def a_count(limit: int) -> Callable[[Any], int]:
    """Clamp to 1..limit; Ollama's -1 and -2 mean without limit, so they become the limit."""
    return lambda v: min(need(type(v) is int, v), limit) if v > 0 else limit


def one_of(*values: str) -> Callable[[Any], str]:
    return lambda v: need(isinstance(v, str) and v in values, v)


def a_list(rule: Callable[[Any], Any], limit: int) -> Callable[[Any], list[Any]]:
    return lambda v: [rule(x) for x in need(isinstance(v, list) and len(v) <= limit, v)]


def an_object(rules: dict[str, Callable[[Any], Any]]) -> Callable[[Any], dict[str, Any]]:
    """Re-make an object from the keys that have a rule; null is as good as absent."""
    return lambda v: {k: rule(v[k]) for k, rule in rules.items() if need(isinstance(v, dict), v).get(k) is not None}


def a_schema(value: Any, depth: int = 8) -> Any:
    """Re-make a JSON schema from the keywords that bound text and shape, in the client's order.

    There is no $ref (some servers fetch it) and no pattern (its grammar can grow without bound).
    """
    if isinstance(value, bool):
        return value
    made = {}
    for key, x in need(depth > 0 and isinstance(value, dict), value).items():
        if key == "properties":
            made[key] = {k: a_schema(v, depth - 1) for k, v in need(isinstance(x, dict) and len(x) <= 64, x).items()}
        elif key in ("items", "additionalProperties"):
            made[key] = a_schema(x, depth - 1)
        elif key in ("type", "title", "description", "const"):
            made[key] = a_text(x)
        elif key in ("enum", "required"):
            made[key] = a_list(a_text, 256)(x)
        elif key in ("minLength", "maxLength", "minItems", "maxItems", "minimum", "maximum"):
            made[key] = a_number(-1e6, 1e6)(x)
    return made


@dataclass(frozen=True)
class Limits:
    """What the owner puts in place of what a client asks for."""

    model: str
    context: int  # tokens
    max_tokens: int
    keep_alive: str  # -1 or a duration such as 10m


def remade_body(path: str, body: bytes, limits: Limits) -> bytes:
    """Return the body that the model server gets, made anew from the keys allowed here; raise Refused."""
    temperature, seed = a_number(0, 5), a_number(-1, 2**63 - 1)
    generate = an_object({
        "prompt": a_text, "system": a_text, "stream": a_bool, "truncate": a_bool,
        "think": lambda v: v if isinstance(v, bool) else one_of("low", "medium", "high")(v),
        "format": lambda v: one_of("json")(v) if isinstance(v, str) else a_schema(v),
        "options": an_object({"temperature": temperature, "seed": seed, "num_predict": a_count(limits.max_tokens),
                              "num_ctx": a_count(limits.context)})})
    chat = an_object({
        "messages": a_list(an_object({"role": one_of("system", "user", "assistant"), "content": a_text}), 64),
        "stream": a_bool, "stream_options": an_object({"include_usage": a_bool}), "temperature": temperature, "seed": seed,
        "response_format": an_object({"type": one_of("text", "json_object", "json_schema"), "schema": a_schema,
                                      "json_schema": an_object({"name": a_text, "strict": a_bool, "schema": a_schema})}),
        "max_tokens": a_count(limits.max_tokens), "chat_template_kwargs": an_object({"enable_thinking": a_bool})})
    try:
        # an integer of a megabyte takes seconds to read; NaN and the infinities are no JSON
        asked = json.loads(body.decode(), parse_int=lambda d: int(need(len(d) < 20, d)), parse_constant=lambda _: need(False, _))
        if path == "/api/generate":
            made = generate(asked)
            made["options"] = {"num_predict": limits.max_tokens, "num_ctx": limits.context, **made.get("options", {})}
            made["keep_alive"] = int(limits.keep_alive) if limits.keep_alive.lstrip("-").isdigit() else limits.keep_alive
        else:
            made = {"max_tokens": limits.max_tokens, **chat(asked)}
        return json.dumps({"model": limits.model, **made}, ensure_ascii=False).encode()
    except RecursionError:
        raise malformed("the body is nested too deep") from None
    except ValueError:  # UnicodeDecodeError and UnicodeEncodeError (a lone surrogate) are ValueErrors too
        raise malformed("the body is no JSON object, or a key has a value of the wrong type or out of range") from None


class AnswerEnd:
    """Find where an answer ends while its bytes pass through untouched.

    Framing is by Content-Length, by chunks, or by the connection's end (RFC 9112, 6.3).
    """

    def __init__(self) -> None:
        self.head: bytearray | None = bytearray()  # None once it is whole
        self.left: int | None = 0  # bytes until the next thing to read; None: until the connection ends
        self.line: bytearray | None = None  # a chunk's size line being read; None: not chunked
        self.keeps = False  # whether the connection may carry another request after this answer
        self.last = False  # the chunk of size 0 was seen; its trailers end with an empty line

    def feed(self, data: bytes) -> bool:
        """Return whether the answer ended with these bytes; raise ValueError for what is no HTTP, or runs over."""
        if self.head is not None:
            self.head += data
            end = self.head.find(b"\r\n\r\n")
            if end < 0:
                return not need(len(self.head) <= ANSWER_HEAD_LIMIT, True)
            data = bytes(self.head[end + 4:])
            self._frame(bytes(self.head[:end]))
            self.head = None
        if self.line is not None:
            return self._chunks(data)
        if self.left is None:
            return False
        self.left -= len(data)
        return need(self.left >= 0, self.left) == 0

    def _frame(self, head: bytes) -> None:
        status = re.match(rb"HTTP/1\.[01] ([2-5]\d\d)", head)
        need(bool(status), status)
        if re.search(rb"(?im)^transfer-encoding:[ \t]*chunked[ \t]*\r?$", head):
            self.line = bytearray()
        else:
            length = re.search(rb"(?im)^content-length:[ \t]*(\d{1,15})[ \t]*\r?$", head)
            self.left = int(length[1]) if length else 0 if status[1] in (b"204", b"304") else None
        self.keeps = head.startswith(b"HTTP/1.1") and not re.search(rb"(?im)^connection:[^\n]*close", head)

    def _chunks(self, data: bytes) -> bool:
        at = 0
        while at < len(data):
            step = min(self.left, len(data) - at)  # the chunk's own bytes, and the line end after them
            self.left, at = self.left - step, at + step
            end = data.find(b"\n", at)
            if self.left == 0 and at < len(data):
                self.line += data[at:end + 1] if end >= 0 else data[at:]
                need(len(self.line) <= 4096, None)
                if end < 0:
                    break
                at, line, self.line = end + 1, bytes(self.line).strip(), bytearray()
                if self.last and not line:
                    return need(at == len(data), True)
                if not self.last:
                    size = re.fullmatch(rb"([0-9A-Fa-f]{1,8})[ \t]*(;.*)?", line)
                    self.left = int(need(bool(size), size) and size[1], 16)
                    self.last, self.left = self.left == 0, self.left + 2 if self.left else 0
        return False


class ModelSide(asyncio.Protocol):
    """A client's connection to the model server; it is kept for the client's next request, but not for long."""

    def __init__(self, client: ClientSide, request: bytes) -> None:
        self.client, self.request = client, request
        self.end: AnswerEnd | None = None  # None: no request is under way

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.client.model = self
        self.send(self.request)

    def send(self, request: bytes) -> None:
        self.end, self.request = AnswerEnd(), b""
        self.transport.write(request)  # head and body in one write: two would wait for each other's ACK (Nagle)

    def data_received(self, data: bytes) -> None:
        try:
            ended = need(self.end is not None, self.end).feed(data)
        except ValueError:
            return self.client.model_left(self)
        self.client.pass_on(data)
        if ended:
            self.end = self.end if not self.end.keeps else None
            self.client.answer_ended(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.client.model_left(self)


class ClientSide(asyncio.Protocol):
    """A connection from the VPS: one request after the other, never two at once."""

    def __init__(self, guard: Guard) -> None:
        self.guard, self.buffer, self.refused = guard, bytearray(), False
        self.request: tuple[str, str, int] | None = None  # method, path and body length, once the head is whole
        self.task: asyncio.Task[None] | None = None  # from a whole request to the connection with the model server
        self.model: ModelSide | None = None
        self.answered = False  # whether a byte of the answer has gone out
        self.since = time.monotonic()  # when the state last changed

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        if len(self.guard.clients) >= CONNECTIONS:
            transport.abort()
        self.guard.clients.add(self)

    def data_received(self, data: bytes) -> None:
        if self.refused:
            return  # read and drop: closing on unread bytes would reset the connection under our answer
        if self.is_busy():
            return self.refuse(malformed("a second request before the first is answered"))
        if not self.buffer:
            self.since = time.monotonic()
        self.buffer += data
        try:
            self._read()
        except Refused as e:
            self.refuse(e)

    def _read(self) -> None:
        if self.request is None:
            end = self.buffer.find(b"\r\n\r\n")
            if max(end, len(self.buffer) if end < 0 else 0) > HEAD_LIMIT:
                raise Refused(431, "too_long", f"the request's head is over {HEAD_LIMIT} bytes")
            if end < 0:
                return
            self.request = read_head(bytes(self.buffer[:end]))
            del self.buffer[:end + 4]
        method, path, length = self.request
        if len(self.buffer) > length:
            raise malformed("there is more than one request")
        if len(self.buffer) == length:
            body, self.request, self.since = bytes(self.buffer), None, time.monotonic()
            self.buffer.clear()
            self.guard.bytes += length
            if self.guard.paused():
                return self.refuse(Refused(503, "paused", "the owner of this GPU uses it now"), keep=True)
            body = remade_body(path, body, self.guard.limits()) if method == "POST" else b""
            self.guard.requests += method == "POST"
            head = f"{method} {path} HTTP/1.1\r\nHost: localhost:{self.guard.target[1]}\r\nAccept: */*\r\n"
            if body:
                head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            request = head.encode() + b"\r\n" + body
            if self.model:
                self.model.send(request)
            else:
                self.task = asyncio.get_running_loop().create_task(self._connect(request))

    async def _connect(self, request: bytes) -> None:
        host, port = self.guard.target
        try:
            await asyncio.get_running_loop().create_connection(lambda: ModelSide(self, request), host, port)
        except OSError:
            self.refuse(NO_MODEL_SERVER, keep=True)
        finally:
            self.task = None

    def pass_on(self, data: bytes) -> None:
        """Send bytes of the answer as they came."""
        self.answered, self.since = True, time.monotonic()
        self.guard.bytes += len(data)
        self.transport.write(data)

    def answer_ended(self, model: ModelSide) -> None:
        self.answered, self.since = False, time.monotonic()
        if model.end:  # the model server will not take another request on this connection
            self.drop_model()

    def model_left(self, model: ModelSide) -> None:
        """The model server closed, or spoke no HTTP: in an answer, before one, or between two."""
        if model is not self.model:
            return
        busy, answered, self.answered = model.end is not None, self.answered, False
        self.drop_model()
        if busy and answered:
            self.transport.close()
        elif busy:
            self.refuse(NO_MODEL_SERVER, keep=True)

    def is_busy(self) -> bool:
        """Return whether a request is under way."""
        return bool(self.task or self.model and self.model.end)

    def refuse(self, why: Refused, keep: bool = False) -> None:
        """Answer a refusal ourselves; keep: the request was whole and lawful, the connection stays."""
        self.guard.refused += why.code not in ("paused", "no_model_server")
        body = json.dumps({"error": {"code": why.code, "message": why.message}}).encode()
        self.transport.write(f"HTTP/1.1 {why.status} {PHRASES[why.status]}\r\nContent-Type: application/json\r\nContent-Length: "
                             f"{len(body)}\r\n{'' if keep else 'Connection: close' + chr(13) + chr(10)}\r\n".encode() + body)
        self.since = time.monotonic()
        if not keep:
            self.refused = True
            self.drop_model()
            self.transport.write_eof()

    def is_overdue(self, now: float) -> bool:
        """Return whether this connection has been in its state for longer than that state may last."""
        limit = SLOW_CONNECT if self.task else SILENT_ANSWER if self.is_busy() else SLOW_REQUEST if self.buffer or self.request or self.refused else IDLE_CONNECTION
        return now - self.since > limit

    def pause_writing(self) -> None:
        if self.model:
            self.model.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.model:
            self.model.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client left: the model server's connection is closed at once, and the GPU is free."""
        self.guard.clients.discard(self)
        self.drop_model()

    def drop_model(self) -> None:
        if self.task:
            self.task.cancel()
        model, self.model = self.model, None
        if model:
            model.transport.abort()


class Guard:
    """The listener that ssh forwards to: what it counts, and what the owner allows."""

    def __init__(self, target: tuple[str, int], limits: Callable[[], Limits], paused: Callable[[], bool]) -> None:
        self.target, self.limits, self.paused = target, limits, paused
        self.clients: set[ClientSide] = set()
        self.requests = self.refused = self.bytes = 0  # generations asked for; requests not passed; both directions
        self.port = 0

    async def start(self) -> None:
        self.server = await asyncio.get_running_loop().create_server(lambda: ClientSide(self), "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]

    def sweep(self) -> None:
        """Drop the connections that are overdue; called every second."""
        now = time.monotonic()
        for client in self.clients:
            if client.model and not client.is_busy() and now - client.since > KEPT_CONNECTION:
                client.drop_model()
        for client in [c for c in self.clients if c.is_overdue(now)]:
            if client.task:
                client.task.cancel()
                client.refuse(NO_MODEL_SERVER, keep=True)
            else:
                client.transport.abort()

    def stop_running(self) -> None:
        """Break off every exchange with the model server."""
        for client in [c for c in self.clients if c.is_busy()]:
            client.transport.abort()

    def close(self) -> None:
        self.server.close()
        for client in list(self.clients):
            client.transport.abort()

# --- probe -------------------------------------------------------------------

class Line(http.client.HTTPConnection):
    """A connection to ADDRESS:PORT or to a Unix socket's path; every wait on it is bounded by its timeout."""

    def __init__(self, at: str, timeout: float = 2.0) -> None:
        super().__init__("localhost", timeout=timeout)
        self.at = at

    def connect(self) -> None:
        if self.at.startswith("/"):
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(self.timeout)
            self.sock.connect(self.at)
        else:
            host, _, port = self.at.rpartition(":")
            self.sock = socket.create_connection((host, int(port)), self.timeout)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, bytes]:
        """Return status, headers and body (to 8 MiB) of the answer; raise OSError or http.client.HTTPException."""
        self.request(method, path, None if body is None else json.dumps(body).encode(), {k: v for k, v in headers.items()})
        answer = self.getresponse()
        return answer.status, answer.headers, answer.read(8 << 20)


# --- supervising -------------------------------------------------------------

TICK = 1.0  # seconds between looks at clock, address, pause and state
SLEPT = 5.0  # seconds; a tick that late means that the machine was asleep
WORDS_KEPT = 80  # lines of ssh's stderr; a failed dial at -v writes about 60


def notify(text: str) -> None:
    """Tell systemd (sd_notify(3)); nothing where no one listens."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
            s.connect("\0" + path[1:] if path.startswith("@") else path)
            s.send(text.encode())


def local_address(peer: str) -> str:
    """Return the address from which packets to peer would leave; empty where there is no route. Sends nothing."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in peer else socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.connect((peer, 9))
            return str(s.getsockname()[0])
    except OSError:
        return ""


def end_with_us() -> Callable[[], None] | None:
    """Return what a child calls before exec so that the Linux kernel ends it when we die."""
    if sys.platform != "linux":
        return None
    import ctypes
    libc, us = ctypes.CDLL(None), os.getpid()

    def arrange() -> None:
        libc.prctl(1, 15)  # PR_SET_PDEATHSIG, SIGTERM
        if os.getppid() != us:  # we died before the call
            os._exit(1)
    return arrange


class Tunnel:
    """One workstation's tunnel from start to stop; run() owns its tasks and the ssh process."""

    def __init__(self, settings: Settings, home: Path, clock: Callable[[], float] = boot_clock) -> None:
        self.settings, self.home, self.clock = settings, home, clock
        host, _, port = settings.target.rpartition(":")
        self.guard = Guard((host, int(port)), self.limits, lambda: False)
        self.stopping, self.hurry = asyncio.Event(), asyncio.Event()
        self.reason = ""  # why we end the link ourselves
        self.peer = self.dialled_from = self.sshd = ""
        self.dials = 0
        self.saved: tuple[str, float, str] = ("", -9.0, "")
        self.state: dict[str, Any] = {
            "version": VERSION, "pid": os.getpid(), "name": settings.name, "destination": settings.destination,
            "remote": settings.remote, "started_at": time.time(), "up_since": None, "redials": 0, "last_error": None,
            "front": None, "round_trip": None, "model": settings.model or PLACEHOLDER_MODEL}

    def limits(self) -> Limits:
        s = self.settings
        return Limits(self.state["model"], s.context, s.max_tokens, s.keep_alive)

    async def run(self) -> int:
        """Hold the tunnel until stop() is called; return the exit status."""
        await self.guard.start()
        tasks = [asyncio.ensure_future(t) for t in (self._supervise(), self._tick())]
        stop = asyncio.ensure_future(self.stopping.wait())
        done, _ = await asyncio.wait([stop, *tasks], return_when=asyncio.FIRST_COMPLETED)
        notify("STOPPING=1")
        for task in tasks:
            task.cancel()
        self.guard.close()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.state["up_since"] = None
        self.save(force=True)
        for task in done - {stop}:
            task.result()  # a task that ended by itself ended by a fault of ours: show it
        return 0

    def redial(self, why: str) -> None:
        """End the link, or the wait for the next try, now."""
        self.reason = why
        self.hurry.set()

    async def _supervise(self) -> None:
        failures = 0
        while True:
            self.hurry.clear()
            self.reason, began, self.dials = "", self.clock(), self.dials + 1
            failure = await self._dial()
            up, self.state["up_since"], self.state["front"] = self.state["up_since"], None, None
            failures = 1 if up and self.clock() - began > STEADY_AFTER else failures + 1
            self._tell(failure, bool(up))
            delay = 0.0 if self.reason else next_delay(failure.pace, failures)
            await asyncio.wait([asyncio.ensure_future(self.hurry.wait())], timeout=delay)

    async def _dial(self) -> Failure:
        """Hold one ssh from start to end; return why it ended."""
        s, front = self.settings, front_address(self.home)
        places = {"destination": s.destination, "port": s.ssh_port, "identity": s.identity, "remote": s.remote,
                  "known_hosts": self.home / "known_hosts"}
        try:
            ssh = await asyncio.create_subprocess_exec(
                *ssh_command(s, self.home, self.guard.port, front), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, preexec_fn=end_with_us(), creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0))
        except OSError as e:
            return judge(0, f"cannot start ssh: {e.strerror}", places)
        words: deque[str] = deque(maxlen=WORDS_KEPT)
        listening = asyncio.ensure_future(self._listen(ssh, words, front))
        hurry = asyncio.ensure_future(self.hurry.wait())
        try:
            await asyncio.wait([listening, hurry], return_when=asyncio.FIRST_COMPLETED)
        finally:
            hurry.cancel()
            with contextlib.suppress(ProcessLookupError):
                ssh.terminate()
            if not (await asyncio.wait([listening], timeout=2.0))[0]:
                ssh.kill()
            await listening
            await ssh.wait()
        return judge(ssh.returncode or 0, "\n".join(words), places, self.reason)

    async def _listen(self, ssh: asyncio.subprocess.Process, words: deque[str], front: str) -> None:
        """Read what ssh says until it ends; notice what the rest of us needs to know."""
        rest = b""
        while True:
            some = await ssh.stderr.read(4096)
            if not some:
                return
            *lines, rest = (rest + some)[-65536:].split(b"\n")
            for line in (raw.decode("utf-8", "replace").rstrip("\r") for raw in lines):
                words.append(line)
                connecting = re.match(r"debug1: Connecting to \S+ \[(.+)\] port", line)
                if connecting:
                    self.peer = connecting[1]
                    self.dialled_from = local_address(self.peer)
                elif "remote software version" in line:
                    self.sshd = line.rpartition("version ")[2][:60]
                elif line.startswith("debug1: remote forward success"):
                    self._is_up(front)
                elif "open failed: administratively prohibited" in line and self.state["front"]:
                    self.state["front"] = None
                    log.warning("the VPS refuses the way to its own %s: the tunnel serves without probe and mirror", self.settings.front)

    def _is_up(self, front: str) -> None:
        self.state.update(up_since=time.time(), front=front, redials=self.dials - 1, last_error=None)
        log.info("tunnel is up: %s serves at %s of %s", self.state["model"], self.settings.remote, self.settings.destination)
        notify(f"READY=1\nSTATUS=up: {self.settings.remote} of {self.settings.destination}")

    def _tell(self, failure: Failure, was_up: bool) -> None:
        """Say a change once: a link that ended, or a new kind of failure."""
        last = self.state["last_error"]
        if was_up or not last or last["kind"] != failure.kind:
            log.warning("%s: %s; %s", failure.kind, failure.seen, failure.cure)
        self.state["last_error"] = {"at": time.time(), "kind": failure.kind, "seen": failure.seen, "cure": failure.cure}
        notify(f"STATUS=down: {failure.seen}; {failure.cure}")

    async def _tick(self) -> None:
        last = self.clock()
        while True:
            await asyncio.sleep(TICK)
            late, last = self.clock() - last - TICK, self.clock()
            if late > SLEPT:
                self.redial(f"woke from {late:.0f} s of sleep")
            if self.peer:
                address = local_address(self.peer)
                if address and address != self.dialled_from:
                    self.redial(f"this machine's address changed from {self.dialled_from or 'none'} to {address}")
                    self.dialled_from = address
            self.guard.sweep()
            self.save()
            notify("WATCHDOG=1")

    def save(self, force: bool = False) -> None:
        """Write the state when it changed; counters alone at most every 5 s."""
        text = json.dumps(self.state)
        counts = {"requests": self.guard.requests, "refused": self.guard.refused, "bytes": self.guard.bytes}
        whole = json.dumps({**self.state, **counts}, indent=1)
        if force or text != self.saved[0] or (whole != self.saved[2] and self.clock() - self.saved[1] >= 5.0):
            write_atomically(self.home / "state.json", whole)
            self.saved = (text, self.clock(), whole)


# --- command line ------------------------------------------------------------

def run(settings: Settings, home: Path) -> int:
    """Hold the tunnel until SIGTERM, SIGINT or a fault."""
    import signal

    async def hold() -> int:
        tunnel = Tunnel(settings, home)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(tunnel.stopping.set))
        return await tunnel.run()
    return asyncio.run(hold())


def status(home: Path, as_json: bool) -> int:
    state = read_json(home / "state.json") or {}
    print(json.dumps(state, indent=1))
    return 0 if state.get("up_since") else 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"tunnel {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("run", "key", "status"):
        sub = commands.add_parser(command)
        if command == "run":
            sub.add_argument("destination", nargs="?")
        if command == "status":
            sub.add_argument("--json", action="store_true")
        else:
            for f in fields(Settings)[1:]:
                sub.add_argument("--" + f.name.replace("_", "-"), help=f.metadata["help"])
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    home = home_folder()
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        if args.command == "status":
            return status(home, args.json)
        settings = completed(parse_settings(home, vars(args)), home)
        if args.command == "key":
            print(*public_key(Path(settings.identity)), settings.name)
            return 0
        if not settings.destination:
            raise BadSetting("run: no VPS given; say tunnel.py run USER@VPS")
        return run(settings, home)
    except Fatal as e:
        print(f"error: {e}", file=sys.stderr)
        return 2 if isinstance(e, BadSetting) else 1


if __name__ == "__main__":
    sys.exit(main())
