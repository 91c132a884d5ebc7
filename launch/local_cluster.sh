#!/usr/bin/env bash
# Trains with N processes on this machine that work together as N hosts would.
#
#     bash launch/local_cluster.sh N --config configs/NAME.py --workdir DIR [--config.key=value ...]
#
# When a process dies the others are taken down, and the exit status is that of the first to die.
# The same command goes on from the newest checkpoint.
#
# PYTHON    interpreter (default: .venv/bin/python)
# DEVICES   simulated CPU devices a process (default: 4)
# RESTARTS  how often to start again by itself if a process was ended by a signal, or saved and left
#           at one (default: 0; a mistake in the config, status 2, is never tried again)
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in
    '' | *[!0-9]* | 0) sed -n '2,/^set/{/^set/d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
esac
count=$1
shift
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || { echo "error: no $python; bash launch/setup.sh makes it" >&2; exit 2; }
restarts=${RESTARTS:-0}

export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" JAX_NUM_PROCESSES=$count
# In program order: devices that are short of threads could wait for one another for ever.
export XLA_FLAGS="--xla_force_host_platform_device_count=${DEVICES:-4} \
--xla_cpu_enable_concurrency_optimized_scheduler=false ${XLA_FLAGS:-}"

processes=()
stop() { [ ${#processes[@]} = 0 ] || kill "-$1" "${processes[@]}" 2>/dev/null; }

# Asked once, each saves at the same step and leaves; asked again, all are gone.
asked=
trap 'if [ -z "$asked" ]; then asked=yes; stop TERM; else stop KILL; fi' INT TERM
trap 'stop KILL' EXIT

while true; do
    port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
    export JAX_COORDINATOR_ADDRESS="localhost:$port"
    processes=()
    for ((index = 0; index < count; index++)); do
        JAX_PROCESS_ID=$index "$python" -m seed_jax.train "$@" &
        processes[index]=$!
    done
    echo "local_cluster: started ${processes[*]}" >&2

    status=0 alarm=
    while [ ${#processes[@]} -gt 0 ]; do
        wait -n -p ended "${processes[@]}" $alarm
        code=$?
        ended=${ended:-} # gone, if a signal came in between
        if [ -n "$alarm" ] && [ "$ended" = "$alarm" ]; then
            alarm=
            stop KILL
        fi
        for index in "${!processes[@]}"; do
            [ "${processes[index]}" = "$ended" ] || continue
            unset "processes[index]"
            [ "$code" != 0 ] && [ "$status" = 0 ] || continue
            status=$code
            if [ "$code" = 2 ] || [ "$code" = 143 ]; then
                # After a mistake, or when all have saved, the others leave by themselves.
                sleep 20 &
                alarm=$!
            elif [ ${#processes[@]} -gt 0 ]; then
                echo "local_cluster: process $index ended with status $code; stopping the others" >&2
                stop KILL
            fi
        done
    done
    [ -z "$alarm" ] || kill "$alarm" 2>/dev/null
    # Ended by a signal, Ctrl-C apart.
    if [ "$status" -le 128 ] || [ "$status" = 130 ] || [ -n "$asked" ] || [ "$restarts" -le 0 ]; then
        exit "$status"
    fi
    restarts=$((restarts - 1))
    echo "local_cluster: starting again ($restarts more times)" >&2
done
