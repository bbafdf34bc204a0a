"""``python -m paged_attn demo`` and ``python -m paged_attn doctor``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run its command; returns the exit status."""
    try:
        options = make_parser().parse_args(arguments)
        return options.run(options)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130  # 128 + SIGINT, as shells have it


def make_parser() -> argparse.ArgumentParser:
    """The command line. What it imports takes a moment, in which Ctrl-C is to be one line, too."""
    from paged_attn import doctor
    from paged_attn.demo import cli

    parser = argparse.ArgumentParser(prog="python -m paged_attn", description="Paged attention without PyTorch.")
    commands = parser.add_subparsers(required=True, metavar="command")
    demo = commands.add_parser(
        "demo",
        help="serve a real language model by continuous batching",
        description="Serve a real language model by continuous batching through a paged KV cache: requests join while "
        "others decode, share the pages of a common prefix, are preempted when the pool is full, and come back.",
    )
    cli.add_options(demo)
    demo.set_defaults(run=cli.run)
    checkup = commands.add_parser(
        "doctor",
        help="say whether the GPU path works here, and what to install",
        description="Look at CuPy, CUDA, the card, NVRTC and JAX, compile the kernels for the card, and check each "
        "against NumPy. The exit status is 0 where the GPU path is usable, else 1.",
    )
    checkup.set_defaults(run=doctor.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
