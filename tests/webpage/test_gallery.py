"""The gallery shows the map and the sentences of every run."""

from __future__ import annotations

import pytest

from cosprobe.evaluation import Grid
from cosprobe.webpage.gallery import main, page
from cosprobe.webpage.sentences import sentences
from tests.examples.pages import result

pytestmark = pytest.mark.slow


def test_every_run_has_its_map_and_sentences(tmp_path):
    folder = result(tmp_path / "example")
    (folder / "report" / "headline.png").write_bytes(b"a map")
    (tmp_path / "figures").mkdir()
    text = page([("mine", folder), ("other", folder)], tmp_path / "figures")
    for said in sentences(Grid.load(folder), "in the package", "maze"):
        assert text.count(said) == 2
    for name in ("mine", "other"):
        assert f"figures/gallery-{name}.png" in text and f"## {name}\n" in text
        assert (tmp_path / "figures" / f"gallery-{name}.png").read_bytes() == b"a map"
    main([str(tmp_path / "gallery.md"), f"mine={folder}", f"other={folder}"])
    assert (tmp_path / "gallery.md").read_text() == text


def test_a_run_without_a_map_is_refused(tmp_path, capsys):
    folder = result(tmp_path / "example")
    (folder / "report" / "headline.png").unlink(missing_ok=True)
    with pytest.raises(SystemExit):
        main([str(tmp_path / "gallery.md"), f"mine={folder}"])
    assert "headline.png' is missing" in capsys.readouterr().err and not (tmp_path / "gallery.md").exists()
