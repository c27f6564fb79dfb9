#!/usr/bin/env bash
# The whole loop on one machine: set up, record demonstrations in the simulator, train both stages, run the policy
# open-loop and in closed loop, and leave everything in one folder. About 10 minutes on two CPU cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUT=quickstart_out EPISODES=120 ITERATIONS_VA=500 ITERATIONS_VLA=1500 TRIALS=12 SEED=0
usage() {
    cat <<TEXT
usage: bash scripts/quickstart.sh [--out DIR] [--episodes N] [--va-iter N] [--vla-iter N] [--trials N] [--seed N]
  --out DIR       folder for everything (default: $OUT); must not hold an earlier run
  --episodes N    demonstrations to record, at most 2.5 minutes of them (default: $EPISODES)
  --va-iter N     training steps of stage 0, the VA prior (default: $ITERATIONS_VA)
  --vla-iter N    training steps of stage 1, the VLA (default: $ITERATIONS_VLA)
  --trials N      closed-loop episodes (default: $TRIALS)
  --seed N        of recording, training and evaluation (default: $SEED)
TEXT
}
while [ $# -gt 0 ]; do
    case "$1" in
        -h | --help) usage; exit 0 ;;
        --out | --episodes | --va-iter | --vla-iter | --trials | --seed)
            [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; } ;;&
        --out) OUT="$2" ;;
        --episodes) EPISODES="$2" ;;
        --va-iter) ITERATIONS_VA="$2" ;;
        --vla-iter) ITERATIONS_VLA="$2" ;;
        --trials) TRIALS="$2" ;;
        --seed) SEED="$2" ;;
        *) echo "error: unknown flag $1; --help lists them" >&2; exit 2 ;;
    esac
    shift 2
done
for number in "$EPISODES" "$ITERATIONS_VA" "$ITERATIONS_VLA" "$TRIALS" "$SEED"; do
    case "$number" in
        '' | *[!0-9]*) echo "error: '$number' is not a whole number; --help says which flags take one" >&2; exit 2 ;;
    esac
done
if [ -e "$OUT/checkpoints" ]; then
    echo "error: $OUT holds an earlier run; remove it or give another folder: --out DIR" >&2
    exit 2
fi

started=$(date +%s)
step() { printf '\n== %s (%d s)\n' "$*" $(($(date +%s) - started)); }

step "1/5 setting up"
bash scripts/setup.sh
export PYTHON="$PWD/.venv/bin/python" PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    GPUS=0 DEVICE=cuda
else
    GPUS=cpu DEVICE=cpu
fi
mkdir -p "$OUT"
OUT="$(cd "$OUT" && pwd)"

step "2/5 recording demonstrations of the scripted expert"
"$PYTHON" -m examples.pickplace.record --out "$OUT/demos/train" --episodes "$EPISODES" --seed "$SEED" \
    --workers 2 --image-size 128 --paraphrases 1 --max-seconds 150
"$PYTHON" -m examples.pickplace.record --out "$OUT/demos/test" --episodes 8 --seed $((SEED + 1000)) \
    --workers 2 --image-size 128 --paraphrases 1
printf 'default:\n  PickPlaceCan: "%s"\n' "$OUT/demos/train" > "$OUT/data_loc.yaml"
export APT_DATA_LOC="$OUT/data_loc.yaml"

train() {
    bash scripts/train.sh --config quickstart --gpus "$GPUS" --va-name va --vla-name vla --seed "$SEED" \
        --ckpt_dir "$OUT/checkpoints" --log_dir "$OUT/logs" "$@"
}
step "3/5 training stage 0 (VA prior: language masked, VLM frozen), then stage 1 (VLA: language in)"
train --stage 0 --max-iter "$ITERATIONS_VA"
train --stage 1 --max-iter "$ITERATIONS_VLA"

step "4/5 open loop: predicted against recorded motion on episodes that were not trained on"
"$PYTHON" -m apt.infer.open_loop --ckpt "$OUT/checkpoints/vla/ckpt_latest.pt" --episodes "$OUT/demos/test" \
    --ema --steps 5 --device "$DEVICE" --out "$OUT/open_loop"

step "5/5 closed loop: the policy moves the robot in the simulator"
"$PYTHON" -m examples.pickplace.evaluate --ckpt "$OUT/checkpoints/vla/ckpt_latest.pt" --episodes "$TRIALS" \
    --ema --denoising-steps 5 --ensemble 4 --execute-steps 4 --device "$DEVICE" --seed "$SEED" \
    --image-size 128 --paraphrases 1 --video --out "$OUT/closed_loop"

"$PYTHON" scripts/quickstart_report.py "$OUT"
echo "finished in $(($(date +%s) - started)) s"
