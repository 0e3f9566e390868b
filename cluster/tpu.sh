#!/usr/bin/env bash
# A run on all hosts of a Cloud TPU slice (TPU VMs):
#
#   cluster/tpu.sh my-tpu us-east5-b mlm modern-base --data.files '/mnt/bucket/text/*.jsonl.gz' --run-dir /mnt/bucket/runs/a
#
# First the name and the zone of the slice, then the arguments of ./launch.sh; paths are seen from the hosts. Copies the
# committed state of this checkout to every host and starts the run there, one process a host; they find each other by
# the metadata of the slice. /mnt/bucket is a disk that all hosts mount (Filestore, gcsfuse), or set BUCKET=name to have
# it mounted by gcsfuse. The run outlives this terminal: `LOG=1 cluster/tpu.sh my-tpu us-east5-b` follows it.
set -euo pipefail
(($# >= 2)) || { sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"; exit 2; }
name=$1 zone=$2
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/.."

on() { # on WORKERS COMMAND
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker="$1" --command="$2"
}

if [[ -n ${LOG:-} ]]; then
  on 0 "tail -n 100 -F espalier.log"
  exit
fi
(($# > 0)) || { echo "error: no arguments for ./launch.sh given" >&2; exit 2; }

archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git archive --format=tar.gz --prefix=espalier/ --output="$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$name:espalier.tar.gz" --zone="$zone" --worker=all
on all "tar -xzf espalier.tar.gz && ./espalier/launch.sh setup"
if [[ -n ${BUCKET:-} ]]; then
  on all "mountpoint -q /mnt/bucket || { sudo mkdir -p /mnt/bucket && sudo chown \$(id -u) /mnt/bucket && gcsfuse --implicit-dirs $(printf %q "$BUCKET") /mnt/bucket; }"
fi
# All hosts within the same minutes: each waits for the others (--distributed.timeout).
on all "nohup ./espalier/launch.sh$(printf ' %q' "$@") >espalier.log 2>&1 </dev/null &"
echo "started on all hosts of $name; LOG=1 $0 $name $zone follows process 0"
