#!/usr/bin/env bash
# The demonstration behind `make demo`: an app without any capability reads live packet counts.
#
# Everything happens in two network namespaces and one directory of its own, and all of it is
# removed at the end, also after a failure or Ctrl-C. The host's network is not touched.
# Exit status: 0 if the counts grew and every process had the capabilities it should have.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if ((EUID != 0)); then
  echo "The demo makes network namespaces and starts bpfgate-broker with privilege: root is needed."
  command -v sudo >/dev/null || { echo "demo: there is no sudo; run it as root" >&2 && exit 1; }
  exec sudo -- tests/demo.sh
fi

readonly seconds=5                # how long the client counts
readonly nobody=65534             # the client's uid and gid
readonly none=0000000000000000    # a capability set without members
readonly bpf_net=0000008000001000 # CAP_BPF (39) and CAP_NET_ADMIN (12)
readonly bin=target/release
readonly object=target/bpf/packet_counter.bpf.o
readonly dir=/run/bpfgate-demo.$$
readonly socket=$dir/socket
readonly iface=bpfgate$$ peer_iface=peer$$ # IFNAMSIZ is 16, and a pid has at most 7 digits
readonly address=192.0.2.1 peer_address=192.0.2.2 # TEST-NET-1, RFC 5737

holder='' peer_holder='' netns='' peer_netns='' broker='' client='' started=()

fail() {
  echo "demo: $1" >&2
  if [[ -s $dir/broker.log ]]; then
    echo "demo: the last lines of the broker's log:" >&2
    tail -n 20 "$dir/broker.log" | sed 's/^/  /' >&2
  fi
  exit 1
}

# The processes in our two network namespaces: all of them descend from this script, because
# nobody else could have entered. This finds a helper whose parent is gone, too.
ours() {
  local inode path
  # A process may end between the glob and the look at it.
  { stat -L -c '%i %n' /proc/[0-9]*/ns/net 2>/dev/null || true; } | while read -r inode path; do
    if [[ $inode == "$netns" || $inode == "$peer_netns" ]]; then
      path=${path#/proc/}
      echo "${path%%/*}"
    fi
  done
}

# Of those, the ones that a child of this script left behind: not our two holders.
left_over() {
  [[ -n $netns ]] || return 0
  ours | grep -vx -e "$holder" -e "${peer_holder:-none}" || true
}

cleanup() {
  local status=$? pid left killed=0 name
  trap '' INT TERM
  set +e
  # An orderly end first: the broker goes, and with it the spawner, the helper, the loader.
  for pid in "${started[@]}"; do kill -TERM "$pid" 2>/dev/null; done
  for _ in {1..30}; do
    [[ -z $(left_over) ]] && break
    sleep 0.1
  done
  for pid in $(left_over); do
    name=$(<"/proc/$pid/comm") && kill -KILL "$pid" && killed=$((killed + 1)) &&
      echo "demo: $name ($pid) did not end by itself and was killed" >&2
  done
  [[ -n $holder ]] && kill -KILL "$holder"
  [[ -n $peer_holder ]] && kill -KILL "$peer_holder"
  wait 2>/dev/null
  if [[ -d $dir ]]; then
    rm -rf "$dir"
    left=$(left_over)
    echo
    echo "Removed: $dir, the interfaces $iface and $peer_iface, their network namespaces, and" \
      "all processes in them${left:+ but $left}."
    [[ -n $left || $killed -gt 0 ]] && status=1
  fi
  exit "$status"
}
trap cleanup EXIT
trap 'echo "demo: line $LINENO failed: $BASH_COMMAND" >&2' ERR
trap 'exit 130' INT
trap 'exit 143' TERM

# wait_for SECONDS COMMAND...: whether the command succeeded within that time.
wait_for() {
  local tries=$(($1 * 20))
  shift
  while ((tries-- > 0)); do
    if "$@"; then return 0; fi
    sleep 0.05
  done
  return 1
}

# Becomes a command in the network namespace of the process $1: with `&`, $! is the command's
# own pid. Unlike `ip netns exec`, this leaves /sys as it is.
become_inside() {
  local pid=$1
  shift
  exec nsenter --net="/proc/$pid/ns/net" -- "$@"
}
inside() { (become_inside "$@"); }

check_prerequisites() {
  local file command
  for file in $bin/bpfgate-{broker,helper,loader} $bin/examples/packet_counter $object; do
    [[ -e $file ]] || fail "$file is not there; run: make demo"
  done
  for command in ip ping nsenter unshare setpriv sha256sum; do
    command -v $command >/dev/null || fail "the command $command is not there; run: make deps"
  done
}

netns_of() { stat -L -c %i "/proc/$1/ns/net"; }
has_own_netns() { [[ $(netns_of "$1") != "$(netns_of $$)" ]]; }

make_network() {
  # A network namespace lives as long as a process in it; these end by themselves at the latest.
  unshare --net -- sleep 120 &
  holder=$!
  wait_for 5 has_own_netns "$holder" || fail "a network namespace could not be made"
  netns=$(netns_of "$holder")
  unshare --net -- sleep 120 &
  peer_holder=$!
  wait_for 5 has_own_netns "$peer_holder" || fail "a second network namespace could not be made"
  peer_netns=$(netns_of "$peer_holder")

  inside "$holder" ip link add "$iface" type veth peer name "$peer_iface" netns "$peer_holder"
  inside "$holder" ip address add "$address/24" dev "$iface"
  inside "$holder" ip link set "$iface" up
  inside "$peer_holder" ip address add "$peer_address/24" dev "$peer_iface"
  inside "$peer_holder" ip link set "$peer_iface" up
  echo "Network:  $iface ($address) and $peer_iface ($peer_address), a veth pair between two new namespaces"
}

# A group that no account has: uid and gid of `nobody` are shared by too many to carry a rule.
free_group() {
  local gid
  for gid in {61000..61100}; do
    if ! getent group "$gid" >/dev/null; then
      echo "$gid"
      return
    fi
  done
  return 1
}

# replace KEY VALUE: in the text of the policy.
replace() {
  local before=$policy
  policy=$(sed -E "s#^($1) = .*#$2#" <<<"$before")
  [[ $policy != "$before" ]] || fail "policies/packet-counter.toml has no line '$1 = ...' to fill in"
}

make_policy() {
  local policy digest
  install -d -m 0755 "$dir" "$dir/policies"
  install -m 0644 "$object" "$dir/packet_counter.bpf.o"
  digest=$(sha256sum "$dir/packet_counter.bpf.o")
  policy=$(<policies/packet-counter.toml)
  replace path "path = \"$dir/packet_counter.bpf.o\""
  replace sha256 "sha256 = \"${digest%% *}\""
  replace interfaces "interfaces = [\"$iface\"]"
  replace 'user|group' "group = $group"
  install -m 0644 /dev/stdin "$dir/policies/packet-counter.toml" <<<"$policy"
  echo "Policy:   policies/packet-counter.toml for this interface, this object, and group $group"
}

broker_listens() { [[ -S $socket ]] || ! kill -0 "$broker" 2>/dev/null; }

start_broker() {
  become_inside "$holder" "$bin/bpfgate-broker" --standalone --policies "$dir/policies" --socket "$socket" \
    >"$dir/broker.log" 2>&1 &
  broker=$!
  started+=("$broker")
  wait_for 5 broker_listens || fail "the broker did not open its socket within 5 seconds"
  [[ -S $socket ]] || fail "the broker ended before it opened its socket"
  echo "Broker:   listens on $socket"
}

start_traffic() {
  become_inside "$peer_holder" ping -q -i 0.2 -w 20 "$address" >"$dir/ping.log" 2>&1 &
  started+=("$!")
}

start_client() {
  local program
  # By descriptor: the way to the file may be closed to nobody, and /run may be mounted noexec.
  exec {program}<"$bin/examples/packet_counter"
  become_inside "$holder" setpriv --reuid=$nobody --regid=$nobody --groups="$group" \
    --bounding-set=-all --inh-caps=-all --no-new-privs \
    "/proc/self/fd/$program" "$socket" "$iface" "$seconds" >"$dir/client.log" 2>&1 &
  client=$!
  started+=("$client")
  exec {program}<&-
  echo "Client:   packet_counter, as nobody (uid $nobody), in group $group, for $seconds seconds"
  echo
  tail -n +1 -s 0.1 -f --pid="$client" "$dir/client.log" &
  started+=("$!")
}

# The packet counts that the client printed so far, one per line.
counts() { sed -nE 's/.*\<packets +([0-9]+) +bytes +[0-9]+.*/\1/p' "$dir/client.log"; }
counts_or_ended() { [[ -n $(counts) ]] || ! kill -0 "$client" 2>/dev/null; }

# field PID NAME: a line of /proc/PID/status.
field() { sed -nE "s/^$2:\s+//p" "/proc/$1/status"; }

# What a process of our namespaces is, from its binary, its arguments and its parent.
role() {
  local pid=$1 exe parent
  if [[ $pid == "$client" ]]; then
    echo client
    return
  fi
  exe=$(readlink "/proc/$pid/exe")
  case ${exe##*/} in
    bpfgate-broker) echo broker ;;
    bpfgate-helper)
      if tr '\0' '\n' <"/proc/$pid/cmdline" | grep -qx -e --spawner; then
        echo "spawner (standalone only; systemd in production)"
      else
        echo helper
      fi
      ;;
    bpfgate-loader)
      parent=$(readlink "/proc/$(field "$pid" PPid)/exe")
      if [[ $parent == "$exe" ]]; then echo "loader, worker"; else echo "loader, parent"; fi
      ;;
    *) echo "${exe##*/}" ;;
  esac
}

# The names of a capability mask.
capability_names() {
  local -A known=([12]=CAP_NET_ADMIN [38]=CAP_PERFMON [39]=CAP_BPF)
  local mask=$((16#$1)) bit names='' others=0
  for bit in {0..63}; do
    ((mask >> bit & 1)) || continue
    if [[ -n ${known[$bit]:-} ]]; then names+=" ${known[$bit]}"; else others=$((others + 1)); fi
  done
  ((others == 0)) || names+=" and $others more"
  names=${names:- none}
  echo "${names# }"
}

# The permitted, effective, inheritable and ambient sets of all threads of a process, each once.
capability_sets() {
  sed -nE 's/^Cap(Prm|Eff|Inh|Amb):\s+/\1=/p' "/proc/$1"/task/*/status | sort -u | paste -sd ' '
}

# Prints the table and checks it: the answer to "who holds what, while packets are counted?"
show_processes() {
  local pid what uid seccomp sets wrong=() seen=' '
  local -A filter=([0]=off [1]=strict [2]=filter)
  echo
  printf '%-8s %-50s %-6s %-8s %-11s %s\n' PID PROCESS UID SECCOMP NONEWPRIVS 'CAPABILITIES (EFFECTIVE)'
  for pid in $(left_over); do
    # One that ends while we look, such as a worker whose load is done, is left out.
    if ! { what=$(role "$pid") && uid=$(field "$pid" Uid) && sets=$(capability_sets "$pid"); } 2>/dev/null; then
      continue
    fi
    [[ $what == ping ]] && continue
    seccomp=$(field "$pid" Seccomp)
    printf '%-8s %-50s %-6s %-8s %-11s %s\n' "$pid" "$what" "${uid%%[[:space:]]*}" \
      "${filter[$seccomp]:-$seccomp}" "$(field "$pid" NoNewPrivs)" "$(capability_names "$(field "$pid" CapEff)")"
    seen+="${what%%[, ]*} "
    case $what in
      client | broker | loader*)
        [[ $sets == "Amb=$none Eff=$none Inh=$none Prm=$none" ]] || wrong+=("the $what ($pid) holds capabilities")
        ;;
      helper)
        [[ $sets == "Amb=$none Eff=$bpf_net Inh=$none Prm=$bpf_net" ]] ||
          wrong+=("the helper ($pid) does not hold exactly CAP_BPF and CAP_NET_ADMIN")
        ;;
    esac
  done
  echo
  for what in client broker helper loader; do
    [[ $seen == *" $what "* ]] || wrong+=("no $what was running")
  done
  if ((${#wrong[@]} > 0)); then
    printf -v what '%s; ' "${wrong[@]}"
    fail "${what%; }"
  fi
}

detached() { ! inside "$holder" ip -o link show dev "$iface" | grep -q 'prog/xdp'; }

check_result() {
  local first last
  wait "$client" || fail "the client failed: $(tail -n 1 "$dir/client.log")"
  first=$(counts | head -n 1)
  last=$(counts | tail -n 1)
  ((${last:-0} > ${first:-0})) || fail "the counts did not grow (first ${first:-none}, last ${last:-none})"
  kill -0 "$broker" 2>/dev/null || fail "the broker ended while the client ran"
  wait_for 3 detached || fail "the session is over, but the XDP program is still attached to $iface"
  sleep 0.2 # lets tail print the client's last line
  echo
  echo "The broker's record of it:"
  sed 's/^/  /' "$dir/broker.log"
  echo
  echo "The counts grew from $first to $last packets. Client, broker and loader held no capability,"
  echo "the helper exactly CAP_BPF and CAP_NET_ADMIN. The program was detached when the client left."
}

check_prerequisites
group=$(free_group) || fail "no free group id between 61000 and 61100"
readonly group
make_network
make_policy
start_broker
start_traffic
start_client
wait_for 5 counts_or_ended || fail "the client printed no count within 5 seconds"
kill -0 "$client" 2>/dev/null || fail "the client ended early: $(tail -n 1 "$dir/client.log")"
show_processes
check_result
