#!/usr/bin/env bash
# A run on TPUs of a GKE cluster, by xpk: launch/xpk.sh create|install|prepare|start|logs|stop|check|delete
#
# Needs docker, gcloud and xpk (pip install xpk), logged in. `start` also resumes. What is run: launch/settings.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/settings.sh

CLUSTER=${CLUSTER:-moc}
ZONE=${ZONE:-us-east5-a}
PROJECT=${PROJECT:-my-project}
TYPE=${TYPE:-v5p-512}                             # 256 chips
SLICES=${SLICES:-1}
IMAGE=${IMAGE:-us-docker.pkg.dev/my-project/moc/moc_jax:latest}
GRACE=${GRACE:-120}                               # seconds between SIGTERM and the end

workload() { # NAME COMMAND
  xpk workload create --workload "$1" --cluster "$CLUSTER" --project "$PROJECT" --zone "$ZONE" --tpu-type "$TYPE" \
    --num-slices "$SLICES" --docker-image "$IMAGE" --max-restarts 1000 \
    --termination-grace-period-seconds "$GRACE" --command "$2"
}

case "${1:-}" in
  create)
    xpk cluster create --cluster "$CLUSTER" --project "$PROJECT" --zone "$ZONE" --tpu-type "$TYPE" \
      --num-slices "$SLICES" --spot
    ;;
  install) # this clone, as an image
    docker build --file launch/Dockerfile --tag "$IMAGE" .
    docker push "$IMAGE"
    ;;
  prepare)
    workload prepare "moc-prepare --config $CONFIG --data.source $DATA --data.cache $CACHE"
    ;;
  start) # a run that was stopped before its end exits with 1 here, so that it is restarted
    workload train "bash launch/until_done.sh moc-train --config $CONFIG --data.source $DATA --data.cache $CACHE \
      --workdir $WORKDIR --compilation-cache $PROGRAMS $MORE"
    ;;
  logs)
    kubectl logs --follow --selector "jobset.sigs.k8s.io/jobset-name=${2:-train},batch.kubernetes.io/job-completion-index=0"
    ;;
  stop) # SIGTERM, GRACE seconds to save, and no restart
    xpk workload delete --workload "${2:-train}" --cluster "$CLUSTER" --project "$PROJECT" --zone "$ZONE"
    ;;
  check) # the results are in the log of process 0
    workload check "python -m benchmarks.pod_check --workdir $WORKDIR-check --out /tmp/pod_check.json"
    ;;
  delete)
    xpk cluster delete --cluster "$CLUSTER" --project "$PROJECT" --zone "$ZONE"
    ;;
  *)
    sed -n '2,4p' "$0" >&2
    exit 2
    ;;
esac
