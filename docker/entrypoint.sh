#!/bin/sh
# The image's entry point: reads the secrets that are mounted as files, then becomes the command.
#   bdense-entrypoint COMMAND...        becomes the command
#   bdense-entrypoint join COMMAND...   joins the Ray cluster at RAY_ADDRESS first, with no CPU or GPU to offer:
#                                       whoever gives work to Ray needs a node of it in the same container
set -eu

secrets=${BDENSE_SECRETS:-/run/secrets}

# read_secret FILE VARIABLE: a secret that is not mounted is not needed; one that cannot be read is an error.
read_secret() {
    [ -e "$secrets/$1" ] || return 0
    if ! [ -f "$secrets/$1" ] || ! [ -r "$secrets/$1" ] || ! [ -s "$secrets/$1" ]; then
        echo "error: the secret $secrets/$1 is empty or cannot be read; make it as docker/secrets/README.md says" >&2
        exit 2
    fi
    export "$2=$(cat "$secrets/$1")"
}

# Before the password is read: Ray's processes inherit the environment, and only launchers need the database.
if [ "${1-}" = join ]; then
    shift
    ray start --address="${RAY_ADDRESS:?gives the address of the cluster to join, HOST:PORT}" \
        --num-cpus=0 --num-gpus=0 --object-store-memory=100000000 --disable-usage-stats >&2
fi

read_secret postgres_password PGPASSWORD
read_secret storage_url OPTUNA_STORAGE
exec "$@"
