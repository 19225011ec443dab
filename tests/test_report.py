"""The page of a run: what is on it, what it links to, and runs of which parts are missing."""

import base64
import html.parser
import io
import json

import numpy as np
import pytest
from PIL import Image

from keras_dinov3 import cli, recipes
from keras_dinov3.report import MAX_TIMES, spread, write_report

EVIL = "<script>alert('x')</script>"


@pytest.fixture
def run(tmp_path):
    """The folder of a run with all its parts, some of them with hostile texts."""
    folder = tmp_path / "my <b>run"
    (folder / "pictures").mkdir(parents=True)
    recipe = recipes.get("tiny").suggest(640, batch_size=32, epochs=20, image_size=32)
    settings = {
        "command": f"keras-dinov3 pretrain --images '{EVIL}'",
        "recipe": recipe.get_config(),
        "images": "photos",
        "seed": 3,
        "environment": {"keras": "3.15.1", "cpu_cores": 2},
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    rows = [
        "epoch,knn,loss,rankme",
        *(f"{e},{0.2 + 0.01 * e},{3 - 0.1 * e},9.5" for e in range(20)),
    ]
    (folder / "log.csv").write_text("\n".join([*rows, "20,0."]))  # cut off
    alarm = {"kind": "flat_targets", "epoch": 2, "step": 40, "message": f"Try less. {EVIL}"}
    (folder / "alarms.jsonl").write_text(json.dumps(alarm) + '\n[1]\n{"kind": "one')
    results = {"knn": {"20": 0.4321}, "few_shot": {"10": {"mean": 0.25}}, "train": EVIL}
    (folder / "results.json").write_text(json.dumps(results))
    rng = np.random.default_rng(0)
    for epoch in range(0, 21, 2):
        image = Image.fromarray(rng.integers(0, 256, (40, 1200, 3), dtype="uint8"))
        image.save(folder / "pictures" / f"patch_pca_{epoch:06d}.png")
    image.save(folder / "pictures" / "crops.png")
    (folder / "pictures" / "attention_000000.png").write_bytes(b"\x89PNG cut off")
    return folder


class Page(html.parser.HTMLParser):
    """The tags, attributes and texts of a page; it must be well nested."""

    VOID = ("meta", "img", "input", "br", "link")

    def __init__(self, path):
        super().__init__()
        self.tags, self.links, self.open, self.texts = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
                self.links.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def test_the_page_says_all_and_asks_for_nothing(run):
    path = write_report(run)
    assert path == run / "report.html"
    page = Page(path)
    assert not {"script", "iframe", "link", "object"} & {tag for tag, _ in page.tags}
    for link in page.links:
        assert link.startswith(("data:image/webp;base64,", "#")), link[:80]
    source = path.read_text()
    assert "@import" not in source and "url(http" not in source and EVIL not in source
    for words in (
        "my <b>run",
        "flat_targets , epoch 2, step 40: Try less. " + EVIL,
        "k-NN 39 % first 20 %",
        "epochs 20",
        "knn 20 0.4321",
        "few_shot 10 mean 0.25",
        "model.num_prototypes 64 about one for 64 images",
        "keras 3.15.1",
        f"--images '{EVIL}'",
        "attention_000000.png cannot be read",
    ):
        assert words in page.text, words
    assert page.text.count("flat_targets") == 1
    assert [tag for tag, _ in page.tags].count("svg") == 1


def test_pictures_over_time(run):
    page = Page(write_report(run))
    labels = [a["for"] for tag, a in page.tags if tag == "label"]
    buttons = [a for tag, a in page.tags if tag == "input" and "patch_pca" in a["name"]]
    assert len(buttons) == MAX_TIMES and set(labels) >= {b["id"] for b in buttons}
    assert ["checked" in b for b in buttons] == [False] * (MAX_TIMES - 1) + [True]
    assert "epoch 0" in page.text and "epoch 20" in page.text
    pictures = [a for tag, a in page.tags if tag == "img"]
    assert len(pictures) == MAX_TIMES + 1  # and that of the crops
    for attributes in pictures:
        data = base64.b64decode(attributes["src"].split(",")[1])
        with Image.open(io.BytesIO(data)) as image:
            assert image.size == (900, 30) == (int(attributes["width"]), int(attributes["height"]))
        assert attributes["alt"]


def test_times_are_spread_over_the_run():
    assert spread(list(range(5)), 8) == [0, 1, 2, 3, 4]
    assert spread(list(range(101)), 5) == [0, 25, 50, 75, 100]


@pytest.mark.parametrize(
    "name, words",
    [
        ("settings.json", "There is no settings.json"),
        ("log.csv", "There is no log.csv"),
        ("alarms.jsonl", "No alarm was written"),
        ("results.json", "There is no results.json"),
        ("pictures", "There are no pictures"),
    ],
)
def test_what_is_missing_is_said(run, name, words):
    (run / name).rename(run / "gone")
    assert words in Page(write_report(run)).text


@pytest.mark.parametrize("name", ["settings.json", "log.csv", "alarms.jsonl", "results.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe\x00", b'{"recipe": 3}'])
def test_damaged_parts_do_not_stop_it(run, name, content):
    (run / name).write_bytes(content)
    page = Page(write_report(run))
    assert "Curves" in page.text and "Settings" in page.text


@pytest.mark.parametrize("name", ["settings.json", "log.csv", "alarms.jsonl", "results.json"])
def test_a_folder_in_the_place_of_a_file_does_not_stop_it(run, name):
    (run / name).unlink()
    (run / name).mkdir()
    page = Page(write_report(run))
    assert "Curves" in page.text and "No alarm" not in page.text.replace("No alarm was", "")


@pytest.mark.parametrize(
    "rows",
    [
        "epoch,loss\n0,1\n1,2,3,4",
        "epoch,loss\n0,1\n1," + "9" * 200_000,
        "epoch,loss\nzero,1",
        "epoch,loss\n0,1\n\x001,2",
    ],
    ids=["more fields than names", "an endless field", "no epoch", "a zero byte"],
)
def test_damaged_rows_do_not_stop_it(run, rows):
    (run / "log.csv").write_text(rows)
    assert "Curves" in Page(write_report(run)).text


def test_several_k_are_all_shown(run):
    (run / "log.csv").write_text("epoch,loss,knn_10,knn_20\n0,3,0.25,0.5\n1,2,0.3,0.6\n")
    page = Page(write_report(run))
    assert "k-NN 10 30 % first 25 %" in page.text and "k-NN 20 60 % first 50 %" in page.text
    assert "No k-NN was logged" not in page.text
    (run / "log.csv").write_text("epoch,loss\n0,3\n")
    assert "No k-NN was logged" in Page(write_report(run)).text


def test_alarms_say_no_more_than_is_known(run):
    (run / "alarms.jsonl").write_text('{"kind": "one')
    text = Page(write_report(run)).text
    assert "Damaged lines in alarms.jsonl that may have held alarms: 1" in text
    assert "No alarm" not in text


def test_odd_names_and_damaged_pictures(run):
    pictures = run / "pictures"
    (pictures / "a_².png").write_bytes(b"")
    whole = (pictures / "crops.png").read_bytes()
    (pictures / "2nd kind_000001.png").write_bytes(whole)
    (pictures / "broken_000001.png").write_bytes(whole[:40] + b"\x00" * 40 + whole[80:])
    path = write_report(run)
    assert "broken_000001.png cannot be read" in Page(path).text
    assert "#times_2nd_kind_0:checked" in path.read_text()  # no selector starts with a digit


def test_the_command(run, tmp_path, capsys):
    assert cli.main(["report", str(run), "--output", str(tmp_path / "page.html")]) == 0
    assert "page.html" in capsys.readouterr().out and Page(tmp_path / "page.html").text
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "none"):
        assert cli.main(["report", str(tmp_path / folder)]) == 2
        assert "must be the folder of a run" in capsys.readouterr().err
