"""report.html from the files of a run directory: what is in it, what may be missing, and what is refused."""

import base64
import html.parser
import json
import re
import struct

import pytest

import clm.report
import mlm.report
from clm.report import texts
from espalier import cli
from espalier.commands.report import ReportConfig, main
from espalier.errors import UserError
from espalier.report import render, tables
from espalier.report.figures import PALETTES, Bar, Curve, draw, legend
from espalier.report.page import entries, settings, shortened
from espalier.report.render import write_report
from espalier.report.style import STYLE
from finetune.tasks.classify import report as classify_report
from finetune.tasks.classify.report import confusion_table
from mlm.report import masked_words

CONFIG = {"task": "masked_lm", "steps": 40, "init_from": None, "optimizer": {"learning_rate": 0.0003, "name": "adamw"}}
METRICS = [{"step": step, "loss": 7.0 - step / 10, "learning_rate": 1e-3} for step in range(1, 41)] + [
    {"step": 20, "eval/loss": 5.25, "eval/accuracy": 0.25},
    {"step": 40, "eval/loss": 3.5, "eval/accuracy": 0.5},
]
SUMMARY = {
    "step": 40,
    "finished": True,
    "eval": {"loss": 3.5, "accuracy": 0.5, "perplexity": 33.1},
    "tokens": 163840,
    "tokens_per_second": 15234.6,
    "mfu": None,
    "environment": {"jax": "0.10.1", "devices": "8 × cpu"},
}
SAMPLES = {
    "unigram_entropy": 6.125,
    "samples": [
        {
            "tokens": [" [CLS]", " a", " [MASK]", "s", " <b>", " [MASK]"],
            "masked": [
                {"index": 2, "truth": " robin", "guesses": [[" robin", 0.75], [" wren", 0.002]]},
                {"index": 5, "truth": " sings", "guesses": [[" flies", 0.5], [" sings", 0.25]]},
            ],
        }
    ],
}
CONFUSION = {"labels": ["yes & no", "maybe"], "matrix": [[3, 1], [0, 6]]}
PREDICTIONS = [
    {"text": "fine <script>", "label": "maybe", "prediction": "maybe", "probability": 0.9},
    {"text": "odd <script>", "text_b": "second", "label": "maybe", "prediction": "yes & no", "probability": 0.8},
    {"text": "odder \u2028 \x85 still", "label": "yes & no", "prediction": "maybe", "probability": 0.95},
]


class Page(html.parser.HTMLParser):
    """The page as its elements, its text, and its pictures."""

    VOID = {"meta", "img", "source", "br"}

    def __init__(self, path):
        super().__init__()
        self.elements, self.text, self.open, self.links = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open, f"never closed: {self.open}"
        self.words = re.sub(r"\s+", " ", " ".join(self.text)).replace("\u202f", " ")
        self.words = self.words.replace("\u2068", "").replace("\u2069", "")

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.links += [value for name, value in attrs if name in ("src", "srcset", "href", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    def pictures(self):
        return [attrs["alt"] for tag, attrs in self.elements if tag == "img"]


@pytest.fixture
def drawings():
    """For tests that look at the pictures themselves."""


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """Elsewhere none is drawn: that takes most of the time."""
    if "drawings" not in request.fixturenames:
        monkeypatch.setattr(render, "draw", lambda curves, label, **form: ("", ""))


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "walk"
    folder.mkdir()
    write(folder, config=CONFIG, summary=SUMMARY, samples=SAMPLES)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in METRICS))
    return folder


def write(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_a_pretraining_run_shows_what_happened(run):
    page = Page(write_report(run))
    for words in (
        "walk", "Masked language model. Finished at step 40 of 40.", "held-out loss 3.500", "perplexity 33.1",
        "held-out accuracy 50.0 %", "163,840", "15,235", "green if the model's first guess is right (1 of 2)",
        "flies 50 %", "sings 25 %", "wren <1 %", "learning_rate 0.0003", "8 × cpu",
    ):  # fmt: skip
        assert words in page.words, words
    loss = next(alt for alt in page.pictures() if alt.startswith("nats per masked token"))
    assert "training 3" in loss and "held-out 3.5" in loss
    assert [attrs["class"] for tag, attrs in page.elements if tag == "mark"] == ["right", "wrong"] * 2
    assert (run / "report.html").read_text().count(mlm.report.STYLE) == 1
    # Pieces of words are joined to what is before them, and what looks like HTML in a text is text.
    assert "robin s <b> sings" in page.words


def test_the_page_needs_nothing_but_itself(run, drawings):
    page = Page(write_report(run))
    # A click may lead to the page of all runs, which is not loaded.
    loaded = [link for link in page.links if link != "../runs.html"]
    assert loaded and all(link.startswith("data:image/png;base64,") for link in loaded)
    for link in loaded:
        png = base64.b64decode(link.partition(",")[2])
        assert png[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", png[16:24])
        assert width > 500 and height > 300
    dark = [attrs for tag, attrs in page.elements if tag == "source" and "34rem" not in attrs["media"]]
    assert len(dark) == len(page.pictures()) and all("dark" in attrs["media"] for attrs in dark)
    assert not re.search("https?:", (run / "report.html").read_text().replace(base64_of(page), ""))
    assert not list(run.glob(".report*"))


def base64_of(page):
    return "|".join(page.links)


def test_a_classifier_shows_its_confusions_and_most_confident_mistakes(run):
    config = CONFIG | {"task": "sequence_classification", "labels": CONFUSION["labels"], "init_from": "runs/demo"}
    metrics = {"accuracy": 0.9, "f1": 0.875, "matthews": 0.79, "majority": 0.6}
    write(run, config=config, summary=SUMMARY | {"metrics": metrics}, confusion=CONFUSION, samples={})
    lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in PREDICTIONS)
    (run / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")
    page = Page(write_report(run))
    assert "The most confident of 2 mistakes in 3 predictions" in page.words
    assert "Classifier with 2 labels, from the weights of runs/demo." in page.words
    assert "accuracy 90.0 % majority class 60.0 % F1 of maybe 87.5 % Matthews 0.790" in page.words
    assert "10 held-out examples" in page.words and "75 %" in page.words and "100 %" in page.words
    assert page.words.index("yes & no, predicted maybe 95 %") < page.words.index("maybe, predicted yes & no 80 %")
    assert "odd <script> / second" in page.words and "fine" not in page.words
    assert "script" not in [tag for tag, _ in page.elements]


def test_runs_and_baselines_side_by_side(run):
    for name, accuracy in (("tuned", 0.84), ("raw", 0.41)):
        (run / name).mkdir()
        write(run / name, config=CONFIG | {"task": "sequence_classification"}, confusion=CONFUSION)
        lines = [{"step": 5, "loss": 1.0}, {"step": 5, "eval/accuracy": accuracy}]
        (run / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [
        {"name": "pretrained", "note": "from this run", "value": 0.84, "run": "tuned"},
        {"name": "scratch", "value": 0.41, "run": "raw"},
        {"name": "majority", "value": 0.125},
    ]
    write(run, comparison={"title": "What it is worth", "note": "On 80 examples.", "rows": rows})
    page = Page(write_report(run))
    assert (
        "What it is worth On 80 examples. pretrained from this run 84.0 % scratch 41.0 % majority 12.5 %" in page.words
    )
    assert "held-out accuracy over the steps; last: pretrained 0.84, scratch 0.41" in page.pictures()
    assert "Confusion matrix: pretrained" in page.words and "Confusion matrix: scratch" not in page.words
    widths = re.findall(r"width:([\d.]+)%'", (run / "report.html").read_text())
    assert widths == ["84.0", "41.0", "12.5"]


def test_whatever_is_there_is_enough(tmp_path):
    write(tmp_path, config={"task": "causal_lm", "steps": 9})
    assert "Causal language model. Not finished." in Page(write_report(tmp_path)).words
    # A line that was cut off while it was written, and numbers that no curve can show.
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": 4.5}\n{"step": 3, "lo')
    write(tmp_path, samples={"texts": ["Once <upon>", ""]}, summary={"step": 2, "finished": False, "tokens": 64})
    page = Page(write_report(tmp_path))
    assert "Paused at step 2 of 9." in page.words and "Once <upon>" in page.words and "(nothing)" in page.words
    assert page.pictures() == ["nats per token over the steps; last: training 4.5"]


def test_a_task_that_is_not_known_here_has_all_but_its_own_section(run):
    """A user's own objective: its metrics are drawn like ours, those that say the same as another are not."""
    write(run, config=CONFIG | {"task": "mine"}, summary=SUMMARY | {"eval": {"loss": 2.0, "words_found": 0.25}})
    lines = [{"step": 2, "loss": 1.0, "found": 0.5, "mfu": 0.4}, {"step": 2, "eval/loss": 2.0, "eval/found": 0.25}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(write_report(run))
    assert "Run. Finished at step 40 of 40. held-out loss 2.000 held-out words found 0.25" in page.words
    assert "Masked words" not in page.words
    assert page.pictures() == [
        "nats per example over the steps; last: training 1, held-out 2",
        "found over the steps; last: training 0.5, held-out 0.25",
    ]


def many_words(count):
    """A sample with `count` masked words."""
    masked = [{"index": at, "truth": f" word{at}", "guesses": [[" guess", 0.5]]} for at in range(count)]
    return {"tokens": [" [MASK]"] * count, "masked": masked}


@pytest.mark.parametrize(("words", "folded"), [(4, 0), (5, 0), (6, 2), (9, 5)])
def test_long_lists_of_masked_words_are_folded(words, folded):
    """All are on the page, the first ones at sight; what opens the others needs no script and one click or key."""
    text = masked_words([many_words(words)] + SAMPLES["samples"] * 7)
    card, _, _ = text.partition("</article>")
    shown, _, hidden = card.partition("<details>")
    assert [shown.count("<tr>"), hidden.count("<tr>")] == [words - folded, folded]
    assert (f"<summary>{folded} more masked words</summary>" in hidden) == bool(folded)
    before, _, others = text.partition("<details><summary>4 more texts</summary>")
    assert [before.count("<article"), others.count("<article")] == [4, 4] and "<script" not in text


def test_what_lines_are_is_said_beside_the_picture_where_it_covers_none(run):
    page = Page(write_report(run))
    assert "training held-out word frequencies alone: 6.12" in page.words
    named = [attrs.get("class") for tag, attrs in page.elements if tag == "i"]
    assert named[:3] == ["c0", "c1", "bar"]
    style = (run / "report.html").read_text()
    assert all(f".c{n}{{color:{p['colours'][n]}}}" in style for p in PALETTES for n in range(4))
    curves = [Curve("训练", [1, 2, 3], [3.0, 2.0, 1.0]), Curve("x" * 300, [1, 3], [2.0, 2.0])]
    renamed = [curve._replace(name="other") for curve in curves]
    assert draw(curves, "loss", bar=Bar("a", 1.5)) == draw(renamed, "loss", bar=Bar("b" * 99, 1.5))
    assert draw(curves, "loss", bar=Bar("a", 1.5)) != draw(curves, "loss", bar=Bar("a", 1.7)) != draw(curves, "loss")
    assert legend(curves[:1]) == [] and legend(curves, Bar("a", 1)) == [("训练", 0), ("x" * 300, 1), ("a", None)]


def test_a_phone_gets_a_picture_that_it_can_read(run, drawings):
    """The wide one would be shrunk to a half: there is another for narrow screens, before it, for light and dark."""
    page = Page(write_report(run))
    sources = [attrs for tag, attrs in page.elements if tag == "source"][:3]
    assert [attrs["media"] for attrs in sources] == [
        "(max-width:34rem) and (prefers-color-scheme:dark)",
        "(max-width:34rem)",
        "(prefers-color-scheme:dark)",
    ]
    widths = [struct.unpack(">I", base64.b64decode(attrs["srcset"].partition(",")[2])[16:20])[0] for attrs in sources]
    assert widths[0] == widths[1] == 800 and widths[2] == 1480


def test_nothing_on_the_page_is_wider_than_a_phone():
    """By its rules: columns have no least width beyond 390 px but within the page's, text breaks anywhere."""
    narrow = STYLE.partition("@media(max-width:34rem)")[2]
    everything = "".join([STYLE, mlm.report.STYLE, clm.report.STYLE, classify_report.STYLE])
    for least in re.findall(r"minmax\((?!min\(|0)([^,]+),", everything):
        assert least == "8rem" and ".bars li{grid-template-columns:minmax(0,1fr) 4.2rem}" in narrow, least
    assert "overflow-wrap:anywhere" in STYLE.partition("body{")[2].partition("}")[0]
    assert ".guesses{width:100%;table-layout:fixed}" in mlm.report.STYLE and ".scroll{overflow-x:auto" in STYLE
    fixed = [float(size) * 16 for size in re.findall(r"[{;](?:min-)?width:([\d.]+)rem", everything)]
    assert fixed and max(fixed) < 390 - 2 * 16
    assert "nowrap" not in everything.replace("font-size:.75rem;white-space:nowrap", "")  # within what scrolls


@pytest.mark.parametrize(
    ("tokens", "language"),
    [
        ([" 系统", "调用", "の"] + ["文件"] * 9, "zh"),
        (["これは", "日本語", "です"], "ja"),
        ([" 한국어", " 文"], "ko"),
        ([" English", " 文"], '""'),
        ([" مرحبا"], '""'),
    ],
)
def test_text_is_marked_with_what_its_script_tells(tokens, language):
    text, expected = "".join(tokens), f"lang={language} dir=auto>"
    hidden = [{"index": 0, "truth": tokens[0], "guesses": []}]
    assert masked_words([{"tokens": [" [MASK]", *tokens[1:]], "masked": hidden}]).count(f"<article {expected}") == 1
    assert texts([text]).startswith(f"<blockquote {expected}")
    assert entries([("title", "", text)]).count(f"<p {expected}") == 1
    assert confusion_table(["yes", text], [[1, 2], [3, 4]]).count(f"<th {expected}{text}</th>") == 1


def test_long_settings_are_folded():
    files = [f"text/{number:04}.txt" for number in range(300)]
    assert f"<summary>300 values</summary>{', '.join(files)}</details>" in settings({"data": {"files": files}})
    assert "<details" not in settings({"files": files[:3]})


def test_a_run_as_tables(run):
    """Counted by hand from METRICS; what pandas is given has one name for a metric, and no nested value."""
    records = tables.metrics(run)
    assert len(records) == 42 and [record["split"] for record in records[-3:]] == [
        "training",
        "evaluation",
        "evaluation",
    ]
    assert records[-1] == {"step": 40, "split": "evaluation", "loss": 3.5, "accuracy": 0.5}
    assert records[0] == {"step": 1, "split": "training", "loss": 6.9, "learning_rate": 1e-3}
    write(run, config=CONFIG | {"data": {"files": ["a.txt"], "filters": {"near": None}}, "published": {"config": {}}})
    assert tables.settings(run) == {
        "task": "masked_lm",
        "steps": 40,
        "init_from": None,
        "optimizer.learning_rate": 0.0003,
        "optimizer.name": "adamw",
        "data.files": ["a.txt"],
        "data.filters.near": None,
    }
    with pytest.raises(UserError, match="no run in"):
        tables.metrics(run / "nowhere")


def test_a_run_that_was_extended_is_not_finished(run):
    write(run, config=CONFIG | {"steps": 60})
    (run / "metrics.jsonl").unlink()
    assert "Paused at step 40 of 60." in Page(write_report(run)).words


def test_a_folder_without_a_run_and_a_damaged_file_are_refused(run, tmp_path):
    with pytest.raises(UserError, match="no run in .*config.json"):
        write_report(tmp_path)
    (run / "samples.json").write_text("{")
    with pytest.raises(UserError, match="samples.json is damaged"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_the_command_takes_the_run_with_or_without_its_flag(run, capsys):
    for arguments in ([str(run), "--json"], ["--json", "--run-dir", str(run)]):
        cli.run_config(main, ReportConfig, prog="report", argv=arguments)
        printed = capsys.readouterr().out.splitlines()
        assert json.loads(printed[-1]) == {"report": str(run / "report.html"), "run_dir": str(run)}
    with pytest.raises(SystemExit) as exit:
        cli.run_config(main, ReportConfig, prog="report", argv=[])
    assert exit.value.code == 2 and "run-dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, limit, expected",
    [
        ("a  few\nwords", 240, "a few words"),
        ("one two three four", 13, "one two three …"),
        ("one two three four", 14, "one two three …"),
        ("语 料 " + "长" * 20, 10, "语 料 长长长长长长 …"),
        ("x" * 20, 10, "x" * 10 + " …"),
    ],
)
def test_a_text_is_cut_at_a_blank_near_the_limit_if_there_is_one(text, limit, expected):
    assert shortened(text, limit) == expected
