"""The figures of a report as SVG data URIs, drawn by matplotlib, which is an extra.

Lines differ by shade, marker and dash, so that they are told apart without colour.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from hf_lowrank.errors import ConfigError
from hf_lowrank.report.layers import by_type
from hf_lowrank.report.schema import Report
from hf_lowrank.report.spectra import shown_components

MAX_LINES = 12
Size = tuple[float, float]
_INK, _SOFT = "#2f5d82", "#565e66"
_NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))
_SETTINGS: Any = {
    "font.family": ["DejaVu Sans", "sans-serif"],
    "svg.fonttype": "none",
    "svg.hashsalt": "hf_lowrank",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _SOFT,
    "axes.grid": True,
    "grid.color": "#e4e6e1",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def require_matplotlib() -> None:
    """Refuses where the figures can't be drawn.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if not can_draw():
        raise ConfigError(
            "report.html needs matplotlib for its figures: pip install 'hf-lowrank[plots]'."
        )


def spectra_figures(report: Report) -> dict[str, str]:
    """One figure for each layer type: price (or singular value) by component, the cut marked.

    Of each type at most `MAX_LINES` layers are drawn, evenly over the depth, light to dark.
    """
    drawn = {}
    for kind, names in by_type(report.spectra).items():
        step = max(1, -(-len(names) // MAX_LINES))
        chosen = names[::step]
        drawn[kind] = _draw(_draw_spectra, report, chosen, kind, size=(4.0, 3.0))
    return drawn


def probes_figure(report: Report) -> str:
    """The search's probes: predicted and measured rise of the loss by kept share."""
    return _draw(_draw_probes, report, size=(5.4, 3.4))


def size_quality_figure(curves: Mapping[Size, Sequence[tuple[str, float, float]]]) -> str:
    """Perplexity by size.

    Args:
        curves: (label, megabytes, perplexity) of compressed models, by (megabytes, perplexity) of
            the dense model that they come from.
    """
    return _draw(_draw_sizes, curves, size=(5.4, 3.6))


def _draw(draw: Any, *arguments: Any, size: tuple[float, float]) -> str:  # noqa: ANN401
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_SETTINGS):
        drawing = Figure(figsize=size)
        axes = drawing.add_axes((0.15, 0.17, 0.82, 0.74))
        draw(axes, *arguments)
        target = io.StringIO()
        drawing.savefig(target, format="svg", transparent=True, metadata=_NO_METADATA)
    svg = target.getvalue()
    data = base64.b64encode(svg[svg.index("<svg") :].encode()).decode()
    return f"data:image/svg+xml;base64,{data}"


def _draw_spectra(axes: Any, report: Report, names: Sequence[str], kind: str) -> None:  # noqa: ANN401
    has_prices = all(report.spectra[name].price_scale for name in names)
    for place, name in enumerate(names):
        found = report.spectra[name]
        components = shown_components(min(found.shape))
        scale = found.price_scale if has_prices else None
        values = [s if scale is None else s * s * scale for s in found.sigma]
        depth = place / max(1, len(names) - 1)
        shade = str(round(0.72 * (1 - depth), 3))
        axes.plot([c + 1 for c in components], values, color=shade, linewidth=0.9)
        rank = report.ranks.get(name)
        if rank is not None:
            height = _between(components, values, rank - 1)
            axes.plot(
                [rank], [height], "o", markersize=5, color=_INK, markeredgecolor="white", zorder=3
            )
    positive = [line for line in axes.get_lines() if any(y > 0 for y in line.get_ydata())]
    if positive:
        axes.set_yscale("log")
    unit = "price (nats)" if has_prices else "singular value"
    axes.set_title(f"{kind}: {unit}", loc="left", fontsize=10)
    axes.set_xlabel("component")


def _between(components: Sequence[int], values: Sequence[float], at: int) -> float:
    """The value at a component, straight between its drawn neighbours."""
    for i in range(1, len(components)):
        left, right = components[i - 1], components[i]
        if left <= at <= right:
            share = (at - left) / (right - left)
            return values[i - 1] * (1 - share) + values[i] * share
    return values[-1]


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _draw_probes(axes: Any, report: Report) -> None:  # noqa: ANN401
    probes = [probe for probe in report.probes if _is_finite(probe.measured)]
    probes.sort(key=lambda probe: probe.param_ratio)
    shares = [100 * probe.param_ratio for probe in probes]
    errors = [e if _is_finite(e := probe.standard_error) else 0.0 for probe in probes]
    axes.errorbar(
        shares,
        [probe.measured for probe in probes],
        yerr=errors,
        color=_INK,
        marker="o",
        linewidth=1.2,
        capsize=3,
        label="measured",
    )
    predicted = [
        (share, probe.predicted)
        for share, probe in zip(shares, probes, strict=True)
        if _is_finite(probe.predicted)
    ]
    if predicted:
        axes.plot(
            *zip(*predicted, strict=True),
            color=_SOFT,
            marker="s",
            markerfacecolor="white",
            linestyle="--",
            linewidth=1.2,
            label="predicted",
        )
    tolerance = report.config.loss_tolerance
    if tolerance is not None:
        axes.axhline(tolerance, color="black", linewidth=0.9, linestyle=":", label="tolerance")
    axes.set_xlabel("kept share of the targeted parameters (%)")
    axes.set_ylabel("rise of the loss (nats/token)")
    axes.legend()


def _draw_sizes(
    axes: Any,  # noqa: ANN401
    curves: Mapping[Size, Sequence[tuple[str, float, float]]],
) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    for number, (dense, points) in enumerate(curves.items()):
        line = sorted([dense, *((size, value) for _, size, value in points)])
        style = ("-", "--", ":", "-.")[number % 4]
        axes.plot(*zip(*line, strict=True), style, color=_INK, linewidth=1.2)
        for label, size, value in points:
            axes.plot([size], [value], "o", color=_INK)
            axes.annotate(
                label, (size, value), xytext=(6, 5), textcoords="offset points", fontsize=9
            )
        axes.plot(*dense, "s", color="black", markerfacecolor="white", zorder=3)
        axes.annotate("dense", dense, xytext=(-4, 7), textcoords="offset points", fontsize=9)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("size (MB)")
    axes.set_ylabel("perplexity (log scale)")
    axes.margins(0.14)
