#!/usr/bin/env bash
# Makes the Python environment once, then runs Espalier's commands in it. See `./launch.sh --help`.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
min_python=3.11

# The library's commands, from the table that espalier/__main__.py reads too: names, and a line of help for each.
commands=() library_help=""
read_commands() {
  local name takes meaning
  while IFS='|' read -r name takes meaning _; do
    [[ $name != \#* ]] || continue
    read -r name <<<"$name"
    read -r takes <<<"$takes"
    read -r meaning <<<"$meaning"
    commands+=("$name")
    library_help+=$(printf '  %-36s%s' "./launch.sh $name $takes" " $meaning")$'\n'
  done <"$root/espalier/commands/table.txt"
}

usage() {
  cat <<HELP
usage: ./launch.sh [COMMAND] [arguments]

  ./launch.sh                          install what is missing, then run the demo
${library_help%$'\n'}
  ./launch.sh test [pytest arguments]  install what the tests need and run them (paths as seen from this folder)
  ./launch.sh docs [--output FOLDER]   the pages of docs/ as a site with search, in site/
  ./launch.sh setup                    install only
  ./launch.sh python [arguments]       the environment's Python, which finds Espalier from everywhere

Each command has its own --help; after a PRESET, --help-all lists every flag. Paths on the command line are seen
from where you are.

The environment is the active virtualenv, the active conda environment (other than base), Colab's own Python, or
else .venv beside this script, made by \$PYTHON (unset = python3; 3.11 or newer). An installed JAX is kept as it is;
where there is none, the build that fits the hardware is chosen (CPU, CUDA 12 or 13, TPU).
HELP
}

say() { printf 'espalier: %s\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

# Which environment is ours to use: sets prefix (its folder), python, and what to do if it does not serve.
find_environment() {
  advice="use another environment, or none: then .venv is made here"
  if [[ -n ${VIRTUAL_ENV:-} && -x $VIRTUAL_ENV/bin/python ]]; then
    prefix=$VIRTUAL_ENV python=$VIRTUAL_ENV/bin/python
  elif [[ -n ${CONDA_PREFIX:-} && ${CONDA_DEFAULT_ENV:-} != base && -x $CONDA_PREFIX/bin/python ]]; then
    prefix=$CONDA_PREFIX python=$CONDA_PREFIX/bin/python
  elif [[ -n ${COLAB_RELEASE_TAG:-} ]]; then
    # A virtual environment would hide the JAX and the accelerator libraries that Colab brings.
    prefix=$("${PYTHON:-python3}" -c 'import sys; print(sys.prefix)') python=${PYTHON:-python3}
  else
    prefix=$root/.venv python=$root/.venv/bin/python advice="delete $root/.venv"
  fi
  stamps=$prefix/.espalier
}

# The class of hardware from files alone: it is asked on every start, and nvidia-smi can take seconds.
find_hardware() {
  local file
  hardware=cpu
  if [[ -e /dev/nvidiactl || -e /dev/nvidia0 || -e /dev/dxg ]] || command -v nvidia-smi >/dev/null; then
    hardware=gpu
  fi
  # /dev/accel without a number belongs to other makers' accelerators.
  for file in /dev/accel[0-9]*; do
    [[ ! -e $file ]] || hardware=tpu
  done
  # Newer TPUs appear as /dev/vfio, which passed-through devices of others do too: ask for Google's PCI numbers
  # (v3 to v7, as jax/_src/hardware_utils.py knows them), since its network cards carry the same vendor.
  if [[ -d /dev/vfio ]]; then
    for file in $(grep -lsx 0x1ae0 /sys/bus/pci/devices/*/vendor || true); do
      [[ ! $(<"${file%vendor}device") =~ ^0x00(27|56|5e|62|63|6f|76)$ ]] || hardware=tpu
    done
  fi
  if [[ -n ${TPU_NAME:-}${TPU_WORKER_ID:-}${TPU_ACCELERATOR_TYPE:-}${TPU_WORKER_HOSTNAMES:-} ]]; then
    hardware=tpu
  fi
}

# The JAX build for the hardware, as a pip extra; nothing for the CPU.
jax_extra() {
  local line driver capability extra=""
  case $hardware in
    tpu) extra=tpu ;;
    gpu)
      while IFS=', ' read -r driver capability; do
        # CUDA 13 needs this driver, and no longer supports cards before Turing (7.5).
        if [[ $driver =~ ^([0-9]+)\. ]] && ((BASH_REMATCH[1] >= 580)) && [[ $extra != cuda12 ]] &&
          ! [[ $capability =~ ^([0-6]\.|7\.[0-4]) ]]; then
          extra=cuda13
        elif [[ $driver =~ ^([0-9]+)\. ]] && ((BASH_REMATCH[1] >= 525)); then
          extra=cuda12
        fi
      done < <(nvidia-smi --query-gpu=driver_version,compute_cap --format=csv,noheader 2>/dev/null || true)
      if [[ -z $extra ]]; then
        line=$(nvidia-smi 2>&1 | head -n 1 || true)
        say "no GPU that JAX can use (nvidia-smi: ${line:-not found}; CUDA 12 needs driver 525 or newer): CPU build"
      fi
      ;;
  esac
  echo "$extra"
}

# Refuses an interpreter that is missing, broken or too old; the second argument says what to do then.
check_python() {
  local interpreter=$1 advice=$2 found
  command -v "$interpreter" >/dev/null || fail "$interpreter not found; Python $min_python or newer is needed: $advice"
  found=$("$interpreter" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || fail "$interpreter does not run; $advice"
  "$interpreter" -c "import sys; sys.exit(sys.version_info < (${min_python/./, }))" ||
    fail "$interpreter is Python $found; $min_python or newer is needed: $advice"
}

make_venv() {
  local base=${PYTHON:-python3} newer
  if "$python" -m pip --version >/dev/null 2>&1; then
    return
  fi
  for newer in python3.13 python3.12 python3.11 /path/to/python; do
    ! "$newer" -c '' 2>/dev/null || break
  done
  check_python "$base" "PYTHON=$newer ./launch.sh"
  # Either there is none, or making it was interrupted, or its interpreter has gone.
  say "making $prefix with $("$base" --version)"
  rm -rf "${prefix:?}/bin" "${prefix:?}/lib"
  if "$base" -c 'import ensurepip' 2>/dev/null; then
    "$base" -m venv "$prefix" >&2
  else
    # Debian ships venv without ensurepip: let the pip of the base interpreter install one.
    "$base" -m venv --without-pip "$prefix" >&2
    "$base" -m pip --python "$python" install --disable-pip-version-check pip >&2
  fi
}

# pip constraints that keep an installed JAX as it is; fails where requirements.txt refuses its version.
jax_constraints() {
  "$python" - "$root/requirements.txt" "$advice" <<'PYTHON'
import importlib.metadata, re, sys

def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None

def number(text):
    return [int(part) for part in re.findall(r"\d+", text.split(".dev")[0])]

installed = version("jax")
if installed:
    spec = re.search(r"^jax([<>=!].*)$", open(sys.argv[1]).read(), re.M)[1]
    for operator, bound in re.findall(r"(>=|<|!=)([\d.]+)", spec):
        a, b = number(installed), number(bound)
        if not {">=": a >= b, "<": a < b, "!=": a != b}[operator]:
            sys.exit(
                f"error: JAX {installed} is installed in {sys.prefix}; Espalier takes jax{spec} (requirements.txt says "
                f"why); {sys.argv[2]}"
            )
for name in ("jax", "jaxlib"):
    if version(name):
        print(f"{name}=={version(name)}")
for distribution in importlib.metadata.distributions():
    name = distribution.metadata["Name"] or ""
    if re.fullmatch(r"jax-cuda\d+-plugin|libtpu", name):
        print(f"# has {name}")
PYTHON
}

# Everything of requirements.txt, and what `test` or `docs` need besides, unless a stamp says that it is there.
# The stamp holds the requirements themselves and is removed while pip works: an interrupted install leaves none.
install() {
  local stamp=$stamps/$1 wanted
  shift
  wanted=$(cat "$@")
  [[ ! -x $python || ! -e $stamp || $(<"$stamp") != "$wanted" ]] || return 0
  if [[ $prefix == "$root/.venv" ]]; then
    make_venv
  else
    check_python "$python" "$advice"
  fi
  rm -f "$stamp"

  local constraints extra="" file
  constraints=$(jax_constraints) || exit 2
  case $hardware:$constraints in
    gpu:*"# has jax-cuda"* | tpu:*"# has libtpu"*) ;;
    *) extra=$(jax_extra) ;;
  esac
  local arguments=(--constraint "$stamps/constraints.txt")
  printf '%s\n' "$constraints" >"$stamps/constraints.txt"
  for file in "$@"; do
    arguments+=(--requirement "$file")
  done
  [[ -z $extra ]] || arguments+=("jax[$extra]")
  say "installing into $prefix${extra:+ with JAX for $extra}; the first time takes some minutes"
  "$python" -m pip install --disable-pip-version-check "${arguments[@]}" 2>&1 |
    { grep -v '^Requirement already satisfied' || true; } >&2 ||
    fail "the installation did not end well (see above); the same command tries again"
  printf '%s\n' "$wanted" >"$stamp.new"
  mv "$stamp.new" "$stamp"
}

# One installation at a time; a second launch waits for the first and then finds the stamp.
install_locked() {
  mkdir -p "$stamps"
  if command -v flock >/dev/null; then
    (
      flock -n 9 || { say "another launch is installing; waiting for it"; flock 9; }
      install "$@"
    ) 9>"$stamps/lock"
  else
    (install "$@")
  fi
}

# libtpu of the version that this JAX belongs with, whose compiler `plan` asks. In a folder of its own: among the other
# packages it would have JAX look for TPUs at every start.
install_libtpu() {
  local wanted folder=$stamps/libtpu
  wanted=$("$python" -c 'import importlib.metadata, re
print(*(re.match(r"[\w.=*]+", line)[0] for line in importlib.metadata.requires("jax") or () if re.match("libtpu==.*tpu", line)))')
  [[ ! -e $folder/version || $(<"$folder/version") != "$wanted" ]] || return 0
  say "installing $wanted, the compiler for TPUs (140 MB), into $folder"
  rm -rf "$folder"
  mkdir -p "$folder"
  "$python" -m pip install --disable-pip-version-check --quiet --no-deps --target "$folder" "$wanted" >&2 ||
    fail "the installation did not end well (see above); the same command tries again"
  printf '%s\n' "$wanted" >"$folder/version"
}

install_libtpu_locked() {
  if [[ $hardware != tpu ]] && command -v flock >/dev/null; then
    (flock 9; install_libtpu) 9>"$stamps/lock"
  elif [[ $hardware != tpu ]]; then
    (install_libtpu)
  fi
}

setup() {
  local files=("$root/requirements.txt") name
  [[ $1 != test ]] || files+=("$root/requirements-test.txt")
  [[ $1 != docs ]] || files+=("$root/docs/site/requirements.txt")
  find_environment
  find_hardware
  name=$hardware-$1
  [[ -x $python && -e $stamps/$name && $(<"$stamps/$name") == "$(cat "${files[@]}")" ]] || install_locked "$name" "${files[@]}"
}

# What the environment needs before JAX is loaded (memory, the cache of compiled programs) is set in espalier/__main__.py.
run() {
  export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
  # -P: a json.py where the user happens to be must not hide Python's.
  exec "$python" -P -m espalier "$@"
}

read_commands
command=${1:-demo}
[[ $# -eq 0 ]] || shift
case $command in
  -h | --help | help) usage ;;
  setup)
    setup run
    say "ready: $python"
    ;;
  test)
    setup run
    setup test
    install_libtpu_locked
    cd "$root"
    # Processes of their own for the tests, since most of them wait for compilers that use one core.
    exec "$python" -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal "$@"
    ;;
  docs)
    setup run
    setup docs
    export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
    exec "$python" "$root/docs/site/build.py" "$@"
    ;;
  python)
    setup run
    run python "$@"
    ;;
  *)
    if [[ " ${commands[*]} " == *" $command "* ]]; then
      setup run
      [[ $command != plan || " $*" != *" --topology"* ]] || install_libtpu_locked
      run "$command" "$@"
    fi
    commands+=(test docs setup python)
    nearest=$("${PYTHON:-python3}" -c 'import difflib, sys; print(*difflib.get_close_matches(sys.argv[1], sys.argv[2:], 1))' \
      "$command" "${commands[@]}" 2>/dev/null || true)
    fail "unknown command '$command'${nearest:+; did you mean $nearest?}; \`./launch.sh --help\` lists ${commands[*]}"
    ;;
esac
