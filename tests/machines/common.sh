# What the scripts that build something share; sourced by them.
# shellcheck shell=bash

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
target=$(realpath -m "${CARGO_TARGET_DIR:-$here/../../target}")/machines
readonly here target

die() {
  echo "${0##*/}: $1" >&2
  exit 1
}

need() { # COMMAND PACKAGE
  command -v "$1" >/dev/null || die "$1 is missing (Debian package $2)"
}

# Everything is made in here, and renamed only when it is complete.
work=''
builder='' # a process that has to be ended before its directory can go
finish() {
  if [[ -n $builder ]]; then
    kill -KILL "$builder"
    wait "$builder" || true
    sleep 0.5 # its children end after it
  fi 2>/dev/null
  [[ -z $work ]] || rm -rf --one-file-system "$work"
}
trap finish EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

new_work() { # DIRECTORY
  rm -rf --one-file-system "$1"
  mkdir -p "$1"
  work=$1
}

keep_work_as() { # DIRECTORY
  rm -rf --one-file-system "$1"
  mv "$work" "$1"
  work=''
}

# One builder at a time for each thing; the lock goes with the process.
lock() { # FILE
  mkdir -p "$(dirname "$1")"
  exec {lock_fd}>"$1"
  flock --nonblock "$lock_fd" || {
    echo "${0##*/}: waiting for another run that builds the same" >&2
    flock "$lock_fd"
  }
}

# Makes the tree DIRECTORY/root into the disk DIRECTORY/root.ext4.
make_disk() { # DIRECTORY
  local size
  need mke2fs e2fsprogs
  size=$(($(du -sm "$1/root" | cut -f1) + 1024))
  # Sparse. Without journal and checksums, because every change to it is thrown away.
  rm -f "$1/root.ext4.new"
  truncate --size="${size}M" "$1/root.ext4.new"
  mke2fs -q -t ext4 -O ^has_journal,^metadata_csum -E lazy_itable_init=1 -m 0 -d "$1/root" "$1/root.ext4.new" ||
    die "mke2fs failed; is there space in $1?"
  mv "$1/root.ext4.new" "$1/root.ext4"
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

# From here on, apt in this script is one of our own: it knows the suites that have kernels, and
# leaves no trace in that of this machine. Nothing is ever installed with it.
private_apt() {
  local apt=$target/apt suite keyring=/usr/share/keyrings/debian-archive-keyring.gpg
  [[ ${APT_CONFIG-} != "$apt/apt.conf" ]] || return 0 # done before
  [[ -e $keyring ]] || die "$keyring is missing (Debian package debian-archive-keyring)"
  find_mirrors
  mkdir -p "$apt"/{etc/{apt.conf,preferences}.d,lists/partial,cache/archives/partial}
  lock "$apt/lock"
  : >"$apt/status"
  {
    for suite in bookworm bookworm-backports trixie trixie-backports sid; do
      echo "deb [signed-by=$keyring] $mirror $suite main"
    done
    for suite in bookworm-security trixie-security; do
      echo "deb [signed-by=$keyring] $security_mirror $suite main"
    done
  } >"$apt/etc/sources.list"
  cat >"$apt/apt.conf" <<END
Dir "$apt";
Dir::Etc "$apt/etc";
Dir::State "$apt";
Dir::State::status "$apt/status";
Dir::Cache "$apt/cache";
Dir::Cache::srcpkgcache "";
Dir::Bin::methods "/usr/lib/apt/methods";
APT::Architecture "amd64";
APT::Architectures "amd64";
APT::Sandbox::User "root";
Acquire::GzipIndexes "true";
Acquire::Languages "none";
Acquire::Check-Valid-Until "false";
END
  export APT_CONFIG=$apt/apt.conf
  # Versions roll: what the lists of yesterday name may be gone today.
  if [[ -z $(find "$apt/updated" -mmin -60 2>/dev/null) ]]; then
    echo "${0##*/}: fetching the package lists of $mirror" >&2
    apt-get -qq update >&2 || die "apt-get update failed; is $mirror reachable?"
    touch "$apt/updated"
  fi
}

# Downloads packages to a directory, all or nothing.
download() { # DIRECTORY PACKAGE...
  local directory=$1
  shift
  rm -rf "$directory.new"
  mkdir -p "$directory.new"
  if ! (cd "$directory.new" && apt-get -qq download "$@") >"$directory.log" 2>&1; then
    rm -rf "$directory.new"
    return 1
  fi
  rm -rf "$directory" "$directory.log"
  mv "$directory.new" "$directory"
}
