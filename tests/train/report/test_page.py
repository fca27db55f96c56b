"""The pieces of the page: whatever the text is, the markup stays ours."""
from hypothesis import given
from hypothesis import strategies as st

from r1zero.train.report import page

from .report_cases import Tags


@given(st.text(max_size=60))
def test_page_pieces_escape_any_text(text):
    made = page.document(text, [page.section(text, page.table([text], [[text]])), page.cards([(text,) * 3]),
                                page.tokens([text], text, text, -0.5), page.response(text, True, text, text)])
    seen = Tags(made.encode("utf-8").decode("utf-8"))
    assert set(seen.tags) <= {"html", "head", "meta", "title", "style", "body", "section", "h2", "div",
                              "table", "tr", "th", "td", "b", "span", "p", "br"}
    assert [seen.tags.count(tag) for tag in ("p", "table", "section", "title")] == [1, 1, 1, 1]
