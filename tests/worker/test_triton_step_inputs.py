"""The decode step's inputs as the device puts them together, against the same by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from triton_interpreter import DEVICE

from microvllm.ops.gpu.step_inputs import STAGED, prepare_decode


@pytest.mark.parametrize("pools", [1, 3])
def test_inputs_of_a_decode_step(pools: int) -> None:
    random = np.random.default_rng(3)
    num_rows, width, page, batch = 9, 1500, 16, 6
    tables = random.integers(1, 10_000, (pools, num_rows, width)).astype(np.int32)
    newest = random.integers(0, 1000, num_rows)
    rows = np.array([7, 0, 3, 5, 8, 8])  # the last two are padding
    lens = np.array([1, 16, 17, width * page, 0, 0])
    ids = np.array([11, -1, -1, 5, 0, 0])
    new = {0: (0, 77), 2: (1, 88), 3: (width - 1, 99)}  # a block that begins with this token
    staged = np.zeros((STAGED + pools, batch), np.int32)
    staged[0], staged[1], staged[2], staged[3], staged[4] = rows, ids, np.maximum(lens - 1, 0), lens, -1
    staged[5] = [3, 4, 5, 6, -1, -1]
    expected = tables.copy()
    for i, (column, block) in new.items():
        blocks = block + 1000 * np.arange(pools)
        staged[4, i], staged[STAGED:, i], expected[:, rows[i], column] = column, blocks, blocks
    on_device = torch.from_numpy(tables).to(DEVICE)
    made = prepare_decode(
        torch.from_numpy(staged).to(DEVICE), on_device, torch.from_numpy(newest).to(DEVICE), page
    )
    assert np.array_equal(on_device.cpu().numpy(), expected)
    assert made.rows.tolist() == rows.tolist() and made.lens.tolist() == lens.tolist()
    assert made.places.tolist() == staged[5].tolist()
    assert made.ids.tolist() == [11, newest[0], newest[3], 5, 0, 0]
    assert made.positions.tolist() == np.maximum(lens - 1, 0).tolist()
    for i in range(batch):
        if lens[i] == 0:
            assert (made.slots[:, i] == -1).all()
            continue
        last = lens[i] - 1
        own = expected[:, rows[i], last // page] * page + last % page
        assert made.slots[:, i].tolist() == own.tolist()
        used = -(-lens[i] // page)
        assert made.blocks[:, i, :used].tolist() == expected[:, rows[i], :used].tolist()
