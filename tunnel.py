#!/usr/bin/env python3
"""Hold the tunnel that puts this machine's model server behind a website, and let nothing else through.

The life of a tunnel: settings are read, the guard listens on a loopback port, ssh dials the VPS and lets it reach the
guard and nothing else; the link is watched, and dialled again whenever it ends. `tunnel.py --help` lists the commands.

Words: the *tunnel* is the ssh link; the *guard* filters what reaches the model server; a *probe* is a question that
proves life; a *backend* is this machine as the VPS sees it; a *client* is who calls.

All lives in one folder, SCATTER_HOME: ~/.config/scatter (Linux, below XDG_CONFIG_HOME if set), /var/lib/scatter (Linux,
root), ~/Library/Application Support/scatter (macOS), %LOCALAPPDATA%\\scatter (Windows).

No ssh outlives this program. SIGTERM and Ctrl-C end it in order. If we are killed: on Linux the kernel ends ssh
(PR_SET_PDEATHSIG); elsewhere a shell between us does, when its pipe from us closes; on Windows a job (never run there).

Needs Python 3.9, its standard library, and the system's ssh (OpenSSH 8.4 or newer).
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import encodings.idna  # noqa: F401 (else the first look-up loads it: as an account that may not read root's Python)
import getpass
import hashlib
import http.client
import io
import itertools
import json
import logging
import logging.handlers
import os
import plistlib
import random
import re
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from xml.sax.saxutils import escape

VERSION = "1.0.0"
WINDOWS = os.name == "nt"
log = logging.getLogger("tunnel")


# --- settings ----------------------------------------------------------------

PLACEHOLDER_MODEL = "sinc-scatter"  # the name the VPS uses; the guard puts the real one in its place
PORT = r"(?:[1-9]\d{0,3}|[1-5]\d{4}|6[0-4]\d{3}|65[0-4]\d\d|655[0-2]\d|6553[0-5])"


class Fatal(Exception):
    """One line for a person: what was seen, with the value, and what to do; and 2, the status for a bad setting."""


def option(default: Any, pattern: str, help: str) -> Any:
    """Declare a setting: its default, the whole form of its value, and the line --help prints."""
    return field(default=default, metadata={"pattern": pattern, "help": help})


@dataclass(frozen=True)
class Settings:
    """Everything an owner can set. A flag wins over tunnel.json, which wins over the default."""

    destination: str = option("", r"([A-Za-z0-9_][\w.-]*@)?[A-Za-z0-9:][\w.:%-]*", "the account on the VPS: USER@HOST")
    name: str = option("", r"[a-z0-9-]{1,32}", "our name there (default: gpu- and 4 hex digits of the key's hash)")
    model: str = option("", r"[\w.:/@+-]{1,200}", "default: sinc-scatter, else the only one loaded or installed")
    target: str = option("127.0.0.1:11434", rf"[\w.-]+:{PORT}", "where the model server listens")
    remote: str = option("", rf"/[\w./-]{{1,100}}|127\.0\.0\.1:{PORT}",
                         "where the VPS finds us: 127.0.0.1:PORT or a path (default: /run/scatter/backends/NAME.sock)")
    front: str = option("127.0.0.1:8461", rf"[\w.-]+:{PORT}", "where the proxy listens on the VPS")
    identity: str = option("", r".+", "private key (default: key in SCATTER_HOME)")
    ssh_port: int = option(22, PORT, "port of the VPS's sshd")
    context: int = option(8192, r"\d{2,7}", "longest context a request may ask for, in tokens")
    max_tokens: int = option(4096, r"[1-9]\d{0,6}", "most tokens a request may generate")
    keep_alive: str = option("-1", r"-1|\d+[smh]?", "how long Ollama keeps the model in memory; -1: for ever")
    mirror: str = option("", r".+", "copy of the VPS's log, or none (default: scatter-api.jsonl in SCATTER_HOME)")
    log_file: str = option("", r".+", "where we log, rotated at 1 MiB (default: standard error)")


def home_folder() -> Path:
    """Return the one folder that holds settings, key, known hosts, state and pause."""
    if os.environ.get("SCATTER_HOME"):
        return Path(os.environ["SCATTER_HOME"]).absolute()
    if WINDOWS:
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "scatter"
    if sys.platform == "darwin":
        return Path.home() / "Library/Application Support/scatter"
    if os.geteuid() == 0:
        return Path("/var/lib/scatter")  # the system service cannot see root's home
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "scatter"


def owner_of(home: Path) -> tuple[int, int]:
    """Return user and group that root must be to work in this home; (0, 0) where we are not root, or it is root's."""
    if WINDOWS or os.geteuid() or not home.exists():
        return 0, 0
    return home.stat().st_uid, home.stat().st_gid


def become_owner(home: Path) -> None:
    """As root, be the account that owns the home from now on: it may have laid links there, and wrote the settings."""
    user, group = owner_of(home)
    if user:
        os.setgroups([])
        os.setgid(group)
        os.setuid(user)


@contextlib.contextmanager
def as_owner(home: Path) -> Iterator[None]:
    """As root, be the account that owns the home for a while."""
    (user, group), groups = owner_of(home), [] if WINDOWS else os.getgroups()
    if user:
        os.setgroups([])
        os.setegid(group)
        os.seteuid(user)
    try:
        yield
    finally:
        if user:
            os.seteuid(0)
            os.setegid(os.getgid())
            os.setgroups(groups)


def parsed(text: bytes) -> Any:
    """Return the value of a JSON text, which may be anyone's; None where it is none."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    return None


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one where there is none, or it is not whole."""
    with contextlib.suppress(OSError):
        value = parsed(path.read_bytes())
        return value if isinstance(value, dict) else {}
    return {}


def write_atomically(path: Path, text: str, dry_run: bool = False) -> bool:
    """Put text in place of the file in one step, so that no reader ever sees half of it; return whether it differed."""
    content = text.encode("utf-16" if path.suffix == ".xml" else "utf-8")  # schtasks believes the first line
    if path.exists() and path.read_bytes() == content:
        return False
    if not dry_run:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + ".new")
        beside.write_bytes(content)
        beside.replace(path)
    return True


def parse_settings(home: Path, flags: dict[str, Any]) -> Settings:
    """Return the settings of flags over tunnel.json over defaults; raise Fatal for one that cannot work."""
    path, values = home / "tunnel.json", {}
    saved = read_json(path)
    if path.exists() and not saved:
        raise Fatal(f"{path}: not a JSON object; mend it or remove it", 2)
    for word in saved.keys() - {f.name for f in fields(Settings)}:
        raise Fatal(f"{path}: {word!r} is no setting; remove it, or write it as --help does, with _ for -", 2)
    to = flags.get("destination", "not asked for")
    if not (saved.get("destination") if to is None else to):
        raise Fatal(f"no VPS given: say tunnel.py {flags['command']} USER@VPS", 2)
    for f in fields(Settings):
        flag, value = flags.get(f.name), saved.get(f.name, f.default)
        where = f"{path}: {f.name}" if flag is None else "--" + f.name.replace("_", "-")
        value = value if flag is None else flag
        if value != f.default and not re.fullmatch(f.metadata["pattern"], str(value)):
            raise Fatal(f"{where}: {str(value)[:80]!r} does not fit; it is {f.metadata['help']}", 2)
        if f.name in ("identity", "mirror", "log_file") and value not in ("", "none"):
            value = os.path.abspath(os.path.join(home if flag is None else "", value))  # the service runs elsewhere
        values[f.name] = type(f.default)(value)
    return Settings(**values)


def completed(settings: Settings, home: Path) -> Settings:
    """Return the settings with every default that depends on the key or the folder filled in."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    identity = settings.identity or str(home / "key")
    name = settings.name or "gpu-" + hashlib.sha256(base64.b64decode(public_key(identity)[1])).hexdigest()[:4]
    return replace(settings, identity=identity, name=name, mirror=settings.mirror or str(home / "scatter-api.jsonl"),
                   remote=settings.remote or f"/run/scatter/backends/{name}.sock")


def key(home: Path, flags: dict[str, Any]) -> int:
    """Print the line that the VPS must authorise."""
    settings = completed(parse_settings(home, flags), home)
    print(*public_key(settings.identity), settings.name)
    return 0


def public_key(identity: str) -> list[str]:
    """Return type and base64 blob of the public key, making the pair if there is none."""
    if not Path(identity).exists():
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "scatter", "-f", identity]
        made = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        if made.returncode:
            raise Fatal(f"ssh-keygen {identity}: {made.stderr.strip()[:200]}; can its folder be written?")
        if WINDOWS:  # ssh.exe refuses a key that others may read, and a new file inherits the folder's rights
            rights = ["/inheritance:r", "/grant:r", getpass.getuser() + ":F", "SYSTEM:F"]
            subprocess.run(["icacls", identity, *rights], capture_output=True, check=False)
    try:
        kind, blob = Path(identity + ".pub").read_text("utf-8").split()[:2]
        base64.b64decode(blob, validate=True)
        return [kind, blob]
    except (OSError, ValueError) as e:
        seen = e.strerror if isinstance(e, OSError) else "this is no public key"
        raise Fatal(f"{identity}.pub: {seen}; make it: ssh-keygen -y -f {identity} > {identity}.pub") from None


# --- ssh command -------------------------------------------------------------

def quoted(word: str) -> str:
    """Quote a word for an option of ssh's or a systemd unit, where quotes, backslashes and % have meanings."""
    return '"' + re.sub(r'(["\\])', r"\\\1", word).replace("%", "%%") + '"'


def ssh_command(settings: Settings, home: Path, guard_port: int, front_at: str) -> list[str]:
    """Return the command that holds the tunnel; front_at is a socket's path or ADDRESS:PORT on this machine.

    -v makes ssh say what judging needs: the VPS's address, sshd's version, that the forward stands, or why it does not.
    """
    known = " ".join(quoted((folder / "known_hosts").as_posix()) for folder in (home, Path.home() / ".ssh"))
    options = (
        f"IdentityFile={quoted(Path(settings.identity).as_posix())}",  # what -i is given is not expanded
        "BatchMode=yes",  # a question that nobody answers would hang the service for ever
        "IdentitiesOnly=yes",  # an agent's other keys would use up sshd's MaxAuthTries
        "IdentityAgent=none",  # a locked agent asks its owner, and waits
        "PreferredAuthentications=publickey",  # each further method is one more failure that a banning sshd counts
        "StrictHostKeyChecking=yes",  # anyone on the way could be the VPS and read every prompt
        f"UserKnownHostsFile={known}",  # ours first
        "UpdateHostKeys=no",  # a VPS taken over could add keys to the pinned ones
        "ExitOnForwardFailure=yes",  # a link without its forward looks up and serves nobody
        "ConnectTimeout=5",  # seconds; a black hole would hold a dial for two minutes
        "ServerAliveInterval=3",  # with 2: a link that dies silently is noticed within 3 x (2 + 1) s; by default never
        "ServerAliveCountMax=2",
        "ForwardAgent=no",  # a VPS taken over could log in elsewhere as the owner
        "ForwardX11=no",  # it could read the owner's keyboard
        "ControlMaster=no",  # a shared connection outlives this process, and its options are not ours
        "ControlPath=none",
        "Compression=no",  # time spent on chunks too small to shrink
        "IPQoS=none",  # some routers freeze or starve marked packets
        "StreamLocalBindUnlink=yes",  # the -L socket that a killed run left would make the next one fail
    )
    return ["ssh", "-F", "none", "-NTv", "-p", str(settings.ssh_port), *itertools.chain(*(("-o", o) for o in options)),
            "-R", f"{settings.remote}:127.0.0.1:{guard_port}",
            "-L", f"{front_at}:{settings.front}", "--", settings.destination]


def front_address(home: Path) -> str:
    """Return where ssh shall listen here for probe and mirror: a socket that is ours alone, or a free port.

    A port on Windows, and where a socket's path would be over macOS's 104 bytes or need quoting of ssh's own.
    """
    path = f"{home}/front.sock"
    if not WINDOWS and len(path.encode()) <= 100 and re.fullmatch(r"[\w./-]+", path, re.ASCII):
        return path
    with socket.create_server(("127.0.0.1", 0)) as s:
        return f"127.0.0.1:{s.getsockname()[1]}"


# --- judging -----------------------------------------------------------------
# ssh says 255 for nearly everything, so its words decide; the first row that matches names the failure.
#
# What mends itself (network, name server, a restarted sshd, a cut link) is tried for ever: at once, then within 0.5, 1,
# 2, 4, 8 and 15 s, each time a random part of that, so that many tunnels cut by one outage do not come back in the same
# second. After 30 s up the waits start again from the first.
#
# What a person must mend (key, host key, account, a forward not allowed) is tried every 60 to 300 s: sshd from 9.8 on
# and fail2ban shut out an address that fails often. What to do is said once, and in `status` until something changes.
#
# A taken port (TCP form) is tried every 2 s: sshd holds the port of a dead link until it notices the death, and logins
# that succeed are not what gets an address banned.

FIRST_WAITS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0)  # seconds, upper ends; 15 is the longest that a mended link waits
SLOW_WAITS = (60.0, 120.0, 240.0, 300.0)  # seconds, upper ends; sshd's penalties last 600 at most
BUSY_WAIT = 2.0  # seconds
STEADY_AFTER = 30.0  # seconds up, after which an end is a new failure and not the next of the last


class Failure(NamedTuple):
    """Why a tunnel ended: its kind, what was seen, what mends it, and the pace of the next tries: soon, slow, busy."""

    kind: str
    seen: str
    cure: str
    pace: str = "soon"


FAILURES = (  # kind, pace, pattern in ssh's words, cure
    ("no_ssh", "slow", r"cannot start ssh.*", "install the OpenSSH client, 8.4 or newer"),
    ("ssh_options", "slow", r"Bad configuration option.*|unknown option.*", "install OpenSSH 8.4 or newer"),
    ("host_key_changed", "slow", r"REMOTE HOST IDENTIFICATION HAS CHANGED", (
        "if the VPS was rebuilt, replace its line in {known_hosts}; else it is not the VPS")),
    ("host_key_unknown", "slow", r"No \S+ host key is known for.*|Host key verification failed.*", (
        "run `ssh -p {port} {destination}` once and compare the fingerprint")),
    ("key_file", "slow", r"UNPROTECTED PRIVATE KEY FILE|Load key .*|no such identity: .*", (
        "make {identity} readable by its owner alone and whole, or remove it and run `tunnel.py key`")),
    ("auth", "slow", r"Permission denied \(.*|Too many authentication failures.*|No supported authentication.*", (
        "let the VPS authorise the line that `tunnel.py key` prints, for the account of {destination}")),
    ("banned", "slow", r"Not allowed at this time.*|Exceeded MaxStartups.*", "sshd shuts this address out; wait"),
    ("no_agreement", "slow", r"no matching .* found.*", "ssh and the VPS share no algorithm; upgrade the older"),
    ("forward_refused", "slow", r"Remote: (?:port forwarding refused|Server has disabled .*)", (
        "sshd_config must let us listen on {remote}: PermitListen, AllowTcpForwarding, AllowStreamLocalForwarding")),
    ("path_taken", "soon", r"remote port forwarding failed for listen path.*", (
        "{remote} cannot be made: no such folder, not the account's, or an old socket but no `StreamLocalBindUnlink`")),
    ("port_taken", "busy", r"remote port forwarding failed for listen port.*", (
        "the VPS still holds {remote}, likely for our last link; it lets go in 16 s to 16 min; or end that sshd")),
    ("front_taken", "soon", r"cannot bind to path .*|cannot listen to port.*|Could not request local forwarding.*", (
        "remove front.sock, which lies beside {known_hosts}, or end who listens there")),
    ("name", "soon", r"Could not resolve hostname.*", (
        "check the name in {destination} and this machine's name server; an alias of ~/.ssh/config is not read here")),
    ("silent", "soon", r"Timeout, server .* not responding.*", "the tunnel is dialled again; nothing to do"),
    ("network", "soon", (
        r"(?:connect to|kex_exchange|Connection|client_loop|ssh_dispatch|banner).*"
        r"(?:refused|timed out|unreachable|No route|closed|[Rr]eset|Broken|aborted).*"),
     "see that the VPS is up and its sshd listens on {port}"),
)
CHATTER = re.compile(r"(?m)^(?:debug1: )?channel .*\n?")  # else a refused -L would be read as the reason of a later end


def judge(status: int, words: str, places: dict[str, Any]) -> Failure:
    """Return why ssh ended, from its exit status and its words (hostile: cut, cleaned).

    places fills the cure: destination, port, identity, remote, known_hosts.
    """
    for kind, pace, pattern, cure in FAILURES:
        found = re.search(pattern, CHATTER.sub("", words))
        if found:
            seen = "".join(c if c.isprintable() else " " for c in found.group())[:200].strip()
            return Failure(kind, seen, cure.format(**places), pace)
    how = f"signal {-status}" if status < 0 else f"status {status}"
    return Failure("dropped", f"ssh ended with {how}", "the tunnel is dialled again; nothing to do")


def next_delay(pace: str, failures: int, chance: Callable[[float, float], float] = random.uniform) -> float:
    """Return the seconds to wait before the next try, after this many failures in a row (1 is the first)."""
    if pace == "busy":
        return BUSY_WAIT
    waits = SLOW_WAITS if pace == "slow" else FIRST_WAITS
    longest = waits[min(failures, len(waits)) - 1]
    return chance(max(SLOW_WAITS[0], longest / 2), longest) if pace == "slow" else chance(0.0, longest)


# --- guard -------------------------------------------------------------------
# The VPS may be taken over, so what arrives here is hostile. One request at a time on a connection; its head is read by
# a grammar narrower than HTTP's, so that no two readers can differ about where it ends; its body is made anew from the
# keys below, and of its headers none is passed on. Answers pass untouched: the model server is the owner's.

HEAD_LIMIT = 16 * 1024  # bytes; the proxy's heads are below 300
BODY_LIMIT = 1024 * 1024  # bytes; a prompt is at most 16,000 characters
CHUNK_LIMIT = 16 << 20  # bytes of one chunk of an answer; the model server is trusted, not unbounded
CONNECTIONS = 128  # at once; the proxy holds one per slot and one for probes
SLOW_CONNECT = 5.0  # seconds; the model server is on this machine or beside it
SLOW_REQUEST = 10.0  # seconds from a request's first byte to its last
KEPT_CONNECTION = 2.0  # seconds; llama.cpp and uvicorn close theirs when idle for 5
IDLE_CONNECTION = 900.0  # seconds; the proxy keeps its own for minutes, so that a request costs one round trip
SILENT_ANSWER = 330.0  # seconds without a byte; the proxy gives up after 300
ROUTES = {("POST", "/api/generate"), ("POST", "/v1/chat/completions"), ("GET", "/api/version"), ("GET", "/health"),
          ("GET", "/props"), ("GET", "/v1/models")}
REQUEST_LINE = re.compile(rb"([A-Z]{1,16}) ([!-~]{1,1024}) HTTP/1\.1")
HEADER_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}):[ \t]*([ -~\t]*)")

# What may stand in a body. str, bool: that type; (low, high): a number in that range; a set: one of these texts; a
# name: a count, clamped to that limit of the owner; [rule]: a list of them; {key: rule}: an object, other keys dropped;
# {str: rule}: an object of any keys; (rule, rule): either. A schema is compiled by the model server, so it has no $ref
# (some fetch it), no pattern and no counts of items or digits (they explode), and is short.
SCHEMA: dict[Any, Any] = {"type": str, "title": str, "description": str, "const": str, "enum": [str], "required": [str]}
SCHEMA.update(minLength=(0, 1999), maxLength=(0, 1999))  # characters; llama.cpp takes no more
SCHEMA.update(properties={str: SCHEMA}, items=SCHEMA, additionalProperties=(bool, SCHEMA))
TEMPERATURE, SEED = (0, 5), (-1, 2**63 - 1)
BODIES: dict[str, dict[str, Any]] = {
    "/api/generate": {
        "prompt": str, "system": str, "stream": bool, "truncate": bool, "think": (bool, {"low", "medium", "high"}),
        "format": ({"json"}, SCHEMA),
        "options": {"temperature": TEMPERATURE, "seed": SEED, "num_predict": "max_tokens", "num_ctx": "context"}},
    "/v1/chat/completions": {
        "messages": [{"role": {"system", "user", "assistant"}, "content": str}], "stream": bool, "seed": SEED,
        "temperature": TEMPERATURE, "max_tokens": "max_tokens", "stream_options": {"include_usage": bool},
        "response_format": {"type": {"text", "json_object", "json_schema"}, "schema": SCHEMA,
                            "json_schema": {"name": str, "strict": bool, "schema": SCHEMA}},
        "chat_template_kwargs": {"enable_thinking": bool}}}
MOST_ITEMS = 256  # of a list or an object
SCHEMA_LIMIT = 2048  # characters; the proxy's has 500, and llama.cpp computed for 41 s on one of 54,000


class Refused(Exception):
    """A request that does not pass: its HTTP status, one word, one sentence for a person."""

    def answer(self, keep: bool) -> bytes:
        """Return the refusal as HTTP; keep: the request was whole and lawful, and the connection stays."""
        status, code, message = self.args
        body = json.dumps({"error": {"code": code, "message": message}})
        close = "" if keep else "Connection: close\r\n"
        return (f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n{close}"
                f"Content-Length: {len(body)}\r\n\r\n{body}").encode()


def need(fits: Any, why: str = "") -> Any:
    """Return what fits if it is true; raise ValueError if not."""
    if not fits:
        raise ValueError(why)
    return fits


def read_head(head: bytes) -> tuple[str, str, int]:
    """Return method, path and body length of a request's head (without its blank line); raise Refused for any doubt."""
    first, *lines = head.split(b"\r\n")
    headers: dict[str, str] = {}
    try:
        request = need(REQUEST_LINE.fullmatch(first), "this is no HTTP/1.1 request line")
        for line in lines:
            header = need(HEADER_LINE.fullmatch(line), "a header line is malformed")
            name = header[1].decode().lower()
            need(name not in headers or name not in ("content-length", "host"), f"{name} is there twice")
            need(name not in ("transfer-encoding", "upgrade", "expect"), f"{name} is not spoken here")
            headers[name] = header[2].decode().strip()
        method, path = request[1].decode(), request[2].decode()
        need("host" in headers, "there is no host")
        length = headers.get("content-length", "0" if method == "GET" else "")
        need(re.fullmatch(r"[0-9]{1,12}", length), "content-length is missing or no number")
        if (method, path) not in ROUTES:
            raise Refused(403, "forbidden", "the guard of this workstation does not pass this request")
        need(method == "POST" or not int(length), "a GET has no body here")
    except ValueError as e:
        raise Refused(400, "bad_request", str(e)) from None
    if int(length) > BODY_LIMIT:
        raise Refused(413, "too_long", f"the body is over {BODY_LIMIT} bytes")
    return method, path, int(length)


@dataclass(frozen=True)
class Limits:
    """What the owner puts in place of what a client asks for."""

    model: str
    context: int  # tokens
    max_tokens: int
    keep_alive: str  # -1, seconds, or a duration such as 10m


def remade(rule: Any, value: Any, limits: Limits) -> Any:
    """Return the value made anew by its rule, in the client's order; raise ValueError if it does not fit."""
    if isinstance(rule, dict):
        need(isinstance(value, dict) and len(value) <= MOST_ITEMS)
        rules = {k: rule.get(k, rule.get(str)) for k, v in value.items() if v is not None}  # null is as good as absent
        return {k: remade(r, value[k], limits) for k, r in rules.items() if r is not None}
    if isinstance(rule, list):
        need(isinstance(value, list) and len(value) <= MOST_ITEMS)
        return [remade(rule[0], v, limits) for v in value]
    if isinstance(rule, str):  # Ollama's -1 and -2 mean without limit, so they become the limit
        need(type(value) is int)
        return min(value, getattr(limits, rule)) if value > 0 else getattr(limits, rule)
    if isinstance(rule, tuple) and not isinstance(rule[0], (int, float)):
        with contextlib.suppress(ValueError):
            return remade(rule[0], value, limits)
        return remade(rule[1], value, limits)
    if isinstance(rule, tuple):
        need(type(value) in (int, float) and rule[0] <= value <= rule[1])
    else:
        need(isinstance(value, str) and value in rule if isinstance(rule, set) else isinstance(value, rule))
    return value


def remade_body(path: str, body: bytes, limits: Limits) -> bytes:
    """Return the body that the model server gets, made anew from the keys allowed here; raise Refused."""
    try:
        # an integer of a megabyte takes seconds to read; NaN and the infinities are no JSON
        asked = json.loads(body.decode(), parse_int=lambda d: int(need(len(d) < 20 and d)),
                           parse_constant=lambda _: need(False))
        made = {"model": limits.model, **remade(BODIES[path], asked, limits)}
        need(len(str(made.get("format", made.get("response_format")))) <= SCHEMA_LIMIT)
        if path == "/api/generate":
            made["options"] = {"num_predict": limits.max_tokens, "num_ctx": limits.context, **made.get("options", {})}
            made["keep_alive"] = limits.keep_alive if limits.keep_alive[-1] in "smh" else int(limits.keep_alive)
        else:
            made.setdefault("max_tokens", limits.max_tokens)
        return json.dumps(made, ensure_ascii=False).encode()
    except (ValueError, RecursionError):  # bad UTF-8 and lone surrogates are ValueErrors too
        raise Refused(400, "bad_request", "the body is no JSON, or a type or range does not fit") from None


class Connection:
    """One connection from the VPS: one request after the other, never two at once."""

    def __init__(self, guard: Guard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.guard, self.reader, self.writer = guard, reader, writer
        self.model: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self.deadline = time.monotonic() + SLOW_REQUEST  # when the guard drops it
        self.answered, self.busy = 0.0, False  # when; whether the model server works for it

    async def serve(self) -> None:
        """Answer requests until the client leaves or one is refused."""
        self.guard.connections.add(self)
        try:
            need(len(self.guard.connections) <= CONNECTIONS)
            while await self._one_request():
                pass
        except Refused as e:
            self.guard.refused += 1
            self.deadline = time.monotonic() + SLOW_REQUEST
            self.writer.write(e.answer(keep=False))
            with contextlib.suppress(OSError):  # the client left
                self.writer.write_eof()
                while await self.reader.read(65536):  # closing on unread bytes would reset it under our answer
                    pass
        except (OSError, EOFError, ValueError):
            self.drop()  # the client left, or the model server did within its answer: the client sees the end
        finally:
            self.guard.connections.discard(self)
            self.drop_model()
            self.writer.close()

    async def _one_request(self) -> bool:
        """Read a request, pass it on, pass its answer back; return whether the connection stays."""
        self.deadline = time.monotonic() + IDLE_CONNECTION
        start = await self.reader.readexactly(1)
        self.deadline = time.monotonic() + SLOW_REQUEST
        try:
            head = start + (await self.reader.readuntil(b"\r\n\r\n"))[:-4]
            method, path, length = read_head(head)
        except asyncio.LimitOverrunError:
            raise Refused(431, "too_long", f"the request's head is over {HEAD_LIMIT} bytes") from None
        stays = not re.search(rb"(?i)\nconnection:[ \t]*close", head)
        body = await self.reader.readexactly(length)
        watch = asyncio.ensure_future(self.reader.read(1))  # a byte is a second request; the end is a client that left
        await asyncio.sleep(0)  # let it see what is here already
        try:
            if watch.done():
                raise Refused(400, "bad_request", "there is more than one request") if watch.result() else EOFError
            if self.guard.paused():
                raise Refused(503, "paused", "the owner of this GPU uses it now")
            body = remade_body(path, body, self.guard.limits()) if body or method == "POST" else b""
            self.guard.requests += method == "POST"
            self.busy = True
            watch.add_done_callback(lambda w: w.cancelled() or self.drop(w.exception()))
            kind = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body else ""
            made = f"{method} {path} HTTP/1.1\r\nHost: localhost:{self.guard.target[1]}\r\nAccept: */*\r\n{kind}\r\n"
            return await self._exchange(made.encode() + body, watch) and stays
        except Refused as e:
            if e.args[0] < 500:
                raise
            self.writer.write(e.answer(keep=stays))
            return stays
        finally:
            self.busy, self.answered = False, time.monotonic()
            watch.cancel()
            await asyncio.wait([watch])  # two may not read at once

    async def _exchange(self, request: bytes, watch: asyncio.Future[bytes]) -> bool:
        """Send the request, and each part of the answer as it comes; return whether the connection stays."""
        self.deadline = time.monotonic() + SILENT_ANSWER
        try:
            if not self.model or self._is_stale(*self.model):
                self.drop_model()
                self.model = await asyncio.wait_for(asyncio.open_connection(*self.guard.target), SLOW_CONNECT)
                need(not watch.done())
            model, to_model = self.model
            to_model.write(request)  # in two writes the second could wait for an ACK
            answer = b"HTTP/1.1 1"
            while answer.startswith(b"HTTP/1.1 1"):  # a head in between, as 103: the answer is yet to come
                answer = await model.readuntil(b"\r\n\r\n")
            status = need(re.match(rb"HTTP/1\.[01] ([2-5]\d\d)", answer))[1]
        # the time-out is a class of its own before Python 3.11
        except (OSError, EOFError, ValueError, asyncio.TimeoutError, asyncio.LimitOverrunError):  # noqa: UP041
            self.drop_model()
            raise Refused(502, "no_model_server", "no model server answers on the workstation") from None
        length = re.search(rb"(?i)\ncontent-length:[ \t]*(\d{1,15})\s*\r\n", answer)
        chunked = re.search(rb"(?i)\ntransfer-encoding:[ \t]*chunked\s*\r\n", answer)
        closes = re.search(rb"(?i)\nconnection:[^\n]*close", answer) or answer.startswith(b"HTTP/1.0")
        left = 1 if chunked else int(length[1]) if length else 0 if status in (b"204", b"304") else float("inf")
        await self._pass(answer, None if left else watch)
        while left:
            if chunked:  # the last has size 0, and its trailers end with an empty line (RFC 9112, 7.1)
                part = await model.readline()
                left = int(need(re.match(rb"[0-9A-Fa-f]{1,8}(?=[ \t;\r\n])", part))[0], 16)
                need(left <= CHUNK_LIMIT)
                part += await model.readexactly(left + 2) if left else b""
                while not left and not part.endswith(b"\n\r\n"):
                    part += need(len(part) < HEAD_LIMIT and await model.readline())
            else:
                part = await model.read(int(min(left, 65536)))
                left -= len(part)
                if not part:
                    return False  # the end that the answer was framed by, or one too early: the client must see it
            await self._pass(part, None if left else watch)
        return not closes

    def _is_stale(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Return whether a kept connection has ended, or says what nobody asked, as 408; no public name tells that."""
        return bool(writer.is_closing() or reader.at_eof() or reader._buffer  # type: ignore[attr-defined]
                    or time.monotonic() - self.answered > KEPT_CONNECTION)

    async def _pass(self, part: bytes, watch: asyncio.Future[bytes] | None = None) -> None:
        """Send a part of the answer; with watch it is the last, after which a next request may come."""
        if watch:
            watch.cancel()
        self.deadline = time.monotonic() + SILENT_ANSWER
        self.guard.bytes += len(part)
        self.writer.write(part)
        await self.writer.drain()

    def drop_model(self) -> None:
        """Close the connection to the model server at once: it stops generating, and the GPU is free."""
        if self.model:
            self.model[1].transport.abort()
            self.model = None

    def drop(self, _: BaseException | None = None) -> None:
        """Close both sides at once."""
        self.drop_model()
        self.writer.transport.abort()


class Guard:
    """The listener that ssh forwards to: what it counts, and what the owner allows."""

    def __init__(self, target: str, limits: Callable[[], Limits], paused: Callable[[], bool]) -> None:
        host, _, port = target.rpartition(":")
        self.target, self.limits, self.paused = (host, int(port)), limits, paused
        self.connections: set[Connection] = set()
        self.requests = self.refused = self.bytes = 0  # generations asked for; requests not passed; bytes of answers

    async def start(self) -> None:
        """Listen on a free loopback port, the same for every link to come."""
        self.server = await asyncio.start_server(
            lambda reader, writer: Connection(self, reader, writer).serve(), "127.0.0.1", limit=HEAD_LIMIT)
        self.port = self.server.sockets[0].getsockname()[1]

    def drop(self, which: Callable[[Connection], bool]) -> None:
        """Drop the connections of which it is true."""
        for c in [c for c in self.connections if which(c)]:
            c.drop()


# --- probe -------------------------------------------------------------------

class Line(http.client.HTTPConnection):
    """A connection to ADDRESS:PORT, a website or a Unix socket's path; every wait is bounded by timeout, in seconds."""

    def __init__(self, at: str, timeout: float = 2.0) -> None:
        self.url = urlsplit(at if "://" in at else f"//{at}")
        super().__init__(self.url.hostname if self.url.scheme else "localhost", timeout=timeout)
        self.at, self.took = at, 0.0  # took: seconds from the last question to its answer's head

    def connect(self) -> None:
        if self.at.startswith("/"):
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(self.timeout)
            self.sock.connect(self.at)
            return
        port = self.url.port or (443 if self.url.scheme == "https" else 80)
        self.sock = socket.create_connection((self.url.hostname, port), self.timeout)
        if self.url.scheme == "https":
            self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.url.hostname)

    def ask(self, path: str, body: Any = None, span: str = "") -> tuple[int, str, bytes]:
        """Return an answer's status, ETag and body (to 8 MiB); raise ConnectionError if none came. span: of a Range."""
        headers = {"Content-Type": "application/json", **({"Range": "bytes=" + span} if span else {})}
        content = None if body is None else json.dumps(body).encode()
        began = time.monotonic()
        try:
            self.request("GET" if body is None else "POST", path, content, headers)
            answer = self.getresponse()
            self.took = time.monotonic() - began  # before the body, which an sshd before 10.1 may hold back 40 ms
            return answer.status, answer.headers.get("ETag", ""), answer.read(8 << 20)
        except (OSError, http.client.HTTPException) as e:
            self.close()
            raise ConnectionError(f"{str(e) or type(e).__name__} from {self.at}") from e


def ask_once(at: str, path: str, body: Any = None, timeout: float = 2.0) -> tuple[int, Any]:
    """Return status and JSON value (None where it is none) of one answer; raise OSError where none came."""
    with contextlib.closing(Line(at, timeout)) as line:
        code, _, text = line.ask(path, body)
    return code, parsed(text)


def probe(line: Line) -> tuple[bool, Any, float | None]:
    """Return whether the link lives, the proxy's health if it answered, and the round trip in seconds if measured.

    Anything but silence proves life: a refusal, too, came from the VPS. A kept connection that the proxy has closed
    proves nothing; a new one is asked then, which takes two round trips and is not measured.
    """
    for kept in (True, False) if line.sock else (False,):
        began = time.monotonic()
        try:
            text = line.ask("/health")[2]
        except OSError:
            if time.monotonic() - began >= line.timeout * 0.95:
                return False, None, None
            continue
        return True, parsed(text), line.took if kept else None
    return True, None, None


def backend_is_down(health: Any, remote: str) -> bool:
    """Return whether the proxy's health says that this workstation is down for a reason that a redial may mend."""
    name = remote if ":" in remote else Path(remote).stem
    try:
        mine = [b for b in health["backends"] if b["name"] == name]
        return not mine or not mine[0]["up"] and mine[0]["reason"] not in ("paused", "model_missing", "warming")
    except (KeyError, TypeError):
        return False  # not our proxy: nothing is known


def probe_verdict(silent: int, down_for: float, patience: float) -> str:
    """Return why to redial, or nothing.

    Two silent probes: the link is dead. The proxy has not seen us for `patience` seconds while the model server here
    answered: the forward is dead. The caller doubles patience after each redial for that.
    """
    if silent >= 2:
        return "two probes in a row had no answer"
    if down_for >= patience:
        return f"the proxy has not seen this workstation for {down_for:.0f} s"
    return ""


# --- model -------------------------------------------------------------------

def models(target: str) -> tuple[str, list[str], list[str]]:
    """Return the model server's kind, the models installed and those loaded; raise OSError where none answers."""
    for kind, path, key, name in (("ollama", "/api/tags", "models", "name"), ("openai", "/v1/models", "data", "id")):
        _, listed = ask_once(target, path)
        with contextlib.suppress(KeyError, TypeError):
            installed = [str(m[name]) for m in listed[key]]
            if kind == "openai":
                return kind, installed, installed
            return kind, installed, [str(m["name"]) for m in ask_once(target, "/api/ps")[1]["models"]]
    return "other", [], []


def chosen_model(wanted: str, installed: list[str], loaded: list[str]) -> tuple[str, str]:
    """Return the model to serve, and what its owner should know of that: empty, or one sentence."""
    here = {*installed, *(name.split(":latest")[0] for name in installed)}
    if wanted:
        absent = f"{wanted} is not installed here (`ollama pull {wanted}` gets it); there are: {', '.join(installed)}"
        return wanted, absent if here and wanted not in here else ""
    if PLACEHOLDER_MODEL in here:
        return PLACEHOLDER_MODEL, ""
    for only in (loaded, installed):
        if len(only) == 1:
            return only[0], ""
    several = f"several models are here and none is chosen; say --model with one of: {', '.join(installed)}"
    return PLACEHOLDER_MODEL, several if installed else "no model is installed here; get one, as by `ollama pull NAME`"


# --- supervising -------------------------------------------------------------

TICK = 1.0  # seconds between looks at clock, address, pause and state
SLEPT = 5.0  # seconds; a tick that late means that the machine was asleep
PROBE_EVERY = 3.0  # seconds; with two silent ones of 2 s each a dead link is noticed within 7
FRONT_PATIENCE = (10.0, 600.0)  # seconds that the proxy may not see us before a redial: at first, and at most
MODELS_EVERY = 10.0  # seconds between looks at which models there are
MIRROR_EVERY = 30.0  # seconds
WORDS_KEPT = 80  # lines of ssh's stderr; a failed dial at -v writes about 60
LONGEST_WORD = 1 << 20  # bytes of such a line; a banner has at most 64 KiB, each of four characters
LEASH = ('exec 3<&0; "$@" </dev/null 3<&- & ssh=$!; (cat <&3; kill $ssh) >/dev/null 2>&1 & leash=$!; '
         "wait $ssh; code=$?; kill $leash 2>/dev/null; exit $code")  # ends ssh when our end of its stdin closes


def boot_clock() -> float:
    """Return monotonic seconds that go on counting while the machine sleeps."""
    if WINDOWS:
        return time.monotonic()  # which counts sleep there alone
    return time.clock_gettime(time.CLOCK_BOOTTIME if sys.platform == "linux" else time.CLOCK_MONOTONIC)


def notify(text: str) -> None:
    """Tell systemd (sd_notify(3)); nothing where no one listens."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
            s.sendto(text.encode(), "\0" + path[1:] if path.startswith("@") else path)


def local_address(peer: str) -> str:
    """Return the address from which packets to peer would leave; empty where there is no route. Sends nothing."""
    family = socket.AF_INET6 if ":" in peer else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as s:
        s.connect((peer, 9))
        return str(s.getsockname()[0])
    return ""


def leashed(command: list[str], platform: str) -> tuple[list[str], dict[str, Any]]:
    """Return command and Popen arguments such that the child ends when we do, however we end."""
    if platform == "win32":
        return command, {"stdin": subprocess.DEVNULL, "creationflags": 0x08000000}  # CREATE_NO_WINDOW: a hidden console
    if platform != "linux":
        return ["/bin/sh", "-c", LEASH, "sh", *command], {"stdin": subprocess.PIPE}
    import ctypes
    libc, us = ctypes.CDLL(None), os.getpid()

    def end_with_us() -> None:
        libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != us:  # we died before the call
            os._exit(1)
    return command, {"stdin": subprocess.DEVNULL, "preexec_fn": end_with_us}


def enter_job() -> None:
    """Put this process and its children into a Windows job that is killed when its last handle closes: at our end."""
    import ctypes
    kernel = ctypes.windll.kernel32  # type: ignore[attr-defined]
    kernel.CreateJobObjectW.restype = kernel.GetCurrentProcess.restype = ctypes.c_void_p
    job, limits = ctypes.c_void_p(kernel.CreateJobObjectW(None, None)), (ctypes.c_uint32 * 36)()
    limits[4] = 0x2000  # JOBOBJECT_EXTENDED_LIMIT_INFORMATION.LimitFlags: JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE
    kernel.SetInformationJobObject(job, 9, ctypes.byref(limits), ctypes.sizeof(limits))
    kernel.AssignProcessToJobObject(job, ctypes.c_void_p(kernel.GetCurrentProcess()))


class Tunnel:
    """One workstation's tunnel from start to stop; run() owns its tasks and the ssh process."""

    def __init__(self, settings: Settings, home: Path) -> None:
        self.settings, self.home, s = settings, home, settings
        self.guard = Guard(s.target, lambda: Limits(self.state["model"], s.context, s.max_tokens, s.keep_alive),
                           lambda: bool(self.state["paused_until"]))
        self.stopping, self.hurry = asyncio.Event(), asyncio.Event()
        self.reason = ""  # why we end the link, or the wait for the next
        self.peer = self.dialled_from = ""  # addresses of the VPS, and of this machine towards it
        self.up_at: float | None = None  # by boot_clock; None: down
        self.round_trip: float | None = None  # seconds
        self.state: dict[str, Any] = {  # what status shows; round trip and the guard's counters are added when written
            "version": VERSION, "pid": os.getpid(), "name": s.name, "destination": s.destination, "remote": s.remote,
            "started_at": time.time(), "up_since": None, "front": None, "dials": 0, "redials": 0, "last_error": None,
            "model": s.model or PLACEHOLDER_MODEL, "model_server": None, "model_note": "",
            "paused_until": paused_until(home), "mirror": None}

    async def run(self) -> int:
        """Hold the tunnel until it is told to stop; return the exit status."""
        await self.guard.start()
        await self._look_at_models()
        loops = (self.stopping.wait(), self._supervise(), self._probe(), self._ticks(),
                 self._every(MODELS_EVERY, self._look_at_models), self._every(MIRROR_EVERY, self._copy_log))
        tasks = [asyncio.ensure_future(loop) for loop in loops]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        notify("STOPPING=1")
        for task in tasks:
            task.cancel()
        self.guard.server.close()
        self.guard.drop(lambda c: True)
        await asyncio.gather(*tasks, return_exceptions=True)
        self._save()
        for task in done:
            task.result()  # a loop that ended by itself ended by a fault of ours: show it
        return 0

    def redial(self, why: str) -> None:
        """End the link, or the wait for the next try, now."""
        self.reason = why
        self.hurry.set()

    async def _every(self, seconds: float, step: Callable[[], Any]) -> None:
        while True:
            await asyncio.sleep(seconds)
            await step()

    async def _supervise(self) -> None:
        failures = 0
        while True:
            self.hurry.clear()
            self.reason, self.up_at, self.state["dials"] = "", None, self.state["dials"] + 1
            failure = await self._dial(front_address(self.home))
            held = boot_clock() - self.up_at if self.up_at else 0.0
            self._tell(failure, was_up=held > 0)
            if self.reason:  # a link or a dial that we ended is no failure to connect: dial again at once
                failures = 0
                continue
            failures = 1 if held > STEADY_AFTER else failures + 1
            self.hurry.clear()
            hurry = asyncio.ensure_future(self.hurry.wait())
            await asyncio.wait([hurry], timeout=next_delay(failure.pace, failures))
            hurry.cancel()

    async def _dial(self, front: str) -> Failure:
        """Hold one ssh from start to end; return why it ended."""
        s, words = self.settings, deque([""], maxlen=WORDS_KEPT)
        places = {**vars(s), "port": s.ssh_port, "known_hosts": self.home / "known_hosts"}
        command, how = leashed(ssh_command(s, self.home, self.guard.port, front), sys.platform)
        try:
            how = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "limit": LONGEST_WORD, **how}
            ssh = await asyncio.create_subprocess_exec(*command, **how)
        except OSError as e:
            return judge(0, f"cannot start ssh: {e.strerror}", places)
        listening, hurry = (asyncio.ensure_future(t) for t in (self._listen(ssh, words, front), self.hurry.wait()))
        try:
            await asyncio.wait([listening, hurry], return_when=asyncio.FIRST_COMPLETED)
        finally:
            hurry.cancel()
            self.state.update(up_since=None, front=None)
            with contextlib.suppress(ProcessLookupError):
                if not listening.done():  # else ssh has ended, and asyncio is collecting its status
                    ssh.stdin.close() if ssh.stdin else ssh.kill()  # it has nothing to tidy, and may be stopped
                if not (await asyncio.wait([listening], timeout=2.0))[0]:  # seconds; ssh ends within milliseconds
                    ssh.kill()
            await listening
            await ssh.wait()
        if self.reason:
            return Failure("ended", self.reason, "the tunnel is dialled again; nothing to do")
        return judge(ssh.returncode or 0, "\n".join(words), places)

    async def _listen(self, ssh: asyncio.subprocess.Process, words: deque[str], front: str) -> None:
        """Read what ssh says until it ends; notice what the rest of us needs to know."""
        async for raw in ssh.stderr:
            line = raw.decode("utf-8", "replace").rstrip()
            words.append(line)
            connecting = re.match(r"debug1: Connecting to \S+ \[(.+)\] port", line)
            if connecting:
                self.peer, self.dialled_from = connecting[1], local_address(connecting[1])
            elif line.startswith("debug1: remote forward success"):
                self.up_at = boot_clock()
                self.state.update(up_since=time.time(), front=front, redials=self.state["dials"] - 1)
                text = f"up: {self.state['model']} serves at {self.settings.remote} of {self.settings.destination}"
                log.info(text)
                notify(f"READY=1\nSTATUS={text}")
            elif "open failed: administratively prohibited" in line and self.state["front"]:
                self.state["front"] = None
                log.warning("the VPS refuses the way to its %s: no probe and no mirror here", self.settings.front)

    def _tell(self, failure: Failure, was_up: bool) -> None:
        """Say a change once: a link that ended, or another kind of failure."""
        last = self.state["last_error"]
        if was_up or not last or last["kind"] != failure.kind:
            log.warning("%s: %s; %s", failure.kind, failure.seen, failure.cure)
        self.state["last_error"] = {"at": time.time(), **failure._asdict()}
        notify(f"STATUS=down: {failure.seen}; {failure.cure}")

    async def _ticks(self) -> None:
        """Notice a sleep, a new address, a pause; drop what is overdue; write the state."""
        last = boot_clock()
        while True:
            await asyncio.sleep(TICK)
            late, last = boot_clock() - last - TICK, boot_clock()
            if late > SLEPT:
                self.redial(f"this machine slept for {late:.0f} s")
            address = local_address(self.peer) if self.peer else ""
            if address and address != self.dialled_from:
                self.redial(f"this machine's address changed from {self.dialled_from or 'none'} to {address}")
                self.dialled_from = address
            until = paused_until(self.home)
            if until != self.state["paused_until"]:
                self.state["paused_until"] = until
                log.info("paused" if until else "resumed")
                self.guard.drop(lambda c: bool(self.state["paused_until"]) and c.busy)
            self.guard.drop(lambda c: time.monotonic() > c.deadline)
            self._save()
            notify("WATCHDOG=1")

    def _save(self) -> None:
        """Write the state when it changed."""
        counts = {"requests": self.guard.requests, "refused": self.guard.refused, "bytes": self.guard.bytes}
        text = json.dumps({**self.state, "round_trip": self.round_trip, **counts}, indent=1)
        with contextlib.suppress(OSError):  # on Windows a reader may have it open
            try:
                write_atomically(self.home / "state.json", text)
            except OSError:  # the disk is full: what is there would pass for today's
                (self.home / "state.json").unlink()

    async def _look_at_models(self) -> None:
        """Choose the model anew if the one chosen is gone, or none was."""
        state, now = self.state, (self.state["model"], self.state["model_note"])
        try:
            kind, installed, loaded = await asyncio.to_thread(models, self.settings.target)
        except OSError:
            state["model_server"] = None
            return
        if state["model_server"] is None or now[1] or now[0] not in installed:
            state["model"], state["model_note"] = new = chosen_model(self.settings.model, installed, loaded)
            if new != now:
                log.info("model: %s %s", *new)
        state["model_server"] = kind

    async def _probe(self) -> None:
        link, silent, seen_at, patience, line = None, 0, boot_clock(), FRONT_PATIENCE[0], Line("")
        while True:
            await asyncio.sleep(PROBE_EVERY if silent != 1 else 0)
            front, state = self.state["front"], self.state
            if not front or link != self.up_at:  # another link: whatever the last one did is forgotten
                line.close()
                link, silent, seen_at, line, self.round_trip = self.up_at, 0, boot_clock(), Line(front or ""), None
            if not front:
                continue
            lives, health, seconds = await asyncio.to_thread(probe, line)
            silent, self.round_trip = 0 if lives else silent + 1, seconds or self.round_trip
            if boot_clock() - seen_at >= patience:
                await self._look_at_models()  # it may have gone since the last look
            if state["paused_until"] or not state["model_server"] or not backend_is_down(health, self.settings.remote):
                seen_at, patience = boot_clock(), FRONT_PATIENCE[0] if health else patience
            why = probe_verdict(silent, boot_clock() - seen_at, patience)
            if why and link == self.up_at:
                patience = patience if silent else min(patience * 2, FRONT_PATIENCE[1])
                seen_at = boot_clock()
                self.redial(why)

    async def _copy_log(self) -> None:
        copy, front = self.settings.mirror, self.state["front"]
        last = self.state["mirror"] or {"file": copy, "position": 0, "problem": ""}
        if not front or copy == "none":
            return
        try:
            now = {**last, "position": await asyncio.to_thread(mirror, front, self.home, Path(copy)), "problem": ""}
        except ConnectionError:  # the link went, or the proxy is down: it is tried again
            return
        except OSError as e:
            now = {**last, "problem": f"{e}; see that its folder is there, may be written and has room"}
        if now["problem"] != last["problem"]:
            log.warning("mirror: %s", now["problem"] or f"{copy} is written again")
        self.state["mirror"] = now


def run(home: Path, flags: dict[str, Any]) -> int:
    """Hold the tunnel until SIGTERM, SIGINT or a fault."""
    settings = completed(parse_settings(home, flags), home)
    to = logging.StreamHandler()
    if settings.log_file:
        to = logging.handlers.RotatingFileHandler(settings.log_file, maxBytes=1 << 20, backupCount=1)
    stamp = "" if os.environ.get("JOURNAL_STREAM") else "%(asctime)s "  # systemd's journal has its own
    logging.basicConfig(level=logging.INFO, format=stamp + "%(message)s", handlers=[to])
    deadline = time.monotonic() + 1.0  # seconds; `status` and `pause` take it for an instant
    while not (held := lock(home)) and time.monotonic() < deadline:
        time.sleep(0.02)
    if not held:
        raise Fatal(f"a tunnel runs from {home} already; stop it, or set SCATTER_HOME to another folder")
    if WINDOWS:
        enter_job()

    async def hold() -> int:
        tunnel, loop = Tunnel(settings, home), asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(tunnel.stopping.set))
        return await tunnel.run()
    with held:
        return asyncio.run(hold())


# --- mirror ------------------------------------------------------------------
# The place reached is kept beside the copy, in COPY.place: the copy's length, and the bytes read of each file of a VPS,
# by ETag (the hash of its first line), so that a VPS that comes back is known again. The copy is written first and the
# place after it, so a kill between them leaves bytes beyond the place; they are cut off and read again. Nothing comes
# twice, and only whole lines come.

LOGS = ("/log.5", "/log.4", "/log.3", "/log.2", "/log.1", "/log")  # the proxy's, oldest first
FILES_KNOWN = 100  # of the VPS's files; at 64 MiB each, years of them
STEPS = 1000  # of 8 MiB at most; what is left comes the next time


def fetch(line: Line, path: str, start: int) -> tuple[str, bytes]:
    """Return a log file's ETag (empty where there is none) and its whole lines from byte start on, to 8 MiB.

    The ETag is asked for again, as a proxy of before may stand there: its 416 has none, and it opens a file twice.
    """
    code, etag, text = line.ask(path, span=f"{start}-")
    if len(text) >= 8 << 20:
        line.close()  # the rest of the answer is still on it
    again = line.ask(path, span="0-0")[1] if code in (200, 206, 416) else ""
    if etag not in ("", again):
        return "", b""
    text = text[start:] if code == 200 else text if code == 206 else b""
    return again, text[:text.rfind(b"\n") + 1]


def mirror_step(line: Line, offsets: dict[str, int]) -> tuple[str, bytes]:
    """Return the ETag of the oldest file that has more than its offset, and that; no bytes when there is nothing new.

    What is older than a file that is known has been copied. A file that is not the newest grows no more; so it is done
    when it gave nothing more, if it was not the newest before it was asked.
    """
    etags: dict[str, str] = {}
    for path in reversed(LOGS):  # the newest first: it nearly always is the one
        etags[path] = line.ask(path, span="0-0")[1]
        if etags[path] in offsets:
            break
    for path in reversed([path for path in etags if etags[path]]):
        etag, new = fetch(line, path, offsets.get(etags[path], 0))
        if new or etag != etags[path]:  # the latter was rotated meanwhile
            return etag, new if etag == etags[path] else b""
    return "", b""


def mirror(front: str, home: Path, copy: Path) -> int:
    """Append to the copy what the VPS's log has more; return the copy's length in bytes. Raise OSError."""
    beside, older = copy.with_name(copy.name + ".place"), home / "mirror.json"  # where the place once was
    with contextlib.closing(Line(front, 10.0)) as line, open(copy, "a+b") as f:
        if not take(f):
            raise OSError(f"another tunnel writes {copy}")
        if not beside.exists():  # first, or a kill would leave bytes uncounted
            old = read_json(older)
            old = old if old.get("file") == str(copy) and old.get("etag") else {"length": f.tell()}
            offsets = {old["etag"]: old["offset"]} if "etag" in old else {}
            write_atomically(beside, json.dumps({"length": old["length"], "offsets": offsets}))
            older.unlink(missing_ok=True)
        try:
            place = read_json(beside)
            offsets, end = dict(place["offsets"]), min(f.tell(), place["length"])
        except (KeyError, TypeError, ValueError):
            raise OSError(f"{beside} does not hold a place; if you remove it, lines may come twice") from None
        if end < place["length"]:  # somebody cut the copy, perhaps within a line
            f.seek(max(0, end - 65536))  # bytes; a line of the proxy's has 400
            tail = f.read(end - f.tell())
            end -= len(tail) - tail.rfind(b"\n") - 1
        f.truncate(end)
        for _ in range(STEPS):
            etag, new = mirror_step(line, offsets)
            if not new:
                break
            f.write(new)
            f.flush()
            os.fsync(f.fileno())
            offsets[etag] = offsets.pop(etag, 0) + len(new)  # the last is the latest
            offsets = dict([*offsets.items()][-FILES_KNOWN:])
            write_atomically(beside, json.dumps({"length": f.seek(0, os.SEEK_END), "offsets": offsets}))
        return f.seek(0, os.SEEK_END)


# --- pause -------------------------------------------------------------------

FOR_EVER = 253402300799.0  # epoch s; the end of the year 9999, because JSON has no infinity
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}  # seconds


def paused_until(home: Path) -> float | None:
    """Return when the pause ends (epoch s; FOR_EVER: at resume), or None where there is no pause."""
    until = read_json(home / "pause.json").get("until", 0.0)
    return until if time.time() < until else None


def pause(home: Path, flags: dict[str, Any]) -> int:
    """Tell callers `paused`, end running generations, unload the model."""
    settings, duration = parse_settings(home, flags), flags["duration"]
    if not re.fullmatch(r"([1-9]\d{0,5}[smhd])?", duration):
        raise Fatal(f"pause: {duration!r} is no time; write 90s, 30m, 2h, 1d, or nothing: until a resume", 2)
    until = time.time() + int(duration[:-1]) * UNITS[duration[-1]] if duration else FOR_EVER
    write_atomically(home / "pause.json", json.dumps({"until": until}))
    print("paused until " + clock_time(until))
    deadline = time.monotonic() + 10.0  # seconds; the tunnel looks every TICK, Ollama frees memory late
    while is_running(home) and not read_json(home / "state.json").get("paused_until") and time.monotonic() < deadline:
        time.sleep(0.05)
    try:
        kind, _, loaded = models(settings.target)
        for name in loaded if kind == "ollama" else ():
            ask_once(settings.target, "/api/generate", {"model": name, "keep_alive": 0}, 10.0)
        while loaded and kind == "ollama" and time.monotonic() < deadline:
            time.sleep(0.1)
            loaded = models(settings.target)[2]
        kept = f"{', '.join(loaded)} stays in memory" if loaded else "it does not say what it has in memory"
        kept = "" if kind == "ollama" and not loaded else kept
    except OSError as e:  # refused: nobody is there to hold memory
        kept = "" if isinstance(e.__cause__, ConnectionRefusedError) else str(e)
    print(f"model server: {kept}; stop it to free the GPU" if kept else "the GPU's memory is free")
    return 0


def resume(home: Path, _: dict[str, Any]) -> int:
    """End the pause; the VPS has the model loaded again as soon as it sees that."""
    (home / "pause.json").unlink(missing_ok=True)
    print("resumed")
    return 0


# --- services ----------------------------------------------------------------

ACCOUNT = "scatter-workstation"  # whom the system unit runs as
UNIT = """\
[Unit]
Description=scatter: the tunnel from this GPU to its website
Wants=network-online.target
After=network-online.target
# five quick failures would end it for good
StartLimitIntervalSec=0

[Service]
Type=notify
ExecStart={command}
Environment={environment}
# READY comes with the first link, and the VPS may be away for days
TimeoutStartSec=infinity
TimeoutStopSec=10
Restart=always
RestartSec=2
RestartPreventExitStatus=2
WatchdogSec=30
{sandbox}

[Install]
WantedBy={target}
"""
SANDBOX = """NoNewPrivileges=yes LockPersonality=yes RestrictRealtime=yes RestrictSUIDSGID=yes LimitCORE=0 TasksMax=64
MemoryDenyWriteExecute=yes SystemCallArchitectures=native"""
SYSTEM_SANDBOX = f"""{SANDBOX} User={ACCOUNT} StateDirectory=scatter StateDirectoryMode=0700 UMask=0077
CapabilityBoundingSet= AmbientCapabilities= ProtectSystem=strict ProtectHome=yes PrivateTmp=yes PrivateDevices=yes
DevicePolicy=closed ProtectProc=invisible ProcSubset=pid ProtectKernelTunables=yes ProtectKernelModules=yes
ProtectKernelLogs=yes ProtectControlGroups=yes ProtectClock=yes ProtectHostname=yes PrivateUsers=yes RemoveIPC=yes
RestrictNamespaces=yes KeyringMode=private SystemCallErrorNumber=EPERM SystemCallFilter=@system-service
SystemCallFilter=~@privileged SystemCallFilter=~@resources RestrictAddressFamilies=AF_INET
RestrictAddressFamilies=AF_INET6 RestrictAddressFamilies=AF_UNIX RestrictAddressFamilies=AF_NETLINK"""
TASK = """\
<?xml version="1.0" encoding="UTF-16"?>
<Task version="1.2" xmlns="http://schemas.microsoft.com/windows/2004/02/mit/task">
  <RegistrationInfo><Description>scatter: the tunnel from this GPU to its website</Description></RegistrationInfo>
  <Triggers><{trigger}><Enabled>true</Enabled></{trigger}></Triggers>
  <Principals><Principal id="Author"><UserId>{user}</UserId><LogonType>{logon}</LogonType></Principal></Principals>
  <Settings>
    <MultipleInstancesPolicy>IgnoreNew</MultipleInstancesPolicy>
    <DisallowStartIfOnBatteries>false</DisallowStartIfOnBatteries><StopIfGoingOnBatteries>false</StopIfGoingOnBatteries>
    <StartWhenAvailable>true</StartWhenAvailable>
    <IdleSettings><StopOnIdleEnd>false</StopOnIdleEnd><RestartOnIdle>false</RestartOnIdle></IdleSettings>
    <Hidden>true</Hidden><ExecutionTimeLimit>PT0S</ExecutionTimeLimit><Priority>5</Priority>
    <RestartOnFailure><Interval>PT1M</Interval><Count>999</Count></RestartOnFailure>
  </Settings>
  <Actions Context="Author"><Exec><Command>{python}</Command><Arguments>{arguments}</Arguments></Exec></Actions>
</Task>
"""


class Service(NamedTuple):
    """What makes the tunnel start with this machine: one file, and the commands around it."""

    path: Path
    text: str
    enable: Sequence[Sequence[str]]
    disable: Sequence[Sequence[str]]
    lasting: Sequence[Sequence[str]] = ((), (), ())  # succeeds if what the service needs is here; makes it; removes it


def service(system: str, admin: bool, python: str, script: Path, home: Path, user: str, user_home: Path) -> Service:
    """Return the service for linux, darwin or win32; pure, so that each can be tested on any.

    It runs from the machine's start; that of a user who is no administrator, on macOS and Windows, from his login.
    """
    argv = [python, str(script), "run", "--log-file", str(home / "tunnel.log")]
    if system == "win32":
        name, path = ("/TN", "scatter"), home / "task.xml"
        trigger, logon = ("BootTrigger", "S4U") if admin else ("LogonTrigger", "InteractiveToken")
        python = python.replace("python.exe", "pythonw.exe")  # which opens no window
        task = TASK.format(trigger=trigger, logon=logon, user=escape(user), python=escape(python),
                           arguments=escape(subprocess.list2cmdline(argv[1:])))
        enable = (("schtasks", "/Create", "/F", *name, "/XML", str(path)), ("schtasks", "/Run", *name))
        return Service(path, task, enable, (("schtasks", "/End", *name), ("schtasks", "/Delete", "/F", *name)))
    if system == "darwin":
        folder = Path("/Library/LaunchDaemons") if admin else user_home / "Library/LaunchAgents"
        path, domain = folder / "scatter.tunnel.plist", "system" if admin else f"gui/{os.getuid()}"
        keys = {"Label": "scatter.tunnel", "RunAtLoad": True, "KeepAlive": True, "ThrottleInterval": 5,
                "ProgramArguments": argv, "EnvironmentVariables": {"SCATTER_HOME": str(home)}}
        return Service(path, plistlib.dumps(keys).decode(), (("launchctl", "bootstrap", domain, str(path)),),
                       (("launchctl", "bootout", f"{domain}/scatter.tunnel"),))
    command = " ".join(quoted(w).replace("$", "$$") for w in argv[:3])  # which are variables in ExecStart alone
    unit = UNIT.format(command=command, environment=quoted(f"SCATTER_HOME={home}"),
                       sandbox="\n".join((SYSTEM_SANDBOX if admin else SANDBOX).split()),
                       target="multi-user.target" if admin else "default.target")
    path = (Path("/etc/systemd/system") if admin else user_home / ".config/systemd/user") / "scatter-tunnel.service"
    account = ("useradd", "--system", "--user-group", "--home-dir", str(home), "--shell", "/usr/sbin/nologin", ACCOUNT)
    lasting = (("getent", "passwd", ACCOUNT), account, ("userdel", ACCOUNT)) if admin else (
        ("test", "-e", f"/var/lib/systemd/linger/{user}"), ("loginctl", "enable-linger", user),
        ("loginctl", "disable-linger", user))  # without it the user's services end with his last session
    systemctl = ("systemctl",) if admin else ("systemctl", "--user")
    enable = ((*systemctl, "daemon-reload"), (*systemctl, "enable", path.name),
              (*systemctl, "restart", "--no-block", path.name))
    return Service(path, unit, enable, ((*systemctl, "disable", "--now", path.name),), lasting)


def this_service(home: Path) -> tuple[Service, list[Path]]:
    """Return this machine's service, and the stable places of its copies of the bundle's files."""
    place = home
    if WINDOWS:
        import ctypes
        admin = bool(ctypes.windll.shell32.IsUserAnAdmin())  # type: ignore[attr-defined]
    else:
        admin = os.geteuid() == 0
        place = Path("/usr/local/lib/scatter") if admin else home
    made = service(sys.platform, admin, sys.executable, place / "tunnel.py", home, getpass.getuser(), Path.home())
    return made, [place / name for name in BUNDLE]


def run_commands(commands: Sequence[Sequence[str]], dry_run: bool, needed: bool = True) -> None:
    """Print and run each; raise Fatal for one that fails though it is needed."""
    runtime = {} if WINDOWS else {"XDG_RUNTIME_DIR": f"/run/user/{os.getuid()}"}  # `su` and cron leave it out
    for command in commands:
        print(shlex.join(command))
        if not dry_run:
            done = subprocess.run(command, capture_output=True, text=True, env={**runtime, **os.environ}, check=False)
            if done.returncode and needed:
                cure = "mend that or run it by sudo, then run this again"
                raise Fatal(f"{shlex.join(command)}: {done.stderr.strip()[:300]}; {cure}")


def put(path: Path, text: str, dry_run: bool) -> bool:
    """Make the file hold the text, and say what was done; return whether it did not before."""
    differed = write_atomically(path, text, dry_run)
    print("unchanged" if not differed else "would write" if dry_run else "wrote", path, sep=": ")
    return differed


def install(home: Path, flags: dict[str, Any]) -> int:
    """Keep the flags as settings, copy this script and what lies beside it, start the service unless it is up."""
    dry_run, (made, copies) = flags["dry_run"], this_service(home)
    own, path = Path(__file__).absolute(), home / "tunnel.json"
    files = {made.path: made.text}
    files.update((c, own.with_name(c.name).read_text("utf-8")) for c in copies if own.with_name(c.name).exists())
    os.umask(0o022)  # the service's account is to read the folder of the script
    with as_owner(home):
        settings = parse_settings(home, flags)
        given = {f.name: getattr(settings, f.name) for f in fields(Settings) if flags.get(f.name) is not None}
        kept = json.dumps({**read_json(path), **given}, indent=1) + "\n"
        if dry_run:
            print(kept, made.text, sep="\n")
        else:
            completed(settings, home)  # makes the key
        changed, state = [put(path, kept, dry_run)], read_json(home / "state.json")
        is_up = bool(state.get("up_since")) and is_running(home)
    changed += [put(path, text, dry_run) for path, text in files.items()]
    if any(changed) or not is_up:  # what setup has mended is dialled now
        if made.lasting[0] and subprocess.run(made.lasting[0], capture_output=True, check=False).returncode:
            run_commands(made.lasting[1:2], dry_run)
            if not dry_run:
                with as_owner(home):
                    (home / "lasting").touch()  # ours to take away again
        if sys.platform != "linux":
            run_commands(made.disable, dry_run, needed=False)  # launchd and the scheduler do not replace what runs
        run_commands(made.enable, dry_run)
        deadline = time.monotonic() + 20.0  # seconds; it starts within 2, and may have to wait for an older one's end
        while not dry_run and read_json(home / "state.json").get("started_at") == state.get("started_at"):
            if time.monotonic() > deadline:
                raise Fatal(f"the service does not start: see its log, and end a `tunnel.py run` that holds {home}")
            time.sleep(0.1)
    if not dry_run:
        print("the tunnel starts with this machine, or with your login; see: tunnel.py status")
    return 0


def uninstall(home: Path, flags: dict[str, Any]) -> int:
    """Stop and remove the service; the folder with key, settings and the copy of the log stays."""
    dry_run, (made, copies) = flags["dry_run"], this_service(home)
    run_commands(made.disable, dry_run, needed=False)
    if (home / "lasting").exists():
        run_commands(made.lasting[2:], dry_run, needed=False)
    for path in [p for p in (made.path, *copies, home / "lasting") if p.exists()]:
        print(f"remove {path}")
        if not dry_run:
            path.unlink()
    if not dry_run and copies[0].parent != home and home.exists():
        with contextlib.suppress(OSError):
            copies[0].parent.rmdir()
        for path in (home, *home.rglob("*")):
            os.chown(path, 0, 0, follow_symlinks=False)  # the account is gone, and another may get its number
    print(f"kept: {home} (key, settings, copy of the log)")
    return 0


# --- check -------------------------------------------------------------------

ASK = {"prompt": "Write a short note that thanks a friend for a book."}  # what goes through the whole chain
SEE_PROXY = "see on the VPS: systemctl status scatter-proxy; and that sshd's PermitOpen allows our -L"


def version_of(text: str) -> tuple[int, ...]:
    """Return the first version number in a text; (99,) where there is none, so that nothing is warned of."""
    found = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    return tuple(int(n) for n in found.groups() if n) if found else (99,)


def hop(name: str, cure: str, ask: Callable[[], Any]) -> Any:
    """Return what asking returns; raise Fatal with the hop's name and cure where it fails."""
    try:
        return ask()
    except (OSError, ValueError, KeyError, TypeError, IndexError, http.client.HTTPException) as e:
        raise Fatal(f"{name}: {e}; {cure}") from None


def said_ok(answer: tuple[int, Any]) -> Any:
    """Return an answer's JSON; raise ValueError if its status is not 200."""
    need(answer[0] == 200, f"it answers {answer[0]} {str(answer[1])[:300]}")
    return answer[1]


def task_of(answer: tuple[int, Any]) -> str:
    return str(said_ok(answer)["sinc"]["fragments"][5]["x"])[:60]


def home_hops(s: Settings) -> Iterator[str]:
    """Ask what is on this machine; yield what was seen, raise Fatal at the first failure."""
    late = " (on Windows Ollama starts when you log in, the tunnel before)" if WINDOWS else ""
    kind, installed, loaded = hop("model server", "start it" + late, lambda: models(s.target))
    version = str((ask_once(s.target, "/api/version")[1] or {}).get("version")) if kind == "ollama" else ""
    warning = "; warning: below 0.34.2 it has known holes, upgrade" if version_of(version) < (0, 34, 2) else ""
    yield f"model server: {kind} {version} at {s.target}{warning}"
    model, note = chosen_model(s.model, installed, loaded)
    if note:
        raise Fatal(f"model: {note}")
    yield f"model: {model}"
    path, messages = "/v1/chat/completions", [{"role": "user", "content": "Hi"}]
    body: dict[str, Any] = {"model": model, "max_tokens": 1, "messages": messages}
    if kind == "ollama":
        options = {"num_predict": 1, "num_ctx": s.context}
        path, body = "/api/generate", {"model": model, "prompt": "Hi", "stream": False, "options": options}
    began = time.monotonic()
    hop("warm", "see the model server's log", lambda: said_ok(ask_once(s.target, path, body, 120.0)))
    yield f"warm: one token in {time.monotonic() - began:.1f} s"
    version = hop("ssh client", "install OpenSSH", lambda: subprocess.run(
        ["ssh", "-V"], capture_output=True, text=True, check=False).stderr.strip())
    warning = "; warning: below 8.4 it can miss a dead link, upgrade" if version_of(version) < (8, 4) else ""
    yield f"ssh client: {version}{warning}"
    yield f"key: {s.identity}; to authorise: {' '.join(public_key(s.identity))} {s.name}"


def link_hops(s: Settings, home: Path) -> Iterator[str]:
    """Ask the way to the VPS and through it, over a tunnel that runs."""
    host = s.destination.rpartition("@")[2]
    cure = f"check {host} and this machine's name server"
    address = hop("name", cure, lambda: socket.getaddrinfo(host, s.ssh_port)[0][4][0])
    yield f"name: {host} is {address}"
    cure = f"see that the VPS is up, its sshd listens on {s.ssh_port}, and no firewall is between"
    with hop("TCP", cure, lambda: socket.create_connection((address, s.ssh_port), 5.0)) as tcp:
        banner = hop("TCP", cure, lambda: need(tcp.recv(256), "no banner").split(b"\r")[0].decode())
    version, warning = version_of(banner.rpartition("_")[2]), ""
    if (9, 2) <= version < (10, 6) and ":" in s.remote:
        warning = "; warning: this sshd holds a dead link's port while visitors come, for up to 16 min"
    yield f"TCP: {banner}{warning}"
    deadline = time.monotonic() + 15.0  # seconds; a dial has 5 to connect, and is tried again
    while not (state := read_json(home / "state.json")).get("up_since"):
        error = state.get("last_error") or {"pace": "soon", "seen": "no link in 15 s", "cure": "see status"}
        if time.monotonic() > deadline or error["pace"] == "slow":
            raise Fatal("host key, login, forward: {seen}; {cure}".format(**error))
        time.sleep(0.1)
    yield f"host key, login, forward: up since {clock_time(state['up_since'])}, {s.remote} is ours"
    health, deadline = (0, None), time.monotonic() + 10.0  # seconds; the proxy looks every 2, and warms the model
    while (health[0] != 200 or backend_is_down(health[1], s.remote)) and time.monotonic() < deadline:
        time.sleep(0.5 if health != (0, None) else 0)
        state = read_json(home / "state.json")
        if state.get("up_since") and not state["front"]:
            yield f"front door: none, as the VPS refuses the way to its {s.front}; what is behind it is not asked"
            return
        try:
            health = ask_once(state.get("front") or "", "/health", timeout=5.0)
        except OSError as e:
            health = (0, e)  # the link went, or the tunnel is about to say that the way is refused
    seen = hop("front door", SEE_PROXY, lambda: need(health[0], health[1]) and said_ok(health)["status"])
    yield f"front door: {seen}, {s.front} on the VPS"
    yield "document: " + hop("document", SEE_PROXY, lambda: task_of(ask_once(state["front"], "/scatter", ASK, 320.0)))


def url_hops(url: str) -> Iterator[str]:
    """Ask the website from outside."""
    at, nginx = urlsplit(url), "see on the VPS: nginx -t, and /var/log/nginx/error.log"
    certbot, path = f"on the VPS: certbot --nginx -d {at.hostname}", at.path.rstrip("/") + "/api/ai-transform"
    address = hop("DNS", f"make a record for {at.hostname}", lambda: socket.getaddrinfo(at.hostname, 0)[0][4][0])
    yield f"DNS: {at.hostname} is {address}"
    hop("TLS", f"see that nginx listens there; {certbot}", Line(url, 5.0).connect)
    yield "TLS: the certificate is good" if at.scheme == "https" else f"TLS: none, prompts travel open; {certbot}"
    yield f"nginx: {hop('nginx', nginx, lambda: said_ok(ask_once(url, path + '/health'))['status'])}"
    outside = "document from outside"
    yield f"{outside}: {hop(outside, nginx, lambda: task_of(ask_once(url, path, ASK, 320.0)))}"


def check(home: Path, flags: dict[str, Any]) -> int:
    """Ask each hop in turn; the first that fails says what was seen and what mends it. Return 0 or 1."""
    settings, url, beside = completed(parse_settings(home, flags), home), flags["url"], None
    if not re.fullmatch(rf"(https?://[\w.-]+(:{PORT})?(/\S*)?)?", url):
        raise Fatal(f"--url: {url[:80]!r} does not fit; it is the website's address, as https://example.org", 2)
    try:
        if paused_until(home):
            raise Fatal(f"paused until {clock_time(paused_until(home))}; `tunnel.py resume` first")
        for line in home_hops(settings):
            print("ok    " + line, flush=True)
        if not is_running(home):  # hold one as long as we ask
            write_atomically(home / "state.json", "{}")
            own = vars(settings)
            options = [f"--{name.replace('_', '-')}={own[name]}" for name in own if own[name] and name != "destination"]
            command, how = leashed([sys.executable, __file__, "run", *options, settings.destination], sys.platform)
            environ = {**os.environ, "SCATTER_HOME": str(home)}  # the account's own default may be another
            beside = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environ, **how)
            if WINDOWS:
                enter_job()
        for line in itertools.chain(link_hops(settings, home), url_hops(url) if url else ()):
            print("ok    " + line, flush=True)
    except Fatal as e:
        print(f"FAIL  {e}")
        return 1
    finally:
        if beside:
            beside.stdin.close() if beside.stdin else beside.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):  # it ends with us in any case
                beside.wait(10.0)  # seconds; ssh has 2 of them
    return 0


# --- setup -------------------------------------------------------------------
# Two calls of the owner's own ssh, with his settings, agent and questions: the first sends the bundle and brings the
# host keys back, the second has the terminal, as sudo may ask for a password. They share one connection where ssh can.

BUNDLE = ("scatter_proxy.py", "install.sh", "tunnel.py")
RECEIVE = ('umask 077; at=$(mktemp -d /tmp/scatter.XXXXXX) && tar -xzmf - -C "$at" && echo "scatter: $(id -u) $at" && '
           "cat /etc/ssh/ssh_host_*_key.pub")


def bundle(files: dict[str, bytes]) -> bytes:
    """Return the files as a compressed tar, with the ends of lines that a shell reads."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in files.items():
            text = content.replace(b"\r\n", b"\n")  # as git on Windows may have made them
            about = tarfile.TarInfo(name)
            about.size = len(text)
            tar.addfile(about, io.BytesIO(text))
    return packed.getvalue()


def pinned(text: str, host: str, port: int, keys: Sequence[str]) -> str:
    """Return the text of known_hosts with these keys, and no others, for the host."""
    places = (host, f"[{host}]:{port}")
    others = [line for line in text.splitlines() if not set(places) & set(line.split(" ")[0].split(","))]
    return "".join(line + "\n" for line in (*others, *(f"{','.join(places)} {key}" for key in keys)))


def install_there(at: str, is_root: bool, words: Sequence[str]) -> str:
    """Return the shell command that installs the bundle at a folder of the VPS and removes the folder."""
    sudo = "" if is_root else "sudo "
    return f"trap 'rm -rf {at}' EXIT HUP INT TERM; {sudo}sh {at}/install.sh vps {shlex.join(words)}"


def public_url(domain: str) -> str:
    """Return the website's address with the best scheme that answers; empty where the domain leads nowhere yet."""
    for url in (f"https://{domain}", f"http://{domain}"):
        with contextlib.suppress(OSError), contextlib.closing(Line(url, 5.0)) as line:
            line.connect()
            return url
    return ""


def setup(home: Path, flags: dict[str, Any]) -> int:
    """Make the VPS our front door, from nothing but ssh access to it; return the exit status of check."""
    admin, domain, dry_run = flags["admin"], flags["domain"], flags["dry_run"]
    with as_owner(home):
        parse_settings(home, {**flags, "destination": admin})  # before ssh gets to see it
    port = ["-p", flags["ssh_port"]] if flags["ssh_port"] else []
    said = subprocess.run(["ssh", *port, "-G", "--", admin], capture_output=True, text=True, check=False)
    if said.returncode:
        raise Fatal(f"ssh -G {admin}: {said.stderr.strip()[:300]}; mend ~/.ssh/config")
    host, at_port = (re.search(rf"(?m)^{word} (.+)$", said.stdout)[1] for word in ("hostname", "port"))
    flags = {**flags, "destination": "scatter-tunnel@" + host, "ssh_port": at_port}
    files, env = {}, home / "scatter.env"
    for path in (Path(__file__).absolute().with_name(name) for name in BUNDLE):
        if not path.exists():
            raise Fatal(f"{path} is not there; keep {', '.join(BUNDLE)} in one folder")
        files[path.name] = path.read_bytes()
    with as_owner(home), tempfile.TemporaryDirectory(prefix="scatter-") as folder:
        settings = parse_settings(home, flags)
        identity = settings.identity or str(home / "key")
        if dry_run and not Path(identity).exists():
            identity = f"{folder}/key"  # to show what would be done; it goes with the folder
        settings = completed(replace(settings, identity=identity), Path(folder) if dry_run else home)
        authorize = " ".join((*public_key(settings.identity), settings.name))
        if env.exists():
            files[env.name] = env.read_bytes()
    words = ["--domain", domain, "--authorize", authorize]
    words += ["--site", flags["site"]] if flags["site"] else []
    words += [f"--{word.replace('_', '-')}" for word in ("packages", "dry_run") if flags[word]]
    with tempfile.TemporaryDirectory(prefix="scatter-") as folder:
        share = [] if WINDOWS else ["-oControlMaster=auto", f"-oControlPath={folder}/s", "-oControlPersist=60"]
        ssh = ["ssh", *port, "-oConnectTimeout=10", "-oServerAliveInterval=15", *share]
        try:
            command = [*ssh, "--", admin, "sh -c " + shlex.quote(RECEIVE)]
            sent = subprocess.run(command, input=bundle(files), stdout=subprocess.PIPE, check=False)
            answer = sent.stdout.decode("utf-8", "replace")
            there = re.search(r"(?m)^scatter: (\d+) (/tmp/scatter\.\w+)$", answer)
            keys = re.findall(r"(?m)^((?:ssh|ecdsa|sk)-\S+ \S+)", answer)
            if not there or not keys:
                raise Fatal(f"ssh {admin}: status {sent.returncode}; mend what it says above, then run setup again")
            is_root = there[1] == "0"
            tty = ["-t"] if not is_root and sys.stdin.isatty() else []
            command = [*ssh, *tty, "--", admin, "sh -c " + shlex.quote(install_there(there[2], is_root, words))]
            status = subprocess.run(command, check=False).returncode
        finally:
            if share:
                subprocess.run([*ssh, "-O", "exit", "--", admin], capture_output=True, check=False)
    if status:
        raise Fatal(f"install.sh on {admin}: status {status}; mend what it says above, then run setup again")
    known = home / "known_hosts"
    with as_owner(home):
        text = known.read_text("utf-8") if known.exists() else ""
        put(known, pinned(text, host, int(at_port), keys), dry_run)
    install(home, flags)
    if dry_run:
        return 0
    become_owner(home)  # what root had to do is done
    url = public_url(domain)
    status = check(home, {**flags, "url": url})
    print(f"\n{url or 'http://' + domain}/api/ai-transform/page")
    if not url:
        print(f"next: a DNS record that says that {domain} is {host}, then: tunnel.py check --url http://{domain}")
    elif url.startswith("http:"):
        print(f"next, on the VPS: certbot --nginx -d {domain}")
    return status


# --- status ------------------------------------------------------------------

def take(file: Any) -> bool:
    """Lock an open file until it is closed; return False if another process holds it."""
    try:
        if WINDOWS:
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def lock(home: Path) -> Any:
    """Return the open lock of the one tunnel that may run from this folder; None while another process holds it."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    held = (home / "lock").open("a")
    if take(held):
        return held
    held.close()
    return None


def is_running(home: Path) -> bool:
    """Return whether a tunnel runs from this folder."""
    held = lock(home)
    if held:
        held.close()
    return held is None


def clock_time(at: float) -> str:
    return "`tunnel.py resume`" if at == FOR_EVER else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def status(home: Path, flags: dict[str, Any]) -> int:
    """Print what the running tunnel last wrote; return 0 if it is up, else 1."""
    state = {**read_json(home / "state.json"), "running": is_running(home), "paused_until": paused_until(home)}
    if not state["running"]:
        state.update(up_since=None, front=None)
    state["up"] = bool(state.get("up_since"))
    print(json.dumps(state, indent=1) if flags["json"] else "\n".join(status_lines(state)))
    return 0 if state["up"] else 1


def status_lines(state: dict[str, Any]) -> list[str]:
    """Return the state as lines for a person."""
    if "dials" not in state and state["running"]:
        return ["a tunnel runs, but its state is not there: it has just started, or its folder has no room"]
    if "dials" not in state:
        return ["no tunnel has run from here yet; start one: tunnel.py run USER@VPS, or tunnel.py install"]
    error, copy, until = state["last_error"], state["mirror"], state["paused_until"]
    known = {**state, **(error or {}), **(copy or {}), "server": state["model_server"] or "no model server answers"}
    known["trip"] = f"{state['round_trip'] * 1000:.0f} ms" if state["round_trip"] else "not measured"
    word = f"up since {clock_time(state['up_since'])}" if state["up"] else "down" if state["running"] else "not running"
    lines = [word + ": {name} serves at {remote} of {destination}", "model {model}, {server}. {model_note}",
             "redials {redials}, round trip {trip}, requests {requests}, refused {refused}, bytes {bytes}"]
    lines += [f"last error, {clock_time(error['at'])}: {{kind}}: {{seen}}; {{cure}}"] if error else []
    lines += [f"paused until {clock_time(until)}"] if until else []
    lines += ["the VPS's log is in {file}, {position} bytes"] if copy else []
    lines += ["it is not copied: {problem}"] if copy and copy.get("problem") else []
    return [line.format(**known) for line in lines]


# --- command line ------------------------------------------------------------

ARGUMENTS: dict[str, dict[str, Any]] = {
    "destination": {"nargs": "?", "help": fields(Settings)[0].metadata["help"]},
    "admin": {"help": "the VPS and your own account on it: root, or one that may sudo"},
    "duration": {"nargs": "?", "default": "", "help": "90s, 30m, 2h, 1d; default: until resume"},
    "--domain": {"required": True, "help": "the website's name"},
    "--site": {"help": "file of the site in the VPS's nginx; default: a server block of its own"},
    "--packages": {"action": "store_true", "help": "let the VPS install by apt what it lacks"},
    "--dry-run": {"action": "store_true", "help": "print each file and command, change nothing"},
    "--url": {"default": "", "help": "the website's address: go on to a document from outside"},
    "--json": {"action": "store_true", "help": "print the whole state"}}
COMMANDS: dict[Callable[[Path, dict[str, Any]], int], tuple[str, str]] = {  # what each takes, what it does
    setup: ("admin --domain --site --packages --dry-run", "make a VPS the front door, and start the tunnel"),
    run: ("destination", "hold the tunnel"),
    install: ("destination --dry-run", "start it with this machine"),
    uninstall: ("--dry-run", "no longer start it"),
    check: ("destination --url", "ask each hop in turn; say the first that fails"),
    status: ("--json", "say whether it is up"),
    pause: ("duration", "give the GPU back: unload the model, tell callers `paused`"),
    resume: ("", "end the pause"),
    key: ("", "make the key if there is none; print the line that the VPS must authorise")}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--version", action="version", version=f"tunnel {VERSION}")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for do, (takes, text) in COMMANDS.items():
        sub = commands.add_parser(do.__name__, help=text, description=text)
        sub.set_defaults(do=do)
        for name in takes.split():
            sub.add_argument(name, **ARGUMENTS[name])
        for f in fields(Settings)[1:] if do not in (uninstall, status, resume) else ():
            default = f" (default: {f.default})" if f.default else ""
            sub.add_argument("--" + f.name.replace("_", "-"), metavar="X", help=f.metadata["help"] + default)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        home = home_folder()
        if args.do not in (setup, install, uninstall):  # root's work is in other folders too
            become_owner(home)
        return args.do(home, vars(args))
    except Fatal as e:
        print(f"error: {e.args[0]}", file=sys.stderr)
        return e.args[1] if e.args[1:] else 1
    except KeyboardInterrupt:
        return 130  # as a shell names the end by SIGINT
    except OSError as e:
        cure = "see that its folder is there, may be written and has room"
        if isinstance(e, FileNotFoundError) and not re.search(r"[/\\]", str(e.filename)):
            cure = "install that program; ssh and ssh-keygen are OpenSSH's"
        print(f"error: {e.filename or args.command}: {e.strerror or e}; {cure}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
