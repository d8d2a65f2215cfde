"""Pictures of figures of merit, as PNG, whose title says what was found. They need matplotlib, of jaxlm[eval]."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np

from jaxlm.config.tasks import less_is_better
from jaxlm.errors import DataError
from jaxlm.evaluate import metrics
from jaxlm.evaluate.drawing import COLOURS, colours_of, digits, drawing, short, show_steps

PALE = "#BFE3F7"
GREY = "#C4C4C4"
FEW = 10  # examples, of which accuracy is mostly chance
WORST = 6  # curves that are shown in colour
READABLE = 16  # classes whose counts fit into the cells of a picture


def roc(path, scores_NC, labels_N, names: Sequence[str] | None = None) -> None:
    """ROC curves: of two classes that of class 1; of more, each against the rest, the 6 of the lowest AUC in colour.

    scores_NC: probabilities; labels_N: numbers of classes.
    """
    result = metrics.classification(scores_NC, labels_N, names)
    table = result["classes"]
    labels = np.asarray(labels_N)
    scores = np.asarray(scores_NC)
    known = [k for k, row in enumerate(table) if "auc" in row]
    if len(table) == 2:
        known = known[1:]
    known.sort(key=lambda k: table[k]["auc"])
    curve = metrics.library("sklearn.metrics").roc_curve
    with drawing(path, 5.6, 5.9) as (figure, set_title):
        axes = figure.add_subplot(aspect="equal", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
        for rank in reversed(range(len(known))):  # the worst above the others
            row = table[known[rank]]
            style = {"color": GREY, "linewidth": 0.7}
            if rank < WORST:
                label = f"{row['auc']:.3f}, class {short(row['name'])}"
                style = {"color": COLOURS[rank], "linewidth": 1.5, "label": label}
            x, y, _ = curve(labels == known[rank], scores[:, known[rank]])
            axes.plot(x, y, **style)
        axes.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=1, label="0.500 chance")
        axes.legend(title="AUC", loc="lower right", alignment="left")
        if known:
            set_title(f"AUC {result['auc']:.3f}{of_curves(table, len(known))}")
        else:
            only = short(table[int(labels[0])]["name"], 40)
            set_title(f"AUC is not defined: all are of the class {only}")
        axes.set(
            xlabel="false positive rate (of all negatives)",
            ylabel="true positive rate (of all positives)",
        )


def of_curves(table: Sequence[Mapping], shown: int) -> str:
    """What the AUC in a title is of: `shown` of the classes of this table have curves."""
    if len(table) == 2:
        return f" for the class {short(table[1]['name'], 40)}"
    text = f", mean of {shown} classes, each against the rest"
    if shown < len(table):
        text += f"; {len(table) - shown} absent"
    if shown > WORST:
        text += f"\nin colour: the {WORST} lowest"
    return text


def confusion(path, matrix: Sequence[Sequence[int]], names: Sequence[str] | None = None) -> None:
    """matrix[i][j]: examples of class i that were taken for class j. Colours are shares of each row."""
    counts = metrics.numbers("confusion", matrix, 2).astype(int)
    classes = len(counts)
    if names is None:
        names = range(classes)
    names = list(map(short, names))
    metrics.count(names=names, rows=counts, columns=counts.T)
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    few = classes <= READABLE
    size = 6
    cell = 0.14  # inches
    power = 0.5  # below 1, it makes small shares visible among many classes
    if few:
        size = 8
        cell = 0.5
        power = 1
    side = np.clip(classes * cell, 3, 14)
    room = 0.01 * size * max(map(len, names))  # inches of the longest name
    norm = metrics.library("matplotlib.colors").PowerNorm(power, 0, 100)
    with drawing(path, side + room + 1.6, side + room + 1.2) as (figure, set_title):
        axes = figure.add_subplot()
        picture = axes.imshow(shares, cmap="Blues", norm=norm, interpolation="nearest")
        figure.colorbar(
            picture, label="share of the true class (%)", shrink=0.6, fraction=0.04, aspect=30
        )
        every = range(0, classes, -(-classes // 100))
        axes.set_yticks(every, names[:: every.step], fontsize=size)
        upright = {"rotation": 0}
        if room > 0.8 * side / classes:  # wider than a cell: one name would run into the next
            upright = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(every, names[:: every.step], fontsize=size, **upright)
        if few:
            write_counts(axes, counts, shares)
        set_title(title_of_confusion(counts, names))
        axes.set(xlabel="predicted class", ylabel="true class")


def write_counts(axes, counts: np.ndarray, shares: np.ndarray) -> None:
    for (i, j), n in np.ndenumerate(counts):
        colour = "white" if shares[i, j] > 55 else "black"
        size = 8 if n < 1e5 else 6
        axes.text(j, i, f"{n:,}", ha="center", va="center", fontsize=size, color=colour)


def title_of_confusion(counts: np.ndarray, names: Sequence[str]) -> str:
    total = counts.sum()
    accuracy = f"accuracy {counts.trace() / max(total, 1):.1%} of {max(total, 1):,} examples"
    wrong = np.where(np.eye(len(counts)), 0, counts)
    if not wrong.any():
        return f"{accuracy}\nno mistakes"
    i, j = np.unravel_index(wrong.argmax(), wrong.shape)
    worst = f"most often {names[i]} is taken for {names[j]}: {wrong[i, j]:,} times"
    return f"{accuracy}\n{worst}"


def calibration(path, result: Mapping) -> None:
    """The reliability diagram of metrics.calibration's result, over the share of examples at each confidence."""
    bins = {}
    for key in result["bins"][0]:
        bins[key] = np.array([row[key] for row in result["bins"]])
    weights = bins["count"] / bins["count"].sum()
    place = (bins["low"] + bins["high"]) / 2
    width = bins["high"] - bins["low"]
    x = bins["confidence"]
    y = bins["accuracy"]
    sure = weights @ x
    right = weights @ y
    verdict = ""
    if sure > right + 0.01:
        verdict = ", overconfident"
    elif sure < right - 0.01:
        verdict = ", underconfident"
    with drawing(path, 5.6, 6.6) as (figure, set_title):
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        bars_style = {
            "color": np.where(bins["count"] < FEW, PALE, COLOURS[5]),
            "edgecolor": "white",
        }
        above.bar(place, y, width, label=f"accuracy (pale: under {FEW} examples)", **bars_style)
        above.vlines(x, np.minimum(x, y), np.maximum(x, y), color=COLOURS[1], label="gap")
        above.plot(
            [0, 1], [0, 1], color="black", linestyle=":", linewidth=1, label="accuracy = confidence"
        )
        figure.legend(loc="outside lower center", ncols=3)
        set_title(f"ECE {result['ece']:.1%}: confidence {sure:.1%}, accuracy {right:.1%}{verdict}")
        above.set(ylabel="accuracy (fraction)", xlim=(0, 1), ylim=(0, 1.02))
        below.bar(place, 100 * weights, width, color="grey", edgecolor="white")
        below.set(
            xlabel="confidence (probability of the prediction)",
            ylabel=f"% of {bins['count'].sum():,}",
        )


class Curve(NamedTuple):
    """One line of a picture of losses. steps, values: [N]; raw: [N], what was smoothed, or None."""

    key: str
    name: str
    colour: str | Sequence[float]
    steps: np.ndarray
    values: np.ndarray
    raw: np.ndarray | None


class Mark(NamedTuple):
    """What is circled: the point (step, height), what to call it in the legend, and what it shows."""

    step: float
    height: float
    label: str
    text: str


def losses(path, runs: str | PurePath | Sequence[tuple[str, str | PurePath]]) -> None:
    """Of a run's metrics.jsonl, or of [(name, path), ...]: training loss, smoothed over 2%, dashed validation loss.

    Circled is the step that eval.metric chooses (config.json beside the file), else the lowest loss. The title counts
    what is above the picture, such as the first steps of a long run. Raises DataError where no row has a finite loss.
    """
    if isinstance(runs, str | PurePath):
        runs = [("", runs)]
    runs = list(runs)
    curves = curves_of(runs)
    if not curves:
        files = ", ".join(str(file) for _, file in runs)
        raise DataError(f"{files}: no row has a finite loss; wait for the first")
    mark, notes = mark_of(runs, curves)
    low, high = limits(curves, mark)
    notes += beyond(curves, high)
    ring = {"color": "black", "fillstyle": "none", "markersize": 10}
    with drawing(path, 8, 5) as (figure, set_title):
        axes = figure.add_subplot(xlabel="step", ylabel="loss (nats)")
        for curve in curves:
            draw(axes, curve)
        axes.plot(mark.step, mark.height, "o", label=mark.label, **ring)
        set_title("\n".join([mark.text, *notes]))
        axes.set(xlim=(0, None), ylim=(low, high))
        show_steps(axes)
        if len(runs) > 3:
            figure.legend(loc="outside right upper")
        else:
            axes.legend(loc="best")


def of_run(name: str) -> str:
    """' of NAME', or '' for a run without a name, alone in its picture."""
    if name:
        return f" of {short(name)}"
    return ""


def path_of(file: str | PurePath) -> PurePath:
    """Of a file in a bucket as given."""
    if isinstance(file, str):
        return Path(file)
    return file


STYLES = {"loss": "-", "eval/loss": "--o"}


def curves_of(runs: Sequence[tuple[str, str | PurePath]]) -> list[Curve]:
    """Those that have values: of each run its training loss, then its validation loss."""
    curves = []
    for (run, file), shade in zip(runs, colours_of(len(runs))):
        of = of_run(run)
        steps, values = read(file, "loss")
        if len(steps):
            raw = None if run else values  # of several runs it would be a thicket
            curves.append(Curve("loss", f"training loss{of}", shade, steps, smooth(values), raw))
        steps, values = read(file, "eval/loss")
        if len(steps):
            colour = shade if run else COLOURS[1]
            curves.append(Curve("eval/loss", f"validation loss{of}", colour, steps, values, None))
    return curves


def smooth(values: np.ndarray) -> np.ndarray:
    """Means over a window of 2% of the values, shorter at the ends."""
    window = np.ones(len(values) // 50 | 1)
    total = np.convolve(values, window, "same")
    return total / np.convolve(np.ones(len(values)), window, "same")


def draw(axes, curve: Curve) -> None:
    if curve.raw is not None:
        axes.plot(curve.steps, curve.raw, color=curve.colour, alpha=0.25, linewidth=0.8)
    style = STYLES[curve.key]
    if len(curve.steps) == 1:
        style = "o"
    axes.plot(
        curve.steps, curve.values, style, color=curve.colour, markersize=3.5, label=curve.name
    )


def mark_of(
    runs: Sequence[tuple[str, str | PurePath]], curves: list[Curve]
) -> tuple[Mark, list[str]]:
    """The best step by the eval.metric of the runs, and notes; the lowest loss where that is not known."""
    used = {metric_of(file) for _, file in runs}
    metric = used.pop() if len(used) == 1 else "loss"
    if metric == "loss":
        return lowest(curves), []
    sign = 1 if less_is_better(metric) else -1
    found = []
    for run, file in runs:
        steps, values = read(file, f"eval/{metric}")
        if len(steps):
            place = (sign * values).argmin()
            found.append((values[place], steps[place], run))
    if not found:
        return lowest(curves), [f"no evaluation gave eval.metric={metric}"]
    value, step, run = min(found, key=lambda each: sign * each[0])
    of = of_run(run)
    text = f"best {metric} {value:.4g} at step {step:,.0f}"
    return Mark(step, height_at(curves, step, of), text, text + of), []


def metric_of(file: str | PurePath) -> str:
    """The eval.metric of the run whose metrics.jsonl this is; loss where its config is not there."""
    config = path_of(file).parent / "config.json"
    with suppress(OSError, ValueError, AttributeError):
        return json.loads(config.read_text()).get("eval.metric", "loss")
    return "loss"


def lowest(curves: list[Curve]) -> Mark:
    """Of the validation losses; of the training losses where there is no other."""
    of_validation = [curve for curve in curves if curve.key == "eval/loss"]
    curve = min(of_validation or curves, key=lambda curve: curve.values.min())
    place = curve.values.argmin()
    value = curve.values[place]
    step = curve.steps[place]
    return Mark(step, value, "lowest", f"lowest {curve.name}: {value:.4f}, at step {step:,.0f}")


def height_at(curves: list[Curve], step: float, of: str) -> float:
    """The loss of a run at a step: in validation where it is there, else in training."""
    own = []
    exact = []
    for name in (f"validation loss{of}", f"training loss{of}"):
        for curve in curves:
            if curve.name == name:
                own.append(curve)
                exact += [curve] * (step in curve.steps)
    curve = (exact or own or curves)[0]
    return float(np.interp(step, curve.steps, curve.values))


def limits(curves: list[Curve], mark: Mark) -> tuple[float, float]:
    """Of the losses shown. In a long run the first 3% may be above, which would flatten the rest."""
    top = mark.height
    least = np.inf
    for curve in curves:
        most = 0.97 if len(curve.values) > 50 else 1
        top = max(top, np.quantile(curve.values, most))
        least = min(least, drawn(curve).min())
    margin = max(top - least, 0.1)
    return least - 0.05 * margin, top + 0.1 * margin


def drawn(curve: Curve) -> np.ndarray:
    """All values of a curve that are seen."""
    if curve.raw is None:
        return curve.values
    return np.append(curve.values, curve.raw)


def beyond(curves: list[Curve], high: float) -> list[str]:
    """A note on the losses that are off the picture, if any are."""
    above = 0
    most = (high, 0.0)
    for curve in curves:
        values = curve.values if curve.raw is None else curve.raw
        above += int(np.sum(values > high))
        most = max(most, (values.max(), curve.steps[values.argmax()]))
    if not above:
        return []
    values = "1 value" if above == 1 else f"{above:,} values"
    return [
        f"off the picture: {values} above {high:.4g}, up to {most[0]:.4g} at step {most[1]:,.0f}"
    ]


class Curves(NamedTuple):
    """Losses of a run at its evaluations, in nats; of training NaN where none is known."""

    label: str
    steps_N: np.ndarray
    train_N: np.ndarray
    val_N: np.ndarray
    stopped: bool  # early, at the last of these steps


MARKS = {  # of `fitting`: what a line or a marker means
    "training loss": {"linestyle": "--"},
    "validation loss": {"linestyle": "-"},
    "lowest validation loss": {"linestyle": "", "marker": "o", "markersize": 8},
    "stopped early": {"linestyle": "", "marker": "X", "markersize": 8},
}


def fitting(path, runs: Sequence[Curves], headline: str) -> None:
    """Runs of several sizes: training loss dashed, validation loss solid, the lowest and where it stopped marked."""
    line = metrics.library("matplotlib.lines").Line2D
    height = max(5, 1.8 + 0.33 * len(runs))  # inches, of the legend
    with drawing(path, 9, height) as (figure, set_title):
        axes = figure.add_subplot(xlabel="step", ylabel="loss (nats)", ymargin=0.06)
        legend = []
        for run, colour in zip(runs, colours_of(len(runs))):
            best = run.val_N.argmin()
            known = np.isfinite(run.train_N)
            axes.plot(run.steps_N[known], run.train_N[known], "--", color=colour, linewidth=1.2)
            axes.plot(run.steps_N, run.val_N, "-", color=colour, linewidth=1.6)
            axes.plot(run.steps_N[best], run.val_N[best], "o", color=colour, markersize=8, zorder=3)
            if run.stopped:
                axes.plot(run.steps_N[-1], run.val_N[-1], "X", color=colour, markersize=9, zorder=3)
            legend.append(line([], [], color=colour, linewidth=4, label=run.label))
        stopped = any(run.stopped for run in runs)
        for name, style in MARKS.items():
            if stopped or name != "stopped early":
                legend.append(line([], [], color="dimgrey", label=name, **style))
        axes.legend(handles=legend, loc="upper left", bbox_to_anchor=(1.01, 1))
        set_title(headline)
        axes.set_xlim(0, None)
        show_steps(axes)


def read(file: str | PurePath, key: str) -> np.ndarray:
    """[2, N]: steps and finite values of a key in metrics.jsonl. NaN is a text there; a crash may cut a row short.

    Raises DataError where the file can't be read.
    """
    steps = []
    values = []
    try:
        text = path_of(file).read_text()
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; give the metrics.jsonl of a run") from None
    for line in text.splitlines():
        with suppress(ValueError, KeyError):
            row = json.loads(line)
            value = float(row[key])
            step = row["step"]
            if np.isfinite(value):
                steps.append(step)
                values.append(value)
    return np.array([steps, values], float)


def bars(path, named_values: Mapping[str, float], label: str) -> None:
    """A bar for each name, in their order; `label` says what the values are, and in what unit."""
    names = [short(name, 32) for name in named_values]
    values = metrics.numbers(label, list(named_values.values()), 1)
    written = [f" {digits(value)} " for value in values]
    low = f"{written[values.argmin()]}({names[values.argmin()]})"
    high = f"{written[values.argmax()]}({names[values.argmax()]})"
    with drawing(path, 7, 1.2 + 0.26 * len(names)) as (figure, set_title):
        axes = figure.add_subplot(xlabel=label, xmargin=0.12)
        drawn_bars = axes.barh(range(len(names)), values, color=COLOURS[0])
        axes.bar_label(drawn_bars, written, fontsize=8)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.xaxis.set_major_formatter("{x:,.6g}")
        if len(names) > 1:
            set_title(f"{label}: from{low} to{high}")
        else:
            set_title(f"{label}:{low}")


def growth(
    path, name: str, sizes: Sequence[float], milliseconds: Sequence[float], flops: Sequence[float]
) -> None:
    """A step's time against what it grows with, both axes logarithmic, beside the growth of its FLOPs."""
    sizes = np.array(sizes, float)
    times = np.array(milliseconds, float)
    flops = np.array(flops, float)
    excess = (times[1:] / times[:-1]) / (flops[1:] / flops[:-1]) - 1
    most = excess.max(initial=0)
    if most > 0:
        verdict = f"up to {most:.0%} faster than FLOPs"
    else:
        verdict = "no faster than FLOPs"
    expected = times[-1] * flops / flops[-1]
    with drawing(path, 5.6, 4.4) as (figure, set_title):
        axes = figure.add_subplot(xlabel=name, ylabel="step (ms)", xscale="log", yscale="log")
        axes.plot(sizes, times, "-o", color=COLOURS[0], markersize=4, label="measured")
        axes.plot(sizes, expected, ":", color="black", label="as its FLOPs, from the largest")
        axes.set_xticks(sizes, list(map("{:,.0f}".format, sizes)))
        axes.minorticks_off()
        axes.set_yticks(times, [digits(time, 3) for time in times])
        axes.legend(loc="upper left")
        set_title(f"{name}: time grows {verdict}")
