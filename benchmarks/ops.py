"""Time every op: `toca bench`, with the commit in its record.

python benchmarks/ops.py --device cuda --json benchmarks/results/gpu/ops.json
"""

from __future__ import annotations

import argparse

import timing
from toca_kernels.apps import bench


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    bench.add_arguments(parser)
    return bench.run(parser.parse_args(), machine=timing.machine)


if __name__ == "__main__":
    raise SystemExit(main())
