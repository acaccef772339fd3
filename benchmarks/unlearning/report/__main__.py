"""Write the report of a setting again: ``python -m unlearning.report FOLDER OUT``."""

import argparse
import sys
from pathlib import Path

from shared_lib.errors import run

from . import write_report


def main() -> None:
    """Read the two folders from the command line and say where the report is."""
    parser = argparse.ArgumentParser(prog="python -m unlearning.report", description="Write the report of a setting.")
    parser.add_argument("folder", type=Path, help="the setting's result files, with settings.json")
    parser.add_argument("out", type=Path, help="where the report goes")
    options = parser.parse_args()
    print(write_report(options.folder, options.out))


if __name__ == "__main__":
    sys.exit(run(main))
