"""A contact sheet shows every picture, framed by whether it is right."""

from __future__ import annotations

import torch

from millrace.data.contact_sheet import contact_sheet


def test_pictures_stand_in_rows_in_frames_that_say_right_or_wrong() -> None:
    images = torch.rand(5, 3, 6, 10, generator=torch.Generator().manual_seed(0))
    right = [True, False, True, True, False]
    sheet = contact_sheet(images, [f"picture {i}" for i in range(5)], right, columns=3, zoom=2)
    rows, cols = sheet.shape[1] // 2, sheet.shape[2] // 3
    assert sheet.shape == (3, 2 * rows, 3 * cols)
    for index, image in enumerate(images):
        top, left = index // 3 * rows, index % 3 * cols
        cell = sheet[:, top : top + rows, left : left + cols]
        shown = cell[:, 4 : 4 + 12 : 2, 4 : 4 + 20 : 2]
        assert torch.allclose(shown, image, atol=0.5 / 255 + 1e-6)
        red, green, _ = cell[:, 2, 2].tolist()
        assert (green > red) == right[index]
        below = cell[:, 4 + 12 + 2 :, :]
        assert (below < 0.5).all(0).any()  # there is writing
    assert (sheet[:, rows:, 2 * cols :] == 1).all()  # no sixth picture


def test_grey_pictures_and_long_captions_fit() -> None:
    sheet = contact_sheet(torch.zeros(1, 1, 8, 8), ["a very long caption indeed"], [True], zoom=3)
    assert sheet.shape[2] == 8 * 3 + 8
    assert contact_sheet(torch.zeros(1, 1, 8, 8), [""], [True], zoom=3).shape == sheet.shape
