# shellcheck shell=bash disable=SC2034
# What launch/*.sh run. Each line may be overridden by the environment, or be edited here; docs/pods.md explains them.
CONFIG=${CONFIG:-multi_shot}                      # a shipped config, or a file on all hosts
DATA=${DATA:-/mnt/shared/videos}                  # storage that all hosts share, or gs://my-bucket/videos
CACHE=${CACHE:-/mnt/shared/cache}                 # encoded videos: on the same, or in a bucket
WORKDIR=${WORKDIR:-gs://my-bucket/runs/multi}     # or a shared folder
PROGRAMS=${PROGRAMS:-gs://my-bucket/programs}     # compiled programs: a restart needs seconds, not minutes
MORE=${MORE:---train.checkpoint-every 200}        # any other settings
