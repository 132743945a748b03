"""All that is measured of tensor, pipeline and context parallelism and of three dimensions, one table after the other.

    python benchmarks/parallel.py
    python benchmarks/parallel.py --only tensor scale

Each is a command of its own, whose docstring says what its columns are and which options it takes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

TABLES = ("tensor", "pipeline", "pipeline_cpu", "context", "scale")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=TABLES, default=TABLES, help="tables to print")
    for table in parser.parse_args().only:
        print(f"\n# {table}\n", flush=True)
        subprocess.run([sys.executable, Path(__file__).with_name(f"parallel_{table}.py")], check=True)


if __name__ == "__main__":
    main()
