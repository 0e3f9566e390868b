#!/usr/bin/env bash
# What happens on each host of a slice, called over ssh by `python -m cluster.tpu`; the checkout is ~/espalier.
#
#   host.sh install BUCKET BEFORE      what was unpacked into ~/espalier.new takes its place; environment, mounts
#   host.sh start DIGEST ARGUMENTS…    ./launch.sh ARGUMENTS…, detached from the terminal; once only
#   host.sh state                      one line: espalier HOST absent|running|ended|stopped DIGEST CODE | last line
#   host.sh stop                       SIGTERM: the run saves and ends
#
# Whether the run lives is told by a lock that the kernel drops with it: no process number is trusted, and a host that
# was started anew has none.
set -euo pipefail
run=$HOME/espalier-run
mkdir -p "$run"
touch "$run/lock"

running() { ! flock -s -n "$run/lock" true; }

# A Python that Espalier takes; the images of the TPUs bring 3.10, so else one of uv's.
find_python() {
  local candidate
  for candidate in python3.13 python3.12 python3.11 python3; do
    if "$candidate" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  python3 -m pip install --user --quiet uv >&2
  python3 -m uv python install 3.12 >&2
  python3 -m uv python find 3.12
}

mount_bucket() {
  ! mountpoint -q /mnt/bucket || return 0
  if ! command -v gcsfuse >/dev/null; then
    local source=https://packages.cloud.google.com/apt
    curl -fsSL "$source/doc/apt-key.gpg" | sudo tee /usr/share/keyrings/gcsfuse.asc >/dev/null
    echo "deb [signed-by=/usr/share/keyrings/gcsfuse.asc] $source gcsfuse-$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get -qq -o DPkg::Lock::Timeout=300 update
    sudo apt-get -qq -o DPkg::Lock::Timeout=300 install -y gcsfuse
  fi
  sudo mkdir -p /mnt/bucket
  sudo chown "$(id -u)" /mnt/bucket
  gcsfuse --implicit-dirs "$1" /mnt/bucket
}

case ${1:-} in
  install)
    if running; then exit; fi
    # The environment stays: it is at the same path afterwards.
    [[ ! -d $HOME/espalier/.venv ]] || mv "$HOME/espalier/.venv" "$HOME/espalier.new/.venv"
    rm -rf "$HOME/espalier"
    mv "$HOME/espalier.new" "$HOME/espalier"
    [[ -z $2 ]] || mount_bucket "$2"
    [[ -z $3 ]] || bash -c "$3"
    PYTHON=$(find_python) "$HOME/espalier/launch.sh" setup
    ;;
  start)
    # Nothing to do where it runs already. The waits are for a look at the state, which holds the lock for a moment.
    flock -w 2 "$run/lock" rm -f "$run/code" "$run/stopped" || exit 0
    echo "$2" >"$run/digest"
    # -o: the lock is held by flock alone, not by what the run may leave behind.
    setsid nohup flock -w 5 -o "$run/lock" bash "$HOME/espalier/cluster/tpu/host.sh" supervise "${@:3}" \
      >>"$run/log" 2>&1 </dev/null &
    for _ in {1..100}; do
      if [[ -e $run/code ]] || running; then exit; fi
      sleep 0.1
    done
    echo "error: the run did not start on $(hostname)" >&2
    exit 1
    ;;
  supervise)
    "$HOME/espalier/launch.sh" "${@:2}" &
    echo $! >"$run/process"
    code=0
    wait $! || code=$?
    echo "$code" >"$run/code"
    ;;
  state)
    digest=$(cat "$run/digest" 2>/dev/null || echo none)
    last=$(tail -c 4000 "$run/log" 2>/dev/null | tr '\r' '\n' | grep -v '^ *$' | tail -n 1 | cut -c 1-200 || true)
    if running; then
      state=running
    elif [[ -e $run/stopped ]]; then
      state=stopped
    elif [[ -e $run/code ]]; then
      state=ended
    else
      state=absent
    fi
    echo "espalier $(hostname) $state $digest $(cat "$run/code" 2>/dev/null || echo -) | $last"
    ;;
  stop)
    if running; then
      touch "$run/stopped"
      kill -TERM "$(<"$run/process")"
    fi
    ;;
  *)
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"
    exit 2
    ;;
esac
