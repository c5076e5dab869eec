#!/usr/bin/env bash
# `make demo` and `make test` as a newcomer meets them: a bare Debian 12 with nothing but what the
# README asks for, an ordinary user with an empty home, no package cache, a clone of HEAD.
# Needs root and debootstrap. Package mirror and pip settings are those of this machine; certificates and
# wheel folders that pip's settings name are shown read-only at the same place.
set -euo pipefail

readonly PACKAGES=python3,python3-venv,python3-dev,g++,git,make,ca-certificates
readonly DEMO_LIMIT_S=300

make_root() {
  local mirror
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Identifier: Packages' \
    'Codename: bookworm' 'Component: main' | head -n 1)
  debootstrap --variant=minbase --include="$PACKAGES" bookworm "$root" $mirror
  chroot "$root" useradd --create-home --skel /nonexistent newcomer
  git clone --quiet --no-hardlinks "$(git rev-parse --show-toplevel)" "$root/home/newcomer/mome_sdk"
  chroot "$root" chown --recursive newcomer: /home/newcomer
}

# pip's settings as one file; a constraints file of this machine is its own affair.
pip_settings() {
  echo "[global]"
  python3 -m pip config list | sed -nE "s/^[^.]+\.([a-z-]+)='(.*)'\$/\1 = \2/p" |
    awk '$1 != "constraint" && !seen[$1]++'
}

# Existing paths in the settings. A folder that serves as an index has its files beside it.
pip_paths() {
  local path
  grep -oE '(file://)?/[^ ]+' "$root/etc/pip.conf" | while read -r path; do
    [[ $path == file://* ]] && path=$(dirname "${path#file://}")
    [[ -e $path ]] && echo "$path"
  done
}

show_read_only() {
  if [[ -d $1 ]]; then mkdir -p "$root$1"; else mkdir -p "$root$(dirname "$1")" && touch "$root$1"; fi
  mount --bind "$1" "$root$1"
  mount -o remount,ro,bind "$root$1"
}

as_newcomer() {
  chroot --userspec=newcomer "$root" env -i HOME=/home/newcomer USER=newcomer LANG=C.UTF-8 \
    PATH=/usr/bin:/bin ${http_proxy:+http_proxy="$http_proxy"} ${https_proxy:+https_proxy="$https_proxy"} \
    bash -euc "cd ~/mome_sdk; $1"
}

# Runs in its own mount and process namespaces: mounts and leftover processes go when it ends.
run_commands() {
  mount -t proc proc "$root/proc"
  mount -t sysfs -o ro sysfs "$root/sys"  # the engines count cores there
  mount -t tmpfs tmpfs "$root/dev/shm"
  pip_settings >"$root/etc/pip.conf"
  local path
  for path in $(pip_paths); do show_read_only "$path"; done

  local start=$SECONDS demo_s
  as_newcomer "make demo"
  demo_s=$((SECONDS - start))
  as_newcomer "ls -l demo-out && make test"
  echo "make demo: $demo_s s (limit $DEMO_LIMIT_S s), make test: $((SECONDS - start - demo_s)) s, installs included"
  ((demo_s <= DEMO_LIMIT_S))
}

if [[ ${1:-} == --inside ]]; then
  root=$2
  run_commands
else
  [[ $EUID == 0 ]] || { echo "fresh.sh makes a chroot: run it as root." >&2; exit 1; }
  root=$(mktemp --directory --tmpdir mome-fresh.XXXXXX)
  chmod 755 "$root"
  trap 'rm -rf --one-file-system "$root"' EXIT
  make_root
  unshare --mount --pid --fork --kill-child --propagation private "$0" --inside "$root"
fi
