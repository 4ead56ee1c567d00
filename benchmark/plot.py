"""Plots as PNG files.

What it does: lets gnuplot draw panels side by side, their x axis logarithmic. What it does not:
know what is measured.

Invariant: the background is opaque and light, so a plot can be read on a dark page as well.
"""

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tools.process import SetupError

PANEL_PIXELS = (560, 400)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#888888", "#cc79a7")  # told apart by the colour-blind


class Panel(NamedTuple):
    """What is drawn over x: points for each line, by its name."""

    y_label: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


def require() -> None:
    """Raise SetupError if nothing can be drawn here."""
    if shutil.which("gnuplot") is None:
        raise SetupError(
            "gnuplot draws the plots and is not installed. On Debian or Ubuntu: "
            "tools/bootstrap --packages gnuplot-nox fonts-dejavu-core"
        )


def draw(file: Path, x_label: str, panels: Sequence[Panel]) -> None:
    """Draw the panels into a PNG file."""
    width, height = PANEL_PIXELS[0] * len(panels), PANEL_PIXELS[1]
    script = [
        f'set terminal pngcairo size {width},{height} font "DejaVu Sans,11" background "#ffffff"',
        f'set output "{file}"',
        f"set multiplot layout 1,{len(panels)}",
        'set logscale x; set format x "%.0s%c"; set grid lc "#dddddd"; set border 3',
        "set tics nomirror; set yrange [0:*]; set offsets graph 0, 0, graph 0.1, 0",
        "set key above; set rmargin 3",
        f'set xlabel "{x_label}"',
    ]
    number = 0
    for panel in panels:
        plots = []
        for line, (label, points) in enumerate(panel.lines.items()):
            script += [f"$line{number} << end", *(f"{x} {y}" for x, y in points), "end"]
            colour = COLOURS[line % len(COLOURS)]
            plots.append(f'$line{number} with linespoints lw 2 pt 7 lc "{colour}" title "{label}"')
            number += 1
        script += [f'set ylabel "{panel.y_label}"', f"plot {', '.join(plots)}"]
    done = subprocess.run(
        ["gnuplot"], input="\n".join(script) + "\n", capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"gnuplot: {done.stderr.strip()}")
