"""How long `import lavish`, `lavish --help` and `lavish chat --help` take, beside a Python that does nothing.

Each number is the median of several fresh processes, run in turns; goals: 0.2 s for the import, 0.5 s for a `--help`.
Prints one line each: median, what is left after the bare Python's start, ratio to the bare start, goal.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

LAVISH = str(Path(sys.executable).parent / "lavish")
COMMANDS: dict[str, tuple[list[str], float | None]] = {  # what runs, and the goal in seconds
    "python -c pass": ([sys.executable, "-c", "pass"], None),
    "import lavish": ([sys.executable, "-c", "import lavish"], 0.2),
    "lavish --help": ([LAVISH, "--help"], 0.5),
    "lavish chat --help": ([LAVISH, "chat", "--help"], 0.5),
}


def measure(num_runs: int) -> dict[str, float]:
    """Give the median seconds of each command over `num_runs` rounds, one untimed round before them."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for round_index in range(num_runs + 1):
        for name, (command, _) in COMMANDS.items():
            started_s = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            if round_index:
                seconds[name].append(time.perf_counter() - started_s)
    return {name: statistics.median(times) for name, times in seconds.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9, help="timed runs of each command")
    medians = measure(parser.parse_args().runs)
    bare_s = medians["python -c pass"]
    are_met = True
    for name, median_s in medians.items():
        goal_s = COMMANDS[name][1]
        line = f"{name:<20} {median_s:6.3f} s  over bare Python {median_s - bare_s:6.3f} s  x{median_s / bare_s:5.1f}"
        if goal_s is not None:
            are_met = are_met and median_s <= goal_s
            line += f"  goal {goal_s:.1f} s: {'met' if median_s <= goal_s else 'MISSED'}"
        print(line)
    return 0 if are_met else 1


if __name__ == "__main__":
    sys.exit(main())
