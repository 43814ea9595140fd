"""The figures of docs/serving.md are those of the committed report."""

from __future__ import annotations

import json

import pytest

from benchmarks.serving.table import DOCUMENT, REPORT, in_document, markdown


def test_the_document_is_what_the_committed_report_says() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert in_document(text, markdown(json.loads(REPORT.read_text(encoding="utf-8")))) == text, "run  python -m benchmarks.serving table"


def test_a_document_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="no marks"):
        in_document("# Serving", "figures")
