"""Names on pictures: letters beyond ASCII have shapes of their own, and long names end in an ellipsis."""

from pipeline.datasets.lettering import fitted, font


def test_letters_beyond_ascii_are_drawn() -> None:
    missing = bytes(font(20).getmask("\uffff"))
    shapes = [bytes(font(20).getmask(letter)) for letter in "aäÜçßőжλ"]
    assert missing not in shapes
    assert len(set(shapes)) == len(shapes)


def test_a_long_name_is_cut_to_its_place() -> None:
    assert fitted("Gefühle", 13, 200) == "Gefühle"
    for width in (20, 60, 120):
        cut = fitted("Über Orte und Ordner", 13, width)
        assert cut.endswith("…")
        assert font(13).getlength(cut) <= width
