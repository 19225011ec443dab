"""One self-contained HTML page of a run: what was set, how it went, what the features show."""

import base64
import html
import io
import json
import pathlib
import re

from PIL import Image

from keras_dinov3.curves import read_history, training_curves

MAX_TIMES = 8  # pictures of a kind, spread over the run
MAX_WIDTH = 900  # pixels of a picture
TITLES = {
    "patch_pca": "Patch features as colours",
    "similarity": "Similarity with one patch",
    "attention": "Attention of the class token",
    "norms": "Lengths of tokens",
}
# Follows the reader's light or dark setting; on paper all pictures are shown.
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
td, th { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
img, svg { max-width: 100%; height: auto; background: white; border-radius: 4px; }
pre { background: var(--soft); padding: .6rem; overflow-x: auto; white-space: pre-wrap; }
.big { display: flex; flex-wrap: wrap; gap: 1rem; padding: 0; list-style: none; }
.big li { background: var(--soft); border-radius: 6px; padding: .6rem 1rem; }
.big b { display: block; font-size: 1.5rem; }
.alarm { border-left: 4px solid #d33; padding-left: .8rem; }
.times input { position: absolute; opacity: 0; }
.times label { display: inline-block; padding: .2rem .7rem; border: 1px solid var(--line);
  border-radius: 4px; margin: 0 .2rem .4rem 0; cursor: pointer; }
.times input:checked + label { background: #3572; border-color: #357; }
.times input:focus-visible + label { outline: 2px solid #357; }
.times figure { display: none; margin: 0; }
@media print { .times figure { display: block !important; } .times label { display: none; } }
"""


def write_report(run_dir, path=None):
    """Writes the page of a run, which opens offline and links to nothing.

    Args:
        run_dir: Folder as `keras-dinov3 pretrain` leaves it. Of settings.json, log.csv,
            alarms.jsonl, results.json (of `keras-dinov3 evaluate`) and pictures/ any may be missing
            or cut off; the page says so.
        path: Path of the page. `None`: report.html in the folder.

    Returns:
        The path.

    Raises:
        ValueError: If there is nothing of a run in the folder.
        ImportError: If Matplotlib is missing.
    """
    folder = pathlib.Path(run_dir)
    if not any((folder / name).exists() for name in ("settings.json", "log.csv")):
        raise ValueError(
            f"{folder} must be the folder of a run, with settings.json or log.csv in it. "
            "`keras-dinov3 pretrain --output` makes one."
        )
    settings, results = (read_json(folder / f"{name}.json") for name in ("settings", "results"))
    name = folder.resolve().name
    page = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{text(name)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{text(name)}</h1>",
        *summary(folder),
        *section("Alarms", alarms(folder / "alarms.jsonl")),
        *section("Curves", curves(folder / "log.csv")),
        *section("Evaluation", evaluation(results)),
        *section("Pictures over time", pictures(folder / "pictures")),
        *section("Settings", described(settings)),
        *section("Environment", environment(settings)),
        "</body></html>",
    ]
    path = folder / "report.html" if path is None else pathlib.Path(path)
    path.write_text("\n".join(page), encoding="utf-8")
    return path


def section(title, lines):
    """A heading and what is below it, or that there is nothing."""
    return [f"<section><h2>{text(title)}</h2>", *lines, "</section>"]


def summary(folder):
    """The numbers that one looks at first."""
    try:
        epochs, series = read_history(folder / "log.csv")
    except (OSError, ValueError):
        return []
    if not len(epochs):
        return []
    items = [("epochs", f"{epochs[-1]}")]
    shown = [(name, name.replace("knn", "k-NN"), 100, " %") for name in knn_names(series)]
    shown += [
        ("linear_probe", "linear probe", 100, " %"),
        ("rankme", "RankMe", 1, ""),
        ("loss", "loss", 1, ""),
    ]
    for name, what, scale, unit in shown:
        if name in series:
            values = [value for value in series[name] if value == value]
            first, last = values[0], values[-1]
            what = what.replace("_", " ")
            items.append((what, f"{scale * last:.4g}{unit}", f"first {scale * first:.4g}{unit}"))
    cells = [
        f"<li>{text(what)}<b>{text(value)}</b>{''.join(map(text, more))}</li>"
        for what, value, *more in items
    ]
    return ['<ul class="big">', *cells, "</ul>"]


def alarms(path):
    """What fired; and what is not known of it, since a silent monitor and none leave one file."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return ["<p>No alarm was written. A run without `CollapseMonitor` has none either.</p>"]
    except OSError as error:
        return [f"<p>alarms.jsonl could not be read: {text(error)}</p>"]
    found, damaged = [], 0
    for line in filter(str.strip, lines):
        try:
            alarm = json.loads(line)
        except ValueError:  # cut off
            alarm = None
        if isinstance(alarm, dict):
            found.append(alarm)
        else:
            damaged += 1
    page = [
        f'<p class="alarm"><b>{text(alarm.get("kind", "alarm"))}</b>, epoch '
        f"{text(alarm.get('epoch', '?'))}, step {text(alarm.get('step', '?'))}: "
        f"{text(alarm.get('message', ''))}</p>"
        for alarm in found
    ]
    if damaged:
        page.append(f"<p>Damaged lines in alarms.jsonl that may have held alarms: {damaged}.</p>")
    return page or ["<p>alarms.jsonl is empty.</p>"]


def knn_names(series):
    """Of the logged values those of `KNN`: one, or one for each k."""
    return [name for name in series if name.split("_")[0] == "knn"]


def curves(path):
    if not path.exists():
        return ["<p>There is no log.csv.</p>"]
    try:
        figure = training_curves(path)
    except (OSError, ValueError) as error:
        return [f"<p>The curves could not be drawn: {text(error)}</p>"]
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)  # it names addresses
    missing = [] if knn_names(read_history(path)[1]) else ["<p>No k-NN was logged.</p>"]
    return [svg, *missing]


def evaluation(results):
    if not results:
        return [
            "<p>There is no results.json. <code>keras-dinov3 evaluate --backbone RUN_DIR --train "
            "DIR --test DIR --output RUN_DIR/results.json</code> writes it.</p>"
        ]
    rows = [(name, number(value)) for name, value in flat(results).items()]
    return table(("what", "value"), rows)


def pictures(folder):
    """The kinds of pictures, each at several times of the run, to be flipped through."""
    lines, times = [], {}
    if (folder / "crops.png").exists():
        picture = embedded(folder / "crops.png", "crops")
        lines += ["<h3>What the student is shown</h3>", picture]
    for path in sorted(folder.glob("*_*.png")):
        kind, _, epoch = path.stem.rpartition("_")
        if re.fullmatch("[0-9]+", epoch):
            times.setdefault(kind, []).append((int(epoch), path))
    for kind, shown in times.items():
        shown = spread(shown, MAX_TIMES)
        title = TITLES.get(kind, kind)
        group = "times_" + re.sub(r"[^A-Za-z0-9]", "_", kind)
        buttons, figures, rules = [], [], []
        for index, (epoch, path) in enumerate(shown):
            key = f"{group}_{index}"
            checked = " checked" if index == len(shown) - 1 else ""
            buttons.append(
                f'<input type="radio" name="{group}" id="{key}"{checked}>'
                f'<label for="{key}">epoch {epoch}</label>'
            )
            caption = f"<figcaption>epoch {epoch}</figcaption>"
            picture = embedded(path, f"{title}, epoch {epoch}")
            figures.append(f'<figure class="{key}">{picture}{caption}</figure>')
            rules.append(f"#{key}:checked ~ .{key} {{ display: block; }}")
        lines += [
            f"<h3>{text(title)}</h3>",
            f"<style>{' '.join(rules)}</style>",
            '<div class="times">',
            *buttons,
            *figures,
            "</div>",
        ]
    return lines or ["<p>There are no pictures.</p>"]


def spread(items, count):
    """The first, the last, and evenly between."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def embedded(path, description):
    """A picture inside the page, no wider than it is shown."""
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
    except Exception:  # Pillow raises nearly every type
        return f"<p>{text(path.name)} cannot be read.</p>"
    if image.width > MAX_WIDTH:
        height = max(round(image.height * MAX_WIDTH / image.width), 1)
        image = image.resize((MAX_WIDTH, height), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=80)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    return (
        f'<img src="data:image/webp;base64,{data}" alt="{text(description)}" '
        f'width="{image.width}" height="{image.height}">'
    )


def described(settings):
    if not settings:
        return ["<p>There is no settings.json.</p>"]
    lines = []
    if settings.get("command"):
        lines.append(f"<pre>{text(settings['command'])}</pre>")
    recipe = settings.get("recipe")
    recipe = recipe if isinstance(recipe, dict) else {}
    if recipe.get("summary"):
        lines.append(f"<p>Recipe {text(recipe.get('name'))}: {text(recipe['summary'])}.</p>")
    reasons = recipe.get("reasons")
    reasons = reasons if isinstance(reasons, dict) else {}
    plan = recipe.get("plan") if isinstance(recipe.get("plan"), dict) else {}
    others = {
        name: value for name, value in settings.items() if name not in ("recipe", "environment")
    }
    others.pop("command", None)
    rows = [(name, json.dumps(value), "") for name, value in (others | plan).items()]
    sections = recipe.get("settings")
    for part, values in sections.items() if isinstance(sections, dict) else ():
        for name, value in values.items() if isinstance(values, dict) else ():
            key = f"{part}.{name}"
            rows.append((key, json.dumps(value), reasons.get(key, "")))
    return lines + table(("setting", "value", "why"), rows)


def environment(settings):
    found = (settings or {}).get("environment")
    if not isinstance(found, dict) or not found:
        return ["<p>Nothing is known of it.</p>"]
    return table(("what", "version or value"), list(found.items()))


def table(names, rows):
    head = "".join(f"<th>{text(name)}</th>" for name in names)
    lines = ["<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return [
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>',
        *lines,
        "</tbody></table></div>",
    ]


def flat(tree, above=""):
    """A nested dict as one level, names joined by spaces."""
    found = {}
    for name, value in tree.items():
        name = f"{above} {name}".strip()
        found |= flat(value, name) if isinstance(value, dict) else {name: value}
    return found


def number(value):
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value)


def read_json(path):
    """The object in a file; `{}` if it is not there, damaged or none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def text(value):
    return html.escape(str(value))
