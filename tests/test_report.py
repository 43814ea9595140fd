"""The sheet that `--compare` writes."""

from __future__ import annotations

import numpy as np
from PIL import Image

from sr3rt.images import read
from sr3rt.report import side_by_side


def test_a_picture_of_floats_is_shown_in_8_bits() -> None:
    grey = (np.arange(60, dtype=np.float32) / 59).reshape(6, 10)
    result = np.pad(grey.repeat(2, axis=0).repeat(2, axis=1), ((0, 0), (1, 0)), constant_values=1.001)[:, :20]
    sheet = np.asarray(side_by_side(read(Image.fromarray(grey)), Image.fromarray(result)))
    assert sheet.shape == (12, 3 * 20 + 8, 3)
    assert np.array_equal(sheet[::2, :20:2, 0], np.round(255 * grey))
    assert np.array_equal(sheet[:, 48:, 0], np.round(255 * result.clip(0, 1)))
