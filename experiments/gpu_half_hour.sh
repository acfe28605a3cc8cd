#!/usr/bin/env bash
# Use half an hour on a machine with one GPU well, in pieces of at most nine minutes:
#
#     experiments/gpu_half_hour.sh [PIECE ...]
#
# PIECE, by default all in this order; a piece that is complete is not repeated, one that was cut short resumes:
#
#     bench     steps of DenseNet-40, plain, selective, frozen and compact, beside PyTorch if that is installed
#     together  five seeds in one program
#     hundred   100 epochs of the plain DenseNet-40 on CIFAR-10, timed
#     study     the published study, three seeds of each configuration at once; repeat the piece until it is complete
#
# Everything lands in $RUNS (default: runs/gpu). The images must be on the machine: `selconv data prepare cifar10`
# before, or TFDS_DATA_DIR. $SELCONV is the program (default: python -m selconv_jax), $LIMIT the seconds of a piece
# (default: 530). $NETWORK (for bench and together) and $RUN (for hundred and study) hold more words for the commands,
# such as NETWORK="blocks=[1] --repeats 2" RUN="epochs=1 data.name=fashion_mnist_sample" for a try on a CPU.
set -u
cd "$(dirname "$0")/.." || exit 1
selconv=${SELCONV:-python -m selconv_jax}
runs=${RUNS:-runs/gpu}
limit=${LIMIT:-530}
mkdir -p "$runs" || exit 1

# Run the program; at the limit it is asked to end, and saves where it is.
within_limit() {
    timeout --signal=TERM --kill-after=60 "$limit" $selconv "$@"
}

# A benchmark writes what it has measured when it is stopped; one without results is made again.
measure() {
    local name=$1
    shift
    if [ -f "$runs/$name/bench.json" ]; then
        echo "$name: complete, see $runs/$name"
        return 0
    fi
    rm -rf "${runs:?}/$name"
    within_limit bench densenet40 --output "$runs/$name" "$@" ${NETWORK:-}
}

bench() {
    local torch=
    python -c "import torch" 2>/dev/null && torch=--torch
    measure bench --what step,frozen,compact,reallocate,eval,input --capacity 0,0.25 $torch
}

together() {
    measure together --what step --capacity 0.25 --together 5
}

hundred() {
    local command=train more="experiments/cifar10/densenet40_plain.toml epochs=100 ${RUN:-} --workdir $runs/hundred"
    [ -e "$runs/hundred" ] && command=resume more=$runs/hundred
    # The time is that of the command, compilation included; the epochs' own are in metrics.jsonl.
    time within_limit $command $more
}

study() {
    within_limit sweep experiments/cifar10/densenet40_plain.toml experiments/cifar10/densenet40_selective.toml \
        --workdir "$runs/published" --seeds 0,1,2 --jobs 3 ${RUN:-}
}

[ $# -gt 0 ] || set -- bench together hundred study
for piece in "$@"; do
    case $piece in
    bench | together | hundred | study) ;;
    *)
        echo "there is no piece '$piece': the pieces are bench, together, hundred, study" >&2
        exit 2
        ;;
    esac
done
status=0
for piece in "$@"; do
    echo "== $piece"
    "$piece" || {
        code=$?
        # Ended by the limit: the next call goes on.
        if [ $code -eq 124 ] || [ $code -eq 143 ]; then
            echo "$piece: not complete yet; call this again to go on"
        else
            echo "$piece: failed (exit status $code)" >&2
            status=1
        fi
    }
done
exit $status
