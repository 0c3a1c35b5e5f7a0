"""The command line that every measured script takes."""

from __future__ import annotations

import argparse


def arguments() -> argparse.Namespace:
    """What ``run.py`` asks of a script. ``rows``, ``group``, ``records`` are 0 or empty where the script's own hold."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", required=True, help="JSON file for the figures")
    parser.add_argument("--workload", required=True)
    parser.add_argument("--scratch", required=True, help="an empty folder")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of matrix products")
    parser.add_argument("--rows", type=int, default=0, help="demonstrations, or sampled responses, a step")
    parser.add_argument("--group", type=int, default=0, help="responses to a prompt")
    parser.add_argument("--records", default="", help="file of records in place of the workload's")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--mode", default="", help="of a tool that has several")
    return parser.parse_args()
