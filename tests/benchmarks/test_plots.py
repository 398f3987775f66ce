"""Pictures show what is compared."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from benchmarks.lib import plots


def test_only_the_fastest_unclipped_step_is_a_line() -> None:
    names = {"ours": "ours", "slow": "unclipped", "fast": "unclipped", "copy": "copy"}
    rows = pd.DataFrame({"implementation": names.keys(), "role": names.values()})
    ax = Figure().subplots()
    plots.draw_bars(ax, rows.assign(device_ms=[4, 3, 2, 1], p20_ms=1, p80_ms=5), "rmsprop")
    assert ax.get_legend_handles_labels()[1] == ["fast: 2", "copy: 1"]
