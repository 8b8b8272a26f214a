# What the scripts that build something share; sourced by them.
# shellcheck shell=bash

readonly here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly target=${CARGO_TARGET_DIR:-$here/../../target}/machines

die() {
  echo "${0##*/}: $1" >&2
  exit 1
}

# The Debian archive (main) and its security archive, as this machine's apt has them configured.
# Fallback, e.g. on Ubuntu: the ones everybody has.
find_mirrors() {
  local uri uris
  # Only addresses: the options of a one-line entry ([signed-by=...]) contain no "://".
  uris=$(sed 's/#.*//' /etc/apt/sources.list /etc/apt/sources.list.d/*.{list,sources} 2>/dev/null |
    grep -oE '[a-z+]+://[^[:space:]]+' || true)
  mirror='' security_mirror=''
  for uri in $uris; do
    case ${uri%/} in
      */debian) : "${mirror:=$uri}" ;;
      */debian-security) : "${security_mirror:=$uri}" ;;
    esac
  done
  : "${mirror:=http://deb.debian.org/debian}" "${security_mirror:=http://deb.debian.org/debian-security}"
}

# One builder at a time for each thing; the lock goes with the process.
lock() {
  mkdir -p "$(dirname "$1")"
  exec {lock_fd}>"$1"
  flock --nonblock "$lock_fd" || {
    echo "${0##*/}: waiting for another run that builds the same" >&2
    flock "$lock_fd"
  }
}
