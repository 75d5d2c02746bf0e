"""barrier_diffusers/evaluation/report.py: one self-contained page about one run or several."""

import base64
import re

import pytest
from report import ReportConfig, main
from written_runs import share, write_certificate, write_run

from barrier_diffusers.evaluation.report import read_run, render
from barrier_diffusers.utils.command_line import run_script


def test_the_page_has_the_numbers_and_needs_no_other_file(tmp_path):
    run = write_run(tmp_path / "run")
    write_certificate(run)
    main(ReportConfig([str(run)]))
    page = (run / "report.html").read_text()
    for wanted in ("90.0", "59.6 to 98.2", "2.0", "98 %", "0.25", "0.125", "0.0625", "0.03125", "&#34;seed&#34;: 7"):
        assert wanted in page, wanted
    for wanted in ("3 of 4 <small>(19.0 to 99.0 %)", "<td>2.00</td>", "seed 11", "contradict the bound of attn2.to_k"):
        assert wanted in page, wanted
    assert re.search(r"attn2\.to_k.*?>no<", page, re.S)  # a bound that did not hold is not hidden
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 3 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert all(base64.b64decode(source.split(",")[1]).startswith(b"\x89PNG") for source in sources)
    assert len(re.findall(r"<img [^>]*alt=\"[^\"]+\"", page)) == 3


def test_names_from_data_are_text(tmp_path):
    page = render([read_run(write_run(tmp_path / "run"))])
    assert "<b>sneaker</b>" not in page and "&lt;b&gt;sneaker&lt;/b&gt;" in page


def test_runs_beside_each_other_and_attacks(tmp_path):
    attack = {"attack": "inversion", "concept": "bag", "budget": {"num_steps": 321}}
    attack |= {
        "searches": [
            {"words": "<i>b", "loss": 0.25, "plain_loss": 0.5},
            {"words": "a", "loss": 0.125, "plain_loss": 0.5},
        ]
    }
    attack |= {"pre_attack": share(0.0, 0.0, 27.8), "post_attack": share(40.0, 16.8, 68.7)}
    runs = [write_run(tmp_path / "one"), write_run(tmp_path / "two", concept="bag", attacks=[attack])]
    main(ReportConfig([str(run) for run in runs], str(tmp_path / "both.html")))
    page = (tmp_path / "both.html").read_text()
    assert page.count("<h2>") == 2 and "num_steps 321" in page and "16.8 to 68.7" in page
    assert page.index("&ldquo;a&rdquo; (loss 0.125") < page.index("&ldquo;&lt;i&gt;b&rdquo; (loss 0.25")
    assert page.count("<h3>Attacks</h3>") == 1 and "Certificate" not in page


def test_runs_are_named_one_after_another(tmp_path, monkeypatch, capsys):
    folders = [str(write_run(tmp_path / name)) for name in ("one", "two")]
    target = str(tmp_path / "both.html")
    monkeypatch.setattr("sys.argv", ["report.py", "--compare", *folders, "--output", target])
    run_script(main, ReportConfig)
    assert (tmp_path / "both.html").read_text().count("<h2>") == 2
    monkeypatch.setattr("sys.argv", ["report.py", "--compare", folders[0]])
    run_script(main, ReportConfig)
    assert str(tmp_path / "one" / "report.html") in capsys.readouterr().out


def test_the_interval_of_the_drop(tmp_path):
    """Newcombe: each side's distance is the root of the squares of the two Wilson distances, before and after."""
    low, high = read_run(write_run(tmp_path / "run")).drop_interval
    assert low == pytest.approx(2 - (7**2 + 3**2) ** 0.5) and high == pytest.approx(2 + (2**2 + 7**2) ** 0.5)


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "holds no metrics.json"), ("{", "no readable JSON"), ("[]", "no record of a run")],
)
def test_a_folder_without_a_run_is_named(content, said, tmp_path):
    if content is not None:
        (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(ValueError, match=said):
        main(ReportConfig([str(tmp_path)], str(tmp_path / "page.html")))
    assert not (tmp_path / "page.html").exists()


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="compare is empty"):
        ReportConfig([])
    with pytest.raises(ValueError, match="must end in .html"):
        ReportConfig(["x"], "page.pdf")
